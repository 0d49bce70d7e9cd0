"""C01: writers killed at random instants and at chosen operations. C07: many processes, one stopped or killed."""

from __future__ import annotations

import asyncio
import random
import secrets
import signal
import time
from pathlib import Path
from typing import Any

import msgspec

from mist.broker.registry import connect
from mist.testing.history import Appended, Checker, Erased, Recorder, load, spread

from . import recording as rec
from .campaign import Report, Trial
from .failpoints import random_failpoint
from .processes import Child, ChildFailed, Nursery
from .sites import SMALL

_CYCLES = 20
_PRODUCERS = 4


def reread(trial: Trial, folder: Path, *, boot: bytes | None = None, retention: bool = False) -> int:
    """Replay everything twice, verify every byte, and check the histories in a folder. Returns the records kept."""

    async def replay() -> int:
        options: dict[str, Any] = {"boot": boot} if boot else {}
        recorder = Recorder(folder / "end.jsonl")
        try:
            async with asyncio.timeout(300), connect(f"log:{folder / 'log'}", **options) as broker:
                stream = await broker.open("s", create=False)
                await rec.read_all(recorder, stream, "end")
                await rec.read_all(recorder, stream, "again", limit=777)
                checked = await stream.verify()
                if checked.damage:
                    trial.fail(f"verify found damage: {checked.damage[:5]}")
                info = await stream.info()
                if checked.records != info.records:
                    trial.fail(f"verify counted {checked.records} records, info says {info.records}")
                return info.records
        finally:
            recorder.close()

    records = asyncio.run(replay())
    checker = Checker(retention=retention)
    checker.add_files(sorted(folder.glob("*.jsonl")))
    trial.judge(checker)
    return records


