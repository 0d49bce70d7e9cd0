"""MIST: event streaming for LLM tool stacks.

`connect(url)` gives a broker, `Client(broker)` speaks envelopes over it, `errors` holds everything that is raised.
Importing this loads msgspec and the standard library only.
"""

from __future__ import annotations

from mist import errors
from mist.broker.base import ConsumerConfig, Delivery, Message, Page, Record, StreamConfig
from mist.broker.registry import connect
from mist.protocol.envelope import Envelope

__version__ = "0.1.0"

__all__ = [
    "ConsumerConfig",
    "Delivery",
    "Envelope",
    "Message",
    "Page",
    "Record",
    "StreamConfig",
    "connect",
    "errors",
]
