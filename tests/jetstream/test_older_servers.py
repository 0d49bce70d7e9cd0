"""The same promises without what newer servers have: no atomic batches, no batches of direct gets, no reset.

There is no older server here; ours is taken for one (`Link.version`), so that the ways round are exercised.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

import pytest

import mist
from mist.broker.base import Broker, ConsumerConfig, Message, StreamConfig
from mist.errors import StorageFull, Unsupported, WrongSequence
from mist_nats.link import Link
from tests.conftest import run
from tests.jetstream.server import shared_url


@pytest.fixture(params=[(2, 9), (2, 10), (2, 11)], ids=str)
def old(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    version: tuple[int, int] = request.param
    monkeypatch.setattr(Link, "version", property(lambda self: version))
    return version


def on(work: Callable[[Broker, str], Awaitable[None]]) -> None:
    async def go() -> None:
        name = f"old-{secrets.token_hex(4)}"
        async with mist.connect(shared_url()) as broker:
            await work(broker, name)
            await broker.delete(name)

    run(go(), 60)


@pytest.mark.usefixtures("old")
def test_streams_keep_who_they_are() -> None:
    """Incarnation and settings are kept with the stream, also where the server keeps no metadata."""

    async def work(broker: Broker, name: str) -> None:
        config = StreamConfig(records_max=10, full="refuse")
        stream = await broker.open(name, config=config)
        async with mist.connect(shared_url()) as other:
            again = await other.open(name, config=config)
            assert again.incarnation == stream.incarnation
        await stream.append([Message("a", b"")] * 10)
        with pytest.raises(StorageFull):
            await stream.append([Message("a", b"")])

    on(work)


@pytest.mark.usefixtures("old")
def test_reading_by_the_ordered_consumer() -> None:
    """Thousands of records, page by page, filtered or not, and the end waited for."""

    async def work(broker: Broker, name: str) -> None:
        stream = await broker.open(name)
        for start in range(0, 2500, 500):
            await stream.append([Message("b" if n % 100 == 7 else "a", b"%d" % n) for n in range(start, start + 500)])
        for subjects, want in (((">",), 2500), (("b",), 25), (("b", "c"), 25)):
            after, got = 0, 0
            while True:
                page = await stream.read(after=after, subjects=subjects, limit=300)
                got += len(page.records)
                after = page.scanned
                if after >= page.last:
                    break
            assert (got, after) == (want, 2500)
        waiting = asyncio.create_task(stream.read(after=2500, subjects=("b",), wait_s=20))
        await asyncio.sleep(0.1)
        await stream.append([Message("a", b"x"), Message("b", b"late")])
        assert [r.data for r in (await waiting).records] == [b"late"]

    on(work)


@pytest.mark.usefixtures("old")
def test_conditions_on_several_messages() -> None:
    """A chain of conditions: all or nothing against another writer, and a repeat of what is stored succeeds."""

    async def work(broker: Broker, name: str) -> None:
        stream = await broker.open(name)
        batch = [Message("a", b"%d" % n, f"i{n}") for n in range(5)]
        first = await stream.append(batch, expected_last=0)
        assert first == [1, 2, 3, 4, 5]
        assert await stream.append(batch, expected_last=0) == first
        with pytest.raises(WrongSequence) as wrong:
            await stream.append([*batch, Message("a", b"new", "i9")], expected_last=0)
        assert wrong.value.last == 5
        assert (await stream.info()).last == 5

    on(work)


def test_a_consumer_that_seeks_is_made_again(old: tuple[int, int]) -> None:
    """The same consumer to its handles, also to those of another connection that waits."""

    async def work(broker: Broker, name: str) -> None:
        stream = await broker.open(name)
        await stream.append([Message("a", b"%d" % n) for n in range(5)])
        if old < (2, 10):
            with pytest.raises(Unsupported):
                await stream.consumer("two", ConsumerConfig(subjects=("a", "b")))
        consumer = await stream.consumer("c", ConsumerConfig(after=5))
        async with mist.connect(shared_url()) as other:
            theirs = await (await other.open(name)).consumer("c")
            waiting = asyncio.create_task(theirs.fetch(wait_s=20))
            await asyncio.sleep(0.1)
            await consumer.seek(2)
            got = await waiting
            assert [d.record.sequence for d in got] == [3, 4, 5]
            assert await theirs.ack(got) == 3
        assert (await consumer.info()).lag == 0

    on(work)
