"""Fetches of many records, which go to the server in two halves."""

from __future__ import annotations

import asyncio
import secrets

from conftest import run

import mist
from mist.broker.base import Consumer, ConsumerConfig, Delivery, Message
from mist.kit.local import RedisServer


def test_order_bounds_and_sharing(shared: RedisServer) -> None:
    """In order, never above the limit or pending_max, each record to one of two workers, acked as a whole."""
    name = f"large-{secrets.token_hex(4)}"

    async def body() -> None:
        async with mist.connect(shared.url) as broker:
            stream = await broker.open(name)
            await stream.append([Message("a", b"%d" % n, f"i{n}") for n in range(5000)])
            config = ConsumerConfig(ack_wait_s=300.0)
            one, two = await stream.consumer("c", config), await stream.consumer("c", config)
            seen: list[int] = []

            async def work(consumer: Consumer, limit: int) -> None:
                while got := await consumer.fetch(limit=limit):
                    assert len(got) <= limit
                    sequences = [d.record.sequence for d in got]
                    assert sequences == sorted(sequences)
                    assert await consumer.ack(got) == len(got)
                    seen.extend(sequences)

            await asyncio.gather(work(one, 1000), work(two, 777))
            assert sorted(seen) == list(range(1, 5001))
            assert (await one.info()).lag == 0
            bounded = await stream.consumer("b", ConsumerConfig(ack_wait_s=300.0, pending_max=900))
            held: list[Delivery] = []
            while got := await bounded.fetch(limit=1500):
                held += got
            assert [d.record.sequence for d in held] == list(range(1, 901))
            assert await bounded.nak(held[::2]) == 450
            again = await bounded.fetch(limit=1500)
            assert [d.record.sequence for d in again] == [d.record.sequence for d in held[::2]]
            assert await bounded.ack([*held[1::2], *again]) == 900
            assert (await bounded.info()).floor == 900

    run(body(), 60)


def test_a_cancelled_large_fetch_gives_back_both_halves(shared: RedisServer) -> None:
    name = f"cancel-{secrets.token_hex(4)}"

    async def body() -> None:
        async with mist.connect(shared.url) as broker:
            stream = await broker.open(name)
            await stream.append([Message("a", b"%d" % n) for n in range(1000)])
            consumer = await stream.consumer("c", ConsumerConfig(ack_wait_s=300.0))
            for turns in range(8):
                fetching = asyncio.create_task(consumer.fetch(limit=1000))
                for _ in range(turns):
                    await asyncio.sleep(0)
                fetching.cancel()
                await asyncio.gather(fetching, return_exceptions=True)
            seen: dict[int, int] = {}
            async with asyncio.timeout(30):
                while len(seen) < 1000:
                    for d in await consumer.fetch(limit=1000, wait_s=0.2):
                        assert d.record.sequence not in seen
                        seen[d.record.sequence] = d.attempt
            assert set(seen.values()) == {1}, "nobody saw them before"

    run(body(), 60)
