"""A clock that stands still until a test moves it.

It holds still what a broker *reads* (record times, leases, the dedupe window); it does not shorten real waits: a
`wait_s` still passes in real time, so tests on this clock ask with `wait_s=0` after moving it.
"""

from __future__ import annotations

import threading

from mist.broker.clock import Clock

START_NS = 1_700_000_000_000_000_000


class FakeClock(Clock):
    def __init__(self, start_ns: int = START_NS) -> None:
        self._lock = threading.Lock()
        self._wall_ns = start_ns
        self._monotonic = 1000.0

    def time_ns(self) -> int:
        return self._wall_ns

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let this much time pass on both clocks."""
        if seconds < 0:
            raise ValueError("time passes forward; use jump_wall to set the wall clock back")
        with self._lock:
            self._wall_ns += round(seconds * 1e9)
            self._monotonic += seconds

    def jump_wall(self, seconds: float) -> None:
        """Set the wall clock forward or back, as an operator or NTP does; monotonic time does not notice."""
        with self._lock:
            self._wall_ns += round(seconds * 1e9)
