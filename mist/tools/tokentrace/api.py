"""The questions of TokenTrace over HTTP: the seed's routes, and those its documents promise, over one store.

| route | answer |
|---|---|
| `GET /traces` | `{"trace_ids", "count", "traces", "next"}`, newest first |
| `GET /traces/recent` | `{"spans", "count", "next"}`, newest first |
| `GET /traces/{id}` | `{"trace_id", "spans", "count", "next"}` by start; `?tree=1` adds `depth`; `/traces/?id=` takes any id |
| `GET /errors` | `{"spans", "count", "next"}`: failed spans, newest first |
| `GET /stats` | the seed's figures, of everything ever or of a window |
| `GET /metrics?window=1h` | the documents' figures; `groupby=`, `bucket=` |
| `GET /metrics/{name}` | one metric of the alerts' list |

Parameters: `since`, `until` (RFC 3339, a date, or Unix nanoseconds), `window` (an age: `1h`, `7d`); `tenant`, `operation`,
`model`, `provider`, `source`, `user`, `status`, `failed=1`, `attr.KEY`; `limit` (default 100, at most 10,000) and `cursor` (the
page before says it as `next`; `""` is the end). A parameter that is not known is refused: a filter with a typing error would
otherwise answer for everything. A limit of 0 or less, or of text, is the default, as in the seed.

Errors are the flat error JSON, or its message as plain text where only that is accepted. Does not write anything.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from msgspec import Raw, Struct

from mist.errors import InvalidArgument, MistError, NotFound
from mist.kit.server import Answer, App, Receive, Scope, Send, as_asked, refusal, reply
from mist.quantities import Duration
from mist.tools.tokentrace import queries
from mist.tools.tokentrace.alerts.measure import ALIASES, METRICS
from mist.tools.tokentrace.queries import StoredSpan
from mist.tools.tokentrace.readers import Readers
from mist.tools.tokentrace.stats import BUCKETS, Metrics, metrics, seed_stats
from mist.tools.tokentrace.store import Store
from mist.tools.tokentrace.tree import depths
from mist.tools.tokentrace.where import Where

LIMIT = 100
QUERY_CHARS_MAX = 8192
PARAMETERS_MAX = 50
_FILTERS = ("tenant", "operation", "model", "provider", "source", "user", "status")
_WINDOW = ("since", "until", "window")
_PAGE = ("limit", "cursor")
Clock = Callable[[], int]


class Span(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A span as the seed's routes give it, and what the store knows beside. Absent = unknown."""

    trace_id: str
    span_id: str
    operation: str
    start_ns: int
    end_ns: int
    status: str
    attrs: Raw
    parent_id: str = ""
    source: str = ""
    tenant: str = ""
    user: str = ""
    model: str | None = None
    provider: str | None = None
    latency_ms: float | None = None
    ttft_ms: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    cost_usd: float | None = None
    score: float | None = None
    price: str | None = None
    sequence: int = 0
    depth: int | None = None


def span_of(found: StoredSpan, depth: int | None = None) -> Span:
    return Span(
        trace_id=found.trace_id, span_id=found.span_id, parent_id=found.parent_id, operation=found.operation,
        start_ns=found.start_ns or 0, end_ns=found.end_ns or 0, status=found.status, attrs=found.attrs,
        source=found.source, tenant=found.tenant, user=found.user_id, model=found.model, provider=found.provider,
        latency_ms=found.latency_ms, ttft_ms=found.ttft_ms, tokens_in=found.tokens_in, tokens_out=found.tokens_out,
        cost_usd=found.cost_usd, score=found.score, price=found.price, sequence=found.sequence, depth=depth,
    )  # fmt: skip


