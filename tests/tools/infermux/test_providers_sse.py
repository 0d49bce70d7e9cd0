"""Server-sent events: the same ones however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mist.errors import TooLarge
from mist.tools.infermux.providers.sse import Event, Parser


def parsed(*parts: bytes, event_bytes_max: int = 1000) -> list[Event]:
    parser = Parser(event_bytes_max)
    return [event for part in parts for event in parser.feed(part)]


LINES = st.lists(
    st.one_of(
        st.sampled_from([b"", b"", b"data", b"data:", b"data: ", b"event: x", b"event", b": comment", b"id: 1", b"retry: 5"]),
        st.binary(max_size=12).map(lambda raw: b"data: " + raw.replace(b"\r", b"").replace(b"\n", b"")),
        st.binary(max_size=12),
    ),
    max_size=12,
)  # fmt: skip
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(LINES, ENDS), max_size=3), st.data())
def test_cut_anywhere_they_are_the_same(blocks: list[tuple[list[bytes], bytes]], data: st.DataObject) -> None:
    whole = b"".join(line + end for lines, end in blocks for line in lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    expected = parsed(whole)
    assert parsed(*parts) == expected
    assert parsed(*[whole[at : at + 1] for at in range(len(whole))]) == expected
    # one kind of line end is as good as another
    plain = whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert parsed(plain) == expected


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [("", b"a")]),
        (b"data:a\ndata: b\ndata:  c\n\n", [("", b"a\nb\n c")]),
        (b"event: e\ndata: a\n\ndata: b\n\n", [("e", b"a"), ("", b"b")]),
        (b"event: e\n\ndata: b\n\n", [("", b"b")]),
        (b": hello\n\n\n\ndata\n\n", [("", b"")]),
        (b"\xef\xbb\xbfdata: a\n\n", [("", b"a")]),
        (b"data: \xef\xbb\xbf\r\n\r\n", [("", b"\xef\xbb\xbf")]),
        (b"data: a\r\rdata: b\r\n\r\n", [("", b"a"), ("", b"b")]),
        (b"data: unfinished\n", []),
        (b"data: unfinished", []),
        (b"other: x\nid: 1\nretry: 2\ndata: a\n\n", [("", b"a")]),
    ],
)
def test_the_rules_of_the_format(stream: bytes, events: list[tuple[str, bytes]]) -> None:
    assert parsed(stream) == events


def test_an_event_has_a_size() -> None:
    """At the limit it is given, one past it refused: in one line or many, ended or not. The next event starts at nothing."""
    fits = b"data: " + b"x" * 14
    assert len(parsed(fits + b"\n\n" + fits + b"\n\n", event_bytes_max=20)) == 2
    assert len(parsed(*[bytes([byte]) for byte in fits + b"\n\n"], event_bytes_max=20)) == 1
    for stream in (fits + b"x", fits + b"x\n", b"data: a\n" * 3, b": comment\n" * 3):
        with pytest.raises(TooLarge):
            parsed(stream, event_bytes_max=20)
        with pytest.raises(TooLarge):
            parsed(*[bytes([byte]) for byte in stream], event_bytes_max=20)
