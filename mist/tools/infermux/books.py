"""The ledger's tables in one SQLite file, and what is done to them: reserve, settle, book. Synchronous; budgets.py has the thread.

`reservations` holds what is under way, `costs` what was spent by day, caller and model, `hours` all of it by the hour, `totals` what
each budget compares with its limit: for every key, team, project and everybody, by day, month and ever, what was spent and what is
reserved. All change in one transaction, so that a total is always the sum of the others; a budget that is made later knows what was
before.

Promises: a batch is one transaction, synced to the disk before `apply` returns; operations take effect in their order, so that no two can
have the same dollar, in this process or in another. Amounts are whole billionths of a US dollar.
"""

from __future__ import annotations

import datetime
import fcntl
import functools
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

from mist.errors import InvalidArgument, Locked, MistError, Refused, StorageFull, Unavailable
from mist.tools.infermux.chat import Caller
from mist.tools.infermux.settings import BudgetSettings, Period

VERSION = 2
BUSY_S = 10.0
_CELLS_MAX = 50_000
_NS = 1_000_000_000
_HOUR_NS = 3600 * _NS
_DAY_NS = 24 * _HOUR_NS

_TABLES = """\
CREATE TABLE reservations (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, time_ns INTEGER NOT NULL, key TEXT NOT NULL, team TEXT NOT NULL,
  project TEXT NOT NULL, env TEXT NOT NULL, provider TEXT NOT NULL, model TEXT NOT NULL, request TEXT NOT NULL,
  nano INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE costs (
  day TEXT, key TEXT, team TEXT, project TEXT, env TEXT, provider TEXT, model TEXT, calls INTEGER NOT NULL,
  tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, nano INTEGER NOT NULL, unknown INTEGER NOT NULL,
  estimated INTEGER NOT NULL, PRIMARY KEY (day, key, team, project, env, provider, model)) WITHOUT ROWID;
CREATE TABLE totals (
  kind TEXT, name TEXT, period TEXT, nano INTEGER NOT NULL, PRIMARY KEY (kind, name, period)) WITHOUT ROWID"""
_HOURS = """\
CREATE TABLE hours (
  hour INTEGER PRIMARY KEY, calls INTEGER NOT NULL, tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL,
  nano INTEGER NOT NULL, unknown INTEGER NOT NULL, estimated INTEGER NOT NULL)"""
"""Since the schema 2; `hour` counts from 1970. A file of schema 1 gets it empty."""
_MORE = (
    " ON CONFLICT DO UPDATE SET calls = calls + excluded.calls, tokens_in = tokens_in + excluded.tokens_in,"
    " tokens_out = tokens_out + excluded.tokens_out, nano = nano + excluded.nano, unknown = unknown + excluded.unknown,"
    " estimated = estimated + excluded.estimated"
)
_ADD_COST = "INSERT INTO costs VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)" + _MORE
_ADD_HOUR = "INSERT INTO hours VALUES (?,?,?,?,?,?,?)" + _MORE

Cell = tuple[str, str, str]
"""(kind, name, period): ("team", "build", "2026-11")."""


class Reservation(Struct, frozen=True, kw_only=True):
    """What a call may cost, taken out of its budgets until it is settled. `request` is the id of the request's envelope: by it
    a recorded answer is found when its process did not live to settle."""

    id: str
    owner: str
    time_ns: int
    caller: Caller
    provider: str
    model: str
    request: str
    nano: int


class Entry(Struct, frozen=True, kw_only=True):
    """What a call did cost. `nano` None = not known: it counts as nothing, and as one of `unknown`. `estimated`: nobody said what
    it cost, this is what it may have."""

    time_ns: int
    caller: Caller
    provider: str
    model: str
    tokens_in: int = 0
    tokens_out: int = 0
    nano: int | None = None
    estimated: bool = False