class Query:
    """The parameters of one request. Each is taken once; what is left at the end is refused."""

    def __init__(self, query: bytes, now_ns: int) -> None:
        if len(query) > QUERY_CHARS_MAX:
            raise InvalidArgument(f"the query is longer than {QUERY_CHARS_MAX} characters")
        try:
            pairs = parse_qsl(
                query.decode("ascii"), keep_blank_values=True, max_num_fields=PARAMETERS_MAX, errors="strict"
            )
        except (ValueError, UnicodeDecodeError) as exc:
            raise InvalidArgument(f"the query cannot be read: {str(exc)[:100]}") from exc
        self._given: dict[str, str] = {}
        for name, value in pairs:
            if name in self._given:
                raise InvalidArgument(f"parameter {name[:80]!r} is given twice")
            self._given[name] = value
        self._known: list[str] = []
        self._now_ns = now_ns

    def take(self, name: str) -> str | None:
        self._known.append(name)
        return self._given.pop(name, None)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is None or value in ("0", "false"):
            return False
        if value in ("", "1", "true"):
            return True
        raise InvalidArgument(f"{name}={value[:40]!r} is neither 1 nor 0")

    def limit(self) -> int:
        text = self.take("limit") or ""
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 18 or int(text) <= 0:
            return LIMIT
        if int(text) > queries.LIMIT_MAX:
            raise InvalidArgument(f"limit={text} is above {queries.LIMIT_MAX}", hint="take the next page by `cursor`")
        return int(text)

    def window(self) -> tuple[int | None, int | None]:
        """(since_ns, until_ns)."""
        since, until, age = (self.take(name) for name in _WINDOW)
        if age is None:
            first, past = self._moment("since", since), self._moment("until", until)
            if first is not None and past is not None and first > past:
                raise InvalidArgument("since lies after until: nothing can match")
            return first, past
        if since is not None or until is not None:
            raise InvalidArgument("window goes alone: since and until are given too")
        seconds = float(Duration(age))
        if seconds <= 0:
            raise InvalidArgument(f"window={age[:40]!r} is nothing", hint="for example 1h, 24h, 7d")
        return max(0, self._now_ns - round(seconds * 1e9)), None

    def _moment(self, name: str, text: str | None) -> int | None:
        if text is None:
            return None
        if text.isascii() and text.isdigit() and len(text) >= 12:
            return min(int(text), 2**62)
        try:
            at = datetime.datetime.fromisoformat(text)
        except ValueError:
            raise InvalidArgument(
                f"{name}={text[:40]!r} is no time", hint="RFC 3339 as 2026-11-25T10:00:00Z, a date, or Unix nanoseconds"
            ) from None
        at = at if at.tzinfo is not None else at.replace(tzinfo=datetime.UTC)
        return max(0, int(at.timestamp()) * 1_000_000_000 + at.microsecond * 1000)

    def where(self, *, failed: bool | None = None) -> Where:
        """All filters and the window."""
        since, until = self.window()
        values = {name: self.take(name) for name in _FILTERS}
        attrs = tuple((name[5:], self._given.pop(name)) for name in sorted(self._given) if name.startswith("attr."))
        failed = self.flag("failed") if failed is None else failed
        return Where(since_ns=since, until_ns=until, failed=failed, attrs=attrs, **values)

    def done(self) -> None:
        """Raises InvalidArgument for what nobody asked for."""
        if self._given:
            name = next(iter(self._given))
            raise InvalidArgument(
                f"unknown parameter {name[:80]!r}", hint=f"known here: {', '.join(self._known)}, attr.KEY"
            )


