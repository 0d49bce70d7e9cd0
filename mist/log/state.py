"""`DIR/state.db`: consumers, leases and checkpoints of every stream, in SQLite (WAL).

One row per leased *range* of records, with a bitmap of what is done inside it, never a row per record. Every write
transaction first takes our own lock file (SQLite's busy handler starves workers), then BEGIN IMMEDIATE. Leases and acks
survive kill -9 (synchronous=NORMAL; a power cut may cost an ack, which is a redelivery); checkpoints and the creation,
deletion and seek of consumers are synced (FULL). Synchronous; the broker calls it from one thread of its own.

A lease's `root` is the id in the tokens it gave out (`root.attempt`): a row that is split keeps its root, a row that
goes back for another attempt gets a new one, so that old tokens fit nothing.
"""

from __future__ import annotations

import math
import os
import sqlite3
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import msgspec
from google_crc32c import value as crc32c

from mist.broker.base import Checkpoint, ConsumerConfig, Pending
from mist.broker.checkpoint import check_advance
from mist.errors import Closed, Conflict, MistError, NotFound, StorageFull, Unavailable
from mist.log.files import Files

_SCHEMA = """
create table if not exists meta(key text primary key, value blob) without rowid;
create table if not exists checkpoint(
  stream text, name text, incarnation text, sequence integer, time_ns integer, crc integer,
  primary key(stream, name)) without rowid;
create table if not exists consumer(
  id integer primary key autoincrement, stream text, name text, incarnation text, config blob, delivered integer,
  unique(stream, name));
create table if not exists lease(
  id integer primary key autoincrement, consumer integer, root integer, lo integer, hi integer, attempt integer,
  deadline integer, left integer, done blob, sequences blob);
create index if not exists lease_by_deadline on lease(consumer, deadline);
create index if not exists lease_by_root on lease(root);
"""


_CANNOT_BE = (
    """select key from meta where typeof(key)<>'text' or typeof(value)<>'blob'""",
    """select name from checkpoint where typeof(stream)<>'text' or typeof(name)<>'text' or typeof(incarnation)<>'text'
    or typeof(sequence)<>'integer' or typeof(time_ns)<>'integer' or typeof(crc)<>'integer'""",
    """select name from consumer where typeof(stream)<>'text' or typeof(name)<>'text' or typeof(incarnation)<>'text'
    or typeof(config)<>'blob' or typeof(delivered)<>'integer' or delivered<0""",
    """select id from lease where typeof(consumer)<>'integer' or typeof(root)<>'integer' or typeof(lo)<>'integer'
    or typeof(hi)<>'integer' or typeof(attempt)<>'integer' or typeof(deadline)<>'integer' or typeof(left)<>'integer'
    or lo<1 or hi<lo or left<1 or left>hi-lo+1 or attempt<0 or (sequences is null and hi-lo>=67108864)
    or (done is null and sequences is null and left<>hi-lo+1)
    or (sequences is not null and (typeof(sequences)<>'blob' or length(sequences)%8<>0 or length(sequences)<8*left))
    or (done is not null and typeof(done)<>'blob')""",
)
"""Queries for rows that we never write."""


class Lease(NamedTuple):
    """A range lo..hi handed out (or waiting) with its attempt. `done`: bitmap over the range, or None when nothing is.
    `sequences`: the matching ones of a filtered consumer, or None when all of the range are."""

    id: int
    root: int
    lo: int
    hi: int
    attempt: int
    deadline: int
    left: int
    done: bytes | None
    sequences: bytes | None

    def all(self) -> Sequence[int]:
        if self.sequences is None:
            return range(self.lo, self.hi + 1)
        return array("Q", self.sequences)

    def open(self) -> list[int]:
        """The sequences that are not settled."""
        done = self.done
        if done is None:
            return list(self.all())
        return [s for i, s in enumerate(self.all()) if not done[i >> 3] >> (i & 7) & 1]


_COLUMNS = "id, root, lo, hi, attempt, deadline, left, done, sequences"


class ConsumerRow(NamedTuple):
    id: int
    incarnation: str
    config: ConsumerConfig
    delivered: int


def now_ms() -> int:
    """Milliseconds of the machine's monotonic clock: comparable between processes of one boot."""
    return time.monotonic_ns() // 1_000_000


