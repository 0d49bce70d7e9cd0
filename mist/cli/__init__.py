"""The `mist` command line: a thin shell over the contract. Nothing in the library imports this package."""
