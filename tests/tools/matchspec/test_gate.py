"""The gate is closed where it fails: nothing vacuous, broken or unknown ever passes it."""

from __future__ import annotations

from math import nan
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mist.tools.matchspec.compare import compare
from mist.tools.matchspec.gate import judge
from mist.tools.matchspec.grading import Score
from mist.tools.matchspec.reports.values import OVERALL, Grade
from mist.tools.matchspec.suite import Gate
from mist.tools.matchspec.tally import Tally

from .counting import manifest, result, tally


def gate(**fields: Any) -> Gate:
    """Also with what a checked suite would refuse."""
    return Gate(**fields)


def row(found: Tally, rules: Gate, name: str = "exact") -> Grade:
    return next(g for g in judge(found, rules).grades if g.name == name)


# ------------------------------------------------------------------------------------------------- what passes


def test_a_good_run_passes_and_says_with_how_much() -> None:
    found = judge(tally([1.0] * 90 + [0.0] * 10), gate(overall=0.85))
    assert (found.ok, found.verdict, found.reasons) == (True, "PASS", [])
    (exact,) = found.grades  # one grader says what the samples say
    assert (exact.name, exact.score, exact.threshold, exact.passed, exact.n) == ("exact", 0.9, 0.85, True, 100)
    assert (round(exact.ci_lower or 0, 3), round(exact.ci_upper or 0, 3)) == (0.826, 0.945)
    assert [g.name for g in judge(tally([1.0] * 9), gate(overall=0.8, per_grader={"exact": 0.5})).grades] == [
        "exact", OVERALL,
    ]  # fmt: skip


def test_the_documents_own_sample_fails_on_its_lower_limit() -> None:
    """0.83 of 120 against 0.80: printed as passed there, its true lower limit is 0.753."""
    scores = [1.0] * 99 + [0.6] + [0.0] * 20  # 0.83 as a mean: 99.6 of 120
    rules = gate(overall=0.80, use_lower_bound=True)
    for metric in ("pass_rate", "mean_score"):
        found = judge(tally(scores), gate(overall=0.80, use_lower_bound=True, metric=metric))
        assert not found.ok
    assert judge(tally([1.0] * 100 + [0.0] * 20), gate(overall=0.80)).ok
    assert not judge(tally([1.0] * 100 + [0.0] * 20), rules).ok


def test_a_lower_limit_no_such_run_can_reach_says_how_many_samples_could() -> None:
    found = judge(tally([1.0] * 10), gate(overall=0.80, use_lower_bound=True))
    assert "it takes 16 samples that all pass, there are 10" in found.reasons[0]
    assert judge(tally([1.0] * 16), gate(overall=0.80, use_lower_bound=True)).ok


def test_thresholds_are_the_graders_own_then_by_name_then_overall_then_one() -> None:
    graders = [
        {"type": "exact", "name": "own", "threshold": 0.1}, {"type": "exact", "name": "named"},
        {"type": "exact", "name": "rest"},
    ]  # fmt: skip
    found = Tally(manifest(10, graders=graders))
    for i in range(10):
        scores = [Score(g["name"], 1.0 if i < 5 else 0.0, i < 5) for g in graders]
        found.add(result(i, 1.0 if i < 5 else 0.0, scores=scores, passed=i < 5))
    rules = gate(overall=0.4, per_grader={"named": 0.3})
    wanted = {g.name: g.threshold for g in judge(found, rules).grades}
    assert wanted == {"own": 0.1, "named": 0.3, "rest": 0.4, OVERALL: 0.4}
    assert judge(found, rules).ok
    assert {g.name: g.threshold for g in judge(found, gate()).grades} == {
        "own": 0.1, "named": 1.0, "rest": 1.0, OVERALL: 1.0,
    }  # fmt: skip
    named = gate(per_grader={"named": 0.3, "rest": 0.3})
    assert {g.name: g.threshold for g in judge(found, named).grades}[OVERALL] is None
    assert judge(found, named).ok


def test_a_grader_of_weight_zero_only_informs() -> None:
    graders = [{"type": "exact", "weight": 1.0}, {"type": "contains", "weight": 0}]
    found = Tally(manifest(4, graders=graders))
    for i in range(4):
        found.add(result(i, scores=[Score("exact", 1.0, True), Score("contains", 0.0, False)]))
    assert judge(found, gate()).ok
    assert row(found, gate(), "contains").threshold is None


