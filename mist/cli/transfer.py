"""Moving records from a stream to a stream or a file: resumable, counted, digested. Shared by copy, mirror and import.

Data, not configuration: subject, id, headers and bytes of a record go over, its sequence and time are the destination's.
Where a transfer stands is kept at the destination: for a stream two checkpoints (the source's sequence, and the
destination's last one at that moment), for a file `FILE.mist-copy`. A crash between storing and saving leaves a tail that
the next run reads back, so that nothing is stored twice, whatever the ids' window. Records with an id the destination
has seen within its window are counted as repeated.

The digest is SHA-256 over what was stored, computed from the source's records and again from what the destination
gives back.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from mist.broker.base import Broker, Checkpoint, Headers, Message, Record, Stream
from mist.cli.filestream import FileStream
from mist.cli.records import View
from mist.cli.render import Progress, seq
from mist.cli.scan import PAGE, PARTIAL, Scan
from mist.cli.session import Session
from mist.errors import InvalidArgument, Malformed, MistError, WrongIncarnation
from mist.protocol.envelope import Envelope
from mist.protocol.url import Url, parse_url

if TYPE_CHECKING:
    from mist.transport import Transport

SAVE_EVERY_S = 0.5
DAMAGED = 8


class Mismatch(MistError):
    """What arrived is not what was sent."""

    code = "data_loss"


class Place(Struct, frozen=True):
    """Where a transfer stands: the source's incarnation and its last sequence that is stored at the destination."""

    incarnation: str
    sequence: int


def fingerprint(subject: str, id: str, headers: Headers, data: bytes) -> bytes:
    """A record as bytes that differ whenever the record does."""
    return msgspec.msgpack.encode((subject, id, headers, data))


def same(record: Record) -> str:
    """What two copies of one record have in common: the id, or the content where there is none."""
    if record.id:
        return f"id:{record.id}"
    return "sha:" + hashlib.sha256(fingerprint(record.subject, "", record.headers, record.data)).hexdigest()


class Sink(ABC):
    """A destination. `stored` and `repeated` count this run's records."""

    name: str
    stored = 0
    repeated = 0
    refused = 0

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

    def __init__(self, broker: Broker, stream: Stream) -> None:
        self.name = f"{stream.name} in {broker.url}"
        self.stream = stream
        self.broker = broker
        self._digest = hashlib.sha256()
        self._ranges: list[list[int]] = []
        self._last = 0
        self._tail: set[str] = set()

    async def place(self, key: str) -> Place | None:
        checkpoints, name = self.broker.checkpoints, self.stream.name
        self._last = (await self.stream.info()).last
        found = await checkpoints.load(name, key)
        if found is None:
            return None
        at = await checkpoints.load(name, f"{key}-at")
        after = at.sequence if at is not None and at.incarnation == self.stream.incarnation else 0
        after = max(after, (await self.stream.info()).first - 1)
        while after < self._last:
            page = await self.stream.read(after=after, limit=1000)
            self._tail.update(same(r) for r in page.records)
            if page.scanned <= after:
                break
            after = page.scanned
        return Place(found.incarnation, found.sequence)

    async def put(self, records: Sequence[Record]) -> None:
        fresh = [r for r in records if same(r) not in self._tail] if self._tail else records
        self.repeated += len(records) - len(fresh)
        if not fresh:
            return
        sequences = await self.stream.append([Message(r.subject, r.data, r.id, r.headers) for r in fresh])
        for record, sequence in zip(fresh, sequences, strict=True):
            if sequence <= self._last:
                self.repeated += 1
                continue
            self._last = sequence
            self.stored += 1
            self._digest.update(fingerprint(record.subject, record.id, record.headers, record.data))
            if self._ranges and self._ranges[-1][1] == sequence - 1:
                self._ranges[-1][1] = sequence
            else:
                self._ranges.append([sequence, sequence])

    async def save(self, key: str, place: Place) -> None:
        # the source's place first: a crash in between leaves an old `-at`, whose longer tail is read back harmlessly
        name, checkpoints = self.stream.name, self.broker.checkpoints
        await checkpoints.save(
            Checkpoint(stream=name, name=key, incarnation=place.incarnation, sequence=place.sequence), force=True
        )
        await checkpoints.save(
            Checkpoint(stream=name, name=f"{key}-at", incarnation=self.stream.incarnation, sequence=self._last),
            force=True,
        )

    async def forget(self, key: str) -> None:
        for each in (key, f"{key}-at"):
            await self.broker.checkpoints.delete(self.stream.name, each)

    async def check(self) -> str:
        back = hashlib.sha256()
        count = 0
        for first, last in self._ranges:
            after = first - 1
            while after < last:
                page = await self.stream.read(after=after, limit=1000)
                for r in page.records:
                    if r.sequence <= last:
                        back.update(fingerprint(r.subject, r.id, r.headers, r.data))
                        count += 1
                if page.scanned <= after:
                    break
                after = page.scanned
        if count != self.stored or back.digest() != self._digest.digest():
            raise Mismatch(
                f"{self.name}: {self.stored} records were stored, {count} are read back, and the digests "
                f"{'agree' if back.digest() == self._digest.digest() else 'differ'}",
                hint=f"`mist stream verify {self.stream.name}` reads every byte",
            )
        return back.hexdigest()


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


