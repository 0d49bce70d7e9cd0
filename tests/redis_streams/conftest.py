"""Servers for these tests: real ones, one shared per test process, own ones where a test kills, pauses or configures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from conftest import missing
from redis import Redis

from mist.kit.local import RedisServer
from mist.testing.servers import MissingServer, run_redis

Start = Callable[..., RedisServer]


@pytest.fixture(scope="session")
def shared() -> Iterator[RedisServer]:
    """A Valkey that nobody kills; stream names are the tests' own."""
    try:
        with run_redis(own_process=True, flavour="valkey", appendfsync="everysec") as server:
            assert isinstance(server, RedisServer)
            yield server
    except MissingServer as exc:
        missing(str(exc))


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a server of this test's own: `start(appendfsync="off", extra=[…])`."""
    with ExitStack() as stack:

        def begin(**options: object) -> RedisServer:
            options.setdefault("flavour", "valkey")
            options.setdefault("appendfsync", "everysec")
            try:
                server = stack.enter_context(run_redis(own_process=True, **options))  # type: ignore[arg-type]
            except MissingServer as exc:
                missing(str(exc))
            assert isinstance(server, RedisServer)
            return server

        yield begin


@pytest.fixture
def plain(shared: RedisServer) -> Iterator[Redis]:
    """redis-py, as anybody else would use the shared server."""
    with Redis(port=shared.port) as redis:
        yield redis
