"""The tools: strangers to one another, composed only by the command line."""
