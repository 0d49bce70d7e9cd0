"""NATS JetStream keeps every promise of the contract, on a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mist.broker.base import Broker
from mist.testing.conformance import BrokerConformance
from mist_nats.broker import NatsBroker
from tests.jetstream.server import shared_url


class TestNats(BrokerConformance):
    @pytest.fixture(autouse=True)
    def _store(self) -> None:
        self.url = shared_url()

    @asynccontextmanager
    async def failing_append(self, broker: Broker, *, after: int) -> AsyncIterator[None]:  # type: ignore[override]
        """The server itself takes `after` more messages of the case's stream and then refuses."""
        assert isinstance(broker, NatsBroker)
        (raw,) = broker.shared
        found = await broker.api.call(f"STREAM.INFO.{raw}", type=dict)
        usual, state = found["config"], found["state"]
        await broker.api.call(
            f"STREAM.UPDATE.{raw}", {**usual, "max_msgs": state["messages"] + after, "discard": "new"}, dict
        )
        try:
            yield
        finally:
            await broker.api.call(f"STREAM.UPDATE.{raw}", usual, dict)
