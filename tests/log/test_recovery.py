"""What a log does after a crash of a process or of the machine, and on files that are not as they should be."""

from __future__ import annotations

import errno
from contextlib import suppress

import pytest
from campaigns.simbox import PATH, Box
from google_crc32c import value as crc32c

from mist.broker.base import Message, StreamConfig
from mist.errors import DataLoss, MistError, VersionUnsupported
from mist.testing.simfiles import Dice, Faults, PowerCut, Script, SimFiles

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


def test_trim_needs_no_room_and_survives_a_power_cut() -> None:
    """Trimming is how one makes room: on a full disk it works, and what it removed stays removed."""
    files = made()
    box = Box(files, 1)
    fill(box, 6, 1500)
    files.settle()
    files.faults = Faults(errno.ENOSPC, 1, forever=True)
    real = files.faults.check
    allocating = ("create", "allocate", "rename", "mkdir")
    files.faults.check = lambda kind, path: kind in allocating and real(kind, path)  # type: ignore[method-assign]
    box.trim(6)
    files.faults = None
    assert box.reader.tail().first == 6
    for seed in range(20):
        after = Box(files.power_cut(Dice(seed)), 2)
        assert after.reader.tail().first == 6
        assert [r.id for r in after.all()] == ["id-6"]


def test_expired_segments_do_not_come_back_with_holes() -> None:
    """A power cut may take back some removals and not others; the mark written before them keeps all out of sight."""
    files = made(StreamConfig(segment_bytes=8192, bytes_max=9000, full="drop_oldest"))
    box = Box(files, 1)
    fill(box, 12, 1500)
    first = box.reader.tail().first
    for seed in range(40):
        after = Box(files.power_cut(Dice(seed)), 2)
        assert after.reader.tail().first >= first - 2  # within the segment that is kept, retention needs no mark
        after.all()


@pytest.mark.parametrize("half", [0, 512])
def test_one_bad_half_of_the_trim_mark_is_survived(half: int) -> None:
    """A crash tears only the half being written: the other one still says a true mark."""
    files = made()
    box = Box(files, 1)
    fill(box, 4, 100)
    box.trim(2)
    box.trim(3)
    files.settle()
    files.put(f"{PATH}/tail", b"")
    for bit in range(half * 8, half * 8 + 28 * 8):
        files.flip(f"{PATH}/trim", bit)
        assert Box(files, 2 + bit).reader.tail().first in (2, 3)
        files.flip(f"{PATH}/trim", bit)


def test_damage_in_the_id_window_does_not_stop_appends() -> None:
    """The ids of damaged blocks are lost to the window, those behind them are not."""
    for hit in (b"1:xxx", b"3:xxx"):
        files = made(StreamConfig())
        fill(Box(files, 1), 5)
        data = files.content(SEGMENT)
        files.put(SEGMENT, data.replace(hit, b"rot" + hit[3:]).replace(b"id-3", b"\xff\xfe-3"))
        box = Box(files, 1)
        assert box.append([Message("a", b"", "new"), Message("a", b"", "id-5"), Message("a", b"", "id-4")]) == [6, 5, 4]


def test_a_damaged_id_does_not_swallow_a_new_message() -> None:
    """A flipped bit may turn an old id into one that comes later: it must not count as stored."""
    files = made(StreamConfig())
    fill(Box(files, 1), 5)
    files.put(SEGMENT, files.content(SEGMENT).replace(b"id-3", b"id-7"))
    box = Box(files, 1)
    assert box.append([Message("a", b"", "id-7")]) == [6]


def test_damaged_index_times_do_not_move_a_look_up() -> None:
    """An index entry counts only when the block it points at says the same sequence and the same time."""
    files = made(StreamConfig())
    box = Box(files, 1)
    fill(box, 400)
    times = {r.sequence: r.timestamp_ns for r in box.all()}
    index = f"{PATH}/{1:020d}.idx"
    entries = bytearray(files.content(index))
    assert len(entries) > 24 * 3
    entries[24 * 2 + 8 : 24 * 2 + 16] = (1).to_bytes(8, "little")
    files.put(index, bytes(entries))
    for sequence in (1, 100, 200, 250, 399):
        assert Box(files, 1).reader.locate(times[sequence]) == sequence


def test_files_of_others_are_ignored() -> None:
    """Only names of exactly our form are segments."""
    files = made()
    fill(Box(files, 1), 2)
    for name in ("7.seg", f"{0:020d}.seg", "x" * 20 + ".seg", f"{9:020d}.seg.tmp", f"{9:020d}.seg~", "README"):
        files.put(f"{PATH}/{name}", b"whatever")
    assert [r.id for r in Box(files, 2).all()] == ["id-1", "id-2"]


def test_a_missing_first_segment_is_a_loss_of_its_records_only() -> None:
    """The range that is named ends where the next segment begins."""
    files = made()
    box = Box(files, 1)
    fill(box, 4, 3000)
    files.unlink(f"{PATH}/{1:020d}.seg")
    box = Box(files, 1)
    with pytest.raises(DataLoss) as caught:
        box.all()
    assert (caught.value.first, caught.value.last) == (1, 1)
    assert [r.id for r in box.all(skip=True)] == ["id-2", "id-3", "id-4"]
    assert [(d.first, d.last) for d in box.journal.verify().damage] == [(1, 1)]


