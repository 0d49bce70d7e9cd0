"""One checker for what processes did to a stream: recorded histories in, every broken promise out.

Every process writes what it called and what it was told as JSON lines, one `write` per line, so that kill -9 loses at most
the line being written. The checker needs no luck with timing: it compares stated results with the final content, and uses
times only where one call ended before another began (monotonic clock of one machine and boot).

Messages are numbered: a *lane* is one caller that appends its messages 1, 2, 3… with one call at a time and repeats a call
until its fate is known. So (lane, number) names a message, and order, holes, doubles and phantoms can be told.

What it does not do: decide whether a process was allowed to fail. A call without an answer, and `ambiguous`, mean
"stored or not"; every other error means "certainly not stored".
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

Runs = list[tuple[int, int]]
"""Sequences as (first, count), ascending within a run."""

Seen = list[tuple[int, str, int, int]]
"""Records as (first sequence, lane, first number, count): consecutive records of consecutive numbers of one lane."""


class Event(Struct, frozen=True, kw_only=True, tag_field="op", omit_defaults=True):
    """Times are monotonic nanoseconds. An event written before a call has only `start_ns`."""

    start_ns: int
    end_ns: int = 0


class Append(Event, frozen=True, kw_only=True, tag="append"):
    """About to append the messages first .. first + count - 1 of a lane."""

    lane: str
    first: int
    count: int


class Appended(Event, frozen=True, kw_only=True, tag="appended"):
    """The answer to the lane's last Append. With `partial_append`, `sequences` are those of the stored prefix."""

    lane: str
    first: int
    count: int
    sequences: Runs = []
    error: str = ""


class Read(Event, frozen=True, kw_only=True, tag="read"):
    """One page. `final`: part of a replay from the first kept record to the end, after everything ended."""

    reader: str
    after: int
    scanned: int = 0
    last: int = 0
    records: Seen = []
    bad: list[int] = []
    """Sequences whose id, subject or data is not what was appended under that number."""
    final: bool = False
    error: str = ""


class Trim(Event, frozen=True, kw_only=True, tag="trim"):
    """About to remove the records below `before`."""

    before: int


class Erase(Event, frozen=True, kw_only=True, tag="erase"):
    """About to erase records; nobody repeats the appends of these."""

    sequences: Runs


class Erased(Event, frozen=True, kw_only=True, tag="erased"):
    """They are gone."""

    sequences: Runs


class Save(Event, frozen=True, kw_only=True, tag="save"):
    """About to save a checkpoint."""

    name: str
    sequence: int


class Saved(Event, frozen=True, kw_only=True, tag="saved"):
    name: str
    sequence: int
    error: str = ""


class Loaded(Event, frozen=True, kw_only=True, tag="loaded"):
    """`sequence` is -1 when there was none."""

    name: str
    sequence: int = -1
    error: str = ""


class Consuming(Event, frozen=True, kw_only=True, tag="consuming"):
    """The settings of a consumer; every worker may write it."""

    consumer: str
    after: int
    ack_wait_s: float
    attempts_max: int


class Fetched(Event, frozen=True, kw_only=True, tag="fetched"):
    """Deliveries as (first sequence, count, attempt)."""

    consumer: str
    deliveries: list[tuple[int, int, int]] = []
    error: str = ""


class Settle(Event, frozen=True, kw_only=True, tag="settle"):
    """About to `ack`, `nak` or `term`."""

    consumer: str
    how: str
    sequences: Runs


class Settled(Event, frozen=True, kw_only=True, tag="settled"):
    """`count` of them were still ours."""

    consumer: str
    how: str
    sequences: Runs
    count: int = 0
    error: str = ""


class Looked(Event, frozen=True, kw_only=True, tag="looked"):
    """What `info` of a consumer said. `final`: after all work was done."""

    consumer: str
    floor: int
    delivered: int
    pending: int
    lag: int
    final: bool = False


class Buried(Event, frozen=True, kw_only=True, tag="buried"):
    """A dead letter, found at the end."""

    consumer: str
    sequence: int
    attempts: int
    reason: str = ""


AnyEvent = (
    Append
    | Appended
    | Read
    | Trim
    | Erase
    | Erased
    | Save
    | Saved
    | Loaded
    | Consuming
    | Fetched
    | Settle
    | Settled
    | Looked
    | Buried
)
_decoder = msgspec.json.Decoder(AnyEvent)
_encode = msgspec.json.Encoder().encode


