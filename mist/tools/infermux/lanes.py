"""What the router keeps of each provider and each model at a provider, and why one of them may not be asked now.

Promises: whatever a call takes (a place in flight, a slot, a breaker's probe, a part of the rates) is in one `Trial` and given
back by its `end`, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from msgspec import Struct

from mist.kit.breaker import Breaker, BreakerPolicy, State
from mist.tools.infermux.limits import Limits, Slots, Taken
from mist.tools.infermux.naming import Target
from mist.tools.infermux.providers.base import Provider
from mist.tools.infermux.routing import Candidate
from mist.tools.infermux.settings import ProviderSettings

SHARE_MIN = 0.05
"""Of its calls, at the beginning of the slow start."""
COOL_S_MAX = 3600.0
"""Nobody is left alone for longer, whatever it asks for."""


class Obstacle(Struct, frozen=True):
    """Why a candidate is not asked. `wait_s`: in so long it may be, infinity = waiting does not help."""

    kind: Literal["open", "sick", "cooling", "rate_limit", "unsupported", "context_window", "unpriced", "busy"]
    reason: str
    wait_s: float = math.inf


class Side:
    """One provider: its adapter, and what all its models share."""

    __slots__ = ("adapter", "in_flight", "limits", "settings", "sick", "slots", "timeout_s")

    def __init__(self, settings: ProviderSettings, adapter: Provider, queue_max: int) -> None:
        self.settings = settings
        self.adapter = adapter
        self.timeout_s = float(settings.timeout)
        self.in_flight = 0
        self.sick = ""
        """Why its health probe (probes.py) says that it is not to be asked."""
        limits = Limits(settings.requests_per_minute, settings.tokens_per_minute)
        self.limits = limits if limits else None
        self.slots = Slots(settings.concurrency_max, queue_max) if settings.concurrency_max else None


class Lane(Candidate):
    """A model at a provider."""

    __slots__ = ("breaker", "cool_until", "name", "recovered_at", "side")

    def __init__(self, target: Target, side: Side, policy: BreakerPolicy, clock: Callable[[], float]) -> None:
        super().__init__(target)
        self.side = side
        self.name = target.name
        self.cool_until = -math.inf
        self.recovered_at = -math.inf

        def changed(before: State, after: State) -> None:
            if after == "closed":
                self.recovered_at = clock()

        self.breaker = Breaker(target.name, policy, on_change=changed, clock=clock)

    def share(self, now: float, slow_start_s: float) -> float:
        """Of the calls that would be its own: less than 1 for a while after it was open."""
        since = now - self.recovered_at
        return max(SHARE_MIN, since / slow_start_s) if since < slow_start_s else 1.0

    def cool(self, seconds: float, now: float) -> None:
        """It asked to be left alone."""
        self.cool_until = max(self.cool_until, now + min(seconds, COOL_S_MAX))

    @property
    def idle(self) -> bool:
        """Nothing is lost when it is forgotten."""
        return not self.in_flight and self.breaker.state == "closed"


class Trial:
    """One attempt under way. Made when everything that has to be waited for is there."""

    __slots__ = ("_entered", "_lane", "_slot", "_taken", "began")

    def __init__(self, lane: Lane, *, slot: bool, tokens: int, now: float) -> None:
        """Raises CircuitOpen; nothing is taken then but the slot, which stays the caller's."""
        self._entered = lane.breaker.enter()
        side = lane.side
        self._lane = lane
        self._taken: Taken | None = side.limits.take(tokens, now) if side.limits is not None else None
        self._slot = slot
        self.began = now
        lane.in_flight += 1
        side.in_flight += 1

    def end(self, worked: bool | None, *, opens: bool = False, tokens: int | None = None) -> None:
        """Give everything back. `worked` None says nothing about the provider; `tokens` is what the call had."""
        lane = self._lane
        side = lane.side
        lane.in_flight -= 1
        side.in_flight -= 1
        if self._slot and side.slots is not None:
            side.slots.give_back()
        if self._taken is not None and side.limits is not None:
            side.limits.settle(self._taken, tokens)
        lane.breaker.leave(self._entered, worked)
        if opens and lane.breaker.state != "open":
            lane.breaker.trip()
