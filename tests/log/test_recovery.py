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

SEGMENT = f"{PATH}/{1:020d}.seg"
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


def test_published_sequences_are_not_given_again_when_the_segment_lost_them() -> None:
    """A page of a former boot says what readers were shown; a segment that ends below it has lost records, and the
    next append goes on behind them."""
    files = made(StreamConfig())
    fill(Box(files, 1), 5)
    files.settle()
    whole = files.content(SEGMENT)
    files.put(SEGMENT, whole[: whole.index(b"4:xxx")])
    box = Box(files, 2)
    assert [r.id for r in box.all(after=0, skip=True)] == ["id-1", "id-2", "id-3"]
    with pytest.raises(DataLoss) as caught:
        box.all(after=3)
    assert (caught.value.first, caught.value.last, caught.value.resume_after) == (4, 5, 5)
    assert box.append([Message("a", b"", "next")]) == [6]
    assert any("records 4 to 5 are lost" in w for w in box.journal.warnings)
    assert [(d.first, d.last) for d in box.journal.verify().damage] == [(4, 5)]


@pytest.mark.parametrize("content", [b"", b"\0" * 300, b"\0" * 5000, b"garbage" * 1000])
def test_last_segment_of_which_nothing_can_be_read_is_set_aside(content: bytes) -> None:
    """Start-up never needs manual deletion: an empty, cut or overwritten last segment goes to the quarantine, the
    others are served, its sequences are not given again."""
    files = made()
    box = Box(files, 1)
    fill(box, 4, 3000)
    last = box.reader.tail().segment
    assert last == 4
    path = f"{PATH}/{last:020d}.seg"
    files.put(path, content)
    box = Box(files, 2)
    assert [r.id for r in box.all(after=0, skip=True)] == ["id-1", "id-2", "id-3"]
    assert box.append([Message("a", b"", "next")]) == [5]
    assert [(d.first, d.last) for d in box.journal.verify().damage] == [(4, 4)]
    assert any("/quarantine/" in p and files.content(p) == content for p in files.paths())
    assert any("cannot be read" in w for w in box.journal.warnings)
    assert [r.id for r in Box(files, 3).all(after=0, skip=True)] == ["id-1", "id-2", "id-3", "next"]


def test_segment_shorter_than_published_does_not_stop_the_writer() -> None:
    """Within one boot, after a writer died: what is missing is damage, appends go on behind it."""
    files = made(StreamConfig())
    box = Box(files, 1)
    fill(box, 3)
    files.put(SEGMENT, files.content(SEGMENT)[:5000])
    files.cut_on("pwrite", "/lock")
    with suppress(PowerCut):
        box.append([Message("a", b"", "torn")])
    box = Box(files.kill(), 1)
    assert box.append([Message("a", b"", "next")]) == [4]
    assert box.all(after=3)[0].id == "next"


def test_torn_tail_is_cut_even_when_the_disk_is_too_full_to_keep_it() -> None:
    """Reading must not need room: nobody was told that a torn block is stored."""
    files = made(StreamConfig())
    fill(Box(files, 1), 2)
    files.settle()
    end = files.content(SEGMENT).rstrip(b"\0")
    files.put(SEGMENT, end + b"torn block")
    number = 2
    box = Box(files, number, warm=False)
    files.faults = Faults(errno.ENOSPC, 1, forever=True)
    real = files.faults.check
    files.faults.check = lambda kind, path: "quarantine" in path and real(kind, path)  # type: ignore[method-assign]
    assert [r.id for r in box.all()] == ["id-1", "id-2"]
    assert files.content(SEGMENT) == end
