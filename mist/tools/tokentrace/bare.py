"""Bare spans to envelopes: the bodies of `POST /spans`.

A span comes in the wire shape (trace_id, span_id, parent_id, operation, start_ns, end_ns, status, attrs) or in the shape of
the documents (parent_span_id, name, started_at, ended_at, prompt_tokens, comp_tokens, attributes …), or mixed; where both
name a thing ours wins. What is no field of the wire shape becomes an attribute. A null is unknown, and so is a `ttft_ms`
of 0, which the documents leave out of their figures.

Promises: the id of an envelope is made of the span's ids, so that a body sent again is stored once, also beside OTLP.
Only what no envelope can be made of is refused here; what is no possible span is judged where all spans are, in the ingest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Raw

from mist.errors import InvalidArgument, Malformed, MistError, ProtocolError, TooLarge
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN
from mist.tools.tokentrace.files import ours, time_ns
from mist.transport.server import Limits, at

PATH = "/spans"
SPANS_MAX = 1000
"""Of one body, as the documents have it."""
SOURCE = "spans"
SOURCE_HEADER = b"mist-source"

WIRE = ("trace_id", "span_id", "parent_id", "operation", "start_ns", "end_ns", "status")
_ID_CHARS_MAX = 200


def envelopes(body: bytes, headers: Mapping[bytes, bytes], limits: Limits) -> tuple[list[Envelope], bool]:
    """The spans of a body, an object or an array of them; never a single one that is answered with nothing.

    Raises Malformed naming the item, TooLarge.
    """
    try:
        items = msgspec.json.decode(body, type=list[Raw]) if body.lstrip()[:1] == b"[" else [Raw(body)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise codec.refuse(Malformed(f"body: {exc}")) from exc
    if len(items) > limits.envelopes_max:
        raise codec.refuse(TooLarge("request (spans)", size_bytes=len(items), size_bytes_max=limits.envelopes_max))
    source = headers.get(SOURCE_HEADER, b"").decode("utf-8", "replace").strip() or SOURCE
    out = []
    for number, item in enumerate(items, 1):
        try:
            out.append(_envelope(bytes(item), source, limits.size_bytes_max))
        except (ProtocolError, TooLarge) as exc:
            raise at(exc, "item", number) from None
    return out, False


def _envelope(item: bytes, source: str, size_bytes_max: int) -> Envelope:
    try:
        found = msgspec.json.decode(item)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise codec.refuse(Malformed(f"not JSON: {exc}")) from exc
    try:
        payload = _payload(found)
        env = Envelope.new(TRACE_SPAN, payload, source=source, id=_id(payload["trace_id"], payload["span_id"]))
    except MistError as exc:
        raise codec.refuse(Malformed(exc.message)) from exc
    return codec.decode_foreign(codec.encode(env), size_bytes_max=size_bytes_max)


def _payload(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise InvalidArgument("a span is an object")
    fields = ours(found)
    attrs = fields.pop("attrs", {})
    if not isinstance(attrs, dict):
        raise InvalidArgument("attrs is not an object")
    for name in ("trace_id", "span_id"):
        if not isinstance(fields.get(name), str) or not fields[name]:
            raise InvalidArgument(f"{name} is missing")
    for name in ("start_ns", "end_ns"):
        if isinstance(fields.get(name), str):
            try:
                fields[name] = time_ns(fields[name])
            except ValueError as exc:
                raise InvalidArgument(f"{name}: {exc}") from exc
    payload = {name: fields.pop(name) for name in WIRE if name in fields}
    return {**payload, "attrs": {**attrs, **fields}}


def _id(trace_id: str, span_id: str) -> str:
    """As OTLP's ids are made, where that can be told apart and is short enough; else a digest of both."""
    both = trace_id + span_id
    if both.isascii() and both.isalnum() and len(both) <= _ID_CHARS_MAX:
        return f"{trace_id}-{span_id}"
    return hashlib.sha256(f"{len(trace_id)}:{both}".encode("utf-8", "replace")).hexdigest()[:32]
