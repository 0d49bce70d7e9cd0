"""`make bench`: speed against peers, in the same run, interleaved, medians. `python -m bench --help`."""
