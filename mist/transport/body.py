"""Request bodies of HTTP, read within limits: what every door that takes uploads shares.

    with intake.request() as request:
        body = await request.read(headers, receive)
        ...  # work with it: it counts as under way until the block ends

Promises: a body too large is refused before it is read where its length is stated, else at the byte that is too many,
gzip by what comes out; a small body that inflates to a huge one is given up early; no more requests and bytes are under
way than the limits say. Does not know paths, formats or answers: refusals are errors, `Answer` where no error of the tree
stands for the status.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Iterator, Mapping

from msgspec import Struct

from mist.errors import InvalidArgument, Malformed, MistError, Overloaded, TimedOut, TooLarge
from mist.kit.server import Receive
from mist.protocol import codec
from mist.protocol.envelope import SIZE_BYTES_MAX


class Limits(Struct, frozen=True, kw_only=True):
    """What a request and all of them together may cost. A `body` is counted after decompression."""

    size_bytes_max: int = SIZE_BYTES_MAX
    body_bytes_max: int = 32 * 1024 * 1024
    envelopes_max: int = 100_000
    gzip_ratio_max: int = 100
    inflight_requests_max: int = 256
    inflight_bytes_max: int = 128 * 1024 * 1024
    read_timeout_s: float = 30.0
    retry_after_s: int = 1


class Answer(Exception):
    """A status that no error of the tree stands for (404, 405, 408, 415), with the error that says why."""

    def __init__(self, status: int, error: MistError, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(error.message)
        self.status = status
        self.error = error
        self.headers = headers


class Gone(Exception):
    """The client left before its body was complete: nothing was stored and nobody is there to be told."""


class Intake:
    """What is under way at one door."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._requests = 0
        self._bytes = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[Request]:
        """Raises Overloaded when too many requests are under way."""
        request = self.enter()
        try:
            yield request
        finally:
            self.leave(request)

    def enter(self) -> Request:
        """A request that is under way until it leaves. Raises Overloaded."""
        if self._requests >= self.limits.inflight_requests_max:
            raise Overloaded(f"{self._requests} requests are under way", retry_after_s=self.limits.retry_after_s)
        self._requests += 1
        return Request(self)

    def leave(self, request: Request) -> None:
        self._requests -= 1
        self._bytes -= request.taken
        request.taken = 0

    def more(self, size: int) -> None:
        """Count so many bytes more as under way. Raises Overloaded."""
        if self._bytes + size > self.limits.inflight_bytes_max:
            raise Overloaded(f"{self._bytes} bytes are under way", retry_after_s=self.limits.retry_after_s)
        self._bytes += size


class Request:
    """One request under way. Its body comes by `read`, or, where no events are to be awaited, by `begin`, `feed` and
    `end`."""

    __slots__ = ("_inflate", "_intake", "_parts", "_size", "taken")

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._inflate: _Inflate | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self.taken = 0

    def take(self, size: int) -> None:
        """This request holds so many bytes in all. Raises TooLarge, Overloaded."""
        most = self._intake.limits.body_bytes_max
        if size > most:
            raise codec.refuse(TooLarge("request body", size_bytes=size, size_bytes_max=most))
        if size > self.taken:
            self._intake.more(size - self.taken)
            self.taken = size

    async def read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, inflated. `headers` has lower-case names. Raises Gone, Answer (415, 408), TooLarge,
        Overloaded, Malformed."""
        limits = self._intake.limits
        self.begin(headers)
        try:
            async with asyncio.timeout(limits.read_timeout_s):
                more = True
                while more:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise Gone
                    self.feed(event.get("body", b""))
                    more = event.get("more_body", False)
        except TimeoutError:
            error = TimedOut(f"the body did not arrive within {limits.read_timeout_s} s")
            raise Answer(408, error, ((b"connection", b"close"),)) from None
        return self.end()

    def begin(self, headers: Mapping[bytes, bytes]) -> None:
        """Look at what the headers say of the body. Raises Answer (415), TooLarge, Overloaded."""
        encoding = headers.get(b"content-encoding")
        if encoding is not None:
            encoding = encoding.strip().lower()
            if encoding not in (b"identity", b"", b"gzip", b"x-gzip"):
                shown = encoding.decode("latin-1")
                raise Answer(415, InvalidArgument(f"content-encoding {shown!r} is not read here", hint="gzip"))
            self._inflate = _Inflate(self._intake.limits) if encoding.endswith(b"gzip") else None
        stated = headers.get(b"content-length", b"")
        if stated.isdigit():
            self.take(int(stated))

    def feed(self, data: bytes) -> None:
        """A piece of the body. Raises TooLarge, Overloaded, Malformed."""
        if not data:
            return
        for part in self._inflate.feed(data) if self._inflate is not None else (data,):
            self._size += len(part)
            self.take(self._size)
            self._parts.append(part)

    def end(self) -> bytes:
        """The whole body. Raises Malformed for gzip that ends early."""
        if self._inflate is not None:
            self._inflate.finish()
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Inflate:
    """gzip, piece by piece, giving up where a small body would become a large one."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._stream = zlib.decompressobj(wbits=31)
        self._in = 0
        self._out = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        self._in += len(chunk)
        while chunk:
            if self._stream.eof:  # a file of several members, as `cat a.gz b.gz` makes it
                self._stream = zlib.decompressobj(wbits=31)
            try:
                part = self._stream.decompress(chunk, 256 * 1024)
            except zlib.error as exc:
                raise codec.refuse(Malformed(f"body is not gzip: {exc}")) from exc
            chunk = self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail
            self._out += len(part)
            most = self._limits.gzip_ratio_max * max(self._in, 1024)
            if self._out > most:
                raise codec.refuse(TooLarge("request body (inflated)", size_bytes=self._out, size_bytes_max=most))
            if part:
                yield part

    def finish(self) -> None:
        if not self._stream.eof:
            raise codec.refuse(Malformed("body: the gzip data ends early"))
