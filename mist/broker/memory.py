"""`memory:` — the reference broker: the whole contract in one process, nothing on disk.

`memory:` is a new store per connect, `memory:NAME` is shared by every connect in this process, from any thread, and
lives as long as the process. Durability is `memory` and cannot be asked to be more. State lives behind one lock;
nothing awaits while holding it. Does not: keep segments (their settings are kept with the stream and have no effect).
"""

from __future__ import annotations

import asyncio
import heapq
import secrets
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice

from msgspec import Struct
from msgspec.structs import replace

from mist.broker.base import (
    ALL,
    BYTES_MAX,
    DEFAULTS,
    RECORD_BYTES_MAX,
    SEQUENCE_MAX,
    Broker,
    Capabilities,
    Checkpoint,
    Checkpoints,
    Consumer,
    ConsumerConfig,
    ConsumerInfo,
    Delivery,
    Message,
    Page,
    Pending,
    Record,
    Stream,
    StreamConfig,
    StreamInfo,
    Verification,
    check_delay,
    check_messages,
    check_position,
    check_read,
    check_sequences,
)
from mist.broker.checkpoint import check_advance, check_save
from mist.broker.clock import SYSTEM, Clock
from mist.broker.deadletter import EXHAUSTED, bury, dead_letter
from mist.broker.notify import Notifier
from mist.errors import (
    Closed,
    Conflict,
    CursorAhead,
    InvalidArgument,
    NotFound,
    SequenceExpired,
    StorageFull,
    WrongSequence,
)
from mist.protocol.subject import check_name, check_stream, dead_stream, matcher
from mist.protocol.url import Url

CAPABILITIES = Capabilities(threads=True, erase=True, verify=True)
_DEFAULTS = replace(DEFAULTS, durability="memory")
_SCAN_MAX = 100_000
"""How many records one look under the lock passes over; a filtered read may then return an empty page."""


class _Lease(Struct):
    """One unsettled record. `token` 0 = not handed out: it waits for `due`."""

    attempt: int
    due: float
    token: int


class _ConsumerState:
    """Delivery state. `leases` is in order of sequence: new ones only ever join at the end."""

    def __init__(self, config: ConsumerConfig) -> None:
        self.config = config
        self.match = matcher(config.subjects)
        self.delivered = config.after
        self.leases: OrderedDict[int, _Lease] = OrderedDict()
        self.queue: list[tuple[float, int]] = []
        self.deleted = False

    def set_due(self, sequence: int, lease: _Lease, due: float) -> None:
        lease.due = due
        heapq.heappush(self.queue, (due, sequence))
        if len(self.queue) > 2 * len(self.leases) + 1000:  # entries of settled leases stay until they come up
            self.queue = [(v.due, s) for s, v in self.leases.items()]
            heapq.heapify(self.queue)

    def forget_below(self, first: int) -> None:
        """Settle what was trimmed or expired away: it can neither be delivered nor hold up the others."""
        while self.leases and next(iter(self.leases)) < first:
            self.leases.popitem(last=False)
        self.delivered = max(self.delivered, first - 1)

    def overdue(self, now: float) -> list[int]:
        """The sequences that may be handed out again, in order. They leave the queue: set_due puts them back."""
        found: set[int] = set()
        while self.queue and (self.queue[0][0] <= now or not self._valid(self.queue[0])):
            entry = heapq.heappop(self.queue)
            if self._valid(entry):
                found.add(entry[1])
        return sorted(found)

    def next_due(self) -> float | None:
        return self.queue[0][0] if self.queue else None

    def _valid(self, entry: tuple[float, int]) -> bool:
        lease = self.leases.get(entry[1])
        return lease is not None and lease.due == entry[0]


class _StreamState:
    def __init__(self, name: str, config: StreamConfig, created_ns: int) -> None:
        self.name = name
        self.config = config
        self.created_ns = created_ns
        self.incarnation = secrets.token_hex(8)
        self.records: list[Record] = []
        self.first = 1
        self.last = 0
        self.time_ns = 0
        self.bytes = 0
        self.ids: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self.consumers: dict[str, _ConsumerState] = {}
        self.changed = Notifier()
        self.deleted = False

    def at(self, sequence: int) -> int:
        """Where in `records` the first one at or behind `sequence` lies; what was erased left no place behind."""
        if len(self.records) == self.last - self.first + 1:
            return max(sequence - self.first, 0)
        return bisect_left(self.records, sequence, key=lambda r: r.sequence)

    @property
    def kept(self) -> int:
        """The first sequence that is there, last + 1 when none is. `first` is only what was not trimmed."""
        return self.records[0].sequence if self.records else self.last + 1


