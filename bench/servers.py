"""NATS and Redis through the contract, against nats-py, redis-py and FastStream in the same run.

Every round runs each case once, on the same server, in turn; ratios are taken pair by pair and their median counts. The
servers are real ones (mist.testing.servers) with data on the disk that `--dir` names. Client and server share this
machine's cores, so only ratios mean something.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from bench import nats_peers, ours, redis_peers
from bench.common import Board, child, encoded, messages, ratio
from mist.testing.servers import run_nats, run_redis

Case = Callable[[], Awaitable[float]]


def looped(case: Case, loop: str) -> float:
    """One case on a fresh event loop, asyncio's or uvloop's."""
    if loop == "uvloop":
        import uvloop

        return uvloop.run(case())
    return asyncio.run(case())  # type: ignore[arg-type]


def rounds(cases: dict[str, Case], count: int, loop: str) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(count):
        for name, case in cases.items():
            out[name].append(looped(case, loop))
    return out


def print_rows(board: Board, subject: str, got: dict[str, list[float]], unit: str = "records/s") -> None:
    for name, values in got.items():
        board.row(subject, name, values, unit)


def nats_publish(board: Board, n: int, scale: float, loop: str, *, always: bool) -> None:
    subject = f"NATS publish, {'sync_interval always' if always else 'default sync'}, acknowledged"
    board.head(subject)
    count = int((10_000 if always else 60_000) * scale)
    items, bodies = messages(count), [encoded(i) for i in range(count)]
    few = bodies[: max(200, count // 20)]
    with run_nats(own_process=True, sync_interval="always" if always else '"2m"') as server:
        url = server.url
        cases: dict[str, Case] = {
            "MIST append(1000), two callers": lambda: ours.publish(url, items),
            "MIST append(1000), one caller": lambda: ours.publish(url, items, callers=1),
            "nats-py publish_async(256)": lambda: nats_peers.publish_async(url, bodies),
            "FastStream publish in gather(256)": lambda: nats_peers.faststream_gather(url, bodies[: count // 4]),
            "FastStream publish, each awaited": lambda: nats_peers.faststream_each(url, few),
        }
        got = rounds(cases, n, loop)
    print_rows(board, subject, got)
    mine = got["MIST append(1000), two callers"]
    if always:
        board.verdict(subject, "of nats-py publish_async", ratio(mine, got["nats-py publish_async(256)"]), 12)
        board.verdict(subject, "of FastStream", ratio(mine, got["FastStream publish, each awaited"]), 25)
    else:
        board.verdict(subject, "of nats-py publish_async(256)", ratio(mine, got["nats-py publish_async(256)"]), 3)
        board.verdict(subject, "of FastStream in gather", ratio(mine, got["FastStream publish in gather(256)"]), 10)


def nats_read(board: Board, n: int, scale: float, loop: str) -> None:
    consume, replay = "NATS consume, an ack per record, decoded", "NATS replay from the middle of 1 M"
    count, whole = int(50_000 * scale), int(1_000_000 * scale)
    bodies = [encoded(i) for i in range(50_000)]
    with run_nats(own_process=True, sync_interval='"2m"') as server:
        url = server.url
        board.head(consume)
        looped(lambda: _nothing(ours.fill(url, count)), loop)
        looped(lambda: _nothing(nats_peers.fill(url, bodies, count)), loop)
        got = rounds(
            {
                "MIST fetch(1000), ack each": lambda: ours.consume(url, count, "worker"),
                "nats-py fetch(1000), ack each": lambda: nats_peers.fetch(url, bodies[:count]),
                "FastStream push": lambda: nats_peers.faststream_push(url, count // 2),
            },
            n,
            loop,
        )
        print_rows(board, consume, got)
        mine = got["MIST fetch(1000), ack each"]
        board.verdict(consume, "of nats-py fetch(1000)", ratio(mine, got["nats-py fetch(1000), ack each"]), 5)
        board.verdict(consume, "of FastStream push", ratio(mine, got["FastStream push"]), 8)

        board.head(replay)
        small = looped(lambda: ours.first_record(url, around=count // 2), loop)
        looped(lambda: _nothing(ours.fill(url, whole)), loop)
        looped(lambda: _nothing(nats_peers.fill(url, bodies, whole)), loop)
        part = min(100_000, whole // 4)
        got = rounds(
            {
                "MIST pages of 1000": lambda: ours.replay(url, after=whole // 2, count=part),
                "nats-py ordered consumer": lambda: nats_peers.ordered(url, after=whole // 2, count=part),
            },
            n,
            loop,
        )
        print_rows(board, replay, got)
        board.verdict(
            replay, "of nats-py ordered", ratio(got["MIST pages of 1000"], got["nats-py ordered consumer"]), 6
        )
        first = [looped(lambda: ours.first_record(url, around=whole // 2), loop) for _ in range(n)]
        ms = board.row(replay, f"first record, in the middle of {whole:,}", first, "ms")
        board.row(replay, f"first record, in the middle of {count:,}", [small], "ms")
        board.verdict(replay, "first record", ms, 3.0, at_least=False, unit=" ms")
        board.verdict(replay, "first record, of the same in the small stream", ms / small, 2.0, at_least=False)


def redis_publish(board: Board, n: int, scale: float, loop: str, *, always: bool) -> None:
    subject = f"Redis publish, {'always' if always else 'everysec'}"
    board.head(subject)
    count = int((20_000 if always else 50_000) * scale)
    items, bodies = messages(count), [encoded(i) for i in range(count)]
    bare = [type(m)(m.subject, m.data) for m in items]
    few = bodies[: max(200, count // 20)]
    with run_redis(own_process=True, appendfsync="always" if always else "everysec") as server:
        url = server.url
        cases: dict[str, Case] = {
            "MIST append(1000), ids checked": lambda: ours.publish(url, items),
            "MIST append(1000), no ids": lambda: ours.publish(url, bare),
            "redis-py pipeline(1000), no check": lambda: redis_peers.pipeline(url, bodies),
            "FastStream publish, each awaited": lambda: redis_peers.faststream_each(url, few),
        }
        got = rounds(cases, n, loop)
    print_rows(board, subject, got)
    pipeline = got["redis-py pipeline(1000), no check"]
    checked = ratio(got["MIST append(1000), ids checked"], pipeline)
    if always:
        board.verdict(subject, "ids checked, of the unchecked pipeline", checked, 1.2)
    else:
        board.verdict(subject, "no ids, of pipeline(1000)", ratio(got["MIST append(1000), no ids"], pipeline), 2)
        board.verdict(subject, "ids checked, of the unchecked pipeline", checked, 1)
        each = ratio(got["MIST append(1000), ids checked"], got["FastStream publish, each awaited"])
        board.verdict(subject, "ids checked, of FastStream each", each, 12)


def redis_read(board: Board, n: int, scale: float, loop: str) -> None:
    consume, replay = "Redis consume, acked, decoded", "Redis replay, decoded"
    count = int(100_000 * scale)
    bodies = [encoded(i) for i in range(50_000)]
    with run_redis(own_process=True, appendfsync="everysec") as server:
        url = server.url
        board.head(consume)
        looped(lambda: _nothing(ours.fill(url, count)), loop)
        looped(lambda: _nothing(redis_peers.fill(url, bodies, count)), loop)
        looped(lambda: _nothing(redis_peers.fill_faststream(url, bodies, count // 5)), loop)
        got = rounds(
            {
                "MIST fetch(1000), ack each": lambda: ours.consume(url, count, "worker"),
                "redis-py XREADGROUP(1000) + XACK": lambda: redis_peers.group(url, (bodies * 2)[:count]),
                "FastStream batch of 1000": lambda: redis_peers.faststream_batch(url, count // 5),
            },
            n,
            loop,
        )
        print_rows(board, consume, got)
        mine = got["MIST fetch(1000), ack each"]
        board.verdict(consume, "of raw redis-py", ratio(mine, got["redis-py XREADGROUP(1000) + XACK"]), 1)
        board.verdict(consume, "of FastStream batch", ratio(mine, got["FastStream batch of 1000"]), 4)
        board.head(replay)
        got = rounds(
            {
                "MIST pages of 1000": lambda: ours.replay(url, after=count // 2, count=count // 2),
                "redis-py XRANGE(1000)": lambda: redis_peers.replay(url, count // 2),
            },
            n,
            loop,
        )
        print_rows(board, replay, got)
        board.verdict(replay, "of raw redis-py", ratio(got["MIST pages of 1000"], got["redis-py XRANGE(1000)"]), 0.7)


async def _nothing(work: Awaitable[Any]) -> float:
    await work
    return 0.0


def _latency(role: str, url: str, count: int, loop: str) -> tuple[float, float]:
    """Milliseconds p50 and p99 from before an append in one process to the record in another's hands, 1,000/s."""
    reader = child(f"latency-{role}", url, str(count), MIST_BENCH_LOOP=loop)
    assert reader.stdout is not None
    assert reader.stdout.readline().strip() == "ready"
    writer = child(f"paced-{role}", url, str(count), MIST_BENCH_LOOP=loop)
    p50, p99 = (float(x) / 1000 for x in reader.communicate(timeout=120)[0].split())
    writer.communicate(timeout=60)
    return p50, p99


