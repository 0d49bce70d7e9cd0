"""Any bytes as an OTLP request in protobuf: refused as one, or envelopes that the codec's own door takes and that go back
to what Google's reader sees in the request."""

from __future__ import annotations

import sys
from typing import Any

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from mist.errors import ProtocolError, TooLarge
from mist.protocol import codec
from mist.tools.tokentrace.otlp.decode import decode_json, decode_protobuf
from mist.tools.tokentrace.otlp.encode import encode_json, request_of
from tests.fuzz.driver import Target, main

SPANS_MAX = 1000


def request(**fields: Any) -> ExportTraceServiceRequest:
    out = ExportTraceServiceRequest()
    group = out.resource_spans.add(schema_url="u")
    group.resource.attributes.add(key="service.name").value.string_value = "svc"
    group.resource.entity_refs.add(type="service", id_keys=["service.name"])
    scope = group.scope_spans.add(schema_url="v")
    scope.scope.name = "s"
    scope.scope.attributes.add(key="a").value.bool_value = True
    span = scope.spans.add(
        **{"trace_id": bytes(range(16)), "span_id": bytes(range(8)), "name": "chat m", "kind": 3,
           "start_time_unix_nano": 10, "end_time_unix_nano": 2**60, **fields}
    )  # fmt: skip
    for key, kind, value in (
        ("gen_ai.operation.name", "string_value", "chat"),
        ("gen_ai.request.model", "string_value", "m"),
        ("gen_ai.usage.input_tokens", "int_value", 7),
        ("model", "string_value", "own"),
        ("otel.kind", "double_value", 0.5),
        ("b", "bytes_value", b"\0\1"),
    ):
        setattr(span.attributes.add(key=key).value, kind, value)
    nested = span.attributes.add(key="n").value.kvlist_value.values.add(key="otel.bytes").value
    nested.array_value.values.add().int_value = -1
    event = span.events.add(name="e", time_unix_nano=5)
    event.attributes.add(key="x").value.string_value = "é"
    span.links.add(trace_id=b"1" * 16, span_id=b"2" * 8, flags=1)
    return out


SEEDS = [
    request().SerializeToString(),
    request(status={"code": 2, "message": "no"}, flags=257, trace_state="a=b").SerializeToString(),
    request(parent_span_id=b"12345678", dropped_events_count=1).SerializeToString(),
    (request().SerializeToString()) * 2,
]
WORDS = [
    b"\x0a\x02\x08\x01",
    b"\x12\x00",
    b"\x7a\x02\x18\x02",
    b"otel.kind",
    b"mist.added",
    b"\xff" * 9 + b"\x01",
    b"\0",
]


def normal(out: ExportTraceServiceRequest) -> list[bytes]:
    """The spans that can be stored, each with its resource and scope, without what OTLP gives no meaning: a key that
    comes twice, fields that are not in the schema, a parent of zeros."""
    found = []
    out.DiscardUnknownFields()
    for group in out.resource_spans:
        for scope in group.scope_spans:
            for span in scope.spans:
                alone = ExportTraceServiceRequest()
                one = alone.resource_spans.add(schema_url=group.schema_url)
                one.resource.CopyFrom(group.resource)
                inner = one.scope_spans.add(schema_url=scope.schema_url)
                inner.scope.CopyFrom(scope.scope)
                kept = inner.spans.add()
                kept.CopyFrom(span)
                if not kept.parent_span_id.strip(b"\0"):
                    kept.parent_span_id = b""
                kept.status.SetInParent()
                for holder in (one.resource, inner.scope, kept, *kept.events, *kept.links):
                    last_of_each(holder.attributes)
                found.append(alone.SerializeToString())
    return found


def payloads(requests: list[bytes]) -> list[bytes]:
    """In an order of their own: spans of one resource are put together on the way back."""
    return sorted(bytes(e.payload) for one in requests for e in decode_protobuf(one).envelopes)


def last_of_each(attributes: Any) -> None:
    known = {pair.key: pair.value for pair in attributes}
    copies = [(key, type(value).FromString(value.SerializeToString())) for key, value in known.items()]
    del attributes[:]
    for key, value in copies:
        attributes.add(key=key).value.CopyFrom(value)


def check(data: bytes) -> bool:
    try:
        decoded = decode_protobuf(data, spans_max=SPANS_MAX)
    except (ProtocolError, TooLarge):
        return False
    try:
        seen = ExportTraceServiceRequest.FromString(data)
    except DecodeError:
        # attributes of spans that were rejected, and of resources without spans, are not looked at
        return False
    total = sum(len(scope.spans) for group in seen.resource_spans for scope in group.scope_spans)
    assert len(decoded.envelopes) + decoded.rejected == total, "every span is stored or counted"
    for env in decoded.envelopes:
        assert codec.decode_foreign(codec.encode(env)) == env, "the codec's door takes it"
    back = request_of(decoded.envelopes)
    if not decoded.rejected and b"mist." not in data and b"strindex" not in data:
        assert payloads(normal(back)) == payloads(normal(seen)), "the way back is the same spans"
    again = decode_json(encode_json(back))
    assert sorted(e.id for e in again.envelopes) == sorted(e.id for e in decoded.envelopes)
    return bool(decoded.envelopes)


TARGET = Target("otlp", SEEDS, WORDS, check)

if __name__ == "__main__":
    sys.exit(main(["otlp"]))
