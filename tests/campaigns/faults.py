"""Campaigns of the embedded log under simulated faults: C02, C03, C04, C05 and C31.

Each is a function `(budget_s, seed, report, *, cases=None) -> dict` that says what it reached and raises AssertionError,
naming the seed, when a promise broke. `cases` bounds it by count instead of time. C31, the bug bank, is in bugbank.py.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from mist.broker.base import Message, Record, StreamConfig
from mist.errors import DataLoss, MistError
from mist.log.format import TAIL_BYTES
from mist.testing.simfiles import SHORT, Dice, Faults, PowerCut, SimFiles

from .simbox import PATH, Box, Model, Tick, seeded

Report = Callable[[str], None]

SMALL = StreamConfig(segment_bytes=8192)
LIMITED = StreamConfig(segment_bytes=8192, bytes_max=12_000, records_max=30)


class _Until:
    """Time or cases, whichever was asked for."""

    def __init__(self, budget_s: float, cases: int | None) -> None:
        self._until = time.monotonic() + budget_s
        self._cases = cases

    def more(self, done: int) -> bool:
        return done < self._cases if self._cases is not None else time.monotonic() < self._until


@contextmanager
def _named(seed: int, what: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (AssertionError, MistError) as exc:
        raise AssertionError(f"seed {seed}: {what()}: {exc!r}") from exc


# -- C02: power cuts --------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    what: str
    count: int = 1
    size: int = 100


class World:
    """A machine with one log, over kills and power cuts."""

    def __init__(self, config: StreamConfig, seed: int = 0) -> None:
        self.config = config
        self.clock = Tick()
        self.files = SimFiles("/log/streams", seed=seed)
        self.model = Model()
        self.number = 1
        self.box: Box | None = None
        self.done: list[str] = []

    def opened(self) -> Box:
        if self.box is None:
            if not self.files.is_dir(PATH):
                Box.create(self.files, self.config, self.clock)
            self.box = Box(self.files, self.number, clock=self.clock)
        return self.box

    def step(self, step: Step) -> None:
        self.done.append(f"{step.what} {step.count}x{step.size}")
        box = self.opened()
        if step.what == "append":
            self.model.append(box, self.model.messages(step.count, step.size))
        elif step.what == "again" and self.model.acked:
            last = max(self.model.acked)
            again = [
                self.model.acked[s]
                for s in range(max(last - step.count, 0) + 1, last + 1)
                if s in self.model.acked and s not in self.model.erase_asked
            ]
            if again:
                box.append([Message("a.0", self.model.tried[i], i) for i in again])
        elif step.what == "trim":
            tail = box.reader.tail()
            before = tail.first + (tail.durable + 1 - tail.first) * min(step.count, 100) // 100
            self.model.trim(box, before)
        elif step.what == "erase":
            # some of what is there: every `count`-th record, from the middle and from the segment being written
            tail = box.reader.tail()
            self.model.erase(box, list(range(tail.durable - step.size % 3, tail.first - 1, -step.count)))
        elif step.what == "read":
            self.model.look(box.all())
        elif step.what == "reopen":
            box.close()
            self.box = None
        elif step.what == "badsync":
            self.files.faults = Faults(errno.EIO, 1)
            self.files.faults.check = _only("sync", self.files.faults)  # type: ignore[method-assign]
            try:
                self.model.append(box, self.model.messages(step.count, step.size))
            finally:
                self.files.faults = None

    def kill(self) -> None:
        """kill -9 of all processes."""
        self.done.append("kill")
        self.files.kill()
        self.box = None

    def cut(self, files: SimFiles) -> World:
        """The same machine after a power cut that left these files."""
        new = World(self.config)
        new.clock = self.clock
        new.files = files
        new.model = self.model.copy()
        new.number = self.number + 1
        new.done = [*self.done, "CUT"]
        return new

    def check(self) -> None:
        """Open what is there and hold it against the model; then see that it goes on."""
        if not self.files.is_dir(PATH):
            assert not self.model.acked, "the stream is gone"
            return
        box = self.opened()
        tail = box.reader.tail()
        records = box.all()
        self._expired(tail.first)
        self.model.check(records, tail.first, tail.durable)
        self.model.nowhere(self.files)
        gone = [s for s in box.reader.erased(tail) if s >= tail.first]
        assert gone == sorted(set(range(tail.first, tail.durable + 1)) - {r.sequence for r in records}), gone
        found = box.journal.verify()
        assert not found.damage, f"verify finds {found.damage}"
        assert found.records == len(records)
        self.model.look(records)
        waiting = list(self.model.in_flight)
        if waiting:
            # the caller repeats what it had no answer for: stored once, whatever the crash kept of it
            sequences = box.append(waiting)
            self.model._acked(waiting, sequences)
            self.model.in_flight = []
        assert self.model.append(box, self.model.messages(2, 120)) is None, "it does not go on"
        tail = box.reader.tail()
        self._expired(tail.first)
        self.model.check(box.all(), tail.first, tail.durable)

    def _expired(self, first: int) -> None:
        """Where the stream lets go by itself, what is below its first record was not trimmed but may be gone."""
        if self.config.bytes_max or self.config.records_max:
            self.model.first_asked = max(self.model.first_asked, first)


def _only(kind: str, faults: Faults) -> Callable[[str, str], bool]:
    real = Faults.check

    def check(what: str, path: str) -> bool:
        return real(faults, what, path) if what == kind else False

    return check


SHORT_SCRIPTS: tuple[tuple[Step, ...], ...] = (
    (Step("append"),),
    (Step("append", 2, 700), Step("append", 1, 40)),
    (Step("append", 3, 300), Step("reopen"), Step("append", 2, 300)),
    (Step("append", 2, 2200), Step("append", 2, 2200), Step("append")),
    (Step("append", 4, 900), Step("append", 4, 900), Step("trim", 60), Step("append")),
    (Step("append", 1, 9000), Step("append"), Step("trim", 100), Step("append")),
    (Step("append"), Step("badsync", 2, 400), Step("append")),
    (Step("append", 2, 1500), Step("badsync", 2, 2400), Step("badsync"), Step("append"), Step("again", 3)),
    (Step("append", 3, 100), Step("erase", 2), Step("append"), Step("erase", 2)),
    (
        Step("append", 3, 900),
        Step("append", 4, 900),
        Step("append", 3, 900),
        Step("erase", 3),
        Step("append"),
        Step("read"),
    ),
    (
        Step("append", 4, 900),
        Step("append", 4, 900),
        Step("trim", 30),
        Step("erase", 1),
        Step("trim", 80),
        Step("append"),
    ),
)


def c02(
    budget_s: float, seed: int, report: Report, *, cases: int | None = None, config: StreamConfig = SMALL
) -> dict[str, Any]:
    """Simulated power cuts: crash states of short scripts at every operation, then random long ones.

    Looked for after every cut: acknowledged records, records a reader was given, trims that returned; nothing doubled,
    nothing invented, no damage reported, the durable mark not lower, appends go on.
    """
    until = _Until(budget_s, cases)
    states = scripts = exhaustive = 0
    with seeded(seed) as rng:
        jobs = [
            (script, second, at)
            for script in SHORT_SCRIPTS
            for second in (False, True)
            for at in range(1, _count(script, config) + 1)
        ]
        rng.shuffle(jobs)
        # every crash point comes up before any is looked at in depth; all states of one where they are few
        most = 64 if cases is None else min(max(cases * 2 // 3 // len(jobs), 4), 256)
        for script, second, at in jobs:
            if not until.more(states) or (cases is not None and states >= cases * 2 // 3):
                break
            scripts += 1
            world = _crashed(script, config, at, rng.randrange(1 << 30))
            if second:  # the process dies there, another one recovers, and then the power goes
                world.kill()
                world.files.cut_after(rng.randint(1, 16))
                with suppress(PowerCut):
                    world.step(Step("append"))
                world.model.peek(world.files, world.box, world.number)
            exhaustive += 1 << world.files.unsettled() <= most
            for files in world.files.crash_states(most=most, seed=rng.randrange(1 << 30)):
                after = world.cut(files)
                with _named(
                    seed, lambda s=script, a=at, k=second: f"{_text(s)}, {'kill' if k else 'cut'} at operation {a}"
                ):  # type: ignore[misc]
                    after.check()
                states += 1
        report(f"C02: {states} states of {scripts} crash points, {exhaustive} of them with every state")
        longs = cuts = 0
        while until.more(states):
            longs += 1
            world = World(rng.choice((config, config, LIMITED)), rng.randrange(1 << 30))
            for _ in range(rng.randint(1, 4)):
                cuts += 1
                world.files.cut_after(rng.randint(1, 60))
                with _named(seed, lambda w=world, n=longs: f"long script {n}: {w.done}"):  # type: ignore[misc]
                    try:
                        for step in _random_steps(rng):
                            world.step(step)
                    except PowerCut:
                        pass
                    world.model.peek(world.files, world.box, world.number)
                    if rng.random() < 0.3:
                        world.kill()
                        continue
                    worlds = [
                        world.cut(files) for files in world.files.crash_states(most=4, seed=rng.randrange(1 << 30))
                    ]
                    for after in worlds:
                        after.check()
                        states += 1
                    world = worlds[-1]
        report(f"C02: {states} states, {longs} long scripts, {cuts} crashes in them")
    return {"states": states, "crash_points": scripts, "exhaustive": exhaustive, "long_scripts": longs, "lost": 0}


def _text(script: Sequence[Step]) -> str:
    return "; ".join(f"{s.what} {s.count}x{s.size}" for s in script)


def _count(script: Sequence[Step], config: StreamConfig) -> int:
    world = World(config)
    for step in script:
        world.step(step)
    return world.files.operations


def _crashed(script: Sequence[Step], config: StreamConfig, at: int, seed: int) -> World:
    world = World(config, seed)
    world.files.cut_after(at)
    try:
        for step in script:
            world.step(step)
    except PowerCut:
        pass
    world.model.peek(world.files, world.box, world.number)
    return world


def _random_steps(rng: random.Random) -> Iterator[Step]:
    while True:
        what = rng.choices(
            ("append", "again", "trim", "read", "reopen", "badsync", "erase"), weights=(12, 2, 2, 2, 2, 1, 2)
        )[0]
        if what == "trim":
            yield Step(what, rng.choice((10, 30, 60, 100)))
        else:
            yield Step(what, rng.randint(1, 6), rng.choice((10, 100, 500, 1500, 3000)))


# -- C03: torn tails --------------------------------------------------------------------------------------------------


class _Log(NamedTuple):
    """A log with every block's place, its last sequence, and the tail page as it was published after it."""

    files: SimFiles
    model: Model
    segment: str
    blocks: list[tuple[int, int, int]]
    """(offset, end, last sequence, or the first in C04) of one segment's blocks."""
    pages: list[bytes]


