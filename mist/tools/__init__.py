"""The tools that stand on the stream: strangers to one another, composed only by the command line."""
