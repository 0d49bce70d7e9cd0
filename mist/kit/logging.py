"""Structured logs of a service: one line each, JSON or text, with trace ids and without secrets.

    with open_log("infermux", format="json") as log:
        log.logger().info("routed", provider="openai", latency_ms=12)

Promises: the fields and their order are the Go library's: `time`, `level`, `msg`, `tool`, the logger's own fields, the
call's, then `trace_id` and `span_id` where the code runs in a trace (`in_trace`). What others log with the standard
library (`mist.…`, uvicorn) becomes the same lines; from loggers that are not ours warnings and above, until told
otherwise. A line is one line: control characters, also those that turn text around, are escaped. Values under the key of a
secret (password, token, authorization, api_key, …), passwords in URLs and bearer tokens in text are replaced by `***`; counts
of tokens stay. The level can be changed while it runs. Nothing that is logged can make logging fail.

Does not: write files, rotate or send; that is for who collects standard error. Made of structlog (the extra `logging`);
the functions on text and the trace context need nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal, Self, TextIO

import msgspec

from mist.errors import InvalidArgument
from mist.protocol.tracecontext import TraceContext
from mist.protocol.url import redact

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
FORMATS = ("json", "text")
HIDDEN = "***"
TEXT_CHARS_MAX = 16 * 1024
DEPTH_MAX = 6
OURS = "mist"

Level = Literal["debug", "info", "warn", "error"]
Format = Literal["json", "text"]

trace: ContextVar[TraceContext | None] = ContextVar("mist_trace", default=None)
"""The span the running code belongs to, if any."""


@contextlib.contextmanager
def in_trace(context: TraceContext | None) -> Iterator[None]:
    """Run a block in a span: its log lines carry the ids."""
    token = trace.set(context)
    try:
        yield
    finally:
        trace.reset(token)


# secrets

_WORDS = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")
_SECRET_WORDS = frozenset({
    "authorization", "token", "password", "passwd", "passphrase", "pwd", "secret", "secrets", "apikey", "cookie",
    "credential", "credentials", "jwt", "dsn",
})  # fmt: skip
_SECRET_PAIRS = frozenset({"apikey", "accesskey", "privatekey", "secretkey", "signingkey", "authkey"})
_URL = re.compile(r"\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s\"'<>]+")
_BEARER = re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE)
_ASSIGNED = re.compile(
    r"((?:\b|_)(?:authorization|token|password|passwd|passphrase|secret|api[_-]?key|private[_-]?key|cookie)[\"']?\s*[=:]\s*)"
    r"(\"[^\"]*\"|'[^']*'|[^\s,;&]+)",
    re.IGNORECASE,
)
_KEY = re.compile(r"\bsk-[A-Za-z0-9_-]{12,}")


def is_secret(key: str) -> bool:
    """Whether a key names something that must not be shown: `api_key`, `X-Auth-Token`, `clientSecret`; not `tokens_in`."""
    words = [word.lower() for word in _WORDS.split(key) if word]
    return any(word in _SECRET_WORDS for word in words) or any(a + b in _SECRET_PAIRS for a, b in pairwise(words))


def redact_text(text: str) -> str:
    """The text with passwords of URLs, bearer tokens, API keys and what stands behind `password=` hidden."""
    if "://" in text:
        text = _URL.sub(lambda found: redact(found[0]), text)
    text = _KEY.sub("sk-" + HIDDEN, _BEARER.sub(rf"\1 {HIDDEN}", text))
    return _ASSIGNED.sub(rf"\g<1>{HIDDEN}", text)


def shown(value: Any, key: str = "", depth: int = 0) -> Any:
    """A value as a line may carry it: plain, finite, bounded, without secrets."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    if key and is_secret(key):
        return HIDDEN
    if isinstance(value, timedelta):
        return (value.days * 86_400 + value.seconds) * 1_000_000_000 + value.microseconds * 1000
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bytes | bytearray | memoryview):
        return _text(bytes(value[:TEXT_CHARS_MAX]).decode("utf-8", "backslashreplace"))
    if depth < DEPTH_MAX and isinstance(value, Mapping):
        return {_text(k): shown(v, str(k), depth + 1) for k, v in value.items()}
    if depth < DEPTH_MAX and isinstance(value, list | tuple | set | frozenset):
        return [shown(item, "", depth + 1) for item in value]
    return _text(value)


def _text(value: Any) -> str:
    try:
        text = value if type(value) is str else str(value)
    except Exception as exc:
        text = f"<{type(value).__name__} without text: {type(exc).__name__}>"
    if len(text) > TEXT_CHARS_MAX:
        text = text[:TEXT_CHARS_MAX] + "…"
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode()
    return redact_text(text)


# lines

_LEVEL_NAMES = {logging.DEBUG: "DEBUG", logging.INFO: "INFO", logging.WARNING: "WARN", logging.ERROR: "ERROR"}
_RESERVED = ("time", "level", "msg", "tool", "trace_id", "span_id")
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "_logger", "_name"}


