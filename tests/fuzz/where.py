"""Any text as a `--where` expression: a predicate that answers yes or no about any document, or refused."""

from __future__ import annotations

import sys

from mist.broker.base import Record
from mist.cli.filters import parse_where
from mist.cli.records import View
from mist.errors import InvalidArgument, TimedOut
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from tests.fuzz.driver import Target, main

PAYLOADS = [
    {"n": 1, "attrs": {"model": "m", "latency_ms": 812.5, "tags": ["a", "b"]}, "ok": True},
    None,
    [1, 2, {"a": "b"}],
    "text",
]
DATA = [codec.encode(Envelope.new("x.y", p, source="fuzz", id="0" * 32, timestamp_ns=1)) for p in PAYLOADS]
RECORDS = [Record(i + 1, "x.y", data, 1) for i, data in enumerate([*DATA, b"foreign \xff"])]


def check(data: bytes) -> bool:
    text = data.decode("utf-8", "surrogateescape")
    try:
        predicate = parse_where(text)
    except InvalidArgument as exc:
        assert len(str(exc)) < 1000, "an error message is short"
        return False
    for record in RECORDS:
        try:
            assert predicate(View(record)) in (True, False)
        except TimedOut:
            continue  # a regular expression may be slow on purpose; it is stopped
    return True


SEEDS = [
    b"payload.n>0", b"payload.attrs.latency_ms>500", b"type='trace.span'", b"payload.attrs.model=m and not payload.ok",
    b"payload.n>=1 or payload.n<0", b"(payload.n=1)", b"payload.attrs.model!='x'",
]  # fmt: skip
WORDS = [
    b"(", b")", b" and ", b" or ", b"not ", b"=", b"!=", b"<=", b">=", b"~", b"'", b'"', b".", b"null", b"true", b"1e999", b"-", b"nan",
    b"\\", b"payload", b"\xff", b"\x00", b"[0]", b"(" * 50,
]  # fmt: skip
TARGET = Target("where", SEEDS, WORDS, check)

if __name__ == "__main__":
    sys.exit(main(["where"]))
