"""The TokenTrace store: one SQLite file (WAL) that holds spans *and* the position they came from.

Promises: `apply` stores a page's rows, its refusals and the new position in one transaction, and only if the position
is still the one the page was read after; so whatever dies at whatever instant, and however many ingests share the
file, every record has its effect once. A span is known by (trace_id, span_id), the first one stays. `applied` (only
where asked for) is an append-only record of every row handed to the store, without any uniqueness, from which a judge
can see a record applied twice.

`synchronous=NORMAL`: a power cut may take the last transactions back, position and rows together; they are then read
from the stream again. The stream is the durable copy, this file can be deleted and built again.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from msgspec import Struct

from mist.errors import InvalidArgument, Locked, MistError, NotFound, Refused, StorageFull, Unavailable
from mist.tools.tokentrace.spans import SpanRow

VERSION = 1
QUARANTINE_BYTES_MAX = 4096
"""So much of a refused record is kept here; all of it stays in the stream."""
_BUSY_S = 10.0

_SCHEMA = """
CREATE TABLE spans (
  trace_id TEXT NOT NULL, span_id TEXT NOT NULL, parent_id TEXT NOT NULL, source TEXT NOT NULL,
  operation TEXT NOT NULL, status TEXT NOT NULL, model TEXT, provider TEXT, start_ns INTEGER, end_ns INTEGER,
  latency_ms REAL, tokens_in INTEGER, tokens_out INTEGER, cost_usd REAL, attrs TEXT NOT NULL, sequence INTEGER NOT NULL
);
CREATE UNIQUE INDEX spans_id ON spans (trace_id, span_id);
CREATE INDEX spans_start ON spans (start_ns);
CREATE INDEX spans_failed ON spans (start_ns) WHERE status NOT IN ('', 'ok');
CREATE TABLE position (
  stream TEXT PRIMARY KEY, incarnation TEXT NOT NULL, sequence INTEGER NOT NULL, time_ns INTEGER NOT NULL
);
CREATE TABLE quarantine (
  stream TEXT NOT NULL, incarnation TEXT NOT NULL, sequence INTEGER NOT NULL, time_ns INTEGER NOT NULL,
  reason TEXT NOT NULL, subject TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (stream, incarnation, sequence)
) WITHOUT ROWID;
CREATE TABLE gaps (
  stream TEXT NOT NULL, incarnation TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
  time_ns INTEGER NOT NULL, reason TEXT NOT NULL
);
CREATE TABLE applied (sequence INTEGER NOT NULL, trace_id TEXT NOT NULL, span_id TEXT NOT NULL, worker TEXT NOT NULL);
CREATE TRIGGER applied_stays BEFORE UPDATE ON applied BEGIN SELECT RAISE(ABORT, 'applied is append-only'); END;
CREATE TRIGGER applied_keeps BEFORE DELETE ON applied BEGIN SELECT RAISE(ABORT, 'applied is append-only'); END;
"""

_INSERT = f"INSERT INTO spans VALUES ({','.join('?' * len(SpanRow._fields))}) ON CONFLICT DO NOTHING"


class Position(Struct, frozen=True):
    """Everything up to `sequence` of this incarnation of the stream is in the store."""

    stream: str
    incarnation: str
    sequence: int


class Refusal(Struct, frozen=True):
    """A record that did not become a span."""

    sequence: int
    time_ns: int
    reason: str
    subject: str
    data: bytes


class Gap(Struct, frozen=True):
    """Records first..last of the stream could not be had any more."""

    first: int
    last: int
    reason: str


class Batch(Struct, frozen=True, kw_only=True):
    """What one page of the stream does to the store. `after` is the position it was read from."""

    after: int
    scanned: int
    rows: Sequence[SpanRow] = ()
    refused: Sequence[Refusal] = ()
    gaps: Sequence[Gap] = ()


class PositionMoved(Exception):
    """Another ingest was faster: nothing was stored, read again from the store's position."""


