"""In which order candidates are asked: one function for each strategy, over what is known of them.

priority       as they come
round_robin    in turn: smooth weighted round robin with equal weights
weighted       the same with the providers' weights: over any run, each is first in proportion, and evenly spread
least_latency  of two drawn at random, the one with less to wait: peak EWMA of its latency times the calls under way
cost           cheapest first; whose price is unknown comes last, never first
sticky         rendezvous hashing: one key stays with one candidate; when that is away its keys move, all others stay

Promises: candidates of a lower `priority` come first, whatever the strategy. Nothing is drawn or counted on but through
`draw` and `now`. With `look` nothing is changed: what would be asked can be shown without asking it. An unmeasured
candidate gets no bonus: while others are measured it is asked with `probe_share` of the calls, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TypeVar

from msgspec import Struct

from mist.tools.infermux.naming import Target
from mist.tools.infermux.settings import RoutingSettings, StrategyName


class PeakEwma:
    """An average that follows a rise at once and a fall slowly, by time and not by number of calls."""

    __slots__ = ("at", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.at = -math.inf

    def observe(self, seconds: float, now: float, decay_s: float) -> None:
        if seconds >= self.value:
            self.value = seconds
        else:
            old = math.exp((self.at - now) / decay_s)
            self.value = self.value * old + seconds * (1.0 - old)
        self.at = now


class Candidate:
    """A target, and what is known of how it does: until a whole answer, and until the first piece of a stream."""

    __slots__ = ("first", "in_flight", "target", "turn", "whole")

    def __init__(self, target: Target) -> None:
        self.target = target
        self.in_flight = 0
        self.whole = PeakEwma()
        self.first = PeakEwma()
        self.turn = 0.0
        """Of the smooth round robin."""

    def wait(self, streamed: bool) -> float:
        """What a call more would have to wait for, as far as we know."""
        return (self.first if streamed else self.whole).value * (self.in_flight + 1)

    def measured(self, streamed: bool, now: float, stale_s: float) -> bool:
        return now - (self.first if streamed else self.whole).at <= stale_s


C = TypeVar("C", bound=Candidate)


class Ask(Struct, frozen=True, kw_only=True):
    """What a strategy may know of a question. `cost` is None where the price is unknown."""

    now: float
    streamed: bool = False
    sticky: Callable[[], str] = str
    cost: Callable[[Target], int | None] = lambda target: None


def ordered(
    strategy: StrategyName,
    candidates: Sequence[C],
    ask: Ask,
    policy: RoutingSettings,
    *,
    draw: Callable[[], float],
    look: bool = False,
) -> list[C]:
    """The candidates, who is to be asked first in front. They come sorted by their priority."""
    if len(candidates) < 2 or strategy == "priority":
        return list(candidates)
    out: list[C] = []
    begin = 0
    while begin < len(candidates):
        end = begin + 1
        while end < len(candidates) and candidates[end].target.priority == candidates[begin].target.priority:
            end += 1
        equals = list(candidates[begin:end])
        if len(equals) > 1:
            # who is asked only when the first ones fail must not lose a turn by that
            equals = _among_equals(strategy, equals, ask, policy, draw, look or begin > 0)
        out += equals
        begin = end
    return out


def _among_equals(
    strategy: StrategyName,
    equals: list[C],
    ask: Ask,
    policy: RoutingSettings,
    draw: Callable[[], float],
    look: bool,
) -> list[C]:
    if strategy == "round_robin":
        return _in_turn(equals, [1.0] * len(equals), look)
    if strategy == "weighted":
        return _in_turn(equals, [c.target.weight for c in equals], look)
    if strategy == "least_latency":
        return _least_latency(equals, ask, policy, draw)
    if strategy == "cost":
        return _cheapest(equals, ask)
    key = ask.sticky()
    return sorted(equals, key=lambda c: rendezvous(key, c.target), reverse=True)


def _in_turn(equals: list[C], weights: list[float], look: bool) -> list[C]:
    """nginx's smooth weighted round robin: everybody gains its weight, the first pays what all gained."""
    turns = [c.turn + w for c, w in zip(equals, weights, strict=True)]
    order = sorted(range(len(equals)), key=turns.__getitem__, reverse=True)
    if not look:
        turns[order[0]] -= sum(weights)
        for candidate, turn in zip(equals, turns, strict=True):
            candidate.turn = turn
    return [equals[i] for i in order]


def _least_latency(equals: list[C], ask: Ask, policy: RoutingSettings, draw: Callable[[], float]) -> list[C]:
    known = [c for c in equals if c.measured(ask.streamed, ask.now, policy.latency_stale)]
    unknown = [c for c in equals if not c.measured(ask.streamed, ask.now, policy.latency_stale)]
    unknown.sort(key=lambda c: c.in_flight)
    if not known:
        idle = [c for c in unknown if c.in_flight == unknown[0].in_flight]
        return _in_front(unknown, idle[_index(draw, len(idle))])
    by_wait = sorted(known, key=lambda c: c.wait(ask.streamed))
    if unknown and not unknown[0].in_flight and draw() < policy.probe_share:
        return [unknown[0], *by_wait, *unknown[1:]]
    if len(known) > 2:
        one = _index(draw, len(known))
        two = _index(draw, len(known) - 1)
        two += two >= one
        # by_wait is sorted, so the smaller index is the shorter wait
        by_wait = _in_front(by_wait, by_wait[min(one, two)])
    return by_wait + unknown


def _cheapest(equals: list[C], ask: Ask) -> list[C]:
    costs = {c.target.key: ask.cost(c.target) for c in equals}

    def by_cost(candidate: C) -> tuple[bool, int]:
        cost = costs[candidate.target.key]
        return cost is None, cost or 0

    return sorted(equals, key=by_cost)


def rendezvous(key: str, target: Target) -> float:
    """How much a key is drawn to a target: the highest one has it. In proportion to weights."""
    digest = blake2b(
        f"{key}\0{target.provider}\0{target.model}".encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    share = (int.from_bytes(digest, "big") + 0.5) / 2**64
    return -target.weight / math.log(share)


def _in_front(candidates: list[C], first: C) -> list[C]:
    return [first, *(c for c in candidates if c is not first)]


def _index(draw: Callable[[], float], size: int) -> int:
    return min(int(draw() * size), size - 1)
