"""The same work as bench.ours with nats-py and with FastStream, as their documents advise it.

They work on a stream of their own, `peer` on the subject `peer.x`, whose messages carry no ids and no headers: that
is what they publish, and it is less to parse than what MIST stores.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import nats
from faststream.nats import JStream, NatsBroker
from nats.js.api import ConsumerConfig, RetentionPolicy, StreamConfig

from bench.common import counting
from mist.protocol import codec
from mist_nats import peers

STREAM, SUBJECT = "peer", "peer.x"


def plain(url: str) -> str:
    """The URL without our parameters."""
    return url.partition("?")[0]


async def remade(js: Any) -> None:
    with contextlib.suppress(nats.js.errors.NotFoundError):
        await js.delete_stream(STREAM)
    await js.add_stream(StreamConfig(name=STREAM, subjects=[f"{STREAM}.>"], retention=RetentionPolicy.LIMITS))


async def publish_async(url: str, bodies: list[bytes]) -> float:
    """nats-py `publish_async`, at most 256 acknowledgements outstanding."""
    return len(bodies) / await peers.publish_async(url, bodies, 0)


async def _faststream(url: str, bodies: list[bytes], at_once: int) -> float:
    nc = await nats.connect(plain(url))
    await remade(nc.jetstream())
    await nc.close()
    broker = NatsBroker(plain(url))
    await broker.connect()
    try:
        start = time.perf_counter()
        if at_once == 1:
            for body in bodies:
                await broker.publish(body, SUBJECT, stream=STREAM, timeout=60)
        else:
            for i in range(0, len(bodies), at_once):
                some = bodies[i : i + at_once]
                await asyncio.gather(*(broker.publish(b, SUBJECT, stream=STREAM, timeout=60) for b in some))
        return len(bodies) / (time.perf_counter() - start)
    finally:
        await broker.stop()


async def faststream_gather(url: str, bodies: list[bytes]) -> float:
    """FastStream `publish(stream=)`, 256 in `asyncio.gather`."""
    return await _faststream(url, bodies, 256)


async def faststream_each(url: str, bodies: list[bytes]) -> float:
    """FastStream `publish(stream=)`, each awaited."""
    return await _faststream(url, bodies, 1)


async def fill(url: str, bodies: list[bytes], count: int) -> None:
    """The peers' stream, `count` messages."""
    nc = await nats.connect(plain(url))
    js = nc.jetstream(timeout=60, publish_async_max_pending=4000)
    await remade(js)
    for i in range(count):
        await js.publish_async(SUBJECT, bodies[i % len(bodies)])
    await js.publish_async_completed()
    await nc.close()


async def fetch(url: str, bodies: list[bytes]) -> float:
    """nats-py pull consumer: `fetch(1000)`, decode, an ack each."""
    return len(bodies) / await peers.fetch(url, bodies, 1000)


async def faststream_push(url: str, count: int) -> float:
    """FastStream's default subscriber (push, its own ack after each), the JSON decoded by it."""
    broker = NatsBroker(plain(url), logger=None)
    handle, done = counting(count)
    broker.subscriber(SUBJECT, stream=JStream(STREAM, declare=False))(handle)
    start = time.perf_counter()
    await broker.start()
    try:
        await asyncio.wait_for(done, 120)
        return count / (time.perf_counter() - start)
    finally:
        await broker.stop()


async def ordered(url: str, *, after: int, count: int) -> float:
    """nats-py's ordered consumer from a sequence, decoded."""
    decode = codec.decode
    nc = await nats.connect(plain(url))
    try:
        js = nc.jetstream(timeout=60)
        start = time.perf_counter()
        sub = await js.subscribe(
            SUBJECT, stream=STREAM, ordered_consumer=True, pending_msgs_limit=2_000_000, pending_bytes_limit=2**31,
            config=ConsumerConfig(deliver_policy=nats.js.api.DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=after + 1),
        )  # fmt: skip
        for _ in range(count):
            decode((await sub.next_msg(10)).data)
        took = time.perf_counter() - start
        await sub.unsubscribe()
        return count / took
    finally:
        await nc.close()


async def subscribe(url: str, count: int, seen: Any, ready: Any) -> None:
    """FastStream: call `seen(body)` for each of `count` messages; for the latency of a follower."""
    nc = await nats.connect(plain(url))
    await remade(nc.jetstream())
    await nc.close()
    broker = NatsBroker(plain(url), logger=None)
    handle, done = counting(count, seen)
    broker.subscriber(SUBJECT, stream=JStream(STREAM, declare=False))(handle)
    await broker.start()
    ready()
    await done
    await broker.stop()
