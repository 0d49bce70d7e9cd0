"""MIST over Redis Streams: `redis://`, `rediss://`, `redis+sentinel://`, `redis+cluster://`.

A stream is a Redis stream under its own name, readable with `redis-cli XRANGE`; consumers are consumer groups. What
must be one step is one script inside the server. Tried with Redis 6.2, Redis 7.0 and Valkey 9.

    async with mist.connect("redis://localhost:6379/0") as broker:
        stream = await broker.open("trace")

docs/how-to/use-redis.md says what an operator sees and which durability the server gives.
"""

from __future__ import annotations

import hiredis  # noqa: F401 - the extra brings it; without it the registry says how to install it

from mist.protocol.url import Url
from mist_redis.broker import RedisBroker
from mist_redis.link import Link
from mist_redis.url import parse

__all__ = ["RedisBroker", "connect"]


async def connect(url: Url) -> RedisBroker:
    """The door that the entry points name. Raises InvalidArgument, Unavailable, NotAuthorised, Unsupported."""
    broker = RedisBroker(url.redacted(), Link(parse(url)))
    try:
        await broker.begin()
    except BaseException:
        await broker.aclose()
        raise
    return broker
