"""A damaged log, and processes that are killed: the exit codes 8 and 9, and copies that come out equal."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.conftest import Cli, envelope, fill, message, records

Spawn = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def damaged(log: str) -> str:
    """Three blocks of ten records, the second one with a flipped bit."""
    for start in (1, 11, 21):
        fill(log, "s", [message(envelope(n)) for n in range(start, start + 10)])
    segment = next(Path(log[4:]).rglob("*.seg"))
    data = bytearray(segment.read_bytes())
    data[data.index(b'"id-15"') + 2] ^= 4
    segment.write_bytes(data)
    return log


def test_verify_ends_with_eight_and_the_range(cli: Cli, damaged: str) -> None:
    """Every block is read; the damaged range is named, in JSON and on stderr."""
    result = cli("-u", damaged, "stream", "verify", "s", "--format", "json")
    assert result.code == 8
    assert result.json["ok"] is False
    assert [(d["first"], d["last"]) for d in result.json["damage"]] == [(11, 20)]
    assert "records 11 to 20" in result.err
    assert cli("-u", damaged, "stream", "verify").code == 8


def test_readers_warn_go_on_and_end_with_nine(cli: Cli, damaged: str, tmp_path: Path) -> None:
    """tail, count, export and copy give what is whole and say what is not."""
    good = [*range(1, 11), *range(21, 31)]
    for args in (["--from", "start"], ["-n", "20"]):
        result = cli("-u", damaged, "tail", "s", "-o", "jsonl", *args)
        assert result.code == 9
        assert [r["sequence"] for r in result.lines] == good
        assert "records 11 to 20" in result.err
    counted = cli("-u", damaged, "count", "s", "--type", "trace.span")
    assert (counted.code, counted.out) == (9, "20\n")
    other = f"log:{tmp_path / 'other'}"
    assert cli("-u", damaged, "copy", "s", other).code == 9
    assert [r.id for r in records(other, "s")] == [f"id-{n}" for n in good]
    assert cli("-u", damaged, "export", "s", str(tmp_path / "x.jsonl")).code == 9
    assert cli.ok("-u", damaged, "tail", "s", "-n", "5", "-o", "jsonl").lines[0]["sequence"] == 26


@pytest.mark.slow
def test_a_copy_killed_again_and_again_is_equal_at_the_end(spawn: Spawn, cli: Cli, log: str, tmp_path: Path) -> None:
    """SIGKILL at any moment: the copy goes on, and in the end holds every record once, in order."""
    fill(log, "s", [message(envelope(n)) for n in range(1, 6001)])
    other = f"log:{tmp_path / 'other'}"
    for target in (1, 1500, 4000):
        process = spawn("-u", log, "copy", "s", other, "--rate", "8000")
        until = time.monotonic() + 20
        while time.monotonic() < until and process.poll() is None:
            found = cli("-u", other, "stream", "info", "s", "-j")
            if found.code == 0 and found.json["records"] >= target:
                break
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    cli.ok("-u", log, "copy", "s", other)
    assert [(r.id, r.data) for r in records(other, "s")] == [(r.id, r.data) for r in records(log, "s")]


def test_two_readers_share_one_consumer(spawn: Spawn, cli: Cli, log: str) -> None:
    """Two `mist sub` processes on one consumer print every record between them, and none twice."""
    fill(log, "s", 400)
    cli.ok("-u", log, "consumer", "create", "s", "w")
    workers = [
        spawn("-u", log, "sub", "s", "--consumer", "w", "-o", "raw", "--select", "sequence", "--batch", "20")
        for _ in range(2)
    ]
    until = time.monotonic() + 20
    while time.monotonic() < until and cli.ok("-u", log, "consumer", "lag", "w", "-j").json["lag"]:
        time.sleep(0.05)
    seen: list[int] = []
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
        out, _ = worker.communicate(timeout=30)
        assert worker.returncode in (143, -signal.SIGTERM)  # the latter when it had not even started
        seen += [int(line) for line in out.split()]
    assert sorted(seen) == list(range(1, 401))
