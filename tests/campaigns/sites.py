"""Where a campaign's stream lives: a backend, its server where it has one, and what its processes have to be told.

`with site("nats", folder) as s:` starts a real server over `folder/server`, with its safe settings; `s.url` is what children connect
to. `log` has no server, and `s.server` raises there. A campaign that needs a backend which is not installed says so with
`lacking`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from mist.broker.registry import adapter
from mist.errors import InvalidArgument, NotFound
from mist.kit.local import LocalServer, nats_binary, nats_server, redis_binary, redis_server

BACKENDS = ("log", "nats", "redis")

SMALL = {"segment_bytes": 256 * 1024, "dedupe_ids_max": 1_000_000, "dedupe_window_s": 3600.0}
"""The log's: segments that roll often, a window that outlives a round."""

QUICK: dict[str, dict[str, Any]] = {
    "log": {},
    "nats": {
        **{
            f"mist_nats.{m}:CALL_S": 2.0
            for m in ("link", "api", "broker", "checkpoints", "consumer", "direct", "publish", "stream")
        },
        "mist_nats.link:PING_S": 0.5,
        **{f"mist_nats.{m}:BEAT_S": 0.5 for m in ("consumer", "tail")},
        **{f"mist_nats.{m}:MISSED_S": 1.5 for m in ("consumer", "tail")},
    },
    "redis": {},
}
"""Timeouts, shortened so that a round can outlast them: module constants of the adapters, set in every child."""
QUICK_QUERY = {"log": "", "nats": "connect_timeout_s=1", "redis": "timeout_s=2&connect_timeout_s=1"}


@cache
def lacking(backend: str) -> str:
    """Why a backend cannot be tried here, or ''."""
    try:
        if backend != "log":
            (nats_binary if backend == "nats" else redis_binary)()
        adapter(backend)
    except (NotFound, InvalidArgument) as exc:
        return str(exc)
    return ""


class Site:
    """One stream's home for one round. `common` goes to every child (see child.py)."""

    def __init__(self, backend: str, url: str, server: LocalServer | None = None, *, quick: bool = True) -> None:
        self.backend = backend
        self._server = server
        self.quick = quick and backend != "log"
        query = QUICK_QUERY[backend] if self.quick else ""
        self.url = url + (("&" if "?" in url else "?") + query if query else "")
        self.config: dict[str, Any] = SMALL if backend == "log" else {}
        self.dense = backend != "nats"

    @property
    def remote(self) -> bool:
        return self.backend != "log"

    @property
    def server(self) -> LocalServer:
        assert self._server is not None, f"{self.backend} has no server"
        return self._server

    @property
    def tuning(self) -> dict[str, Any]:
        return QUICK[self.backend] if self.quick else {}

    @property
    def common(self) -> dict[str, Any]:
        common: dict[str, Any] = {"url": self.url, "config": self.config, "tuning": self.tuning}
        return common if self.remote else {**common, "lock_wait_s": 0.3}


@contextmanager
def site(backend: str, folder: Path, *, quick: bool = True, **options: Any) -> Iterator[Site]:
    """A fresh one under `folder`. `options` go to the server (`sync_interval`, `appendfsync`, `extra`)."""
    if backend == "log":
        yield Site(backend, f"log:{folder / 'log'}")
        return
    make = nats_server if backend == "nats" else redis_server
    server = make(folder / "server", **options)
    server.start()
    try:
        yield Site(backend, server.url, server, quick=quick)
    finally:
        server.kill()
