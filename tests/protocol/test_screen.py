"""What the door to the outside refuses, exactly at its limits, and what it must not refuse."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mist import errors
from mist.protocol import codec, screen
from mist.protocol.codec import decode_foreign
from tests.protocol.values import document, nested, spellings


def sized(size: int) -> bytes:
    """An envelope of exactly so many bytes."""
    return document(b'"%s"' % (b"x" * (size - len(document(b'""')))))


def test_the_size_limit_is_exact() -> None:
    """The largest envelope is read, one byte more is refused, by default and with a limit of one's own."""
    for limit in (codec.SIZE_BYTES_MAX, 500):
        assert decode_foreign(sized(limit), size_bytes_max=limit).id == "a1"
        with pytest.raises(errors.TooLarge) as caught:
            decode_foreign(sized(limit + 1), size_bytes_max=limit)
        assert (caught.value.size_bytes, caught.value.size_bytes_max) == (limit + 1, limit)
    assert codec.SIZE_BYTES_MAX == 10 * 1024 * 1024


@pytest.mark.parametrize("objects", [False, True])
def test_the_depth_limit_is_exact(objects: bool) -> None:
    """64 levels with the envelope's own; 65 are refused; brackets in strings and side by side do not count."""
    assert decode_foreign(document(nested(63, objects=objects))).id == "a1"
    with pytest.raises(errors.TooDeep):
        decode_foreign(document(nested(64, objects=objects)))
    beside = b"[%s]" % b",".join([nested(62, objects=objects), b'"%s"' % (b"[{" * 999), b"{}"] * 50)
    assert decode_foreign(document(beside)).id == "a1"


def test_depth_is_seen_behind_escaped_quotes_and_in_unknown_keys() -> None:
    """A string that seems to end does not hide what comes after it."""
    for text in (b'"\\""', b'"\\\\"', b'"\\\\\\""', b'"[\\"[\\"["', b'"' + b"\\\\" * 500 + b'"'):
        assert decode_foreign(document(b"[%s,%s]" % (text, nested(62)))).id == "a1"
        with pytest.raises(errors.TooDeep):
            decode_foreign(document(b"[%s,%s]" % (text, nested(63))))
    with pytest.raises(errors.TooDeep):
        decode_foreign(document(b"1", unknown=nested(64)))


def test_the_limit_on_keys_is_exact() -> None:
    """100,000 keys with the envelope's own six; colons in strings do not count."""
    free = codec.KEYS_MAX - 6
    assert decode_foreign(document(b"{%s}" % b",".join([b'"":0'] * free))).id == "a1"
    with pytest.raises(errors.TooManyKeys):
        decode_foreign(document(b"{%s}" % b",".join([b'"":0'] * (free + 1))))
    assert decode_foreign(document(b'"%s"' % (b":" * 1_000_000))).id == "a1"
    assert decode_foreign(document(b'{"a":0}'), keys_max=7).id == "a1"
    with pytest.raises(errors.TooManyKeys):
        decode_foreign(document(b'{"a":0,"b":0}'), keys_max=7)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "nan", "inf", "-inf", "+Infinity", "-NaN"])
def test_words_that_are_no_numbers_are_called_not_finite(word: str) -> None:
    """As the whole payload, in a list, as a member; also beside strings that hold quotes."""
    for payload in (word, f"[1,{word}]", f'{{"a":{word}}}', f'{{"a\\"b":"\\\\","c": {word} }}'):
        with pytest.raises(errors.NotFinite):
            decode_foreign(document(payload))


@pytest.mark.parametrize(
    "payload",
    ['"NaN"', '{"NaN":"-Infinity"}', '["a NaN,", "\\"NaN", "1e999"]', '{"k\\\\":"NaN"}', '{"a":"x\\\\\\"NaN"}'],
)
def test_the_same_words_in_strings_are_text(payload: str) -> None:
    """Nothing is refused for what a string says."""
    assert decode_foreign(document(payload)).id == "a1"
    with pytest.raises(errors.Malformed):  # and another fault of such a document keeps its own name
        decode_foreign(document(payload) + b"x")


