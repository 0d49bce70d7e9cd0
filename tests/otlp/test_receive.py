"""`POST /v1/traces`: encodings, answers, refusals, limits; over a real server and over the bare app."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import msgspec
import pytest
from conftest import run
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

import mist
from mist.broker.base import Stream
from mist.errors import (
    Ambiguous,
    Closed,
    Internal,
    Locked,
    MistError,
    Overloaded,
    PartialAppend,
    RateLimited,
    Refused,
    StorageFull,
    TimedOut,
    TooLarge,
    Unavailable,
)
from mist.protocol.codec import decode
from mist.protocol.envelope import Envelope
from mist.tools.tokentrace.otlp import receive
from mist.tools.tokentrace.otlp.receive import JSON, PROTOBUF, Receiver, span_sink
from mist.transport.server import AppServer, Limits
from otlp.test_mapping import SPAN, TRACE, encode_like_an_exporter, request

Post = Callable[..., Awaitable[httpx.Response]]


def spans(count: int, service: str = "chat-api") -> bytes:
    """So many, each with an id of its own."""
    out = ExportTraceServiceRequest()
    for n in range(1, count + 1):
        out.MergeFrom(ExportTraceServiceRequest.FromString(request(service=service, span_id=n.to_bytes(8, "big"))))
    return out.SerializeToString()


def served(work: Callable[[Post, Stream, Receiver], Awaitable[None]], limits: Limits | None = None) -> None:
    """Run against the app on a real server over a stream in memory."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            app = Receiver(span_sink(stream), limits)
            async with AppServer(app) as server, httpx.AsyncClient(trust_env=False) as client:

                async def post(
                    data: bytes, kind: str = PROTOBUF, path: str = "/v1/traces", **headers: str
                ) -> httpx.Response:
                    sent = {"content-type": kind, **{k.replace("_", "-"): v for k, v in headers.items()}}
                    return await client.post(server.url + path, content=data, headers=sent)

                await work(post, stream, app)

    run(body())


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", [PROTOBUF, JSON])
def test_stored_before_the_answer(kind: str, zipped: bool) -> None:
    """The answer is the response message in the request's encoding; the records lie under the service's subject."""

    async def work(post: Post, stream: Stream, app: Receiver) -> None:
        data = spans(3)
        if kind == JSON:
            data = encode_like_an_exporter(ExportTraceServiceRequest.FromString(data))
        if zipped:
            answer = await post(gzip.compress(data), kind, content_encoding="gzip")
        else:
            answer = await post(data, kind + "; charset=utf-8")
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        assert answer.content == (b"" if kind == PROTOBUF else b"{}")
        page = await stream.read()
        assert [r.subject for r in page.records] == ["trace.span.chat-api"] * 3
        assert [r.id for r in page.records] == [f"{TRACE.hex()}-{n:016x}" for n in (1, 2, 3)]
        assert decode(page.records[0].data).source == "chat-api"
        assert app.store.facts() == {"accepted": 3, "rejected": 0}

    served(work)


def test_sent_again_it_is_stored_once() -> None:
    """Also in the other encoding."""

    async def work(post: Post, stream: Stream, app: Receiver) -> None:
        data = spans(5)
        for _ in range(2):
            assert (await post(data)).status_code == 200
        assert (
            await post(encode_like_an_exporter(ExportTraceServiceRequest.FromString(data)), JSON)
        ).status_code == 200
        assert (await stream.info()).records == 5

    served(work)


def test_some_rejected() -> None:
    """Their number and the reasons are in the answer, in either encoding; the others are stored."""

    async def work(post: Post, stream: Stream, app: Receiver) -> None:
        out = ExportTraceServiceRequest.FromString(spans(2))
        out.MergeFrom(ExportTraceServiceRequest.FromString(request(span_id=b"")))
        answer = await post(out.SerializeToString())
        partial = ExportTraceServiceResponse.FromString(answer.content).partial_success
        assert (answer.status_code, partial.rejected_spans) == (200, 1)
        assert partial.error_message == "1 of 3 spans were not stored (1: span_id is not 8 bytes that are not all zero)"
        answer = await post(encode_like_an_exporter(out), JSON)
        assert answer.json() == {"partialSuccess": {"rejectedSpans": "1", "errorMessage": partial.error_message}}
        assert (await stream.info()).records == 2
        assert app.store.facts() == {"accepted": 4, "rejected": 2}

    served(work)


def test_nothing_is_a_request_too() -> None:
    """An exporter may send an empty one."""

    async def work(post: Post, stream: Stream, app: Receiver) -> None:
        assert (await post(b"")).status_code == 200
        assert (await post(b"{}", JSON)).json() == {}

    served(work)


