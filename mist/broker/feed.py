"""Feeding a stream: messages appended in order, each of them once, whatever happens on the way.

What copies and the spool stand on. Between storing and remembering that it was stored a process can die, and an answer can
be lost; so the feed looks at what the stream holds before it repeats anything.

Promises
- Order: what was put before lies before, as one append is in flight at a time.
- Once: a message whose fate is in doubt (Ambiguous, a timeout, a former life of this feed) is looked for in the stream,
  behind the last sequence that was certain, before it is appended again. An append that may still be on its way then is
  met by the id, where the stream compares ids; where it does not, or a message has none, every append is conditional on
  the stream's last sequence, so that of two of them only one can be stored.
- Waiting: while the backend is away it tries again, for as long as its caller lets it.
- What the stream will never take (too large, a subject it does not have) is passed over, told, and counted.

Limits: where others write to the same stream, and an append without an id is in doubt, somebody else's record with the
very same subject, headers and data is taken for ours. Where others write all the time, a conditional append may never
win: after `RACES_MAX` losses in a row it raises Conflict.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from operator import attrgetter

import msgspec
from msgspec import Struct

from mist.broker.base import DEFAULTS, Checkpoint, Checkpoints, Message, Record, Stream
from mist.broker.patience import Patience
from mist.errors import (
    Ambiguous,
    Conflict,
    InvalidArgument,
    MistError,
    PartialAppend,
    SequenceExpired,
    TimedOut,
    TooLarge,
    TransportError,
    Unavailable,
    WrongSequence,
)

REPEATED = 0
REFUSED = -1
RACES_MAX = 100
_UNSURE = (Ambiguous, TimedOut, TransportError)
_GUILTY = (TooLarge, InvalidArgument)
_PAGE = 1000
_id = attrgetter("id")


class Place(Struct, frozen=True):
    """Where a feed stands: everything up to `sequence` of the source (of that incarnation) is stored, and the destination
    (of incarnation `target`) was at `at` then: what lies behind that may be ours as well."""

    incarnation: str
    sequence: int
    at: int = 0
    target: str = ""


class Places:
    """Places in a store of checkpoints, one row each, so that source and destination cannot disagree. The row's stream is
    the one whose broker keeps it; its `incarnation` holds both streams' and `at`."""

    def __init__(self, checkpoints: Checkpoints, stream: str) -> None:
        self._checkpoints = checkpoints
        self._stream = stream

    async def load(self, name: str) -> Place | None:
        found = await self._checkpoints.load(self._stream, name)
        return None if found is None else _unpack(found)

    async def saved_ns(self, name: str) -> int:
        """When it was saved; 0 = never."""
        found = await self._checkpoints.load(self._stream, name)
        return 0 if found is None else found.time_ns

    async def save(self, name: str, place: Place) -> None:
        text = f"{place.at}:{len(place.target)}:{place.target}{place.incarnation}"
        row = Checkpoint(stream=self._stream, name=name, incarnation=text, sequence=place.sequence)
        # forced: the text differs each time; what may follow what is the feed's to know
        await self._checkpoints.save(row, force=True)

    async def forget(self, name: str) -> None:
        await self._checkpoints.delete(self._stream, name)


def _unpack(row: Checkpoint) -> Place:
    at, _, rest = row.incarnation.partition(":")
    size, _, texts = rest.partition(":")
    if not (at.isdigit() and size.isdigit()):  # not a row of ours: a plain checkpoint says where, not what is in doubt
        return Place(row.incarnation, row.sequence)
    return Place(texts[int(size) :], row.sequence, int(at), texts[: int(size)])


def key_of(item: Message | Record) -> str:
    """What two copies of one record have in common: the id, or the content where there is none."""
    if item.id:
        return f"id:{item.id}"
    content = msgspec.msgpack.encode((item.subject, item.headers, item.data))
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class _Tail:
    """What lies in the stream and may be ours: ours are a prefix of what is put next, in order, others may lie between.
    So a message without an id matches only behind the one before it, and after the first that is not there none is."""

    def __init__(self) -> None:
        self._where: dict[str, list[int]] = {}
        self._passed = 0
        self._over = False

    def add(self, record: Record) -> None:
        self._over = False
        self._where.setdefault(key_of(record), []).append(record.sequence)

    def __bool__(self) -> bool:
        return bool(self._where)

    def find(self, message: Message) -> int:
        """The sequence under which it lies there; 0 when it does not."""
        found = self._where.get(key_of(message), [])
        if message.id:
            if found:
                self._passed = max(self._passed, found[0])
            return found[0] if found else 0
        at = bisect_right(found, self._passed)
        if self._over or at == len(found):
            self._over = True
            return 0
        self._passed = found[at]
        return self._passed


