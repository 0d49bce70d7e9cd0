"""An ExportTraceServiceRequest, protobuf or JSON, to envelopes of type `trace.span`.

Promises: nothing of a span is lost but what docs/reference/otlp.md names; a request that cannot be read raises a
ProtocolError and yields nothing; a span that cannot become an envelope is counted with its reason and the others go on; the same
span always makes the same bytes and the same envelope id, in either encoding.

The payload's JSON is put together once, from pieces: an attribute that was seen before, byte for byte, is looked up
(`Entries`), because most attributes of a batch repeat. Memory: those tables, some 10 MiB each at the very most.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw, Struct

from mist.errors import Malformed, ProtocolError, TooDeep, TooLarge
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope
from mist.protocol.payloads import TRACE_SPAN
from mist.protocol.screen import explain, screen
from mist.tools.tokentrace.otlp import genai, names, shapes, wire
from mist.tools.tokentrace.otlp.entries import ENTRIES_MAX, ENTRY_BYTES_MAX, Entries, Entry, json_text
from mist.tools.tokentrace.otlp.values import DEPTH_MAX, of_bytes, of_double, of_pairs, too_deep

SPANS_MAX = 100_000
EXPANDED_BYTES_MAX = 128 * 1024 * 1024
"""What one request may become: every envelope repeats its resource, so that a small request can make a large stream."""
TIME_MAX = 2**63 - 1
_HEAD_BYTES = 2048
"""What an envelope needs beside its payload, at most."""
_SCREEN_BYTES = 256 * 1024
"""A payload up to this size cannot have too many keys."""
_NO_TRACE = bytes(16)
_NO_SPAN = bytes(8)

_encode = msgspec.json.Encoder().encode


class Decoded(Struct):
    """`reasons` says why spans were rejected, with how many each."""

    envelopes: list[Envelope]
    rejected: int = 0
    reasons: dict[str, int] = {}

    def reject(self, reason: str, spans: int = 1) -> None:
        self.rejected += spans
        self.reasons[reason] = self.reasons.get(reason, 0) + spans

    @property
    def message(self) -> str:
        """One sentence for the sender; empty when nothing was rejected."""
        told = "; ".join(f"{n}: {reason}" for reason, n in list(self.reasons.items())[:5])
        return (
            f"{self.rejected} of {self.rejected + len(self.envelopes)} spans were not stored ({told})" if told else ""
        )


class _Origin(NamedTuple):
    """What the spans of one resource and scope share."""

    source: str
    tenant: str
    text: str


# one request


def decode_protobuf(body: bytes, *, size_bytes_max: int = SIZE_BYTES_MAX, spans_max: int = SPANS_MAX) -> Decoded:
    """Raises Malformed for bytes that are no request, TooLarge for too many spans."""
    try:
        request = wire.Request.FromString(body)
        return _request(request.resource_spans, _protobuf, size_bytes_max, spans_max)
    except wire.DecodeError as exc:
        raise Malformed(f"OTLP request: not protobuf of ExportTraceServiceRequest: {exc}") from exc


def decode_json(body: bytes, *, size_bytes_max: int = SIZE_BYTES_MAX, spans_max: int = SPANS_MAX) -> Decoded:
    """Raises Malformed (LoneSurrogate, TooDeep) for bytes that are no request, TooLarge for too many spans."""
    try:
        return _request(shapes.resource_spans(body), _jsons, size_bytes_max, spans_max)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        error = explain(body, exc)
        raise type(error)(f"OTLP request: {error.message.removeprefix('envelope: ')}") from exc


def _request(resources: Sequence[Any], entries: Entries, size_bytes_max: int, spans_max: int) -> Decoded:
    total = sum(len(scope.spans) for resource in resources for scope in resource.scope_spans)
    if total > spans_max:
        raise TooLarge("request (spans)", size_bytes=total, size_bytes_max=spans_max)
    out = Decoded([])
    left = EXPANDED_BYTES_MAX
    for resource in resources:
        for scope in resource.scope_spans:
            try:
                origin = _origin(resource, scope, entries)
            except TooDeep as exc:
                out.reject(exc.message, len(scope.spans))
                continue
            left = _spans(scope.spans, origin, entries, size_bytes_max, out, left)
    return out


def _origin(spans: Any, scope: Any, entries: Entries) -> _Origin:
    resource = spans.resource
    texts = {entry.name: entry.bare for entry in entries.of(resource.attributes)}
    parts = [f'"{names.RESOURCE}{text[1:]}' for text in texts.values()]
    refs = [
        {
            "schema_url": ref.schema_url,
            "type": ref.type,
            "id_keys": list(ref.id_keys),
            "description_keys": list(ref.description_keys),
        }
        for ref in resource.entity_refs
    ]
    inner = scope.scope
    for name, value in (
        (names.RESOURCE_META + "dropped_attributes_count", resource.dropped_attributes_count),
        (names.RESOURCE_META + "entity_refs", refs),
        (names.RESOURCE_META + "schema_url", spans.schema_url),
        (names.SCOPE + "name", inner.name),
        (names.SCOPE + "version", inner.version),
        (names.SCOPE + "dropped_attributes_count", inner.dropped_attributes_count),
        (names.SCOPE + "schema_url", scope.schema_url),
    ):
        if value:
            parts.append(f'"{name}":{json_text(value)}')
    if inner.attributes:
        parts.append(f'"{names.SCOPE}attributes":{entries.block(inner.attributes)}')
    service = _text_of(texts.get(names.SERVICE, ""))
    tenant = _text_of(texts.get(names.TENANT, ""))
    return _Origin(service[: names.SOURCE_CHARS_MAX] or names.SERVICE_UNKNOWN, tenant, ",".join(parts))


def _text_of(entry: str) -> str:
    """The value of `"name":value` when it is text."""
    if not entry:
        return ""
    (value,) = msgspec.json.decode("{" + entry + "}").values()
    return value if isinstance(value, str) else ""


_names: dict[str, str] = {}


def _name(text: str) -> str:
    """The JSON of a span's name; they repeat."""
    known = json_text(text)
    if len(text) <= ENTRY_BYTES_MAX:
        if len(_names) >= ENTRIES_MAX:
            _names.clear()
        _names[text] = known
    return known


