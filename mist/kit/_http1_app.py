"""One run of an ASGI app for a request of http1.py: the body as events in, events out as a framed answer.

Promises: the body is handed on as it comes, and asked for when the app waits; an answer has a length, is chunked, or (in
HTTP/1.0) ends with the connection; none to HEAD, 204 and 304; a header that would break the framing is refused; an app that
fails before it answers is a 500, one that fails in the middle ends the connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import MutableMapping
from typing import Any, Protocol

_log = logging.getLogger("mist.kit.http1")

Headers = list[tuple[bytes, bytes]]
"""Names in lower case."""
CLOSE = (b"connection", b"close")


class Turn(Protocol):
    """What of its request an answer depends on."""

    keep_alive: bool
    expect: bool
    version: str


class Connection(Protocol):
    """What an app's run wants of its connection."""

    writable: asyncio.Event

    def run_app(self, call: AppCall) -> None: ...
    def app_done(self, turn: Any, *, broken: bool = False) -> None: ...
    def wanted(self, turn: Any) -> None: ...
    def write(self, data: bytes) -> None: ...
    def head(self, status: int, headers: Headers) -> bytes: ...


class AppCall:
    """One run of the ASGI app."""

    def __init__(self, connection: Connection, turn: Turn, scope: dict[str, Any]) -> None:
        self.buffered = 0
        self.started = False
        """Whether its answer has begun."""
        self._connection = connection
        self._turn = turn
        self._scope = scope
        self._parts: list[bytes] = []
        self._complete = False
        self._gone = False
        self._came = asyncio.Event()
        self._head: bytes | None = None
        self._chunked = False
        self._left = 0
        self._done = False
        self._running = False
        self._told_end = False

    def start(self) -> None:
        if not self._running:
            self._running = True
            self._connection.run_app(self)

    def body_came(self, data: bytes) -> None:
        if not self._done:
            self._parts.append(data)
            self.buffered += len(data)
            self._came.set()

    def body_ended(self) -> None:
        self._complete = True
        self._came.set()

    def disconnect(self) -> None:
        self._gone = True
        self._came.set()

    async def run(self, app: Any) -> None:
        try:
            await app(self._scope, self._receive, self._send)
        except Exception:
            _log.exception("the app failed on %s %s", self._scope["method"], self._scope["path"])
        if self._done:
            return
        if not self.started and not self._gone:
            await self._send({"type": "http.response.start", "status": 500, "headers": [CLOSE]})
            await self._send({"type": "http.response.body", "body": b""})
            return
        self._done = True
        self._connection.app_done(self._turn, broken=True)

    async def _receive(self) -> MutableMapping[str, Any]:
        while not (self._gone or self._done):
            if self._parts or (self._complete and not self._told_end):
                body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                self._parts.clear()
                self.buffered = 0
                self._told_end = self._complete
                self._connection.wanted(self._turn)
                return {"type": "http.request", "body": body, "more_body": not self._complete}
            self._connection.wanted(self._turn)
            self._came.clear()
            await self._came.wait()
        return {"type": "http.disconnect"}

    async def _send(self, event: MutableMapping[str, Any]) -> None:
        if not self._connection.writable.is_set():
            await self._connection.writable.wait()
        if self._gone:
            return
        kind = event["type"]
        if kind == "http.response.start" and not self.started:
            self._begin(event["status"], [(n.lower(), v) for n, v in event.get("headers", ())])
        elif kind == "http.response.body" and self.started and not self._done:
            self._body(event.get("body", b""), bool(event.get("more_body")))
        else:
            raise RuntimeError(f"the app sent {kind} out of order")

    def _begin(self, status: int, headers: Headers) -> None:
        turn = self._turn
        turn.expect = False
        self._left = 0
        if not self._complete:
            turn.keep_alive = False  # the rest of the body will not be read
        stated = chunked = False
        for name, value in headers:
            if b"\n" in value or b"\r" in value or b"\n" in name or b"\r" in name or b":" in name:
                raise RuntimeError(f"header {name!r} cannot be sent")
            if name == b"content-length":
                self._left, stated = int(value), True
            elif name == b"transfer-encoding":
                chunked = True
            elif name == b"connection" and b"close" in value.lower():
                turn.keep_alive = False
        head = self._connection.head(status, headers)
        without_body = self._scope["method"] == "HEAD" or status in (204, 304)
        if without_body:
            self._left = 0
        elif not stated:
            if turn.version == "1.0":
                turn.keep_alive = False  # the end of the connection is the end of the body
                self._left = -1
            else:
                self._chunked = True
                head += b"" if chunked else b"transfer-encoding: chunked\r\n"
        if not turn.keep_alive and CLOSE not in headers:
            head += b"connection: close\r\n"
        self._head = head + b"\r\n"
        self.started = True

    def _body(self, body: bytes, more: bool) -> None:
        head, self._head = self._head or b"", None
        if self._scope["method"] == "HEAD":
            body = b""
        if self._chunked:
            data = b"%x\r\n%s\r\n" % (len(body), body) if body else b""
            self._connection.write(head + data + (b"" if more else b"0\r\n\r\n"))
        else:
            if self._left >= 0:
                if len(body) > self._left:
                    raise RuntimeError("the answer is longer than its content-length")
                self._left -= len(body)
            self._connection.write(head + body)
        if not more:
            if self._left > 0:
                raise RuntimeError("the answer is shorter than its content-length")
            self._done = True
            self._came.set()
            self._connection.app_done(self._turn)
