"""The other processes of the benchmarks: `python -m bench.child ROLE DIR …`. Each says "ready" and then does its part."""

from __future__ import annotations

import asyncio
import os
import select
import struct
import sys
import time
from pathlib import Path

import mist
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
    # not ru_maxrss: that one starts from what the parent had when it forked
    status = Path("/proc/self/status").read_text().splitlines()
    say(next(line.split()[1] for line in status if line.startswith("VmHWM:")))


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
    elif role in ("follow-bare", "follow-unsynced"):
        follow_bare(path, int(rest[0]), role == "follow-bare")
    elif role == "send-bare":
        send_bare(path, int(rest[0]))


if __name__ == "__main__":
    main()
