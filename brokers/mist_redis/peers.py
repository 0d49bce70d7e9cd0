"""What one might use instead of this adapter: redis-py, as its documents advise, for `mist bench --peers`.

Each works on a key of its own that it removes, whose entries carry no ids, and gives the seconds of the work itself.
redis-py speaks RESP2 with hiredis, its fastest setting.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis

from mist.errors import Unsupported
from mist.protocol import codec
from mist.protocol.url import parse_url
from mist_redis.url import parse

GROUP = "peer"


@asynccontextmanager
async def _key(url: str) -> AsyncIterator[tuple[Any, str]]:
    given = parse(parse_url(url))
    if given.kind != "single" or given.tls:
        raise Unsupported("peers", "redis", hint="compare on one plain server: redis://host:port")
    host, port = given.hosts[0]
    client = Redis(
        host=host, port=port, db=given.db, username=given.user or None, password=given.password or None, protocol=2
    )
    key = f"{given.prefix}mist-peer-{secrets.token_hex(4)}"
    try:
        yield client, key
    finally:
        await client.delete(key)
        await client.aclose()


async def _fill(client: Any, key: str, bodies: Sequence[bytes], batch: int) -> None:
    for i in range(0, len(bodies), batch):
        async with client.pipeline(transaction=False) as pipe:
            for body in bodies[i : i + batch]:
                pipe.xadd(key, {"data": body})
            await pipe.execute()


async def pipeline(url: str, bodies: Sequence[bytes], batch: int) -> float:
    """XADD in pipelines of `batch`."""
    async with _key(url) as (client, key):
        start = time.perf_counter()
        await _fill(client, key, bodies, batch)
        return time.perf_counter() - start


async def group(url: str, bodies: Sequence[bytes], batch: int) -> float:
    """XREADGROUP of `batch`, decode, one XACK for all of them."""
    decode = codec.decode
    async with _key(url) as (client, key):
        await _fill(client, key, bodies, 1000)
        await client.xgroup_create(key, GROUP, "0")
        n = 0
        start = time.perf_counter()
        while n < len(bodies):
            entries = (await client.xreadgroup(GROUP, "me", {key: ">"}, count=batch))[0][1]
            for _, fields in entries:
                decode(fields[b"data"])
            await client.xack(key, GROUP, *[i for i, _ in entries])
            n += len(entries)
        return time.perf_counter() - start


Peer = Callable[[str, Sequence[bytes], int], Awaitable[float]]
PUBLISHING: dict[str, Peer] = {"peer: redis-py pipeline of XADD, no ids": pipeline}
CONSUMING: dict[str, Peer] = {"peer: redis-py XREADGROUP, decode, XACK": group}
