"""OpenAI's chat completions and embeddings, as OpenAI, vLLM, Ollama, LM Studio, llama.cpp, OpenRouter, Groq … speak them.

The question goes out as it came: its names are this API's. Refused (`unsupported`) is what the shapes of chat.py could not
bring back, such as a second choice, log probabilities or audio, and what is no parameter of OpenAI's unless
`extra_params` names it: many servers ignore what they do not know, and the caller would never hear of it.

An answer without choices, a stream without a finish reason or without `[DONE]`, and what is not JSON are `bad_answer`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from mist.kit.http1_client import CONNECT_TIMEOUT_S, Pool
from mist.protocol.payloads import Int64
from mist.tools.infermux.chat import ChatRequest, Chunk, Embeddings, Json, Reply, Usage
from mist.tools.infermux.failures import ProviderError
from mist.tools.infermux.providers.http import Http, utc_now
from mist.tools.infermux.providers.params import encoded, stated, unsupported
from mist.tools.infermux.providers.refusals import error_in, error_of

PARAMS = frozenset({
    "frequency_penalty", "logit_bias", "max_completion_tokens", "max_tokens", "metadata", "parallel_tool_calls", "prediction", "presence_penalty", "prompt_cache_key", "prompt_cache_retention",
    "reasoning_effort", "response_format", "safety_identifier", "seed", "service_tier", "stop", "store", "temperature",
    "tool_choice", "tools", "top_p", "user", "verbosity",
})  # fmt: skip
UNANSWERABLE = frozenset({
    "audio", "function_call", "functions", "logprobs", "modalities", "n", "top_logprobs", "web_search_options",
})  # fmt: skip
"""What an answer to it would hold has no place in chat.py. Refused whatever `extra_params` say."""
EMBED_PARAMS = frozenset({"dimensions", "user"})


class _PromptDetails(Struct):
    cached_tokens: Int64 | None = None


class _CompletionDetails(Struct):
    reasoning_tokens: Int64 | None = None


class _Usage(Struct):
    prompt_tokens: Int64 | None = None
    completion_tokens: Int64 | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Message(Struct):
    """Of an answer, or the delta of one."""

    content: str | list[Json] | None = None
    refusal: str | None = None
    tool_calls: list[Json] | None = None


class _Choice(Struct):
    message: _Message
    finish_reason: str | None = None


class _Answer(Struct):
    choices: list[_Choice]
    id: str | None = None
    model: str | None = None
    usage: _Usage | None = None


class _PieceChoice(Struct):
    delta: _Message | None = None
    finish_reason: str | None = None
    index: int = 0


class _Piece(Struct):
    choices: list[_PieceChoice] | None = None
    id: str | None = None
    model: str | None = None
    usage: _Usage | None = None
    error: Any = None


class _Vector(Struct):
    embedding: list[float]
    index: int


class _Vectors(Struct):
    data: list[_Vector]
    model: str | None = None
    usage: _Usage | None = None


_answer = msgspec.json.Decoder(_Answer)
_piece = msgspec.json.Decoder(_Piece)
_vectors = msgspec.json.Decoder(_Vectors)
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class OpenAI:
    """`base_url` ends before `/chat/completions`: mostly with `/v1`. `extra_params` are parameters this server takes beyond
    OpenAI's (`"*"`: any). `drop_params`: leave out what cannot be sent instead of refusing the question."""

    def __init__(
        self,
        name: str,
        *,
        base_url: str,
        api_key: str = "",
        models: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
        extra_params: Sequence[str] = (),
        drop_params: bool = False,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        pool: Pool | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self.name = name
        self.models = tuple(models)
        self._known = PARAMS | set(extra_params)
        self._any = "*" in extra_params
        self._drop = drop_params
        own = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = Http(
            name,
            base_url,
            {**own, **(headers or {})},
            secrets=(api_key,),
            connect_timeout_s=connect_timeout_s,
            pool=pool,
            now=now,
        )

    async def complete(self, request: ChatRequest, model: str, *, timeout_s: float) -> Reply:
        body = await self._http.post("/chat/completions", self._question(request, model), timeout_s=timeout_s)
        try:
            answer = _answer.decode(body)
        except _NOT_JSON as exc:
            raise self._no_answer(body) from exc
        if not answer.choices:
            raise self._no_answer(body, "an answer without choices")
        choice = answer.choices[0]
        if not choice.finish_reason:
            raise self._no_answer(body, "an answer without a finish reason")
        said = choice.message
        return Reply(
            content=said.content if isinstance(said.content, str) else _text(said.content),
            model=answer.model or model,
            finish_reason=choice.finish_reason,
            tool_calls=said.tool_calls or [],
            refusal=said.refusal or "",
            usage=_usage(answer.usage),
            id=answer.id or "",
        )

    async def stream(self, request: ChatRequest, model: str, *, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        question = self._question(request, model, stream=True, stream_options={"include_usage": True})
        done = finished = False
        async with self._http.stream("/chat/completions", question, timeout_s=timeout_s) as events:
            while not done and (batch := await events.read()) is not None:
                for event in batch:
                    if event.data.strip() == b"[DONE]":
                        done = True
                        break
                    chunk = self._chunk(event.data, model, begun=events.begun)
                    if chunk is not None:
                        finished = finished or bool(chunk.finish_reason)
                        yield chunk
                        events.handed_out()
            if not done or not finished:
                what = "[DONE]" if finished else "a finish reason"
                raise self._http.error("bad_answer", f"the stream ended without {what}", begun=events.begun)

    async def embed(self, model: str, texts: Sequence[str], params: Json, *, timeout_s: float) -> Embeddings:
        asked = stated(params)
        asked.pop("encoding_format", None)  # the form on the wire is chosen here
        kept = self._kept(asked, EMBED_PARAMS)
        question = encoded(self.name, {**kept, "model": model, "input": list(texts), "encoding_format": "float"})
        body = await self._http.post("/embeddings", question, timeout_s=timeout_s)
        try:
            found = _vectors.decode(body)
        except _NOT_JSON as exc:
            raise self._no_answer(body) from exc
        ordered = sorted(found.data, key=lambda vector: vector.index)
        if [vector.index for vector in ordered] != list(range(len(texts))):
            raise self._no_answer(body, f"{len(found.data)} vectors for {len(texts)} texts")
        return Embeddings(
            vectors=[vector.embedding for vector in ordered], model=found.model or model, usage=_usage(found.usage)
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    def _question(self, request: ChatRequest, model: str, **more: Any) -> bytes:
        kept = self._kept(stated(request.params), self._known)
        return encoded(self.name, {"model": model, "messages": request.messages, **kept, **more})

    def _kept(self, asked: Json, known: frozenset[str]) -> Json:
        unknown = [name for name in asked if name in UNANSWERABLE or (name not in known and not self._any)]
        if not unknown:
            return asked
        if not self._drop:
            hint = "leave it out, or name it in extra_params where this server takes it"
            raise unsupported(self.name, unknown, hint="" if UNANSWERABLE & set(unknown) else hint)
        return {name: value for name, value in asked.items() if name not in unknown}

    def _chunk(self, data: bytes, model: str, *, begun: bool) -> Chunk | None:
        try:
            piece = _piece.decode(data)
        except _NOT_JSON as exc:
            raise self._http.error("bad_answer", f"a piece of the stream is no answer: {exc}", begun=begun) from exc
        if piece.error:
            error = error_in({"error": piece.error}) or {}
            raise self._http.told(error, begun=begun)
        choice = next((c for c in piece.choices or () if c.index == 0), None)
        usage = _usage(piece.usage) if piece.usage is not None else None
        said = choice.delta if choice is not None else None
        finish = (choice.finish_reason or "") if choice is not None else ""
        content = refusal = ""
        calls: list[Json] = []
        if said is not None:
            content = said.content if isinstance(said.content, str) else _text(said.content)
            refusal, calls = said.refusal or "", said.tool_calls or []
        if not (content or calls or refusal or finish or usage):
            return None  # the role alone, or a sign of life
        return Chunk(
            content=content, tool_calls=calls, refusal=refusal, finish_reason=finish, usage=usage,
            model=piece.model or model, id=piece.id or "",
        )  # fmt: skip

    def _no_answer(self, body: bytes, what: str = "what is no chat completion") -> ProviderError:
        """Some servers refuse with status 200."""
        error = error_of(body)
        if error is not None:
            return self._http.told(error, status=200)
        return self._http.error("bad_answer", f"answered {what}", status=200)


def _usage(usage: _Usage | None) -> Usage:
    if usage is None:
        return Usage()
    inner, outer = usage.prompt_tokens_details, usage.completion_tokens_details
    return Usage(
        tokens_in=usage.prompt_tokens,
        tokens_out=usage.completion_tokens,
        cached=inner.cached_tokens if inner is not None else None,
        reasoning=outer.reasoning_tokens if outer is not None else None,
    )


def _text(parts: list[Json] | None) -> str:
    """Mistral answers in parts."""
    return "".join(str(part.get("text", "")) for part in parts or () if part.get("type") == "text")
