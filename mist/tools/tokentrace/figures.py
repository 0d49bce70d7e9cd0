"""The store as the alerts see it: figures of a rule's window and groups, and small named states."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from mist.tools.tokentrace.alerts.measure import Amounts, Figures
from mist.tools.tokentrace.alerts.rules import Rule
from mist.tools.tokentrace.stats import Metrics, Summary, metrics
from mist.tools.tokentrace.store import Store
from mist.tools.tokentrace.where import Where


def figures_of(found: Metrics) -> Figures:
    """One group of the store's figures as the alerts' metrics read them."""
    return Figures(
        group=tuple(value or "" for value in found.group.values()),
        count=found.spans,
        errors=found.errors,
        timeouts=found.timeouts,
        latency_ms=_amounts(found.latency_ms),
        ttft_ms=_amounts(found.ttft_ms),
        tokens_in=_amounts(found.tokens_in),
        tokens_out=_amounts(found.tokens_out),
        cost_usd=_amounts(found.cost_usd),
        score=_amounts(found.score),
    )


def _amounts(s: Summary) -> Amounts:
    return Amounts(known=s.known, total=s.total, p10=s.p10, p50=s.p50, p90=s.p90, p95=s.p95, p99=s.p99)


class AlertStore:
    """A connection of the alerts' own, for any of their threads. To be closed."""

    def __init__(self, place: Path | str) -> None:
        self._store = Store.open(place)
        self._lock = threading.Lock()

    def figures(self, rule: Rule, since_ns: int, until_ns: int, /) -> Sequence[Figures]:
        """The rule's spans of [since, until), by its filter and groups."""
        wanted = rule.filter
        where = Where(
            since_ns=since_ns, until_ns=until_ns, tenant=wanted.tenant or None,
            operation=wanted.operation or None, model=wanted.model or None, provider=wanted.provider or None,
            attrs=tuple(sorted(wanted.attrs.items())),
        )  # fmt: skip
        with self._lock:
            found = metrics(self._store, where, rule.group_by)
        return [figures_of(m) for m in found if m.spans or not rule.group_by]

    def load(self, name: str, /) -> bytes | None:
        with self._lock:
            return self._store.load(name)

    def save(self, name: str, data: bytes, /) -> None:
        with self._lock:
            self._store.save(name, data)

    def close(self) -> None:
        with self._lock:
            self._store.close()
