"""The statistics of evals: intervals, paired comparisons, sample sizes, agreement. Pure; standard library only.

Rates (a share of samples that passed) have Wilson's score interval. Means of scores have the percentile interval of the
bootstrap. A Wilson interval of a mean of continuous scores would be meaningless, and is never computed for one that varies.

Deterministic: equal input gives equal output, resampling has a fixed seed. Linear in the number of values.
Above `DRAWN_MAX` values the bootstrap's quantiles are taken from its own expansion (Cornish and Fisher's, with the skewness)
instead of being drawn: their error is then of the order of one in the number of values, well below that of drawing a
thousand resamples, and a hundred thousand values cost milliseconds.

Does not: read runs, know graders or decide (gate.py does). NaN and infinities are InvalidArgument.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate
from math import ceil, fsum, isfinite, sqrt
from random import Random
from statistics import NormalDist
from typing import NamedTuple

from mist.errors import InvalidArgument

CONFIDENCE = 0.95
POWER = 0.80
RESAMPLES = 1000
DRAWN_MAX = 1000
"""Up to so many values (or clusters) the bootstrap is drawn."""
SEED = 20260131
FLAT = 1e-9
"""Clusters whose sums differ by less than this from what the mean says do not vary."""
MCNEMAR_EXACT_MAX = 10_000
"""Up to so many changed samples McNemar's test is exact; above, the normal approximation agrees to three digits."""
_NORMAL = NormalDist()


class Interval(NamedTuple):
    low: float
    high: float


class Difference(NamedTuple):
    """The mean of paired differences, its interval, and how surprising it is if there were none (two-sided)."""

    mean: float
    low: float
    high: float
    p_value: float


class Agreement(NamedTuple):
    """Two raters of the same items. `kappa` is None where chance alone makes them agree on everything: nothing to tell."""

    n: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    kappa: float | None
    kappa_low: float | None
    kappa_high: float | None


def z_of(confidence: float) -> float:
    """The two-sided normal quantile: 1.96 for 0.95. Raises InvalidArgument outside (0, 1)."""
    if not 0 < confidence < 1:
        raise InvalidArgument(f"a confidence of {confidence} lies outside 0 to 1", hint="for example 0.95")
    return _NORMAL.inv_cdf(0.5 + confidence / 2)


# ------------------------------------------------------------------------------------------------- rates