class Reserve(Struct, frozen=True, kw_only=True):
    """Take it out of these budgets, all or none. Those in `exempt` count it and do not refuse it."""

    reservation: Reservation
    budgets: Sequence[BudgetSettings]
    exempt: frozenset[str] = frozenset()


class Settle(Struct, frozen=True):
    """What was reserved is given back, and what it did cost is booked; None = nothing was asked. Doing it twice does nothing."""

    id: str
    entry: Entry | None


class Book(Struct, frozen=True):
    """A cost that nothing was reserved for."""

    entry: Entry


class Outcome(Struct, frozen=True):
    """`refused`: by this budget, of which `used` was used. `alerts`: the budgets whose limit was passed just now."""

    refused: BudgetSettings | None = None
    used: int = 0
    alerts: tuple[BudgetSettings, ...] = ()


Operation = Reserve | Settle | Book
GRANTED = Outcome()


class Books:
    """One open file. Of one thread."""

    def __init__(self, path: Path, db: sqlite3.Connection, lock: int) -> None:
        self.path = path
        self._db = db
        self._lock = lock
        self._cells: dict[Cell, int] = {}
        self._seen = -1
        """SQLite's number for what others have committed: while it stands, our cells are right."""
        self._ours: dict[str, Reservation] = {}
        """Reservations as they lie in the file, as far as we know them."""

    @classmethod
    def open(cls, path: Path) -> Books:
        """Made when absent, with its directory. Raises InvalidArgument for a file that is no ledger."""
        with translated(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # SQLite's own waiting for a busy file is by polling, and starves one of several writers
            lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            except BaseException:
                os.close(lock)
                raise
            books = cls(path, db, lock)
            try:
                with books._locked():
                    db.execute("PRAGMA journal_mode=WAL")
                    db.execute("PRAGMA synchronous=FULL")
                    db.execute("BEGIN IMMEDIATE")
                    version = int(db.execute("PRAGMA user_version").fetchone()[0])
                    if version == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                        for statement in _TABLES.split(";"):
                            db.execute(statement)
                        version = 1
                    if version == 1:
                        db.execute(_HOURS)
                        db.execute(f"PRAGMA user_version={VERSION}")
                        version = VERSION
                    db.execute("COMMIT")
                if version != VERSION:
                    raise InvalidArgument(
                        f"{path} is not a ledger this version can read (schema {version}, ours is {VERSION})",
                        hint="name another file: store in [infermux]",
                    )
            except BaseException:
                books.close()
                raise
        return books

    def apply(self, operations: Sequence[Operation]) -> list[Outcome]:
        """All of it, in one transaction. Raises StorageFull, Locked …: nothing of it was done then."""
        with translated(self.path), self._locked():
            batch = _Batch(self)
            before = dict(self._ours)
            try:
                self._db.execute("BEGIN IMMEDIATE")
                seen = int(self._db.execute("PRAGMA data_version").fetchone()[0])
                if seen != self._seen or len(self._cells) > _CELLS_MAX:
                    self._cells.clear()
                    self._ours.clear()
                    self._seen = seen
                outcomes = [batch.run(operation) for operation in operations]
                batch.write(self._db)
                self._db.execute("COMMIT")
            except BaseException:
                self._cells.clear()
                self._ours = before
                if self._db.in_transaction:  # a full disk has rolled back already
                    self._db.execute("ROLLBACK")
                raise
        return outcomes

    def cell(self, cell: Cell) -> int:
        found = self._cells.get(cell)
        if found is None:
            row = self._db.execute(
                "SELECT nano FROM totals WHERE kind = ? AND name = ? AND period = ?", cell
            ).fetchone()
            found = self._cells[cell] = row[0] if row else 0
        return found

    def reserved(self, id: str) -> Reservation | None:
        """What is reserved under that id, by whomever."""
        if id in self._ours:
            return self._ours[id]
        rows = self._db.execute("SELECT * FROM reservations WHERE id = ?", (id,)).fetchall()
        return _reservation(rows[0]) if rows else None

    def owners(self) -> list[str]:
        """Who has reserved anything."""
        return [str(row[0]) for row in self.fetch("SELECT DISTINCT owner FROM reservations")]

    def of_owner(self, owner: str) -> list[Reservation]:
        return [_reservation(row) for row in self.fetch("SELECT * FROM reservations WHERE owner = ?", (owner,))]

    def fetch(self, sql: str, values: Sequence[str | int] = ()) -> list[tuple[Any, ...]]:
        """Ask what is committed, from any thread: by a connection of its own."""
        with translated(self.path):
            uri = f"{self.path.resolve().as_uri()}?mode=ro"
            db = sqlite3.connect(uri, uri=True, timeout=BUSY_S)
            try:
                return db.execute(sql, values).fetchall()
            finally:
                db.close()

    def close(self) -> None:
        self._db.close()
        os.close(self._lock)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)


