"""One NATS server per test process, shared by all tests that need no server of their own."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

from mist.testing.servers import MissingServer, run_nats

_stack = ExitStack()
_url = ""


def shared_url() -> str:
    """The URL of this process's server, started at first use. Skips the test where there is none; a failure in CI."""
    global _url
    if not _url:
        try:
            _url = _stack.enter_context(run_nats()).url
        except MissingServer as exc:
            if os.environ.get("CI"):
                raise
            pytest.skip(str(exc))
    return _url


def pytest_sessionfinish() -> None:
    _stack.close()


@pytest.fixture
def nats_url() -> str:
    return shared_url()
