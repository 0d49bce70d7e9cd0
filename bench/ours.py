"""What MIST does in the benchmarks of the servers: through the contract and a URL, never round it.

Each function runs on the loop it is called on and gives records per second of the work itself: connecting, making the
stream and the batches is not timed.
"""

from __future__ import annotations

import asyncio
import time

import mist
from bench.common import batches, messages
from mist import Message
from mist.broker.base import Broker, Stream
from mist.protocol import codec

STREAM = "bench"


async def remade(broker: Broker, name: str = STREAM) -> Stream:
    """A new, empty stream of that name."""
    if name in await broker.streams():
        await broker.delete(name)
    return await broker.open(name)


async def append(stream: Stream, items: list[Message], *, callers: int = 2, batch: int = 1000) -> float:
    """Acknowledged appends in batches, `callers` batches in flight."""
    todo = batches(items, batch)
    todo.reverse()

    async def caller() -> None:
        while todo:
            await stream.append(todo.pop())

    start = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return len(items) / (time.perf_counter() - start)


async def publish(url: str, items: list[Message], *, callers: int = 2) -> float:
    async with mist.connect(url) as broker:
        stream = await remade(broker)
        done = await append(stream, items, callers=callers)
        assert (await stream.info()).records == len(items)
        return done


async def fill(url: str, count: int, name: str = STREAM) -> None:
    """`count` records, in a stream of that name, ids counted up."""
    items = messages(50_000)
    async with mist.connect(url) as broker:
        stream = await remade(broker, name)
        for done in range(0, count, len(items)):
            some = items[: min(len(items), count - done)]
            await append(stream, [Message(m.subject, m.data, f"{done + i:032x}") for i, m in enumerate(some)])


async def consume(url: str, count: int, consumer: str) -> float:
    """Fetches of 1000; every record is decoded and acknowledged."""
    decode = codec.decode
    async with mist.connect(url) as broker:
        stream = await broker.open(STREAM, create=False)
        mine = await stream.consumer(consumer, mist.ConsumerConfig(ack_wait_s=60, pending_max=100_000))
        n = 0
        start = time.perf_counter()
        while n < count:
            deliveries = await mine.fetch(limit=1000, wait_s=10)
            for d in deliveries:
                decode(d.record.data)
            n += await mine.ack(deliveries)
        took = time.perf_counter() - start
        assert (await mine.info()).lag == 0
        await mine.delete()
        return n / took


async def replay(url: str, *, after: int, count: int, limit: int = 1000) -> float:
    """Pages of 1000 from a position, every record decoded."""
    decode = codec.decode
    async with mist.connect(url) as broker:
        stream = await broker.open(STREAM, create=False)
        await stream.read(after=0, limit=1)
        n = 0
        start = time.perf_counter()
        while n < count:
            page = await stream.read(after=after, limit=min(limit, count - n))
            for r in page.records:
                decode(r.data)
            n += len(page.records)
            after = page.scanned
        return n / (time.perf_counter() - start)


async def first_record(url: str, *, around: int, tries: int = 15) -> float:
    """Milliseconds from a position to its first record, the stream being open; a new position each time. The median."""
    async with mist.connect(url) as broker:
        stream = await broker.open(STREAM, create=False)
        await stream.read(after=0, limit=1)
        times = []
        for i in range(tries):
            start = time.perf_counter()
            page = await stream.read(after=around + 7 * i, limit=1)
            times.append((time.perf_counter() - start) * 1000)
            assert page.records
        return sorted(times)[tries // 2]
