"""The wire of NATS as functions: cuts, acknowledgements, headers and times."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.broker.base import HEADERS_BYTES_MAX, Headers, Message
from mist.broker.deadletter import OURS
from mist_nats import wire
from mist_nats.headers import ID, LINES_BYTES_MAX, QUIET_ID, message_lines, plain_headers, read_header
from mist_nats.wire import Frame, Garbled, Splitter

LINE = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\r\n\x00"), max_size=40)
NAME = LINE.filter(lambda t: bool(t) and ":" not in t)
PLAIN = st.tuples(st.sampled_from(["a", "A", "Content-Type", "traceparent", "x-1", *sorted(OURS)]), LINE)
HEADERS = st.lists(st.one_of(PLAIN, st.tuples(NAME, LINE)), max_size=6).map(tuple)


def feed(
    splitter: Splitter, chunks: list[bytes]
) -> tuple[list[bytes], list[tuple[bytes, Frame]], list[tuple[bytes, bytes]]]:
    fed = [splitter.feed(c) for c in chunks]
    return (
        [x for f in fed for x in f.lines],
        [(sid, frame) for f in fed for sid, run in f.frames for frame in run],
        [a for f in fed for a in f.acks],
    )


@given(st.data())
def test_cuts_change_nothing(data: st.DataObject) -> None:
    """Messages, acknowledgements and control lines are the same however the bytes are cut."""
    parts, expected = [], []
    acks = []
    lines = []
    for n in range(data.draw(st.integers(1, 8))):
        kind = data.draw(st.sampled_from(["msg", "hmsg", "ack", "line"]))
        body = data.draw(st.binary(max_size=30))
        if kind == "msg":
            parts.append(b"MSG s.%d 7 %d\r\n%b\r\n" % (n, len(body), body))
            expected.append((b"7", (b"s.%d" % n, b"", b"", body)))
        elif kind == "hmsg":
            head = b"NATS/1.0\r\na: b\r\n\r\n"
            parts.append(b"HMSG s 8 r.%d %d %d\r\n%b%b\r\n" % (n, len(head), len(head) + len(body), head, body))
            expected.append((b"8", (b"s", b"r.%d" % n, head, body)))
        elif kind == "ack":
            dup = b',"duplicate": true' if n % 2 else b""
            ack = b'{"stream":"S","seq":%d%b}' % (n + 100, dup)
            parts.append(b"MSG _INBOX.x.%d 1 %d\r\n%b\r\n" % (n, len(ack), ack))
            acks.append((b"%d" % n, b"%d" % (n + 100)))
        else:
            parts.append(b"PING\r\n")
            lines.append(b"PING")
    whole = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=10)))
    chunks = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert feed(Splitter(b"1"), chunks) == (lines, expected, acks)


def test_errors_among_acknowledgements_stay_whole() -> None:
    """An acknowledgement that is an error, or of a batch, comes as a message, between the others."""
    bad = b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 7"},"stream":"S","seq":0}'
    good = b'{"stream":"S", "seq":5}'
    stream = b"".join(b"MSG _I.a.%d 1 %d\r\n%b\r\n" % (n, len(b), b) for n, b in enumerate([good, bad, good]))
    lines, frames, acks = feed(Splitter(b"1"), [stream])
    assert not lines
    assert acks == [(b"0", b"5"), (b"2", b"5")]
    assert frames == [(b"1", (b"_I.a.1", b"", b"", bad))]


@pytest.mark.parametrize(
    "bad",
    [
        b"MSG a\r\n\r\n", b"MSG a 1 x\r\n", b"HMSG a 1 20 10\r\n" + b"x" * 12, b"MSG a 1 2\r\nabcd\r\n",
        b"MSG a 1 99999999999\r\n", b"MSG a 1 r more 2\r\nab\r\n", b"x" * (wire.LINE_BYTES_MAX + 1),
    ],
)  # fmt: skip
def test_what_is_not_the_protocol_is_refused(bad: bytes) -> None:
    """Garbled, and never a message."""
    with pytest.raises(Garbled):
        Splitter().feed(bad)


@given(st.one_of(st.just(""), LINE), HEADERS, st.binary(max_size=50), st.sampled_from([ID, QUIET_ID]))
def test_id_headers_and_data_come_back(id: str, headers: Headers, data: bytes, which: bytes) -> None:
    """Exactly, also with what the server adds in front and behind."""
    lines, spilled = message_lines(Message("s", data, id, headers), which)
    block = b"NATS/1.0\r\n%b\r\n" % lines if lines else b""
    assert read_header(block, data + spilled) == (id, headers, data)
    added = b"NATS/1.0\r\n%bNats-Batch-Id: x\r\nNats-Stream: S\r\nNats-Sequence: 1\r\n\r\n" % lines
    assert read_header(added, data + spilled) == (id, headers, data)


def test_headers_beyond_what_a_server_takes_follow_the_data() -> None:
    """JetStream refuses more than 64 KiB of headers; ours may be as long as the contract says."""
    headers = (("first", "1"), ("h", "x" * (HEADERS_BYTES_MAX - 7)))
    lines, spilled = message_lines(Message("s", b"data", "", headers), ID)
    assert len(lines) < LINES_BYTES_MAX
    assert b"first: 1\r\n" in lines
    assert read_header(b"NATS/1.0\r\n%b\r\n" % lines, b"data" + spilled) == ("", headers, b"data")


def test_plain_headers_are_plain_lines() -> None:
    """What any NATS client can read is written so that it can."""
    lines, _ = message_lines(Message("s", b"", "id-1", (("Content-Type", "x/y"), ("Mist-Reason", "late"))), ID)
    assert lines == b"Nats-Msg-Id: id-1\r\nContent-Type: x/y\r\nMist-Reason: late\r\n"


def test_headers_of_others_are_taken_as_they_are() -> None:
    """Nothing that a foreign client wrote makes a reader raise."""
    block = b"NATS/1.0\r\nA: b\r\nmist-headers: [1]\r\nMist-Headers: nonsense\r\nMist-Headers-Bytes: 999\r\nX\r\nA:  c \r\n\r\n"
    id, headers, data = read_header(block, b"body")
    assert (id, data) == ("", b"body")
    assert headers[0] == ("A", "b")
    assert ("A", "c") in headers
    assert read_header(b"NATS/1.0\r\nMist-Headers-Bytes: 2\r\n\r\n", b"body")[2] == b"body"
    assert read_header(b"NATS/1.0\r\nNats-Msg-Id: =not a token\r\n\r\n", b"")[0] == "=not a token"


def test_ack_subjects_of_both_forms() -> None:
    """The short one, and the one with domain, account and a random token."""
    short = wire.ack_subject(b"$JS.ACK.S.c.2.10.7.1795613647334509076.3")
    assert short == (b"$JS.ACK.S.c.", b"2.10.7.1795613647334509076.3", 2, 10, 7, 1795613647334509076, 3)
    long = wire.ack_subject(b"$JS.ACK.dom.hash.S.c.2.10.7.1795613647334509076.3.rnd")
    assert long == (b"$JS.ACK.dom.hash.S.c.", b"2.10.7.1795613647334509076.3.rnd", 2, 10, 7, 1795613647334509076, 3)
    assert wire.ack_subject(b"") is None
    assert wire.ack_subject(b"_INBOX.x") is None


@given(st.integers(0, 2**62))
def test_times_come_back(ns: int) -> None:
    """As the server writes them, which leaves out trailing zeros."""
    text = wire.rfc3339(ns)
    assert wire.time_ns(text.encode()) == ns
    short = text[:-1].rstrip("0").rstrip(".") + "Z"
    if short.count(":") == 2:
        assert wire.time_ns(short.encode()) == ns


def test_settling_builds_one_publish_each() -> None:
    """One frame per delivery, nothing for none."""
    assert wire.settle("$JS.ACK.S.c.", ["1.2", "1.3"], b"+ACK") == (
        b"PUB $JS.ACK.S.c.1.2 4\r\n+ACK\r\nPUB $JS.ACK.S.c.1.3 4\r\n+ACK\r\n"
    )
    assert wire.settle("p", [], b"+ACK") == b""


PREFIX = b"$JS.ACK.s.c."
TAILS = st.builds(
    lambda tried, sequence, number, at, left: b"%d.%d.%d.%d.%d" % (tried, sequence, number, at, left),
    st.sampled_from((1, 1, 1, 1, 2, 11)), st.integers(1, 9), st.integers(1, 9), st.integers(1, 2**62), st.integers(0, 9),
)  # fmt: skip
REPLIES = st.one_of(
    TAILS.map(PREFIX.__add__),
    TAILS.map(lambda t: PREFIX + t + b".Xy"),
    st.sampled_from((b"", b"$JS.ACK.s.d.1.1.1.1.1", PREFIX, PREFIX + b"1.1")),
)


@given(st.lists(REPLIES, max_size=6), st.integers(0, 4))
def test_a_run_of_deliveries_is_what_each_of_them_is(replies: list[bytes], newest: int) -> None:
    """By column or one by one: the same numbers; whatever is unusual is left to the look at each."""
    found = wire.deliveries(PREFIX, newest, [(b"x", reply, b"", b"") for reply in replies])
    parts = [wire.ack_subject(reply) for reply in replies]
    usual = bool(parts) and all(p is not None and p[0] == PREFIX and p[2] == 1 for p in parts)
    usual = usual and len({reply.count(b".") for reply in replies}) == 1  # one server writes one form
    numbers = [newest, *(p[4] for p in parts if p is not None)]
    grows = all(a < b for a, b in itertools.pairwise(numbers))
    if found is None:
        assert not (usual and grows)
        return
    assert usual
    assert grows
    sequences, times, tails, last = found
    assert [(p[3], p[5], p[1].decode()) for p in parts if p] == list(zip(sequences, times, tails, strict=True))
    assert last == numbers[-1]


HEADER = st.one_of(
    st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=9).map(
        lambda id: b"NATS/1.0\r\nNats-Msg-Id: " + id.encode() + b"\r\n\r\n"
    ),
    st.sampled_from(
        (
            b"", b"NATS/1.0\r\n\r\n", b"NATS/1.0\r\na: b\r\n\r\n", b"NATS/1.0 404 No\r\n\r\n",
            b"NATS/1.0\r\nNats-Msg-Id: a\r\nb: c\r\n\r\n", b"NATS/1.0\r\nNats-Msg-Id: \xff\r\n\r\n", b"\r\n\r\n",
            b"NATS/1.0\r\nNats-Msg-Id: =41\r\n\r\n",
            b"NATS/1.0\r\nNats-Msg-Id: a\r\nNats-Batch-Id: b\r\nNats-Batch-Sequence: 1\r\n\r\n",
            b"NATS/1.0\r\nNats-Msg-Id: a\r\nNats-Batch-Id: b\r\n\r\nb: c\r\n\r\n",
            2 * b"NATS/1.0\r\nNats-Msg-Id: a\r\n\r\n",
        )
    ),
)  # fmt: skip


@given(st.lists(HEADER, min_size=1, max_size=5))
def test_plain_headers_are_what_each_of_them_is(headers: list[bytes]) -> None:
    """Ids by column are the ids one by one, or it says that one of them has more to it."""
    found = plain_headers(headers)
    if found is not None:
        assert [(id, (), b"") for id in found] == [read_header(h, b"") for h in headers]


def test_a_header_of_our_name_that_is_no_text_is_somebody_elses() -> None:
    """Bytes that are not UTF-8 in the list of headers, in the header itself and spilled: taken as they stand, never an error."""
    for value in (b'[["a","\x8dw"]]', b"\xff", b"[[1]]"):
        assert read_header(b"NATS/1.0\r\nX: y\r\nMist-Headers: " + value + b"\r\n\r\n", b"d") == (
            "",
            (("X", "y"),),
            b"d",
        )
