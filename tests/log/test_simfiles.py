"""The simulated file layer does what it says: it is what all power-cut campaigns stand on."""

from __future__ import annotations

import errno

import pytest

from mist.testing.simfiles import SECTOR, SHORT, Dice, Faults, PowerCut, Script, SimFiles


def made() -> tuple[SimFiles, int]:
    files = SimFiles("/d")
    return files, files.open("/d/f", create=True)


def test_nothing_unsynced_need_survive_and_everything_may() -> None:
    """A write, and the name of its file, are there or not, independently."""
    files, fd = made()
    files.pwrite(fd, b"data", 0)
    states = {tuple((p, s.content(p)) for p in s.paths()) for n in range(40) for s in [files.power_cut(Dice(n))]}
    assert states == {(), (("/d/f", b""),), (("/d/f", b"data"),)}
    assert states == {tuple((p, s.content(p)) for p in s.paths()) for s in files.crash_states(most=99, seed=1)}


def test_a_synced_file_without_a_synced_name_is_gone() -> None:
    """fdatasync of a file says nothing about its directory."""
    files, fd = made()
    files.pwrite(fd, b"data", 0)
    files.sync(fd)
    assert files.power_cut(Script()).paths() == []
    files.sync_dir("/d")
    assert files.power_cut(Script()).content("/d/f") == b"data"


def test_writes_tear_at_sectors() -> None:
    """Any subset of the sectors of a write; never a part of one."""
    files, fd = made()
    files.sync_dir("/d")
    files.pwrite(fd, b"a" * SECTOR + b"b" * SECTOR, 0)
    found = {s.content("/d/f") for s in files.crash_states(most=99, seed=1)}
    assert found == {b"", b"a" * SECTOR, bytes(SECTOR) + b"b" * SECTOR, b"a" * SECTOR + b"b" * SECTOR}


def test_a_rename_is_there_or_not() -> None:
    """Never both names, never none."""
    files, fd = made()
    files.sync(fd)
    files.sync_dir("/d")
    files.rename("/d/f", "/d/g")
    assert {tuple(s.paths()) for s in files.crash_states(most=99, seed=1)} == {("/d/f",), ("/d/g",)}


def test_a_failed_sync_drops_what_it_should_have_written() -> None:
    """The next sync succeeds and does not store it; what is written again is stored."""
    lost = 0
    for seed in range(40):
        files = SimFiles("/d", seed=seed)
        fd = files.open("/d/f", create=True)
        files.sync_dir("/d")
        files.pwrite(fd, b"x" * 3 * SECTOR, 0)
        files.faults = Faults(errno.EIO, 1)
        with pytest.raises(OSError, match="Input/output"):
            files.sync(fd)
        files.sync(fd)
        assert files.content("/d/f") == b"x" * 3 * SECTOR, "the kernel still shows it"
        lost += files.power_cut(Script([True] * 9)).content("/d/f") != b"x" * 3 * SECTOR
        files.pwrite(fd, b"x" * 3 * SECTOR, 0)
        files.sync(fd)
        assert files.power_cut(Script()).content("/d/f") == b"x" * 3 * SECTOR
    assert lost > 20


def test_a_cut_stops_everything_and_a_kill_loses_nothing() -> None:
    """The operation at the cut is done, a sync is not; afterwards nothing changes any more."""
    files, fd = made()
    files.sync_dir("/d")
    files.cut_on("pwrite")
    with pytest.raises(PowerCut):
        files.pwrite(fd, b"data", 0)
    with pytest.raises(PowerCut):
        files.pwrite(fd, b"more", 4)
    assert files.content("/d/f") == b"data"
    files.kill()
    assert files.content("/d/f") == b"data"
    fd = files.open("/d/f")
    files.cut_on("sync")
    with pytest.raises(PowerCut):
        files.sync(fd)
    assert files.power_cut(Script()).content("/d/f") == b""


def test_faults_are_counted_among_what_they_can_happen_to() -> None:
    """The k-th one, once or from then on, until healed; short writes store a part."""
    files, fd = made()
    files.faults = faults = Faults(errno.ENOSPC, 2)
    files.pread(fd, 1, 0)
    files.pwrite(fd, b"1", 0)
    with pytest.raises(OSError, match="No space"):
        files.pwrite(fd, b"2", 1)
    files.pwrite(fd, b"3", 1)
    assert (faults.seen, faults.hits, faults.where) == (3, 1, ["pwrite f"])
    files.faults = faults = Faults(errno.EROFS, 1, forever=True)
    for _ in range(2):
        with pytest.raises(OSError, match="Read-only"):
            files.truncate(fd, 0)
    faults.heal()
    files.truncate(fd, 0)
    files.faults = Faults(SHORT, 1)
    assert files.pwrite(fd, b"abcd", 0) == 2
    assert files.content("/d/f") == b"ab"


def test_locks_belong_to_descriptors() -> None:
    """As with flock: another descriptor of the same file does not get it, closing gives it up."""
    files, fd = made()
    other = files.open("/d/f")
    assert files.lock(fd, wait=False)
    assert files.lock(fd, wait=False)
    assert not files.lock(other, wait=False)
    files.close(fd)
    assert files.lock(other, wait=False)


def test_truncated_bytes_may_come_back() -> None:
    """A size change is unsynced like a write."""
    files, fd = made()
    files.pwrite(fd, b"data", 0)
    files.sync(fd)
    files.sync_dir("/d")
    files.truncate(fd, 2)
    assert {files.power_cut(Dice(n)).content("/d/f") for n in range(20)} == {b"data", b"da"}
