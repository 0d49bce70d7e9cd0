"""How long to wait before the next try: doubling, capped, with full jitter.

Full jitter (anywhere between nothing and the ceiling) spreads a crowd that failed at the same moment; a fixed delay
would bring it back at the same moment too. A value, no loop: who retries what, and how often, is the caller's.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from msgspec import Struct


class Backoff(Struct, frozen=True, kw_only=True):
    """The ceiling starts at `first_s` and doubles with every attempt, up to `most_s`."""

    first_s: float = 0.05
    most_s: float = 2.0

    def ceiling_s(self, attempt: int) -> float:
        """The longest wait after this attempt (1 = the first one)."""
        return min(self.most_s, self.first_s * 2.0 ** min(attempt - 1, 60))

    def delay_s(self, attempt: int, rand: Callable[[], float] = random.random) -> float:
        return self.ceiling_s(attempt) * rand()