def wilson(passed: float, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of the rate `passed / total`. Nothing judged: (0, 1)."""
    return _wilson(passed, total, z_of(confidence))


def _wilson(passed: float, total: int, z: float) -> Interval:
    if total <= 0:
        return Interval(0.0, 1.0)
    if not 0 <= passed <= total:  # also refuses NaN
        raise InvalidArgument(f"{passed} of {total} is no rate")
    p, z2 = passed / total, z * z
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    return Interval(max(0.0, centre - half) if passed else 0.0, min(1.0, centre + half) if passed < total else 1.0)


def all_pass_size(threshold: float, confidence: float = CONFIDENCE) -> int:
    """The smallest number of samples whose interval, when all pass, lies at or above the threshold: below it no run can
    meet that threshold on its lower limit. (n / (n + z²) >= t, solved for n.)"""
    if not 0 <= threshold < 1:
        raise InvalidArgument(f"no number of samples puts a lower limit at {threshold}", hint="a threshold below 1")
    z = z_of(confidence)
    n = max(1, ceil(threshold * z * z / (1 - threshold)))
    return n if _wilson(n, n, z).low >= threshold else n + 1


def size_to_see(
    difference: float,
    *,
    rate: float = 0.5,
    changed: float | None = None,
    power: float = POWER,
    confidence: float = CONFIDENCE,
) -> int:
    """How many samples it takes to see a difference of rates with this probability (`power`).

    `changed` None: two independent sets of samples, each of this size, around `rate`. Else the same samples twice (a
    paired test), of which this share changes its verdict: far fewer are enough.
    """
    d, za, zb = abs(difference), z_of(confidence), _NORMAL.inv_cdf(power)
    if not 0 < d <= 1:
        raise InvalidArgument(f"a difference of {difference} cannot be looked for", hint="above 0, at most 1")
    if changed is not None:
        share = min(1.0, max(changed, d))  # at least the difference itself changes
        return ceil((za * sqrt(share) + zb * sqrt(max(0.0, share - d * d))) ** 2 / (d * d))
    p1 = min(max(rate, 0.0), 1.0)
    p2 = p1 + d if p1 + d <= 1 else max(0.0, p1 - d)
    mean = (p1 + p2) / 2
    spread = za * sqrt(2 * mean * (1 - mean)) + zb * sqrt(p1 * (1 - p1) + p2 * (1 - p2))
    return max(1, ceil(spread * spread / (d * d)))


# ------------------------------------------------------------------------------------------------- means


def mean_of(values: Sequence[float]) -> float:
    """Raises InvalidArgument for no values, NaN and infinities."""
    if not values:
        raise InvalidArgument("no values: there is no mean of nothing")
    mean = fsum(values) / len(values)
    if not isfinite(mean):
        raise InvalidArgument("a value is not a finite number")
    return mean


def standard_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float | None:
    """Of the mean. With `clusters` (one key per value: the document a question is about, the sample that was repeated)
    values of one cluster may depend on one another. None with fewer than two clusters: nothing is known then."""
    off = _residuals(values, mean_of(values), clusters)
    g = len(off)
    return sqrt(fsum(r * r for r in off) * g / (g - 1)) / len(values) if g > 1 else None


def count_clusters(clusters: Sequence[Hashable] | None, n: int) -> int:
    """How many independent things were drawn."""
    return n if clusters is None else len(set(clusters))


def bootstrap(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """The percentile interval of the mean; whole clusters are drawn where there are any.

    Where all values are equal the bootstrap sees no spread and gives the mean twice; see `score_interval`.
    """
    mean = mean_of(values)
    off = _residuals(values, mean, clusters)
    z = z_of(confidence)
    if len(off) > DRAWN_MAX:
        return _expanded(off, mean, len(values), z)
    means = _resampled(off, mean, len(values), resamples, seed)
    cut = (1 - confidence) / 2
    return Interval(_quantile(means, cut), _quantile(means, 1 - cut))


def score_interval(
    scores: Sequence[float], clusters: Sequence[Hashable] | None = None, *, confidence: float = CONFIDENCE
) -> Interval:
    """The interval of a mean of scores in 0..1: the bootstrap's, or, where nothing varies (all scores, or those of the
    clusters as a whole) and it would claim to know everything, Wilson's over what was drawn: no set of scores in 0..1 with
    this mean spreads more than one of zeros and ones."""
    mean = mean_of(scores)
    if min(scores) >= 0 and max(scores) <= 1 and max(map(abs, _residuals(scores, mean, clusters))) < FLAT:
        n = count_clusters(clusters, len(scores))
        return wilson(min(1.0, mean) * n, n, confidence)
    return bootstrap(scores, clusters, confidence=confidence)


def paired(
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Difference:
    """`after` minus `before`, sample by sample. The p-value is the share of resampled means beyond zero, doubled; where
    none is, the normal one, as a thousand draws could not tell 0.002 from less, and several comparisons at once must. It is
    never less than all signs being the same by chance."""
    if len(before) != len(after):
        raise InvalidArgument(f"{len(before)} and {len(after)} values are no pairs")
    values = [b - a for a, b in zip(before, after, strict=True)]
    mean = mean_of(values)
    off = _residuals(values, mean, clusters)
    if not any(off):
        return Difference(mean, mean, mean, 1.0 if mean == 0 or len(off) < 2 else 2.0 ** (1 - len(off)))
    error = sqrt(fsum(r * r for r in off)) / len(values)
    if len(off) > DRAWN_MAX:
        low, high = _expanded(off, mean, len(values), z_of(confidence))
        return Difference(mean, low, high, 2 * _NORMAL.cdf(-abs(mean) / error))
    means = _resampled(off, mean, len(values), resamples, seed)
    cut = (1 - confidence) / 2
    beyond = min(sum(m <= 0 for m in means), sum(m >= 0 for m in means))
    p = min(1.0, 2 * (beyond + 1) / (len(means) + 1))
    if not beyond:
        p = max(min(p, 2 * _NORMAL.cdf(-abs(mean) / error)), 2.0 ** (1 - len(off)))
    return Difference(mean, _quantile(means, cut), _quantile(means, 1 - cut), p)


def _residuals(values: Sequence[float], mean: float, clusters: Sequence[Hashable] | None) -> list[float]:
    """How far each cluster's sum is from what the mean says; without clusters each value is its own."""
    if clusters is None:
        return [v - mean for v in values]
    if len(clusters) != len(values):
        raise InvalidArgument(f"{len(values)} values in {len(clusters)} clusters: one key each is wanted")
    sums: dict[Hashable, float] = {}
    for key, value in zip(clusters, values, strict=True):
        sums[key] = sums.get(key, 0.0) + value - mean
    return list(sums.values())


