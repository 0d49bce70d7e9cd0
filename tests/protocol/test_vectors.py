"""Compatibility with the Go library: the vectors of its behaviour document, both ways."""

from __future__ import annotations

import zlib

import msgspec
import pytest
from msgspec import Raw

from mist import errors
from mist.protocol import codec
from mist.protocol.envelope import Envelope, encode_payload
from mist.protocol.payloads import HEALTH_PING, ChatMessage, HealthPing
from mist.protocol.tracecontext import parse_traceparent
from mist.protocol.version import negotiate
from tests.protocol.values import document

PING = (
    b'{"version":"1","id":"00112233445566778899aabbccddeeff","source":"test","type":"health.ping",'
    b'"timestamp_ns":1700000000000000000,"payload":{"from":"test"},"checksum":538888838}'
)


def test_vector_1_the_ping_is_the_same_bytes_as_gos() -> None:
    """Keys in the seed's order, compact, checksum last: byte for byte, and back."""
    env = Envelope.new(
        HEALTH_PING, HealthPing(from_="test"), source="test", id="00112233445566778899aabbccddeeff",
        timestamp_ns=1_700_000_000_000_000_000, checksum=True,
    )  # fmt: skip
    assert codec.encode(env) == PING
    assert codec.decode(PING) == env
    assert codec.decode_foreign(PING).decode() == HealthPing(from_="test")


@pytest.mark.parametrize(("payload", "checksum"), [(b'{"a":1}', 1444654255), (b"null", 634125391)])
def test_vector_2_the_checksum_is_zlibs(payload: bytes, checksum: int) -> None:
    """CRC-32 of the payload bytes, accepted when right."""
    assert Envelope.new("t", Raw(payload), source="s", checksum=True).checksum == checksum
    assert codec.decode_foreign(document(payload, checksum=checksum)).checksum == checksum


GO_TEXT = b'"a\\u003cb\\u003e\\u0026\\u2028\xc3\xa9\xf0\x9f\x8c\x8d\\u0001\\t\\"\\\\/"'
TEXT = 'a<b>&\u2028é🌍\x01\t"\\/'


def test_vector_3_gos_escapes_are_read_and_relayed_as_they_are() -> None:
    """Go writes <, >, & and U+2028 as escapes. We read them, and pass the bytes on unchanged."""
    payload = b'{"role":"user","content":%s}' % GO_TEXT
    data = document(payload, checksum=zlib.crc32(payload))
    env = codec.decode_foreign(data)
    assert env.decode(ChatMessage).content == TEXT
    assert bytes(env.payload) == payload
    assert codec.decode(codec.encode(env)) == env


def test_vector_3_our_own_text_differs_only_in_what_need_not_be_escaped() -> None:
    """We write <, >, & and U+2028 raw; all other characters have Go's form."""
    ours = encode_payload(TEXT)
    for raw, escaped in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("\u2028", "\\u2028")):
        ours = ours.replace(raw.encode(), escaped.encode())
    assert ours == GO_TEXT


def test_vector_4_map_keys_are_sorted_and_struct_keys_are_not() -> None:
    """Go sorts map keys by their bytes, at every level; structs keep the order of their declaration."""
    value = {"b": 1, "a": {"z": 1, "é": 2, "Z": 3, "🌍": 4, "\uffee": 5}}
    assert encode_payload(value) == '{"a":{"Z":3,"z":1,"é":2,"\uffee":5,"🌍":4},"b":1}'.encode()
    assert encode_payload(ChatMessage(role="r", content="c")) == b'{"role":"r","content":"c"}'


@pytest.mark.parametrize(
    ("value", "go", "ours"),
    [
        (1e20, b"100000000000000000000", b"1e20"),
        (1e21, b"1e+21", b"1e21"),
        (1e-6, b"0.000001", b"1e-6"),
        (1e-7, b"1e-7", b"1e-7"),
        (0.5, b"0.5", b"0.5"),
        (3.0, b"3", b"3.0"),
        (123456.789, b"123456.789", b"123456.789"),
    ],
)
def test_vector_5_floats_have_another_form_and_the_same_value(value: float, go: bytes, ours: bytes) -> None:
    """The documented difference: forms differ, values do not, and Go's form is relayed as it came."""
    assert encode_payload(value) == ours
    env = codec.decode_foreign(document(go, checksum=zlib.crc32(go)))
    assert env.decode(float) == value
    assert go in codec.encode(env)


def test_vector_8_invalid_utf8_is_refused_on_purpose() -> None:
    """The seed replaces bytes that are not UTF-8; replacing changes data silently, so we refuse."""
    for data in (document(id=b'"a\xff"'), document(b'"\xff"'), document(b"1", unknown=b'"\xc0\xaf"')):
        with pytest.raises(errors.Malformed, match="not UTF-8"):
            codec.decode_foreign(data)


@pytest.mark.parametrize("fields", [{"timestamp_ns": b"1.5"}, {"checksum": b"-1"}, {"checksum": b"4294967296"}])
def test_vector_9_numbers_of_the_wrong_type_are_refused(fields: dict[str, bytes]) -> None:
    """A time with a fraction, a checksum that is negative or has 33 bits."""
    with pytest.raises(errors.Malformed):
        codec.decode_foreign(document(**fields))


