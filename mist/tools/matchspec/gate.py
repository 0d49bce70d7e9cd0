"""The gate: a run's numbers to PASS or FAIL. Pure, and closed where it fails.

PASS is never the lack of a complaint: it needs a complete run in which something was judged, for every grader and every
model enough samples and a score (or the lower end of its interval) at the threshold, no more errors than allowed, known
cost under a cost ceiling, known latencies under a latency ceiling, and no significant loss against the baseline. Whatever
cannot be told fails. A threshold, confidence or metric that cannot be right is a reason to fail, not an exception.

Two aggregates, by name: `pass_rate`, the share of samples that passed, and `mean_score`. Without repeats a rate has Wilson's
interval; repeats and mean scores have the bootstrap's over samples. Where the gate clusters, all of it is over clusters:
bootstrap, standard error, comparison; that needs results which say their cluster, and else fails.

Thresholds: a grader's own over its harness; else what the gate says for its name; else `overall`; else 1. The graders of
one model are pooled over its harnesses, models never. The samples as a whole (`overall`) must reach `overall` where it is
stated, or where a grader had to fall back to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum, isfinite
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from mist.errors import InvalidArgument
from mist.tools.matchspec.reports.values import OVERALL, Grade
from mist.tools.matchspec.statistics import (
    Interval,
    all_pass_size,
    count_clusters,
    holm,
    mcnemar,
    paired,
    score_interval,
    standard_error,
    wilson,
)
from mist.tools.matchspec.suite import Gate
from mist.tools.matchspec.tally import HarnessTally, Reduced, Tally, Value

METRICS = ("pass_rate", "mean_score")
LATENCY_SHARE = 0.95
CLUSTERS_FEW = 10
"""Fewer clusters than these make an interval rough: a warning says so."""


class Judgement(Struct, frozen=True):
    """`reasons` say why it fails; none = PASS. `judged` is whether anything could be judged at all."""

    grades: list[Grade]
    reasons: list[str]
    warnings: list[str]
    judged: bool

    @property
    def ok(self) -> bool:
        return not self.reasons

    @property
    def verdict(self) -> str:
        return "PASS" if self.ok else "FAIL"


def judge(tally: Tally, gate: Gate, *, baseline: Tally | None = None, complete: bool = True) -> Judgement:
    """`complete` False: the caller knows that the run is not (a limit was reached, it is still going on)."""
    try:
        grades, warnings = _grades(tally, gate)
        if baseline is not None:
            grades = _against(tally, baseline, grades, gate)
    except InvalidArgument as exc:
        return Judgement([], [exc.message], [], False)
    judged = any(h.overall.states.count(s) for h in tally.harnesses.values() for s in (1, 2))
    reasons = list(_of_run(tally, gate, complete=complete, judged=judged))
    reasons += [f"{_where(g)}: {g.why}" for g in grades if not g.passed]
    if not any(g.threshold is not None for g in grades):
        reasons.append("nothing was compared with a threshold")
    return Judgement(grades, list(dict.fromkeys(reasons)), warnings, judged)


def _where(grade: Grade) -> str:
    place = grade.harness or grade.model
    return f"{place}: {grade.name}" if place else grade.name


# ------------------------------------------------------------------------------------------------- the run


def _of_run(tally: Tally, gate: Gate, *, complete: bool, judged: bool) -> Iterable[str]:
    if tally.total == 0:
        yield "the run has no samples"
    if tally.done < tally.total or not complete:
        yield f"the run is not complete: {tally.done} of {tally.total} results"
    if not judged:
        yield "no sample could be judged"
    if gate.metric not in METRICS:
        yield f"no metric is called {str(gate.metric)[:40]!r}"
    for info in tally.manifest.harnesses:  # runs of before there were harnesses name their graders in each result
        if not info.graders:
            yield f"harness {info.name} has no graders"
    known = {name for h in tally.harnesses.values() for name in h.graders}
    for name in sorted(set(gate.per_grader) - known):
        yield f"no grader is called {name[:80]!r}"
    if gate.cluster and gate.cluster != tally.manifest.gate.cluster:
        yield f"the results do not say their {gate.cluster[:80]!r}, by which the gate clusters: rescore the run"
    elif gate.cluster and tally.unclustered:
        yield f"{tally.unclustered} of {tally.done} results do not say their {gate.cluster[:80]!r}: rescore the run"
    if gate.on_error not in ("fail", "exclude"):
        yield f"no rule for errors is called {str(gate.on_error)[:40]!r}"
    if gate.min_sample_action not in ("warn", "fail"):
        yield f"no rule for too few samples is called {str(gate.min_sample_action)[:40]!r}"
    if gate.on_error == "exclude" and tally.done and not tally.errors / tally.done <= gate.errors_max_share:
        share = tally.errors / tally.done
        yield f"{tally.errors} of {tally.done} results are errors: {share:.3f} is above {gate.errors_max_share:g}"
    if gate.cost_usd_max is not None:
        if tally.cost_unknown or tally.cost_usd is None:
            yield f"the cost of {tally.cost_unknown} of {tally.done} results is not known: it may not be below the ceiling"
        elif not tally.cost_usd <= gate.cost_usd_max:
            yield f"the run cost ${tally.cost_usd:.6g}, above ${gate.cost_usd_max:g}"
    if gate.latency_ms_max is not None:
        slow = tally.latency_ms(LATENCY_SHARE)
        if tally.latency_unknown or slow is None:
            yield f"the latency of {tally.latency_unknown} of {tally.done} results is not known"
        elif not slow <= gate.latency_ms_max:
            yield f"the 95th percentile of the latency is {slow:.1f} ms, above {gate.latency_ms_max:g} ms"


# ------------------------------------------------------------------------------------------------- the rows


def _grades(tally: Tally, gate: Gate) -> tuple[list[Grade], list[str]]:
    warnings: list[str] = []
    grades: list[Grade] = []
    for model in tally.models:
        harnesses = list(tally.of_model(model))
        pooled: dict[str, list[HarnessTally]] = {}
        falls_back = False
        for h in harnesses:
            for name in h.graders:
                if name in h.informing:
                    grades.append(_grade(model, name, [h], None, gate, warnings))
                elif h.thresholds.get(name) is not None:
                    grades.append(_grade(model, name, [h], h.thresholds[name], gate, warnings))
                else:
                    pooled.setdefault(name, []).append(h)
        for name, found in pooled.items():
            threshold = gate.per_grader.get(name)
            if threshold is None:
                falls_back = True
                threshold = 1.0 if gate.overall is None else gate.overall
            grades.append(_grade(model, name, found, threshold, gate, warnings))
        wanted = gate.overall
        if wanted is None and (falls_back or not any(g.model == model and g.threshold is not None for g in grades)):
            wanted = 1.0
        if not _says_the_same(harnesses, pooled, wanted, grades[-1] if grades else None):
            grades.append(_grade(model, OVERALL, harnesses, wanted, gate, warnings))
    return grades, warnings


def _says_the_same(
    harnesses: list[HarnessTally], pooled: dict[str, list[HarnessTally]], wanted: float | None, row: Grade | None
) -> bool:
    """Whether there is one grader, and its row (the last one) is that of the samples, result by result and by threshold."""
    if row is None or row.threshold != wanted or any(list(h.graders) != [row.name] for h in harnesses):
        return False
    return row.name in pooled and all(
        h.overall.states == h.graders[row.name].states and h.overall.scores == h.graders[row.name].scores
        for h in harnesses
    )


def values_of(harnesses: Sequence[HarnessTally], name: str, gate: Gate) -> Reduced:
    """Over several harnesses; the indexes go on counting."""
    if len(harnesses) == 1:
        return harnesses[0].reduced(name, exclude_errors=gate.on_error == "exclude")
    values: list[Value] = []
    errors = judged = first = 0
    for h in harnesses:
        found = h.reduced(name, exclude_errors=gate.on_error == "exclude")
        values += [Value(first + v.index, v.score, v.rate, v.cluster) for v in found.values]
        errors, judged, first = errors + found.errors, judged + found.judged, first + h.info.samples
    return Reduced(values, errors, judged)


def interval_of(numbers: Sequence[float], clusters: Sequence[int] | None, gate: Gate) -> Interval:
    """Wilson's where every number is 0 or 1 and nothing clusters, the bootstrap's else."""
    if clusters is not None:
        return score_interval(numbers, clusters, confidence=gate.confidence)
    ones = sum(1 for x in numbers if x == 1.0)
    if ones + sum(1 for x in numbers if x == 0.0) == len(numbers):
        return wilson(ones, len(numbers), gate.confidence)
    return score_interval(numbers, confidence=gate.confidence)


def _grade(
    model: str, name: str, harnesses: list[HarnessTally], threshold: float | None, gate: Gate, warnings: list[str]
) -> Grade:
    found = values_of(harnesses, name, gate)
    scores, rates = [v.score for v in found.values], [v.rate for v in found.values]
    numbers = rates if gate.metric == "pass_rate" else scores
    n = len(numbers)
    row = Grade(
        name=name, score=None, threshold=threshold, passed=False, n=n, ci_lower=None, ci_upper=None, model=model,
        harness=harnesses[0].info.name if len(harnesses) == 1 else "", metric=gate.metric, errors=found.errors,
        passed_n=sum(1 for r in rates if r == 1.0),
    )  # fmt: skip
    if n:
        clusters = [v.cluster for v in found.values] if gate.cluster else None
        if clusters is not None:
            row = replace(row, clusters=count_clusters(clusters, n))
        low, high = interval_of(numbers, clusters, gate)
        row = replace(
            row, score=fsum(numbers) / n, ci_lower=low, ci_upper=high, mean_score=fsum(scores) / n,
            standard_error=standard_error(numbers, clusters),
        )  # fmt: skip
    why = "" if threshold is None else _why_not(row, found, gate, warnings)
    return replace(row, passed=not why, why=why)


def _why_not(row: Grade, found: Reduced, gate: Gate, warnings: list[str]) -> str:
    wanted = row.threshold
    if wanted is None or not 0.0 <= wanted <= 1.0:
        return f"a threshold of {wanted} does not lie in 0..1"
    if not row.n or not found.judged or row.score is None or row.ci_lower is None:
        return f"no sample could be judged, {row.errors} errors"
    attempts = found.errors + found.judged
    if gate.on_error == "exclude" and not found.errors / attempts <= gate.errors_max_share:
        return f"{found.errors} of {attempts} could not be judged, above the share of {gate.errors_max_share:g}"
    if row.n < gate.min_sample_size:
        few = f"{row.n} samples are fewer than {gate.min_sample_size}"
        if gate.min_sample_action != "warn":
            return few
        warnings.append(f"{_where(row)}: {few}")
    if row.clusters is not None and row.clusters < CLUSTERS_FEW:
        warnings.append(f"{_where(row)}: with {row.clusters} clusters the interval is rough")
    reached = row.ci_lower if gate.use_lower_bound else row.score
    if not isfinite(reached) or not reached >= wanted:
        what = f"the lower limit {reached:.3f}" if gate.use_lower_bound else f"{reached:.3f}"
        return f"{what} is below {wanted:.3f}{_hint(row, wanted, gate)}"
    return ""


def _hint(row: Grade, wanted: float, gate: Gate) -> str:
    """Where so few samples cannot reach it, however good they are, how many could."""
    if not gate.use_lower_bound or wanted >= 1.0:
        return ""
    least = all_pass_size(wanted, gate.confidence)
    what, have = ("samples", row.n) if row.clusters is None else ("clusters", row.clusters)
    return f" (it takes {least} {what} that all pass, there are {have})" if have < least else ""


# ------------------------------------------------------------------------------------------------- the baseline


def _against(tally: Tally, baseline: Tally, grades: list[Grade], gate: Gate) -> list[Grade]:
    """The rows with the baseline's score and the difference over the samples both have. One model each are compared
    whatever they are called; of several those of the same name. A significant loss fails the row."""
    one = len(tally.models) == 1 == len(baseline.models)
    rows: list[tuple[Grade, Pairs]] = []
    for grade in grades:
        other = baseline.models[0] if one else grade.model
        ours = [h for h in tally.of_model(grade.model) if grade.harness in ("", h.info.name)]
        rows.append((grade, pairs(list(baseline.of_model(other)), ours, grade.name, gate)))
    ps = holm([_p_value(found, gate) for _, found in rows if found.ids])
    adjusted = iter(ps)
    out = []
    for grade, (before, after, ids, _, _) in rows:
        if not ids:
            why = grade.why or "the baseline has none of these samples"
            out.append(replace(grade, passed=grade.passed and grade.threshold is None, why=why))
            continue
        p, delta = next(adjusted), (fsum(after) - fsum(before)) / len(before)
        grade = replace(grade, baseline_score=fsum(before) / len(before), delta=delta, p_value=p)
        if grade.threshold is not None and delta < 0 and p < 1 - gate.confidence:
            why = grade.why or f"{-delta:.3f} below the baseline, which is not chance (p={p:.3g})"
            grade = replace(grade, passed=False, why=why)
        out.append(grade)
    return out


class Pairs(NamedTuple):
    """The numbers of the samples both sides have, by id, in the order of `after`; `clusters` are those of `after`, None
    where the gate does not cluster. `changed`: how many have the same id but another input or expectation, and are no pairs."""

    before: list[float]
    after: list[float]
    ids: list[str]
    clusters: list[int] | None
    changed: int


def pairs(before: Sequence[HarnessTally], after: Sequence[HarnessTally], name: str, gate: Gate) -> Pairs:
    """Needs tallies with ids."""
    known: dict[str, tuple[float, int]] = {}
    for id, value, text, _ in _by_id(before, name, gate):
        known.setdefault(id, (value, text))
    left, right, ids, changed = [], [], [], 0
    clusters: list[int] = []
    for id, value, text, cluster in _by_id(after, name, gate):
        found = known.pop(id, None)
        if found is None:
            continue
        if found[1] != text:
            changed += 1
            continue
        left.append(found[0])
        right.append(value)
        ids.append(id)
        clusters.append(cluster)
    return Pairs(left, right, ids, clusters if gate.cluster else None, changed)


def _by_id(harnesses: Sequence[HarnessTally], name: str, gate: Gate) -> Iterable[tuple[str, float, int, int]]:
    for h in harnesses:
        # an id belongs to its harness; where a model has several of them, both are needed to find its pair
        prefix = f"{h.info.name}/" if len(harnesses) > 1 else ""
        if name != OVERALL and name not in h.graders:
            continue
        for v in h.reduced(name, exclude_errors=gate.on_error == "exclude").values:
            number = v.rate if gate.metric == "pass_rate" else v.score
            yield f"{prefix}{h.ids[v.index]}", number, h.texts[v.index], v.cluster


def _p_value(found: Pairs, gate: Gate) -> float:
    before, after, _, clusters, _ = found
    if clusters is not None:  # McNemar's test takes every sample for one that was drawn by itself
        return paired(before, after, clusters, confidence=gate.confidence).p_value
    changes = [b - a for a, b in zip(before, after, strict=True)]
    if all(c in (-1.0, 0.0, 1.0) for c in changes):
        return mcnemar(changes.count(1.0), changes.count(-1.0))
    return paired(before, after, confidence=gate.confidence).p_value
