"""The TokenTrace store: spans, what follows from them, *and* the position they came from, in one database.

Promises: `apply` stores a page's rows, their part of the totals, its refusals and the new position in one transaction,
and only if the position is still the one the page was read after; so whatever dies at whatever instant, and however
many ingests share the store, every record has its effect once. A span is known by (trace_id, span_id), the first one
stays. Totals (`rollups`) are sums and sketches that do not depend on the order of things: a store that is built again
from the same records gives the same answers, and an erased span is taken out of them again.

The stream is the durable copy: a store can be deleted and built again (`rebuilding`), all at once or not at all.
Two databases: an SQLite file, the default, and PostgreSQL (`postgresql://…`) for who outgrows it; the statements are
these, the differences lie in their drivers. A Store is not for two threads at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from msgspec import Struct

from mist.errors import Internal, InvalidArgument
from mist.kit.prices import Prices
from mist.tools.tokentrace.driver import Driver, Values
from mist.tools.tokentrace.rollup import OTHER, STEPS, Cell, Minutes, Series, cells_by_minute, coarser
from mist.tools.tokentrace.schema import COLUMNS, DERIVED
from mist.tools.tokentrace.spans import Row, SpanRow, cached_tokens

QUARANTINE_BYTES_MAX = 4096
"""So much of a refused record is kept here; all of it stays in the stream."""
SERIES_MAX = 2000
"""So many (operation, model, provider) one tenant may have totals of; what comes later is counted as OTHER."""
TENANTS_SERIES_MAX = 50_000
"""The same for all tenants together."""
KEPT_FROM = "kept_from_ns"
"""The state that says up to which time retention has deleted spans and their minutes."""
_CHUNK = 2000
_RETAINED_MIN = 10
"""So many spans go at least when the store is too large: the last step must not take a transaction for each."""
_TRACE, _SPAN, _SEQUENCE = (COLUMNS.index(name) for name in ("trace_id", "span_id", "sequence"))


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
    rows: Sequence[Row] = ()
    """Their sequences differ."""
    minutes: Minutes | None = None
    """What all rows add to the totals, where that was worked out beforehand."""
    refused: Sequence[Refusal] = ()
    gaps: Sequence[Gap] = ()
    other: int = 0
    """Records of other types, which were passed over."""


class Selector(Struct, frozen=True, kw_only=True):
    """Whose spans: those of one trace, one user, or one tenant. Exactly one is given."""

    trace_id: str = ""
    user: str = ""
    tenant: str = ""

    def __post_init__(self) -> None:
        if sum(bool(v) for v in (self.trace_id, self.user, self.tenant)) != 1:
            raise InvalidArgument("name one trace, one user or one tenant")

    def condition(self) -> tuple[str, str]:
        """(SQL condition with one parameter, the parameter)."""
        if self.trace_id:
            return "trace_id = ?", self.trace_id
        return ("user_id = ?", self.user) if self.user else ("tenant = ?", self.tenant)


class PositionMoved(Exception):
    """Another ingest was faster: nothing was stored, read again from the store's position."""


