"""The signal rules of one command: heard at any instant, and everything put back."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import pytest

from mist.errors import TimedOut
from mist.kit.signals import Interrupted, run


@pytest.mark.timeout(20)
def test_a_signal_that_another_thread_is_given_wakes_a_sleeping_loop() -> None:
    """The same as one that comes just before the loop falls asleep: no system call of the main thread is interrupted."""

    def give() -> None:
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        time.sleep(0.2)

    async def sleep_for_ever() -> None:
        giver = threading.Thread(target=give)
        giver.start()
        try:
            await asyncio.Event().wait()
        finally:
            giver.join()

    with pytest.raises(Interrupted) as caught:
        run(sleep_for_ever)
    assert caught.value.number == signal.SIGTERM


def test_handlers_and_the_wakeup_are_as_before() -> None:
    """Also when the work fails or takes too long."""

    async def fail() -> None:
        raise ValueError("no")

    async def sleep() -> None:
        await asyncio.sleep(60)

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="no"):
        run(fail)
    with pytest.raises(TimedOut):
        run(sleep, timeout_s=0.01)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_elsewhere_than_in_the_main_thread_it_runs_without_handlers() -> None:
    """Where none can be set."""
    found: list[int] = []

    async def work() -> int:
        return 7

    thread = threading.Thread(target=lambda: found.append(run(work)))
    thread.start()
    thread.join()
    assert found == [7]
