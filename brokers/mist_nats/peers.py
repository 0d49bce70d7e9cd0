"""What one might use instead of this adapter: nats-py, as its documents advise, for `mist bench --peers`.

Each works on a stream of its own that it makes and removes, whose messages carry no ids and no headers, and gives the
seconds of the work itself.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import nats
from nats.js.api import ConsumerConfig, StreamConfig

from mist.protocol import codec
from mist.protocol.url import parse_url
from mist_nats.url import options

WINDOW = 256
"""How many acknowledgements of publish_async are outstanding."""
TIMEOUT_S = 60.0


@asynccontextmanager
async def _stream(url: str) -> AsyncIterator[tuple[Any, str]]:
    """A connection's JetStream context and a stream; its subject is `<stream>.x`."""
    given = options(parse_url(url))
    client = await nats.connect(servers=list(given.servers), **given.client)
    name = f"mist-peer-{secrets.token_hex(4)}"
    try:
        js = client.jetstream(timeout=TIMEOUT_S, publish_async_max_pending=WINDOW, domain=given.domain or None)
        await js.add_stream(StreamConfig(name=name, subjects=[f"{name}.>"], num_replicas=given.replicas or 1))
        try:
            yield js, name
        finally:
            await js.delete_stream(name)
    finally:
        await client.close()


async def _fill(js: Any, name: str, bodies: Sequence[bytes]) -> None:
    for body in bodies:
        await js.publish_async(f"{name}.x", body)
    await js.publish_async_completed()


async def publish_async(url: str, bodies: Sequence[bytes], batch: int) -> float:
    """`publish_async` with a window; `batch` has no meaning to it."""
    async with _stream(url) as (js, name):
        start = time.perf_counter()
        await _fill(js, name, bodies)
        return time.perf_counter() - start


async def fetch(url: str, bodies: Sequence[bytes], batch: int) -> float:
    """A pull subscription: `fetch(batch)`, decode, an ack each."""
    decode = codec.decode
    async with _stream(url) as (js, name):
        await _fill(js, name, bodies)
        config = ConsumerConfig(max_ack_pending=100_000)
        sub = await js.pull_subscribe(f"{name}.x", durable="peer", stream=name, config=config)
        n = 0
        start = time.perf_counter()
        while n < len(bodies):
            some = await sub.fetch(batch, timeout=TIMEOUT_S)
            for m in some:
                decode(m.data)
                await m.ack()
            n += len(some)
        took = time.perf_counter() - start
        await sub.unsubscribe()
        return took


Peer = Callable[[str, Sequence[bytes], int], Awaitable[float]]
PUBLISHING: dict[str, Peer] = {f"peer: nats-py publish_async({WINDOW})": publish_async}
CONSUMING: dict[str, Peer] = {"peer: nats-py fetch, decode, ack each": fetch}
