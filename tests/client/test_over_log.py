"""Publisher, workers and a named reader together over the embedded log, every call failing now and then."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from conftest import run

import mist
from mist.broker.backoff import Backoff
from mist.broker.base import ConsumerConfig
from mist.broker.publisher import Publisher
from mist.client import Client, Delivered
from mist.client.client import to_message
from mist.errors import MistError
from mist.protocol.envelope import Envelope
from mist.testing.faults import Dice, FaultyBroker

QUICK = Backoff(first_s=0.0005, most_s=0.005)
RATES = {"append": 0.2, "fetch": 0.1, "ack": 0.2, "nak": 0.2, "read": 0.1, "save": 0.2, "info": 0.1, "load": 0.1}
COUNT = 300


def span(n: int) -> Envelope:
    return Envelope.new("trace.span", {"n": n}, source="test", id=f"span-{n}")


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_lost_or_doubled_under_faults(tmp_path: Path, seed: int) -> None:
    """Every envelope is stored once in order, handled at least once, and read by a reader that is restarted often."""

    async def case() -> None:
        async with FaultyBroker(await mist.connect(f"log:{tmp_path}"), Dice(seed, RATES)) as broker:
            stream = await broker.open("s")
            publisher = Publisher(stream, batch_records_max=20, backoff=QUICK)
            sequences = await asyncio.gather(*[publisher.publish(to_message(span(n))) for n in range(COUNT)])
            assert sequences == list(range(1, COUNT + 1))
            await publisher.drain()

            client = Client(broker)
            handled: dict[int, int] = {}
            stop = asyncio.Event()

            async def handle(item: Delivered) -> None:
                n = item.envelope.decode(dict)["n"]
                assert item.sequence == n + 1
                if n % 50 == 0 and item.attempt == 1:
                    raise ValueError("try again")
                handled[n] = handled.get(n, 0) + 1
                if len(handled) == COUNT:
                    stop.set()

            config = ConsumerConfig(attempts_max=0)
            workers = [
                await client.subscribe("s", "c", handle, config=config, concurrency=5, prefetch=5, backoff=QUICK)
                for _ in range(2)
            ]
            await asyncio.gather(*[w.run(stop) for w in workers])
            assert sorted(handled) == list(range(COUNT))
            info = await (await stream.consumer("c")).info()
            assert (info.floor, info.pending) == (COUNT, 0)

            read: list[int] = []
            while not read or read[-1] < COUNT:
                try:
                    async with client.replay("s", name="report", limit=7) as records:
                        async for r in records:
                            read.append(r.sequence)
                            if r.sequence % 13 == 0:
                                await records.save()
                except MistError as exc:
                    assert exc.retryable  # noqa: PT017 - the faults; the reader is opened again
            assert sorted(set(read)) == list(range(1, COUNT + 1))
            await client.aclose()

    run(case())
