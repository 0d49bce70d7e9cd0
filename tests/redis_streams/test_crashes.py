"""A worker that dies between two steps leaves nothing behind that the next one does not finish."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import run

import mist
from mist.broker.base import ConsumerConfig, Message
from mist.errors import Unavailable
from mist.kit.local import RedisServer
from mist_redis import consumer as module


@pytest.mark.parametrize("how", ["nak", "abandoned"])
def test_between_the_dead_letter_and_its_settling(
    shared: RedisServer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The letter was not written, or written and not settled: after the ack wait it is done again, stored once."""
    name = f"crash-{secrets.token_hex(4)}"
    real = module.bury
    crashes = ["before", "after"]

    async def dying(broker: Any, letters: Sequence[Message], *, stream: str) -> None:
        step = crashes.pop(0) if crashes else ""
        if step != "before":
            await real(broker, letters, stream=stream)
        if step:
            raise Unavailable("the worker died here")

    monkeypatch.setattr(module, "bury", dying)

    async def body() -> None:
        async with mist.connect(shared.url) as broker:
            stream = await broker.open(name)
            await stream.append([Message("a", b"bad", "id-1"), Message("a", b"good")])
            consumer = await stream.consumer("c", ConsumerConfig(ack_wait_s=0.3, attempts_max=1))
            held = await consumer.fetch(limit=1)
            if how == "nak":
                with pytest.raises(Unavailable):
                    await consumer.nak(held)
            seen: list[bytes] = []
            async with asyncio.timeout(20):
                while (await consumer.info()).lag:
                    try:
                        got = await consumer.fetch(wait_s=0.1)
                    except Unavailable:
                        continue
                    seen += [d.record.data for d in got]
                    await consumer.ack(got)
            assert seen == [b"good"]
            assert not crashes
            dead = await broker.open(f"{name}--dead", create=False)
            assert [r.data for r in (await dead.read()).records] == [b"bad"]

    run(body())


def test_a_consumer_of_another_process_sees_the_same_leases(shared: RedisServer) -> None:
    """A delivery is settled by whoever holds its token, and only while that is the current one."""
    name = f"pass-{secrets.token_hex(4)}"

    async def body() -> None:
        async with mist.connect(shared.url) as one, mist.connect(shared.url) as two:
            stream = await one.open(name)
            await stream.append([Message("a", b"%d" % n) for n in range(40)])
            mine = await stream.consumer("c", ConsumerConfig(ack_wait_s=300.0))
            theirs = await (await two.open(name)).consumer("c")
            held = await mine.fetch(limit=20)
            assert await theirs.nak(held[:2]) == 2
            assert await mine.ack(held) == 18, "two of them were given back by somebody else"
            again = await theirs.fetch(limit=30)
            assert [d.attempt for d in again] == [2, 2] + [1] * 20 or [d.attempt for d in again] == [2, 2]
            assert await mine.ack(held[:2]) == 0
            assert await mine.ack(again[:2]) == 2

    run(body())
