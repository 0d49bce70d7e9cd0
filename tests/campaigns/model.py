"""C18: one model of the contract, whatever a program could do, on `log:` and on `memory:`."""

from __future__ import annotations

import secrets
import traceback
from typing import Any

import hypothesis
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from mist.broker.base import Broker
from mist.broker.registry import connect
from mist.testing.statemachine import state_machine

from .campaign import Report, Trial

_CHUNK = 20


def c18(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """The state machine of mist.testing, half of the examples on `log:`, half on `memory:`."""
    trial = Trial("C18", budget_s, seed, report, units)
    while trial.more():
        for backend in ("log", "memory"):
            count = min(_CHUNK, (trial.left + 1) // 2)
            number = seed + trial.reached
            url = f"log:{trial.round()}" if backend == "log" else f"memory:c18-{secrets.token_hex(4)}"

            async def store(url: str = url) -> Broker:
                return await connect(url)

            machine = hypothesis.seed(number)(state_machine(store, store))
            try:
                run_state_machine_as_test(machine, settings=settings(  # type: ignore[no-untyped-call]
                    machine.TestCase.settings, max_examples=count, database=None,
                    phases=(Phase.generate, Phase.shrink), print_blob=False,
                ))  # fmt: skip
            except Exception:
                trial.fail(f"{backend}, seed {number}: {traceback.format_exc(limit=-5)}")
                break
            trial.reached += count
            trial.add(**{f"{backend}_examples": count})
        trial.say(f"{trial.reached} examples")
    return trial.result()
