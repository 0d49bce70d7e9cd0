"""One record to one row, or to the reason why not."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mist.kit.prices import parse_prices
from mist.protocol.codec import MSGPACK, encode, encode_msgpack
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN
from mist.tools.tokentrace import spans as module
from mist.tools.tokentrace.spans import BadSpan, SpanRow, row_of

from .spanning import TRACE, envelope, payload, record


def row(**changes: Any) -> SpanRow:
    found = row_of(record(envelope(1, **changes)))
    assert found is not None
    return found


def test_a_span_becomes_a_row_with_its_columns() -> None:
    """Times give the latency in milliseconds, attributes give model, tokens and cost, the record gives the sequence."""
    assert row() == SpanRow(
        trace_id=TRACE, span_id=f"{1:016x}", parent_id="", source="svc", tenant="", user_id="", operation="chat",
        status="ok", model="m1", provider="p1", time_ns=1_700_000_000_000_000_001, ttft_ms=None, score=None, price=None,
        start_ns=1_700_000_000_000_000_001, end_ns=1_700_000_000_250_000_001, latency_ms=250.0,
        tokens_in=100, tokens_out=20, cost_usd=0.5,
        attrs='{"cost_usd":0.5,"model":"m1","provider":"p1","tokens_in":100,"tokens_out":20}', sequence=7,
    )  # fmt: skip


def test_what_is_unknown_is_none_and_never_zero() -> None:
    """A span without attributes and end has no latency, tokens, cost or model."""
    found = row(end_ns=0, attrs={})
    assert (found.latency_ms, found.tokens_in, found.tokens_out, found.cost_usd, found.model) == (None,) * 5
    assert row(attrs={"tokens_in": 0, "cost_usd": 0}).tokens_in == 0
    assert row(attrs={"cost_usd": 0}).cost_usd == 0.0


def test_attributes_that_are_null_are_none() -> None:
    """As the seed takes them: a sender without any writes null as well as nothing."""
    found = row_of(record(envelope(1, attrs=None)))
    assert found is not None
    assert (found.attrs, found.model, found.cost_usd) == ("{}", None, None)


def test_latency_comes_from_the_attribute_where_times_are_absent() -> None:
    """The seeds send latency_ms; measured times win over it."""
    assert row(end_ns=0, attrs={"latency_ms": 12.5}).latency_ms == 12.5
    assert row(attrs={"latency_ms": 12.5}).latency_ms == 250.0


def test_float_counts_and_opentelemetry_names_are_read() -> None:
    """Seeds send counts as floats; GenAI attribute names count where ours are absent."""
    assert row(attrs={"tokens_in": 100.0}).tokens_in == 100
    found = row(
        attrs={
            "gen_ai.request.model": "asked",
            "gen_ai.response.model": "answered",
            "gen_ai.provider.name": "openai",
            "gen_ai.usage.input_tokens": 3,
            "gen_ai.usage.output_tokens": 4,
        }
    )
    assert (found.model, found.provider, found.tokens_in, found.tokens_out) == ("answered", "openai", 3, 4)


def test_msgpack_records_are_read_by_their_header() -> None:
    """The content type says how to decode."""
    found = row_of(record(encode_msgpack(envelope(1)), headers=(("Content-Type", MSGPACK),)))
    assert found is not None
    assert found.tokens_in == 100


def test_another_type_is_passed_over() -> None:
    """An alert on the trace stream is neither a span nor a fault."""
    alert = Envelope.new("trace.alert", {"level": "warning"}, source="s")
    assert row_of(record(alert)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trace_id": ""}, "trace_id is missing"),
        ({"span_id": ""}, "span_id is missing"),
        ({"trace_id": "x" * 257}, "trace_id is not 1 to 256"),
        ({"trace_id": "a\nb"}, "printable"),
        ({"span_id": "ünïcode"}, "ASCII"),
        ({"start_ns": 10, "end_ns": 9}, "ends before it starts"),
        ({"start_ns": -1}, "start_ns is out of range"),
        ({"end_ns": 2**63}, "end_ns is out of range"),
        ({"attrs": {"tokens_in": -1}}, "attrs.tokens_in"),
        ({"attrs": {"tokens_in": 1.5}}, "attrs.tokens_in"),
        ({"attrs": {"tokens_out": "20"}}, "attrs.tokens_out"),
        ({"attrs": {"tokens_out": True}}, "attrs.tokens_out"),
        ({"attrs": {"tokens_in": 2**80}}, "attrs.tokens_in"),
        ({"attrs": {"cost_usd": -0.01}}, "attrs.cost_usd"),
        ({"attrs": {"cost_usd": "free"}}, "attrs.cost_usd"),
        ({"end_ns": 0, "attrs": {"latency_ms": -5}}, "attrs.latency_ms"),
        ({"attrs": {"model": 4}}, "attrs.model is not text"),
        ({"attrs": []}, "malformed"),
        ({"trace_id": 7}, "malformed"),
    ],
)
def test_an_impossible_span_is_refused_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    """No such value may reach a total."""
    with pytest.raises(BadSpan, match=reason.replace(".", r"\.")):
        row_of(record(envelope(1, **changes)))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "malformed"),
        (b"not json", "malformed"),
        (b"[" * 100_000, "malformed|too_deep"),
        (b"{}", "missing_field"),
        (encode(envelope(1)).replace(b'"version":"1"', b'"version":"9"'), "version_unsupported"),
        (
            encode(Envelope.new(TRACE_SPAN, payload(), source="s", checksum=True)).replace(b'"m1"', b'"m2"'),
            "checksum_mismatch",
        ),
        (encode(Envelope.new(TRACE_SPAN, None, source="s")), "malformed"),
        (encode(Envelope.new(TRACE_SPAN, [1], source="s")), "malformed"),
    ],
)
def test_undecodable_bytes_are_refused_with_the_code(data: bytes, code: str) -> None:
    """The reason begins with the error's code, so that quarantine can be counted by it."""
    with pytest.raises(BadSpan, match=f"^({code}): "):
        row_of(record(data))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_row_or_a_reason(data: bytes) -> None:
    """Nothing else can come out: an exception of another kind would stop the ingest."""
    with contextlib.suppress(BadSpan):
        row_of(record(data))


