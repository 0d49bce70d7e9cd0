"""The durable contract. Read this first.

Bytes below, types above; batch below, single above: records carry bytes, the codec sits one layer up, so a relay moves
records without decoding them. A Broker opens Streams, a Stream appends and reads Records and opens Consumers; the
Broker's Checkpoints keep positions. Everything else (cursors, the batching publisher, workers) is written once above.

Promises, each one a case in mist.testing.conformance:

sequence     int >= 1, increasing, unique for the life of a stream. Ours start at 1 and are dense; only order is promised.
time         of a record: its append time at the broker, Unix nanoseconds, never going back along the sequence.
incarnation  text that changes when a stream is deleted and made again.
no third-party exception crosses this contract: everything raised is in mist.errors (or CancelledError).
use after `aclose` raises Closed; `aclose` is idempotent and wakes every waiter with Closed.
a Broker belongs to the event loop it was connected on.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self

from msgspec import Struct
from msgspec.structs import fields

from mist.errors import Conflict, InvalidArgument, TooLarge, Unsupported
from mist.protocol.subject import check_filter, check_subject

Headers = tuple[tuple[str, str], ...]
"""Content type, trace context, dead-letter reason…; names compare case-sensitively, CR and LF are refused."""

Durability = Literal["memory", "process", "power", "replicated"]
"""What an acknowledged append survives: nothing / kill -9 / a power cut / the loss of a node."""

BYTES_MAX = 8 * 1024 * 1024
RECORD_BYTES_MAX = 11 * 1024 * 1024
ID_BYTES_MAX = 256
HEADERS_BYTES_MAX = 64 * 1024
SEQUENCE_MAX = 2**63 - 1
"""Positions above are refused as InvalidArgument: no store can hold them."""
ALL = (">",)


class Message(Struct, frozen=True, gc=False):
    """To be written. `id` de-duplicates within the stream's window; empty = never a duplicate. Everything comes back
    exactly as it was given; what cannot (`check_messages`) is refused."""

    subject: str
    data: bytes
    id: str = ""
    headers: Headers = ()


class Record(Struct, frozen=True, gc=False):
    """As stored."""

    sequence: int
    subject: str
    data: bytes
    timestamp_ns: int
    id: str = ""
    headers: Headers = ()


class Page(Struct, frozen=True):
    """A read's answer. `scanned` is the `after` of the next read (it moves even when no record matched);
    `last` is the stream's last readable sequence at the time of the read. `scanned >= last` means: at the end."""

    records: list[Record]
    scanned: int
    last: int


class Delivery(Struct, frozen=True, gc=False):
    """A record handed to a consumer. `attempt` starts at 1; `token` together with the sequence names this delivery: the
    record's next one has another token."""

    record: Record
    attempt: int
    token: str


class Capabilities(Struct, frozen=True, kw_only=True):
    """Promises both ways: declared means the conformance suite exercises it, undeclared means the call raises
    Unsupported."""

    persistent: bool = False
    """Streams, consumers and checkpoints survive aclose and a new connect."""
    processes: bool = False
    """Several processes may append, read, consume and checkpoint at once."""
    threads: bool = False
    """Several event loops in threads of one process may connect to the same data."""
    read: bool = True
    """Undeclared: its streams are for publishing only (a spool); `read` refuses, and so does all that reads."""
    append: bool = True
    conditional_append: bool = True
    """`expected_last` is honoured."""
    dedupe: bool = True
    """Undeclared: ids are stored but never compared, and a dedupe window in StreamConfig is refused."""
    consumers: bool = True
    pending: bool = True
    """`Consumer.pending` lists the unsettled deliveries. Undeclared: `ConsumerInfo.pending` still counts them."""
    checkpoints: bool = True
    trim: bool = True
    erase: bool = False
    """Single records can be erased from anywhere in a stream."""
    locate: bool = True
    retention: bool = True
    """age_s_max, bytes_max and records_max of StreamConfig are honoured."""
    verify: bool = False
    """`verify` reads every stored byte and finds damage."""
    delete: bool = True


