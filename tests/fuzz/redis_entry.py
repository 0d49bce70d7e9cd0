"""Any fields under any id as an entry of a Redis stream: a record, or the one refusal of ids without a sequence."""

from __future__ import annotations

import sys

import msgspec

from mist.broker.base import header
from mist_redis.entry import ENTRY, SHAPE, record, records
from mist_redis.ids import NoSequence, to_id
from tests.fuzz.driver import Target, main


def check(data: bytes) -> bool:
    """The first line is the id's digits, then fields and values line by line; the last odd one is dropped."""
    head, *lines = data.split(b"\n")
    digits = bytes(c for c in head if 0x30 <= c <= 0x39) or b"0"
    ms, n = digits[: len(digits) // 2][:20] or b"0", digits[len(digits) // 2 :][:20]
    id = b"%d-%d" % (int(ms), int(n))
    flat = lines[: len(lines) // 2 * 2]
    accepted = False
    for own in (True, False):
        try:
            found = record([id, flat], own=own, subject="s")
        except NoSequence:
            continue
        accepted = True
        assert records([[id, flat]], own=own, subject="s") == [found], "one by one and together"
        assert to_id(found.sequence, own=own).encode() == id, "the sequence is the id"
        shape = header(found.headers, SHAPE)
        if shape == "fields":
            assert isinstance(msgspec.json.decode(found.data), dict), "all fields, as an object"
        elif shape:
            assert flat == [shape.encode(), found.data], "the one body, byte for byte"
        else:
            assert found.data == flat[flat.index(b"data") + 1], "ours"
        assert not shape or header(found.headers, ENTRY).encode() == id
    return accepted


SEEDS = [
    b"01\nsubject\na.b\ndata\n{}\nid\nx\ntime\n1732540000123",
    b"01\nsubject\na.b\ndata\n{}\ntime\n1732540000123\nheaders_json\n[[\"a\",\"b\"]]",
    b"17325400001230000000000001\ndata\n{}",
    b"17325400001230000000000001\n__data__\n\xff\x00",
    b"11\na\n1\na\n2\nb\n\xff",
    b"05\npayload\nx",
]  # fmt: skip
WORDS = [
    b"\n", b"subject", b"data", b"time", b"id", b"headers_json", b"__data__", b"payload", b"[]", b'[["a"]]', b"\xff",
    b"1732540000123", b"18446744073709551615", b"1048576", b"0", b"a.b", b"\ndata\n", b"\ntime\n1\n",
]  # fmt: skip
TARGET = Target("redis_entry", SEEDS, WORDS, check)

if __name__ == "__main__":
    sys.exit(main(["redis_entry"]))
