"""Space of the disk: trimmed records give theirs back, and a full disk leaves room for everything but appends."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
from conftest import run

from mist.broker.base import Message, StreamConfig
from mist.broker.registry import connect

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
            assert (await stream.read(after=61)).records == []
            assert (await other.read(after=61)).records == []
            assert deleted_segments() == []

    run(main())
