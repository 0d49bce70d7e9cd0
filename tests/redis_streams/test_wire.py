"""Replies find their callers, whoever stops waiting; a silent connection is given up; URLs say what they mean."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import run
from hypothesis import given
from hypothesis import strategies as st

from mist.errors import (
    Conflict,
    Internal,
    InvalidArgument,
    NotAuthorised,
    NotFound,
    StorageFull,
    Unavailable,
    Unsupported,
)  # fmt: skip
from mist.protocol.url import parse_url
from mist_redis.faults import translate
from mist_redis.names import Names
from mist_redis.resp import Lost, NotSent, ReplyError, Wire, pack
from mist_redis.url import parse


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.sent = b""
        self.ended = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def is_closing(self) -> bool:
        return self.ended

    def abort(self) -> None:
        self.ended = True


def wired() -> tuple[Wire, Transport]:
    wire, transport = Wire(), Transport()
    wire.connection_made(transport)  # type: ignore[arg-type]
    return wire, transport


@given(
    st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=1, max_size=8),
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
)
def test_every_caller_gets_its_own_replies(calls: list[tuple[int, bool]], cuts: list[int]) -> None:
    """However the bytes are cut, and whoever was cancelled meanwhile."""

    async def body() -> None:
        wire, _ = wired()
        futures = [wire.call(b"x", count, 60) for count, _ in calls]
        for future, (_, cancelled) in zip(futures, calls, strict=True):
            if cancelled:
                future.cancel()
        stream = b"".join(b":%d\r\n" % (10 * n + i) for n, (count, _) in enumerate(calls) for i in range(count))
        at = 0
        for size in (*cuts, len(stream)):
            wire.data_received(stream[at : at + size])
            at += size
        for n, (future, (count, cancelled)) in enumerate(zip(futures, calls, strict=True)):
            assert future.cancelled() == cancelled
            if not cancelled:
                assert await future == [10 * n + i for i in range(count)]
        wire.abort()

    run(body())


def test_a_lost_connection_says_whether_anything_was_sent() -> None:
    async def body() -> None:
        wire, _ = wired()
        waiting = wire.call(b"x", 1, 60)
        wire.connection_lost(None)
        with pytest.raises(Lost):
            await waiting
        with pytest.raises(NotSent):
            await wire.call(b"x", 1, 60)

    run(body())


def test_silence_ends_the_connection() -> None:
    """The call whose time is over first decides, wherever it stands."""

    async def body() -> None:
        wire, transport = wired()
        calls = [wire.call(b"x", 1, 60), wire.call(b"x", 1, 0.02)]
        wire._tick()
        ended = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)
        assert [type(e) for e in ended] == [Lost, Lost]
        assert transport.ended

    run(body())


@pytest.mark.parametrize("noise", [b"+unasked\r\n", b"nonsense\r\n", b"*99999999999999999999\r\n"])
def test_what_is_not_an_answer_ends_the_connection(noise: bytes) -> None:
    async def body() -> None:
        wire, transport = wired()
        wire.data_received(noise)
        assert transport.ended

    run(body())


def test_pack() -> None:
    assert pack([("PING",), ("GET", b"\xff")]) == b"*1\r\n$4\r\nPING\r\n*2\r\n$3\r\nGET\r\n$1\r\n\xff\r\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("OOM command not allowed", StorageFull), ("MISCONF Errors writing to the AOF file: No space left", StorageFull),
        ("MISCONF something", Unavailable), ("READONLY You can't write", Unavailable), ("LOADING dataset", Unavailable),
        ("MASTERDOWN Link", Unavailable), ("CLUSTERDOWN Hash slot not served", Unavailable), ("NOPERM no", NotAuthorised),
        ("WRONGPASS x", NotAuthorised), ("WRONGTYPE Operation", Conflict), ("NOGROUP No such key", NotFound),
        ("NOREPLICAS Not enough", Unavailable), ("ERR unknown command 'XADD'", Unsupported), ("ERR what", Internal),
    ],
)  # fmt: skip
def test_error_replies(text: str, error: type[Exception]) -> None:
    found = translate(ReplyError(text), "stream s: append")
    assert type(found) is error
    assert "stream s: append" in str(found) or error is Unsupported


@pytest.mark.parametrize(
    "url",
    [
        "redis:localhost", "redis://", "redis://h:0", "redis://h:99999", "redis://a,b/0", "redis://h/x", "redis://h/0/1",
        "redis+sentinel://h:26379", "redis+cluster://h/1", "redis://h?wait_replicas=-1", "redis://h?wait_replicas=x",
        "redis://h?wait_replicas=1.5", "redis://h?waitaof=maybe", "redis://h?timeout_s=0", "redis://h?prefix={x}",
        "redis://h?name=a b", "redis://h?password_file=/nowhere", "redis://h?unknown=1", "redis://h?tls=maybe",
    ],
)  # fmt: skip
def test_urls_that_cannot_be_right(url: str) -> None:
    with pytest.raises(InvalidArgument):
        parse(parse_url(url))


def test_urls() -> None:
    found = parse(parse_url("rediss://us%40er:p%2Fw@[::1]:7000/3?prefix=a:&tls_ca=/ca&wait_replicas=2&waitaof=yes"))
    assert (found.user, found.password, found.hosts, found.db) == ("us@er", "p/w", (("::1", 7000),), 3)
    assert (found.tls, found.tls_ca, found.prefix, found.wait_replicas, found.waitaof) == (True, "/ca", "a:", 2, True)
    found = parse(parse_url("redis+sentinel://a,b:26380/main/2?stream=s"))
    assert (found.kind, found.hosts, found.primary, found.db) == (
        "sentinel", (("a", 26379), ("b", 26380)), "main", 2,
    )  # fmt: skip


@given(st.text(max_size=60), st.sampled_from(("", "app:")))
def test_every_key_has_one_name_that_opens_it(key: str, prefix: str) -> None:
    names = Names(prefix)
    try:
        raw = (prefix + key).encode()
    except UnicodeEncodeError:
        return
    name = names.name(raw)
    if name is not None:
        assert prefix + key in names.candidates(name)
        stream, meta = names.keys(prefix + key)
        assert stream == prefix + key
        assert meta.endswith(":meta")


def test_state_shares_the_slot_of_its_stream() -> None:
    from redis.crc import key_slot

    names = Names("app:")
    keys: list[Any] = ["app:trace", "app:user:events", "app:{tag}rest"]
    for key in keys:
        for what in ("meta", "ids:0", "group:c", "wake", "checkpoints"):
            assert key_slot(names.beside(key, what).encode()) == key_slot(key.encode())