@pytest.mark.parametrize("word", ["nano", "infinite", "_NaN", "NaN1", "xnan"])
def test_other_bare_words_are_malformed(word: str) -> None:
    """Only the words that other encoders write for NaN and infinities have the special name."""
    with pytest.raises(errors.Malformed):
        decode_foreign(document(f"[{word}]"))


TOO_LARGE_NUMBERS = [
    "1e999", "-1e309", "1.8e308", "1E+0400", "17976931348623159" + "0" * 292 + ".0", "9" * 4301, "-" + "9" * 4301,
    "0.0001e313", "9" * 250 + "e99", "1e99999999999999999999",
]  # fmt: skip
FINE_NUMBERS = [
    "1e308", "1.7976931348623157e308", "-1E+0308", "0e999", "-0.0e400", "1e-400", "1e-99999999999999999999", "9" * 4300,
    "0." + "9" * 5000, "1" + "0" * 300 + ".5", "0.00001e312", "1e-" + "0" * 250 + "5", "-0", "18446744073709551616",
    "1e+00000000000000000000000001", "1e-" + "9" * 5000,
]  # fmt: skip
LARGE = b',"%s"' % (b" " * 1_100_000)  # makes the payload too large to be checked by decoding it


@pytest.mark.parametrize("fill", [b"", LARGE], ids=["small", "large"])
@pytest.mark.parametrize("number", TOO_LARGE_NUMBERS, ids=lambda n: n[:24])
def test_numbers_that_become_infinite_are_refused(number: str, fill: bytes) -> None:
    """Small and large payloads are checked in two ways; both see the same."""
    for form in (b"[%s%s]", b'[0,"",{"a": %s }%s]', b'["1",-1.5e3,\n%s\n%s]'):
        with pytest.raises(errors.NotFinite):
            decode_foreign(document(form % (number.encode(), fill)))


@pytest.mark.parametrize("fill", [b"", LARGE], ids=["small", "large"])
@pytest.mark.parametrize("number", FINE_NUMBERS, ids=lambda n: n[:24])
def test_large_numbers_that_are_finite_pass(number: str, fill: bytes) -> None:
    """The edges of a double and of 4,300 digits, long fractions, leading zeros in exponents."""
    for form in (b"[%s%s]", b'[0,"",{"a": %s }%s]'):
        assert decode_foreign(document(form % (number.encode(), fill))).id == "a1"


@settings(max_examples=200, deadline=None)
@given(st.from_regex(r"\A-?(0|[1-9][0-9]{0,320})(\.[0-9]{1,5})?([eE][+-]?0{0,3}[0-9]{1,4})?\Z"))
def test_both_ways_of_checking_numbers_agree(number: str) -> None:
    """The scan of large payloads decides any number like the decoder does."""

    def refused(payload: bytes) -> bool:
        try:
            screen.check_numbers(payload)
        except errors.NotFinite:
            return True
        return False

    assert refused(b"[%s]" % number.encode()) == refused(b"[%s%s]" % (number.encode(), LARGE))


@pytest.mark.parametrize(
    "text",
    [
        "\\ud800",
        "\\uDC00",
        "a\\ud83d",
        "\\ud83dx\\ude00",
        "\\ude00\\ud83d",
        "\\ud83d\\ud83d\\ude00",
        "\\ud83d\\\\\\ude00",
    ],
)
def test_half_a_surrogate_pair_is_called_one(text: str) -> None:
    """High without low, low without high, the wrong order; in values, in keys, in the envelope's own fields."""
    for data in (
        document(f'"{text}"'),
        document(f'{{"{text}":1}}'),
        document(f'["\\\\","{text}",1]'),
        document(id=text),
        document(unknown=text),
    ):
        with pytest.raises(errors.LoneSurrogate):
            decode_foreign(data)


def test_another_fault_beside_an_escaped_backslash_is_not_called_a_surrogate() -> None:
    """`\\\\ud800` in a string of a document that is broken elsewhere: malformed, and no more."""
    with pytest.raises(errors.Malformed):
        decode_foreign(document('["\\\\ud800", "\\\\\\\\udc00"') + b"x")


