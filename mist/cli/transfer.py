"""Moving records from a stream to a stream or a file: resumable, counted, digested. Shared by copy, mirror and import.

Data, not configuration: subject, id, headers and bytes of a record go over, its sequence and time are the destination's.
Where a transfer stands is kept at the destination: for a stream one checkpoint (the source's sequence, and the
destination's last one at that moment), for a file `FILE.mist-copy`. A crash between storing and saving leaves a tail that
the next run reads back, so that nothing is stored twice, whatever the ids' window and also without ids (mist.broker.feed).
Records with an id the destination has seen within its window are counted as repeated; what it will never take is told,
passed over and counted as refused.

While one page is stored the next is read, and the one before is read back from the destination: the digest is SHA-256 over
what was stored, computed from the source's records and again from what the destination gives.

A broker that goes away is waited for, with a line on stderr, for as long as --timeout lets it; one that is away at the
start, for ten seconds or --timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from mist.broker.base import Broker, Headers, Message, Record, Stream
from mist.broker.feed import REPEATED, Feed, Place, Places
from mist.broker.patience import Patience, Steady, again
from mist.cli.filestream import FileStream
from mist.cli.records import View
from mist.cli.render import Progress, seq
from mist.cli.scan import PAGE, PARTIAL, Scan
from mist.cli.session import REACH_S, Session
from mist.errors import Conflict, InvalidArgument, Malformed, MistError, SequenceExpired, WrongIncarnation
from mist.kit.parallel import RateLimiter
from mist.protocol.envelope import Envelope
from mist.protocol.url import Url, parse_url, redact

if TYPE_CHECKING:
    from mist.transport import Transport

T = TypeVar("T")
SAVE_EVERY_S = 0.5


TOLD_MAX = 10
LAST_SAVE_S = 2.0
BEHIND_MAX = 8
"""Batches that are stored and not yet read back."""


class Mismatch(MistError):
    """What arrived is not what was sent."""

    code = "data_loss"


def fingerprint(subject: str, id: str, headers: Headers, data: bytes) -> bytes:
    """A record as bytes that differ whenever the record does."""
    return msgspec.msgpack.encode((subject, id, headers, data))


def fingerprints(records: Sequence[Record]) -> memoryview:
    """The fingerprints of all of these, one behind the other."""
    packed = msgspec.msgpack.encode([(r.subject, r.id, r.headers, r.data) for r in records])
    # what stands before the first one says how many there are: it must not depend on how they were paged
    head = 1 if len(records) < 16 else 3 if len(records) < 1 << 16 else 5
    return memoryview(packed)[head:]


class Refusals:
    """What a destination will never take: counted, the first ones told on stderr."""

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self._name = name
        self.count = 0

    def __call__(self, sequence: int, error: MistError) -> None:
        self.count += 1
        if self.count <= TOLD_MAX:
            more = "; further ones are only counted" if self.count == TOLD_MAX else ""
            self._session.out.warn(f"record {sequence}: not taken by {self._name}: {error.message}{more}")


class Sink(ABC):
    """A destination. `stored`, `repeated` and `refused` count this run's records."""

    name: str
    stored = 0
    repeated = 0
    refused = 0
    unverified = 0

    @abstractmethod
    async def place(self, key: str) -> Place | None:
        """Where the transfer `key` stands, None at the first run. Must be called first."""

    @abstractmethod
    async def put(self, records: Sequence[Record]) -> None:
        """Store them durably."""

    @abstractmethod
    async def save(self, key: str, place: Place) -> None: ...

    @abstractmethod
    async def check(self) -> str:
        """Read back what this run stored. Returns the digest; raises Mismatch."""

    @abstractmethod
    async def forget(self, key: str) -> None: ...