def _resampled(off: list[float], mean: float, n: int, resamples: int, seed: int) -> list[float]:
    draw, g = Random(seed).choices, len(off)
    return sorted(mean + sum(draw(off, k=g)) / n for _ in range(resamples))


def _expanded(off: list[float], mean: float, n: int, z: float) -> Interval:
    g = len(off)
    centre = fsum(off) / g
    second = fsum((r - centre) ** 2 for r in off)
    if second == 0:
        return Interval(mean, mean)
    lean = fsum((r - centre) ** 3 for r in off) / second**1.5 * (z * z - 1) / 6
    error = sqrt(second) / n
    return Interval(mean + error * (lean - z), mean + error * (lean + z))


def _quantile(ordered: list[float], share: float) -> float:
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


# ------------------------------------------------------------------------------------------------- comparing


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p-value: how surprising this split of the changed samples is if neither side were better."""
    n, k = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    if n > MCNEMAR_EXACT_MAX:
        return min(1.0, 2 * _NORMAL.cdf((k + 0.5 - n / 2) / (sqrt(n) / 2)))
    term, tail = 1, 1
    for i in range(1, k + 1):
        term = term * (n - i + 1) // i
        tail += term
    return min(1.0, (2 * tail) / (1 << n))


def holm(p_values: Sequence[float]) -> list[float]:
    """The same p-values as several comparisons at once must read them (Holm's step-down), in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    stepped = accumulate((min(1.0, (len(order) - i) * p_values[at]) for i, at in enumerate(order)), max)
    out = [1.0] * len(order)
    for at, p in zip(order, stepped, strict=True):
        out[at] = p
    return out


# ------------------------------------------------------------------------------------------------- agreement


def agreement(ours: Sequence[Hashable], theirs: Sequence[Hashable], *, confidence: float = CONFIDENCE) -> Agreement:
    """How far two raters agree beyond chance: accuracy with Wilson's interval, Cohen's kappa with a normal one (its
    standard error from how much each item moves it). Raises InvalidArgument for no items."""
    n = len(ours)
    if n == 0 or n != len(theirs):
        raise InvalidArgument(f"{n} and {len(theirs)} labels: the same items, at least one, are wanted")
    left: dict[Hashable, float] = {}
    right: dict[Hashable, float] = {}
    for a, b in zip(ours, theirs, strict=True):
        left[a] = left.get(a, 0.0) + 1 / n
        right[b] = right.get(b, 0.0) + 1 / n
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    observed, chance = same / n, fsum(share * right.get(label, 0.0) for label, share in left.items())
    low, high = wilson(same, n, confidence)
    if chance > 1 - 1e-12:
        return Agreement(n, observed, low, high, None, None, None)
    kappa = (observed - chance) / (1 - chance)
    moves = [
        ((a == b) - observed) / (1 - chance)
        - (1 - observed) / (1 - chance) ** 2 * (right.get(a, 0.0) + left.get(b, 0.0) - 2 * chance)
        for a, b in zip(ours, theirs, strict=True)
    ]
    half = z_of(confidence) * sqrt(fsum(m * m for m in moves)) / n
    return Agreement(n, observed, low, high, kappa, max(-1.0, kappa - half), min(1.0, kappa + half))