def test_every_segment_header_may_be_lost() -> None:
    """What a stream is, its name, incarnation and configuration, lies beside the segments once more."""
    files = made()
    box = Box(files, 1)
    fill(box, 3, 3000)
    incarnation = box.journal.incarnation
    for base in (1, 2, 3):
        path = f"{PATH}/{base:020d}.seg"
        files.put(path, b"\0" * 4096 + files.content(path)[4096:])
    for number in (1, 2):
        box = Box(files, number)
        assert box.journal.incarnation == incarnation
        assert [r.id for r in box.all()][:3] == ["id-1", "id-2", "id-3"]
        assert box.append([Message("a", b"", f"next-{number}")]) == [3 + number]
    assert {d.first for d in box.journal.verify().damage} == {1, 2, 3}


def test_a_foreign_segment_does_not_take_the_stream_over() -> None:
    """A segment of another stream, copied in by mistake, is damage; ours stay readable."""
    other = made()
    fill(Box(other, 1), 1)
    files = made()
    fill(Box(files, 1), 2)
    files.settle()
    files.put(f"{PATH}/{50:020d}.seg", other.content(SEGMENT))
    box = Box(files, 2)
    assert [r.id for r in box.all(after=0, skip=True)][:2] == ["id-1", "id-2"]


def test_a_newer_format_is_refused_and_left_alone() -> None:
    """An older build must not take what a newer one wrote for damage and cut it."""
    files = made()
    fill(Box(files, 1), 2)
    files.settle()
    files.put(f"{PATH}/{3:020d}.seg", newer_header(files.content(SEGMENT)) + b"blocks of another kind")
    before = {p: files.content(p) for p in files.paths() if p.endswith(".seg")}
    with pytest.raises(VersionUnsupported):
        Box(files, 2)
    assert {p: files.content(p) for p in files.paths() if p.endswith(".seg")} == before


def newer_header(segment: bytes) -> bytes:
    """The header of this segment as a build with the next format version would write it."""
    half = bytearray(segment[:2048].replace(b'"version":1', b'"version":3'))
    half[8:12] = crc32c(bytes(half[12:])).to_bytes(4, "little")
    return bytes(half) * 2


def test_a_removed_last_segment_is_damage_and_writing_goes_on() -> None:
    """Within one boot: what it held is lost and named, its sequences are not given again."""
    files = made()
    box = Box(files, 1)
    fill(box, 3, 3000)
    files.unlink(f"{PATH}/{3:020d}.seg")
    box = Box(files, 1)
    with suppress(MistError):
        box.append([Message("a", b"", "first try")])
    assert box.append([Message("a", b"", "next")]) == [4]
    assert [r.id for r in box.all(skip=True)] == ["id-1", "id-2", "next"]
    with pytest.raises(DataLoss) as caught:
        box.all(after=2)
    assert (caught.value.first, caught.value.last) == (3, 3)


def test_a_stale_block_is_noticed_when_it_is_followed() -> None:
    """A block that passes every check but is not the one that was written here (a lost write): the next one's chain
    does not fit."""
    files = made(StreamConfig())
    box = Box(files, 1)
    fill(box, 3, 100)
    stale = files.power_cut(Script())
    old = Box(stale, 2)
    old.append([Message("a.b", b"x" * 102, "stale")])
    start = box.journal.tail.end
    box.append([Message("a.b", b"y" * 102, "fresh")])
    box.append([Message("a.b", b"z" * 102, "after")])
    data, other = bytearray(files.content(SEGMENT)), stale.content(SEGMENT)
    size = old.journal.tail.end - start
    assert old.journal.tail.end == start + size
    data[start : start + size] = other[start : start + size]
    files.put(SEGMENT, bytes(data))
    box = Box(files, 1)
    assert box.journal.verify().damage
    with pytest.raises(DataLoss):
        box.all()
    with pytest.raises(DataLoss):
        box.all(limit=1)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dies", [False, True])
def test_a_block_whose_sync_failed_is_not_adopted_on_the_word_of_another_sync(seed: int, dies: bool) -> None:
    """After a failed sync the system holds the lost bytes for clean: the next sync succeeds without storing them. Neither
    a writer that could not even note the failure, nor one that follows a dead one, may count them as stored."""
    files = SimFiles("/log/streams", seed=seed)
    Box.create(files, StreamConfig())
    box = Box(files, 1)
    fill(box, 1, 2000)
    box.close()
    files.settle()
    box = Box(files, 1)
    files.faults = Faults(errno.EIO, 1, forever=True)
    real = files.faults.check
    after_sync = [False]

    def check(kind: str, path: str) -> bool:
        after_sync[0] |= kind == "sync"
        if after_sync[0] and dies and kind != "sync":
            files.cut_after(1)  # killed where it would note the failure
        return after_sync[0] and not (dies and kind != "sync") and real(kind, path)

    files.faults.check = check  # type: ignore[method-assign]
    with suppress(PowerCut, MistError):
        box.append([Message("a", b"z" * 3000, "unknown")])
    files.faults = None
    if dies:
        box = Box(files.kill(), 1)
    box.append([Message("a", b"", "next")])
    seen = [r.id for r in box.all()]
    after = Box(nothing_else(files), 2)
    assert [r.id for r in after.all()] == seen
    assert not after.journal.verify().damage
