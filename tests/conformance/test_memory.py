"""The memory broker keeps every promise of the contract: by name, and as a store of its own."""

from __future__ import annotations

import secrets

import pytest

from mist.testing.conformance import BrokerConformance


class TestMemory(BrokerConformance):
    @pytest.fixture(autouse=True)
    def _store(self) -> None:
        self.url = f"memory:conformance-{secrets.token_hex(4)}"
