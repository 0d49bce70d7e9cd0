"""Fuzzing: `python -m tests.fuzz --seconds 60`, or one target by name: `python -m tests.fuzz.envelope`.

A target is a module of this package with `TARGET = Target(...)`; its name in `driver.TARGETS` puts it into the whole
run, the campaign and the short run of the tests.
"""
