"""Two runs, or two models of one, sample by sample: what was gained, what was lost, and whether that could be chance.

Pure, over tallies with ids. Only samples that both have are compared, with the same input and expectation: those that
were changed in between are counted and left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from mist.errors import Conflict
from mist.tools.matchspec.gate import pairs
from mist.tools.matchspec.reports.values import OVERALL
from mist.tools.matchspec.statistics import count_clusters, holm, mcnemar, paired, size_to_see
from mist.tools.matchspec.suite import Gate
from mist.tools.matchspec.tally import Tally

HINT_BELOW = 0.05
"""A difference whose p-value lies above: a hint says how many samples would show it."""


class Comparison(Struct, frozen=True, kw_only=True):
    """`model` is B's, `model_a` A's. `gained`: failed in A, passed in B; `lost`: the other way round, the regressions.
    `p_value`: exact two-sided McNemar test of gained against lost; `p_adjusted`: Holm's, over all rows of the answer. Where
    the samples of both runs cluster by the same field, p-values and interval are the paired bootstrap's over `clusters`.

    `score_delta`: the difference of mean scores with the paired bootstrap's interval and p-value. `samples_needed`: how many
    samples would show this difference with 80 %, at this share of changed ones; None where there is none, or it shows."""

    model: str
    common: int
    rate_a: float
    rate_b: float
    delta: float
    gained: list[str]
    lost: list[str]
    p_value: float
    model_a: str = ""
    harness: str = ""
    score_a: float = 0.0
    score_b: float = 0.0
    score_delta: float = 0.0
    ci_low: float = 0.0
    ci_high: float = 0.0
    score_p: float = 1.0
    p_adjusted: float = 1.0
    changed: int = 0
    samples_needed: int | None = None
    clusters: int | None = None


def compare(a: Tally, b: Tally, *, model_a: str = "", model_b: str = "", confidence: float = 0.95) -> list[Comparison]:
    """Model by model where both have it; named ones against one another. Raises Conflict when nothing is common."""
    if model_a or model_b:
        couples = [(model_a or model_b, model_b or model_a)]
    elif len(a.models) == 1 == len(b.models):
        couples = [(a.models[0], b.models[0])]
    else:
        couples = [(m, m) for m in a.models if m in b.models]
    found = [row for left, right in couples if (row := _compared(a, b, left, right, confidence)) is not None]
    if not found:
        raise Conflict(
            f"runs {a.manifest.run} and {b.manifest.run} have no model with common samples",
            hint="compare runs of the same data, or name the models: RUN:MODEL",
        )
    adjusted = holm([row.p_value for row in found])
    return [replace(row, p_adjusted=p) for row, p in zip(found, adjusted, strict=True)]


def _compared(a: Tally, b: Tally, left: str, right: str, confidence: float) -> Comparison | None:
    before, after = list(a.of_model(left)), list(b.of_model(right))
    cluster = _cluster(a, b)
    rates_a, rates_b, ids, clusters, changed = pairs(before, after, OVERALL, Gate(cluster=cluster))
    if not ids:
        return None
    scores_a, scores_b, *_ = pairs(before, after, OVERALL, Gate(metric="mean_score"))
    gained, lost = _moved(ids, rates_a, rates_b), _moved(ids, rates_b, rates_a)
    n = len(ids)
    rate_a, rate_b = sum(rates_a) / n, sum(rates_b) / n
    mean = paired(scores_a, scores_b, clusters, confidence=confidence)
    p = mcnemar(len(gained), len(lost))
    if clusters is not None:
        p = paired(rates_a, rates_b, clusters, confidence=confidence).p_value
    needed = None
    if clusters is None and rate_a != rate_b and p >= HINT_BELOW:
        needed = size_to_see(rate_b - rate_a, changed=(len(gained) + len(lost)) / n)
    return Comparison(
        model=right, model_a=left, common=n, rate_a=rate_a, rate_b=rate_b, delta=rate_b - rate_a, gained=gained,
        lost=lost, p_value=p, score_a=sum(scores_a) / n, score_b=sum(scores_b) / n, score_delta=mean.mean,
        ci_low=mean.low, ci_high=mean.high, score_p=mean.p_value, changed=changed, samples_needed=needed,
        clusters=None if clusters is None else count_clusters(clusters, n),
    )  # fmt: skip


def _cluster(a: Tally, b: Tally) -> str:
    """What the samples of both cluster by; all results of B say theirs."""
    cluster = b.manifest.gate.cluster
    return cluster if cluster and cluster == a.manifest.gate.cluster and not b.unclustered else ""


def _moved(ids: Sequence[str], before: Sequence[float], after: Sequence[float]) -> list[str]:
    """Those that count as passed after (more than half of the repeats) and not before."""
    return [id for id, was, now in zip(ids, before, after, strict=True) if was <= 0.5 < now]
