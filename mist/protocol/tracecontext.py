"""W3C trace context: the `traceparent` text and the ids in it (https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re

from msgspec import Struct

from mist.protocol.ids import new_id

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})", re.ASCII)


class TraceContext(Struct, frozen=True):
    """`trace_id` 32 hex, `span_id` 16 hex (the parent of what comes next), `flags` bit 0 = sampled."""

    trace_id: str
    span_id: str
    flags: int = 1

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"

    def child(self) -> TraceContext:
        """The same trace with a new span id."""
        return TraceContext(self.trace_id, new_id()[:16], self.flags)


def parse_traceparent(text: str) -> TraceContext | None:
    """The context, or None when the text is not one (wrong length or case, extra fields, zero ids, version ff).

    Version ff and ids of zeros are invalid by the standard; any other two-hex version is read, as the seed does.
    """
    m = _FORM.fullmatch(text)
    if m is None or m[1] == "ff" or m[2] == "0" * 32 or m[3] == "0" * 16:
        return None
    return TraceContext(m[2], m[3], int(m[4], 16))


def new_trace() -> TraceContext:
    return TraceContext(new_id(), new_id()[:16])
