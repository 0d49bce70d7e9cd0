"""The seed's echo: what to point things at before there is a key, and a golden measure of everything around it.

`echo: ` and the last message. A token is four bytes: of each message of the question, rounded down, and of the answer, at least
one. A token costs 0.00001 US dollars. Parameters change nothing: there is nothing to sample.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from mist.tools.infermux.chat import ChatRequest, Chunk, Embeddings, Json, Reply, Usage
from mist.tools.infermux.failures import ProviderError
from mist.tools.infermux.providers.pieces import pieces

USD_PER_TOKEN = 0.00001
BYTES_PER_TOKEN = 4


class Echo:
    """`delay_s` passes before each answer. `sleep` is how it passes."""

    def __init__(
        self,
        name: str = "echo",
        *,
        models: Sequence[str] = ("echo",),
        delay_s: float = 0.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name = name
        self.models = tuple(models)
        self._delay_s = delay_s
        self._sleep = sleep

    async def complete(self, request: ChatRequest, model: str, *, timeout_s: float) -> Reply:
        if self._delay_s:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._sleep(self._delay_s)
            except TimeoutError as exc:
                raise ProviderError("timeout", f"no answer within {timeout_s:g} s", provider=self.name) from exc
        texts = [message.text for message in request.messages]
        content = "echo: " + (texts[-1] if texts else "")
        tokens_in = sum(_bytes(text) // BYTES_PER_TOKEN for text in texts)
        tokens_out = max(1, _bytes(content) // BYTES_PER_TOKEN)
        return Reply(
            content=content,
            model=model,
            usage=Usage(tokens_in=tokens_in, tokens_out=tokens_out),
            cost_usd=(tokens_in + tokens_out) * USD_PER_TOKEN,
        )

    async def stream(self, request: ChatRequest, model: str, *, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        for chunk in pieces(await self.complete(request, model, timeout_s=timeout_s)):
            yield chunk

    async def embed(self, model: str, texts: Sequence[str], params: Json, *, timeout_s: float) -> Embeddings:
        raise ProviderError("unsupported", "has no embeddings", provider=self.name)

    async def aclose(self) -> None:
        """Nothing is open."""


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
