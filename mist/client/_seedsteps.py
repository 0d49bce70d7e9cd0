"""Reads the checkpoint files of the Go library: `<run>.jsonl`, one record per line, the last one of a step wins.

Promises: a bad line costs itself only, and is told; records that were glued to a torn line (the library appends behind
what a crash left) are found. Results stay the bytes they are, so that integers above 2^53 keep their value.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Raw, Struct

_START = re.compile(rb'\{\s*"step"\s*:')


class Seed(Struct, frozen=True):
    """`results` of the completed steps in the order of their completion; the numbers of lines with something unreadable."""

    results: dict[str, Raw]
    bad_lines: list[int]


class _Line(Struct):
    step: str
    status: str
    timestamp: str = ""
    result: Raw = Raw(b"null")


_decode = msgspec.json.Decoder(_Line).decode
_any = msgspec.json.Decoder().decode


def read_seed(data: bytes) -> Seed:
    results: dict[str, Raw] = {}
    bad: list[int] = []
    for number, text in enumerate(data.split(b"\n"), 1):
        if not text.strip(b"\0 \t\r"):
            continue
        record = _line(text)
        if record is None:
            bad.append(number)
            record = _glued(text)
        if record is None or not record.step:
            continue
        results.pop(record.step, None)
        if record.status == "completed":
            results[record.step] = Raw(bytes(record.result))
    return Seed(results, bad)


def _line(text: bytes) -> _Line | None:
    try:
        _any(text)  # also what `Raw` passes over
        return _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _glued(text: bytes) -> _Line | None:
    """A whole record at the end of a torn line."""
    for found in list(_START.finditer(text))[1:]:
        record = _line(text[found.start() :])
        if record is not None and record.timestamp:  # every record has one; an object within a torn result hardly
            return record
    return None
