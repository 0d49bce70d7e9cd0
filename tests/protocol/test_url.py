"""URLs: one grammar, printed as they are read, secrets never printed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mist.errors import InvalidArgument
from mist.protocol.url import Url, has_scheme, parse_url, redact

schemes = st.sampled_from(["log", "memory", "file", "stdio", "chan", "nats", "redis", "http", "https"])
paths = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r\n?%"), max_size=20)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)


@pytest.mark.parametrize(
    ("text", "scheme", "target"),
    [
        ("log:./data", "log", "./data"), ("log:/abs/dir", "log", "/abs/dir"), ("log:///abs/dir", "log", "/abs/dir"),
        ("log:a%20b%3Fc", "log", "a b?c"), ("memory:", "memory", ""), ("memory:NAME", "memory", "NAME"),
        ("file:x.jsonl", "file", "x.jsonl"), ("file:///tmp/x", "file", "/tmp/x"), ("file://rel/x", "file", "rel/x"),
        ("file:///a%20b", "file", "/a%20b"), ("stdio:", "stdio", ""), ("stdio://", "stdio", ""), ("chan://n", "chan", "n"),
        ("nats://h:4222", "nats", "//h:4222"), ("redis://h:6379/0", "redis", "//h:6379/0"), ("HTTP://H/mist", "http", "//H/mist"),
    ],
)  # fmt: skip
def test_urls_of_every_backend_and_of_the_seed_are_read(text: str, scheme: str, target: str) -> None:
    """Short and slashed forms of local schemes name the same; `file:` is not percent-decoded, as in the seed."""
    url = parse_url(text)
    assert (url.scheme, url.target, url.query) == (scheme, target, ())
    assert parse_url(str(url)) == url


def test_parameters_are_read_in_order_and_the_last_one_counts() -> None:
    """Several subjects are several values; a blank value is a value."""
    url = parse_url("nats://h?stream=s&subject=a.*.>&subject=b&x=")
    assert url.get("stream") == "s"
    assert url.all("subject") == ("a.*.>", "b")
    assert url.get("subject") == "b"
    assert url.get("x", "default") == ""
    assert url.get("y", "default") == "default"
    assert str(url) == "nats://h?stream=s&subject=a.*.>&subject=b&x="


def test_a_parameter_that_nobody_knows_is_refused() -> None:
    """A typo must not be ignored, and the message hides secrets."""
    url = parse_url("redis://u:sesame@h?steam=s")
    url.refuse_unknown("steam")
    with pytest.raises(InvalidArgument, match="steam") as caught:
        url.refuse_unknown("stream")
    assert "sesame" not in str(caught.value)


@settings(max_examples=500, deadline=None)
@given(schemes, st.sampled_from(["", "//", "///"]), paths, st.lists(st.tuples(words, words), max_size=3))
def test_what_is_printed_reads_back_equal(scheme: str, slashes: str, path: str, query: list[tuple[str, str]]) -> None:
    """For every URL that parses, and for its own printed form."""
    url = parse_url(f"{scheme}:{slashes}{path}")
    assert parse_url(str(url)) == url
    full = Url(url.scheme, url.target, tuple((k or "k", v) for k, v in query))
    assert parse_url(str(full)) == full


@settings(max_examples=300, deadline=None)
@given(st.text("%?&=#:/@ab\x00\n\udcff0 ", max_size=30))
def test_any_text_is_read_or_refused_by_name(text: str) -> None:
    """Nothing but InvalidArgument comes out, and what is read makes the round trip."""
    for candidate in (text, "log:" + text, "nats:" + text):
        try:
            url = parse_url(candidate)
        except InvalidArgument:
            continue
        assert parse_url(str(url)) == url
        assert redact(redact(candidate)) == redact(candidate)


@pytest.mark.parametrize("text", ["", "stream", "a:", "./log:x", "/a/b", "C:x", ":x", "log", "log:a\nb", "log:a\x00"])
def test_these_are_not_urls(text: str) -> None:
    """A name, a path, a drive letter, and texts with line breaks or NUL; the error says what to write."""
    with pytest.raises(InvalidArgument, match="for example"):
        parse_url(text)


@pytest.mark.parametrize("text", ["log:x?a", "log:x?a=1&&b=2", "log:x?=%FF", "nats://h?x=%ff", "log:%FF"])
def test_parameters_and_paths_that_do_not_decode_are_refused(text: str) -> None:
    """A part without `=`, an empty part, bytes that are not UTF-8."""
    with pytest.raises(InvalidArgument):
        parse_url(text)


def test_a_scheme_tells_a_url_from_a_name() -> None:
    """How the command line decides what an argument is."""
    assert has_scheme("log:x")
    assert has_scheme("nats://h")
    assert not has_scheme("trace")
    assert not has_scheme("./log:x")
    assert not has_scheme("a:b")


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("nats://h:4222", "nats://h:4222"),
        ("nats://user:sesame@h:4222/x?a=1", "nats://user:***@h:4222/x?a=1"),
        ("nats://sesame@h", "nats://***@h"),
        ("redis://:sesame@h/0", "redis://***@h/0"),
        ("nats://user:sesame@h?from=@-1h", "nats://user:***@h?from=@-1h"),
        ("nats://h:4222?from=@2026-01-01", "nats://h:4222?from=@2026-01-01"),
        ("nats://u:sesame@a:1,u2:sesame@b:2", "nats://u:***@b:2"),
        ("nats://u:sesame@a:1,nats://u2:sesame@b:2", "nats://u:***@b:2"),
        ("http://h/p@q", "http://h/p@q"),
        ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
        ("http://h/x?to=redis://u:sesame@h2", "http://h/x?to=redis://***@h2"),
        ("nats://h?token=sesame&x=1&API_KEY=sesame", "nats://h?token=***&x=1&API_KEY=***"),
        ("nats://h?tok%65n=sesame#sesame", "nats://h?tok%65n=***"),
        ("log:/a@b/c", "log:/a@b/c"),
        ("log://a/b@c", "log://a/b@c"),
    ],
)
def test_secrets_are_hidden_and_the_rest_is_kept(text: str, printed: str) -> None:
    """User names, hosts and harmless parameters stay readable."""
    assert redact(text) == printed
    assert redact(printed) == printed


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["nats", "redis", "rediss", "NATS"]),
    st.sampled_from(["", "user", "u.s-e_r"]),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="@"), max_size=12),
    st.sampled_from(["h", "h:4222", "[::1]:1", "h/0", "h/0?a=b", "h:1?from=@1&x=y"]),
)
def test_a_password_of_any_printable_characters_is_never_printed(scheme: str, user: str, rest: str, host: str) -> None:
    """Also one with slashes, question marks, hashes, colons, commas or brackets that nobody escaped."""
    secret = f"se{rest}same"
    text = f"{scheme}://{user}:{secret}@{host}"
    if "?" in secret and "@" in host:
        return  # two question marks: nobody can say where the query starts
    shown = redact(text)
    assert secret not in shown
    assert "same" not in shown
    assert shown.endswith(f"***@{host}")
    with pytest.raises(InvalidArgument) as caught:
        parse_url(text + "\n")
    assert "same" not in str(caught.value)


def test_a_token_with_a_question_mark_is_hidden() -> None:
    """NATS takes a token where others have user:password. What stands between ? and @ is no query unless it has a =."""
    assert redact("nats://to?ken@host:4222") == "nats://***@host:4222"
    assert redact("nats://host:4222?stream=a@b") == "nats://host:4222?stream=a@b"


def test_redaction_in_front_of_a_question_mark_is_stable() -> None:
    """An & before the ? does not swallow the query; found by the fuzzer, which redacts twice."""
    text = "nats://&user,:pw@h:422password=x2?stream=s&suser,:pw@h:422password=x"
    shown = redact(text)
    assert redact(shown) == shown
    assert shown == "nats://&user,:***@h:422password=***?stream=s&suser,:pw@h:422password=***"
