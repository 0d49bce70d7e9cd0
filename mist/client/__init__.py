"""The pleasant layer, in envelopes: publish, replay, follow, and workers over durable consumers."""

from __future__ import annotations

from mist.client.client import Client, EnvelopePublisher
from mist.client.policy import AckPolicy
from mist.client.reader import Reader
from mist.client.received import Bad, Received, decode_record
from mist.client.worker import Delivered, Worker, WorkerStats

__all__ = [
    "AckPolicy",
    "Bad",
    "Client",
    "Delivered",
    "EnvelopePublisher",
    "Reader",
    "Received",
    "Worker",
    "WorkerStats",
    "decode_record",
]
