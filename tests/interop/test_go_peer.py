"""Against a program built on the Go library (gopeer/): files, pipes and HTTP, both ways.

Skipped where Go or the module is missing: `cd tests/interop/gopeer && go mod download` fetches it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import run

from mist import connect
from mist.errors import ChecksumMismatch, EndOfStream, InvalidArgument
from mist.kit.retry import RetryPolicy
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from mist.testing.transports import SAMPLES, envelope, sized
from mist.transport import dial, serve
from mist.transport.middleware import Retrying

SOURCE = Path(__file__).parent / "gopeer"


@pytest.fixture(scope="session")
def gopeer(tmp_path_factory: pytest.TempPathFactory) -> str:
    go = shutil.which("go")
    if go is None:
        pytest.skip("go is not installed")
    binary = tmp_path_factory.mktemp("go") / "gopeer"
    made = subprocess.run(
        [go, "build", "-o", str(binary), "."], cwd=SOURCE, capture_output=True, text=True, timeout=110,
        env={**os.environ, "GOPROXY": "off", "GOFLAGS": "-mod=readonly -buildvcs=false"}, check=False,
    )  # fmt: skip
    if made.returncode and "module lookup disabled" in made.stderr:
        pytest.skip("the Go library is not in the module cache: run `go mod download` in tests/interop/gopeer")
    assert made.returncode == 0, made.stderr
    return str(binary)


def go(*argv: str) -> list[dict[str, Any]]:
    done = subprocess.run(argv, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return [msgspec.json.decode(line) for line in done.stdout.splitlines()]


def all_types() -> list[Envelope]:
    return [envelope(payload=p, type=t, checksum=True, source="matchspec") for t, p in SAMPLES.items()]


def test_we_read_what_go_wrote(gopeer: str, tmp_path: Path) -> None:
    """Every line a Go program writes is an envelope for us, checksum and content included."""
    path = tmp_path / "go.jsonl"
    go(gopeer, "write", f"file://{path}", "50")

    async def case() -> list[Envelope]:
        async with dial(f"file://{path}") as t:
            return [e async for e in t]

    got = run(case())
    assert [e.id for e in got] == [f"{i:032x}" for i in range(50)]
    assert {e.type for e in got} == set(SAMPLES)
    assert all(e.checksum for e in got)
    text = 'a<b>&\u2028é🌍\x01\t"\\/'
    assert got[0].data() == {"from": text}
    assert got[2].decode().attrs == {"z": 1e20, "a": 1e-7, "n": None}
    assert got[5].decode().tokens_in == 1 << 60
    # our lines for the same envelopes are Go's, byte for byte
    assert codec.encode_lines(got) == path.read_bytes()


def test_go_reads_what_we_wrote(gopeer: str, tmp_path: Path) -> None:
    """A Go reader accepts our lines: payload bytes and checksums hold, the optional fields do not disturb it."""
    path = tmp_path / "ours.jsonl"
    sent = all_types()
    sent.append(envelope(payload=msgspec.Raw(b'{\n "a": [1,\n2] }'), checksum=True, tenant="t", correlation_id="c"))

    async def case() -> None:
        async with dial(f"file:{path}") as t:
            await t.send_many(sent)

    run(case())
    assert path.stat().st_mode & 0o777 == 0o600
    *got, end = go(gopeer, "read", f"file://{path}")
    assert [g["id"] for g in got] == [e.id for e in sent]
    assert all(g["verified"] for g in got)
    assert [g["payload"] for g in got] == [e.data() for e in sent]
    assert "no more messages" in end["error"]


def test_go_reader_stops_at_a_long_line(gopeer: str, tmp_path: Path) -> None:
    """A line of 1 MiB ends a Go reader for good, which is what our warning says; ours goes on."""
    path = tmp_path / "long.jsonl"

    async def case() -> tuple[list[str], int]:
        async with dial(f"file:{path}") as t:
            await t.send(envelope(1))
            await t.send(sized(1024 * 1024))
            await t.send(envelope(2))
            warnings = t.warnings  # type: ignore[attr-defined]
        async with dial(f"file:{path}") as t:
            return warnings, len([e async for e in t])

    warnings, count = run(case())
    assert len(warnings) == 1
    assert "1 MiB" in warnings[0]
    assert count == 3
    first, end = go(gopeer, "read", f"file://{path}")
    assert first["payload"] == {"n": 1}
    assert "too long" in end["error"]


def test_both_append_to_one_file(gopeer: str, tmp_path: Path) -> None:
    """A Go program and we append at the same time: every line of both is whole."""
    path = tmp_path / "both.jsonl"

    async def case() -> list[Envelope]:
        child = await asyncio.create_subprocess_exec(gopeer, "write", f"file://{path}", "400", "20000")
        async with dial(f"file:{path}?sync=none") as t:
            for i in range(400):
                await t.send(envelope(payload={"n": i, "fill": "y" * 20000}))
        assert await child.wait() == 0
        async with dial(f"file:{path}") as t:
            return [e async for e in t]

    got = run(case(), timeout_s=60)
    ours = [e.data()["n"] for e in got if e.source == "suite"]
    theirs = [e.id for e in got if e.source == "matchspec"]
    assert ours == list(range(400))
    assert theirs == [f"{i:032x}" for i in range(400)]


def test_go_reads_on_after_our_repair(gopeer: str, tmp_path: Path) -> None:
    """A line that a crashed Go writer left torn is put aside by our append, and the Go reader sees all the others."""
    path = tmp_path / "torn.jsonl"
    go(gopeer, "write", f"file://{path}", "3")
    path.write_bytes(path.read_bytes()[:-40])

    async def case() -> None:
        async with dial(f"file:{path}") as t:
            await t.send(envelope(9, id="9"))

    run(case())
    *got, _ = go(gopeer, "read", f"file://{path}")
    assert [g["id"] for g in got] == [f"{0:032x}", f"{1:032x}", "9"]
    assert not any("error" in g for g in got)


def test_pipe_through_go(gopeer: str) -> None:
    """Envelopes piped through a Go program come back, and closing our side ends it cleanly.

    The Go library writes a payload anew with its own escapes, so a checksum over bytes it would write otherwise is
    wrong after that hop, and we refuse the envelope rather than guess.
    """

    async def case() -> None:
        to_r, to_w = os.pipe()
        from_r, from_w = os.pipe()
        child = await asyncio.create_subprocess_exec(gopeer, "pipe", stdin=to_r, stdout=from_w)
        os.close(to_r)
        os.close(from_w)
        sent = [envelope(payload=p, type=t) for t, p in SAMPLES.items()]
        sent += [envelope(i, checksum=True) for i in range(2000)]
        out = await dial("stdio:", stdin=-1, stdout=to_w)
        back = await dial("stdio:", stdin=from_r, stdout=-1)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(out.send_many(sent))
                received = tasks.create_task(_collect(back, len(sent)))
            await out.send(envelope(payload="a<b", checksum=True))
            await out.send(envelope(payload="after"))
            with pytest.raises(ChecksumMismatch):
                await back.receive()
            assert (await back.receive()).data() == "after"
            await out.close()
            os.close(to_w)
            with pytest.raises(EndOfStream):
                await back.receive()
            assert await child.wait() == 0
        finally:
            await back.close()
            os.close(from_r)
        got = received.result()
        assert [e.id for e in got] == [e.id for e in sent]
        assert [e.data() for e in got] == [e.data() for e in sent]

    run(case())


def test_go_posts_to_us(gopeer: str) -> None:
    """What a Go program posts is stored in our stream when it is told 202."""

    async def case() -> list[bytes]:
        async with connect("memory:") as broker:
            stream = await broker.open("s")
            async with serve(stream) as server:
                child = await asyncio.create_subprocess_exec(gopeer, "write", server.url, "20")
                assert await child.wait() == 0
            return [r.data for r in (await stream.read()).records]

    got = [codec.decode(data) for data in run(case())]
    assert [e.id for e in got] == [f"{i:032x}" for i in range(20)]
    assert all(e.checksum for e in got)


def test_go_posts_are_refused_when_full(gopeer: str) -> None:
    """A full inbox answers 503, which a Go program reports."""

    async def case() -> tuple[int | None, bytes]:
        async with dial("http:?listen=127.0.0.1:0", inbox_size=2) as t:
            child = await asyncio.create_subprocess_exec(
                gopeer,
                "write",
                t.listening,
                "3",
                stderr=subprocess.PIPE,  # type: ignore[attr-defined]
            )
            _, said = await child.communicate()
            assert len(await t.receive_many(5)) == 2
            return child.returncode, said

    code, said = run(case())
    assert code == 1
    assert b"503" in said


def test_we_post_to_go(gopeer: str) -> None:
    """A Go listener takes what we post one by one, at the URL without a path; NDJSON it refuses, and we say why."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sent = all_types()

    async def case() -> list[dict[str, Any]]:
        child = await asyncio.create_subprocess_exec(
            gopeer, "listen", f"127.0.0.1:{port}", str(len(sent)), stdout=subprocess.PIPE
        )
        policy = RetryPolicy(attempts_max=200, wait_s=0.02, wait_s_max=0.2, deadline_s=20)
        async with Retrying(await dial(f"http://127.0.0.1:{port}?batch=0"), policy) as t:
            await t.send(sent[0])  # again until it listens
            async with dial(f"http://127.0.0.1:{port}") as batching:
                with pytest.raises(InvalidArgument, match="batch=0"):
                    await batching.send_many(sent[1:3])
            await t.send_many(sent[1:])
        out, _ = await child.communicate()
        assert child.returncode == 0
        return [msgspec.json.decode(line) for line in out.splitlines()]

    got = run(case())
    assert [g["id"] for g in got] == [e.id for e in sent]
    assert all(g["verified"] for g in got)


async def _collect(t: Any, count: int) -> list[Envelope]:
    out: list[Envelope] = []
    while len(out) < count:
        out += await t.receive_many()
    return out