def test_harnesses_of_one_model_are_pooled_and_models_are_not() -> None:
    both = manifest(4, "a", "b")
    pooled = Tally(both_of_one_model := _same_model(both))
    apart = Tally(both)
    for i in range(4):
        for name, score in (("a", 1.0), ("b", 0.0 if i else 1.0)):
            pooled.add(result(i, score, harness=name))
            apart.add(result(i, score, harness=name))
    assert both_of_one_model.models == ["one"]
    found = judge(pooled, gate(overall=0.6))
    assert found.ok
    assert [(g.name, g.n, g.score) for g in found.grades] == [("exact", 8, 0.625)]
    assert judge(apart, gate(overall=0.6)).reasons == ["b: exact: 0.250 is below 0.600"]


def _same_model(m: Any) -> Any:
    from msgspec.structs import replace

    return replace(m, models=["one"], harnesses=[replace(h, model="one") for h in m.harnesses])


# ------------------------------------------------------------------------------------------------- what clusters


DOCUMENTS = [f"d{i // 20}" for i in range(200)]
"""Ten documents with twenty questions each."""
WHOLE = [1.0] * 180 + [0.0] * 20
"""Nine of them answered, one not: 0.9 either way, and far less certain over documents."""


def test_questions_about_one_document_are_not_drawn_one_by_one() -> None:
    rules = gate(overall=0.8, use_lower_bound=True)
    alone = judge(tally(WHOLE), rules)
    assert alone.ok
    found = judge(tally(WHOLE, clusters=DOCUMENTS), gate(overall=0.8, use_lower_bound=True, cluster="document"))
    (exact,) = found.grades
    assert (exact.score, exact.n, exact.clusters) == (0.9, 200, 10)
    assert (exact.ci_lower or 1) < 0.75 < (alone.grades[0].ci_lower or 0)
    assert (exact.standard_error or 0) > 4 * (alone.grades[0].standard_error or 1)
    assert not found.ok


def test_few_clusters_are_said_and_one_tells_nothing() -> None:
    rules = gate(overall=0.5, use_lower_bound=True, cluster="document")
    few = judge(tally([1.0, 1.0, 1.0, 0.0] * 5, clusters=["a", "b", "c", "d"] * 5), rules)
    assert few.warnings == ["m: exact: with 4 clusters the interval is rough"]
    one = judge(tally([1.0] * 50, clusters=["a"] * 50), rules)
    assert (one.ok, one.grades[0].standard_error) == (False, None)
    assert "it takes 4 clusters that all pass, there are 1" in one.reasons[0]
    same = judge(tally([1.0, 0.0] * 50, clusters=[f"d{i // 2}" for i in range(100)]), rules)
    assert (same.grades[0].ci_lower or 0) < 0.5  # clusters that are all alike do not make it a point


def test_results_that_do_not_say_their_cluster_never_pass() -> None:
    rules = gate(overall=0.0, cluster="document")
    assert judge(tally(WHOLE), rules).reasons == [
        "the results do not say their 'document', by which the gate clusters: rescore the run"
    ]
    without = judge(tally(WHOLE, clusters=["", *DOCUMENTS[1:]]), rules)
    assert without.reasons == ["1 of 200 results do not say their 'document': rescore the run"]


def test_a_loss_in_one_document_may_be_chance_where_its_questions_are_not() -> None:
    before, after = [1.0] * 200, [0.0] * 20 + [1.0] * 180
    alone = judge(tally(after, ids=True), gate(overall=0.5), baseline=tally(before, ids=True))
    assert [g.passed for g in alone.grades] == [False]
    rules = gate(overall=0.5, cluster="document")
    found = judge(
        tally(after, ids=True, clusters=DOCUMENTS), rules, baseline=tally(before, ids=True, clusters=DOCUMENTS)
    )
    assert (found.ok, round(found.grades[0].delta or 0, 3)) == (True, -0.1)
    (row,) = compare(tally(before, ids=True, clusters=DOCUMENTS), tally(after, ids=True, clusters=DOCUMENTS))
    assert (row.clusters, len(row.lost)) == (10, 20)
    assert row.p_value > 0.05
    (row,) = compare(tally(before, ids=True), tally(after, ids=True, clusters=DOCUMENTS))
    assert (row.clusters, row.p_value < 1e-5) == (None, True)  # one side does not say: samples by themselves


