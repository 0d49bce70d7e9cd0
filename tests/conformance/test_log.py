"""The embedded log keeps every promise of the contract, on real files."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import mist
from mist.broker.base import Broker
from mist.log.files import Files
from mist.log.segments import Block, Segments
from mist.testing.conformance import BrokerConformance


class _FullDisk(Files):
    """A file system that takes `room` more bytes of segments, then says ENOSPC; None: no bound."""

    room: int | None = None

    def pwritev(self, fd: int, parts: Sequence[bytes], offset: int) -> int:
        if self.room is None:
            return super().pwritev(fd, parts, offset)
        data = b"".join(parts)[: self.room]
        if not data:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        return super().pwritev(fd, [data], offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().pwrite(fd, data, offset)


class TestLog(BrokerConformance):
    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.path = tmp_path / "log"
        self.url = f"log:{self.path}"
        self.files = _FullDisk()

    async def connect(self) -> Broker:
        return await mist.connect(self.url, files=self.files)

    @asynccontextmanager
    async def failing_append(self, broker: Broker, *, after: int) -> AsyncIterator[None]:  # type: ignore[override]
        self.files.room = 10 * after  # a block is written whole or not at all, whatever fits
        try:
            yield
        finally:
            self.files.room = None

    async def stored(self, broker: Broker, stream: str) -> bytes:
        files = sorted(p for p in (self.path / "streams" / stream).rglob("*") if p.is_file())
        return b"".join(p.read_bytes() for p in [*files, *self.path.glob("state.db*")])

    async def damage(self, broker: Broker, stream: str, first: int, last: int) -> tuple[int, int] | None:
        opened = await broker.open(stream, create=False)
        segments = Segments(Files(), str(self.path / "streams" / stream), opened.journal.segments.seed)  # type: ignore[attr-defined]
        hit: list[tuple[int, int]] = []
        low = high = 0
        for base in segments.refresh():
            for item in segments.walk(base, mark=(await opened.info()).last):
                assert isinstance(item, Block)
                if item.header.base <= last and item.header.last >= first:
                    hit.append((base, item.offset + item.header.size - 1))
                    low, high = low or item.header.base, item.header.last
        segments.close()
        for base, offset in hit:
            with (self.path / "streams" / stream / f"{base:020d}.seg").open("r+b") as f:
                f.seek(offset)
                byte = f.read(1)
                f.seek(offset)
                f.write(bytes([byte[0] ^ 0x40]))
        return low, high
