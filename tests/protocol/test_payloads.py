"""The ten payload types: the seed's keys, their order, what is omitted, and lenient reading."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from mist import errors
from mist.protocol import payloads as p
from mist.protocol.envelope import Envelope, encode_payload

ZERO: list[tuple[msgspec.Struct, str]] = [
    (p.InferRequest(), '{"model":"","messages":null}'),
    (p.ChatMessage(), '{"role":"","content":""}'),
    (
        p.InferResponse(),
        '{"model":"","provider":"","content":"","tokens_in":0,"tokens_out":0,"cost_usd":0.0,"latency_ms":0,"finish_reason":""}',
    ),
    (p.EvalRun(), '{"suite":"","baseline":false}'),
    (
        p.EvalResult(),
        '{"suite":"","task":"","passed":false,"score":0.0,"baseline_score":0.0,"delta":0.0,"duration_ms":0}',
    ),
    (p.TraceSpan(), '{"trace_id":"","span_id":"","operation":"","start_ns":0,"end_ns":0,"status":""}'),
    (p.TraceAlert(), '{"level":"","metric":"","value":0.0,"threshold":0.0,"message":""}'),
    (p.DataEntities(), '{"count":0,"format":"","path":""}'),
    (p.DataSchema(), '{"name":"","fields":null}'),
    (p.SchemaField(), '{"name":"","type":"","required":false}'),
    (p.HealthPing(), '{"from":""}'),
    (p.HealthPong(), '{"from":"","version":"","uptime_s":0}'),
]

FULL: list[tuple[msgspec.Struct, str]] = [
    (
        p.InferRequest("m", "p", [p.ChatMessage("user", "hi")], {"t": 0}, {"k": "v"}),
        '{"model":"m","provider":"p","messages":[{"role":"user","content":"hi"}],"params":{"t":0},"meta":{"k":"v"}}',
    ),
    (
        p.ChatMessage("assistant", None, "n", [{"id": "c"}], "c"),
        '{"role":"assistant","content":null,"name":"n","tool_calls":[{"id":"c"}],"tool_call_id":"c"}',
    ),
    (
        p.ChatMessage("user", [{"type": "text", "text": "hi"}]),
        '{"role":"user","content":[{"text":"hi","type":"text"}]}',
    ),
    (
        p.InferResponse("m", "p", "c", None, None, None, 3, "stop", "k", "r", "m-2", [{"id": "c"}], "no", 1, 2, "v"),
        (
            '{"model":"m","provider":"p","content":"c","tokens_in":null,"tokens_out":null,"cost_usd":null,"latency_ms":3,'
            '"finish_reason":"stop","request_key":"k","request_id":"r","answered_by":"m-2","tool_calls":[{"id":"c"}],'
            '"refusal":"no","tokens_cached":1,"tokens_reasoning":2,"price_version":"v"}'
        ),
    ),
    (
        p.EvalRun("s", ["a"], True, "u", {"k": "v"}),
        '{"suite":"s","tasks":["a"],"baseline":true,"infer_url":"u","tags":{"k":"v"}}',
    ),
    (
        p.EvalResult("s", "t", True, 0.5, 0.25, 0.25, 3, "e"),
        '{"suite":"s","task":"t","passed":true,"score":0.5,"baseline_score":0.25,"delta":0.25,"duration_ms":3,"error":"e"}',
    ),
    (
        p.TraceSpan("t", "s", "p", "o", 1, 2, "ok", {"b": None, "a": 1}),
        '{"trace_id":"t","span_id":"s","parent_id":"p","operation":"o","start_ns":1,"end_ns":2,"status":"ok","attrs":{"a":1,"b":null}}',
    ),
    (
        p.DataEntities(1, "csv", "/x", "s", "c"),
        '{"count":1,"format":"csv","path":"/x","schema":"s","checksum":"c"}',
    ),
    (
        p.DataSchema("n", [p.SchemaField("f", "int", True)]),
        '{"name":"n","fields":[{"name":"f","type":"int","required":true}]}',
    ),
]


@pytest.mark.parametrize(
    ("value", "text"), ZERO + FULL, ids=lambda v: type(v).__name__ if not isinstance(v, str) else ""
)
def test_keys_order_and_omission_are_the_seeds(value: msgspec.Struct, text: str) -> None:
    """Keys in table order; empty ones omitted exactly where the seed omits them; and the text reads back equal."""
    assert encode_payload(value).decode() == text
    assert msgspec.json.decode(text, type=type(value)) == value


@pytest.mark.parametrize("type_", sorted(p.PAYLOADS))
def test_reading_is_lenient(type_: str) -> None:
    """Absent keys are zero, unknown keys are ignored, a null payload is nothing."""
    env = Envelope.new(type_, msgspec.Raw(b'{"unheard_of":[1]}'), source="s")
    assert env.decode() == p.PAYLOADS[type_]()
    assert Envelope.new(type_, None, source="s").decode() is None


@pytest.mark.parametrize(
    ("into", "text"),
    [
        (p.TraceSpan, '{"start_ns":"1"}'),
        (p.TraceSpan, '{"start_ns":9223372036854775808}'),
        (p.InferResponse, '{"tokens_in":1.5}'),
        (p.EvalResult, '{"passed":1}'),
        (p.EvalRun, "[]"),
    ],
)
def test_a_payload_that_does_not_fit_is_malformed(into: Any, text: str) -> None:
    """Wrong types and integers beyond 64 bits, with the envelope's id in the message."""
    env = Envelope.new("t", msgspec.Raw(text.encode()), source="s", id="the-id")
    with pytest.raises(errors.Malformed, match="the-id"):
        env.decode(into)


