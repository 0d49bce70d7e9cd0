"""Anthropic's Messages API, asked and answered in OpenAI's names.

question    `system` and `developer` messages become the top-level `system`, joined by an empty line; `tool` messages become
            `tool_result` blocks of a user message; neighbours of one role are joined, since turns alternate there.
            `stop` -> `stop_sequences`, `max_tokens` or `max_completion_tokens` -> `max_tokens`, which the API wants: MAX_TOKENS
            where the question says none. `tools`, `tool_choice`, `parallel_tool_calls`, `user`, `reasoning_effort` and a
            `response_format` with a JSON schema have their like. Pictures by URL or data URL.
answer      text blocks joined, `tool_use` -> `tool_calls`; `end_turn`, `stop_sequence` -> `stop`, `max_tokens` -> `length`,
            `tool_use` -> `tool_calls`, `refusal` -> `content_filter`. Its `input_tokens` leave out what was read from
            or written to the cache; ours are all of them.

Refused (`unsupported`): every other parameter (`seed`, `logit_bias`, penalties …), a temperature above 1, sound and files,
names of speakers. Not asked for and not carried: thinking, citations, server tools.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from mist.kit.http1_client import CONNECT_TIMEOUT_S, Pool
from mist.protocol.payloads import Int64
from mist.tools.infermux.chat import ChatMessage, ChatRequest, Chunk, Embeddings, Json, Reply, Usage
from mist.tools.infermux.failures import ProviderError
from mist.tools.infermux.providers.http import Http, utc_now
from mist.tools.infermux.providers.params import encoded, stated, unsupported
from mist.tools.infermux.providers.refusals import error_in, error_of

VERSION = "2023-06-01"
"""Of the API, where the settings name none. The next one, WITHOUT_SAMPLING, takes neither temperature nor top_p."""
WITHOUT_SAMPLING = "2026-10-21"
MAX_TOKENS = 4096
"""Asked for where the question says nothing: the API has no default, every model may say as much."""

_FINISH = {
    "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "model_context_window_exceeded": "length",
    "tool_use": "tool_calls", "refusal": "content_filter",
}  # fmt: skip
_EFFORTS = frozenset({"low", "medium", "high", "xhigh", "max"})


class _Details(Struct):
    thinking_tokens: Int64 | None = None


class _Usage(Struct):
    input_tokens: Int64 | None = None
    output_tokens: Int64 | None = None
    cache_creation_input_tokens: Int64 | None = None
    cache_read_input_tokens: Int64 | None = None
    output_tokens_details: _Details | None = None


class _Block(Struct):
    """Of an answer, or the delta of one."""

    type: str
    text: str = ""
    id: str = ""
    name: str = ""
    input: msgspec.Raw = msgspec.Raw(b"{}")
    partial_json: str = ""


class _Answer(Struct):
    content: list[_Block]
    id: str = ""
    model: str = ""
    stop_reason: str | None = None
    usage: _Usage | None = None


class _Start(Struct):
    id: str = ""
    model: str = ""
    usage: _Usage | None = None


class _Delta(Struct):
    type: str = ""
    text: str = ""
    partial_json: str = ""
    stop_reason: str | None = None


class _Event(Struct):
    type: str
    index: int = 0
    message: _Start | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None
    error: Any = None


_answer = msgspec.json.Decoder(_Answer)
_event = msgspec.json.Decoder(_Event)
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Anthropic:
    """`base_url` ends before `/v1/messages`, or before `/messages`. `max_tokens` is asked for where the question says nothing. `version` is
    that of the API. `drop_params`: leave out what cannot be sent instead of refusing the question."""

    def __init__(
        self,
        name: str,
        *,
        base_url: str,
        api_key: str = "",
        models: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
        max_tokens: int = MAX_TOKENS,
        version: str = VERSION,
        drop_params: bool = False,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        pool: Pool | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self.name = name
        self.models = tuple(models)
        self._max_tokens = max_tokens
        self._sampling = version < WITHOUT_SAMPLING
        self._drop = drop_params
        own = {"anthropic-version": version} | ({"x-api-key": api_key} if api_key else {})
        base_url = base_url.rstrip("/").removesuffix("/v1")
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
        body = await self._http.post("/v1/messages", self._question(request, model), timeout_s=timeout_s)
        try:
            answer = _answer.decode(body)
        except _NOT_JSON as exc:
            raise self._no_answer(body) from exc
        if not answer.stop_reason:
            raise self._no_answer(body, "a message without a stop reason")
        calls = [
            _call(block.id, block.name, bytes(block.input).decode())
            for block in answer.content
            if block.type == "tool_use"
        ]
        return Reply(
            content="".join(block.text for block in answer.content if block.type == "text"),
            model=answer.model or model,
            finish_reason=_FINISH.get(answer.stop_reason, answer.stop_reason),
            tool_calls=calls,
            usage=_usage(answer.usage or _Usage()),
            id=answer.id,
        )

    async def stream(self, request: ChatRequest, model: str, *, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        question = self._question(request, model, stream=True)
        async with self._http.stream("/v1/messages", question, timeout_s=timeout_s) as events:
            answer = _Stream(model)
            while not answer.done and (batch := await events.read()) is not None:
                for event in batch:
                    try:
                        said = _event.decode(event.data)
                    except _NOT_JSON as exc:
                        what = f"a piece of the stream is no event: {exc}"
                        raise self._http.error("bad_answer", what, begun=events.begun) from exc
                    if said.type == "error":
                        raise self._http.told(error_in({"error": said.error}) or {}, begun=events.begun)
                    chunk = answer.take(said)
                    if chunk is not None:
                        yield chunk
                        events.handed_out()
            if not answer.done or not answer.finished:
                what = "message_stop" if answer.finished else "a stop reason"
                raise self._http.error("bad_answer", f"the stream ended without {what}", begun=events.begun)

    async def embed(self, model: str, texts: Sequence[str], params: Json, *, timeout_s: float) -> Embeddings:
        raise ProviderError("unsupported", "has no embeddings", provider=self.name)

    async def aclose(self) -> None:
        await self._http.aclose()

    def _question(self, request: ChatRequest, model: str, **more: Any) -> bytes:
        refused: list[str] = []
        system, messages = _messages(self.name, request.messages, refused)
        body: Json = {"model": model, "max_tokens": self._max_tokens, "messages": messages}
        if system:
            body["system"] = system
        body |= _params(self.name, stated(request.params), refused, sampling=self._sampling)
        if refused and not self._drop:
            raise unsupported(self.name, refused)
        return encoded(self.name, body | more)

    def _no_answer(self, body: bytes, what: str = "what is no message") -> ProviderError:
        """Some servers refuse with status 200."""
        error = error_of(body)
        if error is not None:
            return self._http.told(error, status=200)
        return self._http.error("bad_answer", f"answered {what}", status=200)


class _Stream:
    """An answer under way: events to chunks."""

    def __init__(self, model: str) -> None:
        self.done = False
        self.finished = False
        self._model = model
        self._id = ""
        self._usage = _Usage()
        self._calls: dict[int, int] = {}
        """Place of a block -> place of its tool call."""
        self._silent: set[int] = set()
        """Blocks of tools whose input has not begun: that of a tool without parameters never does."""

    def take(self, event: _Event) -> Chunk | None:
        match event.type:
            case "content_block_delta":
                delta = event.delta or _Delta()
                if delta.type == "text_delta" and delta.text:
                    return self._chunk(content=delta.text)
                if delta.type == "input_json_delta" and delta.partial_json and event.index in self._calls:
                    self._silent.discard(event.index)
                    return self._arguments(event.index, delta.partial_json)
            case "content_block_start" if event.content_block is not None:
                block = event.content_block
                if block.type == "text" and block.text:
                    return self._chunk(content=block.text)
                if block.type == "tool_use":
                    at = self._calls[event.index] = len(self._calls)
                    self._silent.add(event.index)
                    return self._chunk(tool_calls=[{"index": at, **_call(block.id, block.name, "")}])
            case "content_block_stop" if event.index in self._silent:
                self._silent.discard(event.index)
                return self._arguments(event.index, "{}")
            case "message_start" if event.message is not None:
                self._id, self._model = event.message.id, event.message.model or self._model
                self._usage = event.message.usage or self._usage
            case "message_delta":
                self._more(event.usage)
                reason = event.delta.stop_reason if event.delta is not None else None
                if reason:
                    self.finished = True
                    return self._chunk(finish_reason=_FINISH.get(reason, reason), usage=_usage(self._usage))
            case "message_stop":
                self.done = True
            case _:
                pass  # ping, and what may be added: to be passed over, says the API
        return None

    def _arguments(self, block: int, text: str) -> Chunk:
        return self._chunk(tool_calls=[{"index": self._calls[block], "function": {"arguments": text}}])

    def _chunk(self, **fields: Any) -> Chunk:
        return Chunk(model=self._model, id=self._id, **fields)

    def _more(self, usage: _Usage | None) -> None:
        """Later counts are of the whole answer; what they leave out stays."""
        if usage is not None:
            new = {name: value for name, value in msgspec.structs.asdict(usage).items() if value is not None}
            self._usage = msgspec.structs.replace(self._usage, **new)


def _usage(usage: _Usage) -> Usage:
    parts = (usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens)
    details = usage.output_tokens_details
    return Usage(
        tokens_in=sum(part or 0 for part in parts) if usage.input_tokens is not None else None,
        tokens_out=usage.output_tokens,
        cached=usage.cache_read_input_tokens,
        reasoning=details.thinking_tokens if details is not None else None,
    )


def _call(id: str, name: str, arguments: str) -> Json:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _messages(provider: str, messages: Sequence[ChatMessage], refused: list[str]) -> tuple[str, list[Json]]:
    """The system prompt and the turns. What cannot be said is left out, its name put into `refused`."""
    system: list[str] = []
    turns: list[Json] = []
    for message in messages:
        if message.name:
            refused.append("messages.name")
        if message.role in ("system", "developer"):
            system += [block["text"] for block in _blocks(message.content, refused) if block["type"] == "text"]
            continue
        if message.role == "tool":
            role = "user"
            result: Json = {"type": "tool_result", "tool_use_id": message.tool_call_id}
            if inner := _blocks(message.content, refused):
                result["content"] = inner
            blocks = [result]
        elif message.role in ("user", "assistant"):
            role = message.role
            blocks = _blocks(message.content, refused)
            blocks += [use for call in message.tool_calls if (use := _tool_use(provider, call, refused))]
        else:
            raise ProviderError("invalid", f"no role is called {message.role[:50]!r}", provider=provider)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    for turn in turns:
        if len(turn["content"]) == 1 and turn["content"][0]["type"] == "text":
            turn["content"] = turn["content"][0]["text"]
    return "\n\n".join(system), turns


def _blocks(content: str | list[Json] | None, refused: list[str]) -> list[Json]:
    if not content:
        return []  # the API refuses empty text
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    blocks: list[Json] = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            if part.get("text"):
                blocks.append({"type": "text", "text": str(part["text"])})
        elif kind == "image_url":
            image = part.get("image_url")
            url = str(image.get("url", "") if isinstance(image, dict) else image)
            blocks.append({"type": "image", "source": _source(url)})
        else:
            refused.append(f"messages.content.{str(kind)[:50]}")
    return blocks


def _source(url: str) -> Json:
    head, comma, data = url.partition(",")
    if url.startswith("data:") and comma and head.endswith(";base64"):
        return {"type": "base64", "media_type": head[5:-7].split(";")[0], "data": data}
    return {"type": "url", "url": url}


def _tool_use(provider: str, call: Json, refused: list[str]) -> Json:
    function = call.get("function")
    if not isinstance(function, dict):
        refused.append(f"messages.tool_calls.{str(call.get('type'))[:50]}")
        return {}
    try:
        arguments = msgspec.json.decode(str(function.get("arguments") or "{}"))
    except (msgspec.DecodeError, RecursionError) as exc:
        what = f"the arguments of the tool call {str(call.get('id'))[:80]} are no JSON"
        raise ProviderError("invalid", what, provider=provider) from exc
    return {"type": "tool_use", "id": call.get("id", ""), "name": function.get("name", ""), "input": arguments}


def _params(provider: str, asked: Json, refused: list[str], *, sampling: bool) -> Json:
    body: Json = {}
    limits = [asked[name] for name in ("max_tokens", "max_completion_tokens") if name in asked]
    if len(limits) > 1 and limits[0] != limits[1]:
        raise ProviderError("invalid", "max_tokens and max_completion_tokens say different things", provider=provider)
    for name, value in asked.items():
        match name:
            case "max_tokens" | "max_completion_tokens":
                body["max_tokens"] = value
            case "temperature" | "top_p" | "top_k" if not sampling:
                refused.append(name)
            case "temperature" if not isinstance(value, int | float) or value > 1:
                refused.append("temperature above 1")
            case "temperature" | "top_p" | "top_k":
                body[name] = value
            case "stop":
                body["stop_sequences"] = [value] if isinstance(value, str) else value
            case "user":
                body["metadata"] = {"user_id": value}
            case "reasoning_effort" if value in _EFFORTS:
                body.setdefault("output_config", {})["effort"] = value
            case "response_format" if (schema := _schema(value)) is not None:
                body.setdefault("output_config", {})["format"] = {"type": "json_schema", "schema": schema}
            case "tools":
                if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
                    raise ProviderError("invalid", "tools is no list of objects", provider=provider)
                body["tools"] = [known for tool in value if (known := _tool(tool, refused))]
            case "tool_choice" | "parallel_tool_calls":
                pass  # together, below
            case _:
                refused.append(name)
    if not body.get("tools"):
        refused += [f"{name} without tools" for name in ("tool_choice", "parallel_tool_calls") if name in asked]
    else:
        choice = _tool_choice(asked.get("tool_choice", "auto"), refused)
        if asked.get("parallel_tool_calls") is False and choice.get("type") != "none":
            choice["disable_parallel_tool_use"] = True
        if "tool_choice" in asked or "parallel_tool_calls" in asked:
            body["tool_choice"] = choice
    return body


def _schema(response_format: Any) -> Json | None:
    if not isinstance(response_format, dict) or response_format.get("type") != "json_schema":
        return None
    inner = response_format.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    return schema if isinstance(schema, dict) else None


def _tool(tool: Json, refused: list[str]) -> Json:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        refused.append(f"tools.{str(tool.get('type'))[:50]}")
        return {}
    out: Json = {
        "name": function.get("name", ""),
        "input_schema": function.get("parameters") or {"type": "object", "properties": {}},
    }
    if function.get("description"):
        out["description"] = function["description"]
    if function.get("strict") is not None:
        out["strict"] = function["strict"]
    return out


def _tool_choice(choice: Any, refused: list[str]) -> Json:
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        return {"type": "tool", "name": choice["function"].get("name", "")}
    kind = {"auto": "auto", "none": "none", "required": "any"}.get(choice) if isinstance(choice, str) else None
    if kind is None:
        refused.append("tool_choice")
        return {"type": "auto"}
    return {"type": kind}
