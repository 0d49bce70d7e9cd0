"""Serves `POST /mist`: the door of a stream, or of any function, for envelopes over HTTP.

    async with serve(stream, port=8081) as server: ...

Promises: 202 only after the sink has stored the envelopes where it promises to: for a stream, its durability. One
envelope is answered with an empty body, as the Go library does (its sequence is in the header `Mist-Sequence`); NDJSON
and JSON arrays with `{"accepted":n,"first":…,"last":…}`. A sink that answers (`Replies`) makes it 200: one reply to one
envelope as JSON, otherwise a line each. All of a request or nothing: every line is read and checked
before the sink sees any. Refusals are the flat error JSON `{"code","message","meta","cause"}`: 400 naming the line, 413
for what is too large (said before the body is read where the length is stated), 405 with Allow, 404 elsewhere, 415 for
an encoding we do not read, 408 for a body that does not come, 503 with Retry-After while too many bytes or requests
are under way or the sink is full. Closing finishes the requests under way.

Does not: authenticate, terminate TLS for the world, route. That is the gateway. `ingest` is a bare ASGI app, no
framework; `HttpServer` runs it on uvicorn (the extra `server`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

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
from mist.kit.server import App, AppServer, Receive, Scope, Send
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from mist.protocol.subject import subject_for
from mist.transport._lines import encode_lines
from mist.transport.body import Answer, Gone, Intake
from mist.transport.body import Limits as Limits

_log = logging.getLogger("mist.transport.server")


class Replies(Struct, frozen=True):
    """What a sink that answers gives back instead of sequences."""

    envelopes: list[Envelope]


Sink = Callable[[list[Envelope]], Awaitable[Sequence[int] | Replies | None]]
"""Stores envelopes; returns when that is done, with their sequences where it has any. Or answers them."""

_NDJSON = (codec.NDJSON, "application/jsonl", "application/ndjson", "application/jsonlines")
_INT_SAFE = 2**53


def stream_sink(stream: Stream) -> Callable[[list[Envelope]], Awaitable[Sequence[int]]]:
    """Appends to the stream: subject = type, id = envelope id."""

    async def store(envelopes: list[Envelope]) -> Sequence[int]:
        return await stream.append([to_message(e) for e in envelopes])

    return store


def to_message(envelope: Envelope) -> Message:
    return Message(subject_for(envelope.type), codec.encode(envelope), envelope.id)


def ingest(
    sink: Stream | Sink,
    *,
    path: str = "/mist",
    limits: Limits | None = None,
    reply: Callable[[Envelope], Envelope | None] | None = None,
) -> App:
    """The ASGI app. `sink` is a stream or a coroutine function over a list of envelopes.

    An envelope that comes alone and that `reply` has an answer for (a `health.ping`) is answered with 200 and that
    envelope, and is not stored.
    """
    store = stream_sink(sink) if isinstance(sink, Stream) else sink
    return _Ingest(store, path, limits or Limits(), reply)


class _Ingest:
    def __init__(
        self, store: Sink, path: str, limits: Limits, reply: Callable[[Envelope], Envelope | None] | None
    ) -> None:
        self._store = store
        self._reply = reply
        self._path = path
        self._limits = limits
        self._intake = Intake(limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise Internal(f"a {scope['type']} connection reached an app that speaks HTTP only")
        try:
            status, body, headers = await self._answer(scope, receive)
        except Gone:
            return
        except Answer as exc:
            status, body, headers = exc.status, msgspec.json.encode(exc.error.to_wire()), [_TYPE, *exc.headers]
        except MistError as exc:
            status, body, headers = self._refuse(exc)
        except Exception as exc:
            _log.exception("the sink of POST %s failed", self._path)
            wire = Internal(f"the server failed: {type(exc).__name__}").to_wire()
            status, body, headers = 500, msgspec.json.encode(wire), [_TYPE]
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, bytes, _Headers]:
        if scope["path"] != self._path:
            raise NotFound(f"nothing is served at {scope['path']}", hint=f"POST {self._path}")
        if scope["method"] != "POST":
            error = InvalidArgument(f"{scope['method']} is not served at {self._path}", hint="POST")
            raise Answer(405, error, ((b"allow", b"POST"),))
        headers = {bytes(k).lower(): bytes(v) for k, v in scope["headers"]}
        content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
        with self._intake.request() as request:
            body = await request.read(headers, receive)
            envelopes, single = _parse(body, content_type, self._limits)
            if not envelopes:
                return 202, b'{"accepted":0}', [_TYPE]
            if single and self._reply is not None and (answer_envelope := self._reply(envelopes[0])) is not None:
                return 200, codec.encode(answer_envelope), [_TYPE]
            sequences = await self._store(envelopes)
        if isinstance(sequences, Replies):
            if sequences.envelopes:
                return _reply(sequences.envelopes, single)
            sequences = None
        if single:
            return 202, b"", [(b"mist-sequence", b"%d" % sequences[0])] if sequences else []
        answer: dict[str, Any] = {"accepted": len(envelopes)}
        if sequences:
            answer["first"] = _json_int(sequences[0])
            answer["last"] = _json_int(sequences[-1])
        return 202, msgspec.json.encode(answer), [_TYPE]

    def _refuse(self, error: MistError) -> tuple[int, bytes, _Headers]:
        status = error.http_status
        headers: _Headers = [_TYPE]
        if error.code in ("storage_full", "closed"):
            status = 503  # what the seed's senders know as "full, come back": the code in the body says which
        if status in (429, 503):
            wait = error.retry_after_s if error.retry_after_s is not None else self._limits.retry_after_s
            headers.append((b"retry-after", b"%d" % max(1, round(wait))))
        if status in (413, 503):
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        return status, msgspec.json.encode(error.to_wire()), headers


_Headers = list[tuple[bytes, bytes]]
_TYPE = (b"content-type", b"application/json")


def _reply(replies: list[Envelope], single: bool) -> tuple[int, bytes, _Headers]:
    if single and len(replies) == 1:
        return 200, codec.encode(replies[0]), [_TYPE]
    return 200, encode_lines(replies).data, [(b"content-type", codec.NDJSON.encode())]


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        event = await receive()
        await send({"type": event["type"] + ".complete"})
        if event["type"] == "lifespan.shutdown":
            return


def _json_int(sequence: int) -> int | str:
    return sequence if sequence <= _INT_SAFE else str(sequence)


def _parse(body: bytes, content_type: str, limits: Limits) -> tuple[list[Envelope], bool]:
    """The envelopes of a body, and whether it was a single one. Raises the first error, naming the line."""
    if content_type in _NDJSON:
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
            raise _at(exc, "line", number) from None
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
            raise _at(exc, "item", number) from None
    return out


def _at(error: MistError, what: str, number: int) -> MistError:
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
