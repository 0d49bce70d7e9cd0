"""The same work as bench.ours with redis-py and with FastStream, as their documents advise it.

They work on a stream of their own, `peer`. redis-py speaks RESP2 with hiredis, its fastest setting. FastStream's
consumers read what FastStream published.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import redis.asyncio as redis
from faststream.redis import RedisBroker, StreamSub

from bench.common import counting
from mist.protocol import codec
from mist_redis import peers

STREAM, GROUP = "peer", "peer-group"
STREAM_FASTSTREAM = "peer-faststream"


async def pipeline(url: str, bodies: list[bytes]) -> float:
    """redis-py: XADD in pipelines of 1000, without ids and without a check."""
    return len(bodies) / await peers.pipeline(url, bodies, 1000)


async def faststream_each(url: str, bodies: list[bytes]) -> float:
    """FastStream `publish(stream=)`, each awaited."""
    broker = RedisBroker(url, logger=None)
    await broker.connect()
    try:
        start = time.perf_counter()
        for body in bodies:
            await broker.publish(body, stream=STREAM_FASTSTREAM, maxlen=1_000_000)
        return len(bodies) / (time.perf_counter() - start)
    finally:
        await broker.stop()


async def fill(url: str, bodies: list[bytes], count: int) -> None:
    """The stream for redis-py's replay."""
    client = redis.Redis.from_url(url)
    await client.delete(STREAM)
    for i in range(0, count, 1000):
        async with client.pipeline(transaction=False) as pipe:
            for j in range(i, min(i + 1000, count)):
                pipe.xadd(STREAM, {"data": bodies[j % len(bodies)]})
            await pipe.execute()
    await client.aclose()


async def fill_faststream(url: str, bodies: list[bytes], count: int) -> None:
    """The stream for FastStream's consumers, written by FastStream."""
    client = redis.Redis.from_url(url)
    await client.delete(STREAM_FASTSTREAM)
    await client.aclose()
    broker = RedisBroker(url, logger=None)
    await broker.connect()
    for i in range(0, count, 50):  # its pool raises above 100 connections
        some = [bodies[j % len(bodies)] for j in range(i, min(i + 50, count))]
        await asyncio.gather(*(broker.publish(b, stream=STREAM_FASTSTREAM) for b in some))
    await broker.stop()


async def group(url: str, bodies: list[bytes]) -> float:
    """redis-py: XREADGROUP of 1000, decode, one XACK of 1000."""
    return len(bodies) / await peers.group(url, bodies, 1000)


async def replay(url: str, count: int) -> float:
    """redis-py: XRANGE of 1000 from the middle, decoded."""
    decode = codec.decode
    client = redis.Redis.from_url(url, protocol=2)
    try:
        whole = await client.xlen(STREAM)
        skipped = whole - count
        at: Any = b"-"
        while skipped > 0:
            entries: Any = await client.xrange(STREAM, at, "+", count=min(skipped, 100_000))
            at = b"(" + entries[-1][0]
            skipped -= len(entries)
        n = 0
        start = time.perf_counter()
        while n < count:
            entries = await client.xrange(STREAM, at, "+", count=1000)
            for _, fields in entries:
                decode(fields[b"data"])
            n += len(entries)
            at = b"(" + entries[-1][0]
        return n / (time.perf_counter() - start)
    finally:
        await client.aclose()


async def faststream_batch(url: str, count: int) -> float:
    """FastStream: a group's subscriber in batches of 1000, the JSON decoded by it."""
    client = redis.Redis.from_url(url)
    await client.xgroup_create(STREAM_FASTSTREAM, GROUP, "0")
    broker = RedisBroker(url, logger=None)
    done = asyncio.get_running_loop().create_future()
    left = count
    sub = StreamSub(STREAM_FASTSTREAM, group=GROUP, consumer="me", batch=True, max_records=1000)

    @broker.subscriber(stream=sub)
    async def handle(messages: list[dict[str, Any]]) -> None:
        nonlocal left
        left -= len(messages)
        if left <= 0 and not done.done():
            done.set_result(None)

    start = time.perf_counter()
    await broker.start()
    try:
        await asyncio.wait_for(done, 120)
        return count / (time.perf_counter() - start)
    finally:
        await broker.stop()
        await client.xgroup_destroy(STREAM_FASTSTREAM, GROUP)
        await client.aclose()


async def subscribe(url: str, count: int, seen: Any, ready: Any) -> None:
    """FastStream: call `seen(body)` for each of `count` messages; for the latency of a follower."""
    client = redis.Redis.from_url(url)
    await client.delete(STREAM_FASTSTREAM)
    await client.xgroup_create(STREAM_FASTSTREAM, GROUP, "0", mkstream=True)
    await client.aclose()
    broker = RedisBroker(url, logger=None)
    handle, done = counting(count, seen)
    broker.subscriber(stream=StreamSub(STREAM_FASTSTREAM, group=GROUP, consumer="me", polling_interval=100))(handle)
    await broker.start()
    ready()
    await done
    await broker.stop()
