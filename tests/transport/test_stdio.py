"""`stdio:` beyond the suite: real pipes and processes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run

from mist.errors import EndOfStream, Locked, Malformed, TransportError
from mist.protocol import codec
from mist.testing.transports import envelope
from mist.transport.stdio import StdioTransport

RELAY = """
import asyncio, sys
from mist.transport import dial
async def main():
    async with dial("stdio:") as t:
        async for e in t:
            await t.send(e)
asyncio.run(main())
"""
FLOOD = """
import asyncio, sys
from mist.errors import EndOfStream
from mist.testing.transports import envelope
from mist.transport import dial
async def main():
    async with dial("stdio:") as t:
        while True:
            await t.send_many([envelope(i) for i in range(100)])
try:
    asyncio.run(main())
except EndOfStream as exc:
    print(exc, file=sys.stderr)
    sys.exit(exc.exit_code)
"""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    r, w = os.pipe()
    yield r, w
    for fd in (r, w):
        try:
            os.close(fd)
        except OSError:
            continue  # the test closed it


def test_relay_process() -> None:
    """A program that sends back what it receives: all of it, in order, bytes unchanged, and a clean end."""
    lines = b"".join(codec.encode(envelope(i, checksum=True)) + b"\n" for i in range(3000))
    done = subprocess.run([sys.executable, "-c", RELAY], input=lines, capture_output=True, timeout=60, check=False)
    assert done.stderr == b""
    assert done.returncode == 0
    assert done.stdout == lines


def test_redirected_files(tmp_path: Path) -> None:
    """Input and output may be regular files, which no selector watches; /dev/null is an input that has ended."""
    (tmp_path / "in").write_bytes(b"".join(codec.encode(envelope(i)) + b"\n" for i in range(50)))
    with open(tmp_path / "in", "rb") as stdin, open(tmp_path / "out", "wb") as stdout:
        subprocess.run([sys.executable, "-c", RELAY], stdin=stdin, stdout=stdout, timeout=60, check=True)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in").read_bytes()
    subprocess.run([sys.executable, "-c", RELAY], stdin=subprocess.DEVNULL, timeout=60, check=True)


def test_broken_pipe_is_a_clean_end() -> None:
    """A producer whose reader goes away gets EndOfStream, whose exit code is 0."""
    child = subprocess.Popen([sys.executable, "-c", FLOOD], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    codec.decode(child.stdout.readline())
    child.stdout.close()
    said = child.stderr.read()
    child.stderr.close()
    assert child.wait(60) == 0
    assert b"the other side is gone" in said


def test_shared_output_stays_blocking(pipe: tuple[int, int]) -> None:
    """Others that write to the same pipe never meet EAGAIN because of us."""
    r, w = pipe

    async def case() -> None:
        async with StdioTransport(stdin=-1, stdout=w) as t:
            await t.send(envelope())
            assert not fcntl.fcntl(w, fcntl.F_GETFL) & os.O_NONBLOCK

    run(case())
    assert codec.decode(os.read(r, 9999)).data() == {"n": 0}
    os.write(w, b"still open\n")


def test_two_readers_are_refused(pipe: tuple[int, int]) -> None:
    """A second reader of one input is refused while the first is open, and welcome afterwards."""
    r, w = pipe
    os.write(w, codec.encode(envelope(1)) + b"\n" + codec.encode(envelope(2)) + b"\n")

    async def case() -> None:
        async with StdioTransport(stdin=r, stdout=w) as first, StdioTransport(stdin=r, stdout=w) as second:
            assert (await first.receive()).data() == {"n": 1}
            with pytest.raises(Locked):
                await second.receive()
            assert (await first.receive()).data() == {"n": 2}
            await first.close()
            os.write(w, codec.encode(envelope(3)) + b"\n")
            assert (await second.receive()).data() == {"n": 3}

    run(case())


def test_input_without_last_newline(pipe: tuple[int, int]) -> None:
    """A whole document at the end counts; half of one is an error before the end."""
    r, w = pipe
    os.write(w, codec.encode(envelope(1)))
    os.close(w)

    async def whole() -> None:
        async with StdioTransport(stdin=r) as t:
            assert [e.data() async for e in t] == [{"n": 1}]

    run(whole())
    r2, w2 = os.pipe()
    os.write(w2, codec.encode(envelope(1))[:-3])
    os.close(w2)

    async def torn() -> None:
        async with StdioTransport(stdin=r2) as t:
            with pytest.raises(Malformed, match="stdin:1: torn"):
                await t.receive()
            with pytest.raises(EndOfStream):
                await t.receive()

    run(torn())
    os.close(r2)


def test_senders_of_one_turn_share_a_write(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred sends at once are one write."""
    r, w = pipe
    writes: list[int] = []
    real = os.write

    def counted(fd: int, data: bytes) -> int:
        writes.append(len(data))
        return real(fd, data)

    monkeypatch.setattr(os, "write", counted)

    async def case() -> None:
        async with StdioTransport(stdin=-1, stdout=w) as t:
            await asyncio.gather(*[t.send(envelope(i)) for i in range(100)])

    run(case())
    assert len(writes) == 1
    assert os.read(r, 1 << 20).count(b"\n") == 100


def test_close_gives_up_on_a_stuck_reader(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A close does not wait for ever for a reader that stopped: the senders get an error."""
    _, w = pipe
    monkeypatch.setattr("mist.transport.stdio.CLOSE_WAIT_S", 0.05)

    async def case() -> None:
        t = StdioTransport(stdin=-1, stdout=w)
        sending = asyncio.create_task(t.send_many([envelope(i) for i in range(5000)]))
        await asyncio.sleep(0.02)
        assert not sending.done()
        await t.close()
        with pytest.raises(TransportError, match="nobody took"):
            await sending

    run(case())


def test_closed_descriptors_are_our_errors() -> None:
    """Descriptors that are not open raise an error of ours."""

    async def case() -> None:
        async with StdioTransport(stdin=987, stdout=988) as t:
            with pytest.raises(TransportError, match="stdin"):
                await t.receive()
            with pytest.raises(TransportError, match="stdout"):
                await t.send(envelope())

    run(case())
