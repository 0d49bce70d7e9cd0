"""For the tests of alerts: rules in one line, a store of figures, a receiver that remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mist.protocol.envelope import Envelope
from mist.tools.tokentrace.alerts.rules import Rule, rules_of
from mist.tools.tokentrace.stats import Metrics, Summary

HOOK = {"url": "http://hook.test/a"}


def rule(env: Mapping[str, str] | None = None, **keys: Any) -> Rule:
    """One rule from the keys of TOML; `for_` is `for`. A minute of error_rate above a half where nothing is said."""
    table = {"name": "r", "metric": "error_rate", "op": ">", "threshold": 0.5, "window": "1m", "cooldown": "0s", **keys}
    table = {("for" if k == "for_" else k): v for k, v in table.items() if v is not None}
    (out,) = rules_of({"tokentrace": {"alerts": [table]}}, "mist.toml", env=env or {})
    return out


MEASURES = ("latency_ms", "ttft_ms", "tokens_in", "tokens_out", "cost_usd", "score")


def summary(known: int = 0, total: float | None = None, **percentiles: float) -> Summary:
    figures = {p: percentiles.get(p) for p in ("p10", "p50", "p90", "p95", "p99")}
    return Summary(known=known, total=total, avg=total / known if total is not None else None, **figures)


def figures(
    spans: int = 0, errors: int = 0, *, timeouts: int = 0, group: dict[str, str | None] | None = None, **more: Summary
) -> Metrics:
    """One row of figures; what is not said is unknown."""
    return Metrics(
        group=group or {}, at=None, spans=spans, errors=errors, timeouts=timeouts,
        error_rate=errors / spans if spans else None, **{name: more.get(name, summary()) for name in MEASURES},
    )  # fmt: skip


class FakeStore:
    """Figures are what the test says; states are bytes by name. `fail` is raised."""

    def __init__(self) -> None:
        self.now: list[Metrics] = []
        self.asked: list[tuple[str, int, int]] = []
        self.states: dict[str, bytes] = {}
        self.fail: Exception | None = None

    def measure(self, rule: Rule, since_ns: int, until_ns: int) -> Sequence[Metrics]:
        self.asked.append((rule.name, since_ns, until_ns))
        if self.fail is not None:
            raise self.fail
        return self.now

    def load(self, name: str) -> bytes | None:
        return self.states.get(name)

    def save(self, name: str, data: bytes) -> None:
        if self.fail is not None:
            raise self.fail
        self.states[name] = data


class Stream:
    """An append that remembers; a known id is stored once."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []
        self.fail: Exception | None = None

    async def __call__(self, envelopes: list[Envelope]) -> None:
        if self.fail is not None:
            raise self.fail
        known = {e.id for e in self.envelopes}
        self.envelopes += [e for e in envelopes if e.id not in known]

    @property
    def said(self) -> list[tuple[str, str]]:
        return [(a.state, a.level) for a in (e.decode() for e in self.envelopes)]


class Receiver:
    """A `Post` that remembers; `answers` are errors to raise first."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[Exception] = []

    async def __call__(self, url: str, headers: Mapping[str, str], body: bytes, timeout_s: float) -> None:
        if self.answers:
            raise self.answers.pop(0)
        self.got.append((url, dict(headers), body))
