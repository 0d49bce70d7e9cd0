"""An HTTP/1.1 client on httptools: POST a body to an origin, over connections that are kept. What http1.py is on the other side.

    pool = Pool()
    answer = await pool.post(origin, head, body)      # when its head is there
    while piece := await answer.read(): ...
    answer.release()                                  # or close(): one of the two, always

Promises
- One request at a time on a connection; one that was answered to its end is kept, one that was left, cancelled, or whose server
  said more than the answer is closed. What a server says unasked closes its connection.
- A body ends where its length or its last chunk says. One that has neither ends with the connection, and is kept apart from one that
  broke off (a reset, or an end before its time): that raises.
- Everything has a limit: connections (further requests wait in line), the time to connect, the head in bytes, lines and interim
  answers, the framing of a body, what is read ahead of the reader. The deadline of an answer and the size of its body are the caller's.
- A kept connection that ends before one byte of an answer came is what a server's idle timeout looks like: the request is sent once
  more, on a new connection, where the caller says that it may be. Nothing else is sent twice.
- Addresses of a name are tried in turn, a new one every quarter of a second, until one connects.

Raises Unavailable for what has no answer at all, ProtocolError for what is none, TooLarge, TimedOut. Does not: redirects, proxies, cookies,
compression, HTTP/2, uploads in pieces. A pool belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from mist.errors import Closed, InvalidArgument, MistError, ProtocolError, TimedOut, TooLarge, Unavailable

if TYPE_CHECKING:
    import httptools

CONNECTIONS_MAX = 1024
CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = 60.0
HEAD_BYTES_MAX = 64 * 1024
HEADERS_MAX = 200
INTERIM_MAX = 16
"""1xx answers before the answer."""
AHEAD_BYTES_MAX = 256 * 1024
"""Of a body, before its reader takes it."""
NEXT_ADDRESS_S = 0.25
ADDRESSES_MAX = 16
ADDRESSES_S = 60.0
"""How long the addresses of a name are remembered."""
JOINED_BYTES_MAX = 64 * 1024
"""Up to here a body goes out in one write with its head."""
_NO_BODY = frozenset({204, 304})


class Origin(NamedTuple):
    """Where to. `host` without brackets."""

    host: str
    port: int
    tls: bool = False


class Response:
    """An answer whose head is there. Header names in lower case; values of a name that comes twice are joined by a comma."""

    __slots__ = ("_connection", "_error", "_parts", "_size", "_waiter", "complete", "headers", "status")

    def __init__(self, connection: _Connection) -> None:
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


class _Connection(asyncio.Protocol):
    """One connection, made for one pool."""

    def __init__(self, pool: Pool, origin: Origin) -> None:
        self.origin = origin
        self.since_s = 0.0
        """When it became idle."""
        self.used = False
        self.heard = False
        """Whether a byte came since the last request."""
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._parser: httptools.HttpResponseParser = pool.httptools.HttpResponseParser(self)
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

    # the pool's side

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
            self._pool.keep(self)
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
        self._pool.gone(self)

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
        except self._pool.httptools.HttpParserUpgrade:
            self._failed(ProtocolError("the server changes to a protocol that nobody asked for"))
            return
        except self._pool.httptools.HttpParserError as exc:
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
        self._pool.gone(self)

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
        self._pool.gone(self)

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


class Pool:
    """Connections to any number of origins. `tls` None: certificates are verified by the system's authorities."""

    def __init__(
        self,
        *,
        connections_max: int = CONNECTIONS_MAX,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        keepalive_s: float = KEEPALIVE_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.httptools = _httptools()
        self._connections_max = connections_max
        self._connect_timeout_s = connect_timeout_s
        self._keepalive_s = keepalive_s
        self._tls = tls
        self._idle: dict[Origin, deque[_Connection]] = {}
        self._all: set[_Connection] = set()
        self._connecting = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._addresses: dict[Origin, tuple[float, list[Any]]] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    async def post(
        self, origin: Origin, head: bytes, body: bytes, *, deadline_s: float | None = None, repeatable: bool = False
    ) -> Response:
        """The answer to a request, when its head is there. `head` is all of the request before its body. `deadline_s`, by the
        loop's clock, is for that. `repeatable`: it may be sent again where a kept connection was closed under it. Raises Unavailable, ProtocolError, TooLarge, TimedOut."""
        connection = self._take(origin) or await self._in_time(origin, deadline_s)
        try:
            return await connection.ask(head, body, deadline_s)
        except Unavailable:
            if not (repeatable and connection.used and not connection.heard):
                raise
        return await (await self._in_time(origin, deadline_s)).ask(head, body, deadline_s)

    async def _in_time(self, origin: Origin, deadline_s: float | None) -> _Connection:
        limit = asyncio.timeout_at(deadline_s)
        try:
            async with limit:
                return await self._connected(origin)
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise TimedOut("no answer in time") from exc

    async def aclose(self) -> None:
        """Close every connection, answers under way with them. Idempotent."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for connection in list(self._all):
            connection._failed(Unavailable("the connections were closed"))
        self._idle.clear()
        while self._waiting:
            self._next()
        await asyncio.sleep(0)  # transports close in the next turn of the loop

    # connections

    def keep(self, connection: _Connection) -> None:
        loop = asyncio.get_running_loop()
        connection.since_s = loop.time()
        self._idle.setdefault(connection.origin, deque()).append(connection)
        if self._sweep is None and not self._closed:
            self._sweep = loop.call_later(self._keepalive_s, self._swept, loop)
        if self._waiting:
            self._next()

    def gone(self, connection: _Connection) -> None:
        if connection not in self._all:
            return
        self._all.discard(connection)
        idle = self._idle.get(connection.origin)
        if idle is not None and connection in idle:
            idle.remove(connection)
            if not idle:
                del self._idle[connection.origin]
        self._next()

    def _take(self, origin: Origin) -> _Connection | None:
        """The one that was used last; those that were idle for too long are closed."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.usable and asyncio.get_running_loop().time() - connection.since_s < self._keepalive_s:
                return connection
            connection.abort()
        return None

    async def _connected(self, origin: Origin) -> _Connection:
        """A new one, or one that became free while this waited for its turn."""
        while not self._closed and len(self._all) + self._connecting >= self._connections_max:
            other = next((idle for to, idle in self._idle.items() if to != origin and idle), None)
            if other is not None:
                other[0].abort()  # makes room
                continue
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._next()  # it was our turn just now
                raise
            free = self._take(origin)
            if free is not None:
                return free
        if self._closed:
            raise Closed("the pool of connections is closed")
        self._connecting += 1
        try:
            connection = await self._connect(origin)
        except BaseException:
            self._next()
            raise
        finally:
            self._connecting -= 1
        return connection

    def _next(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def _swept(self, loop: asyncio.AbstractEventLoop) -> None:
        """One timer for all: close what was idle for long enough."""
        now = loop.time()
        old = [c for idle in self._idle.values() for c in idle if now - c.since_s >= self._keepalive_s]
        for connection in old:
            connection.abort()
        self._sweep = loop.call_later(self._keepalive_s / 2, self._swept, loop) if self._idle else None

    async def _connect(self, origin: Origin) -> _Connection:
        limit = asyncio.timeout(self._connect_timeout_s)
        try:
            with _unavailable():
                async with limit:
                    connection = await self._first(origin, await self._resolved(origin))
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise Unavailable("no connection in time") from exc
        if self._closed or not connection.usable:
            connection.abort()
            raise Unavailable("the connection was closed before an answer")
        self._all.add(connection)
        return connection

    async def _resolved(self, origin: Origin) -> list[Any]:
        loop = asyncio.get_running_loop()
        known = self._addresses.get(origin)
        if known is not None and loop.time() - known[0] < ADDRESSES_S:
            return known[1]
        found = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        ordered = _by_turns(found)[:ADDRESSES_MAX]
        self._addresses[origin] = loop.time(), ordered
        return ordered

    async def _first(self, origin: Origin, addresses: list[Any]) -> _Connection:
        """The first address that connects. Each has a head start before the next is tried beside it."""
        if len(addresses) == 1:
            return await self._at(origin, addresses[0])
        left = deque(addresses)
        running: set[asyncio.Task[_Connection]] = set()
        error: BaseException | None = None
        try:
            while left or running:
                if left:
                    running.add(asyncio.ensure_future(self._at(origin, left.popleft())))
                done, running = await asyncio.wait(
                    running, timeout=NEXT_ADDRESS_S if left else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    if (failed := task.exception()) is None:
                        running.update(done - {task})  # there may be two of them
                        return task.result()
                    error = failed
            self._addresses.pop(origin, None)
            raise error or OSError("no address")
        finally:
            for task in running:
                task.cancel()
                task.add_done_callback(_unwanted)

    async def _at(self, origin: Origin, address: Any) -> _Connection:
        family, where = address[0], address[4]
        tls = self._context() if origin.tls else None
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self, origin), where[0], where[1], family=family, ssl=tls,
            server_hostname=origin.host if tls is not None else None,
        )  # fmt: skip
        return connection

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


def _unwanted(task: asyncio.Task[_Connection]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().abort()


def _by_turns(found: list[Any]) -> list[Any]:
    """Addresses with their families by turns, each in the order the system gives: where one of the families leads nowhere,
    the second address works."""
    families: dict[Any, deque[Any]] = {}
    for address in found:
        families.setdefault(address[0], deque()).append(address)
    out = []
    while families:
        for family in list(families):
            out.append(families[family].popleft())
            if not families[family]:
                del families[family]
    return out


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except TimeoutError:  # an OSError, too
        raise
    except OSError as exc:
        raise Unavailable(str(exc) or type(exc).__name__) from exc
    except UnicodeError as exc:
        raise Unavailable(f"no such host: {exc}") from exc


def _httptools() -> Any:
    try:
        import httptools
    except ImportError as exc:
        raise InvalidArgument(
            "asking over HTTP needs a package that is not installed (httptools)", hint="pip install 'mist-stack[infer]'"
        ) from exc
    return httptools
