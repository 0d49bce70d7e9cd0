"""Large payloads beside the stream: content-addressed files, and references to them in envelopes.

    client = Client(broker, blobs=Blobs(directory))     # payloads above 1 MiB go there; readers get them back

Promises: a file is whole and synced before `put` returns, so before its record is appended; what `get` gives has the
digest it was asked for; `sweep` removes nothing that a record names or that was put within the grace time. Only the
header `Mist-Ref` makes a record a reference, never a payload that looks like one. docs/adr/0016 says why.

Does not: encrypt, compress, or copy itself to where a stream is copied to. Synchronous, but for `sweep_all`.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import secrets
import zlib
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Raw, Struct, field
from msgspec.structs import replace

from mist.broker.base import Broker, Headers, Message, Record, Stream, header
from mist.broker.clock import SYSTEM, Clock
from mist.broker.cursor import Cursor
from mist.errors import DataLoss, Malformed, MistError, NotFound, StorageFull, Unavailable
from mist.protocol.codec import decode, encode
from mist.protocol.envelope import Envelope

REF = "Mist-Ref"
THRESHOLD = 1024 * 1024
"""Payloads above this many bytes go beside the stream."""
GRACE_S = 86_400.0
"""How long a file that nobody names stays: an append of its record may still be under way."""
GRACE_ERASED_S = 60.0
DIGEST_CHARS = 64
_PREFIX = "sha256:"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_TEMPORARY = ".tmp-"


class Reference(Struct, frozen=True):
    """What stands in the envelope instead of the payload."""

    ref: str = field(name="$ref")
    size: int


class Swept(Struct, frozen=True):
    """What a sweep did. `young` files are named by nobody but younger than the grace time."""

    removed: int
    bytes: int
    young: int
    kept: int


class Blobs:
    """A directory of payloads. Several processes may use it at once."""

    def __init__(self, directory: str | Path, *, over_bytes: int = THRESHOLD, clock: Clock = SYSTEM) -> None:
        self.directory = Path(directory)
        self.over_bytes = over_bytes
        self._clock = clock

    def put(self, data: bytes | Raw) -> str:
        """Store it durably, once; its reference. Raises StorageFull, Unavailable."""
        content = bytes(data)
        digest = hashlib.sha256(content).hexdigest()
        path = self._path(digest)
        with _translated(f"blob {digest[:12]}"):
            self._made(path.parent)
            if not self._touched(path, digest):
                self._write(path, content)
            _sync(path.parent)  # also for one that was there: who placed it may have died before this
        return _PREFIX + digest

    def _touched(self, path: Path, digest: str) -> bool:
        """Whether it is there and whole; then it is young again, and a sweep leaves it alone."""
        with self._locked(), suppress(FileNotFoundError):
            if hashlib.sha256(path.read_bytes()).hexdigest() == digest:
                now = self._clock.time_ns()
                os.utime(path, ns=(now, now))
                return True
        return False

    def _write(self, path: Path, content: bytes) -> None:
        temporary = path.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            with temporary.open("xb") as f:
                os.fchmod(f.fileno(), 0o600)
                f.write(content)
                f.flush()
                now = self._clock.time_ns()
                os.utime(f.fileno(), ns=(now, now))
                os.fsync(f.fileno())
            with self._locked():
                temporary.rename(path)
        except BaseException:
            with suppress(OSError):  # a sweep removes what is left
                temporary.unlink()
            raise

    def get(self, reference: str) -> bytes:
        """The payload. Raises NotFound, Malformed when it is not what its name says or that is no reference."""
        digest = _digest(reference)
        with _translated(f"blob {digest[:12]}"):
            try:
                content = self._path(digest).read_bytes()
            except FileNotFoundError as exc:
                raise NotFound(f"no payload {reference} in {self.directory}") from exc
        if hashlib.sha256(content).hexdigest() != digest:
            raise Malformed(f"the payload {reference} in {self.directory} is damaged")
        return content

    def sweep(self, used: Collection[str], *, grace_s: float = GRACE_S, among: Iterable[str] | None = None) -> Swept:
        """Remove files that are not in `used` and older than the grace time; only `among` these, where given. `used` must
        have been read before, from every stream that refers here."""
        removed = size = young = kept = 0
        oldest = self._clock.time_ns() - int(grace_s * 1e9)
        with _translated(f"{self.directory}: sweep"):
            if not self.directory.is_dir():
                return Swept(0, 0, 0, 0)
            for path in self._files() if among is None else [self._path(_digest(r)) for r in set(among)]:
                if _PREFIX + path.parent.name + path.name in used:
                    kept += 1
                    continue
                with self._locked(), suppress(FileNotFoundError):  # another sweep was faster
                    found = path.stat()
                    if found.st_mtime_ns > oldest:
                        young += 1
                        continue
                    path.unlink()
                    removed += 1
                    size += found.st_size
        return Swept(removed, size, young, kept)

    def _files(self) -> Iterator[Path]:
        for folder in sorted(p for p in self.directory.iterdir() if p.is_dir() and len(p.name) == 2):
            for path in sorted(folder.iterdir()):
                if path.name.startswith(_TEMPORARY) or len(path.name) == DIGEST_CHARS - 2:
                    yield path

    def _path(self, digest: str) -> Path:
        return self.directory / digest[:2] / digest[2:]

    def _made(self, folder: Path) -> None:
        """The folder with all above it, and their names on the device."""
        missing = [p for p in (folder, *folder.parents) if not p.exists()]
        for path in reversed(missing):
            path.mkdir(mode=0o700, exist_ok=True)
            _sync(path.parent)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time: touching or placing a file, and removing one."""
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def beside(broker: Broker) -> Blobs | None:
    """Where the payloads of a log lie: `DIR/blobs`. None for other backends, whose directory must be named."""
    path = getattr(broker, "path", "") if broker.backend == "log" else ""
    return Blobs(Path(path) / "blobs") if path else None