class Store:
    """One open store. Not for two threads at once; many processes may open the file."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path = path
        self._db = db

    @classmethod
    def open(cls, path: Path | str) -> Store:
        """Open for ingest, made when absent, with its directory. Raises InvalidArgument for a file that is no store."""
        path = Path(path)
        with _translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=NORMAL")
                db.execute("PRAGMA cache_size=-65536")
                db.execute("BEGIN IMMEDIATE")
                if _version(db) == 0:
                    for statement in _statements():
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version={VERSION}")
                db.execute("COMMIT")
                _check_version(db, path)
            except BaseException:
                db.close()
                raise
        return cls(path, db)

    @classmethod
    def read(cls, path: Path | str) -> Store:
        """Open for questions only; never makes or changes anything. Raises NotFound when there is no store."""
        path = Path(path)
        if not path.is_file():
            raise NotFound(
                f"no TokenTrace store at {path}", hint="`mist trace worker --until-end` builds it from the stream"
            )
        with _translated(path):
            uri = f"{path.resolve().as_uri()}?mode=ro"
            db = sqlite3.connect(uri, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                _check_version(db, path)
            except BaseException:
                db.close()
                raise
        return cls(path, db)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def position(self, stream: str) -> Position | None:
        """Where the store stands in that stream."""
        row = self.one("SELECT stream, incarnation, sequence FROM position WHERE stream = ?", (stream,))
        return Position(*row) if row else None

    def forget(self, stream: str) -> None:
        """Drop the position (spans stay): the next ingest begins anew. For a stream that was made again."""
        with _translated(self.path):
            self._db.execute("DELETE FROM position WHERE stream = ?", (stream,))

    def apply(self, stream: str, incarnation: str, batch: Batch, *, record: str = "") -> int:
        """One transaction: rows, refusals, gaps and the position. Returns how many spans are new.

        Raises PositionMoved when the store no longer stands at `batch.after`. `record` names the worker in the
        append-only table `applied`; empty = the table is not written.
        """
        db, now = self._db, time.time_ns()
        with _translated(self.path):
            db.execute("BEGIN IMMEDIATE")
            try:
                row = db.execute(
                    "SELECT sequence FROM position WHERE stream = ? AND incarnation = ?", (stream, incarnation)
                ).fetchone()
                if (row[0] if row else batch.after) != batch.after:
                    raise PositionMoved
                new = db.executemany(_INSERT, batch.rows).rowcount if batch.rows else 0
                if record:
                    db.executemany(
                        "INSERT INTO applied VALUES (?, ?, ?, ?)",
                        [(r.sequence, r.trace_id, r.span_id, record) for r in batch.rows],
                    )
                db.executemany(
                    "INSERT OR IGNORE INTO quarantine VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [
                        (stream, incarnation, r.sequence, r.time_ns, r.reason, r.subject, r.data[:QUARANTINE_BYTES_MAX])
                        for r in batch.refused
                    ],
                )
                db.executemany(
                    "INSERT INTO gaps VALUES (?, ?, ?, ?, ?, ?)",
                    [(stream, incarnation, g.first, g.last, now, g.reason) for g in batch.gaps],
                )
                db.execute(
                    "INSERT OR REPLACE INTO position VALUES (?, ?, ?, ?)", (stream, incarnation, batch.scanned, now)
                )
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # a full disk has rolled back already
                    db.execute("ROLLBACK")
                raise
        return max(new, 0)

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> Generator[tuple[Any, ...], None, None]:
        """Rows of a question, as they come. To be read to its end or closed before the store is."""
        with _translated(self.path):
            yield from self._db.execute(sql, parameters)

    def one(self, sql: str, parameters: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        with _translated(self.path):
            row: tuple[Any, ...] | None = self._db.execute(sql, parameters).fetchone()
            return row

    def count(self, table: str = "spans") -> int:
        row = self.one(f"SELECT count(*) FROM {table}")
        return int(row[0]) if row else 0


def _statements() -> Iterator[str]:
    # executescript would commit the transaction that makes two first openers safe
    statement = ""
    for line in _SCHEMA.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


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
def _translated(path: Path) -> Iterator[None]:
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
        return Locked(f"{path} is locked by another process for more than {_BUSY_S:g} s")
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")):
        return Refused(f"{path}: {exc}", hint="name another file with --store")
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return InvalidArgument(
            f"{path}: {exc}", hint="move it away and run `mist trace worker --until-end`: the stream builds it again"
        )
    return Unavailable(f"{path}: {exc}", retryable=False)
