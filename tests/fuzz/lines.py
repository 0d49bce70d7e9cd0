"""Any block of JSON lines: decoding it at once means what decoding its lines one by one means."""

from __future__ import annotations

import sys

from mist.errors import MistError
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from tests.fuzz import envelope
from tests.fuzz.driver import Target, main

_SEEDS = envelope.seeds()
SEEDS = [
    b"",
    b"\n".join(_SEEDS) + b"\n",
    b"\r\n".join(_SEEDS),
    b"\n\n".join(_SEEDS[:3]),
    *(_SEEDS[i] + b"\n" + _SEEDS[-i - 1] + b"\n" for i in range(4)),
]


def by_line(data: bytes) -> list[Envelope]:
    """What the block means, in the slow and obvious way."""
    out = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                out.append(codec.decode_foreign(line))
            except MistError as exc:
                exc.meta["line"] = str(number)
                raise
    return out


def check(data: bytes) -> bool:
    expected: list[Envelope] | MistError
    try:
        expected = by_line(data)
    except MistError as exc:
        expected = exc
    before = codec.refusals.total()
    try:
        envs = codec.decode_lines(data, foreign=True)
    except MistError as exc:
        assert isinstance(expected, MistError), "a good block is read"
        assert (type(exc), exc.meta) == (type(expected), expected.meta), "the same error at the same line"
        assert codec.refusals.total() == before + 1, "a refusal is counted once"
        return False
    assert envs == expected, "the same envelopes"
    assert codec.decode_lines(data) == envs, "our own door reads what the other one reads"
    return bool(envs)


TARGET = Target("lines", SEEDS, [*envelope.WORDS, b"}\n{", b"\n", b"\n\n", b"\r\n"], check)

if __name__ == "__main__":
    sys.exit(main(["lines"]))
