"""Pure values and bytes, no I/O: envelope, payload types, codec, versions, trace context, subjects, URLs."""
