"""Files of calls to envelopes: CSV with a header, or JSON lines.

A CSV column is found by its name in any case, or by an explicit mapping. Known names: those of the store (trace_id,
span_id, parent_id, operation, status, model, provider, start_ns, end_ns, latency_ms, tokens_in, tokens_out, cost_usd),
`timestamp`, and those of the Azure LLM inference traces (TIMESTAMP, ContextTokens, GeneratedTokens). Other columns
are kept as attributes. A JSON line is a whole envelope, a span in its wire shape or that of the seed's documents, or an
object with the same names.

Promises: a row without ids gets them from the file's digest and its number, so that the same file can be read again
without making new spans; an empty cell is unknown; a row that cannot be read is reported with its line and the next
one is read. Times without a zone are UTC. Memory: one row.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from mist.errors import InvalidArgument, MistError, NotFound, Refused
from mist.protocol.codec import decode_foreign
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN, TraceSpan
from mist.tools.tokentrace.spans import INT_MAX

SOURCE = "tokentrace.ingest"
OPERATION = "chat"
FIELD_CHARS_MAX = 1024 * 1024

TEXTS = ("trace_id", "span_id", "parent_id", "operation", "status", "model", "provider")
COUNTS = ("tokens_in", "tokens_out")
AMOUNTS = ("latency_ms", "cost_usd")
TIMES = ("start_ns", "end_ns", "timestamp")
KNOWN = (*TEXTS, *COUNTS, *AMOUNTS, *TIMES)
ALIASES = {"contexttokens": "tokens_in", "generatedtokens": "tokens_out"}
DOCUMENTED = {
    "parent_span_id": "parent_id", "name": "operation", "started_at": "start_ns", "ended_at": "end_ns",
    "prompt_tokens": "tokens_in", "comp_tokens": "tokens_out", "completion_tokens": "tokens_out", "attributes": "attrs",
}  # fmt: skip
"""What the seed's documents call the fields of a span in JSON -> ours."""


class BadRow(Struct, frozen=True):
    """A row that did not become an envelope: its line in the file and why."""

    line: int
    reason: str


def digest(path: Path) -> str:
    """SHA-256 of the file, hex."""
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except FileNotFoundError as exc:
        raise NotFound(f"no file {path}") from exc
    except OSError as exc:
        raise Refused(f"{path}: {exc.strerror or exc}") from exc


def row_id(file_digest: str, number: int) -> str:
    """The id of row `number` (from 1) of a file: 32 hex, the same whenever the file is read."""
    return hashlib.sha256(f"{file_digest}:{number}".encode()).hexdigest()[:32]


