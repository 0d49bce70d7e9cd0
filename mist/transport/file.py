"""`file:PATH` — JSON lines, byte-compatible with the Go library: mode 0600, one document and one newline per envelope.

    file:PATH?from=POSITION&follow=1&sync=batch|none

Promises: appends of several processes never tear one another (one lock around each); a torn last line left by a crash
is put aside into `PATH.torn` before anything is appended, never glued to; with `sync=batch` (the default) a send
returns when its lines survive a power cut, senders of one moment share one fdatasync; with `sync=none` they survive
kill -9. The path is made absolute at construction; the file is made by the first send, its folder is not.

Reading ends with EndOfStream, and a later receive looks again; `follow=1` waits instead. `position` is where the next
receive goes on, and `from=` takes `start`, `end`, `N` (line N and what follows), `+N` (what follows line N); the option
`position=` takes a `Position`, which needs no counting.

Does not: rotate, index, remember positions, or hold several streams: that is `log:DIR`. Locks are advisory and local;
a Go peer takes none, it is safe against us because each of its appends is one write.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Sequence

from msgspec import Struct

from mist.errors import (
    Ambiguous,
    CursorAhead,
    EndOfStream,
    InvalidArgument,
    Locked,
    MistError,
    NotAuthorised,
    NotFound,
    StorageFull,
    TransportError,
)
from mist.protocol import codec
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope
from mist.protocol.url import Url
from mist.transport._join import Joiner
from mist.transport._lines import GO_LINE_BYTES_MAX, LineDecoder, Position, encode_lines
from mist.transport._watch import POLL_S, changed, look
from mist.transport.base import RECEIVE_LIMIT, Transport, check_limit, closed_error

_log = logging.getLogger("mist.transport.file")

BLOCK_BYTES_MIN = 64 * 1024
BLOCK_BYTES_MAX = 1024 * 1024
LOCK_WAIT_S = 10.0
INLINE_BYTES_MAX = 256 * 1024
TORN_SETTLE_S = 0.02


class Torn(Struct, frozen=True):
    """A line that a crash left unfinished at `offset`, `size` bytes. `kept` is the file that has it now, or "" when
    it was a whole envelope that only lacked its newline and got one."""

    offset: int
    size: int
    kept: str


def from_url(url: Url, *, position: Position | None = None, size_bytes_max: int = SIZE_BYTES_MAX) -> FileTransport:
    url.refuse_unknown("from", "follow", "sync")
    start: str | Position = position if position is not None else url.get("from", "start")
    return FileTransport(
        url.target, start=start, follow=_flag(url, "follow"), sync=url.get("sync", "batch"),
        size_bytes_max=size_bytes_max,
    )  # fmt: skip


def _flag(url: Url, key: str, default: str = "0") -> bool:
    value = url.get(key, default)
    if value in ("1", "true", "yes"):
        return True
    if value in ("0", "false", "no"):
        return False
    raise InvalidArgument(f"{url.redacted()}: {key}={value!r} is neither 1 nor 0")


class FileTransport(Transport):
    def __init__(
        self,
        path: str,
        *,
        start: str | Position = "start",
        follow: bool = False,
        sync: str = "batch",
        size_bytes_max: int = SIZE_BYTES_MAX,
        poll_s: float = POLL_S,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        if not path or "\x00" in path:
            raise InvalidArgument("file: names no file", hint="for example file:traces.jsonl")
        if sync not in ("batch", "none"):
            raise InvalidArgument(f"file: sync={sync!r} is not known", hint="sync=batch or sync=none")
        self.path = os.path.abspath(path)
        self.url = f"file:{self.path}"
        self.size_bytes_max = size_bytes_max
        self.torn: list[Torn] = []
        """What this end found unfinished and repaired."""
        self.warnings: list[str] = []
        self._start: int | Position = start if isinstance(start, Position) else _parse_start(start)
        self.follow = follow
        self._sync = sync == "batch"
        self._poll_s = poll_s
        self._lock_wait_s = lock_wait_s
        self._closed = False
        self._closing: asyncio.Future[None] | None = None
        self._joiner = Joiner(self._write)
        self._write_fd = -1
        self._read_fd = -1
        self._reading = asyncio.Lock()
        self._lines: LineDecoder | None = None
        self._at = 0  # where the next block starts
        self._block_bytes = BLOCK_BYTES_MIN
        self._torn_seen = (-1, 0)

    # sending

    async def send_many(self, envelopes: Sequence[Envelope]) -> None:
        if self._closed:
            raise closed_error(self.url)
        if not envelopes:
            return
        encoded = encode_lines(envelopes, self.size_bytes_max)
        if encoded.largest >= GO_LINE_BYTES_MAX and not self.warnings:
            self.warnings.append(
                f"{self.path}: a line of {encoded.largest} bytes; readers built on the Go library stop at 1 MiB"
            )
            _log.warning("%s", self.warnings[-1])
        await self._joiner.put(encoded.data)

    async def _write(self, data: bytes) -> None:
        if not self._sync and len(data) <= INLINE_BYTES_MAX and self._append(data, wait=False):
            return
        await asyncio.to_thread(self._append, data, wait=True)

    def _append(self, data: bytes, *, wait: bool) -> bool:
        """Append and, if so configured, sync. False: it would have to wait for a lock or a repair."""
        try:
            fd = self._locked_fd(wait)
            if fd < 0:
                return False
            try:
                if not self._repair(fd, wait):
                    return False
                self._write_all(fd, data)
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)
            # The lock is free while the disk works, so that processes share its time; the bytes are in the file.
            if self._sync:
                try:
                    os.fdatasync(fd)
                except OSError as exc:
                    raise Ambiguous(
                        f"{self.path}: fdatasync failed: {exc.strerror}; the lines may be lost by a power cut"
                    ) from exc
        except OSError as exc:
            raise _os_error(exc, self.path) from exc
        return True

    def _locked_fd(self, wait: bool) -> int:
        """The file open for appending, and locked. -1 when somebody has the lock and we are not to wait."""
        until = time.monotonic() + self._lock_wait_s
        pause = 0.0005
        while True:
            fd = self._write_fd
            if fd < 0:
                fd = self._write_fd = self._open_for_append()
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    return -1
                if time.monotonic() > until:
                    raise Locked(
                        f"{self.path}: another process holds its lock for more than {self._lock_wait_s} s"
                    ) from None
                time.sleep(pause)
                pause = min(pause * 2, 0.01)
                continue
            st = os.fstat(fd)
            if look(self.path).identity == (st.st_dev, st.st_ino):
                return fd
            self._write_fd = -1  # renamed or removed under us (rotation): lines go to the path, not to the old file
            os.close(fd)

    def _open_for_append(self) -> int:
        made = False
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            made = True
        try:
            _check_regular(fd, self.path)
            if made and self._sync:
                _sync_folder(self.path)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _repair(self, fd: int, wait: bool) -> bool:
        """Make sure the file ends with a newline, so that what follows stands on its own line."""
        size = os.fstat(fd).st_size
        if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
            return True
        if not wait:
            return False
        # A peer that takes no lock may be in the middle of its write: what still grows is not torn.
        while True:
            time.sleep(TORN_SETTLE_S)
            now = os.fstat(fd).st_size
            if os.pread(fd, 1, now - 1) == b"\n":
                return True
            if now == size:
                break
            size = now
        offset = _last_line_start(fd, size)
        if size - offset <= self.size_bytes_max and _is_envelope(os.pread(fd, size - offset, offset)):
            self._write_all(fd, b"\n")
            self._report(Torn(offset, size - offset, ""))
            return True
        kept = self.path + ".torn"
        side = os.open(kept, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            at = offset
            while at < size:
                part = os.pread(fd, min(size - at, BLOCK_BYTES_MAX), at)
                self._write_all(side, part)
                at += len(part)
            self._write_all(side, b"\n")
            os.fdatasync(side)
        finally:
            os.close(side)
        os.ftruncate(fd, offset)
        self._report(Torn(offset, size - offset, kept))
        return True

    def _report(self, torn: Torn) -> None:
        self.torn.append(torn)
        what = f"kept in {torn.kept}" if torn.kept else "whole but for its newline, which it got"
        _log.warning("%s: the last line was torn (offset %d, %d bytes); %s", self.path, torn.offset, torn.size, what)

    def _write_all(self, fd: int, data: bytes) -> None:
        before = os.fstat(fd).st_size
        written = 0
        try:
            view = memoryview(data)
            while written < len(data):
                written += os.write(fd, view[written:])
        except OSError:
            if written and os.fstat(fd).st_size == before + written:
                os.ftruncate(fd, before)  # nothing of a failed send stays, as far as it is ours alone to take back
            raise

    # receiving

    @property
    def position(self) -> Position | None:
        """Behind the last envelope received or error raised: what `position=` resumes from. None before the first
        receive, unless the start was given as a position."""
        if self._lines is not None:
            return self._lines.position
        return self._start if isinstance(self._start, Position) else None

    async def receive(self) -> Envelope:
        lines = self._lines
        if lines is not None and lines.ready and not self._closed and not self._reading.locked():
            got = lines.take(1)
            if got:
                return got[0]
        return await super().receive()

    async def receive_many(self, limit: int = RECEIVE_LIMIT, wait_s: float | None = None) -> list[Envelope]:
        check_limit(limit)
        loop = asyncio.get_running_loop()
        until = None if wait_s is None else loop.time() + wait_s
        async with self._reading:
            while True:
                if self._closed:
                    raise closed_error(self.url)
                got = self._lines.take(limit) if self._lines is not None else []
                if got:
                    return got
                seen = look(self.path)  # before the read: what comes between the two wakes the wait below
                if await self._fill():
                    continue
                if not self.follow:
                    raise EndOfStream(f"{self.path}: no more lines")
                if self._closing is None:
                    self._closing = loop.create_future()
                left = None if until is None else max(0.0, until - loop.time())
                more = await changed(self.path, seen, closing=self._closing, wait_s=left, poll_s=self._poll_s)
                if not more and not self._closed:
                    return []

    async def _fill(self) -> bool:
        """Read until something can be taken. False at the end."""
        try:
            lines = self._lines or await self._open_for_reading()
            if lines is None:
                return False
            # An unfinished line is read again: a repair may have cut it off and others written in its place.
            self._at -= lines.forget_rest()
            while not lines.ready:
                block = await asyncio.to_thread(os.pread, self._read_fd, self._block_bytes, self._at)
                if self._closed:
                    raise closed_error(self.url)
                if not block:
                    return self._at_end(lines)
                lines.feed(block)
                self._at += len(block)
                self._block_bytes = min(self._block_bytes * 2, BLOCK_BYTES_MAX)
        except OSError as exc:
            raise _os_error(exc, self.path) from exc
        return True

    def _at_end(self, lines: LineDecoder) -> bool:
        """Whether there is something to take after all: an unfinished last line, or the news that the file changed."""
        st = os.fstat(self._read_fd)
        now = look(self.path).identity
        if self.follow and now not in ((0, 0), (st.st_dev, st.st_ino)):
            os.close(self._read_fd)
            self._read_fd, self._lines, self._start = -1, None, Position()
            raise TransportError(
                f"{self.path}: another file took its place after line {lines.position.line}",
                hint="receive again to go on with its first line",
            )
        if st.st_size < lines.next_offset - 1:  # a last line without its newline counts one more byte than there is
            raise TransportError(f"{self.path}: was cut to {st.st_size} bytes, the reader is at {lines.next_offset}")
        torn = (lines.next_offset, lines.rest)
        if self.follow or not lines.rest or torn == self._torn_seen:
            return False
        self._torn_seen = torn
        lines.finish(keep=True)
        self._at = lines.next_offset
        return lines.ready

    async def _open_for_reading(self) -> LineDecoder | None:
        """None: the file is not there yet, and we follow."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if self.follow:
                return None
            raise
        try:
            _check_regular(fd, self.path)
            start = self._start
            if isinstance(start, Position):
                _check_position(fd, start, self.path)
            else:
                start = await asyncio.to_thread(_find_line, fd, start, self.path)
        except BaseException:
            os.close(fd)
            raise
        self._read_fd = fd
        self._lines = LineDecoder(self.path, start, self.size_bytes_max)
        self._at = start.offset
        return self._lines

    async def close(self) -> None:
        self._closed = True
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)
        await self._joiner.flush()
        async with self._reading:
            for fd in (self._write_fd, self._read_fd):
                if fd >= 0:
                    os.close(fd)
            self._write_fd = self._read_fd = -1


