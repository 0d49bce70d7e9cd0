"""Attributes as they lie on the wire, made into pieces of a payload's JSON; those that repeat are made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec

from mist.errors import Malformed
from mist.tools.tokentrace.otlp import genai, names

ENTRIES_MAX = 4096
ENTRY_BYTES_MAX = 256

_encode = msgspec.json.Encoder().encode


class Entry(NamedTuple):
    """An attribute, ready to be put into `attrs`: its name there and `"name":value`. Where it fills a column of ours:
    the column, the rank among those that fill it (-1: it bears the column's own name) and `"column":value`."""

    name: str
    text: str
    column: str = ""
    rank: int = 0
    filled: str = ""


class Entries:
    """Attributes as they lie on the wire -> entries. Bounded: emptied when it is full, refilled by what is in use.

    `read` gives the name and the JSON-able value of one. Several threads may use one table."""

    def __init__(self, read: Callable[[bytes], tuple[str, Any]]) -> None:
        self._read = read
        self.known: dict[bytes, Entry] = {}

    def make(self, raw: bytes) -> Entry:
        """Raises Malformed; TooDeep for a value nested too deeply."""
        entry = entry_of(*self._read(raw))
        if len(raw) <= ENTRY_BYTES_MAX:
            if len(self.known) >= ENTRIES_MAX:
                self.known.clear()
            self.known[raw] = entry
        return entry

    def texts(self, raws: Iterable[bytes], prefix: str = "") -> dict[str, str]:
        """Attributes that are not a span's own: under their plain names, with a prefix."""
        out: dict[str, str] = {}
        for raw in raws:
            name, text, *_ = self.known.get(raw) or self.make(raw)
            bare = text[len(names.ATTR) + 1 :] if name.startswith(names.ATTR) else text[1:]
            out[name] = f'"{prefix}{bare}'
        return out

    def block(self, raws: Iterable[bytes]) -> str:
        return "{" + ",".join(self.texts(raws).values()) + "}"


def entry_of(key: str, value: Any) -> Entry:
    name = names.ATTR + key if key.startswith(names.RESERVED) else key
    text = f"{json_text(name)}:{json_text(value)}"
    if name in genai.COLUMNS:
        return Entry(name, text, name, -1)
    source = genai.SOURCES.get(name)
    column = None if source is None else source.read(value)
    if source is None or column is None:
        return Entry(name, text)
    return Entry(name, text, source.column, source.rank, f'"{source.column}":{json_text(column)}')


def json_text(value: Any) -> str:
    try:
        return _encode(value).decode()
    except UnicodeEncodeError as exc:
        raise Malformed(f"OTLP request: {exc}") from exc
