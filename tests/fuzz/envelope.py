"""Any bytes at the door to the outside: an envelope that keeps every promise, or one counted error of ours."""

from __future__ import annotations

import json
import sys
import zlib

import msgspec

from mist import errors
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from tests.fuzz.driver import Target, main


def seeds() -> list[bytes]:
    payloads: list[object] = [
        None, "text", [1, 2.5, -3e-7, True, None], {"a": {"b": [{"c": 'q"\\/\b'}]}}, {"trace_id": "ab" * 16, "attrs": {}},
        "é🌍\u2028", 10**25, [[[[[[[[]]]]]]]],
    ]  # fmt: skip
    made = [
        codec.encode(Envelope.new("trace.span", p, source="s", id="00" * 16, timestamp_ns=1, checksum=i % 2 == 0))
        for i, p in enumerate(payloads)
    ]
    return [
        *made,
        codec.encode(
            Envelope.new("t", {}, source="s", correlation_id="c", causation_id="d", tenant="e", traceparent="f")
        ),
        b'{"Version":"1","ID":"i","source":"s","TYPE":"t","Payload":{"x":"\\u00e9\\ud83d\\ude00"},"checksum":null}',
        b' {"version":" +01 ","id":"i","source":"s","type":"t","unknown":[{"k":"v"}],"payload": [ 1 , 2 ] } ',
    ]


WORDS = [
    b'"', b"\\", b'\\"', b"\\\\", b"\\u", b"\\ud800", b"\\udc00", b"{", b"}", b"[", b"]", b":", b",", b"NaN", b"-Infinity",
    b"nan", b"null", b"true", b"0", b"-", b"1e999", b"e309", b".0", b"9" * 30, b"9" * 4301, b"\xff", b"\xed\xa0\x80", b"\x00",
    b"\xef\xbb\xbf", b"\n", b" ", b"[" * 64, b'{"a":' * 64, b'"id":', b'"payload":', b'"checksum":1,', b'"version":"2"',
    "🌍".encode(), b"\\n", b'"":0,' * 20,
]  # fmt: skip

EXPECTED = (errors.ProtocolError, errors.TooLarge)


def refused_once(data: bytes) -> Envelope | None:
    """The envelope, or None after exactly one count under the error's own code."""
    before = codec.refusals.total()
    try:
        env = codec.decode_foreign(data)
    except EXPECTED as exc:
        assert codec.refusals.total() == before + 1, "a refusal is counted once"
        assert exc.code in errors.CODES
        assert len(str(exc)) < 1000, "an error message is short"
        return None
    assert codec.refusals.total() == before, "what is accepted is not counted"
    return env


def check(data: bytes) -> bool:
    env = refused_once(data)
    if env is None:
        return False
    payload = bytes(env.payload)
    assert payload in data or payload == b"null", "payload bytes are verbatim"
    assert all((env.version, env.id, env.source, env.type)), "required fields are there"
    assert not env.checksum or env.checksum == zlib.crc32(payload), "a stated checksum is true"
    # the standard library reads the same value, and finds no NaN
    ours = msgspec.json.decode(payload)
    theirs = json.loads(payload, parse_constant=_refuse)
    assert ours == theirs, "another reader sees the same value"
    once = codec.encode(env)
    assert codec.decode(once) == env, "encoding and decoding changes nothing"
    assert codec.decode_foreign(once) == env, "what was accepted is accepted again"
    assert codec.encode(codec.decode(once)) == once, "a second hop writes the same bytes"
    return True


def _refuse(word: str) -> None:
    raise AssertionError(f"{word} passed")


TARGET = Target("envelope", seeds(), WORDS, check)

if __name__ == "__main__":
    sys.exit(main(["envelope"]))
