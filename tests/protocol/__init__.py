"""The protocol: values and bytes, no I/O."""