def _log(rng: random.Random, blocks: int, *, config: StreamConfig, before: int) -> _Log:
    files = SimFiles("/log/streams")
    clock = Tick()
    Box.create(files, config, clock)
    box = Box(files, 1, clock=clock)
    model = Model()
    for _ in range(before):
        model.append(box, model.messages(2, 1500))
    places: list[tuple[int, int, int]] = []
    pages: list[bytes] = []
    last_segment = 0
    while len(places) < blocks:
        model.append(box, model.messages(rng.randint(1, 3), rng.choice((5, 5, 40))))
        tail = box.journal.tail
        if tail.segment != last_segment:
            last_segment, places, pages = tail.segment, [], []
        start = places[-1][1] if places else 4096
        places.append((start, tail.end, tail.durable))
        pages.append(files.content(f"{PATH}/tail")[:TAIL_BYTES])
    box.close()
    return _Log(files, model, f"{PATH}/{last_segment:020d}.seg", places, pages)


def c03(budget_s: float, seed: int, report: Report, *, cases: int | None = None) -> dict[str, Any]:
    """Torn tails: the last segment cut at every byte of its last 16 blocks.

    A crash leaves a page that says less than the segment holds: whole blocks stay, the torn one is cut and kept aside.
    A segment shorter than what was published is damage: it is reported with its exact range and its sequences are
    never given again, after a reboot and within one boot.
    """
    until = _Until(budget_s, cases)
    done = reported = 0
    with seeded(seed) as rng:
        # blocks small enough that every byte can be cut, in a log with segments before it
        log = _log(rng, 17, config=StreamConfig(segment_bytes=16384), before=4)
        whole = log.files.content(log.segment)[: log.blocks[-1][1]]
        first = len(log.blocks) - 16
        start, end = log.blocks[first][0], log.blocks[-1][1]
        places = list(range(start, end + 1))
        rng.shuffle(places)
        for cut in places:
            if not until.more(done):
                break
            keeps = max((b for b in log.blocks if b[1] <= cut), key=lambda b: b[1])
            with _named(seed, lambda c=cut: f"last segment cut at byte {c}"):  # type: ignore[misc]
                for slack in (b"", b"\0" * 600):
                    _torn(log, whole[:cut] + slack, keeps, cut)
                if keeps[1] < end and done % 4 == 0:
                    for number in (1, 2):
                        _shorter(log, whole[:cut], keeps, number, hole=rng.random() < 0.5)
                        reported += 1
            done += 1
        report(f"C03: {done} of {len(places)} cuts of a segment's last 16 blocks, {reported} too short ones reported")
    return {"cuts": done, "of": len(places), "reported": reported, "lost": 0}


