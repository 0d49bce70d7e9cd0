"""What OpenAI's and Anthropic's APIs say, in their own words: bodies, events, errors. Used by providers.py."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from msgspec import Struct

FaultName = Literal[
    "context_length", "content_policy", "credentials", "forbidden", "unknown_model", "invalid", "rate_limited",
    "no_quota", "server", "overloaded", "slow_headers", "slow_chunks", "truncated", "no_done", "error_in_stream",
    "bad_json", "no_choices", "not_an_object", "bad_utf8", "redirect", "html", "hang_up", "refused_with_200", "huge", "bad_piece",
    "compressed",
]  # fmt: skip


class Answer(Struct, frozen=True, kw_only=True):
    """What a model says. `tool_calls` are pairs of a name and its arguments. `pieces`: how the text is cut in a stream; words
    where it is empty."""

    text: str = ""
    tool_calls: list[tuple[str, dict[str, Any]]] = []
    finish: str = ""
    pieces: list[str] = []
    cached: int = 0
    reasoning: int = 0
    refusal: str = ""


def _words(answer: Answer) -> list[str]:
    if answer.pieces:
        return answer.pieces
    first, *rest = answer.text.split(" ")
    return [first, *(f" {word}" for word in rest)] if answer.text else []


def _tokens_in(messages: list[Any]) -> int:
    return sum(len(json.dumps(message.get("content")).split()) for message in messages)


def _tokens_out(answer: Answer) -> int:
    return len(answer.text.split()) + 5 * len(answer.tool_calls) + answer.reasoning


class Dialect:
    """What the two APIs say differently."""

    def key_of(self, headers: Mapping[str, str]) -> str:
        raise NotImplementedError

    def tools(self, body: Mapping[str, Any]) -> list[str]:
        raise NotImplementedError

    def wrong(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> str:
        """What a real server would refuse in this question."""
        raise NotImplementedError

    def whole(self, body: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def events(self, body: Mapping[str, Any], answer: Answer) -> Iterator[tuple[bytes, bool]]:
        """The bytes of each event, and whether it is a piece of the answer."""
        raise NotImplementedError

    def error(self, name: FaultName, model: str, message: str = "") -> tuple[int, dict[str, Any]]:
        raise NotImplementedError

    def error_event(self) -> bytes:
        raise NotImplementedError


class _OpenAI(Dialect):
    _ERRORS: Mapping[str, tuple[int, str, str, str | None, str | None]] = {
        "context_length": (400, "This model's maximum context length is 128000 tokens. However, your messages resulted in 130000 tokens. Please reduce the length of the messages.", "invalid_request_error", "messages", "context_length_exceeded"),
        "content_policy": (400, "The response was filtered due to the prompt triggering our content management policy.", "invalid_request_error", "prompt", "content_filter"),
        "credentials": (401, "Incorrect API key provided: {key}.", "invalid_request_error", None, "invalid_api_key"),
        "forbidden": (403, "Project does not have access to model `{model}`", "invalid_request_error", None, "model_access_denied"),
        "unknown_model": (404, "The model `{model}` does not exist or you do not have access to it.", "invalid_request_error", None, "model_not_found"),
        "invalid": (400, "Invalid type for 'messages[0].content'.", "invalid_request_error", "messages", "invalid_type"),
        "rate_limited": (429, "Rate limit reached for {model} on requests per min (RPM): Limit 3, Used 3, Requested 1. Please try again in 20s.", "requests", None, "rate_limit_exceeded"),
        "no_quota": (429, "You exceeded your current quota, please check your plan and billing details.", "insufficient_quota", None, "insufficient_quota"),
        "server": (500, "The server had an error while processing your request. Sorry about that!", "server_error", None, None),
        "overloaded": (503, "The engine is currently overloaded, please try again later.", "server_error", None, None),
    }  # fmt: skip
    _numbers = itertools.count(1)

    def key_of(self, headers: Mapping[str, str]) -> str:
        return headers.get("authorization", "").removeprefix("Bearer ")

    def tools(self, body: Mapping[str, Any]) -> list[str]:
        if body.get("tool_choice") == "none":
            return []
        return [tool["function"]["name"] for tool in body.get("tools") or ()]

    def wrong(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> str:
        if not body.get("messages"):
            return "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead."
        if body.get("stream_options") and not body.get("stream"):
            return "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        return ""

    def whole(self, body: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant", "content": answer.text or None, "refusal": answer.refusal or None, "annotations": [],
        }  # fmt: skip
        if answer.tool_calls:
            message["tool_calls"] = [
                {"id": f"call_{at}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
                for at, (name, arguments) in enumerate(answer.tool_calls)
            ]
        return {
            **self._frame(body, "chat.completion"),
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish(answer)}],
            "usage": self._usage(body, answer),
        }

    def events(self, body: Mapping[str, Any], answer: Answer) -> Iterator[tuple[bytes, bool]]:
        frame = self._frame(body, "chat.completion.chunk")
        with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        if with_usage:
            frame["usage"] = None

        def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return self._data({**frame, "choices": [choice]})

        yield event({"role": "assistant", "content": None if answer.tool_calls else "", "refusal": None}), False
        for word in _words(answer):
            yield event({"content": word}), True
        if answer.refusal:
            yield event({"refusal": answer.refusal}), True
        for at, (name, arguments) in enumerate(answer.tool_calls):
            function = {"name": name, "arguments": ""}
            yield (
                event({"tool_calls": [{"index": at, "id": f"call_{at}", "type": "function", "function": function}]}),
                True,
            )
            text = json.dumps(arguments)
            for part in (text[: len(text) // 2], text[len(text) // 2 :]):
                yield event({"tool_calls": [{"index": at, "function": {"arguments": part}}]}), True
        yield event({}, self._finish(answer)), False
        if with_usage:
            yield self._data({**frame, "choices": [], "usage": self._usage(body, answer)}), False
        yield b"data: [DONE]\n\n", False

    def error(self, name: FaultName, model: str, message: str = "") -> tuple[int, dict[str, Any]]:
        status, text, type_, param, code = self._ERRORS[name]
        text = message or text.replace("{model}", model).replace("{key}", "sk-wrong")
        return status, {"error": {"message": text, "type": type_, "param": param, "code": code}}

    def error_event(self) -> bytes:
        return self._data({"error": self.error("server", "")[1]["error"]})

    def _frame(self, body: Mapping[str, Any], kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{next(self._numbers)}", "object": kind, "created": 1_700_000_000, "model": body["model"],
            "service_tier": "default", "system_fingerprint": "fp_0",
        }  # fmt: skip

    def _usage(self, body: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
        tokens_in, tokens_out = _tokens_in(body["messages"]), _tokens_out(answer)
        return {
            "prompt_tokens": tokens_in,
            "completion_tokens": tokens_out,
            "total_tokens": tokens_in + tokens_out,
            "prompt_tokens_details": {"cached_tokens": answer.cached, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": answer.reasoning, "audio_tokens": 0},
        }

    def _finish(self, answer: Answer) -> str:
        return answer.finish or ("tool_calls" if answer.tool_calls else "stop")

    def _data(self, value: dict[str, Any]) -> bytes:
        return b"data: %s\n\n" % json.dumps(value).encode()


class _Anthropic(Dialect):
    _ERRORS: Mapping[str, tuple[int, str, str]] = {
        "context_length": (400, "invalid_request_error", "prompt is too long: 208310 tokens > 200000 maximum"),
        "content_policy": (400, "content_filter", "Output blocked by content filtering policy"),
        "credentials": (401, "authentication_error", "invalid x-api-key"),
        "forbidden": (403, "permission_error", "Your API key does not have permission to use the specified resource."),
        "unknown_model": (404, "not_found_error", "model: {model}"),
        "invalid": (400, "invalid_request_error", "messages.0.content: Input should be a valid string"),
        "rate_limited": (429, "rate_limit_error", "This request would exceed your organization's rate limit."),
        "no_quota": (400, "invalid_request_error", "Your credit balance is too low to access the Anthropic API."),
        "server": (500, "api_error", "Internal server error"),
        "overloaded": (529, "overloaded_error", "Overloaded"),
    }  # fmt: skip

    def key_of(self, headers: Mapping[str, str]) -> str:
        return headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")

    def tools(self, body: Mapping[str, Any]) -> list[str]:
        if (body.get("tool_choice") or {}).get("type") == "none":
            return []
        return [tool["name"] for tool in body.get("tools") or ()]

    def wrong(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> str:
        if "anthropic-version" not in headers:
            return "anthropic-version: header is required"
        if not isinstance(body.get("max_tokens"), int):
            return "max_tokens: Field required"
        if not body.get("messages"):
            return "messages: at least one message is required"
        for at, message in enumerate(body["messages"]):
            if message.get("role") not in ("user", "assistant"):
                return f'messages: Unexpected role "{message.get("role")}". The Messages API accepts a top-level `system` parameter.'
            for part in message["content"] if isinstance(message["content"], list) else ():
                if part.get("type") == "text" and not part.get("text"):
                    return f"messages.{at}: text content blocks must be non-empty"
        unknown = body.keys() - {
            "model", "max_tokens", "messages", "system", "temperature", "top_p", "top_k", "stop_sequences", "tools",
            "tool_choice", "metadata", "stream", "output_config", "thinking", "service_tier",
        }  # fmt: skip
        if unknown:
            return f"{min(unknown)}: Extra inputs are not permitted"
        gone = body.keys() & {"temperature", "top_p", "top_k"}
        if gone and headers["anthropic-version"] >= "2026-10-21":
            return f"{min(gone)}: Extra inputs are not permitted"
        if not 0 <= body.get("temperature", 0) <= 1:
            return "temperature: range: 0..1"
        return ""

    def whole(self, body: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = [{"type": "text", "text": answer.text, "citations": None}] if answer.text else []
        blocks += [
            {"type": "tool_use", "id": f"toolu_{at}", "name": name, "input": arguments}
            for at, (name, arguments) in enumerate(answer.tool_calls)
        ]
        return {**self._frame(body), "content": blocks, "stop_reason": self._stop(answer), "stop_sequence": None, "usage": self._usage(body, answer)}  # fmt: skip

    def events(self, body: Mapping[str, Any], answer: Answer) -> Iterator[tuple[bytes, bool]]:
        usage = self._usage(body, answer)
        start = {**self._frame(body), "content": [], "stop_reason": None, "stop_sequence": None, "usage": {**usage, "output_tokens": 1}}  # fmt: skip
        yield self._event("message_start", message=start), False
        yield self._event("ping"), False
        words, at = _words(answer), 0
        if words:
            yield self._event("content_block_start", index=at, content_block={"type": "text", "text": ""}), False
            for word in words:
                yield self._event("content_block_delta", index=at, delta={"type": "text_delta", "text": word}), True
            yield self._event("content_block_stop", index=at), False
            at += 1
        for number, (name, arguments) in enumerate(answer.tool_calls):
            block = {"type": "tool_use", "id": f"toolu_{number}", "name": name, "input": {}}
            yield self._event("content_block_start", index=at, content_block=block), True
            text = json.dumps(arguments) if arguments else ""
            for part in ("", text[: len(text) // 2], text[len(text) // 2 :]) if text else ("",):
                delta = {"type": "input_json_delta", "partial_json": part}
                yield self._event("content_block_delta", index=at, delta=delta), True
            yield self._event("content_block_stop", index=at), False
            at += 1
        end = {"stop_reason": self._stop(answer), "stop_sequence": None}
        yield self._event("message_delta", delta=end, usage={"output_tokens": usage["output_tokens"]}), False
        yield self._event("message_stop"), False

    def error(self, name: FaultName, model: str, message: str = "") -> tuple[int, dict[str, Any]]:
        status, type_, text = self._ERRORS[name]
        error = {"type": type_, "message": message or text.replace("{model}", model)}
        return status, {"type": "error", "error": error, "request_id": "req_0123"}

    def error_event(self) -> bytes:
        return self._event("error", error=self.error("overloaded", "")[1]["error"])

    def _frame(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {"id": "msg_0123", "type": "message", "role": "assistant", "model": body["model"]}

    def _usage(self, body: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
        return {
            "input_tokens": _tokens_in(body["messages"]),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": answer.cached,
            "output_tokens": _tokens_out(answer),
            "service_tier": "standard",
        }

    def _stop(self, answer: Answer) -> str:
        return answer.finish or ("tool_use" if answer.tool_calls else "end_turn")

    def _event(self, type_: str, **fields: Any) -> bytes:
        return b"event: %s\ndata: %s\n\n" % (type_.encode(), json.dumps({"type": type_, **fields}).encode())


OPENAI = _OpenAI()
ANTHROPIC = _Anthropic()
