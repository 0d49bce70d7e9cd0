"""Envelopes of type `trace.span` to OTLP: the way back of `decode`.

Promises: a span that came by OTLP leaves as the same span (attributes in the same order), whatever store it went through,
as long as `attrs` stayed the JSON it was; any other span leaves with the attributes of the conventions added, and comes
back by OTLP as the same payload from the same source. An attribute that cannot be what its reserved name says is sent as
an attribute. Integers beyond 64 bits become doubles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from mist.errors import InvalidArgument, MistError
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN, TraceSpan
from mist.tools.tokentrace.otlp import genai, names, wire
from mist.tools.tokentrace.otlp.values import special

_trace: Any = wire.trace  # its enums are types of their own, ours are numbers
_UINT32, _UINT64 = 2**32 - 1, 2**64 - 1
_ERRORS = ("error", "timeout")
"""Our statuses that are OTLP's error."""


def request_of(envelopes: Iterable[Envelope], on_refused: Callable[[InvalidArgument], None] | None = None) -> Any:
    """An ExportTraceServiceRequest, spans in order, those of one resource and scope together.

    Raises InvalidArgument for an envelope that is no span, or one with a time that OTLP cannot say; or tells `on_refused`
    and leaves it out.
    """
    request = wire.service.ExportTraceServiceRequest()
    groups: dict[bytes, Any] = {}
    scopes: dict[bytes, Any] = {}
    for envelope in envelopes:
        try:
            resource, scope, span = _span(envelope)
        except InvalidArgument as exc:
            if on_refused is None:
                raise
            on_refused(exc)
            continue
        key = resource.SerializeToString(deterministic=True)
        group = groups.get(key)
        if group is None:
            group = groups[key] = request.resource_spans.add()
            group.CopyFrom(resource)
        key += b"\0" + scope.SerializeToString(deterministic=True)
        holder = scopes.get(key)
        if holder is None:
            holder = scopes[key] = group.scope_spans.add()
            holder.CopyFrom(scope)
        holder.spans.append(span)
    return request


def encode_protobuf(request: Any) -> bytes:
    data: bytes = request.SerializeToString()
    return data


def encode_json(request: Any) -> bytes:
    """OTLP's JSON: protobuf's, but ids in hex and enums as numbers."""
    out = wire.json_format.MessageToDict(request, use_integers_for_enums=True)
    for group, plain_group in zip(request.resource_spans, out.get("resourceSpans", ()), strict=True):
        for scope, plain_scope in zip(group.scope_spans, plain_group.get("scopeSpans", ()), strict=True):
            for span, plain in zip(scope.spans, plain_scope.get("spans", ()), strict=True):
                _hex(span, plain)
                for link, plain_link in zip(span.links, plain.get("links", ()), strict=True):
                    _hex(link, plain_link)
    return msgspec.json.encode(out)


def _hex(message: Any, plain: dict[str, Any]) -> None:
    for key, value in (
        ("traceId", message.trace_id),
        ("spanId", message.span_id),
        ("parentSpanId", getattr(message, "parent_span_id", b"")),
    ):
        if value:
            plain[key] = value.hex()


def _span(envelope: Envelope) -> tuple[Any, Any, Any]:
    """(ResourceSpans without scopes, ScopeSpans without spans, Span)"""
    try:
        if envelope.type != TRACE_SPAN:
            raise InvalidArgument(f"it is of type {envelope.type}")
        payload = envelope.decode(TraceSpan) or TraceSpan()
        if not payload.trace_id or not payload.span_id:
            raise InvalidArgument("it has no trace_id or no span_id")
        if payload.start_ns < 0 or payload.end_ns < 0:
            raise InvalidArgument("a time is below zero")
    except MistError as exc:
        raise InvalidArgument(f"envelope {envelope.id} cannot be sent by OTLP: {exc.message}") from exc
    out = _Out(payload)
    if names.RESOURCE + names.SERVICE in payload.attrs or envelope.source == names.SERVICE_UNKNOWN:
        _came(out, payload)
    else:
        _ours(out, payload, envelope)
    return out.resource, out.scope, out.span