def test_a_surrogate_written_as_utf8_is_called_one() -> None:
    """The three bytes that some encoders make of it."""
    with pytest.raises(errors.LoneSurrogate):
        decode_foreign(document(b'"\xed\xa0\x80"'))
    assert decode_foreign(document(b'"\xed\x9f\xbf"')).id == "a1"


@pytest.mark.parametrize(
    "text", ["\\ud83d\\ude00", "\\\\ud800", "\\\\\\\\udc00", "\\uD83D\\uDE00\\uD83D\\uDE00", "\\u0000"]
)
def test_whole_pairs_and_escaped_backslashes_pass(text: str) -> None:
    """`\\\\ud800` is a backslash and five letters. NUL is a character like another inside a payload."""
    assert decode_foreign(document(f'["{text}"]')).data() == json.loads(f'["{text}"]')


@pytest.mark.parametrize(
    "payload", ['"\x00"', '"\x01"', '"\n"', "01", "1.", ".5", "[1,]", "{,}", '{"a"}', "'a'", "yes", "[1 2]", "\x0b1"]
)
def test_what_is_not_json_is_refused_inside_the_payload_too(payload: str) -> None:
    """The payload is not decoded, but its syntax is checked."""
    with pytest.raises(errors.Malformed):
        decode_foreign(document(payload))


@settings(max_examples=300, deadline=None)
@given(spellings())
def test_nothing_that_json_allows_is_refused(payload: bytes) -> None:
    """Any spelling of any value passes, and is the value that the standard library reads."""
    assert decode_foreign(document(payload)).data() == json.loads(payload)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(list(b'"\\[]{}:,1 aN')), max_size=40).map(bytes))
def test_outside_strings_is_exact_on_json_and_harmless_elsewhere(data: bytes) -> None:
    """Brackets and colons outside of strings are counted as a decoder sees them."""
    bare = screen.outside_strings(data)
    assert len(bare) <= len(data)
    try:
        pairs = json.loads(data, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return
    assert bare.count(b"[") + bare.count(b"{") == containers(pairs)


def containers(value: object) -> int:
    """How many lists and objects a value is made of; an object is a tuple of pairs, so duplicate keys count."""
    if isinstance(value, list):
        return 1 + sum(map(containers, value))
    return 1 + sum(containers(v) for _, v in value) if isinstance(value, tuple) else 0


def test_strings_that_cross_the_chunks_stay_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunk size, the same is outside, except for doubled quotation marks."""
    data = b'{"a\\"[":["\\\\",{"b":"]\\\\\\""}],"c":"","d":NaN}' * 3
    whole = screen.outside_strings(data).replace(b'""', b'"')
    for size in range(1, 40):
        monkeypatch.setattr(screen, "_CHUNK", size)
        cut = screen.outside_strings(data)
        assert cut.replace(b'"', b"") == whole.replace(b'"', b"")


@pytest.mark.parametrize(
    "payload",
    [
        b'"' + b'\\"' * 2_000_000,  # a string that never ends, all of it escaped quotes
        b'"' + b"\\" * 4_000_001,
        b"[" + b'"a",' * 1_000_000,
        b"9" * 4_000_000,
        b"[" + b"1e" * 2_000_000,
        b'["\\ud800' * 400_000,
        b"[" + b"N" * 4_000_000,
        b"-" * 4_000_000,
        b"[" * 4_000_000,
        b"[]," * 1_300_000,
        b'{"":' * 1_000_000,
        b"[%s1]" % (b"1" * 199 + b",") * 20_000,
        b"[%s]" % b",".join([b"1" * 250] * 16_000),
    ],
    ids=range(13),
)
def test_hostile_input_of_four_megabytes_is_decided_in_linear_time(payload: bytes) -> None:
    """None of these hangs (the suite's own time limit would see it); each is refused or read."""
    with pytest.raises((errors.ProtocolError, errors.TooLarge)):
        decode_foreign(document(payload) + b"]")


def test_screen_alone_says_nothing_of_a_document_that_is_fine() -> None:
    """It returns None, and does not count."""
    before = dict(codec.refusals)
    assert screen.screen(document()) is None
    with pytest.raises(errors.TooLarge):
        screen.screen(document(), size_bytes_max=10)
    assert dict(codec.refusals) == before
