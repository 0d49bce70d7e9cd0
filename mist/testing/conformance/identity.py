"""What goes in comes back exactly: data, subjects, ids, headers. What cannot, is refused."""

from __future__ import annotations

import pytest

from mist.broker.base import HEADERS_BYTES_MAX, Headers, Message
from mist.errors import InvalidArgument, NotFound
from mist.protocol.subject import STREAM_CHARS_MAX, SUBJECT_CHARS_MAX
from mist.testing.conformance.harness import Env, Harness, case, messages, read_all

DATA = (
    b"",
    b"\x00",
    bytes(range(256)),
    b"\r\n\r\n",
    b"\xff\xfe not utf-8 \xc3\x28",
    "žluťoučký 🐎".encode(),
    b'{"a":1}\n{"b":2}\n',
    b"x" * 100_000,
)
SUBJECTS = (
    "a",
    "trace.span",
    "eval.result.=2Fpath=20x",
    "A.B-c_d",
    "$SYS.like/this",
    "ünï.код.数据",
    "#%&+=~@!,;:'\"()[]{}|\\^`?",
    ".".join("abcdefghij"),
    "x" * SUBJECT_CHARS_MAX,
)
IDS = (
    "1",
    "dead:0123:17:consumer",
    " leading and trailing ",
    "with\ttab",
    "ünï-код-数据-🐎",
    "0" * 256,
    "é" * 128,
    "$*.>/\\",
    "=", "'\";--",
)  # fmt: skip
HEADERS: tuple[Headers, ...] = (
    (("Content-Type", "application/json"),),
    (("a", "1"), ("A", "2"), ("a", "3")),
    (("empty", ""), ("space", " both ends "), ("tab", "\t")),
    (("unicode", "žluťoučký 🐎"), ("Nats-Msg-Id", "not the id"), ("b", "=?utf-8?q?x?=")),
    (("with space", "x"), ("ключ", "значение")),
    tuple((f"h{n}", "v" * n) for n in range(100)),
    (("big", "v" * 20_000),),
)
BAD_SUBJECTS = (
    "",
    ".",
    "a.",
    ".a",
    "a..b",
    "a b",
    "a\tb",
    "a\nb",
    "*",
    "a.*",
    ">",
    "a.>",
    "a\x00b",
    "x" * 256,
    "\ud800",
)
BAD_STREAMS = ("", "a.b", "a b", "-a", "a/b", "..", "a\n", "ü", "a*", "x" * (STREAM_CHARS_MAX + 1), "\x00", "\ud800")


