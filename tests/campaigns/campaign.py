"""What a campaign is: a function of a time budget and a seed that says what it reached and what broke."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mist.testing.history import Checker, Verdict

Report = Callable[[str], None]


class Run(Protocol):
    """The answer: `reached` (units), `failures`, `kept` (the directory of a failure), `notes`, `counts`, and `whole` where
    there is an end: the number of units that are all there are."""

    def __call__(
        self, budget_s: float, seed: int, report: Report, /, *, units: int | None = None
    ) -> dict[str, Any]: ...


def named(id: str, backend: str) -> str:
    """The id of a campaign on a backend: the embedded log's carries none, C12n is C12 on NATS, C12r on Redis."""
    return id + {"log": "", "nats": "n", "redis": "r"}[backend]


class Campaign(NamedTuple):
    """`ci` and `nightly` are sizes in `unit`; 0 = everything there is, in one run. `longest`: what counts is the longest
    run, not the sum of all. `needs`: the backends without which it cannot run (sites.py)."""

    id: str
    what: str
    unit: str
    ci: int
    nightly: int
    run: Run
    longest: bool = False
    needs: tuple[str, ...] = ()


class Trial:
    """One call of a campaign: a working directory that is kept when something broke, a budget, and the result.

    `units` bounds it by count (CI); without it the budget does.
    """

    def __init__(self, id: str, budget_s: float, seed: int, report: Report, units: int | None) -> None:
        self.id = id
        self.seed = seed
        self._report = report
        self._units = units
        self._until = time.monotonic() + budget_s
        base = Path(os.environ.get("MIST_CAMPAIGN_DIR") or tempfile.gettempdir())
        base.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"mist-{id.lower()}-{seed}-", dir=base))
        self.reached = 0
        self.failures: list[str] = []
        self.notes: list[str] = []
        self.counts: dict[str, int] = {}
        self._round = 0

    def more(self) -> bool:
        """Whether to go on: units and time are left, and nothing broke."""
        if self.failures:
            return False
        return self.reached < self._units if self._units is not None else time.monotonic() < self._until

    @property
    def left(self) -> int:
        """Units left, or a large number when time decides."""
        return self._units - self.reached if self._units is not None else 1 << 30

    def round(self) -> Path:
        """A fresh directory; the one of the round before is removed, nothing having broken in it."""
        self._round += 1
        if self._round > 1:
            shutil.rmtree(self.folder / f"round-{self._round - 1}", ignore_errors=True)
        path = self.folder / f"round-{self._round}"
        path.mkdir()
        return path

    def say(self, text: str) -> None:
        self._report(f"{self.id}: {text}")

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.say(f"FAILED: {text}")

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def add(self, **counts: int) -> None:
        for key, value in counts.items():
            self.counts[key] = self.counts.get(key, 0) + value

    def judge(self, checker: Checker) -> Verdict:
        """Check a history; a broken promise is a failure."""
        verdict = checker.check()
        self.add(histories=1, **{k: v for k, v in verdict.counts.items() if v})
        if not verdict.ok:
            self.fail(str(verdict))
        return verdict

    def result(self) -> dict[str, Any]:
        """The answer of a campaign. Removes the working directory when nothing broke."""
        if not self.failures:
            shutil.rmtree(self.folder, ignore_errors=True)
        return {
            "reached": self.reached,
            "failures": self.failures,
            "kept": str(self.folder) if self.failures else "",
            "notes": self.notes,
            "counts": self.counts,
        }
