"""The notifier: a cancellation is never lost, whatever else happens in the same turn."""

from __future__ import annotations

import asyncio

import pytest
from conftest import run

from mist.broker.notify import Notifier


def test_a_cancellation_in_the_turn_of_the_notification_is_kept() -> None:
    """A reader that is cancelled and woken at once ends; swallowing it left workers that could not be stopped."""

    async def case() -> None:
        notifier = Notifier()
        task = asyncio.create_task(notifier.wait(notifier.generation, 20.0))
        await asyncio.sleep(0)
        notifier.notify()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(case())


def test_waiting_has_a_timeout_and_sees_a_generation_that_has_passed() -> None:
    """False when the time ran out, True at once when the state changed before the wait began."""

    async def case() -> None:
        notifier = Notifier()
        assert not await notifier.wait(notifier.generation, 0.001)
        before = notifier.generation
        notifier.notify()
        assert await notifier.wait(before, None)

    run(case())
