"""How many requests and tokens a minute, and how many calls at once: of a provider, and of a key.

Promises: over no 60 seconds is more given than the limit (the window moves by seconds, and a second that is partly over
counts whole); what is refused says when to come back; what was taken can be corrected, or given back. Who waits for a slot is
served in the order of asking, and a cancelled wait holds nothing. In memory, of one process: money has a ledger
(budgets.py).
"""

from __future__ import annotations

import asyncio
from collections import deque

from mist.errors import Overloaded

WINDOW_S = 60


class Window:
    """A sliding window. `now` is any clock of seconds that never goes back. A weight above the limit passes when nothing
    else is in the window: it would never pass otherwise."""

    __slots__ = ("_seconds", "_used", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._seconds: deque[list[int]] = deque()
        """[second, taken in it], oldest first."""
        self._used = 0

    def used(self, now: float) -> int:
        oldest = int(now) - WINDOW_S
        while self._seconds and self._seconds[0][0] < oldest:
            self._used -= self._seconds.popleft()[1]
        return self._used

    def fits(self, weight: int, now: float) -> bool:
        used = self.used(now)
        return used + weight <= self.limit or not used

    def wait_s(self, weight: int, now: float) -> float:
        """How long until it fits; 0 = it fits now."""
        if self.fits(weight, now):
            return 0.0
        left = self._used
        for second, taken in self._seconds:
            left -= taken
            if left + weight <= self.limit or not left:
                return second + WINDOW_S + 1 - now
        return float(WINDOW_S + 1)

    def take(self, weight: int, now: float) -> int:
        """Take it, fitting or not; returns the second it was taken in, for `correct`."""
        second = int(now)
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1][1] += weight
        else:
            self._seconds.append([second, weight])
        self._used += weight
        return second

    def correct(self, second: int, change: int) -> None:
        """What was taken in that second was more (or less) by `change`. What has left the window stays as it was."""
        for entry in reversed(self._seconds):
            if entry[0] == second:
                entry[1] += change
                self._used += change
                return
            if entry[0] < second:
                return


class Slots:
    """So many at once; more wait in line."""

    __slots__ = ("_line", "_queue_max", "in_use", "size")

    def __init__(self, size: int, queue_max: int) -> None:
        self.size = size
        self.in_use = 0
        self._queue_max = queue_max
        self._line: deque[asyncio.Future[None]] = deque()

    @property
    def free(self) -> bool:
        return self.in_use < self.size

    @property
    def waiting(self) -> int:
        return len(self._line)

    async def take(self) -> None:
        """Wait for one's turn. Raises Overloaded when too many wait; cancelled, it has taken nothing."""
        if self.in_use < self.size:
            self.in_use += 1
            return
        if len(self._line) >= self._queue_max:
            raise Overloaded(f"{len(self._line)} calls wait for one of {self.size} places", retry_after_s=1.0)
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back()  # it was our turn just now
            elif turn in self._line:  # else it was passed over just now
                self._line.remove(turn)
            raise

    def give_back(self) -> None:
        """A place is free: it goes to whoever waits longest."""
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.in_use -= 1


class Taken:
    """What one call has taken of a Limits: to be settled once."""

    __slots__ = ("requests_at", "tokens", "tokens_at")

    def __init__(self, requests_at: int, tokens_at: int, tokens: int) -> None:
        self.requests_at = requests_at
        self.tokens_at = tokens_at
        self.tokens = tokens


class Limits:
    """Requests and tokens a minute of one provider or key; 0 = no limit."""

    __slots__ = ("requests", "tokens")

    def __init__(self, requests_per_minute: int, tokens_per_minute: int) -> None:
        self.requests = Window(requests_per_minute) if requests_per_minute else None
        self.tokens = Window(tokens_per_minute) if tokens_per_minute else None

    def __bool__(self) -> bool:
        return self.requests is not None or self.tokens is not None

    def wait_s(self, tokens: int, now: float) -> float:
        """How long until a call with so many tokens fits; 0 = it fits now."""
        wait = self.requests.wait_s(1, now) if self.requests is not None else 0.0
        return max(wait, self.tokens.wait_s(tokens, now)) if self.tokens is not None else wait

    def take(self, tokens: int, now: float) -> Taken:
        return Taken(
            self.requests.take(1, now) if self.requests is not None else 0,
            self.tokens.take(tokens, now) if self.tokens is not None else 0, tokens,
        )  # fmt: skip

    def settle(self, taken: Taken, tokens: int | None) -> None:
        """The call had so many tokens; None = nobody said, so the estimate stands."""
        if self.tokens is not None and tokens is not None:
            self.tokens.correct(taken.tokens_at, tokens - taken.tokens)

    def undo(self, taken: Taken) -> None:
        """Nothing was asked after all."""
        if self.requests is not None:
            self.requests.correct(taken.requests_at, -1)
        self.settle(taken, 0)
