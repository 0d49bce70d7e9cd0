"""A router that does what a test tells it, and streams that keep, refuse or swallow what is appended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from mist.errors import MistError
from mist.tools.infermux.chat import Caller, ChatRequest, Chunk, Embeddings, Json, Reply, Usage
from mist.tools.infermux.routed import Attempt, ModelState, ProviderState, Routed, RoutedEmbeddings


class FakeRouter:
    """`error` is raised, before or in the middle of an answer (`after` pieces); `gate` holds answers back until set;
    `left` counts the calls that were cancelled."""

    def __init__(self) -> None:
        self.asked: list[ChatRequest] = []
        self.error: MistError | None = None
        self.after = 0
        self.gate: asyncio.Event | None = None
        self.reached = asyncio.Event()
        self.left = asyncio.Event()
        self.reply: Callable[[ChatRequest], Reply] = echo
        self.chunks: Sequence[Chunk] | None = None
        self.cost_usd: float | None = 0.00013
        self.switched: list[tuple[str, str]] = []

    async def complete(self, request: ChatRequest) -> Routed:
        await self._come(request)
        if self.error is not None:
            raise self.error
        return self._routed(self.reply(request))

    @asynccontextmanager
    async def streaming(self, request: ChatRequest) -> AsyncIterator[Any]:
        await self._come(request)
        if self.error is not None and self.after == 0:
            raise self.error
        call = _Call(self)
        try:
            yield call
        except asyncio.CancelledError:
            self.left.set()
            raise

    async def embed(
        self, model: str, texts: Sequence[str], params: Json, caller: Caller, *, id: str = ""
    ) -> RoutedEmbeddings:
        if self.error is not None:
            raise self.error
        vectors = [[float(len(t)), 0.5] for t in texts]
        embeddings = Embeddings(vectors=vectors, model=model, usage=Usage(tokens_in=3))
        return RoutedEmbeddings(embeddings=embeddings, **self._way())

    def providers(self) -> list[ProviderState]:
        models = [
            ModelState(
                model=m, circuit="closed", retry_after_s=0, cooling_s=0, latency_s=None, first_s=None, in_flight=0
            )
            for m in ("m", "n")
        ]
        return [
            ProviderState(
                name="fake", type="echo", healthy=True, models=models, in_flight=0, waiting=0, requests_headroom=None,
                tokens_headroom=None,
            )
        ]  # fmt: skip

    def names(self) -> dict[str, str]:
        return {"m": "fake", "n": "fake", "auto": "infermux", "fast": "infermux"}

    def circuit(self, name: str, action: str) -> None:
        self.switched.append((name, action))

    async def _come(self, request: ChatRequest) -> None:
        self.asked.append(request)
        self.reached.set()
        try:
            await asyncio.sleep(0)
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.left.set()
            raise

    def _routed(self, reply: Reply) -> Routed:
        return Routed(reply=reply, **self._way())

    def _way(self) -> dict[str, Any]:
        return {
            "provider": "fake", "model": "m", "strategy": "priority", "group": "g", "cost_usd": self.cost_usd,
            "price_version": "p1", "latency_ns": 1_500_000,
            "attempts": [Attempt(provider="fake", model="m", kind="", status=200, latency_ns=1)],
        }  # fmt: skip


class _Call:
    def __init__(self, router: FakeRouter) -> None:
        self._router = router
        self._out: list[Chunk] = []
        self.chunks = self._chunks()

    async def _chunks(self) -> AsyncIterator[Chunk]:
        router = self._router
        for at, chunk in enumerate(router.chunks if router.chunks is not None else pieces("one two three")):
            if router.error is not None and at >= router.after:
                raise router.error
            self._out.append(chunk)
            yield chunk
            await asyncio.sleep(0)
        if router.error is not None:
            raise router.error

    def routed(self) -> Routed:
        usage = next((c.usage for c in self._out if c.usage is not None), Usage())
        content = "".join(c.content for c in self._out)
        return self._router._routed(Reply(content=content, model="m-1", usage=usage))


def echo(request: ChatRequest) -> Reply:
    """The last message again."""
    text = request.messages[-1].text if request.messages else ""
    return Reply(content=f"echo: {text}", model="m-1", usage=Usage(tokens_in=6, tokens_out=7))


def pieces(text: str) -> list[Chunk]:
    words = text.split(" ")
    out = [Chunk(content=w if at == 0 else f" {w}", model="m-1") for at, w in enumerate(words)]
    return [*out, Chunk(finish_reason="stop", usage=Usage(tokens_in=6, tokens_out=3), model="m-1")]