def fields_of(tool: str, record: logging.LogRecord, event: dict[str, Any]) -> dict[str, Any]:
    """One line, in order. `event` is what structlog has: the text under `event`, and the call's fields."""
    msg = event.pop("event", "")
    exc_info = event.pop("exc_info", None)
    event.pop("stack_info", None)
    number = record.levelno
    level = next((name for least, name in sorted(_LEVEL_NAMES.items(), reverse=True) if number >= least), "DEBUG")
    stamp = datetime.fromtimestamp(record.created, UTC)
    out: dict[str, Any] = {
        "time": f"{stamp:%Y-%m-%dT%H:%M:%S.%f}Z", "level": level, "msg": _text(msg), "tool": tool,
    }  # fmt: skip
    if record.name != OURS:
        out["logger"] = record.name
    extra = {k: v for k, v in record.__dict__.items() if k not in _STANDARD}
    for key, value in (*extra.items(), *event.items()):
        name = _text(key)
        out[f"{name}_" if name in _RESERVED else name] = shown(value, key)
    error = _exception(exc_info)
    if error is not None:
        out["error"] = _text(f"{type(error).__name__}: {error}")
        out["stack"] = _text("".join(logging.Formatter().formatException((type(error), error, error.__traceback__))))
    context = trace.get()
    if context is not None:
        out["trace_id"] = context.trace_id
        out["span_id"] = context.span_id
    return out


def _exception(found: Any) -> BaseException | None:
    if found is True:
        return sys.exc_info()[1]
    if isinstance(found, tuple):
        return found[1] if isinstance(found[1], BaseException) else None
    return found if isinstance(found, BaseException) else None


def as_json(fields: Mapping[str, Any]) -> str:
    """Also what JSON may leave as it is and a terminal obeys (C1 controls, marks that turn text around) is escaped."""
    text = msgspec.json.encode(fields).decode()
    if text.isprintable():
        return text
    return "".join([c if c.isprintable() else json.dumps(c)[1:-1] for c in text])


def as_text(fields: Mapping[str, Any]) -> str:
    """`key=value …`, quoted where it has to be."""
    return " ".join(f"{_quoted(key)}={_quoted(value)}" for key, value in fields.items())


def _quoted(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if text and text.isprintable() and not any(c in text for c in ' "='):
        return text
    out = []
    for c in text:
        if c in '"\\':
            out.append("\\" + c)
        elif c.isprintable():
            out.append(c)
        elif c in "\n\r\t":
            out.append({"\n": "\\n", "\r": "\\r", "\t": "\\t"}[c])
        else:
            out.append(f"\\u{ord(c):04x}" if ord(c) < 65536 else f"\\U{ord(c):08x}")
    return '"' + "".join(out) + '"'


class Log:
    """What `open_log` gives: the handler of this process' log, until `close`."""

    def __init__(self, tool: str, level: Level, format: Format, stream: TextIO) -> None:
        structlog = _structlog()
        render: Callable[[Mapping[str, Any]], str] = as_json if format == "json" else as_text

        def line(_logger: Any, _method: str, event: Any) -> str:
            record = event.pop("_record")
            del event["_from_structlog"]
            return render(fields_of(tool, record, event))

        self._structlog = structlog
        self._handler = logging.StreamHandler(stream)
        self._handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=[line]))
        self._before: dict[str, int] = {}
        self.set_level(level)
        logging.getLogger().addHandler(self._handler)

    def logger(self, **fields: Any) -> Any:
        """A structlog logger with fields of its own: `info(msg, **fields)`, `bind(**fields)`, `exception(msg)`."""
        structlog = self._structlog
        found = structlog.wrap_logger(
            logging.getLogger(OURS),
            processors=[structlog.stdlib.filter_by_level, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
            wrapper_class=structlog.stdlib.BoundLogger,
        )
        return found.bind(**fields)

    def set_level(self, level: Level, *, logger: str = OURS) -> None:
        """From now on, for `mist` and everything below it, or for another logger; "" is all that are not ours.

        Raises InvalidArgument for a level that is none.
        """
        if level not in LEVELS:
            raise InvalidArgument(f"no log level {level!r}", hint=f"known: {', '.join(LEVELS)}")
        target = logging.getLogger(logger)
        self._before.setdefault(logger, target.level)
        target.setLevel(LEVELS[level])

    def close(self) -> None:
        """Idempotent; levels are as before."""
        logging.getLogger().removeHandler(self._handler)
        for name, level in self._before.items():
            logging.getLogger(name).setLevel(level)
        self._before.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def open_log(tool: str, *, level: Level = "info", format: Format = "json", stream: TextIO | None = None) -> Log:
    """Write this process' log to `stream` (standard error). Raises InvalidArgument for an unknown level or format."""
    if format not in FORMATS:
        raise InvalidArgument(f"no log format {format!r}", hint=f"known: {', '.join(FORMATS)}")
    return Log(tool, level, format, stream or sys.stderr)


def _structlog() -> Any:
    try:
        import structlog
    except ImportError as exc:
        raise InvalidArgument(
            "structured logs need a package that is not installed (structlog)", hint="pip install 'mist-stack[logging]'"
        ) from exc
    return structlog
