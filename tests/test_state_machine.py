"""The model of the contract against our brokers, and proof that it bites."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import mist
from mist.broker import memory
from mist.broker.base import Broker, Delivery
from mist.testing.statemachine import state_machine

NAME = f"model-{secrets.token_hex(4)}"


async def shared() -> Broker:
    return await mist.connect(f"memory:{NAME}")


stores: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def _log(tmp_path_factory: pytest.TempPathFactory) -> None:
    stores["log"] = tmp_path_factory.mktemp("model")


async def log() -> Broker:
    return await mist.connect(f"log:{stores['log']}")


TestMemoryModel = state_machine(shared, shared).TestCase
TestLogModel = state_machine(log, log).TestCase
# more of them, from other seeds, are the campaign's
EXAMPLES = int(os.environ.get("MIST_EXAMPLES", "30"))
TestMemoryModel.settings = settings(TestMemoryModel.settings, max_examples=EXAMPLES)
TestLogModel.settings = settings(TestLogModel.settings, max_examples=EXAMPLES)

original = {"take": memory.MemoryConsumer._take, "page": memory.MemoryStream._page, "nak": memory.MemoryConsumer.nak}


def forgetting_the_bound(self: Any, limit: int, bytes_max: int) -> Any:
    return original["take"](self, limit + 1, bytes_max)


def losing_a_record(self: Any, limit: int, bytes_max: int) -> Any:
    out, at_end = original["take"](self, limit, bytes_max)
    return (out[:-1] if len(out) > 3 else out), at_end


def passing_over(self: Any, after: int, match: Any, limit: int, bytes_max: int) -> Any:
    page = original["page"](self, after, match, limit, bytes_max)
    return page if len(page.records) < 3 else mist.Page(page.records[:-1], page.scanned, page.last)


async def counting_no_attempts(self: Any, deliveries: Sequence[Delivery], *, delay_s: float = 0.0) -> int:
    for d in deliveries:
        if d.record.sequence in self._state.leases:
            self._state.leases[d.record.sequence].attempt = 1
    return await original["nak"](self, deliveries, delay_s=delay_s)  # type: ignore[no-any-return]


MUTANTS = [
    (memory.MemoryConsumer, "_take", forgetting_the_bound),
    (memory.MemoryConsumer, "_take", losing_a_record),
    (memory.MemoryConsumer, "nak", counting_no_attempts),
    (memory.MemoryStream, "_page", passing_over),
    (memory._ConsumerState, "forget_below", lambda self, first: None),
]


@pytest.mark.parametrize(("where", "name", "mutant"), MUTANTS, ids=[getattr(m[2], "__name__", "") for m in MUTANTS])
def test_the_model_bites(where: type, name: str, mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that breaks a promise disagrees with the model within a few hundred examples."""
    monkeypatch.setattr(where, name, mutant)
    machine = state_machine(shared, shared)
    eager = settings(
        machine.TestCase.settings, max_examples=300, phases=[Phase.generate], derandomize=True, database=None
    )
    with pytest.raises((AssertionError, ExceptionGroup, KeyError, IndexError)):
        run_state_machine_as_test(machine, settings=eager)