class _Store:
    def __init__(self, clock: Clock) -> None:
        self.lock = threading.Lock()
        self.clock = clock
        self.streams: dict[str, _StreamState] = {}
        self.checkpoints: dict[tuple[str, str], Checkpoint] = {}
        self.tokens = 0


_shared: dict[str, _Store] = {}
_shared_lock = threading.Lock()


async def connect(url: Url, *, clock: Clock = SYSTEM) -> MemoryBroker:
    """The adapter's door: `memory:` or `memory:NAME`."""
    url.refuse_unknown("stream", "subject", "consumer")
    if not url.target:
        return MemoryBroker(str(url), _Store(clock))
    with _shared_lock:
        store = _shared.setdefault(url.target, _Store(clock))
    return MemoryBroker(str(url), store)


class MemoryBroker(Broker):
    backend = "memory"
    capabilities = CAPABILITIES

    def __init__(self, url: str, store: _Store) -> None:
        self.url = url
        self._store = store
        self._checkpoints = MemoryCheckpoints(self, store)
        self._closed = False

    def check_open(self) -> None:
        if self._closed:
            raise Closed("the broker is closed")

    async def open(self, name: str, *, create: bool = True, config: StreamConfig | None = None) -> MemoryStream:
        self.check_open()
        check_stream(name)
        asked = (config or StreamConfig()).validate()
        if asked.durability not in (None, "memory"):
            raise InvalidArgument(
                f"memory: cannot give durability {asked.durability!r}", hint="use log:DIR or a server"
            )
        with self._store.lock:
            state = self._store.streams.get(name)
            if state is None:
                if not create:
                    raise NotFound(f"no stream {name} in {self.url}")
                state = _StreamState(name, asked.or_defaults(_DEFAULTS), self._store.clock.time_ns())
                self._store.streams[name] = state
            else:
                asked.check_fits(state.config, name)
        return MemoryStream(self, state)

    async def streams(self) -> list[str]:
        self.check_open()
        with self._store.lock:
            return sorted(self._store.streams)

    async def delete(self, name: str) -> None:
        self.check_open()
        check_stream(name)
        with self._store.lock:
            state = self._store.streams.pop(name, None)
            if state is None:
                raise NotFound(f"no stream {name} in {self.url}")
            state.deleted = True
            for key in [k for k in self._store.checkpoints if k[0] == name]:
                del self._store.checkpoints[key]
        state.changed.notify()

    async def ping(self) -> float:
        self.check_open()
        return 0.0

    @property
    def checkpoints(self) -> MemoryCheckpoints:
        return self._checkpoints

    async def aclose(self) -> None:
        self._closed = True
        with self._store.lock:
            states = list(self._store.streams.values())
        for state in states:
            state.changed.notify()