class StreamSink(Sink):
    """A stream of a broker."""

    def __init__(self, broker: Broker, stream: Stream, patience: Patience, session: Session) -> None:
        self.name = f"{stream.name} in {redact(broker.url)}"
        self.stream = stream
        self.broker = broker
        self._patience = patience
        self._refusals = Refusals(session, self.name)
        self._feed = Feed(stream, patience, on_refused=self._refused)
        self._places = Places(broker.checkpoints, stream.name)
        self._kept: Place | None = None
        self._back = ReadBack(Steady(stream, patience), self.name)
        self._putting: tuple[Sequence[Record], list[Message]] = ((), [])

    def _refused(self, message: Message, error: MistError) -> None:
        self.refused += 1
        records, messages = self._putting
        self._refusals(next(r.sequence for r, m in zip(records, messages, strict=True) if m is message), error)

    async def place(self, key: str) -> Place | None:
        self._kept = await self._patience(lambda: self._places.load(key))
        await self._feed.begin(self._kept)
        return self._kept

    async def put(self, records: Sequence[Record]) -> None:
        messages = [Message(r.subject, r.data, r.id, r.headers) for r in records]
        self._putting = (records, messages)
        answer = await self._feed.put(messages)
        if answer and min(answer) <= 0:
            self.repeated += answer.count(REPEATED)
            records = [r for r, s in zip(records, answer, strict=True) if s > 0]
            answer = [s for s in answer if s > 0]
        self.stored += len(answer)
        if answer:
            await self._back.expect(records, answer)

    async def save(self, key: str, place: Place) -> None:
        # somebody else's row means that the same command runs twice: neither could promise anything
        now = await self._patience(lambda: self._places.load(key))
        new = Place(place.incarnation, place.sequence, self._feed.at, self.stream.incarnation)
        if now not in (self._kept, new):
            raise Conflict(
                f"{self.name}: another run of the same transfer saved its place meanwhile",
                hint="stop one of them; the other goes on where they are",
            )
        await self._patience(lambda: self._places.save(key, new))
        self._kept = new

    async def forget(self, key: str) -> None:
        await self._patience(lambda: self._places.forget(key))

    async def check(self) -> str:
        digest = await self._back.finish()
        self.unverified = self._back.expired
        return digest

    async def aclose(self) -> None:
        await self._back.aclose()


class _Stored(NamedTuple):
    """A batch that was stored: its sequences, ascending, and the digest up to and with it."""

    sequences: list[int]
    digest: Any


class ReadBack:
    """Reads what was stored, a few batches behind, and compares digests."""

    def __init__(self, stream: Stream, name: str) -> None:
        self._stream = stream
        self._name = name
        self._sent = hashlib.sha256()
        self._got = hashlib.sha256()
        self._queue: asyncio.Queue[_Stored | None] = asyncio.Queue(BEHIND_MAX)
        self._task: asyncio.Task[None] | None = None
        self.expired = 0
        """Records that the destination's retention had removed before they were compared."""

    async def expect(self, records: Sequence[Record], sequences: list[int]) -> None:
        """These were stored. Raises Mismatch when an earlier batch was not what was sent."""
        self._sent.update(fingerprints(records))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        await self._or_failure(self._queue.put(_Stored(sequences, self._sent.copy())))

    async def finish(self) -> str:
        """Wait for the last batch; the digest of all."""
        if self._task is not None:
            await self._or_failure(self._queue.put(None))
            await self._task
        return self._sent.hexdigest()

    async def _or_failure(self, putting: Any) -> None:
        """Do it, or raise why the reading has ended."""
        task = self._task
        assert task is not None  # noqa: S101
        waiting = asyncio.ensure_future(putting)
        try:
            await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if task.done():
            task.result()

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while (batch := await self._queue.get()) is not None:
            found = await self._read(batch.sequences)
            if found is None:
                self.expired += len(batch.sequences)
                self._got = batch.digest
                continue
            if found:
                self._got.update(fingerprints(found))
            same = self._got.digest() == batch.digest.digest()
            if len(found) != len(batch.sequences) or not same:
                first, last = batch.sequences[0], batch.sequences[-1]
                raise Mismatch(
                    f"{self._name}: {len(batch.sequences)} records were stored as {first} to {last}, {len(found)} are read "
                    f"back, and the digests {'agree' if same else 'differ'}",
                    hint=f"`mist stream verify {self._stream.name}` reads every byte",
                )

    async def _read(self, sequences: list[int]) -> list[Record] | None:
        """The records under these sequences; None when some are gone by the stream's retention."""
        wanted = set(sequences)
        out: list[Record] = []
        after, last = sequences[0] - 1, sequences[-1]
        while after < last:
            try:
                page = await self._stream.read(after=after, limit=PAGE)
            except SequenceExpired:
                return None
            found = page.records
            if len(found) != len(sequences) or found[0].sequence != sequences[0] or found[-1].sequence != last:
                found = [r for r in found if r.sequence in wanted]
            out += found
            if page.scanned <= after:
                break
            after = page.scanned
        return out


