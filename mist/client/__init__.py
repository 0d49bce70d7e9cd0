"""The pleasant layer, in envelopes: publish, replay, follow, and workers over durable consumers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mist.client.client import Client, EnvelopePublisher
from mist.client.handler import Handler
from mist.client.policy import AckPolicy
from mist.client.reader import Reader
from mist.client.received import Bad, Received, decode_record
from mist.client.worker import Delivered, Worker, WorkerStats

if TYPE_CHECKING:
    from mist.client.serving import Served, run, serve
    from mist.client.steps import Run

__all__ = [
    "AckPolicy",
    "Bad",
    "Client",
    "Delivered",
    "EnvelopePublisher",
    "Handler",
    "Reader",
    "Received",
    "Run",
    "Served",
    "Worker",
    "WorkerStats",
    "decode_record",
    "run",
    "serve",
]


def __getattr__(name: str) -> Any:
    """What few programs need loads at its first use: serving brings every transport with it."""
    if name in ("Served", "run", "serve"):
        from mist.client import serving

        return getattr(serving, name)
    if name == "Run":
        from mist.client.steps import Run

        return Run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
