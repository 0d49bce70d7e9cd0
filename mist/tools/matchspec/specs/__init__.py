"""From the tables of a suite's files to its shapes. Everything here notes problems and raises none."""
