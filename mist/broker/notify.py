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
        for waiter in waiters:
            try:
                waiter.get_loop().call_soon_threadsafe(_settle, waiter)
            except RuntimeError:
                continue  # that loop is closed, and its waiter with it

    async def wait(self, generation: int, timeout_s: float | None) -> bool:
        """Wait until the generation differs from `generation`; False when the time ran out first."""
        with self._lock:
            if self.generation != generation:
                return True
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
        try:
            # not wait_for: before Python 3.12 it swallows a cancellation that comes together with the result
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            return False
        finally:
            with self._lock:
                self._waiters.discard(waiter)
        return True


def _settle(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
