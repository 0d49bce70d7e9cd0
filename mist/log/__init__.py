"""`log:` the embedded durable broker."""