@pytest.mark.parametrize("edge", [2**63 - 1, -(2**63)])
def test_times_are_64_bits_wide_as_in_go(edge: int) -> None:
    """The last value of an int64 is read, the next one is not."""
    assert codec.decode_foreign(document(timestamp_ns=edge)).timestamp_ns == edge
    with pytest.raises(errors.Malformed):
        codec.decode_foreign(document(timestamp_ns=edge + (1 if edge > 0 else -1)))


@pytest.mark.parametrize("payload", [b'"text"', b"[1,2]", b"null", b"7", b"true", b'{"a":[]}'])
def test_vector_10_any_kind_of_payload_is_accepted(payload: bytes) -> None:
    """The payload may be any JSON value."""
    assert bytes(codec.decode_foreign(document(payload)).payload) == payload


def test_vector_10_an_absent_payload_is_null() -> None:
    """Without the key it reads, and is written again, as null; so are an absent time and null fields."""
    env = codec.decode_foreign(b'{"version":"1","id":"a","source":"s","type":"t","checksum":null,"tenant":null}')
    assert bytes(env.payload) == b"null"
    assert env.timestamp_ns == 0
    assert b'"payload":null' in codec.encode(env)
    assert env.decode() is None


def test_vector_11_the_last_of_two_keys_wins() -> None:
    """For the envelope's keys and inside of payloads."""
    env = codec.decode_foreign(document(b'{"a":1,"a":2}').replace(b'"id":"a1"', b'"id":"first","id":"last"'))
    assert env.id == "last"
    assert env.decode() == {"a": 2}


def test_vector_12_keys_in_any_case_are_accepted() -> None:
    """`Version`, `ID`, `TimeStamp_NS`: read by the slow path, which only runs after the fast one failed."""
    data = PING.replace(b"version", b"Version").replace(b'"id"', b'"ID"').replace(b"timestamp_ns", b"TimeStamp_NS")
    data = data.replace(b"payload", b"PAYLOAD").replace(b"checksum", b"CheckSum")
    assert codec.decode_foreign(data) == codec.decode(PING)
    with pytest.raises(errors.ChecksumMismatch):
        codec.decode_foreign(data.replace(b"538888838", b"538888839"))


TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.mark.parametrize(("version", "flags"), [("00", "01"), ("00", "00"), ("01", "ff"), ("cc", "03")])
def test_vector_13_a_traceparent_of_any_version_and_flags_is_read(version: str, flags: str) -> None:
    """Trace and parent ids come out, and the flags are kept."""
    context = parse_traceparent(f"{version}-{TRACE}-{PARENT}-{flags}")
    assert context is not None
    assert (context.trace_id, context.span_id, context.flags) == (TRACE, PARENT, int(flags, 16))


@pytest.mark.parametrize(
    "text",
    [
        f" 00-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-extra",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"0-{TRACE}-{PARENT}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01\n",
        "",
        "garbage",
    ],
)
def test_vector_14_a_traceparent_that_is_none_is_rejected(text: str) -> None:
    """Leading space, upper case, extra field, zero ids, wrong lengths."""
    assert parse_traceparent(text) is None


def test_the_forbidden_traceparent_version_is_rejected() -> None:
    """`ff` is invalid by the standard; the seed accepts it. A difference on purpose."""
    assert parse_traceparent(f"ff-{TRACE}-{PARENT}-01") is None


def test_vector_15_negotiation() -> None:
    """The highest common version, or an error."""
    assert negotiate("1-3", "2-5") == "3"
    assert negotiate("2", "1-3") == "2"
    with pytest.raises(errors.VersionUnsupported):
        negotiate("1-2", "3-4")
    with pytest.raises(errors.InvalidArgument):
        negotiate("3-1", "1")


def test_vector_16_the_wire_form_of_an_error() -> None:
    """code, message, meta, cause, in this order."""
    error = errors.TimedOut("m", meta={"a": "b"})
    error.__cause__ = ValueError("c")
    assert msgspec.json.encode(error.to_wire()) == b'{"code":"timeout","message":"m","meta":{"a":"b"},"cause":"c"}'


def test_unknown_keys_are_ignored_and_order_does_not_matter() -> None:
    """A newer peer may add keys, and write them in any order."""
    data = b'{"zz":{"deep":[1]},"payload":{},"type":"t","timestamp_ns":5,"source":"s","id":"i","version":"1"}'
    env = codec.decode_foreign(data)
    assert (env.id, env.source, env.type, env.timestamp_ns) == ("i", "s", "t", 5)


def test_a_go_reader_finds_only_keys_it_knows_in_a_plain_envelope() -> None:
    """The additive keys are omitted while empty, so an envelope without them is the seed's."""
    keys = list(msgspec.json.decode(codec.encode(Envelope.new("t", source="s", checksum=True))))
    assert keys == ["version", "id", "source", "type", "timestamp_ns", "payload", "checksum"]
