"""Direct get: stored messages without a consumer, many in one request (server 2.11+), one at a time before that.

Promises: records in order, exactly as they were appended; an answer that breaks off (a server that goes away) raises,
it never looks like a shorter page. Does not: decide what a gap means; that needs the stream's state (read.py).
"""

from __future__ import annotations

import asyncio
import re

import msgspec
from msgspec import Struct

from mist.broker.base import Record
from mist.errors import Closed, TimedOut, Unavailable
from mist_nats import wire
from mist_nats.api import Api
from mist_nats.headers import read_header
from mist_nats.link import AGAIN_S, CALL_S, Lost
from mist_nats.wire import Frame

_USUAL = re.compile(
    rb"NATS/1\.0\r\n(?:Nats-Msg-Id: ([!-<>-~][ -~]*)\r\n)?(?:Nats-(?:Batch|Expected)-[^\r]*\r\n)*Nats-Stream: [^\r]*\r\n"
    rb"Nats-Subject: ([^\r]*)\r\nNats-Sequence: (\d+)\r\nNats-Time-Stamp: (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?Z\r\n"
    rb"(?:Nats-Num-Pending: \d+\r\nNats-Last-Sequence: \d+\r\n)?\r\n"
).fullmatch
"""A record of ours without headers: id, subject, sequence, second and fraction."""
BATCH_MAX = 4096
SLACK = 400
"""What a stored message weighs beside its data, roughly: the server counts subject and headers into max_bytes."""


class Request(Struct, omit_defaults=True):
    seq: int = 0
    batch: int = 0
    max_bytes: int = 0
    next_by_subj: str = ""
    start_time: str = ""
    last_by_subj: str = ""


class Batch(Struct):
    """Records, how many more match behind them (-1: not told), and whether the server knew no match at all."""

    records: list[Record]
    more: int
    none: bool = False


class Subjects:
    """What the server calls a subject -> what we call it; a stream has few."""

    def __init__(self, prefix: str) -> None:
        self._prefix = len(prefix)
        self._known: dict[bytes, str] = {}

    def __call__(self, raw: bytes) -> str:
        found = self._known.get(raw)
        if found is None:
            if len(self._known) > 4096:
                self._known.clear()
            found = self._known[raw] = raw.decode(errors="replace")[self._prefix :]
        return found


def record_of(frame: Frame, subjects: Subjects) -> Record:
    """The record of any answer. Raises Garbled."""
    header = frame[2]
    sequence = wire.field(header, b"Nats-Sequence")
    if not sequence.isdigit():
        raise wire.Garbled(f"a direct get without its sequence: {header[:80]!r}")
    id, headers, data = read_header(header, frame[3])
    return Record(
        int(sequence), subjects(wire.field(header, b"Nats-Subject")), data,
        wire.time_ns(wire.field(header, b"Nats-Time-Stamp")), id, headers,
    )  # fmt: skip


async def get(api: Api, stream: str, request: Request, subjects: Subjects, until: float) -> Batch:
    """One request, asked again when nobody answers. Raises Unavailable, TimedOut, Closed; that nobody is there is told as
    Batch.none with more=-1."""
    answer = None
    while answer is None:
        answer = await _ask(api, stream, request, until)
    frames, end = answer
    if end and wire.status(end[0][2]) not in (204, 404):
        if wire.status(end[0][2]) == 503:
            return Batch([], -1, True)
        raise Unavailable(f"stream {stream}: read: {wire.status_text(end[0][2])}")
    try:
        records = records_of(frames, subjects)
    except wire.Garbled as exc:
        raise Unavailable(f"stream {stream}: read: {exc}", retryable=False) from exc
    if not records:
        return Batch([], 0, True)
    left = wire.field(end[0][2] if end else frames[-1][2], b"Nats-Num-Pending")
    return Batch(records, int(left) if left.isdigit() else -1)


async def _ask(api: Api, stream: str, request: Request, until: float) -> tuple[list[Frame], list[Frame]] | None:
    """The records and what ended them; None when nothing was heard for AGAIN_S."""
    link = api.link
    await link.ready(until)
    single = not request.batch
    box = link.inbox()
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bool] = loop.create_future()
    frames: list[Frame] = []
    end: list[Frame] = []

    def handle(got: list[Frame]) -> None:
        last = got[-1]
        if wire.status(last[2]):
            end.append(got.pop())
        frames.extend(got)
        if (end or (single and frames)) and not done.done():
            done.set_result(True)

    def lost() -> None:
        if not done.done():
            done.set_exception(Lost("the connection was lost"))

    def quiet() -> None:
        if not frames and not done.done() and loop.time() < until:
            done.set_result(False)

    box.handler = handle
    link.on_lost.append(lost)
    timer = loop.call_later(AGAIN_S, quiet)
    answered = False
    try:
        link.send(wire.pub(api.subject(f"DIRECT.GET.{stream}"), msgspec.json.encode(request), box.subject))
        async with asyncio.timeout_at(until):
            answered = await done
    except TimeoutError as exc:
        raise TimedOut(f"stream {stream}: read: no answer within {CALL_S:g} s") from exc
    except Lost as exc:
        if link.closed:
            raise Closed("the broker is closed") from exc
        raise Unavailable(f"stream {stream}: read: the connection was lost") from exc
    finally:
        timer.cancel()
        link.on_lost.remove(lost)
        if answered:
            link.release(box)
        else:
            link.drop(box)  # what comes late must not fall into another answer
    return (frames, end) if answered else None


def records_of(frames: list[Frame], subjects: Subjects) -> list[Record]:
    """Their records. Raises Garbled."""
    out: list[Record] = []
    usual, second = _USUAL, wire.second_ns
    for frame in frames:
        found = usual(frame[2])
        if found is None:
            out.append(record_of(frame, subjects))
            continue
        id, subject, sequence, at, part = found.groups()
        ns = second(at) + int(part.ljust(9, b"0")) if part else second(at)
        out.append(Record(int(sequence), subjects(subject), frame[3], ns, id.decode() if id else ""))
    return out
