"""One record of the trace stream to one row of the store, or to the reason why not.

Promises: never raises anything but BadSpan; numbers that reach a row are finite, whole where they count, not negative
and fit SQLite; what is unknown is None, never zero. A record of another type is None: it is passed over, not refused.
A cost that the span does not state is made from the price table where one is given, and `price` names its version.
Does not: change or drop attributes (they are kept as the JSON that came), guess tokens.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Raw, Struct

from mist.broker.base import Record, header
from mist.errors import MistError
from mist.kit.prices import Prices
from mist.protocol.codec import MSGPACK, decode, decode_msgpack
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN, Int64

ID_CHARS_MAX = 256
NAME_CHARS_MAX = 1024
"""Of model, provider, operation, source, tenant, user and status: they become keys."""
INT_MAX = 2**63 - 1
COUNT_MAX = 2**53
COST_USD_MAX = 1e6


class BadSpan(Exception):
    """Why a record cannot become a row. Internal to the tool: the ingest puts the text into quarantine."""


Row = tuple[Any, ...]
"""The values of a SpanRow without its names. A page holds its rows so: they are made in a third of the time, and the garbage
collector, which looks at every object with a class of its own again and again, leaves plain tuples of plain values alone."""


class SpanRow(NamedTuple):
    """One row of the table `spans`, in the order of its columns. `attrs` is JSON text.

    `time_ns` is when the span started, or where it does not say when its record was appended. `price` is the version
    of the price table that made the cost; None = the span stated it, or it is unknown.
    """

    trace_id: str
    span_id: str
    parent_id: str
    source: str
    tenant: str
    user_id: str
    operation: str
    status: str
    model: str | None
    provider: str | None
    time_ns: int
    start_ns: int | None
    end_ns: int | None
    latency_ms: float | None
    ttft_ms: float | None
    tokens_in: int | None
    tokens_out: int | None
    cost_usd: float | None
    score: float | None
    price: str | None
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


_NAMES = {
    "score": "eval.score",
    "user_dotted": "user.id",
    "user_end": "enduser.id",
    "otel_model": "gen_ai.response.model",
    "otel_asked": "gen_ai.request.model",
    "otel_provider": "gen_ai.provider.name",
    "otel_in": "gen_ai.usage.input_tokens",
    "otel_out": "gen_ai.usage.output_tokens",
    "otel_cached": "gen_ai.usage.cache_read.input_tokens",
}


class _Attrs(Struct, gc=False, rename=_NAMES):
    """The attributes that become columns; OpenTelemetry's GenAI names count where ours are absent."""

    model: object = None
    provider: object = None
    tokens_in: object = None
    tokens_out: object = None
    tokens_cached: object = None
    cost_usd: object = None
    latency_ms: object = None
    ttft_ms: object = None
    score: object = None
    user: object = None
    user_dotted: object = None
    user_end: object = None
    otel_model: object = None
    otel_asked: object = None
    otel_provider: object = None
    otel_in: object = None
    otel_out: object = None
    otel_cached: object = None


_Id = Annotated[str, Meta(min_length=1, max_length=ID_CHARS_MAX)]
_Name = Annotated[str, Meta(max_length=NAME_CHARS_MAX)]
_Some = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]
_Time = Annotated[int, Meta(ge=0, le=INT_MAX)]
_Count = Annotated[int, Meta(ge=0, le=COUNT_MAX)]
# the limit itself is left to the careful path: a whole number just above it becomes it as a float
_Amount = Annotated[float, Meta(ge=0, lt=COUNT_MAX)]
_Cost = Annotated[float, Meta(ge=0, lt=COST_USD_MAX)]


class _QuickSpan(Struct, gc=False):
    trace_id: _Id
    span_id: _Id
    parent_id: str = ""
    operation: _Name = ""
    start_ns: _Time = 0
    end_ns: _Time = 0
    status: _Name = ""
    attrs: Raw = Raw(b"{}")


class _Quick(Struct, gc=False):
    """An ordinary envelope with an ordinary span, read and checked in one go; anything else fails to decode."""

    timestamp_ns: Int64
    version: Literal["1"]
    id: Annotated[str, Meta(min_length=1)]
    source: _Some
    type: Literal["trace.span"]
    payload: _QuickSpan
    checksum: Literal[0] = 0
    tenant: _Name = ""


