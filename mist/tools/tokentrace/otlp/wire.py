"""Protobuf messages of our own that read and write the same bytes as OTLP's and google.rpc's.

`Request` is ExportTraceServiceRequest with one change that the wire does not show: attributes are declared as bytes, so
that a span's are had as a list without making an object for each. Most attributes of a batch repeat byte for byte, and
the decoder looks such a one up instead of reading it again. `Status` and `RetryInfo` are google.rpc's: they are not in
opentelemetry-proto, and another package for three fields is not worth it.

The descriptors live in a pool of their own and cannot meet those of other packages.
"""

from __future__ import annotations

from typing import Any

from mist.errors import InvalidArgument

try:
    from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
    from opentelemetry.proto.common.v1 import common_pb2 as common
    from opentelemetry.proto.trace.v1 import trace_pb2 as trace
except ImportError as exc:
    raise InvalidArgument(
        f"OTLP needs a package that is not installed ({(exc.name or 'protobuf').partition('.')[0]})",
        hint="pip install 'mist-stack[otel]'",
    ) from exc

__all__ = [
    "DecodeError",
    "Request",
    "RetryInfo",
    "Status",
    "common",
    "json_format",
    "retry_info",
    "service",
    "status",
    "trace",
]

_SCHEMA: dict[str, tuple[str, ...]] = {
    "Request": ("resource_spans 1 *ResourceSpans",),
    "ResourceSpans": ("resource 1 Resource", "scope_spans 2 *ScopeSpans", "schema_url 3 string"),
    "Resource": ("attributes 1 *bytes", "dropped_attributes_count 2 uint32", "entity_refs 3 *EntityRef"),
    "EntityRef": ("schema_url 1 string", "type 2 string", "id_keys 3 *string", "description_keys 4 *string"),
    "ScopeSpans": ("scope 1 Scope", "spans 2 *Span", "schema_url 3 string"),
    "Scope": ("name 1 string", "version 2 string", "attributes 3 *bytes", "dropped_attributes_count 4 uint32"),
    "Span": (
        "trace_id 1 bytes",
        "span_id 2 bytes",
        "trace_state 3 string",
        "parent_span_id 4 bytes",
        "name 5 string",
        "kind 6 int32",
        "start_time_unix_nano 7 fixed64",
        "end_time_unix_nano 8 fixed64",
        "attributes 9 *bytes",
        "dropped_attributes_count 10 uint32",
        "events 11 *Event",
        "dropped_events_count 12 uint32",
        "links 13 *Link",
        "dropped_links_count 14 uint32",
        "status 15 SpanStatus",
        "flags 16 fixed32",
    ),
    "Event": ("time_unix_nano 1 fixed64", "name 2 string", "attributes 3 *bytes", "dropped_attributes_count 4 uint32"),
    "Link": (
        "trace_id 1 bytes",
        "span_id 2 bytes",
        "trace_state 3 string",
        "attributes 4 *bytes",
        "dropped_attributes_count 5 uint32",
        "flags 6 fixed32",
    ),
    "SpanStatus": ("message 2 string", "code 3 int32"),
    "Status": ("code 1 int32", "message 2 string", "details 3 *Any"),
    "Any": ("type_url 1 string", "value 2 bytes"),
    "RetryInfo": ("retry_delay 1 Duration",),
    "Duration": ("seconds 1 int64", "nanos 2 int32"),
}
_PACKAGE = "mist.otlp"


def _build() -> dict[str, Any]:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="mist/otlp.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for field in fields:
            attribute, number, kind = field.split(" ")
            label = kinds.LABEL_REPEATED if kind.startswith("*") else kinds.LABEL_OPTIONAL
            kind = kind.removeprefix("*")
            made = message.field.add(name=attribute, number=int(number), label=label)
            if kind in _SCHEMA:
                made.type = kinds.TYPE_MESSAGE
                made.type_name = f".{_PACKAGE}.{kind}"
            else:
                made.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _SCHEMA}


_made = _build()
Request = _made["Request"]
Status = _made["Status"]
RetryInfo = _made["RetryInfo"]
RETRY_INFO_URL = "type.googleapis.com/google.rpc.RetryInfo"


def status(code: int, message: str, retry_after_s: float | None = None) -> bytes:
    """A google.rpc.Status, with a RetryInfo where the sender is to come back."""
    out = Status(code=code, message=message)
    if retry_after_s is not None:
        out.details.add(type_url=RETRY_INFO_URL, value=retry_info(retry_after_s))
    data: bytes = out.SerializeToString()
    return data


def retry_info(seconds: float) -> bytes:
    whole = int(seconds)
    info = RetryInfo()
    info.retry_delay.seconds = whole
    info.retry_delay.nanos = int((seconds - whole) * 1e9)
    data: bytes = info.SerializeToString()
    return data