def latency(board: Board, n: int, scale: float, loop: str) -> None:
    count = max(500, int(3000 * scale))
    servers: list[tuple[str, Any]] = [
        ("NATS", functools.partial(run_nats, own_process=True, sync_interval='"2m"')),
        ("Redis", functools.partial(run_redis, own_process=True, appendfsync="everysec")),
    ]
    for name, run in servers:
        subject = f"end to end latency at 1,000/s, {name}"
        board.head(subject)
        with run() as server:
            got: dict[str, list[tuple[float, float]]] = {"MIST fetch and ack": [], "FastStream": []}
            for _ in range(n):
                got["MIST fetch and ack"].append(_latency("mist", server.url, count, loop))
                got["FastStream"].append(_latency(f"faststream-{name.lower()}", server.url, count, loop))
        for i, (which, most) in enumerate((("p50", 0.75), ("p99", 0.8))):
            columns = {who: [pair[i] for pair in pairs] for who, pairs in got.items()}
            for who, values in columns.items():
                board.row(subject, f"{who}, {which}", values, "ms")
            of = ratio(columns["MIST fetch and ack"], columns["FastStream"])
            board.verdict(subject, f"{which}, of FastStream", of, most, at_least=False)


def memory(board: Board, scale: float) -> None:
    """Resident memory of a process that appends, replays and consumes a long stream."""
    subject = "memory, MIST's process"
    board.head(subject)
    for name, run in (
        ("NATS", functools.partial(run_nats, own_process=True, sync_interval='"2m"')),
        ("Redis", functools.partial(run_redis, own_process=True, appendfsync="everysec")),
    ):
        with run() as server:  # type: ignore[operator]
            for count in (int(200_000 * scale), int(2_000_000 * scale)):
                answer = child("memory", server.url, str(count)).communicate(timeout=1200)[0]
                worst = max(json.loads(answer).values())
                board.row(subject, f"{name}, {count:,} records appended, replayed, consumed", [worst], "MB")
                board.verdict(subject, f"{name}, {count:,}", worst, 150, at_least=False, unit=" MB")