def outlined(envelope: Envelope, blobs: Blobs | None) -> tuple[Envelope, Headers]:
    """The envelope as it is to be stored, its payload stored beside it where it is large; and the record's headers."""
    if blobs is None or len(bytes(envelope.payload)) <= blobs.over_bytes:
        return envelope, ()
    payload = bytes(envelope.payload)
    reference = blobs.put(payload)
    small = msgspec.json.encode(Reference(reference, len(payload)))
    checksum = zlib.crc32(small) if envelope.checksum else 0
    return replace(envelope, payload=Raw(small), checksum=checksum), ((REF, reference),)


Store = Callable[[list[Envelope]], Awaitable[Any]]


def outlining(plain: Store, stream: Stream, blobs: Blobs | None, subject: Callable[[Envelope], str]) -> Store:
    """A sink that stores large payloads beside the stream; what has none goes to `plain` as it is."""
    if blobs is None:
        return plain
    most = blobs.over_bytes

    async def store(envelopes: list[Envelope]) -> Any:
        if max([memoryview(e.payload).nbytes for e in envelopes], default=0) <= most:
            return await plain(envelopes)
        messages = []
        for envelope in envelopes:
            small, headers = await asyncio.to_thread(outlined, envelope, blobs)
            messages.append(Message(subject(envelope), encode(small), envelope.id, headers))
        return await stream.append(messages)

    return store


def inlined(envelope: Envelope, record: Record, blobs: Blobs | None) -> Envelope:
    """The envelope with its payload, where the record refers to one and there is a directory. Raises DataLoss, Malformed."""
    reference = header(record.headers, REF) if record.headers else ""
    if not reference or blobs is None:
        return envelope
    try:
        stated = msgspec.json.decode(envelope.payload, type=Reference)
    except msgspec.DecodeError as exc:
        raise Malformed(f"envelope {envelope.id}: {REF} says {reference[:20]}, the payload is no reference") from exc
    try:
        payload = blobs.get(reference)
    except (NotFound, Malformed) as exc:
        raise DataLoss(
            first=record.sequence, last=record.sequence, resume_after=record.sequence, why=f"incomplete: {exc.message}"
        ) from exc
    if stated.ref != reference or stated.size != len(payload):
        raise Malformed(f"envelope {envelope.id}: header and payload refer to different things")
    return replace(envelope, payload=Raw(payload), checksum=zlib.crc32(payload) if envelope.checksum else 0)


def whole(record: Record, blobs: Blobs | None) -> Record:
    """The record as it would be with its payload inside, for who reads records and not through a client."""
    if blobs is None or not record.headers or not header(record.headers, REF):
        return record
    envelope = inlined(decode(record.data), record, blobs)
    return replace(record, data=encode(envelope), headers=tuple(h for h in record.headers if h[0] != REF))


def references(records: Iterable[Record]) -> set[str]:
    """What these records refer to."""
    return {header(r.headers, REF) for r in records if r.headers} - {""}


async def referenced(broker: Broker) -> set[str]:
    """What any record of any stream refers to. Reads them all. Raises DataLoss: what damage refers to is unknown, so
    nothing may be swept."""
    used: set[str] = set()
    for name in await broker.streams():
        async with Cursor(await broker.open(name, create=False)) as cursor:
            async for page in cursor.pages():
                used |= references(page.records)
    return used


async def sweep_all(broker: Broker, blobs: Blobs, *, grace_s: float = GRACE_S) -> Swept:
    """Mark and sweep. Every stream that refers to this directory must be on this broker."""
    return blobs.sweep(await referenced(broker), grace_s=grace_s)


def _digest(reference: str) -> str:
    digest = reference.removeprefix(_PREFIX)
    if len(digest) != DIGEST_CHARS or not set(digest) <= set("0123456789abcdef") or digest == reference:
        raise Malformed(f"not a reference: {reference[:80]!r}")
    return digest


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        error: type[MistError] = StorageFull if exc.errno in _FULL else Unavailable
        raise error(f"{what}: {exc.strerror or exc}") from exc


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
