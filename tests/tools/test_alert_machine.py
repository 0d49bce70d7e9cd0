"""One rule, one group: against examples, and against a small model that hypothesis drives."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mist.tools.tokentrace.alerts.machine import Event, GroupState, step
from mist.tools.tokentrace.alerts.measure import Reading
from mist.tools.tokentrace.alerts.rules import LEVELS, Rule
from tests.tools import alerting

S = 1_000_000_000
START = 1_700_000_000 * S


def play(one: Rule, *values: float | None, every_s: int = 30, silent: range = range(0)) -> list[str]:
    """What is said at each evaluation: "" or state:level."""
    state, out = GroupState(), []
    for number, value in enumerate(values):
        now = START + number * every_s * S
        state, event = step(one, state, Reading((), value, 9), now, silenced=number in silent)
        out.append(f"{event.state}:{event.level}" if event else "")
    return out


def test_it_fires_once_and_resolves_once() -> None:
    """Strictly beyond fires; staying there says nothing; back at the threshold resolves."""
    assert play(alerting.rule(), 0.5, 0.6, 0.9, 0.5, 0.4) == ["", "firing:warning", "", "resolved:warning", ""]
    low = alerting.rule(metric="quality_score", op="<", threshold=0.8, level="critical")
    assert play(low, 0.8, 0.7, 0.8) == ["", "firing:critical", "resolved:critical"]
    assert play(alerting.rule(op=">="), 0.5, 0.4) == ["firing:warning", "resolved:warning"]


def test_a_level_rises_and_never_falls_within_an_episode() -> None:
    """Warning, then critical; falling back to the warning's range says nothing; one resolved, of the level reached."""
    pair = alerting.rule(threshold={"warning": 0.5, "critical": 0.8})
    assert play(pair, 0.6, 0.9, 0.6, 0.9, 0.1) == ["firing:warning", "firing:critical", "", "", "resolved:critical"]
    assert play(pair, 0.9, 0.6, 0.2) == ["firing:critical", "", "resolved:critical"]


def test_it_has_to_hold_for_so_long() -> None:
    """`for` counts from the first evaluation beyond; coming back starts it again; each level by itself."""
    one = alerting.rule(for_="1m")
    assert play(one, 0.9, 0.9, 0.9) == ["", "", "firing:warning"]
    assert play(one, 0.9, 0.1, 0.9, 0.9, 0.9) == ["", "", "", "", "firing:warning"]
    pair = alerting.rule(for_="1m", threshold={"warning": 0.5, "critical": 0.8})
    assert play(pair, 0.6, 0.6, 0.9, 0.9, 0.9) == ["", "", "firing:warning", "", "firing:critical"]


def test_hysteresis_keeps_it_firing_between_the_two_values() -> None:
    """It ends at `recover`, not at the threshold."""
    one = alerting.rule(recover=0.3)
    assert play(one, 0.6, 0.5, 0.31, 0.6, 0.3) == ["firing:warning", "", "", "", "resolved:warning"]


def test_cooldown_delays_the_next_episode_but_not_a_worse_one() -> None:
    """Three evaluations of cooldown: the second episode waits for its end, and is announced then if it still holds."""
    one = alerting.rule(cooldown="90s")
    said = ["firing:warning", "resolved:warning", "", "firing:warning"]
    assert play(one, 0.9, 0.1, 0.9, 0.9) == said
    pair = alerting.rule(cooldown="10m", threshold={"warning": 0.5, "critical": 0.8})
    assert play(pair, 0.6, 0.1, 0.6, 0.9) == ["firing:warning", "resolved:warning", "", "firing:critical"]


def test_silence_holds_back_firings_only() -> None:
    """What is beyond when the silence ends fires then; what was announced before it is resolved in it."""
    assert play(alerting.rule(), 0.9, 0.9, 0.9, silent=range(2)) == ["", "", "firing:warning"]
    assert play(alerting.rule(), 0.9, 0.1, 0.9, 0.1, silent=range(1, 4)) == [
        "firing:warning",
        "resolved:warning",
        "",
        "",
    ]


def test_the_three_ways_to_see_no_data() -> None:
    """ok: it is fine. keep: nothing changes. alert: it is as bad as the mildest threshold."""
    assert play(alerting.rule(no_data="ok"), 0.9, None, None) == ["firing:warning", "resolved:warning", ""]
    assert play(alerting.rule(no_data="keep"), 0.9, None, 0.1) == ["firing:warning", "", "resolved:warning"]
    assert play(alerting.rule(no_data="keep", for_="1m"), 0.9, None, 0.9) == ["", "", "firing:warning"]
    pair = alerting.rule(no_data="alert", threshold={"warning": 0.5, "critical": 0.8})
    assert play(pair, 0.1, None, None, 0.1) == ["", "firing:warning", "", "resolved:warning"]


