"""One coroutine to its end, with the rules of a service for signals and time: exit codes 130 and 143.

The first SIGINT or SIGTERM cancels the work, which flushes what it has; a second one does not wait. `Interrupted` carries
the signal: the process is to end with 128 + its number, 130 or 143. `drained` turns the cancellation into an event, for
work that puts its things in order by itself.

Handlers are plain `signal.signal` ones, because the loop's own run only between callbacks and not inside a blocked write.
Such a handler runs when the interpreter gets to it: a loop that is just falling asleep, or a signal that another thread is
given, would leave it waiting for the next event, perhaps for ever. So a signal also writes a byte that wakes the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TypeVar

from mist.errors import TimedOut

T = TypeVar("T")

AGAIN_S = 0.5
"""A repeat within this time is the same wish: `timeout` and some supervisors signal the process and then its group."""


class Interrupted(Exception):
    """A signal asked the command to stop; it has flushed what it had."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


def run(
    work: Callable[[], Coroutine[Any, Any, Any]],
    *,
    timeout_s: float | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> Any:
    """Run a coroutine to its end with our signal rules. Raises Interrupted, TimedOut, or what the coroutine raises.

    `loop_factory` makes the event loop: `uvloop.new_event_loop`, for one.
    """
    caught: list[int] = []
    first: list[float] = []

    async def body() -> Any:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()

        def stop(number: int, frame: FrameType | None) -> None:
            if caught:
                if time.monotonic() - first[0] > AGAIN_S:
                    raise KeyboardInterrupt
                return
            caught.append(number)
            first.append(time.monotonic())
            loop.call_soon_threadsafe(task.cancel)  # type: ignore[union-attr]

        with _handled(stop, loop):
            try:
                async with asyncio.timeout(timeout_s) as limit:
                    return await work()
            except TimeoutError as exc:
                if not limit.expired():
                    raise
                raise TimedOut(f"not done after {timeout_s:g} s", hint="give it more with --timeout") from exc

    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(body())
    except asyncio.CancelledError:
        if caught:
            raise Interrupted(caught[0]) from None
        raise
    except KeyboardInterrupt:
        if caught:
            os._exit(128 + caught[0])  # asked twice: a blocked write must not hold us
        raise
    except BaseExceptionGroup as group:
        raise _only(group) from group


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's event loop for `run`, where it is installed (the extra `fast`)."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def drained(work: Callable[[asyncio.Event], Coroutine[Any, Any, T]]) -> T:
    """Run `work(stop)`; a cancellation (a signal, a timeout) sets `stop` and waits until the work has put its things
    in order, then goes on."""
    stop = asyncio.Event()
    task = asyncio.create_task(work(stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await task
        raise


@contextlib.contextmanager
def _handled(stop: Callable[[int, FrameType | None], None], loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """`stop` handles SIGINT and SIGTERM, and the loop is awake to see what it did. Elsewhere than in the main thread, where
    handlers cannot be set, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waking, bell = socket.socketpair()
    with waking, bell:
        waking.setblocking(False)
        bell.setblocking(False)
        loop.add_reader(waking, waking.recv, 4096)
        wakeup = signal.set_wakeup_fd(bell.fileno(), warn_on_full_buffer=False)
        before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            loop.remove_reader(waking)


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first leaf of a task group's failure: the others are its consequences."""
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
