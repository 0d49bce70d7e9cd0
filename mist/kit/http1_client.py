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
from typing import Any

from mist.errors import Closed, InvalidArgument, TimedOut, Unavailable
from mist.kit._http1_connection import Connection
from mist.kit._http1_connection import Origin as Origin
from mist.kit._http1_connection import Response as Response

CONNECTIONS_MAX = 1024
CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = 60.0
NEXT_ADDRESS_S = 0.25
ADDRESSES_MAX = 16
ADDRESSES_S = 60.0
"""How long the addresses of a name are remembered."""


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
        self._idle: dict[Origin, deque[Connection]] = {}
        self._all: set[Connection] = set()
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

    async def _in_time(self, origin: Origin, deadline_s: float | None) -> Connection:
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

    def keep(self, connection: Connection) -> None:
        loop = asyncio.get_running_loop()
        connection.since_s = loop.time()
        self._idle.setdefault(connection.origin, deque()).append(connection)
        if self._sweep is None and not self._closed:
            self._sweep = loop.call_later(self._keepalive_s, self._swept, loop)
        if self._waiting:
            self._next()

    def gone(self, connection: Connection) -> None:
        if connection not in self._all:
            return
        self._all.discard(connection)
        idle = self._idle.get(connection.origin)
        if idle is not None and connection in idle:
            idle.remove(connection)
            if not idle:
                del self._idle[connection.origin]
        self._next()

    def _take(self, origin: Origin) -> Connection | None:
        """The one that was used last; those that were idle for too long are closed."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.usable and asyncio.get_running_loop().time() - connection.since_s < self._keepalive_s:
                return connection
            connection.abort()
        return None

    async def _connected(self, origin: Origin) -> Connection:
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

    async def _connect(self, origin: Origin) -> Connection:
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

    async def _first(self, origin: Origin, addresses: list[Any]) -> Connection:
        """The first address that connects. Each has a head start before the next is tried beside it."""
        if len(addresses) == 1:
            return await self._at(origin, addresses[0])
        left = deque(addresses)
        running: set[asyncio.Task[Connection]] = set()
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

    async def _at(self, origin: Origin, address: Any) -> Connection:
        family, where = address[0], address[4]
        tls = self._context() if origin.tls else None
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self, origin), where[0], where[1], family=family, ssl=tls,
            server_hostname=origin.host if tls is not None else None,
        )  # fmt: skip
        return connection

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


def _unwanted(task: asyncio.Task[Connection]) -> None:
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
