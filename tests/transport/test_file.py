"""`file:` beyond the suite: torn lines, positions, following, several processes, what can go wrong on disk."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import run

from mist.errors import (
    Ambiguous,
    CursorAhead,
    EndOfStream,
    InvalidArgument,
    Locked,
    Malformed,
    NotAuthorised,
    NotFound,
    StorageFull,
    TooLarge,
    TransportError,
)
from mist.protocol import codec
from mist.testing.transports import envelope, sized
from mist.transport import Position, dial
from mist.transport.file import FileTransport, Torn


async def write(path: Path, numbers: range) -> None:
    async with dial(f"file:{path}?sync=none") as t:
        await t.send_many([envelope(i) for i in numbers])


def append(path: Path, data: bytes) -> None:
    with open(path, "ab") as f:
        f.write(data)


async def read(url: str, **options: Any) -> list[int]:
    async with dial(url, **options) as t:
        return [e.data()["n"] async for e in t]


def test_format_and_mode(tmp_path: Path) -> None:
    """One compact document and one newline per line, mode 0600, nothing else."""
    path = tmp_path / "a.jsonl"
    sent = [envelope(i, checksum=True) for i in range(3)]

    async def case() -> None:
        async with dial(f"file://{path}") as t:
            await t.send(sent[0])
            await t.send_many(sent[1:])

    run(case())
    assert path.read_bytes() == b"".join(codec.encode(e) + b"\n" for e in sent)
    assert path.stat().st_mode & 0o777 == 0o600


def test_path_is_absolute_at_construction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing the folder afterwards does not move the file."""
    monkeypatch.chdir(tmp_path)
    t = FileTransport("rel.jsonl", sync="none")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")

    async def case() -> None:
        async with t:
            await t.send(envelope(1))

    run(case())
    assert (tmp_path / "rel.jsonl").exists()


def test_reading_makes_nothing(tmp_path: Path) -> None:
    """A receive from a missing file says so and creates no file; a missing folder is named."""

    async def case() -> None:
        async with dial(f"file:{tmp_path}/no.jsonl") as t:
            with pytest.raises(NotFound, match=r"no\.jsonl"):
                await t.receive()
        async with dial(f"file:{tmp_path}/no/folder.jsonl") as t:
            with pytest.raises(NotFound, match="folder has to exist"):
                await t.send(envelope())

    run(case())
    assert list(tmp_path.iterdir()) == []


def test_torn_last_line_is_put_aside(tmp_path: Path) -> None:
    """An append after a crash cuts the torn line into PATH.torn, reports it, and glues nothing."""
    path = tmp_path / "t.jsonl"
    run(write(path, range(2)))
    whole = path.read_bytes()
    torn = codec.encode(envelope(5))[:-7]
    path.write_bytes(whole + torn)

    async def case() -> list[Torn]:
        async with dial(f"file:{path}") as t:
            await t.send(envelope(2))
            return t.torn  # type: ignore[attr-defined, no-any-return]

    assert run(case()) == [Torn(len(whole), len(torn), f"{path}.torn")]
    assert (tmp_path / "t.jsonl.torn").read_bytes() == torn + b"\n"
    assert run(read(f"file:{path}")) == [0, 1, 2]


