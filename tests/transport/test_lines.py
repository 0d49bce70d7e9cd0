"""JSON lines without I/O."""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from mist.errors import Malformed, MistError, TooDeep, TooLarge
from mist.protocol import codec
from mist.testing.transports import envelope, sized
from mist.transport._lines import LineDecoder, Position, encode_lines

PIECES: list[tuple[bytes, Any]] = [
    (codec.encode(envelope(1, id="one")) + b"\n", "one"),
    (codec.encode(envelope(2, id="two", checksum=True)) + b"\r\n", "two"),
    (b"\n", None),
    (b"  \t\n", None),
    (b"broken\n", Malformed),
    (b'{"VERSION":"1","Id":"three","source":"s","type":"t"}\n', "three"),
    (codec.encode(envelope(payload=Raw(b"[" * 80 + b"]" * 80))) + b"\n", TooDeep),
    (codec.encode(sized(3000)) + b"\n", TooLarge),
]


def drain(decoder: LineDecoder, limit: int) -> list[Any]:
    out: list[Any] = []
    while True:
        try:
            got = decoder.take(limit)
        except MistError as exc:
            out.append(exc)
            continue
        if not got:
            return out
        out += got


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(range(len(PIECES))), max_size=12), st.data())
def test_cut_anywhere(picks: list[int], data: st.DataObject) -> None:
    """However the bytes are cut and taken, each line gives the same, and the position names every line's end."""
    raw = b"".join(PIECES[i][0] for i in picks)
    decoder = LineDecoder("in", size_bytes_max=2000)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    got: list[Any] = []
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        decoder.feed(raw[start:end])
        got += drain(decoder, data.draw(st.integers(1, 4)))
        at = decoder.position
        assert raw[: at.offset].count(b"\n") == at.line
        assert at.offset == 0 or raw[at.offset - 1 : at.offset] == b"\n"
    wanted = [PIECES[i][1] for i in picks if PIECES[i][1] is not None]
    assert len(got) == len(wanted)
    for one, want in zip(got, wanted, strict=True):
        assert one.id == want if isinstance(want, str) else type(one) is want
    assert decoder.position == Position(len(picks), len(raw))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 7))
def test_resume_from_every_position(picks: list[int], limit: int) -> None:
    """A decoder that starts at the position of another gives exactly the rest."""
    raw = b"".join(PIECES[i][0] for i in picks)
    first = LineDecoder("in")
    first.feed(raw)
    head = [e.id for e in first.take(limit)]
    at = first.position
    second = LineDecoder("in", at)
    second.feed(raw[at.offset :])
    tail = [e.id for e in drain(second, 100)]
    assert head + tail == [PIECES[i][1] for i in picks if PIECES[i][1] is not None]


def test_errors_name_the_line() -> None:
    """An error says input, line and offset, in its text and for programs."""
    decoder = LineDecoder("x.jsonl")
    good = codec.encode(envelope()) + b"\n"
    decoder.feed(good + b"\n" + b"bad\n")
    decoder.take(5)
    with pytest.raises(Malformed, match=r"^x\.jsonl:3: ") as caught:
        decoder.take(5)
    assert caught.value.meta["line"] == "3"
    assert caught.value.meta["offset"] == str(len(good) + 1)


def test_oversize_line_costs_no_memory() -> None:
    """A line far above the limit is passed over piece by piece, with its size in the error."""
    decoder = LineDecoder("in", size_bytes_max=1000)
    for _ in range(100):
        decoder.feed(b"x" * 1000)
        assert sum(len(p) for p in decoder._rest) <= 2001
    decoder.feed(b"\n" + codec.encode(envelope(id="next")) + b"\n")
    with pytest.raises(TooLarge) as caught:
        decoder.take(1)
    assert caught.value.size_bytes == 100_000
    assert decoder.take(1)[0].id == "next"
    assert decoder.position.line == 2


def test_unfinished_last_line() -> None:
    """At the end of the input a whole document counts as a line, a torn one is an error."""
    doc = codec.encode(envelope(id="last"))
    whole = LineDecoder("in")
    whole.feed(doc)
    assert whole.take(1) == []
    whole.finish()
    assert whole.take(1)[0].id == "last"
    torn = LineDecoder("in")
    torn.feed(doc[:-5])
    torn.finish(keep=True)
    with pytest.raises(Malformed, match="torn last line") as caught:
        torn.take(1)
    assert caught.value.meta["torn"] == "1"
    assert torn.position == Position(0, 0)


def test_documents_not_one_to_a_line() -> None:
    """Two documents on a line, and one over two lines, are errors; no line number shifts."""
    doc = codec.encode(envelope(id="d"))
    decoder = LineDecoder("in")
    decoder.feed(doc + doc + b"\n" + doc + b"\n" + doc.replace(b":", b":\n", 1) + b"\n" + doc + b"\n")
    got = drain(decoder, 10)
    assert [isinstance(x, MistError) for x in got] == [True, False, True, True, False]
    assert decoder.position.line == 5


def test_encoding_keeps_one_line_each() -> None:
    """Line breaks inside payloads become spaces; a right checksum is right again, a wrong one stays wrong."""
    raw = b'{"a":\n1}'
    right = msgspec.structs.replace(envelope(payload=Raw(raw)), checksum=zlib.crc32(raw))
    wrong = msgspec.structs.replace(right, checksum=1)
    lines = encode_lines([envelope(1), right, wrong]).data.splitlines()
    assert len(lines) == 3
    assert bytes(codec.decode(lines[1]).payload) == b'{"a": 1}'
    assert b'"checksum":1}' in lines[2]


def test_encoding_refuses_by_name() -> None:
    """The envelope that is too large is named, whatever lies around it."""
    big = sized(2001)
    with pytest.raises(TooLarge, match=big.id):
        encode_lines([envelope(), big, envelope()], 2000)
    assert encode_lines([sized(2000)], 2000).largest == 2001
