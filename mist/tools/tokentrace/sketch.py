"""Percentiles that merge: counts of values in buckets of equal relative width.

The sketch is DDSketch's logarithmic mapping (Masson, Rim, Lee: *DDSketch: a fast and fully-mergeable quantile sketch
with relative-error guarantees*, VLDB 2019) without its collapsing: bucket `i` holds the values in `(G**(i-1), G**i]` with
`G = (1 + A) / (1 - A)`, and answers for all of them with a value no more than `A` away from each. So a percentile is the
exact one (nearest rank) within 0.8 %; merging is adding counts; taking a value away is subtracting one; and the same
values give the same sketch in any order, which is what makes a rebuilt store equal to the old one.

Ours and not the `ddsketch` package: its sketch is an object with a dense array per value set, whose bytes depend on the
order of insertion; here millions of small ones lie in a table, most with a handful of buckets. The tests compare both.

Promises: any value from 0 to 2^63 may be added (0 has a bucket of its own); size is bounded by the range of values:
about 1,150 buckets for nine decades.
"""

from __future__ import annotations

from math import ceil, log

Sketch = dict[int, int]
"""Bucket -> count. Counts are at least 1."""

ACCURACY = 0.008
GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
PER_LOG = 1 / log(GAMMA)
ZERO = -(2**31)
"""The bucket of the value 0, below all others."""


def bucket(value: float) -> int:
    """The bucket of a value >= 0."""
    return ceil(log(value) * PER_LOG) if value > 0 else ZERO


def estimate(index: int) -> float:
    """The value a bucket answers with, to six digits: more would only look exact."""
    return 0.0 if index == ZERO else float(f"{2 * GAMMA**index / (GAMMA + 1):.6g}")


def merge(into: Sketch, other: Sketch, sign: int = 1) -> None:
    """Add (or with -1 take away) the counts of another sketch. What reaches 0 is dropped."""
    for index, count in other.items():
        left = into.get(index, 0) + sign * count
        if left:
            into[index] = left
        else:
            into.pop(index, None)


def quantiles(sketch: Sketch, percents: tuple[int, ...]) -> list[float | None]:
    """The values at rank ceil(p / 100 * n), counted from 1, within ACCURACY; None for an empty sketch.

    `percents` in ascending order.
    """
    total = sum(sketch.values())
    if total <= 0:
        return [None] * len(percents)
    out: list[float | None] = []
    seen = 0
    buckets = iter(sorted(sketch.items()))
    index = 0
    for percent in percents:
        rank = max(1, -(-percent * total // 100))
        while seen < rank:
            index, count = next(buckets)
            seen += count
        out.append(estimate(index))
    return out
