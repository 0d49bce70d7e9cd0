"""JSON in outputs: reading it, comparing it, and finding a value in it by a path. Pure.

Equal: as JSON values, numbers by their value (1 is 1.0, true is not 1), objects whatever the order of their keys.

A path is `$` (which may be left out) and any number of steps: `.name`, `["any name"]`, `[3]`, `[-1]` (from the end);
a name at the start needs no dot: `choices[0].message.content`. Not in it: wildcards, slices, filters, recursion.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from mist.errors import InvalidArgument

NESTED_MAX = 100

_STEP = re.compile(
    r"""\.?(?P<name>[A-Za-z_][\w-]*)|\[(?P<index>-?\d{1,9})\]|\[(?P<quoted>"(?:[^"\\]|\\.)*"|'[^'\\]*')\]"""
)
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[ \t]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)


class Nothing:
    """What is not there, or no JSON."""


NOTHING = Nothing()
Path = tuple[str | int, ...]


def read(text: str) -> Any:
    """The value of a JSON text, or NOTHING."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError, ValueError):
        return NOTHING


def fenced(text: str) -> str:
    """The content of the first fence marked json, else of the only fence, else the text."""
    found = _FENCE.findall(text)
    for language, body in found:
        if language.lower() == "json":
            return str(body)
    return str(found[0][1]) if len(found) == 1 else text


def canonical(value: Any) -> bytes:
    """Bytes that are equal when the values are."""
    return msgspec.json.encode(_plain(value, 0), order="deterministic")


def same(a: Any, b: Any) -> bool:
    return canonical(a) == canonical(b)


def _plain(value: Any, depth: int) -> Any:
    if depth > NESTED_MAX:
        raise InvalidArgument(f"JSON nested deeper than {NESTED_MAX}")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {k: _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v, depth + 1) for v in value]
    return value


def parse(path: str) -> Path:
    """The steps of a path. Raises InvalidArgument with the place where it cannot be read."""
    at = 1 if path.startswith("$") else 0
    steps: list[str | int] = []
    while at < len(path):
        m = _STEP.match(path, at)
        if m is None or (at == 1 and path[0] == "$" and path[1] not in ".["):
            raise InvalidArgument(
                f"not a path, from character {at + 1}: {path!r}",
                hint='write steps such as .name, ["any name"], [0], [-1]',
            )
        if m["index"]:
            steps.append(int(m["index"]))
        elif m["quoted"]:
            quoted = m["quoted"]
            steps.append(quoted[1:-1] if quoted[0] == "'" else msgspec.json.decode(quoted, type=str))
        else:
            if not m[0].startswith(".") and at > 0:
                raise InvalidArgument(f"not a path, from character {at + 1}: {path!r}", hint="a dot goes before a name")
            steps.append(m["name"])
        at = m.end()
    return tuple(steps)


def find(value: Any, path: Path) -> Any:
    """The value at the path, or NOTHING. A step by number fits lists only, one by name objects only."""
    for step in path:
        if isinstance(step, int):
            if not isinstance(value, list) or not -len(value) <= step < len(value):
                return NOTHING
            value = value[step]
        else:
            if not isinstance(value, dict) or step not in value:
                return NOTHING
            value = value[step]
    return value
