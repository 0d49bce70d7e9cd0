"""One connection of the client of http1_client.py, and the answer it is about: sans pool, so that any bytes can be fed to it.

A connection tells its owner when it is free again (`keep`) and when it is gone.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mist.errors import MistError, ProtocolError, TimedOut, TooLarge, Unavailable

if TYPE_CHECKING:
    import httptools

HEAD_BYTES_MAX = 64 * 1024
HEADERS_MAX = 200
INTERIM_MAX = 16
"""1xx answers before the answer."""
AHEAD_BYTES_MAX = 256 * 1024
"""Of a body, before its reader takes it."""
JOINED_BYTES_MAX = 64 * 1024
"""Up to here a body goes out in one write with its head."""
_NO_BODY = frozenset({204, 304})


class Origin(NamedTuple):
    """Where to. `host` without brackets."""

    host: str
    port: int
    tls: bool = False


class Owner(Protocol):
    """Whose connections they are. `httptools` is the module."""

    httptools: Any

    def keep(self, connection: Connection, /) -> None: ...

    def gone(self, connection: Connection, /) -> None: ...


class Response:
    """An answer whose head is there. Header names in lower case; values of a name that comes twice are joined by a comma."""

    __slots__ = ("_connection", "_error", "_parts", "_size", "_waiter", "complete", "headers", "status")

    def __init__(self, connection: Connection) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.complete = False
        """Whether its end has come; pieces may still lie here."""
        self._connection = connection
        self._parts: list[bytes] = []
        self._size = 0
        self._error: MistError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read(self, deadline_s: float | None = None) -> bytes:
        """What has come since; at least a byte, or nothing at the end. Raises ProtocolError where it broke off, TimedOut where
        nothing came until `deadline_s` by the loop's clock; the connection is closed then."""
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self.complete:
                return b""
            await self._wait(deadline_s)
        parts, self._parts = self._parts, []
        self._size = 0
        self._connection.go_on()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release(self) -> None:
        """Keep the connection where the answer is at its end, else close it."""
        self._connection.leave(self)

    def close(self) -> None:
        if self._connection.has(self):
            self._connection.abort()

    async def _wait(self, deadline_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_at(deadline_s, self._connection.late) if deadline_s is not None else None
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: MistError) -> None:
        if not self.complete and self._error is None:
            self._error = error
        self._wake()


class Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self, owner: Owner, origin: Origin) -> None:
        self.origin = origin
        self.since_s = 0.0
        """When it became idle."""
        self.used = False
        self.heard = False
        """Whether a byte came since the last request."""
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._parser: httptools.HttpResponseParser = owner.httptools.HttpResponseParser(self)
        self._transport: Any = None
        self._answer: Response | None = None
        self._began: asyncio.Future[Response] | None = None
        self._in_head = False
        self._raw = 0  # bytes of the present answer, head and framing with it
        self._given = 0  # bytes of the present body without it
        self._lines = 0
        self._interim = 0
        self._to_the_end = False
        self._keep = False
        self._paused = False
        self._gone = False
        self._why: MistError | None = None

    # the owner's side

    @property
    def usable(self) -> bool:
        return not self._gone and not self._transport.is_closing()

    async def ask(self, head: bytes, body: bytes, deadline_s: float | None = None) -> Response:
        """Send, and wait for the head of the answer."""
        if not self.usable:
            raise Unavailable("the connection was closed before an answer")
        self._answer = Response(self)
        self._began = self._loop.create_future()
        # a timer, and no task that it would cancel: several times cheaper than asyncio.timeout
        timer = self._loop.call_at(deadline_s, self.late) if deadline_s is not None else None
        self._interim = 0
        self.heard = False
        self._new_head()
        if len(body) <= JOINED_BYTES_MAX:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)
        try:
            return await self._began
        except BaseException:
            self.abort()
            raise
        finally:
            self._began = None
            if timer is not None:
                timer.cancel()

    def leave(self, answer: Response) -> None:
        if self._answer is not answer:
            return  # it is somebody else's by now, or nobody's
        self._answer = None
        if answer.complete and self._keep and self.usable:
            self.used = True
            self.go_on()
            self._owner.keep(self)
        else:
            self.abort()

    def late(self) -> None:
        """What was waited for did not come in time."""
        self._failed(TimedOut("no answer in time"))

    def has(self, answer: Response) -> bool:
        return self._answer is answer

    def abort(self) -> None:
        self._answer = None
        self._gone = True
        if self._transport is not None:
            self._transport.abort()
        self._owner.gone(self)

    def go_on(self) -> None:
        if self._paused:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    # the transport's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None or answer.complete:
            if data.strip(b"\r\n"):  # an empty line after an answer is an old habit of servers
                self._spoilt()
            return
        self.heard = True
        self._raw += len(data)
        try:
            self._parser.feed_data(data)
        except self._owner.httptools.HttpParserUpgrade:
            self._failed(ProtocolError("the server changes to a protocol that nobody asked for"))
            return
        except self._owner.httptools.HttpParserError as exc:
            self._failed(ProtocolError(f"the answer is no proper HTTP: {exc}"))
            return
        if self._why is not None:
            self._failed(self._why)
        elif self._in_head:
            self._check(HEAD_BYTES_MAX, "head of the answer")
        elif not answer.complete:
            # the parser keeps an extension or a trailer that does not end, however long it gets
            self._check(2 * HEAD_BYTES_MAX + 8 * self._given, "framing of the answer")

    def _check(self, most: int, what: str) -> None:
        if self._raw > most:
            self._failed(TooLarge(what, size_bytes=self._raw, size_bytes_max=most))

    def eof_received(self) -> None:
        return None  # the transport closes itself

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        answer = self._answer
        if answer is not None and not answer.complete:
            if self._to_the_end and not self._in_head and exc is None:
                answer.complete = True
                self._keep = False
                answer._wake()
            elif self._in_head:
                how = f"the connection broke: {exc}" if exc is not None else "the connection was closed"
                what = "in the head of the answer" if self.heard else "before an answer"
                self._failed((ProtocolError if self.heard else Unavailable)(f"{how} {what}"))
            else:
                self._failed(ProtocolError("the answer broke off" + (f": {exc}" if exc is not None else "")))
        self._owner.gone(self)

    def _failed(self, error: MistError) -> None:
        answer, began = self._answer, self._began
        self.abort()
        if began is not None and not began.done():
            began.set_exception(error)
        elif answer is not None:
            answer._fail(error)

    def _spoilt(self) -> None:
        """More came than was asked for. An answer that is whole stays so."""
        self._keep = False
        self._gone = True
        self._transport.abort()
        self._owner.gone(self)

    # the parser's

    def _new_head(self) -> None:
        self._in_head = True
        self._raw = self._given = self._lines = 0
        self._to_the_end = False

    def on_message_begin(self) -> None:
        if self._answer is not None and self._answer.complete:
            self._keep = False  # a second answer to one request

    def on_header(self, name: bytes, value: bytes) -> None:
        answer = self._answer
        self._lines += 1
        if answer is None or answer.complete or not self._in_head or self._lines > HEADERS_MAX:
            if self._lines > HEADERS_MAX and self._why is None:
                self._why = TooLarge("headers of the answer", size_bytes=self._lines, size_bytes_max=HEADERS_MAX)
            return  # too many, or a trailer
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        before = answer.headers.get(key)
        answer.headers[key] = text if before is None else f"{before}, {text}"

    def on_headers_complete(self) -> None:
        answer, began = self._answer, self._began
        if answer is None or answer.complete:
            return
        status = self._parser.get_status_code()
        if status < 200:
            self._interim += 1
            if self._interim > INTERIM_MAX:
                self._why = ProtocolError(f"more than {INTERIM_MAX} interim answers")
            return
        self._in_head = False
        headers = answer.headers
        answer.status = status
        self._to_the_end = not ("content-length" in headers or "transfer-encoding" in headers or status in _NO_BODY)
        self._keep = self._parser.should_keep_alive()
        coding = headers.get("transfer-encoding", "chunked").lower()
        if coding != "chunked":  # who reads another one differently takes a body for an answer, or an answer for a body
            self._why = ProtocolError(f"transfer-encoding {coding[:80]!r}, which nobody asked for")
        if began is not None and not began.done() and self._why is None:
            began.set_result(answer)

    def on_body(self, data: bytes) -> None:
        answer = self._answer
        if answer is None or answer.complete:
            return
        self._given += len(data)
        answer._parts.append(data)
        answer._size += len(data)
        if answer._waiter is not None:
            answer._wake()
        if answer._size > AHEAD_BYTES_MAX and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        answer = self._answer
        if answer is None or answer.complete:
            return
        if self._in_head:  # an interim answer; the next head is that of the answer, or of another
            answer.headers.clear()
            self._lines = 0
            return
        answer.complete = True
        answer._wake()
