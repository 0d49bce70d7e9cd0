"""OpenAI's HTTP shapes: bodies to questions, answers to bodies, pieces to server-sent events, errors to its error JSON.

Promises: a body is decoded once and an answer encoded once. What is of the wrong type is refused with its place (`param`).
A parameter that we have no name for goes to the provider, which takes or refuses it; a part of a message that we do not
carry is refused, because leaving it out would change the question; null is as good as absent. What is not known is not
there: an answer whose tokens nobody stated has no `usage`.

Pure functions and values, no I/O.
"""

from __future__ import annotations

import base64
import re
import time
from array import array
from collections.abc import Mapping
from sys import byteorder
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from mist.errors import (
    InvalidArgument,
    MistError,
    NotAuthorised,
    NotFound,
    Overloaded,
    ProtocolError,
    RateLimited,
    Refused,
    TimedOut,
    TooLarge,
    Unavailable,
    Unsupported,
)
from mist.tools.infermux.chat import Caller, ChatMessage, ChatRequest, Chunk, Embeddings, Json, Reply, Usage
from mist.tools.infermux.failures import Kind, ProviderError

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
OURS = "infermux_error"
THEIRS = "invalid_request_error"
MESSAGES_MAX = 10_000

_encode = msgspec.json.Encoder().encode
_body = msgspec.json.Decoder(dict[str, Any]).decode
_MESSAGE = frozenset(ChatMessage.__struct_fields__)
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


class BadBody(InvalidArgument):
    """A body that cannot be asked. `param` is OpenAI's word for where."""

    def __init__(self, message: str, *, param: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint, meta={"param": param} if param else {})
        self.param = param


class Question(NamedTuple):
    """A question and what of the body is about the answer's form."""

    request: ChatRequest
    stream: bool
    include_usage: bool


# ---------------------------------------------------------------------------- bodies


def chat(body: bytes, *, caller: Caller, meta: dict[str, str], id: str = "", traceparent: str = "") -> Question:
    """A body of `/v1/chat/completions`. Raises BadBody."""
    found = _object(body)
    messages = found.pop("messages", None)
    if not isinstance(messages, list) or not messages:
        raise BadBody("`messages` is a list of at least one message", param="messages")
    if len(messages) > MESSAGES_MAX:
        raise BadBody(f"{len(messages)} messages are more than {MESSAGES_MAX}", param="messages")
    for at, message in enumerate(messages):
        if message.__class__ is dict and (None in message.values() or not message.keys() <= _MESSAGE):
            _tidy(message, at)
    return _asked(found, _messages(messages), caller=caller, meta=meta, id=id, traceparent=traceparent)


def completion(body: bytes, *, caller: Caller, meta: dict[str, str], id: str = "", traceparent: str = "") -> Question:
    """A body of the older `/v1/completions`: its prompt is one user's message. Raises BadBody."""
    found = _object(body)
    prompt = found.pop("prompt", None)
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise BadBody("`prompt` is one text here", param="prompt", hint="several prompts are several requests")
    return _asked(
        found, (ChatMessage(role="user", content=prompt),), caller=caller, meta=meta, id=id, traceparent=traceparent
    )


class EmbeddingBody(NamedTuple):
    model: str
    texts: list[str]
    params: Json
    base64: bool


def embedding(body: bytes) -> EmbeddingBody:
    """A body of `/v1/embeddings`. Raises BadBody."""
    found = _object(body)
    model = _model(found)
    texts = found.pop("input", None)
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise BadBody(
            "`input` is a text or a list of texts", param="input", hint="lists of token numbers are not taken"
        )
    form = found.pop("encoding_format", None) or "float"
    if form not in ("float", "base64"):
        raise BadBody(f"`encoding_format` {str(form)[:40]!r} is neither float nor base64", param="encoding_format")
    return EmbeddingBody(model, texts, {k: v for k, v in found.items() if v is not None}, form == "base64")


def wants_stream(body: bytes) -> bool:
    """Whether an answer in pieces may be wanted. Decoding says so for sure; this is for choosing the way to it."""
    return b'"stream"' in body and _STREAMED.search(body) is not None


_STREAMED = re.compile(rb'"stream"\s*:\s*true')


