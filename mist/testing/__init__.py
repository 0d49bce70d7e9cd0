"""Shipped test helpers: conformance suites, fake clock, fault injection. Nothing in mist imports this."""
