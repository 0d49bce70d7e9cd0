"""Calls on a stream with a history: what a campaign's processes use instead of the bare contract."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mist.broker.base import Checkpoint, Checkpoints, Consumer, Delivery, Message, Record, Stream, header
from mist.broker.deadletter import ATTEMPTS, CONSUMER, REASON, SEQUENCE
from mist.errors import MistError, PartialAppend, SequenceExpired
from mist.testing import history as h

now = time.monotonic_ns


def message(lane: str, number: int, size: int) -> Message:
    """The message of that number: id, subject and every byte of the data follow from (lane, number, size)."""
    id = f"{lane}-{number}"
    return Message(f"lane.{number % 4}", _data(id, size), id)


def _data(id: str, size: int) -> bytes:
    unit = f"{id}:{size};".encode()
    return (unit * (size // len(unit) + 1))[: max(size, len(unit))]


def identify(record: Record) -> tuple[str, int] | None:
    """(lane, number) of a record; None when any part of it is not what `message` made."""
    lane, dash, digits = record.id.rpartition("-")
    if not dash or not digits.isdigit():
        return None
    head = record.data[: record.data.find(b";")]
    id, _, size = head.partition(b":")
    if id != record.id.encode() or not size.isdigit() or record.data != _data(record.id, int(size)):
        return None
    return (lane, int(digits)) if record.subject == f"lane.{int(digits) % 4}" else None


def seen(records: Iterable[Record]) -> tuple[h.Seen, list[int]]:
    """Records as a history writes them, and the sequences that are not what was appended."""
    out: h.Seen = []
    bad: list[int] = []
    for r in records:
        who = identify(r)
        if who is None:
            bad.append(r.sequence)
            who = ("?", r.sequence)
        lane, number = who
        if out:
            s, last, n, c = out[-1]
            if last == lane and s + c == r.sequence and n + c == number:
                out[-1] = (s, lane, n, c + 1)
                continue
        out.append((r.sequence, lane, number, 1))
    return out, bad


class Lane:
    """One caller of append: its messages are numbered, and a call is repeated until its fate is known."""

    def __init__(
        self, recorder: h.Recorder, stream: Stream, name: str, *, size: int, after: tuple[int, int] = (1, 0)
    ) -> None:
        """`after`: (next number, how many of them were asked for without an answer in a former life)."""
        self._recorder = recorder
        self._stream = stream
        self.name = name
        self.size = size
        self.next, self.open = after
        self.acked = 0
        self.slowest_s = 0.0

    async def append(self, count: int) -> str:
        """One call. Returns the error's code, or "". A call of unknown fate is what the next one repeats."""
        count = self.open or count
        first, self.open = self.next, count
        messages = [message(self.name, n, self.size) for n in range(first, first + count)]
        start = now()
        self._recorder.write(h.Append(start_ns=start, lane=self.name, first=first, count=count))
        sequences: Sequence[int] = []
        error = ""
        try:
            sequences = await self._stream.append(messages)
        except PartialAppend as exc:
            sequences, error = exc.sequences, exc.code
        except MistError as exc:
            error = exc.code
        end = now()
        self.slowest_s = max(self.slowest_s, (end - start) / 1e9)
        self._recorder.write(
            h.Appended(
                start_ns=start, end_ns=end, lane=self.name, first=first, count=count, sequences=h.runs(sequences),
                error=error,
            )
        )  # fmt: skip
        self.next += len(sequences)
        self.acked += len(sequences)
        if error != "ambiguous":
            self.open = 0
        return error


def former_life(path: Path) -> dict[str, tuple[int, int]]:
    """For each lane in a history: (next number, how many were asked for without an answer)."""
    out: dict[str, tuple[int, int]] = {}
    for e in h.load(path) if path.exists() else []:
        if isinstance(e, h.Append):
            out[e.lane] = (e.first, e.count)
        elif isinstance(e, h.Appended) and e.error != "ambiguous":
            out[e.lane] = (e.first + h_count(e), 0)
    return out


def h_count(e: h.Appended) -> int:
    """How many messages an answer says are stored."""
    return sum(count for _, count in e.sequences)


async def read(
    recorder: h.Recorder, stream: Stream, reader: str, *, after: int, final: bool = False, **options: Any
) -> int:
    """One recorded page. Returns the next `after`; on SequenceExpired the position that is still kept."""
    start = now()
    try:
        page = await stream.read(after=after, **options)
    except SequenceExpired as exc:
        recorder.write(h.Read(start_ns=start, end_ns=now(), reader=reader, after=after, error=exc.code))
        return exc.first - 1
    except MistError as exc:
        recorder.write(h.Read(start_ns=start, end_ns=now(), reader=reader, after=after, final=final, error=exc.code))
        return after
    records, bad = seen(page.records)
    recorder.write(
        h.Read(
            start_ns=start, end_ns=now(), reader=reader, after=after, scanned=page.scanned, last=page.last,
            records=records, bad=bad, final=final,
        )
    )  # fmt: skip
    return page.scanned


