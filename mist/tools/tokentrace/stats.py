"""Figures by model: exact in this slice.

A percentile is the *nearest rank*: of n known values in order, the one at rank ceil(p / 100 * n), counted from 1. It is
always a value that occurred. Unknown values do not take part; where nothing is known the answer is None. Cost is the
sum of the known costs, None where none is known. Memory: the numbers of all spans asked for (about 100 bytes each).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum

from msgspec import Struct

from mist.tools.tokentrace.store import Store


class Quantiles(Struct, frozen=True):
    p50: float | int | None
    p90: float | int | None
    p99: float | int | None


class ModelStats(Struct, frozen=True):
    """One row; `model` is None for spans that name none. Latency in milliseconds, cost in US dollars."""

    model: str | None
    count: int
    latency_ms: Quantiles
    tokens_in: Quantiles
    tokens_out: Quantiles
    cost_usd: float | None


class Stats(Struct, frozen=True):
    """`mist trace stats --format json`."""

    total: int
    spans: list[ModelStats]


def nearest_rank(ordered: Sequence[float], percent: int) -> float | None:
    """The value at rank ceil(percent / 100 * n) of n ordered values; None when there are none."""
    if not ordered:
        return None
    rank = -(-percent * len(ordered) // 100)
    return ordered[max(rank, 1) - 1]


def quantiles(values: Iterable[float | None]) -> Quantiles:
    ordered = sorted(v for v in values if v is not None)
    return Quantiles(nearest_rank(ordered, 50), nearest_rank(ordered, 90), nearest_rank(ordered, 99))


def stats(store: Store, *, since_ns: int | None = None, until_ns: int | None = None, model: str = "") -> Stats:
    """All spans, or those that started in [since_ns, until_ns) and name this model. Most frequent model first."""
    where, parameters = window(since_ns, until_ns, model)
    columns: dict[str | None, tuple[list[float | None], ...]] = {}
    sql = f"SELECT model, latency_ms, tokens_in, tokens_out, cost_usd FROM spans{where}"
    for name, *values in store.query(sql, parameters):
        lists = columns.get(name)
        if lists is None:
            lists = columns[name] = ([], [], [], [])
        for known, value in zip(lists, values, strict=True):
            known.append(value)
    rows = []
    for name, (latency, tokens_in, tokens_out, cost) in columns.items():
        costs = [c for c in cost if c is not None]
        rows.append(
            ModelStats(
                name,
                len(latency),
                quantiles(latency),
                quantiles(tokens_in),
                quantiles(tokens_out),
                fsum(costs) if costs else None,
            )
        )
    rows.sort(key=lambda r: (-r.count, r.model or ""))
    return Stats(sum(r.count for r in rows), rows)


def window(since_ns: int | None, until_ns: int | None, model: str = "", *more: str) -> tuple[str, list[object]]:
    """A WHERE clause and its parameters. `more` are conditions of ours, never text from outside."""
    conditions: list[str] = list(more)
    parameters: list[object] = []
    for condition, value in (("start_ns >= ?", since_ns), ("start_ns < ?", until_ns), ("model = ?", model or None)):
        if value is not None:
            conditions.append(condition)
            parameters.append(value)
    return (f" WHERE {' AND '.join(conditions)}" if conditions else ""), parameters
