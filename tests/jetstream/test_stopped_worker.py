"""A worker that stood still for longer than the ack wait finds deliveries in its socket that are another's by now."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time

import mist
from mist.broker.base import ConsumerConfig, Message
from tests.conftest import run
from tests.jetstream.server import shared_url

CONFIG = ConsumerConfig(ack_wait_s=0.4)
COUNT = 300
SIZE = 4000
"""Together more than one read of the socket takes."""


def test_what_another_worker_has_acked_is_not_handed_out() -> None:
    """The loop is blocked, as by SIGSTOP, while its request is answered; another worker gets the records and acks them."""
    url, name = shared_url(), f"stopped-{secrets.token_hex(4)}"
    acked: set[int] = set()

    async def other() -> None:
        async with mist.connect(url) as broker:
            stream = await broker.open(name)
            consumer = await stream.consumer("c", CONFIG)
            await stream.append([Message("a", b"x" * SIZE, str(i)) for i in range(COUNT)])
            await asyncio.sleep(CONFIG.ack_wait_s)
            while len(acked) < COUNT:
                got = await consumer.fetch(limit=COUNT, wait_s=1)
                assert await consumer.ack(got) == len(got)
                acked.update(d.record.sequence for d in got)

    async def main() -> None:
        async with mist.connect(url) as broker:
            consumer = await (await broker.open(name)).consumer("c", CONFIG)
            waiting = asyncio.create_task(consumer.fetch(limit=COUNT, wait_s=1))
            await asyncio.sleep(0.05)  # its request is at the server
            worker = threading.Thread(target=lambda: asyncio.run(other()))
            worker.start()
            while len(acked) < COUNT and worker.is_alive():
                time.sleep(0.01)  # noqa: ASYNC251 - that is the point
            worker.join()
            assert len(acked) == COUNT
            stale = await waiting
            assert await consumer.ack(stale) == 0
            assert [d.record.sequence for d in stale] == []
            assert await consumer.fetch(wait_s=0.1) == []
            assert (await consumer.info()).lag == 0

    run(main())
