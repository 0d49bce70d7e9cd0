"""The store in one SQLite file (WAL): the default, needs no server. Many processes may open the file.

`synchronous=NORMAL`: a power cut may take the last transactions back, position and rows together; they are then read
from the stream again. `secure_delete`: what is deleted is overwritten with zeros.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from mist.errors import InvalidArgument, Locked, MistError, NotFound, Refused, StorageFull, Unavailable
from mist.tools.tokentrace.driver import Values
from mist.tools.tokentrace.schema import COLUMNS, VERSION, statements
from mist.tools.tokentrace.spans import Row

BUSY_S = 10.0
LOG_PAGES = 8000
"""Of 4 KiB: how long the write-ahead log grows before its pages are written to the file. A page of an index that many
transactions touch is then written once for all of them."""
_ROWS = 1400
"""Rows of one INSERT (of at most 32,766 values). The interpreter's lock is given away once for all of them, and fought for
once, so that the next page is understood beside it."""
_VALUES = f"({','.join('?' * len(COLUMNS))})"
# FAIL and not the usual ABORT: a failure takes the whole transaction back anyway, and SQLite need not keep a copy of each
# page to undo a single statement; that copying was half of the time
_INSERT = f"INSERT OR FAIL INTO spans ({','.join(COLUMNS)}) VALUES "
_INSERT_ROWS = _INSERT + ",".join([_VALUES] * _ROWS) + " ON CONFLICT DO NOTHING"
_INSERT_ONE = _INSERT + _VALUES + " ON CONFLICT DO NOTHING"


class SqliteDriver:
    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.place = str(path)
        self._path = path
        self._db = db
        self._seen = -1

    @classmethod
    def open(cls, path: Path) -> SqliteDriver:
        """For writing, made when absent, with its directory. Raises InvalidArgument for a file that is no store."""
        with translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=NORMAL")
                db.execute("PRAGMA cache_size=-65536")
                db.execute("PRAGMA secure_delete=ON")
                db.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES}")
                db.execute("BEGIN IMMEDIATE")
                if _version(db) == 0:
                    for statement in statements("sqlite"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version={VERSION}")
                db.execute("COMMIT")
                _check_version(db, path)
            except BaseException:
                db.close()
                raise
        return cls(path, db)

    @classmethod
    def read(cls, path: Path) -> SqliteDriver:
        """For questions only; never makes or changes anything. Raises NotFound when there is no store."""
        if not path.is_file():
            raise NotFound(
                f"no TokenTrace store at {path}", hint="`mist trace worker --until-end` builds it from the stream"
            )
        with translated(path):
            uri = f"{path.resolve().as_uri()}?mode=ro"
            db = sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                _check_version(db, path)
            except BaseException:
                db.close()
                raise
        return cls(path, db)

    def begin(self) -> None:
        with translated(self._path):
            self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        with translated(self._path):
            self._db.execute("COMMIT")

    def rollback(self) -> None:
        if self._db.in_transaction:  # a full disk has rolled back already
            self._db.execute("ROLLBACK")

    def execute(self, sql: str, values: Values = ()) -> int:
        with translated(self._path):
            return self._db.execute(sql, values).rowcount

    def execute_many(self, sql: str, rows: Sequence[Values]) -> int:
        with translated(self._path):
            return max(0, self._db.executemany(sql, rows).rowcount) if rows else 0

    def fetch(self, sql: str, values: Values = ()) -> list[tuple[Any, ...]]:
        with translated(self._path):
            return self._db.execute(sql, values).fetchall()

    def query(self, sql: str, values: Values = ()) -> Iterator[tuple[Any, ...]]:
        with translated(self._path):
            yield from self._db.execute(sql, values)

    def insert_spans(self, rows: Sequence[Row]) -> int:
        with translated(self._path):
            new = 0
            whole = len(rows) - len(rows) % _ROWS
            for at in range(0, whole, _ROWS):
                flat = list(chain.from_iterable(rows[at : at + _ROWS]))
                new += self._db.execute(_INSERT_ROWS, flat).rowcount
            if whole < len(rows):
                new += self._db.executemany(_INSERT_ONE, rows[whole:]).rowcount
            return new

    def attribute(self, key: str) -> tuple[str, tuple[str, ...]]:
        path = f'$."{key}"'
        # json_extract gives 1 for true
        text = "CASE json_type(attrs, ?) WHEN 'true' THEN 'true' WHEN 'false' THEN 'false'"
        return text + " ELSE CAST(json_extract(attrs, ?) AS TEXT) END", (path, path)

    def changed_elsewhere(self) -> bool:
        seen = int(self._db.execute("PRAGMA data_version").fetchone()[0])
        changed, self._seen = seen != self._seen, seen
        return changed

    def size_bytes(self) -> int:
        with translated(self._path):
            pages, free, size = (
                int(self._db.execute(f"PRAGMA {name}").fetchone()[0])
                for name in ("page_count", "freelist_count", "page_size")
            )
        return (pages - free) * size

    def scrub(self) -> None:
        with translated(self._path):
            # the pages of before lie in the log until it begins anew
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def interrupt(self) -> None:
        self._db.interrupt()

    def close(self) -> None:
        self._db.close()


def _version(db: sqlite3.Connection) -> int:
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version == 0 and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        return -1  # somebody else's database
    return version


def _check_version(db: sqlite3.Connection, path: Path) -> None:
    version = _version(db)
    if version != VERSION:
        raise InvalidArgument(
            f"{path} is not a TokenTrace store this version can read (schema {version}, ours is {VERSION})",
            hint="name another file with --store; the stream builds it again",
        )


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's and the file system's errors as ours."""
    try:
        yield
    except sqlite3.Error as exc:
        raise _mist_error(path, exc) from exc
    except OSError as exc:
        raise Refused(f"{path}: {exc.strerror or exc}", hint="name another file with --store") from exc


def _mist_error(path: Path, exc: sqlite3.Error) -> MistError:
    name = getattr(exc, "sqlite_errorname", "") or ""
    if name.startswith("SQLITE_FULL"):
        return StorageFull(f"{path}: the disk is full")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return Locked(f"{path} is locked by another process for more than {BUSY_S:g} s")
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")):
        return Refused(f"{path}: {exc}", hint="name another file with --store")
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return InvalidArgument(
            f"{path}: {exc}", hint="move it away and run `mist trace worker --until-end`: the stream builds it again"
        )
    return Unavailable(f"{path}: {exc}", retryable=False)
