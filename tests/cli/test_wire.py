"""ping and relay: the seed's verbs over the transports, with its weaknesses gone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.conftest import ROOT, Cli, envelope, fill, records
from mist.protocol.codec import decode, encode

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mist.transport.file") is None, reason="the transports are not there yet"
)
LINES = b"".join(encode(envelope(n)) + b"\n" for n in range(1, 6))
Spawn = Callable[..., "subprocess.Popen[bytes]"]


def test_ping_a_broker_stores_nothing(cli: Cli, url: str) -> None:
    """A round trip is measured; no stream is made or touched."""
    fill(url, "s", 1)
    found = cli.ok("ping", url, "-j").json
    assert set(found) == {"url", "ms", "answer"}
    assert found["ms"] >= 0
    assert len(cli.ok("ping", url, "-n", "3", "--interval", "0", "-o", "jsonl").lines) == 3
    assert len(cli.ok("-u", url, "stream", "ls", "-j").json) == 1
    assert len(records(url, "s")) == 1


def test_ping_a_transport_sends_one_envelope(cli: Cli, home: Path) -> None:
    """The envelope is the seed's: health.ping from mist-cli."""
    result = cli.ok("ping", "file:p.jsonl")
    assert result.err.startswith("ping sent to file:p.jsonl (")
    sent = decode((home / "p.jsonl").read_bytes())
    assert (sent.type, sent.source, sent.data()) == ("health.ping", "mist-cli", {"from": "mist-cli"})


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["http://127.0.0.1:1/mist"], 7),
        (["ftp://x"], 2),
        (["chan:x"], 2),
        (["file:no/such/dir/x.jsonl"], 3),
        (["log:absent"], 3),
        (["file:p.jsonl", "--wait", "0.1"], 6),
    ],
)
def test_ping_fails_aloud(cli: Cli, home: Path, args: list[str], code: int) -> None:
    """Every failure is a line and a code of its own; the seed was silent with 1."""
    result = cli("ping", *args)
    assert result.code == code, result
    assert result.err.startswith("error: ")
    assert not (home / "absent").exists()


def test_relay_ends_with_the_source_and_counts(cli: Cli, home: Path, log: str) -> None:
    """The end of the input is success, payload bytes stay, and the number is told."""
    (home / "in.jsonl").write_bytes(LINES)
    result = cli.ok("relay", "file:in.jsonl", f"{log}?stream=t")
    assert result.err == f"relayed 5 messages from file:in.jsonl to {log}?stream=t\n"
    assert [r.id for r in records(log, "t")] == [f"id-{n}" for n in range(1, 6)]
    back = cli.ok("relay", f"{log}?stream=t&follow=0", "file:out.jsonl", "-j")
    assert (back.json["relayed"], back.json["refused"]) == (5, 0)
    assert (home / "out.jsonl").read_bytes() == LINES
    assert cli.ok("relay", "file:in.jsonl", "file:two.jsonl", "-n", "2", "-j").json["relayed"] == 2


def test_relay_passes_over_a_bad_line(cli: Cli, home: Path) -> None:
    """One bad document is told and does not stop the rest; the exit code says so."""
    (home / "in.jsonl").write_bytes(LINES + b"garbage\n" + encode(envelope(9)) + b"\n")
    result = cli("relay", "file:in.jsonl", "file:out.jsonl")
    assert result.code == 9
    assert "passed over" in result.err
    assert (home / "out.jsonl").read_bytes() == LINES + encode(envelope(9)) + b"\n"
    assert cli("relay", "in.jsonl", "file:out.jsonl").code == 2
    assert cli("relay", "file:absent.jsonl", "file:out.jsonl").code == 3


def test_relay_through_pipes(spawn: Spawn, log: str) -> None:
    """stdin to a stream, and a stream to stdout, as processes; the message of the relay is not in the data."""
    filled = spawn("relay", "stdio:", f"{log}?stream=t", stdin=subprocess.PIPE)
    _, err = filled.communicate(LINES, timeout=30)
    assert (filled.returncode, err.count(b"relayed 5 messages")) == (0, 1)
    drained = spawn("relay", f"{log}?stream=t&follow=0", "stdio:", "-o", "json")
    out, _ = drained.communicate(timeout=30)
    assert (drained.returncode, out) == (0, LINES)


def test_relay_to_an_http_server(cli: Cli, home: Path, log: str) -> None:
    """`http:` is a destination like any other; 202 means stored."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("httpx")
    (home / "in.jsonl").write_bytes(LINES)
    code = (
        "import asyncio, sys, mist\nfrom mist.transport import serve\n"
        "async def main():\n"
        "    async with mist.connect(sys.argv[1]) as broker:\n"
        "        async with serve(await broker.open('t'), port=0) as server:\n"
        "            print(server.url, flush=True)\n"
        "            await asyncio.to_thread(sys.stdin.read)\n"
        "asyncio.run(main())\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, log], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)}
    )
    with server:
        assert server.stdout is not None
        assert server.stdin is not None
        address = server.stdout.readline().decode().strip()
        try:
            cli.ok("relay", "file:in.jsonl", address)
            cli.ok("ping", address)
        finally:
            server.stdin.close()
        assert server.wait(30) == 0
    assert [r.id for r in records(log, "t")][:5] == [f"id-{n}" for n in range(1, 6)]
