"""Replay with decode against SQLite; first record after a cursor, opening, and memory, at 10 thousand and at 5 million."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import statistics
import time
from pathlib import Path

import mist
from bench.common import Board, batches, child, fresh, interleaved, messages, ratio
from mist import Message
from mist.broker.cursor import Cursor
from mist.protocol import codec

REPLAY = "replay with lazy envelope decode"
POSITION = "first record after a cursor in the middle"
OPEN = "opening a log"
MEMORY = "memory while replaying"


async def fill(path: Path, count: int, batch: int = 1000) -> None:
    """A log of `count` records in blocks of `batch`, durability `process` (reading does not differ)."""
    items = messages(50_000)
    async with mist.connect(f"log:{path}") as broker:
        stream = await broker.open("s", config=mist.StreamConfig(durability="process"))
        done = 0
        while done < count:
            some = [
                Message(m.subject, m.data, f"{done + i:032x}") for i, m in enumerate(items[: min(50_000, count - done)])
            ]
            for group in batches(some, batch):
                await stream.append(group)
            done += len(some)


def pages(path: Path, count: int, limit: int = 1000) -> float:
    decode = codec.decode

    async def main() -> float:
        async with mist.connect(f"log:{path}") as broker:
            stream = await broker.open("s", create=False)
            start = time.perf_counter()
            after = n = 0
            while True:
                page = await stream.read(after=after, limit=limit)
                if not page.records:
                    break
                n += len([decode(r.data) for r in page.records])
                after = page.scanned
            took = time.perf_counter() - start
            assert n == count
            return n / took

    return asyncio.run(main())


def each(path: Path, count: int) -> float:
    decode = codec.decode

    async def main() -> float:
        async with mist.connect(f"log:{path}") as broker:
            stream = await broker.open("s", create=False)
            start = time.perf_counter()
            n = 0
            async for record in Cursor(stream).replay():
                decode(record.data)
                n += 1
            took = time.perf_counter() - start
            assert n == count
            return n / took

    return asyncio.run(main())


def sqlite_filled(base: Path, count: int) -> Path:
    path = fresh(base, "sqlite-read") / "log.db"
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("pragma journal_mode=wal")
    db.execute("create table log(sequence integer primary key, body blob)")
    for group in batches(messages(count)):
        db.execute("begin")
        db.executemany("insert into log(body) values(?)", [(m.data,) for m in group])
        db.execute("commit")
    db.close()
    return path


def sqlite_read(path: Path, count: int) -> float:
    decode = codec.decode
    db = sqlite3.connect(path)
    start = time.perf_counter()
    n = 0
    for (body,) in db.execute("select body from log where sequence > 0 order by sequence"):
        decode(body)
        n += 1
    took = time.perf_counter() - start
    db.close()
    assert n == count
    return n / took


def first_record(path: Path, count: int, tries: int = 15) -> float:
    """Milliseconds from a fresh cursor to its first record, the broker being open; a new position each time."""

    async def main() -> float:
        async with mist.connect(f"log:{path}") as broker:
            stream = await broker.open("s", create=False)
            await stream.read(after=0, limit=1)
            times = []
            for i in range(tries):
                after = count // 2 + i * 7
                start = time.perf_counter()
                page = await stream.read(after=after, limit=1)
                times.append((time.perf_counter() - start) * 1000)
                assert page.records[0].sequence == after + 1
            return statistics.median(times)

    return asyncio.run(main())


def opened(path: Path, count: int) -> float:
    """Milliseconds to connect, open the stream and read its last record."""

    async def main() -> float:
        start = time.perf_counter()
        async with mist.connect(f"log:{path}") as broker:
            stream = await broker.open("s", create=False)
            page = await stream.read(after=(await stream.info()).last - 1, limit=1)
            took = time.perf_counter() - start
            assert page.records[0].sequence >= count
            return took * 1000

    return asyncio.run(main())


def killed(path: Path) -> None:
    """A process that appends to the log is killed with SIGKILL while it does."""
    process = child("append", str(path))
    assert process.stdout is not None
    assert process.stdin is not None
    for _ in range(3):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stdin.close()


def resident(path: Path, count: int) -> float:
    """Peak MB of a process that replays everything."""
    process = child("replay", str(path), str(count))
    out, _ = process.communicate()
    return float(out.strip()) / 1024


def run(board: Board, base: Path, rounds: int, scale: float) -> None:
    count = int(200_000 * scale)
    board.head(REPLAY)
    log, log64, log1 = fresh(base, "read"), fresh(base, "read64"), fresh(base, "read1")
    asyncio.run(fill(log, count))
    asyncio.run(fill(log64, count, 64))
    asyncio.run(fill(log1, count // 10, 1))
    lite = sqlite_filled(base, count)
    got = interleaved({
        "mist log: pages of 1000 (blocks of 1000)": lambda: pages(log, count),
        "mist log: async for (blocks of 1000)": lambda: each(log, count),
        "SQLite read + decode": lambda: sqlite_read(lite, count),
        "mist log: pages of 1000 (blocks of 64)": lambda: pages(log64, count),
        "mist log: pages of 1000 (blocks of 1)": lambda: pages(log1, count // 10),
    }, rounds)  # fmt: skip
    for name, values in got.items():
        board.row(REPLAY, name, values, "records/s")
    by_page, by_record, peer, _, _ = got.values()
    board.verdict(REPLAY, "pages, of SQLite", ratio(by_page, peer), 1.4)
    board.verdict(REPLAY, "async for, of SQLite", ratio(by_record, peer), 1.0)

    large = int(5_000_000 * scale)
    small_log, large_log = fresh(base, "small"), fresh(base, "large")
    asyncio.run(fill(small_log, 10_000))
    asyncio.run(fill(large_log, large))
    board.head(POSITION)
    got = interleaved({
        "in 10 thousand": lambda: first_record(small_log, 10_000),
        f"in {large:,}": lambda: first_record(large_log, large),
    }, rounds)  # fmt: skip
    for name, values in got.items():
        board.row(POSITION, name, values, "ms")
    small_ms, large_ms = got.values()
    board.verdict(POSITION, "large, of small", ratio(large_ms, small_ms), 2.0, at_least=False)
    board.verdict(POSITION, "large", statistics.median(large_ms), 5.0, at_least=False, unit=" ms")

    board.head(OPEN)

    def after_kill(path: Path, n: int) -> float:
        killed(path)
        return opened(path, n)

    got = interleaved({
        "10 thousand, clean stop": lambda: opened(small_log, 10_000),
        f"{large:,}, clean stop": lambda: opened(large_log, large),
        "10 thousand, after kill -9": lambda: after_kill(small_log, 10_000),
        f"{large:,}, after kill -9": lambda: after_kill(large_log, large),
    }, rounds)  # fmt: skip
    for name, values in got.items():
        board.row(OPEN, name, values, "ms")
    clean_small, clean_large, kill_small, kill_large = got.values()
    board.verdict(OPEN, "large of small, clean", ratio(clean_large, clean_small), 2.0, at_least=False)
    board.verdict(OPEN, "large of small, after kill -9", ratio(kill_large, kill_small), 10.0, at_least=False)

    board.head(MEMORY)
    peak = [resident(large_log, large) for _ in range(1)]
    board.row(MEMORY, f"peak resident, {large:,} records decoded", peak, "MB")
    board.verdict(MEMORY, "peak resident", max(peak), 100.0, at_least=False, unit=" MB")