def test_what_is_refused() -> None:
    """With a Status in the encoding of the request, and a sentence."""

    async def work(post: Post, stream: Stream, app: Receiver) -> None:
        bad = await post(b"\xff\xff")
        status = Status.FromString(bad.content)
        assert (bad.status_code, bad.headers["content-type"], status.code) == (400, PROTOBUF, 3)
        assert "ExportTraceServiceRequest" in status.message
        bad = await post(b"[1]", JSON)
        assert (bad.status_code, bad.headers["content-type"], bad.json()["code"]) == (400, JSON, 3)
        assert (await post(b"not gzip", content_encoding="gzip")).status_code == 400
        assert (await post(b"", content_encoding="br")).status_code == 415
        assert (await post(b"", "text/plain")).status_code == 415
        for path in ("/v1/metrics", "/v1/logs"):
            answer = await post(b"", path=path)
            assert answer.status_code == 404
            assert "MIST stores traces" in Status.FromString(answer.content).message
        assert (await post(b"", path="/")).status_code == 404
        # a body a byte too large is refused, one that inflates to a huge one too
        assert (await post(b"x" * 4097)).status_code == 413
        assert (await post(gzip.compress(bytes(4000)), content_encoding="gzip")).status_code == 400
        assert (await post(gzip.compress(bytes(4097)), content_encoding="gzip")).status_code == 413
        many = await post(spans(11))
        assert (many.status_code, "spans" in Status.FromString(many.content).message) == (413, True)
        assert (await stream.info()).records == 0

    served(work, Limits(body_bytes_max=4096, envelopes_max=10))


def test_a_get_is_told_what_to_do() -> None:
    """405 with Allow."""

    async def body() -> None:
        async with AppServer(Receiver(nowhere)) as server, httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(server.url + "/v1/traces")
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")

    run(body())


async def nowhere(envelopes: list[Envelope]) -> Sequence[int] | None:
    return None


def ask(app: Receiver, data: bytes, **headers: str) -> tuple[int, dict[bytes, bytes], bytes]:
    """One request to the bare app."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(event: Any) -> None:
        sent.append(event)

    pairs = [(k.encode(), v.encode()) for k, v in {"Content-Type": PROTOBUF, **headers}.items()]
    scope = {"type": "http", "path": "/v1/traces", "method": "POST", "headers": pairs}
    run(app(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


def failing(error: Exception) -> Receiver:
    async def sink(envelopes: list[Envelope]) -> None:
        raise error

    return Receiver(sink)


@pytest.mark.parametrize(
    ("error", "status", "after"),
    [
        (Unavailable("x"), 503, b"1"),
        (Overloaded("x", retry_after_s=7), 503, b"7"),
        (StorageFull("x"), 503, b"1"),
        (Closed("x"), 503, b"1"),
        (Locked("x"), 503, b"1"),
        (PartialAppend([1], total=2), 503, b"1"),
        (RateLimited("x", retry_after_s=2.4), 429, b"2"),
        (Ambiguous("x"), 504, None),
        (TimedOut("x"), 504, None),
        (Refused("x"), 403, None),
        (TooLarge("x", size_bytes=2, size_bytes_max=1), 413, None),
        (Internal("x"), 500, None),
        (ZeroDivisionError(), 500, None),
    ],
)
def test_what_passes_is_a_status_that_exporters_repeat(error: Exception, status: int, after: bytes | None) -> None:
    """429, 502, 503 and 504 and no other; what does not pass is none of these."""
    found, headers, body = ask(failing(error), request())
    assert (found, headers.get(b"retry-after")) == (status, after)
    assert Status.FromString(body).message
    if isinstance(error, MistError) and receive.passes(error):
        assert found in (429, 502, 503, 504)


def test_a_large_body_is_decoded_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on; the answer is the same."""
    threads: list[Any] = []
    real = asyncio.to_thread

    async def spied(work: Any, *args: Any) -> Any:
        threads.append(work)
        return await real(work, *args)

    monkeypatch.setattr(receive, "THREAD_BYTES", 100)
    monkeypatch.setattr(asyncio, "to_thread", spied)
    assert ask(Receiver(nowhere), spans(10))[0] == 200
    assert len(threads) == 1
    assert ask(Receiver(nowhere), b"")[0] == 200
    assert len(threads) == 1


def test_too_many_under_way() -> None:
    """503 with Retry-After, and the door opens again when they are done."""

    async def work(post: Post, stream: Stream, app: Receiver) -> None:
        big = await post(b"x" * 300)
        assert (big.status_code, big.headers["retry-after"]) == (503, "1")
        assert (await post(spans(1))).status_code == 200

    served(work, Limits(inflight_bytes_max=200))


def test_a_websocket_is_no_request() -> None:
    """Whoever mounts it wrongly hears of it."""
    with pytest.raises(Internal):
        run(Receiver(nowhere)({"type": "websocket"}, None, None))  # type: ignore[arg-type]


def test_a_service_with_any_name_has_a_subject() -> None:
    """Encoded; left out when it is too long for one."""

    async def work(post: Post, stream: Stream, app: Receiver) -> None:
        for n, service in enumerate(["a.b c*", "ü" * 100, "", "x" * 300]):
            out = ExportTraceServiceRequest.FromString(request(service=service, span_id=bytes([n] * 7 + [9])))
            assert (await post(out.SerializeToString())).status_code == 200
        records = (await stream.read()).records
        assert [r.subject for r in records] == [
            "trace.span.a=2Eb=20c=2A", "trace.span", "trace.span.unknown_service", f"trace.span.{'x' * 128}",
        ]  # fmt: skip
        assert [decode(r.data).source for r in records] == ["a.b c*", "ü" * 100, "unknown_service", "x" * 128]

    served(work)


def test_an_answer_is_json_for_json() -> None:
    """The response message by OTLP's rules: 64-bit numbers are text."""
    assert msgspec.json.decode(receive.refusal(Unavailable("later"), JSON)) == {"code": 14, "message": "later"}
    assert SPAN