def test_unknown_money_is_not_zero() -> None:
    """A cost may be null, and stays null."""
    assert b'"cost_usd":null' in encode_payload(p.InferResponse(cost_usd=None))
    assert msgspec.json.decode(b'{"cost_usd":null}', type=p.InferResponse).cost_usd is None


def test_the_type_constants_are_distinct_and_all_have_a_class() -> None:
    """Ten types, ten classes."""
    assert len(p.PAYLOADS) == 10
    assert len(set(p.PAYLOADS.values())) == 10


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_payload_with_nan_is_refused_when_it_is_made(bad: float) -> None:
    """At any place: in dicts, lists, tuples, structs. The encoder alone would write null."""
    for value in (bad, {"a": [1, (bad,)]}, p.EvalResult(score=bad), [p.TraceSpan(attrs={"x": {"y": bad}})]):
        with pytest.raises(errors.NotFinite):
            encode_payload(value)


def test_null_alone_is_no_nan() -> None:
    """A payload that holds null, or the word, is fine."""
    assert encode_payload({"a": None, "b": "null NaN"}) == b'{"a":null,"b":"null NaN"}'


@pytest.mark.parametrize("value", ["\ud800", {"\udfff": 1}, ["a\ud800b"]])
def test_a_payload_with_half_a_surrogate_pair_is_refused_when_it_is_made(value: Any) -> None:
    """Such text has no UTF-8 form."""
    with pytest.raises(errors.LoneSurrogate):
        encode_payload(value)


def test_a_value_without_a_json_form_is_malformed() -> None:
    """Objects of unknown classes, and loops, are named by their type."""
    loop: list[Any] = []
    loop.append(loop)
    for value in (object(), {"a": object()}, loop):
        with pytest.raises(errors.Malformed, match="no JSON form"):
            encode_payload(value)


def test_an_envelope_needs_a_source_and_a_type() -> None:
    """They are the two things nobody can fill in."""
    with pytest.raises(errors.MissingField, match="source"):
        Envelope.new("t", source="")
    with pytest.raises(errors.MissingField, match="type"):
        Envelope.new("", source="s")