def _parse_start(text: str) -> int | Position:
    """How many lines to pass over: `start`, `N` (line N is the first), `+N` (line N is the last passed), `end` (-1)."""
    plus = text.startswith(("+", " "))  # a + in a query means a space to everybody else
    after = text[1:] if plus else text
    if text in ("", "start"):
        return Position()
    if text == "end":
        return -1
    if after.isascii() and after.isdigit():
        passed = int(after) if plus else max(int(after) - 1, 0)
        return passed or Position()
    raise InvalidArgument(f"file: from={text!r} is not a position", hint="start, end, N (line N) or +N (after line N)")


def _find_line(fd: int, lines: int, path: str) -> Position:
    """The position behind that many lines, or behind the last whole line for -1. Reads what lies before it."""
    line = at = offset = 0
    while block := os.pread(fd, BLOCK_BYTES_MAX, at):
        have = block.count(b"\n")
        if 0 <= lines <= line + have:
            cut = 0
            for _ in range(lines - line):
                cut = block.index(b"\n", cut) + 1
            return Position(lines, at + cut if cut else offset)
        line += have
        if have:
            offset = at + block.rindex(b"\n") + 1
        at += len(block)
    if lines > line:
        raise CursorAhead(after=lines, last=line, stream=path)
    return Position(line, offset)


