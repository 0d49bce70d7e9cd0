"""`python -m tests.fuzz [--seconds 60] [--seed N] [TARGET...]`: all targets, or the named ones."""

from __future__ import annotations

import sys

from tests.fuzz.driver import main

if __name__ == "__main__":
    sys.exit(main())
