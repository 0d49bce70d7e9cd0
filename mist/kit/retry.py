"""Call again what failed, while that can help.

Promises: only errors whose `retryable` says so are tried again (never a cancellation, never a permanent error); waits
grow, are jittered downwards so that callers spread, stay below `wait_s_max`, and are never shorter than the
`retry_after_s` of the error; all attempts end before `deadline_s`; the error that is raised is the last one. Clock,
sleep and randomness are parameters.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from msgspec import Struct

from mist.errors import InvalidArgument, MistError, TimedOut

T = TypeVar("T")


class RetryPolicy(Struct, frozen=True, kw_only=True):
    """`attempts_max` counts the first call. A wait is drawn from `[(1 - jitter) * w, w]`, with
    `w = min(wait_s * factor ** n, wait_s_max)`; `wait_s_max` 0 = no cap. The default jitter of 1 is full jitter: callers that
    failed together come back apart. `attempt_s` bounds one attempt, `deadline_s` all of them; None = no bound."""

    attempts_max: int = 3
    wait_s: float = 0.1
    factor: float = 2.0
    wait_s_max: float = 5.0
    jitter: float = 1.0
    attempt_s: float | None = None
    deadline_s: float | None = 30.0

    def __post_init__(self) -> None:
        if self.attempts_max < 1 or self.wait_s < 0 or self.factor < 1 or self.wait_s_max < 0:
            raise InvalidArgument(f"retry policy cannot be right: {self}")
        if not 0 <= self.jitter <= 1 or any(s is not None and s <= 0 for s in (self.attempt_s, self.deadline_s)):
            raise InvalidArgument(f"retry policy cannot be right: {self}")

    def pause_s(self, failures: int, draw: float) -> float:
        """The wait after that many failures. `draw` is uniform in 0..1."""
        wait = self.wait_s * self.factor ** min(failures - 1, 64)
        if self.wait_s_max:
            wait = min(wait, self.wait_s_max)
        return wait * (1.0 - self.jitter * draw)


def retryable(error: Exception) -> bool:
    """What the error itself says; an error that is not ours is not known to be safe to repeat."""
    return isinstance(error, MistError) and error.retryable


async def retry(
    call: Callable[[], Awaitable[T]],
    policy: RetryPolicy | None = None,
    *,
    classify: Callable[[Exception], bool] = retryable,
    on_retry: Callable[[Exception, int, float], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    draw: Callable[[], float] = random.random,
) -> T:
    """`await call()`, again while that can help. `on_retry(error, failures, wait_s)` is told before each wait.

    An attempt that outlives `attempt_s` is cancelled and counts as TimedOut, which is retryable. The deadline also bounds
    each attempt: one that outlives it is cancelled and raises TimedOut, or the error of the attempt before where there is one.
    """
    policy = policy or RetryPolicy()
    until = None if policy.deadline_s is None else clock() + policy.deadline_s
    failures = 0
    last: Exception | None = None
    while True:
        left = None if until is None else max(0.0, until - clock())
        final = left is not None and (policy.attempt_s is None or left <= policy.attempt_s)
        limit = asyncio.timeout(left if final else policy.attempt_s)
        try:
            async with limit:
                return await call()
        except TimeoutError as exc:
            error: Exception = exc
            if limit.expired():
                if final:
                    if last is not None:
                        raise last from exc
                    raise TimedOut(f"no answer within {policy.deadline_s} s") from exc
                error = TimedOut(f"no answer within {policy.attempt_s} s")
                error.__cause__ = exc
        except Exception as exc:
            error = exc
        failures += 1
        last = error
        if failures >= policy.attempts_max or not classify(error):
            raise error
        wait = policy.pause_s(failures, draw())
        after = getattr(error, "retry_after_s", None)
        if after is not None:
            wait = max(wait, after)
        if until is not None and clock() + wait >= until:
            raise error
        if on_retry is not None:
            on_retry(error, failures, wait)
        await sleep(wait)
