"""HTTP/1.1 on httptools, for uvicorn's server in place of uvicorn's own protocol: any ASGI app, and a short way for doors.

An app may have `direct(path)`, which gives a `Door` for that path or None, and `answered(method, path, headers, status, seconds)`,
which is told about every answer of a door. A door gets whole requests without the objects,
events and task that ASGI makes for each, and answers with bytes: several times as many requests a second.

Promises
- Keep-alive, pipelining (answers in order), chunked bodies both ways, HEAD, `Expect: 100-continue` (said when the body is
  wanted, never to a request that is refused), `Connection: close`; an upgrade that nobody serves is ignored.
- Everything has a limit: the head in bytes and lines (431), the time a head may take (408) and a body on its way to a door
  (408), idle connections, requests waiting in one connection, an answer nobody reads. What is no HTTP is 400. Errors are the
  flat error JSON. Connections that hang cost a place in a set and no timer of their own.
- A body for an app is read as fast as the app takes it; an answer is written as fast as the client does.
- Closing answers what is under way; idle connections are closed at once.

Does not: HTTP/2, TLS (a proxy's), websockets, trailers.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec
from msgspec import Struct

from mist.errors import InvalidArgument, MistError, TimedOut, TooLarge
from mist.kit._http1_app import CLOSE, AppCall
from mist.kit._http1_app import Headers as Headers

if TYPE_CHECKING:
    import httptools

_log = logging.getLogger("mist.kit.http1")

Respond = Callable[[int, bytes, Headers], None]
"""Status, body, headers but the length. To be called once; later calls do nothing."""

_LINES = {s.value: b"HTTP/1.1 %d %s\r\n" % (s.value, s.phrase.encode()) for s in HTTPStatus}
_JSON: Headers = [(b"content-type", b"application/json")]
_HIGH_WATER = 64 * 1024
LINGER_S = 2.0
"""How long a client that was refused before its body was through may go on sending."""


class HttpLimits(Struct, frozen=True, kw_only=True):
    """What one connection may cost. Times are looked at every half of the shortest, half a second at most."""

    head_bytes_max: int = 32 * 1024
    headers_max: int = 100
    head_s_max: float = 10.0
    write_s_max: float = 30.0
    pipeline_max: int = 64


class Exchange(ABC):
    """One request on its way into a door. `feed` gets the body; then `end`. Either may raise a MistError, or `respond`, to
    refuse it; whatever happens, `left` is called once at its end."""

    @abstractmethod
    def feed(self, data: bytes) -> None: ...

    @abstractmethod
    def end(self, respond: Respond) -> bytes | None:
        """The body is complete. Answer through `respond`, now or later, on this loop. A body that is given back goes to the
        app with its request, which is then none of the door's: for answers in pieces."""

    @abstractmethod
    def left(self) -> None:
        """It was answered, refused, or its client is gone."""


class Door(ABC):
    """What serves one path directly."""

    body_s_max = 30.0
    """How long a body may take to arrive. (An app looks to this itself.)"""

    @abstractmethod
    def begin(self, method: bytes, headers: Headers) -> Exchange:
        """A request's head has come. Raises a MistError, which `refusal` makes an answer."""

    @abstractmethod
    def refusal(self, error: Exception, headers: Headers) -> tuple[int, bytes, Headers]:
        """The answer to an error, for a request with these headers."""


class _Turn:
    """A request's place in its connection: answers go out in the order of requests."""

    __slots__ = (
        "answer", "app", "began_s", "cut", "door", "exchange", "expect", "headers", "keep_alive", "method", "over", "path",
        "target", "version",
    )  # fmt: skip

    def __init__(self) -> None:
        self.headers: Headers = []
        self.keep_alive = True
        self.expect = False
        self.version = "1.1"
        self.door: Door | None = None
        self.exchange: Exchange | None = None
        self.app: AppCall | None = None
        self.answer: bytes | None = None
        self.over = False  # answered as far as the door or app is concerned
        self.cut = False  # answered before its body was through
        self.method = self.path = ""
        self.target: tuple[bytes, str, bytes, bytes] | None = None  # method, path, raw path, query: for the app
        self.began_s = 0.0


