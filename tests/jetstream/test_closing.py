"""Closing while the server is away."""

from __future__ import annotations

import asyncio

import mist
from mist.broker.base import Message
from mist.kit.local import NatsServer
from mist.testing.servers import run_nats
from tests.conftest import run


def test_a_broker_closes_while_it_tries_to_reconnect() -> None:
    """The connection is gone and every try for a new one fails: closing waits for neither."""

    async def go(server: NatsServer) -> None:
        for wait_s in (0.0, 0.05, 0.3, 1.0):
            broker = await mist.connect(server.url)
            await (await broker.open("s")).append([Message("a", b"")])
            server.kill()
            await asyncio.sleep(wait_s)
            async with asyncio.timeout(20):
                await broker.aclose()
            await asyncio.to_thread(server.start)

    with run_nats(own_process=True) as server:
        assert isinstance(server, NatsServer)
        run(go(server), timeout_s=100)