def _fresh(log: _Log) -> SimFiles:
    """A copy of the files of a log."""
    log.files.settle()
    return log.files.power_cut(Dice(0))


def _torn(log: _Log, content: bytes, keeps: tuple[int, int, int], cut: int) -> None:
    files = _fresh(log)
    files.put(log.segment, content)
    files.put(f"{PATH}/tail", next(p for b, p in zip(log.blocks, log.pages, strict=True) if b == keeps))
    box = Box(files, 2)
    tail = box.reader.tail()
    assert tail.durable == keeps[2], f"last is {tail.durable}, whole blocks reach {keeps[2]}"
    records = box.all()
    assert [r.sequence for r in records] == list(range(1, keeps[2] + 1))
    assert all(r.id == log.model.acked[r.sequence] and r.data == log.model.tried[r.id] for r in records)
    assert not box.journal.verify().damage
    torn = content[keeps[1] : cut].rstrip(b"\0")
    aside = [files.content(p) for p in files.paths() if "/quarantine/" in p]
    assert aside == ([torn] if torn else []), "what was cut is kept"
    assert box.append([Message("a", b"next", "next")]) == [keeps[2] + 1]
    box.close()


def _shorter(log: _Log, content: bytes, keeps: tuple[int, int, int], number: int, *, hole: bool) -> None:
    """The page has published more than the segment holds now."""
    files = _fresh(log)
    end, last = log.blocks[-1][1], log.blocks[-1][2]
    files.put(log.segment, content + (b"\0" * (end - len(content)) if hole else b""))
    box = Box(files, number)
    records, lost = _with_gaps(box)
    assert [r.sequence for r in records] == list(range(1, keeps[2] + 1))
    assert all(r.id == log.model.acked[r.sequence] and r.data == log.model.tried[r.id] for r in records)
    assert lost == [(keeps[2] + 1, last)], f"lost {lost}, not {keeps[2] + 1} to {last}"
    damage = box.journal.verify().damage
    assert [(d.first, d.last) for d in damage] == lost, f"verify says {damage}"
    assert box.append([Message("a", b"next", "next")]) == [last + 1], "a published sequence was given again"
    records, lost = _with_gaps(box)
    assert records[-1].id == "next"
    assert lost == [(keeps[2] + 1, last)]
    box.close()
    records, lost = _with_gaps(Box(files, number + 1))
    assert records[-1].id == "next"
    assert lost == [(keeps[2] + 1, last)], f"after another boot: {lost}"