# ------------------------------------------------------------------------------------------------- what never does


@pytest.mark.parametrize("on_error", ["fail", "exclude"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_errors_never_pass_a_run(on_error: str, threshold: float) -> None:
    """The seed's documents leave errors out of the rate: 119 errors and one pass would be 100 %."""
    rules = gate(overall=threshold, on_error=on_error, errors_max_share=1.0)
    assert not judge(tally([-1.0] * 20), rules).ok
    almost = gate(overall=0.9, on_error=on_error)
    assert not judge(tally([1.0] + [-1.0] * 119), almost).ok


def test_errors_may_be_left_out_up_to_a_share() -> None:
    scores = [1.0] * 19 + [-1.0]
    assert not judge(tally(scores), gate(overall=1.0)).ok
    assert judge(tally(scores), gate(overall=1.0, on_error="exclude", errors_max_share=0.05)).ok
    assert not judge(tally(scores), gate(overall=1.0, on_error="exclude", errors_max_share=0.04)).ok


def test_a_run_that_is_not_complete_never_passes() -> None:
    found = Tally(manifest(10))
    for i in range(9):
        found.add(result(i))
    assert "not complete: 9 of 10" in judge(found, gate(overall=0.0)).reasons[0]
    assert not judge(tally([1.0]), gate(), complete=False).ok


def test_too_few_samples_warn_or_fail() -> None:
    warned = judge(tally([1.0] * 5), gate(min_sample_size=6))
    assert warned.ok
    assert "5 samples are fewer than 6" in warned.warnings[0]
    assert not judge(tally([1.0] * 5), gate(min_sample_size=6, min_sample_action="fail")).ok
    assert judge(tally([1.0] * 6), gate(min_sample_size=6, min_sample_action="fail")).ok


def test_unknown_costs_and_latencies_are_above_every_ceiling() -> None:
    def spent(*costs: float | None) -> Tally:
        found = Tally(manifest(len(costs)))
        for i, cost in enumerate(costs):
            found.add(result(i, cost_usd=cost, latency_ms=cost))
        return found

    assert judge(spent(0.1, 0.2), gate(cost_usd_max=0.31)).ok
    assert not judge(spent(0.1, 0.2), gate(cost_usd_max=0.29)).ok
    assert "the cost of 1 of 2 results is not known" in judge(spent(0.1, None), gate(cost_usd_max=9.0)).reasons[0]
    assert not judge(spent(0.1, nan), gate(cost_usd_max=9.0)).ok
    assert judge(spent(*[1.0] * 19, 50.0), gate(latency_ms_max=1.0)).ok
    assert not judge(spent(*[1.0] * 18, 50.0, 50.0), gate(latency_ms_max=1.0)).ok
    assert not judge(spent(1.0, None), gate(latency_ms_max=9.0)).ok


def test_a_result_counts_once_and_only_in_its_place() -> None:
    found = Tally(manifest(2))
    for _ in range(3):
        found.add(result(0))
    found.add(result(7))
    found.add(result(1, harness="stranger"))
    assert found.done == 1
    assert not judge(found, gate(overall=0.0)).ok


def test_the_order_of_results_decides_nothing() -> None:
    """A run that was killed, resumed and asked concurrently has them in another order: figures and examples are the same."""
    results = [result(i, [0.0, 0.3, 1.0][i % 3], latency_ms=float(i), cost_usd=0.1 * i) for i in range(40)]
    found = []
    for seed in range(3):
        tallied = Tally(manifest(40), examples_max=5)
        for r in Random(seed).sample(results, 40):
            tallied.add(r)
        found.append((judge(tallied, gate(metric="mean_score")), tallied.examples(), tallied.cost_usd))
    assert found[0] == found[1] == found[2]
    assert [e.id for e in found[0][1][0]] == ["q0", "q1", "q3", "q4", "q6"]


def test_repeats_are_reduced_per_sample() -> None:
    """Five samples asked twice: the rate is that of samples, n counts samples."""
    found = Tally(manifest(5, epochs=2, reducer="pass^2"))
    for i in range(5):
        for epoch in (1, 2):
            found.add(result(i, 0.0 if i == 0 and epoch == 2 else 1.0, epoch=epoch))
    exact = row(found, gate(overall=0.8))
    assert (exact.n, exact.score, exact.passed_n) == (5, 0.8, 4)


ROTTEN = st.sampled_from(
    ["empty", "absent", "errors", "grader_errors", "nan", "unknown_grader", "unknown_metric", "unpriced", "no_graders",
     "bad_threshold", "bad_rule"]
)  # fmt: skip


@given(
    rotten=st.lists(ROTTEN, min_size=1, max_size=4, unique=True),
    n=st.integers(1, 6),
    overall=st.sampled_from([None, 0.0, 0.5, 1.0]),
    metric=st.sampled_from(["pass_rate", "mean_score"]),
    lower=st.booleans(),
    on_error=st.sampled_from(["fail", "exclude"]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    repeats=st.integers(1, 2),
)
@settings(max_examples=100, deadline=None)
def test_nothing_rotten_ever_passes(
    rotten: list[str],
    n: int,
    overall: float | None,
    metric: str,
    lower: bool,
    on_error: str,
    share: float,
    repeats: int,
) -> None:
    """However kind the thresholds: empty data, missing results, errors only, unknown graders and metrics, no price, NaN."""
    fields: dict[str, Any] = {
        "overall": overall, "metric": metric, "use_lower_bound": lower, "on_error": on_error, "errors_max_share": share,
    }  # fmt: skip
    if "unknown_metric" in rotten:
        fields["metric"] = "vibes"
    if "unknown_grader" in rotten:
        fields["per_grader"] = {"nobody": 0.0}
    if "unpriced" in rotten:
        fields["cost_usd_max"] = 1e9
    if "bad_threshold" in rotten:
        fields["overall"] = nan if overall else -1.0
    if "bad_rule" in rotten:
        fields["on_error"] = "shrug"
    graders = [] if "no_graders" in rotten else None
    samples = 0 if "empty" in rotten else n
    found = Tally(manifest(samples, graders=graders, epochs=repeats))
    for i in range(samples - ("absent" in rotten)):
        for epoch in range(1, repeats + 1):
            score = nan if "nan" in rotten else 1.0
            scores = [Score("exact", score, True, error="x" if "grader_errors" in rotten else "")]
            if "no_graders" in rotten:
                scores = []
            error = "down" if "errors" in rotten else ""
            found.add(result(i, score, passed=True, error=error, scores=scores, epoch=epoch))
    judged = judge(found, gate(**fields))
    assert not judged.ok
    assert judged.verdict == "FAIL"
    assert judged.reasons


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, nan]), max_size=8), st.floats(0, 1), st.booleans(),
    st.sampled_from(["pass_rate", "mean_score"]),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_what_passes_reached_its_threshold(scores: list[float], threshold: float, lower: bool, metric: str) -> None:
    """The other way round: a PASS is never without samples, and every judged row is at its threshold."""
    found = judge(tally(scores), gate(overall=threshold, use_lower_bound=lower, metric=metric))
    if found.ok:
        assert scores
        for g in found.grades:
            reached = g.ci_lower if lower else g.score
            assert reached is not None
            assert reached >= threshold