class _Batch:
    """The changes of one transaction, added up before they are written."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._changed: set[Cell] = set()
        self._new: dict[str, Reservation] = {}
        self._gone: set[str] = set()
        self._costs: defaultdict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * 6)
        self._hours: defaultdict[int, list[int]] = defaultdict(lambda: [0] * 6)

    def run(self, operation: Operation) -> Outcome:
        if isinstance(operation, Reserve):
            return self._reserve(operation)
        if isinstance(operation, Settle):
            self._settle(operation)
        else:
            self._book(operation.entry)
        return GRANTED

    def _reserve(self, wanted: Reserve) -> Outcome:
        reservation = wanted.reservation
        alerts = []
        for budget in wanted.budgets:
            used = self._books.cell(cell_of(budget, reservation.caller, reservation.time_ns))
            if used + reservation.nano <= budget.limit_nano or budget.name in wanted.exempt:
                continue
            if budget.action != "alert":
                return Outcome(budget, used)
            if used <= budget.limit_nano:
                alerts.append(budget)
        self._add(reservation.caller, reservation.time_ns, reservation.nano)
        self._new[reservation.id] = self._books._ours[reservation.id] = reservation
        return Outcome(None, 0, tuple(alerts))

    def _settle(self, settled: Settle) -> None:
        reservation = None if settled.id in self._gone else self._books.reserved(settled.id)
        if reservation is None:
            return
        self._books._ours.pop(settled.id, None)
        if self._new.pop(settled.id, None) is None:
            self._gone.add(settled.id)
        cost = (settled.entry.nano or 0) if settled.entry is not None else 0
        # in the period it was reserved in: what a budget granted stays in that budget
        self._add(reservation.caller, reservation.time_ns, cost - reservation.nano)
        if settled.entry is not None:
            self._count(settled.entry, reservation.time_ns)

    def _book(self, entry: Entry) -> None:
        self._add(entry.caller, entry.time_ns, entry.nano or 0)
        self._count(entry, entry.time_ns)

    def _add(self, caller: Caller, time_ns: int, nano: int) -> None:
        if not nano:
            return
        cells = self._books._cells
        for cell in cells_of(caller, time_ns):
            cells[cell] = self._books.cell(cell) + nano
            self._changed.add(cell)

    def _count(self, entry: Entry, time_ns: int) -> None:
        who = entry.caller
        row = self._costs[day_of(time_ns), who.key, who.team, who.project, who.env, entry.provider, entry.model]
        hour = self._hours[hour_of(time_ns)]
        new = (1, entry.tokens_in, entry.tokens_out, entry.nano or 0, entry.nano is None, entry.estimated)
        for at, number in enumerate(new):
            row[at] += number
            hour[at] += number

    def write(self, db: sqlite3.Connection) -> None:
        if self._gone:
            db.executemany("DELETE FROM reservations WHERE id = ?", [(id,) for id in self._gone])
        if self._new:
            rows = [
                (r.id, r.owner, r.time_ns, r.caller.key, r.caller.team, r.caller.project, r.caller.env, r.provider, r.model,
                 r.request, r.nano)
                for r in self._new.values()
            ]  # fmt: skip
            db.executemany("INSERT INTO reservations VALUES (?,?,?,?,?,?,?,?,?,?,?)", rows)
        if self._changed:
            cells = [(*cell, self._books._cells[cell]) for cell in self._changed]
            db.executemany("INSERT INTO totals VALUES (?,?,?,?) ON CONFLICT DO UPDATE SET nano = excluded.nano", cells)
        if self._costs:
            db.executemany(_ADD_COST, [(*key, *row) for key, row in self._costs.items()])
            db.executemany(_ADD_HOUR, [(hour, *row) for hour, row in self._hours.items()])


def _reservation(row: Sequence[str | int]) -> Reservation:
    id, owner, time_ns, key, team, project, env, provider, model, request, nano = row
    return Reservation(
        id=str(id), owner=str(owner), time_ns=int(time_ns),
        caller=Caller(key=str(key), team=str(team), project=str(project), env=str(env)),
        provider=str(provider), model=str(model), request=str(request), nano=int(nano),
    )  # fmt: skip


def hour_of(time_ns: int) -> int:
    """Counted from 1970."""
    return time_ns // _HOUR_NS


def day_of(time_ns: int) -> str:
    return _day(time_ns // _DAY_NS)


@functools.lru_cache(maxsize=64)
def _day(number: int) -> str:
    return datetime.datetime.fromtimestamp(number * 86_400, datetime.UTC).strftime("%Y-%m-%d")


def period_of(period: Period, time_ns: int) -> str:
    """The name of the period in force: 2026-11-25, 2026-11, or nothing for ever."""
    return {"day": day_of(time_ns), "month": day_of(time_ns)[:7], "total": ""}[period]


def ends_in_s(period: Period, time_ns: int) -> float | None:
    """How long until a new period begins; None = never."""
    if period == "total":
        return None
    now = datetime.datetime.fromtimestamp(time_ns // _NS, datetime.UTC)
    midnight = now.replace(hour=0, minute=0, second=0)
    if period == "day":
        end = midnight + datetime.timedelta(days=1)
    else:
        end = (midnight.replace(day=1) + datetime.timedelta(days=32)).replace(day=1)
    return (end - now).total_seconds()


def cells_of(caller: Caller, time_ns: int) -> Iterable[Cell]:
    day = day_of(time_ns)
    names = (("key", caller.key), ("team", caller.team), ("project", caller.project), ("all", ""))
    return [(kind, name, period) for kind, name in names for period in (day, day[:7], "")]


def cell_of(budget: BudgetSettings, caller: Caller, time_ns: int) -> Cell:
    """What a budget compares with its limit, for a caller that it applies to."""
    kind, _ = budget.scope
    return kind, named(kind, caller), period_of(budget.period, time_ns)


def named(kind: str, caller: Caller) -> str:
    return str(getattr(caller, kind)) if kind != "all" else ""


def applies(budget: BudgetSettings, caller: Caller) -> bool:
    kind, of = budget.scope
    return of in ("*", "") or named(kind, caller) == of


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's and the file system's errors as ours."""
    try:
        yield
    except sqlite3.Error as exc:
        raise _mist_error(path, exc) from exc
    except OSError as exc:
        raise Refused(f"{path}: {exc.strerror or exc}", hint="name another file: store in [infermux]") from exc


def _mist_error(path: Path, exc: sqlite3.Error) -> MistError:
    name = str(getattr(exc, "sqlite_errorname", "") or "")
    if name.startswith("SQLITE_FULL"):
        return StorageFull(f"{path}: the disk is full")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return Locked(f"{path} is held by another program for more than {BUSY_S:g} s")
    if name.startswith("SQLITE_NOTADB"):
        return InvalidArgument(f"{path} is no ledger: {exc}", hint="name another file: store in [infermux]")
    return Unavailable(f"{path}: {exc}")
