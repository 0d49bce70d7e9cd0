"""How each backend grows: 1, 2, 4 and 8 streams with a process each way per stream; 10 thousand, 1 and 10 million records.

Everything shares this machine's cores, the server included, so the rates of many streams say where one machine
saturates, not what a cluster gives. The figures by size say what stays flat.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mist
from bench import ours
from bench.common import Board, child, fresh
from mist.kit.local import LocalServer
from mist.testing.servers import run_nats, run_redis

STREAMS = (1, 2, 4, 8)
SIZES = (10_000, 1_000_000, 10_000_000)


@contextlib.contextmanager
def _log(base: Path) -> Iterator[tuple[str, LocalServer | None, Path]]:
    place = fresh(base, "scale-log")
    yield f"log:{place}", None, place


@contextlib.contextmanager
def _nats(base: Path) -> Iterator[tuple[str, LocalServer | None, Path]]:
    with run_nats(own_process=True, sync_interval='"2m"') as server:
        assert isinstance(server, LocalServer)
        yield server.url, server, server.directory


@contextlib.contextmanager
def _redis(base: Path) -> Iterator[tuple[str, LocalServer | None, Path]]:
    with run_redis(own_process=True, appendfsync="everysec") as server:
        assert isinstance(server, LocalServer)
        yield server.url, server, server.directory


BACKENDS: dict[str, Callable[[Path], Any]] = {"log": _log, "NATS": _nats, "Redis": _redis}


def together(role: str, url: str, streams: int, count: int) -> float:
    """Records per second over all streams, one process each, from the first start to the last end."""
    processes = [child(role, url, f"scale-{i}", str(count)) for i in range(streams)]
    for p in processes:
        assert p.stdout is not None
        assert p.stdout.readline().strip() == "ready"
    for p in processes:
        assert p.stdin is not None
        p.stdin.write("go\n")
        p.stdin.flush()
    times = [[float(x) for x in p.communicate()[0].split()] for p in processes]
    return streams * count / (max(t[1] for t in times) - min(t[0] for t in times))


def by_streams(board: Board, base: Path, scale: float) -> None:
    for name, backend in BACKENDS.items():
        subject = f"streams at once, {name}"
        board.head(subject)
        count = int(200_000 * scale)
        for streams in STREAMS:
            with backend(base) as (url, _, _):
                board.row(subject, f"{streams} streams, append", [together("fill", url, streams, count)], "records/s")
                board.row(subject, f"{streams} streams, consume", [together("drain", url, streams, count)], "records/s")


async def opened_ms(url: str) -> float:
    """Milliseconds to connect, open the stream and know its end."""
    start = time.perf_counter()
    async with mist.connect(url) as broker:
        await (await broker.open(ours.STREAM, create=False)).info()
    return (time.perf_counter() - start) * 1000


def by_size(board: Board, base: Path, scale: float) -> None:
    for name, backend in BACKENDS.items():
        subject = f"records in a stream, {name}"
        board.head(subject)
        for size in SIZES:
            count = int(size * scale)
            with backend(base) as (url, server, place):
                start = time.perf_counter()
                asyncio.run(ours.fill(url, count))
                board.row(subject, f"{count:,}: append", [count / (time.perf_counter() - start)], "records/s")
                first = asyncio.run(ours.first_record(url, around=count // 2))
                board.row(subject, f"{count:,}: first record in the middle", [first], "ms")
                board.row(subject, f"{count:,}: connect, open, info", [asyncio.run(opened_ms(url))], "ms")
                part = min(count // 2, 200_000)
                replayed = asyncio.run(ours.replay(url, after=count // 2, count=part))
                board.row(subject, f"{count:,}: replay from the middle", [replayed], "records/s")
                used = int(subprocess.run(["du", "-sk", place], capture_output=True, text=True).stdout.split()[0])
                board.row(subject, f"{count:,}: on the disk", [used * 1024 / count], "B/record")
                if server is not None:
                    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
                    resident = int(next(line.split()[1] for line in lines if line.startswith("VmRSS:"))) / 1024
                    board.row(subject, f"{count:,}: server's resident memory", [resident], "MB")


def run(board: Board, base: Path, scale: float) -> None:
    by_streams(board, base, scale)
    by_size(board, base, scale)