class Feed:
    """Feeds `stream`. For one task at a time. `on_refused` is told of every message that is passed over."""

    def __init__(
        self,
        stream: Stream,
        patience: Patience,
        *,
        on_refused: Callable[[Message, MistError], None] | None = None,
    ) -> None:
        self.stream = stream
        self.last = 0
        """The last sequence of the stream that this feed knows of."""
        self.at = 0
        """The last sequence that is ours, for the `Place` to be saved now: what is put next lies behind it."""
        self._patience = patience
        self._on_refused = on_refused
        self._former = _Tail()
        self._former_life = False  # one of its appends may still be on its way
        self._late = False  # one of ours may
        self._compares_ids = False
        self._conditional = False
        self._begun = False

    async def begin(self, place: Place | None = None, *, idle_s: float | None = None) -> None:
        """Look at the stream, once, before the first `put`. `place` is where a former life stood: what lies behind it
        may be ours. `idle_s`, where everything has an id, is the age of the place: nothing in doubt is older, so that a
        stream that still knows these ids need not be looked through."""
        info = await self._patience(self.stream.info)
        config = info.config.or_defaults(DEFAULTS)
        can = info.capabilities
        window_s, ids_max = config.dedupe_window_s or 0.0, config.dedupe_ids_max or 0
        self._compares_ids = can.dedupe and window_s > 0 and ids_max >= 2 * _PAGE
        self._conditional = can.conditional_append
        self.last = self.at = info.last
        self._begun = True
        if place is None:
            return
        known = idle_s is not None and idle_s < window_s / 2 and info.last - place.at <= ids_max // 2
        if known and self._compares_ids and place.target == self.stream.incarnation:
            self.at = place.at
            return
        self._former_life = True
        self.last = self.at = max(place.at if place.target == self.stream.incarnation else 0, info.first - 1)
        await self._look(self._former)

    async def put(self, messages: Sequence[Message]) -> list[int]:
        """Store them. Their sequences, REPEATED for what was there before this feed began, or for an id that the stream
        knows, REFUSED for what it will never take.

        Raises what is not worth waiting for (StorageFull, NotFound…): the messages before it may be stored by then, and a
        feed that begins from the last known place finds them.
        """
        if not self._begun:
            await self.begin()
        if not self._former:
            return await self._store(messages)
        out = [REPEATED if self._there(m) else None for m in messages]
        stored = iter(await self._store([m for m, there in zip(messages, out, strict=True) if there is None]))
        return [next(stored) if there is None else there for there in out]

    def _there(self, message: Message) -> bool:
        """Whether a former life stored it."""
        sequence = self._former.find(message)
        self.at = max(self.at, sequence)
        return bool(sequence)

    def _refuse(self, message: Message, error: MistError) -> int:
        if self._on_refused is not None:
            self._on_refused(message, error)
        return REFUSED

    async def _store(self, messages: Sequence[Message]) -> list[int]:
        out: list[int] = []
        races = 0
        while len(out) < len(messages):
            rest = messages[len(out) :] if out else messages
            guarded = self._conditional and not (self._compares_ids and "" not in map(_id, rest))
            error: MistError
            try:
                # without a condition the argument is left out: who does not have it refuses it
                answer = await (
                    self.stream.append(rest, expected_last=self.last) if guarded else self.stream.append(rest)
                )
            except WrongSequence as exc:
                races += 1
                if races > RACES_MAX:
                    raise Conflict(
                        f"stream {self.stream.name}: others write to it all the time, and records without an id can only "
                        "be told apart when nobody comes between",
                        hint="feed a stream of its own",
                    ) from exc
                await asyncio.sleep(random.random() * min(races, 20) / 1000)
                if self._late or self._former_life:
                    out += await self._found(rest)
                else:
                    self.last = max(self.last, exc.last)
                continue
            except PartialAppend as exc:
                out += self._known(exc.sequences)
                error = exc.__cause__ if isinstance(exc.__cause__, MistError) else Unavailable(exc.message)
            except MistError as exc:
                error = exc
            else:
                self._patience.back()
                if guarded:  # of an older one that is still on its way the condition does not hold any more
                    self._late = self._former_life = False
                out += self._known(answer)
                continue
            rest = messages[len(out) :]
            if isinstance(error, _GUILTY) and rest:
                return out + await self._store_apart(rest, error)
            unsure = isinstance(error, _UNSURE)
            self._late = self._late or unsure
            await self._patience.wait(error)
            if unsure:
                out += await self._found(rest)
        return out

    async def _store_apart(self, messages: Sequence[Message], error: MistError) -> list[int]:
        """Something among them is refused: the half without it must not suffer."""
        if len(messages) == 1:
            return [self._refuse(messages[0], error)]
        half = len(messages) // 2
        return await self._store(messages[:half]) + await self._store(messages[half:])

    def _known(self, sequences: Sequence[int]) -> list[int]:
        """The answer of an append: what is not new was there before."""
        if sequences and sequences[0] > self.last and len(set(sequences)) == len(sequences):
            self.last = self.at = sequences[-1]
            return list(sequences)
        out = []
        for sequence in sequences:
            if sequence > self.last:
                self.last = sequence
                self.at = sequence
                out.append(sequence)
            else:
                out.append(REPEATED)
        return out

    async def _found(self, messages: Sequence[Message]) -> list[int]:
        """The sequences of the first of these, as far as they were stored after all."""
        # a former life may have sent more than these: what is left over is for the next ones
        tail = self._former if self._former_life else _Tail()
        await self._look(tail)
        out = []
        for message in messages:
            sequence = tail.find(message)
            if not sequence:
                break
            self.at = max(self.at, sequence)
            out.append(sequence)
        return out

    async def _look(self, tail: _Tail) -> None:
        """Take in what lies behind `last`, and move it to the end."""
        while True:
            try:
                after = self.last
                page = await self._patience(lambda after=after: self.stream.read(after=after, limit=_PAGE))  # type: ignore[misc]
            except SequenceExpired as exc:
                self.last = exc.first - 1
                continue
            for record in page.records:
                tail.add(record)
            self.last = max(after, page.scanned)
            if page.scanned >= page.last or page.scanned <= after:
                return