class _Out:
    """The three messages, and how attributes get into them."""

    def __init__(self, payload: TraceSpan) -> None:
        self.resource = _trace.ResourceSpans()
        self.scope = _trace.ScopeSpans()
        self.span = _trace.Span(
            trace_id=names.id_bytes(payload.trace_id, 16),
            span_id=names.id_bytes(payload.span_id, 8),
            parent_span_id=names.id_bytes(payload.parent_id, 8) if payload.parent_id else b"",
            name=payload.operation,
            start_time_unix_nano=payload.start_ns,
            end_time_unix_nano=payload.end_ns,
        )
        if payload.status in _ERRORS:
            self.span.status.code = names.STATUS_ERROR

    def attribute(self, name: str, value: Any) -> None:
        if name.startswith(names.ATTR):
            name = name.removeprefix(names.ATTR)
        elif name.startswith(names.RESERVED) and self._field(name, value):
            return
        _pair(self.span.attributes, name, value)

    def _field(self, name: str, value: Any) -> bool:
        """Put a value where its reserved name says; whether it can stand there."""
        if name.startswith(names.RESOURCE):
            _pair(self.resource.resource.attributes, name.removeprefix(names.RESOURCE), value)
            return True
        setter = _FIELDS.get(name)
        return setter is not None and setter(self, value)


def _came(out: _Out, payload: TraceSpan) -> None:
    """A span that came by OTLP: what was derived on its way in stays here."""
    attrs = payload.attrs
    own = attrs.get(names.OWN, ())
    derived = genai.columns(attrs)
    if payload.status == "error" and names.STATUS_TEXT in attrs:
        derived.setdefault("error", attrs[names.STATUS_TEXT])
    for name, value in attrs.items():
        if name == names.OWN or (name in derived and name not in own and value == derived[name]):
            continue
        out.attribute(name, value)


def _ours(out: _Out, payload: TraceSpan, envelope: Envelope) -> None:
    """A span of our own: all it has, what the conventions call it, and a list of what to take out again."""
    attrs = payload.attrs
    for name, value in attrs.items():
        out.attribute(name, value)
    added = genai.conventional(payload.operation, attrs)
    listed = list(added)
    if genai.OPERATION in added:
        out.span.kind = _CLIENT
        listed.append(names.KIND)
        if model := genai.text(attrs.get("model")):
            out.span.name = f"{payload.operation} {model}"
            listed.append(names.NAME)
    # what the way in will make of this, and was not there
    listed += [name for name in genai.columns(attrs) if name not in attrs]
    if not genai.COLUMNS.isdisjoint(attrs):
        listed.append(names.OWN)
    if payload.status not in ("ok", "error"):
        added[names.STATUS] = payload.status
    for name, text, size in zip(
        names.ID_NAMES, (payload.trace_id, payload.span_id, payload.parent_id), (16, 8, 8), strict=True
    ):
        if text and not names.is_id(text, size):
            added[name] = text
    for name, value in ((names.SERVICE, envelope.source), (names.TENANT, envelope.tenant)):
        if value:
            _pair(out.resource.resource.attributes, name, value)
            listed.append(names.RESOURCE + name)
    added[names.ADDED] = listed
    for name, value in added.items():
        _pair(out.span.attributes, name, value)


_CLIENT = names.KINDS.index("client")


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


Setter = Callable[[_Out, Any], bool]


def _number(part: str, field: str, most: int = _UINT32) -> Setter:
    def set_(out: _Out, value: Any) -> bool:
        if not _whole(value, 1, most):
            return False
        setattr(_part(out, part), field, value)
        return True

    return set_


def _string(part: str, field: str) -> Setter:
    def set_(out: _Out, value: Any) -> bool:
        if not isinstance(value, str):
            return False
        setattr(_part(out, part), field, value)
        return True

    return set_


def _part(out: _Out, path: str) -> Any:
    found: Any = out
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _kind(out: _Out, value: Any) -> bool:
    number = names.KINDS.index(value) if value in names.KINDS[1:] else value
    if not _whole(number, -(2**31), 2**31 - 1):
        return False
    out.span.kind = number
    return True


def _code(out: _Out, value: Any) -> bool:
    number = names.STATUS_OK if value == "OK" else value
    if not _whole(number, -(2**31), 2**31 - 1) or out.span.status.code:
        return False
    out.span.status.code = number
    return True


