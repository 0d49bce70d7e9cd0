"""Pages of a log: the same records whatever the limits, in spite of trims, rolls and large records beside."""

from __future__ import annotations

import random

import pytest
from campaigns.simbox import PATH, Box, seeded

from mist.broker.base import RECORD_BYTES_MAX, Message, StreamConfig
from mist.errors import CursorAhead, SequenceExpired
from mist.log.reader import Reader
from mist.protocol.subject import matcher
from mist.testing.simfiles import Script, SimFiles


def made(config: StreamConfig) -> tuple[SimFiles, Box]:
    files = SimFiles("/log/streams")
    Box.create(files, config)
    return files, Box(files, 1)


def fill(box: Box, rng: random.Random, blocks: int) -> None:
    count = box.journal.tail.durable
    for _ in range(blocks):
        batch = []
        for _ in range(rng.randint(1, 9)):
            count += 1
            headers = (("n", str(count)),) if count % 5 == 0 else ()
            batch.append(
                Message(f"s.{count % 3}", b"d" * rng.choice((0, 3, 400)), f"id-{count}" if count % 2 else "", headers)
            )
        box.append(batch)


@pytest.mark.parametrize("subjects", [(">",), ("s.1",), ("none.*",)])
@pytest.mark.parametrize("index", [True, False])
def test_every_limit_gives_the_same_records(subjects: tuple[str, ...], index: bool) -> None:
    """Paging by any count and any number of bytes, from one reader or a new one each time, with and without the index,
    gives what one large page gives."""
    with seeded(4) as rng:
        files, box = made(StreamConfig(segment_bytes=16384))
        fill(box, rng, 60)
        if not index:
            for path in files.paths():
                if path.endswith(".idx"):
                    files.unlink(path)
        match = None if subjects == (">",) else matcher(subjects)
        whole = [r for r in box.all() if match is None or match(r.subject)]
        for limit in (1, 2, 3, 7, 64, 1000):
            for bytes_max in (1, 500, 1 << 20):
                reader, after, got = box.reader, 0, []
                while True:
                    if rng.random() < 0.2:
                        reader = Reader(box.journal)
                    page = reader.page(after=after, match=match, limit=limit, bytes_max=bytes_max)
                    assert len(page.records) <= limit
                    assert sum(len(r.data) for r in page.records) <= bytes_max or len(page.records) == 1
                    got += page.records
                    if page.scanned >= page.last:
                        break
                    assert page.scanned > after
                    after = page.scanned
                assert got == whole


def test_a_reader_beside_trims_and_rolls() -> None:
    """Its memory of places never gives what was trimmed, nor loses what is kept."""
    with seeded(9) as rng:
        _, box = made(StreamConfig(segment_bytes=8192))
        after = 0
        for _ in range(60):
            fill(box, rng, rng.randint(1, 4))
            tail = box.reader.tail()
            if rng.random() < 0.3:
                box.trim(rng.randint(tail.first, tail.durable + 1))
            tail = box.reader.tail()
            if after + 1 < tail.first:
                with pytest.raises(SequenceExpired):
                    box.reader.page(after=after, match=None, limit=5, bytes_max=1 << 20)
                after = tail.first - 1
            page = box.reader.page(after=after, match=None, limit=rng.randint(1, 30), bytes_max=1 << 20)
            assert [r.sequence for r in page.records] == list(range(after + 1, page.scanned + 1))
            after = page.scanned
            with pytest.raises(CursorAhead):
                box.reader.page(after=tail.durable + 1, match=None, limit=1, bytes_max=1)


def test_the_largest_records_in_the_smallest_segments() -> None:
    """A block larger than a segment has one of its own; a batch above the size of a block takes several, in order."""
    _, box = made(StreamConfig(segment_bytes=8192))
    big = [Message("a", bytes([i]) * RECORD_BYTES_MAX, f"big-{i}") for i in range(3)]
    assert box.append(big) == [1, 2, 3]
    assert box.append([Message("a", b"small")]) == [4]
    assert [len(r.data) for r in box.all()] == [RECORD_BYTES_MAX] * 3 + [5]
    page = box.reader.page(after=0, match=None, limit=10, bytes_max=8 << 20)
    assert len(page.records) == 1, "one record is given, whatever its size"
    assert box.journal.verify().damage == []
    assert box.journal.verify().records == 4


def test_more_records_than_a_block_holds() -> None:
    """65,535 in a block, the rest in the next; more than 256 subjects among them."""
    _, box = made(StreamConfig())
    messages = [Message(f"s.{i % 300}", b"", f"id-{i}") for i in range(70_000)]
    assert box.append(messages) == list(range(1, 70_001))
    records = box.all(limit=100_000)
    assert [r.subject for r in records] == [m.subject for m in messages]
    assert [r.id for r in records] == [m.id for m in messages]
    assert box.append(messages[-10:]) == list(range(69_991, 70_001)), "known ids"


@pytest.mark.parametrize("name", ["lock", "tail", f"{1:020d}.idx", "trim"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 10, b"\xff" * 5000], ids=["empty", "short", "noise"])
def test_every_small_file_may_hold_anything(name: str, content: bytes) -> None:
    """Lock words, page, index and mark are rebuilt or read around; nothing that is stored is lost."""
    with seeded(2) as rng:
        files, box = made(StreamConfig(segment_bytes=1 << 20))
        fill(box, rng, 200)
        whole = box.all()
        files.settle()
        for number in (1, 2):
            copy = files.power_cut(Script())
            copy.put(f"{PATH}/{name}", content)
            after = Box(copy, number)
            assert after.all() == whole
            assert after.append([Message("a", b"on")]) == [whole[-1].sequence + 1]
            assert Box(copy, 3).all()[:-1] == whole


def test_a_place_in_a_removed_segment_is_forgotten() -> None:
    """Where the ids of a window were read up to may lie at the end of a segment that was trimmed since; building the
    window again must not look there."""
    _, box = made(StreamConfig(segment_bytes=8192))
    box.append([Message("a", b"x" * 3000, "id-1")])
    box.committer._window.clear()
    box.append([Message("a", b"x" * 3000, "id-2")])  # reads the ids of segment 1 to its end
    assert box.reader.tail().segment == 2
    box.trim(2)
    box.committer._window.clear()  # as after a failed append
    assert box.append([Message("a", b"", "id-3"), Message("a", b"", "id-2")]) == [3, 2]


def test_a_list_made_before_the_removal_is_not_believed() -> None:
    """A reader that lists segments between a publication and the removal it announces does not go back to them.

    Found by C02: the id window asked for a time, and the append failed with "No such file".
    """
    files, box = made(StreamConfig(segment_bytes=8192))
    for i in range(12):
        box.append([Message("a", b"x" * 3000, f"id-{i}")])
    reader = box.reader
    tail = reader.tail()
    oldest = reader._segments.refresh()[0]
    box.trim(11)
    after = reader.tail()
    assert after.first_segment > oldest
    name = f"{PATH}/{oldest:020d}.seg"
    fd = files.open(name, create=True)  # the removal is late: the file is still there when the reader lists
    files.close(fd)
    reader._listed = (0, 0)
    reader._refresh(after)
    files.unlink(name)
    assert reader._segments.bases[0] == after.first_segment
    assert reader.locate(0) == after.first
    assert [r.sequence for r in reader.page(after=10, match=None, limit=10, bytes_max=1 << 20).records] == [11, 12]
    assert tail.durable == after.durable
