"""Appends that are refused, or known, on a stream of three replicas: the ways round a refusal must not harm the stream.

nats-server 2.14 and 2.15 stop a replicated stream for good when a condition fails where the replicas apply it (found by
campaign C09c); the stream must take appends after each of these.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import mist
from mist.broker.base import Message, StreamConfig
from mist.errors import StorageFull, WrongSequence
from mist.testing.servers import NatsServer, run_nats_cluster
from tests.conftest import run


def m(id: str) -> Message:
    return Message("a", id.encode(), id)


async def refused_and_known(url: str) -> None:
    async with mist.connect(url) as broker:
        stream = await broker.open("s")
        assert await stream.append([m("a"), m("b")], expected_last=0) == [1, 2]
        assert await stream.append([m("a"), m("b")], expected_last=0) == [1, 2], "a repeat of a stored one"
        with pytest.raises(WrongSequence):
            await stream.append([m("c")], expected_last=1)
        with pytest.raises(WrongSequence):
            await stream.append([m("c"), m("d")], expected_last=1)
        assert await stream.append([m("b"), m("c")]) == [2, 3], "a known one and a new one"
        assert await stream.append([m("c"), m("d"), m("e")]) == [3, 4, 5]
        assert await stream.append([m("f")], expected_last=5) == [6]
        assert await stream.append([m("f")], expected_last=5) == [6]

        small = await broker.open("small", config=StreamConfig(records_max=3, full="refuse"))
        assert await small.append([m("a"), m("b")]) == [1, 2]
        with pytest.raises(StorageFull):
            await small.append([m("c"), m("d")])
        assert await small.append([m("a"), m("b")]) == [1, 2], "known ones need no room"
        assert await small.append([m("c")]) == [3]


def test_refused_and_known_appends() -> None:
    async def go(servers: list[NatsServer]) -> None:
        await refused_and_known(f"{servers[0].url}&replicas=3")
        for server in servers:
            log = (Path(server.directory) / "server.log").read_text()
            assert "critical" not in log

    with run_nats_cluster() as servers:
        run(go(servers), 60)
