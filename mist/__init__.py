"""MIST: event streaming for LLM tool stacks.

`connect(url)` gives a broker, `Client(broker)` speaks envelopes over it, `errors` holds everything that is raised.
Importing this loads msgspec and the standard library only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mist import errors
from mist.broker.base import ConsumerConfig, Delivery, Message, Page, Record, StreamConfig
from mist.broker.registry import connect
from mist.protocol.envelope import Envelope

if TYPE_CHECKING:
    from mist.client.client import Client

__version__ = "0.1.0"

__all__ = [
    "Client",
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


def __getattr__(name: str) -> Any:
    """`Client` brings asyncio's machinery with it, so it loads at its first use."""
    if name == "Client":
        from mist.client.client import Client

        return Client
    raise AttributeError(f"module 'mist' has no attribute {name!r}")