# ------------------------------------------------------------------------------------------------- the baseline


def test_a_significant_loss_against_the_baseline_fails() -> None:
    before = tally([1.0] * 100, ids=True)
    worse = judge(tally([1.0] * 80 + [0.0] * 20, ids=True), gate(overall=0.5), baseline=before)
    assert not worse.ok
    assert "0.200 below the baseline, which is not chance" in worse.reasons[0]
    exact = worse.grades[0]
    assert (exact.baseline_score, round(exact.delta or 0, 3)) == (1.0, -0.2)
    assert (exact.p_value or 1) < 0.001
    chance = judge(tally([1.0] * 97 + [0.0] * 3, ids=True), gate(overall=0.5), baseline=before)
    assert chance.ok
    assert chance.grades[0].delta == pytest.approx(-0.03)


def test_a_baseline_without_these_samples_is_none() -> None:
    other = Tally(manifest(3), ids=True)
    for i in range(3):
        other.add(result(i, input="another question"))
    found = judge(tally([1.0] * 3, ids=True), gate(), baseline=other)
    assert not found.ok
    assert "the baseline has none of these samples" in found.reasons[0]


def test_one_model_is_compared_with_one_model_whatever_they_are_called() -> None:
    before, after = tally([1.0, 0.0], ids=True, harness="old"), tally([1.0, 1.0], ids=True, harness="new")
    found = judge(after, gate(overall=0.5), baseline=before)
    assert found.ok
    assert found.grades[0].delta == 0.5
