"""Figures: nearest rank within the sketch, unknown stays unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ddsketch import DDSketch
from hypothesis import given
from hypothesis import strategies as st

from mist.tools.tokentrace.rollup import MEASURES, SCALE, Cell, Series, cells_by_minute
from mist.tools.tokentrace.sketch import ACCURACY, Sketch, bucket, merge, quantiles
from mist.tools.tokentrace.spans import row_of
from mist.tools.tokentrace.stats import ModelStats, Quantiles, seed_stats, stats
from mist.tools.tokentrace.store import Batch, Store
from mist.tools.tokentrace.where import Where

from .spanning import envelope, record


def nearest_rank(values: list[float], percent: int) -> float:
    """The exact percentile: the value at rank ceil(percent / 100 * n), counted from 1."""
    return sorted(values)[max(1, -(-percent * len(values) // 100)) - 1]


MANY = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e12), st.integers(0, 2**53).map(float)), min_size=1)


@given(MANY, MANY)
def test_a_percentile_is_the_exact_one_within_the_accuracy(ours: list[float], others: list[float]) -> None:
    """Of any values of any size, and of two sketches merged; taking the others away again leaves the first."""
    one, two = sketched(ours), sketched(others)
    together = dict(one)
    merge(together, two)
    assert together == sketched([*others, *ours])
    for values, found in ((ours, one), ([*ours, *others], together)):
        percents = (1, 10, 50, 90, 95, 99, 100)
        for percent, answer in zip(percents, quantiles(found, percents), strict=True):
            assert answer == pytest.approx(nearest_rank(values, percent), rel=ACCURACY * 1.001, abs=0)
    merge(together, two, -1)
    assert together == one


def sketched(values: list[float]) -> Sketch:
    out: Sketch = {}
    for value in values:
        merge(out, {bucket(value): 1})
    return out


def add(cell: Cell, status: str, values: list[float | None]) -> None:
    """One span more, as the definitions say it."""
    cell.spans += 1
    cell.failed += status not in ("", "ok")
    cell.timeouts += status == "timeout"
    for measure, scale, value in zip(cell.measures, SCALE, values, strict=True):
        if value is not None:
            measure.known += 1
            measure.total += round(value * scale)
            merge(measure.sketch, {bucket(value): 1})


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**11), st.sampled_from(["a", "b", "", None]), st.sampled_from(["", "ok", "error", "timeout"]),
            st.none() | st.floats(0, 2**53), st.none() | st.integers(0, 2**53), st.none() | st.floats(0, 1e6),
        )
    )
)  # fmt: skip
def test_many_spans_at_once_add_what_they_add_one_by_one(seen: list[tuple[Any, ...]]) -> None:
    """Counts, exact sums and sketches of every minute and series."""
    rows = []
    one_by_one: dict[tuple[int, Series], Cell] = {}
    for time_ns, model, status, latency_ms, tokens_in, cost_usd in seen:
        row = row_of(record(envelope(1)))
        assert row is not None
        row = row._replace(
            time_ns=time_ns, model=model, status=status, latency_ms=latency_ms, tokens_in=tokens_in, cost_usd=cost_usd
        )
        rows.append(row)
        key = (time_ns // 10**9 // 60 * 60, Series(row.tenant, row.operation, model or "", row.provider or ""))
        add(one_by_one.setdefault(key, Cell()), status, [getattr(row, name) for name in MEASURES])
    found = cells_by_minute(rows)
    assert list(found) == list(one_by_one)
    for key, cell in found.items():
        other = one_by_one[key]
        assert (cell.spans, cell.failed, cell.timeouts) == (other.spans, other.failed, other.timeouts)
        assert cell.pack() == other.pack()


def test_it_agrees_with_the_package_of_the_paper() -> None:
    """ddsketch's own implementation at the same accuracy: the two answers lie within both errors of one another."""
    values = [1.0003**n for n in range(1, 30_000, 7)]
    theirs = DDSketch(ACCURACY)
    for value in values:
        theirs.add(value)
    found = quantiles(sketched(values), (10, 50, 90, 99))
    for percent, answer in zip((0.1, 0.5, 0.9, 0.99), found, strict=True):
        assert answer == pytest.approx(theirs.get_quantile_value(percent), rel=2 * ACCURACY)


