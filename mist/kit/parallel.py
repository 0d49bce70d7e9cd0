"""Many calls, a few at a time; and not too many a second.

    infos = await Pool(8).map(info, names)                      # in order, the first error ends it
    async with Pool(8, timeout_s=5).completed(info, names) as done:
        async for index, outcome in done: ...                   # as they finish

Promises of a `Pool`: never more than `workers` calls at a time; items are taken one by one, from any iterable or async
iterable, only when a worker is free and the reader keeps up; leaving early (an error, a cancellation, `break`) starts
nothing new, cancels what runs and waits until it has ended; an item that takes longer than `timeout_s` is TimedOut and the
others go on. A `RateLimiter` is fair (who asked first is served first) and exact: over any time it gives `rate` a second
and at most `burst` at once, no fraction is lost. Clock and sleep are parameters. Does not: work across processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from mist.errors import Internal, InvalidArgument, TimedOut

T = TypeVar("T")
R = TypeVar("R")


class Outcome(NamedTuple, Generic[R]):
    """What became of one item: `value`, or `error`."""

    value: R | None
    error: Exception | None = None

    def get(self) -> R:
        """The value. Raises the error."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class _Ended(NamedTuple):
    """The last thing a reader sees: there is no more, or the iterable itself failed."""

    error: Exception | None


class Pool:
    """A limit, not a thing that runs: it may be used again, and by several at once (each has its own `workers`)."""

    def __init__(self, workers: int, *, timeout_s: float | None = None) -> None:
        if workers < 1 or (timeout_s is not None and timeout_s <= 0):
            raise InvalidArgument(f"a pool of {workers} workers with {timeout_s} s for an item cannot be")
        self._workers = workers
        self._timeout_s = timeout_s

    async def map(self, function: Callable[[T], Awaitable[R]], items: Iterable[T] | AsyncIterable[T]) -> list[R]:
        """The results in the order of the items. Raises the first error there is; what then runs is cancelled."""
        found: dict[int, R] = {}
        async with self.completed(function, items) as done:
            async for index, outcome in done:
                found[index] = outcome.get()
        return [found[index] for index in range(len(found))]

    async def settle(
        self, function: Callable[[T], Awaitable[R]], items: Iterable[T] | AsyncIterable[T]
    ) -> list[Outcome[R]]:
        """An outcome for each item, in order, whatever happens to the others."""
        async with self.completed(function, items) as done:
            found = {index: outcome async for index, outcome in done}
        return [found[index] for index in range(len(found))]

    @contextlib.asynccontextmanager
    async def completed(
        self, function: Callable[[T], Awaitable[R]], items: Iterable[T] | AsyncIterable[T]
    ) -> AsyncIterator[AsyncIterator[tuple[int, Outcome[R]]]]:
        """The number of each item and its outcome, as they finish."""
        results: asyncio.Queue[tuple[int, Outcome[R]] | _Ended] = asyncio.Queue(self._workers)
        running = asyncio.create_task(self._run(function, items, results))

        async def read() -> AsyncGenerator[tuple[int, Outcome[R]], None]:
            while True:
                found = await results.get()
                if isinstance(found, _Ended):
                    if found.error is not None:
                        raise found.error
                    return
                yield found

        reader = read()
        try:
            yield reader
        finally:
            running.cancel()
            await asyncio.wait({running})
            await reader.aclose()

    async def _run(
        self,
        function: Callable[[T], Awaitable[R]],
        items: Iterable[T] | AsyncIterable[T],
        results: asyncio.Queue[tuple[int, Outcome[R]] | _Ended],
    ) -> None:
        source = items if isinstance(items, AsyncIterable) else _asynchronous(items)
        iterator = aiter(source)
        taking = asyncio.Lock()
        count = 0
        failed: Exception | None = None

        async def worker() -> None:
            nonlocal count, failed
            while failed is None:
                async with taking:  # an async generator takes one question at a time
                    try:
                        item = await anext(iterator)
                    except StopAsyncIteration:
                        return
                    except Exception as exc:
                        failed = exc
                        return
                    index = count
                    count += 1
                await results.put((index, await self._one(function, item)))

        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(worker())
        await results.put(_Ended(failed))

    async def _one(self, function: Callable[[T], Awaitable[R]], item: T) -> Outcome[R]:
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                return Outcome(await function(item))
        except Exception as exc:
            if isinstance(exc, TimeoutError) and limit.expired():
                late = TimedOut(f"not done within {self._timeout_s:g} s")
                late.__cause__ = exc
                return Outcome(None, late)
            return Outcome(None, exc)
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # nobody cancelled us: something inside did that to itself, which is its failure and not the pool's end
            cancelled = Internal("it was cancelled from inside")
            cancelled.__cause__ = exc
            return Outcome(None, cancelled)


async def _asynchronous(items: Iterable[T]) -> AsyncIterator[T]:
    found: Iterator[T] = iter(items)
    for item in found:
        yield item


class RateLimiter:
    """A token bucket that starts full. `rate` tokens come each second (`math.inf` = no limit), at most `burst` are kept.

    A weight above `burst` is taken when the bucket is full and owed by those who come later, so that the rate holds.
    """

    def __init__(
        self,
        rate: float,
        *,
        burst: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        burst = max(1.0, rate) if burst is None else burst
        if not rate > 0 or not burst > 0:
            raise InvalidArgument(f"a rate of {rate} a second with a burst of {burst} cannot be")
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._sleep = sleep
        self._tokens = burst
        self._at = clock()
        self._turn = asyncio.Lock()
        """Held by who is first in the queue; asyncio's lock serves in the order of asking."""

    def try_take(self, weight: float = 1.0) -> bool:
        """Take without waiting; False when there is not enough, or somebody waits already."""
        self._check(weight)
        if self._turn.locked() or self._missing(weight) > 0:
            return False
        self._tokens -= weight
        return True

    async def take(self, weight: float = 1.0) -> None:
        """Wait for one's turn and for the tokens. Cancelled, it has taken nothing."""
        self._check(weight)
        async with self._turn:
            while (missing := self._missing(weight)) > 0:
                await self._sleep(missing / self._rate)
            self._tokens -= weight

    def _check(self, weight: float) -> None:
        if not 0 <= weight < math.inf:
            raise InvalidArgument(f"a weight of {weight} cannot be")

    def _missing(self, weight: float) -> float:
        """How many tokens are missing now; 0 or less = none. Rounding of a float is no token."""
        if self._rate == math.inf:
            return 0.0
        now = self._clock()
        # the bucket is counted forward from the last look, so no part of a token is ever rounded away
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        missing = min(weight, self._burst) - self._tokens
        return missing if missing > 1e-9 * self._burst else 0.0