def _with_gaps(box: Box) -> tuple[list[Record], list[tuple[int, int]]]:
    """All that can be read, and the ranges that DataLoss named."""
    out: list[Record] = []
    lost: list[tuple[int, int]] = []
    tail = box.reader.tail()
    at = tail.first - 1
    while True:
        try:
            page = box.reader.page(after=at, match=None, limit=1000, bytes_max=1 << 30)
        except DataLoss as exc:
            if exc.first <= at or exc.last < exc.first or exc.resume_after < exc.last:
                raise AssertionError(f"a range that cannot be: after {at}, {exc.first} to {exc.last}") from exc
            lost.append((exc.first, exc.last))
            at = exc.resume_after
            continue
        out.extend(page.records)
        if page.scanned >= page.last:
            return out, lost
        at = page.scanned


# -- C04: bit rot -----------------------------------------------------------------------------------------------------


def c04(budget_s: float, seed: int, report: Report, *, cases: int | None = None) -> dict[str, Any]:
    """Bit rot: flip bits of a 64 KiB segment (all of them without `cases`), of its index, and of the small files.

    Every flip in the segment is noticed, by a read or by verify; no payload differs from what was written; nothing but
    the block that was hit is lost, before and after a reboot. Flips anywhere else lose nothing.
    """
    until = _Until(budget_s, cases)
    with seeded(seed) as rng:
        log, last = _rotten(rng), _rotten(rng, blocks=40)
        path = f"{PATH}/{1:020d}.seg"
        bits = len(log.files.content(path)) * 8
        order = list(range(bits))
        rng.shuffle(order)
        flipped = reboots = 0
        everything = _content(log)
        of_last = _content(last)
        for bit in order:
            if not until.more(flipped):
                break
            with _named(seed, lambda b=bit: f"bit {b} of the segment"):  # type: ignore[misc]
                _flipped(log, bit, 1, everything)
                if flipped % 64 == 0:
                    _flipped(log, bit, 2, everything)
                    _flipped(last, rng.randrange(last.blocks[-1][1] * 8), 2, of_last)
                    reboots += 2
            flipped += 1
        small = 0
        for name in (f"{1:020d}.idx", "tail", "lock", "trim"):
            size = len(log.files.content(f"{PATH}/{name}"))
            some = list(range(size * 8))
            rng.shuffle(some)
            for bit in some[: 150 if cases is not None else None]:
                with _named(seed, lambda n=name, b=bit: f"bit {b} of {n}"):  # type: ignore[misc]
                    _rot_elsewhere(log, f"{PATH}/{name}", bit, everything, rng)
                small += 1
        report(f"C04: {flipped} of {bits} bits flipped in a segment, {reboots} with a reboot; {small} in other files")
    return {"bits": flipped, "of": bits, "reboots": reboots, "other_files": small, "undetected": 0, "wrong": 0}


