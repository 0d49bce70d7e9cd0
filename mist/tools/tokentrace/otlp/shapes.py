"""OTLP's JSON, read by its rules, as objects that look like the protobuf messages of `wire`.

Ids are hex, 64-bit integers text or numbers, enums numbers (their names are read too), bytes base64 of either alphabet;
keys are lowerCamelCase, unknown ones are passed over, null is absent. Attributes stay JSON until `read_pair`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from math import inf, nan
from typing import Any

import msgspec
from msgspec import Raw, Struct

from mist.errors import Malformed
from mist.tools.tokentrace.otlp import names
from mist.tools.tokentrace.otlp.values import DEPTH_MAX, of_bytes, of_double, of_pairs, too_deep

_Number = int | str | float | None


class JsonValue(Struct, rename="camel", gc=False):
    string_value: str | None = None
    bool_value: bool | None = None
    int_value: _Number = None
    double_value: _Number = None
    array_value: JsonArray | None = None
    kvlist_value: JsonMap | None = None
    bytes_value: str | None = None


class JsonArray(Struct, gc=False):
    values: list[JsonValue | None] | None = None


class JsonPair(Struct, gc=False):
    key: str | None = None
    value: JsonValue | None = None


class JsonMap(Struct, gc=False):
    values: list[JsonPair] | None = None


class JsonRef(Struct, rename="camel"):
    schema_url: str | None = None
    type: str | None = None
    id_keys: list[str] | None = None
    description_keys: list[str] | None = None


class JsonResource(Struct, rename="camel"):
    attributes: list[Raw] | None = None
    dropped_attributes_count: _Number = None
    entity_refs: list[JsonRef] | None = None


class JsonScope(Struct, rename="camel"):
    name: str | None = None
    version: str | None = None
    attributes: list[Raw] | None = None
    dropped_attributes_count: _Number = None


class JsonStatus(Struct):
    message: str | None = None
    code: _Number = None


class JsonEvent(Struct, rename="camel"):
    time_unix_nano: _Number = None
    name: str | None = None
    attributes: list[Raw] | None = None
    dropped_attributes_count: _Number = None


class JsonLink(Struct, rename="camel"):
    trace_id: str | None = None
    span_id: str | None = None
    trace_state: str | None = None
    attributes: list[Raw] | None = None
    dropped_attributes_count: _Number = None
    flags: _Number = None


class JsonSpan(Struct, rename="camel"):
    trace_id: str | None = None
    span_id: str | None = None
    trace_state: str | None = None
    parent_span_id: str | None = None
    flags: _Number = None
    name: str | None = None
    kind: _Number = None
    start_time_unix_nano: _Number = None
    end_time_unix_nano: _Number = None
    attributes: list[Raw] | None = None
    dropped_attributes_count: _Number = None
    events: list[JsonEvent] | None = None
    dropped_events_count: _Number = None
    links: list[JsonLink] | None = None
    dropped_links_count: _Number = None
    status: JsonStatus | None = None


class JsonScopeSpans(Struct, rename="camel"):
    scope: JsonScope | None = None
    spans: list[JsonSpan] | None = None
    schema_url: str | None = None


class JsonResourceSpans(Struct, rename="camel"):
    resource: JsonResource | None = None
    scope_spans: list[JsonScopeSpans] | None = None
    schema_url: str | None = None


class JsonRequest(Struct, rename="camel"):
    resource_spans: list[JsonResourceSpans] | None = None


_request = msgspec.json.Decoder(JsonRequest).decode
_json_pair = msgspec.json.Decoder(JsonPair).decode
_UINT32, _UINT64 = 2**32 - 1, 2**64 - 1
_SPECIAL = {"NaN": nan, "Infinity": inf, "-Infinity": -inf}


class Plain(Struct, gc=False):
    """What a message looks like to `_spans`, with all fields there."""

    attributes: list[bytes] = []
    dropped_attributes_count: int = 0
    dropped_events_count: int = 0
    dropped_links_count: int = 0
    trace_id: bytes = b""
    span_id: bytes = b""
    parent_span_id: bytes = b""
    trace_state: str = ""
    flags: int = 0
    name: str = ""
    kind: int = 0
    code: int = 0
    message: str = ""
    time_unix_nano: int = 0
    start_time_unix_nano: int = 0
    end_time_unix_nano: int = 0
    version: str = ""
    schema_url: str = ""
    type: str = ""
    id_keys: list[str] = []
    description_keys: list[str] = []
    entity_refs: list[Any] = []
    events: list[Any] = []
    links: list[Any] = []
    spans: list[Any] = []
    scope_spans: list[Any] = []
    status: Any = None
    scope: Any = None
    resource: Any = None


_NOTHING = Plain()


def resource_spans(body: bytes) -> list[Plain]:
    """The ResourceSpans of a request. Raises what msgspec raises for what is not JSON of that shape, and Malformed."""
    return [_of_json(spans) for spans in _request(body).resource_spans or ()]


def _of_json(spans: JsonResourceSpans) -> Plain:
    resource = spans.resource or JsonResource()
    refs = [
        Plain(
            schema_url=r.schema_url or "",
            type=r.type or "",
            id_keys=r.id_keys or [],
            description_keys=r.description_keys or [],
        )
        for r in resource.entity_refs or ()
    ]
    return Plain(
        resource=Plain(
            attributes=_raws(resource.attributes),
            dropped_attributes_count=_count(resource.dropped_attributes_count),
            entity_refs=refs,
        ),
        schema_url=spans.schema_url or "",
        scope_spans=[_of_json_scope(s) for s in spans.scope_spans or ()],
    )


def _of_json_scope(spans: JsonScopeSpans) -> Plain:
    scope = spans.scope or JsonScope()
    return Plain(
        scope=Plain(
            name=scope.name or "",
            version=scope.version or "",
            attributes=_raws(scope.attributes),
            dropped_attributes_count=_count(scope.dropped_attributes_count),
        ),
        schema_url=spans.schema_url or "",
        spans=[_of_json_span(s) for s in spans.spans or ()],
    )


def _of_json_span(s: JsonSpan) -> Plain:
    return Plain(
        trace_id=_hex(s.trace_id),
        span_id=_hex(s.span_id),
        parent_span_id=_hex(s.parent_span_id),
        trace_state=s.trace_state or "",
        flags=_count(s.flags),
        name=s.name or "",
        kind=_enum(s.kind, "SPAN_KIND_", _KIND_NAMES),
        start_time_unix_nano=_integer(s.start_time_unix_nano, 0, _UINT64),
        end_time_unix_nano=_integer(s.end_time_unix_nano, 0, _UINT64),
        attributes=_raws(s.attributes),
        dropped_attributes_count=_count(s.dropped_attributes_count),
        events=[
            Plain(
                time_unix_nano=_integer(e.time_unix_nano, 0, _UINT64),
                name=e.name or "",
                attributes=_raws(e.attributes),
                dropped_attributes_count=_count(e.dropped_attributes_count),
            )
            for e in s.events or ()
        ],
        dropped_events_count=_count(s.dropped_events_count),
        links=[
            Plain(
                trace_id=_hex(k.trace_id),
                span_id=_hex(k.span_id),
                trace_state=k.trace_state or "",
                attributes=_raws(k.attributes),
                dropped_attributes_count=_count(k.dropped_attributes_count),
                flags=_count(k.flags),
            )
            for k in s.links or ()
        ],
        dropped_links_count=_count(s.dropped_links_count),
        status=_NOTHING
        if s.status is None
        else Plain(code=_enum(s.status.code, "STATUS_CODE_", _CODE_NAMES), message=s.status.message or ""),
    )


_KIND_NAMES = ("UNSPECIFIED", *(kind.upper() for kind in names.KINDS[1:]))
_CODE_NAMES = ("UNSET", "OK", "ERROR")


def _raws(attributes: list[Raw] | None) -> list[bytes]:
    return [bytes(raw) for raw in attributes] if attributes else []


def _hex(text: str | None) -> bytes:
    """The bytes of an id; none for what is not hex: the span is then rejected for that."""
    if not text:
        return b""
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b"?"


def _count(value: _Number) -> int:
    return _integer(value, 0, _UINT32)


def _integer(value: _Number, least: int, most: int) -> int:
    if value is None:
        return 0
    try:
        number = int(value)
    except (ValueError, OverflowError):
        number = least - 1
    if not least <= number <= most or (isinstance(value, float) and number != value):
        raise Malformed(f"OTLP request: {str(value)[:40]!r} is not a whole number from {least} to {most}")
    return number


def _enum(value: _Number, prefix: str, known: Sequence[str]) -> int:
    if isinstance(value, str) and value.removeprefix(prefix) in known:
        return known.index(value.removeprefix(prefix))
    return _integer(value, -(2**31), 2**31 - 1)


def read_pair(raw: bytes) -> tuple[str, Any]:
    pair = _json_pair(raw)
    return pair.key or "", _plain_json(pair.value, 0)


def _plain_json(value: JsonValue | None, depth: int) -> Any:
    if value is None:
        return None
    found = [name for name in JsonValue.__struct_fields__ if getattr(value, name) is not None]
    if not found:
        return None
    if len(found) > 1:
        raise Malformed(f"OTLP request: one value cannot be both {found[0]} and {found[1]}")
    if value.string_value is not None:
        return value.string_value
    if value.bool_value is not None:
        return value.bool_value
    if value.int_value is not None:
        return _integer(value.int_value, -(2**63), 2**63 - 1)
    if value.double_value is not None:
        return of_double(_double(value.double_value))
    if value.bytes_value is not None:
        return of_bytes(_base64(value.bytes_value))
    if depth >= DEPTH_MAX:
        raise too_deep()
    if value.array_value is not None:
        return [_plain_json(item, depth + 1) for item in value.array_value.values or ()]
    pairs = (value.kvlist_value and value.kvlist_value.values) or ()
    return of_pairs([(pair.key or "", _plain_json(pair.value, depth + 1)) for pair in pairs])


def _double(value: int | str | float) -> float:
    if isinstance(value, str):
        if value in _SPECIAL:
            return _SPECIAL[value]
        if not value.isascii() or value.strip("0123456789+-.eE"):
            raise Malformed(f"OTLP request: {value[:40]!r} is not a number")
    try:
        return float(value)
    except (ValueError, OverflowError) as exc:
        raise Malformed(f"OTLP request: {str(value)[:40]!r} is not a double") from exc


def _base64(text: str) -> bytes:
    """Of either alphabet, with or without padding."""
    plain = text.rstrip("=").translate(_STANDARD)
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise Malformed("OTLP request: a bytesValue is not base64") from exc


_STANDARD = str.maketrans("-_", "+/")