class _FilePlace(Struct, frozen=True):
    incarnation: str
    sequence: int
    bytes: int


class FileSink(Sink):
    """A JSON-lines file of plain envelopes, through the `file:` transport. Foreign records and headers do not fit."""

    def __init__(self, url: Url, transport: Transport) -> None:
        self.path = Path(url.target)
        self.name = str(self.path)
        self._transport = transport
        self._digest = hashlib.sha256()
        self._tail: set[str] = set()
        self._start = 0

    def _state(self) -> Path:
        return self.path.with_name(self.path.name + ".mist-copy")

    def _places(self) -> dict[str, _FilePlace]:
        try:
            return msgspec.json.decode(self._state().read_bytes(), type=dict[str, _FilePlace])
        except FileNotFoundError:
            return {}
        except msgspec.DecodeError as exc:
            raise Malformed(
                f"{self._state()}: cannot be read: {exc}", hint="--restart starts from the beginning"
            ) from exc

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    async def place(self, key: str) -> Place | None:
        self._start = self._size()
        found = self._places().get(key)
        if found is None:
            return None
        if self._start < found.bytes:
            raise WrongIncarnation(
                f"{self.path} is shorter than when it was copied to", hint="--restart copies all again"
            )
        for line in self._lines(found.bytes):
            self._tail.add(f"id:{line.id}")
        return Place(found.incarnation, found.sequence)

    def _lines(self, offset: int) -> Iterable[Envelope]:
        from mist.protocol import codec

        if offset >= self._size():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if line.endswith(b"\n") and line.strip():
                    yield codec.decode(line)

    async def put(self, records: Sequence[Record]) -> None:
        envelopes = []
        for record in records:
            view = View(record)
            env = view.envelope
            if env is None:
                self.refused += 1
            elif self._tail and f"id:{env.id}" in self._tail:
                self.repeated += 1
            else:
                envelopes.append(env)
                self._digest.update(fingerprint(env.type, env.id, (), bytes(env.payload)))
        await self._transport.send_many(envelopes)
        self.stored += len(envelopes)

    async def save(self, key: str, place: Place) -> None:
        places = self._places() | {key: _FilePlace(place.incarnation, place.sequence, self._size())}
        _replace(self._state(), msgspec.json.encode(places))

    async def forget(self, key: str) -> None:
        places = self._places()
        places.pop(key, None)
        _replace(self._state(), msgspec.json.encode(places))

    async def check(self) -> str:
        back = hashlib.sha256()
        count = 0
        for env in self._lines(self._start):
            back.update(fingerprint(env.type, env.id, (), bytes(env.payload)))
            count += 1
        if count != self.stored or back.digest() != self._digest.digest():
            raise Mismatch(f"{self.path}: {self.stored} records were written, {count} other ones are read back")
        return back.hexdigest()


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def transfer_key(kind: str, *parts: str) -> str:
    """The name under which a transfer's place is kept: the same command gives the same name."""
    return f"{kind}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def source_url(session: Session, text: str) -> str:
    """A stream argument in full, so that the same source gives the same key from another directory."""
    url, name = session.target(text)
    if url.scheme in ("log", "file"):
        target = str(Path(url.target or ".").resolve())
        return f"{url.scheme}:{target}?stream={name}"
    return f"{url.without_query()}?stream={name}"


