"""Recorded answers in place of a model: a rerun costs nothing and asks nobody.

Promises: what was not recorded is `invalid` and never falls back to a provider that is paid; the cost of a replayed answer is
0.0 and stated; which of several answers to one question comes is decided by the question alone (see `Recordings.find`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from mist.tools.infermux.chat import ChatRequest, Chunk, Embeddings, Json, Reply
from mist.tools.infermux.failures import ProviderError
from mist.tools.infermux.providers.pieces import pieces
from mist.tools.infermux.recordings import Recordings, epoch_of, key_of


class Replay:
    """`recordings` stay the caller's to close. Without `models` it answers for whatever was recorded."""

    def __init__(self, name: str, recordings: Recordings, *, models: Sequence[str] = ()) -> None:
        self.name = name
        self.models = tuple(models)
        self._recordings = recordings

    async def complete(self, request: ChatRequest, model: str, *, timeout_s: float) -> Reply:
        key = key_of(request, model)
        epoch = epoch_of(request)
        reply = self._recordings.find(key, epoch=epoch)
        if reply is None:
            count = self._recordings.count(key)
            what = f"{count} answers of {model} are recorded for this question, not {epoch}" if count else ""
            raise ProviderError(
                "invalid", what or f"no answer of {model} is recorded for this question", provider=self.name,
                hint=f"its key is {key}; the model, every message and every parameter must be as recorded",
            )  # fmt: skip
        return reply

    async def stream(self, request: ChatRequest, model: str, *, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        for chunk in pieces(await self.complete(request, model, timeout_s=timeout_s)):
            yield chunk

    async def embed(self, model: str, texts: Sequence[str], params: Json, *, timeout_s: float) -> Embeddings:
        raise ProviderError("unsupported", "has no embeddings: they are not recorded", provider=self.name)

    async def aclose(self) -> None:
        """The recordings are the caller's."""
