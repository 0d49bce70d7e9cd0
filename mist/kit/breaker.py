"""A circuit breaker: stop calling what does not work, ask carefully whether it works again.

closed -> open after `failures_max` failures in a row, or when of at least `volume_min` calls within `window_s` the share
`failure_rate` failed; open -> half-open after `open_s`; half-open lets `probes_max` calls through at a time: one success
closes, one failure opens again, each time for `factor` times as long up to `open_s_max`.

Promises: a call that is cancelled gives its probe back (it counts for nothing, unless it had already taken `slow_s`:
then something hangs, and it is a failure); a call that began before the state changed does not speak for the new
state; rejected calls raise CircuitOpen with `retry_after_s`. An error that shows the other side at work (an envelope
it refuses) is not a failure.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from msgspec import Struct

from mist.errors import CircuitOpen, Closed, EndOfStream, InvalidArgument, MistError

if TYPE_CHECKING:  # settings name a policy, and every command reads settings: they need no HTTP server for that
    from mist.kit.metrics import Metrics

T = TypeVar("T")
State = Literal["closed", "open", "half-open"]
STATES: tuple[State, ...] = ("closed", "open", "half-open")
SLICES = 10
"""Of the window: what leaves it leaves in tenths."""


class BreakerPolicy(Struct, frozen=True, kw_only=True):
    failures_max: int = 5
    open_s: float = 30.0
    factor: float = 2.0
    open_s_max: float = 300.0
    probes_max: int = 1
    slow_s: float = 10.0
    failure_rate: float | None = None
    window_s: float = 60.0
    volume_min: int = 20

    def __post_init__(self) -> None:
        if self.failures_max < 1 or self.probes_max < 1 or self.open_s <= 0 or self.factor < 1 or self.slow_s <= 0:
            raise InvalidArgument(f"breaker policy cannot be right: {self}")
        if self.window_s <= 0 or self.volume_min < 1 or not (self.failure_rate is None or 0 < self.failure_rate <= 1):
            raise InvalidArgument(f"breaker policy cannot be right: {self}")


class BreakerCounts(Struct, frozen=True):
    successes: int
    failures: int
    rejections: int
    opened: int


def is_failure(error: Exception) -> bool:
    """Whether an error says that the other side does not work: retryable ones of ours, and every foreign one."""
    if isinstance(error, EndOfStream | Closed | CircuitOpen):
        return False
    return error.retryable if isinstance(error, MistError) else True


class Breaker:
    def __init__(
        self,
        name: str,
        policy: BreakerPolicy | None = None,
        *,
        classify: Callable[[Exception], bool] = is_failure,
        on_change: Callable[[State, State], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._policy = policy or BreakerPolicy()
        self._classify = classify
        self._on_change = on_change
        self._clock = clock
        self._state: State = "closed"
        self._generation = 0
        self._streak = 0
        self._probes = 0
        self._open_until = 0.0
        self._open_s = self._policy.open_s
        self._window: deque[list[float]] = deque()
        """Slices of the last `window_s`: [number of the slice, calls, failures]."""
        self._successes = self._failures = self._rejections = self._opened = 0

    @property
    def state(self) -> State:
        """As it is now: an open breaker whose time is over is half-open."""
        if self._state == "open" and self._clock() >= self._open_until:
            self._change("half-open")
        return self._state

    @property
    def counts(self) -> BreakerCounts:
        return BreakerCounts(self._successes, self._failures, self._rejections, self._opened)

    async def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """`await function()`, if the breaker lets it through. Raises CircuitOpen otherwise."""
        generation = self.enter()
        began = self._clock()
        try:
            result = await function()
        except Exception as exc:
            failed = True
            try:
                failed = self._classify(exc)
            finally:  # also when the caller's classifier fails: a probe is always given back
                self.leave(generation, not failed)
            raise
        except BaseException:
            slow = self._clock() - began >= self._policy.slow_s
            self.leave(generation, False if slow else None)
            raise
        self.leave(generation, True)
        return result

    @property
    def retry_after_s(self) -> float:
        """How long it stays open; 0 when it is not."""
        return max(0.0, self._open_until - self._clock()) if self.state == "open" else 0.0

    @property
    def admits(self) -> bool:
        """Whether `enter` would let a call through now."""
        state = self.state
        return state == "closed" or (state == "half-open" and self._probes < self._policy.probes_max)

    def enter(self) -> int:
        """Begin what is not one awaitable, a stream for example. Raises CircuitOpen. What it returns is to be given to
        `leave`, once, whatever happens."""
        state = self.state
        if state == "open":
            self._reject(max(0.0, self._open_until - self._clock()))
        if state == "half-open":
            if self._probes >= self._policy.probes_max:
                self._reject(min(1.0, self._policy.open_s))
            self._probes += 1
        return self._generation

    def trip(self, *, until_reset: bool = False) -> None:
        """Open now, however few calls failed: for a fault that somebody has to look at, or by hand."""
        self._open()
        if until_reset:
            self._open_until = math.inf

    def reset(self) -> None:
        """Close, and forget what failed."""
        self._open_s = self._policy.open_s
        self._change("closed")

    def _reject(self, retry_after_s: float) -> None:
        self._rejections += 1
        if retry_after_s == math.inf:
            raise CircuitOpen(f"{self.name}: the circuit was opened by hand", hint="it is open until it is reset")
        raise CircuitOpen(
            f"{self.name}: the circuit is open, too many calls failed", retry_after_s=retry_after_s,
            hint=f"it is tried again in {retry_after_s:.1f} s",
        )  # fmt: skip

    def leave(self, entered: int, worked: bool | None) -> None:
        """Take the outcome of what began with `enter` in; None = it says nothing."""
        if worked is not None:
            self._successes += worked
            self._failures += not worked
        if entered != self._generation:
            return  # it began in another state
        if self._state == "half-open":
            self._probes -= 1
            if worked is True:
                self._open_s = self._policy.open_s
                self._change("closed")
            elif worked is False:
                self._open_s = min(self._open_s * self._policy.factor, self._policy.open_s_max)
                self._open()
        elif worked is not None:
            self._streak = 0 if worked else self._streak + 1
            if self._streak >= self._policy.failures_max or self._too_many_fail(worked):
                self._open()

    def _too_many_fail(self, worked: bool) -> bool:
        """Take a call into the window, if there is one; whether its share of failures is reached."""
        policy = self._policy
        if policy.failure_rate is None:
            return False
        now = self._clock() * SLICES / policy.window_s // 1
        if not self._window or self._window[-1][0] != now:
            self._window.append([now, 0, 0])
        self._window[-1][1] += 1
        self._window[-1][2] += not worked
        while self._window[0][0] <= now - SLICES:
            self._window.popleft()
        calls = sum(entry[1] for entry in self._window)
        failures = sum(entry[2] for entry in self._window)
        return calls >= policy.volume_min and failures >= policy.failure_rate * calls

    def _open(self) -> None:
        self._opened += 1
        self._open_until = self._clock() + self._open_s
        self._change("open")

    def _change(self, state: State) -> None:
        before, self._state = self._state, state
        self._generation += 1
        self._streak = self._probes = 0
        self._window.clear()
        if self._on_change is not None:
            self._on_change(before, state)


def watch(metrics: Metrics, breakers: Sequence[Breaker]) -> None:
    """Show breakers as metrics: `mist_breaker_state` (0 closed, 1 open, 2 half-open), `mist_breaker_calls_total`."""

    def states() -> dict[tuple[str, ...], float]:
        return {(breaker.name,): STATES.index(breaker.state) for breaker in breakers}

    def calls() -> dict[tuple[str, ...], float]:
        return {
            (breaker.name, outcome): number
            for breaker in breakers
            for outcome, number in (
                ("success", breaker.counts.successes),
                ("failure", breaker.counts.failures),
                ("rejected", breaker.counts.rejections),
            )
        }

    metrics.watch("mist_breaker_state", "0 closed, 1 open, 2 half-open.", states, labels=("breaker",))
    metrics.watch(
        "mist_breaker_calls_total", "Calls by what became of them.", calls, labels=("breaker", "outcome"), kind="counter"
    )  # fmt: skip