def patience(session: Session, name: str) -> Patience:
    """Waits for the backend of that name, and says so on stderr."""
    out = session.out

    def away(error: MistError, since_s: float) -> None:
        until = "--timeout bounds it" if session.timeout_s is None else f"until --timeout {session.timeout_s:g} is over"
        out.warn(f"{name} does not answer ({error.message}); trying again, {until}")

    return Patience(on_away=away, on_back=lambda s: out.note(f"{name} is back after {s:.1f} s"))


async def reach(session: Session, name: str, call: Callable[[], Awaitable[T]]) -> T:
    """What needs a connection at the start: waited for as long as --timeout says, or `REACH_S`, as a wrong URL is away too."""
    said: list[str] = []

    def tell(error: MistError) -> None:
        if not said:
            said.append(name)
            session.out.note(f"{name}: {error.message}; trying again for up to {wait_s:g} s")

    wait_s = session.timeout_s or REACH_S
    return await again(call, away_s_max=wait_s, on_retry=tell)


async def open_source(session: Session, text: str, *, strict: bool = True) -> tuple[Broker | None, Stream]:
    """The source: waited for when it goes away, and with `strict` refusing what is no record (a file's bad lines must not
    become records of a stream)."""
    name = redact(session.target(text)[0].without_query())
    broker, stream = await reach(session, name, lambda: session.locate(text))
    if isinstance(stream, FileStream):
        stream.strict = strict
        return broker, stream
    return broker, Steady(stream, patience(session, name))


async def open_sink(session: Session, text: str, default_name: str, stack: Any) -> Sink:
    """The destination an argument names; a broker URL without a stream takes the source's name."""
    url, name = session.target(text)
    if url.scheme == "file":
        from mist.transport import dial

        return FileSink(url, await stack.enter_async_context(dial(Url("file", url.target))))
    name = name or default_name
    if not name:
        raise InvalidArgument(f"{url.redacted()}: which stream?", hint="add ?stream=NAME")
    where = redact(url.without_query())
    broker = await reach(session, where, lambda: session.connect(url, create=True))
    stream = await reach(session, where, lambda: broker.open(name))
    sink = StreamSink(broker, stream, patience(session, where), session)
    stack.push_async_callback(sink.aclose)
    return sink


def refuse_itself(broker: Broker | None, source: Stream, sink: Sink) -> None:
    """Raise InvalidArgument when a stream is to be copied onto itself: past the dedupe window that doubles it."""
    if broker is None or not isinstance(sink, StreamSink):
        return
    one, other = (_place(b) for b in (broker, sink.broker))
    if one == other and source.name == sink.stream.name and source.incarnation == sink.stream.incarnation:
        raise InvalidArgument("source and destination are the same stream", hint="name another stream or broker")


def _place(broker: Broker) -> str:
    url = parse_url(broker.url)
    return str(Path(url.target).resolve()) if url.scheme == "log" else broker.url


def span_of(info: Any, after: int, to: int | None) -> int:
    """About how many records lie behind `after`, up to `to`: sequences may have gaps of any size."""
    low, high = max(after, info.first - 1), info.last if to is None else min(to, info.last)
    width = info.last - info.first + 1
    return max(1, round(info.records * (high - low) / width)) if high > low and info.records else 0