class MemoryStream(Stream):
    size_bytes_max = RECORD_BYTES_MAX

    def __init__(self, broker: MemoryBroker, state: _StreamState) -> None:
        self._broker = broker
        self._store = broker._store
        self._state = state
        self.name = state.name
        self.incarnation = state.incarnation

    def _check(self) -> None:
        self._broker.check_open()
        if self._state.deleted:
            raise NotFound(f"stream {self.name} was deleted")

    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        self._check()
        if not messages:
            return []
        check_messages(messages, self.size_bytes_max)
        state = self._state
        with self._store.lock:
            self._check()
            now = self._now()
            self._expire_ids(now)
            out: list[int] = []
            fresh: dict[str, int] = {}
            new: list[Record] = []
            for m in messages:
                known = fresh.get(m.id) or state.ids.get(m.id, (0, 0))[0] if m.id else 0
                if known:
                    out.append(known)
                    continue
                sequence = state.last + len(new) + 1
                new.append(Record(sequence, m.subject, m.data, now, m.id, m.headers))
                out.append(sequence)
                if m.id:
                    fresh[m.id] = sequence
            if new and expected_last is not None and expected_last != state.last:
                raise WrongSequence(expected=expected_last, last=state.last, stream=self.name)
            self._retain()  # what is too old anyway must not count as room taken
            self._make_room(new)
            state.time_ns = now
            state.records.extend(new)
            state.last += len(new)
            state.bytes += sum(_size(r) for r in new)
            for id, sequence in fresh.items():
                state.ids[id] = (sequence, now)
            self._expire_ids(now)
            self._retain()
        if new:
            state.changed.notify()
        return out

    def _now(self) -> int:
        """Record time: the wall clock, except that it never goes back (also not behind trimmed records)."""
        return max(self._store.clock.time_ns(), self._state.time_ns)

    def _expire_ids(self, now: int) -> None:
        config, ids = self._state.config, self._state.ids
        window_ns, most = int((config.dedupe_window_s or 0) * 1e9), config.dedupe_ids_max or 0
        while ids:
            key = next(iter(ids))
            if window_ns and len(ids) <= most and ids[key][1] >= now - window_ns:
                break
            del ids[key]

    def _make_room(self, new: list[Record]) -> None:
        state, config = self._state, self._state.config
        if config.full != "refuse" or not new:
            return
        over = config.bytes_max and state.bytes + sum(_size(r) for r in new) > config.bytes_max
        if over or (config.records_max and len(state.records) + len(new) > config.records_max):
            raise StorageFull(
                f"stream {self.name} is full", hint="trim it, or let it drop the oldest (full=drop_oldest)"
            )

    def _retain(self) -> None:
        state, config = self._state, self._state.config
        drop = 0
        total = len(state.records)
        if config.records_max:
            drop = max(drop, total - config.records_max)
        if config.bytes_max and state.bytes > config.bytes_max:
            kept = state.bytes - sum(_size(r) for r in state.records[:drop])
            while kept > config.bytes_max and drop < total:
                kept -= _size(state.records[drop])
                drop += 1
        if config.age_s_max:
            oldest = self._now() - int(config.age_s_max * 1e9)
            while drop < total and state.records[drop].timestamp_ns < oldest:
                drop += 1
        if drop:
            self._drop(drop)

    def _drop(self, count: int) -> None:
        state = self._state
        state.bytes -= sum(_size(r) for r in state.records[:count])
        state.first = state.records[count].sequence if count < len(state.records) else state.last + 1
        del state.records[:count]
        for consumer in state.consumers.values():
            consumer.forget_below(state.first)
        state.changed.notify()  # a fetch held up by pending_max may go on

    async def read(
        self,
        *,
        after: int = 0,
        subjects: Sequence[str] = ALL,
        limit: int = 256,
        bytes_max: int = BYTES_MAX,
        wait_s: float = 0.0,
    ) -> Page:
        check_read(after=after, limit=limit, bytes_max=bytes_max, wait_s=wait_s)
        match = matcher(subjects)
        clock = self._store.clock
        until = clock.monotonic() + wait_s
        while True:
            generation = self._state.changed.generation
            with self._store.lock:
                self._check()
                self._retain()
                page = self._page(after, match, limit, bytes_max)
            if page.records or wait_s <= 0:
                return page
            after = page.scanned  # nothing here matched; what was passed over needs no second look
            left = until - clock.monotonic()
            if left <= 0:
                return page
            if page.scanned < page.last:
                await asyncio.sleep(0)  # a long scan, in turns with everybody else
            else:
                await self._state.changed.wait(generation, left)

    def _page(self, after: int, match: Callable[[str], bool] | None, limit: int, bytes_max: int) -> Page:
        state = self._state
        if after > state.last:
            raise CursorAhead(after=after, last=state.last, stream=self.name)
        if after + 1 < state.first:
            raise SequenceExpired(after=after, first=state.first, stream=self.name)
        out: list[Record] = []
        size = 0
        scanned = after
        at = state.at(after + 1)
        end = min(len(state.records), at + _SCAN_MAX)
        for i in range(at, end):
            record = state.records[i]
            if match is None or match(record.subject):
                size += len(record.data)
                if out and size > bytes_max:
                    break
                out.append(record)
            scanned = record.sequence
            if len(out) >= limit:
                break
        else:
            if end >= len(state.records):
                scanned = state.last  # what was erased behind the last record is passed over too
        return Page(out, scanned, state.last)

    async def info(self) -> StreamInfo:
        with self._store.lock:
            self._check()
            self._retain()
            s = self._state
            return StreamInfo(
                name=s.name, incarnation=s.incarnation, first=s.kept, last=s.last, records=len(s.records),
                bytes=s.bytes, durability="memory", capabilities=CAPABILITIES, config=s.config,
                created_ns=s.created_ns, size_bytes_max=self.size_bytes_max,
            )  # fmt: skip

    async def locate(self, time_ns: int) -> int:
        with self._store.lock:
            self._check()
            self._retain()
            records = self._state.records
            at = bisect_left(records, time_ns, key=lambda r: r.timestamp_ns)
            return records[at].sequence if at < len(records) else self._state.last + 1

    async def trim(self, *, before: int) -> int:
        check_position(before, "before")
        with self._store.lock:
            self._check()
            state = self._state
            if before > state.last + 1:
                raise CursorAhead(after=before - 1, last=state.last, stream=self.name)
            if before <= state.first:
                return 0
            count = state.at(before)
            self._drop(count)
            return count

    async def erase(self, sequences: Sequence[int]) -> int:
        check_sequences(sequences)
        with self._store.lock:
            self._check()
            state, doomed = self._state, set(sequences)
            gone = [
                r for s in doomed if (i := state.at(s)) < len(state.records) and (r := state.records[i]).sequence == s
            ]
            if not gone:
                return 0
            doomed = {r.sequence for r in gone}
            state.records = [r for r in state.records if r.sequence not in doomed]
            state.bytes -= sum(map(_size, gone))
            for record in gone:
                if state.ids.get(record.id, (0, 0))[0] == record.sequence:
                    del state.ids[record.id]
            for consumer in state.consumers.values():
                for sequence in doomed & consumer.leases.keys():
                    del consumer.leases[sequence]
            state.changed.notify()  # a fetch held up by pending_max may go on
            return len(gone)

    async def verify(self) -> Verification:
        with self._store.lock:
            self._check()
            self._retain()
            s = self._state
            return Verification(records=len(s.records), bytes=s.bytes, first=s.kept, last=s.last, damage=[])

    async def consumer(self, name: str, config: ConsumerConfig | None = None, *, create: bool = True) -> MemoryConsumer:
        check_name(name)
        dead_stream(self.name)  # a name that leaves no room for dead letters must fail now, not at the first bad record
        if config is not None:
            config.validate()
        with self._store.lock:
            self._check()
            found = self._state.consumers.get(name)
            if found is None:
                if not create:
                    raise NotFound(f"stream {self.name} has no consumer {name}")
                found = _ConsumerState(config or ConsumerConfig())
                if found.config.after > self._state.last:
                    raise CursorAhead(after=found.config.after, last=self._state.last, stream=self.name)
                self._state.consumers[name] = found
            elif config is not None and config != found.config:
                raise Conflict(f"consumer {name} of stream {self.name} exists with another configuration")
        return MemoryConsumer(self, name, found)

    async def consumers(self) -> list[str]:
        with self._store.lock:
            self._check()
            return sorted(self._state.consumers)


