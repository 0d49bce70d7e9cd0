"""Exact figures: nearest rank, unknown stays unknown."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mist.tools.tokentrace.spans import row_of
from mist.tools.tokentrace.stats import ModelStats, Quantiles, nearest_rank, quantiles, stats
from mist.tools.tokentrace.store import Batch, Store

from .spanning import envelope, record


def test_the_rank_is_the_ceiling_counted_from_one() -> None:
    """Of 10 values the median is the 5th, p90 the 9th, p99 the 10th; of one value every percentile is it."""
    ten = [10.0 * n for n in range(1, 11)]
    assert quantiles(ten) == Quantiles(50, 90, 100)
    assert quantiles([7]) == Quantiles(7, 7, 7)
    assert quantiles([2, 1]) == Quantiles(1, 2, 2)
    assert quantiles(range(1, 101)) == Quantiles(50, 90, 99)
    assert quantiles([None, None]) == Quantiles(None, None, None)


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=60), st.integers(1, 100))
def test_a_percentile_is_the_least_value_that_covers_it(values: list[int], percent: int) -> None:
    """At least p % of the values are not above it, and it is the smallest of the values with that property."""
    found = nearest_rank(sorted(values), percent)
    covering = [v for v in values if sum(w <= v for w in values) * 100 >= percent * len(values)]
    assert found == min(covering)


def test_stats_by_model_leave_the_unknown_out(tmp_path: Path) -> None:
    """Known values only; null where none is known; the most frequent model first; cost is summed exactly."""
    spans = [
        envelope(1, attrs={"model": "a", "tokens_in": 10, "cost_usd": 0.1}),
        envelope(2, attrs={"model": "a", "tokens_in": 30, "cost_usd": 0.2}),
        envelope(3, attrs={"model": "a"}, end_ns=0),
        envelope(4, attrs={"model": "b"}, start_ns=0, end_ns=0),
        envelope(5, attrs={}, start_ns=0, end_ns=0),
    ]
    rows = [r for n, e in enumerate(spans, 1) if (r := row_of(record(e, n))) is not None]
    nothing = Quantiles(None, None, None)
    with Store.open(tmp_path / "t.db") as store:
        store.apply("trace", "i", Batch(after=0, scanned=5, rows=rows))
        found = stats(store)
        assert found.total == 5
        assert found.spans == [
            ModelStats("a", 3, Quantiles(250.0, 250.0, 250.0), Quantiles(10, 30, 30), nothing, 0.30000000000000004),
            ModelStats(None, 1, nothing, nothing, nothing, None),
            ModelStats("b", 1, nothing, nothing, nothing, None),
        ]
        assert [s.model for s in stats(store, model="b").spans] == ["b"]
        assert stats(store, since_ns=1_700_000_000_000_000_002, until_ns=1_700_000_000_000_000_003).total == 1


def test_an_empty_store_answers_with_nothing(tmp_path: Path) -> None:
    """Zero spans are an empty list, never null."""
    with Store.open(tmp_path / "t.db") as store:
        assert (stats(store).total, stats(store).spans) == (0, [])
