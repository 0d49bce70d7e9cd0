"""Records of a stream, pushed: an ephemeral pull consumer without acks, and what it sent.

A waiting read costs one hop per record this way, and a long replay a third of what direct gets cost the server. Reads
stay pure: a tail holds every matching record behind `position` in order, several readers may take the same ones, and
whoever asks for a position it does not hold reads directly. On a gap in the consumer's numbers (a `dense` one: or in the
stream's), a missed heartbeat, a lost connection or a deleted consumer the tail is dead: its readers look for themselves
and make a new one. Bounded: it asks for no more while half a batch or half of BYTES waits to be read, and forgets what
was read beyond KEEP.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Sequence

import msgspec

from mist.broker.base import ALL, Record
from mist_nats import wire
from mist_nats.api import Api, ConsumerInfo
from mist_nats.direct import Subjects
from mist_nats.headers import plain_headers, read_header
from mist_nats.link import Inbox
from mist_nats.names import TAIL
from mist_nats.wire import Frame

BATCH = 1000
BYTES = 8 * 1024 * 1024
KEEP = 1000
EXPIRES_S = 30.0
BEAT_S = 5.0
MISSED_S = 12.0
STALL_S = 0.5
"""How long a page is waited for: what was about to come may have been trimmed by others."""
IDLE_S = 30.0
GONE_S = 60.0
"""After this the server removes a tail whose client has gone."""


class Tail:
    """Records of `stream` that match `filters` (the server's subjects), behind `after`. `start` it, then `serves`,
    `take`, `wait`."""

    def __init__(
        self,
        api: Api,
        stream: str,
        subjects: Subjects,
        filters: Sequence[str],
        after: int,
        name: str,
        *,
        batch: int = BATCH,
        dense: bool = False,
    ) -> None:
        self.api = api
        self.stream = stream
        self.name = TAIL + name
        self.filters = filters
        self.unfiltered = tuple(filters) == ALL
        self.position = after
        self.known = after
        """The highest sequence that certainly exists."""
        self.left = -1
        """How many matching records are behind the last one that came; -1 before the consumer stands."""
        self.dead = False
        self._batch = batch
        self._dense = dense
        self._prefix = b""
        self._subjects = subjects
        self._records: list[Record] = []
        self._sequences: list[int] = []
        self._bytes = 0
        self._served = after
        self._count = 0
        self._box: Inbox | None = None
        self._asked = 0
        self._one = False
        self._waiters: set[asyncio.Future[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._heard = self._used = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Make the consumer. Raises ApiError and errors of mist.errors."""
        conf: dict[str, object] = {
            "name": self.name, "deliver_policy": "by_start_sequence", "opt_start_seq": self.position + 1,
            "ack_policy": "none", "mem_storage": True, "num_replicas": 1, "inactive_threshold": int(GONE_S * 1e9),
            "max_deliver": 1,
        }  # fmt: skip
        if not self.unfiltered:
            if len(self.filters) == 1:
                conf["filter_subject"] = self.filters[0]
            else:
                conf["filter_subjects"] = list(self.filters)
        info = await self.api.call(
            f"CONSUMER.CREATE.{self.stream}.{self.name}"
            + (f".{self.filters[0]}" if "filter_subject" in conf else ""),
            {"stream_name": self.stream, "config": conf}, ConsumerInfo, patient=False,
        )  # fmt: skip
        self.left = info.num_pending
        self._box = self.api.link.inbox()
        self._box.handler = self._frames
        self.api.link.on_lost.append(self.die)
        self._watch()
        self._ask()

    def serves(self, after: int) -> bool:
        return not self.dead and self.position <= after <= self.known

    @property
    def idle_s(self) -> float:
        """How long nobody has taken anything."""
        return self._loop.time() - self._used

    @property
    def coming(self) -> bool:
        """Whether the server is at it: it was asked, and it has more."""
        return bool(self._asked and self.left and not self.dead)

    @property
    def ended(self) -> bool:
        """Whether everything the server had when it sent the last record was taken."""
        return self.left == 0 and self._served >= self.known

    def take(self, after: int, limit: int, bytes_max: int) -> tuple[list[Record], int]:
        """What it holds behind `after`, and the stream's last sequence as far as it is known here."""
        self._used = self._loop.time()
        start = bisect_right(self._sequences, after)
        stop = min(len(self._records), start + limit)
        out = self._records[start:stop]
        size = 0
        for at, record in enumerate(out):
            size += len(record.data)
            if at and size > bytes_max:
                out, stop = out[:at], start + at
                break
        if not out:
            return [], max(self.known, after)
        scanned = out[-1].sequence
        self._served = max(self._served, scanned)
        self._forget()
        self._ask()
        if self.unfiltered:
            last = self._sequences[-1] + self.left if self._sequences else scanned + self.left
        else:
            last = scanned + (1 if self.left or (self._sequences and self._sequences[-1] > scanned) else 0)
        return out, max(last, scanned)

    async def fill(self, upto: int) -> None:
        """Until it holds `upto`, the server has no more, or STALL_S: a page is not what one read of the socket brought."""
        until = self._loop.time() + STALL_S
        while self.coming and self.known < upto and self._loop.time() < until:
            await self.wait(upto - 1, until)

    async def wait(self, after: int, until: float) -> None:
        """Until there may be something behind `after`, the tail is dead, or it is loop time `until`."""
        self._used = self._loop.time()
        self._ask()
        if self.dead or (self._sequences and self._sequences[-1] > after):
            return
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.add(waiter)
        timer = None if until == float("inf") else self._loop.call_at(until, _settle, waiter)
        try:
            await waiter
        finally:
            if timer is not None:
                timer.cancel()
            self._waiters.discard(waiter)
            self._used = self._loop.time()

    def die(self) -> None:
        """Serve nothing any more; wake the readers."""
        if self.dead:
            return
        self.dead = True
        if self._timer is not None:
            self._timer.cancel()
        link = self.api.link
        if self.die in link.on_lost:
            link.on_lost.remove(self.die)
        if self._box is not None:
            link.drop(self._box)
            if link.connected and not link.closed:  # nobody waits for the answer: the server removes it by itself too
                link.send(wire.pub(self.api.subject(f"CONSUMER.DELETE.{self.stream}.{self.name}"), b""))
        self._wake()

    # --- inside ---

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            _settle(waiter)

    def _watch(self) -> None:
        now = self._loop.time()
        if (now - self._heard > MISSED_S and self._asked) or (now - self._used > IDLE_S and not self._waiters):
            self.die()
        else:
            self._timer = self._loop.call_later(BEAT_S / 2, self._watch)

    def _enough(self) -> bool:
        """Whether no more is to be asked for yet."""
        read = bisect_right(self._sequences, self._served)
        unread = len(self._sequences) - read
        if unread >= self._batch // 2:
            return True
        # more than that is here only with large records, or while what was read is kept
        return self._bytes > BYTES // 2 and sum([len(r.data) for r in self._records[read:]]) > BYTES // 2

    def _ask(self) -> None:
        if self.dead or self._asked or self._box is None or self._enough():
            return
        self._asked = 1 if self._one else self._batch
        self._heard = self._loop.time()
        request: dict[str, int] = {
            "batch": self._asked, "expires": int(EXPIRES_S * 1e9), "idle_heartbeat": int(BEAT_S * 1e9),
        }  # fmt: skip
        if not self._one:
            request["max_bytes"] = BYTES
        self._one = False
        subject = self.api.subject(f"CONSUMER.MSG.NEXT.{self.stream}.{self.name}")
        self.api.link.send(wire.pub(subject, msgspec.json.encode(request), self._box.subject))

    def _frames(self, frames: list[Frame]) -> None:
        self._heard = self._loop.time()
        for frame in () if self._column(frames) else frames:
            if self.dead:
                return
            code = wire.status(frame[2])
            if code:
                self._status(code, frame[2])
            else:
                self._record(frame)
        self._ask()
        self._wake()

    def _status(self, code: int, header: bytes) -> None:
        if code == 100:
            if int(wire.field(header, b"Nats-Last-Consumer") or 0) != self._count:
                self.die()
        elif code == 409 and b"MaxBytes" in header:
            self._one = b"Exceeds" in header
            self._asked = 0
        elif code in (404, 408) or b"Batch Completed" in header:
            self._asked = 0
        else:
            self.die()

    def _column(self, frames: list[Frame]) -> bool:
        """Take the usual run, unbroken and of records with an id and nothing else, all at once."""
        first = wire.deliveries(self._prefix, self._count, frames) if self._prefix else None
        ids = plain_headers([f[2] for f in frames]) if first is not None else None
        end = wire.ack_subject(frames[-1][1])
        if first is None or ids is None or end is None:
            return False
        sequences, times, _, newest = first
        count = len(frames)
        if newest != self._count + count or (self._dense and sequences[-1] != self.known + count):
            return False
        datas = [f[3] for f in frames]
        self._records += map(Record, sequences, map(self._subjects, [f[0] for f in frames]), datas, times, ids)
        self._sequences += sequences
        self._bytes += sum(map(len, datas))
        self._count = newest
        self._asked = max(0, self._asked - count)
        self.known, self.left = sequences[-1], end[6]
        return True

    def _record(self, frame: Frame) -> None:
        at = wire.ack_subject(frame[1])
        if at is None or at[4] != self._count + 1 or (self._dense and at[3] != self.known + 1):
            self.die()
            return
        self._count += 1
        self._asked = max(0, self._asked - 1)
        self._prefix, _, _, sequence, _, time_ns, self.left = at
        id, headers, data = read_header(frame[2], frame[3])
        self._records.append(Record(sequence, self._subjects(frame[0]), data, time_ns, id, headers))
        self._sequences.append(sequence)
        self._bytes += len(data)
        self.known = sequence

    def _forget(self) -> None:
        read = bisect_right(self._sequences, self._served)
        if read > 2 * KEEP or (self._bytes > BYTES and read > 1):
            drop = read - (KEEP if self._bytes <= BYTES else 0)
            self.position = self._sequences[drop - 1]
            self._bytes -= sum(len(r.data) for r in self._records[:drop])
            del self._records[:drop], self._sequences[:drop]


def _settle(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
