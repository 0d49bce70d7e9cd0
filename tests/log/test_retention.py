"""What a stream lets go, and that damage, rolls and crashes never make it let go more."""

from __future__ import annotations

from contextlib import suppress

import pytest
from campaigns.simbox import PATH, Box, Tick

from mist.broker.base import Message, StreamConfig
from mist.errors import DataLoss, SequenceExpired, StorageFull
from mist.testing.simfiles import PowerCut, Script, SimFiles

SEGMENT = f"{PATH}/{1:020d}.seg"


def made(config: StreamConfig) -> tuple[SimFiles, Box, Tick]:
    files, clock = SimFiles("/log/streams"), Tick()
    Box.create(files, config, clock)
    return files, Box(files, 1, clock=clock), clock


def put(box: Box, count: int, size: int = 500, start: int = 1) -> None:
    for i in range(start, start + count):
        box.append([Message("a", f"{i}:".encode().ljust(size, b"x"), f"id-{i}")])


def kept(box: Box) -> tuple[int, int]:
    tail = box.reader.tail()
    return tail.first, tail.durable


def test_count_limit_drops_the_oldest_records() -> None:
    """Exactly records_max stay, also within a block."""
    _, box, _ = made(StreamConfig(records_max=5))
    box.append([Message("a", b"", f"id-{i}") for i in range(8)])
    assert kept(box) == (4, 8)
    put(box, 2, start=20)
    assert kept(box) == (6, 10)
    assert [r.sequence for r in box.all()] == [6, 7, 8, 9, 10]


def test_full_refuse_stores_nothing_above_the_limit_and_goes_on_after_a_trim() -> None:
    """StorageFull is definite; a trim makes room."""
    _, box, _ = made(StreamConfig(records_max=3, full="refuse"))
    put(box, 3)
    with pytest.raises(StorageFull):
        put(box, 1, start=4)
    assert kept(box) == (1, 3)
    box.trim(3)
    put(box, 2, start=4)
    assert kept(box) == (3, 5)


@pytest.mark.parametrize("config", [StreamConfig(age_s_max=3600.0), StreamConfig(bytes_max=100_000)])
@pytest.mark.parametrize("what", ["header", "count", "payload"])
def test_damage_at_the_oldest_record_expires_alone(config: StreamConfig, what: str) -> None:
    """A damaged first block must not take the good records behind it along, nor stop retention."""
    files, box, clock = made(config)
    put(box, 3)
    data = bytearray(files.content(SEGMENT))
    start = data.index(b"MBLK")
    if what == "header":
        data[start : start + 4] = b"ROT!"
    elif what == "count":
        data[start + 12] = 2  # a count that would take the next record with it
    else:
        data[start + 200] ^= 255
    files.put(SEGMENT, bytes(data))
    clock.now_ns += 3601 * 10**9
    if config.bytes_max:
        for i in range(4, 400):
            put(box, 1, start=i)
            if box.journal.tail.first > 1:
                break
    else:
        box.append([Message("a", b"", "fresh")])
        assert box.journal.tail.first == 4
        assert [r.id for r in box.all()] == ["fresh"]
        return
    assert box.journal.tail.first == 2
    assert box.all()[0].id == "id-2"


def test_records_written_after_damage_outlive_its_age() -> None:
    """Old damage expires; what came fresh in the same segment stays."""
    files, box, clock = made(StreamConfig(age_s_max=3600.0))
    put(box, 2)
    data = files.content(SEGMENT)
    files.put(SEGMENT, data.replace(b"MBLK", b"ROT!"))
    clock.now_ns += 1800 * 10**9
    put(box, 1, start=3)
    clock.now_ns += 1900 * 10**9
    put(box, 1, start=4)
    assert [r.id for r in box.all()] == ["id-3", "id-4"]


def test_empty_stream_whose_roll_was_not_published_keeps_its_limits() -> None:
    """A crash between making a segment and publishing it, with everything trimmed: appends and limits go on."""
    files, box, clock = made(StreamConfig(segment_bytes=8192, bytes_max=20_000))
    put(box, 1, 3500)
    box.trim(2)
    files.cut_on("sync_dir", "/s")
    with suppress(PowerCut):
        put(box, 1, 3500, start=2)
    box = Box(files.kill(), 1, clock=clock)
    put(box, 40, 3500, start=2)
    assert box.journal.tail.durable == 41
    assert box.all()[-1].id == "id-41"


def test_a_damaged_segment_header_does_not_stop_appends_with_an_age_limit_on_segments() -> None:
    """The age of a segment whose header is bad is unknown: the next append rolls."""
    files, box, clock = made(StreamConfig(segment_age_s=3600.0))
    put(box, 1)
    data = files.content(SEGMENT)
    files.put(SEGMENT, b"\1" * 4096 + data[4096:])
    put(box, 1, start=2)
    box = Box(files, 1, clock=clock)
    put(box, 1, start=3)
    assert [r.id for r in box.all()] == ["id-1", "id-2", "id-3"]
    assert len(box.journal.segments.bases) == 2


def test_bytes_do_not_count_reserved_space_after_a_power_cut() -> None:
    """A sealed segment is cut to its size durably; otherwise limits would drop records for space that is not used."""
    files, box, _ = made(StreamConfig(segment_bytes=8192))
    put(box, 6, 1500)
    before = box.reader.tail().bytes
    assert Box(files.power_cut(Script()), 2).reader.tail().bytes == before


def test_a_gap_left_by_expiry_is_not_silent() -> None:
    """A position below the first kept record is refused with that record's sequence."""
    _, box, _ = made(StreamConfig(records_max=2))
    put(box, 5)
    with pytest.raises(SequenceExpired) as caught:
        box.all(after=1)
    assert caught.value.first == 4
    assert not isinstance(caught.value, DataLoss)


def test_trimming_what_has_expired_makes_that_durable() -> None:
    """Expiry within a segment is not marked, and a power cut may take back the append that caused it; a trim that
    returned holds."""
    files, box, _ = made(StreamConfig(records_max=3))
    put(box, 5)
    assert kept(box) == (3, 5)
    box.trim(3)
    files.settle()
    box.append([Message("a", b"", f"more-{i}") for i in range(3)])
    box.trim(5)
    after = Box(files.power_cut(Script()), 2)
    assert kept(after)[0] >= 5