async def open_sink(session: Session, text: str, default_name: str, stack: Any) -> Sink:
    """The destination an argument names; a broker URL without a stream takes the source's name."""
    url, name = session.target(text)
    if url.scheme == "file":
        from mist.transport import dial

        return FileSink(url, await stack.enter_async_context(dial(Url("file", url.target))))
    name = name or default_name
    if not name:
        raise InvalidArgument(f"{url.redacted()}: which stream?", hint="add ?stream=NAME")
    broker = await session.connect(url, create=True)
    return StreamSink(broker, await broker.open(name))


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


def strict(session: Session, stream: Stream) -> Stream:
    """The source, refusing what is no record: a file's bad lines must not become records of a stream."""
    if isinstance(stream, FileStream):
        stream.strict = True
    return stream


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
        self.moved = 0
        self.last_time_ns = 0

    async def run(self, progress: Progress) -> None:
        """Move everything the scan gives. The place is saved twice a second, at the end, and when interrupted."""
        begun = time.monotonic()
        start = self._scan.position
        try:
            async for views in self._scan.pages():
                records = [v.record for v in views]
                for at in range(0, len(records), self._step()):
                    part = records[at : at + self._step()]
                    if self._rate is not None:
                        early = begun + self.moved / self._rate - time.monotonic()
                        if early > 0:
                            await asyncio.sleep(early)
                    await self._sink.put(part)
                    self.moved += len(part)
                    self.last_time_ns = part[-1].timestamp_ns
                    last = at + len(part) >= len(records)
                    self._unsaved = self._scan.position if last else part[-1].sequence
                    if time.monotonic() >= self._next_save:
                        await self._save()
                progress.at(self._scan.position - start)
                if self._follow and len(records) < PAGE:
                    await self._save()  # at the end: it may be long until there is more
            self._unsaved = self._scan.position
        finally:
            await self._save()

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


def report(session: Session, sink: Sink, *, source: str, scan: Scan, digest: str, verb: str) -> None:
    """The result: one object, or one line."""
    if sink.refused:
        session.out.warn(
            f"{sink.refused} records are no envelopes and cannot lie in a file of envelopes; see `mist export`"
        )
        session.fail_with(PARTIAL)
    if session.out.format == "table":
        more = f", {sink.repeated:,} were there" if sink.repeated else ""
        session.out.note(f"{verb} {sink.stored:,} records of {source} to {sink.name}{more}; digests agree")
        return
    session.out.item(
        {
            "source": source, "destination": sink.name, "stored": sink.stored, "repeated": sink.repeated,
            "refused": sink.refused, "damaged_ranges": scan.damaged, "position": seq(scan.position), "sha256": digest,
        }
    )  # fmt: skip