class MemoryConsumer(Consumer):
    def __init__(self, stream: MemoryStream, name: str, state: _ConsumerState) -> None:
        self.name = name
        self.stream = stream.name
        self.config = state.config
        self._stream = stream
        self._store = stream._store
        self._state = state

    def _check(self) -> None:
        self._stream._check()
        if self._state.deleted:
            raise NotFound(f"consumer {self.name} of stream {self.stream} was deleted")

    async def fetch(self, *, limit: int = 256, bytes_max: int = BYTES_MAX, wait_s: float = 0.0) -> list[Delivery]:
        check_read(limit=limit, bytes_max=bytes_max, wait_s=wait_s)
        clock = self._store.clock
        until = clock.monotonic() + wait_s
        changed = self._stream._state.changed
        while True:
            generation = changed.generation
            with self._store.lock:
                self._check()
                self._stream._retain()
                # The exhausted first and alone: burying awaits, and a delivery must never be held over an await
                exhausted = self._take_exhausted()
                if not exhausted:
                    out, at_end = self._take(limit, bytes_max)
                    due = self._state.next_due()
            if exhausted:
                await self._bury(exhausted, EXHAUSTED)
                continue
            if out:
                return out
            if not at_end:
                await asyncio.sleep(0)  # a long scan, in turns with everybody else
                continue
            left = until - clock.monotonic()
            if left <= 0:
                return []
            await changed.wait(generation, left if due is None else min(left, max(due - clock.monotonic(), 0.0)))

    def _take_exhausted(self) -> list[Delivery]:
        """Overdue records out of attempts, leased to us until they are buried."""
        state, now = self._state, self._store.clock.monotonic()
        out: list[Delivery] = []
        for sequence in state.overdue(now):
            lease = state.leases[sequence]
            if self._spent(lease):
                out.append(self._lease(sequence, lease, now))
            else:
                state.set_due(sequence, lease, lease.due)
        return out

    def _take(self, limit: int, bytes_max: int) -> tuple[list[Delivery], bool]:
        """Deliveries, and whether everything was looked at."""
        state, stream, now = self._state, self._stream._state, self._store.clock.monotonic()
        out: list[Delivery] = []
        size = 0
        full = False
        for sequence in state.overdue(now):
            lease = state.leases[sequence]
            record = stream.records[stream.at(sequence)]
            full = full or len(out) >= limit or bool(out and size + len(record.data) > bytes_max)
            if full:
                state.set_due(sequence, lease, lease.due)
                continue
            size += len(record.data)
            lease.attempt += 1
            out.append(self._lease(sequence, lease, now))
        if full:
            return out, True
        room = state.config.pending_max - len(state.leases)
        at = stream.at(max(state.delivered + 1, stream.first))
        end = min(len(stream.records), at + _SCAN_MAX)
        for i in range(at, end):
            record = stream.records[i]
            if state.match is None or state.match(record.subject):
                if len(out) >= limit or room <= 0 or (out and size + len(record.data) > bytes_max):
                    return out, True
                size += len(record.data)
                room -= 1
                lease = state.leases[record.sequence] = _Lease(1, 0.0, 0)
                out.append(self._lease(record.sequence, lease, now))
            state.delivered = record.sequence
        return out, end == len(stream.records)

    def _spent(self, lease: _Lease) -> bool:
        return 0 < self.config.attempts_max <= lease.attempt

    def _token(self) -> int:
        self._store.tokens += 1
        return self._store.tokens

    def _lease(self, sequence: int, lease: _Lease, now: float) -> Delivery:
        """Hand a lease out under a new token, for `ack_wait_s`."""
        lease.token = self._token()
        self._state.set_due(sequence, lease, now + self.config.ack_wait_s)
        record = self._stream._state.records[self._stream._state.at(sequence)]
        return Delivery(record, lease.attempt, f"{sequence}.{lease.token}")

    def _ours(self, deliveries: Sequence[Delivery]) -> dict[int, _Lease]:
        """Their leases by sequence, as far as the tokens are the current ones."""
        out: dict[int, _Lease] = {}
        for d in deliveries:
            lease = self._state.leases.get(d.record.sequence)
            if lease is not None and lease.token and d.token == f"{d.record.sequence}.{lease.token}":
                out[d.record.sequence] = lease
        return out

    async def ack(self, deliveries: Sequence[Delivery]) -> int:
        with self._store.lock:
            self._check()
            ours = self._ours(deliveries)
            for sequence in ours:
                del self._state.leases[sequence]
        if ours:
            self._stream._state.changed.notify()  # pending_max may have room again
        return len(ours)

    async def nak(self, deliveries: Sequence[Delivery], *, delay_s: float = 0.0) -> int:
        check_delay(delay_s)
        with self._store.lock:
            self._check()
            ours = self._ours(deliveries)
            now = self._store.clock.monotonic()
            exhausted: list[Delivery] = []
            for sequence, lease in ours.items():
                if self._spent(lease):
                    exhausted.append(self._lease(sequence, lease, now))
                else:
                    lease.token = 0
                    self._state.set_due(sequence, lease, now + delay_s)
        if ours:
            self._stream._state.changed.notify()
        await self._bury(exhausted, EXHAUSTED)
        return len(ours)

    async def term(self, deliveries: Sequence[Delivery], *, reason: str = "") -> int:
        with self._store.lock:
            self._check()
            now = self._store.clock.monotonic()
            # a new token and a new wait: nobody else may settle or fetch them while they are buried
            ours = [self._lease(sequence, lease, now) for sequence, lease in self._ours(deliveries).items()]
        await self._bury(ours, reason)
        return len(ours)

    async def _bury(self, deliveries: Sequence[Delivery], reason: str) -> None:
        """Dead letters first, then the acks: a crash in between makes a second letter with the same id, never none."""
        if not deliveries:
            return
        letters = [
            dead_letter(
                d.record, stream=self.stream, incarnation=self._stream.incarnation, consumer=self.name,
                attempts=d.attempt, reason=reason,
            )
            for d in deliveries
        ]  # fmt: skip
        await bury(self._stream._broker, letters, stream=self.stream)
        await self.ack(deliveries)

    async def extend(self, deliveries: Sequence[Delivery]) -> int:
        with self._store.lock:
            self._check()
            ours = self._ours(deliveries)
            due = self._store.clock.monotonic() + self.config.ack_wait_s
            for sequence, lease in ours.items():
                self._state.set_due(sequence, lease, due)
        return len(ours)

    async def info(self) -> ConsumerInfo:
        with self._store.lock:
            self._check()
            self._stream._retain()
            state, stream = self._state, self._stream._state
            delivered = max(state.delivered, stream.first - 1)
            unread = stream.at(delivered + 1)
            lag_s = 0.0
            if unread < len(stream.records):
                lag_s = max(0.0, (self._store.clock.time_ns() - stream.records[unread].timestamp_ns) / 1e9)
            return ConsumerInfo(
                name=self.name, stream=self.stream, floor=next(iter(state.leases)) - 1 if state.leases else delivered,
                delivered=delivered, pending=len(state.leases),
                redelivered=sum(v.attempt > 1 for v in state.leases.values()),
                lag=len(stream.records) - unread + len(state.leases), lag_s=lag_s, config=self.config,
            )  # fmt: skip

    async def pending(self, *, limit: int = 1000) -> list[Pending]:
        if not 1 <= limit <= SEQUENCE_MAX:
            raise InvalidArgument(f"pending: limit={limit} cannot be right")
        with self._store.lock:
            self._check()
            self._stream._retain()
            now = self._store.clock.monotonic()
            return [Pending(s, v.attempt, v.due - now) for s, v in islice(self._state.leases.items(), limit)]

    async def seek(self, after: int) -> None:
        check_position(after)
        with self._store.lock:
            self._check()
            stream = self._stream._state
            if after > stream.last:
                raise CursorAhead(after=after, last=stream.last, stream=self.stream)
            self._state.leases.clear()
            self._state.queue.clear()
            self._state.delivered = max(after, stream.first - 1)
        self._stream._state.changed.notify()

    async def delete(self) -> None:
        with self._store.lock:
            self._stream._check()
            self._state.deleted = True
            if self._stream._state.consumers.get(self.name) is self._state:
                del self._stream._state.consumers[self.name]
        self._stream._state.changed.notify()


class MemoryCheckpoints(Checkpoints):
    def __init__(self, broker: MemoryBroker, store: _Store) -> None:
        self._broker = broker
        self._store = store

    async def save(self, checkpoint: Checkpoint, *, force: bool = False) -> Checkpoint:
        self._broker.check_open()
        check_save(checkpoint)
        with self._store.lock:
            key = (checkpoint.stream, checkpoint.name)
            stored = self._store.checkpoints.get(key)
            if stored is not None and not force:
                check_advance(stored, checkpoint)
            saved = replace(checkpoint, time_ns=self._store.clock.time_ns())
            self._store.checkpoints[key] = saved
            return saved

    async def load(self, stream: str, name: str) -> Checkpoint | None:
        self._broker.check_open()
        with self._store.lock:
            return self._store.checkpoints.get((stream, name))

    async def delete(self, stream: str, name: str) -> bool:
        self._broker.check_open()
        with self._store.lock:
            return self._store.checkpoints.pop((stream, name), None) is not None

    async def list(self, stream: str = "") -> list[Checkpoint]:
        self._broker.check_open()
        with self._store.lock:
            return [v for k, v in sorted(self._store.checkpoints.items()) if not stream or k[0] == stream]


def _size(record: Record) -> int:
    return len(record.data)
