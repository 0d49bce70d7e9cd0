"""Any text as a position: parsed into what a stream can be asked for, or refused in one short line."""

from __future__ import annotations

import sys

from mist.cli.position import SEQUENCE_MAX, parse_position, since_position
from mist.errors import InvalidArgument
from tests.fuzz.driver import Target, main

NOW_NS = 1_790_000_000_000_000_000


def check(data: bytes) -> bool:
    text = data.decode("utf-8", "surrogateescape")
    accepted = False
    for parse in (parse_position, since_position):
        try:
            position = parse(text, now_ns=NOW_NS)
        except InvalidArgument as exc:
            assert len(str(exc)) < 500, "an error message is short"
            continue
        accepted = True
        assert position == parse(text, now_ns=NOW_NS), "the same text is the same position"
        assert position.number >= 0
        assert position.kind == "time" or position.number <= SEQUENCE_MAX
        assert (position.kind == "cursor") == bool(position.name)
    return accepted


SEEDS = [
    b"start", b"end", b"1", b"42", b"+7", b"-10", b"@2026-01-31", b"@2026-01-31T12:00:00Z", b"@2026-01-31T12:00:00.5+02:00",
    b"@-1h", b"@-1h30m", b"cursor:report", b"9223372036854775807", b"90m", b"2.5s",
]  # fmt: skip
WORDS = [
    b"@", b"+", b"-", b":", b"T", b"Z", b".", b"0", b"9" * 20, b"cursor:", b"1e9", b"h", b"ms", b"w", b"2026-02-30", b"24:00:00",
    b"\xd9\xa1", b"\xff", b" ", b"\n", b"\x00", b"+99:99", b".123456789123",
]  # fmt: skip
TARGET = Target("position", SEEDS, WORDS, check)

if __name__ == "__main__":
    sys.exit(main(["position"]))