def _wait_ms(config: ConsumerConfig) -> int:
    """The ack wait in whole milliseconds, never shorter than it was asked for."""
    return math.ceil(config.ack_wait_s * 1000) + 1


class State:
    """Consumers, leases and checkpoints of one log directory. Use it from one thread."""

    def __init__(self, files: Files, directory: str, boot: bytes) -> None:
        self.files = files
        self.path = os.path.join(directory, "state.db")
        self.boot = boot
        self.warnings: list[str] = []
        self.waits_for_lock = False
        self._db: sqlite3.Connection | None = None
        self._file = (0, 0)
        self._suspect = False
        self._level = ""
        self._lock_fd = files.open(os.path.join(directory, "state.lock"), create=True)
        try:
            with self._locked():
                self._open()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Our own lock, and every foreign exception as ours."""
        self.waits_for_lock = True
        try:
            self.files.lock(self._lock_fd, wait=True)
        except OSError as exc:
            raise Unavailable(f"state.lock: {exc.strerror or exc}") from exc
        finally:
            self.waits_for_lock = False
        try:
            with self._translated():
                yield
        finally:
            with suppress(OSError):  # the kernel drops it with the descriptor
                self.files.unlock(self._lock_fd)

    def _open(self) -> None:
        """Under lock: the database, a new one when the one there is damaged."""
        if self._db is not None:
            self._db.close()
            self._db = None
        kept = ""
        try:
            self._db = self._connect()
        except sqlite3.Error as exc:
            if not _is_damage(exc):
                raise
            kept = self._quarantine(exc)
            self._db = self._connect()
        st = os.stat(self.path)
        self._file = (st.st_dev, st.st_ino)
        self._suspect = False
        if kept:
            self._salvage(self._db, kept)

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, timeout=10.0, check_same_thread=False)
        try:
            db.execute("pragma journal_mode=wal")
            db.execute("pragma synchronous=full")
            self._level = "full"
            db.executescript(_SCHEMA)
            _examine(db)
            row = db.execute("select value from meta where key='boot'").fetchone()
            if row is None or row[0] != self.boot:
                db.execute("begin immediate")
                if row is None:
                    # a new file, perhaps in place of a damaged one: numbers in tokens and handles must not come again
                    start = time.time_ns() // 1_000_000
                    db.execute("insert into sqlite_sequence values('lease', ?), ('consumer', ?)", (start, start))
                # deadlines of another boot mean nothing: everything leased is due now
                db.execute("update lease set deadline=0")
                db.execute("insert or replace into meta values('boot', ?)", (self.boot,))
                db.execute("commit")
            os.chmod(self.path, 0o600)
        except BaseException:
            db.close()
            raise
        return db

    def _quarantine(self, why: Exception) -> str:
        """Set a damaged state file aside; a new one is started. Nothing in the streams is lost."""
        kept = f"{self.path}.damaged-{time.time_ns()}"
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.rename(self.path + suffix, kept + suffix)
        self.warnings.append(
            f"state.db was damaged ({why}) and is kept as {os.path.basename(kept)}; consumers start anew, and so do"
            " checkpoints that could not be saved from it"
        )
        return kept

    def _salvage(self, db: sqlite3.Connection, kept: str) -> None:
        """Take over the checkpoints of a damaged file, as far as it can be read and their checksums hold."""
        found: list[tuple[object, ...]] = []
        with suppress(sqlite3.Error, ValueError, OverflowError):  # what can be had; the rest is reported as damaged
            old = sqlite3.connect(kept)
            try:
                rows = old.execute("select stream, name, incarnation, sequence, time_ns, crc from checkpoint")
                found.extend(row for row in rows if row[5] == _crc(*row[:5]))
            finally:
                old.close()
        for row in found:
            db.execute("insert or ignore into checkpoint values(?,?,?,?,?,?)", row)

    def close(self) -> None:
        """Idempotent."""
        if self._db is not None:
            self._db.close()
            self._db = None
        if self._lock_fd >= 0:
            self.files.close(self._lock_fd)
            self._lock_fd = -1

    @contextmanager
    def _write(self, *, synced: bool = False) -> Iterator[sqlite3.Connection]:
        level = "full" if synced else "normal"
        if self._db is None:
            raise Closed("the broker is closed")
        with self._locked():
            db = self._current()
            if level != self._level:
                db.execute(f"pragma synchronous={level}")
                self._level = level
            db.execute("begin immediate")
            try:
                yield db
                db.execute("commit")
            except BaseException:
                if db.in_transaction:
                    db.execute("rollback")
                raise

    def _current(self) -> sqlite3.Connection:
        """Under lock: the connection to the file that is there now; another process may have set ours aside."""
        try:
            st = os.stat(self.path)
            same = (st.st_dev, st.st_ino) == self._file
        except FileNotFoundError:
            same = False
        if self._suspect or not same:
            self._open()
        if self._db is None:
            raise Closed("the broker is closed")
        return self._db

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if self._db is None:
            raise Closed("the broker is closed")
        if self._suspect:
            with self._locked():
                self._current()
        with self._translated():
            yield self._db

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """What comes out of the database as ours. After damage, the next call opens it anew, and sets it aside."""
        try:
            yield
        except sqlite3.Error as exc:
            self._suspect = self._suspect or _is_damage(exc)
            raise _translate(exc) from exc
        except (TypeError, ValueError, OverflowError, IndexError, MemoryError) as exc:
            self._suspect = True
            raise Unavailable(f"state.db holds what cannot be right: {exc!r}", hint="try again") from exc

    def make_room(self) -> None:
        """After StorageFull: move what the write-ahead log holds into the database, so that its space is used again."""
        with self._reading() as db:
            db.execute("pragma wal_checkpoint(passive)")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, checkpoint: Checkpoint, *, force: bool) -> Checkpoint:
        with self._write(synced=True) as db:
            if not force:
                stored = self._load(db, checkpoint.stream, checkpoint.name)
                if stored is not None:
                    check_advance(stored, checkpoint)
            saved = msgspec.structs.replace(checkpoint, time_ns=time.time_ns())
            db.execute("insert or replace into checkpoint values(?,?,?,?,?,?)", (*_row(saved), _crc(*_row(saved))))
        return saved

    def _load(self, db: sqlite3.Connection, stream: str, name: str) -> Checkpoint | None:
        row = db.execute(
            "select incarnation, sequence, time_ns, crc from checkpoint where stream=? and name=?", (stream, name)
        ).fetchone()
        if row is None:
            return None
        if row[3] != _crc(stream, name, *row[:3]):
            raise Unavailable(
                f"checkpoint {name} of stream {stream} is damaged",
                retryable=False,
                hint="save it with force, or delete it",
            )
        return Checkpoint(stream=stream, name=name, incarnation=row[0], sequence=row[1], time_ns=row[2])

    def load(self, stream: str, name: str) -> Checkpoint | None:
        with self._reading() as db:
            return self._load(db, stream, name)

    def delete_checkpoint(self, stream: str, name: str) -> bool:
        with self._write(synced=True) as db:
            return db.execute("delete from checkpoint where stream=? and name=?", (stream, name)).rowcount > 0

    def checkpoints(self, stream: str) -> list[Checkpoint]:
        query = (
            "select stream, name, incarnation, sequence, time_ns, crc from checkpoint"
            " where ?='' or stream=? order by 1, 2"
        )
        with self._reading() as db:
            rows = db.execute(query, (stream, stream)).fetchall()
            good = [r for r in rows if r[5] == _crc(*r[:5])]
        return [Checkpoint(stream=r[0], name=r[1], incarnation=r[2], sequence=r[3], time_ns=r[4]) for r in good]

    def forget_stream(self, stream: str) -> None:
        with self._write(synced=True) as db:
            db.execute("delete from lease where consumer in (select id from consumer where stream=?)", (stream,))
            db.execute("delete from consumer where stream=?", (stream,))
            db.execute("delete from checkpoint where stream=?", (stream,))

    # -- consumers ----------------------------------------------------------------------------------------------------

    def consumer(
        self, stream: str, incarnation: str, name: str, config: ConsumerConfig | None, *, create: bool
    ) -> ConsumerRow:
        with self._reading() as db:
            row = self._consumer(db, stream, incarnation, name)
        if row is None:
            if not create:
                raise NotFound(f"stream {stream} has no consumer {name}")
            with self._write(synced=True) as db:
                row = self._consumer(db, stream, incarnation, name)
                if row is None:
                    made = config or ConsumerConfig()
                    # rows of a former incarnation of the stream go with it
                    old = db.execute("select id from consumer where stream=? and name=?", (stream, name)).fetchone()
                    if old is not None:
                        db.execute("delete from lease where consumer=?", old)
                        db.execute("delete from consumer where id=?", old)
                    cursor = db.execute(
                        "insert into consumer(stream, name, incarnation, config, delivered) values(?,?,?,?,?)",
                        (stream, name, incarnation, msgspec.json.encode(made), made.after),
                    )
                    return ConsumerRow(int(cursor.lastrowid or 0), incarnation, made, made.after)
        if config is not None and config != row.config:
            raise Conflict(f"consumer {name} of stream {stream} exists with another configuration")
        return row

    def _consumer(self, db: sqlite3.Connection, stream: str, incarnation: str, name: str) -> ConsumerRow | None:
        row = db.execute(
            "select id, incarnation, config, delivered from consumer where stream=? and name=? and incarnation=?",
            (stream, name, incarnation),
        ).fetchone()
        return (
            None
            if row is None
            else ConsumerRow(row[0], row[1], msgspec.json.decode(row[2], type=ConsumerConfig), row[3])
        )

    def consumers(self, stream: str, incarnation: str) -> list[str]:
        with self._reading() as db:
            rows = db.execute(
                "select name from consumer where stream=? and incarnation=? order by 1", (stream, incarnation)
            )
            return [r[0] for r in rows]

    def delivered(self, consumer: int) -> int:
        """The highest sequence handed out or passed over. Raises NotFound when the consumer was deleted."""
        with self._reading() as db:
            return self._delivered(db, consumer)

    @staticmethod
    def _delivered(db: sqlite3.Connection, consumer: int) -> int:
        row = db.execute("select delivered from consumer where id=?", (consumer,)).fetchone()
        if row is None:
            raise NotFound("the consumer was deleted")
        return int(row[0])

    def take(
        self, consumer: int, config: ConsumerConfig, *, limit: int, first: int, last: int,
        found: tuple[int, Sequence[int], int] | None = None,
    ) -> tuple[list[Lease], list[Lease], int | None, bool]:  # fmt: skip
        """Lease what is due again, then new records up to `last` (or `found`, for a filtered consumer).

        `found` = (after, matching sequences, scanned): what a filtered read gave; it is used when nobody moved the
        consumer meanwhile. Returns the leases handed out, those out of attempts (held until they are buried), the
        deadline of the next waiting lease, and whether the consumer moved on.
        """
        now = now_ms()
        until = now + _wait_ms(config)
        given: list[Lease] = []
        exhausted: list[Lease] = []
        with self._write() as db:
            delivered = self._delivered(db, consumer)
            self._forget_trimmed(db, consumer, first)
            count = 0
            rows = db.execute(
                f"select {_COLUMNS} from lease where consumer=? and deadline<=? order by lo limit ?",
                (consumer, now, limit),
            ).fetchall()
            for row in rows:
                lease = Lease(*row)
                if config.attempts_max and lease.attempt >= config.attempts_max:
                    exhausted.append(lease)
            if exhausted:
                # alone: burying takes its time, and nobody's deliveries must wait for it
                return [], [self._again(db, lease, lease.attempt, until) for lease in exhausted], None, True
            for row in rows:
                lease = Lease(*row)
                if count >= limit:
                    break
                if lease.left > limit - count:
                    lease = self._split(db, consumer, lease, limit - count)
                given.append(self._again(db, lease, lease.attempt + 1, until))
                count += lease.left
            held = db.execute("select coalesce(sum(left), 0) from lease where consumer=?", (consumer,)).fetchone()[0]
            room = min(limit - count, config.pending_max - held)
            after = max(delivered, first - 1)
            moved = delivered
            if room > 0 and found is not None:
                if found[0] == delivered or found[0] == after:
                    sequences = found[1][:room]
                    moved = found[2] if len(sequences) == len(found[1]) else sequences[-1]
                    if sequences:
                        packed = array("Q", sequences).tobytes()
                        given.append(
                            self._new(db, consumer, sequences[0], sequences[-1], len(sequences), until, packed)
                        )
            elif room > 0 and found is None and last > after:
                moved = min(last, after + room)
                given.append(self._new(db, consumer, after + 1, moved, moved - after, until, None))
            if moved > delivered:
                db.execute("update consumer set delivered=? where id=?", (moved, consumer))
            waiting = db.execute("select min(deadline) from lease where consumer=?", (consumer,)).fetchone()[0]
        return given, exhausted, waiting, moved > delivered

    def _forget_trimmed(self, db: sqlite3.Connection, consumer: int, first: int) -> None:
        """What was trimmed is neither pending nor due."""
        rows = db.execute(f"select {_COLUMNS} from lease where consumer=? and lo<?", (consumer, first)).fetchall()
        for row in rows:
            lease = Lease(*row)
            self._rewrite(db, lease, [s for s in lease.open() if s >= first])

    @staticmethod
    def _new(
        db: sqlite3.Connection, consumer: int, lo: int, hi: int, left: int, until: int, sequences: bytes | None,
        *, attempt: int = 1, done: bytes | None = None, root: int = 0,
    ) -> Lease:  # fmt: skip
        cursor = db.execute(
            "insert into lease(consumer, root, lo, hi, attempt, deadline, left, done, sequences) values(?,?,?,?,?,?,?,?,?)",
            (consumer, root, lo, hi, attempt, until, left, done, sequences),
        )
        id = int(cursor.lastrowid or 0)
        if not root:
            db.execute("update lease set root=? where id=?", (id, id))
        return Lease(id, root or id, lo, hi, attempt, until, left, done, sequences)

    @staticmethod
    def _again(db: sqlite3.Connection, lease: Lease, attempt: int, until: int) -> Lease:
        """Hand a waiting lease out: a new root is not needed, the attempt makes its tokens new."""
        db.execute("update lease set attempt=?, deadline=? where id=?", (attempt, until, lease.id))
        return lease._replace(attempt=attempt, deadline=until)

    def _split(self, db: sqlite3.Connection, consumer: int, lease: Lease, count: int) -> Lease:
        """Cut the first `count` open sequences off into a row of their own; the rest stays as it was."""
        sequences = lease.open()
        head, tail = sequences[:count], sequences[count:]
        self._rewrite(db, lease, tail)
        packed = None if head[-1] - head[0] + 1 == len(head) else array("Q", head).tobytes()
        return self._new(
            db, consumer, head[0], head[-1], len(head), lease.deadline, packed, attempt=lease.attempt, root=lease.root
        )

    @staticmethod
    def _rewrite(db: sqlite3.Connection, lease: Lease, sequences: Sequence[int]) -> None:
        """Make a row hold exactly these open sequences; no sequences: it goes."""
        if not sequences:
            db.execute("delete from lease where id=?", (lease.id,))
            return
        dense = sequences[-1] - sequences[0] + 1 == len(sequences)
        packed = None if dense else array("Q", sequences).tobytes()
        db.execute(
            "update lease set lo=?, hi=?, left=?, done=null, sequences=? where id=?",
            (sequences[0], sequences[-1], len(sequences), packed, lease.id),
        )

    def settle(self, consumer: int, groups: dict[str, list[int]]) -> int:
        """Acks by token -> sequences. Returns how many were still open under their token."""
        count = 0
        with self._write() as db:
            self._delivered(db, consumer)
            for token, sequences in groups.items():
                root, attempt = _parse(token)
                low, high = min(sequences), max(sequences)
                dense = high - low + 1 == len(sequences)
                packed = None if dense else array("Q", sorted(sequences)).tobytes()
                gone = db.execute(
                    "delete from lease where id=? and attempt=? and lo=? and hi=? and done is null and sequences is ?"
                    " and consumer=? and root=id",
                    (root, attempt, low, high, packed, consumer),
                )
                if gone.rowcount:
                    count += len(sequences)
                    continue
                count += len(self._pick(db, consumer, root, attempt, sequences))
        return count

    def _pick(
        self, db: sqlite3.Connection, consumer: int, root: int, attempt: int, sequences: Sequence[int]
    ) -> list[int]:
        """Mark these as done where they are open under this token; which ones were."""
        wanted = set(sequences)
        picked: list[int] = []
        rows = db.execute(
            f"select {_COLUMNS} from lease where root=? and attempt=? and consumer=? and hi>=? and lo<=?",
            (root, attempt, consumer, min(wanted), max(wanted)),
        ).fetchall()
        for row in rows:
            lease = Lease(*row)
            every = lease.all()
            done = bytearray(lease.done or bytes((len(every) + 7) // 8))
            mine = 0
            for s in sorted(wanted):
                i = s - lease.lo if lease.sequences is None else _index(every, s)
                if 0 <= i < len(every) and not done[i >> 3] >> (i & 7) & 1:
                    done[i >> 3] |= 1 << (i & 7)
                    picked.append(s)
                    mine += 1
            if mine == lease.left:
                db.execute("delete from lease where id=?", (lease.id,))
            elif mine:
                db.execute("update lease set done=?, left=left-? where id=?", (bytes(done), mine, lease.id))
        return picked

    def skip(self, consumer: int, first: int, last: int) -> None:
        """Settle a damaged range for good, in every lease and ahead of what was handed out."""
        with self._write() as db:
            delivered = self._delivered(db, consumer)
            rows = db.execute(
                f"select {_COLUMNS} from lease where consumer=? and hi>=? and lo<=?", (consumer, first, last)
            ).fetchall()
            for row in rows:
                lease = Lease(*row)
                self._rewrite(db, lease, [s for s in lease.open() if not first <= s <= last])
            if first - 1 <= delivered < last:
                db.execute("update consumer set delivered=? where id=?", (last, consumer))

    def erase(self, stream: str, sequences: Sequence[int]) -> None:
        """Settle these for good in every lease of the stream's consumers."""
        doomed = set(sequences)
        with self._write() as db:
            rows = db.execute(
                f"select {_COLUMNS} from lease where consumer in (select id from consumer where stream=?)"
                " and hi>=? and lo<=?",
                (stream, min(doomed), max(doomed)),
            ).fetchall()
            for row in rows:
                lease = Lease(*row)
                still = lease.open()
                left = [s for s in still if s not in doomed]
                if len(left) < len(still):
                    self._rewrite(db, lease, left)

    def give_back(
        self, consumer: int, groups: dict[str, list[int]], *, delay_ms: int, same_attempt: bool = False
    ) -> int:
        """Open deliveries back to waiting, due after a delay. `same_attempt`: they were never seen by anybody."""
        count = 0
        with self._write() as db:
            self._delivered(db, consumer)
            for token, sequences in groups.items():
                root, attempt = _parse(token)
                picked = sorted(self._pick(db, consumer, root, attempt, sequences))
                count += len(picked)
                if picked:
                    dense = picked[-1] - picked[0] + 1 == len(picked)
                    packed = None if dense else array("Q", picked).tobytes()
                    self._new(
                        db, consumer, picked[0], picked[-1], len(picked), now_ms() + delay_ms, packed,
                        attempt=attempt - same_attempt,
                    )  # fmt: skip
        return count

    def ours(self, consumer: int, groups: dict[str, list[int]]) -> set[int]:
        """Which of these are still open under their token."""
        out: set[int] = set()
        with self._reading() as db:
            for token, sequences in groups.items():
                root, attempt = _parse(token)
                rows = db.execute(
                    f"select {_COLUMNS} from lease where root=? and attempt=? and consumer=?", (root, attempt, consumer)
                )
                for row in rows:
                    out.update(set(Lease(*row).open()) & set(sequences))
        return out

    def extend(self, consumer: int, config: ConsumerConfig, groups: dict[str, list[int]]) -> int:
        """New deadlines. A subset of a lease is split off, so that the others still return in time."""
        until = now_ms() + _wait_ms(config)
        count = 0
        with self._write() as db:
            self._delivered(db, consumer)
            for token, sequences in groups.items():
                root, attempt = _parse(token)
                rows = db.execute(
                    f"select {_COLUMNS} from lease where root=? and attempt=? and consumer=?", (root, attempt, consumer)
                ).fetchall()
                for row in rows:
                    lease = Lease(*row)
                    still = lease.open()
                    mine = sorted(set(still) & set(sequences))
                    count += len(mine)
                    if len(mine) == len(still):
                        db.execute("update lease set deadline=? where id=?", (until, lease.id))
                    elif mine:
                        taken = set(mine)
                        self._rewrite(db, lease, [s for s in still if s not in taken])
                        dense = mine[-1] - mine[0] + 1 == len(mine)
                        packed = None if dense else array("Q", mine).tobytes()
                        self._new(
                            db, consumer, mine[0], mine[-1], len(mine), until, packed, attempt=attempt, root=root
                        )  # fmt: skip
        return count

    def leases(self, consumer: int) -> list[Lease]:
        with self._reading() as db:
            rows = db.execute(f"select {_COLUMNS} from lease where consumer=? order by lo", (consumer,))
            return [Lease(*r) for r in rows]

    def figures(self, consumer: int, first: int) -> tuple[int, int, int, int]:
        """(floor, delivered, pending, redelivered)."""
        with self._reading() as db:
            delivered = max(self._delivered(db, consumer), first - 1)
            pending = redelivered = 0
            floor = delivered
            for lease in self.leases(consumer):
                still = [s for s in lease.open() if s >= first] if lease.lo < first or lease.done else None
                left = lease.left if still is None else len(still)
                if left:
                    floor = min(floor, (lease.lo if still is None else still[0]) - 1)
                pending += left
                redelivered += left if lease.attempt > 1 else 0
            return floor, delivered, pending, redelivered

    def pending(self, consumer: int, limit: int, first: int) -> list[Pending]:
        now = now_ms()
        out: list[Pending] = []
        with self._reading() as db:
            self._delivered(db, consumer)
            for lease in self.leases(consumer):
                due = (lease.deadline - now - 1) / 1000  # deadlines are rounded up
                out.extend(Pending(s, lease.attempt, due) for s in lease.open() if s >= first)
        return sorted(out, key=lambda p: p.sequence)[:limit]

    def seek(self, consumer: int, after: int) -> None:
        with self._write(synced=True) as db:
            self._delivered(db, consumer)
            db.execute("delete from lease where consumer=?", (consumer,))
            db.execute("update consumer set delivered=? where id=?", (after, consumer))

    def delete_consumer(self, consumer: int) -> None:
        with self._write(synced=True) as db:
            db.execute("delete from lease where consumer=?", (consumer,))
            db.execute("delete from consumer where id=?", (consumer,))


