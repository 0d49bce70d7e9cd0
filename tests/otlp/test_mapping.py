"""OTLP to `trace.span` and back: the table of docs/reference/otlp.md, and nothing lost for any span."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from mist.errors import InvalidArgument, Malformed, ProtocolError, TooLarge
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TraceSpan
from mist.tools.tokentrace.otlp import genai, names
from mist.tools.tokentrace.otlp.decode import decode_json, decode_protobuf
from mist.tools.tokentrace.otlp.encode import encode_json, encode_protobuf, request_of

TRACE, SPAN, PARENT = bytes(range(1, 17)), bytes(range(1, 9)), bytes(range(2, 10))

EXAMPLES = int(os.environ.get("MIST_EXAMPLES", "50"))


def request(attributes: dict[str, Any] | None = None, *, service: str | None = "chat-api", **fields: Any) -> bytes:
    """A request of one span."""
    out = ExportTraceServiceRequest()
    group = out.resource_spans.add()
    if service is not None:
        group.resource.attributes.add(key="service.name").value.string_value = service
    span = group.scope_spans.add().spans.add(
        **{"trace_id": TRACE, "span_id": SPAN, "name": "chat gpt-4", "start_time_unix_nano": 10,
           "end_time_unix_nano": 30, **fields}
    )  # fmt: skip
    for key, value in (attributes or {}).items():
        put(span.attributes.add(key=key).value, value)
    return out.SerializeToString()


def put(out: AnyValue, value: Any) -> None:
    if isinstance(value, AnyValue):
        out.CopyFrom(value)
    elif isinstance(value, list):
        out.array_value.SetInParent()
        for item in value:
            put(out.array_value.values.add(), item)
    else:
        kind = {str: "string", bool: "bool", int: "int", float: "double", bytes: "bytes"}[type(value)]
        setattr(out, f"{kind}_value", value)


def one(body: bytes) -> Envelope:
    decoded = decode_protobuf(body)
    assert decoded.rejected == 0, decoded.message
    (envelope,) = decoded.envelopes
    return envelope


def attrs(body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = one(body).data().get("attrs", {})
    return found


def back(envelopes: list[Envelope]) -> ExportTraceServiceRequest:
    return ExportTraceServiceRequest.FromString(encode_protobuf(request_of(envelopes)))


def test_a_chat_span_becomes_the_payload_of_the_seed() -> None:
    """Our columns are there, and all that came is there under its own name."""
    came = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4",
        "gen_ai.response.model": "gpt-4-0613",
        "gen_ai.usage.input_tokens": 374,
        "gen_ai.usage.output_tokens": 44,
        "gen_ai.usage.cost": 0.01386,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.time_to_first_chunk": 0.25,
        "user.id": "u-1",
        "mine": 1.0,
    }
    env = one(request(came, parent_span_id=PARENT, kind=3))
    assert (env.source, env.type, env.id) == ("chat-api", "trace.span", f"{TRACE.hex()}-{SPAN.hex()}")
    span = env.decode(TraceSpan)
    assert (span.trace_id, span.span_id, span.parent_id) == (TRACE.hex(), SPAN.hex(), PARENT.hex())
    assert (span.operation, span.start_ns, span.end_ns, span.status) == ("chat", 10, 30, "ok")
    assert span.attrs == {
        **came,
        "model": "gpt-4-0613", "provider": "openai", "tokens_in": 374, "tokens_out": 44, "cost_usd": 0.01386,
        "finish_reason": "stop", "ttft_ms": 250.0, "user": "u-1",
        "otel.name": "chat gpt-4", "otel.kind": "client", "resource.service.name": "chat-api",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("came", "ours"),
    [
        ({"gen_ai.system": "anthropic"}, {"provider": "anthropic"}),
        ({"gen_ai.system": "az.ai.openai", "gen_ai.provider.name": "azure.ai.openai"}, {"provider": "azure.ai.openai"}),
        ({"gen_ai.provider.name": "azure.ai.openai", "gen_ai.system": "az.ai.openai"}, {"provider": "azure.ai.openai"}),
        ({"gen_ai.usage.prompt_tokens": 5, "gen_ai.usage.completion_tokens": 6}, {"tokens_in": 5, "tokens_out": 6}),
        ({"llm.token_count.prompt": 5, "llm.token_count.completion": 6.0}, {"tokens_in": 5, "tokens_out": 6}),
        ({"llm.model_name": "m", "llm.provider": "p", "llm.cost.total": 0.5},
         {"model": "m", "provider": "p", "cost_usd": 0.5}),
        ({"llm.usage.prompt_tokens": 5, "llm.request.model": "m", "llm.vendor": "v"},
         {"tokens_in": 5, "model": "m", "provider": "v"}),
        ({"gen_ai.request.model": "asked"}, {"model": "asked"}),
        ({"enduser.id": "e"}, {"user": "e"}),
        ({"error.type": "timeout"}, {"error": "timeout"}),
        ({"gen_ai.response.finish_reasons": ["stop", "length"]}, {"finish_reason": "stop,length"}),
        ({"gen_ai.usage.input_tokens": -1, "gen_ai.usage.output_tokens": "7", "gen_ai.request.model": ""}, {}),
        ({"gen_ai.usage.input_tokens": True, "gen_ai.usage.cost": math.nan, "gen_ai.response.model": 4}, {}),
        ({"gen_ai.usage.input_tokens": 1.5, "gen_ai.usage.cost": -0.1, "gen_ai.response.finish_reasons": []}, {}),
    ],
)  # fmt: skip
def test_names_of_then_and_of_others(came: dict[str, Any], ours: dict[str, Any]) -> None:
    """A column is filled from what can be right, the current name first; what cannot be right fills nothing."""
    found = attrs(request(came))
    assert {name: found[name] for name in found if name in genai.COLUMNS} == ours


def test_an_attribute_under_our_own_name_is_left_as_it_is() -> None:
    """And known for one on the way back."""
    body = request({"gen_ai.request.model": "a", "model": "b", "error": True})
    found = attrs(body)
    assert (found["model"], found["error"], found["otel.own"]) == ("b", True, ["model", "error"])
    assert back([one(body)]) == ExportTraceServiceRequest.FromString(body)


def test_the_reason_of_a_failure() -> None:
    """error.type, else the text of the status."""
    failed = {"code": 2, "message": "HTTP 500"}
    env = one(request({}, status=failed))
    assert env.data()["status"] == "error"
    assert env.data()["attrs"]["error"] == env.data()["attrs"]["otel.status_description"] == "HTTP 500"
    assert attrs(request({"error.type": "timeout"}, status=failed))["error"] == "timeout"
    assert one(request({}, status={"code": 1})).data()["attrs"]["otel.status_code"] == "OK"


def test_values_that_json_cannot_say_have_a_form() -> None:
    """Bytes, doubles that are not finite, maps with a key twice; a double stays a double."""
    twice = AnyValue()
    for n in (1, 2):
        twice.kvlist_value.values.add(key="k").value.int_value = n
    found = attrs(request({"b": b"\x00\xff", "n": math.nan, "i": -math.inf, "d": 1.0, "m": twice, "none": AnyValue()}))
    assert found["b"] == {"otel.bytes": "AP8="}
    assert (found["n"], found["i"]) == ({"otel.double": "NaN"}, {"otel.double": "-Infinity"})
    assert found["m"] == {"otel.kvlist": [["k", 1], ["k", 2]]}
    assert isinstance(found["d"], float)
    assert found["none"] is None


def test_a_key_that_comes_twice_keeps_its_last_value() -> None:
    """OTLP forbids it; what is stored stays one JSON object."""
    out = ExportTraceServiceRequest.FromString(request({"a": 1}))
    out.resource_spans[0].scope_spans[0].spans[0].attributes.add(key="a").value.int_value = 2
    assert attrs(out.SerializeToString())["a"] == 2


def test_attributes_that_look_like_our_names_are_moved_aside() -> None:
    """They come back as they were."""
    body = request({"otel.kind": "x", "resource.name": "GET /", "otel.attr.y": 1}, kind=2)
    found = attrs(body)
    assert found["otel.attr.otel.kind"] == "x"
    assert (found["otel.kind"], found["otel.attr.resource.name"]) == ("server", "GET /")
    assert back([one(body)]) == ExportTraceServiceRequest.FromString(body)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"trace_id": b""}, "trace_id"),
        ({"trace_id": bytes(16)}, "trace_id"),
        ({"trace_id": b"123"}, "trace_id"),
        ({"span_id": b""}, "span_id"),
        ({"span_id": bytes(8)}, "span_id"),
        ({"span_id": bytes(9)}, "span_id"),
        ({"parent_span_id": b"1"}, "parent_span_id"),
        ({"start_time_unix_nano": 2**63}, "time"),
        ({"end_time_unix_nano": 2**64 - 1}, "time"),
    ],
)
def test_a_span_that_cannot_be_stored_is_rejected_with_the_reason(fields: dict[str, Any], reason: str) -> None:
    """The others of the request are not."""
    out = ExportTraceServiceRequest.FromString(request())
    out.MergeFrom(ExportTraceServiceRequest.FromString(request(**fields)))
    decoded = decode_protobuf(out.SerializeToString())
    assert (len(decoded.envelopes), decoded.rejected) == (1, 1)
    assert reason in decoded.message
    assert decode_json(encode_like_an_exporter(out)).message == decoded.message


def encode_like_an_exporter(out: ExportTraceServiceRequest) -> bytes:
    """OTLP's JSON without our encoder: protobuf's, ids turned into hex."""
    from google.protobuf import json_format

    plain = json_format.MessageToDict(out, use_integers_for_enums=True)
    for group, found in zip(plain.get("resourceSpans", []), out.resource_spans, strict=True):
        for scope, found_scope in zip(group.get("scopeSpans", []), found.scope_spans, strict=True):
            for span, real in zip(scope.get("spans", []), found_scope.spans, strict=True):
                ids(span, real)
                for link, real_link in zip(span.get("links", []), real.links, strict=True):
                    ids(link, real_link)
    return msgspec.json.encode(plain)


def ids(plain: dict[str, Any], real: Any) -> None:
    for key, name in (("traceId", "trace_id"), ("spanId", "span_id"), ("parentSpanId", "parent_span_id")):
        if getattr(real, name, b""):
            plain[key] = getattr(real, name).hex()


def test_too_deep_too_large_too_many() -> None:
    """A span beyond a limit is rejected, a request beyond one refused."""
    value = AnyValue(int_value=1)
    for depth in range(17):
        deep = request({"v": value})
        decoded = decode_protobuf(deep)
        assert decoded.rejected == (1 if depth > 16 else 0)
        if not decoded.rejected:
            # the codec's own door takes it
            codec.decode_foreign(codec.encode(decoded.envelopes[0]))
        outer = AnyValue()
        outer.kvlist_value.values.add(key="otel.kvlist").value.CopyFrom(value)
        value = outer
    assert "nested deeper than 16" in decode_protobuf(request({"v": value})).message
    assert decode_protobuf(request({"v": "x" * 3000}), size_bytes_max=4096).rejected == 1
    assert decode_protobuf(request({"v": "x" * 1000}), size_bytes_max=4096).rejected == 0
    many = decode_protobuf(request({f"k{n}": n for n in range(100_001)}))
    assert "keys" in many.message
    with pytest.raises(TooLarge):
        decode_protobuf(request() * 3, spans_max=2)
    # a small request that would fill a disk: every span repeats its resource
    heavy = ExportTraceServiceRequest.FromString(request(service="x" * 2_000_000))
    (scope,) = heavy.resource_spans[0].scope_spans
    scope.spans.extend([scope.spans[0]] * 99)
    with pytest.raises(TooLarge, match="as envelopes"):
        decode_protobuf(heavy.SerializeToString())


@pytest.mark.parametrize(
    "body", [b"\x00", b"x", request()[:-1], b"\x0a\x05abc", request({"a": "b"}).replace(b"\x01b", b"\x01\xff")]
)
def test_bytes_that_are_no_request_are_malformed(body: bytes) -> None:
    """As a whole: nothing of it is stored."""
    with pytest.raises(Malformed):
        decode_protobuf(body)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{", b'{"resourceSpans":{}}', b'{"resourceSpans":[{"scopeSpans":[{"spans":[{"kind":"X"}]}]}]}',
        b'{"resourceSpans":[{"scopeSpans":[{"spans":[{"startTimeUnixNano":"-1"}]}]}]}',
        b'{"resourceSpans":[{"scopeSpans":[{"spans":[{"startTimeUnixNano":"1.5"}]}]}]}',
        b'{"resourceSpans":[{"resource":{"attributes":[{"key":"a","value":{"intValue":"9223372036854775808"}}]},"scopeSpans":[{}]}]}',
        b'{"resourceSpans":[{"resource":{"attributes":[{"key":"a","value":{"bytesValue":"!"}}]},"scopeSpans":[{}]}]}',
        b'{"resourceSpans":[{"resource":{"attributes":[{"key":"a","value":{"doubleValue":"nan"}}]},"scopeSpans":[{}]}]}',
        b'{"resourceSpans":[{"resource":{"attributes":[{"key":"a","value":{"stringValue":"s","intValue":1}}]},"scopeSpans":[{}]}]}',
        b'{"resourceSpans":[{"schemaUrl":"\\ud800"}]}', b'{"resourceSpans":' * 5000, b"[" * 100_000,
    ],
)  # fmt: skip
def test_json_that_is_no_request_is_malformed(body: bytes) -> None:
    """The same."""
    with pytest.raises(ProtocolError):
        decode_json(body)


# for any span

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
NUMBER64 = st.integers(-(2**63), 2**63 - 1)
COUNT = st.one_of(st.just(0), st.integers(0, 2**32 - 1))


def any_value(**kind: Any) -> AnyValue:
    return AnyValue(**kind)


def array(items: list[AnyValue]) -> AnyValue:
    out = AnyValue()
    out.array_value.SetInParent()
    for item in items:
        out.array_value.values.add().CopyFrom(item)
    return out


def kvlist(items: list[tuple[str, AnyValue]]) -> AnyValue:
    out = AnyValue()
    out.kvlist_value.SetInParent()
    for key, item in items:
        out.kvlist_value.values.add(key=key).value.CopyFrom(item)
    return out


KEY = st.one_of(TEXT, st.sampled_from(["otel.bytes", "otel.double", "otel.kvlist"]))
VALUES: st.SearchStrategy[AnyValue] = st.recursive(
    st.one_of(
        st.just(AnyValue()),
        st.builds(any_value, string_value=TEXT),
        st.builds(any_value, bool_value=st.booleans()),
        st.builds(any_value, int_value=NUMBER64),
        st.builds(any_value, double_value=st.floats(allow_nan=False)),
        st.builds(any_value, bytes_value=st.binary(max_size=8)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(array), st.lists(st.tuples(KEY, inner), max_size=3).map(kvlist)
    ),
    max_leaves=6,
)
NAMES = st.one_of(
    TEXT,
    st.sampled_from(
        [*genai.SOURCES, *genai.COLUMNS, "gen_ai.operation.name", "otel.name", "otel.kind", "otel.own", "otel.attr.x",
         "otel.events", "otel.status_code", "resource.service.name", "service.name", "otel.scope.name"]
    ),
)  # fmt: skip
ATTRIBUTES = st.dictionaries(NAMES, VALUES, max_size=6).map(
    lambda found: [KeyValue(key=key, value=value) for key, value in found.items()]
)
ID8 = st.binary(min_size=8, max_size=8).filter(any)


@st.composite
def requests(draw: st.DrawFn) -> ExportTraceServiceRequest:
    out = ExportTraceServiceRequest()
    group = out.resource_spans.add(schema_url=draw(TEXT))
    group.resource.SetInParent()
    group.resource.attributes.extend(draw(ATTRIBUTES))
    if not any(kv.key == "service.name" for kv in group.resource.attributes) and draw(st.booleans()):
        group.resource.attributes.add(key="service.name").value.string_value = draw(TEXT)
    group.resource.dropped_attributes_count = draw(COUNT)
    if draw(st.booleans()):
        group.resource.entity_refs.add(type=draw(TEXT), id_keys=draw(st.lists(TEXT, max_size=2)), schema_url=draw(TEXT))
    scope = group.scope_spans.add(schema_url=draw(TEXT))
    scope.scope.name, scope.scope.version = draw(TEXT), draw(TEXT)
    scope.scope.attributes.extend(draw(ATTRIBUTES))
    scope.scope.dropped_attributes_count = draw(COUNT)
    span = scope.spans.add(
        trace_id=draw(st.binary(min_size=16, max_size=16).filter(any)), span_id=draw(ID8),
        parent_span_id=draw(st.one_of(st.just(b""), ID8)), trace_state=draw(TEXT), flags=draw(COUNT),
        name=draw(st.one_of(TEXT, st.sampled_from(["chat", "chat gpt-4"]))), kind=draw(st.integers(0, 7)),
        start_time_unix_nano=draw(st.integers(0, 2**63 - 1)), end_time_unix_nano=draw(st.integers(0, 2**63 - 1)),
        attributes=draw(ATTRIBUTES), dropped_attributes_count=draw(COUNT), dropped_events_count=draw(COUNT),
        dropped_links_count=draw(COUNT),
    )  # fmt: skip
    if draw(st.booleans()):
        span.status.code, span.status.message = draw(st.integers(0, 4)), draw(TEXT)
    for _ in range(draw(st.integers(0, 2))):
        span.events.add(
            time_unix_nano=draw(st.integers(0, 2**64 - 1)), name=draw(TEXT), attributes=draw(ATTRIBUTES),
            dropped_attributes_count=draw(COUNT),
        )  # fmt: skip
        span.links.add(
            trace_id=draw(st.binary(max_size=17)), span_id=draw(st.binary(max_size=9)), trace_state=draw(TEXT),
            attributes=draw(ATTRIBUTES), dropped_attributes_count=draw(COUNT), flags=draw(COUNT),
        )  # fmt: skip
    return out


def whole(out: ExportTraceServiceRequest) -> ExportTraceServiceRequest:
    """With the empty messages there that mean the same as none, as equality sees a difference."""
    copy = ExportTraceServiceRequest.FromString(out.SerializeToString())
    for group in copy.resource_spans:
        group.resource.SetInParent()
        for scope in group.scope_spans:
            scope.scope.SetInParent()
            for span in scope.spans:
                span.status.SetInParent()
    return copy


@given(requests())
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_span_goes_in_and_comes_out_the_same(out: ExportTraceServiceRequest) -> None:
    """Through the bytes of the stream; and its JSON means the same envelope."""
    (env,) = decode_protobuf(out.SerializeToString()).envelopes
    stored = codec.decode_foreign(codec.encode(env))
    assert whole(back([stored])) == whole(out)
    (other,) = decode_json(encode_like_an_exporter(out)).envelopes
    assert other == env
    (again,) = decode_json(encode_json(request_of([stored]))).envelopes
    assert again == env


def test_nan_too() -> None:
    """Which equals nothing, so it is not in the test for any span."""
    (span,) = back([one(request({"n": math.nan}))]).resource_spans[0].scope_spans[0].spans
    assert math.isnan(span.attributes[0].value.double_value)


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER64, st.floats(allow_nan=False, allow_infinity=False), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
OURS = st.builds(
    TraceSpan,
    trace_id=st.one_of(st.just(TRACE.hex()), st.sampled_from(["t-1", "ABCDEF", "0" * 32, "a" * 64])),
    span_id=st.one_of(st.just(SPAN.hex()), st.sampled_from(["s", "0" * 16, "A" * 16])),
    parent_id=st.sampled_from(["", PARENT.hex(), "p", "0" * 16]),
    operation=st.one_of(TEXT, st.sampled_from(["chat", "embeddings"])),
    start_ns=st.integers(0, 2**63 - 1),
    end_ns=st.integers(0, 2**63 - 1),
    status=st.sampled_from(["ok", "error", "timeout", "", "cancelled"]),
    attrs=st.dictionaries(
        st.one_of(
            TEXT.filter(lambda t: not t.startswith(("otel.", "resource.", "mist."))),
            st.sampled_from([*genai.COLUMNS, *genai.SOURCES, "gen_ai.operation.name"]),
        ),
        st.one_of(PLAIN, st.sampled_from(["gpt-4", 7, 0.5, ["stop"]])),
        max_size=6,
    ),
)


@example(TraceSpan("t", "s", operation="x", attrs={"gen_ai.operation.name": "y"}), "s", "")
@given(OURS, TEXT.filter(lambda t: t != "unknown_service"), TEXT)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_span_of_ours_goes_out_and_comes_back_the_same(span: TraceSpan, source: str, tenant: str) -> None:
    """Payload, source and tenant; in both encodings, and when it goes round twice."""
    env = Envelope.new("trace.span", span, source=source or "s", tenant=tenant)
    for _ in range(2):
        (came,) = decode_protobuf(encode_protobuf(request_of([env]))).envelopes
        assert came.decode(TraceSpan) == span
        assert (came.source, came.tenant) == (env.source, env.tenant)
        assert decode_json(encode_json(request_of([env]))).envelopes == [came]
        env = came


def test_a_span_of_ours_leaves_with_the_names_of_the_conventions() -> None:
    """Other tools find model, tokens and failures where they look for them."""
    span = TraceSpan(
        trace_id="run-1", span_id="call-1", operation="chat", start_ns=1, end_ns=2, status="timeout",
        attrs={"model": "gpt-4", "provider": "openai", "tokens_in": 3, "tokens_out": 4, "cost_usd": 0.1,
               "finish_reason": "stop", "ttft_ms": 120.0, "error": "deadline", "user": "u"},
    )  # fmt: skip
    sent = request_of([Envelope.new("trace.span", span, source="svc")])
    (group,) = sent.resource_spans
    assert [(a.key, a.value.string_value) for a in group.resource.attributes] == [("service.name", "svc")]
    (out,) = group.scope_spans[0].spans
    assert (out.name, out.kind, out.status.code, len(out.trace_id), len(out.span_id)) == ("chat gpt-4", 3, 2, 16, 8)
    values = {a.key: a.value for a in out.attributes}
    assert values["gen_ai.operation.name"].string_value == "chat"
    assert values["gen_ai.request.model"].string_value == "gpt-4"
    assert values["gen_ai.provider.name"].string_value == "openai"
    assert values["gen_ai.usage.input_tokens"].int_value == 3
    assert values["gen_ai.usage.output_tokens"].int_value == 4
    assert [v.string_value for v in values["gen_ai.response.finish_reasons"].array_value.values] == ["stop"]
    assert values["gen_ai.response.time_to_first_chunk"].double_value == 0.12
    assert values["error.type"].string_value == "deadline"
    assert values["cost_usd"].double_value == 0.1
    assert values["mist.status"].string_value == "timeout"


def test_spans_of_one_resource_and_scope_travel_together() -> None:
    """And what cannot be sent is refused with its envelope."""
    spans = [
        Envelope.new("trace.span", TraceSpan(trace_id=TRACE.hex(), span_id=f"{n:016x}"), source="ab"[n % 2])
        for n in range(1, 7)
    ]
    sent = request_of(spans)
    assert [len(group.scope_spans[0].spans) for group in sent.resource_spans] == [3, 3]
    for bad in (
        Envelope.new("eval.run", {}, source="s"),
        Envelope.new("trace.span", {"trace_id": "t"}, source="s"),
        Envelope.new("trace.span", {"trace_id": "t", "span_id": "s", "start_ns": -1}, source="s"),
        Envelope.new("trace.span", [1], source="s"),
    ):
        with pytest.raises(InvalidArgument, match="cannot be sent by OTLP"):
            request_of([bad])
        told: list[InvalidArgument] = []
        assert len(request_of([bad, spans[0]], told.append).resource_spans) == len(told) == 1


def test_nobody_lends_a_span_another_identity() -> None:
    """`mist.trace_id` is believed only when the bytes were made from it."""
    env = one(request({"mist.added": [], "mist.trace_id": "somebody-else"}))
    assert env.data()["trace_id"] == TRACE.hex()


def test_integers_beyond_64_bits_become_doubles() -> None:
    """OTLP has none."""
    env = Envelope.new(
        "trace.span", {"trace_id": "t", "span_id": "s", "attrs": {"n": 2**70, "m": 10**4000}}, source="s"
    )
    (span,) = request_of([env]).resource_spans[0].scope_spans[0].spans
    values = {a.key: a.value.double_value for a in span.attributes}
    assert (values["n"], values["m"]) == (2.0**70, math.inf)


def test_the_reference_names_every_name() -> None:
    """The tables of docs/reference/otlp.md say what is read, what is written and where the rest is kept."""
    page = (Path(__file__).parents[2] / "docs/reference/otlp.md").read_text()
    reserved = [
        value for key, value in vars(names).items() if key.isupper() and str(value).startswith(("otel.", "mist."))
    ]
    reserved.remove(names.DROPPED_COUNT)
    for name in (*genai.SOURCES, *genai.COLUMNS, genai.OPERATION, *reserved, *names.ID_NAMES, *names.KINDS[1:]):
        assert f"`{name}" in page, name
    for status in (number for number in names.DROPPED):
        assert f"`{names.DROPPED_COUNT.format(status)}`" in page


def test_texts_are_the_same_whatever_reader_saw_them() -> None:
    """Short ones are read by hand: at every length around its limits, and where it is not what it seems."""
    for size in range(132):
        for key in ("k", "k" * 60):
            assert attrs(request({key: "é" + "x" * size}))[key] == "é" + "x" * size
    pair = KeyValue(key="a", value=AnyValue(string_value="bcdefgh")).SerializeToString()
    with pytest.raises(Malformed):
        decode_protobuf(request({"a": "bcdefgh"}).replace(pair, pair.replace(b"bc", b"\xed\xa0")))
