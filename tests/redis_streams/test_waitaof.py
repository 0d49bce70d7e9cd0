"""A WAITAOF that answers too early is no promise: `power` on an everysec server only where it waits."""

from __future__ import annotations

from typing import Any

import pytest

import mist
from mist.broker.base import StreamConfig
from mist.errors import InvalidArgument
from mist.testing.servers import run_redis
from mist_redis.durability import facts
from tests.conftest import run


@pytest.mark.parametrize(
    ("server", "waits"),
    [
        ("redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:9.1.2\r\n", False),
        ("redis_version:7.2.7\r\n", False),
        ("redis_version:7.4.2\r\n", False),
        ("redis_version:8.0.0\r\n", True),
        ("redis_version:8.2.1\r\n", True),
        ("", False),
    ],
)
def test_whether_waitaof_is_relied_on(server: str, waits: bool) -> None:
    """redis/redis#13793 was mended in Redis 8; Valkey 9.1.2 has it."""
    settings = {"appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction"}
    replies: list[Any] = [[k.encode(), v.encode()] for k, v in settings.items()]
    replies += [[b"min-replicas-to-write", b"0"], b"aof_enabled:1\r\n", b"connected_slaves:0\r\n", server.encode()]
    replies.append([[b"waitaof", -4]])
    found = facts(replies)
    assert (found.level, found.waitaof) == ("process", waits)


def test_power_is_refused_where_it_would_not_be_given() -> None:
    """`make power-cut` lost what such a stream had acknowledged."""

    async def main(url: str) -> None:
        async with mist.connect(url) as broker:
            with pytest.raises(InvalidArgument, match="cannot give durability 'power'"):
                await broker.open("s", config=StreamConfig(durability="power"))
            assert (await (await broker.open("s")).info()).durability == "process"

    with run_redis(flavour="valkey", appendfsync="everysec") as server:
        run(main(server.url))