def _rotten(rng: random.Random, *, blocks: int = 0) -> _Log:
    """A log whose first segment is about 64 KiB of small and large blocks, with a second one behind it; or, with
    `blocks`, has just these in its only segment."""
    files = SimFiles("/log/streams")
    clock = Tick()
    Box.create(files, StreamConfig(segment_bytes=(1024 if blocks else 64) * 1024), clock)
    box = Box(files, 1, clock=clock)
    model = Model()
    places: list[tuple[int, int, int]] = []
    while box.journal.tail.segment == 1 and not 0 < blocks == len(places):
        start, first = box.journal.tail.end, box.journal.tail.durable + 1
        model.append(box, model.messages(rng.randint(1, 24), rng.choice((0, 20, 300))))
        if box.journal.tail.segment == 1:
            places.append((start, box.journal.tail.end, first))
    model.append(box, model.messages(3, 50))
    if blocks:
        places.append((places[-1][1], box.journal.tail.end, box.journal.tail.durable - 2))
    model.trim(box, 2)
    files.settle()
    box.close()
    return _Log(files, model, f"{PATH}/{1:020d}.seg", places, [])


def _content(log: _Log) -> list[tuple[int, str, bytes]]:
    box = Box(log.files, 1)
    out = [(r.sequence, r.id, r.data) for r in box.all()]
    box.close()
    return out


