"""One record of the trace stream to one row of the store, or to the reason why not.

Promises: never raises anything but BadSpan; numbers that reach a row are finite, whole where they count, not negative
and fit SQLite; what is unknown is None, never zero. A record of another type is None: it is passed over, not refused.
Does not: change or drop attributes (they are kept as the JSON that came), infer prices, guess tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from msgspec import Raw, Struct

from mist.broker.base import Record, header
from mist.errors import MistError
from mist.protocol.codec import MSGPACK, decode, decode_msgpack
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN

ID_CHARS_MAX = 256
INT_MAX = 2**63 - 1
COUNT_MAX = 2**53


class BadSpan(Exception):
    """Why a record cannot become a row. Internal to the tool: the ingest puts the text into quarantine."""


class SpanRow(NamedTuple):
    """One row of the table `spans`, in the order of its columns. `attrs` is JSON text."""

    trace_id: str
    span_id: str
    parent_id: str
    source: str
    operation: str
    status: str
    model: str | None
    provider: str | None
    start_ns: int | None
    end_ns: int | None
    latency_ms: float | None
    tokens_in: int | None
    tokens_out: int | None
    cost_usd: float | None
    attrs: str
    sequence: int


class _Span(Struct, gc=False):
    trace_id: str = ""
    span_id: str = ""
    parent_id: str = ""
    operation: str = ""
    start_ns: int = 0
    end_ns: int = 0
    status: str = ""
    attrs: Raw = Raw(b"{}")


class _Attrs(
    Struct,
    gc=False,
    rename={
        "otel_model": "gen_ai.response.model",
        "otel_asked": "gen_ai.request.model",
        "otel_provider": "gen_ai.provider.name",
        "otel_in": "gen_ai.usage.input_tokens",
        "otel_out": "gen_ai.usage.output_tokens",
    },
):
    """The attributes that become columns; OpenTelemetry's GenAI names count where ours are absent."""

    model: object = None
    provider: object = None
    tokens_in: object = None
    tokens_out: object = None
    cost_usd: object = None
    latency_ms: object = None
    otel_model: object = None
    otel_asked: object = None
    otel_provider: object = None
    otel_in: object = None
    otel_out: object = None


_span = msgspec.json.Decoder(_Span).decode
_attrs = msgspec.json.Decoder(_Attrs).decode
_NO_ATTRS = _Attrs()


def row_of(record: Record) -> SpanRow | None:
    """The row of a record, None when it is an envelope of another type. Raises BadSpan."""
    try:
        if header(record.headers, "Content-Type") == MSGPACK:
            env = decode_msgpack(record.data)
        else:
            env = decode(record.data)
    except MistError as exc:
        raise BadSpan(f"{exc.code}: {exc.message}") from exc
    if env.type != TRACE_SPAN:
        return None
    return _row(env, record.sequence)


def _row(env: Envelope, sequence: int) -> SpanRow:
    try:
        span = _span(env.payload)
        plain = span.attrs in (b"{}", b"null")
        attrs = _NO_ATTRS if plain else _attrs(span.attrs)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadSpan(f"malformed: payload is not a span: {exc}") from exc
    start, end = _time(span.start_ns, "start_ns"), _time(span.end_ns, "end_ns")
    latency: float | None
    if start is not None and end is not None:
        if end < start:
            raise BadSpan("invalid: the span ends before it starts")
        latency = (end - start) / 1e6
    else:
        latency = _amount(attrs.latency_ms, "latency_ms")
    model = attrs.model or attrs.otel_model or attrs.otel_asked
    return SpanRow(
        _id(span.trace_id, "trace_id"),
        _id(span.span_id, "span_id"),
        span.parent_id,
        env.source,
        span.operation,
        span.status,
        _text(model, "model"),
        _text(attrs.provider or attrs.otel_provider, "provider"),
        start,
        end,
        latency,
        _count(attrs.otel_in if attrs.tokens_in is None else attrs.tokens_in, "tokens_in"),
        _count(attrs.otel_out if attrs.tokens_out is None else attrs.tokens_out, "tokens_out"),
        _amount(attrs.cost_usd, "cost_usd"),
        "{}" if plain else bytes(span.attrs).decode(),
        sequence,
    )


def _id(text: str, name: str) -> str:
    if 0 < len(text) <= ID_CHARS_MAX and text.isascii() and text.isprintable():
        return text
    what = "is missing" if not text else f"is not 1 to {ID_CHARS_MAX} printable ASCII characters"
    raise BadSpan(f"invalid: {name} {what}")


def _time(value: int, name: str) -> int | None:
    if value == 0:
        return None
    if 0 < value <= INT_MAX:
        return value
    raise BadSpan(f"invalid: {name} is out of range")


def _text(value: object, name: str) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    raise BadSpan(f"invalid: attrs.{name} is not text")


def _count(value: object, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= COUNT_MAX:
        return value
    if isinstance(value, float) and value.is_integer() and 0 <= value <= COUNT_MAX:
        return int(value)  # the seeds send token counts as floats
    raise BadSpan(f"invalid: attrs.{name} is not a whole number from 0 to 2^53")


def _amount(value: object, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= COUNT_MAX:
        return float(value)
    raise BadSpan(f"invalid: attrs.{name} is not a number from 0 to 2^53")
