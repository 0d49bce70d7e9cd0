"""C14: one consumer a hundred times slower than ten others, all in one process whose memory is watched."""

from __future__ import annotations

import asyncio
import json
import random
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec

from mist.broker.base import Consumer, ConsumerConfig, StreamConfig
from mist.broker.registry import connect
from mist.testing.history import Checker, Recorder

from . import recording as rec
from .campaign import Report, Trial, named
from .processes import ChildFailed, Nursery
from .sites import site

GROWTH_BYTES_MAX = 50 * 1024 * 1024
_CONFIG = {"segment_bytes": 4 << 20, "dedupe_ids_max": 20_000}
_RECORDED_S = 20
_RATE = 2000
_FAST = 10
_SLOWER = 100


def c14(
    budget_s: float, seed: int, report: Report, *, units: int | None = None, backend: str = "log"
) -> dict[str, Any]:
    """2,000 messages a second, ten consumers that keep up, one that is a hundred times slower, one follower that sleeps."""
    trial = Trial(named("C14", backend), budget_s, seed, report, units)
    seconds = max(5, units if units is not None else int(budget_s))
    folder = trial.round()
    with Nursery(trial.folder) as nursery, site(backend, folder, quick=False) as where:
        child = nursery.start("slow", {
            "url": where.url, "config": _CONFIG if backend == "log" else {}, "seconds": seconds, "seed": seed, "result": str(folder / "result.json"),
            "history": str(folder / "slow.jsonl") if seconds <= _RECORDED_S else "",
        })  # fmt: skip
        try:
            child.finish(seconds * 2 + 60, ask=False)
        except ChildFailed as exc:
            trial.fail(str(exc))
            return trial.result()
    result = json.loads((folder / "result.json").read_text())
    growth = result["peak"] - result["start"]
    if growth >= GROWTH_BYTES_MAX:
        trial.fail(f"memory grew by {growth / 1e6:.1f} MB in {seconds} s")
    if result["behind"]:
        trial.fail(f"fast consumers fell behind: {result['behind']}")
    if not 0 < result["slow"] < result["appended"] / 10:
        trial.fail(f"the slow consumer handled {result['slow']} of {result['appended']}: this was no test")
    if seconds <= _RECORDED_S:
        checker = Checker(dense=backend != "nats", remote=backend != "log")
        checker.add_files([folder / "slow.jsonl"])
        trial.judge(checker)
    else:
        trial.note(f"no history of a run of more than {_RECORDED_S} s")
    trial.reached += seconds
    trial.add(appended=result["appended"], slow=result["slow"], growth_bytes=max(growth, 0))
    trial.say(
        f"{seconds} s, {result['appended']} messages, the slow one handled {result['slow']}, grew {growth / 1e6:.1f} MB"
    )
    return trial.result()


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


async def slow(args: dict[str, Any]) -> None:
    """The child of C14. Memory counts from the moment when every part has run for a tenth of the time."""
    random.seed(args["seed"])
    seconds: int = args["seconds"]
    begun = time.monotonic()
    recorder = Recorder(args["history"] or "/dev/null")
    async with AsyncExitStack() as stack:
        stack.callback(recorder.close)
        broker = await stack.enter_async_context(connect(args["url"]))
        stream = await broker.open(
            "s", config=msgspec.convert(args["config"], StreamConfig) if args["config"] else None
        )
        consumers = [await stream.consumer(f"fast{i}", ConsumerConfig(ack_wait_s=600)) for i in range(_FAST)]
        sleeper = await stream.consumer("slow", ConsumerConfig(ack_wait_s=600))
        lane = rec.Lane(recorder, stream, "lane", size=400)
        done = asyncio.Event()
        memory: list[int] = []
        handled = [0]

        async def append() -> None:
            batch, next_at = _RATE // 50, time.monotonic()
            while time.monotonic() < begun + seconds:
                await lane.append(batch)
                next_at += 1 / 50
                await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            done.set()

        async def fast(consumer: Consumer) -> int:
            """Until everything is settled; returns the lag at the end."""
            work = rec.Work(recorder, consumer)
            while not done.is_set() or (await consumer.info()).lag:
                deliveries, _ = await work.fetch(limit=256, wait_s=0.1)
                await work.settle("ack", deliveries)
            looked = await work.look(final=True)
            return looked.lag

        async def sleep_through() -> None:
            work = rec.Work(recorder, sleeper)
            while not done.is_set():
                deliveries, _ = await work.fetch(limit=20, wait_s=0.1)
                await work.settle("ack", deliveries)
                handled[0] += len(deliveries)
                await asyncio.sleep(len(deliveries) * _SLOWER / _RATE)

        async def follow() -> None:
            """A reader that reads a page and sleeps: its position falls behind by ever more segments."""
            after = 0
            while not done.is_set():
                after = await rec.read(recorder, stream, "sleepy", after=after, limit=20, wait_s=0.1)
                await asyncio.sleep(0.5)

        async def watch() -> None:
            await asyncio.sleep(seconds / 10)
            while not done.is_set():
                memory.append(resident())
                await asyncio.sleep(0.1)

        async with asyncio.TaskGroup() as group:
            for part in (append(), sleep_through(), follow(), watch()):
                group.create_task(part)
            lags = [group.create_task(fast(c)) for c in consumers]
        if args["history"]:
            await rec.read_all(recorder, stream, "end")
        behind = {f"fast{i}": t.result() for i, t in enumerate(lags) if t.result()}
    Path(args["result"]).write_text(json.dumps({
        "start": memory[0], "peak": max(memory), "appended": lane.acked, "slow": handled[0], "behind": behind,
    }))  # fmt: skip
