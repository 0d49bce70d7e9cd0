"""Latency from before a durable append to another process's follower, at 1,000/s, against the bare system calls."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.common import Board, child, fresh

SUBJECT = "append to another process's follower, 1,000/s durable"


def _pair(follower: str, writer: str, base: Path, count: int) -> tuple[float, float]:
    path = fresh(base, f"follow-{follower}")
    reader = child(follower, str(path), str(count))
    assert reader.stdout is not None
    reader.stdout.readline()  # it follows now
    sender = child(writer, str(path), str(count))
    out, _ = sender.communicate()
    assert sender.returncode == 0, out
    answer, _ = reader.communicate()
    p50, p99 = map(float, answer.split()[-2:])
    return p50, p99


def run(board: Board, base: Path, rounds: int, scale: float) -> None:
    board.head(SUBJECT)
    count = int(3000 * scale) or 500
    ours: list[tuple[float, float]] = []
    bare: list[tuple[float, float]] = []
    early: list[tuple[float, float]] = []
    for _ in range(rounds):
        ours.append(_pair("follow", "send", base, count))
        bare.append(_pair("follow-bare", "send-bare", base, count))
        early.append(_pair("follow-unsynced", "send-bare", base, count))
    for q, at in (("p50", 0), ("p99", 1)):
        mine, peer = [v[at] for v in ours], [v[at] for v in bare]
        board.row(SUBJECT, f"mist log, {q}", mine, "us")
        board.row(SUBJECT, f"write + fdatasync + mark, inotify on the mark, {q}", peer, "us")
        board.row(SUBJECT, f"woken before the sync (not durable when seen), {q}", [v[at] for v in early], "us")
        board.verdict(
            SUBJECT, f"{q}, of the bare loop", statistics.median(a / b for a, b in zip(mine, peer, strict=True)), 3.0,
            at_least=False,
        )  # fmt: skip
