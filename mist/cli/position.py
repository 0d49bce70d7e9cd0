"""The one grammar for places in a stream: `start`, `end`, `N`, `+N`, `-N`, `@TIME`, `@-1h`, `cursor:NAME`.

Parsing is pure (the clock is passed in); resolving asks the stream. A position names one record; `--from` starts with
it and `--to` ends with it, inclusive:

    start         the first kept record
    end           behind the last record (as --to: the last record)
    N             the record with that sequence
    +N            the first record after sequence N
    -N            the N-th last record
    @TIME         the first record at or after that time (as --to: the last record at or before it)
    cursor:NAME   the record after the cursor's (as --to: the cursor's)

A time is RFC 3339 (`2026-01-31T12:00:00Z`, no offset = UTC), a date, or an age like `-90m` or `-1h30m`.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Literal

from msgspec import Struct

from mist.broker.base import Checkpoints, Stream, StreamInfo
from mist.errors import CursorAhead, InvalidArgument, NotFound, WrongIncarnation
from mist.protocol.subject import check_name
from mist.quantities import Duration

Kind = Literal["start", "end", "at", "after", "last", "time", "cursor"]
GRAMMAR = "positions: start, end, N, +N, -N, @TIME, @-1h, cursor:NAME"
SEQUENCE_MAX = 2**63 - 1

_RFC3339 = re.compile(
    r"\d{4}-\d{2}-\d{2}(?:[Tt ]\d{2}:\d{2}(?::\d{2}(?:\.(\d{1,9})\d*)?)?(?:[Zz]|[+-]\d{2}:?\d{2})?)?", re.ASCII
)


class Position(Struct, frozen=True):
    """A parsed position. `number` is a sequence, a count or Unix nanoseconds, as `kind` says."""

    kind: Kind
    number: int = 0
    name: str = ""


START = Position("start")
END = Position("end")


def parse_time(text: str, now_ns: int) -> int:
    """A time in Unix nanoseconds: RFC 3339, a date, or an age with a minus. Raises InvalidArgument."""
    if text.startswith("-"):
        return max(0, now_ns - round(Duration(text[1:]) * 1e9))
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise InvalidArgument(
            f"not a time: {text[:40]!r}", hint="for example 2026-01-31T12:00:00Z, 2026-01-31, or -1h for an hour ago"
        )
    digits = match[1] or ""
    bare = text.replace(f".{digits}", "", 1) if digits else text
    bare = re.sub(r"(:\d{2})\d+(?=[Zz+-]|$)", r"\1", bare) if digits and len(text) > 40 else bare
    try:
        stamp = datetime.fromisoformat(bare.upper())
    except ValueError as exc:
        raise InvalidArgument(f"not a time: {text[:40]!r}: {exc}") from exc
    stamp = stamp.replace(tzinfo=stamp.tzinfo or UTC)
    since = stamp - datetime(1970, 1, 1, tzinfo=UTC)
    whole = since.days * 86_400 + since.seconds
    return max(0, whole * 1_000_000_000 + int(digits.ljust(9, "0") or "0"))


def parse_position(text: str, *, now_ns: int) -> Position:
    """A position of the grammar. Raises InvalidArgument for anything else."""
    if text in ("start", "end"):
        return START if text == "start" else END
    if text.startswith("@"):
        return Position("time", parse_time(text[1:], now_ns))
    if text.startswith("cursor:"):
        return Position("cursor", 0, check_name(text[7:]))
    sign, digits = (text[0], text[1:]) if text[:1] in ("+", "-") else ("", text)
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 19 or int(digits) > SEQUENCE_MAX:
        raise InvalidArgument(f"not a position: {text[:40]!r}", hint=GRAMMAR)
    number = int(digits)
    if sign == "+":
        return Position("after", number)
    if sign == "-":
        return Position("last", number)
    if number < 1:
        raise InvalidArgument("not a position: 0", hint="sequences start at 1; `start` is the first kept record")
    return Position("at", number)


def since_position(text: str, *, now_ns: int) -> Position:
    """`--since` and `--until`: an age (`1h`) or a time, with or without the @."""
    text = text.removeprefix("@")
    if text.startswith("-") or _RFC3339.fullmatch(text):
        return Position("time", parse_time(text, now_ns))
    return Position("time", max(0, now_ns - round(Duration(text) * 1e9)))


async def after_of(position: Position, stream: Stream, checkpoints: Checkpoints | None, info: StreamInfo) -> int:
    """The `after` (exclusive) that makes a reader start with this position's record."""
    match position.kind:
        case "start":
            return info.first - 1
        case "end":
            return info.last
        case "at":
            _within(position.number - 1, info)
            return position.number - 1
        case "after":
            _within(position.number, info)
            return position.number
        case "last":
            return await nth_last(stream, position.number, info)
        case "time":
            return max(info.first, await stream.locate(position.number)) - 1
        case "cursor":
            return await _cursor(position.name, checkpoints, info)


async def last_of(position: Position, stream: Stream, checkpoints: Checkpoints | None, info: StreamInfo) -> int:
    """The last sequence (inclusive) of a range that ends with this position's record."""
    match position.kind:
        case "start":
            return info.first
        case "end":
            return info.last
        case "at":
            return position.number
        case "after":
            return position.number + 1
        case "last":
            return await nth_last(stream, position.number, info) + 1
        case "time":
            return await stream.locate(position.number + 1) - 1
        case "cursor":
            return await _cursor(position.name, checkpoints, info)


def _within(after: int, info: StreamInfo) -> None:
    if after > info.last:
        raise CursorAhead(after=after, last=info.last, stream=info.name)


async def nth_last(stream: Stream, count: int, info: StreamInfo) -> int:
    """The `after` that leaves the last `count` records: arithmetic where the stream is dense, else by reading back."""
    if count <= 0:
        return info.last
    if info.records == info.last - info.first + 1:
        return max(info.first - 1, info.last - count)
    low = info.last
    step = max(count * 2, 256)
    found = 0
    while low >= info.first:
        high, low = low, max(info.first - 1, low - step)
        sequences: list[int] = []
        after = low
        while after < high:
            page = await stream.read(after=after, limit=10_000)
            sequences.extend(r.sequence for r in page.records if r.sequence <= high)
            if page.scanned <= after:
                break
            after = page.scanned
        found += len(sequences)
        if found >= count:
            return sequences[found - count] - 1
        if low < info.first:
            break
        step *= 2
    return info.first - 1


async def _cursor(name: str, checkpoints: Checkpoints | None, info: StreamInfo) -> int:
    if checkpoints is None:
        raise InvalidArgument(f"{info.name} keeps no cursors", hint="use a sequence or a time")
    found = await checkpoints.load(info.name, name)
    if found is None:
        raise NotFound(
            f"no cursor {name} on stream {info.name}",
            hint=f"`mist cursor ls {info.name}` shows them; `--from start --save-cursor {name}` makes it",
        )
    if found.incarnation != info.incarnation:
        raise WrongIncarnation(
            f"cursor {name}: stream {info.name} was deleted and made again since it was saved",
            hint=f"`mist cursor rm {info.name} {name}` forgets it",
        )
    return found.sequence
