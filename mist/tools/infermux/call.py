"""One call on its way: who is asked, what a failure leads to, what is reserved and paid. The one place that asks again.

After a failure (failures.py): `invalid` and `content_policy` end the call. `context_window` goes on with candidates that are
known to have more room. What may get better at the same candidate is asked there again, up to `retries` times, with full
jitter and no sooner than its Retry-After; whoever wants more than `retry_wait_max` is left for the next candidate. When all
have been asked and some of them only want to be left alone for a while that fits the deadline, they are waited for, once more in
order. Everything ends before the deadline and after `attempts_max` attempts; what is raised is the last failure, with all
attempts in its `meta`.

Money: a reservation stands behind every attempt that may cost something. A provider that refused with a status, or was not
reached, costs nothing and the next attempt takes the reservation over. One that timed out, was cancelled or broke off may cost
something: its attempt is settled with the most it can have cost, and the next one needs a reservation of its own.

Promises: whatever ends a call, a cancellation in any await included, everything that it took is given back: probes, places in flight,
slots, rates, reservations. A failure after the first piece of a stream is never answered by asking again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mist.errors import CircuitOpen, MistError, Overloaded, RateLimited, Refused, Unavailable
from mist.kit.prices import Price
from mist.tools.infermux.books import Entry, Reservation, applies
from mist.tools.infermux.chat import ChatRequest, Usage
from mist.tools.infermux.costs import Size, to_nano, tokens_of
from mist.tools.infermux.failures import COUNTED, FALLS_BACK, OPENS, RETRIED, Kind, ProviderError
from mist.tools.infermux.keys import KeyRules
from mist.tools.infermux.lanes import Lane, Obstacle, Trial
from mist.tools.infermux.limits import Taken
from mist.tools.infermux.naming import Stage, Target
from mist.tools.infermux.routed import CANCELLED, Attempt
from mist.tools.infermux.routing import Ask, ordered
from mist.tools.infermux.settings import BudgetSettings, Capability

if TYPE_CHECKING:
    from mist.tools.infermux.router import Route, Router

T = TypeVar("T")
PERHAPS_BILLED: frozenset[str] = frozenset({"timeout", "bad_answer", CANCELLED})
"""Failures of which nobody knows whether the provider did the work."""
_NOBODY = Usage()


class Won(Generic[T]):
    """An attempt that was answered, still open: for `Call.answered`, or `Call.broken` when a stream breaks off."""

    __slots__ = ("lane", "reservation", "trial", "value")

    def __init__(self, lane: Lane, trial: Trial, reservation: Reservation | None, value: T) -> None:
        self.lane = lane
        self.trial = trial
        self.reservation = reservation
        self.value = value


class Call:
    """For `drive`, and then `close`, whatever happened."""

    __slots__ = (
        "_allowed", "_amount", "_exempt", "_free", "_key", "_key_slot", "_key_taken", "_only", "_room", "_size", "_skipped",
        "_tokens_used", "attempts", "began", "budgets", "cost_usd", "deadline", "ended", "error", "override", "price_version",
        "request", "route", "router", "streamed", "tokens_out_default",
    )  # fmt: skip

    def __init__(self, router: Router, request: ChatRequest, *, streamed: bool, tokens_out_default: int) -> None:
        """Raises NotFound, Refused."""
        self.router = router
        self.request = request
        self.streamed = streamed
        self.tokens_out_default = tokens_out_default
        self.began = self.ended = router.clock()
        self.deadline = self.began + router.policy.deadline
        self.route: Route = router.route(request.model, request.provider)
        self.attempts: list[Attempt] = []
        self.override = ""
        self.error: ProviderError | None = None
        self.cost_usd: float | None = None
        self.price_version = ""
        self.budgets: tuple[BudgetSettings, ...] = ()
        self._exempt: frozenset[str] = frozenset()
        self._free: list[Reservation] = []
        self._amount = 0
        self._allowed = True
        """Whether candidates without a price may be asked."""
        self._size: Size | None = None
        self._room = 0
        self._only: set[str] | None = None
        self._skipped: MistError | None = None
        self._key: KeyRules | None = None
        self._key_taken: Taken | None = None
        self._key_slot = False
        self._tokens_used: int | None = None
        if router.rules:
            self._key = router.rules.get(request.caller.key)
            if self._key is not None and not self._key.may_ask(request.model):
                raise Refused(
                    f"the key {self._key.name} may not ask for {request.model[:80]!r}",
                    hint="models of this key in [infermux]",
                )
        if router.settings.budgets:
            self.budgets = tuple(b for b in router.settings.budgets if applies(b, request.caller))

    # --- what the question is

    @property
    def size(self) -> Size:
        if self._size is None:
            self._size = Size(self.request, self.tokens_out_default)
        return self._size

    @property
    def tokens(self) -> int:
        """What it takes of the tokens a minute, until its usage is known."""
        return self.size.tokens_in + self.size.stated

    @property
    def needs(self) -> tuple[Capability, ...]:
        params = self.request.params
        out: list[Capability] = []
        if params.get("tools") or params.get("functions"):
            out.append("tools")
        if self.size.pictures:
            out.append("vision")
        if (params.get("response_format") or {"type": "text"}) != {"type": "text"}:
            out.append("json")
        return tuple(out)

    def sticky(self) -> str:
        """What `sticky` keeps together."""
        what = self.router.policy.sticky
        if what.startswith("meta."):
            return self.request.meta.get(what[5:], "")
        if what != "prefix":
            return str(getattr(self.request.caller, what))
        left = self.router.policy.prefix_chars
        parts = []
        for message in self.request.messages:
            text = message.text[:left]
            parts.append(f"{message.role}:{text}")
            left -= len(text)
            if left <= 0:
                break
        return "\n".join(parts)

    # --- who is asked

    def obstacle(self, lane: Lane, now: float) -> Obstacle | None:
        """Why this one is not asked now. What no waiting helps comes first."""
        target = lane.target
        if target.can is not None:
            missing = [need for need in self.needs if need not in target.can]
            if missing:
                return Obstacle("unsupported", f"it cannot do {', '.join(missing)}")
        if self._room and (target.context_tokens or 0) <= self._room:
            return Obstacle("context_window", f"it is not known to have more room than {self._room} tokens")
        if target.context_tokens is not None:
            least = self.size.tokens_in_min + self.size.stated
            if least > target.context_tokens:
                return Obstacle(
                    "context_window",
                    f"the question has {least} tokens or more, it has room for {target.context_tokens}",
                )
        if not self._allowed and self._price(target) is None:
            return Obstacle("unpriced", "its price is unknown, and a budget refuses what it cannot price")
        if lane.side.sick:
            return Obstacle("sick", lane.side.sick, float(lane.side.settings.health_check.interval))
        if not lane.breaker.admits:
            wait = lane.breaker.retry_after_s
            if wait == math.inf:
                return Obstacle("open", "its circuit was opened by hand")
            said = f"its circuit is open for {wait:.1f} s more" if wait else "it is being tried by another call"
            return Obstacle("open", said, wait or 1.0)
        if lane.cool_until > now:
            wait = lane.cool_until - now
            return Obstacle("cooling", f"it asked to be left alone for {wait:.1f} s more", wait)
        if lane.side.limits is not None:
            wait = lane.side.limits.wait_s(self.tokens, now)
            if wait:
                return Obstacle("rate_limit", f"its rate limit is reached for {wait:.1f} s more", wait)
        return None

    def candidates(self) -> Iterator[Lane]:
        """Who may be asked, in order; a later stage is looked at when it is reached."""
        for stage, lanes in self.route.stages:
            for number, lane in enumerate(self.ordered(stage, lanes)):
                # time has passed, and more is known, when those before it have failed
                if not number or self.obstacle(lane, self.router.clock()) is None:
                    yield lane

    def ordered(self, stage: Stage, lanes: list[Lane], *, look: bool = False) -> list[Lane]:
        """Those of a stage that may be asked now, in order."""
        now = self.router.clock()
        only = self._only
        free = [n for n in lanes if (only is None or n.name in only) and self.obstacle(n, now) is None]
        if len(free) < 2:
            return free
        policy = self.router.policy
        ask = Ask(now=now, streamed=self.streamed, sticky=self.sticky, cost=self._estimate)
        free = ordered(stage.strategy, free, ask, policy, draw=self.router.draw, look=look)
        return self._eased(free, now, look)

    def _eased(self, lanes: list[Lane], now: float, look: bool) -> list[Lane]:
        """Whoever works again since a short time is passed over now and then, whoever has no place free is asked last."""
        back = []
        slow_start_s = self.router.policy.slow_start
        while not look and len(lanes) > 1:
            share = lanes[0].share(now, slow_start_s)
            if share >= 1.0 or self.router.draw() < share:
                break
            back.append(lanes[0])
            lanes = lanes[1:]
        lanes = lanes + back
        if any(n.side.slots is not None and not n.side.slots.free for n in lanes):
            lanes.sort(key=lambda n: n.side.slots is not None and not n.side.slots.free)  # stable
        return lanes

    # --- the call

    async def drive(self, ask: Callable[[Lane, float], Awaitable[T]]) -> Won[T]:
        """Ask until somebody answers. Raises ProviderError, RateLimited, CircuitOpen, Overloaded."""
        if self._key is not None:
            await self._enter_key(self._key)
        if self.budgets and self.router.ledger is not None:
            await self._fund()
        while True:
            candidates = self.candidates()
            for lane in candidates:
                won = await self._at(lane, candidates, ask)
                if won is not None:
                    return won
                if self._spent():
                    break
            wait = None if self._spent() else self._wait_s()
            if wait is None:
                raise self.given_up()
            await self.router.sleep(wait)

    async def _at(
        self, lane: Lane, candidates: Iterator[Lane], ask: Callable[[Lane, float], Awaitable[T]]
    ) -> Won[T] | None:
        """Ask one candidate, again while that can help. None = go on with the next. Raises what ends the call."""
        failures = 0
        hedge_s = self.router.policy.hedge_after
        while True:
            try:
                if hedge_s:
                    return await self._hedged(lane, candidates, ask, hedge_s)
                return await self._attempt(lane, ask)
            except ProviderError as exc:
                failures += 1
                pause = self._after(exc, lane, failures)
            except (CircuitOpen, Overloaded) as exc:  # somebody else took the probe, or the line is full
                self._skipped = exc
                return None
            if pause is None:
                return None
            await self.router.sleep(pause)

    def _after(self, error: ProviderError, lane: Lane, failures: int) -> float | None:
        """How long to wait before the same candidate is asked again; None = the next one. Raises what ends the call."""
        self.error = error
        router = self.router
        now = router.clock()
        if error.kind == "context_window" and self._room:
            return None
        if error.kind not in FALLS_BACK:
            raise self.given_up()
        if error.kind not in RETRIED or failures > router.policy.retries or self._spent() or not lane.breaker.admits:
            return None
        pause = max(router.retry.pause_s(failures, router.draw()), error.retry_after_s or 0.0)
        return pause if pause <= router.policy.retry_wait_max and now + pause < self.deadline else None

    def _spent(self) -> bool:
        return len(self.attempts) >= self.router.policy.attempts_max or self.router.clock() >= self.deadline

    def _wait_s(self) -> float | None:
        """How long until somebody may be asked who only wants to be left alone; None = nobody, or too long."""
        now = self.router.clock()
        waits = {}
        for _, lanes in self.route.stages:
            for lane in lanes:
                obstacle = self.obstacle(lane, now)
                if obstacle is not None and obstacle.kind == "cooling":
                    waits[lane.name] = obstacle.wait_s
        if not waits:
            return None
        # all who wait for the same provider come back apart
        wait = min(waits.values()) + self.router.retry.pause_s(1, self.router.draw())
        if now + wait >= self.deadline:
            return None
        self._only = set(waits)
        return wait

    async def _attempt(self, lane: Lane, ask: Callable[[Lane, float], Awaitable[T]]) -> Won[T]:
        """Ask once. Raises ProviderError; CircuitOpen and Overloaded when it was not asked at all."""
        router = self.router
        side = lane.side
        slot = False
        if side.slots is not None:
            await self._wait_for(side.slots.take())
            slot = True
        reservation: Reservation | None = None
        try:
            if self._free or self._amount:
                reservation = await self._reservation()
            now = router.clock()
            if slot or reservation is not None:  # time has passed since it was looked at
                obstacle = self.obstacle(lane, now)
                if obstacle is not None:
                    raise Overloaded(f"{lane.name}: {obstacle.reason}", retry_after_s=min(obstacle.wait_s, 60.0))
            trial = Trial(lane, slot=slot, tokens=self.tokens if side.limits is not None else 0, now=now)
        except BaseException:
            if slot and side.slots is not None:
                side.slots.give_back()
            if reservation is not None:
                self._free.append(reservation)
            raise
        timeout_s = min(side.timeout_s, self.deadline - now)
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                value = await ask(lane, timeout_s)
        except ProviderError as exc:
            error = exc
        except asyncio.CancelledError:
            self._ended(lane, trial, reservation, CANCELLED)
            raise
        except Exception as exc:
            if isinstance(exc, TimeoutError) and limit.expired():
                error = ProviderError("timeout", f"no answer within {timeout_s:.3g} s", provider=side.adapter.name)
            else:  # an adapter promises ProviderError: whatever else it is, the next one may do better
                error = ProviderError("bad_answer", f"{type(exc).__name__}: {exc}", provider=side.adapter.name)
            error.__cause__ = exc
        except BaseException:
            self._ended(lane, trial, reservation, CANCELLED)
            raise
        else:
            return Won(lane, trial, reservation, value)
        fair = timeout_s >= side.timeout_s  # it had the time it is promised
        self._ended(lane, trial, reservation, error.kind, error.status, fair=fair)
        if error.kind == "rate_limited" and error.retry_after_s:
            lane.cool(error.retry_after_s, router.clock())
        elif error.kind == "context_window" and lane.target.context_tokens:
            self._room = max(self._room, lane.target.context_tokens)
        raise error

    async def _hedged(
        self, lane: Lane, candidates: Iterator[Lane], ask: Callable[[Lane, float], Awaitable[T]], after_s: float
    ) -> Won[T]:
        """Ask, and ask the next candidate as well when there is no answer for a while. The first answer is taken, the other
        attempt cancelled."""
        running = {asyncio.ensure_future(self._attempt(lane, ask))}
        won: Won[T] | None = None
        error: MistError | None = None
        try:
            done, _ = await asyncio.wait(running, timeout=after_s)
            if not done and len(self.attempts) + 1 < self.router.policy.attempts_max:
                other = next(candidates, None)
                if other is not None:
                    running.add(asyncio.ensure_future(self._attempt(other, ask)))
            while running and won is None:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    try:
                        result = task.result()
                    except MistError as exc:
                        running.remove(task)
                        # an error of the provider says more than one of ours
                        error = exc if error is None or isinstance(exc, ProviderError) else error
                        continue
                    running.remove(task)
                    won = result
                    break
        except BaseException:
            await self._stop(running, None)
            raise
        await self._stop(running, won)
        if won is None:
            raise error or Unavailable(f"{lane.name} did not answer")
        return won

    async def _stop(self, running: set[asyncio.Task[Won[T]]], won: Won[T] | None) -> None:
        """Cancel what runs and wait for its end, however often we are cancelled meanwhile; then `won` is not wanted either."""
        for task in running:
            task.cancel()
        cancelled: asyncio.CancelledError | None = None
        left = set(running)
        while left:
            try:
                _, left = await asyncio.wait(left)
            except asyncio.CancelledError as exc:
                cancelled = exc
        unwanted = [task.result() for task in running if not task.cancelled() and task.exception() is None]
        if cancelled is not None and won is not None:
            unwanted.append(won)
        for one in unwanted:
            self._ended(one.lane, one.trial, one.reservation, CANCELLED)
        try:
            for one in unwanted:
                close = getattr(one.value[0], "aclose", None) if isinstance(one.value, tuple) else None
                if close is not None:
                    await close()
        except asyncio.CancelledError:
            if won is not None and won not in unwanted:
                self._ended(won.lane, won.trial, won.reservation, CANCELLED)
            raise
        if cancelled is not None:
            raise cancelled

    # --- how an attempt ended

    def answered(self, won: Won[Any], usage: Usage, *, stated_usd: float | None, text_bytes: int) -> None:
        """Somebody did answer, all of it. `text_bytes` stands for the tokens where `usage` does not say."""
        router, lane, trial = self.router, won.lane, won.trial
        now = router.clock()
        seconds = now - trial.began
        if not self.streamed:
            lane.whole.observe(seconds, now, router.policy.latency_decay)
        self.attempts.append(
            Attempt(provider=lane.target.provider, model=lane.target.model, latency_ns=round(seconds * 1e9))
        )
        tokens = None if usage.tokens_in is None else usage.tokens_in + (usage.tokens_out or 0)
        self._tokens_used = tokens
        trial.end(True, tokens=tokens)
        self._price_it(lane, usage, stated_usd)
        if router.ledger is not None:
            nano = None if self.cost_usd is None else to_nano(self.cost_usd)
            if lane.side.settings.type == "replay":
                nano = 0
            estimated = nano is None
            if nano is None:
                nano = self._estimate_of(lane.target, tokens_of(text_bytes))
            self._pay(lane, won.reservation, usage, nano, estimated=estimated and nano is not None)

    def first_piece(self, won: Won[Any]) -> None:
        """A stream has begun."""
        now = self.router.clock()
        won.lane.first.observe(now - won.trial.began, now, self.router.policy.latency_decay)

    def broken(self, won: Won[Any], kind: str, status: int, usage: Usage, text_bytes: int) -> None:
        """A stream broke off, or nobody wanted the rest of it."""
        self._price_it(won.lane, usage, None)
        self._ended(won.lane, won.trial, won.reservation, kind, status, begun=True, usage=usage, text_bytes=text_bytes)

    def _price_it(self, lane: Lane, usage: Usage, stated_usd: float | None) -> None:
        self.cost_usd, self.price_version = stated_usd, ""
        if stated_usd is None and lane.side.settings.type != "replay":  # what was paid once is not paid again
            costs = self.router.costs
            self.cost_usd = costs.actual(lane.target.provider, lane.target.model, usage, self.router.time_ns())
            if self.cost_usd is not None:
                self.price_version = costs.version

    def _ended(
        self,
        lane: Lane,
        trial: Trial,
        reservation: Reservation | None,
        kind: Kind | str,
        status: int = 0,
        *,
        fair: bool = True,
        begun: bool = False,
        usage: Usage = _NOBODY,
        text_bytes: int = 0,
    ) -> None:
        """Take the end of an attempt in that was not answered, or not to its end."""
        router = self.router
        now = router.clock()
        seconds = now - trial.began
        target = lane.target
        self.attempts.append(
            Attempt(
                provider=target.provider, model=target.model, kind=kind, status=status, latency_ns=round(seconds * 1e9)
            )
        )
        worked: bool | None = None
        if kind in COUNTED or kind in OPENS:
            worked = None if kind == "timeout" and not fair else False
        elif kind == CANCELLED:
            # begun, it did work; else it hangs when it was silent for half of the time it has
            worked = True if begun else (False if seconds >= lane.side.timeout_s / 2 else None)
        elif kind not in ("rate_limited", "unsupported"):
            worked = True  # it answered: it does not want this question
        if kind == "timeout" and fair and not begun:
            (lane.first if self.streamed else lane.whole).observe(seconds, now, router.policy.latency_decay)
        billed = begun or kind in PERHAPS_BILLED
        trial.end(worked, opens=kind in OPENS, tokens=None if billed else 0)
        if router.ledger is None:
            return
        if not billed:
            if reservation is not None:
                self._free.append(reservation)
            return
        nano = None if self.cost_usd is None or not begun else to_nano(self.cost_usd)
        estimated = nano is None
        if nano is None:
            nano = self._estimate_of(target, tokens_of(text_bytes) if begun else self.size.tokens_out)
        if lane.side.settings.type == "replay":
            nano = 0
        self._pay(lane, reservation, usage, nano, estimated=estimated and nano is not None)

    # --- money, rates and places of keys

    def _price(self, target: Target) -> Price | None:
        return self.router.costs.price(target.provider, target.model, self.router.time_ns())

    def _estimate(self, target: Target) -> int | None:
        return self._estimate_of(target, self.size.tokens_out)

    def _estimate_of(self, target: Target, tokens_out: int) -> int | None:
        return self.router.costs.estimate(
            target.provider, target.model, self.size.tokens_in, tokens_out, self.router.time_ns()
        )

    async def _fund(self) -> None:
        """Reserve what the dearest candidate may cost. A budget may have another model asked instead."""
        while True:
            strict = [
                b for b in self.budgets if b.unpriced == "refuse" and b.action != "alert" and b.name not in self._exempt
            ]  # fmt: skip
            self._allowed = not strict
            estimates = [self._estimate(lane.target) for _, lanes in self.route.stages for lane in lanes]
            known = [nano for nano in estimates if nano is not None]
            if strict and not known:
                raise RateLimited(
                    f"the price of {self.request.model[:80]!r} is unknown, and budget {strict[0].name} refuses what it cannot price",
                    hint='a price table (prices in [infermux]), or unpriced = "allow" in the budget',
                    meta={"reason": "budget_exceeded", "budget": strict[0].name}, retryable=False,
                )  # fmt: skip
            self._amount = max(known, default=0)
            try:
                self._free.append(await self._reservation())
            except RateLimited as exc:
                instead = exc.meta.get("model_override", "")
                if not instead:
                    raise
                self.override = instead
                self._exempt |= {exc.meta["budget"]}
                self.route = self.router.route(instead, "")
                continue
            return

    async def _reservation(self) -> Reservation:
        """One that is free, or another. Raises RateLimited, and what a ledger raises that cannot be written."""
        if self._free:
            return self._free.pop()
        ledger = self.router.ledger
        assert ledger is not None  # noqa: S101 - amounts are only set where there is one
        target = self.route.plan.stages[0].targets[0]
        limit = asyncio.timeout(max(0.0, self.deadline - self.router.clock()))
        try:
            async with limit:
                return await ledger.reserve(
                    self.request.caller, self._amount, self.budgets, provider=target.provider, model=target.model,
                    request=self.request.id, exempt=self._exempt,
                )  # fmt: skip
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise Unavailable("the ledger did not answer before the deadline", retry_after_s=1.0) from exc

    def _pay(
        self, lane: Lane, reservation: Reservation | None, usage: Usage, nano: int | None, *, estimated: bool
    ) -> None:
        ledger = self.router.ledger
        if ledger is None:
            return
        entry = Entry(
            time_ns=self.router.time_ns(), caller=self.request.caller, provider=lane.target.provider,
            model=lane.target.model, tokens_in=usage.tokens_in or 0, tokens_out=usage.tokens_out or 0, nano=nano,
            estimated=estimated,
        )  # fmt: skip
        if reservation is not None:
            ledger.settle(reservation, entry)
        else:
            ledger.book(entry)

    async def _enter_key(self, key: KeyRules) -> None:
        now = self.router.clock()
        if key.limits is not None:
            wait = key.limits.wait_s(self.tokens, now)
            if wait:
                raise RateLimited(
                    f"the key {key.name} has used up its requests or tokens of this minute", retry_after_s=wait,
                    meta={"reason": "rate_limit", "key": key.name},
                )  # fmt: skip
            self._key_taken = key.limits.take(self.tokens, now)
        if key.slots is not None:
            await self._wait_for(key.slots.take())
            self._key_slot = True

    async def _wait_for(self, turn: Awaitable[None]) -> None:
        limit = asyncio.timeout(max(0.0, self.deadline - self.router.clock()))
        try:
            async with limit:
                await turn
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise Overloaded("no place was free before the deadline", retry_after_s=1.0) from exc

    def way(self, lane: Lane) -> dict[str, Any]:
        """What a Way says, by its names."""
        stage = next(stage for stage, lanes in self.route.stages if lane in lanes)
        return {
            "provider": lane.target.provider, "model": lane.target.model, "strategy": stage.strategy,
            "group": stage.group, "cost_usd": self.cost_usd, "price_version": self.price_version,
            "latency_ns": round((self.ended - self.began) * 1e9), "attempts": self.attempts,
            "budget_override": self.override,
        }  # fmt: skip

    def close(self) -> None:
        """Give back what is left."""
        self.ended = self.router.clock()
        ledger = self.router.ledger
        if ledger is not None:
            while self._free:
                ledger.release(self._free.pop())
        if self._key is not None:
            if self._key_slot and self._key.slots is not None:
                self._key_slot = False
                self._key.slots.give_back()
            if self._key_taken is not None and self._key.limits is not None:
                self._key.limits.settle(self._key_taken, self._tokens_used)
                self._key_taken = None

    # --- nobody answered

    def given_up(self) -> MistError:
        """What is raised: the last failure, else why nobody was asked."""
        if self.error is not None:
            if self.attempts:
                self.error.meta["attempts"] = ", ".join(
                    f"{a.provider}/{a.model}: {a.kind}" + (f" {a.status}" if a.status else "") for a in self.attempts
                )
            return self.error
        now = self.router.clock()
        found = [(lane, self.obstacle(lane, now)) for _, lanes in self.route.stages for lane in lanes]
        obstacles = [(lane, obstacle) for lane, obstacle in found if obstacle is not None]
        said = "; ".join(f"{lane.name}: {obstacle.reason}" for lane, obstacle in obstacles)
        message = f"nobody can be asked for {self.request.model[:80]!r}: {said}"
        kinds = {obstacle.kind for _, obstacle in obstacles}
        wait = min((obstacle.wait_s for _, obstacle in obstacles), default=math.inf)
        after = wait if wait < math.inf else None
        if kinds & {"rate_limit", "cooling"}:
            return RateLimited(message, retry_after_s=after, meta={"reason": "rate_limit"})
        if kinds & {"open", "sick"}:
            return CircuitOpen(message, retry_after_s=after)
        if self._skipped is not None:
            return self._skipped
        if "unpriced" in kinds:
            return RateLimited(message, meta={"reason": "budget_exceeded"}, retryable=False)
        return ProviderError("context_window" if "context_window" in kinds else "unsupported", message)