def test_whole_last_line_gets_its_newline(tmp_path: Path) -> None:
    """A last line that lacks only its newline is read, and kept by the next append."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(codec.encode(envelope(0)))
    assert run(read(f"file:{path}")) == [0]
    run(write(path, range(1, 3)))
    assert run(read(f"file:{path}")) == [0, 1, 2]
    assert not (tmp_path / "t.jsonl.torn").exists()


def test_reader_reports_a_torn_line_once(tmp_path: Path) -> None:
    """A reader gets everything before a torn line, its error once, the end; and what comes after the repair."""
    path = tmp_path / "t.jsonl"
    run(write(path, range(2)))
    with open(path, "ab") as f:
        f.write(b'{"version":"1","id":"x')

    async def case() -> None:
        async with dial(f"file:{path}") as t:
            assert len(await t.receive_many()) == 2
            with pytest.raises(Malformed, match=r"t\.jsonl:3: torn last line"):
                await t.receive()
            for _ in range(2):
                with pytest.raises(EndOfStream):
                    await t.receive()
            await write(path, range(2, 5))
            assert [e.data()["n"] async for e in t] == [2, 3, 4]

    run(case())


def test_follower_survives_a_repair(tmp_path: Path) -> None:
    """A follower that saw half a line never glues it to what a repair puts in its place."""
    path = tmp_path / "t.jsonl"
    run(write(path, range(1)))

    async def case() -> list[int]:
        async with dial(f"file:{path}?follow=1") as t:
            got = [(await t.receive()).data()["n"]]
            append(path, codec.encode(envelope(8))[:30])
            assert await t.receive_many(5, wait_s=0.05) == []
            await write(path, range(1, 4))
            got += [(await t.receive()).data()["n"] for _ in range(3)]
            return got

    assert run(case()) == [0, 1, 2, 3]


def test_follower_waits_for_the_file(tmp_path: Path) -> None:
    """Following a file that is not there yet waits for it."""
    path = tmp_path / "later.jsonl"

    async def case() -> None:
        async with dial(f"file:{path}?follow=1") as t:
            waiting = asyncio.create_task(t.receive())
            await asyncio.sleep(0.03)
            await write(path, range(4, 5))
            assert (await waiting).data() == {"n": 4}

    run(case())


def test_follower_reports_replacement_and_cut(tmp_path: Path) -> None:
    """A file that is replaced is an error once, then its lines; one that is cut below the position stays an error."""
    path = tmp_path / "t.jsonl"
    run(write(path, range(3)))

    async def case() -> None:
        async with dial(f"file:{path}?follow=1") as t:
            assert len(await t.receive_many()) == 3
            path.rename(tmp_path / "t.1")
            await write(path, range(7, 9))
            with pytest.raises(TransportError, match="another file took its place"):
                await t.receive()
            assert [e.data()["n"] for e in await t.receive_many()] == [7, 8]
            os.truncate(path, 0)
            with pytest.raises(TransportError, match="was cut"):
                await t.receive()

    run(case())


def test_appends_follow_the_path(tmp_path: Path) -> None:
    """After a rotation, an open sender writes to the path and not to the file that was moved away."""
    path = tmp_path / "t.jsonl"

    async def case() -> None:
        async with dial(f"file:{path}?sync=none") as t:
            await t.send(envelope(1))
            path.rename(tmp_path / "old")
            await t.send(envelope(2))

    run(case())
    assert run(read(f"file:{path}")) == [2]
    assert run(read(f"file:{tmp_path}/old")) == [1]


def test_late_lines_are_seen(tmp_path: Path) -> None:
    """After the end, a reader that asks again gets what was appended since."""
    path = tmp_path / "t.jsonl"

    async def case() -> None:
        await write(path, range(2))
        async with dial(f"file:{path}") as t:
            assert [e.data()["n"] async for e in t] == [0, 1]
            await write(path, range(2, 4))
            assert [e.data()["n"] async for e in t] == [2, 3]

    run(case())


@pytest.mark.parametrize(
    ("start", "wanted"),
    [
        ("start", [0, 1, 2, 3, 4]),
        ("1", [0, 1, 2, 3, 4]),
        ("3", [2, 3, 4]),
        ("+3", [3, 4]),
        ("+5", []),
        ("end", []),
        ("6", []),
    ],
)
def test_from(tmp_path: Path, start: str, wanted: list[int]) -> None:
    """`from=` takes start, end, N and +N; the blank line counts as a line of its own in none of them."""
    path = tmp_path / "t.jsonl"
    run(write(path, range(5)))
    assert run(read(f"file:{path}?from={start}")) == wanted


def test_from_beyond_the_end(tmp_path: Path) -> None:
    """A line number beyond the file, and text that is no position, are refused."""
    path = tmp_path / "t.jsonl"
    run(write(path, range(5)))
    with pytest.raises(CursorAhead):
        run(read(f"file:{path}?from=%2B6"))
    for bad in ("-1", "x", "1.5"):
        with pytest.raises(InvalidArgument, match="not a position"):
            run(read(f"file:{path}?from={bad}"))


def test_from_end_then_follow(tmp_path: Path) -> None:
    """`from=end` with follow gives only what comes later."""
    path = tmp_path / "t.jsonl"
    run(write(path, range(3000)))

    async def case() -> None:
        async with dial(f"file:{path}?from=end&follow=1") as t:
            assert await t.receive_many(5, wait_s=0.05) == []
            assert t.position == Position(3000, path.stat().st_size)  # type: ignore[attr-defined]
            await write(path, range(1))
            assert (await t.receive()).data() == {"n": 0}

    run(case())


def test_resume_from_position(tmp_path: Path) -> None:
    """The position after any receive resumes exactly behind it; one between no two lines is refused."""
    path = tmp_path / "t.jsonl"
    run(write(path, range(1000)))

    async def case() -> None:
        async with dial(f"file:{path}?from=2") as t:
            assert t.position is None  # type: ignore[attr-defined]
            await t.receive_many(320)
            await t.receive()
            at = t.position  # type: ignore[attr-defined]
        assert at.line == 322
        assert await read(f"file:{path}", position=at) == list(range(322, 1000))
        with pytest.raises(InvalidArgument, match="not the start of a line"):
            await read(f"file:{path}", position=Position(1, at.offset + 1))
        with pytest.raises(CursorAhead):
            await read(f"file:{path}", position=Position(1, 10**9))

    run(case())


def test_bad_and_oversize_lines_cost_themselves_only(tmp_path: Path) -> None:
    """A bad line and one above the limit raise, naming file and line; everything around them is read."""
    path = tmp_path / "t.jsonl"
    lines = [codec.encode(envelope(0)), b"bad", codec.encode(sized(5001)), codec.encode(envelope(1)), b"x" * 20_000]
    path.write_bytes(b"\n".join([*lines, codec.encode(envelope(2))]) + b"\n")

    async def case() -> None:
        async with dial(f"file:{path}", size_bytes_max=5000) as t:
            assert (await t.receive()).data() == {"n": 0}
            with pytest.raises(Malformed, match=rf"{path}:2: "):
                await t.receive()
            with pytest.raises(TooLarge, match=rf"{path}:3: "):
                await t.receive()
            assert (await t.receive()).data() == {"n": 1}
            with pytest.raises(TooLarge) as caught:
                await t.receive()
            assert caught.value.size_bytes == 20_000
            assert (await t.receive()).data() == {"n": 2}

    run(case())


def _append(path: str, who: int, count: int) -> None:
    async def case() -> None:
        async with dial(f"file:{path}?sync={'none' if who % 2 else 'batch'}") as t:
            for i in range(count):
                await t.send_many([envelope(payload={"who": who, "n": i, "fill": "z" * (i % 50 * 100)})] * 2)

    asyncio.run(case())


def test_processes_append_at_once(tmp_path: Path) -> None:
    """Four processes append: no line is torn or lost, batches stay together, each one's order is kept."""
    path = str(tmp_path / "p.jsonl")
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=_append, args=(path, who, 60)) for who in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0

    async def case() -> list[Any]:
        async with dial(f"file:{path}") as t:
            return [e.data() async for e in t]

    got = run(case())
    assert len(got) == 4 * 60 * 2
    for who in range(4):
        assert [d["n"] for d in got if d["who"] == who] == [i for i in range(60) for _ in range(2)]
    assert all(a == b for a, b in zip(got[::2], got[1::2], strict=True))