def _flipped(log: _Log, bit: int, number: int, everything: list[tuple[int, str, bytes]]) -> None:
    """One bit of the first segment, seen within the boot that wrote it or after another one."""
    hit = next((b for b in log.blocks if b[0] <= bit >> 3 < b[1]), None)
    log.files.flip(log.segment, bit)
    files = log.files if number == 1 else log.files.power_cut(Dice(0))
    box = Box(files, number)
    _rot(log, box, everything, hit)
    if number > 1:
        assert box.append([Message("a", b"on", "on")]) == [everything[-1][0] + 1]
        assert box.all(after=everything[-1][0])[0].data == b"on"
    box.close()
    log.files.flip(log.segment, bit)


def _rot(log: _Log, box: Box, everything: list[tuple[int, str, bytes]], hit: tuple[int, int, int] | None) -> None:
    records, lost = _with_gaps(box)
    given = [(r.sequence, r.id, r.data) for r in records]
    missing = {s for first, last in lost for s in range(first, last + 1)}
    assert given == [e for e in everything if e[0] not in missing], "a wrong payload, or a record skipped silently"
    damage = box.journal.verify().damage
    assert damage, "not noticed"
    if hit is None:
        assert not missing, f"a flip in the header lost {sorted(missing)}"
        return
    bases = box.journal.segments.bases
    behind = bases[1] if len(bases) > 1 else everything[-1][0] + 1
    following = next((b[2] for b in log.blocks if b[0] == hit[1]), behind)
    assert all(hit[2] <= s < following for s in missing), f"block of {hit[2]} was hit, {sorted(missing)} are lost"
    assert {s for d in damage for s in range(d.first, d.last + 1)} == missing


def _rot_elsewhere(
    log: _Log, path: str, bit: int, everything: list[tuple[int, str, bytes]], rng: random.Random
) -> None:
    for number in (1, 2):
        files = log.files.power_cut(Dice(0))
        files.flip(path, bit)
        box = Box(files, number, clock=Tick(1_800_000_000_000_000_000))
        assert [(r.sequence, r.id, r.data) for r in box.all()] == everything
        after, _, _ = rng.choice(everything)
        assert [(r.sequence, r.id, r.data) for r in box.all(after=after)] == [e for e in everything if e[0] > after]
        assert not box.journal.verify().damage
        assert box.append([Message("a", b"on", "on")]) == [everything[-1][0] + 1]
        at = box.all(after=everything[-1][0])[0].timestamp_ns
        assert box.reader.locate(at) == everything[-1][0] + 1
        assert box.reader.locate(1) == everything[0][0]
        times = {r.timestamp_ns: r.sequence for r in reversed(box.all())}
        for time_ns in rng.sample(sorted(times), 5):
            assert box.reader.locate(time_ns) == times[time_ns], "located elsewhere than by a scan"
        box.close()


# -- C05: failing operations ------------------------------------------------------------------------------------------

WORKLOAD: tuple[Step, ...] = (
    Step("append", 2, 100),
    Step("append", 3, 1500),
    Step("read"),
    Step("append", 2, 1200),
    Step("again", 3),
    Step("reopen"),
    Step("append", 1, 6000),
    Step("trim", 50),
    Step("append", 2, 500),
    Step("read"),
    Step("trim", 100),
    Step("append", 3, 900),
    Step("erase", 2),
    Step("append", 1, 3000),
    Step("erase", 3, 1),
)
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS, "EINTR": errno.EINTR, "short": SHORT}


