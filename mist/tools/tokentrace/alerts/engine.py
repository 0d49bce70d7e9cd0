"""All rules at one moment: what was saved and what was measured, to what is to be saved and said. Pure.

What is to be said is part of what is saved: envelopes wait in `unsent`, webhooks in `outbox`, until they are delivered.
So a crash at any instant says nothing that was not decided durably, and repeats it with the same ids. Everything is
bounded: groups for each rule, envelopes and webhooks that wait.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from mist.errors import Internal
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_ALERT, TraceAlert
from mist.quantities import Duration
from mist.tools.tokentrace.alerts.machine import Event, GroupState, ended, forgettable, step
from mist.tools.tokentrace.alerts.measure import Reading
from mist.tools.tokentrace.alerts.rules import Rule, Target

GROUPS_MAX = 1000
"""For each rule; groups beyond are not watched, and counted."""
UNSENT_MAX = 1000
"""No rule is evaluated while so many envelopes wait for their stream."""
OUTBOX_MAX = 1000
"""Webhooks that wait; beyond, the oldest is dropped and counted."""
STATE = "alerts"
"""The name under which the store keeps `Saved`."""
_COMPLEMENT = {">": "<=", ">=": "<", "<": ">=", "<=": ">"}


class Webhook(Struct, frozen=True, kw_only=True):
    """One delivery that waits. `target` is `target_key`: a rule that was changed meanwhile may have lost it."""

    id: str
    rule: str
    target: str
    body: str
    failures: int = 0
    due_ns: int = 0


class RuleState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`metric`, `op` and `window_s` are kept so that an episode can be ended when its rule is gone."""

    groups: list[GroupState] = []
    at_ns: int = 0
    metric: str = ""
    op: str = ""
    window_s: float = 0.0
    group_by: tuple[str, ...] = ()


class Saved(Struct, frozen=True, kw_only=True):
    """Everything that survives a restart."""

    version: int = 1
    rules: dict[str, RuleState] = {}
    unsent: list[Envelope] = []
    outbox: list[Webhook] = []


class Told(Struct):
    """Counters of this process."""

    evaluations: int = 0
    failed: int = 0
    """Evaluations that could not be made."""
    fired: int = 0
    resolved: int = 0
    groups_over: int = 0
    webhooks_dropped: int = 0


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Saved).decode


def encode(saved: Saved) -> bytes:
    return _encode(saved)


def decode(data: bytes | None) -> Saved:
    """What `encode` wrote; None is a fresh start. Raises Internal for anything else: forgetting would fire again."""
    if data is None:
        return Saved()
    try:
        saved = _decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Internal(
            f"the saved state of the alerts cannot be read: {exc}", hint=f"state {STATE!r} of the store"
        ) from exc
    if saved.version != 1:
        raise Internal(f"the saved state of the alerts has version {saved.version}, this program reads 1")
    return saved


def due_ns(rule: Rule, saved: Saved, now_ns: int) -> int | None:
    """The moment to evaluate the rule for, if there is one: the last full period. A period is evaluated once, also
    over restarts; one that was missed is not made up for."""
    every = round(rule.every_s * 1e9)
    moment = now_ns - now_ns % every
    last = saved.rules[rule.name].at_ns if rule.name in saved.rules else 0
    return moment if moment > last or last > now_ns else None


def evaluate(
    rule: Rule, saved: Saved, readings: Sequence[Reading], moment_ns: int, told: Told, *, silenced: bool, source: str
) -> Saved:
    """One rule, all its groups."""
    old = saved.rules.get(rule.name, RuleState(group_by=rule.group_by))
    if old.group_by != rule.group_by:
        # these groups cannot come back: their episodes end here
        lost = [e for s in old.groups if (e := ended(s, moment_ns))]
        saved = _say(saved, rule.name, old, lost, rule, told, source)
        old = RuleState()
    states = {state.group: state for state in old.groups}
    events = []
    measured = {reading.group: reading for reading in readings}
    fresh = sorted((r for r in readings if r.group not in states), key=lambda r: (-r.samples, r.group))
    room = max(0, GROUPS_MAX - len(states))
    told.groups_over += len(fresh[room:])
    groups = [*states, *(r.group for r in fresh[:room])]
    absent = Reading((), 0.0 if rule.min_samples == 0 else None, 0)  # only counts are known without a span
    kept = []
    for group in groups:
        before = states.get(group, GroupState(group=group))
        after, event = step(rule, before, measured.get(group, absent), moment_ns, silenced=silenced)
        if event is not None:
            events.append(event)
        if group in measured or not forgettable(rule, after, moment_ns):
            kept.append(after)
    told.evaluations += 1
    new = RuleState(
        groups=kept, at_ns=moment_ns, metric=rule.metric, op=rule.op, window_s=rule.window_s, group_by=rule.group_by
    )
    saved = replace(saved, rules={**saved.rules, rule.name: new})
    return _say(saved, rule.name, new, events, rule, told, source)


