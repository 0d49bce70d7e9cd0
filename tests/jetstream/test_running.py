"""A long replay is delivered, not asked for: the same pages, nothing passed over, nothing of what is gone, bounded."""

from __future__ import annotations

import asyncio
import secrets
from types import SimpleNamespace
from typing import Any, cast

import nats
import pytest

import mist
from mist.broker.base import ALL, Message, Page, Record
from mist.errors import SequenceExpired
from mist_nats.api import Api
from mist_nats.direct import Subjects
from mist_nats.link import Link
from mist_nats.running import BATCH, PAGES
from mist_nats.stream import NatsStream
from mist_nats.tail import BYTES, Tail
from tests.conftest import run
from tests.jetstream.server import shared_url

COUNT = 4000
LIMIT = 256


@pytest.fixture(autouse=True)
def _small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of several requests in a stream that is quickly made."""
    monkeypatch.setattr("mist_nats.stream.RUN_BATCH", 2 * LIMIT)


async def filled(broker: mist.Broker) -> NatsStream:
    stream = await broker.open(f"run-{secrets.token_hex(4)}")
    await stream.append([Message("a", b"%d" % n, str(n)) for n in range(1, COUNT + 1)])
    return cast(NatsStream, stream)


async def begun(stream: NatsStream) -> int:
    """Read until the run has begun; the position."""
    after = 0
    for _ in range(PAGES + 1):
        page = await stream.read(after=after, limit=LIMIT)
        assert [r.sequence for r in page.records] == list(range(after + 1, after + LIMIT + 1))
        after = page.scanned
    assert stream.shared.run._tail is not None
    return after


def test_a_long_replay_gives_every_record_and_sees_the_end() -> None:
    """Also what is appended while it stands at the end, in the read that follows the append."""

    async def go() -> None:
        async with mist.connect(shared_url()) as broker:
            stream = await filled(broker)
            after = await begun(stream)
            records: list[Record] = []
            while after < COUNT:
                page = await stream.read(after=after, limit=LIMIT)
                assert page.last == COUNT
                records += page.records
                after = page.scanned
            expected = [(n, b"%d" % n, str(n), "a") for n in range(LIMIT * (PAGES + 1) + 1, COUNT + 1)]
            assert [(r.sequence, r.data, r.id, r.subject) for r in records] == expected
            for n in range(COUNT + 1, COUNT + 4):
                await stream.append([Message("a", b"new")])
                page = await stream.read(after=n - 1)
                assert ([r.sequence for r in page.records], page.last) == ([n], n)
            assert await stream.consumers() == []
            await broker.delete(stream.name)

    run(go())


def test_what_was_written_behind_the_run_is_counted() -> None:
    """A record that was acknowledged before a read began, and that the server has not delivered yet: not the end."""

    async def go() -> None:
        async with mist.connect(shared_url()) as broker:
            stream = await filled(broker)
            after = await begun(stream)
            tail = stream.shared.run._tail
            assert tail is not None
            while after + LIMIT < COUNT:
                after = (await stream.read(after=after, limit=LIMIT)).scanned
            while tail.known < COUNT:  # it comes in pieces
                await tail.wait(COUNT - 1, float("inf"))
            assert tail._box is not None
            tail._box.handler = None
            await stream.append([Message("a", b"new")])
            page = await stream.read(after=after, limit=LIMIT)
            assert (page.scanned, page.last) == (COUNT, COUNT + 1)
            await broker.delete(stream.name)

    run(go())


@pytest.mark.parametrize("here", [True, False])
def test_a_trim_is_not_passed_over(here: bool) -> None:
    """By this connection the next read says so; by another one at the latest behind what was read ahead."""

    async def go() -> None:
        async with mist.connect(shared_url()) as broker, mist.connect(shared_url()) as other:
            stream = await filled(broker)
            after = await begun(stream)
            await (stream if here else await other.open(stream.name)).trim(before=COUNT)
            pages: list[Page] = []

            async def go_on() -> None:
                position = after
                while position < COUNT:
                    pages.append(await stream.read(after=position, limit=LIMIT))
                    position = pages[-1].scanned

            with pytest.raises(SequenceExpired) as told:
                await go_on()
            assert told.value.first == COUNT
            served = [r.sequence for page in pages for r in page.records]
            assert served == list(range(after + 1, after + 1 + len(served)))
            assert not (here and served)
            await broker.delete(stream.name)

    run(go())


def test_what_was_erased_is_not_read_ahead() -> None:
    async def go() -> None:
        async with mist.connect(shared_url()) as broker:
            stream = await filled(broker)
            after = await begun(stream)
            gone = after + 3
            assert await stream.erase([gone]) == 1
            page = await stream.read(after=after, limit=LIMIT)
            assert gone not in [r.sequence for r in page.records]
            assert len(page.records) == LIMIT
            await broker.delete(stream.name)

    run(go())


def test_a_reader_who_pauses_is_not_served_what_was_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with mist.connect(shared_url()) as broker:
            stream = await filled(broker)
            after = await begun(stream)
            monkeypatch.setattr("mist_nats.running.FRESH_S", -1.0)
            page = await stream.read(after=after, limit=LIMIT)
            assert page.scanned == after + LIMIT
            assert stream.shared.run._tail is None
            await broker.delete(stream.name)

    run(go())


def test_where_no_consumer_can_be_made_pages_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without the right to make one, a full account: the replay goes on, and does not try for every page."""
    tried: list[str] = []

    async def refused(self: Tail) -> None:
        tried.append(self.name)
        raise TimeoutError

    async def go() -> None:
        async with mist.connect(shared_url()) as broker:
            stream = await filled(broker)
            monkeypatch.setattr(Tail, "start", refused)
            after = 0
            pages: list[Page] = []
            while after < COUNT:
                pages.append(await stream.read(after=after, limit=LIMIT))
                after = pages[-1].scanned
            assert [r.sequence for p in pages for r in p.records] == list(range(1, COUNT + 1))
            assert len(tried) == 1
            await broker.delete(stream.name)

    run(go())


