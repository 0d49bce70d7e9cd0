"""OTLP out: to our own receiver, to endpoints that are slow, full, wrong or gone."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from conftest import run
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from mist.errors import Ambiguous, InvalidArgument, MistError, TransportError, Unavailable
from mist.kit.retry import RetryPolicy
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TraceSpan
from mist.tools.tokentrace.otlp import send
from mist.tools.tokentrace.otlp.decode import decode_protobuf
from mist.tools.tokentrace.otlp.receive import JSON, PROTOBUF, Receiver
from mist.tools.tokentrace.otlp.send import Sent, endpoint, export
from mist.transport.server import AppServer
from otlp.test_mapping import request
from otlp.test_receive import spans

SOON = RetryPolicy(attempts_max=4, wait_s=0.001, deadline_s=20)
Answer = Callable[[httpx.Request], httpx.Response]


def ours(count: int) -> list[Envelope]:
    return [
        Envelope.new(
            "trace.span", TraceSpan("t", f"s{n}", operation="chat", start_ns=1, end_ns=2, status="ok"), source="svc"
        )
        for n in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("json", [True, False])
def test_what_is_sent_arrives_as_it_was(json: bool, zipped: bool) -> None:
    """Spans that came by OTLP and spans of our own; in batches."""
    came: list[Envelope] = []

    async def sink(envelopes: list[Envelope]) -> Sequence[int] | None:
        came.extend(envelopes)
        return None

    async def body() -> Sent:
        async with AppServer(Receiver(sink)) as server:
            return await export(
                [*ours(1500), *decode_protobuf(spans(2)).envelopes], f"otlp+{server.url}", json=json, zipped=zipped
            )

    assert run(body()) == Sent(spans=1502)
    sent = [*ours(1500), *decode_protobuf(spans(2)).envelopes]
    assert [(e.source, e.decode(TraceSpan)) for e in came] == [(e.source, e.decode(TraceSpan)) for e in sent]
    assert came[-2:] == sent[-2:]


def against(
    answers: Sequence[httpx.Response | Exception], envelopes: list[Envelope], **options: Any
) -> tuple[Sent | MistError, list[httpx.Request]]:
    """Export to an endpoint that answers so, one after another."""
    asked: list[httpx.Request] = []
    left = list(answers)

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def body() -> Sent | MistError:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as client:
            try:
                return await export(envelopes, "otlp+http://there", client=client, policy=SOON, **options)
            except MistError as exc:
                return exc

    return run(body()), asked


OK = httpx.Response(200, headers={"content-type": PROTOBUF})


def test_it_is_repeated_while_that_can_help() -> None:
    """The statuses that OTLP names, a connection that is refused, an answer that is lost."""
    for first in (
        httpx.Response(429), httpx.Response(502), httpx.Response(503, headers={"retry-after": "0"}),
        httpx.Response(504), httpx.ConnectError("refused"), httpx.ReadTimeout("lost"),
    ):  # fmt: skip
        result, asked = against([first, OK], ours(3))
        assert result == Sent(spans=3)
        assert len(asked) == 2
        assert asked[0].content == asked[1].content
        assert len(ExportTraceServiceRequest.FromString(gzip.decompress(asked[0].content)).resource_spans) == 1
        assert str(asked[0].url) == "http://there:4318/v1/traces"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (
            httpx.Response(400, headers={"content-type": PROTOBUF}, content=Status(message="bad").SerializeToString()),
            MistError,
        ),
        (httpx.Response(500, headers={"content-type": JSON}, content=b'{"code":13,"message":"bad"}'), TransportError),
        (httpx.Response(401, text="bad"), MistError),
        (httpx.Response(307, headers={"location": "/x"}, text="bad"), TransportError),
        (httpx.Response(200, headers={"content-type": "text/html"}, text="<p>bad"), TransportError),
        (httpx.Response(200, headers={"content-type": JSON}, text="bad"), TransportError),
    ],
)
def test_it_is_not_repeated_where_it_cannot(answer: httpx.Response, kind: type[MistError]) -> None:
    """The endpoint's words are in the error, and how far it came."""
    result, asked = against([OK, answer], ours(send.BATCH_SPANS + 1))
    assert isinstance(result, kind)
    assert len(asked) == 2
    assert result.meta["spans"] == str(send.BATCH_SPANS)
    if answer.status_code in (400, 401, 500):
        assert "bad" in result.message


def test_the_last_error_is_raised() -> None:
    """When it has been repeated often enough."""
    result, asked = against([httpx.ConnectError("refused")] * 4, ours(1))
    assert isinstance(result, Unavailable)
    assert len(asked) == 4
    result, _ = against([httpx.ReadError("reset")] * 4, ours(1))
    assert isinstance(result, Ambiguous)


def test_what_was_rejected_and_what_cannot_be_sent() -> None:
    """Both are counted with the reason; a batch of nothing is not sent."""
    partial = ExportTraceServiceResponse()
    partial.partial_success.rejected_spans = 2
    partial.partial_success.error_message = "no room"
    answer = httpx.Response(200, headers={"content-type": PROTOBUF}, content=partial.SerializeToString())
    bad = Envelope.new("eval.run", {}, source="s")
    result, _ = against([answer], [*ours(3), bad])
    assert isinstance(result, Sent)
    assert (result.spans, result.rejected, result.refused) == (1, 2, 1)
    assert "eval.run" in result.reasons[0]
    assert result.reasons[1] == "no room"
    said = b'{"partialSuccess":{"rejectedSpans":"1","errorMessage":"no"}}'
    result, _ = against([httpx.Response(200, headers={"content-type": JSON}, content=said)], ours(1), json=True)
    assert result == Sent(spans=0, rejected=1, reasons=["no"])
    result, asked = against([], [bad])
    assert isinstance(result, Sent)
    assert asked == []


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In spans, tested above, and in bytes."""
    monkeypatch.setattr(send, "BATCH_BYTES_MAX", 500)
    _, asked = against([OK] * 10, ours(10))
    assert len(asked) > 1


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("otlp+http://h", "http://h:4318/v1/traces"),
        ("otlp+http://h:80/x?y=1", "http://h:80/x?y=1"),
        ("otlp+https://h/", "https://h/v1/traces"),
        ("otlp+http://[::1]", "http://[::1]:4318/v1/traces"),
    ],
)
def test_endpoints(url: str, target: str) -> None:
    """What is posted to."""
    assert endpoint(url) == target


@pytest.mark.parametrize("url", ["http://h", "otlp+http:", "otlp+http://h:x", "otlp+grpc://h", ""])
def test_no_endpoints(url: str) -> None:
    """Refused before anything is sent."""
    with pytest.raises(InvalidArgument):
        endpoint(url)
    assert request()
