"""Subjects, filters, and the one encoder for names that come from outside."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mist.errors import InvalidArgument
from mist.protocol import subject as s

anything = st.text(max_size=40) | st.text("-=_.* >$/\\aZ0é\x00\n", max_size=12)
tokens = st.text("abcXYZ019_-=$", min_size=1, max_size=4)
subjects = st.lists(tokens, min_size=1, max_size=5).map(".".join)
filters = st.builds(
    lambda parts, tail: ".".join([*parts, *tail]) or ">",
    st.lists(st.sampled_from(["*", "a", "b", "c"]) | tokens, max_size=4),
    st.sampled_from([[], [">"]]),
)


def utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@settings(max_examples=400, deadline=None)
@given(anything.filter(utf8))
def test_tokens_are_reversible_and_never_hold_what_is_forbidden(text: str) -> None:
    """Decoding gives the text; the token is plain ASCII without dots, wildcards, separators or white space."""
    token = s.encode_token(text)
    assert s.decode_token(token) == text
    assert re.fullmatch(r"[A-Za-z0-9_=]+(?:-[A-Za-z0-9_=]+)*", token, re.ASCII)
    assert "--" not in token
    assert token.isascii()


@settings(max_examples=400, deadline=None)
@given(anything.filter(utf8), anything.filter(utf8))
def test_two_texts_never_share_a_token(one: str, other: str) -> None:
    """Injective: also for texts that differ in case, in normal form, or by a byte that looks like an escape."""
    assert (s.encode_token(one) == s.encode_token(other)) == (one == other)


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("plain_1", "plain_1"), ("", "="), ("=", "=3D"), ("a-b", "a-b"), ("-a", "=2Da"), ("a-", "a=2D"), ("a--b", "a=2D=2Db"),
        ("a.b", "a=2Eb"), ("*", "=2A"), (">", "=3E"), ("$SYS", "=24SYS"), ("a/b", "a=2Fb"), ("é", "=C3=A9"), ("=41", "=3D41"),
        ("a-é", "a=2D=C3=A9"), ("\x00", "=00"), ("dead", "dead"),
    ],
)  # fmt: skip
def test_tokens_have_this_form(text: str, token: str) -> None:
    """The form is part of stored data and of subjects on servers, so it is pinned."""
    assert s.encode_token(text) == token
    assert s.decode_token(token) == text


@pytest.mark.parametrize(
    "token",
    ["", "==", "=4", "=41", "=zz", "=c3=a9", "=C3", "=ED=A0=80", "a--b", "-a", "a-", "a.b", "é", "= 1", "=+1", "=2D=2"],
)
def test_what_the_encoder_never_makes_is_not_decoded(token: str) -> None:
    """One text, one token: a second spelling is refused, not read."""
    with pytest.raises(InvalidArgument):
        s.decode_token(token)


def test_text_without_a_utf8_form_has_no_token() -> None:
    """A lone surrogate is refused by the encoder and by the check of subjects."""
    for call in (s.encode_token, s.check_subject, s.check_filter, s.check_stream):
        with pytest.raises(InvalidArgument):
            call("a\ud800")


@settings(max_examples=300, deadline=None)
@example("dead", "=64ead")
@example("dead", "a--dead")
@given(anything.filter(utf8), anything.filter(utf8))
def test_tenants_never_share_a_stream_nor_own_the_dead_letters(one: str, other: str) -> None:
    """Streams of different tenants differ, and none is a dead-letter stream."""
    try:
        streams = s.tenant_stream("trace", one), s.tenant_stream("trace", other)
    except InvalidArgument:
        return  # too long together
    assert (streams[0] == streams[1]) == (one == other)
    assert s.dead_stream("trace") not in streams
    assert all(t == "trace" or t.count("--") == 1 for t in streams)


def test_the_limits_on_names_are_exact() -> None:
    """128 characters for a stream, 255 bytes for a subject, 255 characters for a filter."""
    assert s.check_stream("x" * 128)
    assert s.check_subject("x" * 255)
    assert s.check_subject("é" * 127)
    assert s.check_filter("*." + "x" * 253)
    for call, text in (
        (s.check_stream, "x" * 129),
        (s.check_subject, "x" * 256),
        (s.check_subject, "é" * 128),
        (s.check_filter, "*." + "x" * 254),
        (s.check_subject, "x" * 1_000_000),
    ):
        with pytest.raises(InvalidArgument):
            call(text)


@pytest.mark.parametrize("name", ["", "-a", "a.b", "a b", "a/b", "..", "é", "a\n", "*", "a\x00"])
def test_these_are_not_stream_names(name: str) -> None:
    """Nothing that could leave a folder, end a line or match more than itself."""
    with pytest.raises(InvalidArgument):
        s.check_stream(name)


@pytest.mark.parametrize(
    "text", ["", ".", "a.", ".a", "a..b", "a b", "a.*", "a.>", "*", ">", "a\tb", "a\x00", "a\n", "a\u2028b", "x*y"]
)
def test_these_are_not_subjects(text: str) -> None:
    """Empty tokens, wildcards, white space of any alphabet, controls."""
    with pytest.raises(InvalidArgument):
        s.check_subject(text)


@pytest.mark.parametrize(
    "pattern", ["", ".", "a.", ">.a", "a.>.b", "a..>", "a*", "*b", "a>", "a b", "a\n", "..>", ".>"]
)
def test_these_are_not_filters(pattern: str) -> None:
    """`*` and `>` stand alone in their token, and `>` is the last."""
    with pytest.raises(InvalidArgument):
        s.check_filter(pattern)
    with pytest.raises(InvalidArgument):
        s.matcher([">", pattern])


def test_no_filter_at_all_is_a_mistake() -> None:
    """An empty list does not silently mean everything, or nothing."""
    with pytest.raises(InvalidArgument):
        s.matcher([])


def naive(pattern: list[str], subject: list[str]) -> bool:
    """NATS' rule, token by token."""
    if pattern == [">"]:
        return bool(subject)
    if not pattern or not subject:
        return not pattern and not subject
    return pattern[0] in ("*", subject[0]) and naive(pattern[1:], subject[1:])