def retire(saved: Saved, kept: Mapping[str, Rule], now_ns: int, told: Told, *, source: str) -> Saved:
    """End the episodes of rules that are no more, and forget these."""
    for name in [name for name in saved.rules if name not in kept]:
        old = saved.rules[name]
        events = [e for s in old.groups if (e := ended(s, now_ns))]
        saved = replace(saved, rules={k: v for k, v in saved.rules.items() if k != name})
        saved = _say(saved, name, old, events, None, told, source)
    return saved


def _say(
    saved: Saved, name: str, state: RuleState, events: Sequence[Event], rule: Rule | None, told: Told, source: str
) -> Saved:
    unsent, outbox = list(saved.unsent), list(saved.outbox)
    for event in events:
        if event.state == "firing":
            told.fired += 1
        else:
            told.resolved += 1
        alert = alert_of(name, state, event, rule)
        env = envelope_of(alert, event, rule, source)
        unsent.append(env)
        if rule is None:
            continue
        for target in rule.targets:
            key = target_key(target)
            body = body_of(env.id, alert, event, rule).decode()
            outbox.append(Webhook(id=_digest(env.id, key), rule=name, target=key, body=body, due_ns=event.at_ns))
    over = max(0, len(outbox) - OUTBOX_MAX)
    told.webhooks_dropped += over
    return replace(saved, unsent=unsent, outbox=outbox[over:])


def alert_of(name: str, state: RuleState, event: Event, rule: Rule | None) -> TraceAlert:
    """The payload. Message and numbers in the seed's form."""
    limit = f"(threshold: {event.threshold:.4g})"
    if event.deleted:
        message = f"{state.metric}: the alert is no more {limit}"
    elif event.value is None:
        message = f"{state.metric}: no data for {_duration(state.window_s)} {limit}"
    else:
        op = state.op if event.state == "firing" else _COMPLEMENT[state.op]
        message = f"{state.metric} {op} {event.value:.4g} {limit}"
    return TraceAlert(
        level=event.level, metric=state.metric, value=event.value, threshold=event.threshold, message=message, name=name,
        state=event.state, group=dict(zip(state.group_by, event.group, strict=False)), window_s=state.window_s,
        samples=event.samples, since_ns=event.episode_ns, dedup_key=_digest(name, *event.group)[:32],
    )  # fmt: skip


def envelope_of(alert: TraceAlert, event: Event, rule: Rule | None, source: str) -> Envelope:
    """Its id is made of rule, group, episode, state and level: saying it again is the same envelope."""
    tenant = alert.group.get("tenant", "") or (rule.filter.tenant if rule is not None else "")
    return Envelope.new(
        TRACE_ALERT, alert, source=source, timestamp_ns=event.at_ns, tenant=tenant,
        id=_digest(alert.name, *event.group, str(event.episode_ns), event.state, event.level)[:32],
    )  # fmt: skip


def body_of(id: str, alert: TraceAlert, event: Event, rule: Rule) -> bytes:
    """What a webhook gets: the documents' keys, and ours."""
    body = {
        "id": id,
        "alert": alert.name,
        "rule_id": alert.dedup_key,
        "state": alert.state,
        "level": alert.level,
        "metric": alert.metric,
        "op": rule.op,
        "value": alert.value,
        "threshold": alert.threshold,
        "message": alert.message,
        "window": _duration(rule.window_s),
        "span_count": alert.samples,
        "filter": msgspec.to_builtins(rule.filter),
        "group": alert.group,
        "fired_at": _rfc3339(event.episode_ns),
        "dedup_key": alert.dedup_key,
    }
    if event.state == "resolved":
        body["resolved_at"] = _rfc3339(event.at_ns)
    return _encode(body)


def target_key(target: Target) -> str:
    """Names a target without showing its URL, which may hold a secret."""
    return _digest(target.url, target.url_env)[:16]


def _digest(*parts: str) -> str:
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _duration(seconds: float) -> str:
    return str(Duration(f"{seconds:.3f}s"))


def _rfc3339(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
