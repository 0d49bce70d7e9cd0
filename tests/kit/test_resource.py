"""Limiter against a model, and what the process says of itself."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

from mist.errors import InvalidArgument, Overloaded
from mist.kit.metrics import Metrics
from mist.kit.resource import Limiter, snapshot, watch


def test_over_release_is_an_error_and_changes_nothing() -> None:
    """The seed's went to -1 and then blocked for ever, or gave out more than there was."""
    limiter = Limiter("slots", 2)
    with pytest.raises(InvalidArgument):
        limiter.release()
    assert limiter.try_acquire(2)
    with pytest.raises(InvalidArgument):
        limiter.release(3)
    limiter.release(2)
    assert (limiter.active, limiter.available, limiter.total) == (0, 2, 1)
    with pytest.raises(InvalidArgument):
        limiter.try_acquire(3)
    with pytest.raises(InvalidArgument):
        Limiter("none", 0)


def test_a_large_request_is_not_starved() -> None:
    """It waits for its turn, and smaller ones behind it wait too; exactly as many are out as fit."""

    async def case() -> None:
        limiter = Limiter("bytes", 10)
        await limiter.acquire(6)
        order: list[str] = []

        async def hold(name: str, weight: int) -> None:
            async with limiter.hold(weight):
                order.append(name)

        tasks = [asyncio.create_task(hold("large", 10)), asyncio.create_task(hold("small", 1))]
        await asyncio.sleep(0)
        assert limiter.waiting == 2
        assert not limiter.try_acquire(1), "there is room, but others came first"
        limiter.release(6)
        await asyncio.gather(*tasks)
        assert order == ["large", "small"]
        assert (limiter.active, limiter.waiting) == (0, 0)

    run(case())


def test_waiting_is_bounded_and_cancelling_takes_nothing() -> None:
    """Overloaded after `wait_s`; when the one in front gives up, those behind it that fit are served."""

    async def case() -> None:
        limiter = Limiter("slots", 4)
        await limiter.acquire(2)
        with pytest.raises(Overloaded, match="slots"):
            await limiter.acquire(3, wait_s=0.01)
        assert (limiter.active, limiter.waiting) == (2, 0)
        large = asyncio.create_task(limiter.acquire(4))
        small = asyncio.create_task(limiter.acquire(1))
        await asyncio.sleep(0)
        large.cancel()
        await small
        assert (limiter.active, limiter.waiting) == (3, 0)
        # given and cancelled in the same moment
        last = asyncio.create_task(limiter.acquire(4))
        await asyncio.sleep(0)
        limiter.release(3)
        last.cancel()
        with pytest.raises(asyncio.CancelledError):
            await last
        assert limiter.active == 0

    run(case())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.integers(0, 3)), max_size=30))
def test_never_more_than_there_is(plan: list[tuple[int, bool, int]]) -> None:
    """Holders that come, wait, are cancelled and leave in any order: the sum is right, and zero at the end."""

    async def case() -> None:
        limiter = Limiter("x", 5)
        out = 0

        async def holder(weight: int, steps: int) -> None:
            nonlocal out
            async with limiter.hold(weight):
                out += weight
                assert out <= 5
                assert out <= limiter.active
                try:
                    for _ in range(steps):
                        await asyncio.sleep(0)
                finally:
                    out -= weight

        tasks: list[asyncio.Task[Any]] = []
        for weight, cancel, steps in plan:
            tasks.append(asyncio.create_task(holder(weight, steps)))
            if steps % 2:
                await asyncio.sleep(0)
            if cancel:
                tasks[len(tasks) // 2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [t for t in tasks if not t.cancelled() and t.exception()] == []
        assert (limiter.active, limiter.waiting, out) == (0, 0, 0)

    run(case())


def test_the_process_is_seen() -> None:
    """Memory, descriptors, tasks; as metrics too, with the limiters."""

    async def case() -> None:
        before = snapshot()
        assert before.rss_bytes
        assert before.rss_bytes > 1_000_000
        assert before.cpus >= 1
        assert before.open_fds is not None
        read, write = os.pipe()
        after = snapshot()
        os.close(read)
        os.close(write)
        assert after.open_fds == before.open_fds + 2
        assert after.tasks >= 1
        metrics = Metrics()
        limiter = Limiter("inbox", 3)
        limiter.try_acquire(2)
        watch(metrics, [limiter])
        assert metrics.get("process_resident_memory_bytes") > 1_000_000
        assert metrics.get("mist_tasks") >= 1
        assert metrics.get("mist_resource_active", resource="inbox") == 2
        with pytest.raises(InvalidArgument):
            watch(Metrics(), [Limiter("same", 1), Limiter("same", 1)])

    run(case())
    assert snapshot().tasks == 0
