"""Retry and breaker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import run

from mist.errors import CircuitOpen, EndOfStream, InvalidArgument, Malformed, RateLimited, TimedOut, Unavailable
from mist.kit.breaker import Breaker, BreakerPolicy, watch
from mist.kit.metrics import Metrics
from mist.kit.retry import RetryPolicy, retry


class Script:
    """A call with given outcomes, on a clock that only sleeping moves."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.calls = 0
        self.now = 0.0
        self.waits: list[float] = []

    async def __call__(self) -> Any:
        self.calls += 1
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def retry(self, policy: RetryPolicy | None = None, draw: float = 0.0, **options: Any) -> Any:
        return retry(self, policy, clock=lambda: self.now, sleep=self.sleep, draw=lambda: draw, **options)


def test_retries_until_it_works() -> None:
    """Retryable errors are tried again with growing waits, told to `on_retry`."""
    script = Script(Unavailable("a"), Unavailable("b"), "done")
    told: list[tuple[str, int, float]] = []
    policy = RetryPolicy(attempts_max=5, wait_s=0.1, factor=2)
    assert run(script.retry(policy, on_retry=lambda e, n, w: told.append((str(e), n, w)))) == "done"
    assert script.waits == [0.1, 0.2]
    assert told == [("a", 1, 0.1), ("b", 2, 0.2)]


def test_raises_the_last_error() -> None:
    """Out of attempts, the last error comes through."""
    script = Script(Unavailable("1"), Unavailable("2"), Unavailable("3"))
    with pytest.raises(Unavailable, match="3"):
        run(script.retry(RetryPolicy(attempts_max=3)))
    assert script.calls == 3


@pytest.mark.parametrize("error", [Malformed("x"), EndOfStream("x"), CircuitOpen("x")])
def test_permanent_errors_are_not_repeated(error: Exception) -> None:
    """What cannot get better is raised at once."""
    script = Script(error, "never")
    with pytest.raises(type(error)):
        run(script.retry())
    assert script.calls == 1


def test_foreign_errors_and_own_classifier() -> None:
    """Errors that are not ours are not repeated, unless the caller's classifier says so."""
    script = Script(ValueError("x"), "ok")
    with pytest.raises(ValueError, match="x"):
        run(script.retry())
    assert run(script.retry(classify=lambda e: True)) == "ok"


def test_cancellation_is_not_an_error() -> None:
    """A cancelled call is not called again."""
    script = Script(asyncio.CancelledError(), "never")
    with pytest.raises(asyncio.CancelledError):
        run(script.retry())
    assert script.calls == 1


def test_retry_after_is_honoured() -> None:
    """The wait the other side asked for is the least; one beyond the deadline is not begun."""
    script = Script(RateLimited("x", retry_after_s=4), RateLimited("y", retry_after_s=60), "never")
    with pytest.raises(RateLimited, match="y"):
        run(script.retry(RetryPolicy(deadline_s=30)))
    assert script.waits == [4]


def test_jitter_and_cap() -> None:
    """Jitter shortens, never lengthens; the cap holds; 0 means no cap."""
    policy = RetryPolicy(wait_s=1, factor=10, wait_s_max=20, jitter=0.5)
    assert [policy.pause_s(n, 0.0) for n in (1, 2, 3, 1000)] == [1, 10, 20, 20]
    assert policy.pause_s(2, 1.0) == 5
    assert RetryPolicy(wait_s=1, factor=10, wait_s_max=0).pause_s(4, 0) == 1000


def test_deadline_ends_a_hanging_call() -> None:
    """A call that hangs is ended by the deadline, as an error of ours."""

    async def hangs() -> None:
        await asyncio.sleep(60)

    with pytest.raises(TimedOut):
        run(retry(hangs, RetryPolicy(deadline_s=0.02)))