class Http1(asyncio.Protocol):
    """Made by uvicorn's server, one for each connection."""

    limits = HttpLimits()
    _common_of: tuple[Any, bytes] = (None, b"")

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        import httptools

        if not config.loaded:
            config.load()
        self._config = config
        self._state = server_state
        self._app_state = app_state
        self._loop: asyncio.AbstractEventLoop = _loop or asyncio.get_running_loop()
        self._direct: Callable[[str], Door | None] = getattr(config.app, "direct", _no_door)
        self._answered: Callable[[str, str, Headers, int, float], None] | None = getattr(config.app, "answered", None)
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._idle_s = float(config.timeout_keep_alive)
        self._transport: Any = None
        self._turns: deque[_Turn] = deque()
        self._turn: _Turn | None = None  # the one that is being read
        self._url = b""
        self._in_head = False
        self._head_bytes = 0
        self._raw = 0  # bytes of the present head, or of the present body with its framing
        self._given = 0  # bytes of the present body without it
        self._closing = False  # nothing more is read
        self._reading = True
        self.writable = asyncio.Event()
        self.writable.set()
        self.due_s = 0.0  # when the connection has been waited for long enough; 0 = it is not waited for
        self._why = ""
        self._unsent = 0

    # the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._state.connections.add(self)
        self._wait("head", self.limits.head_s_max)
        _Sweeper.of(self._loop).add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(self)
        _Sweeper.of(self._loop).drop(self)
        self._closing = True
        self.due_s = 0.0
        self._parser = None
        self.writable.set()
        for turn in self._turns:
            if turn.exchange is not None:
                turn.exchange.left()
                turn.exchange = None
            if turn.app is not None:
                turn.app.disconnect()
        self._turns.clear()

    def data_received(self, data: bytes) -> None:
        if self._closing or self._parser is None:
            return
        import httptools

        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # nobody serves it: the request was a plain one, and what follows on the connection is not HTTP
            self._stop_reading()
            if self._turns:
                self._turns[-1].keep_alive = False
            else:
                self._transport.close()
        except httptools.HttpParserCallbackError as exc:
            _log.error("a bug while reading a request", exc_info=exc.__context__ or exc)
            self._closing = True
            self._transport.abort()
        except httptools.HttpParserError:
            if not self._closing:
                self._refuse(400, InvalidArgument("this is no HTTP request"))
        if self._turn is not None:
            self._check_framing(len(data))
        if len(self._turns) > self.limits.pipeline_max:
            self._pause()

    def _check_framing(self, size: int) -> None:
        """The parser keeps a header or trailer that does not end, however long it gets: count what goes in."""
        self._raw += size
        if self._raw > self.limits.head_bytes_max + (0 if self._in_head else 8 * self._given):
            most = self.limits.head_bytes_max
            self._refuse(431, TooLarge("request head or framing", size_bytes=self._raw, size_bytes_max=most))

    def eof_received(self) -> None:
        return None

    def pause_writing(self) -> None:
        self.writable.clear()
        self._pause()
        self._unsent = self._transport.get_write_buffer_size()
        self._wait("write", self.limits.write_s_max)

    def resume_writing(self) -> None:
        self.writable.set()
        if self._turn is None:
            self._wait("idle" if not self._turns else "", self._idle_s)
        else:
            self._wait("head" if self._in_head else "", self.limits.head_s_max)
        self._resume()

    def shutdown(self) -> None:
        """The server closes: answer what is under way, then go."""
        if not self._turns:
            self._closing = True
            self._transport.close()
            return
        self._turns[-1].keep_alive = False
        if self._turn is None:
            self._stop_reading()

    # time

    def _wait(self, why: str, seconds: float) -> None:
        self._why = why
        self.due_s = self._loop.time() + seconds if why else 0.0

    def expired(self) -> None:
        """The sweeper found that the connection was waited for long enough."""
        why, self.due_s = self._why, 0.0
        if why == "head" and self._in_head:
            self._refuse(408, TimedOut(f"the head of the request did not come within {self.limits.head_s_max:g} s"))
        elif why == "body" and self._turn is not None and self._turn.door is not None:
            self._refuse(408, TimedOut(f"the body did not arrive within {self._turn.door.body_s_max:g} s"))
        elif why == "write":
            left = self._transport.get_write_buffer_size()
            if left < self._unsent:
                self._unsent = left
                self._wait("write", self.limits.write_s_max)  # slow, but it reads
            else:
                self._transport.abort()
        else:
            self._closing = True
            self._transport.close()

    # the parser

    def on_message_begin(self) -> None:
        if self._closing:
            return  # what was sent behind a request that ends the connection
        self._turn = _Turn()
        self._url = b""
        self._in_head = True
        self._head_bytes = self._raw = self._given = 0
        self._wait("head", self.limits.head_s_max)

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        turn = self._turn
        if turn is None:
            return
        if not self._in_head:
            return  # a trailer
        name = name.lower()
        turn.headers.append((name, value))
        if name == b"expect" and value.lower() == b"100-continue":
            turn.expect = True
        self._count(len(name) + len(value))

    def _count(self, size: int) -> None:
        self._head_bytes += size
        turn = self._turn
        if turn is not None and (
            self._head_bytes > self.limits.head_bytes_max or len(turn.headers) > self.limits.headers_max
        ):
            most = self.limits.head_bytes_max
            self._refuse(431, TooLarge("request head", size_bytes=self._head_bytes, size_bytes_max=most))

    def on_headers_complete(self) -> None:
        turn, parser = self._turn, self._parser
        if turn is None or parser is None:
            return
        self._in_head = False
        self._raw = 0
        turn.keep_alive = parser.should_keep_alive()
        version = parser.get_http_version()
        if version != "1.1":
            turn.version = version
            turn.expect = False  # an old client waits for no such word
        path, _, query = self._url.partition(b"?")
        if not path.startswith(b"/") and path != b"*":
            path = b"/" + path.partition(b"://")[2].partition(b"/")[2]  # the absolute form, as to a proxy
        text = path.decode("latin-1")
        if "%" in text:
            text = unquote(text)
        self._turns.append(turn)
        door = self._direct(text)
        if door is None:
            self._to_app(turn, parser.get_method(), text, path, query)
            return
        turn.door = door
        turn.target = parser.get_method(), text, path, query
        if self._answered is not None:
            turn.method, turn.path, turn.began_s = parser.get_method().decode("latin-1"), text, self._loop.time()
        self._wait("body", door.body_s_max)
        try:
            turn.exchange = door.begin(parser.get_method(), turn.headers)
        except Exception as exc:
            self._door_refuses(turn, exc)
            return
        if turn.expect:
            self._continue(turn)

    def on_body(self, data: bytes) -> None:
        turn = self._turn
        if turn is None:
            return
        turn.expect = False
        self._given += len(data)
        if turn.exchange is not None:
            try:
                turn.exchange.feed(data)
            except Exception as exc:
                self._door_refuses(turn, exc)
        elif turn.app is not None:
            turn.app.body_came(data)
            if turn.app.buffered > _HIGH_WATER:
                self._pause()

    def on_message_complete(self) -> None:
        turn, self._turn = self._turn, None
        if turn is None:
            return
        self.due_s = 0.0
        if not turn.keep_alive:
            self._stop_reading()
        if turn.exchange is not None:
            try:
                given_back = turn.exchange.end(lambda status, body, headers: self._respond(turn, status, body, headers))
            except Exception as exc:
                self._door_refuses(turn, exc)
            else:
                if given_back is not None:
                    self._give_to_app(turn, given_back)
        elif turn.app is not None:
            turn.app.body_ended()

    # doors

    def _door_refuses(self, turn: _Turn, error: Exception) -> None:
        """Answer an error. A request whose body is not through cannot share its connection any longer."""
        assert turn.door is not None  # noqa: S101
        status, body, headers = turn.door.refusal(error, turn.headers)
        if turn is self._turn:
            self._cut(turn)
        self._respond(turn, status, body, headers)

    def _cut(self, turn: _Turn) -> None:
        turn.keep_alive = False
        turn.cut = True
        self._turn = None
        self._stop_reading()
        self.due_s = 0.0

    def _respond(self, turn: _Turn, status: int, body: bytes, headers: Headers) -> None:
        if turn.over:
            return
        turn.over = True
        if turn.exchange is not None:
            turn.exchange.left()
            turn.exchange = None
        if self._answered is not None and turn.path:
            self._answered(turn.method, turn.path, turn.headers, status, self._loop.time() - turn.began_s)
        if self._parser is None:
            return
        parts = [_LINES[status], self._common()]
        for name, value in headers:
            parts.append(b"%s: %s\r\n" % (name, value))
            if name == b"connection":
                turn.keep_alive = False
        if not turn.keep_alive and CLOSE not in headers:
            parts.append(b"connection: close\r\n")
        parts.append(b"content-length: %d\r\n\r\n" % len(body))
        parts.append(body)
        turn.answer = b"".join(parts)
        self._advance()

    def _advance(self) -> None:
        """Write the answers whose turn it is; start the app whose turn it is."""
        turns, transport = self._turns, self._transport
        while turns:
            turn = turns[0]
            if turn.app is not None and not turn.over:
                turn.app.start()
                return
            if not turn.over:
                return
            turns.popleft()
            self._state.total_requests += 1
            if turn.answer is not None and not transport.is_closing():
                transport.write(turn.answer)
            if not turn.keep_alive:
                self._end(turn)
                return
        if self._turn is None and not self.due_s:
            self._wait("idle", self._idle_s)
        if not self._reading:
            self._resume()

    def _end(self, turn: _Turn) -> None:
        """The last answer is out. To close while the client still sends would take the answer from it (the kernel resets
        the connection): its rest is read and thrown away for a while."""
        self._closing = True
        if not turn.cut or self._transport.is_closing():
            self._transport.close()
            return
        self._transport.write_eof()
        self._wait("linger", LINGER_S)
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()

    # apps

    def _to_app(self, turn: _Turn, method: bytes, path: str, raw_path: bytes, query: bytes) -> None:
        self.due_s = 0.0
        scope = {
            "type": "http", "asgi": {"version": self._config.asgi_version, "spec_version": "2.3"},
            "http_version": turn.version, "server": _address(self._transport, "sockname"),
            "client": _address(self._transport, "peername"), "scheme": "http", "root_path": self._config.root_path,
            "method": method.decode("ascii"), "path": path, "raw_path": raw_path, "query_string": query,
            "headers": turn.headers, "state": self._app_state.copy(),
        }  # fmt: skip
        turn.app = AppCall(self, turn, scope)
        if self._turns[0] is turn:
            turn.app.start()

    def _give_to_app(self, turn: _Turn, body: bytes) -> None:
        """A door does not want this one."""
        assert turn.exchange is not None and turn.target is not None  # noqa: S101, PT018
        turn.exchange.left()
        turn.exchange = turn.door = None
        turn.path = ""  # the app is seen by itself
        self._to_app(turn, *turn.target)
        assert turn.app is not None  # noqa: S101
        turn.app.body_came(body)
        turn.app.body_ended()

    def run_app(self, call: AppCall) -> None:
        task = self._loop.create_task(call.run(self._config.loaded_app))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def app_done(self, turn: Any, *, broken: bool = False) -> None:
        """The app's answer is through, or `broken` off."""
        if turn.over:
            return
        turn.over = True
        if self._turn is not None and turn is self._turn:  # an unread rest of the body would be taken for a request
            self._cut(self._turn)
        elif broken:
            turn.keep_alive = False
            self._stop_reading()
        if self._parser is not None:
            self._advance()

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def _continue(self, turn: _Turn) -> None:
        turn.expect = False
        if self._turns and self._turns[0] is turn:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def wanted(self, turn: Any) -> None:
        """An app waits for its body."""
        if turn.expect:
            self._continue(turn)
        self._resume()

    def head(self, status: int, headers: Headers) -> bytes:
        """The head of an answer, without its last line."""
        line = _LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
        return b"".join([line, self._common(), *[b"%s: %s\r\n" % header for header in headers]])

    def _common(self) -> bytes:
        headers = self._state.default_headers
        if self._common_of[0] is not headers:
            Http1._common_of = headers, b"".join([b"%s: %s\r\n" % header for header in headers])
        return self._common_of[1]

    # reading

    def _refuse(self, status: int, error: MistError) -> None:
        """A request that reached nobody: answer it after those before it, and read no more."""
        turn = self._turn or _Turn()
        if turn not in self._turns:
            self._turns.append(turn)
        self._cut(turn)
        if turn.app is not None:
            turn.app.disconnect()
            if turn.app.started:
                self.app_done(turn, broken=True)
                return
            turn.app = None  # it has said nothing yet, and will not be heard
        self._respond(turn, status, msgspec.json.encode(error.to_wire()), list(_JSON))

    def _stop_reading(self) -> None:
        self._closing = True
        self._pause()

    def _pause(self) -> None:
        if self._reading and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._reading or self._closing or not self.writable.is_set() or self._transport.is_closing():
            return
        if len(self._turns) > self.limits.pipeline_max:
            return
        self._reading = True
        self._transport.resume_reading()


