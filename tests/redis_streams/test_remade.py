"""A stream that was deleted and made again within the minute wakes its waiters at once, as a new one does."""

from __future__ import annotations

import asyncio

import pytest

import mist
from mist.broker.base import Message
from mist.testing.servers import run_redis
from mist_redis import waiting
from tests.conftest import run


def test_a_remade_stream_wakes_its_waiters(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the deletion left in the key that waiters watch is not taken for news that a look has missed."""
    monkeypatch.setattr(waiting, "POLL_S", 60.0)

    async def go(url: str) -> None:
        async with mist.connect(url) as broker, mist.connect(url) as other:
            await broker.open("s")
            await broker.delete("s")
            stream = await broker.open("s")
            consumer = await stream.consumer("c")
            theirs = await other.open("s")
            for n in range(6):
                fetching = asyncio.create_task(consumer.fetch(wait_s=30))
                reading = asyncio.create_task(stream.read(after=n, wait_s=30))
                await asyncio.sleep(0.05)
                await theirs.append([Message("a", b"%d" % n)])
                async with asyncio.timeout(15):
                    (delivery,) = await fetching
                    assert delivery.record.sequence == n + 1
                    assert await consumer.ack([delivery]) == 1
                    assert [r.sequence for r in (await reading).records] == [n + 1]

    with run_redis() as server:
        run(go(server.url), 60)
