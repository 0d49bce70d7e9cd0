"""HTTP of a service: an ASGI app on uvicorn in the running event loop, and a site made of several apps.

Promises: `AppServer.start` returns when the address is known and connections are taken; `close` takes no new connection,
answers the requests under way (`close_s` at most) and may be called by the program at any time; signals stay the program's
business. A `Site` gives each path to its app; an error of ours is answered with its status and error JSON, any other
with 500 and a line in the log, never with its text; what no app serves is 404, or 503 with Retry-After while an app may still come.

Does not: authenticate, terminate TLS for the world, limit bodies. Bodies are limited by the app that reads them.
Needs the extra `server` for `AppServer` only.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import msgspec

from mist.errors import Closed, Internal, InvalidArgument, MistError, NotFound, TransportError, Unavailable
from mist.kit.http1 import Door, Http1
from mist.kit.logging import trace
from mist.protocol.tracecontext import TraceContext, parse_traceparent

_log = logging.getLogger("mist.kit.server")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = tuple[tuple[bytes, bytes], ...]

CLOSE_WAIT_S = 10.0
RETRY_AFTER_S = 1


class Answer(NamedTuple):
    """What a page says."""

    status: int
    body: bytes
    type: bytes = b"application/json"
    headers: Headers = ()


def refusal(status: int, error: MistError, headers: Headers = ()) -> Answer:
    """The flat error JSON with a status."""
    return Answer(status, msgspec.json.encode(error.to_wire()), headers=headers)


def as_asked(scope: Scope, answer: Answer, error: MistError) -> Answer:
    """The refusal as plain text, as the seed answers, where the client accepts that and no JSON."""
    accept = b",".join(value for name, value in scope["headers"] if name.lower() == b"accept")
    if b"text/plain" in accept and b"json" not in accept and b"*/*" not in accept:
        return answer._replace(body=error.message.encode(), type=b"text/plain; charset=utf-8")
    return answer


def page(answer: Callable[[Scope], Awaitable[Answer]]) -> App:
    """An app for GET and HEAD; other methods are 405."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in ("GET", "HEAD"):
            found = await answer(scope)
        else:
            error = InvalidArgument(f"{scope['method']} is not served at {scope['path']}", hint="GET")
            found = refusal(405, error, ((b"allow", b"GET, HEAD"),))
        await reply(scope, send, found)

    return app


async def reply(scope: Scope, send: Send, answer: Answer) -> None:
    """Send an answer; to HEAD without its body."""
    headers = [
        (b"content-type", answer.type), (b"content-length", b"%d" % len(answer.body)), *answer.headers,
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else answer.body})


def _trace_of(headers: Iterable[tuple[bytes, bytes]]) -> TraceContext | None:
    for name, value in headers:
        if name == b"traceparent":
            return parse_traceparent(value.decode("latin-1"))
    return None