def _object(body: bytes) -> dict[str, Any]:
    try:
        return _body(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadBody(f"the body is not a JSON object: {exc}") from exc


def _model(found: dict[str, Any]) -> str:
    model = found.pop("model", None)
    if not isinstance(model, str) or not model:
        raise BadBody("`model` is the name of a model, an alias, a group, or auto", param="model")
    return model


def _messages(messages: list[Any]) -> tuple[ChatMessage, ...]:
    try:
        out = msgspec.convert(messages, tuple[ChatMessage, ...])
    except msgspec.ValidationError as exc:
        text, _, place = str(exc).partition(" - at `$")
        param = "messages" + place.rstrip("`")
        raise BadBody(f"{text} at {param}", param=param) from exc
    for at, message in enumerate(out):
        if message.role not in _ROLES:
            raise BadBody(
                f"messages[{at}].role is {message.role[:40]!r}", param=f"messages[{at}].role",
                hint=f"one of {', '.join(sorted(_ROLES))}",
            )  # fmt: skip
    return out


def _tidy(message: dict[str, Any], at: int) -> None:
    """Take out what says nothing; refuse what we would lose. (A client sends an answer back with all its empty fields.)"""
    for name in [k for k in message if k not in _MESSAGE]:
        if message.pop(name) not in (None, "", [], {}):
            raise BadBody(
                f"messages[{at}].{name[:60]} is not carried by this router", param=f"messages[{at}].{name[:60]}",
                hint=f"it knows {', '.join(sorted(_MESSAGE))}",
            )  # fmt: skip
    for name in ("name", "tool_calls", "tool_call_id"):
        if name in message and message[name] is None:
            del message[name]


def _asked(
    found: dict[str, Any],
    messages: tuple[ChatMessage, ...],
    *,
    caller: Caller,
    meta: dict[str, str],
    id: str,
    traceparent: str,
) -> Question:
    model = _model(found)
    stream = found.pop("stream", None)
    if stream is not None and stream.__class__ is not bool:
        raise BadBody("`stream` is true or false", param="stream")
    options = found.pop("stream_options", None)
    include_usage = False
    if options is not None:
        if not isinstance(options, dict):
            raise BadBody("`stream_options` is an object", param="stream_options")
        if not stream:
            raise BadBody("`stream_options` goes with `stream`", param="stream_options")
        include_usage = options.get("include_usage") is True
    many = found.pop("n", None)
    if many not in (None, 1):
        raise BadBody("`n` is 1: one question has one answer here", param="n", hint="ask several times")
    params = found if None not in found.values() else {k: v for k, v in found.items() if v is not None}
    request = ChatRequest(
        model=model, messages=messages, params=params, meta=meta, caller=caller, id=id, traceparent=traceparent
    )
    return Question(request, bool(stream), include_usage)


# ---------------------------------------------------------------------------- answers


class _Message(Struct):
    content: str | None
    refusal: str | None
    tool_calls: list[Json] | msgspec.UnsetType = msgspec.UNSET
    role: str = "assistant"


class _Choice(Struct):
    message: _Message
    finish_reason: str
    index: int = 0
    logprobs: None = None


class _TextChoice(Struct):
    text: str
    finish_reason: str | None
    index: int = 0
    logprobs: None = None


class _Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    completion_tokens_details: dict[str, int] | msgspec.UnsetType = msgspec.UNSET


class _Completion(Struct):
    id: str
    created: int
    model: str
    choices: list[Any]
    usage: _Usage | msgspec.UnsetType = msgspec.UNSET
    object: str = "chat.completion"


def usage_of(usage: Usage) -> _Usage | None:
    """OpenAI's form has no place for "not known": both counts, or nothing."""
    if usage.tokens_in is None or usage.tokens_out is None:
        return None
    out = _Usage(usage.tokens_in, usage.tokens_out, usage.tokens_in + usage.tokens_out)
    if usage.cached is not None:
        out.prompt_tokens_details = {"cached_tokens": usage.cached}
    if usage.reasoning is not None:
        out.completion_tokens_details = {"reasoning_tokens": usage.reasoning}
    return out


def chat_completion(reply: Reply, id: str, created_s: int) -> bytes:
    """The body of an answer."""
    calls = reply.tool_calls
    message = _Message(reply.content if reply.content or not calls else None, reply.refusal or None)
    if calls:
        message.tool_calls = calls
    choice = _Choice(message, reply.finish_reason)
    return _encode(
        _Completion(f"chatcmpl-{id}", created_s, reply.model, [choice], usage_of(reply.usage) or msgspec.UNSET)
    )


def text_completion(reply: Reply, id: str, created_s: int) -> bytes:
    choice = _TextChoice(reply.content, reply.finish_reason)
    usage = usage_of(reply.usage) or msgspec.UNSET
    return _encode(_Completion(f"cmpl-{id}", created_s, reply.model, [choice], usage, "text_completion"))


def embeddings(found: Embeddings, *, as_base64: bool) -> bytes:
    data = [
        {"object": "embedding", "index": at, "embedding": _floats(vector) if as_base64 else vector}
        for at, vector in enumerate(found.vectors)
    ]
    body: Json = {"object": "list", "data": data, "model": found.model}
    if (tokens := found.usage.tokens_in) is not None:
        body["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _encode(body)


def _floats(vector: list[float]) -> str:
    """32-bit floats, little-endian, in base64: what the official client asks for."""
    packed = array("f", vector)
    if byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode("ascii")


def models(names: Mapping[str, str]) -> bytes:
    """`names`: model -> who has it."""
    return _encode({"object": "list", "data": [_model_object(name, owner) for name, owner in names.items()]})


def model(name: str, owner: str) -> bytes:
    return _encode(_model_object(name, owner))


def _model_object(name: str, owner: str) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": owner}


# ---------------------------------------------------------------------------- streams


class Events:
    """The events of one streamed answer. `usage` goes into an event of its own at the end where it was asked for, together
    with what an answer in one piece says in headers (`infermux`)."""

    def __init__(self, id: str, created_s: int, *, include_usage: bool, text: bool = False) -> None:
        self._id = f"cmpl-{id}" if text else f"chatcmpl-{id}"
        self._created_s = created_s
        self._include_usage = include_usage
        self._text = text
        self._object = "text_completion" if text else "chat.completion.chunk"
        self._model = ""
        self._first = True

    def chunk(self, chunk: Chunk) -> bytes:
        """One event; empty where the piece says nothing of the answer (usage alone)."""
        self._model = chunk.model or self._model
        if self._text:
            if not chunk.content and not chunk.finish_reason:
                return b""
            return self._event([_TextChoice(chunk.content, chunk.finish_reason or None)])
        delta: Json = {}
        if self._first:
            delta = {"role": "assistant", "content": chunk.content}
        elif chunk.content:
            delta["content"] = chunk.content
        if chunk.tool_calls:
            delta["tool_calls"] = chunk.tool_calls
        if chunk.refusal:
            delta["refusal"] = chunk.refusal
        if not delta and not chunk.finish_reason:
            return b""
        self._first = False
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": chunk.finish_reason or None}
        return self._event([choice])

    def end(self, usage: Usage, about: Json) -> bytes:
        """What comes after the last piece."""
        if not self._include_usage:
            return DONE
        self._model = about.get("model") or self._model
        return self._event([], usage_of(usage), about) + DONE

    def _event(self, choices: list[Any], usage: _Usage | None = None, about: Json | None = None) -> bytes:
        event: Json = {
            "id": self._id, "object": self._object, "created": self._created_s, "model": self._model, "choices": choices,
        }  # fmt: skip
        if self._include_usage:
            event["usage"] = usage
        if about:
            event["infermux"] = about
        return b"data: %b\n\n" % _encode(event)


# ---------------------------------------------------------------------------- errors

_KINDS: dict[Kind, tuple[str, str]] = {
    "rate_limited": (OURS, "rate_limit"),
    "overloaded": (OURS, "no_healthy_providers"),
    "server": (OURS, "upstream_error"),
    "timeout": (OURS, "upstream_timeout"),
    "connection": (OURS, "upstream_error"),
    "bad_answer": (OURS, "upstream_error"),
    "credentials": (OURS, "upstream_error"),
    "unknown_model": (OURS, "model_not_found"),
    "context_window": (THEIRS, "context_length_exceeded"),
    "content_policy": (THEIRS, "content_filter"),
    "invalid": (THEIRS, "invalid_request"),
    "unsupported": (THEIRS, "unsupported_parameter"),
}


class Said(NamedTuple):
    """What an error is to a client: status, OpenAI's `type`, `code`, and whether asking again may help."""

    status: int
    type: str
    code: str
    again: bool


def said(error: MistError) -> Said:
    """The one table of statuses of every HTTP door here."""
    if isinstance(error, ProviderError):
        kind, code = _KINDS[error.kind]
        return Said(error.http_status, kind, code, error.retryable or error.kind == "timeout")
    if isinstance(error, NotFound):
        return Said(404, OURS, "model_not_found" if "model" in error.meta else error.code, False)
    if isinstance(error, RateLimited):
        code = error.meta.get("reason") or "rate_limit"
        return Said(429, OURS, code, code != "budget_exceeded")
    if isinstance(error, Overloaded):  # this router, not a provider
        return Said(503, OURS, "overloaded", True)
    if isinstance(error, Unavailable):  # CircuitOpen is one
        return Said(503, OURS, "no_healthy_providers", True)
    if isinstance(error, TimedOut):
        return Said(504, OURS, "upstream_timeout", True)
    if isinstance(error, NotAuthorised):
        return Said(401, THEIRS, "invalid_api_key", False)
    if isinstance(error, Refused):
        return Said(403, THEIRS, "refused", False)
    if isinstance(error, TooLarge):
        return Said(413, THEIRS, "too_large", False)
    if isinstance(error, BadBody | InvalidArgument | Unsupported | ProtocolError):
        return Said(400, THEIRS, "invalid_request", False)
    return Said(error.http_status, OURS, error.code, error.retryable)


def error_body(error: MistError) -> bytes:
    """OpenAI's error JSON. In the middle of a stream it is an event, which the official client raises; no [DONE] follows it:
    the answer is not whole."""
    what = said(error)
    return _encode(
        {"error": {"message": str(error), "type": what.type, "param": error.meta.get("param"), "code": what.code}}
    )


def now_s() -> int:
    return int(time.time())
