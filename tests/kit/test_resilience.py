"""Retry and breaker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import run

from mist.errors import CircuitOpen, EndOfStream, InvalidArgument, Malformed, RateLimited, TimedOut, Unavailable
from mist.kit.breaker import Breaker, BreakerPolicy
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
    for bad in ({"attempts_max": 0}, {"factor": 0.5}, {"jitter": 2}, {"deadline_s": 0}, {"wait_s": -1}):
        with pytest.raises(InvalidArgument):
            RetryPolicy(**bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        BreakerPolicy(failures_max=0)


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
