"""msgpack, the second content type: the round trip, and everything that the JSON door refuses."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mist import errors
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from mist.protocol.pack import screen_msgpack
from tests.protocol.values import name, values

pack = msgspec.msgpack.encode


def document(payload: bytes = b"\x80", **fields: Any) -> bytes:
    """A msgpack envelope written by hand."""
    known = {"version": "1", "id": "a1", "source": "test", "type": "x.y", "timestamp_ns": 1} | fields
    body = b"".join(pack(k) + pack(v) for k, v in known.items())
    return bytes([0x80 | len(known) + 1]) + body + pack("payload") + payload


@settings(max_examples=300, deadline=None)
@given(values, name, st.booleans())
def test_an_envelope_makes_the_round_trip_through_msgpack(value: object, source: str, checksum: bool) -> None:
    """The same fields, the same value; a checksum is right on both sides though the bytes differ."""
    env = Envelope.new("any.type", value, source=source, checksum=checksum, tenant="t")
    back = codec.decode_msgpack(codec.encode_msgpack(env))
    assert back.data() == value
    assert bool(back.checksum) == checksum
    assert replace(back, payload=env.payload, checksum=env.checksum) == env
    assert codec.verify(back) is back


def test_the_checksum_covers_the_msgpack_bytes() -> None:
    """It is verified over what came, before the conversion."""
    payload = pack({"a": 1})
    assert codec.decode_msgpack(document(payload, checksum=zlib.crc32(payload))).data() == {"a": 1}
    with pytest.raises(errors.ChecksumMismatch):
        codec.decode_msgpack(document(payload, checksum=zlib.crc32(b'{"a":1}')))


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\x01"


REFUSALS: list[tuple[bytes, type[errors.MistError]]] = [
    (b"", errors.Malformed),
    (b"\xc1", errors.Malformed),
    (b"\x90", errors.Malformed),
    (document() + b"\x01", errors.Malformed),
    (document()[:-1], errors.Malformed),
    (document(version=""), errors.MissingField),
    (document(version="9"), errors.VersionUnsupported),
    (document(checksum=5), errors.ChecksumMismatch),
    (document(timestamp_ns=2**63), errors.Malformed),
    (document(b"\xcb" + struct.pack(">d", float("nan"))), errors.NotFinite),
    (document(b"\x92\x01\xca" + struct.pack(">f", float("-inf"))), errors.NotFinite),
    (document(b"\xcb\x7f"), errors.Malformed),
    (document(b"\xdd\xff\xff\xff\xff"), errors.Malformed),
    (document(b"\xdc\xff\xff" + b"\x01" * 9), errors.Malformed),
    (document(b"\xdf\xff\xff\xff\xff"), errors.TooManyKeys),
    (document(b"\xde\x00\x05\xa0\x01"), errors.Malformed),
    (document(b"\xdb\xff\xff\xff\xffx"), errors.Malformed),
    (document(b"\xa2\xff\xff"), errors.Malformed),
    (document(b"\xa3\xed\xa0\x80"), errors.Malformed),
    (document(b"\x81\x01\x01"), errors.Malformed),
    (document(b"\x81\x90\x01"), errors.Malformed),
    (document(b"\xc4\x01x"), errors.Malformed),
    (document(b"\xd6\xff\x00\x00\x00\x00"), errors.Malformed),
    (document(nested(64)), errors.TooDeep),
    (document(b"\xdd\x00\x0f\x42\x40" + b"\x90" * 1_000_000), errors.TooManyKeys),
]


@pytest.mark.parametrize(("data", "error"), REFUSALS, ids=range(len(REFUSALS)))
def test_each_refusal_has_its_class_and_one_count(data: bytes, error: type[errors.MistError]) -> None:
    """Claims without bytes, keys that are not text, binary, extensions, NaN, depth: refused before decoding."""
    before = dict(codec.refusals)
    with pytest.raises(errors.MistError) as caught:
        codec.decode_msgpack(data)
    assert type(caught.value) is error
    after = dict(codec.refusals)
    assert after.pop(caught.value.code) == before.pop(caught.value.code, 0) + 1
    assert after == before


def test_the_limits_are_exact() -> None:
    """Size, depth, keys and values: the limit passes, one more is refused."""
    data = document()
    assert codec.decode_msgpack(data, size_bytes_max=len(data)).id == "a1"
    with pytest.raises(errors.TooLarge):
        codec.decode_msgpack(data, size_bytes_max=len(data) - 1)
    assert codec.decode_msgpack(document(nested(63))).id == "a1"
    for limit, good, bad in (
        ("keys_max", b"\x82\xa0\x01\xa0\x01", b"\x83\xa0\x01\xa0\x01\xa0\x01"),
        ("values_max", b"\x91\x01", b"\x92\x01\x01"),
    ):
        screen_msgpack(good, **{limit: 2})
        with pytest.raises(errors.TooManyKeys):
            screen_msgpack(bad, **{limit: 2})


ALL_FORMS = [
    0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1, -1, -32, -33, -128, -129, -32768, -32769, -(2**31),
    -(2**31) - 1, -(2**63), 1.5, None, True, False, "", "x" * 31, "x" * 32, "x" * 256, "x" * 70_000,
    [0] * 15, [0] * 16, [0] * 70_000, {str(i): i for i in range(15)}, {str(i): i for i in range(16)},
    {str(i): i for i in range(70_000)},
]  # fmt: skip


@pytest.mark.parametrize("value", ALL_FORMS, ids=range(len(ALL_FORMS)))
def test_every_form_of_msgpack_that_json_has_passes(value: object) -> None:
    """All widths of integers, strings, lists and maps; the walk ends exactly at the end."""
    screen_msgpack(pack(value))
    with pytest.raises(errors.Malformed):
        screen_msgpack(pack([value])[:-1])
    assert codec.decode_msgpack(codec.encode_msgpack(Envelope.new("t", value, source="s"))).data() == value


def test_what_msgpack_cannot_hold_is_malformed() -> None:
    """Integers above 64 bits are JSON, but not msgpack."""
    with pytest.raises(errors.Malformed, match="no msgpack form"):
        codec.encode_msgpack(Envelope.new("t", 2**64, source="s"))


@settings(max_examples=500, deadline=None)
@given(
    st.binary(max_size=30)
    | st.lists(st.sampled_from(list(b"\x00\x80\x81\x91\x92\xa0\xa1\xc0\xcb\xdc\xde\xe0")), max_size=20).map(bytes)
)
def test_whatever_the_walk_accepts_the_decoder_walks_too(data: bytes) -> None:
    """The walk and the decoder agree on where values end: all that remains to the decoder is UTF-8 and the tail."""
    try:
        screen_msgpack(data)
    except errors.MistError:
        return
    assert complaint(data) in ("", "text", "tail")


def complaint(data: bytes) -> str:
    """What the decoder says of msgpack bytes, empty when nothing."""
    try:
        msgspec.msgpack.decode(data)
    except UnicodeDecodeError:
        return "text"
    except msgspec.DecodeError as exc:
        return "tail" if "trailing" in str(exc) else str(exc)
    return ""
