"""The questions of the command line: newest traces, one trace, failed spans, refused records, everything in order.

Answers are in a stable order (start time, then position in the stream). Nothing here writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import msgspec
from msgspec import Raw, Struct

from mist.errors import InvalidArgument, NotFound
from mist.protocol.payloads import TraceSpan
from mist.tools.tokentrace.stats import window
from mist.tools.tokentrace.store import Store

_FAILED = "status NOT IN ('', 'ok')"
_ORDER = "ORDER BY start_ns, sequence"


class StoredSpan(Struct, frozen=True, kw_only=True):
    """A span as stored. None = unknown."""

    trace_id: str
    span_id: str
    parent_id: str
    source: str
    operation: str
    status: str
    model: str | None
    provider: str | None
    start_ns: int | None
    end_ns: int | None
    latency_ms: float | None
    tokens_in: int | None
    tokens_out: int | None
    cost_usd: float | None
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


def _spans(store: Store, rest: str, parameters: list[object]) -> Iterator[StoredSpan]:
    for row in store.query(f"SELECT {_COLUMNS} FROM spans {rest}", parameters):
        fields = dict(zip(_FIELDS, row, strict=True))
        fields["attrs"] = Raw(fields["attrs"].encode())
        yield StoredSpan(**fields)


def every_span(
    store: Store, *, since_ns: int | None = None, until_ns: int | None = None, model: str = ""
) -> Iterator[StoredSpan]:
    """All spans by start time, one at a time."""
    where, parameters = window(since_ns, until_ns, model)
    return _spans(store, f"{where} {_ORDER}", parameters)


def failed_spans(
    store: Store, *, limit: int, since_ns: int | None = None, until_ns: int | None = None, model: str = ""
) -> list[StoredSpan]:
    """Spans whose status is neither empty nor `ok`, newest first."""
    where, parameters = window(since_ns, until_ns, model, _FAILED)
    return list(_spans(store, f"{where} ORDER BY start_ns DESC, sequence DESC LIMIT ?", [*parameters, limit]))


def trace(store: Store, trace_id: str) -> list[StoredSpan]:
    """The spans of one trace; the id may be shortened to any prefix that names one trace only.

    Raises NotFound, InvalidArgument for an ambiguous prefix.
    """
    found = list(_spans(store, f"WHERE trace_id = ? {_ORDER}", [trace_id]))
    if found:
        return found
    high = trace_id + "\x7f"
    ids = [
        str(row[0])
        for row in store.query(
            "SELECT DISTINCT trace_id FROM spans WHERE trace_id >= ? AND trace_id < ? LIMIT 4", (trace_id, high)
        )
    ]
    if not trace_id or not ids:
        raise NotFound(f"no trace {trace_id!r} in {store.path}", hint="`mist trace ls` lists the newest")
    if len(ids) > 1:
        raise InvalidArgument(
            f"trace {trace_id!r} is not one trace: {', '.join(ids[:3])}…", hint="write more of its id"
        )
    return list(_spans(store, f"WHERE trace_id = ? {_ORDER}", [ids[0]]))


def newest_traces(
    store: Store,
    *,
    limit: int,
    since_ns: int | None = None,
    until_ns: int | None = None,
    model: str = "",
    failed: bool = False,
) -> list[TraceSummary]:
    """The traces of the newest matching spans, newest first, each summed over all its spans."""
    where, parameters = window(since_ns, until_ns, model, *([_FAILED] if failed else []))
    order: dict[str, None] = {}
    sql = f"SELECT trace_id FROM spans{where} ORDER BY start_ns DESC, sequence DESC"
    with closing(store.query(sql, parameters)) as found:
        for (trace_id,) in found:
            order.setdefault(trace_id)
            if len(order) >= limit:
                break
    return [_summary(store, trace_id) for trace_id in order]


def _summary(store: Store, trace_id: str) -> TraceSummary:
    row = store.one(
        f"SELECT count(*), sum({_FAILED}), min(start_ns), max(end_ns), sum(tokens_in), sum(tokens_out), sum(cost_usd),"
        " max(latency_ms), json_group_array(DISTINCT model) FROM spans WHERE trace_id = ?",
        (trace_id,),
    )
    if row is None:
        raise NotFound(f"no trace {trace_id!r} in {store.path}")
    count, failed, start, end, tokens_in, tokens_out, cost, longest, models = row
    return TraceSummary(
        trace_id=trace_id,
        spans=count,
        failed=failed or 0,
        start_ns=start,
        latency_ms=(end - start) / 1e6 if start is not None and end is not None else longest,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        cost_usd=cost,
        models=sorted(m for m in msgspec.json.decode(models, type=list[str | None]) if m),
    )


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
