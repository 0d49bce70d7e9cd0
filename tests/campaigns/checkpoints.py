"""C08: processes killed while they save checkpoints."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

from mist.broker.registry import connect
from mist.testing.history import Checker, Recorder

from . import recording as rec
from .campaign import Report, Trial
from .processes import Child, ChildFailed, Nursery

_SAVERS = 2
_CYCLES = 50


def c08(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """kill -9 while saving: two processes save under a shared name and a name of their own, one is killed at a time.

    Every new life loads all its names first; nothing may be unreadable, made up, or lower than what was known before.
    """
    trial = Trial("C08", budget_s, seed, report, units)
    rng = random.Random(seed)
    with Nursery(trial.folder) as nursery:
        while trial.more():
            folder = trial.round()
            try:
                _kill_savers(trial, nursery, folder, rng, min(_CYCLES, trial.left))
            except ChildFailed as exc:
                trial.fail(str(exc))
                break
            asyncio.run(_load_all(folder))
            checker = Checker()
            checker.add_files(sorted(folder.glob("*.jsonl")))
            verdict = trial.judge(checker)
            trial.say(f"{trial.reached} kills, {verdict.counts['saves']} saves in this round")
    return trial.result()


def _names(i: int) -> list[str]:
    return ["shared", f"own{i}"]


def _kill_savers(trial: Trial, nursery: Nursery, folder: Path, rng: random.Random, cycles: int) -> None:
    def start(i: int) -> Child:
        return nursery.start("saver", {
            "url": f"log:{folder / 'log'}", "label": f"s{i}", "history": str(folder / f"s{i}.jsonl"), "names": _names(i),
            "seed": rng.random(),
        })  # fmt: skip

    savers = [start(i) for i in range(_SAVERS)]
    time.sleep(0.1)
    for _ in range(cycles):
        if not trial.more():
            break
        i = rng.randrange(_SAVERS)
        time.sleep(rng.uniform(0.005, 0.06))
        savers[i].kill()
        savers[i] = start(i)
        trial.reached += 1
    time.sleep(0.05)
    for child in savers:
        child.finish()


async def _load_all(folder: Path) -> None:
    recorder = Recorder(folder / "end.jsonl")
    try:
        async with asyncio.timeout(60), connect(f"log:{folder / 'log'}") as broker:
            for name in sorted({n for i in range(_SAVERS) for n in _names(i)}):
                await rec.load(recorder, broker.checkpoints, "s", name)
    finally:
        recorder.close()