async def read_all(recorder: h.Recorder, stream: Stream, reader: str, *, limit: int = 4096) -> int:
    """A final replay: every kept record. Returns how many pages that took."""
    info = await stream.info()
    after, pages = info.first - 1, 0
    while True:
        pages += 1
        position = await read(recorder, stream, reader, after=after, final=True, limit=limit)
        if position >= info.last or position <= after:
            return pages
        after = position


async def save(recorder: h.Recorder, checkpoints: Checkpoints, checkpoint: Checkpoint) -> str:
    """A recorded save. Returns the error's code, or ""."""
    start = now()
    name, sequence = checkpoint.name, checkpoint.sequence
    recorder.write(h.Save(start_ns=start, name=name, sequence=sequence))
    error = ""
    try:
        await checkpoints.save(checkpoint)
    except MistError as exc:
        error = exc.code
    recorder.write(h.Saved(start_ns=start, end_ns=now(), name=name, sequence=sequence, error=error))
    return error


async def load(recorder: h.Recorder, checkpoints: Checkpoints, stream: str, name: str) -> int:
    """A recorded load. Returns the sequence, -1 when there is none."""
    start = now()
    sequence, error = -1, ""
    try:
        found = await checkpoints.load(stream, name)
        sequence = found.sequence if found is not None else -1
    except MistError as exc:
        error = exc.code
    recorder.write(h.Loaded(start_ns=start, end_ns=now(), name=name, sequence=sequence, error=error))
    return sequence


class Work:
    """A recorded consumer."""

    def __init__(self, recorder: h.Recorder, consumer: Consumer) -> None:
        self._recorder = recorder
        self.consumer = consumer
        config = consumer.config
        recorder.write(
            h.Consuming(
                start_ns=now(), consumer=consumer.name, after=config.after, ack_wait_s=config.ack_wait_s,
                attempts_max=config.attempts_max,
            )
        )  # fmt: skip

    async def fetch(self, **options: Any) -> tuple[list[Delivery], str]:
        """Deliveries, and the error's code."""
        start = now()
        deliveries: list[Delivery] = []
        error = ""
        try:
            deliveries = await self.consumer.fetch(**options)
        except MistError as exc:
            error = exc.code
        if deliveries or error:
            packed: list[tuple[int, int, int]] = []
            for d in deliveries:
                s = d.record.sequence
                if packed and packed[-1][0] + packed[-1][1] == s and packed[-1][2] == d.attempt:
                    packed[-1] = (packed[-1][0], packed[-1][1] + 1, d.attempt)
                else:
                    packed.append((s, 1, d.attempt))
            self._recorder.write(
                h.Fetched(
                    start_ns=start, end_ns=now(), consumer=self.consumer.name, deliveries=packed, error=error
                )
            )  # fmt: skip
        return deliveries, error

    async def settle(self, how: str, deliveries: Sequence[Delivery], **options: Any) -> tuple[int, str]:
        """`ack`, `nak` or `term`. How many were ours, and the error's code."""
        if not deliveries:
            return 0, ""
        sequences = h.runs([d.record.sequence for d in deliveries])
        start = now()
        name = self.consumer.name
        self._recorder.write(h.Settle(start_ns=start, consumer=name, how=how, sequences=sequences))
        count, error = 0, ""
        try:
            count = await getattr(self.consumer, how)(deliveries, **options)
        except MistError as exc:
            error = exc.code
        self._recorder.write(
            h.Settled(
                start_ns=start, end_ns=now(), consumer=name, how=how, sequences=sequences, count=count, error=error
            )
        )  # fmt: skip
        return count, error

    async def look(self, *, final: bool = False) -> h.Looked:
        start = now()
        info = await self.consumer.info()
        looked = h.Looked(
            start_ns=start, end_ns=now(), consumer=self.consumer.name, floor=info.floor, delivered=info.delivered,
            pending=info.pending, lag=info.lag, final=final,
        )  # fmt: skip
        self._recorder.write(looked)
        return looked


async def record_dead(recorder: h.Recorder, dead: Stream) -> list[Record]:
    """All dead letters of a stream, recorded and returned."""
    out: list[Record] = []
    after = 0
    while True:
        page = await dead.read(after=after, limit=4096)
        for r in page.records:
            recorder.write(
                h.Buried(
                    start_ns=now(), consumer=header(r.headers, CONSUMER), sequence=int(header(r.headers, SEQUENCE)),
                    attempts=int(header(r.headers, ATTEMPTS)), reason=header(r.headers, REASON),
                )
            )  # fmt: skip
        out.extend(page.records)
        after = page.scanned
        if after >= page.last:
            return out
