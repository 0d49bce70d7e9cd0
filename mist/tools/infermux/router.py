"""The router: a question in, an answer of one of many providers out. How a call goes is in call.py and streaming.py.

    router = Router.from_settings(settings, prices=prices, ledger=ledger)
    routed = await router.complete(request)
    async with router.streaming(request) as call: ...

Promises: it is the only one that retries: adapters try once, and so should callers. It raises ProviderError, NotFound (the model is
unknown), Refused (not with this key), RateLimited (`meta["reason"]` is rate_limit or budget_exceeded), CircuitOpen, Overloaded, and
what a ledger that cannot be written raises. `explain` asks nobody and changes nothing. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from mist.errors import InvalidArgument, NotFound
from mist.kit.breaker import Breaker
from mist.kit.prices import Prices
from mist.kit.retry import RetryPolicy
from mist.tools.infermux.budgets import Ledger
from mist.tools.infermux.building import build_providers
from mist.tools.infermux.call import Call
from mist.tools.infermux.chat import Caller, ChatMessage, ChatRequest, Chunk, Embeddings, Json, Reply
from mist.tools.infermux.costs import Costs, to_dollars, utf8_size
from mist.tools.infermux.keys import KeyRules
from mist.tools.infermux.lanes import Lane, Side
from mist.tools.infermux.naming import Catalogue, LeftOut, Plan, Stage, Target
from mist.tools.infermux.providers.base import Provider
from mist.tools.infermux.routed import Choice, Explanation, ModelState, ProviderState, Routed, RoutedEmbeddings
from mist.tools.infermux.routing import PeakEwma
from mist.tools.infermux.settings import AUTO, InferMuxSettings
from mist.tools.infermux.streaming import Streaming

ROUTES_MAX = 1000
LANES_MAX = 10_000
"""Names come from outside where a provider takes whatever it is asked for: beyond this, the idle ones are forgotten."""


class Route:
    """A plan with the lanes of its targets."""

    __slots__ = ("plan", "stages")

    def __init__(self, plan: Plan, stages: list[tuple[Stage, list[Lane]]]) -> None:
        self.plan = plan
        self.stages = stages


class Router:
    def __init__(
        self,
        settings: InferMuxSettings,
        providers: Sequence[Provider],
        *,
        prices: Prices | None = None,
        ledger: Ledger | None = None,
        clock: Callable[[], float] = time.monotonic,
        time_ns: Callable[[], int] = time.time_ns,
        draw: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """`providers`: one for each of the settings, by name. Raises InvalidArgument for budgets without a ledger."""
        if settings.budgets and ledger is None:
            raise InvalidArgument("infermux.budgets need a ledger", hint="store in [infermux] names its file")
        by_name = {p.name: p for p in providers}
        self.settings = settings
        self.policy = settings.routing
        self.ledger = ledger
        self.clock = clock
        self.time_ns = time_ns
        self.draw = draw
        self.sleep = sleep
        self.costs = Costs(prices, settings.asked)
        self.retry = RetryPolicy(wait_s=self.policy.retry_wait, wait_s_max=self.policy.retry_wait_max)
        self.rules = {key.name: KeyRules(key, self.policy.queue_max) for key in settings.keys}
        self._breaker = settings.breaker.policy()
        self._catalogue = Catalogue(settings)
        self._sides = {p.name: Side(p, by_name[p.name], self.policy.queue_max) for p in settings.asked}
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._routes: dict[tuple[str, str], Route] = {}
        for provider in settings.asked:
            for model in provider.models:
                self.route(f"{provider.name}/{model}", provider.name)

    @classmethod
    def from_settings(
        cls,
        settings: InferMuxSettings,
        *,
        prices: Prices | None = None,
        ledger: Ledger | None = None,
        env: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        time_ns: Callable[[], int] = time.time_ns,
        draw: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> Router:
        """With the adapters that the settings name. Raises InvalidArgument, for example for a key's variable that is not set."""
        return cls(
            settings, build_providers(settings, env=env), prices=prices, ledger=ledger, clock=clock, time_ns=time_ns,
            draw=draw, sleep=sleep,
        )  # fmt: skip

    async def complete(self, request: ChatRequest) -> Routed:
        """The whole answer."""
        call = Call(self, request, streamed=False, tokens_out_default=self.policy.tokens_out_default)

        def ask(lane: Lane, timeout_s: float) -> Awaitable[Reply]:
            return lane.side.adapter.complete(request, lane.target.model, timeout_s=timeout_s)

        try:
            won = await call.drive(ask)
            reply = won.value
            size = 0 if self.ledger is None else utf8_size(reply.content)
            call.answered(won, reply.usage, stated_usd=reply.cost_usd, text_bytes=size)
        finally:
            call.close()
        return Routed(reply=reply, **call.way(won.lane))

    def streaming(self, request: ChatRequest) -> Streaming:
        """The answer in pieces: `async with`."""
        return Streaming(Call(self, request, streamed=True, tokens_out_default=self.policy.tokens_out_default))

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        """The same for who wants the pieces only. An iterator that is left early is to be closed (`aclose`)."""
        async with self.streaming(request) as call:
            async for chunk in call.chunks:
                yield chunk

    async def embed(
        self, model: str, texts: Sequence[str], params: Json | None = None, caller: Caller | None = None, *,
        provider: str = "", id: str = "",
    ) -> RoutedEmbeddings:  # fmt: skip
        """One vector for each text."""
        request = ChatRequest(
            model=model, provider=provider, caller=caller or Caller(), id=id,
            messages=tuple(ChatMessage(role="user", content=text) for text in texts),
        )  # fmt: skip
        call = Call(self, request, streamed=False, tokens_out_default=0)

        def ask(lane: Lane, timeout_s: float) -> Awaitable[Embeddings]:
            return lane.side.adapter.embed(lane.target.model, texts, params or {}, timeout_s=timeout_s)

        try:
            won = await call.drive(ask)
            call.answered(won, won.value.usage, stated_usd=None, text_bytes=0)
        finally:
            call.close()
        return RoutedEmbeddings(embeddings=won.value, **call.way(won.lane))

    # --- looking

    def names(self) -> dict[str, str]:
        """What may be asked for, and who has it: the first provider of a model, `infermux` for groups, aliases and `auto`."""
        found = dict.fromkeys(self.settings.names(), "infermux")
        for provider in reversed(self.settings.asked):
            found |= dict.fromkeys([*provider.models, *provider.aliases], provider.name)
        ours = [g.name for g in self.settings.groups] + list(self.settings.aliases)
        return found | dict.fromkeys([*ours, AUTO], "infermux")

    def explain(self, request: ChatRequest) -> Explanation:
        """Who would be asked now, in order, and who would not. Raises NotFound, Refused. Budgets are not asked."""
        call = Call(self, request, streamed=False, tokens_out_default=self.policy.tokens_out_default)
        now = self.clock()
        candidates: list[Choice] = []
        left_out = list(call.route.plan.left_out)
        for stage, lanes in call.route.stages:
            for lane in call.ordered(stage, lanes, look=True):
                target = lane.target
                nano = self.costs.estimate(
                    target.provider, target.model, call.size.tokens_in, call.size.tokens_out, self.time_ns()
                )
                candidates.append(
                    Choice(
                        provider=target.provider,
                        model=target.model,
                        stage=stage.name,
                        group=stage.group,
                        strategy=stage.strategy,
                        priority=target.priority,
                        weight=target.weight,
                        latency_s=_measured(lane.whole),
                        in_flight=lane.in_flight,
                        estimate_usd=None if nano is None else to_dollars(nano),
                        share=lane.share(now, self.policy.slow_start),
                    )
                )
            for lane in lanes:
                obstacle = call.obstacle(lane, now)
                if obstacle is not None:
                    left_out.append(LeftOut(lane.target.provider, lane.target.model, obstacle.reason))
        first = call.route.plan.stages[0]
        return Explanation(
            model=request.model, resolved=first.name, group=first.group, strategy=first.strategy, candidates=candidates,
            left_out=left_out,
        )  # fmt: skip

    def providers(self) -> list[ProviderState]:
        """How everybody does, in the order of the settings."""
        now = self.clock()
        out = []
        for name, side in self._sides.items():
            lanes = [lane for lane in self._lanes.values() if lane.side is side]
            models = [
                ModelState(
                    model=lane.target.model, circuit=lane.breaker.state, retry_after_s=lane.breaker.retry_after_s,
                    cooling_s=max(0.0, lane.cool_until - now), latency_s=_measured(lane.whole),
                    first_s=_measured(lane.first), in_flight=lane.in_flight,
                )
                for lane in lanes
            ]  # fmt: skip
            requests = side.limits.requests if side.limits is not None else None
            tokens = side.limits.tokens if side.limits is not None else None
            out.append(
                ProviderState(
                    name=name,
                    type=side.settings.type,
                    models=models,
                    in_flight=side.in_flight,
                    healthy=not side.sick
                    and (not models or any(m.circuit != "open" and not m.cooling_s for m in models)),
                    waiting=side.slots.waiting if side.slots is not None else 0,
                    requests_headroom=None if requests is None else max(0, requests.limit - requests.used(now)),
                    tokens_headroom=None if tokens is None else max(0, tokens.limit - tokens.used(now)),
                )
            )
        return out

    def sides(self) -> Iterable[Side]:
        """Providers with what is kept of each, for probes.py."""
        return self._sides.values()

    def breakers(self) -> list[Breaker]:
        """For kit/breaker.watch."""
        return [lane.breaker for lane in self._lanes.values()]

    def circuit(self, provider: str, action: Literal["open", "close", "reset"], model: str = "") -> None:
        """Open the circuits of a provider (or of one of its models) by hand, until they are closed (or reset, which is the same)
        by hand. Raises NotFound."""
        lanes = [n for (name, of), n in self._lanes.items() if name == provider and model in ("", of)]
        if provider not in self._sides or (model and not lanes):
            raise NotFound(f"no provider {provider[:64]!r}" + (f" with a model {model[:80]!r}" if model else ""))
        for lane in lanes:
            if action == "open":
                lane.breaker.trip(until_reset=True)
            else:
                lane.breaker.reset()

    async def aclose(self) -> None:
        """Close the adapters. The ledger is its owner's."""
        for side in self._sides.values():
            await side.adapter.aclose()

    # --- for calls

    def route(self, model: str, provider: str) -> Route:
        """Who could answer, with what is known of them. Raises NotFound."""
        key = (model, provider)
        route = self._routes.get(key)
        if route is None:
            plan = self._catalogue.plan(model, provider)
            if len(self._routes) >= ROUTES_MAX:
                self._routes.clear()
            route = Route(plan, [(stage, [self._lane(t) for t in stage.targets]) for stage in plan.stages])
            self._routes[key] = route
        return route

    def _lane(self, target: Target) -> Lane:
        lane = self._lanes.get(target.key)
        if lane is None:
            if len(self._lanes) >= LANES_MAX:
                self._routes.clear()
                self._lanes = {key: lane for key, lane in self._lanes.items() if not lane.idle}
            lane = self._lanes[target.key] = Lane(target, self._sides[target.provider], self._breaker, self.clock)
        return lane


def _measured(ewma: PeakEwma) -> float | None:
    return ewma.value if ewma.at > float("-inf") else None