def test_concurrent_senders_share_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends of one moment are one write and one fdatasync, and none returns before it."""
    synced: list[int] = []
    real = os.fdatasync

    def counted(fd: int) -> None:
        real(fd)
        synced.append(os.fstat(fd).st_size)

    monkeypatch.setattr(os, "fdatasync", counted)
    path = tmp_path / "t.jsonl"

    async def case() -> None:
        async with dial(f"file:{path}") as t:

            async def one(i: int) -> None:
                await t.send(envelope(i))
                assert synced

            await asyncio.gather(*[one(i) for i in range(200)])

    run(case())
    assert len(synced) <= 3
    assert synced[-1] == path.stat().st_size


def test_sync_none_does_not_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sync=none` leaves the disk to the operating system."""
    monkeypatch.setattr(os, "fdatasync", lambda fd: pytest.fail("synced"))
    run(write(tmp_path / "t.jsonl", range(3)))
    assert len(run(read(f"file:{tmp_path}/t.jsonl"))) == 3


def test_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails halfway raises StorageFull and takes its bytes back; the next send works."""
    path = tmp_path / "t.jsonl"
    real = os.write
    fail = False

    def short(fd: int, data: Any) -> int:
        nonlocal fail
        if not fail:
            return real(fd, data)
        if len(data) > 20:
            return real(fd, bytes(data[:20]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", short)

    async def case() -> None:
        nonlocal fail
        async with dial(f"file:{path}") as t:
            await t.send(envelope(0))
            fail = True
            size = path.stat().st_size
            with pytest.raises(StorageFull) as caught:
                await t.send(envelope(1))
            assert caught.value.retryable
            assert path.stat().st_size == size
            fail = False
            await t.send(envelope(2))

    # each failing call writes 20 bytes and then meets the full disk
    calls = 0

    def twice(fd: int, data: Any) -> int:
        nonlocal calls
        if not fail:
            return real(fd, data)
        calls += 1
        if calls == 1:
            return real(fd, bytes(data[:20]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", twice)
    run(case())
    assert run(read(f"file:{path}")) == [0, 2]


def test_failed_sync_is_ambiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk refuses to sync, nobody claims the lines are safe."""

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)

    async def case() -> None:
        async with dial(f"file:{tmp_path}/t.jsonl") as t:
            with pytest.raises(Ambiguous):
                await t.send(envelope())

    run(case())


