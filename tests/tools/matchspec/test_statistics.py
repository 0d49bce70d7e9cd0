"""The numbers of evals, against figures computed elsewhere and against what must hold of any input."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import comb, sqrt
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mist.errors import InvalidArgument
from mist.tools.matchspec import statistics
from mist.tools.matchspec.statistics import (
    DRAWN_MAX,
    agreement,
    all_pass_size,
    bootstrap,
    holm,
    mcnemar,
    paired,
    score_interval,
    size_to_see,
    standard_error,
    wilson,
)

GOLDEN = [
    (0.83, 120, 0.753, 0.887),
    (0.91, 120, 0.845, 0.949),
    (0.74, 120, 0.655, 0.810),
    (0.74, 10, 0.433, 0.914),
    (0.74, 500, 0.700, 0.777),
    (1.0, 5, 0.566, 1.0),
    (1.0, 8, 0.676, 1.0),
    (1.0, 20, 0.839, 1.0),
]


@pytest.mark.parametrize(("rate", "n", "low", "high"), GOLDEN)
def test_wilsons_interval_has_the_golden_values(rate: float, n: int, low: float, high: float) -> None:
    assert [round(end, 3) for end in wilson(rate * n, n)] == [low, high]


def test_wilson_of_nothing_knows_nothing_and_of_nonsense_refuses() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10).low == 0.0
    assert wilson(10, 10).high == 1.0
    for passed, n in ((3, 2), (-1, 2), (float("nan"), 2)):
        with pytest.raises(InvalidArgument):
            wilson(passed, n)
    with pytest.raises(InvalidArgument):
        wilson(1, 2, 1.0)


@pytest.mark.parametrize(("threshold", "n"), [(0.80, 16), (0.85, 22), (0.90, 35), (0.95, 73), (0.99, 381)])
def test_the_smallest_run_that_can_meet_a_threshold(threshold: float, n: int) -> None:
    """And one sample fewer cannot, even when all pass."""
    assert all_pass_size(threshold) == n
    assert wilson(n, n).low >= threshold > wilson(n - 1, n - 1).low


def test_how_many_samples_show_a_difference() -> None:
    """Fleiss's formula for two proportions (0.8 against 0.85: 906 each); a paired test needs fewer, and at least the
    difference itself changes."""
    assert size_to_see(0.05, rate=0.8) == 906
    assert size_to_see(0.05, changed=0.10) == 312
    assert size_to_see(0.05, changed=0.0) == size_to_see(0.05, changed=0.05) < 312
    with pytest.raises(InvalidArgument):
        size_to_see(0.0)


def test_the_bootstrap_is_the_same_each_time_and_close_to_the_normal_interval() -> None:
    rand = Random(7)
    values = [rand.random() for _ in range(400)]
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values)
    error = standard_error(values)
    assert error is not None
    mean = sum(values) / 400
    assert low == pytest.approx(mean - 1.96 * error, abs=error / 4)
    assert high == pytest.approx(mean + 1.96 * error, abs=error / 4)


def test_drawn_and_expanded_bootstrap_agree_where_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a skewed sample, where the normal interval would be off."""
    rand = Random(3)
    values = [rand.random() ** 8 for _ in range(DRAWN_MAX)]
    drawn = bootstrap(values, resamples=4000)
    monkeypatch.setattr(statistics, "DRAWN_MAX", 10)
    expanded = bootstrap(values)
    width = drawn.high - drawn.low
    assert expanded.low == pytest.approx(drawn.low, abs=0.06 * width)
    assert expanded.high == pytest.approx(drawn.high, abs=0.06 * width)
    mean = sum(values) / len(values)
    assert expanded.high - mean > mean - expanded.low


def test_an_interval_of_equal_scores_is_not_a_point() -> None:
    """The bootstrap sees no spread in three perfect scores; Wilson's interval says how little that is."""
    assert bootstrap([1.0] * 3) == (1.0, 1.0)
    assert score_interval([1.0] * 3) == wilson(3, 3)
    assert score_interval([0.5] * 8, clusters=[1] * 4 + [2] * 4) == wilson(1, 2)
    assert score_interval([0.0, 1.0, 1.0]) == bootstrap([0.0, 1.0, 1.0])


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [float("inf")]])
def test_a_mean_of_nothing_or_of_no_numbers_is_refused(bad: list[float]) -> None:
    for ask in (bootstrap, standard_error, score_interval):
        with pytest.raises(InvalidArgument):
            ask(bad)


