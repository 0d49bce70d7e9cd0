"""The names under which what OTLP knows and our payload does not is kept in `attrs`. docs/reference/otlp.md explains them."""

from __future__ import annotations

from hashlib import sha256

NAME = "otel.name"
KIND = "otel.kind"
STATUS_CODE = "otel.status_code"
STATUS_TEXT = "otel.status_description"
TRACE_STATE = "otel.trace_state"
FLAGS = "otel.flags"
EVENTS = "otel.events"
LINKS = "otel.links"
DROPPED = ("attributes", "events", "links")
DROPPED_COUNT = "otel.dropped_{}_count"
SCOPE = "otel.scope."
RESOURCE_META = "otel.resource."
OWN = "otel.own"
"""Of our columns' names, those that were attributes of the span itself, so that they are not taken for added ones."""
ATTR = "otel.attr."
"""Before the name of a span's attribute that would read as one of these."""
RESOURCE = "resource."
RESERVED = ("otel.", RESOURCE)

ADDED = "mist.added"
"""On a span that we sent: what was added for OTLP's sake and is taken out again when it comes back."""
STATUS = "mist.status"
ID_NAMES = ("mist.trace_id", "mist.span_id", "mist.parent_id")
TENANT = "mist.tenant"
"""A resource attribute: the tenant of the envelopes."""

SERVICE = "service.name"
SERVICE_UNKNOWN = "unknown_service"
SOURCE_CHARS_MAX = 128

KINDS = ("", "internal", "server", "client", "producer", "consumer")
"""By number. A number that we do not know stays one."""
STATUS_OK, STATUS_ERROR = 1, 2


def is_id(text: str, size: int) -> bool:
    """Whether OTLP can carry this id as it is: so many bytes in lower-case hex, not all zero."""
    return len(text) == 2 * size and not text.strip("0123456789abcdef") and bool(text.strip("0"))


def id_bytes(text: str, size: int) -> bytes:
    """The id as OTLP's bytes; one that it cannot carry is replaced by the beginning of its SHA-256."""
    return bytes.fromhex(text) if is_id(text, size) else sha256(text.encode()).digest()[:size]
