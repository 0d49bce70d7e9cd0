"""Pool and rate limiter."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
from conftest import run
from hypothesis import given
from hypothesis import strategies as st

from mist.errors import Internal, InvalidArgument, TimedOut
from mist.kit.parallel import Pool, RateLimiter


class Calls:
    """A function that counts itself. Item n ends in the order of `order`, if there is one."""

    def __init__(self) -> None:
        self.running = self.most = self.started = self.ended = 0

    async def __call__(self, n: int) -> int:
        self.running += 1
        self.started += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(n % 5):
                await asyncio.sleep(0)
            if n < 0:
                raise ValueError(f"item {n}")
            return n * 2
        finally:
            self.running -= 1
            self.ended += 1


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_results_in_order_and_never_more_at_a_time(workers: int) -> None:
    """From an iterable or an async one; an empty one gives nothing."""

    async def numbers() -> AsyncIterator[int]:
        for n in range(100):
            await asyncio.sleep(0)
            yield n

    async def case() -> None:
        calls = Calls()
        assert await Pool(workers).map(calls, range(1000)) == [n * 2 for n in range(1000)]
        assert calls.most == workers
        assert await Pool(workers).map(calls, numbers()) == [n * 2 for n in range(100)]
        assert await Pool(workers).map(calls, []) == []

    run(case())


def test_the_first_error_ends_it() -> None:
    """Nothing new starts, what runs is cancelled and has ended."""

    async def case() -> None:
        calls = Calls()
        with pytest.raises(ValueError, match="item -1"):
            await Pool(4).map(calls, [*range(10), -1, *range(10_000)])
        assert calls.running == 0
        assert calls.started < 40

    run(case())


def test_settle_keeps_every_outcome() -> None:
    """Errors beside values, in order."""

    async def case() -> None:
        outcomes = await Pool(3).settle(Calls(), [1, -2, 3])
        assert [o.value for o in outcomes] == [2, None, 6]
        assert isinstance(outcomes[1].error, ValueError)
        assert outcomes[0].get() == 2
        with pytest.raises(ValueError, match="item -2"):
            outcomes[1].get()

    run(case())


def test_as_they_finish() -> None:
    """A slow item holds nobody up; a reader that leaves ends the rest; one that does not read holds it back."""

    async def case() -> None:
        gate = asyncio.Event()
        started: list[int] = []
        cancelled: list[int] = []

        async def call(n: int) -> int:
            started.append(n)
            try:
                if n == 0:
                    await gate.wait()
            except asyncio.CancelledError:
                cancelled.append(n)
                raise
            return n

        seen: list[int] = []
        async with Pool(2).completed(call, range(1000)) as done:
            for _ in range(50):
                await asyncio.sleep(0)
            assert len(started) <= 5, "nobody reads: it waits"
            async for index, outcome in done:
                assert outcome.get() == index
                seen.append(index)
                if index == 10:
                    break
        assert seen == list(range(1, 11))
        assert cancelled == [0]
        count = len(started)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(started) == count < 20

    run(case())


def test_cancelled_it_starts_nothing_new() -> None:
    """And what ran has ended when the caller goes on."""

    async def case() -> None:
        started: list[int] = []
        ended: list[int] = []

        async def call(n: int) -> None:
            started.append(n)
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append(n)

        task = asyncio.create_task(Pool(3).map(call, range(100)))
        while len(started) < 3:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(started) == sorted(ended) == [0, 1, 2]

    run(case())


def test_a_slow_item_is_timed_out_alone() -> None:
    """The others go on. A call that cancels itself is its own failure, a TimeoutError of its own stays what it is."""

    async def call(n: int) -> int:
        if n == 0:
            await asyncio.Event().wait()
        if n == 1:
            raise asyncio.CancelledError
        if n == 2:
            raise TimeoutError("mine")
        return n

    async def case() -> None:
        outcomes = await Pool(2, timeout_s=0.02).settle(call, range(6))
        assert isinstance(outcomes[0].error, TimedOut)
        assert isinstance(outcomes[1].error, Internal)
        assert isinstance(outcomes[2].error, TimeoutError)
        assert [o.value for o in outcomes[3:]] == [3, 4, 5]

    run(case())


def test_an_iterable_that_fails() -> None:
    """Its error comes through, after what it gave before."""

    def items() -> Any:
        yield 1
        raise KeyError("source")

    async def case() -> None:
        seen: list[int] = []

        async def read() -> None:
            async with Pool(2).completed(Calls(), items()) as done:
                async for index, _ in done:
                    seen.append(index)

        with pytest.raises(KeyError):
            await read()
        assert seen == [0]

    run(case())


def test_pools_that_cannot_be() -> None:
    """No workers, no time."""
    for kw in ({"workers": 0}, {"workers": 1, "timeout_s": 0}):
        with pytest.raises(InvalidArgument):
            Pool(**kw)  # type: ignore[arg-type]


# rate


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.now += seconds

    def limiter(self, rate: float, burst: float | None = None) -> RateLimiter:
        return RateLimiter(rate, burst=burst, clock=lambda: self.now, sleep=self.sleep)


@pytest.mark.parametrize("rate", [0.3, 3, 200, 886, 1000, 12345.678])
def test_the_rate_is_exact(rate: float) -> None:
    """No fraction of a token is lost, however often one looks (the seed gave 886 of 1000)."""

    async def case() -> None:
        time = Time()
        limiter = time.limiter(rate, burst=1)
        for _ in range(1000):
            limiter.try_take(0.999999)
            time.now += 0.1 / rate
        time = Time()
        limiter = time.limiter(rate, burst=1)
        for _ in range(2001):
            await limiter.take()
        assert time.now == pytest.approx(2000 / rate, rel=1e-6)

    run(case())


@given(
    st.floats(0.1, 1000), st.floats(1, 100),
    st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 50)), max_size=60),
)  # fmt: skip
def test_never_more_than_burst_and_rate(rate: float, burst: float, steps: list[tuple[float, float]]) -> None:
    """Over any time: at most `burst + rate * elapsed` without waiting; and what is refused is really not there."""
    time = Time()
    limiter = time.limiter(rate, burst)
    tokens = burst
    for elapsed, weight in steps:
        time.now += elapsed
        tokens = min(burst, tokens + elapsed * rate)
        if limiter.try_take(weight):
            assert min(weight, burst) <= tokens + 1e-6 * burst
            tokens -= weight
        else:
            assert min(weight, burst) > tokens - 1e-6 * burst


def test_who_asked_first_is_served_first() -> None:
    """A heavy one is not overtaken by light ones, nor by somebody who does not wait."""

    async def case() -> None:
        time = Time()
        limiter = time.limiter(10, burst=10)
        assert limiter.try_take(10)
        order: list[str] = []

        async def take(name: str, weight: float) -> None:
            await limiter.take(weight)
            order.append(name)

        tasks = [asyncio.create_task(take(*what)) for what in (("heavy", 10.0), ("light", 1.0), ("last", 1.0))]
        await asyncio.sleep(0)
        assert not limiter.try_take(0.001)
        await asyncio.gather(*tasks)
        assert order == ["heavy", "light", "last"]

    run(case())


def test_cancelled_it_has_taken_nothing() -> None:
    """And the next one is served."""

    async def case() -> None:
        time = Time()
        limiter = time.limiter(1, burst=5)
        assert limiter.try_take(5)
        forever = asyncio.Event()
        limiter._sleep = lambda seconds: forever.wait()
        task = asyncio.create_task(limiter.take(5))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        time.now += 5
        assert limiter.try_take(5)

    run(case())


def test_a_weight_above_the_burst_is_owed() -> None:
    """It goes when the bucket is full, the next one waits for all of it."""

    async def case() -> None:
        time = Time()
        limiter = time.limiter(10, burst=1)
        await limiter.take(100)
        assert time.now == 0
        await limiter.take(1)
        assert time.now == pytest.approx(10)
        for rate, burst in ((0, 1), (-1, 1), (1, 0), (math.nan, 1)):
            with pytest.raises(InvalidArgument):
                RateLimiter(rate, burst=burst)
        for weight in (-1, math.inf, math.nan):
            with pytest.raises(InvalidArgument):
                limiter.try_take(weight)
        free = RateLimiter(math.inf)
        await free.take(1e12)
        assert free.try_take(1e12)

    run(case())
