"""Counters: numbers that only grow, by name and labels. The least that middleware needs.

Promises: the order of labels does not matter; a number is an int or a finite float; at most `series_max` series, the
rest is counted in `dropped`, so that a label made from user input cannot fill the memory.
Does not: gauges, histograms or an exposition format.
"""

from __future__ import annotations

import math
import threading

from mist.errors import InvalidArgument

SERIES_MAX = 10_000


class Counters:
    def __init__(self, series_max: int = SERIES_MAX) -> None:
        self.dropped = 0
        self._series_max = series_max
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, /, **labels: str) -> None:
        if amount < 0 or not math.isfinite(amount):
            raise InvalidArgument(f"counter {name}: cannot add {amount}")
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            if key not in self._values and len(self._values) >= self._series_max:
                self.dropped += 1
                return
            self._values[key] = self._values.get(key, 0) + amount

    def get(self, name: str, /, **labels: str) -> float:
        """One series; 0 when nothing was counted."""
        with self._lock:
            return self._values.get((name, tuple(sorted(labels.items()))), 0)

    def snapshot(self) -> dict[str, float]:
        """All of them, `name{label="value"}` -> number, sorted."""
        with self._lock:
            items = sorted(self._values.items())
        return {_text(name, labels): value for (name, labels), value in items}


def _text(name: str, labels: tuple[tuple[str, str], ...]) -> str:
    if not labels:
        return name
    inner = ",".join(f'{k}="{v.replace(chr(92), chr(92) * 2).replace(chr(34), chr(92) + chr(34))}"' for k, v in labels)
    return f"{name}{{{inner}}}"
