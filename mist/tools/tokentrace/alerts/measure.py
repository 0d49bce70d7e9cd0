"""What an alert can watch: metrics by name, each a function of the figures of one group in one window.

Promises: unknown is None, never zero; `samples` is the number of spans that the value is made of. Latencies and times
to the first token are milliseconds, costs US dollars, rates and scores shares from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct


class Amounts(Struct, frozen=True, kw_only=True):
    """One measure over the spans that know it. The percentiles and the sum are None where none does."""

    known: int = 0
    total: float | None = None
    p10: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None

    @property
    def avg(self) -> float | None:
        return None if self.total is None or not self.known else self.total / self.known


NOTHING = Amounts()


class Figures(Struct, frozen=True, kw_only=True):
    """The spans of one window and group. `errors` includes `timeouts`, as the documents count."""

    group: tuple[str, ...] = ()
    count: int = 0
    errors: int = 0
    timeouts: int = 0
    latency_ms: Amounts = NOTHING
    ttft_ms: Amounts = NOTHING
    tokens_in: Amounts = NOTHING
    tokens_out: Amounts = NOTHING
    cost_usd: Amounts = NOTHING
    score: Amounts = NOTHING


class Metric(Struct, frozen=True):
    """`counts`: known even where there is no span. `share`: lies between 0 and 1."""

    value: Callable[[Figures], float | None]
    samples: Callable[[Figures], int]
    counts: bool = False
    share: bool = False


class Reading(Struct, frozen=True):
    """The value of one group; None = no data."""

    group: tuple[str, ...]
    value: float | None
    samples: int


GROUPS = ("tenant", "operation", "model", "provider")
"""What `group_by` may name."""


class Asked(Protocol):
    """The part of a rule that says which spans to measure."""

    @property
    def metric(self) -> str: ...
    @property
    def window_s(self) -> float: ...
    @property
    def min_samples(self) -> int: ...
    @property
    def group_by(self) -> tuple[str, ...]: ...


def _count(f: Figures) -> int:
    return f.count


def _rate(field: str) -> Callable[[Figures], float | None]:
    return lambda f: getattr(f, field) / f.count if f.count else None


def _amount(measure: str, figure: str) -> Metric:
    return Metric(
        lambda f: getattr(getattr(f, measure), figure), lambda f: getattr(f, measure).known, share=measure == "score"
    )


def _both(f: Figures) -> float | None:
    if f.tokens_in.total is None or f.tokens_out.total is None:
        return None
    return f.tokens_in.total + f.tokens_out.total


METRICS: dict[str, Metric] = {
    "span_count": Metric(lambda f: float(f.count), _count, counts=True),
    "error_count": Metric(lambda f: float(f.errors), _count, counts=True),
    "error_rate": Metric(_rate("errors"), _count, share=True),
    "timeout_count": Metric(lambda f: float(f.timeouts), _count, counts=True),
    "timeout_rate": Metric(_rate("timeouts"), _count, share=True),
    **{f"latency_{p}": _amount("latency_ms", p) for p in ("avg", "p50", "p90", "p95", "p99")},
    **{f"ttft_{p}": _amount("ttft_ms", p) for p in ("avg", "p50", "p90", "p95", "p99")},
    **{f"tokens_in_{p}": _amount("tokens_in", p) for p in ("total", "avg", "p50", "p90", "p95", "p99")},
    **{f"tokens_out_{p}": _amount("tokens_out", p) for p in ("total", "avg", "p50", "p90", "p95", "p99")},
    "tokens_total": Metric(_both, lambda f: max(f.tokens_in.known, f.tokens_out.known)),
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


def read(rule: Asked, figures: Sequence[Figures]) -> list[Reading]:
    """The rule's metric for every group. Without groups there is always one, spans or none."""
    if not rule.group_by and not figures:
        figures = (Figures(),)
    known = METRICS[rule.metric]
    out = []
    for one in figures:
        samples = known.samples(one)
        out.append(Reading(one.group, known.value(one) if samples >= rule.min_samples else None, samples))
    return out
