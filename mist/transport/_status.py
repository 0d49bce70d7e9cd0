"""HTTP answers to errors and back: pure functions over status, headers and body."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from mist import errors
from mist.errors import MistError

REASON_CHARS_MAX = 300
_NUMBERS = frozenset(
    {
        "size_bytes",
        "size_bytes_max",
        "stated",
        "computed",
        "expected",
        "last",
        "first",
        "after",
        "resume_after",
        "total",
    }
)


def _classes(base: type[MistError]) -> dict[str, type[MistError]]:
    out = {base.code: base} if base is not MistError else {}
    for sub in base.__subclasses__():
        if sub.__module__ == errors.__name__:
            out.update(_classes(sub))
    return out


CLASSES = _classes(MistError)
"""Code -> class, for every error of the tree."""

_BY_STATUS = {
    400: "validation", 401: "auth", 403: "refused", 404: "not_found", 408: "timeout", 409: "conflict",
    411: "validation", 413: "too_large", 415: "validation", 422: "validation", 429: "rate_limit",
    500: "transport", 501: "unsupported", 502: "unavailable", 503: "unavailable", 504: "ambiguous", 507: "storage_full",
}  # fmt: skip
_HINTS = {
    404: "does the path end in /mist?",
    405: "the server takes no POST there; does the path end in /mist?",
    413: "send less at once",
}


def error_for(status: int, headers: Mapping[str, str], body: bytes, where: str) -> MistError:
    """The error that an answer of 300 or above stands for. `headers` has lower-case names."""
    if 300 <= status < 400:
        location = headers.get("location", "")
        return errors.TransportError(
            f"{where}: answered {status} and sends us to {location or 'nowhere'}; nothing was delivered",
            hint="dial that URL if it is meant: redirects are not followed, some turn a POST into a GET",
            meta={"status": str(status), "location": location},
            retryable=False,
        )
    told = _structured(body)
    code = told.get("code", "") if told is not None else ""
    cls = CLASSES.get(code) or CLASSES.get(_BY_STATUS.get(status, ""), errors.TransportError)
    reason = str(told["message"]) if told is not None else _plain(body)
    meta: dict[str, str] = {}
    if told is not None and isinstance(told.get("meta"), dict):
        meta = {str(k): str(v) for k, v in told["meta"].items()}
    meta["status"] = str(status)
    hint = _HINTS.get(status, "") if told is None else meta.pop("hint", "")  # it knows better than we do
    message = f"{where}: answered {status}" + (f": {reason}" if reason else "")
    retryable: bool | None = None
    if cls is errors.TransportError:
        retryable = status >= 500
    return make_error(
        cls, message, hint=hint, meta=meta, retryable=retryable,
        retry_after_s=retry_after(headers.get("retry-after", "")),
    )  # fmt: skip


def make_error(cls: type[MistError], message: str, **fields: Any) -> MistError:
    """An error of a class whose own constructor wants more than we were told. Attributes are filled from `meta`."""
    error = cls.__new__(cls)
    MistError.__init__(error, message, **fields)
    for key in _NUMBERS:
        value = error.meta.get(key, "")
        setattr(error, key, int(value) if value.isascii() and value.isdigit() else 0)
    error.__dict__.setdefault("field", error.meta.get("field", ""))
    error.__dict__.setdefault("ids", [])
    error.__dict__.setdefault("sequences", [])
    error.__dict__.setdefault("capability", "")
    error.__dict__.setdefault("backend", "")
    return error


def _structured(body: bytes) -> dict[str, Any] | None:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if isinstance(value, dict) and isinstance(value.get("code"), str) and isinstance(value.get("message"), str):
        return value
    return None


def _plain(body: bytes) -> str:
    text = body[: REASON_CHARS_MAX * 4].decode("utf-8", "replace").strip()
    if text.startswith("<"):
        return ""  # a proxy's error page says nothing to whoever reads our errors
    return "".join(c if c.isprintable() else " " for c in text)[:REASON_CHARS_MAX]


def retry_after(text: str, now: datetime | None = None) -> float | None:
    """Seconds to wait by a Retry-After header: a number, or a date."""
    text = text.strip()
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())