_OPERATION_AT = len(genai.OPERATION) + 3


def _spans(
    spans: Sequence[Any], origin: _Origin, entries: Entries, size_bytes_max: int, out: Decoded, left: int
) -> int:
    """The hot loop: what most spans do not have is handled elsewhere. Returns what is left of the bytes."""
    entries_of, known_name = entries.of, _names.get
    source, tenant, shared = origin
    envelopes = out.envelopes
    payload_bytes_max = size_bytes_max - _HEAD_BYTES
    for span in spans:
        trace_id, span_id, parent_id = span.trace_id, span.span_id, span.parent_span_id
        start, end = span.start_time_unix_nano, span.end_time_unix_nano
        if len(trace_id) != 16 or trace_id == _NO_TRACE:
            out.reject("trace_id is not 16 bytes that are not all zero")
            continue
        if len(span_id) != 8 or span_id == _NO_SPAN:
            out.reject("span_id is not 8 bytes that are not all zero")
            continue
        if parent_id and len(parent_id) != 8:
            out.reject("parent_span_id is neither empty nor 8 bytes")
            continue
        if start > TIME_MAX or end > TIME_MAX:
            out.reject("a time is above 2^63-1 nanoseconds")
            continue
        ours = False
        try:
            found = entries_of(span.attributes)
            name = span.name
            operation = spoken = known_name(name) or _name(name)
            parts = list(map(_text, found))
            filled: list[Entry] = []
            for entry in list(filter(_special, found)):
                if entry.name == genai.OPERATION:
                    operation = entry.text[_OPERATION_AT:]
                    if operation[0] != '"' or operation == '""':
                        operation = spoken
                    elif operation != spoken:
                        parts.append(f'"otel.name":{spoken}')
                elif entry.name == names.ADDED:
                    ours = True
                else:
                    filled.append(entry)
            if filled:
                parts = _columns(found, filled, parts)
            kind = span.kind
            if kind:
                parts.append(_KIND_TEXTS.get(kind) or f'"otel.kind":{kind}')
            status = "ok"
            told = span.status
            code = told.code
            if code or told.message:
                status = "error" if code == names.STATUS_ERROR else "ok"
                parts += _status(code, told.message, found)
            if span.flags:
                parts.append(f'"otel.flags":{span.flags}')
            if span.trace_state:
                parts.append(f'"otel.trace_state":{json_text(span.trace_state)}')
            if span.events or span.links:
                parts += _pointers(span, entries)
            if span.dropped_attributes_count or span.dropped_events_count or span.dropped_links_count:
                parts += _dropped(span)
        except TooDeep as exc:
            out.reject(exc.message)
            continue
        if shared:
            parts.append(shared)
        trace, own_id = trace_id.hex(), span_id.hex()
        parent = f',"parent_id":"{parent_id.hex()}"' if parent_id and parent_id != _NO_SPAN else ""
        attrs = f',"attrs":{{{",".join(parts)}}}' if parts else ""
        payload = (
            f'{{"trace_id":"{trace}","span_id":"{own_id}"{parent},"operation":{operation},'
            f'"start_ns":{start},"end_ns":{end},"status":"{status}"{attrs}}}'
        ).encode()
        if ours:
            payload, trace, own_id = _ours(payload)
        left -= len(payload)
        if left < 0:
            raise TooLarge(
                "request (as envelopes)", size_bytes=EXPANDED_BYTES_MAX - left, size_bytes_max=EXPANDED_BYTES_MAX
            )
        if len(payload) > _SCREEN_BYTES:
            try:
                screen(payload, size_bytes_max=payload_bytes_max)
            except (ProtocolError, TooLarge) as exc:
                out.reject(exc.message.replace("envelope", "the span"))
                continue
        elif len(payload) > payload_bytes_max:
            out.reject(f"the span is larger than {payload_bytes_max} bytes")
            continue
        envelopes.append(
            Envelope(
                version="1", id=f"{trace}-{own_id}", source=source, type=TRACE_SPAN, timestamp_ns=end or start,
                payload=Raw(payload), tenant=tenant,
            )
        )  # fmt: skip
    return left


