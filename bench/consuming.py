"""Consume and ack through leases, fetches of 1000: one process and four, and the worst single wait."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

from bench.common import Board, child, fresh
from bench.replaying import fill

SUBJECT = "consume and ack through leases, fetches of 1000"


def _drain(path: Path, name: str, processes: int, count: int) -> tuple[float, float]:
    """Records per second over all workers, and the longest fetch or ack in milliseconds."""
    workers = [child("consume", str(path), name) for _ in range(processes)]
    for w in workers:
        assert w.stdout is not None
        w.stdout.readline()
    start = time.perf_counter()
    for w in workers:
        assert w.stdin is not None
        w.stdin.write("go\n")
        w.stdin.flush()
    answers = [w.communicate()[0].split() for w in workers]
    took = max(float(a[2]) for a in answers) - start
    assert sum(int(a[0]) for a in answers) == count
    return count / took, max(float(a[1]) for a in answers)


def run(board: Board, base: Path, rounds: int, scale: float) -> None:
    board.head(SUBJECT)
    count = int(2_000_000 * scale)
    path = fresh(base, "consume")
    asyncio.run(fill(path, count))
    one: list[tuple[float, float]] = []
    four: list[tuple[float, float]] = []
    for i in range(rounds):
        one.append(_drain(path, f"one-{i}", 1, count))
        four.append(_drain(path, f"four-{i}", 4, count))
    single = board.row(SUBJECT, "one process", [r for r, _ in one], "records/s")
    board.row(SUBJECT, "four processes", [r for r, _ in four], "records/s")
    board.row(SUBJECT, "worst wait, one process", [w for _, w in one], "ms")
    worst = board.row(SUBJECT, "worst wait, four processes", [w for _, w in four], "ms")
    board.verdict(SUBJECT, "one process", single, 1_000_000, unit="/s")
    board.verdict(
        SUBJECT, "four processes, of one", statistics.median(b[0] / a[0] for a, b in zip(one, four, strict=True)), 1.0
    )
    board.verdict(SUBJECT, "worst wait", worst, 50.0, at_least=False, unit=" ms")
