"""Erasing from the log while others have its files open, by processes that die, and beside damage."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from campaigns.simbox import PATH, Box, Model
from conftest import run

import mist
from mist.broker.base import Message, StreamConfig
from mist.errors import Ambiguous, DataLoss, StorageFull, Unavailable, VersionUnsupported
from mist.log import format as log_format
from mist.log.erasing import ERASING
from mist.log.format import decode_segment_header
from mist.testing.simfiles import Faults, PowerCut, SimFiles

SMALL = StreamConfig(segment_bytes=8192)
GONE = [2, 3, 9, 14]


def two() -> tuple[SimFiles, Model, Box, Box]:
    """Two processes with one log of several segments open, both having read all of it."""
    files = SimFiles("/log/streams")
    Box.create(files, SMALL)
    one, other = Box(files, 1), Box(files, 1)
    model = Model()
    for size in (300, 1500, 300, 1500, 40):
        assert model.append(one, model.messages(3, size)) is None
    for box in (one, other):
        assert len(box.all()) == 15
    return files, model, one, other


def die(files: SimFiles, box: Box) -> None:
    """What the kernel does for a process that was killed: its lock is free."""
    files.never_cut()
    files.dead = False
    files.close(box.journal._lock_fd)


def sequences(box: Box) -> list[int]:
    return [r.sequence for r in box.all()]


def left(*gone: int) -> list[int]:
    return [s for s in range(1, 16) if s not in gone]


def test_an_open_reader_and_an_open_writer_see_the_gap() -> None:
    """Without opening anything anew: what another process has in memory and in open files is let go."""
    files, model, one, other = two()
    page = other.reader.page(after=7, match=None, limit=1, bytes_max=1 << 20)  # the rest of the block is remembered
    assert model.erase(one, GONE) is None
    assert [r.sequence for r in other.reader.page(after=page.scanned, match=None, limit=2, bytes_max=1 << 20).records] == [
        10, 11,
    ]  # fmt: skip
    for box in (other, one):
        assert sequences(box) == left(*GONE)
    model.nowhere(files)
    assert other.append([Message("a", b"again", "id-9")]) == [16]  # the id is free at once, here too
    assert other.append([Message("a", b"", "id-10")]) == [10]
    assert other.journal.verify().damage == []
    assert other.journal.verify().records == 12


def test_ids_of_trimmed_records_stay_known_beside_erased_ones() -> None:
    """A writer forgets the ids that were erased, and nothing else: what it knew of trimmed records is not on disk."""
    _, model, one, other = two()
    assert other.append([Message("a", b"", "id-1")]) == [1]
    one.trim(8)
    assert model.erase(one, [9]) is None
    assert other.append([Message("a", b"", "id-1")]) == [1]
    assert other.append([Message("a", b"", "id-10")]) == [10]
    assert other.append([Message("a", b"again", "id-9")]) == [16]
    assert model.erase(one, [12]) is None
    assert other.append([Message("a", b"", f"id-{n}") for n in (9, 2, 12)]) == [16, 2, 17]


def test_whoever_dies_while_erasing_the_others_go_on() -> None:
    """At every operation of an erasure: a reader beside it sees the record or the gap and nothing else; the next writer
    recovers; erasing again finishes, and then every byte is gone."""
    deaths = 0
    for k in range(1, 200):
        files, model, one, other = two()
        files.cut_after(k)
        try:
            model.erase(one, GONE)
        except PowerCut:
            deaths += 1
        else:
            break
        die(files, one)
        missing = set(range(1, 16)) - set(sequences(other))
        assert missing <= set(GONE)
        model.look(other.all())
        assert model.append(other, model.messages(1, 100)) is None
        assert not [p for p in files.paths() if p.endswith(ERASING)]
        missing = set(range(1, 16)) - set(sequences(other))
        tail = other.reader.tail()
        assert list(other.reader.erased(tail)) == sorted(missing), f"died at operation {k}"
        assert model.erase(other, GONE) is None
        assert sequences(other) == [*left(*GONE), 16]
        model.nowhere(files)
        assert other.journal.verify().damage == []
    assert deaths > 20, "the erasure has more operations than this"


def test_a_reader_beside_a_death_behind_the_rename_learns_of_it() -> None:
    """The page was not published, so the open reader still has the old file; the recovery tells it, whatever it does."""
    files, model, one, other = two()
    files.cut_on("rename", ".seg")
    with pytest.raises(PowerCut):
        model.erase(one, [2])
    die(files, one)
    assert sequences(other) == left()
    third = Box(files, 1)
    assert third.erase([2]) == 0  # nothing is left to do but to make it durable
    assert sequences(other) == left(2)
    model.erased.add(2)
    model.nowhere(files)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_an_erasure_that_fails_can_be_repeated(error: int) -> None:
    """Whichever operation fails: the error is ours, nothing else is lost, and repeating it finishes."""
    for k in range(1, 300):
        files, model, one, other = two()
        files.faults = faults = Faults(error, k)
        failed = model.erase(one, GONE)
        files.faults = None
        if not faults.hits:
            break
        assert failed is None or isinstance(failed, Ambiguous | StorageFull | Unavailable)
        assert set(range(1, 16)) - set(sequences(other)) <= set(GONE)
        assert model.erase(one, GONE) is None
        assert sequences(other) == sequences(one) == left(*GONE)
        model.nowhere(files)
        assert one.journal.verify().damage == []


def test_the_segment_that_is_written_is_sealed_first() -> None:
    """Its published end and chain stay true; erasing from sealed ones makes no new segment."""
    _, model, one, _ = two()
    before = one.journal.tail
    assert model.erase(one, [1]) is None
    assert one.journal.tail.segment == before.segment
    assert model.erase(one, [15]) is None
    assert (one.journal.tail.segment, one.journal.tail.chain) == (16, before.chain)
    assert one.append([Message("a", b"x")]) == [16]
    assert sequences(one) == [*left(1, 15), 16]


def test_trimmed_bytes_that_are_still_there_go_too() -> None:
    """A trim leaves them until their segment goes. They do not count."""
    files, model, one, _ = two()
    one.trim(3)
    assert one.erase([1, 2, 3]) == 1
    model.erase_asked = model.erased = {1, 2, 3}
    model.nowhere(files)


def test_an_older_build_refuses_the_stream() -> None:
    """It says so at opening; one that has it open reports damage where records were erased, and hands out nothing else."""
    files, model, one, other = two()
    assert decode_segment_header(files.content(f"{PATH}/stream")).version == 1
    assert model.erase(one, [2]) is None
    assert decode_segment_header(files.content(f"{PATH}/stream")).version == 2
    assert decode_segment_header(files.content(f"{PATH}/{1:020d}.seg")).version == 2
    with mock.patch.object(log_format, "VERSION_ERASED", 1), mock.patch.object(log_format, "_ERASED", 0):
        with pytest.raises(VersionUnsupported):
            Box(files, 1)
        with pytest.raises(DataLoss) as loss:
            other.all()
        assert (loss.value.first, loss.value.last) == (1, 3)
        model.look(other.all(skip=True))
        other.append([Message("a", b"x")])
    assert sequences(one) == [*left(2), 16]


def test_damage_is_copied_and_named(tmp_path: Path) -> None:
    """Records inside damage cannot be erased: the others are, then DataLoss says which are not. The damage stays where it
    was, no larger."""

    async def go() -> None:
        async with mist.connect(f"log:{tmp_path}") as broker:
            stream = await broker.open("s", config=StreamConfig(segment_bytes=1 << 20))
            for n in range(4):
                await stream.append([Message("a", b"%d" % (10 * n + i) * 50) for i in range(5)])
        path = tmp_path / "streams" / "s" / f"{1:020d}.seg"
        content = bytearray(path.read_bytes())
        at = content.index(b"12" * 50)
        content[at] ^= 1
        path.write_bytes(content)
        async with mist.connect(f"log:{tmp_path}") as broker:
            stream = await broker.open("s")
            for _ in range(2):
                with pytest.raises(DataLoss) as loss:
                    await stream.erase([3, 7, 8, 16])
                assert (loss.value.first, loss.value.last) == (6, 10)
            assert [(d.first, d.last) for d in (await stream.verify()).damage] == [(6, 10)]
            assert [r.sequence for r in (await stream.read()).records] == [1, 2, 4, 5]
            assert [r.sequence for r in (await stream.read(after=10)).records] == [11, 12, 13, 14, 15, 17, 18, 19, 20]
        assert (b"02" * 50) not in path.read_bytes()

    run(go())


def test_the_index_fits_the_new_file(tmp_path: Path) -> None:
    """Positions are found by it, and it leads to the same records as a scan."""

    async def go() -> None:
        async with mist.connect(f"log:{tmp_path}") as broker:
            stream = await broker.open("s")
            for n in range(300):
                await stream.append([Message("a", b"%d" % i * 1000) for i in range(n % 3 + 1)])
            await stream.erase([*range(100, 220), 3, 500])
            await stream.append([Message("a", b"x")])
            opened: Any = stream
            segments = opened._reader._segments
            entries = segments.index(1, fresh=True)
            assert len(entries) >= 5
            for sequence, time_ns, offset in entries:
                block = segments.block(1, offset)
                assert (block.header.base, block.header.time_ns) == (sequence, time_ns)
            everything = (await stream.read(limit=10_000, bytes_max=1 << 30)).records
            for sequence in (1, 2, 4, 99, 150, 220, 221, 400, 599, 600):
                page = await stream.read(after=sequence, limit=1)
                assert page.records == [r for r in everything if r.sequence > sequence][:1]

    run(go())
