"""Envelopes to bytes and back: verification, refusals and their counters, lines, payload bytes kept verbatim."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw
from msgspec.structs import replace

from mist import errors
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from tests.protocol.values import document, envelopes, name, nested, spellings, values

REFUSALS: list[tuple[bytes, type[errors.MistError], str]] = [
    (b"", errors.Malformed, "malformed"),
    (b"nonsense", errors.Malformed, "malformed"),
    (b"[]", errors.Malformed, "malformed"),
    (document(b"{") + b"x", errors.Malformed, "malformed"),
    (document() + b"{}", errors.Malformed, "malformed"),
    (b"\xef\xbb\xbf" + document(), errors.Malformed, "malformed"),
    (document(id=7), errors.Malformed, "malformed"),
    (document(version=None), errors.MissingField, "missing_field"),
    (document(id=""), errors.MissingField, "missing_field"),
    (document(source=b"null"), errors.MissingField, "missing_field"),
    (document(type=None), errors.MissingField, "missing_field"),
    (document(version="2"), errors.VersionUnsupported, "version_unsupported"),
    (document(version="0"), errors.VersionUnsupported, "version_unsupported"),
    (document(version="one"), errors.VersionUnsupported, "version_unsupported"),
    (document(checksum=1), errors.ChecksumMismatch, "checksum_mismatch"),
    (document(b'{"a":NaN}'), errors.NotFinite, "not_finite"),
    (document(b"-Infinity"), errors.NotFinite, "not_finite"),
    (document(b'"\\ud800"'), errors.LoneSurrogate, "lone_surrogate"),
]
FOREIGN: list[tuple[bytes, type[errors.MistError], str]] = [
    (document(b"[1e999]"), errors.NotFinite, "not_finite"),
    (document(nested(64)), errors.TooDeep, "too_deep"),
    (document(b"{%s}" % b",".join(b'"":0' for _ in range(codec.KEYS_MAX))), errors.TooManyKeys, "too_many_keys"),
    (document(b'"%s"' % (b"x" * codec.SIZE_BYTES_MAX)), errors.TooLarge, "too_large"),
    (document(b'"\xff"'), errors.Malformed, "malformed"),
]


def named(value: object) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("data", "error", "code"), REFUSALS + FOREIGN, ids=named)
def test_each_refusal_has_its_class_its_code_and_one_count(
    data: bytes, error: type[errors.MistError], code: str
) -> None:
    """At the foreign door: the exact class, the exact code, and exactly one more in `refusals`."""
    before = dict(codec.refusals)
    with pytest.raises(errors.MistError) as caught:
        codec.decode_foreign(data)
    assert type(caught.value) is error
    assert caught.value.code == code
    after = dict(codec.refusals)
    assert after.pop(code) == before.pop(code, 0) + 1
    assert after == before


@pytest.mark.parametrize(("data", "error", "code"), REFUSALS, ids=named)
def test_our_own_door_refuses_the_same_by_the_same_names(data: bytes, error: type[errors.MistError], code: str) -> None:
    """`decode` checks shape, version and checksum; in lines as well, with the line's number."""
    before = codec.refusals[code]
    with pytest.raises(error):
        codec.decode(data)
    assert codec.refusals[code] == before + 1
    if data:
        with pytest.raises(error) as caught:
            codec.decode_lines(document() + b"\n\n" + data + b"\n")
        assert caught.value.meta["line"] == "3"
        assert codec.refusals[code] == before + 2


