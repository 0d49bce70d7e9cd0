"""One rule, one group: ok -> pending -> firing -> ok, decided by values and a clock that are passed in.

Promises:
- fires at a level when the value has been beyond its threshold for `for`, nobody silenced it, and the last firing at
  that level or above is `cooldown` ago. What is held back by silence or cooldown fires as soon as they end, if the
  value is still beyond.
- an episode's level only rises; a rise is a firing of the same episode.
- an episode ends once, with one resolved: when the value is back at `recover`, or there is no data and the policy says
  that this is fine. Silence holds back firings, never the resolved of something that was announced.
- no data with the policy `keep` changes nothing; with `alert` it counts as being beyond the mildest threshold.
- a clock that goes back lengthens a wait by at most that wait.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from mist.tools.tokentrace.alerts.measure import Reading
from mist.tools.tokentrace.alerts.rules import LEVELS, Level, Rule


class GroupState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`since_ns`: beyond each level since. `fired_ns`: when each level, or one above it, was last announced. `level`:
    what the running episode has announced, empty = none; it began at `episode_ns`. The rest is the last evaluation."""

    group: tuple[str, ...] = ()
    since_ns: dict[Level, int] = {}
    fired_ns: dict[Level, int] = {}
    level: Level | Literal[""] = ""
    episode_ns: int = 0
    threshold: float = 0.0
    at_ns: int = 0
    value: float | None = None
    samples: int = 0

    @property
    def phase(self) -> Literal["ok", "pending", "firing"]:
        return "firing" if self.level else "pending" if self.since_ns else "ok"


class Event(Struct, frozen=True, kw_only=True):
    """Something to be said. `value` None = there is no data. `deleted`: it ended because the rule is gone."""

    state: Literal["firing", "resolved"]
    group: tuple[str, ...]
    level: Level
    threshold: float
    value: float | None
    samples: int
    at_ns: int
    episode_ns: int
    deleted: bool = False


def step(
    rule: Rule, before: GroupState, reading: Reading, now_ns: int, *, silenced: bool = False
) -> tuple[GroupState, Event | None]:
    """One evaluation at `now_ns`."""
    state = replace(
        before,
        since_ns={k: min(t, now_ns) for k, t in before.since_ns.items()},
        fired_ns={k: min(t, now_ns) for k, t in before.fired_ns.items()},
        at_ns=now_ns, value=reading.value, samples=reading.samples,
    )  # fmt: skip
    if reading.value is None and rule.no_data == "keep":
        return state, None
    beyond = _beyond(rule, reading.value)
    state = replace(state, since_ns={level: state.since_ns.get(level, now_ns) for level in beyond})
    if state.level and _recovered(rule, reading.value):
        return _resolved(state, now_ns)
    ready = [
        level
        for level in beyond
        if now_ns - state.since_ns[level] >= rule.for_s * 1e9
        and (level not in state.fired_ns or now_ns - state.fired_ns[level] >= rule.cooldown_s * 1e9)
    ]
    if not ready or silenced or (state.level and LEVELS.index(ready[-1]) <= LEVELS.index(state.level)):
        return state, None
    level = ready[-1]
    reached = LEVELS[: LEVELS.index(level) + 1]
    state = replace(
        state, level=level, episode_ns=state.episode_ns if state.level else now_ns, threshold=rule.thresholds[level],
        fired_ns={**state.fired_ns, **dict.fromkeys(reached, now_ns)},
    )  # fmt: skip
    return state, _event(state, "firing", now_ns)


def ended(state: GroupState, now_ns: int) -> Event | None:
    """What is left to say when the rule itself is gone."""
    if not state.level:
        return None
    return replace(_event(state, "resolved", now_ns), deleted=True)


def forgettable(rule: Rule, state: GroupState, now_ns: int) -> bool:
    """Whether a group without spans leaves nothing to remember."""
    if state.phase != "ok" or rule.no_data == "alert":
        return False
    return all(now_ns - at >= rule.cooldown_s * 1e9 for at in state.fired_ns.values())


def _beyond(rule: Rule, value: float | None) -> list[Level]:
    """The levels whose threshold the value is beyond, mild to severe."""
    if value is None:
        return [rule.mildest] if rule.no_data == "alert" else []
    return [level for level in LEVELS if level in rule.thresholds and rule.beyond(value, rule.thresholds[level])]


def _recovered(rule: Rule, value: float | None) -> bool:
    if value is None:
        return rule.no_data == "ok"
    return not rule.beyond(value, rule.recover)


def _resolved(state: GroupState, now_ns: int) -> tuple[GroupState, Event]:
    event = _event(state, "resolved", now_ns)
    return replace(state, level="", episode_ns=0, threshold=0.0), event


def _event(state: GroupState, what: Literal["firing", "resolved"], now_ns: int) -> Event:
    assert state.level  # noqa: S101 - only announced states speak
    return Event(
        state=what, group=state.group, level=state.level, threshold=state.threshold, value=state.value,
        samples=state.samples, at_ns=now_ns, episode_ns=state.episode_ns,
    )  # fmt: skip
