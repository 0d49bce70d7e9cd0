"""Real terminals, pipes and signals, with the embedded log and real processes."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Cli, envelope, fill, message
from mist.broker.base import Message

Spawn = Callable[..., "subprocess.Popen[bytes]"]
LIMIT_S = 30


def read_until(descriptor: int, wanted: bytes, limit_s: float = LIMIT_S) -> bytes:
    """What comes from a descriptor up to `wanted`, or all of it at its end."""
    out = b""
    until = time.monotonic() + limit_s
    while wanted not in out and time.monotonic() < until:
        if not select.select([descriptor], [], [], 0.5)[0]:
            continue
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # a terminal whose other side is closed
            break
        if not chunk:
            break
        out += chunk
    return out


class Terminal:
    """A command on a terminal of 80 columns and 10 lines."""

    def __init__(self, spawn: Spawn, *args: str, **env: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 80, 0, 0))
        self.process = spawn(
            *args,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={"TERM": "xterm", "PAGER": "cat", **env},
            start_new_session=True,
        )
        os.close(slave)

    def finish(self) -> tuple[int, str]:
        out = read_until(self.master, b"\0never")
        code = self.process.wait(LIMIT_S)
        os.close(self.master)
        return code, out.decode().replace("\r\n", "\n")


def test_a_terminal_gets_colour_and_lines_that_fit(spawn: Spawn, log: str) -> None:
    """Bold headers and no line wider than the terminal; with NO_COLOR or TERM=dumb no escape at all."""
    fill(log, "s", [Message("a." + "long-" * 20 + "x", b"y" * 500)])
    code, shown = Terminal(spawn, "-u", log, "stream", "ls").finish()
    assert code == 0
    assert "\x1b[1mname" in shown
    code, plain = Terminal(spawn, "-u", log, "tail", "s", NO_COLOR="1").finish()
    assert code == 0
    assert "\x1b" not in plain
    assert all(len(line) <= 80 for line in plain.splitlines())
    assert "…" in plain
    assert "\x1b" not in Terminal(spawn, "-u", log, "stream", "ls", TERM="dumb").finish()[1]


def test_a_pipe_gets_neither_colour_nor_cuts(spawn: Spawn, log: str) -> None:
    """What goes into a file is whole and plain, unless FORCE_COLOR asks."""
    fill(log, "s", [Message("a", b"y" * 300)])
    out, err = spawn("-u", log, "tail", "s").communicate(timeout=LIMIT_S)
    assert b"y" * 300 in out
    assert b"\x1b" not in out + err
    out, _ = spawn("-u", log, "stream", "ls", env={"FORCE_COLOR": "1"}).communicate(timeout=LIMIT_S)
    assert b"\x1b[1m" in out


def test_a_tall_table_is_paged_only_on_a_terminal(spawn: Spawn, log: str, tmp_path: Path) -> None:
    """Taller than the screen goes through PAGER on a terminal, never into a pipe, and never with pager = false."""
    for n in range(12):
        fill(log, f"s{n}", 1)
    marker = tmp_path / "paged"
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\ntouch {marker}\ncat\n")
    pager.chmod(0o755)
    code, shown = Terminal(spawn, "-u", log, "stream", "ls", PAGER=str(pager)).finish()
    assert (code, marker.exists()) == (0, True)
    assert "s11" in shown
    marker.unlink()
    out, _ = spawn("-u", log, "stream", "ls", env={"PAGER": str(pager)}).communicate(timeout=LIMIT_S)
    assert out.count(b"\n") == 13
    Terminal(spawn, "-u", log, "stream", "ls", PAGER=str(pager), MIST_PAGER="false").finish()
    assert not marker.exists()


@pytest.mark.parametrize(("answer", "code", "left"), [(b"y\n", 0, 0), (b"\n", 11, 1), (b"no\n", 11, 1)])
def test_a_person_is_asked_once(spawn: Spawn, cli: Cli, log: str, answer: bytes, code: int, left: int) -> None:
    """On a terminal the question names what will be gone; only yes is yes."""
    fill(log, "s", 3)
    terminal = Terminal(spawn, "-u", log, "stream", "rm", "s")
    asked = read_until(terminal.master, b"[y/N] ")
    assert b"delete stream s with 3 records" in asked
    os.write(terminal.master, answer)
    assert terminal.finish()[0] == code
    assert len(cli.ok("-u", log, "stream", "ls", "-j").json) == left


def test_head_ends_it_with_success(log: str, spawn: Spawn) -> None:
    """A reader that has had enough is no error: exit 0, nothing on stderr."""
    fill(log, "s", [message(envelope(n)) for n in range(1, 3000)])
    for args in (["tail", "s", "--from", "start", "-o", "jsonl"], ["export", "s", "-"], ["tail", "s", "-n", "3000"]):
        process = spawn("-u", log, *args)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(LIMIT_S) == 0
        assert process.stderr.read() == b""


def test_a_follower_sees_what_another_process_publishes(log: str, spawn: Spawn, cli: Cli) -> None:
    """`tail -f` prints a record as soon as it is durable."""
    fill(log, "s", 1)
    process = spawn("-u", log, "tail", "s", "-f", "-o", "jsonl")
    assert process.stdout is not None
    read_until(process.stdout.fileno(), b"id-1")
    fill(log, "s", [message(envelope(2))])
    assert b'"sequence":2' in read_until(process.stdout.fileno(), b"\n")
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_S) == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_flushes_saves_and_tells_how_to_resume(
    log: str, spawn: Spawn, cli: Cli, number: signal.Signals, code: int
) -> None:
    """Every printed line is whole, the cursor covers exactly them, and --from goes on behind them."""
    fill(log, "s", [message(envelope(n)) for n in range(1, 2001)])
    process = spawn("-u", log, "tail", "s", "-f", "--from", "start", "--save-cursor", "me", "-o", "jsonl")
    assert process.stdout is not None
    assert process.stderr is not None
    read_until(process.stdout.fileno(), b'"sequence":2000,')
    process.send_signal(number)
    process.send_signal(number)  # as `timeout` does: the process and its group
    err = process.stderr.read().decode()
    assert process.wait(LIMIT_S) == code
    assert err == f"resume with: mist -u {log} tail s --from +2000\n"
    assert cli.ok("-u", log, "cursor", "show", "s", "me", "-j").json["sequence"] == 2000


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_signal_while_the_reader_is_slow_loses_no_byte(log: str, spawn: Spawn, unbuffered: str) -> None:
    """A write that blocks when the signal comes is finished: whole lines, in order, none missing."""
    fill(log, "s", [message(envelope(n)) for n in range(1, 3001)])
    process = spawn(
        "-u", log, "tail", "s", "-f", "--from", "start", "-o", "jsonl", env={"PYTHONUNBUFFERED": unbuffered}
    )
    assert process.stdout is not None
    assert process.stderr is not None
    pipe = process.stdout.fileno()
    assert select.select([pipe], [], [], LIMIT_S)[0]
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until and not _full(pipe):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out = b""
    while chunk := os.read(pipe, 65536):
        out += chunk
    assert process.wait(LIMIT_S) == 143
    lines = out.splitlines(keepends=True)
    assert all(line.endswith(b"}\n") for line in lines)
    numbers = [int(line.split(b",")[0].partition(b":")[2]) for line in lines]
    assert numbers == list(range(1, len(numbers) + 1))
    assert f"--from +{numbers[-1]}\n" in process.stderr.read().decode()


def _full(pipe: int) -> bool:
    """Whether a pipe holds as much as it can: its writer waits."""
    held = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0\0\0\0"))[0]
    return bool(held >= fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ))


def test_nothing_needs_a_terminal(spawn: Spawn, log: str) -> None:
    """With all three streams closed or null a command does its work."""
    fill(log, "s", 1)
    for args in (["stream", "ls"], ["tail", "s"], ["doctor"], ["stream", "rm", "s", "-y"]):
        assert spawn("-u", log, *args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait(LIMIT_S) == 0


def test_lag_is_watched_until_interrupted(spawn: Spawn, cli: Cli, log: str) -> None:
    """--watch gives a line per look as JSON lines, and ends with 130."""
    fill(log, "s", 2)
    cli.ok("-u", log, "consumer", "create", "s", "w")
    process = spawn("-u", log, "consumer", "lag", "s", "--watch", "--every", "0.1", "-o", "jsonl")
    assert process.stdout is not None
    shown = b""
    while shown.count(b"\n") < 3:
        shown += read_until(process.stdout.fileno(), b"\n")
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_S) == 130


def test_a_worker_that_is_stopped_gives_back_what_it_did_not_print(spawn: Spawn, cli: Cli, log: str) -> None:
    """Everything printed is acked, the rest is there for the next one."""
    fill(log, "s", 5)
    process: Any = spawn("-u", log, "sub", "s", "--consumer", "w", "--from", "start", "-o", "jsonl")
    read_until(process.stdout.fileno(), b"id-5")
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT_S) == 143
    lag = cli.ok("-u", log, "consumer", "lag", "w", "-j").json
    assert lag["lag"] in (0, 5)  # printed and acked, or stopped between the two: then all of them come again
