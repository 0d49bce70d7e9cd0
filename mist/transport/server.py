"""Serves `POST /mist`: the door of a stream, or of any function, for envelopes over HTTP.

    async with serve(stream, port=8081) as server: ...

Promises: 202 only after the sink has stored the envelopes where it promises to: for a stream, its durability. One
envelope is answered with an empty body, as the Go library does (its sequence is in the header `Mist-Sequence`); NDJSON
and JSON arrays with `{"accepted":n,"first":…,"last":…}`. A sink that answers (`Replies`) makes it 200: one reply to one
envelope as JSON, otherwise a line each. All of a request or nothing: every line is read and checked
before the sink sees any. Refusals are the flat error JSON `{"code","message","meta","cause"}`: 400 naming the line, 413
for what is too large (said before the body is read where the length is stated), 405 with Allow, 404 elsewhere, 415 for
an encoding we do not read, 408 for a body that does not come, 503 with Retry-After while too many bytes or requests
are under way or the sink is full. Who accepts `text/plain` and no JSON gets the sentence alone. Closing finishes the requests
under way.

Does not: authenticate, terminate TLS for the world, route. That is the gateway. `ingest` is a bare ASGI app, no
framework, and a door of mist.kit.http1, which spares it what ASGI costs; `HttpServer` runs it on uvicorn's server (the
extra `server`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import Raw

from mist.broker.base import Message, Stream
from mist.errors import (
    Internal,
    InvalidArgument,
    Malformed,
    MistError,
    NotFound,
    ProtocolError,
    TooLarge,
)
from mist.kit.http1 import Door, Exchange, Headers, Respond
from mist.kit.server import AppServer, Receive, Scope, Send
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from mist.protocol.subject import subject_for
from mist.transport._calls import Calls, Replies
from mist.transport._lines import encode_lines
from mist.transport.body import Answer, Gone, Intake, Request
from mist.transport.body import Limits as Limits

_log = logging.getLogger("mist.transport.server")


Sink = Callable[[list[Envelope]], Awaitable[Sequence[int] | Replies | None]]
"""Stores envelopes; returns when that is done, with their sequences where it has any. Or answers them."""
Reply = Callable[[Envelope, Mapping[bytes, bytes]], Envelope | Awaitable[Envelope] | None]
"""An answer to an envelope that came alone, with its request's headers, now or later; or None: it is for the sink. What is
awaited is cancelled when the client leaves."""
Read = Callable[[bytes, Mapping[bytes, bytes], Limits], tuple[list[Envelope], bool]]
"""The envelopes of a body, given its headers by lower-case name, and whether it was a single one, which is answered with
an empty body. Raises ProtocolError, TooLarge."""

_NDJSON = (codec.NDJSON.encode(), b"application/jsonl", b"application/ndjson", b"application/jsonlines")
_INT_SAFE = 2**53
_TYPE = (b"content-type", b"application/json")


_subject = lru_cache(maxsize=4096)(subject_for)


def stream_sink(stream: Stream) -> Callable[[list[Envelope]], Awaitable[Sequence[int]]]:
    """Appends to the stream: subject = type, id = envelope id."""

    async def store(envelopes: list[Envelope]) -> Sequence[int]:
        return await stream.append(to_messages(envelopes))

    return store


def to_messages(envelopes: list[Envelope]) -> list[Message]:
    """Encoded at once: a third of the time that one by one takes."""
    datas = codec.encode_lines(envelopes).split(b"\n")
    if len(datas) != len(envelopes) + 1:  # a payload with line breaks between its tokens
        datas = [codec.encode(e) for e in envelopes]
    subjects = {type: _subject(type) for type in {e.type for e in envelopes}}
    return [Message(subjects[e.type], data, e.id) for e, data in zip(envelopes, datas, strict=False)]


def ingest(
    sink: Stream | Sink,
    *,
    path: str = "/mist",
    limits: Limits | None = None,
    reply: Reply | None = None,
    shared: bool | None = None,
    read: Read | None = None,
) -> Ingest:
    """The door at `path`. `sink` is a stream or a coroutine function over a list of envelopes.

    An envelope that comes alone and that `reply` has an answer for (a `health.ping`) is answered with 200 and that
    envelope, and is not stored.

    `shared`: small requests of the same moment may share one call of the sink (the default for a stream). A sink that
    stores, and gives a sequence for each envelope or None, can be shared; one that answers cannot. When a shared call
    fails by the fault of one envelope, each of its requests is tried by itself: the sink has to bear repeats.

    `read` is for a door whose bodies are not envelopes.
    """
    store = stream_sink(sink) if isinstance(sink, Stream) else sink
    calls = Calls(store, isinstance(sink, Stream) if shared is None else shared)
    return Ingest(calls, path, limits or Limits(), reply, read or _parse)


class Ingest(Door):
    """An ASGI app, and the door of mist.kit.http1 for its path."""

    def __init__(
        self,
        calls: Calls,
        path: str,
        limits: Limits,
        reply: Reply | None,
        read: Read,
    ) -> None:
        self.path = path
        self.limits = limits
        self.body_s_max = limits.read_timeout_s
        self.intake = Intake(limits)
        self.reply = reply
        self.calls = calls
        self.read = read

    def direct(self, path: str) -> Door | None:
        return self if path == self.path else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise Internal(f"a {scope['type']} connection reached an app that speaks HTTP only")
        headers: Headers = [(bytes(k).lower(), bytes(v)) for k, v in scope["headers"]]
        try:
            status, body, more = await self._answer(scope, headers, receive)
        except Gone:
            return
        except Exception as exc:
            status, body, more = self.refusal(exc, headers)
        more = [*more, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": more})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive) -> tuple[int, bytes, Headers]:
        if scope["path"] != self.path:
            raise NotFound(f"nothing is served at {scope['path']}", hint=f"POST {self.path}")
        self._check(scope["method"])
        named = dict(headers)
        answered: asyncio.Future[tuple[int, bytes, Headers]] = asyncio.get_running_loop().create_future()

        def respond(status: int, body: bytes, more: Headers) -> None:
            if not answered.done():
                answered.set_result((status, body, more))

        with self.intake.request() as request:
            task = self.take(await request.read(named, receive), named, headers, respond)
            if task is None:
                return await answered
            leaving = asyncio.create_task(_left(receive))
            try:
                await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not answered.done():
                    raise Gone
                return answered.result()
            finally:
                leaving.cancel()
                task.cancel()

    def _check(self, method: str) -> None:
        if method != "POST":
            error = InvalidArgument(f"{method} is not served at {self.path}", hint="POST")
            raise Answer(405, error, ((b"allow", b"POST"),))

    def begin(self, method: bytes, headers: Headers) -> Exchange:
        self._check(method.decode("latin-1"))
        return _Direct(self, headers)

    def take(
        self, body: bytes, named: dict[bytes, bytes], headers: Headers, respond: Respond
    ) -> asyncio.Task[None] | None:
        """Read the envelopes of a body and store them; then `respond`. Raises ProtocolError, TooLarge. A task is what makes
        an answer, to be cancelled when nobody waits for it."""
        envelopes, single = self.read(body, named, self.limits)
        if not envelopes:
            respond(202, b'{"accepted":0}', [_TYPE])
            return None
        if single and self.reply is not None and (said := self.reply(envelopes[0], named)) is not None:
            if not isinstance(said, Envelope):
                return asyncio.get_running_loop().create_task(self._answering(said, headers, respond))
            respond(200, codec.encode(said), [_TYPE])
            return None

        def done(stored: Sequence[int] | Replies | None, error: Exception | None) -> None:
            if error is None:
                respond(*_accepted(stored, len(envelopes), single))
            else:
                respond(*self.refusal(error, headers))

        self.calls.put(envelopes, done)
        return None

    async def _answering(self, answer: Awaitable[Envelope], headers: Headers, respond: Respond) -> None:
        try:
            said = await answer
        except Exception as exc:
            respond(*self.refusal(exc, headers))
        else:
            respond(200, codec.encode(said), [_TYPE])

    def refusal(self, error: Exception, headers: Headers) -> tuple[int, bytes, Headers]:
        more: tuple[tuple[bytes, bytes], ...] = ()
        if isinstance(error, Answer):
            status, known, more = error.status, error.error, error.headers
        elif isinstance(error, MistError):
            status, known = error.http_status, error
            if error.code in ("storage_full", "closed"):
                status = 503  # what the seed's senders know as "full, come back": the code in the body says which
            if status in (429, 503):
                wait = error.retry_after_s if error.retry_after_s is not None else self.limits.retry_after_s
                more += ((b"retry-after", b"%d" % max(1, round(wait))),)
            if status in (413, 503):
                more += ((b"connection", b"close"),)  # the rest of the body is not read
        else:
            _log.error("the sink of POST %s failed", self.path, exc_info=error)
            status, known = 500, Internal(f"the server failed: {type(error).__name__}")
        if any(n == b"accept" and b"text/plain" in v and b"json" not in v for n, v in headers):
            return status, f"{known}\n".encode(), [(b"content-type", b"text/plain; charset=utf-8"), *more]
        return status, msgspec.json.encode(known.to_wire()), [_TYPE, *more]


class _Direct(Exchange):
    """A request that comes without ASGI."""

    __slots__ = ("_answering", "_door", "_headers", "_named", "_request")

    def __init__(self, door: Ingest, headers: Headers) -> None:
        self._door = door
        self._headers = headers
        self._named = dict(headers)
        self._answering: asyncio.Task[None] | None = None
        self._request: Request | None = door.intake.enter()
        try:
            self._request.begin(self._named)
        except BaseException:
            self.left()
            raise

    def feed(self, data: bytes) -> None:
        if self._request is not None:
            self._request.feed(data)

    def end(self, respond: Respond) -> None:
        if self._request is not None:
            self._answering = self._door.take(self._request.end(), self._named, self._headers, respond)

    def left(self) -> None:
        if self._answering is not None:  # it is done, or its client is gone
            self._answering.cancel()
        request, self._request = self._request, None
        if request is not None:
            self._door.intake.leave(request)


def _accepted(stored: Sequence[int] | Replies | None, count: int, single: bool) -> tuple[int, bytes, Headers]:
    if isinstance(stored, Replies):
        if stored.envelopes:
            return _reply(stored.envelopes, single)
        stored = None
    if single:
        return 202, b"", [(b"mist-sequence", b"%d" % stored[0])] if stored else []
    answer: dict[str, Any] = {"accepted": count}
    if stored:
        answer["first"] = _json_int(stored[0])
        answer["last"] = _json_int(stored[-1])
    return 202, msgspec.json.encode(answer), [_TYPE]


def _reply(replies: list[Envelope], single: bool) -> tuple[int, bytes, Headers]:
    if single and len(replies) == 1:
        return 200, codec.encode(replies[0]), [_TYPE]
    return 200, encode_lines(replies).data, [(b"content-type", codec.NDJSON.encode())]


async def _left(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        event = await receive()
        await send({"type": event["type"] + ".complete"})
        if event["type"] == "lifespan.shutdown":
            return


def _json_int(sequence: int) -> int | str:
    return sequence if sequence <= _INT_SAFE else str(sequence)


def _parse(body: bytes, headers: Mapping[bytes, bytes], limits: Limits) -> tuple[list[Envelope], bool]:
    """Raises the first error, naming the line."""
    content_type = headers.get(b"content-type", b"")
    if content_type != b"application/json" and content_type.split(b";")[0].strip().lower() in _NDJSON:
        return _parse_lines(body, limits), False
    start = body.lstrip(b" \t\r\n")[:1]
    if start == b"[":
        return _parse_array(body, limits), False
    try:
        return [codec.decode_foreign(body, size_bytes_max=limits.size_bytes_max)], True
    except Malformed as exc:
        if body.count(b"\n") and "trailing" in exc.message:
            exc.hint = f"several envelopes are sent as {codec.NDJSON}"
        raise


def _parse_lines(body: bytes, limits: Limits) -> list[Envelope]:
    lines = body.count(b"\n") + 1
    if lines > limits.envelopes_max + 1:
        raise codec.refuse(TooLarge("request (envelopes)", size_bytes=lines, size_bytes_max=limits.envelopes_max))
    block = body if body.endswith(b"\n") else body + b"\n"
    if len(block) <= limits.size_bytes_max:
        envelopes = codec.decode_block(block, size_bytes_max=limits.size_bytes_max)
        if envelopes is not None:
            return envelopes
    out: list[Envelope] = []
    for number, line in enumerate(block.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            out.append(codec.decode_foreign(line, size_bytes_max=limits.size_bytes_max))
        except (ProtocolError, TooLarge) as exc:
            raise at(exc, "line", number) from None
    return out


def _parse_array(body: bytes, limits: Limits) -> list[Envelope]:
    try:
        items = msgspec.json.decode(body, type=list[Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise codec.refuse(Malformed(f"body: {exc}")) from exc
    if len(items) > limits.envelopes_max:
        raise codec.refuse(TooLarge("request (envelopes)", size_bytes=len(items), size_bytes_max=limits.envelopes_max))
    out: list[Envelope] = []
    for number, item in enumerate(items, 1):
        try:
            out.append(codec.decode_foreign(bytes(item), size_bytes_max=limits.size_bytes_max))
        except (ProtocolError, TooLarge) as exc:
            raise at(exc, "item", number) from None
    return out


def at(error: MistError, what: str, number: int) -> MistError:
    """The same error, which names its line or item."""
    error.meta[what] = str(number)
    error.message = f"{what} {number}: {error.message}"
    error.args = (error.message,)
    return error


class HttpServer(AppServer):
    """`ingest` on uvicorn; `url` is where envelopes are posted."""

    def __init__(
        self,
        sink: Stream | Sink,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        path: str = "/mist",
        limits: Limits | None = None,
        size_bytes_max: int = 0,
    ) -> None:
        limits = limits or Limits()
        if size_bytes_max:
            limits = msgspec.structs.replace(limits, size_bytes_max=size_bytes_max)
        super().__init__(ingest(sink, path=path, limits=limits), host=host, port=port, path=path)


def serve(
    sink: Stream | Sink, *, host: str = "127.0.0.1", port: int = 0, path: str = "/mist", limits: Limits | None = None
) -> HttpServer:
    """A server for `async with`: `POST path` stores into `sink`."""
    return HttpServer(sink, host=host, port=port, path=path, limits=limits)
