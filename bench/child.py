"""The other processes of the benchmarks: `python -m bench.child ROLE DIR …`. Each says "ready" and then does its part."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import mist
from bench import ours
from bench.common import encoded, messages
from mist import Message
from mist.broker.cursor import Cursor
from mist.log.watch import _inotify
from mist.protocol import codec


def say(*words: object) -> None:
    print(*words, flush=True)


async def append(path: str) -> None:
    """Append for ever, to be killed."""
    async with mist.connect(f"log:{path}") as broker:
        stream = await broker.open("s")
        items = messages(1000)
        n = time.time_ns()
        while True:
            await stream.append([Message(m.subject, m.data, f"{n + i:032x}") for i, m in enumerate(items[:100])])
            n += 1000
            say("appended")


async def replay(path: str, count: int) -> None:
    async with mist.connect(f"log:{path}") as broker:
        stream = await broker.open("s", create=False)
        n = 0
        async for record in Cursor(stream).replay():
            codec.decode(record.data)
            n += 1
        assert n >= count
    say(resident_mb() * 1024)


async def consume(path: str, name: str) -> None:
    async with mist.connect(f"log:{path}") as broker:
        stream = await broker.open("s", create=False)
        consumer = await stream.consumer(name, mist.ConsumerConfig(ack_wait_s=60))
        say("ready")
        sys.stdin.readline()
        n = 0
        worst = 0.0
        while True:
            start = time.perf_counter()
            deliveries = await consumer.fetch(limit=1000)
            fetched = time.perf_counter()
            if not deliveries:
                break
            n += len(deliveries)
            await consumer.ack(deliveries)
            worst = max(worst, fetched - start, time.perf_counter() - fetched)
        say(n, worst * 1000, time.perf_counter())


def percentiles(times: list[float]) -> str:
    ordered = sorted(times)
    return f"{ordered[len(ordered) // 2]:.1f} {ordered[int(len(ordered) * 0.99)]:.1f}"


async def follow(path: str, count: int) -> None:
    async with mist.connect(f"log:{path}") as broker:
        stream = await broker.open("s")
        say("ready")
        after = 0
        times: list[float] = []
        while after < count:
            page = await stream.read(after=after, wait_s=5)
            now = time.perf_counter_ns()
            times.extend((now - int.from_bytes(r.data[:8], "little")) / 1000 for r in page.records)
            after = page.scanned
        say(percentiles(times[100:]))


async def send(path: str, count: int) -> None:
    body = encoded(1)
    async with mist.connect(f"log:{path}") as broker:
        stream = await broker.open("s")
        due = time.perf_counter()
        for i in range(count):
            due += 0.001
            if (left := due - time.perf_counter()) > 0:
                await asyncio.sleep(left)
            stamp = time.perf_counter_ns().to_bytes(8, "little")
            await stream.append([Message("trace.span", stamp + body, f"{i:032x}")])


async def latency_mist(url: str, count: int) -> None:
    """A worker: fetch, look at the stamp, acknowledge."""
    async with mist.connect(url) as broker:
        stream = await ours.remade(broker, "latency")
        consumer = await stream.consumer("worker")
        say("ready")
        times: list[float] = []
        while len(times) < count:
            got = await consumer.fetch(limit=100, wait_s=30)
            now = time.time_ns()
            times.extend((now - stamp_of(d.record.data)) / 1000 for d in got)
            await consumer.ack(got)
        say(percentiles(times[100:]))


def stamp_of(body: bytes) -> int:
    return int(body[30 : body.index(b",", 30)])


def stamped() -> bytes:
    """An envelope of about 424 bytes with the time first, where it is found without decoding."""
    return b'{"version":"1","timestamp_ns":%d,' % time.time_ns() + _REST


_REST = b'"id":"%032d","source":"infermux","type":"trace.span","payload":{"x":"%s"}}' % (0, b"y" * 300)


async def paced(count: int, send: Callable[[bytes], Awaitable[object]]) -> None:
    """`send` 1,000 times a second."""
    due = time.perf_counter()
    for _ in range(count):
        due += 0.001
        if (left := due - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        await send(stamped())


async def paced_mist(url: str, count: int) -> None:
    async with mist.connect(url) as broker:
        stream = await broker.open("latency", create=False)
        await paced(count, lambda body: stream.append([Message("trace.span", body)]))


async def latency_faststream(kind: str, url: str, count: int) -> None:
    from bench import nats_peers, redis_peers

    times: list[float] = []

    def seen(body: dict[str, int]) -> None:
        times.append((time.time_ns() - body["timestamp_ns"]) / 1000)

    peers = nats_peers if kind == "nats" else redis_peers
    await peers.subscribe(url, count, seen, lambda: say("ready"))
    say(percentiles(times[100:]))


async def paced_faststream(kind: str, url: str, count: int) -> None:
    from bench import nats_peers, redis_peers

    if kind == "nats":
        nats_broker = nats_peers.NatsBroker(nats_peers.plain(url), logger=None)
        await nats_broker.connect()
        await paced(count, lambda body: nats_broker.publish(body, nats_peers.SUBJECT, stream=nats_peers.STREAM))
        await nats_broker.stop()
    else:
        redis_broker = redis_peers.RedisBroker(url, logger=None)
        await redis_broker.connect()
        await paced(count, lambda body: redis_broker.publish(body, stream=redis_peers.STREAM_FASTSTREAM))
        await redis_broker.stop()


async def memory(url: str, count: int) -> None:
    """Resident megabytes after appending, replaying and consuming `count` records."""
    found: dict[str, float] = {}
    await ours.fill(url, count)
    found["append"] = resident_mb()
    await ours.replay(url, after=0, count=count)
    found["replay"] = resident_mb()
    await ours.consume(url, count, "memory")
    found["consume"] = resident_mb()
    say(json.dumps(found))


async def fill_one(url: str, name: str, count: int) -> None:
    """Fill a stream of its own when told to go, and say how long that took."""
    items = messages(min(count, 50_000))
    async with mist.connect(url) as broker:
        stream = await ours.remade(broker, name)
        say("ready")
        sys.stdin.readline()
        start = time.perf_counter()
        for done in range(0, count, len(items)):
            some = items[: min(len(items), count - done)]
            await ours.append(stream, [Message(m.subject, m.data, f"{done + i:032x}") for i, m in enumerate(some)])
        say(start, time.perf_counter())


async def drain_one(url: str, name: str, count: int) -> None:
    """Consume and acknowledge a stream of its own when told to go."""
    async with mist.connect(url) as broker:
        stream = await broker.open(name, create=False)
        consumer = await stream.consumer("scale", mist.ConsumerConfig(ack_wait_s=60, pending_max=100_000))
        say("ready")
        sys.stdin.readline()
        start = time.perf_counter()
        n = 0
        while n < count:
            got = await consumer.fetch(limit=1000, wait_s=10)
            for d in got:
                codec.decode(d.record.data)
            n += await consumer.ack(got)
        say(start, time.perf_counter())


def resident_mb() -> float:
    """The most this process ever held (VmHWM: ru_maxrss would start from the parent's)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM:"))) / 1024


def follow_bare(path: str, count: int, synced: bool) -> None:
    """`synced`: woken by the mark that is written after the sync, as a follower of durable records must be; otherwise
    by the write itself, before it is durable."""
    file = Path(path, "log")
    file.touch()
    fd = os.open(file, os.O_RDONLY)
    mark = Path(path, "mark")
    mark.touch()
    watch = _inotify(str(mark if synced else file))
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    say("ready")
    times: list[float] = []
    size = 8 + len(encoded(1))
    at = 0
    while at < count * size:
        poll.poll(5000)
        os.read(watch, 4096)
        data = os.pread(fd, 1 << 20, at)
        now = time.perf_counter_ns()
        for i in range(0, len(data) - size + 1, size):
            times.append((now - struct.unpack_from("<Q", data, i)[0]) / 1000)
            at += size
    say(percentiles(times[100:]))


def send_bare(path: str, count: int) -> None:
    body = encoded(1)
    fd = os.open(Path(path, "log"), os.O_WRONLY | os.O_APPEND)
    mark = os.open(Path(path, "mark"), os.O_WRONLY | os.O_CREAT)
    due = time.perf_counter()
    for i in range(count):
        due += 0.001
        if (left := due - time.perf_counter()) > 0:
            time.sleep(left)
        os.write(fd, time.perf_counter_ns().to_bytes(8, "little") + body)
        os.fdatasync(fd)
        os.pwrite(mark, i.to_bytes(8, "little"), 0)


def main() -> None:
    role, path, *rest = sys.argv[1:]
    logging.disable(logging.INFO)
    if os.environ.get("MIST_BENCH_LOOP") == "uvloop":
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    if role == "append":
        asyncio.run(append(path))
    elif role == "replay":
        asyncio.run(replay(path, int(rest[0])))
    elif role == "consume":
        asyncio.run(consume(path, rest[0]))
    elif role == "follow":
        asyncio.run(follow(path, int(rest[0])))
    elif role == "send":
        asyncio.run(send(path, int(rest[0])))
    elif role == "latency-mist":
        asyncio.run(latency_mist(path, int(rest[0])))
    elif role == "paced-mist":
        asyncio.run(paced_mist(path, int(rest[0])))
    elif role.startswith("latency-faststream-"):
        asyncio.run(latency_faststream(role.rpartition("-")[2], path, int(rest[0])))
    elif role.startswith("paced-faststream-"):
        asyncio.run(paced_faststream(role.rpartition("-")[2], path, int(rest[0])))
    elif role == "fill":
        asyncio.run(fill_one(path, rest[0], int(rest[1])))
    elif role == "drain":
        asyncio.run(drain_one(path, rest[0], int(rest[1])))
    elif role == "memory":
        asyncio.run(memory(path, int(rest[0])))
    elif role in ("follow-bare", "follow-unsynced"):
        follow_bare(path, int(rest[0]), role == "follow-bare")
    elif role == "send-bare":
        send_bare(path, int(rest[0]))


if __name__ == "__main__":
    main()
