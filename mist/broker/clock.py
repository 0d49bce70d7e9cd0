"""Time as a parameter, so that a test can hold or move it."""

from __future__ import annotations

import time


class Clock:
    """Wall time for records, monotonic time for waits within one process."""

    def time_ns(self) -> int:
        return time.time_ns()

    def monotonic(self) -> float:
        return time.monotonic()


SYSTEM = Clock()
