"""One score out of the repeats of a sample. Pure.

`mean`, `median`, `max`   of the scores
`mode`                    the commonest score; the smallest of those that tie
`at_least_k`              1 when k or more of the repeats passed, else 0 (`at_least_2`)
`pass@k`                  the chance that one of k draws passes, estimated without bias from n repeats of which c passed:
                          1 - C(n-c, k) / C(n, k)   (Chen et al., Evaluating Large Language Models Trained on Code, 2021)
`pass^k`                  the chance that all k draws pass: C(c, k) / C(n, k)

The last three count what passed; for the first four `rate` is the same reduction over 1 (passed) and 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import comb
from statistics import fmean, median

from mist.errors import InvalidArgument

Reducer = Callable[[Sequence[float], Sequence[bool]], tuple[float, float]]
"""(scores, passed) of all repeats -> (score, rate), both in 0..1."""

SIMPLE: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": fmean,
    "median": median,
    "max": max,
    "mode": lambda values: _mode(values),
}
_COUNTING = re.compile(r"(at_least_|pass@|pass\^)([1-9][0-9]{0,3})")
HINT = "mean, median, mode, max, at_least_K, pass@K, pass^K"


def reducer(name: str, epochs: int, where: str = "reducer") -> Reducer:
    """The reducer of that name for so many repeats. Raises InvalidArgument for an unknown one, and for a k above them."""
    simple = SIMPLE.get(name)
    if simple is not None:
        return lambda scores, passed: (simple(scores), simple([float(p) for p in passed]))
    found = _COUNTING.fullmatch(name)
    if found is None:
        raise InvalidArgument(f"{where}: unknown reducer {name!r}", hint=f"known: {HINT}")
    kind, k = found[1], int(found[2])
    if k > epochs:
        raise InvalidArgument(f"{where}: {name} needs {k} repeats or more, there are {epochs}", hint="raise `epochs`")
    count = {"at_least_": at_least, "pass@": pass_at, "pass^": pass_all}[kind]

    def counted(scores: Sequence[float], passed: Sequence[bool]) -> tuple[float, float]:
        rate = count(len(passed), sum(passed), k)
        return rate, rate

    return counted


def at_least(n: int, c: int, k: int) -> float:
    """1 when k or more of n passed."""
    return 1.0 if c >= k else 0.0


def pass_at(n: int, c: int, k: int) -> float:
    """The chance that at least one of k draws out of n, without putting back, is one of the c that passed. Fewer than k
    repeats (a run that is not complete): what there is, drawn whole."""
    k = min(k, n)
    return 1.0 - comb(n - c, k) / comb(n, k)


def pass_all(n: int, c: int, k: int) -> float:
    """The chance that all of k draws are. Fewer than k repeats: 0, nothing says that k would pass."""
    return comb(c, k) / comb(n, k) if n >= k else 0.0


def _mode(values: Sequence[float]) -> float:
    counts = Counter(values)
    most = max(counts.values())
    return min(v for v, n in counts.items() if n == most)