_KIND_TEXTS = {number: f'"otel.kind":"{text}"' for number, text in enumerate(names.KINDS) if text}


_text, _special = itemgetter(1), itemgetter(2)


def _columns(found: list[Entry], special: list[Entry], parts: list[str]) -> list[str]:
    """The texts of a span, whose columns are not all filled by the first choice for each."""
    best: dict[str, Entry] = {}
    for entry in found:
        if entry.column and (entry.column not in best or entry.rank < best[entry.column].rank):
            best[entry.column] = entry
    own = [entry.column for entry in best.values() if entry.rank < 0]
    if own:  # the first choices have filled what the span says itself
        parts[: len(found)] = [
            entry.text.removesuffix("," + entry.filled) if entry.filled and entry.column in own else entry.text
            for entry in found
        ]
        parts.append(f'"{names.OWN}":{json_text(own)}')
    parts += [entry.filled for entry in special if entry.rank > 0 and best.get(entry.column) is entry]
    return parts


def _status(code: int, message: str, found: list[Entry]) -> list[str]:
    parts = []
    if code == names.STATUS_OK:
        parts.append(f'"{names.STATUS_CODE}":"OK"')
    elif code not in (0, names.STATUS_ERROR):
        parts.append(f'"{names.STATUS_CODE}":{code}')
    if message:
        text = json_text(message)
        parts.append(f'"{names.STATUS_TEXT}":{text}')
        if code == names.STATUS_ERROR and not any(entry.column == "error" for entry in found):
            parts.append(f'"error":{text}')
    return parts


def _dropped(span: Any) -> list[str]:
    counts = [(what, getattr(span, f"dropped_{what}_count")) for what in names.DROPPED]
    return [f'"{names.DROPPED_COUNT.format(what)}":{count}' for what, count in counts if count]


