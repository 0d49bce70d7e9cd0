"""Recorded answers in place of a model: a rerun costs nothing and asks nobody.

Promises: what was not recorded is `invalid` and never falls back to a provider that is paid; the cost of a replayed answer is
0.0 and stated; which of several answers to one question comes is decided by the question alone (see `Recordings.find`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from mist.errors import MistError
from mist.tools.infermux.chat import ChatRequest, Chunk, Embeddings, Json, Reply
from mist.tools.infermux.failures import ProviderError
from mist.tools.infermux.providers.pieces import pieces
from mist.tools.infermux.recordings import Recordings, epoch_of, key_of


class Replay:
    """`recordings` are the caller's to close, or come from a function that is called once, at the first question, and are
    then closed here. Without `models` it answers for whatever was recorded."""

    def __init__(
        self,
        name: str,
        recordings: Recordings | Callable[[], Awaitable[Recordings]],
        *,
        models: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.models = tuple(models)
        self._recordings = recordings if isinstance(recordings, Recordings) else None
        self._read = None if isinstance(recordings, Recordings) else recordings
        self._reading = asyncio.Lock()

    async def complete(self, request: ChatRequest, model: str, *, timeout_s: float) -> Reply:
        try:
            async with asyncio.timeout(timeout_s):
                recordings = self._recordings or await self._first()
            epoch = epoch_of(request)
        except TimeoutError as exc:
            raise ProviderError("timeout", f"not read within {timeout_s:g} s", provider=self.name) from exc
        except MistError as exc:
            raise ProviderError("invalid", exc.message, provider=self.name, hint=exc.hint) from exc
        key = key_of(request, model)
        reply = recordings.find(key, epoch=epoch)
        if reply is None:
            count = recordings.count(key)
            what = f"{count} answers of {model} are recorded for this question, none of epoch {epoch}" if count else ""
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
        """What it read itself it closes."""
        if self._read is not None and self._recordings is not None:
            self._recordings.close()
            self._recordings = None

    async def _first(self) -> Recordings:
        async with self._reading:  # everybody who asks meanwhile waits for the same reading
            if self._recordings is None:
                assert self._read is not None  # noqa: S101 - one of the two, see __init__
                self._recordings = await self._read()
            return self._recordings