def _index(every: Sequence[int], sequence: int) -> int:
    from bisect import bisect_left

    at = bisect_left(every, sequence)
    return at if at < len(every) and every[at] == sequence else -1


def _parse(token: str) -> tuple[int, int]:
    root, _, attempt = token.partition(".")
    try:
        return int(root), int(attempt)
    except ValueError:
        return 0, 0  # somebody else's token: fits nothing


def _row(c: Checkpoint) -> tuple[str, str, str, int, int]:
    return c.stream, c.name, c.incarnation, c.sequence, c.time_ns


def _crc(*row: object) -> int:
    """The checksum of a checkpoint: SQLite would not notice a flipped bit in a number."""
    return int(crc32c(repr(row).encode("utf-8", "replace")))


def _is_damage(exc: sqlite3.Error) -> bool:
    """Whether the file is to blame, and not the disk, a lock or the caller."""
    code = getattr(exc, "sqlite_errorcode", None)
    if code is None:
        return isinstance(exc, sqlite3.DatabaseError) and not isinstance(exc, sqlite3.OperationalError)
    # SQLITE_ERROR is what a changed schema answers: all our statements fit ours
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR)


def _examine(db: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError when the file is damaged, its schema another, or a row cannot be right."""
    found = db.execute("pragma quick_check(1)").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(str(found))
    for query in _CANNOT_BE:
        row = db.execute(query).fetchone()
        if row is not None:
            raise sqlite3.DatabaseError(f"a row that cannot be right: {row[0]!r}")


def _translate(exc: sqlite3.Error) -> MistError:
    text = str(exc)
    if "full" in text:
        return StorageFull(f"state.db: {text}", hint="free space; reading and appending are not affected")
    return Unavailable(f"state.db: {text}", hint="`mist doctor` shows the state of the directory")