class Recorder:
    """Appends events to one process's file. Opening it again, after a kill, drops a torn last line."""

    def __init__(self, path: str | Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        size = os.fstat(self._fd).st_size
        whole = size
        while whole:
            start = max(0, whole - 65_536)
            at = os.pread(self._fd, whole - start, start).rfind(b"\n")
            whole = start + at + 1 if at >= 0 else start
            if at >= 0:
                break
        if whole != size:
            os.ftruncate(self._fd, whole)

    def write(self, event: AnyEvent) -> None:
        os.write(self._fd, _encode(event) + b"\n")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def load(path: str | Path) -> list[AnyEvent]:
    """The events of one process. A torn last line (killed while writing) is left out; any other bad line raises."""
    lines = Path(path).read_bytes().split(b"\n")
    return [_decoder.decode(line) for line in lines[:-1]]


def runs(sequences: Sequence[int]) -> Runs:
    """Sequences as runs, in the order given."""
    out: Runs = []
    for s in sequences:
        if out and s == out[-1][0] + out[-1][1]:
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((s, 1))
    return out


def spread(of: Runs) -> list[int]:
    """The sequences of runs."""
    return [s for first, count in of for s in range(first, first + count)]


class Problem(NamedTuple):
    """`promise` is one word: lost, moved, doubled, order, hole, gap, phantom, replay, page, stale, back, time, checkpoint,
    missed, floor, final, exclusive, attempt, buried, unread."""

    promise: str
    text: str


class Verdict(Struct, frozen=True, kw_only=True):
    """`problems` holds the first ones of each kind, `totals` how many there were of each."""

    problems: list[Problem]
    totals: dict[str, int]
    counts: dict[str, int]

    @property
    def ok(self) -> bool:
        return not self.totals

    def __str__(self) -> str:
        if self.ok:
            return "no broken promise"
        shown = "; ".join(f"{p.promise}: {p.text}" for p in self.problems[:10])
        return f"{sum(self.totals.values())} broken promises ({self.totals}): {shown}"


_SHOWN = 5
_DEADLINE_NS = 2_000_000
"""Deadlines are kept in whole milliseconds, so a record may come back that much early."""


class _Call:
    """A call and what became of it: `error` is None while it has no answer."""

    __slots__ = ("asked", "end_ns", "error", "said")

    def __init__(self, asked: Append | Save | Settle) -> None:
        self.asked = asked
        self.error: str | None = None
        self.end_ns = 0
        self.said: Appended | Saved | Settled | None = None

    @property
    def perhaps(self) -> bool:
        """Whether it may have had an effect."""
        return self.error in (None, "", "ambiguous", "partial_append")


class Checker:
    """Add the events of every process, then `check` once. `dense`: sequences have no gaps (log, memory). `retention`: the
    stream may let records go by itself. `remote`: there is a network between, so a call may time out, and a checkpoint
    whose save failed that way may be stored; and a page with records may state the end as of when these were sent. `forgets`: the server was killed and may have lost its last acks and
    attempts, so a record may be delivered again after its ack; everything else still counts."""

    def __init__(
        self, *, dense: bool = True, retention: bool = False, remote: bool = False, forgets: bool = False
    ) -> None:
        self._dense = dense
        self._retention = retention
        self._forgets = forgets
        self._remote = remote
        self._unsure = ("unavailable", "timeout") if remote else ()
        self._away = ("unavailable", "closed", *self._unsure)
        self._problems: list[Problem] = []
        self._totals: Counter[str] = Counter()
        self._events = 0
        self._appends: dict[str, list[_Call]] = defaultdict(list)
        self._saves: dict[str, list[_Call]] = defaultdict(list)
        self._settles: dict[str, list[_Call]] = defaultdict(list)
        self._reads: list[Read] = []
        self._trims: list[Trim] = []
        self._erasing: set[int] = set()
        self._erased: list[Erased] = []
        self._loads: dict[str, list[Loaded]] = defaultdict(list)
        self._consuming: dict[str, Consuming] = {}
        self._fetches: dict[str, list[Fetched]] = defaultdict(list)
        self._looks: dict[str, list[Looked]] = defaultdict(list)
        self._buried: dict[str, list[Buried]] = defaultdict(list)
        self._first = 1
        self._last = 0
        self._at: dict[int, tuple[str, int]] = {}
        self._where: dict[str, dict[int, int]] = defaultdict(dict)

    def add_files(self, paths: Iterable[str | Path]) -> None:
        for path in paths:
            self.add(load(path))

    def add(self, events: Iterable[AnyEvent]) -> None:
        """The events of one process, in the order it wrote them."""
        calls: dict[tuple[str, str], _Call] = {}
        for e in events:
            self._events += 1
            match e:
                case Append():
                    calls["append", e.lane] = call = _Call(e)
                    self._appends[e.lane].append(call)
                case Save():
                    calls["save", e.name] = call = _Call(e)
                    self._saves[e.name].append(call)
                case Settle():
                    calls["settle", e.consumer] = call = _Call(e)
                    self._settles[e.consumer].append(call)
                case Appended():
                    self._answer(calls.pop(("append", e.lane), None), e)
                case Saved():
                    self._answer(calls.pop(("save", e.name), None), e)
                case Settled():
                    self._answer(calls.pop(("settle", e.consumer), None), e)
                case Read():
                    self._reads.append(e)
                case Trim():
                    self._trims.append(e)
                case Erase():
                    self._erasing.update(spread(e.sequences))
                case Erased():
                    self._erased.append(e)
                case Loaded():
                    self._loads[e.name].append(e)
                case Consuming():
                    self._consuming[e.consumer] = e
                case Fetched():
                    self._fetches[e.consumer].append(e)
                case Looked():
                    self._looks[e.consumer].append(e)
                case Buried():
                    self._buried[e.consumer].append(e)

    def _answer(self, call: _Call | None, said: Appended | Saved | Settled) -> None:
        if call is None:
            raise ValueError(f"history: an answer without a call: {said}")
        call.said, call.error, call.end_ns = said, said.error, said.end_ns

    def _broken(self, promise: str, text: str) -> None:
        self._totals[promise] += 1
        if self._totals[promise] <= _SHOWN:
            self._problems.append(Problem(promise, text))

    def check(self) -> Verdict:
        self._check_content()
        self._check_appends()
        self._check_pages()
        self._check_erased()
        self._check_order_in_time()
        for name in sorted({*self._saves, *self._loads}):
            self._check_checkpoint(name, self._saves[name], self._loads[name])
        for consumer in sorted({*self._fetches, *self._looks, *self._buried}):
            self._check_consumer(consumer)
        return Verdict(problems=self._problems, totals=dict(self._totals), counts=self._counts())

    def _counts(self) -> dict[str, int]:
        appends = [c for calls in self._appends.values() for c in calls]
        fetches = [f for each in self._fetches.values() for f in each]
        return {
            "events": self._events,
            "records": len(self._at),
            "acked": sum(c.asked.count for c in appends if isinstance(c.asked, Append) and c.error == ""),
            "unknown": sum(c.error in (None, "ambiguous") for c in appends),
            "refused": sum(not c.perhaps for c in appends),
            "reads": len(self._reads),
            "saves": sum(map(len, self._saves.values())),
            "loads": sum(map(len, self._loads.values())),
            "deliveries": sum(d[1] for f in fetches for d in f.deliveries),
            "buried": sum(map(len, self._buried.values())),
        }

    # -- the content --------------------------------------------------------------------------------------------------

    def _check_content(self) -> None:
        """Take the final replays in: the first one is the content, the others must equal it."""
        finals: dict[str, list[Read]] = defaultdict(list)
        for page in self._reads:
            if page.final:
                finals[page.reader].append(page)
        if not finals and (self._appends or self._fetches):
            self._broken("unread", "nobody read the stream at the end")
        for reader, pages in finals.items():
            content: dict[int, tuple[str, int]] = {}
            position = pages[0].after
            for page in pages:
                if page.error:
                    self._broken("unread", f"{reader}: after {page.after}: {page.error}")
                if page.after != position:
                    self._broken("unread", f"{reader}: page after {page.after} does not follow {position}")
                position = page.scanned
                content.update(_each(page))
            last = max(page.last for page in pages)
            if position != last:
                self._broken("unread", f"{reader}: ended at {position} of {last}")
            if not self._at:
                self._at, self._first, self._last = content, pages[0].after + 1, last
            elif content != self._at:
                self._broken("replay", f"{reader}: another content than the first replay")
        if self._dense:
            for s in range(self._first, self._last + 1):
                if s not in self._at and s not in self._erasing:
                    self._broken("gap", f"nothing at sequence {s}")
        if self._first > 1 and not self._retention:
            asked = max((t.before for t in self._trims), default=1)
            if not self._erasing.issuperset(range(asked, self._first)):
                self._broken("lost", f"the first kept record is {self._first}, nobody trimmed beyond {asked}")
        for s in sorted(self._at):
            lane, number = self._at[s]
            known = self._where[lane]
            if number in known:
                self._broken("doubled", f"{lane} {number} at {known[number]} and {s}")
            else:
                known[number] = s

    def _check_appends(self) -> None:
        erased = self._gone()
        for lane in sorted({*self._appends, *self._where}):
            where = self._where[lane]
            gone = erased.get(lane, frozenset[int]())
            calls = self._appends[lane]
            possible: set[int] = set()
            for call in calls:
                asked = call.asked
                assert isinstance(asked, Append)
                if call.perhaps:
                    possible.update(range(asked.first, asked.first + asked.count))
                if isinstance(call.said, Appended) and call.error in ("", "partial_append"):
                    self._check_acked(asked, call.said, where)
            for number, s in where.items():
                if number not in possible:
                    self._broken("phantom", f"{lane} {number} at {s} was never appended, or refused")
            numbers = sorted(where)
            for one, two in pairwise(numbers):
                if where[one] >= where[two]:
                    self._broken("order", f"{lane}: {one} at {where[one]}, {two} at {where[two]}")
                if not gone.issuperset(range(one + 1, two)):
                    self._broken("hole", f"{lane}: {two} is stored, {one + 1} is not")
            if numbers and self._first == 1 and not gone.issuperset(range(1, numbers[0])):
                self._broken("hole", f"{lane}: {numbers[0]} is stored, 1 is not")

    def _check_acked(self, asked: Append, said: Appended, where: dict[int, int]) -> None:
        stated = spread(said.sequences)
        if len(stated) != asked.count and not (said.error and len(stated) < asked.count):
            self._broken("lost", f"{asked.lane} {asked.first}: {len(stated)} sequences for {asked.count} messages")
        for number, s in enumerate(stated, asked.first):
            found = where.get(number)
            if found is None:
                if s >= self._first and s not in self._erasing:
                    self._broken("lost", f"{asked.lane} {number}, acked at {s}, is not there")
            elif found != s:
                self._broken("moved", f"{asked.lane} {number}, acked at {s}, is at {found}")

    def _check_pages(self) -> None:
        for page in self._reads:
            for s in page.bad:
                self._broken("phantom", f"{page.reader}: record {s} is not what was appended")
            if page.error:
                if page.error != "sequence_expired" and page.error not in self._away:
                    self._broken("page", f"{page.reader}: read after {page.after}: {page.error}")
                continue
            previous = page.after
            for s, message in _each(page):
                if not previous < s <= page.scanned:
                    self._broken("page", f"{page.reader}: record {s} in the page {page.after} to {page.scanned}")
                if self._dense and not self._erasing.issuperset(range(previous + 1, s)):
                    self._broken("page", f"{page.reader}: {s} follows {previous} in a page")
                previous = s
                found = self._at.get(s)
                if s >= self._first and found != message and not (found is None and s in self._erasing):
                    self._broken("replay", f"{page.reader}: {message} at {s}, at the end {self._at.get(s)} is there")
            if self._dense and not self._erasing.issuperset(range(previous + 1, page.scanned + 1)):
                self._broken(
                    "page", f"{page.reader}: {page.scanned} is scanned, the page after {page.after} ends at {previous}"
                )
            if not page.after <= page.scanned <= page.last:
                self._broken("page", f"{page.reader}: after {page.after}, scanned {page.scanned}, last {page.last}")

    def _check_erased(self) -> None:
        """What was erased is in no page that was asked for afterwards."""
        when: dict[int, int] = {}
        for e in self._erased:
            for s in spread(e.sequences):
                when[s] = min(e.end_ns, when.get(s, e.end_ns))
        for page in self._reads if when else ():
            for s, message in _each(page):
                if when.get(s, page.start_ns) < page.start_ns:
                    self._broken("back", f"{page.reader}: {message} at {s} was read after it had been erased")

    def _gone(self) -> dict[str, set[int]]:
        """The numbers of the messages that were or may have been erased, by lane."""
        out: dict[str, set[int]] = defaultdict(set)
        for page in self._reads if self._erasing else ():
            for s, (lane, number) in _each(page):
                if s in self._erasing:
                    out[lane].add(number)
        for lane, calls in self._appends.items() if self._erasing else ():
            for call in calls:
                if isinstance(call.said, Appended) and isinstance(call.asked, Append):
                    stated = enumerate(spread(call.said.sequences), call.asked.first)
                    out[lane].update(number for number, s in stated if s in self._erasing)
        return out

    def _check_order_in_time(self) -> None:
        """What had been acked or seen before a call began lies below what the call appends, and inside what it reads."""
        known: list[tuple[int, int]] = [(p.end_ns, p.last) for p in self._reads if not p.error]
        asked_first: dict[tuple[str, int], int] = {}
        for lane, calls in self._appends.items():
            for call in calls:
                assert isinstance(call.asked, Append)
                for number in range(call.asked.first, call.asked.first + call.asked.count):
                    # a call that was repeated with other messages behind the same first one may have stored it
                    asked_first.setdefault((lane, number), call.asked.start_ns)
                if isinstance(call.said, Appended) and call.said.sequences:
                    known.append((call.end_ns, max(f + n - 1 for f, n in call.said.sequences)))
        highest = _Highest(known)
        for page in self._reads:
            if self._remote and page.records:
                continue  # pushed: the end it states is as old as the records it brings
            if not page.error and page.last < (below := highest.before(page.start_ns)):
                self._broken("stale", f"{page.reader}: the end was {page.last} after {below} had been acked or read")
        for (lane, number), start_ns in asked_first.items():
            s = self._where[lane].get(number)
            if s is not None and s <= (below := highest.before(start_ns)):
                self._broken("time", f"{lane} {number} got {s} after {below} had been acked or read")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _check_checkpoint(self, name: str, saves: list[_Call], loads: list[Loaded]) -> None:
        stored = _Highest([(c.end_ns, c.asked.sequence) for c in saves if isinstance(c.asked, Save) and c.error == ""])
        loads = sorted(loads, key=lambda e: e.start_ns)
        seen = _Highest([(e.end_ns, e.sequence) for e in loads if not e.error])
        asked = {
            c.asked.sequence for c in saves if isinstance(c.asked, Save) and (c.perhaps or c.error in self._unsure)
        }
        for e in loads:
            if e.error in self._unsure:
                continue
            if e.error:
                self._broken("checkpoint", f"{name} cannot be read: {e.error}")
            elif e.sequence >= 0 and e.sequence not in asked:
                self._broken("checkpoint", f"{name} is {e.sequence}, which nobody saved")
            elif e.sequence < (low := max(stored.before(e.start_ns, -1), seen.before(e.start_ns, -1))):
                self._broken("checkpoint", f"{name} went back from {low} to {e.sequence}")
        for c in saves:
            assert isinstance(c.asked, Save)
            low = max(stored.before(c.asked.start_ns, -1), seen.before(c.asked.start_ns, -1))
            if c.error == "" and c.asked.sequence < low:
                self._broken("checkpoint", f"{name}: {c.asked.sequence} was accepted after {low}")

    # -- consumers ----------------------------------------------------------------------------------------------------

    def _check_consumer(self, name: str) -> None:
        config = self._consuming.get(name) or Consuming(
            start_ns=0, consumer=name, after=0, ack_wait_s=0, attempts_max=0
        )
        handed: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for f in self._fetches[name]:
            if f.error and f.error not in (*self._away, "locked", "storage_full"):
                self._broken("missed", f"{name}: fetch: {f.error}")
            for first, count, attempt in f.deliveries:
                for s in range(first, first + count):
                    handed[s].append((f.start_ns, f.end_ns, attempt))
        asked_settled: dict[int, int] = {}  # sequence -> the earliest ack or term call
        done: dict[int, int] = {}  # sequence -> when its ack or term had certainly worked
        given_back: dict[int, list[int]] = defaultdict(list)
        for c in self._settles[name]:
            asked = c.asked
            assert isinstance(asked, Settle)
            sequences = spread(asked.sequences)
            for s in sequences:
                if asked.how == "nak":
                    given_back[s].append(asked.start_ns)
                elif asked_settled.get(s, asked.start_ns) >= asked.start_ns:
                    asked_settled[s] = asked.start_ns
            whole = isinstance(c.said, Settled) and c.error == "" and c.said.count == len(sequences)
            if whole and asked.how != "nak":
                for s in sequences:
                    done[s] = min(done.get(s, c.end_ns), c.end_ns)
        buried = self._check_buried(name, config, done, asked_settled)
        self._check_deliveries(name, config, handed, done, given_back)
        self._check_looks(name, config, asked_settled, buried, handed)

    def _check_buried(
        self, name: str, config: Consuming, done: dict[int, int], asked_settled: dict[int, int]
    ) -> set[int]:
        buried: set[int] = set()
        termed = {
            s
            for c in self._settles[name]
            if isinstance(c.asked, Settle) and c.asked.how == "term"
            for s in spread(c.asked.sequences)
        }
        for b in self._buried[name]:
            if b.sequence in buried:
                self._broken("buried", f"{name}: {b.sequence} is a dead letter twice")
            buried.add(b.sequence)
            if not b.reason:
                self._broken("buried", f"{name}: {b.sequence} is a dead letter without a reason")
            if b.sequence in termed:
                continue
            if config.attempts_max and b.attempts < config.attempts_max:
                self._broken("buried", f"{name}: {b.sequence} is a dead letter after {b.attempts} attempts")
            if b.sequence in done and not self._forgets:
                self._broken("buried", f"{name}: {b.sequence} was acked and is a dead letter")
        for s in termed - buried:
            if s in done:
                self._broken("buried", f"{name}: {s} was termed and is no dead letter")
        return buried

    def _check_deliveries(
        self, name: str, config: Consuming, handed: dict[int, list[tuple[int, int, int]]], done: dict[int, int],
        given_back: dict[int, list[int]],
    ) -> None:  # fmt: skip
        wait_ns = int(config.ack_wait_s * 1e9) - _DEADLINE_NS
        for s, times in handed.items():
            times.sort(key=lambda t: (t[2], t[0]))
            if self._at and s >= self._first and s not in self._at:
                self._broken("phantom", f"{name}: {s} was delivered and is not in the stream")
            settled = done.get(s)
            for start, _, attempt in times:
                if settled is not None and start > settled and not self._forgets:
                    self._broken("final", f"{name}: {s} was delivered after its ack")
                if attempt < 1 or (config.attempts_max and attempt > config.attempts_max):
                    self._broken("attempt", f"{name}: {s} was delivered with attempt {attempt}")
            for (start, _, before), (_, end, attempt) in pairwise(times) if not self._forgets else ():
                if before == attempt:
                    self._broken("attempt", f"{name}: {s} was delivered twice with attempt {attempt}")
                elif end < start:
                    self._broken("attempt", f"{name}: {s}: attempt {attempt} came before attempt {before}")
                # each deadline was set between start and end of its call
                elif end < start + wait_ns and not any(start < t < end for t in given_back[s]):
                    self._broken("exclusive", f"{name}: {s} was handed out twice within the ack wait")

    def _check_looks(
        self, name: str, config: Consuming, asked_settled: dict[int, int], buried: set[int],
        handed: dict[int, list[tuple[int, int, int]]],
    ) -> None:  # fmt: skip
        start = max(config.after + 1, self._first)
        looks = self._looks[name]
        # when everything from the start up to a sequence had been asked to be settled; never, behind the first that was not
        never = 1 << 63
        since: list[int] = []
        latest = 0
        for s in range(start, max((look.floor for look in looks), default=0) + 1):
            latest = max(latest, 0 if s in buried else asked_settled.get(s, never))
            since.append(latest)
        for look in looks:
            if look.floor >= start and since[look.floor - start] > look.end_ns:
                s = start + next(i for i, t in enumerate(since) if t > look.end_ns)
                self._broken("floor", f"{name}: the floor is {look.floor}, {s} was not settled")
            if look.floor > look.delivered:
                self._broken("floor", f"{name}: the floor {look.floor} is above what was delivered, {look.delivered}")
            if not look.final:
                continue
            if look.lag or look.pending or look.floor < self._last:
                self._broken("missed", f"{name}: at the end floor {look.floor}, pending {look.pending}, lag {look.lag}")
            for s in range(start, self._last + 1):
                if s in self._at and s not in handed and s not in buried and s not in asked_settled:
                    self._broken("missed", f"{name}: {s} was never delivered")


class _Highest:
    """The highest value whose time lies before an instant."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        pairs.sort()
        self._times = [t for t, _ in pairs]
        self._values: list[int] = []
        top = -1
        for _, value in pairs:
            top = max(top, value)
            self._values.append(top)

    def before(self, time_ns: int, default: int = 0) -> int:
        at = bisect_left(self._times, time_ns) - 1
        return self._values[at] if at >= 0 else default


def _each(page: Read) -> list[tuple[int, tuple[str, int]]]:
    return [(s + i, (lane, number + i)) for s, lane, number, count in page.records for i in range(count)]
