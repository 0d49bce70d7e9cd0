"""What a set of spans adds to the totals: pure sums and sketches, by minute, hour, day and for ever.

A cell is (step, at, tenant, operation, model, provider): `step` seconds wide, starting at `at` (Unix seconds, a multiple
of the step; step 0 is everything). It holds counts and, for each measure, how many spans know it, their exact sum and
the sketch of its percentiles. Sums are whole numbers of a small unit (SCALE), so that no order of adding and no taking
away makes a difference: a store that is built again from the stream is equal, and an erased span leaves nothing behind.

Does not: touch a database (see `sql`), know prices, or keep what a span says beyond these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import ceil, log
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from mist.tools.tokentrace.sketch import PER_LOG, ZERO, Sketch, merge
from mist.tools.tokentrace.spans import Row, SpanRow

STEPS = (60, 3600, 86400, 0)
"""Widths of cells in seconds; 0 is the one cell of everything."""
MEASURES = ("latency_ms", "ttft_ms", "tokens_in", "tokens_out", "cost_usd", "score")
SCALE = (1e6, 1e6, 1.0, 1.0, 1e12, 1e9)
"""Sums are kept as whole nanoseconds, tokens, 1e-12 US dollars, and 1e-9 of a score."""
OTHER = "~other"
"""What a cell beyond the cap on series is called."""
_INT64 = 2**63
_FIRST = SpanRow._fields.index(MEASURES[0])
_PAST = _FIRST + len(MEASURES)
_STATUS, _TIME, _TENANT, _OPERATION, _MODEL, _PROVIDER = (
    SpanRow._fields.index(name) for name in ("status", "time_ns", "tenant", "operation", "model", "provider")
)
_counted = itemgetter(_STATUS, *range(_FIRST, _PAST))
_MINUTE = 60_000_000_000


class Series(NamedTuple):
    """What cells are told apart by. Empty = the span says nothing."""

    tenant: str
    operation: str
    model: str
    provider: str


class Measure:
    """One measure of one cell: `known` spans state it, their sum in units of 1/SCALE, their sketch."""

    __slots__ = ("known", "sketch", "total")

    def __init__(self, known: int = 0, total: int = 0, sketch: Sketch | None = None) -> None:
        self.known = known
        self.total = total
        self.sketch: Sketch = {} if sketch is None else sketch

    def merge(self, other: Measure, sign: int = 1) -> None:
        self.known += sign * other.known
        self.total += sign * other.total
        merge(self.sketch, other.sketch, sign)


class Cell:
    """Counts and measures; `failed` includes `timeouts`."""

    __slots__ = ("failed", "measures", "spans", "timeouts")

    def __init__(self, spans: int = 0, failed: int = 0, timeouts: int = 0) -> None:
        self.spans = spans
        self.failed = failed
        self.timeouts = timeouts
        self.measures = [Measure() for _ in MEASURES]

    def count(self, statuses: Sequence[str], columns: Sequence[Sequence[Any]]) -> None:
        """Add spans, of which this is the column of statuses and one column for each measure (None: not known). Column by
        column takes a third of the time of span by span."""
        self.spans += len(statuses)
        self.failed += len(statuses) - statuses.count("ok") - statuses.count("")
        self.timeouts += statuses.count("timeout")
        for measure, scale, column in zip(self.measures, SCALE, columns, strict=True):
            values = [value for value in column if value is not None]
            if values:
                measure.known += len(values)
                measure.total += sum(values) if scale == 1 else sum([round(value * scale) for value in values])
                buckets = [ceil(log(v) * PER_LOG) if v > 0 else ZERO for v in values]
                if isinstance(measure.sketch, Counter):
                    measure.sketch.update(buckets)
                else:
                    merge(counted := Counter(buckets), measure.sketch)
                    measure.sketch = counted

    def merge(self, other: Cell, sign: int = 1) -> None:
        self.spans += sign * other.spans
        self.failed += sign * other.failed
        self.timeouts += sign * other.timeouts
        for mine, theirs in zip(self.measures, other.measures, strict=True):
            if theirs.known:
                mine.merge(theirs, sign)

    def pack(self) -> bytes:
        """The measures as stored: MessagePack, per measure nil or [known, total, {bucket: count}]; a total beyond 64
        bits is text."""
        return msgspec.msgpack.encode(
            [
                [m.known, m.total if -_INT64 <= m.total < _INT64 else str(m.total), m.sketch] if m.known else None
                for m in self.measures
            ]
        )

    @classmethod
    def unpack(cls, spans: int, failed: int, timeouts: int, data: bytes) -> Cell:
        cell = cls(spans, failed, timeouts)
        for measure, packed in zip(cell.measures, _unpack(data), strict=True):
            if packed is not None:
                measure.known, total, measure.sketch = packed
                measure.total = int(total)
        return cell


_unpack = msgspec.msgpack.Decoder(list[tuple[int, int | str, dict[int, int]] | None]).decode


Minutes = dict[tuple[int, Series], Cell]
"""What spans add: by minute in Unix seconds, and series."""


def cells_by_minute(rows: Iterable[Row]) -> Minutes:
    """(minute in Unix seconds, series) -> what these rows add."""
    out: Minutes = {}
    count_in(out, rows)
    return out


def count_in(minutes: Minutes, rows: Iterable[Row]) -> None:
    """Add what these rows add. Fastest where they were made just before: values that have left the processor's cache take
    twice as long."""
    groups: dict[tuple[int, str, str, str, str], list[Row]] = {}
    for row in rows:
        key = (row[_TIME] // _MINUTE, row[_TENANT], row[_OPERATION], row[_MODEL] or "", row[_PROVIDER] or "")
        group = groups.get(key)
        if group is None:
            groups[key] = [row]
        else:
            group.append(row)
    for (minute, *names), group in groups.items():
        place = minute * 60, Series(*names)
        cell = minutes.get(place)
        if cell is None:
            cell = minutes[place] = Cell()
        statuses, *columns = zip(*map(_counted, group), strict=True)
        cell.count(statuses, columns)


def coarser(minutes: Minutes, step: int) -> Minutes:
    """The same in cells of another width. Cells of one minute are shared, not copied."""
    if step == STEPS[0]:
        return minutes
    out: Minutes = {}
    mine: set[tuple[int, Series]] = set()
    for (at, series), cell in minutes.items():
        key = (at // step * step if step else 0, series)
        found = out.get(key)
        if found is None:
            out[key] = cell
            continue
        if key not in mine:
            mine.add(key)
            out[key] = fresh = Cell()
            fresh.merge(found)
            found = fresh
        found.merge(cell)
    return out
