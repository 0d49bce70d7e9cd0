"""The store in PostgreSQL (the extra `postgres`): for who outgrows one file. `postgresql://user@host/database?…`

The tables lie in the schema `mist_tokentrace` of that database, made when absent; the URL is libpq's, with everything it
can say (`sslmode`, `target_session_attrs`, several hosts). A password may stand in the URL's user part, PGPASSWORD or
the password file; messages never show it. Spans come in by COPY.

Writers take one advisory lock for the length of their transaction, as they would on the SQLite file: pages are applied
one after the other, so that totals can be read, changed and written. `synchronous_commit` is the server's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mist.errors import (
    InvalidArgument,
    Locked,
    MistError,
    NotAuthorised,
    NotFound,
    Refused,
    StorageFull,
    Unavailable,
)
from mist.protocol.url import redact
from mist.tools.tokentrace.driver import Values
from mist.tools.tokentrace.schema import COLUMNS, VERSION, statements
from mist.tools.tokentrace.spans import Row

SCHEMA = "mist_tokentrace"
LOCK_WAIT_S = 10
CONNECT_S = 10
_WRITERS = 0x6D697374  # the advisory lock's number: "mist"
_CURSOR_ROWS = 2000
_NAMES = ", ".join(COLUMNS)
_SIZED_ROWS = 1000
_ENTRIES_BYTES = 200
"""What a span takes beside its row: its entries in the indexes. The files say nothing of how much is kept: they do not shrink
when rows are deleted, and retention by their size would delete everything."""


class PostgresDriver:
    def __init__(self, url: str, db: Any) -> None:
        self.place = redact(url)
        self._db = db
        self._psycopg = _psycopg()

    @classmethod
    def open(cls, url: str) -> PostgresDriver:
        """For writing; the tables are made when absent. Raises NotAuthorised, Unavailable, InvalidArgument."""
        driver = cls._connected(url)
        try:
            driver.begin()
            try:
                version = driver._version()
                if version is None:
                    driver.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
                    for statement in statements("postgres"):
                        driver.execute(statement)
                    driver.execute("CREATE TABLE version (number INTEGER NOT NULL)")
                    driver.execute("INSERT INTO version VALUES (?)", (VERSION,))
                    version = VERSION
                driver.commit()
            except BaseException:
                driver.rollback()
                raise
            driver._check(version)
        except BaseException:
            driver.close()
            raise
        return driver

    @classmethod
    def read(cls, url: str) -> PostgresDriver:
        """For questions only. Raises NotFound when there is no store."""
        driver = cls._connected(url)
        try:
            version = driver._version()
            if version is None:
                raise NotFound(
                    f"no TokenTrace store in {driver.place}",
                    hint="`mist trace worker --until-end` builds it from the stream",
                )
            driver._check(version)
            driver.execute("SET default_transaction_read_only = on")
        except BaseException:
            driver.close()
            raise
        return driver

    @classmethod
    def _connected(cls, url: str) -> PostgresDriver:
        psycopg = _psycopg()
        place = redact(url)
        try:
            db = psycopg.connect(
                url, autocommit=True, connect_timeout=CONNECT_S, application_name="mist tokentrace",
                options=f"-c search_path={SCHEMA} -c lock_timeout={LOCK_WAIT_S}s -c client_min_messages=warning",
            )  # fmt: skip
        except psycopg.Error as exc:
            raise _mist_error(psycopg, place, exc) from exc
        return cls(url, db)

    def _version(self) -> int | None:
        with self._translated():
            row = self._db.execute("SELECT to_regclass(%s)", (f"{SCHEMA}.version",)).fetchone()
            if row[0] is None:
                return None
            return int(self._db.execute("SELECT number FROM version").fetchone()[0])

    def _check(self, version: int) -> None:
        if version != VERSION:
            raise InvalidArgument(
                f"the store in {self.place} is not one this version can read (schema {version}, ours is {VERSION})",
                hint="name another database with --store; the stream builds it again",
            )

    def begin(self) -> None:
        with self._translated():
            self._db.execute("BEGIN")
            try:
                self._db.execute("SELECT pg_advisory_xact_lock(%s)", (_WRITERS,))
            except BaseException:
                self._db.rollback()
                raise

    def commit(self) -> None:
        with self._translated():
            self._db.execute("COMMIT")

    def rollback(self) -> None:
        if not self._db.closed:
            with self._translated():
                self._db.rollback()

    def execute(self, sql: str, values: Values = ()) -> int:
        with self._translated():
            return int(self._db.execute(sql.replace("?", "%s"), values or None).rowcount)

    def execute_many(self, sql: str, rows: Sequence[Values]) -> int:
        if not rows:
            return 0
        with self._translated(), self._db.cursor() as cursor:
            cursor.executemany(sql.replace("?", "%s"), rows)
            return int(cursor.rowcount)

    def fetch(self, sql: str, values: Values = ()) -> list[tuple[Any, ...]]:
        with self._translated():
            found: list[tuple[Any, ...]] = self._db.execute(sql.replace("?", "%s"), values or None).fetchall()
            return found

    def query(self, sql: str, values: Values = ()) -> Iterator[tuple[Any, ...]]:
        # a cursor of the server: the client would else hold all of a large answer
        with self._translated(), self._db.transaction(), self._db.cursor(name="mist") as cursor:
            cursor.itersize = _CURSOR_ROWS
            cursor.execute(sql.replace("?", "%s"), values or None)
            yield from cursor

    def insert_spans(self, rows: Sequence[Row]) -> int:
        with self._translated(), self._db.cursor() as cursor:
            cursor.execute("CREATE TEMPORARY TABLE IF NOT EXISTS incoming (LIKE spans) ON COMMIT DELETE ROWS")
            cursor.execute("ALTER TABLE incoming DROP COLUMN IF EXISTS id")
            cursor.execute("TRUNCATE incoming")
            with cursor.copy(f"COPY incoming ({_NAMES}) FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
            cursor.execute(f"INSERT INTO spans ({_NAMES}) SELECT {_NAMES} FROM incoming ON CONFLICT DO NOTHING")
            return int(cursor.rowcount)

    def attribute(self, key: str) -> tuple[str, tuple[str, ...]]:
        return "(attrs::json ->> ?)", (key,)

    def changed_elsewhere(self) -> bool:
        return True  # what others committed is not told here: totals are read anew each time

    def size_bytes(self) -> int:
        with self._translated():
            others, spans, each = self._db.execute(
                "SELECT (SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0) FROM pg_class c JOIN pg_namespace n"
                " ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relkind = 'r' AND c.relname <> 'spans'),"
                " (SELECT count(*) FROM spans), (SELECT coalesce(avg(pg_column_size(s.*)), 0)"
                " FROM (SELECT * FROM spans ORDER BY id DESC LIMIT %s) AS s)",
                (SCHEMA, _SIZED_ROWS),
            ).fetchone()
            return int(others) + int(spans) * (int(each) + _ENTRIES_BYTES)

    def scrub(self) -> None:
        with self._translated():
            self._db.execute("VACUUM spans")

    def interrupt(self) -> None:
        self._db.cancel()

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._psycopg.Error as exc:
            raise _mist_error(self._psycopg, self.place, exc) from exc


def _mist_error(psycopg: Any, place: str, exc: Exception) -> MistError:
    errors = psycopg.errors
    text = " ".join(str(exc).split())[:200]
    if isinstance(
        exc, errors.InvalidPassword | errors.InvalidAuthorizationSpecification | errors.InsufficientPrivilege
    ):
        return NotAuthorised(f"{place}: {text}")
    if isinstance(exc, errors.LockNotAvailable | errors.DeadlockDetected | errors.QueryCanceled):
        return Locked(f"{place} is locked by another process for more than {LOCK_WAIT_S} s")
    if isinstance(exc, errors.DiskFull):
        return StorageFull(f"{place}: the disk is full")
    if isinstance(exc, errors.ReadOnlySqlTransaction | errors.UndefinedTable):
        return Refused(f"{place}: {text}", hint="name another database with --store")
    if "password authentication failed" in text or "no password supplied" in text:
        return NotAuthorised(f"{place}: {text}", hint="PGPASSWORD, a password file, or the URL's user part")
    if isinstance(exc, psycopg.OperationalError | psycopg.InterfaceError):
        return Unavailable(f"{place}: {text}")
    if isinstance(exc, psycopg.ProgrammingError) and "invalid" in text and "URI" in text:
        return InvalidArgument(f"{place}: {text}")
    return Unavailable(f"{place}: {text}", retryable=False)


def _psycopg() -> Any:
    try:
        import psycopg
    except ImportError as exc:
        raise InvalidArgument(
            "a store in PostgreSQL needs a package that is not installed (psycopg)",
            hint="pip install 'mist-stack[postgres]'",
        ) from exc
    return psycopg