class Store:
    """One open store; `place` says where, without a password."""

    def __init__(self, driver: Driver) -> None:
        self.place = driver.place
        self._db = driver
        self._depth = 0
        self._broken = False
        self._series: set[Series] = set()
        # of the page in hand and of the one before: a cell holds up to 100 KB of sketches
        self._cells: dict[tuple[int, int, Series], Cell] = {}
        self._older: dict[tuple[int, int, Series], Cell] = {}

    @classmethod
    def open(cls, place: Path | str) -> Store:
        """Open for ingest, made when absent. `place` is a file, or a `postgresql://` URL.

        Raises InvalidArgument for what is no store of ours, Refused or Unavailable where it cannot be reached.
        """
        return cls._connect(place, writing=True)

    @classmethod
    def read(cls, place: Path | str) -> Store:
        """Open for questions only; never makes or changes anything. Raises NotFound when there is no store."""
        return cls._connect(place, writing=False)

    @classmethod
    def _connect(cls, place: Path | str, *, writing: bool) -> Store:
        if isinstance(place, str) and place.startswith(("postgresql://", "postgres://")):
            from mist.tools.tokentrace.postgres import PostgresDriver

            return cls(PostgresDriver.open(place) if writing else PostgresDriver.read(place))
        from mist.tools.tokentrace.sqlite import SqliteDriver

        path = Path(place)
        return cls(SqliteDriver.open(path) if writing else SqliteDriver.read(path))

    def close(self) -> None:
        self._db.close()

    def interrupt(self) -> None:
        """Make the statement that runs in another thread fail. The one thing that may be called from outside."""
        self._db.interrupt()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # ----------------------------------------------------------------- transactions

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing; one inside another belongs to it."""
        if self._depth == 0:
            self._db.begin()
            self._broken = False
        self._depth += 1
        try:
            if self._depth == 1 and self._db.changed_elsewhere():
                self._forget_cache()
            yield
        except BaseException:
            self._depth -= 1
            self._forget_cache()
            self._broken = True  # what failed inside may be half done: the whole cannot be kept
            if self._depth == 0:
                self._db.rollback()
            raise
        self._depth -= 1
        if self._depth == 0:
            try:
                if self._broken:
                    raise Internal("a part of this transaction failed: it cannot be kept")
                self._db.commit()
            except BaseException:
                self._forget_cache()
                self._db.rollback()
                raise

    def _forget_cache(self) -> None:
        self._cells.clear()
        self._older.clear()
        self._series.clear()

    def query(self, sql: str, values: Values = ()) -> Iterator[tuple[Any, ...]]:
        """Rows of a question, as they come. To be read to its end or closed before the store is."""
        return self._db.query(sql, values)

    def one(self, sql: str, values: Values = ()) -> tuple[Any, ...] | None:
        return next(iter(self._db.fetch(sql, values)), None)

    def count(self, table: str = "spans") -> int:
        row = self.one(f"SELECT count(*) FROM {table}")
        return int(row[0]) if row else 0

    def attribute(self, key: str) -> tuple[str, tuple[str, ...]]:
        """The SQL expression of an attribute as text, and its parameters."""
        return self._db.attribute(key)

    # ----------------------------------------------------------------- ingest

    def position(self, stream: str) -> Position | None:
        """Where the store stands in that stream."""
        row = self.one("SELECT stream, incarnation, sequence FROM position WHERE stream = ?", (stream,))
        return Position(*row) if row else None

    def streams(self) -> set[str]:
        """The streams whose records are in the store."""
        return {str(row[0]) for row in self._db.fetch("SELECT stream FROM position")}

    def forget(self, stream: str) -> None:
        """Drop the position (spans stay): the next ingest begins anew. For a stream that was made again."""
        with self._transaction():
            self._db.execute("DELETE FROM position WHERE stream = ?", (stream,))

    def apply(self, stream: str, incarnation: str, batch: Batch, *, record: str = "") -> int:
        """One transaction: rows, totals, refusals, gaps and the position. Returns how many spans are new.

        Raises PositionMoved when the store no longer stands at `batch.after`. `record` names the worker in the
        append-only table `applied`; empty = the table is not written.
        """
        db, now = self._db, time.time_ns()
        with self._transaction():
            row = self.one("SELECT sequence FROM position WHERE stream = ? AND incarnation = ?", (stream, incarnation))
            if (row[0] if row else batch.after) != batch.after:
                raise PositionMoved
            new = self._insert(batch) if batch.rows else 0
            if record:
                db.execute_many(
                    "INSERT INTO applied VALUES (?, ?, ?, ?)",
                    [(row[_SEQUENCE], row[_TRACE], row[_SPAN], record) for row in batch.rows],
                )
            db.execute_many(
                "INSERT INTO quarantine VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                [
                    (stream, incarnation, r.sequence, r.time_ns, r.reason, r.subject, r.data[:QUARANTINE_BYTES_MAX])
                    for r in batch.refused
                ],
            )
            db.execute_many(
                "INSERT INTO gaps VALUES (?, ?, ?, ?, ?, ?)",
                [(stream, incarnation, g.first, g.last, now, g.reason) for g in batch.gaps],
            )
            db.execute(
                "INSERT INTO position VALUES (?, ?, ?, ?) ON CONFLICT (stream) DO UPDATE SET"
                " incarnation = excluded.incarnation, sequence = excluded.sequence, time_ns = excluded.time_ns",
                (stream, incarnation, batch.scanned, now),
            )
        return new

    def _insert(self, batch: Batch) -> int:
        """Insert what is new and count it in; how many that were."""
        rows = batch.rows
        (last,) = self._db.fetch("SELECT coalesce(max(id), 0) FROM spans")[0]
        new = self._db.insert_spans(rows)
        if new == len(rows):
            self._add(cells_by_minute(rows) if batch.minutes is None else batch.minutes)
        else:
            # some were there already: which ones decides what the totals gain
            stored = {row[0] for row in self._db.fetch("SELECT sequence FROM spans WHERE id > ?", (last,))}
            fresh = [row for row in rows if row[_SEQUENCE] in stored]
            if len(fresh) != new:
                raise Internal("two rows of a page have one sequence: their totals would be wrong")
            self._add(cells_by_minute(fresh))
        return new

    # ----------------------------------------------------------------- totals

    def _add(self, minutes: Minutes, sign: int = 1) -> None:
        """Merge what rows add (or, with -1, take away) into the cells of every width."""
        if not minutes:
            return
        self._older, self._cells = self._cells, {}
        capped = self._capped(minutes)
        changed: list[tuple[Any, ...]] = []
        emptied: list[tuple[Any, ...]] = []
        for step in STEPS:
            for (at, series), more in coarser(capped, step).items():
                cell = self._cell(step, at, series)
                cell.merge(more, sign)
                if cell.spans:
                    changed.append((step, at, *series, cell.spans, cell.failed, cell.timeouts, cell.pack()))
                else:
                    emptied.append((step, at, *series))
                    self._cells.pop((step, at, series), None)
        self._db.execute_many(
            "INSERT INTO rollups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (step, at, tenant, operation, model, provider) DO UPDATE SET spans = excluded.spans,"
            " failed = excluded.failed, timeouts = excluded.timeouts, measures = excluded.measures",
            changed,
        )
        self._db.execute_many(
            "DELETE FROM rollups WHERE step = ? AND at = ? AND tenant = ? AND operation = ? AND model = ?"
            " AND provider = ?",
            emptied,
        )

    def _cell(self, step: int, at: int, series: Series) -> Cell:
        """The cell as it stands, for the writing transaction. Kept for the next page as long as nobody else writes."""
        key = (step, at, series)
        cell = self._cells.get(key) or self._older.get(key)
        if cell is None:
            row = self.one(
                "SELECT spans, failed, timeouts, measures FROM rollups WHERE step = ? AND at = ? AND tenant = ?"
                " AND operation = ? AND model = ? AND provider = ?",
                (step, at, *series),
            )
            cell = Cell.unpack(row[0], row[1], row[2], bytes(row[3])) if row else Cell()
        self._cells[key] = cell
        return cell

    def _capped(self, minutes: Minutes) -> Minutes:
        """With series beyond the caps as OTHER: what comes from outside must not make totals without end."""
        names = {series for _, series in minutes}
        if not names <= self._series:
            self._series = {
                Series(*row) for row in self._db.fetch("SELECT tenant, operation, model, provider FROM series")
            }
            per_tenant: dict[str, int] = {}
            for series in self._series:
                per_tenant[series.tenant] = per_tenant.get(series.tenant, 0) + 1
            added = []
            for _, series in minutes:
                mine = per_tenant.get(series.tenant, 0)
                if series in self._series or mine >= SERIES_MAX or len(self._series) >= TENANTS_SERIES_MAX:
                    continue
                per_tenant[series.tenant] = mine + 1
                self._series.add(series)
                added.append(series)
            self._db.execute_many("INSERT INTO series VALUES (?, ?, ?, ?)", added)
            if names <= self._series:
                return minutes
            known_tenants = set(per_tenant)
            out: Minutes = {}
            for (at, series), cell in minutes.items():
                if series not in self._series:
                    tenant = series.tenant if series.tenant in known_tenants else OTHER
                    series = Series(tenant, OTHER, OTHER, OTHER)
                out.setdefault((at, series), Cell()).merge(cell)
            return out
        return minutes

    # ----------------------------------------------------------------- what changes spans afterwards

    @contextmanager
    def rebuilding(self) -> Iterator[None]:
        """Inside: the store is empty and `apply` fills it anew from the stream's beginning. All of it becomes visible
        at once at the end; an error or a crash leaves what was before. `applied` stays, and so does what others saved."""
        with self._transaction():
            self._forget_cache()
            for table in DERIVED:
                self._db.execute(f"DELETE FROM {table}")
            self._db.execute("DELETE FROM state WHERE name = ?", (KEPT_FROM,))
            yield

    def erase(self, selector: Selector, *, stream: str = "", sequences: Sequence[int] = ()) -> int:
        """Delete the spans of a trace, user or tenant, their part of the totals, and what quarantine holds of these
        sequences of the stream. Returns how many spans were deleted."""
        condition, value = selector.condition()
        erased = 0
        with self._transaction():
            while rows := self._rows(f"{condition} ORDER BY id", (value,), _CHUNK):
                self._delete(rows)
                self._add(cells_by_minute([row for _, row in rows]), -1)
                erased += len(rows)
            self._db.execute_many(
                "DELETE FROM quarantine WHERE stream = ? AND sequence = ?", [(stream, s) for s in sequences]
            )
        self._db.scrub()
        return erased

    def retain(self, *, before_ns: int | None = None, bytes_max: int | None = None, limit: int = 10_000) -> int:
        """Delete up to `limit` of the oldest spans: those that began before a time, or any while the store is larger
        than `bytes_max`. Totals of hours, days and of everything stay; those of minutes go with their spans. Returns how
        many were deleted: call again until it is 0."""
        if bytes_max is not None:
            size = self._db.size_bytes()
            if size > bytes_max:
                # as many as take up what is too much: a store of few large spans would else be emptied
                limit = min(limit, max(_RETAINED_MIN, self.count() * (size - bytes_max) // size))
            else:
                bytes_max = None
        if before_ns is None and bytes_max is None:
            return 0
        with self._transaction():
            condition, values = ("time_ns < ?", (before_ns,)) if bytes_max is None else ("1 = 1", ())
            found = list(self._db.fetch(
                f"SELECT id, time_ns FROM spans WHERE {condition} ORDER BY time_ns, sequence, id LIMIT {int(limit)}", values
            ))  # fmt: skip
            if not found:
                return 0
            self._db.execute_many("DELETE FROM spans WHERE id = ?", [(row[0],) for row in found])
            newest = int(found[-1][1])
            self._forget_cache()
            self._db.execute("DELETE FROM rollups WHERE step = 60 AND at < ?", (newest // 1_000_000_000 // 60 * 60,))
            self.save(KEPT_FROM, b"%d" % max(newest, int(self.load(KEPT_FROM) or b"0")))
        return len(found)

    def reprice(self, prices: Prices) -> int:
        """Costs that a price table made, or that were unknown, made again by this one; totals follow. What a span stated
        itself stays. One transaction. Returns how many spans changed."""
        changed, last = 0, 0
        with self._transaction():
            while True:
                rows = self._rows(
                    "id > ? AND model IS NOT NULL AND (cost_usd IS NULL OR price IS NOT NULL) ORDER BY id",
                    (last,), _CHUNK,
                )  # fmt: skip
                if not rows:
                    return changed
                last = rows[-1][0]
                old, new, updates = [], [], []
                for number, row in rows:
                    cost = prices.cost_usd(
                        provider=row.provider or "", model=row.model or "", time_ns=row.time_ns,
                        tokens_in=row.tokens_in, tokens_out=row.tokens_out, tokens_cached=cached_tokens(row.attrs),
                    )  # fmt: skip
                    version = None if cost is None else prices.version
                    if (cost, version) != (row.cost_usd, row.price):
                        old.append(row)
                        new.append(row._replace(cost_usd=cost, price=version))
                        updates.append((cost, version, number))
                self._db.execute_many("UPDATE spans SET cost_usd = ?, price = ? WHERE id = ?", updates)
                self._add(cells_by_minute(new))
                self._add(cells_by_minute(old), -1)
                changed += len(updates)

    def _rows(self, rest: str, values: Values, limit: int) -> list[tuple[int, SpanRow]]:
        found = self._db.fetch(f"SELECT id, {', '.join(COLUMNS)} FROM spans WHERE {rest} LIMIT {int(limit)}", values)
        return [(row[0], SpanRow(*row[1:])) for row in found]

    def _delete(self, rows: Iterable[tuple[int, SpanRow]]) -> None:
        self._db.execute_many("DELETE FROM spans WHERE id = ?", [(number,) for number, _ in rows])

    # ----------------------------------------------------------------- small state

    def load(self, name: str) -> bytes | None:
        """What a part of the tool saved under a name (the state of alerts, say)."""
        row = self.one("SELECT data FROM state WHERE name = ?", (name,))
        return bytes(row[0]) if row else None

    def save(self, name: str, data: bytes) -> None:
        with self._transaction():
            self._db.execute(
                "INSERT INTO state VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET data = excluded.data", (name, data)
            )

    def size_bytes(self) -> int:
        """The space the store occupies, without what was freed."""
        return self._db.size_bytes()