def c05(budget_s: float, seed: int, report: Report, *, cases: int | None = None) -> dict[str, Any]:
    """Failing operations: the k-th one, for every k, with every error, once and for ever.

    While it fails, everything raised is ours; what was refused for certain is not stored, what was acknowledged is.
    When it works again, the log goes on, what was unanswered is repeated and stored once, and then the power goes.
    """
    until = _Until(budget_s, cases)
    done = 0
    counts: dict[str, int] = {}
    with seeded(seed) as rng:
        jobs = [
            (name, forever, limited, k)
            for limited in (False, True)
            for name, error in ERRORS.items()
            for forever in (False, True)
            for k in range(1, _operations(error, _config(limited)) + 1)
        ]
        rng.shuffle(jobs)
        for name, forever, limited, k in jobs:
            if not until.more(done):
                break
            how = f"{name} {'from' if forever else 'at'} operation {k}{', limited stream' if limited else ''}"
            with _named(seed, lambda h=how: h):  # type: ignore[misc]
                outcome = _failing(Faults(ERRORS[name], k, forever=forever), _config(limited), rng)
            counts[outcome] = counts.get(outcome, 0) + 1
            done += 1
        report(f"C05: {done} of {len(jobs)} failing operations; outcomes {counts}")
    return {"faults": done, "of": len(jobs), "outcomes": counts, "lost": 0, "doubled": 0}


def _config(limited: bool) -> StreamConfig:
    return StreamConfig(segment_bytes=8192, bytes_max=12_000) if limited else SMALL


def _operations(error: int, config: StreamConfig) -> int:
    world = World(config)
    world.files.faults = faults = Faults(error, 0)
    for step in WORKLOAD:
        world.step(step)
    return faults.seen


def _failing(faults: Faults, config: StreamConfig, rng: random.Random) -> str:
    world = World(config, rng.randrange(1 << 30))
    world.files.faults = faults
    model = world.model
    unanswered: list[Message] = []
    errors: list[str] = []

    def attempt(call: Callable[[], Any]) -> MistError | None:
        try:
            result = call()
        except MistError as exc:
            result = exc
        if isinstance(result, MistError):
            errors.append(type(result).__name__)
            return result
        return None

    for step in WORKLOAD:
        if world.box is None and attempt(world.opened) is not None:
            continue
        box = world.opened()
        if step.what == "append":
            messages = model.messages(step.count, step.size)
            if attempt(lambda b=box, m=messages: model.append(b, m)) is not None:  # type: ignore[misc]
                unanswered.extend(m for m in messages if m.id not in model.acked.values())
        else:
            attempt(lambda s=step: world.step(s))  # type: ignore[misc]
    faults.heal()
    assert faults.hits, "the fault was never met"
    waiting = list(unanswered)
    with suppress(MistError):  # this look may still find the log as the fault left it
        opened = world.opened()
        with opened.journal.locked():
            pass
        _holds(world, opened, config)
    model.refused.clear()
    for _ in range(2):
        error = attempt(lambda: model.append(world.opened(), model.messages(1, 50)))
        if error is None:
            break
    assert error is None, f"does not go on when the fault is gone: {error!r}, after {faults.where}"
    box = world.opened()
    if waiting:
        model._acked(waiting, box.append(waiting))
    _holds(world, box, config)
    number = world.number
    for files in world.files.crash_states(most=3, seed=rng.randrange(1 << 30)):
        after = world.cut(files)
        _holds(after, after.opened(), config)
        assert after.number == number + 1
    return "unnoticed" if not errors else ("ambiguous" if "Ambiguous" in errors else "definite")


def _holds(world: World, box: Box, config: StreamConfig) -> None:
    tail = box.reader.tail()
    if config.bytes_max:
        world.model.first_asked = max(world.model.first_asked, tail.first)
    world.model.check(box.all(), tail.first, tail.durable)
    world.model.nowhere(world.files)
    assert not box.journal.verify().damage