class _QuickAttrs(Struct, gc=False, rename=_NAMES):
    """`_Attrs` of the types and in the ranges that need no second look."""

    model: _Name | None = None
    provider: _Name | None = None
    tokens_in: _Count | None = None
    tokens_out: _Count | None = None
    tokens_cached: _Count | None = None
    cost_usd: _Cost | None = None
    latency_ms: _Amount | None = None
    ttft_ms: _Amount | None = None
    score: _Amount | None = None
    user: _Name | None = None
    user_dotted: _Name | None = None
    user_end: _Name | None = None
    otel_model: _Name | None = None
    otel_asked: _Name | None = None
    otel_provider: _Name | None = None
    otel_in: _Count | None = None
    otel_out: _Count | None = None
    otel_cached: _Count | None = None


_quick = msgspec.json.Decoder(_Quick).decode
_quick_attrs = msgspec.json.Decoder(_QuickAttrs).decode
_span = msgspec.json.Decoder(_Span).decode
_attrs = msgspec.json.Decoder(_Attrs).decode
_NO_ATTRS = _Attrs()
_PLAIN = (Raw(b"{}"), Raw(b"null"))
"""Raw is equal to Raw only, never to bytes."""
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def row_of(record: Record, prices: Prices | None = None) -> SpanRow | None:
    """The row of a record, None when it is an envelope of another type. Raises BadSpan."""
    row = values_of(record, prices)
    return None if row is None else SpanRow._make(row)


def values_of(record: Record, prices: Prices | None = None) -> Row | None:
    """`row_of` for a page: the same values without their names."""
    data = record.data
    escapes = b"\\" in data
    # what is out of the ordinary in any way takes the careful path, which knows the reasons
    if not record.headers and not (escapes and b"\\u0000" in data):
        try:
            env = _quick(data)
            span = env.payload
            raw = span.attrs
            attrs = _quick_attrs(raw)
            text = str(raw, "utf-8")
        except _NOT_JSON:
            return _careful(record, prices)
        start, end = span.start_ns or None, span.end_ns or None
        if start is None or end is None:
            latency = attrs.latency_ms
        else:
            latency = (end - start) / 1e6
        # JSON holds no control character but DEL unless it is escaped
        printable = not escapes and data.isascii() and b"\x7f" not in data
        if (printable or _printable(span.trace_id + span.span_id)) and (latency is None or latency >= 0):
            model = attrs.model or attrs.otel_model or attrs.otel_asked or None
            provider = attrs.provider or attrs.otel_provider or None
            tokens_in = attrs.otel_in if attrs.tokens_in is None else attrs.tokens_in
            tokens_out = attrs.otel_out if attrs.tokens_out is None else attrs.tokens_out
            cost, price = attrs.cost_usd, None
            time_ns = start or record.timestamp_ns
            if cost is None and prices is not None and model is not None:
                cached = attrs.otel_cached if attrs.tokens_cached is None else attrs.tokens_cached
                cost, price = _priced(prices, provider, model, time_ns, tokens_in, tokens_out, cached)
            return (
                span.trace_id, span.span_id, span.parent_id, env.source, env.tenant,
                attrs.user or attrs.user_dotted or attrs.user_end or "", span.operation, span.status, model, provider,
                time_ns, start, end, latency, attrs.ttft_ms, tokens_in, tokens_out, cost, attrs.score, price, text,
                record.sequence,
            )  # fmt: skip
    return _careful(record, prices)


def _careful(record: Record, prices: Prices | None) -> SpanRow | None:
    """The same for any record. What the quick way gives, this one would give too."""
    try:
        if header(record.headers, "Content-Type") == MSGPACK:
            env = decode_msgpack(record.data)
        else:
            env = decode(record.data)
    except MistError as exc:
        raise BadSpan(f"{exc.code}: {exc.message}") from exc
    if env.type != TRACE_SPAN:
        return None
    return _row(_payload(env), env.source, env.tenant, record, prices)


def _priced(
    prices: Prices, provider: str | None, model: str, time_ns: int, tokens_in: int | None, tokens_out: int | None,
    cached: int | None,
) -> tuple[float | None, str | None]:  # fmt: skip
    """(cost, version of the table that made it), None both where it cannot be known."""
    cost = prices.cost_usd(
        provider=provider or "", model=model, time_ns=time_ns, tokens_in=tokens_in, tokens_out=tokens_out,
        tokens_cached=cached,
    )  # fmt: skip
    return cost, None if cost is None else prices.version


def _payload(env: Envelope) -> _Span:
    try:
        return _span(env.payload)
    except _NOT_JSON as exc:
        raise BadSpan(f"malformed: payload is not a span: {exc}") from exc


