"""Spans for the tests of TokenTrace: envelopes, messages, records."""

from __future__ import annotations

from typing import Any

from mist.broker.base import Message, Record
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def payload(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A span as JSON values; `attrs` of the changes replace the default ones."""
    span: dict[str, Any] = {
        "trace_id": TRACE,
        "span_id": f"{number:016x}",
        "operation": "chat",
        "start_ns": 1_700_000_000_000_000_000 + number,
        "end_ns": 1_700_000_000_000_000_000 + number + 250_000_000,
        "status": "ok",
        "attrs": {"model": "m1", "provider": "p1", "tokens_in": 100, "tokens_out": 20, "cost_usd": 0.5},
    }
    return {**span, **changes}


def envelope(number: int = 1, **changes: Any) -> Envelope:
    return Envelope.new(TRACE_SPAN, payload(number, **changes), source="svc", id=f"{number:032x}")


def message(number: int = 1, **changes: Any) -> Message:
    env = envelope(number, **changes)
    return Message("trace.span.svc", encode(env), env.id)


def record(data: bytes | Envelope, sequence: int = 7, **changes: Any) -> Record:
    raw = data if isinstance(data, bytes) else encode(data)
    return Record(sequence, "trace.span.svc", raw, 1_700_000_000_000_000_000, **changes)
