"""Attributes as they lie on the wire, made into pieces of a payload's JSON; those that repeat are made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from mist.errors import Malformed
from mist.tools.tokentrace.otlp import genai, names

ENTRIES_MAX = 8192
ENTRY_BYTES_MAX = 128

_name = itemgetter(0)
_encode = msgspec.json.Encoder().encode


class Entry(NamedTuple):
    """An attribute, ready to be put into `attrs`.

    `text` is `"name":value`, with the name it has there, and behind it `,"column":value` where it is the first choice for
    a column of ours. `special` entries have to be looked at together with the span's others: the operation, what is only a
    later choice for a column, what bears a column's own name (rank -1), what `names.ADDED` lists. `filled` is
    `"column":value`. `bare` is `"key":value` for attributes of events, links, scopes and resources, whose names meet none
    of ours.
    """

    name: str
    text: str
    special: bool
    column: str
    rank: int
    filled: str
    bare: str


class _Key(NamedTuple):
    """What is the same for all attributes of one key."""

    name: str
    prefix: str
    bare: str
    special: bool
    column: str
    rank: int
    read: genai.Read | None


class Entries:
    """Attributes as they lie on the wire -> entries. Bounded: what was not used since the table was last full is dropped.

    `read` gives the name and the JSON-able value of one. Several threads may use one table."""

    def __init__(self, read: Callable[[bytes], tuple[str, Any]]) -> None:
        self._read = read
        self._known: dict[bytes, Entry] = {}
        self._before: dict[bytes, Entry] = {}
        self._keys: dict[str, _Key] = {}

    def of(self, raws: Iterable[bytes]) -> list[Entry]:
        """In their order, every name once. Raises Malformed; TooDeep for a value nested too deeply."""
        raws = list(raws)
        found: list[Any] = list(map(self._known.get, raws))
        if not all(found):
            found = [entry or self._make(raw) for entry, raw in zip(found, raws, strict=True)]
        if len(set(map(_name, found))) < len(found):  # of a key that comes twice the last one counts
            found = list({entry.name: entry for entry in found}.values())
        return found

    def _make(self, raw: bytes) -> Entry:
        entry = self._before.get(raw)
        if entry is None:
            key, value = self._read(raw)
            name, prefix, bare, special, column, rank, read = self._keys.get(key) or self._key(key)
            json = json_text(value)
            text, filled = prefix + json, ""
            if read is not None:
                if (fills := read(value)) is None:
                    column = ""
                else:
                    filled = f'"{column}":{json_text(fills)}'
                    if not rank:
                        text = f"{text},{filled}"
            # without the constructor's own Python, which is a third of all this
            entry = tuple.__new__(Entry, (name, text, special, column, rank, filled, bare + json))
        if len(raw) <= ENTRY_BYTES_MAX:
            if len(self._known) >= ENTRIES_MAX:
                self._before, self._known = self._known, {}
            self._known[raw] = entry
        return entry

    def _key(self, key: str) -> _Key:
        name = names.ATTR + key if key.startswith(names.RESERVED) else key
        prefix, bare = f"{json_text(name)}:", f"{json_text(key)}:"
        if name in genai.COLUMNS:
            made = _Key(name, prefix, bare, True, name, -1, None)
        elif source := genai.SOURCES.get(name):
            made = _Key(name, prefix, bare, source.rank > 0, source.column, source.rank, source.read)
        else:
            made = _Key(name, prefix, bare, name in (genai.OPERATION, names.ADDED), "", 0, None)
        if len(key) <= ENTRY_BYTES_MAX:
            if len(self._keys) >= ENTRIES_MAX:
                self._keys.clear()
            self._keys[key] = made
        return made

    def block(self, raws: Iterable[bytes]) -> str:
        """Attributes that are not a span's own, as one object."""
        return "{" + ",".join([entry.bare for entry in self.of(raws)]) + "}"


def json_text(value: Any) -> str:
    try:
        return _encode(value).decode()
    except UnicodeEncodeError as exc:
        raise Malformed(f"OTLP request: {exc}") from exc