class Site:
    """Several apps behind one listener. `tables` are searched in order and may change while it runs; a path that ends
    with `/` serves everything below it.

    `waiting` says why apps may still come ("" = all are there): what is not found is then 503 and not 404, because a
    sender that was told 404 gives up. `seen(method, route, status, seconds)` is told about every answer; `route` is the
    path of the table, "" for what was not found, so that it may become a label; status 0 = no answer was sent. A request
    runs in the trace of its `traceparent`, so that log lines carry it.
    """

    def __init__(
        self,
        *tables: Mapping[str, App],
        waiting: Callable[[], str] = str,
        seen: Callable[[str, str, int, float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tables = list(tables)
        self._waiting = waiting
        self._seen = seen
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise Internal(f"a {scope['type']} connection reached an app that speaks HTTP only")
        began = self._clock()
        status = 0

        async def noted(event: MutableMapping[str, Any]) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
            await send(event)

        route, app = self._find(scope["path"])
        token = trace.set(_trace_of(scope["headers"]))
        try:
            if app is None:
                await reply(scope, noted, self._nowhere(scope["path"]))
            else:
                await app(scope, receive, noted)
        except Exception as exc:
            if status:
                raise  # half an answer is out: only closing the connection tells the client
            if isinstance(exc, MistError):
                known: MistError = exc
            else:
                _log.exception("%s %s failed", scope["method"], scope["path"])
                known = Internal(f"the server failed: {type(exc).__name__}")
            await reply(scope, noted, refusal(known.http_status, known))
        finally:
            if self._seen is not None:
                self._seen(scope["method"], route, status, self._clock() - began)
            trace.reset(token)

    def direct(self, path: str) -> Door | None:
        """What serves the path without ASGI, see http1.py: an app that has a `direct` of its own."""
        app = self._find(path)[1]
        find: Callable[[str], Door | None] | None = getattr(app, "direct", None)
        return find(path) if find is not None else None

    def answered(self, method: str, path: str, headers: list[tuple[bytes, bytes]], status: int, seconds: float) -> None:
        """A door has answered; apps are seen in `__call__`."""
        if self._seen is None:
            return
        token = trace.set(_trace_of(headers))
        try:
            self._seen(method, self._find(path)[0], status, seconds)
        finally:
            trace.reset(token)

    def _find(self, path: str) -> tuple[str, App | None]:
        for table in self.tables:
            if path in table:
                return path, table[path]
        for table in self.tables:
            for route, app in table.items():
                if route.endswith("/") and path.startswith(route):
                    return route, app
        return "", None

    def _nowhere(self, path: str) -> Answer:
        why = self._waiting()
        if why:
            return refusal(503, Unavailable(why, hint="GET /readyz"), ((b"retry-after", b"%d" % RETRY_AFTER_S),))
        known = ", ".join(dict.fromkeys(route for table in self.tables for route in table))
        return refusal(404, NotFound(f"nothing is served at {path}", hint=known))


def parse_address(text: str) -> tuple[str, int]:
    """`host:port` or `:port` or `[v6]:port`."""
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise InvalidArgument(f"listen={text!r} is not an address", hint="for example 127.0.0.1:8081")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


class AppServer:
    """An ASGI app on uvicorn, in the running event loop. Port 0 takes a free one; `url`, which ends with `path`, says
    which. `http` is the protocol: "auto" is our own (http1.py) where httptools is installed (the extra `fast`), else
    uvicorn's on h11. (uvloop belongs to who makes the loop: `mist.kit.signals.run`.)"""

    def __init__(
        self,
        app: App,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        path: str = "",
        http: Literal["auto", "h11", "httptools"] = "auto",
        close_s: float = CLOSE_WAIT_S,
    ) -> None:
        self.url = ""
        self._app = app
        self._host = host
        self._port = port
        self._path = path
        self._http = http
        self._close_s = close_s
        self._server: Any = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Raises TransportError when the address is taken."""
        if self._closed:
            raise Closed("the server is closed")
        if self._task is not None:
            return
        uvicorn = _uvicorn()
        if self._http == "httptools" and importlib.util.find_spec("httptools") is None:
            raise InvalidArgument("httptools is not installed", hint="pip install 'mist-stack[fast]'")
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listener = _listen(family, self._host, self._port)
        except OSError as exc:
            raise TransportError(f"cannot listen on {self._host}:{self._port}: {exc.strerror or exc}") from exc
        port = listener.getsockname()[1]
        host = f"[{self._host}]" if family == socket.AF_INET6 else self._host
        config = uvicorn.Config(
            self._app, http=_protocol(self._http), log_config=None, access_log=False, lifespan="off", ws="none",
            proxy_headers=False, server_header=False, timeout_graceful_shutdown=max(1, round(self._close_s)),
        )  # fmt: skip

        class Quiet(uvicorn.Server):  # type: ignore[misc, name-defined]
            """A server inside somebody's program: signals are that program's business."""

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        self._server = Quiet(config)
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            if self._task.done():
                listener.close()
                self._task.result()
                raise TransportError(f"the server on {host}:{port} did not start")
            await asyncio.sleep(0)
        self.url = f"http://{host}:{port}{self._path}"

    async def close(self) -> None:
        """Idempotent. Takes no new connection, answers the requests under way (`close_s` at most)."""
        self._closed = True
        if self._task is not None:
            self._server.should_exit = True
            task, self._task = self._task, None
            await task

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


def _listen(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    # asyncio sets TCP_NODELAY only on sockets that name their protocol, which socket.create_server's do not; without
    # it an answer in two writes waits 40 ms for the sender's delayed ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    return listener


def _protocol(http: str) -> Any:
    if http != "auto":
        return http
    return Http1 if importlib.util.find_spec("httptools") is not None else "h11"


def _uvicorn() -> Any:
    try:
        import uvicorn
    except ImportError as exc:
        raise InvalidArgument(
            "serving http needs a package that is not installed (uvicorn)", hint="pip install 'mist-stack[server]'"
        ) from exc
    return uvicorn
