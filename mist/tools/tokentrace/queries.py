"""Which spans and traces there are: pages of spans, newest traces, one trace, refused records, everything in order.

Answers are in a stable order (time, then position in the stream), the same in a store that was built again. A page says
where the next one begins: a cursor, text that only this module reads. Nothing here writes.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import msgspec
from msgspec import Raw, Struct

from mist.errors import InvalidArgument, NotFound
from mist.protocol.payloads import TraceSpan
from mist.tools.tokentrace.store import Store
from mist.tools.tokentrace.where import FAILED, Where, clause, conditions

_PLACE = ("time_ns", "sequence", "trace_id", "span_id")
"""A span's place among all; nothing of it changes when the store is built again. The last two tell apart what two streams
gave one time and one sequence."""
_NAMES = ", ".join(_PLACE)
_ORDER = f"ORDER BY {_NAMES}"
_NEWEST = f"ORDER BY {', '.join(f'{name} DESC' for name in _PLACE)}"
LIMIT_MAX = 10_000


class StoredSpan(Struct, frozen=True, kw_only=True):
    """A span as stored, see `spans.SpanRow`. None = unknown."""

    trace_id: str
    span_id: str
    parent_id: str
    source: str
    tenant: str
    user_id: str
    operation: str
    status: str
    model: str | None
    provider: str | None
    time_ns: int
    start_ns: int | None
    end_ns: int | None
    latency_ms: float | None
    ttft_ms: float | None
    tokens_in: int | None
    tokens_out: int | None
    cost_usd: float | None
    score: float | None
    price: str | None
    attrs: Raw
    sequence: int


class TraceSummary(Struct, frozen=True, kw_only=True):
    """One trace in a list. `latency_ms` is from the first start to the last end known."""

    trace_id: str
    spans: int
    failed: int
    start_ns: int | None
    latency_ms: float | None
    tokens_in: int | None
    tokens_out: int | None
    cost_usd: float | None
    models: list[str]


class SpanPage(Struct, frozen=True):
    """`next` continues after the last one; empty = there are no more now."""

    spans: list[StoredSpan]
    next: str


class TracePage(Struct, frozen=True):
    traces: list[TraceSummary]
    next: str


class Refused(Struct, frozen=True, kw_only=True):
    """A record in quarantine. `data` is its beginning, as text."""

    stream: str
    sequence: int
    time_ns: int
    reason: str
    subject: str
    data: str


_FIELDS = StoredSpan.__struct_fields__
_COLUMNS = ", ".join(_FIELDS)


def _spans(store: Store, rest: str, values: list[Any]) -> Iterator[StoredSpan]:
    for row in store.query(f"SELECT {_COLUMNS} FROM spans {rest}", values):
        fields = dict(zip(_FIELDS, row, strict=True))
        fields["attrs"] = Raw(fields["attrs"].encode())
        yield StoredSpan(**fields)


Place = tuple[int, int, str, str]


def _token(place: Place) -> str:
    time_ns, sequence, *ids = place
    return f"{time_ns}.{sequence}.{urlsafe_b64encode(chr(0).join(ids).encode()).rstrip(b'=').decode()}"


def _cursor(text: str) -> Place | None:
    if not text:
        return None
    try:
        time_ns, sequence, ids = text.split(".")
        trace_id, span_id = urlsafe_b64decode(ids + "==").decode("ascii").split(chr(0))
        place = int(time_ns), int(sequence), trace_id, span_id
    except ValueError:
        raise InvalidArgument(f"{text[:80]!r} is not a cursor", hint="take it from `next` of the page before") from None
    if not all(0 <= part < 2**63 for part in place[:2]):
        raise InvalidArgument(f"{text[:80]!r} is not a cursor", hint="take it from `next` of the page before")
    return place


def _limited(limit: int) -> int:
    if not 1 <= limit <= LIMIT_MAX:
        raise InvalidArgument(f"limit {limit} is not from 1 to {LIMIT_MAX}")
    return limit


def every_span(store: Store, where: Where | None = None) -> Iterator[StoredSpan]:
    """All spans by time, one at a time."""
    found, values = conditions(store, where or Where())
    yield from _spans(store, f"{clause(found)} {_ORDER}", values)


def spans(
    store: Store, where: Where | None = None, *, limit: int, cursor: str = "", oldest_first: bool = False
) -> SpanPage:
    """Matching spans, newest first. Raises InvalidArgument for a bad limit or cursor."""
    found, values = conditions(store, where or Where())
    return _page(store, found, values, limit, cursor, oldest_first)


def _page(store: Store, found: list[str], values: list[Any], limit: int, cursor: str, oldest_first: bool) -> SpanPage:
    at = _cursor(cursor)
    if at is not None:
        found = [*found, f"({_NAMES}) {'>' if oldest_first else '<'} (?, ?, ?, ?)"]
        values = [*values, *at]
    order = _ORDER if oldest_first else _NEWEST
    rows = list(_spans(store, f"{clause(found)} {order} LIMIT {_limited(limit) + 1}", values))
    more = len(rows) > limit
    rows = rows[:limit]
    last = rows[-1] if more else None
    token = _token((last.time_ns, last.sequence, last.trace_id, last.span_id)) if last else ""
    return SpanPage(rows, token)


def full_trace_id(store: Store, trace_id: str, tenant: str | None = None) -> str:
    """The id itself, or the only one that begins so. Raises NotFound, InvalidArgument for a beginning of several."""
    condition, values = ("", []) if tenant is None else (" AND tenant = ?", [tenant])
    if store.one(f"SELECT 1 FROM spans WHERE trace_id = ?{condition} LIMIT 1", [trace_id, *values]):
        return trace_id
    ids = [
        str(row[0])
        for row in store.query(
            f"SELECT DISTINCT trace_id FROM spans WHERE trace_id >= ? AND trace_id < ?{condition} LIMIT 4",
            [trace_id, trace_id + "\x7f", *values],
        )
    ]
    if not trace_id or not ids:
        raise NotFound(f"no trace {trace_id[:80]!r} in {store.place}", hint="`mist trace ls` lists the newest")
    if len(ids) > 1:
        raise InvalidArgument(
            f"trace {trace_id!r} is not one trace: {', '.join(ids[:3])}…", hint="write more of its id"
        )
    return ids[0]


def trace_page(store: Store, trace_id: str, *, limit: int, cursor: str = "", tenant: str | None = None) -> SpanPage:
    """The spans of one trace in the order they began; the id is whole. Raises NotFound when there is none."""
    where = Where(tenant=tenant)
    found, values = conditions(store, where)
    page = SpanPage([], "")
    if "\0" not in trace_id:  # no id has one, and not every database can be asked
        page = _page(store, ["trace_id = ?", *found], [trace_id, *values], limit, cursor, oldest_first=True)
    if not page.spans and not cursor:
        raise NotFound("trace not found", hint=f"GET /traces lists the ids; asked for {trace_id[:80]!r}")
    return page


def trace(store: Store, trace_id: str) -> list[StoredSpan]:
    """All spans of one trace; the id may be shortened to any prefix that names one trace only.

    Raises NotFound, InvalidArgument for an ambiguous prefix.
    """
    whole = full_trace_id(store, trace_id)
    return list(_spans(store, f"WHERE trace_id = ? {_ORDER}", [whole]))


def traces(store: Store, where: Where | None = None, *, limit: int, cursor: str = "") -> TracePage:
    """The traces of the newest matching spans, newest first, each summed over all its spans (of the tenant asked for)."""
    where = where or Where()
    found, values = conditions(store, where)
    at = _cursor(cursor)
    narrowed = [*found, f"({_NAMES}) < (?, ?, ?, ?)"] if at else found
    order: dict[str, Place] = {}
    earlier: set[str] = set()
    sql = f"SELECT {_NAMES} FROM spans{clause(narrowed)} {_NEWEST}"
    more = False
    with closing(store.query(sql, [*values, *(at or ())])) as rows:  # type: ignore[type-var]
        for place in rows:
            trace_id = place[2]
            if trace_id in order or trace_id in earlier:
                continue
            if at and _newest(store, trace_id, found, values) >= at:
                earlier.add(trace_id)  # an earlier page has it
                continue
            if len(order) >= _limited(limit):
                more = True
                break
            order[trace_id] = place
    token = _token(list(order.values())[-1]) if more else ""
    return TracePage([_summary(store, trace_id, where.tenant) for trace_id in order], token)


def _newest(store: Store, trace_id: str, found: list[str], values: list[Any]) -> Place:
    row = store.one(
        f"SELECT {_NAMES} FROM spans{clause(['trace_id = ?', *found])} {_NEWEST} LIMIT 1",
        [trace_id, *values],
    )
    return (row[0], row[1], row[2], row[3]) if row else (0, 0, "", "")


def _summary(store: Store, trace_id: str, tenant: str | None) -> TraceSummary:
    condition, values = ("", [trace_id]) if tenant is None else (" AND tenant = ?", [trace_id, tenant])
    row = store.one(
        f"SELECT count(*), sum(CASE WHEN {FAILED} THEN 1 ELSE 0 END), min(start_ns), max(end_ns), sum(tokens_in),"
        f" sum(tokens_out), sum(cost_usd), max(latency_ms)"
        # in one order, wherever rows lie: the last digit of a sum depends on it
        f" FROM (SELECT status, start_ns, end_ns, tokens_in, tokens_out, cost_usd, latency_ms FROM spans"
        f" WHERE trace_id = ?{condition} ORDER BY span_id) AS trace",
        values,
    )
    if row is None or not row[0]:
        raise NotFound(f"no trace {trace_id!r} in {store.place}")
    count, failed, start, end, tokens_in, tokens_out, cost, longest = row
    models = store.query(f"SELECT DISTINCT model FROM spans WHERE trace_id = ?{condition}", values)
    return TraceSummary(
        trace_id=trace_id,
        spans=count,
        failed=failed or 0,
        start_ns=start,
        latency_ms=(end - start) / 1e6 if start is not None and end is not None else longest,
        tokens_in=_whole(tokens_in),
        tokens_out=_whole(tokens_out),
        cost_usd=cost,
        models=sorted(str(m[0]) for m in models if m[0]),
    )


def _whole(value: Any) -> int | None:
    """PostgreSQL sums whole numbers as decimals."""
    return None if value is None else int(value)


def quarantined(store: Store, *, limit: int) -> list[Refused]:
    """Refused records, newest first."""
    return [
        Refused(
            stream=row[0],
            sequence=row[1],
            time_ns=row[2],
            reason=row[3],
            subject=row[4],
            data=bytes(row[5]).decode("utf-8", "replace"),
        )
        for row in store.query(
            "SELECT stream, sequence, time_ns, reason, subject, data FROM quarantine"
            " ORDER BY time_ns DESC, sequence DESC LIMIT ?",
            (limit,),
        )
    ]


def payload_of(span: StoredSpan) -> TraceSpan:
    """The span in its wire shape, as `mist trace export` writes it and `mist trace ingest` reads it."""
    return TraceSpan(
        trace_id=span.trace_id,
        span_id=span.span_id,
        parent_id=span.parent_id,
        operation=span.operation,
        start_ns=span.start_ns or 0,
        end_ns=span.end_ns or 0,
        status=span.status,
        attrs=msgspec.json.decode(span.attrs) or {},
    )