def _row(span: _Span, source: str, tenant: str, record: Record, prices: Prices | None) -> SpanRow:
    if b"\\u0000" in record.data:
        _no_nul(span, source, tenant)
    raw = span.attrs
    plain = raw in _PLAIN
    try:
        attrs = _NO_ATTRS if plain else _attrs(raw)
        text = "{}" if plain else str(raw, "utf-8")
    except _NOT_JSON as exc:
        raise BadSpan(f"malformed: payload is not a span: {exc}") from exc
    start, end = span.start_ns or None, span.end_ns or None
    if start is not None and not 0 < start <= INT_MAX:
        raise BadSpan("invalid: start_ns is out of range")
    if end is not None and not 0 < end <= INT_MAX:
        raise BadSpan("invalid: end_ns is out of range")
    latency: float | None
    if start is not None and end is not None:
        if end < start:
            raise BadSpan("invalid: the span ends before it starts")
        latency = (end - start) / 1e6
    else:
        latency = _amount(attrs.latency_ms, "latency_ms")
    model = _name(attrs.model or attrs.otel_model or attrs.otel_asked, "attrs.model")
    provider = _name(attrs.provider or attrs.otel_provider, "attrs.provider")
    tokens_in = _count(attrs.otel_in if attrs.tokens_in is None else attrs.tokens_in, "tokens_in")
    tokens_out = _count(attrs.otel_out if attrs.tokens_out is None else attrs.tokens_out, "tokens_out")
    cost = _amount(attrs.cost_usd, "cost_usd", COST_USD_MAX)
    time_ns = start or record.timestamp_ns
    price = None
    if cost is None and prices is not None and model is not None:
        cached = _count(attrs.otel_cached if attrs.tokens_cached is None else attrs.tokens_cached, "tokens_cached")
        cost, price = _priced(prices, provider, model, time_ns, tokens_in, tokens_out, cached)
    return SpanRow(
        _id(span.trace_id, "trace_id"),
        _id(span.span_id, "span_id"),
        span.parent_id,
        source if len(source) <= NAME_CHARS_MAX else _long("source"),
        tenant if len(tenant) <= NAME_CHARS_MAX else _long("tenant"),
        _user(attrs.user or attrs.user_dotted or attrs.user_end),
        span.operation if len(span.operation) <= NAME_CHARS_MAX else _long("operation"),
        span.status if len(span.status) <= NAME_CHARS_MAX else _long("status"),
        model,
        provider,
        time_ns,
        start,
        end,
        latency,
        _amount(attrs.ttft_ms, "ttft_ms"),
        tokens_in,
        tokens_out,
        cost,
        _amount(attrs.score, "eval.score"),
        price,
        text,
        record.sequence,
    )


def _no_nul(span: _Span, source: str, tenant: str) -> None:
    """Names become keys, and not every database can hold this character in a text."""
    texts = (span.trace_id, span.span_id, span.parent_id, span.operation, span.status, source, tenant)
    if any("\0" in text for text in texts):
        raise BadSpan("invalid: a name holds the character NUL")


def cached_tokens(attrs: str) -> int | None:
    """The cached part of the input that stored attributes state."""
    found = _attrs(attrs)
    return _count(found.otel_cached if found.tokens_cached is None else found.tokens_cached, "tokens_cached")


def _id(text: str, name: str) -> str:
    if 0 < len(text) <= ID_CHARS_MAX and _printable(text):
        return text
    what = "is missing" if not text else f"is not 1 to {ID_CHARS_MAX} printable ASCII characters"
    raise BadSpan(f"invalid: {name} {what}")


def _printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _long(name: str) -> str:
    raise BadSpan(f"invalid: {name} is longer than {NAME_CHARS_MAX} characters")


def _name(value: object, name: str) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        if len(value) > NAME_CHARS_MAX or "\0" in value:
            raise BadSpan(f"invalid: {name} is longer than {NAME_CHARS_MAX} characters or holds NUL")
        return value
    raise BadSpan(f"invalid: {name} is not text")


def _user(value: object) -> str:
    """Who it was for; a number is an id too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _name(value, "attrs.user") or ""


def _count(value: object, name: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= COUNT_MAX:
        return value
    if isinstance(value, float) and value.is_integer() and 0 <= value <= COUNT_MAX:
        return int(value)  # the seeds send token counts as floats
    raise BadSpan(f"invalid: attrs.{name} is not a whole number from 0 to 2^53")


def _amount(value: object, name: str, most: float = COUNT_MAX) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most:
        return float(value)
    raise BadSpan(f"invalid: attrs.{name} is not a number from 0 to {most:.0f}")
