"""`python -m mist` is `mist`."""

from __future__ import annotations

import sys

from mist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
