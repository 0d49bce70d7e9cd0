"""Durable appends: batches of 1000, and 1,000 tasks each waiting for its own ack; against SQLite, LMDB and plain files."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from pathlib import Path

import lmdb

import mist
from bench.common import BATCH, Board, batches, fresh, interleaved, messages, ratio
from mist import Message

SUBJECT = "durable append, batches of 1000"
TASKS = "durable append, 1,000 tasks each awaiting its own ack"


def ours(base: Path, groups: list[list[Message]], durability: str = "power") -> float:
    async def main() -> float:
        async with mist.connect(f"log:{fresh(base, 'log')}") as broker:
            stream = await broker.open("s", config=mist.StreamConfig(durability=durability))  # type: ignore[arg-type]
            count = 0
            start = time.perf_counter()
            for group in groups:
                count += len(await stream.append(group))
            took = time.perf_counter() - start
            assert (await stream.info()).last == count
            return count / took

    return asyncio.run(main())


def in_flight(base: Path, groups: list[list[Message]], callers: int) -> float:
    async def main() -> float:
        async with mist.connect(f"log:{fresh(base, 'log')}") as broker:
            stream = await broker.open("s")
            todo = iter(groups)

            async def caller() -> None:
                for group in todo:
                    await stream.append(group)

            start = time.perf_counter()
            await asyncio.gather(*[caller() for _ in range(callers)])
            took = time.perf_counter() - start
            assert (await stream.info()).last == sum(map(len, groups))
            return sum(map(len, groups)) / took

    return asyncio.run(main())


def sqlite(base: Path, groups: list[list[Message]]) -> float:
    db = sqlite3.connect(fresh(base, "sqlite") / "log.db", isolation_level=None)
    db.execute("pragma journal_mode=wal")
    db.execute("pragma synchronous=full")
    db.execute("create table log(sequence integer primary key, body blob)")
    rows = [[(m.data,) for m in group] for group in groups]
    start = time.perf_counter()
    for group in rows:
        db.execute("begin")
        db.executemany("insert into log(body) values(?)", group)
        db.execute("commit")
    took = time.perf_counter() - start
    db.close()
    return sum(map(len, rows)) / took


def lmdb_bare(base: Path, groups: list[list[Message]], ids: bool = False) -> float:
    env = lmdb.open(str(fresh(base, "lmdb")), map_size=4 << 30, max_dbs=2, sync=True, metasync=True)
    log, index = env.open_db(b"log"), env.open_db(b"ids")
    n = 0
    rows = []
    for group in groups:
        rows.append([((n + i).to_bytes(8, "big"), m.data, m.id.encode()) for i, m in enumerate(group)])
        n += len(group)
    start = time.perf_counter()
    for group in rows:
        with env.begin(write=True) as t:
            for key, value, id in group:
                if ids and not t.put(id, key, db=index, overwrite=False):
                    continue
                t.put(key, value, append=True, db=log)
    took = time.perf_counter() - start
    env.close()
    return n / took


def plain(base: Path, groups: list[list[Message]]) -> float:
    lines = [[m.data + b"\n" for m in group] for group in groups]
    fd = os.open(fresh(base, "plain") / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    start = time.perf_counter()
    for group in lines:
        os.write(fd, b"".join(group))
        os.fdatasync(fd)
    took = time.perf_counter() - start
    os.close(fd)
    return sum(map(len, lines)) / took


def tasks(base: Path, items: list[Message], count: int) -> float:
    async def main() -> float:
        async with mist.connect(f"log:{fresh(base, 'log')}") as broker:
            stream = await broker.open("s")
            todo = iter(items)

            async def worker() -> None:
                for message in todo:
                    await stream.append([message])

            start = time.perf_counter()
            await asyncio.gather(*[worker() for _ in range(count)])
            took = time.perf_counter() - start
            assert (await stream.info()).last == len(items)
            return len(items) / took

    return asyncio.run(main())


def run(board: Board, base: Path, rounds: int, scale: float) -> None:
    groups = batches(messages(int(100_000 * scale) // BATCH * BATCH))
    board.head(SUBJECT)
    got = interleaved({
        "mist log: one caller (ids, dedupe, CRC, index)": lambda: ours(base, groups),
        "mist log: four callers": lambda: in_flight(base, groups, 4),
        "LMDB, sync, unique id index (the same job)": lambda: lmdb_bare(base, groups, ids=True),
        "LMDB, sync, bare": lambda: lmdb_bare(base, groups),
        "SQLite WAL, synchronous=FULL": lambda: sqlite(base, groups),
        "plain write + fdatasync": lambda: plain(base, groups),
        "mist log: one caller, level process": lambda: ours(base, groups, "process"),
    }, rounds)  # fmt: skip
    for name, values in got.items():
        board.row(SUBJECT, name, values, "records/s")
    mine, four, same, bare, lite, _, _ = got.values()
    board.verdict(SUBJECT, "of LMDB doing the same job", ratio(mine, same), 1.5)
    board.verdict(SUBJECT, "of bare LMDB", ratio(mine, bare), 1.1)
    board.verdict(SUBJECT, "of SQLite", ratio(mine, lite), 3.0)
    board.verdict(SUBJECT, "four callers, of bare LMDB", ratio(four, bare), 1.1)
    board.head(TASKS)
    items = messages(int(100_000 * scale))
    few = batches(items[: int(1500 * scale)], 1)
    got = interleaved({
        "mist log: 1,000 tasks": lambda: tasks(base, items, 1000),
        "mist log: 64 tasks": lambda: tasks(base, items[: len(items) // 3], 64),
        "mist log: one caller": lambda: ours(base, few),
        "plain write + fdatasync, one at a time": lambda: plain(base, few),
    }, rounds)  # fmt: skip
    for name, values in got.items():
        board.row(TASKS, name, values, "records/s")
    many, _, _, one = got.values()
    board.verdict(TASKS, "of one-at-a-time write + fdatasync", ratio(many, one), 25.0)
