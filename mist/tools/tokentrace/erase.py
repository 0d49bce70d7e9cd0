"""Erasing what belongs to one trace, user or tenant: from the stream, its dead letters and the store, with an audit record.

The stream is the authority: it is read to its end, whatever the store knows, so that what was not ingested yet goes too.
Two envelopes in the stream `audit` frame the work: one before anything is touched, one when it is done. One without the
other shows an erasure that was interrupted; running it again with the same selector finishes it. They say who, when, why
and how many, and name the person by a salted digest only.

What concerns a selector: a span by its trace, user or tenant as the store would have them; an envelope of another type
by its tenant, or where it holds the value as a text of its own; what cannot be read as an envelope, where it holds that
text. Better one unreadable record too many than one left.

Does not: reach mirrors, exports and backups, or what a producer publishes again afterwards. Spans that lie in the memory of a
running ingest while the stream is erased may reach the store a moment later: `erase` waits for the ingest to pass
(`settle_s`) and erases from the store again; `ErasureDone.behind` says when it did not get that far.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec
from msgspec import Struct

from mist.broker.base import Broker, Record, Stream, header
from mist.broker.clock import SYSTEM, Clock
from mist.broker.cursor import Cursor
from mist.client.blobs import GRACE_ERASED_S, Blobs, Swept, beside, referenced, references, whole
from mist.client.client import to_message
from mist.errors import InvalidArgument, MistError, NotFound, Unsupported
from mist.protocol.codec import MSGPACK, decode, decode_msgpack
from mist.protocol.envelope import Envelope
from mist.protocol.subject import dead_stream
from mist.tools.tokentrace.spans import BadSpan, row_of
from mist.tools.tokentrace.store import Position, Selector

AUDIT = "audit"
"""The stream of audit records."""
BEGUN = "audit.erasure.begun"
DONE = "audit.erasure.done"
SOURCE = "tokentrace"
REASON_CHARS_MAX = 2000
SETTLE_S = 5.0


class Erasable(Protocol):
    """What is needed of the store."""

    def erase(self, selector: Selector, *, stream: str = "", sequences: Sequence[int] = ...) -> int: ...
    def position(self, stream: str) -> Position | None: ...


class ErasureBegun(Struct, frozen=True, kw_only=True):
    """`digest` is SHA-256 of `salt`, the kind and the value, each ended by a zero byte: who knows the value can find its
    erasure. Do not put the value into `reason`."""

    erasure: str
    kind: str
    digest: str
    salt: str
    stream: str
    by: str
    reason: str
    time_ns: int


class ErasureDone(Struct, frozen=True, kw_only=True):
    """`behind`: the ingest stood before sequence `upto` when the store was erased from for the last time; when it is
    running, erase again later. `damaged` sequences could not be read, and so not looked into. `blobs_left`: payloads beside the
    stream that nobody names any more but that were stored a moment ago; the next sweep takes them."""

    erasure: str
    records: int
    dead_letters: int
    spans: int
    damaged: int
    upto: int
    behind: bool
    blobs: int
    blobs_left: int
    time_ns: int


class Found(Struct):
    """What was found in one stream."""

    sequences: list[int]
    damaged: int
    upto: int
    references: set[str] = set()


async def erase(
    broker: Broker,
    stream: str,
    store: Erasable | None,
    selector: Selector,
    *,
    reason: str,
    by: str,
    audit: str = AUDIT,
    blobs: Blobs | None = None,
    settle_s: float = SETTLE_S,
    clock: Clock = SYSTEM,
    on_event: Callable[[str], None] | None = None,
) -> ErasureDone:
    """Erase what the selector names. `by` is who does it, `reason` why; both are kept for ever. `blobs` is where payloads of the
    stream lie (by default a log's own): those of erased records go unless another record of the broker has the same.

    Raises InvalidArgument, NotFound, Unsupported (a backend without `erase`) before anything is done. After any later error
    repeat it: what is gone already is passed over, and a second pair of audit records says what the repeat did.
    """
    say = on_event or (lambda _text: None)
    if not by or not reason or len(by) + len(reason) > REASON_CHARS_MAX:
        raise InvalidArgument(f"an erasure needs who and why, up to {REASON_CHARS_MAX} characters")
    kind, value = selected(selector)
    if value in reason or value in by:
        raise InvalidArgument("the reason must not name who is erased", hint="it is kept for ever")
    if not broker.capabilities.erase:
        raise Unsupported("erase", broker.backend)
    source = await broker.open(stream, create=False)
    erasure, salt = secrets.token_hex(16), secrets.token_hex(16)
    begun = ErasureBegun(
        erasure=erasure, kind=kind, digest=digest(salt, kind, value), salt=salt, stream=stream, by=by, reason=reason,
        time_ns=clock.time_ns(),
    )  # fmt: skip
    await _note(broker, audit, BEGUN, begun, clock)
    blobs = blobs or beside(broker)
    found = await find(source, selector, blobs)
    letters: Stream | None = None
    of_dead = Found([], 0, 0)
    with suppress(NotFound):
        letters = await broker.open(dead_stream(stream), create=False)
        of_dead = await find(letters, selector, blobs)
    # the store first: what quarantine holds is known by its sequences, which nobody finds when the stream forgot them
    spans = await _from_store(store, selector, stream, found)
    records = await source.erase(found.sequences)
    say(f"{records} records of stream {stream} erased")
    dead_letters = await letters.erase(of_dead.sequences) if letters is not None else 0
    say(f"{dead_letters} dead letters erased")
    behind = store is not None and await _behind(store, stream, found.upto, settle_s)
    spans += await _from_store(store, selector, stream, found)
    say(f"{spans} spans erased from the store")
    refs = found.references | of_dead.references
    swept = Swept(0, 0, 0, 0)
    if blobs is not None and refs:
        used = await referenced(broker)
        swept = await asyncio.to_thread(blobs.sweep, used, grace_s=GRACE_ERASED_S, among=refs)
        say(f"{swept.removed} payloads beside the stream erased")
    done = ErasureDone(
        erasure=erasure, records=records, dead_letters=dead_letters, spans=spans, damaged=found.damaged + of_dead.damaged,
        upto=found.upto, behind=behind, blobs=swept.removed, blobs_left=swept.young, time_ns=clock.time_ns(),
    )  # fmt: skip
    await _note(broker, audit, DONE, done, clock)
    return done


async def find(stream: Stream, selector: Selector, blobs: Blobs | None = None) -> Found:
    """The records that concern the selector, up to the end as of now. Changes nothing."""
    out = Found([], 0, (await stream.info()).last)
    async with Cursor(stream, on_gap="skip") as cursor:
        async for page in cursor.pages(to=out.upto):
            matching = await asyncio.to_thread(_matching, page.records, selector, blobs)
            out.sequences.extend([r.sequence for r in matching])
            out.references |= references(matching)
        out.damaged = sum(gap.last - gap.first + 1 for gap in cursor.gaps if gap.why == "data_loss")
    return out


async def unfinished(broker: Broker, *, audit: str = AUDIT) -> list[ErasureBegun]:
    """Erasures that were begun and not done: run them again."""
    open_: dict[str, ErasureBegun] = {}
    try:
        stream = await broker.open(audit, create=False)
    except NotFound:
        return []
    async with Cursor(stream, subjects=(BEGUN, DONE)) as cursor:
        async for record in cursor.replay():
            envelope = decode(record.data)
            if envelope.type == BEGUN:
                begun = envelope.decode(ErasureBegun)
                open_[begun.erasure] = begun
            else:
                open_.pop(envelope.decode(ErasureDone).erasure, None)
    return list(open_.values())


def selected(selector: Selector) -> tuple[str, str]:
    """(kind, value) of a selector."""
    if selector.trace_id:
        return "trace", selector.trace_id
    return ("user", selector.user) if selector.user else ("tenant", selector.tenant)


def digest(salt: str, kind: str, value: str) -> str:
    """How an audit record names who was erased."""
    return hashlib.sha256(b"".join(part.encode() + b"\0" for part in (salt, kind, value))).hexdigest()


def concerns(record: Record, selector: Selector, blobs: Blobs | None = None) -> bool:
    """Whether a record belongs to the trace, user or tenant."""
    kind, value = selected(selector)
    with suppress(MistError):  # a payload that cannot be had is looked for in what is there
        record = whole(record, blobs)
    try:
        row = row_of(record)
    except BadSpan:
        return _holds(record.data, value)
    if row is not None:
        return value == (row.trace_id if kind == "trace" else row.user_id if kind == "user" else row.tenant)
    try:
        packed = header(record.headers, "Content-Type") == MSGPACK
        envelope = decode_msgpack(record.data) if packed else decode(record.data)
    except MistError:
        return _holds(record.data, value)
    return (kind == "tenant" and envelope.tenant == value) or _holds(record.data, value)


def _holds(data: bytes, value: str) -> bool:
    """Whether the value is a text of its own in these bytes, as JSON or msgpack write it."""
    return msgspec.json.encode(value) in data or msgspec.msgpack.encode(value) in data


def _matching(records: list[Record], selector: Selector, blobs: Blobs | None) -> list[Record]:
    return [r for r in records if concerns(r, selector, blobs)]


async def _from_store(store: Erasable | None, selector: Selector, stream: str, found: Found) -> int:
    if store is None:
        return 0
    return await asyncio.to_thread(store.erase, selector, stream=stream, sequences=found.sequences)


async def _behind(store: Erasable, stream: str, upto: int, settle_s: float) -> bool:
    """Wait until the ingest has passed `upto`; whether it has not when the time is over."""
    until = asyncio.get_running_loop().time() + settle_s
    while True:
        position = await asyncio.to_thread(store.position, stream)
        if position is None or position.sequence >= upto:
            return False
        if asyncio.get_running_loop().time() >= until:
            return True
        await asyncio.sleep(min(0.05, settle_s))


async def _note(broker: Broker, audit: str, type: str, what: ErasureBegun | ErasureDone, clock: Clock) -> None:
    envelope = Envelope.new(type, what, source=SOURCE, timestamp_ns=clock.time_ns())
    await (await broker.open(audit)).append([to_message(envelope)])
