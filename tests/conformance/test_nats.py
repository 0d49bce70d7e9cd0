"""NATS JetStream keeps every promise of the contract, on a real server."""

from __future__ import annotations

import pytest

from mist.testing.conformance import BrokerConformance
from tests.jetstream.server import shared_url


class TestNats(BrokerConformance):
    @pytest.fixture(autouse=True)
    def _store(self) -> None:
        self.url = shared_url()
