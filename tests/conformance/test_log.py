"""The embedded log keeps every promise of the contract, on real files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mist.testing.conformance import BrokerConformance


class TestLog(BrokerConformance):
    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.url = f"log:{tmp_path / 'log'}"