def test_stats_by_model_leave_the_unknown_out(tmp_path: Path) -> None:
    """Known values only; null where none is known; the most frequent model first; cost is summed exactly."""
    spans = [
        envelope(1, attrs={"model": "a", "tokens_in": 10, "cost_usd": 0.1}),
        envelope(2, attrs={"model": "a", "tokens_in": 30, "cost_usd": 0.2}),
        envelope(3, attrs={"model": "a"}, end_ns=0, status="error"),
        envelope(4, attrs={"model": "b"}, start_ns=0, end_ns=0),
        envelope(5, attrs={}, start_ns=0, end_ns=0),
    ]
    rows = [r for n, e in enumerate(spans, 1) if (r := row_of(record(e, n))) is not None]
    nothing = Quantiles(None, None, None, None)
    with Store.open(tmp_path / "t.db") as store:
        store.apply("trace", "i", Batch(after=0, scanned=5, rows=rows))
        found = stats(store)
        assert found.total == 5
        a, none, b = found.spans
        assert (a.model, a.count, a.errors, a.cost_usd, a.cost_known) == ("a", 3, 1, 0.3, 2)
        assert (a.latency_ms.p50, a.latency_ms.p99) == (pytest.approx(250, rel=0.008),) * 2
        assert (a.tokens_in.p50, a.tokens_in.p90) == (pytest.approx(10, rel=0.008), pytest.approx(30, rel=0.008))
        assert a.tokens_out == nothing
        assert b == ModelStats("b", 1, 0, nothing, nothing, nothing, None, 0)
        assert none == ModelStats(None, 1, 0, nothing, nothing, nothing, None, 0)
        assert [s.model for s in stats(store, Where(model="b")).spans] == ["b"]
        one = Where(since_ns=1_700_000_000_000_000_002, until_ns=1_700_000_000_000_000_003)
        assert stats(store, one).total == 1


def test_an_empty_store_answers_with_nothing(tmp_path: Path) -> None:
    """Zero spans are an empty list, never null; the seed's figures are zeros, the cost too: no cost is unknown."""
    with Store.open(tmp_path / "t.db") as store:
        assert (stats(store).total, stats(store).spans) == (0, [])
        found = seed_stats(store)
        assert (found.total_spans, found.error_rate, found.latency_p99_ms, found.total_cost_usd) == (0, 0.0, 0.0, 0.0)
        assert found.by_operation == {}


def test_the_seed_golden_figures_hold_within_the_sketch(tmp_path: Path) -> None:
    """10..100 ms: p50 50, p99 100 (nearest rank), mean 55; eight 1 ms calls have a p99 of 1 ms; 31 to 130 s are not
    flattened: each of these is wrong in the seed's 13 buckets."""
    for took, expected in (
        ([10.0 * n for n in range(1, 11)], (50, 100, 55)),
        ([1.0] * 8, (1, 1, 1)),
        ([1000.0 * n for n in range(31, 131)], (80_000, 129_000, 80_500)),
        ([700.0], (700, 700, 700)),
    ):
        rows = []
        for n, ms in enumerate(took, 1):
            row = row_of(record(envelope(n, start_ns=10**18, end_ns=10**18 + int(ms * 1e6)), n))
            assert row is not None
            rows.append(row)
        with Store.open(tmp_path / f"{len(took)}.db") as store:
            store.apply("trace", "i", Batch(after=0, scanned=len(rows), rows=rows))
            found = seed_stats(store)
            figures = (found.latency_p50_ms, found.latency_p99_ms, found.latency_avg_ms)
            assert figures == pytest.approx(expected, rel=0.00801)
