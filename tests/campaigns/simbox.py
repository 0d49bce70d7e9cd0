"""A log on simulated files, driven without an event loop, and the memory of what it promised.

`Box` is one process on one boot: journal, reader and the real Committer, called from this thread. `Model` knows every
message that was tried, which were acknowledged, which a reader saw, what was trimmed; `check` says what a log found
later must hold.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import mist.log.journal
from mist.broker.base import Message, Record, StreamConfig
from mist.broker.clock import Clock
from mist.broker.notify import Notifier
from mist.errors import Ambiguous, DataLoss, MistError, PartialAppend
from mist.log.committer import Committer
from mist.log.files import Files
from mist.log.format import TAIL_BYTES, decode_tail
from mist.log.journal import LOG_DEFAULTS, Journal, storage_error
from mist.log.reader import Reader
from mist.testing.simfiles import PowerCut, SimFiles

STREAMS = "/log/streams"
NAME = "s"
PATH = f"{STREAMS}/{NAME}"


class Tick(Clock):
    """Every look at the clock is a millisecond later."""

    def __init__(self, start_ns: int = 1_700_000_000_000_000_000) -> None:
        self.now_ns = start_ns

    def time_ns(self) -> int:
        self.now_ns += 1_000_000
        return self.now_ns

    def monotonic(self) -> float:
        return self.now_ns / 1e9


@contextmanager
def seeded(seed: int) -> Iterator[random.Random]:
    """Names and incarnations of the log from a seed, so that a failure comes again; little space reserved ahead, so that
    thousands of logs are looked at in a short time."""
    rng = random.Random(seed)
    module: Any = mist.log.journal
    real = module.secrets, module._RESERVE_MIN
    module.secrets = SimpleNamespace(token_hex=lambda n: f"{rng.getrandbits(8 * n):0{2 * n}x}")
    module._RESERVE_MIN = 16 * 1024
    try:
        yield rng
    finally:
        module.secrets, module._RESERVE_MIN = real


def boot(number: int) -> bytes:
    return number.to_bytes(16, "big")


class _Loop:
    """What the Committer needs of an event loop when nobody runs its thread."""

    def create_future(self) -> Any:
        return SimpleNamespace(done=lambda: True)


class Box:
    """One process with the stream open. Raises what the log raises."""

    def __init__(self, files: Files, number: int, *, clock: Clock | None = None, warm: bool = True) -> None:
        self.files = files
        self.clock = clock or Tick()
        try:
            self.journal = Journal(files, self.clock, PATH, boot(number))
        except OSError as exc:
            raise storage_error(exc, "open") from exc
        self.reader = Reader(self.journal)
        self.committer: Any = Committer(self.journal, _Loop(), Notifier(), 1.0)  # type: ignore[arg-type]
        self.committer._thread = object()  # never started: `append` does its work
        if warm:
            with self.journal.locked():
                pass

    @staticmethod
    def create(files: Files, config: StreamConfig, clock: Clock | None = None) -> None:
        try:
            Journal.create(files, clock or Tick(), STREAMS, NAME, config.or_defaults(LOG_DEFAULTS))
        except OSError as exc:
            raise storage_error(exc, "create") from exc

    def append(self, messages: list[Message], expected_last: int | None = None) -> list[int]:
        self.committer.append(messages, expected_last)
        (request,) = self.committer._swap()
        try:
            if not self.journal.try_lock():
                raise AssertionError("the lock is held by nobody we know")
        except OSError as exc:
            raise storage_error(exc, "lock") from exc  # as the Committer's thread does
        try:
            self.committer._commit([request])
        finally:
            if not getattr(self.files, "dead", False):
                self.journal.unlock()
        self.committer._bytes = self.committer._count = 0
        if getattr(self.files, "dead", False):
            raise PowerCut
        if request.error is not None:
            raise request.error
        return list(request.result)

    def trim(self, before: int) -> None:
        with self.journal.locked():
            self.journal.trim(before)

    def erase(self, sequences: list[int]) -> int:
        """As LogStream.erase does it: segment by segment, each under the lock."""
        left, count = sorted(sequences), 0
        while left:
            with self.journal.locked():
                part = self.journal.erase(left)
            assert not part.damage, f"nothing is damaged, it says {part.damage}"
            count += part.records
            left = [s for s in left if s > part.upto]
        return count

    def all(self, *, after: int | None = None, limit: int = 1000, skip: bool = False) -> list[Record]:
        """Everything kept, page by page; with `skip`, over the damage."""
        out: list[Record] = []
        tail = self.reader.tail()
        at = tail.first - 1 if after is None else after
        while True:
            try:
                page = self.reader.page(after=at, match=None, limit=limit, bytes_max=1 << 30)
            except DataLoss as exc:
                if not skip:
                    raise
                if exc.resume_after <= at:
                    raise AssertionError("damage that does not end") from exc
                at = exc.resume_after
                continue
            out.extend(page.records)
            if page.scanned >= page.last:
                return out
            assert page.scanned > at, "a page that does not move"
            at = page.scanned

    def close(self) -> None:
        self.committer._reader and self.committer._reader.close()
        self.reader.close()
        self.journal.close()


class Model:
    """What was tried and promised."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        self.tried: dict[str, bytes] = {}
        self.acked: dict[int, str] = {}
        self.refused: set[str] = set()
        """Ids whose append failed definitely: not stored, unless tried again later."""
        self.seen: dict[int, str] = {}
        self.first = 1
        """Records below this are gone: trim returned."""
        self.first_asked = 1
        """A trim up to here was asked for and may have happened."""
        self.in_flight: list[Message] = []
        self.erased: set[int] = set()
        """These are gone: erase returned."""
        self.erase_asked: set[int] = set()
        """These may be."""

    def copy(self) -> Model:
        new = Model()
        for name in ("tried", "acked", "refused", "seen", "erased", "erase_asked"):
            setattr(new, name, getattr(self, name).copy())
        new.first, new.first_asked, new.in_flight = self.first, self.first_asked, list(self.in_flight)
        new.numbers = itertools.count(len(self.tried) + 1)
        return new

    def messages(self, count: int, size: int) -> list[Message]:
        out = []
        for _ in range(count):
            n = next(self.numbers)
            id = f"id-{n}"
            data = f"{n}:".encode().ljust(size, b"abcdefghij"[n % 10 : n % 10 + 1])
            self.tried[id] = data
            out.append(Message(f"a.{n % 3}", data, id))
        return out

    def append(self, box: Box, messages: list[Message]) -> MistError | None:
        """Append, and remember what came of it. PowerCut goes on; ours is returned."""
        self.in_flight = messages
        try:
            sequences = box.append(messages)
        except PartialAppend as exc:
            self._acked(messages[: len(exc.sequences)], exc.sequences)
            self.in_flight = []
            return exc
        except Ambiguous as exc:
            self.in_flight = []
            return exc
        except MistError as exc:
            self.refused.update(m.id for m in messages if m.id not in self.acked.values())
            self.in_flight = []
            return exc
        self.in_flight = []
        self._acked(messages, sequences)
        return None

    def _acked(self, messages: list[Message], sequences: list[int]) -> None:
        for m, s in zip(messages, sequences, strict=True):
            assert self.acked.get(s, m.id) == m.id, f"sequence {s} was given twice: {self.acked[s]} and {m.id}"
            self.acked[s] = m.id
            self.refused.discard(m.id)

    def trim(self, box: Box, before: int) -> MistError | None:
        self.first_asked = max(self.first_asked, before)
        try:
            box.trim(before)
        except MistError as exc:
            return exc
        self.first = max(self.first, before)
        return None

    def erase(self, box: Box, sequences: list[int]) -> MistError | None:
        self.erase_asked.update(sequences)
        try:
            box.erase(sequences)
        except MistError as exc:
            return exc
        self.erased.update(sequences)
        return None

    def nowhere(self, files: SimFiles) -> None:
        """What was erased is in no file of the stream. (What is set aside is no record.)"""
        contents = {p: files.content(p) for p in files.paths() if p.startswith(PATH) and "/quarantine/" not in p}
        for sequence in self.erased & self.acked.keys():
            id = self.acked[sequence].encode()
            for path, content in contents.items():
                assert bytes([0xA0 + len(id)]) + id not in content, f"erased record {sequence} is still in {path}"

    def look(self, records: list[Record]) -> None:
        """A reader was given these: they must stay what they are."""
        for r in records:
            assert self.tried.get(r.id) == r.data, f"record {r.sequence} is not what was written"
            assert self.seen.get(r.sequence, r.id) == r.id, f"record {r.sequence} changed"
            assert self.acked.get(r.sequence, r.id) == r.id, f"record {r.sequence} is not the acknowledged one"
            self.seen[r.sequence] = r.id

    def peek(self, files: SimFiles, box: Box | None, number: int) -> None:
        """At the instant of a crash: what a reader beside the writer could have been given."""
        try:
            tail = decode_tail(files.content(f"{PATH}/tail")[:TAIL_BYTES])
        except FileNotFoundError:
            return
        if box is None or tail is None or tail.boot != boot(number) or tail.deleted:
            return
        try:
            self.look(box.all())
        except (PowerCut, MistError):
            return

    def check(self, records: list[Record], first: int, last: int, *, power: bool = True) -> None:
        """What must hold of a log found later: nothing promised is missing, nothing doubled, nothing invented."""
        sequences = [r.sequence for r in records]
        missing = set(range(first, last + 1)) - set(sequences)
        assert sequences == sorted(set(sequences)), f"out of order: {sequences}"
        assert missing <= self.erase_asked, f"not dense: {sequences} in {first}..{last}, erased {self.erase_asked}"
        assert not self.erased & set(sequences), f"erased records are back: {self.erased & set(sequences)}"
        assert first <= max(self.first_asked, 1), f"first is {first}, trimmed up to {self.first_asked}"
        assert first >= self.first, f"trimmed records are back: first {first}, trimmed up to {self.first}"
        by = {r.sequence: r for r in records}
        ids = [r.id for r in records]
        assert len(set(ids)) == len(ids), f"doubled: {sorted(i for i in set(ids) if ids.count(i) > 1)}"
        for promised, what in ((self.acked, "acknowledged"), (self.seen, "seen by a reader")):
            for sequence, id in promised.items():
                if sequence < first or (sequence in self.erase_asked and sequence not in by):
                    continue
                assert sequence in by, f"record {sequence} ({id}) was {what} and is lost"
                assert by[sequence].id == id, f"record {sequence} was {what} as {id}, it is {by[sequence].id}"
        for r in records:
            assert self.tried.get(r.id) == r.data, f"record {r.sequence} is not what was written"
            assert r.id not in self.refused, f"{r.id} was refused for certain and is stored"


__all__ = ["NAME", "PATH", "STREAMS", "Box", "Model", "Tick", "boot", "seeded"]