class Api:
    """The routes, as doors of a site. `prometheus` is the page that `GET /metrics` without parameters is."""

    def __init__(self, readers: Readers, *, prometheus: App | None = None, clock: Clock = time.time_ns) -> None:
        self._readers = readers
        self._prometheus = prometheus
        self._clock = clock

    def doors(self) -> dict[str, App]:
        doors: dict[str, App] = {
            "/traces": self._door(self._traces),
            "/traces/recent": self._door(self._recent),
            "/traces/": self._door(self._trace),
            "/errors": self._door(self._errors),
            "/stats": self._door(self._stats),
            "/metrics/": self._door(self._metric),
        }
        window = self._door(self._metrics)

        async def metrics_or_page(scope: Scope, receive: Receive, send: Send) -> None:
            asked = scope.get("query_string") or self._prometheus is None
            await (window if asked else self._prometheus)(scope, receive, send)  # type: ignore[misc]

        return {**doors, "/metrics": metrics_or_page}

    def _door(self, question: Callable[[str, Query], Callable[[Store], Any]]) -> App:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["method"] not in ("GET", "HEAD"):
                error = InvalidArgument(f"{scope['method']} is not served at {scope['path']}", hint="GET")
                await reply(scope, send, as_asked(scope, refusal(405, error, ((b"allow", b"GET, HEAD"),)), error))
                return
            try:
                query = Query(scope.get("query_string", b""), self._clock())
                ask = question(scope["path"], query)
                query.done()
                body = await self._readers.ask(lambda store: msgspec.json.encode(ask(store)))
                answer = Answer(200, body)
            except MistError as exc:
                headers: tuple[tuple[bytes, bytes], ...] = ()
                if exc.http_status in (429, 503):
                    headers = ((b"retry-after", b"%d" % max(1, round(exc.retry_after_s or 1))),)
                answer = as_asked(scope, refusal(exc.http_status, exc, headers), exc)
            await reply(scope, send, answer)

        return app

    # ----------------------------------------------------------------- routes

    def _traces(self, path: str, query: Query) -> Callable[[Store], Any]:
        where, limit, cursor = query.where(), query.limit(), query.take("cursor") or ""

        def ask(store: Store) -> Any:
            page = queries.traces(store, where, limit=limit, cursor=cursor)
            ids = [t.trace_id for t in page.traces]
            return {"trace_ids": ids, "count": len(ids), "traces": page.traces, "next": page.next}

        return ask

    def _recent(self, path: str, query: Query) -> Callable[[Store], Any]:
        return self._spans(query, query.where())

    def _errors(self, path: str, query: Query) -> Callable[[Store], Any]:
        return self._spans(query, query.where(failed=True))

    def _spans(self, query: Query, where: Where) -> Callable[[Store], Any]:
        limit, cursor = query.limit(), query.take("cursor") or ""

        def ask(store: Store) -> Any:
            page = queries.spans(store, where, limit=limit, cursor=cursor)
            return {"spans": [span_of(s) for s in page.spans], "count": len(page.spans), "next": page.next}

        return ask

    def _trace(self, path: str, query: Query) -> Callable[[Store], Any]:
        trace_id = path.removeprefix("/traces/") or query.take("id") or ""
        if not trace_id:
            raise InvalidArgument("trace ID required", hint="GET /traces/{id}")
        limit, cursor, tenant = query.limit(), query.take("cursor") or "", query.take("tenant")
        tree = query.flag("tree")

        def ask(store: Store) -> Any:
            page = queries.trace_page(store, trace_id, limit=limit, cursor=cursor, tenant=tenant)
            deep = depths(page.spans) if tree else {}
            spans = [span_of(s, deep.get(s.span_id)) for s in page.spans]
            return {"trace_id": trace_id, "spans": spans, "count": len(spans), "next": page.next}

        return ask

    def _stats(self, path: str, query: Query) -> Callable[[Store], Any]:
        where = query.where()
        return lambda store: seed_stats(store, where)

    def _metrics(self, path: str, query: Query) -> Callable[[Store], Any]:
        window, where = query._given.get("window"), query.where()
        groups = tuple(name for name in (query.take("groupby") or "").split(",") if name)
        bucket = query.take("bucket")
        if bucket is not None and bucket not in BUCKETS:
            raise InvalidArgument(f"bucket={bucket[:40]!r}", hint=f"one of {', '.join(BUCKETS)}")

        def ask(store: Store) -> Any:
            whole = _documented(metrics(store, where)[0])
            whole["cost"]["by_model"] = {
                m.group["model"] or "": m.cost_usd.total for m in metrics(store, where, ("model",))
            }
            answer = {"window": window, "since_ns": where.since_ns, "until_ns": where.until_ns, **whole}
            if groups or bucket:
                found = metrics(store, where, groups, bucket=bucket)  # type: ignore[arg-type]
                answer["groups"] = [{"group": m.group, "at": m.at, **_documented(m)} for m in found]
            return answer

        return ask

    def _metric(self, path: str, query: Query) -> Callable[[Store], Any]:
        name = path.removeprefix("/metrics/")
        known = METRICS.get(ALIASES.get(name, name))
        if known is None:
            raise NotFound(f"no metric {name[:80]!r}", hint=f"one of {', '.join(METRICS)}")
        where = query.where()
        groups = tuple(part for part in (query.take("groupby") or "").split(",") if part)

        def ask(store: Store) -> Any:
            found = metrics(store, where, groups)
            rows = [{"group": m.group, "value": known.value(m), "samples": known.samples(m)} for m in found]
            answer = {"metric": name, "since_ns": where.since_ns, "until_ns": where.until_ns}
            return {**answer, "groups": rows} if groups else {**answer, **rows[0]}

        return ask


def _documented(m: Metrics) -> dict[str, Any]:
    """The figures in the shape the seed's documents have, and the percentiles they leave out."""
    tokens = [t for t in (m.tokens_in.total, m.tokens_out.total) if t is not None]
    return {
        "span_count": m.spans,
        "cost": {"total_usd": m.cost_usd.total, "per_call_usd": m.cost_usd.avg, "known_span_count": m.cost_usd.known},
        "tokens": {
            "prompt_total": m.tokens_in.total, "completion_total": m.tokens_out.total,
            "total": sum(tokens) if tokens else None,
        },
        "latency": {
            "avg_ms": m.latency_ms.avg, "p50_ms": m.latency_ms.p50, "p90_ms": m.latency_ms.p90,
            "p95_ms": m.latency_ms.p95, "p99_ms": m.latency_ms.p99,
        },
        "ttft": {"p50_ms": m.ttft_ms.p50, "p95_ms": m.ttft_ms.p95},
        "errors": {"rate": m.error_rate, "count": m.errors, "timeouts": m.timeouts},
        "quality": {
            "score_avg": m.score.avg, "score_p10": m.score.p10, "scored_span_count": m.score.known,
        },
    }  # fmt: skip