@pytest.mark.parametrize("foreign", [False, True])
def test_good_lines_are_decoded_with_one_door_or_the_other(foreign: bool) -> None:
    """A block with and without a last newline, with empty lines, with CRLF, and with nothing in it."""
    one, two = document(id="1"), document(b"[1, 2]", id="2", checksum=zlib.crc32(b"[1, 2]"))
    for block in (one + b"\n" + two, one + b"\n" + two + b"\n", one + b"\r\n \n\n" + two + b"\r\n"):
        assert [e.id for e in codec.decode_lines(block, foreign=foreign)] == ["1", "2"]
    for nothing in (b"", b"\n", b" \n\r\n"):
        assert codec.decode_lines(nothing, foreign=foreign) == []


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(
    ("block", "line"),
    [
        (document() + b" " + document() + b"\n", "1"),
        (document(b"{},{}") + b"\n" + document(), "1"),
        (document(b'{\n"a":1}') + b"\n" + document() + document(), "1"),
        (document() + b"\n" + document(b'"a\nb"'), "2"),
        (document() + b"\n" + b'{"version":"1",\n"id":"x"}', "2"),
    ],
)
def test_one_line_is_one_document(block: bytes, line: str, foreign: bool) -> None:
    """Two documents on a line, or one on two lines, are refused, also where the counts happen to agree."""
    with pytest.raises(errors.Malformed) as caught:
        codec.decode_lines(block, foreign=foreign)
    assert caught.value.meta["line"] == line


def outcome(call: Callable[[], object]) -> object:
    """What a call gives, or the class and coordinates of what it raises."""
    try:
        return call()
    except errors.MistError as exc:
        return type(exc), exc.meta


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        envelopes().map(codec.encode)
        | st.sampled_from([d for d, _, _ in REFUSALS + FOREIGN[:2]])
        | st.sampled_from([b"", b" ", document(nested(63)), document(b"\r[]")]),
        max_size=4,
    ),
    st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
)
def test_a_block_of_foreign_lines_means_what_its_lines_mean(lines: list[bytes], ending: bytes) -> None:
    """Decoding at once and decoding line by line give the same envelopes, or the same error at the same line."""

    def by_line() -> list[Envelope]:
        out = []
        for number, line in enumerate(ending.join(lines).split(b"\n"), 1):
            if line.strip():
                try:
                    out.append(codec.decode_foreign(line))
                except errors.MistError as exc:
                    exc.meta["line"] = str(number)
                    raise
        return out

    assert outcome(lambda: codec.decode_lines(ending.join(lines), foreign=True)) == outcome(by_line)


def test_a_foreign_line_has_the_size_limit_and_a_block_has_not() -> None:
    """Many lines may be larger together than one may be; one line above the limit is named."""
    line = document(b'"%s"' % (b"x" * 400))
    size = len(line)
    assert len(codec.decode_lines(b"\n".join([line] * 5), foreign=True, size_bytes_max=size)) == 5
    with pytest.raises(errors.TooLarge) as caught:
        codec.decode_lines(b"\n".join([line, line[:-2] + b' "}', line]), foreign=True, size_bytes_max=size)
    assert caught.value.meta["line"] == "2"


@settings(max_examples=300, deadline=None)
@given(envelopes())
def test_an_envelope_makes_the_round_trip(env: Envelope) -> None:
    """Through both doors, alone and in lines, equal in every field."""
    data = codec.encode(env)
    assert codec.decode(data) == env
    assert codec.decode_foreign(data) == env
    assert codec.encode_lines([env, env]) == data + b"\n" + data + b"\n"
    if b"\n" not in data:
        assert codec.decode_lines(codec.encode_lines([env, env]), foreign=True) == [env, env]


@settings(max_examples=300, deadline=None)
@given(spellings(), st.booleans())
def test_a_relay_passes_payload_bytes_on_verbatim(payload: bytes, summed: bool) -> None:
    """Odd white space, escapes and number forms come out as they went in, and the checksum stays true."""
    payload = payload.strip()
    data = document(payload, checksum=zlib.crc32(payload) if summed else None)
    once = codec.encode(codec.decode_foreign(data))
    assert b'"payload":' + payload in once
    assert codec.encode(codec.decode_foreign(once)) == once


