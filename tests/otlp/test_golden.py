"""Requests that real exporters for JSON made, recorded: the way in is tested where the packages are not.

`js-…` was sent by exporter.cjs through @opentelemetry/exporter-trace-otlp-http 0.223.1 with sdk-trace-node 2.12.0 on Node 20, and
`python-…` by test_exporters.a_conversation through opentelemetry-exporter-otlp-json-http 0.66b1 with sdk 1.45.2. Only the
folders in the stack traces were renamed.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from mist.protocol.payloads import TraceSpan
from mist.tools.tokentrace.otlp.decode import decode_json, decode_protobuf
from mist.tools.tokentrace.otlp.encode import request_of
from mist.tools.tokentrace.otlp.receive import JSON, Receiver
from otlp.test_receive import ask, nowhere

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))
OURS = {
    "model": "gpt-4-0613", "provider": "openai", "tokens_in": 374, "tokens_out": 44, "cost_usd": 0.01386,
    "finish_reason": "stop", "otel.name": "chat gpt-4", "otel.kind": "client", "gen_ai.request.temperature": 0.5,
    "resource.service.name": "chat-api", "resource.deployment.zones": ["a", "b"],
    "otel.scope.name": "test.instrumentation", "otel.scope.version": "1.2",
}  # fmt: skip


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_a_recorded_request_means_what_was_sent(path: Path) -> None:
    """Three spans: model, tokens, cost, failure, parents; and the app answers as it should."""
    decoded = decode_json(path.read_bytes())
    assert decoded.rejected == 0
    good, failed, agent = (e.decode(TraceSpan) for e in decoded.envelopes)
    assert {e.source for e in decoded.envelopes} == {"chat-api"}
    assert (agent.operation, agent.parent_id, agent.status) == ("invoke_agent", "", "ok")
    assert (good.parent_id, failed.parent_id) == (agent.span_id, agent.span_id)
    assert good.trace_id == failed.trace_id == agent.trace_id
    assert OURS.items() <= good.attrs.items()
    assert good.attrs["otel.events"][0]["name"] == "gen_ai.choice"
    assert good.attrs["otel.events"][0]["attributes"] == {"index": 0}
    assert failed.status == "error"
    assert failed.attrs["error"] == failed.attrs["otel.status_description"]
    assert failed.attrs["error"].endswith("no answer")
    assert failed.attrs["otel.events"][0]["attributes"]["exception.message"] == "no answer"
    assert 0 < good.end_ns - good.start_ns < 10**9
    headers = {"Content-Type": JSON}
    assert ask(Receiver(nowhere), path.read_bytes(), **headers)[::2] == (200, b"{}")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_in_protobuf_it_is_the_same(path: Path) -> None:
    """Google's own reader of JSON agrees with ours, once the ids are what it expects; and back it is what it was."""
    plain = msgspec.json.decode(path.read_bytes())
    for group in plain["resourceSpans"]:
        for scope in group["scopeSpans"]:
            for span in scope["spans"]:
                to_base64(span)
    message = json_format.ParseDict(plain, ExportTraceServiceRequest())
    decoded = decode_protobuf(message.SerializeToString())
    assert decoded.envelopes == decode_json(path.read_bytes()).envelopes
    for found in (message, back := request_of(decoded.envelopes)):
        for span in found.resource_spans[0].scope_spans[0].spans:
            span.status.SetInParent()
    assert back == message


def to_base64(span: dict[str, Any]) -> None:
    for key in ("traceId", "spanId", "parentSpanId"):
        if key in span:
            span[key] = base64.b64encode(bytes.fromhex(span[key])).decode()