class _Sweeper:
    """One timer for all connections of a loop."""

    _of: dict[asyncio.AbstractEventLoop, _Sweeper] = {}  # noqa: RUF012 - the entries live as long as their connections

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._connections: set[Http1] = set()
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _Sweeper:
        found = cls._of.get(loop)
        if found is None:
            found = cls._of[loop] = cls(loop)
        return found

    def add(self, connection: Http1) -> None:
        self._connections.add(connection)
        if self._timer is None:
            limits = connection.limits
            shortest = min(limits.head_s_max, limits.write_s_max)
            self._every_s = max(0.005, min(0.5, shortest / 2))
            self._timer = self._loop.call_later(self._every_s, self._sweep)

    def drop(self, connection: Http1) -> None:
        self._connections.discard(connection)
        if not self._connections and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._of.pop(self._loop, None)

    def _sweep(self) -> None:
        now = self._loop.time()
        for connection in [c for c in self._connections if 0.0 < c.due_s <= now]:
            connection.expired()
        self._timer = self._loop.call_later(self._every_s, self._sweep) if self._connections else None


def _no_door(path: str) -> Door | None:
    return None


def _address(transport: Any, which: str) -> tuple[str, int] | None:
    address = transport.get_extra_info(which)
    return (str(address[0]), int(address[1])) if isinstance(address, tuple) and len(address) >= 2 else None