class StreamConfig(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Set at creation, kept with the stream. None = the backend's default. `full` says what happens to an append
    above bytes_max or records_max: the oldest records go, or the append is refused with StorageFull."""

    durability: Durability | None = None
    age_s_max: float | None = None
    bytes_max: int | None = None
    records_max: int | None = None
    full: Literal["drop_oldest", "refuse"] | None = None
    dedupe_window_s: float | None = None
    dedupe_ids_max: int | None = None
    segment_bytes: int | None = None
    """Where the backend has segments (log): roll at this size, and at this age."""
    segment_age_s: float | None = None

    def or_defaults(self, defaults: StreamConfig) -> StreamConfig:
        """These settings, with the defaults where a field is None."""
        return StreamConfig(
            **{
                f.name: getattr(defaults, f.name) if getattr(self, f.name) is None else getattr(self, f.name)
                for f in fields(StreamConfig)
            }
        )

    def check_fits(self, existing: StreamConfig, stream: str) -> None:
        """Raise Conflict when a stream that exists was made with other settings than the ones asked for."""
        for f in fields(StreamConfig):
            asked, has = getattr(self, f.name), getattr(existing, f.name)
            if asked is not None and asked != has:
                raise Conflict(
                    f"stream {stream}: exists with {f.name}={has}, asked for {asked}",
                    hint="open it without a configuration, or delete it first",
                )

    def validate(self) -> StreamConfig:
        for name in (
            "age_s_max",
            "bytes_max",
            "records_max",
            "dedupe_window_s",
            "dedupe_ids_max",
            "segment_bytes",
            "segment_age_s",
        ):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise InvalidArgument(f"stream configuration: {name}={value} is not a number >= 0")
        return self


DEFAULTS = StreamConfig(
    age_s_max=0, bytes_max=0, records_max=0, full="drop_oldest", dedupe_window_s=120.0, dedupe_ids_max=100_000,
    segment_bytes=64 * 1024 * 1024, segment_age_s=0,
)  # fmt: skip
"""0 = no limit; a dedupe window of 0 s or 0 ids = no de-duplication. `durability` has no default here: every backend
states its own."""


class StreamInfo(Struct, frozen=True, kw_only=True):
    """`first` is the oldest record's sequence, last + 1 when there is none. `bytes` is what the stream occupies, as the
    backend counts it."""

    name: str
    incarnation: str
    first: int
    last: int
    records: int
    bytes: int
    durability: Durability
    capabilities: Capabilities
    config: StreamConfig
    created_ns: int = 0
    size_bytes_max: int = RECORD_BYTES_MAX
    warnings: tuple[str, ...] = ()


class Damage(Struct, frozen=True):
    """Records first..last (inclusive) cannot be read. `where` is for the operator: file and offset."""

    first: int
    last: int
    where: str
    why: str


class Verification(Struct, frozen=True, kw_only=True):
    """The answer of `verify`: what was read, and every damaged range, in order."""

    records: int
    bytes: int
    first: int
    last: int
    damage: list[Damage]


class ConsumerConfig(Struct, frozen=True, kw_only=True):
    """`after` is where a new consumer starts (exclusive). `ack_wait_s`: an unacked delivery returns after this.
    `attempts_max`: then it goes to the dead letters (0 = for ever). `pending_max` bounds unacked deliveries over all
    workers: `fetch` gives nothing above it."""

    after: int = 0
    subjects: tuple[str, ...] = ALL
    ack_wait_s: float = 30.0
    attempts_max: int = 5
    pending_max: int = 65_536

    def validate(self) -> ConsumerConfig:
        for pattern in self.subjects:
            check_filter(pattern)
        if (
            not 0 <= self.after <= SEQUENCE_MAX
            or not (self.ack_wait_s > 0 and math.isfinite(self.ack_wait_s))
            or self.attempts_max < 0
            or self.pending_max < 1
            or not self.subjects
        ):
            raise InvalidArgument(f"consumer configuration cannot be right: {self}")
        return self


class ConsumerInfo(Struct, frozen=True, kw_only=True):
    """`floor`: everything up to it is settled. `delivered`: the highest sequence ever handed out or passed over.
    `pending`: handed out, not settled (given back ones too). `redelivered`: pending ones with attempt > 1. `lag`: undelivered and pending
    records (for a filtered consumer unscanned records count whether they match or not). `lag_s`: age of the oldest
    undelivered record, 0 when there is none."""

    name: str
    stream: str
    floor: int
    delivered: int
    pending: int
    redelivered: int
    lag: int
    lag_s: float
    config: ConsumerConfig


class Pending(Struct, frozen=True):
    """One unsettled delivery. `due_s`: seconds until it may be handed out again, negative when overdue."""

    sequence: int
    attempt: int
    due_s: float


class Fact(Struct, frozen=True):
    """One thing an operator should know about a backend: `what` it is, how it `is`, and, where that is less than it
    should be, a `warning` with the next step."""

    what: str
    value: str
    warning: str = ""


class Checkpoint(Struct, frozen=True, kw_only=True):
    """A durable position under a name: everything up to `sequence` is done. `time_ns` is when it was saved."""

    stream: str
    name: str
    incarnation: str
    sequence: int
    time_ns: int = 0


class Checkpoints(ABC):
    """The one store of positions. Key: (stream, name). A saved checkpoint survives what the backend's strongest
    durability survives."""

    @abstractmethod
    async def save(self, checkpoint: Checkpoint, *, force: bool = False) -> Checkpoint:
        """Store it atomically, with the time filled in. Saving the same sequence again is fine.

        Raises CheckpointRegression when the stored sequence is higher, WrongIncarnation when the stored one is of
        another incarnation; `force` overrides both.
        """

    @abstractmethod
    async def load(self, stream: str, name: str) -> Checkpoint | None: ...

    @abstractmethod
    async def delete(self, stream: str, name: str) -> bool:
        """Whether there was one."""

    @abstractmethod
    async def list(self, stream: str = "") -> list[Checkpoint]:
        """All of one stream, or all; sorted by (stream, name)."""


class Broker(ABC):
    """One connection to one backend. Made by `mist.connect(url)`."""

    url: str
    """As it may be printed: secrets replaced."""
    backend: str
    """Its short name: log, memory, nats, redis."""
    capabilities: Capabilities

    @abstractmethod
    async def open(self, name: str, *, create: bool = True, config: StreamConfig | None = None) -> Stream:
        """The stream of that name, made when absent and `create`. Opening again gives another handle on the
        same stream (same name and incarnation).

        Raises NotFound (absent, not create), Conflict (exists with other settings than asked for),
        InvalidArgument (not a stream name).
        """

    @abstractmethod
    async def streams(self) -> list[str]:
        """The names, sorted; dead-letter streams included."""

    @abstractmethod
    async def delete(self, name: str) -> None:
        """Remove the stream, its consumers and its checkpoints, not its dead letters. Raises NotFound. Open handles
        raise NotFound after, waiting ones at once."""

    @abstractmethod
    async def ping(self) -> float:
        """Round trip in seconds. Raises Unavailable or TimedOut."""

    async def describe(self) -> list[Fact]:
        """What is in force behind this connection (server version, how it syncs, replicas…), for `mist doctor`. Asks the
        server; changes nothing. Nothing to tell is fine."""
        return []

    @property
    @abstractmethod
    def checkpoints(self) -> Checkpoints: ...

    @abstractmethod
    async def aclose(self) -> None:
        """Idempotent. Appends already accepted are finished first; waiting reads and fetches raise Closed."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()


class Stream(ABC):
    """One ordered, append-only sequence of records."""

    name: str
    incarnation: str
    size_bytes_max: int
    """The largest `data` of one message."""

    @abstractmethod
    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        """Store the messages in order and return their sequences, when the stream's durability is reached.

        All or a prefix: PartialAppend tells how far. No messages: returns [] and touches nothing. A message whose id
        was seen within the window is not stored again and gets the first one's sequence; that check comes before
        `expected_last` (the last sequence the caller knows), which raises WrongSequence if other messages came
        between and something new is to be stored. A cancelled append is not withdrawn.
        Raises TooLarge and InvalidArgument before anything is stored; Ambiguous when the fate is unknown;
        StorageFull when there is no room.
        """

    @abstractmethod
    async def read(
        self,
        *,
        after: int = 0,
        subjects: Sequence[str] = ALL,
        limit: int = 256,
        bytes_max: int = BYTES_MAX,
        wait_s: float = 0.0,
    ) -> Page:
        """One page of the records after `after` (exclusive), oldest first, at most `limit` of them.

        A page's data stays within `bytes_max`, but holds at least one record where one matches. At the end it waits up
        to `wait_s` for a record (below 0: not at all; infinity: until there is one), then returns an empty page. A
        filtered page may be empty before the end: go on with `scanned`. Pure: cancelling it loses nothing, the same `after` gives the same records.
        Raises SequenceExpired, CursorAhead, DataLoss (when the first record to return is damaged; records before the
        damage are returned first).
        """

    @abstractmethod
    async def info(self) -> StreamInfo: ...

    @abstractmethod
    async def locate(self, time_ns: int) -> int:
        """The first sequence whose record time is >= `time_ns`; last + 1 when there is none."""

    @abstractmethod
    async def trim(self, *, before: int) -> int:
        """Remove the records below sequence `before`; returns how many went. Never makes room in the numbering.

        Consumers pass over what is gone: it is neither pending nor lag. Raises CursorAhead when `before` is beyond
        last + 1.
        """

    async def erase(self, sequences: Sequence[int]) -> int:
        """Erase these records, wherever they lie; returns how many were there. What is unknown, trimmed or erased
        already is no error, and repeating it after an error is what to do.

        When it returns, at the stream's durability, data, id, headers and subject are gone from the stream's own storage
        as far as the backend can promise (docs/adr/0014 says how far). No sequence changes, readers and consumers step
        over the gap; where the oldest records went, a read there may raise SequenceExpired, as after a trim. An unsettled
        delivery of an erased record is settled. The id may be published again, at the latest when the dedupe window is
        over. Dead letters, copies and what was handed out before are not touched.
        Raises DataLoss, when the others are erased, for sequences inside damage; StorageFull.
        """
        raise Unsupported("erase", f"stream {self.name}")

    @abstractmethod
    async def verify(self) -> Verification:
        """Read every stored byte."""

    @abstractmethod
    async def consumer(self, name: str, config: ConsumerConfig | None = None, *, create: bool = True) -> Consumer:
        """The durable consumer of that name, made when absent and `create`.

        Raises NotFound, Conflict (exists with another configuration than asked for), CursorAhead (config.after),
        InvalidArgument (also where the stream's name leaves no room for `--dead`: `dead_stream` would raise later).
        """

    @abstractmethod
    async def consumers(self) -> list[str]: ...


class Consumer(ABC):
    """Durable delivery state, shared by competing workers."""

    name: str
    stream: str
    config: ConsumerConfig

    @abstractmethod
    async def fetch(self, *, limit: int = 256, bytes_max: int = BYTES_MAX, wait_s: float = 0.0) -> list[Delivery]:
        """Up to `limit` deliveries: first what is due again, then new records. Waits up to `wait_s` for the first.

        Each is this caller's until `ack_wait_s` passes. A record out of attempts is put among the dead letters, with
        its reason, before it is settled here, and the next one is served. Damage raises DataLoss once per range; the
        next fetch goes on behind it.
        """

    @abstractmethod
    async def ack(self, deliveries: Sequence[Delivery]) -> int:
        """Settle them. Returns how many were still ours; a stale or unknown token is a no-op, a delivery given twice
        counts once. Final."""

    @abstractmethod
    async def nak(self, deliveries: Sequence[Delivery], *, delay_s: float = 0.0) -> int:
        """Give them back, to be delivered again after `delay_s` with attempt + 1; those out of attempts become dead
        letters. Returns how many were still ours."""

    @abstractmethod
    async def term(self, deliveries: Sequence[Delivery], *, reason: str = "") -> int:
        """Never deliver them again: they become dead letters with this reason. Returns how many were still ours."""

    @abstractmethod
    async def extend(self, deliveries: Sequence[Delivery]) -> int:
        """Start their `ack_wait_s` anew. Returns how many were still ours."""

    @abstractmethod
    async def info(self) -> ConsumerInfo: ...

    @abstractmethod
    async def pending(self, *, limit: int = 1000) -> list[Pending]:
        """Unsettled deliveries by sequence. A capability of its own: some servers count them and list none."""

    @abstractmethod
    async def seek(self, after: int) -> None:
        """Forget all delivery state and go on after `after`, or with the first kept record where that is later. Older
        deliveries become stale. Raises CursorAhead."""

    @abstractmethod
    async def delete(self) -> None:
        """Remove the consumer. Idempotent; later calls raise NotFound."""


def check_messages(messages: Sequence[Message], size_bytes_max: int) -> None:
    """What every adapter checks before it stores anything. Raises TooLarge or InvalidArgument naming the position."""
    if messages:
        check_columns(
            [m.subject for m in messages],
            [m.data for m in messages],
            [m.id for m in messages],
            [m.headers for m in messages],
            size_bytes_max,
        )


def check_columns(
    subjects: Sequence[str], datas: Sequence[bytes], ids: Sequence[str], headers: Sequence[Headers], size_bytes_max: int
) -> None:
    """`check_messages` for a batch by column (at least one message): whole columns first, single ones after a hit."""
    if sum(map(len, datas)) > size_bytes_max and max(map(len, datas)) > size_bytes_max:
        i, big = next((i, len(d)) for i, d in enumerate(datas) if len(d) > size_bytes_max)
        raise TooLarge(f"message {i}: data", size_bytes=big, size_bytes_max=size_bytes_max)
    for subject in set(subjects):
        check_subject(subject)
    # one look at all ids together decides nearly every batch
    if max(map(len, ids)) > ID_BYTES_MAX // 4 or not plain("".join(ids)):
        for i, id in enumerate(ids):
            if not _text(id) or len(id.encode()) > ID_BYTES_MAX:
                raise InvalidArgument(
                    f"message {i}: id {id[:40]!r} holds CR, LF, NUL or a lone surrogate, or is longer than {ID_BYTES_MAX} bytes"
                )
    if any(headers):
        for i, h in enumerate(headers):
            if h:
                check_headers(h, i)


def check_headers(headers: Headers, position: int = 0) -> None:
    """Raise InvalidArgument for headers that could not come back as they are, or break a wire."""
    size = 0
    for key, value in headers:
        if not key or ":" in key or not _text(key) or not _text(value):
            raise InvalidArgument(
                f"message {position}: header {key[:40]!r} holds CR, LF, NUL, a lone surrogate, or a colon in its name"
            )
        size += len(key.encode()) + len(value.encode())
    if size > HEADERS_BYTES_MAX:
        raise InvalidArgument(f"message {position}: headers of {size} bytes (max {HEADERS_BYTES_MAX})")


_BREAK = re.compile("[\\r\\n\\x00]")


def plain(text: str) -> bool:
    """Whether it is ASCII without CR, LF and NUL: then it may be an id or a header value."""
    return text.isascii() and "\n" not in text and "\r" not in text and "\x00" not in text


def _text(text: str) -> bool:
    """Whether it can be a header value or an id: one line that has a UTF-8 form."""
    if _BREAK.search(text):
        return False
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_position(value: int, what: str = "after") -> None:
    """Raise InvalidArgument for a position no stream can have: negative, or above SEQUENCE_MAX."""
    if not 0 <= value <= SEQUENCE_MAX:
        raise InvalidArgument(f"{what}={value} is not a position (0 to {SEQUENCE_MAX})")


def check_sequences(sequences: Sequence[int]) -> None:
    """What every `erase` checks first. Raises InvalidArgument."""
    for sequence in sequences:
        check_position(sequence, "sequence")


def check_read(*, after: int = 0, limit: int, bytes_max: int, wait_s: float) -> None:
    """What every `read` and `fetch` checks before it looks at anything. Raises InvalidArgument."""
    check_position(after)
    if limit < 1 or bytes_max < 1 or wait_s != wait_s:
        raise InvalidArgument(f"limit={limit}, bytes_max={bytes_max}, wait_s={wait_s} cannot be right")


def check_delay(delay_s: float) -> None:
    """What every `nak` checks. Raises InvalidArgument."""
    if not (delay_s >= 0 and math.isfinite(delay_s)):
        raise InvalidArgument(f"delay_s={delay_s} cannot be right")


def header(headers: Headers, name: str, default: str = "") -> str:
    """The first value of a header, or the default."""
    for key, value in headers:
        if key == name:
            return value
    return default