def c01(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """kill -9 of writers: 4 producers with 3 callers each, group commit, segments of 256 KiB, a follower beside them.

    Half of the victims carry a failpoint, the others die at a random instant. Every 20 cycles all are killed at once, the
    log is read (half of the time as after a reboot), and the history is checked.
    """
    trial = Trial("C01", budget_s, seed, report, units)
    rng = random.Random(seed)
    with Nursery(trial.folder) as nursery:
        while trial.more():
            folder = trial.round()
            try:
                _kill_writers(trial, nursery, folder, rng, min(_CYCLES, trial.left))
                boot = secrets.token_bytes(16) if rng.random() < 0.5 else None
                records = reread(trial, folder, boot=boot)
            except ChildFailed as exc:
                trial.fail(str(exc))
                break
            trial.say(f"{trial.reached} kills, {records} records in this round, histories agree")
    return trial.result()


class _Victims:
    """The writers of one round; those that are armed carry a failpoint and die by themselves sooner or later."""

    def __init__(self, nursery: Nursery, folder: Path, common: dict[str, Any], rng: random.Random) -> None:
        self._nursery = nursery
        self._folder = folder
        self._common = common
        self._rng = rng
        self._armed: set[int] = set()
        self.children = [self._start(i) for i in range(_PRODUCERS)]

    def _start(self, number: int, *, armed: bool = False) -> Child:
        label = f"p{number}"
        point = msgspec.to_builtins(random_failpoint(self._rng)) if armed else None
        return self._nursery.start("writer", {
            **self._common, "label": label, "history": str(self._folder / f"{label}.jsonl"), "lanes": 3,
            "seed": self._rng.random(), "size": (40, 600), "batch": 24, "pause_ms": 2, "failpoint": point,
        })  # fmt: skip

    def cycle(self) -> str:
        """Let one die, start it again. Says how it died."""
        number = self._rng.randrange(_PRODUCERS)
        how = self._die(self.children[number], armed=number in self._armed)
        self._armed.discard(number)
        if self._rng.random() < 0.6:
            self._armed.add(number)
        self.children[number] = self._start(number, armed=number in self._armed)
        return how

    def _die(self, child: Child, *, armed: bool) -> str:
        if armed and child.killed(0.5):
            return "failpoint"
        time.sleep(self._rng.uniform(0.002, 0.06))
        if child.killed(0):
            return "failpoint"
        child.kill()
        return "random_instant"

    def end(self, *, kill: bool) -> None:
        """All at once, or one after the other and orderly where no failpoint may strike."""
        for number, child in enumerate(self.children):
            if child.killed(0):
                continue
            if kill or number in self._armed:
                child.kill()
            else:
                child.finish()


def _kill_writers(trial: Trial, nursery: Nursery, folder: Path, rng: random.Random, cycles: int) -> None:
    durability = "power" if rng.random() < 0.7 else "process"
    common = {"url": f"log:{folder / 'log'}", "config": {**SMALL, "durability": durability}}
    beside = ["reader", "trimmer"] if rng.random() < 0.4 else ["reader"]
    others = [
        nursery.start(role, {**common, "label": role, "history": str(folder / f"{role}.jsonl"), "seed": rng.random()})
        for role in beside
    ]
    victims = _Victims(nursery, folder, common, rng)
    time.sleep(0.05)
    for _ in range(cycles):
        if not trial.more():
            break
        trial.add(**{victims.cycle(): 1})
        trial.reached += 1
    time.sleep(0.05)
    victims.end(kill=rng.random() < 0.5)
    for child in others:
        child.finish()
    trial.add(torn_tails=len(list((folder / "log" / "streams" / "s" / "quarantine").glob("*.torn"))))


_ERASING = ("rename", "sync_dir", "sync", "unlink", "truncate", "pwrite", "pwritev")


def c15(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """kill -9 of processes that erase, with writers and a reader beside them; most die at a chosen operation.

    Nothing else is lost, what an erasure that returned took is in no later page and in no file, and verify is clean.
    """
    trial = Trial("C15", budget_s, seed, report, units)
    rng = random.Random(seed)
    with Nursery(trial.folder) as nursery:
        while trial.more():
            folder = trial.round()
            try:
                _kill_erasers(trial, nursery, folder, rng, min(_CYCLES, trial.left))
                records = reread(trial, folder, boot=secrets.token_bytes(16) if rng.random() < 0.5 else None)
                _look_for_erased(trial, folder)
            except ChildFailed as exc:
                trial.fail(str(exc))
                break
            trial.say(f"{trial.reached} kills, {records} records in this round, histories agree")
    return trial.result()


def _kill_erasers(trial: Trial, nursery: Nursery, folder: Path, rng: random.Random, cycles: int) -> None:
    common = {"url": f"log:{folder / 'log'}", "config": {**SMALL, "durability": rng.choice(("power", "process"))}}
    others = [
        nursery.start(role, {
            **common, "label": label, "history": str(folder / f"{label}.jsonl"), "seed": rng.random(), "lanes": 2,
            "size": (40, 600), "batch": 24, "pause_ms": 4,
        })
        for role, label in (("writer", "p0"), ("writer", "p1"), ("reader", "reader"))
    ]  # fmt: skip
    time.sleep(0.2)
    for cycle in range(cycles):
        if not trial.more():
            break
        armed = rng.random() < 0.8
        point = {"kind": rng.choice(_ERASING), "nth": rng.randint(1, 12), "when": rng.choice(("before", "after"))}
        # each has a history of its own: what one was about to erase when it died may be erased or not
        eraser = nursery.start("eraser", {
            **common, "label": f"e{cycle}", "history": str(folder / f"e{cycle}.jsonl"), "seed": rng.random(),
            "failpoint": point if armed else None,
        })  # fmt: skip
        if armed and eraser.killed(1.0):
            trial.add(failpoint=1)
        else:
            time.sleep(rng.uniform(0.0, 0.1))
            eraser.kill()
            trial.add(random_instant=1)
        trial.reached += 1
    for child in others:
        child.finish()


def _look_for_erased(trial: Trial, folder: Path) -> None:
    """No file of the stream holds the id of a record that an erasure took which returned."""
    events = [e for p in folder.glob("*.jsonl") for e in load(p)]
    erased = {s for e in events if isinstance(e, Erased) for s in spread(e.sequences)}
    ids: dict[int, bytes] = {}
    for e in events:
        if isinstance(e, Appended) and e.sequences:
            ids |= {s: f"{e.lane}-{n}".encode() for n, s in enumerate(spread(e.sequences), e.first)}
    stored = b"".join(p.read_bytes() for p in (folder / "log" / "streams" / "s").iterdir() if p.is_file())
    left = [s for s in sorted(erased & ids.keys()) if bytes([0xA0 + len(ids[s])]) + ids[s] in stored]
    if left:
        trial.fail(f"{len(left)} erased records are still in the files, the first is {left[0]}")
    trial.add(erased=len(erased))


def c07(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """16 processes append to one log; one is killed, or stopped while it holds the lock.

    While it is stopped the others get Locked within the lock wait (0.3 s; 10 s are allowed here, machines are busy), and
    nothing of what they then withdraw is stored. When it goes on, all of them do.
    """
    trial = Trial("C07", budget_s, seed, report, units)
    rng = random.Random(seed)
    with Nursery(trial.folder) as nursery:
        while trial.more():
            folder = trial.round()
            try:
                _stop_one(trial, nursery, folder, rng)
                reread(trial, folder)
            except ChildFailed as exc:
                trial.fail(str(exc))
                break
            trial.reached += 1
            trial.say(f"{trial.reached} rounds")
    return trial.result()


_PROCESSES = 16


def _acked(folder: Path) -> int:
    """How many appends were answered well so far, by all processes."""
    return sum(p.read_bytes().count(b'"sequences":[[') for p in folder.glob("p*.jsonl"))


def _refused(folder: Path) -> int:
    return sum(p.read_bytes().count(b'"error":"locked"') for p in folder.glob("p*.jsonl"))


def _until(what: str, condition: Any, timeout_s: float = 30.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise ChildFailed(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.01)


def _stop_one(trial: Trial, nursery: Nursery, folder: Path, rng: random.Random) -> None:
    common = {
        "url": f"log:{folder / 'log'}",
        "config": SMALL,
        "lock_wait_s": 0.3,
        "lanes": 1,
        "size": (40, 600),
        "batch": 16,
    }
    stops = rng.random() < 0.6
    point = {
        "kind": rng.choice(("pwritev", "sync", "pwrite")), "nth": rng.randint(5, 30),
        "when": rng.choice(("before", "after")), "signal": int(signal.SIGSTOP if stops else signal.SIGKILL),
    }  # fmt: skip
    children = [
        nursery.start("writer", {
            **common, "label": f"p{i}", "history": str(folder / f"p{i}.jsonl"), "seed": rng.random(), "pause_ms": 30,
            "failpoint": point if i == 0 else None,
        })
        for i in range(_PROCESSES)
    ]  # fmt: skip
    victim, others = children[0], children[1:]
    if stops:
        if not victim.wait_stopped(30):
            raise ChildFailed(f"the failpoint {point} was never reached: {victim.output()}")
        before = _refused(folder)
        _until("the others to be refused", lambda: _refused(folder) >= before + 3)
        trial.add(refused_while_stopped=_refused(folder) - before)
        victim.signal(signal.SIGCONT)
    elif not victim.killed(30):
        raise ChildFailed(f"the failpoint {point} was never reached: {victim.output()}")
    before = _acked(folder)
    _until("all to go on", lambda: _acked(folder) >= before + 2 * _PROCESSES)
    for child in others:
        child.finish()
    if stops:
        victim.finish()
