"""Any bytes as msgpack: an envelope that survives both encodings, or one counted error of ours."""

from __future__ import annotations

import sys

from mist.errors import ProtocolError, TooLarge
from mist.protocol import codec
from tests.fuzz import envelope
from tests.fuzz.driver import Target, main

WORDS = [
    b"\x80", b"\x81", b"\x90", b"\x91", b"\xa0", b"\xa1x", b"\xc0", b"\xc1", b"\xc4\x01x", b"\xca\x7f\xc0\x00\x00",
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00", b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff", b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00",
    b"\xd6\xff\x00\x00\x00\x00", b"\xd9\x01\xff", b"\xdb\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff",
    b"\xde\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xe0", b"\x91" * 64, b"\x81\xa1a" * 64, b"\x00", b"\x7f", b"\xa3\xed\xa0\x80",
]  # fmt: skip


def seeds() -> list[bytes]:
    """The envelopes of the JSON target that msgpack can hold."""
    out = []
    for data in envelope.seeds():
        try:
            out.append(codec.encode_msgpack(codec.decode(data)))
        except ProtocolError:
            continue  # an integer above 64 bits
    return out


def check(data: bytes) -> bool:
    before = codec.refusals.total()
    try:
        env = codec.decode_msgpack(data)
    except (ProtocolError, TooLarge):
        assert codec.refusals.total() == before + 1, "a refusal is counted once"
        return False
    assert codec.refusals.total() == before, "what is accepted is not counted"
    assert codec.decode_foreign(codec.encode(env)) == env, "as JSON it passes the other door"
    assert codec.decode_msgpack(codec.encode_msgpack(env)) == env, "and back"
    return True


TARGET = Target("msgpack", seeds(), WORDS, check)

if __name__ == "__main__":
    sys.exit(main(["msgpack"]))