def _check_position(fd: int, position: Position, path: str) -> None:
    size = os.fstat(fd).st_size
    if position.offset > size + 1:
        raise CursorAhead(after=position.offset, last=size, stream=f"{path} (bytes)")
    if 0 < position.offset <= size and os.pread(fd, 1, position.offset - 1) != b"\n":
        raise InvalidArgument(
            f"{path}: byte {position.offset} is not the start of a line", hint="is this position another file's?"
        )


def _is_envelope(tail: bytes) -> bool:
    try:
        codec.decode_foreign(tail)
    except MistError:
        return False
    return True


def _last_line_start(fd: int, size: int) -> int:
    at = size
    while at > 0:
        start = max(0, at - BLOCK_BYTES_MIN)
        cut = os.pread(fd, at - start, start).rfind(b"\n")
        if cut >= 0:
            return start + cut + 1
        at = start
    return 0


def _check_regular(fd: int, path: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise InvalidArgument(f"{path} is not a regular file", hint="use stdio: for pipes and terminals")


def _sync_folder(path: str) -> None:
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _os_error(exc: OSError, path: str) -> MistError:
    why = exc.strerror or str(exc)
    if exc.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(
            f"{path}: {why}", hint="the folder has to exist" if not os.path.isdir(os.path.dirname(path)) else ""
        )
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return NotAuthorised(f"{path}: {why}")
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull(f"{path}: {why}", hint="make room there and send again")
    if exc.errno == errno.EISDIR:
        return InvalidArgument(f"{path} is a folder", hint="name a file in it")
    return TransportError(f"{path}: {why}")
