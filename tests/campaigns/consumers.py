"""C12: workers killed and paused. C13: poison in the stream. SOAK: four processes share a consumer, nothing breaks them."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

from mist.broker.base import ConsumerConfig

from .campaign import Report, Trial, named
from .child import open_sink
from .processes import ChildFailed, Nursery
from .scene import Scene
from .sites import Site, site

_CYCLES = 20


def c12(
    budget_s: float, seed: int, report: Report, *, units: int | None = None, backend: str = "log"
) -> dict[str, Any]:
    """8 workers of one consumer while the stream grows: one after the other is killed, or stopped for longer than the ack
    wait and then goes on with what is no longer its own. Beside them one ingester that keeps its position in its sink.

    Every record is delivered at least once, none after its ack, none twice within the ack wait; the workers' sink and the
    ingester's both hold exactly the stream's records.
    """
    trial = Trial(named("C12", backend), budget_s, seed, report, units)
    rng = random.Random(seed)
    with Nursery(trial.folder) as nursery:
        while trial.more():
            folder = trial.round()
            try:
                with site(backend, folder) as where:
                    _disturb_workers(trial, nursery, folder, where, rng, min(_CYCLES, trial.left))
            except ChildFailed as exc:
                trial.fail(str(exc))
    return trial.result()


_WORKERS = 8


def _disturb_workers(
    trial: Trial, nursery: Nursery, folder: Path, where: Site, rng: random.Random, cycles: int
) -> None:
    config = ConsumerConfig(ack_wait_s=0.4, attempts_max=0, pending_max=rng.choice((300, 65_536)))
    r = Scene(nursery, folder, where, config, rng, slow_ms=20)
    r.fill(1000)
    source = r.start("writer", "source", lanes=2, size=(40, 300), batch=20, pause_ms=25)
    ingest = {"sink": str(folder / "ingest.db")}
    open_sink(ingest["sink"]).close()
    ingester = r.start("ingester", "ingester", **ingest)
    workers = [r.worker(i) for i in range(_WORKERS)]
    asleep: dict[int, float] = {}
    time.sleep(0.1)

    def wake(*, all: bool = False) -> None:
        for i in [i for i, t in asleep.items() if all or t < time.monotonic()]:
            workers[i].signal(signal.SIGCONT)
            del asleep[i]

    for _ in range(cycles):
        if not trial.more():
            break
        time.sleep(rng.uniform(0.01, 0.12))
        wake()
        i = rng.randrange(_WORKERS)
        if i not in asleep and rng.random() < 0.4:
            workers[i].signal(signal.SIGSTOP)
            asleep[i] = time.monotonic() + rng.uniform(0.5, 0.9)
            trial.add(pauses=1)
        else:
            workers[i].kill()
            asleep.pop(i, None)
            workers[i] = r.worker(i)
            trial.add(kills=1)
            trial.reached += 1
        if rng.random() < 0.3:
            ingester.kill()
            ingester = r.start("ingester", "ingester", **ingest)
            trial.add(ingester_kills=1)
    wake(all=True)
    source.finish()
    r.drain()
    for child in workers:
        child.finish()
    records, letters = r.end(trial)
    until = time.monotonic() + 60
    while len(r.effects(folder / "ingest.db")) < records and time.monotonic() < until:
        time.sleep(0.02)
    ingester.finish()
    everything = list(range(1, records + 1))
    for sink in (r.sink, folder / "ingest.db"):
        if r.effects(sink) != everything:
            trial.fail(f"{sink.name} holds {len(r.effects(sink))} rows for {records} records")
    if letters:
        trial.fail(f"{len(letters)} dead letters without a reason to be there")
    trial.say(f"{trial.reached} kills, {records} records, both sinks hold each of them once")


def c13(
    budget_s: float, seed: int, report: Report, *, units: int | None = None, backend: str = "log"
) -> dict[str, Any]:
    """1 % poison, served by 4 workers: a third is given back each time, a third refused for ever, a third never answered.

    All of it becomes dead letters, once, with the reason; the rest is served.
    """
    trial = Trial(named("C13", backend), budget_s, seed, report, units)
    rng = random.Random(seed)
    with Nursery(trial.folder) as nursery:
        while trial.more():
            folder = trial.round()
            count = min(10_000, trial.left)
            try:
                with site(backend, folder) as where:
                    _poison(trial, nursery, folder, where, rng, count)
            except ChildFailed as exc:
                trial.fail(str(exc))
                break
            trial.reached += count
            trial.say(f"{trial.reached} messages")
    return trial.result()


def _poison(trial: Trial, nursery: Nursery, folder: Path, where: Site, rng: random.Random, count: int) -> None:
    r = Scene(nursery, folder, where, ConsumerConfig(ack_wait_s=0.5, attempts_max=3), rng, poison=100)
    r.fill(count)
    workers = [r.worker(i) for i in range(4)]
    r.drain()
    for child in workers:
        child.finish()
    records, letters = r.end(trial)
    poison = [s for s in range(1, records + 1) if s % 100 == 0]
    if sorted(s for s, _ in letters) != poison:
        trial.fail(f"{len(letters)} dead letters for {len(poison)} poisoned messages")
    for s, reason in letters:
        termed = s // 100 % 3 == 1
        if not reason.startswith("cannot read message" if termed else "attempts"):
            trial.fail(f"dead letter {s} gives the reason {reason!r}")
    if r.effects(r.sink) != [s for s in range(1, records + 1) if s % 100]:
        trial.fail("the sink does not hold exactly the good messages")
    trial.add(dead_letters=len(letters))


def soak(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """Four processes share one consumer of a growing stream; nobody is killed, so every record is delivered exactly once."""
    trial = Trial("SOAK", budget_s, seed, report, units)
    rng = random.Random(seed)
    with Nursery(trial.folder) as nursery:
        while trial.more():
            folder = trial.round()
            # generous, because a record delivered twice is a failure here and the machine may be busy
            try:
                r = Scene(
                    nursery, folder, Site("log", f"log:{folder / 'log'}"), ConsumerConfig(ack_wait_s=60), rng, look=0.1
                )
                sources = [
                    r.start("writer", f"source{i}", lanes=2, size=(40, 300), batch=50, pause_ms=10) for i in range(2)
                ]
                workers = [r.worker(i) for i in range(4)]
                time.sleep(3)
                for child in sources:
                    child.finish()
                r.drain()
                for child in workers:
                    child.finish()
                records, letters = r.end(trial)
            except ChildFailed as exc:
                trial.fail(str(exc))
                break
            trial.reached += records
            if trial.counts["deliveries"] != trial.reached or letters:
                trial.fail(
                    f"{trial.counts['deliveries']} deliveries of {trial.reached} records, {len(letters)} dead letters"
                )
            trial.say(f"{trial.reached} records")
    return trial.result()
