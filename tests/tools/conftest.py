"""Places for stores: an SQLite file, and a schema of a real PostgreSQL. Processes and servers are those of tests/cli."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.conftest import cli, log, servers, spawn
from conftest import missing

from mist.testing.postgres import run_postgres
from mist.testing.servers import MissingServer
from mist.tools.tokentrace.postgres import SCHEMA

from .shell import Shell

__all__ = ["cli", "log", "servers", "spawn"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a server for this process's tests."""
    try:
        with run_postgres() as server:
            yield server.url
    except MissingServer as exc:
        missing(str(exc))


@pytest.fixture
def database(postgres: str) -> str:
    """The URL of a PostgreSQL without a store."""
    import psycopg

    with psycopg.connect(postgres, autocommit=True) as db:
        db.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE".encode())
    return postgres


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where a store may be opened; nothing is there yet."""
    if request.param == "sqlite":
        return tmp_path / "store" / "t.db"
    url: str = request.getfixturevalue("database")
    return url


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """The command line over a log of this test's own, in its directory."""
    monkeypatch.chdir(tmp_path)
    return Shell(monkeypatch, f"log:{tmp_path / 'log'}")