def copying(board: Board, n: int, scale: float) -> None:
    """`mist copy` from a log to a server, against the slower side's own rate in the same round."""
    import tempfile
    from pathlib import Path

    count = int(1_000_000 * scale)
    with tempfile.TemporaryDirectory() as folder:
        log = f"log:{folder}/log"
        asyncio.run(ours.fill(log, count))
        for name, run in (
            ("NATS", functools.partial(run_nats, own_process=True, sync_interval='"2m"')),
            ("Redis", functools.partial(run_redis, own_process=True, appendfsync="everysec")),
        ):
            subject = f"copy of {count:,} records, log to {name}"
            board.head(subject)
            copied, own = [], []
            for _ in range(n):
                with run() as server:  # type: ignore[operator]
                    own.append(asyncio.run(ours.publish(server.url, messages(min(count, 200_000)))))
                    copied.append(_copy(log, server.url, count))
                for left in Path(folder).glob("log/copy-*"):
                    left.unlink()
            board.row(subject, "mist copy", copied, "records/s")
            board.row(subject, f"MIST append to {name}, two callers", own, "records/s")
            board.verdict(subject, "of the slower side's own rate", ratio(copied, own), 0.6)


def _copy(source: str, target: str, count: int) -> float:
    import subprocess
    import time

    argv = [sys.executable, "-m", "mist", "-u", source, "copy", ours.STREAM, f"{target}{'&' if '?' in target else '?'}stream=copied", "--format", "json"]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, timeout=1200)
    took = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    return count / took


def run(board: Board, parts: list[str], n: int, scale: float, loop: str) -> None:
    """The parts `nats`, `redis`, `latency`, `memory`, `copy` that are asked for."""
    logging.disable(logging.INFO)
    if "nats" in parts:
        nats_publish(board, n, scale, loop, always=False)
        nats_publish(board, n, scale, loop, always=True)
        nats_read(board, n, scale, loop)
    if "redis" in parts:
        redis_publish(board, n, scale, loop, always=False)
        redis_publish(board, n, scale, loop, always=True)
        redis_read(board, n, scale, loop)
    if "latency" in parts:
        latency(board, n, scale, loop)
    if "memory" in parts:
        memory(board, scale)
    if "copy" in parts:
        copying(board, max(1, n // 2), scale)
