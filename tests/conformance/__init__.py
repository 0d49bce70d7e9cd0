"""The conformance suite run over our own brokers, and proof that it bites. A package: its files carry backend names."""
