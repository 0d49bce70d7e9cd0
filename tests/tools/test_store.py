"""The store: rows and position in one transaction, or nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from mist.errors import InvalidArgument, NotFound, Refused
from mist.tools.tokentrace.spans import SpanRow, row_of
from mist.tools.tokentrace.store import (
    QUARANTINE_BYTES_MAX,
    Batch,
    Gap,
    Position,
    PositionMoved,
    Refusal,
    Store,
)

from .spanning import envelope, record


def rows(*numbers: int) -> list[SpanRow]:
    found = [row_of(record(envelope(n), n)) for n in numbers]
    return [r for r in found if r is not None]


def test_rows_and_position_are_stored_together_and_stay(tmp_path: Path) -> None:
    """Closed and opened again, both are there."""
    path = tmp_path / "deep" / "er" / "t.db"
    with Store.open(path) as store:
        assert store.position("trace") is None
        assert store.apply("trace", "i1", Batch(after=0, scanned=5, rows=rows(1, 2))) == 2
    with Store.open(path) as store:
        assert store.position("trace") == Position("trace", "i1", 5)
        assert store.count() == 2


def test_a_batch_read_from_another_position_changes_nothing(tmp_path: Path) -> None:
    """Whoever lost the race reads on from the store's position."""
    with Store.open(tmp_path / "t.db") as store:
        store.apply("trace", "i1", Batch(after=0, scanned=5, rows=rows(1)))
        with pytest.raises(PositionMoved):
            store.apply("trace", "i1", Batch(after=0, scanned=5, rows=rows(2)), record="w")
        assert (store.count(), store.count("applied")) == (1, 0)


def test_the_first_span_of_an_id_stays(tmp_path: Path) -> None:
    """Idempotent by (trace_id, span_id), whatever the sequence."""
    with Store.open(tmp_path / "t.db") as store:
        store.apply("trace", "i1", Batch(after=0, scanned=1, rows=rows(1)))
        later = rows(1)[0]._replace(sequence=2, model="other")
        assert store.apply("trace", "i1", Batch(after=1, scanned=2, rows=[later])) == 0
        assert store.one("SELECT model, sequence FROM spans") == ("m1", 1)


def test_the_record_of_what_was_applied_shows_a_second_time(tmp_path: Path) -> None:
    """It has no uniqueness: the table of spans hides a repetition, this one does not; and it cannot be rewritten."""
    path = tmp_path / "t.db"
    with Store.open(path) as store:
        store.apply("trace", "i1", Batch(after=0, scanned=1, rows=rows(1)), record="w1")
        store.apply("trace", "i1", Batch(after=1, scanned=1, rows=rows(1)), record="w2")
        assert store.count("spans") == 1
        assert list(store.query("SELECT sequence, worker FROM applied")) == [(1, "w1"), (1, "w2")]
    db = sqlite3.connect(path)
    for statement in ("DELETE FROM applied", "UPDATE applied SET worker = 'x'"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement)
    db.close()


def test_a_failing_transaction_leaves_nothing(tmp_path: Path) -> None:
    """A row SQLite cannot take rolls back the rows before it and the position."""
    with Store.open(tmp_path / "t.db") as store:
        bad = rows(2)[0]._replace(start_ns=2**70)
        with pytest.raises(OverflowError):
            store.apply("trace", "i1", Batch(after=0, scanned=5, rows=[*rows(1), bad]))
        assert (store.count(), store.position("trace")) == (0, None)
        assert store.apply("trace", "i1", Batch(after=0, scanned=5, rows=rows(1))) == 1


def test_refusals_and_gaps_are_kept_with_their_reason(tmp_path: Path) -> None:
    """Quarantine keeps the beginning of the bytes; repeating a refusal keeps one."""
    refusal = Refusal(3, 99, "malformed: x", "trace.span", b"z" * 10_000)
    with Store.open(tmp_path / "t.db") as store:
        store.apply("trace", "i1", Batch(after=0, scanned=3, refused=[refusal], gaps=[Gap(1, 2, "expired")]))
        store.apply("trace", "i1", Batch(after=3, scanned=4, refused=[refusal]))
        assert store.one("SELECT reason, length(data) FROM quarantine") == ("malformed: x", QUARANTINE_BYTES_MAX)
        assert store.one("SELECT first, last, reason FROM gaps") == (1, 2, "expired")


def test_reading_makes_nothing_and_says_what_is_missing(tmp_path: Path) -> None:
    """A question never creates a store."""
    path = tmp_path / "none" / "t.db"
    with pytest.raises(NotFound, match="no TokenTrace store"):
        Store.read(path)
    assert not path.parent.exists()


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    """Opened for questions, the file is read-only."""
    Store.open(tmp_path / "t.db").close()
    with Store.read(tmp_path / "t.db") as store, pytest.raises(Refused):
        store.apply("trace", "i1", Batch(after=0, scanned=1))


def test_a_reader_sees_what_a_writer_committed(tmp_path: Path) -> None:
    """WAL: questions while the worker writes."""
    with Store.open(tmp_path / "t.db") as writer, Store.read(tmp_path / "t.db") as reader:
        writer.apply("trace", "i1", Batch(after=0, scanned=1, rows=rows(1)))
        assert reader.count() == 1


@pytest.mark.parametrize("content", [b"not a database, but long enough to be looked at" * 50, b"{}"])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    """With a sentence, and untouched."""
    path = tmp_path / "t.db"
    path.write_bytes(content)
    for open_it in (Store.open, Store.read):
        with pytest.raises(InvalidArgument):
            open_it(path)
    assert path.read_bytes() == content


def test_somebody_elses_database_and_a_later_schema_are_refused(tmp_path: Path) -> None:
    """Their tables are not ours to change."""
    for name, statement in (("a.db", "CREATE TABLE other (x)"), ("b.db", "PRAGMA user_version=99")):
        db = sqlite3.connect(tmp_path / name)
        db.execute(statement)
        db.commit()
        db.close()
        for open_it in (Store.open, Store.read):
            with pytest.raises(InvalidArgument, match="not a TokenTrace store"):
                open_it(tmp_path / name)


def test_a_place_that_cannot_hold_a_store_is_refused(tmp_path: Path) -> None:
    """A file where a directory should be, a directory where the file should be."""
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "t.db", tmp_path):
        with pytest.raises(Refused):
            Store.open(path)
