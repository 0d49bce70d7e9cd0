"""The servers of `mist.testing.servers` in containers: for real where an engine answers and has the images.

`make compose-test` runs this file with MIST_TEST_DOCKER=required, which turns every skip into a failure.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from testing.test_servers import ask

from mist.kit.local import LocalServer, nats_answers, redis_answers
from mist.testing import servers
from mist.testing.servers import Running, run_nats, run_redis

ROOT = Path(__file__).parents[2]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that has both images."""
    for name in (servers.NATS_URL, servers.REDIS_URL):
        monkeypatch.delenv(name, raising=False)
    missing = [i for i in (servers.NATS_IMAGE, servers.REDIS_IMAGE) if not servers._engine_has(i)]
    if missing and os.environ.get("MIST_TEST_DOCKER") == "required":
        pytest.fail(f"no engine that has {missing}")
    if missing:
        pytest.skip(f"no Docker engine answers that has {' and '.join(missing)}")


def address(server: Running | LocalServer) -> tuple[str, int, int]:
    """Host, port and monitoring port of a container's URL."""
    assert type(server) is Running
    url = urlsplit(server.url)
    return str(url.hostname), int(url.port or 0), int(url.query.removeprefix("monitor=") or 0)


def test_nats_in_a_container(engine: None) -> None:
    """It answers when the block begins, with the settings that a local one has; it is gone at the end."""
    with run_nats() as server:
        host, port, monitor = address(server)
        assert nats_answers(port, monitor, host=host)
        assert b'"max_payload":12582912' in ask(port, b"").replace(b" ", b"")
        assert b'"sync_always": true' in ask(monitor, b"GET /jsz?config=1 HTTP/1.0\r\n\r\n")
    assert not nats_answers(port, monitor, host=host)


def test_redis_in_a_container(engine: None) -> None:
    """The same for Valkey."""
    with run_redis() as server:
        host, port, _ = address(server)
        assert redis_answers(port, host=host)
        assert b"always" in ask(port, b"CONFIG GET appendfsync\r\n")
        assert b"noeviction" in ask(port, b"CONFIG GET maxmemory-policy\r\n")
    assert not redis_answers(port, host=host)


def test_a_test_that_kills_gets_a_process(engine: None) -> None:
    """`own_process` never takes a container."""
    with run_redis(own_process=True) as server:
        assert isinstance(server, LocalServer)


def test_containers_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """MIST_TEST_DOCKER=off."""
    monkeypatch.setenv("MIST_TEST_DOCKER", "off")
    monkeypatch.delenv(servers.REDIS_URL, raising=False)
    monkeypatch.setattr(servers, "_engine_has", lambda image: pytest.fail("asked"))
    with run_redis() as server:
        assert isinstance(server, LocalServer)


def test_the_images_are_those_of_compose() -> None:
    """An engine on which the compose files ran has what the tests look for."""
    named = (ROOT / "compose/compose.yaml").read_text() + (ROOT / "compose/nats/Dockerfile").read_text()
    source = Path(servers.__file__).read_text()
    for name in re.findall(r'_IMAGE", "([^"]+)"', source):
        assert name in named
