"""One score out of repeats: known values, and what must hold of every one."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mist.errors import InvalidArgument
from mist.tools.matchspec.reducers import SIMPLE, at_least, pass_all, pass_at, reducer


@pytest.mark.parametrize(
    ("name", "scores", "passed", "found"),
    [
        ("mean", [0.0, 0.5, 1.0], [False, False, True], (0.5, 1 / 3)),
        ("median", [0.0, 0.25, 1.0], [False, True, True], (0.25, 1.0)),
        ("max", [0.0, 0.5], [False, True], (0.5, 1.0)),
        ("mode", [0.5, 1.0, 1.0], [False, True, True], (1.0, 1.0)),
        ("mode", [0.0, 1.0], [False, True], (0.0, 0.0)),
        ("at_least_2", [1.0, 1.0, 0.0], [True, True, False], (1.0, 1.0)),
        ("at_least_3", [1.0, 1.0, 0.0], [True, True, False], (0.0, 0.0)),
        ("pass@1", [1.0, 0.0, 0.0, 0.0], [True, False, False, False], (0.25, 0.25)),
        ("pass@2", [1.0, 0.0, 0.0, 0.0], [True, False, False, False], (0.5, 0.5)),
        ("pass^2", [1.0, 1.0, 0.0], [True, True, False], (1 / 3, 1 / 3)),
    ],
)
def test_reducers_have_their_known_values(
    name: str, scores: list[float], passed: list[bool], found: tuple[float, float]
) -> None:
    """(score, rate)."""
    assert reducer(name, len(scores))(scores, passed) == (pytest.approx(found[0]), pytest.approx(found[1]))


@pytest.mark.parametrize("name", ["", "best", "pass@", "pass@0", "pass@6", "at_least_6", "pass^6", "pass@1.5"])
def test_an_unknown_reducer_or_one_that_needs_more_repeats_is_refused(name: str) -> None:
    """Five repeats."""
    with pytest.raises(InvalidArgument):
        reducer(name, 5)


@given(st.integers(1, 7), st.data())
@settings(max_examples=50)
def test_pass_at_k_is_the_share_of_draws_that_pass(n: int, data: st.DataObject) -> None:
    """Counted over every draw of k out of n, for any (one passes) and for all."""
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations([i < c for i in range(n)], k))
    assert pass_at(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_all(n, c, k) == pytest.approx(sum(map(all, draws)) / len(draws))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=50)
def test_a_reduced_score_lies_among_the_scores(scores: list[float]) -> None:
    """The simple ones."""
    passed = [s > 0.5 for s in scores]
    for name in SIMPLE:
        score, rate = reducer(name, len(scores))(scores, passed)
        assert min(scores) - 1e-9 <= score <= max(scores) + 1e-9
        assert 0 <= rate <= 1


def test_fewer_repeats_than_k_promise_nothing_they_do_not_show() -> None:
    """A run that is not complete: one that passed is one, all of k is not known to pass."""
    assert (pass_at(2, 1, 5), pass_at(2, 0, 5), pass_all(2, 2, 5), at_least(2, 2, 5)) == (1.0, 0.0, 0.0, 0.0)
