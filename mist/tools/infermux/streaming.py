"""A streamed answer on its way through the router.

    async with router.streaming(request) as call:
        async for chunk in call.chunks: ...
    routed = call.routed()

Promises: entering the block raises whatever can be known before the first piece, after retries and fallbacks that nobody sees. After
that the answer is this provider's: a failure ends the stream with a ProviderError that says `begun`, never with a second
beginning. Leaving the block early, or being cancelled, closes the provider's stream and gives everything back; `routed` then says
what is known. What is not taken is not asked for: a slow reader slows the provider's connection down, not our memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from mist.errors import Closed
from mist.tools.infermux.call import Call, Won
from mist.tools.infermux.chat import Chunk, Json, Reply, Usage
from mist.tools.infermux.costs import utf8_size
from mist.tools.infermux.failures import ProviderError
from mist.tools.infermux.lanes import Lane
from mist.tools.infermux.routed import CANCELLED, Routed


class Streaming:
    """One streamed call. Iterate `chunks` once, inside the block."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._won: Won[tuple[AsyncIterator[Chunk], Chunk]] | None = None
        self._source: AsyncIterator[Chunk] | None = None
        self._first: Chunk | None = None
        self._open = False
        self._text: list[str] = []
        self._refusal: list[str] = []
        self._bytes = 0
        self._tool_calls: dict[int, Json] = {}
        self._finish_reason = ""
        self._usage = Usage()
        self._model = ""
        self._id = ""

    @property
    def chunks(self) -> AsyncIterator[Chunk]:
        return self

    async def __aenter__(self) -> Self:
        call = self._call
        try:
            won = await call.drive(self._ask)
        except BaseException:
            call.close()
            raise
        self._won = won
        self._source, self._first = won.value
        self._open = True
        call.first_piece(won)
        return self

    async def _ask(self, lane: Lane, timeout_s: float) -> tuple[AsyncIterator[Chunk], Chunk]:
        source = lane.side.adapter.stream(self._call.request, lane.target.model, timeout_s=timeout_s)
        try:
            return source, await anext(source)
        except StopAsyncIteration as exc:
            raise ProviderError(
                "bad_answer", "the answer ended before it began", provider=lane.side.adapter.name
            ) from exc
        except BaseException:
            await _close(source)
            raise

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._first is not None:
            chunk, self._first = self._first, None
            self._take(chunk)
            return chunk
        won, source = self._won, self._source
        if not self._open or won is None or source is None:
            if won is None:
                raise Closed("the chunks of a stream are read inside its block")
            raise StopAsyncIteration
        timeout_s = won.lane.side.timeout_s
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                chunk = await anext(source)
        except StopAsyncIteration:
            self._end()
            raise
        except ProviderError as exc:
            exc.begun = True
            self._break(exc.kind, exc.status)
            raise
        except asyncio.CancelledError:
            self._break(CANCELLED)
            await _close(source)
            raise
        except Exception as exc:
            late = isinstance(exc, TimeoutError) and limit.expired()
            error = ProviderError(
                "timeout" if late else "bad_answer",
                f"silent for {timeout_s:g} s" if late else f"{type(exc).__name__}: {exc}",
                provider=won.lane.side.adapter.name, begun=True,
            )  # fmt: skip
            self._break(error.kind)
            await _close(source)
            raise error from exc
        self._take(chunk)
        return chunk

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if not self._open:
            return
        if self._finish_reason:
            self._end()  # all of it was there; the reader did not look for the end
        else:
            self._break(CANCELLED)
        if self._source is not None:
            await _close(self._source)

    def routed(self) -> Routed:
        """How it came, and what is known of the answer: all of it once the chunks have ended."""
        call, won = self._call, self._won
        if won is None:
            raise Closed("the stream has not begun")
        reply = Reply(
            content="".join(self._text), model=self._model or won.lane.target.model,
            finish_reason=self._finish_reason, tool_calls=[self._tool_calls[i] for i in sorted(self._tool_calls)],
            refusal="".join(self._refusal), usage=self._usage, id=self._id,
        )  # fmt: skip
        return Routed(reply=reply, **call.way(won.lane))

    def _take(self, chunk: Chunk) -> None:
        """Add a piece to what is known."""
        if chunk.content:
            self._text.append(chunk.content)
            self._bytes += utf8_size(chunk.content)
        if chunk.refusal:
            self._refusal.append(chunk.refusal)
            self._bytes += utf8_size(chunk.refusal)
        for delta in chunk.tool_calls:
            self._take_tool_call(delta)
        self._finish_reason = chunk.finish_reason or self._finish_reason
        self._usage = chunk.usage or self._usage
        self._model = chunk.model or self._model
        self._id = chunk.id or self._id

    def _take_tool_call(self, delta: Json) -> None:
        """OpenAI's deltas: the first has id and name, arguments come in pieces."""
        index = int(delta.get("index") or 0)
        call = self._tool_calls.setdefault(
            index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = delta.get("id") or call["id"]
        call["type"] = delta.get("type") or call["type"]
        function: Json = delta.get("function") or {}
        call["function"]["name"] = function.get("name") or call["function"]["name"]
        arguments = function.get("arguments") or ""
        call["function"]["arguments"] += arguments
        self._bytes += utf8_size(arguments)

    def _end(self) -> None:
        if self._open and self._won is not None:
            self._open = False
            self._call.answered(self._won, self._usage, stated_usd=None, text_bytes=self._bytes)
            self._call.close()

    def _break(self, kind: str, status: int = 0) -> None:
        if self._open and self._won is not None:
            self._open = False
            self._call.broken(self._won, kind, status, self._usage, self._bytes)
            self._call.close()


async def _close(source: AsyncIterator[Chunk]) -> None:
    close = getattr(source, "aclose", None)
    if close is not None:
        await close()
