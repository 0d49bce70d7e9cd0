"""C19: the fuzz targets of tests.fuzz. The log's own bytes are blocks.py."""

from __future__ import annotations

from typing import Any

from tests.fuzz import driver

from .campaign import Report, Trial

_INPUTS = 2000


def c19(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """The targets of tests.fuzz, in turn. A hang ends the process with a traceback of where."""
    trial = Trial("C19", budget_s, seed, report, units)
    turn = 0
    while trial.more():
        name = sorted(driver.TARGETS)[turn % len(driver.TARGETS)]
        found = driver.run(driver.load(name), inputs=min(_INPUTS, trial.left), seed=seed + turn)
        for f in found.findings:
            trial.fail(f"{name}, seed {found.seed}, input {f.number}: {f.data[:200]!r}: {f.error}")
        trial.reached += found.inputs
        trial.add(**{name: found.inputs}, accepted=found.accepted)
        trial.say(f"{trial.reached} inputs, slowest {found.slowest_s * 1000:.0f} ms ({name})")
        turn += 1
    return trial.result()
