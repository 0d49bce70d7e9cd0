"""Durations as people write them: `90s`, `15m`, `1h30m`, `2d`, `1w`, `250ms`. Pure, exact to the nanosecond."""

from __future__ import annotations

import re

from mist.errors import InvalidArgument

_PART = re.compile(r"(\d+(?:\.\d+)?)(w|d|h|ms|m|s)", re.ASCII)
_WHOLE = re.compile(r"(?:\d+(?:\.\d+)?(?:w|d|h|ms|m|s))+", re.ASCII)
_UNIT_NS = {
    "w": 604_800_000_000_000,
    "d": 86_400_000_000_000,
    "h": 3_600_000_000_000,
    "m": 60_000_000_000,
    "s": 1_000_000_000,
    "ms": 1_000_000,
}
_CHARS_MAX = 64


def parse_duration(text: str) -> int:
    """`90m`, `1h30m`, `2.5s` in nanoseconds. Raises InvalidArgument."""
    if len(text) > _CHARS_MAX or not _WHOLE.fullmatch(text):
        raise InvalidArgument(f"not a duration: {text[:40]!r}", hint="for example 90s, 15m, 1h30m, 2d, 1w")
    return sum(int(float(number) * _UNIT_NS[unit]) for number, unit in _PART.findall(text))


def format_duration(seconds: float) -> str:
    """`5m`, `1h30m`, `2.5s`: the shortest text that `parse_duration` reads back, for whole milliseconds."""
    left = round(seconds * 1e9)
    out = ""
    for unit in ("d", "h", "m"):
        count, left = divmod(left, _UNIT_NS[unit])
        out += f"{count}{unit}" if count else ""
    return f"{out}{left / 1e9:g}s" if left or not out else out
