"""OTLP over HTTP: `POST /v1/traces`, protobuf and JSON, as an ASGI app.

    app = Receiver(span_sink(stream))

Promises: 200 only after the sink has stored every span that can be one, with an ExportTraceServiceResponse in the encoding
of the request; spans that cannot are counted in `partial_success`, with the reasons. The same span sent again makes the
same envelope id, so that a stream keeps it once within its window. Refusals are a google.rpc.Status in that encoding: 400
for what is no request, 413 and 415, 429 and 503 with Retry-After where coming back helps; exporters repeat 429, 502,
503 and 504 and nothing else, so every failure that passes is one of these. Body limits are those of `POST /mist`.

Does not: authenticate, store metrics or logs (404, with a sentence that says so).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache

import msgspec

from mist.broker.base import Message, Stream
from mist.errors import CODES, Internal, InvalidArgument, MistError, NotFound
from mist.kit.server import Receive, Scope, Send
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.tools.tokentrace.otlp import wire
from mist.tools.tokentrace.otlp.decode import Decoded, decode_json, decode_protobuf
from mist.tools.tokentrace.publish import subject_of
from mist.transport.body import Answer, Gone, Intake, Limits
from mist.transport.server import Sink

_log = logging.getLogger("mist.tools.tokentrace.otlp")

PATH = "/v1/traces"
OTHERS = ("/v1/metrics", "/v1/logs")
PROTOBUF, JSON = "application/x-protobuf", "application/json"
THREAD_BYTES = 256 * 1024
"""A larger body is decoded in a thread, so that the event loop goes on answering."""

Decode = Callable[[bytes], Decoded]
_Headers = list[tuple[bytes, bytes]]

RPC_CODES = {
    "OK": 0, "CANCELLED": 1, "UNKNOWN": 2, "INVALID_ARGUMENT": 3, "DEADLINE_EXCEEDED": 4, "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6, "PERMISSION_DENIED": 7, "RESOURCE_EXHAUSTED": 8, "FAILED_PRECONDITION": 9, "ABORTED": 10,
    "OUT_OF_RANGE": 11, "UNIMPLEMENTED": 12, "INTERNAL": 13, "UNAVAILABLE": 14, "DATA_LOSS": 15, "UNAUTHENTICATED": 16,
}  # fmt: skip
"""google.rpc.Code, the numbers of gRPC's status codes."""


def span_sink(stream: Stream) -> Sink:
    """Appends to the stream: subject `trace.span.<source>`, id = envelope id."""
    subject = lru_cache(maxsize=1024)(subject_of)

    async def store(envelopes: list[Envelope]) -> Sequence[int]:
        return await stream.append([Message(subject(e.type, e.source), encode(e), e.id) for e in envelopes])

    return store


def passes(error: MistError) -> bool:
    """Whether sending the same again later can help."""
    return error.retryable or error.code == "closed"  # closed: the one that comes after us will take it


class Store:
    """One decoded request into the sink: what the doors for HTTP and gRPC share. `accepted` and `rejected` count."""

    def __init__(self, sink: Sink, limits: Limits) -> None:
        self._sink = sink
        self._protobuf: Decode = lambda body: decode_protobuf(
            body, size_bytes_max=limits.size_bytes_max, spans_max=limits.envelopes_max
        )
        self._json: Decode = lambda body: decode_json(
            body, size_bytes_max=limits.size_bytes_max, spans_max=limits.envelopes_max
        )
        self.accepted = 0
        self.rejected = 0

    def facts(self) -> dict[str, int]:
        return {"accepted": self.accepted, "rejected": self.rejected}

    async def __call__(self, body: bytes, *, json: bool = False) -> Decoded:
        """Returns when all that can be stored is stored."""
        decode = self._json if json else self._protobuf
        decoded = decode(body) if len(body) < THREAD_BYTES else await asyncio.to_thread(decode, body)
        if decoded.envelopes:
            await self._sink(decoded.envelopes)
        self.accepted += len(decoded.envelopes)
        self.rejected += decoded.rejected
        return decoded


class Receiver:
    """The ASGI app. `sink` returns when the envelopes are stored (`span_sink` for a stream); `store` counts."""

    def __init__(self, sink: Sink, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._intake = Intake(self._limits)
        self.store = Store(sink, self._limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise Internal(f"a {scope['type']} connection reached an app that speaks HTTP only")
        headers = {bytes(k).lower(): bytes(v) for k, v in scope["headers"]}
        content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
        encoding = PROTOBUF if content_type == PROTOBUF else JSON
        extra: _Headers = []
        try:
            status, body = 200, await self._answer(scope, headers, content_type, receive)
        except Gone:
            return
        except Answer as exc:
            status, body, extra = exc.status, refusal(exc.error, encoding), [*exc.headers]
        except MistError as exc:
            status, body, extra = self._refuse(exc, encoding)
        except Exception as exc:
            _log.exception("the sink of POST %s failed", PATH)
            status, body = 500, refusal(Internal(f"the server failed: {type(exc).__name__}"), encoding)
        extra += [(b"content-type", encoding.encode()), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": extra})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, headers: dict[bytes, bytes], content_type: str, receive: Receive) -> bytes:
        path = scope["path"]
        if path in OTHERS:
            raise NotFound(f"MIST stores traces: {' and '.join(OTHERS)} are not served", hint=f"POST {PATH}")
        if path != PATH:
            raise NotFound(f"nothing is served at {path}", hint=f"POST {PATH}")
        if scope["method"] != "POST":
            error = InvalidArgument(f"{scope['method']} is not served at {PATH}", hint="POST")
            raise Answer(405, error, ((b"allow", b"POST"),))
        if content_type not in (PROTOBUF, JSON):
            error = InvalidArgument(f"content-type {content_type!r} is not read here", hint=f"{PROTOBUF} or {JSON}")
            raise Answer(415, error)
        with self._intake.request() as request:
            body = await request.read(headers, receive)
            decoded = await self.store(body, json=content_type == JSON)
        return response(decoded, content_type)

    def _refuse(self, error: MistError, encoding: str) -> tuple[int, bytes, _Headers]:
        status = error.http_status
        headers: _Headers = []
        if passes(error) and status not in (429, 502, 503, 504):
            status = 503
        if status in (429, 503):
            wait = error.retry_after_s if error.retry_after_s is not None else self._limits.retry_after_s
            headers.append((b"retry-after", b"%d" % max(1, round(wait))))
        if status in (413, 503):
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        return status, refusal(error, encoding), headers


def response(decoded: Decoded, encoding: str = PROTOBUF) -> bytes:
    """An ExportTraceServiceResponse; empty where nothing was rejected."""
    if encoding == JSON:
        partial = {"rejectedSpans": str(decoded.rejected), "errorMessage": decoded.message}
        return msgspec.json.encode({"partialSuccess": partial} if decoded.rejected else {})
    out = wire.service.ExportTraceServiceResponse()
    if decoded.rejected:
        out.partial_success.rejected_spans = decoded.rejected
        out.partial_success.error_message = decoded.message
    data: bytes = out.SerializeToString()
    return data


def refusal(error: MistError, encoding: str) -> bytes:
    """A google.rpc.Status."""
    code = RPC_CODES[CODES[error.code].grpc]
    if encoding == JSON:
        return msgspec.json.encode({"code": code, "message": str(error)})
    return wire.status(code, str(error))
