"""Providers that do what a test says, a clock that tests move, and the router over them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from mist.tools.infermux.chat import Caller, ChatMessage, ChatRequest, Chunk, Embeddings, Json, Reply, Usage
from mist.tools.infermux.failures import Kind, ProviderError
from mist.tools.infermux.router import Router
from mist.tools.infermux.settings import InferMuxSettings, ProviderSettings, RoutingSettings

HANG = "hang"
Step = Reply | ProviderError | Exception | str
"""`hang`: until it is cancelled. Another text is the answer."""


def fail(kind: Kind, status: int = 500, retry_after_s: float | None = None) -> ProviderError:
    return ProviderError(kind, f"scripted {kind}", status=status, retry_after_s=retry_after_s)


class Scripted:
    """Answers by its script, step by step; the last step is repeated. `under_way` counts what has begun and not ended."""

    def __init__(self, name: str, *script: Any, models: Sequence[str] = ("m",)) -> None:
        self.name = name
        self.models = models
        self.script = list(script) or ["hello"]
        self.asked: list[tuple[str, float]] = []
        self.under_way = 0
        self.cancelled = 0
        self.gate: asyncio.Event | None = None
        self.usage = Usage(tokens_in=10, tokens_out=20)
        self.closed = False

    def _step(self) -> Any:
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    async def complete(self, request: ChatRequest, model: str, *, timeout_s: float) -> Reply:
        step = await self._begin(model, timeout_s)
        try:
            await self._middle(step)
            return step if isinstance(step, Reply) else Reply(content=str(step), model=model, usage=self.usage)
        finally:
            self.under_way -= 1

    async def stream(self, request: ChatRequest, model: str, *, timeout_s: float) -> AsyncIterator[Chunk]:
        """A step that is a list: its items one by one, errors raised where they stand."""
        step = await self._begin(model, timeout_s)
        try:
            if not isinstance(step, list):
                await self._middle(step)
                step = [Chunk(content=c) for c in str(step)] + [Chunk(finish_reason="stop", usage=self.usage)]
            for item in step:
                await self._middle(item)
                yield item if isinstance(item, Chunk) else Chunk(content=item)
        finally:
            self.under_way -= 1

    async def embed(self, model: str, texts: Sequence[str], params: Json, *, timeout_s: float) -> Embeddings:
        step = await self._begin(model, timeout_s)
        try:
            await self._middle(step)
            return Embeddings(vectors=[[float(len(t))] for t in texts], model=model, usage=Usage(tokens_in=5))
        finally:
            self.under_way -= 1

    async def _begin(self, model: str, timeout_s: float) -> Any:
        self.asked.append((model, timeout_s))
        self.under_way += 1
        return self._step()

    async def _middle(self, step: Any) -> None:
        try:
            if self.gate is not None:
                await self.gate.wait()
            if step == HANG:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(step, Exception):
            raise step

    async def aclose(self) -> None:
        self.closed = True


class Clock:
    """Stands still until it is moved; `sleep` moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        self.now += seconds
        await asyncio.sleep(0)


def router(
    *providers: Scripted, clock: Clock | None = None, draw: Callable[[], float] | None = None, **more: Any
) -> Router:
    """Over providers that all have `m`; `more` are settings of the router, `of` those of single providers, by name."""
    clock = clock or Clock()
    of: dict[str, dict[str, Any]] = more.pop("of", {})
    prices, ledger = more.pop("prices", None), more.pop("ledger", None)
    time_ns = more.pop("time_ns", lambda: 1_795_608_000_000_000_000)
    routing = RoutingSettings(**more.pop("routing", {}))
    settings = InferMuxSettings(
        providers=tuple(
            ProviderSettings(
                **{"name": p.name, "type": "openai", "base_url": "http://127.0.0.1:1", "models": tuple(p.models)} | of.get(p.name, {})
            )
            for p in providers
        ),
        routing=routing, **more,
    )  # fmt: skip
    return Router(
        settings, providers, prices=prices, ledger=ledger, clock=clock, time_ns=time_ns,
        draw=draw or random.Random(1).random, sleep=clock.sleep,
    )  # fmt: skip


def question(text: str = "hi", *, model: str = "m", **more: Any) -> ChatRequest:
    caller = more.pop("caller", Caller())
    return ChatRequest(model=model, messages=(ChatMessage(role="user", content=text),), caller=caller, **more)


def at_rest(found: Router) -> None:
    """Nothing is under way anywhere, nothing waits, nothing is held."""
    for lane in found._lanes.values():
        assert lane.in_flight == 0
        assert lane.breaker._probes == 0
    for side in found._sides.values():
        assert side.in_flight == 0
        if side.slots is not None:
            assert (side.slots.in_use, side.slots.waiting) == (0, 0)
    for rules in found.rules.values():
        if rules.slots is not None:
            assert (rules.slots.in_use, rules.slots.waiting) == (0, 0)
    if found.ledger is not None:
        assert found.ledger.outstanding == 0