@settings(max_examples=200, deadline=None)
@given(values, name)
def test_what_we_make_reads_back_as_the_value(value: object, source: str) -> None:
    """Envelope.new, encode, decode, data: the same value."""
    env = Envelope.new("any.type", value, source=source, checksum=True)
    assert codec.decode_foreign(codec.encode(env)).data() == value


def test_a_changed_payload_is_noticed_and_both_sums_are_named() -> None:
    """The error carries what was stated and what was computed."""
    with pytest.raises(errors.ChecksumMismatch) as caught:
        codec.decode_foreign(document(b'{"a":2}', checksum=zlib.crc32(b'{"a":1}')))
    assert caught.value.stated == 1444654255
    assert caught.value.computed == zlib.crc32(b'{"a":2}')


def test_a_checksum_of_zero_means_there_is_none() -> None:
    """As in the seed; absent, 0 and null are the same."""
    for form in (b"0", b"null"):
        assert codec.decode_foreign(document(checksum=form)).checksum == 0


def test_the_first_error_is_the_seeds_first() -> None:
    """version, id, source, type, then the version's range, then the checksum."""
    fields: dict[str, object] = {"version": "", "id": "", "source": "", "type": "", "checksum": 1}
    for field, good in (("version", "9"), ("id", "i"), ("source", "s"), ("type", "t")):
        with pytest.raises(errors.MissingField, match=field):
            codec.decode(document(**fields))
        fields[field] = good
    with pytest.raises(errors.VersionUnsupported):
        codec.decode(document(**fields))
    with pytest.raises(errors.ChecksumMismatch):
        codec.decode(document(**fields | {"version": " +01 "}))


def test_a_buffer_that_changes_later_does_not_change_the_envelope() -> None:
    """The payload is a view of the bytes it was read from, so buffers are copied first."""
    buffer = bytearray(document(b'{"a":1}'))
    made = [codec.decode(buffer), codec.decode_foreign(buffer), codec.decode(memoryview(buffer))]
    buffer[:] = b"x" * len(buffer)
    assert [bytes(e.payload) for e in made] == [b'{"a":1}'] * 3


def test_text_without_a_utf8_form_is_refused_when_it_is_written() -> None:
    """A lone surrogate in any field: an error of ours and not the encoder's."""
    bad = replace(Envelope.new("t", source="s"), tenant="\ud800")
    for write in (codec.encode, codec.encode_msgpack, lambda e: codec.encode_lines([e])):
        with pytest.raises(errors.LoneSurrogate):
            write(bad)


def test_a_document_that_is_deeper_than_the_stack_is_an_error_of_ours() -> None:
    """Our own door has no depth limit, but no RecursionError comes out of it either."""
    for deep in (document(nested(200_000)), document(nested(200_000, objects=True)), document(b"[" * 200_000)):
        with pytest.raises(errors.TooDeep):
            codec.decode(deep)


def test_refusals_are_counted_across_threads() -> None:
    """No count is lost when several threads refuse at once."""
    before = codec.refusals["missing_field"]

    def work() -> None:
        for _ in range(500):
            with pytest.raises(errors.MissingField):
                codec.decode(document(id=""))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert codec.refusals["missing_field"] == before + 2000


def test_an_envelope_may_carry_the_additive_keys() -> None:
    """correlation_id, causation_id, traceparent and tenant make the round trip and are omitted when empty."""
    env = Envelope.new("t", source="s", correlation_id="c", causation_id="d", traceparent="e", tenant="f")
    assert codec.decode_foreign(codec.encode(env)) == env
    assert b"tenant" not in codec.encode(replace(env, tenant=""))


def test_raw_payloads_go_in_as_they_are() -> None:
    """`msgspec.Raw` is taken verbatim, and the checksum is over exactly these bytes."""
    env = Envelope.new("t", Raw(b'{ "a" : 1 }'), source="s", checksum=True)
    assert env.checksum == zlib.crc32(b'{ "a" : 1 }')
    assert b'"payload":{ "a" : 1 }' in codec.encode(env)