def _pointers(span: Any, entries: Entries) -> list[str]:
    parts = []
    if span.events:
        parts.append(f'"{names.EVENTS}":[{",".join([_event(event, entries) for event in span.events])}]')
    if span.links:
        parts.append(f'"{names.LINKS}":[{",".join([_link(link, entries) for link in span.links])}]')
    return parts


def _event(event: Any, entries: Entries) -> str:
    parts = [f'"name":{json_text(event.name)},"time_ns":{event.time_unix_nano}']
    if event.attributes:
        parts.append(f'"attributes":{entries.block(event.attributes)}')
    if event.dropped_attributes_count:
        parts.append(f'"dropped_attributes_count":{event.dropped_attributes_count}')
    return "{" + ",".join(parts) + "}"


def _link(link: Any, entries: Entries) -> str:
    parts = [f'"trace_id":"{link.trace_id.hex()}","span_id":"{link.span_id.hex()}"']
    if link.trace_state:
        parts.append(f'"trace_state":{json_text(link.trace_state)}')
    if link.attributes:
        parts.append(f'"attributes":{entries.block(link.attributes)}')
    if link.dropped_attributes_count:
        parts.append(f'"dropped_attributes_count":{link.dropped_attributes_count}')
    if link.flags:
        parts.append(f'"flags":{link.flags}')
    return "{" + ",".join(parts) + "}"


def _ours(payload: bytes) -> tuple[bytes, str, str]:
    """A span that we sent, as it was before: what was added for OTLP's sake is taken out."""
    span = msgspec.json.decode(payload)
    attrs = span["attrs"]
    added = attrs[names.ADDED]
    if isinstance(added, list) and all(isinstance(name, str) for name in added):
        for name in (*added, names.ADDED):
            attrs.pop(name, None)
        if names.NAME in attrs:  # what the span is called is our operation, whatever its attributes say
            span["operation"] = attrs.pop(names.NAME)
        status = attrs.pop(names.STATUS, None)
        if isinstance(status, str):
            span["status"] = status
        for key, size, name in zip(("trace_id", "span_id", "parent_id"), (16, 8, 8), names.ID_NAMES, strict=True):
            text = attrs.get(name)
            # only the id that these bytes were made from: nobody can lend a span another's identity
            if isinstance(text, str) and names.id_bytes(text, size).hex() == span.get(key):
                span[key] = attrs.pop(name)
        if not attrs:
            del span["attrs"]
        payload = _encode(span)
    return payload, span["trace_id"], span["span_id"]


# protobuf values


def _read_protobuf(raw: bytes) -> tuple[str, Any]:
    size = len(raw)
    # Most attributes that were not seen before are a short text under a short key: read by hand in half the time.
    value = raw[1] + 4 if 8 < size < 128 else size
    if (
        value + 2 < size
        and raw[0] == raw[value] == 0x0A
        and raw[value - 2] == 0x12
        and raw[value - 1] == size - value
        and raw[value + 1] == size - value - 2
    ):
        try:
            return raw[2 : value - 2].decode(), raw[value + 2 :].decode()
        except UnicodeDecodeError:
            pass  # protobuf's own reader says what is wrong
    pair = wire.common.KeyValue.FromString(raw)
    return pair.key, _plain(pair.value, 0)


def _plain(value: Any, depth: int) -> Any:
    kind = value.WhichOneof("value")
    if kind is None or kind == "string_value_strindex":  # the second is for profiles only
        return None
    inner = getattr(value, kind)
    if kind == "bytes_value":
        return of_bytes(inner)
    if kind == "double_value":
        return of_double(inner)
    if kind not in ("array_value", "kvlist_value"):
        return inner
    if depth >= DEPTH_MAX:
        raise too_deep()
    if kind == "array_value":
        return [_plain(item, depth + 1) for item in inner.values]
    return of_pairs([(pair.key, _plain(pair.value, depth + 1)) for pair in inner.values])


_protobuf = Entries(_read_protobuf)
_jsons = Entries(shapes.read_pair)