@settings(max_examples=400, deadline=None)
@given(st.lists(filters, min_size=1, max_size=3), subjects | st.lists(st.sampled_from("abc"), min_size=1).map(".".join))
def test_filters_match_what_the_rule_says(patterns: list[str], subject: str) -> None:
    """Any number of filters against a naive matcher."""
    match = s.matcher(patterns)
    expected = any(naive(p.split("."), subject.split(".")) for p in patterns)
    assert (match is None or match(subject)) == expected
    assert s.matching(patterns, [subject]) == ([subject] if expected else [])


def test_everything_needs_no_matcher() -> None:
    """`>` among the filters means every subject, and costs nothing."""
    assert s.matcher([">"]) is None
    assert s.matcher(["a", ">"]) is None


@settings(max_examples=300, deadline=None)
@given(anything.filter(utf8), anything.filter(utf8))
def test_the_subject_of_an_envelope_can_be_appended_and_filtered(type_: str, qualifier: str) -> None:
    """Any type and qualifier give a valid subject or one too long, and a qualifier never reads as another's filter."""
    try:
        subject, other = s.subject_for(type_, qualifier), s.subject_for(type_, qualifier + "x")
    except InvalidArgument:
        assert len(s.encode_token(type_) + s.encode_token(qualifier)) > 200
        return
    assert s.check_subject(subject) == subject
    assert s.matching([subject], [other]) == []


def test_a_common_type_is_its_own_subject() -> None:
    """`eval.result` and a run make `eval.result.<run>`."""
    assert s.subject_for("eval.result", "run-1") == "eval.result.run-1"
    assert s.subject_for("trace.span") == "trace.span"
    assert s.subject_for("trace.span", "my service") == "trace.span.my=20service"
