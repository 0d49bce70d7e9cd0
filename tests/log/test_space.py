"""Space of the disk: trimmed records give theirs back, and a full disk leaves room for everything but appends."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import run

from mist.broker.base import Checkpoint, ConsumerConfig, Message, StreamConfig
from mist.broker.registry import connect
from mist.errors import StorageFull
from mist.log.files import Files
from mist.log.reserve import RESERVE, RESERVE_BYTES
from mist.log.state import State

CONFIG = StreamConfig(segment_bytes=64 * 1024)


def deleted_segments() -> list[str]:
    """Segments this process still holds open although they were removed: their space is not free."""
    out = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError as exc:
            if exc.errno != errno.ENOENT:  # the descriptor of the listing itself
                raise
            continue
        if target.endswith(".seg (deleted)"):
            out.append(target)
    return out


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_trimmed_segments_are_let_go_by_writers_readers_and_followers(tmp_path: Path) -> None:
    """A descriptor of a removed segment keeps its space from everybody: each handle closes it with its next call."""

    async def main() -> None:
        async with connect(f"log:{tmp_path}") as writer, connect(f"log:{tmp_path}") as follower:
            stream = await writer.open("s", config=CONFIG)
            for i in range(20):
                await stream.append([Message("a", bytes(20_000), f"{i}.{k}") for k in range(3)])
            other = await follower.open("s")
            for handle in (stream, other):
                after = 0
                while after < 60:
                    after = (await handle.read(after=after, limit=10)).scanned
            await stream.trim(before=60)
            assert deleted_segments()  # this is what the calls below have to end
            await stream.append([Message("a", b"x", "again")])
            assert (await other.read(after=61)).records == []
            assert deleted_segments() == []

    run(main())


class FullFiles(Files):
    """Takes no more space while `full`; what is allocated can be written."""

    full = False

    def allocate(self, fd: int, size: int) -> None:
        if self.full and size > os.fstat(fd).st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().allocate(fd, size)


class FullState:
    """The state file finds the disk full until the reserve has been given up."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused = 0
        reserve = directory / RESERVE
        for name in ("save", "settle", "take"):
            real = getattr(State, name)

            def call(state: State, *args: Any, real: Any = real, **kw: Any) -> Any:
                if reserve.exists():
                    self.refused += 1
                    raise StorageFull("state.db: database or disk is full")
                return real(state, *args, **kw)

            monkeypatch.setattr(State, name, call)


def test_a_full_disk_still_allows_acks_checkpoints_and_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Space is kept for what makes room: it is given up when a settling call meets a full disk, and the call repeated."""

    async def main() -> None:
        async with connect(f"log:{tmp_path}") as broker:
            stream = await broker.open("s")
            await stream.append([Message("a", b"x")] * 3)
            assert (tmp_path / RESERVE).stat().st_size == RESERVE_BYTES
            consumer = await stream.consumer("c", ConsumerConfig())
            full = FullState(tmp_path, monkeypatch)
            deliveries = await consumer.fetch(limit=3)
            assert len(deliveries) == 3
            assert full.refused == 1
            assert not (tmp_path / RESERVE).exists()
            assert await consumer.ack(deliveries) == 3
            mark = Checkpoint(stream="s", name="n", incarnation=stream.incarnation, sequence=3)
            assert (await broker.checkpoints.save(mark)).sequence == 3

    run(main())


def test_a_disk_that_stays_full_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the reserve does not help, the caller is told; nothing is repeated for ever."""

    def never(*_: Any, **__: Any) -> None:
        raise StorageFull("state.db: database or disk is full")

    async def main() -> None:
        async with connect(f"log:{tmp_path}") as broker:
            stream = await broker.open("s")
            monkeypatch.setattr(State, "save", never)
            mark = Checkpoint(stream="s", name="n", incarnation=stream.incarnation, sequence=0)
            with pytest.raises(StorageFull):
                await broker.checkpoints.save(mark)

    run(main())


def test_appends_make_the_reserve_again_before_they_take_space(tmp_path: Path) -> None:
    """With the reserve given up, an append that needs new space is refused until there is room for both."""

    async def main() -> None:
        files = FullFiles()
        async with connect(f"log:{tmp_path}", files=files) as broker:
            stream = await broker.open("s", config=StreamConfig(segment_bytes=8 * 1024 * 1024))
            big = [Message("a", bytes(700_000))]
            await stream.append(big)
            (tmp_path / RESERVE).unlink()
            files.full = True
            with pytest.raises(StorageFull):
                await stream.append(big)
            assert not (tmp_path / RESERVE).exists()
            files.full = False
            assert await stream.append(big) == [2]
            assert (tmp_path / RESERVE).stat().st_size == RESERVE_BYTES

    run(main())