def envelopes_of(
    path: Path, *, model: str = "", operation: str = OPERATION, columns: Mapping[str, str] | None = None
) -> Iterator[Envelope | BadRow]:
    """The envelopes of a file, in its order. `model` is for rows that name none ("" = the file's name without its
    ending); `columns` maps our name to the file's column.

    Raises NotFound, Refused (not readable), InvalidArgument (neither .csv nor .jsonl, or a header we cannot map).
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".jsonl", ".ndjson"):
        raise InvalidArgument(f"{path}: cannot tell what this is", hint="name it .csv (with a header) or .jsonl")
    name = digest(path)
    reader = _csv_rows if kind == ".csv" else _json_rows
    return reader(path, name, model or path.stem, operation, dict(columns or {}))


def ours(span: Mapping[str, Any]) -> dict[str, Any]:
    """A span's fields under our names, which win where both are there; without what is unknown: null, and a `ttft_ms` of 0,
    which the documents leave out of their figures."""
    out: dict[str, Any] = {}
    for key, value in span.items():
        name = DOCUMENTED.get(key, key)
        if name != key and span.get(name) is not None:
            name = key
        if value is not None and not (name == "ttft_ms" and value == 0):
            out[name] = value
    return out


def _csv_rows(
    path: Path, file_digest: str, model: str, operation: str, columns: dict[str, str]
) -> Iterator[Envelope | BadRow]:
    csv.field_size_limit(FIELD_CHARS_MAX)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as f:
        reader = csv.reader(f)
        header = next(reader, [])
        names = _names(path, header, columns)
        number = 0
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as exc:
                yield BadRow(reader.line_num, str(exc))
                continue
            if not cells:
                continue
            number += 1
            if len(cells) != len(header):
                yield BadRow(reader.line_num, f"{len(cells)} cells where the header has {len(header)}")
                continue
            fields = {name: cell for name, cell in zip(names, cells, strict=True) if cell != ""}
            try:
                yield _envelope(fields, row_id(file_digest, number), model, operation)
            except (ValueError, MistError) as exc:
                yield BadRow(reader.line_num, str(exc))


def _names(path: Path, header: list[str], columns: dict[str, str]) -> list[str]:
    """What each column is called by us."""
    for ours, theirs in columns.items():
        if ours not in KNOWN:
            raise InvalidArgument(
                f"--column {ours}={theirs}: {ours} is not one of ours", hint=f"ours: {', '.join(KNOWN)}"
            )
        if theirs not in header:
            raise InvalidArgument(f"{path} has no column {theirs!r}", hint=f"its columns: {', '.join(header)[:300]}")
    back = {theirs: ours for ours, theirs in columns.items()}
    names = [back.get(column) or _known(column.strip()) for column in header]
    if not set(names) & set(KNOWN):
        raise InvalidArgument(
            f"{path}: no column we know in its header: {', '.join(header)[:200]}",
            hint=f"say which is which, for example --column tokens_in=PromptTokens; ours: {', '.join(KNOWN)}",
        )
    if len(set(names)) != len(names):
        raise InvalidArgument(f"{path}: two columns mean the same: {', '.join(header)[:200]}", hint="use --column")
    return names


def _known(name: str) -> str:
    """Our name for a column or key, or the one it has."""
    plain = name.lower()
    return ALIASES.get(plain) or (plain if plain in KNOWN else name)


def _json_rows(
    path: Path, file_digest: str, model: str, operation: str, columns: dict[str, str]
) -> Iterator[Envelope | BadRow]:
    back = {theirs: ours for ours, theirs in columns.items()}
    with path.open("rb") as f:
        number = 0
        for line_number, line in enumerate(f, 1):
            if not line.strip():
                continue
            number += 1
            try:
                value = _object(line)
                if "payload" in value and "type" in value:
                    env = decode_foreign(line.strip())
                    if env.type != TRACE_SPAN:
                        raise ValueError(f"an envelope of type {env.type}, not {TRACE_SPAN}")
                    yield env
                    continue
                mapped = {back.get(k, k): v for k, v in value.items()}
                fields = {_known(k): v for k, v in ours(mapped).items()}
                attrs = fields.pop("attrs", {})
                if not isinstance(attrs, dict):
                    raise ValueError("attrs is not an object")
                yield _envelope({**attrs, **fields}, row_id(file_digest, number), model, operation)
            except (ValueError, RecursionError, MistError) as exc:
                yield BadRow(line_number, str(exc))


def _envelope(fields: dict[str, Any], id: str, model: str, operation: str) -> Envelope:
    attrs: dict[str, Any] = {"model": str(fields.pop("model", model))}
    start = time_ns(fields.pop("start_ns")) if "start_ns" in fields else 0
    stamp = fields.pop("timestamp", None)
    if not start and stamp is not None:
        start = time_ns(stamp)
    span = {name: _word(fields.pop(name), name) for name in TEXTS if name in fields and name != "provider"}
    end = time_ns(fields.pop("end_ns")) if "end_ns" in fields else 0
    for name in COUNTS:
        if name in fields:
            attrs[name] = _number(fields.pop(name), name, whole=True)
    for name in AMOUNTS:
        if name in fields:
            attrs[name] = _number(fields.pop(name), name)
    attrs.update(fields)
    payload = TraceSpan(
        trace_id=span.get("trace_id") or id,
        span_id=span.get("span_id") or id[:16],
        parent_id=span.get("parent_id", ""),
        operation=span.get("operation", operation),
        start_ns=start,
        end_ns=end,
        status=span.get("status", ""),
        attrs=attrs,
    )
    return Envelope.new(TRACE_SPAN, payload, source=SOURCE, id=id, timestamp_ns=start)


def _object(line: bytes) -> dict[str, Any]:
    value = msgspec.json.decode(line)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _word(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is not text: {value!r:.60}")
    return value


def _number(value: Any, name: str, *, whole: bool = False) -> int | float:
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if not 0 <= number <= 2**53 or (whole and not number.is_integer()):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{name} is not a {'whole ' if whole else ''}number from 0 to 2^53: {value!r:.60}") from None
    return int(number) if whole else number


_FRACTION = re.compile(r"^(.*\d)\.(\d{1,9})\d*(Z|[+-]\d\d:?\d\d)?$", re.ASCII)


def time_ns(value: Any) -> int:
    """Unix nanoseconds of a number (already nanoseconds) or an ISO 8601 time, to the nanosecond; no zone means UTC. Raises
    ValueError, also for a time that 64 bits cannot hold: no reader could take the envelope."""
    found = _time_ns(value)
    if not 0 <= found <= INT_MAX:
        raise ValueError(f"not a time from 1970 to 2262: {value!r:.60}")
    return found


def _time_ns(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError(f"not a time: {value!r:.60}")
    text = value.strip()
    if text.isascii() and text.isdigit() and len(text) >= 16:
        return int(text)
    fraction = 0
    m = _FRACTION.match(text)
    if m:
        fraction = int(m[2].ljust(9, "0"))
        text = m[1] + (m[3] or "")
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"not a time: {value!r:.60}") from None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return int(at.timestamp()) * 1_000_000_000 + fraction
