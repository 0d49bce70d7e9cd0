"""`mist doctor` says what real servers are set to, and warns where an acknowledged record could be lost."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest

from cli.conftest import Cli
from mist.testing.servers import run_nats, run_redis

CASES = [
    (lambda: run_nats(own_process=True), "sync", "ok", "always, as the server says"),
    (lambda: run_nats(own_process=True, sync_interval='"10s"'), "sync", "warn", "every 10 s, as the server says"),
    (lambda: run_redis(own_process=True), "append-only file", "ok", "yes, appendfsync always"),
    (lambda: run_redis(own_process=True, appendfsync="everysec"), "append-only file", "warn", "last second"),
    (lambda: run_redis(own_process=True, appendfsync="off"), "append-only file", "warn", "a restart loses"),
    (lambda: run_redis(own_process=True, extra=["--maxmemory-policy", "allkeys-lru"]), "eviction", "warn", "noeviction"),
]  # fmt: skip
NAMES = ["nats-always", "nats-interval", "redis-always", "redis-everysec", "redis-no-file", "redis-evicts"]


@pytest.mark.parametrize(("make", "check", "state", "says"), CASES, ids=NAMES)
def test_what_is_in_force(cli: Cli, make: Any, check: str, state: str, says: str) -> None:
    """One row for it, with the state and the reason; the server and its version are named."""
    server: AbstractContextManager[Any] = make()
    with server as running:
        rows = {r["check"]: r for r in cli.ok("-u", running.url, "doctor", "-j").json}
    assert rows[check]["state"] == state
    assert says in rows[check]["detail"]
    assert any(c.isdigit() for c in rows["server"]["detail"])
