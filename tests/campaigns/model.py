"""C18: one model of the contract, whatever a program could do, on every backend."""

from __future__ import annotations

import secrets
import traceback
from contextlib import ExitStack
from typing import Any

import hypothesis
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from mist.broker.base import Broker
from mist.broker.registry import connect
from mist.testing.statemachine import state_machine

from .campaign import Report, Trial, named
from .sites import site

_CHUNK = 20


def c18(
    budget_s: float, seed: int, report: Report, *, units: int | None = None, backend: str = "log"
) -> dict[str, Any]:
    """The state machine of mist.testing: on one server, or half of the examples on `log:` and half on `memory:`."""
    trial = Trial(named("C18", backend), budget_s, seed, report, units)
    kinds = ("log", "memory") if backend == "log" else (backend,)
    with ExitStack() as stack:
        server = stack.enter_context(site(backend, trial.folder)) if backend != "log" else None
        while trial.more():
            for kind in kinds:
                count = min(_CHUNK, (trial.left + len(kinds) - 1) // len(kinds))
                if kind == "memory":
                    url = f"memory:c18-{secrets.token_hex(4)}"
                else:
                    url = server.url if server is not None else f"log:{trial.round()}"
                if not _examples(trial, kind, url, count, seed + trial.reached):
                    break
            trial.say(f"{trial.reached} examples")
    return trial.result()


def _examples(trial: Trial, kind: str, url: str, count: int, number: int) -> bool:
    async def store() -> Broker:
        return await connect(url)

    machine = hypothesis.seed(number)(state_machine(store, store))
    try:
        run_state_machine_as_test(machine, settings=settings(  # type: ignore[no-untyped-call]
            machine.TestCase.settings, max_examples=count, database=None, phases=(Phase.generate, Phase.shrink),
            print_blob=False,
        ))  # fmt: skip
    except Exception:
        trial.fail(f"{kind}, seed {number}: {traceback.format_exc(limit=-5)}")
        return False
    trial.reached += count
    trial.add(**{f"{kind}_examples": count})
    return True