def test_policies_that_cannot_be() -> None:
    """Nonsense is refused when the policy is made."""
    for bad in (
        {"attempts_max": 0},
        {"factor": 0.5},
        {"jitter": 2},
        {"deadline_s": 0},
        {"wait_s": -1},
        {"attempt_s": 0},
    ):
        with pytest.raises(InvalidArgument):
            RetryPolicy(**bad)  # type: ignore[arg-type]
    for worse in ({"failures_max": 0}, {"failure_rate": 0}, {"failure_rate": 1.1}, {"volume_min": 0}, {"window_s": 0}):
        with pytest.raises(InvalidArgument):
            BreakerPolicy(**worse)  # type: ignore[arg-type]


def test_the_default_is_full_jitter() -> None:
    """From nothing to the whole wait, so that those who failed together do not come back together."""
    policy = RetryPolicy(wait_s=1)
    assert [policy.pause_s(1, draw) for draw in (0.0, 0.5, 1.0)] == [1, 0.5, 0]


def test_an_attempt_that_hangs_is_repeated() -> None:
    """`attempt_s` bounds one attempt, and its end is retryable; a TimeoutError of the call's own is not ours."""
    calls: list[int] = []

    async def hangs_once() -> str:
        calls.append(1)
        if len(calls) == 1:
            await asyncio.Event().wait()
        return "done"

    policy = RetryPolicy(attempt_s=0.02, wait_s=0)
    assert run(retry(hangs_once, policy)) == "done"
    script = Script(TimeoutError("mine"), "never")
    with pytest.raises(TimeoutError, match="mine"):
        run(script.retry(policy))


def test_cancelled_while_it_waits() -> None:
    """The cancellation comes through, not the error of before."""

    async def case() -> None:
        waiting = asyncio.Event()

        async def sleep(seconds: float) -> None:
            waiting.set()
            await asyncio.Event().wait()

        async def fails() -> None:
            raise Unavailable("x")

        task = asyncio.create_task(retry(fails, sleep=sleep))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(case())


# breaker


class Clocked:
    def __init__(self, **policy: Any) -> None:
        self.now = 0.0
        self.changes: list[tuple[str, str]] = []
        self.breaker = Breaker(
            "peer", BreakerPolicy(**policy), clock=lambda: self.now, on_change=lambda a, b: self.changes.append((a, b))
        )

    def call(self, outcome: Any = "ok") -> Any:
        async def function() -> Any:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        return run(self.breaker.call(function))

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            with pytest.raises(Unavailable):
                self.call(Unavailable("x"))


def test_opens_rejects_and_recovers() -> None:
    """Failures in a row open it; it rejects with the time left; a probe that works closes it."""
    c = Clocked(failures_max=3, open_s=10)
    c.fail(2)
    c.call()
    c.fail(3)
    assert c.breaker.state == "open"
    c.now = 4
    with pytest.raises(CircuitOpen) as caught:
        c.call()
    assert caught.value.retry_after_s == 6
    assert not caught.value.retryable
    c.now = 10
    assert c.breaker.state == "half-open"
    assert c.call("yes") == "yes"
    assert c.changes == [("closed", "open"), ("open", "half-open"), ("half-open", "closed")]
    assert c.breaker.counts.rejections == 1


def test_failed_probe_opens_for_longer() -> None:
    """Each failed probe doubles the time up to the cap; recovery resets it."""
    c = Clocked(failures_max=1, open_s=10, factor=2, open_s_max=30)
    c.fail()
    for wait in (10, 20, 30, 30):
        c.now += wait - 1
        assert c.breaker.state == "open"
        c.now += 1
        c.fail()
    c.now += 30
    c.call()
    c.fail()
    c.now += 10
    assert c.breaker.state == "half-open"


def test_cancelled_probe_gives_its_place_back() -> None:
    """A probe that is cancelled leaves the breaker half-open and another probe gets through."""
    c = Clocked(failures_max=1, open_s=1)
    c.fail()
    c.now = 1
    with pytest.raises(asyncio.CancelledError):
        c.call(asyncio.CancelledError())
    assert c.breaker.state == "half-open"
    assert c.call("again") == "again"
    assert c.breaker.state == "closed"


