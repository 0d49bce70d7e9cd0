"""What an alert can watch: metrics by name, each a function of the figures of one group in one window.

Promises: unknown is None, never zero; `samples` is the number of spans that the value is made of. Latencies and times
to the first token are milliseconds, costs US dollars, rates and scores shares from 0 to 1. A window holds the spans that
began in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from mist.tools.tokentrace import stats
from mist.tools.tokentrace.stats import Metrics
from mist.tools.tokentrace.store import Store
from mist.tools.tokentrace.where import Where

if TYPE_CHECKING:
    from mist.tools.tokentrace.alerts.rules import Rule


class Metric(Struct, frozen=True):
    """`counts`: known even where there is no span. `share`: lies between 0 and 1."""

    value: Callable[[Metrics], float | None]
    samples: Callable[[Metrics], int]
    counts: bool = False
    share: bool = False


class Reading(Struct, frozen=True):
    """The value of one group, named by the values of `group_by` (empty = the spans name none). None = no data."""

    group: tuple[str, ...]
    value: float | None
    samples: int


def _spans(m: Metrics) -> int:
    return m.spans


def _amount(measure: str, figure: str) -> Metric:
    return Metric(
        lambda m: getattr(getattr(m, measure), figure), lambda m: getattr(m, measure).known, share=measure == "score"
    )


def _both(m: Metrics) -> float | None:
    if m.tokens_in.total is None or m.tokens_out.total is None:
        return None
    return m.tokens_in.total + m.tokens_out.total


METRICS: dict[str, Metric] = {
    "span_count": Metric(lambda m: float(m.spans), _spans, counts=True),
    "error_count": Metric(lambda m: float(m.errors), _spans, counts=True),
    "error_rate": Metric(lambda m: m.error_rate, _spans, share=True),
    "timeout_count": Metric(lambda m: float(m.timeouts), _spans, counts=True),
    "timeout_rate": Metric(lambda m: m.timeouts / m.spans if m.spans else None, _spans, share=True),
    **{f"latency_{p}": _amount("latency_ms", p) for p in ("avg", "p50", "p90", "p95", "p99")},
    **{f"ttft_{p}": _amount("ttft_ms", p) for p in ("avg", "p50", "p90", "p95", "p99")},
    **{f"tokens_in_{p}": _amount("tokens_in", p) for p in ("total", "avg", "p50", "p90", "p95", "p99")},
    **{f"tokens_out_{p}": _amount("tokens_out", p) for p in ("total", "avg", "p50", "p90", "p95", "p99")},
    "tokens_total": Metric(_both, lambda m: max(m.tokens_in.known, m.tokens_out.known)),
    "total_cost_usd": _amount("cost_usd", "total"),
    "cost_per_call": _amount("cost_usd", "avg"),
    "cost_p95": _amount("cost_usd", "p95"),
    "quality_score": _amount("score", "avg"),
    "quality_p10": _amount("score", "p10"),
    "quality_p50": _amount("score", "p50"),
}
ALIASES = {
    "total_cost": "total_cost_usd",
    "prompt_tokens": "tokens_in_total",
    "completion_tokens": "tokens_out_total",
    "total_tokens": "tokens_total",
}
"""The documents' names for some."""


def metric(name: str) -> Metric:
    return METRICS[ALIASES.get(name, name)]


def measure(store: Store, rule: Rule, since_ns: int, until_ns: int) -> list[Metrics]:
    """The figures of the rule's spans that began in [since, until), by its groups."""
    asked = rule.filter
    where = Where(
        since_ns=since_ns, until_ns=until_ns, tenant=asked.tenant or None, operation=asked.operation or None,
        model=asked.model or None, provider=asked.provider or None, attrs=tuple(asked.attrs.items()),
    )  # fmt: skip
    return stats.metrics(store, where, rule.group_by)


def read(rule: Rule, figures: Sequence[Metrics]) -> list[Reading]:
    """The rule's metric for every group."""
    known = METRICS[rule.metric]
    out = []
    for one in figures:
        samples = known.samples(one)
        value = known.value(one) if samples >= rule.min_samples else None
        out.append(Reading(tuple(one.group[name] or "" for name in rule.group_by), value, samples))
    return out
