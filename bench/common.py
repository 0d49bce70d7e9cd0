"""Envelopes of 424 bytes, interleaved rounds, and rows of a table."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from mist import Message

T0 = 1_790_000_000_000_000_000
BATCH = 1000


def encoded(i: int) -> bytes:
    """One trace span in an envelope: 424 bytes, every one different."""
    payload = {
        "trace_id": f"{i // 8:016x}",
        "span_id": f"{i:08x}",
        "parent_id": f"{i // 2:08x}",
        "operation": "chat.completion",
        "start_ns": T0 + i * 1000,
        "end_ns": T0 + i * 1000 + 812_345_678,
        "status": "ok",
        "attrs": {
            "model": "gpt-4o-mini",
            "provider": "openai",
            "tokens_in": 812 + i % 97,
            "tokens_out": 128 + i % 31,
            "cost_usd": 0.00231,
        },
    }
    doc = {
        "version": "1", "id": f"{i:032x}", "source": "infermux", "type": "trace.span", "timestamp_ns": T0 + i,
        "payload": payload,
    }  # fmt: skip
    return json.dumps(doc, separators=(",", ":")).encode()


def messages(count: int, *, start: int = 0) -> list[Message]:
    """Messages with distinct ids over eight subjects. Bodies repeat after 50,000 to keep the generator out of the way."""
    bodies = [encoded(i) for i in range(min(count, 50_000))]
    return [Message(f"trace.span.s{i % 8}", bodies[i % len(bodies)], f"{start + i:032x}") for i in range(count)]


def batches(items: list[Any], size: int = BATCH) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


class Board:
    """Collects rows (subject, name, figures) and prints them; `verdict` compares medians with a target."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.rows: list[dict[str, Any]] = []
        self.verdicts: list[dict[str, Any]] = []

    def row(self, subject: str, name: str, values: Iterable[float], unit: str) -> float:
        figures = list(values)
        median = statistics.median(figures)
        self.rows.append({
            "subject": subject, "name": name, "unit": unit, "median": median, "min": min(figures), "max": max(figures),
            "runs": len(figures),
        })  # fmt: skip
        if not self.as_json:
            print(
                f"  {name:58s} {_short(median):>10} {unit:10s} [{_short(min(figures))} .. {_short(max(figures))}] n={len(figures)}",
                flush=True,
            )
        return median

    def head(self, subject: str) -> None:
        if not self.as_json:
            print(f"\n{subject}", flush=True)

    def verdict(
        self, subject: str, what: str, value: float, target: float, *, at_least: bool = True, unit: str = "x"
    ) -> None:
        ok = value >= target if at_least else value <= target
        self.verdicts.append(
            {
                "subject": subject,
                "what": what,
                "value": value,
                "target": target,
                "at_least": at_least,
                "ok": ok,
                "unit": unit,
            }
        )
        if not self.as_json:
            sign = ">=" if at_least else "<="
            print(
                f"  -> {what}: {_short(value)}{unit}, target {sign} {_short(target)}{unit}: {'met' if ok else 'NOT MET'}",
                flush=True,
            )

    def finish(self) -> None:
        if self.as_json:
            print(json.dumps({"rows": self.rows, "verdicts": self.verdicts}, indent=1))
            return
        print("\nTargets")
        for v in self.verdicts:
            sign = ">=" if v["at_least"] else "<="
            print(
                f"  {'met    ' if v['ok'] else 'NOT MET'} {v['subject']}: {v['what']} = {_short(v['value'])}{v['unit']} ({sign} {_short(v['target'])}{v['unit']})"
            )


def _short(value: float) -> str:
    if value >= 1_000_000:
        return f"{value / 1e6:.2f}M"
    if value >= 10_000:
        return f"{value / 1e3:.0f}k"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def interleaved(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every case once per round, in turn, so that drift of the machine hits all alike."""
    out: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            out[name].append(case())
    return out


def fresh(base: Path, name: str) -> Path:
    """An empty place; what earlier cases left dirty is written first, so that it is not billed to this one."""
    path = base / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    os.sync()
    return path


def ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios pair by pair."""
    return statistics.median([x / y for x, y in zip(a, b, strict=True)])


def child(*args: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.child", *args],
        stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env={**os.environ, **env},
    )  # fmt: skip


def rate(count: int, run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return count / (time.perf_counter() - start)


def counting(
    count: int, seen: Callable[[dict[str, Any]], None] | None = None
) -> tuple[Callable[[dict[str, Any]], Awaitable[None]], asyncio.Future[None]]:
    """A handler for FastStream, and what is done when it has been given `count` messages; `seen` gets each of them."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    left = count

    async def handle(message: dict[str, Any]) -> None:
        nonlocal left
        if seen is not None:
            seen(message)
        left -= 1
        if left == 0:
            done.set_result(None)

    return handle, done
