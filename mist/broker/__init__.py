"""The durable contract (base.py) and what is written once above it."""
