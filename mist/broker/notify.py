"""Wake waiting coroutines, from any thread and for any event loop, without losing a wake-up.

A waiter reads `generation` before it looks at the state it waits for, then waits for a later generation.
"""

from __future__ import annotations

import asyncio
import threading


class Notifier:
    def __init__(self) -> None:
        self.generation = 0
        self._lock = threading.Lock()
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Start a new generation; every waiter wakes. Callable from any thread."""
        with self._lock:
            self.generation += 1
            waiters, self._waiters = self._waiters, set()
        if not waiters:
            return
        here = asyncio._get_running_loop()
        for waiter in waiters:
            loop = waiter.get_loop()
            if loop is here:
                _settle(waiter)
                continue
            try:
                loop.call_soon_threadsafe(_settle, waiter)
            except RuntimeError:
                continue  # that loop is closed, and its waiter with it

    async def wait(self, generation: int, timeout_s: float | None) -> bool:
        """Wait until the generation differs from `generation`; False when the time ran out first."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if self.generation != generation:
                return True
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiters.add(waiter)
        # not asyncio.wait_for: a follower pays this per wake-up, and this is half of it
        timer = None if timeout_s is None or timeout_s == float("inf") else loop.call_later(timeout_s, _settle, waiter)
        try:
            await waiter
        finally:
            if timer is not None:
                timer.cancel()
            with self._lock:
                self._waiters.discard(waiter)
        return self.generation != generation


def _settle(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
