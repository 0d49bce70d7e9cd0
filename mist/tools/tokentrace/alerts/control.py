"""What operators do with alerts: list, status, silence, delete. Plain functions over the store, for any process.

A rule's orders are small named states of their own, read at every evaluation: the service need not run when they are
given, and a silence survives its restart. Does not: make rules, which are configuration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from mist.errors import Internal, InvalidArgument, NotFound
from mist.tools.tokentrace.alerts import engine
from mist.tools.tokentrace.alerts.rules import Level, Rule

SILENCE_S_MAX = 366 * 86_400.0


class States(Protocol):
    """The part of a store that keeps small named states."""

    def load(self, name: str, /) -> bytes | None: ...
    def save(self, name: str, data: bytes, /) -> None: ...


class Orders(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`deleted` holds the digest of the rule that was deleted: one that is written differently is another."""

    silenced_until_ns: int = 0
    deleted: str = ""


class Group(Struct, frozen=True, kw_only=True):
    """`value` None = no data. `since_ns`: the episode's start, or since when the value is beyond; 0 = neither."""

    group: dict[str, str]
    state: Literal["ok", "pending", "firing"]
    level: str
    value: float | None
    samples: int
    since_ns: int


class Status(Struct, frozen=True, kw_only=True):
    """A rule and how it stands. `state` is the worst of its groups'."""

    name: str
    metric: str
    op: str
    thresholds: dict[Level, float]
    window_s: float
    state: Literal["ok", "pending", "firing"]
    silenced_until_ns: int
    evaluated_ns: int
    groups: list[Group]


def list_alerts(store: States, rules: Sequence[Rule], *, now_ns: int) -> list[Status]:
    """All rules that were not deleted, in the order of the configuration."""
    saved = engine.decode(store.load(engine.STATE))
    out = []
    for rule in rules:
        orders = orders_of(store, rule.name)
        if not deleted(rule, orders):
            out.append(_status(rule, saved, orders, now_ns))
    return out


def status(store: States, rules: Sequence[Rule], name: str, *, now_ns: int) -> Status:
    """Raises NotFound."""
    rule, orders = _find(store, rules, name)
    return _status(rule, engine.decode(store.load(engine.STATE)), orders, now_ns)


def silence(store: States, rules: Sequence[Rule], name: str, duration_s: float, *, now_ns: int) -> int:
    """Hold back its firings from now on for so long (0 = end the silence). Returns until when, Unix nanoseconds. What
    fires already is still resolved. Raises NotFound, InvalidArgument."""
    if not 0 <= duration_s <= SILENCE_S_MAX:
        raise InvalidArgument(f"silence: {duration_s:g} s is not between 0 and {SILENCE_S_MAX:g}")
    rule, orders = _find(store, rules, name)
    until = now_ns + round(duration_s * 1e9) if duration_s else 0
    _save(store, name, replace(orders, silenced_until_ns=until))
    return max(until, rule.silence_until_ns if rule.silence_until_ns > now_ns else 0)


def delete(store: States, rules: Sequence[Rule], name: str) -> None:
    """Evaluate it no more; what fires is resolved. It comes back when its configuration is changed. Raises NotFound."""
    rule, orders = _find(store, rules, name)
    _save(store, name, replace(orders, deleted=_digest(rule)))


def orders_of(store: States, name: str) -> Orders:
    data = store.load(_key(name))
    if data is None:
        return Orders()
    try:
        return msgspec.json.decode(data, type=Orders)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Internal(f"the orders for alert {name!r} cannot be read: {exc}", hint=f"state {_key(name)!r}") from exc


def deleted(rule: Rule, orders: Orders) -> bool:
    return bool(orders.deleted) and orders.deleted == _digest(rule)


def silenced(rule: Rule, orders: Orders, now_ns: int) -> bool:
    return max(orders.silenced_until_ns, rule.silence_until_ns) > now_ns


def _find(store: States, rules: Sequence[Rule], name: str) -> tuple[Rule, Orders]:
    for rule in rules:
        if rule.name == name:
            orders = orders_of(store, name)
            if not deleted(rule, orders):
                return rule, orders
    raise NotFound(f"no alert {name[:100]!r}", hint="`GET /alerts` lists them")


def _status(rule: Rule, saved: engine.Saved, orders: Orders, now_ns: int) -> Status:
    state = saved.rules.get(rule.name, engine.RuleState())
    groups = [
        Group(
            group=dict(zip(rule.group_by, s.group, strict=False)), state=s.phase, level=s.level, value=s.value,
            samples=s.samples, since_ns=s.episode_ns or min(s.since_ns.values(), default=0),
        )
        for s in state.groups
    ]  # fmt: skip
    phases = {g.state for g in groups}
    until = max(orders.silenced_until_ns, rule.silence_until_ns)
    return Status(
        name=rule.name, metric=rule.metric, op=rule.op, thresholds=rule.thresholds, window_s=rule.window_s,
        state="firing" if "firing" in phases else "pending" if "pending" in phases else "ok",
        silenced_until_ns=until if until > now_ns else 0, evaluated_ns=state.at_ns, groups=groups,
    )  # fmt: skip


def _save(store: States, name: str, orders: Orders) -> None:
    store.save(_key(name), msgspec.json.encode(orders))


def _key(name: str) -> str:
    return f"alerts/{name}"


def _digest(rule: Rule) -> str:
    return hashlib.sha256(msgspec.json.encode(rule)).hexdigest()[:16]
