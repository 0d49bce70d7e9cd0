"""What a service needs around its work. Imports mist.errors only."""
