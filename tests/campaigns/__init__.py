"""Campaigns: the promises of docs/explanation/durability.md under faults. `python -m tests.campaigns.run --help`."""
