"""What a provider's refusal means: status, error body and headers to a kind of failures.py. Pure functions.

The status decides, unless the body is more exact: a context that is too long, a forbidden content and a wrong value all
come with 400, an empty purse with 429. A code wins over a type, both over words in the message; words are looked at only
because servers that speak OpenAI's format (vLLM, llama.cpp …) invent no code for a context that is too long.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from mist.tools.infermux.failures import Kind
from mist.transport._status import retry_after

REASON_CHARS_MAX = 500

_BY_STATUS: dict[int, Kind] = {
    400: "invalid", 401: "credentials", 402: "credentials", 403: "credentials", 404: "unknown_model", 408: "timeout",
    409: "server", 413: "invalid", 422: "invalid", 429: "rate_limited", 500: "server", 502: "server", 503: "overloaded",
    504: "timeout", 529: "overloaded",
}  # fmt: skip
_BY_CODE: dict[str, Kind] = {
    # OpenAI's `code`, Azure's, and llama.cpp's `type`
    "context_length_exceeded": "context_window",
    "exceed_context_size_error": "context_window",
    "content_policy_violation": "content_policy",
    "content_filter": "content_policy",
    "model_not_found": "unknown_model",
    "DeploymentNotFound": "unknown_model",
    "invalid_api_key": "credentials",
    "insufficient_quota": "credentials",
    "billing_hard_limit_reached": "credentials",
    "rate_limit_exceeded": "rate_limited",
    "unknown_parameter": "unsupported",
    "unsupported_parameter": "unsupported",
    "unsupported_value": "unsupported",
    # types of Anthropic, and of servers that answer in the middle of a stream, where no status says it
    "authentication_error": "credentials",
    "permission_error": "credentials",
    "billing_error": "credentials",
    "not_found_error": "unknown_model",
    "rate_limit_error": "rate_limited",
    "overloaded_error": "overloaded",
    "timeout_error": "timeout",
}
_TOO_LONG = re.compile(
    r"context (?:length|window|size)|maximum context|prompt is too long|exceed context limit|reduce the length of the",
    re.I,
)
_NO_CREDIT = re.compile(r"credit balance is too low", re.I)
_NOT_HERE = re.compile(r"(?:not supported|unsupported|deprecated) (?:for|with|by|in) this model|does not support", re.I)
_CLIENT = frozenset({0, 400, 413, 422})


def kind_of(status: int, error: Mapping[str, Any]) -> Kind:
    """`error` is the object that OpenAI and Anthropic both call `error`; `status` 0: in the middle of a stream."""
    message = str(error.get("message") or "")
    if status in _CLIENT:
        if _TOO_LONG.search(message):
            return "context_window"
        if _NO_CREDIT.search(message):  # Anthropic says so with 400
            return "credentials"
    for key in ("code", "type"):
        kind = _BY_CODE.get(str(error.get(key)))
        if kind is not None:
            return kind
    if not status and isinstance(error.get("code"), int):
        status = error["code"]  # vLLM, in a stream
    if status in _CLIENT and _NOT_HERE.search(message):
        return "unsupported"
    kind = _BY_STATUS.get(status)
    if kind is not None:
        return kind
    if status < 300:  # said inside an answer
        return "invalid" if error.get("type") == "invalid_request_error" else "server"
    if status < 400:
        return "bad_answer"
    return "invalid" if status < 500 else "server"


def said_by(body: bytes) -> dict[str, Any]:
    """The error object of a refusal's body; plain text becomes its message, a proxy's page says nothing."""
    error = error_of(body)
    if error is None:
        text = body[: REASON_CHARS_MAX * 4].decode("utf-8", "replace").strip()
        return {} if text.startswith(("<", "{", "[")) else {"message": text}
    return error


def error_of(body: bytes) -> dict[str, Any] | None:
    """The error object in a body, None where there is none or it is no JSON."""
    try:
        return error_in(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def error_in(value: Any) -> dict[str, Any] | None:
    """The error object inside an answer, None where it holds none."""
    if not isinstance(value, dict):
        return None
    error = value.get("error")
    if isinstance(error, dict):
        return error
    if isinstance(error, str):  # Ollama
        return {"message": error}
    if value.get("object") == "error" or ("detail" in value and "choices" not in value):  # older vLLM; FastAPI
        return value if "message" in value else {"message": str(value.get("detail"))}
    return None


def reason_of(error: Mapping[str, Any]) -> str:
    """One printable line."""
    text = str(error.get("message") or error.get("type") or error.get("code") or "")
    return "".join(c if c.isprintable() else " " for c in text)[:REASON_CHARS_MAX]


def asked_to_wait_s(headers: Mapping[str, str], now: datetime) -> float | None:
    """`retry-after-ms` (OpenAI), else `retry-after`: seconds, fractions too, or a date. None where there is neither, or
    nothing to make of it. `headers` finds names in any case."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        if not text:
            continue
        try:
            seconds = float(text) * unit
        except ValueError:
            if unit == 1.0:
                try:
                    return retry_after(text, now)
                except (OverflowError, TypeError):
                    return None
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    return None