class Transfer:
    """One run from `scan` into `sink`."""

    def __init__(
        self, scan: Scan, sink: Sink, *, key: str, incarnation: str, rate: float | None, follow: bool = False
    ) -> None:
        self._scan = scan
        self._sink = sink
        self._key = key
        self._incarnation = incarnation
        self._rate = rate
        self._follow = follow
        self._unsaved: int | None = None
        self._next_save = time.monotonic() + SAVE_EVERY_S
        self.position = scan.position
        """Everything of the source up to it is at the destination."""
        self.moved = 0
        self.last_time_ns = 0

    async def run(self, progress: Progress) -> None:
        """Move everything the scan gives. The place is saved twice a second, at the end, and when interrupted."""
        pace = RateLimiter(self._rate or math.inf, burst=1)
        self._unsaved = self.position
        await self._save()  # before anything is stored: a run that is killed at once must find its tail too
        try:
            async for records, position in self._pages():
                for at in range(0, len(records), self._step()):
                    part = records[at : at + self._step()]
                    await pace.take(len(part))
                    await self._sink.put(part)
                    self.moved += len(part)
                    self.last_time_ns = part[-1].timestamp_ns
                    last = at + len(part) >= len(records)
                    self.position = self._unsaved = position if last else part[-1].sequence
                    if time.monotonic() >= self._next_save:
                        await self._save()
                progress.at(self.moved)
            self.position = self._unsaved = self._scan.position
        except BaseException:
            # without it the next run only has more to look for; a destination that is away must not hold us now
            with contextlib.suppress(MistError, TimeoutError):
                async with asyncio.timeout(LAST_SAVE_S):
                    await self._save()
            raise
        await self._save()

    async def _pages(self) -> AsyncIterator[tuple[list[Record], int]]:
        """The scan's pages and where each ends, one read ahead while the one before is stored."""
        pages = self._scan.pages()

        async def one() -> tuple[list[View], int] | None:
            views = await anext(pages, None)
            return None if views is None else (views, self._scan.position)

        ahead = asyncio.ensure_future(one())
        try:
            while True:
                if self._follow and not ahead.done():  # it may be long until there is more
                    await asyncio.wait({ahead}, timeout=max(0.0, self._next_save - time.monotonic()))
                    if not ahead.done():
                        await self._save()
                found = await ahead
                if found is None:
                    return
                ahead = asyncio.ensure_future(one())
                yield [v.record for v in found[0]], found[1]
        finally:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)

    def _step(self) -> int:
        return 1000 if self._rate is None else max(1, min(1000, int(self._rate // 10)))

    async def _save(self) -> None:
        """Only what is stored is ever saved: an interrupted batch is found again in the destination's tail."""
        if self._unsaved is not None:
            await self._sink.save(self._key, Place(self._incarnation, self._unsaved))
            self._unsaved = None
            self._next_save = time.monotonic() + SAVE_EVERY_S


async def resume_after(session: Session, sink: Sink, key: str, incarnation: str, *, restart: bool) -> int | None:
    """The source sequence to go on after, or None to begin. Raises WrongIncarnation when the source was made again."""
    if restart:
        await sink.forget(key)
    place = await sink.place(key)
    if place is None:
        return None
    if place.incarnation != incarnation:
        raise WrongIncarnation(
            f"{sink.name}: was copied from a source that has since been made again",
            hint="--restart copies the new one from its beginning",
        )
    session.out.detail(f"going on after {place.sequence}")
    return place.sequence


def complain(session: Session, sink: Sink) -> None:
    """What did not go over, or could not be compared, ends with 9."""
    if sink.refused:
        session.fail_with(PARTIAL)
        if isinstance(sink, FileSink):
            session.out.warn(
                f"{sink.refused} records are no envelopes and cannot lie in a file of envelopes; see `mist export`"
            )
        else:
            session.out.warn(f"{sink.refused:,} records were not taken by {sink.name} and were passed over")
    if sink.unverified:
        session.fail_with(PARTIAL)
        session.out.warn(
            f"{sink.unverified:,} of the records stored were gone from {sink.name} before they could be compared: "
            "its retention is shorter than this took"
        )


def report(session: Session, sink: Sink, *, source: str, scan: Scan, digest: str, verb: str) -> None:
    """The result: one object, or one line."""
    complain(session, sink)
    if session.out.format == "table":
        more = f", {sink.repeated:,} were there" if sink.repeated else ""
        session.out.note(f"{verb} {sink.stored:,} records of {source} to {sink.name}{more}; digests agree")
        return
    session.out.item(
        {
            "source": source, "destination": sink.name, "stored": sink.stored, "repeated": sink.repeated,
            "refused": sink.refused, "unverified": sink.unverified, "damaged_ranges": scan.damaged, "position": seq(scan.position), "sha256": digest,
        }
    )  # fmt: skip
