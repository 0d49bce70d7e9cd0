"""Every transport of ours through the one suite."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from mist.broker.base import Message
from mist.kit.breaker import Breaker
from mist.testing.transports import TransportConformance
from mist.transport import Transport, dial, pair
from mist.transport.http import HttpTransport
from mist.transport.middleware import Breaking, Counting, Retrying
from mist.transport.stream import StreamTransport


def append(path: str, data: bytes) -> None:
    with open(path, "ab") as f:
        f.write(data)


Ends = AsyncIterator[tuple[Transport, Transport]]


class TestChan(TransportConformance):
    bounded = 256
    receives_bad = False
    verbatim_line_breaks = True

    @asynccontextmanager
    async def connect(self, tmp_path: Path) -> Ends:
        async with dial(f"chan:{tmp_path.name}") as sender, dial(f"chan:{tmp_path.name}") as receiver:
            yield sender, receiver


class TestChanOfOne(TestChan):
    bounded = 1

    @asynccontextmanager
    async def connect(self, tmp_path: Path) -> Ends:
        sender, receiver = pair(1)
        async with sender, receiver:
            yield sender, receiver


class TestWrapped(TestChan):
    """Middleware changes nothing of what the inner transport promises (tracing changes traceparents: elsewhere)."""

    @asynccontextmanager
    async def connect(self, tmp_path: Path) -> Ends:
        a, b = pair()
        async with (
            Counting(Retrying(Breaking(a, Breaker("chan")))) as sender,
            Counting(Retrying(b)) as receiver,
        ):
            yield sender, receiver


class TestFile(TransportConformance):
    waits = False

    @asynccontextmanager
    async def connect(self, tmp_path: Path) -> Ends:
        async with dial(f"file:{tmp_path}/t.jsonl?sync=none") as sender, dial(f"file:{tmp_path}/t.jsonl") as receiver:
            yield sender, receiver

    async def inject(self, sender: Transport, receiver: Transport, data: bytes) -> None:
        append(receiver.path, data + b"\n")  # type: ignore[attr-defined]


class TestFileFollowed(TestFile):
    waits = True
    ends = False

    @asynccontextmanager
    async def connect(self, tmp_path: Path) -> Ends:
        url = f"file:{tmp_path}/t.jsonl"
        async with dial(url) as sender, dial(f"{url}?follow=1") as receiver:
            yield sender, receiver


class TestStdio(TransportConformance):
    bounded = 200  # a pipe holds 64 KiB

    @asynccontextmanager
    async def connect(self, tmp_path: Path) -> Ends:
        r, w = os.pipe()
        self.writer = w
        sender, receiver = await dial("stdio:", stdout=w, stdin=-1), await dial("stdio:", stdin=r)

        async def close_sender() -> None:
            nonlocal w
            await close()
            if w >= 0:
                os.close(w)  # what ends the input is the last writer going away
                w = -1

        close, sender.close = sender.close, close_sender  # type: ignore[method-assign]
        try:
            async with sender, receiver:
                yield sender, receiver
        finally:
            os.close(r)

    async def inject(self, sender: Transport, receiver: Transport, data: bytes) -> None:
        os.write(self.writer, data + b"\n")


class TestHttp(TransportConformance):
    ends = False
    receives_bad = False
    verbatim_line_breaks = False

    @asynccontextmanager
    async def connect(self, tmp_path: Path) -> Ends:
        async with dial("http:?listen=127.0.0.1:0", inbox_size=4000) as receiver:
            assert isinstance(receiver, HttpTransport)
            async with dial(receiver.listening) as sender:
                yield sender, receiver


class TestStream(TransportConformance):
    ends = False
    verbatim_line_breaks = True
    query = ""

    @asynccontextmanager
    async def connect(self, tmp_path: Path) -> Ends:
        url = f"memory:{tmp_path.name}?stream=s"
        async with dial(url) as sender, dial(url + self.query) as receiver:
            yield sender, receiver

    async def inject(self, sender: Transport, receiver: Transport, data: bytes) -> None:
        assert isinstance(sender, StreamTransport)
        await sender._stream.append([Message("foreign", data)])


class TestStreamToItsEnd(TestStream):
    waits = False
    ends = True
    query = "&follow=0"


class TestConsumer(TestStream):
    query = "&consumer=worker"


class TestConsumerToItsEnd(TestStreamToItsEnd):
    query = "&consumer=worker&follow=0"


class TestLog(TestStream):
    @asynccontextmanager
    async def connect(self, tmp_path: Path) -> Ends:
        url = f"log:{tmp_path}/data?stream=s"
        async with dial(url) as sender, dial(url + self.query) as receiver:
            yield sender, receiver


class TestLogConsumer(TestLog):
    query = "&consumer=worker"
