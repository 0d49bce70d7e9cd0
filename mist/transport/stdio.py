"""`stdio:` — JSON lines over standard input and output, for pipes between programs.

Promises: senders of one turn of the event loop share one write; `send` returns when the operating system has the bytes,
so a slow reader slows the sender down; input is read in blocks; a reader that went away (broken pipe) and the end of
the input are EndOfStream, which is a clean end (exit code 0); a cancelled receive loses nothing. Standard output is
never switched to non-blocking for other processes that share it. One reader: a second `stdio:` in the same process is
refused the input while the first is open, because each would hold lines the other waits for.

Does not: close standard input or output, or keep `print` from writing between the lines: send talk to stderr.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Sequence

from mist.errors import EndOfStream, Locked, MistError, TransportError
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope
from mist.protocol.url import Url
from mist.transport._join import Joiner
from mist.transport._lines import LineDecoder, encode_lines
from mist.transport.base import RECEIVE_LIMIT, Transport, check_limit, closed_error

READ_BYTES = 256 * 1024
CLOSE_WAIT_S = 5.0

_readers: dict[tuple[int, int], StdioTransport] = {}
"""Who reads which input, by device and inode."""


def from_url(url: Url, *, stdin: int = 0, stdout: int = 1, size_bytes_max: int = SIZE_BYTES_MAX) -> StdioTransport:
    url.refuse_unknown()
    return StdioTransport(stdin=stdin, stdout=stdout, size_bytes_max=size_bytes_max)


class StdioTransport(Transport):
    """`stdin` and `stdout` are file descriptors; they stay open when this closes."""

    url = "stdio:"

    def __init__(self, *, stdin: int = 0, stdout: int = 1, size_bytes_max: int = SIZE_BYTES_MAX) -> None:
        self.size_bytes_max = size_bytes_max
        self._stdin = stdin
        self._stdout = stdout
        self._closed = False
        self._closing: asyncio.Future[None] | None = None
        self._reading = asyncio.Lock()
        self._lines = LineDecoder("stdin", size_bytes_max=size_bytes_max)
        self._input: tuple[int, int] | None = None
        self._by_event = True
        self._ended = False
        self._joiner = Joiner(self._write)
        self._own_out = -1

    # sending

    async def send_many(self, envelopes: Sequence[Envelope]) -> None:
        if self._closed:
            raise closed_error(self.url)
        if envelopes:
            await self._joiner.put(encode_lines(envelopes, self.size_bytes_max).data)

    async def _write(self, data: bytes) -> None:
        try:
            if self._own_out < 0:
                self._own_out = _reopen(self._stdout)
            if self._own_out >= 0:
                await self._write_ready(self._own_out, data)
            else:
                await asyncio.to_thread(_write_blocking, self._stdout, data)
        except OSError as exc:
            raise _os_error(exc, "stdout") from exc

    async def _write_ready(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                await _ready(fd, write=True)

    # receiving

    async def receive_many(self, limit: int = RECEIVE_LIMIT, wait_s: float | None = None) -> list[Envelope]:
        check_limit(limit)
        loop = asyncio.get_running_loop()
        until = None if wait_s is None else loop.time() + wait_s
        async with self._reading:
            self._claim()
            if self._closing is None:
                self._closing = loop.create_future()
            while True:
                if self._closed:
                    raise closed_error(self.url)
                got = self._lines.take(limit)
                if got:
                    return got
                if self._ended:
                    raise EndOfStream("stdin: closed by the other side")
                left = None if until is None else max(0.0, until - loop.time())
                block = await self._read(left)
                if block is None:
                    if not self._closed:
                        return []
                elif block:
                    self._lines.feed(block)
                else:
                    self._ended = True
                    self._lines.finish()

    async def receive(self) -> Envelope:
        if self._lines.ready and not self._closed and not self._reading.locked():
            got = self._lines.take(1)
            if got:
                return got[0]
        return await super().receive()

    async def _read(self, wait_s: float | None) -> bytes | None:
        """What there is, waiting for something; None when the time ran out or we are closing.

        The read follows the wait without giving way in between, so that a cancelled one has taken nothing.
        """
        try:
            if self._by_event:
                try:
                    if not await _ready(self._stdin, wait_s=wait_s, closing=self._closing):
                        return None
                except PermissionError:  # /dev/null and its like: epoll refuses what is always ready
                    self._by_event = False
            return os.read(self._stdin, READ_BYTES)
        except OSError as exc:
            raise _os_error(exc, "stdin") from exc

    def _claim(self) -> None:
        if self._input is not None or self._closed:
            return
        try:
            st = os.fstat(self._stdin)
        except OSError as exc:
            raise _os_error(exc, "stdin") from exc
        key = (st.st_dev, st.st_ino)
        if key in _readers:
            raise Locked("stdin is being read by another stdio: of this process", hint="close that one first")
        _readers[key] = self
        self._input = key
        self._by_event = not stat.S_ISREG(st.st_mode)  # a redirected file is always ready, and epoll refuses it

    async def close(self) -> None:
        """Waits for lines under way up to 5 s, for a reader that stopped reading may never take them."""
        self._closed = True
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)
        try:
            async with asyncio.timeout(CLOSE_WAIT_S):
                await self._joiner.flush()
        except TimeoutError:
            self._joiner.abandon(TransportError("stdout: nobody took the last lines before it was closed"))
        async with self._reading:
            if self._input is not None:
                _readers.pop(self._input, None)
                self._input = None
            if self._own_out >= 0:
                os.close(self._own_out)
                self._own_out = -1


async def _ready(
    fd: int, *, write: bool = False, wait_s: float | None = None, closing: asyncio.Future[None] | None = None
) -> bool:
    """Wait until a descriptor can be read or written. False when the time ran out or `closing` is done."""
    loop = asyncio.get_running_loop()
    turn: asyncio.Future[bool] = loop.create_future()

    def settle(answer: bool) -> None:
        if not turn.done():
            turn.set_result(answer)

    def on_closing(_: object) -> None:
        settle(False)

    timer = loop.call_later(wait_s, settle, False) if wait_s is not None else None
    if closing is not None:
        closing.add_done_callback(on_closing)
    (loop.add_writer if write else loop.add_reader)(fd, settle, True)
    try:
        return await turn
    finally:
        (loop.remove_writer if write else loop.remove_reader)(fd)
        if timer is not None:
            timer.cancel()
        if closing is not None:
            closing.remove_done_callback(on_closing)


def _reopen(fd: int) -> int:
    """The same pipe or terminal through a description of our own, non-blocking; -1 where that cannot be had.

    O_NONBLOCK belongs to the open file description, which a shell shares among all programs of a pipeline: setting it
    on the one we were given makes `write` fail in others.
    """
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        return -1
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1  # no /proc here
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EPERM):
            return -1  # a pipe made by another user: writable as it is, not to be opened again
        if exc.errno == errno.ENXIO:
            raise BrokenPipeError(errno.EPIPE, "no reader") from exc
        raise


def _write_blocking(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _os_error(exc: OSError, which: str) -> MistError:
    if isinstance(exc, BrokenPipeError | ConnectionResetError):
        return EndOfStream(f"{which}: the other side is gone")
    return TransportError(f"{which}: {exc.strerror or exc}")
