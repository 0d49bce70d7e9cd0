"""File locks between real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from conftest import run

from mist.errors import Internal, Locked, Refused
from mist.kit.lock import FileLock, is_held, owner

HOLDER = """
import sys, time
from mist.kit.lock import FileLock
with FileLock(sys.argv[1]) as lock:
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[bytes]:
    """Another process that holds it until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_one_at_a_time_and_it_says_who(tmp_path: Path) -> None:
    """pid, host and since; a killed holder leaves nothing stale, and the file stays."""
    path = tmp_path / "a" / "b" / "lock"
    with holder(path) as process:
        found = owner(path)
        assert found is not None
        assert (found.pid, found.host) == (process.pid, socket.gethostname())
        with pytest.raises(Locked) as caught:
            FileLock(path).acquire()
        assert str(process.pid) in str(caught.value)
        assert caught.value.meta["pid"] == str(process.pid)
        assert not FileLock(path).try_acquire()
        process.kill()
    assert path.exists()
    assert owner(path) is None, "what the file says is believed only while it is held"
    with FileLock(path) as lock:
        assert lock.held
        found = owner(path)
        assert found is not None
        assert found.pid == os.getpid()
    assert path.exists()
    assert path.stat().st_mode & 0o777 == 0o600
    assert not is_held(path)


def test_waiting_is_bounded(tmp_path: Path) -> None:
    """On the clock it was given; async the same; and it gets the lock when it is free in time."""
    path = tmp_path / "lock"
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with FileLock(path):
        waiting = FileLock(path, clock=lambda: now, sleep=sleep)
        with pytest.raises(Locked, match="for more than 5 s"):
            waiting.acquire(5)
        assert 5 <= now < 5.1
        with pytest.raises(Locked):
            run(FileLock(path).acquire_async())
    with holder(path) as process:
        threading.Timer(0.1, lambda: process.stdin and process.stdin.close()).start()
        patient = FileLock(path)
        patient.acquire(60)
        assert patient.held
        patient.release()
        patient.release()


def test_a_file_that_somebody_removed_is_noticed(tmp_path: Path) -> None:
    """Waiter and newcomer of the seed: two holders at once. Here the lock is on the file that lies there."""
    path = tmp_path / "lock"
    first = FileLock(path)
    first.acquire()
    path.unlink()
    second = FileLock(path)
    assert second.try_acquire()
    assert not FileLock(path).try_acquire()
    second.release()
    first.release()

    # removed between open and lock
    real = os.open
    opened: list[int] = []

    def racing(place: object, flags: int, mode: int = 0o777) -> int:
        descriptor = real(place, flags, mode)  # type: ignore[call-overload]
        if not opened:
            path.unlink()
        opened.append(descriptor)
        return int(descriptor)

    os.open = racing  # type: ignore[assignment]
    try:
        third = FileLock(path)
        assert third.try_acquire()
    finally:
        os.open = real
    assert len(opened) == 2
    assert os.path.samestat(os.fstat(third.fileno()), os.stat(path))
    third.release()


def test_many_processes_never_two(tmp_path: Path) -> None:
    """Each adds to a file by reading and writing it: under the lock no addition is lost."""
    lock, number = tmp_path / "lock", tmp_path / "number"
    number.write_text("0")
    program = """
    import sys
    from pathlib import Path
    from mist.kit.lock import FileLock
    for _ in range(25):
        lock = FileLock(sys.argv[1])
        lock.acquire(60)
        Path(sys.argv[2]).write_text(str(int(Path(sys.argv[2]).read_text()) + 1))
        lock.release()
    """
    argv = [sys.executable, "-c", textwrap.dedent(program), str(lock), str(number)]
    processes = [subprocess.Popen(argv) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert number.read_text() == "100"


def test_a_child_that_inherits_it_goes_on_holding(tmp_path: Path) -> None:
    """After the parent's release, as long as it lives."""
    path = tmp_path / "lock"
    lock = FileLock(path)
    lock.acquire()
    lock.note(b'{"server": "x"}')
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=(lock.fileno(),)
    )
    lock.release()
    assert is_held(path)
    assert owner(path) is None, "the file says something else"
    with child:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(20)
    assert not is_held(path)


def test_other_failures_are_not_called_held(tmp_path: Path) -> None:
    """A folder that is a file, a path that is a folder; and misuse."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(Refused):
        FileLock(file / "lock").try_acquire()
    with pytest.raises(Refused):
        FileLock(tmp_path).try_acquire()
    with pytest.raises(Refused):
        is_held(file / "lock")
    lock = FileLock(tmp_path / "lock")
    with pytest.raises(Internal):
        lock.fileno()
    with lock, pytest.raises(Internal):
        lock.try_acquire()
