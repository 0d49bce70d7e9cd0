"""The breaker against a small model: calls that begin, end, fail, are cancelled and hang, in any order, over any time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from mist.errors import CircuitOpen, Malformed, Unavailable
from mist.kit.breaker import Breaker, BreakerPolicy


class Pause:
    """What a call waits for until the test says how it ends."""

    def __await__(self) -> Generator[None, None, str]:
        yield
        return "done"


async def call() -> str:
    return await Pause()


class Running:
    """One call under way, and when it began in the model."""

    def __init__(self, coroutine: Coroutine[Any, Any, str], generation: int, began: float) -> None:
        self.coroutine = coroutine
        self.generation = generation
        self.began = began


class Machine(RuleBasedStateMachine):
    running = Bundle("running")

    @initialize(
        failures_max=st.integers(1, 3), probes_max=st.integers(1, 3), factor=st.sampled_from([1.0, 2.0]),
        open_s=st.sampled_from([1.0, 5.0]),
    )  # fmt: skip
    def begin(self, failures_max: int, probes_max: int, factor: float, open_s: float) -> None:
        self.policy = BreakerPolicy(
            failures_max=failures_max, probes_max=probes_max, factor=factor, open_s=open_s, open_s_max=20.0, slow_s=10.0
        )
        self.now = 0.0
        self.breaker = Breaker("x", self.policy, clock=lambda: self.now)
        self.live: list[Running] = []
        # the model
        self.state = "closed"
        self.generation = 0
        self.streak = 0
        self.open_until = 0.0
        self.open_s = open_s
        self.counts = [0, 0, 0, 0]  # successes, failures, rejections, opened

    def model_enter(self, state: str) -> None:
        self.state = state
        self.generation += 1
        self.streak = 0
        if state == "open":
            self.open_until = self.now + self.open_s
            self.counts[3] += 1

    def model_look(self) -> None:
        if self.state == "open" and self.now >= self.open_until:
            self.model_enter("half-open")

    def probes(self) -> int:
        return sum(r.generation == self.generation for r in self.live)

    @rule(target=running)
    def starts(self) -> Any:
        self.model_look()
        let_through = self.state == "closed" or (self.state == "half-open" and self.probes() < self.policy.probes_max)
        coroutine = self.breaker.call(call)
        if let_through:
            assert coroutine.send(None) is None
            found = Running(coroutine, self.generation, self.now)
            self.live.append(found)
            return found
        with pytest.raises(CircuitOpen) as caught:
            coroutine.send(None)
        self.counts[2] += 1
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s >= 0
        if self.state == "open":
            assert caught.value.retry_after_s == pytest.approx(self.open_until - self.now)
        return None

    @rule(found=consumes(running), how=st.sampled_from(["works", "fails", "refuses", "cancelled", "stops"]))
    def ends(self, found: Running | None, how: str) -> None:
        if found is None:
            return
        slow = self.now - found.began >= self.policy.slow_s
        worked: bool | None
        if how == "works":
            with pytest.raises(StopIteration):
                found.coroutine.send(None)
            worked = True
        elif how == "fails":
            with pytest.raises(Unavailable):
                found.coroutine.throw(Unavailable("x"))
            worked = False
        elif how == "refuses":  # the caller's fault: the other side works
            with pytest.raises(Malformed):
                found.coroutine.throw(Malformed("x"))
            worked = True
        elif how == "cancelled":
            with pytest.raises(asyncio.CancelledError):
                found.coroutine.throw(asyncio.CancelledError())
            worked = False if slow else None
        else:
            found.coroutine.close()
            worked = False if slow else None
        self.live.remove(found)
        if worked is not None:
            self.counts[0 if worked else 1] += 1
        if found.generation != self.generation:
            return
        if self.state == "closed" and worked is not None:
            self.streak = 0 if worked else self.streak + 1
            if self.streak >= self.policy.failures_max:
                self.model_enter("open")
        elif self.state == "half-open" and worked is not None:
            if worked:
                self.open_s = self.policy.open_s
                self.model_enter("closed")
            else:
                self.open_s = min(self.open_s * self.policy.factor, self.policy.open_s_max)
                self.model_enter("open")

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 4.0, 10.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "breaker"):
            return
        self.model_look()
        assert self.breaker.state == self.state
        counts = self.breaker.counts
        assert [counts.successes, counts.failures, counts.rejections, counts.opened] == self.counts
        if self.state == "half-open":
            assert self.probes() <= self.policy.probes_max

    def teardown(self) -> None:
        """However it got here: when all have gone and the time is over, a call gets through, and its success closes."""
        if not hasattr(self, "breaker"):
            return
        for found in self.live:
            found.coroutine.close()
        self.now += self.policy.open_s_max + 1
        last = self.breaker.call(call)
        assert last.send(None) is None
        with pytest.raises(StopIteration):
            last.send(None)
        assert self.breaker.state == "closed"


TestBreaker = Machine.TestCase
TestBreaker.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