def test_a_clustered_error_counts_clusters_and_not_values() -> None:
    """Ten copies of four values are four values: the clustered error is that of the four, the plain one far smaller."""
    four = [0.0, 0.2, 0.9, 1.0]
    copies, keys = four * 10, list(range(4)) * 10
    plain, clustered = standard_error(copies), standard_error(copies, keys)
    assert plain is not None
    assert clustered == pytest.approx(standard_error(four))
    assert clustered > 3 * plain
    assert standard_error(four, list("abcd")) == pytest.approx(standard_error(four))
    assert standard_error([1.0]) is None
    assert standard_error([0.0, 1.0], ["a", "a"]) is None
    assert bootstrap(copies, keys).low < bootstrap(copies).low


def test_mcnemar_is_the_exact_sign_test() -> None:
    """Against the definition, and its large-sample form against the exact one."""
    for gained, lost in product(range(8), repeat=2):
        n = gained + lost
        tail = sum(comb(n, i) for i in range(min(gained, lost) + 1))
        assert mcnemar(gained, lost) == pytest.approx(min(1.0, float(Fraction(2 * tail, 2**n))))
        assert mcnemar(gained, lost) == mcnemar(lost, gained)
    assert mcnemar(5100, 4890) == pytest.approx(mcnemar(5110, 4900), abs=0.002)  # 9,990 exact, 10,010 normal
    assert mcnemar(60_000, 40_000) < 1e-9


def test_a_paired_difference_tells_a_shift_from_noise() -> None:
    rand = Random(5)
    before = [rand.random() for _ in range(300)]
    noisy = [v + (0.3 * rand.random() if i % 2 else -0.3 * rand.random()) for i, v in enumerate(before)]
    better = [v + 0.1 for v in noisy]
    assert paired(before, noisy).p_value > 0.05
    found = paired(before, better)
    assert 0 < found.low < found.mean < found.high
    assert found.p_value < 0.01
    assert paired(before, before) == (0.0, 0.0, 0.0, 1.0)
    assert paired([0.0], [1.0]).p_value == 1.0  # one pair is no evidence
    large = paired(before * 5, better * 5)
    assert large.p_value < found.p_value
    assert paired(before * 5, better * 5, clusters=list(range(300)) * 5).low == pytest.approx(found.low, abs=1e-9)
    with pytest.raises(InvalidArgument):
        paired([1.0], [])


def test_a_difference_beyond_all_draws_has_a_smaller_p_value_unless_there_are_few() -> None:
    """Twenty-five comparisons at once must be able to find it; five values cannot say more than 1 in 16."""
    n = 200
    before = [0.5 + (i % 7) / 100 for i in range(n)]
    after = [b - 0.3 + (i % 5) / 100 for i, b in enumerate(before)]
    assert paired(before, after).p_value < 1e-6
    assert paired(before[:5], after[:5]).p_value == 2.0**-4
    clusters = [i % 5 for i in range(n)]
    assert paired(before, after, clusters).p_value == 2.0**-4


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=50)
def test_holm_never_makes_a_p_value_smaller_and_keeps_their_order(ps: list[float]) -> None:
    adjusted = holm(ps)
    assert all(p <= a <= 1 for p, a in zip(ps, adjusted, strict=True))
    order = sorted(range(len(ps)), key=ps.__getitem__)
    assert [adjusted[i] for i in order] == sorted(adjusted)
    assert min(adjusted) == pytest.approx(min(1.0, len(ps) * min(ps)))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_kappa_by_hand() -> None:
    """The textbook table 20 5 / 10 15: accuracy 0.7, kappa 0.4. And the standard error of Fleiss, Cohen and Everitt
    (1969), by their own formula."""
    ours = ["y"] * 25 + ["n"] * 25
    theirs = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    found = agreement(ours, theirs)
    assert (found.n, found.accuracy) == (50, 0.7)
    assert found.kappa == pytest.approx(0.4)
    p = {("y", "y"): 0.4, ("y", "n"): 0.1, ("n", "y"): 0.2, ("n", "n"): 0.3}
    row, column, po, pe, k = {"y": 0.5, "n": 0.5}, {"y": 0.6, "n": 0.4}, 0.7, 0.5, 0.4
    a = sum(p[i, i] * (1 - (row[i] + column[i]) * (1 - k)) ** 2 for i in "yn")
    b = (1 - k) ** 2 * sum(p[i, j] * (column[i] + row[j]) ** 2 for i in "yn" for j in "yn" if i != j)
    error = sqrt((a + b - (k - pe * (1 - k)) ** 2) / (50 * (1 - pe) ** 2))
    assert po - pe == pytest.approx(k * (1 - pe))
    assert found.kappa_low == pytest.approx(0.4 - 1.959964 * error, abs=1e-6)


def test_raters_that_can_only_agree_have_no_kappa() -> None:
    found = agreement([True] * 5, [True] * 5)
    assert (found.accuracy, found.kappa) == (1.0, None)
    assert agreement([1, 0], [0, 1]).kappa == pytest.approx(-1.0)
    with pytest.raises(InvalidArgument):
        agreement([], [])
