"""What a log does after a crash of a process or of the machine, and on files that are not as they should be."""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest
from campaigns.simbox import PATH, Box, Model, Tick, boot, seeded

from mist.broker.base import Message, StreamConfig
from mist.errors import DataLoss, MistError, NotFound, StorageFull, Unavailable
from mist.log.journal import Journal
from mist.testing.simfiles import Faults, PowerCut, Script, SimFiles

SMALL = StreamConfig(segment_bytes=8192)


def made(config: StreamConfig = SMALL) -> SimFiles:
    files = SimFiles("/log/streams")
    Box.create(files, config)
    return files


def fill(box: Box, blocks: int, size: int = 500) -> list[Message]:
    """One record per block."""
    messages = [Message("a.b", f"{i}:".encode().ljust(size, b"x"), f"id-{i}") for i in range(1, blocks + 1)]
    for m in messages:
        box.append([m])
    return messages


def nothing_else(files: SimFiles) -> SimFiles:
    """After a power cut that kept only what was synced."""
    return files.power_cut(Script())


def test_stream_made_by_a_dead_process_survives_a_power_cut() -> None:
    """Who makes a stream may die before its name is on the device; the next one syncs the name before it publishes."""
    files = SimFiles("/log/streams")
    files.cut_on("rename", ".new-s-", nth=2)
    with suppress(PowerCut):
        Box.create(files, SMALL)
    assert files.is_dir(PATH), "the crash is meant to come just behind the rename"
    files.kill()
    fill(Box(files, 1), 1)
    assert [r.id for r in Box(nothing_else(files), 2).all()] == ["id-1"]


def test_segment_made_by_a_dead_process_survives_a_power_cut() -> None:
    """The same for a segment: who goes on in one that was made but not published syncs its name first."""
    files = made()
    box = Box(files, 1)
    fill(box, 1, 3000)
    files.cut_on("rename", "00002.seg")
    with suppress(PowerCut):
        box.append([Message("a", b"y" * 3000, "new")])
    files.kill()
    second = Box(files, 1)
    assert second.append([Message("a", b"y" * 3000, "new")]) == [2]
    assert second.reader.tail().segment == 2
    assert [r.id for r in Box(nothing_else(files), 2).all()] == ["id-1", "new"]