def _scope_attributes(out: _Out, value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    _pairs(out.scope.scope.attributes, value)
    return True


def _events(out: _Out, value: Any) -> bool:
    try:
        events = msgspec.convert(value, list[_Event])
    except msgspec.ValidationError:
        return False
    for event in events:
        made = out.span.events.add(
            name=event.name, time_unix_nano=event.time_ns, dropped_attributes_count=event.dropped_attributes_count
        )
        _pairs(made.attributes, event.attributes)
    return True


def _links(out: _Out, value: Any) -> bool:
    try:
        links = msgspec.convert(value, list[_Link])
        ids = [(bytes.fromhex(link.trace_id), bytes.fromhex(link.span_id)) for link in links]
    except (msgspec.ValidationError, ValueError):
        return False
    for link, (trace_id, span_id) in zip(links, ids, strict=True):
        made = out.span.links.add(
            trace_id=trace_id, span_id=span_id, trace_state=link.trace_state, flags=link.flags,
            dropped_attributes_count=link.dropped_attributes_count,
        )  # fmt: skip
        _pairs(made.attributes, link.attributes)
    return True


def _entity_refs(out: _Out, value: Any) -> bool:
    try:
        refs = msgspec.convert(value, list[_EntityRef])
    except msgspec.ValidationError:
        return False
    for ref in refs:
        out.resource.resource.entity_refs.add(
            schema_url=ref.schema_url, type=ref.type, id_keys=ref.id_keys, description_keys=ref.description_keys
        )
    return True


Uint32 = Annotated[int, Meta(ge=0, le=_UINT32)]


class _Event(Struct, forbid_unknown_fields=True):
    name: str = ""
    time_ns: int = 0
    attributes: dict[str, Any] = {}
    dropped_attributes_count: Uint32 = 0

    def __post_init__(self) -> None:
        # msgspec has no constraint above 2^63-1
        if not 0 <= self.time_ns <= _UINT64:
            raise ValueError("time_ns")


class _Link(Struct, forbid_unknown_fields=True):
    trace_id: str = ""
    span_id: str = ""
    trace_state: str = ""
    attributes: dict[str, Any] = {}
    dropped_attributes_count: Uint32 = 0
    flags: Uint32 = 0


class _EntityRef(Struct, forbid_unknown_fields=True):
    schema_url: str = ""
    type: str = ""
    id_keys: list[str] = []
    description_keys: list[str] = []


_FIELDS: dict[str, Setter] = {
    names.NAME: _string("span", "name"),
    names.KIND: _kind,
    names.STATUS_CODE: _code,
    names.STATUS_TEXT: _string("span.status", "message"),
    names.TRACE_STATE: _string("span", "trace_state"),
    names.FLAGS: _number("span", "flags"),
    names.EVENTS: _events,
    names.LINKS: _links,
    **{names.DROPPED_COUNT.format(what): _number("span", f"dropped_{what}_count") for what in names.DROPPED},
    names.SCOPE + "name": _string("scope.scope", "name"),
    names.SCOPE + "version": _string("scope.scope", "version"),
    names.SCOPE + "attributes": _scope_attributes,
    names.SCOPE + "dropped_attributes_count": _number("scope.scope", "dropped_attributes_count"),
    names.SCOPE + "schema_url": _string("scope", "schema_url"),
    names.RESOURCE_META + "dropped_attributes_count": _number("resource.resource", "dropped_attributes_count"),
    names.RESOURCE_META + "entity_refs": _entity_refs,
    names.RESOURCE_META + "schema_url": _string("resource", "schema_url"),
}


# values


def _pairs(out: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        _pair(out, name, value)


def _pair(out: Any, name: str, value: Any) -> None:
    _value(out.add(key=name).value, value)


def _value(out: Any, value: Any) -> None:
    if isinstance(value, str):
        out.string_value = value
    elif isinstance(value, bool):
        out.bool_value = value
    elif isinstance(value, int):
        if -(2**63) <= value < 2**63:
            out.int_value = value
        else:
            out.double_value = float(value) if abs(value) < 2**1023 else inf if value > 0 else -inf
    elif isinstance(value, float):
        out.double_value = value
    elif isinstance(value, list):
        out.array_value.SetInParent()
        for item in value:
            _value(out.array_value.values.add(), item)
    elif isinstance(value, dict):
        _map(out, value)
    else:
        out.SetInParent()  # null: a value that is not set


def _map(out: Any, value: dict[str, Any]) -> None:
    meant = special(value)
    if isinstance(meant, bytes):
        out.bytes_value = meant
    elif isinstance(meant, float):
        out.double_value = meant
    else:
        out.kvlist_value.SetInParent()
        for name, item in meant if meant is not None else value.items():
            _pair(out.kvlist_value.values, name, item)
