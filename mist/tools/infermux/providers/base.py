"""The contract of a provider. Adapters know one wire format each and nothing of routing, retries, money or records.

Promises: a provider raises ProviderError and nothing else of its own; it tries once; a cancelled call closes its
connection or hands it back clean; `stream` raises before its first chunk whatever can be known by then, and later errors
say `begun`; what it cannot send is refused (`unsupported`), never dropped.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from mist.tools.infermux.chat import ChatRequest, Chunk, Embeddings, Json, Reply


class Provider(Protocol):
    """`name` is that of the configuration. `models` are the provider's own names; empty = whatever it is asked for."""

    @property
    def name(self) -> str: ...

    @property
    def models(self) -> Sequence[str]: ...

    async def complete(self, request: ChatRequest, model: str, *, timeout_s: float) -> Reply:
        """The whole answer of `model` (the provider's name for it)."""

    def stream(self, request: ChatRequest, model: str, *, timeout_s: float) -> AsyncIterator[Chunk]:
        """The answer in pieces. `timeout_s` is for the time until the first piece, and between pieces."""

    async def embed(self, model: str, texts: Sequence[str], params: Json, *, timeout_s: float) -> Embeddings:
        """Raises ProviderError `unsupported` where there are none."""

    async def aclose(self) -> None: ...
