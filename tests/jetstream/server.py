"""One NATS server per test process, for all tests that need no server of their own."""

from __future__ import annotations

import atexit
import os
from contextlib import ExitStack

import pytest

from mist.testing.servers import MissingServer, run_nats

_stack = ExitStack()
_url = ""
atexit.register(_stack.close)


def shared_url() -> str:
    """Its URL; started at first use. Where there is none the test is skipped, or fails when CI is set."""
    global _url
    if not _url:
        try:
            _url = _stack.enter_context(run_nats()).url
        except MissingServer as exc:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(exc))
    return _url