def test_lock_held_too_long(tmp_path: Path) -> None:
    """A lock that somebody never gives back is an error of its own, to be tried again."""
    path = tmp_path / "t.jsonl"
    run(write(path, range(1)))
    with open(path, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)

        async def case() -> None:
            async with FileTransport(str(path), lock_wait_s=0.05) as t:
                with pytest.raises(Locked):
                    await t.send(envelope())
            async with FileTransport(str(path), lock_wait_s=0.05, sync="none") as t:
                with pytest.raises(Locked):
                    await t.send(envelope())

        run(case())


def test_what_is_no_file(tmp_path: Path) -> None:
    """Folders, devices, no path and unknown parameters are refused with a sentence."""

    async def case() -> None:
        for url in (f"file:{tmp_path}", "file:/dev/null"):
            async with dial(url) as t:
                with pytest.raises(InvalidArgument):
                    await t.send(envelope())
                with pytest.raises(InvalidArgument):
                    await t.receive()
        for url in ("file:", "file:x?sync=always", "file:x?following=1", "file:x?follow=maybe"):
            with pytest.raises(InvalidArgument):
                await dial(url)

    run(case())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file(tmp_path: Path) -> None:
    """A file we may not open is NotAuthorised."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"")
    path.chmod(0)
    with pytest.raises(NotAuthorised):
        run(read(f"file:{path}"))


def test_cancelled_sends_keep_order(tmp_path: Path) -> None:
    """A cancelled send may still arrive; it never tears or reorders the others."""
    path = tmp_path / "t.jsonl"

    async def case() -> None:
        async with dial(f"file:{path}") as t:
            tasks = [asyncio.create_task(t.send(envelope(i))) for i in range(50)]
            await asyncio.sleep(0)
            for task in tasks[::3]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(case())
    got = run(read(f"file:{path}"))
    assert got == sorted(got)
    assert {i for i in range(50) if i % 3} <= set(got)
