"""Figures: counts, sums and percentiles of spans, in any window, by any of their names.

Where the totals can answer (no condition on a single span) they do: whole days, hours and minutes from their cells, and
only the two broken minutes at the ends from the spans themselves. Otherwise all spans that match are read. Both give the
same: counts and sums are exact, percentiles are nearest rank within 0.8 % (see `sketch`). What no span states is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

import msgspec
from msgspec import Struct

from mist.errors import InvalidArgument
from mist.tools.tokentrace.rollup import MEASURES, SCALE, Cell, Measure, Series
from mist.tools.tokentrace.sketch import quantiles
from mist.tools.tokentrace.store import KEPT_FROM, Store
from mist.tools.tokentrace.where import Where, check_key, clause, conditions

PERCENTS = (10, 50, 90, 95, 99)
SERIES = Series._fields
GROUPS = (*SERIES, "source", "user", "status")
"""What can be grouped by, beside `attr.<key>`."""
GROUPS_MAX = 10_000
Bucket = Literal["minute", "hour", "day"]
BUCKETS: dict[str, int] = {"minute": 60, "hour": 3600, "day": 86400}
_NS = 1_000_000_000
_MINUTE = 60 * _NS
_CHUNK = 8000
"""Spans that are counted together, and are in memory at once."""


class Summary(Struct, frozen=True):
    """One measure: how many spans know it, their sum and mean, percentiles. None where no span knows it."""

    known: int
    total: float | int | None
    avg: float | None
    p10: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None


class Metrics(Struct, frozen=True, kw_only=True):
    """Figures of one group. `group` is name -> value (None: the spans name none); `at` the start of its time bucket in
    Unix seconds. `errors` are spans whose status is neither empty nor ok, timeouts among them. `cost_usd.known` below
    `spans` means that some costs are unknown."""

    group: dict[str, str | None]
    at: int | None
    spans: int
    errors: int
    timeouts: int
    error_rate: float | None
    latency_ms: Summary
    ttft_ms: Summary
    tokens_in: Summary
    tokens_out: Summary
    cost_usd: Summary
    score: Summary


Key = tuple[tuple[str | None, ...], int | None]


def metrics(
    store: Store, where: Where | None = None, group_by: Sequence[str] = (), *, bucket: Bucket | None = None
) -> list[Metrics]:
    """One row per group (one in all without `group_by`, also when no span matches), most spans first; with `bucket` one
    per group and time bucket, by time. A bucket that the window cuts is counted whole.

    Raises InvalidArgument for a name that cannot be grouped by, or more than GROUPS_MAX groups.
    """
    where = where or Where()
    for name in group_by:
        if name not in GROUPS and not (name.startswith("attr.") and len(name) > 5):
            raise InvalidArgument(
                f"cannot group by {name[:80]!r}", hint=f"one of {', '.join(GROUPS)}, or attr.KEY for an attribute"
            )
        if name.startswith("attr."):
            check_key(name[5:])
    if len(set(group_by)) != len(group_by):
        raise InvalidArgument("a name to group by is given twice")
    width = BUCKETS[bucket] if bucket else 0
    if width:
        where = _whole_buckets(where, width)
    cells = _cells(store, where, group_by, width)
    if not cells and not group_by and not width:
        cells[((), None)] = Cell()
    return _ordered([_metrics(key, cell, group_by) for key, cell in cells.items()], width)


def _cells(store: Store, where: Where, group_by: Sequence[str], width: int = 0) -> dict[Key, Cell]:
    cells: dict[Key, Cell] = {}
    if where.from_totals and all(name in SERIES for name in group_by):
        _from_totals(store, where, group_by, width, cells)
    else:
        _from_spans(store, where, group_by, width, cells)
    return cells


def _ordered(found: list[Metrics], width: int) -> list[Metrics]:
    def key(m: Metrics) -> tuple[Any, ...]:
        names = [(v is not None, v or "") for v in m.group.values()]
        return (m.at, names) if width else (-m.spans, names)

    return sorted(found, key=key)


def _whole_buckets(where: Where, width: int) -> Where:
    since, until = where.since_ns, where.until_ns
    return msgspec.structs.replace(
        where,
        since_ns=None if since is None else since // (width * _NS) * width * _NS,
        until_ns=None if until is None else -(-until // (width * _NS)) * width * _NS,
    )


def _cell(cells: dict[Key, Cell], key: Key) -> Cell:
    cell = cells.get(key)
    if cell is None:
        if len(cells) >= GROUPS_MAX:
            raise InvalidArgument(f"more than {GROUPS_MAX} groups", hint="a shorter window, or fewer names to group by")
        cell = cells[key] = Cell()
    return cell


# ----------------------------------------------------------------- from the totals


def _from_totals(store: Store, where: Where, group_by: Sequence[str], width: int, cells: dict[Key, Cell]) -> None:
    ranges, edges = _split(store, where, width)
    named = [(n, getattr(where, n)) for n in SERIES if getattr(where, n) is not None]
    condition = "".join(f" AND {name} = ?" for name, _ in named)
    places = [SERIES.index(name) for name in group_by]
    for step, first, last in ranges:
        for row in store.query(
            f"SELECT at, {', '.join(SERIES)}, spans, failed, timeouts, measures FROM rollups"
            f" WHERE step = ? AND at >= ? AND at < ?{condition}",
            (step, first, last, *(value for _, value in named)),
        ):
            group = tuple(row[1 + place] or None for place in places)
            at = int(row[0]) // width * width if width else None
            _cell(cells, (group, at)).merge(Cell.unpack(row[5], row[6], row[7], bytes(row[8])))
    for since, until in edges:
        part = Where(since_ns=since, until_ns=until, **dict(named))
        _from_spans(store, part, group_by, width, cells)


_FOR_EVER = 2**62 // _NS


def _split(store: Store, where: Where, width: int) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """(step, first, last) ranges of cells in Unix seconds and (since, until) edges in nanoseconds that make up the
    window. With a bucket of `width` no cell is wider than it."""
    if where.since_ns is None and where.until_ns is None and not width:
        return [(0, 0, 1)], []
    since = -(2**62) if where.since_ns is None else where.since_ns
    until = 2**62 if where.until_ns is None else where.until_ns
    kept = int(store.load(KEPT_FROM) or b"0")
    if since < kept and where.since_ns is not None:
        # spans and minutes before `kept` are gone; hours are not: what cannot be told apart is counted whole
        since = since // (3600 * _NS) * 3600 * _NS
    if until <= since:
        return [], []
    low, high = -(-since // _MINUTE) * 60, until // _MINUTE * 60
    edges: list[tuple[int, int]] = []
    if low >= high and -(-since // _MINUTE) > until // _MINUTE:
        return [], [(since, until)]
    if since < low * _NS:
        edges.append((since, low * _NS))
    if until > high * _NS:
        edges.append((high * _NS, until))
    ranges: list[tuple[int, int, int]] = []
    steps = [s for s in (86400, 3600, 60) if not width or s <= width]
    _cover(low, high, steps, ranges)
    return ranges, edges


def _cover(low: int, high: int, steps: Sequence[int], ranges: list[tuple[int, int, int]]) -> None:
    """Seconds [low, high) by the widest cells that fit."""
    if low >= high or not steps:
        return
    step = steps[0]
    first, last = -(-low // step) * step, high // step * step
    if first >= last:
        _cover(low, high, steps[1:], ranges)
        return
    ranges.append((step, first, last))
    _cover(low, first, steps[1:], ranges)
    _cover(last, high, steps[1:], ranges)


# ----------------------------------------------------------------- from the spans


_COLUMN = {"user": "user_id"}


def _from_spans(store: Store, where: Where, group_by: Sequence[str], width: int, cells: dict[Key, Cell]) -> None:
    found, values = conditions(store, where)
    names: list[str] = []
    parameters: list[Any] = []
    for name in group_by:
        if name.startswith("attr."):
            expression, more = store.attribute(name[5:])
            names.append(expression)
            parameters.extend(more)
        else:
            names.append(_COLUMN.get(name, name))
    columns = ", ".join(["time_ns", "status", *MEASURES, *names])
    many = 2 + len(MEASURES)
    found_rows = store.query(f"SELECT {columns} FROM spans{clause(found)}", [*parameters, *values])
    while rows := list(islice(found_rows, _CHUNK)):
        groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        for row in rows:
            group = groups.setdefault((row[0] // (width * _NS) * width if width else None, *row[many:]), [])
            group.append(row)
        for (at, *names_of), members in groups.items():
            of = list(zip(*members, strict=True))
            key = (tuple(value or None for value in names_of), at)
            _cell(cells, key).count(of[1], of[2:many])


# ----------------------------------------------------------------- answers


def _metrics(key: Key, cell: Cell, group_by: Sequence[str]) -> Metrics:
    return Metrics(
        group=dict(zip(group_by, key[0], strict=True)),
        at=key[1],
        spans=cell.spans,
        errors=cell.failed,
        timeouts=cell.timeouts,
        error_rate=cell.failed / cell.spans if cell.spans else None,
        **{name: _summary(m, scale) for name, m, scale in zip(MEASURES, cell.measures, SCALE, strict=True)},
    )


def _summary(measure: Measure, scale: float) -> Summary:
    if not measure.known:
        return Summary(0, None, None, None, None, None, None, None)
    total = measure.total if scale == 1 else measure.total / scale
    return Summary(measure.known, total, measure.total / (scale * measure.known), *quantiles(measure.sketch, PERCENTS))


class Quantiles(Struct, frozen=True):
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None


class ModelStats(Struct, frozen=True):
    """One row; `model` is None for spans that name none. Latency in milliseconds, cost in US dollars: the sum of the known
    ones, which `cost_known` counts."""

    model: str | None
    count: int
    errors: int
    latency_ms: Quantiles
    tokens_in: Quantiles
    tokens_out: Quantiles
    cost_usd: float | None
    cost_known: int


class Stats(Struct, frozen=True):
    """`mist trace stats --format json`."""

    total: int
    spans: list[ModelStats]


def stats(store: Store, where: Where | None = None) -> Stats:
    """By model, most frequent first."""
    rows = [
        ModelStats(
            m.group["model"], m.spans, m.errors, _four(m.latency_ms), _four(m.tokens_in), _four(m.tokens_out),
            m.cost_usd.total, m.cost_usd.known,
        )
        for m in metrics(store, where, ("model",))
    ]  # fmt: skip
    return Stats(sum(r.count for r in rows), rows)


def _four(summary: Summary) -> Quantiles:
    return Quantiles(summary.p50, summary.p90, summary.p95, summary.p99)


class Operation(Struct, frozen=True):
    count: int
    errors: int


class SeedStats(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`GET /stats`, with the seed's keys. Figures of nothing are 0 as there. The cost of spans none of which knows its own
    is None, and `cost_unknown_spans` says how many spans are not in it."""

    total_spans: int
    error_count: int
    error_rate: float
    latency_p50_ms: float
    latency_p90_ms: float
    latency_p95_ms: float
    latency_p99_ms: float
    latency_avg_ms: float
    total_tokens_in: int
    total_tokens_out: int
    total_cost_usd: float | None
    cost_unknown_spans: int
    by_operation: dict[str, Operation] = {}


def seed_stats(store: Store, where: Where | None = None) -> SeedStats:
    """Of everything ever ingested, or of a window."""
    cells = _cells(store, where or Where(), ("operation",))
    whole = Cell()
    for cell in cells.values():
        whole.merge(cell)
    m = _metrics(((), None), whole, ())
    return SeedStats(
        total_spans=m.spans,
        error_count=m.errors,
        error_rate=m.error_rate or 0.0,
        latency_p50_ms=m.latency_ms.p50 or 0.0,
        latency_p90_ms=m.latency_ms.p90 or 0.0,
        latency_p95_ms=m.latency_ms.p95 or 0.0,
        latency_p99_ms=m.latency_ms.p99 or 0.0,
        latency_avg_ms=m.latency_ms.avg or 0.0,
        total_tokens_in=int(m.tokens_in.total or 0),
        total_tokens_out=int(m.tokens_out.total or 0),
        total_cost_usd=m.cost_usd.total if m.spans else 0.0,
        cost_unknown_spans=m.spans - m.cost_usd.known,
        by_operation={
            key[0][0] or "": Operation(cell.spans, cell.failed)
            for key, cell in sorted(cells.items(), key=lambda item: item[0][0][0] or "")
        },
    )