class Identity(Harness):
    @case("append")
    async def test_data_comes_back_exactly(self, env: Env) -> None:
        """Empty, binary and large data: the same bytes."""
        stream = await env.stream()
        await stream.append([Message("d", d) for d in DATA])
        for d in DATA:
            await stream.append([Message("d", d)])
        records = await read_all(stream)
        assert [r.data for r in records] == [*DATA, *DATA]
        assert all(type(r.data) is bytes for r in records)

    @case("append")
    async def test_subjects_come_back_exactly(self, env: Env) -> None:
        """Unicode, punctuation, many tokens and the longest subject; each is found by a filter of its own text."""
        stream = await env.stream()
        await stream.append([Message(s, b"%d" % n) for n, s in enumerate(SUBJECTS)])
        assert [r.subject for r in await read_all(stream)] == list(SUBJECTS)
        for n, subject in enumerate(SUBJECTS):
            assert [r.data for r in await read_all(stream, subjects=(subject,))] == [b"%d" % n]

    @case("append")
    async def test_ids_come_back_exactly(self, env: Env) -> None:
        """Unicode, blanks, and the longest id."""
        stream = await env.stream()
        await stream.append([Message("i", b"", i) for i in IDS])
        await stream.append([Message("i", b"")])
        assert [r.id for r in await read_all(stream)] == [*IDS, ""]

    @case("append", "dedupe")
    async def test_odd_ids_are_different_ids(self, env: Env) -> None:
        """No two ids fall together, and each is recognised when it comes again."""
        stream = await env.stream()
        ids = [*IDS, "leading and trailing", "with tab", "1 ", "ÜNÏ-код-数据-🐎"]
        first = await stream.append([Message("i", b"", i) for i in ids])
        assert len(set(first)) == len(ids)
        for n, i in enumerate(ids):
            assert await stream.append([Message("i", b"again", i)]) == [first[n]]

    @case("append")
    async def test_headers_come_back_exactly(self, env: Env) -> None:
        """Order, repeated names, case, blanks at the ends, empty and long values, unicode."""
        stream = await env.stream()
        await stream.append([Message("h", b"%d" % n, "", h) for n, h in enumerate(HEADERS)])
        await stream.append([Message("h", b"", "an id", HEADERS[1]), Message("h", b"none")])
        records = await read_all(stream)
        assert [r.headers for r in records] == [*HEADERS, HEADERS[1], ()]

    @case("append", "consumers")
    async def test_deliveries_carry_everything(self, env: Env) -> None:
        """A delivery holds the same record that a read gives."""
        stream = await env.stream()
        await stream.append(
            [Message(SUBJECTS[n], DATA[n], IDS[n], HEADERS[n]) for n in range(min(len(HEADERS), len(DATA)))]
        )
        consumer = await stream.consumer("c")
        deliveries = await consumer.fetch(limit=100, wait_s=env.patience_s)
        assert [d.record for d in deliveries] == (await read_all(stream))[: len(deliveries)]
        assert deliveries
        await consumer.ack(deliveries)

    @case("append", "persistent")
    async def test_everything_comes_back_after_reopening(self, env: Env) -> None:
        """The same after a restart."""
        stream = await env.stream()
        await stream.append([Message("d", d) for d in DATA])
        await stream.append([Message(s, b"") for s in SUBJECTS])
        await stream.append([Message("i", b"", i) for i in IDS])
        await stream.append([Message("h", b"", "", h) for h in HEADERS])
        before = await read_all(stream)
        await env.restart()
        assert await read_all(await env.stream()) == before

    @case("append")
    async def test_bad_headers_are_refused(self, env: Env) -> None:
        """CR, LF, NUL, an empty name, a colon in the name, a lone surrogate, more than the limit."""
        stream = await env.stream()
        for name, value in (
            ("a\r", ""), ("a\n", ""), ("a", "x\r\ny: z"), ("a", "\n"), ("a", "\r"), ("a", "\x00"), ("", "x"),
            ("a:b", "x"), ("a\x00", ""), ("a", "\ud800"), ("\udfff", "x"), ("a", "x" * HEADERS_BYTES_MAX),
        ):  # fmt: skip
            with pytest.raises(InvalidArgument):
                await stream.append([Message("h", b""), Message("h", b"", "", ((name, value),))])
        assert (await stream.info()).records == 0

    @case("append")
    async def test_bad_ids_are_refused(self, env: Env) -> None:
        """Too long in bytes, CR, LF, NUL, a lone surrogate."""
        stream = await env.stream()
        for bad in ("x" * 257, "é" * 129, "a\nb", "a\r", "\x00", "ok\ud800", "\ud800"):
            with pytest.raises(InvalidArgument):
                await stream.append([Message("a", b"", "fine"), Message("a", b"", bad)])
        assert (await stream.info()).records == 0

    @case("append")
    async def test_bad_subjects_are_refused(self, env: Env) -> None:
        """Empty tokens, wildcards, white space, controls, too long, lone surrogates."""
        stream = await env.stream()
        for bad in BAD_SUBJECTS:
            with pytest.raises(InvalidArgument):
                await stream.append([Message(bad, b"")])
        assert (await stream.info()).records == 0

    @case()
    async def test_bad_stream_names_are_refused(self, env: Env) -> None:
        """What cannot name a stream is refused by open, with and without create, and makes nothing."""
        before = await env.broker.streams()
        for bad in BAD_STREAMS:
            for create in (True, False):
                with pytest.raises(InvalidArgument):
                    await env.broker.open(bad, create=create)
            if env.broker.capabilities.delete:
                with pytest.raises((InvalidArgument, NotFound)):
                    await env.broker.delete(bad)
        after = await env.broker.streams()
        assert not set(BAD_STREAMS) & set(after)
        assert len(set(after) & set(before)) == len(before)

    @case("append")
    async def test_stream_names_that_look_alike_are_different(self, env: Env) -> None:
        """Names differing in case, separator or a suffix are different streams; the longest name works."""
        suffixes = ("a", "A", "a_", "a-b", "a--b", "a_b", "ab", "a=2E", "0")
        for n, suffix in enumerate(suffixes):
            await (await env.stream(suffix)).append(messages(1, start=n))
        for n, suffix in enumerate(suffixes):
            assert [r.data for r in await read_all(await env.stream(suffix))] == [b"%d" % n]
        assert {env.name(s) for s in suffixes} <= set(await env.broker.streams())
        room = STREAM_CHARS_MAX - len(env.name("x")) + 1
        long = await env.stream("x" * room)
        assert len(long.name) == STREAM_CHARS_MAX
        await long.append(messages(1))
        assert len(await read_all(long)) == 1