@given(st.dictionaries(st.sampled_from(sorted(payload())), JSON), JSON)
def test_any_json_gives_a_row_sqlite_can_hold_or_a_reason(changes: dict[str, Any], attr: Any) -> None:
    """Numbers of a row are in range, whatever was sent."""
    changes = {"attrs": {"tokens_in": attr, "cost_usd": attr, "latency_ms": attr, "model": attr}, **changes}
    data = msgspec.json.encode(
        {
            "version": "1",
            "id": "i",
            "source": "s",
            "type": TRACE_SPAN,
            "timestamp_ns": 1,
            "payload": payload(1, **changes),
        }
    )
    try:
        found = row_of(record(data))
    except BadSpan:
        return
    assert found is not None
    for value in (found.start_ns, found.end_ns, found.tokens_in, found.tokens_out):
        assert value is None or 0 <= value < 2**63
    for amount in (found.latency_ms, found.cost_usd):
        assert amount is None or 0 <= amount < float("inf")


EDGES = st.sampled_from([
    b"null", b"0", b"-0", b"-0.0", b"1", b"1.0", b"1e3", b"1e400", b"-1", b"0.1", b"9007199254740991", b"9007199254740992",
    b"9007199254740993", b"9007199254740992.5", b"9223372036854775807", b"9223372036854775808", b"1000000", b"1000000.5",
    b"999999.9999999999", b"1e6", b"true", b"false", b'""', b'"x"', b'"a\\u0000b"', b'"\\ud83d\\ude00"', b'"\xc3\xbc"', b'"\xff"',
    b"[]", b"{}", b'"1"', b'"%s"' % (b"x" * 1024), b'"%s"' % (b"x" * 1025), b'"%s"' % ("\U0001f600".encode() * 1024),
    b'"%s"' % (b"x" * 256), b'"%s"' % (b"x" * 257), b" 5 ", b'"a\x7f"', b'"\\u007f"', b'"trace.span"', b'"trace.alert"', b'"2"',
])  # fmt: skip
ATTRS = [*module._Attrs.__struct_encode_fields__, "other"]
PRICED = parse_prices(b'[[price]]\nmodel = "*"\ninput_per_million = 1\noutput_per_million = 3', "t")


def outcome(function: Any, data: bytes) -> tuple[str, ...]:
    try:
        found = function(record(data), PRICED)
    except BadSpan as exc:
        return ("bad", str(exc))
    return ("none",) if found is None else tuple(repr(value) for value in found)


@example({"timestamp_ns": b"9223372036854775808"}, {}, {})
@example({}, {"span_id": b'"a\x7f"'}, {})
@example({}, {"span_id": b'"\\u007f"'}, {})
@given(
    st.dictionaries(st.sampled_from(["version", "id", "source", "type", "checksum", "tenant", "timestamp_ns"]), EDGES, max_size=2),
    st.dictionaries(st.sampled_from([*payload(), "parent_id"]), EDGES, max_size=2),
    st.dictionaries(st.sampled_from(ATTRS), EDGES, max_size=6),
)  # fmt: skip
def test_the_quick_way_gives_what_the_careful_way_gives(
    env: dict[str, bytes], span: dict[str, bytes], attrs: dict[str, bytes]
) -> None:
    """To the last bit, at every limit: the same row, the same reason, or the same silence."""

    def text(fields: dict[str, bytes]) -> bytes:
        return b"{%s}" % b",".join(b'"%s":%s' % (name.encode(), value) for name, value in fields.items())

    whole = {name: msgspec.json.encode(value) for name, value in payload(1).items()}
    inner = text({**whole, "attrs": text(attrs), **span})
    outer = {"version": b'"1"', "id": b'"i"', "source": b'"s"', "type": b'"trace.span"', "timestamp_ns": b"1"}
    data = text({**outer, **env, "payload": inner})
    assert outcome(row_of, data) == outcome(module._careful, data)