def test_hanging_calls_count() -> None:
    """Calls cancelled by their caller's deadline after `slow_s` are failures."""
    c = Clocked(failures_max=2, slow_s=5)

    async def hangs() -> None:
        c.now += 6
        raise asyncio.CancelledError

    for _ in range(2):
        with pytest.raises(asyncio.CancelledError):
            run(c.breaker.call(hangs))
    assert c.breaker.state == "open"


def test_old_calls_do_not_speak_for_the_new_state() -> None:
    """A call begun before the breaker opened neither closes nor reopens it when it ends."""
    c = Clocked(failures_max=1, open_s=1)

    async def case() -> None:
        gate = asyncio.Event()

        async def slow() -> None:
            await gate.wait()

        old = asyncio.create_task(c.breaker.call(slow))
        await asyncio.sleep(0)

        async def fails() -> None:
            raise Unavailable("x")

        with pytest.raises(Unavailable):
            await c.breaker.call(fails)
        c.now = 1
        assert c.breaker.state == "half-open"
        gate.set()
        await old
        assert c.breaker.state == "half-open"

    run(case())


def test_one_probe_at_a_time() -> None:
    """While a probe runs, others are rejected."""
    c = Clocked(failures_max=1, open_s=1)
    c.fail()
    c.now = 1

    async def case() -> None:
        gate = asyncio.Event()
        probe = asyncio.create_task(c.breaker.call(gate.wait))
        await asyncio.sleep(0)
        with pytest.raises(CircuitOpen):
            await c.breaker.call(gate.wait)
        gate.set()
        await probe

    run(case())
    assert c.breaker.state == "closed"


def test_permanent_errors_show_life() -> None:
    """An error that is the caller's fault does not open the breaker."""
    c = Clocked(failures_max=1)
    for error in (Malformed("x"), EndOfStream("x")):
        with pytest.raises(type(error)):
            c.call(error)
    assert c.breaker.state == "closed"


def test_a_share_of_failures_opens_it() -> None:
    """With enough calls within the window, never two in a row; what is older does not count."""
    c = Clocked(failures_max=100, failure_rate=0.5, window_s=60, volume_min=10)
    for _ in range(4):
        c.call()
        c.fail()
    assert c.breaker.state == "closed", "8 calls are too few to judge"
    c.now += 61
    for _ in range(4):
        c.call()
        c.fail()
    assert c.breaker.state == "closed", "the 8 before are forgotten"
    c.call()
    assert c.breaker.state == "closed", "4 of 9"
    c.fail()
    assert c.breaker.state == "open"
    c.now += 30
    c.call()
    assert c.breaker.state == "closed"
    c.fail()
    assert c.breaker.state == "closed", "a new state begins with an empty window"


def test_a_classifier_that_fails_costs_no_probe() -> None:
    """Its error comes out, the call counts as a failure, and the next probe gets through."""
    c = Clocked(failures_max=1, open_s=1)
    c.fail()
    c.now = 1

    def broken(error: Exception) -> bool:
        raise KeyError("classifier")

    c.breaker._classify = broken
    with pytest.raises(KeyError):
        c.call(Unavailable("x"))
    assert c.breaker.state == "open"
    c.now += 2
    assert c.call("again") == "again"


def test_breakers_as_metrics() -> None:
    """State and calls, by name."""
    c = Clocked(failures_max=1, open_s=1)
    metrics = Metrics()
    watch(metrics, [c.breaker])
    c.call()
    c.fail()
    assert metrics.get("mist_breaker_state", breaker="peer") == 1
    c.now = 1
    assert metrics.get("mist_breaker_state", breaker="peer") == 2
    assert metrics.get("mist_breaker_calls_total", breaker="peer", outcome="failure") == 1