def test_a_clock_that_goes_back_does_not_silence_it_for_ever() -> None:
    """An hour back: a cooldown of 5 minutes lasts 5 minutes more, not an hour."""
    one = alerting.rule(cooldown="5m")
    state, _ = step(one, GroupState(), Reading((), 0.9, 1), START)
    state, _ = step(one, state, Reading((), 0.1, 1), START - 3600 * S)
    state, early = step(one, state, Reading((), 0.9, 1), START - 3400 * S)
    state, later = step(one, state, Reading((), 0.9, 1), START - 3300 * S)
    assert early is None
    assert later is not None


LEVEL_VALUE = {"warning": 0.5, "critical": 0.8}
RECOVER = 0.4


class AgainstAModel(RuleBasedStateMachine):
    """The model keeps the history of values and of what was said, and decides by looking back."""

    @initialize(
        for_s=st.sampled_from([0, 30, 90]),
        cooldown_s=st.sampled_from([0, 60, 300]),
        levels=st.sampled_from([("warning",), ("critical",), ("warning", "critical")]),
        no_data=st.sampled_from(["ok", "keep", "alert"]),
    )
    def begin(self, for_s: int, cooldown_s: int, levels: tuple[str, ...], no_data: str) -> None:
        self.rule = alerting.rule(
            threshold={k: LEVEL_VALUE[k] for k in levels}, recover=RECOVER, for_=f"{for_s}s", cooldown=f"{cooldown_s}s",
            no_data=no_data,
        )  # fmt: skip
        self.levels = levels
        self.state = GroupState()
        self.now = START
        self.history: list[tuple[int, float | None]] = []
        self.said: list[Event] = []

    @rule(
        value=st.sampled_from([None, 0.0, 0.4, 0.45, 0.5, 0.6, 0.8, 0.9]),
        pause=st.sampled_from([30, 30, 30, 60, 600]),
        silent=st.sampled_from([False, False, True]),
    )
    def evaluate(self, value: float | None, pause: int, silent: bool) -> None:
        self.now += pause * S
        self.history.append((self.now, value))
        open_level = self.said[-1].level if self.said and self.said[-1].state == "firing" else ""
        self.state, event = step(self.rule, self.state, Reading((), value, 5), self.now, silenced=silent)
        expected = self.expected(open_level, value, silent)
        assert (f"{event.state}:{event.level}" if event else "") == expected
        if event:
            self.said.append(event)

    def expected(self, open_level: str, value: float | None, silent: bool) -> str:
        if value is None and self.rule.no_data == "keep":
            return ""
        if open_level and (value <= RECOVER if value is not None else self.rule.no_data == "ok"):
            return f"resolved:{open_level}"
        for level in reversed(self.levels):
            worse = not open_level or LEVELS.index(level) > LEVELS.index(open_level)  # type: ignore[arg-type]
            if worse and not silent and self.held(level) and self.cool(level):
                return f"firing:{level}"
        return ""

    def held(self, level: str) -> bool:
        """Beyond this level at every evaluation of the last `for`, the last one included."""
        since = None
        for at, value in reversed(self.history):
            if value is None and self.rule.no_data == "keep":
                continue
            if not self.is_beyond(level, value):
                break
            since = at
        return since is not None and self.now - since >= self.rule.for_s * S

    def is_beyond(self, level: str, value: float | None) -> bool:
        if value is None:
            return self.rule.no_data == "alert" and level == self.levels[0]
        return value > LEVEL_VALUE[level]

    def cool(self, level: str) -> bool:
        at_or_above = [
            e.at_ns
            for e in self.said
            if e.state == "firing" and LEVELS.index(e.level) >= LEVELS.index(level)  # type: ignore[arg-type]
        ]
        return not at_or_above or self.now - max(at_or_above) >= self.rule.cooldown_s * S

    @invariant()
    def each_episode_is_resolved_once(self) -> None:
        """Between two resolved there is one episode; a resolved follows a firing, with its level and start."""
        before: Event | None = None
        for event in getattr(self, "said", []):
            if event.state == "resolved":
                assert before is not None
                assert before.state == "firing"
                assert (before.level, before.episode_ns) == (event.level, event.episode_ns)
            elif before is not None and before.state == "firing":
                assert event.episode_ns == before.episode_ns
                assert LEVELS.index(event.level) > LEVELS.index(before.level)
            before = event


AgainstAModel.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestAgainstAModel = AgainstAModel.TestCase