class _Sink:
    """What a tail needs of a link: it notes the requests."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.on_lost: list[Any] = []
        self.connected = self.closed = False
        self.box = SimpleNamespace(handler=None, subject=b"_INBOX.x")

    def inbox(self) -> Any:
        return self.box

    def send(self, data: bytes) -> None:
        self.sent.append(data)

    def drop(self, box: Any) -> None:
        pass


def test_a_tail_asks_for_no_more_than_it_may_hold() -> None:
    """Large records end a request early (409): however few they are, BYTES and a half is what waits to be read."""

    async def go() -> None:
        sink = _Sink()

        async def call(*_: Any, **__: Any) -> Any:
            return SimpleNamespace(num_pending=10**6)

        api = cast(Api, SimpleNamespace(link=cast(Link, sink), call=call, subject=str.encode))
        tail = Tail(api, "s", Subjects(""), ALL, 0, "t", batch=BATCH)
        await tail.start()
        data, n, held = b"x" * (BYTES // 8), 0, 0
        while len(sink.sent) > held and n < 100:
            held = len(sink.sent)
            for _ in range(8):
                n += 1
                sink.box.handler([(b"a", b"$JS.ACK.s.t.1.%d.%d.1.9" % (n, n), b"", data)])
            sink.box.handler([(b"a", b"", b"NATS/1.0 409 Batch Completed by MaxBytes\r\n\r\n", b"")])
        assert n * len(data) <= BYTES * 3 // 2
        taken = 0
        while taken < n:  # and it asks again when they were read
            records, _ = tail.take(taken, 1000, 2**40)
            taken += len(records)
        assert len(sink.sent) > held
        tail.die()

    asyncio.run(go())


def test_pages_of_a_stream_without_direct_gets_are_whole() -> None:
    """What others make seldom has direct gets: a page is not what one read of the socket brought of it."""
    url, name = shared_url(), f"theirs-{secrets.token_hex(4)}"

    async def main() -> None:
        theirs = await nats.connect(url.partition("?")[0])
        await theirs.jetstream().add_stream(name=name, subjects=[name])
        for _ in range(400):
            await theirs.publish(name, b"x" * 2000)
        await theirs.flush()
        async with mist.connect(url) as broker:
            stream = await broker.open(name, create=False)
            while (await stream.info()).last < 400:
                await asyncio.sleep(0.02)
            sizes = [len((await stream.read(after=after, limit=100)).records) for after in (0, 100, 200, 350)]
            assert sizes == [100, 100, 100, 50]
            await theirs.jetstream().delete_stream(name)
        await theirs.close()

    run(main())
