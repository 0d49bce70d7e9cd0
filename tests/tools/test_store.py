"""The store: rows, totals and position in one transaction, or nothing. On SQLite and on a real PostgreSQL."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import msgspec
import pytest

from mist.errors import InvalidArgument, MistError, NotFound, Refused
from mist.kit.prices import parse_prices
from mist.tools.tokentrace import queries
from mist.tools.tokentrace import store as module
from mist.tools.tokentrace.rollup import OTHER
from mist.tools.tokentrace.spans import SpanRow, row_of
from mist.tools.tokentrace.stats import metrics, seed_stats
from mist.tools.tokentrace.store import (
    QUARANTINE_BYTES_MAX,
    Batch,
    Gap,
    Position,
    PositionMoved,
    Refusal,
    Selector,
    Store,
)
from mist.tools.tokentrace.where import Where

from .spanning import envelope, record

Place = Path | str


def rows(*numbers: int) -> list[SpanRow]:
    found = [row_of(record(envelope(n), n)) for n in numbers]
    return [r for r in found if r is not None]


def made(number: int, **changes: object) -> SpanRow:
    """A row as if read from the stream, with columns changed."""
    return rows(number)[0]._replace(**changes)  # type: ignore[arg-type]


def test_rows_and_position_are_stored_together_and_stay(place: Place) -> None:
    """Closed and opened again, both are there."""
    with Store.open(place) as store:
        assert store.position("trace") is None
        assert store.apply("trace", "i1", Batch(after=0, scanned=5, rows=rows(1, 2))) == 2
    with Store.open(place) as store:
        assert store.position("trace") == Position("trace", "i1", 5)
        assert (store.count(), store.streams()) == (2, {"trace"})


def test_a_batch_read_from_another_position_changes_nothing(place: Place) -> None:
    """Whoever lost the race reads on from the store's position."""
    with Store.open(place) as store:
        store.apply("trace", "i1", Batch(after=0, scanned=5, rows=rows(1)))
        with pytest.raises(PositionMoved):
            store.apply("trace", "i1", Batch(after=0, scanned=5, rows=rows(2)), record="w")
        assert (store.count(), store.count("applied")) == (1, 0)


def test_the_first_span_of_an_id_stays(place: Place) -> None:
    """Idempotent by (trace_id, span_id), whatever the sequence, also within one page; totals count it once."""
    with Store.open(place) as store:
        store.apply("trace", "i1", Batch(after=0, scanned=1, rows=rows(1)))
        later = made(1, sequence=2, model="other")
        twice = [later, *rows(3), made(3, sequence=4)]
        assert store.apply("trace", "i1", Batch(after=1, scanned=4, rows=twice)) == 1
        assert store.one("SELECT model, sequence FROM spans ORDER BY sequence") == ("m1", 1)
        assert (store.count(), seed_stats(store).total_spans) == (2, 2)


def test_a_large_page_is_all_or_nothing_and_counts_what_is_new(place: Place) -> None:
    """More rows than one statement takes, some of them known: exactly the others are new. One that the database refuses,
    far behind the beginning, takes all of it back."""
    spans = rows(*range(1, 2501))
    with Store.open(place) as store:
        store.apply("trace", "i1", Batch(after=0, scanned=1, rows=[spans[n] for n in (3, 999, 1000, 2400)]))
        bad = spans[1700]._replace(source=None)  # type: ignore[arg-type]
        with pytest.raises(MistError):
            store.apply("trace", "i1", Batch(after=1, scanned=2500, rows=[*spans[:1700], bad, *spans[1701:]]))
        assert (store.count(), seed_stats(store).total_spans) == (4, 4)
        assert (
            store.apply("trace", "i1", Batch(after=1, scanned=2500, rows=[*spans, spans[6]._replace(sequence=2501)]))
            == 2496
        )
        assert (store.count(), seed_stats(store).total_spans) == (2500, 2500)
        assert store.one("SELECT sum(sequence) FROM spans") == (2500 * 2501 // 2,)


def test_the_record_of_what_was_applied_shows_a_second_time(place: Place) -> None:
    """It has no uniqueness: the table of spans hides a repetition, this one does not; and it cannot be rewritten."""
    with Store.open(place) as store:
        store.apply("trace", "i1", Batch(after=0, scanned=1, rows=rows(1)), record="w1")
        store.apply("trace", "i1", Batch(after=1, scanned=1, rows=rows(1)), record="w2")
        assert store.count("spans") == 1
        assert list(store.query("SELECT sequence, worker FROM applied")) == [(1, "w1"), (1, "w2")]
        for statement in ("DELETE FROM applied", "UPDATE applied SET worker = 'x'"):
            with pytest.raises(MistError, match="append-only"):
                store._db.execute(statement)


def test_a_failing_transaction_leaves_nothing(place: Place) -> None:
    """A row the database cannot take rolls back the rows before it, the totals and the position."""
    with Store.open(place) as store:
        bad = made(2, start_ns=2**70)
        with pytest.raises((OverflowError, MistError)):
            store.apply("trace", "i1", Batch(after=0, scanned=5, rows=[*rows(1), bad]))
        assert (store.count(), store.count("rollups"), store.position("trace")) == (0, 0, None)
        assert store.apply("trace", "i1", Batch(after=0, scanned=5, rows=rows(1))) == 1
        assert seed_stats(store).total_spans == 1


def test_refusals_and_gaps_are_kept_with_their_reason(place: Place) -> None:
    """Quarantine keeps the beginning of the bytes; repeating a refusal keeps one."""
    refusal = Refusal(3, 99, "malformed: x", "trace.span", b"z" * 10_000)
    with Store.open(place) as store:
        store.apply("trace", "i1", Batch(after=0, scanned=3, refused=[refusal], gaps=[Gap(1, 2, "expired")]))
        store.apply("trace", "i1", Batch(after=3, scanned=4, refused=[refusal]))
        assert store.one("SELECT reason, length(data) FROM quarantine") == ("malformed: x", QUARANTINE_BYTES_MAX)
        assert store.one("SELECT first, last, reason FROM gaps") == (1, 2, "expired")
        assert [r.sequence for r in queries.quarantined(store, limit=5)] == [3]


def test_a_reader_cannot_write(place: Place) -> None:
    """Opened for questions, the store is read-only."""
    Store.open(place).close()
    with Store.read(place) as store, pytest.raises(Refused):
        store.apply("trace", "i1", Batch(after=0, scanned=1))


def test_a_reader_sees_what_a_writer_committed(place: Place) -> None:
    """Questions while the worker writes; a cell that another connection changed is read anew."""
    with Store.open(place) as one, Store.open(place) as two, Store.read(place) as reader:
        one.apply("trace", "i1", Batch(after=0, scanned=1, rows=rows(1)))
        two.apply("trace", "i1", Batch(after=1, scanned=2, rows=rows(2)))
        one.apply("trace", "i1", Batch(after=2, scanned=3, rows=rows(3)))
        assert (reader.count(), seed_stats(reader).total_spans) == (3, 3)


def test_reading_makes_nothing_and_says_what_is_missing(place: Place) -> None:
    """A question never creates a store."""
    for _ in range(2):
        with pytest.raises(NotFound, match="no TokenTrace store"):
            Store.read(place)


# ----------------------------------------------------------------- totals, and what changes spans afterwards


NS = 1_000_000_000
START = 1_700_000_000


def traffic(count: int, seed: int = 1) -> list[SpanRow]:
    """Spans over three days, of several models and tenants, some without this or that."""
    chance = random.Random(seed)
    out = []
    for n in range(1, count + 1):
        at = (START + chance.randrange(3 * 86400)) * NS + chance.randrange(NS)
        took = chance.lognormvariate(5, 1)
        out.append(
            made(
                n, trace_id=f"{n % 97:032x}", time_ns=at, start_ns=at, end_ns=at + int(took * 1e6), latency_ms=took,
                model=chance.choice(["a", "b", None]), provider=chance.choice(["p", None]),
                tenant=chance.choice(["", "acme"]), user_id=chance.choice(["", "u1", "u2"]),
                operation=chance.choice(["chat", "embed"]), status=chance.choice(["ok", "ok", "error", "timeout"]),
                tokens_in=chance.choice([None, chance.randrange(5000)]), cost_usd=chance.choice([None, chance.random()]),
                score=chance.choice([None, chance.random()]),
            )
        )  # fmt: skip
    return out


def filled(store: Store, spans: list[SpanRow], page: int = 100) -> None:
    for at in range(0, len(spans), page):
        store.apply("trace", "i", Batch(after=at, scanned=at + page, rows=spans[at : at + page]))


def answers(store: Store) -> bytes:
    """Everything people ask, as bytes."""
    return msgspec.json.encode(
        [
            seed_stats(store),
            metrics(store, group_by=("model", "provider")),
            metrics(store, group_by=("tenant", "operation"), bucket="day"),
            metrics(store, Where(since_ns=(START + 1000) * NS + 5, until_ns=(START + 100_000) * NS + 7), ("model",)),
            metrics(store, Where(user="u1"), ("status",)),
            queries.spans(store, limit=50).spans,
            queries.traces(store, limit=20).traces,
            queries.quarantined(store, limit=5),
        ]
    )


def test_totals_and_spans_give_the_same_figures(place: Place) -> None:
    """Any window, any group: what the cells say is what reading every span says, to the last bit."""
    chance = random.Random(7)
    with Store.open(place) as store:
        filled(store, traffic(1500))
        for _ in range(25):
            bounds = sorted(START * NS + chance.randrange(4 * 86400 * NS) for _ in range(2))
            since = chance.choice([None, bounds[0], bounds[0] // (3600 * NS) * 3600 * NS])
            until = chance.choice([None, bounds[1], bounds[1] // (60 * NS) * 60 * NS])
            narrow = chance.choice([{}, {"model": "a"}, {"model": ""}, {"tenant": "acme", "operation": "chat"}])
            groups = chance.choice([(), ("model",), ("tenant", "operation"), ("provider", "model")])
            where = Where(since_ns=since, until_ns=until, **narrow)
            # a condition that all spans fulfil, and that the totals know nothing of
            slow = msgspec.structs.replace(where, source="svc")
            for bucket in (None, "hour", "day"):
                assert metrics(store, where, groups, bucket=bucket) == metrics(store, slow, groups, bucket=bucket)  # type: ignore[arg-type]


def test_the_same_records_give_the_same_bytes_in_any_pages(place: Place, tmp_path: Path) -> None:
    """Rebuilt from the beginning, in other pages: byte-identical answers, and all at once."""
    spans = traffic(700)
    with Store.open(place) as store, Store.read(place) as reader:
        filled(store, spans, page=100)
        before = answers(store)
        with store.rebuilding():
            filled(store, spans, page=333)
            assert answers(reader) == before
        assert answers(store) == before == answers(reader)
    with Store.open(tmp_path / "other.db") as other:
        filled(other, spans, page=64)
        assert answers(other) == before


def test_a_rebuild_that_fails_leaves_the_store_as_it_was(place: Place) -> None:
    """An error inside, also one that was caught on the way, undoes all of it."""
    spans = traffic(300)
    with Store.open(place) as store:
        filled(store, spans)
        before = answers(store)
        with pytest.raises(PositionMoved), store.rebuilding():
            filled(store, [*spans[:150]], page=100) or filled(store, spans)
        assert answers(store) == before
        with pytest.raises(MistError, match="cannot be kept"), store.rebuilding(), pytest.raises(PositionMoved):
            store.apply("trace", "i", Batch(after=0, scanned=1, rows=spans[:1])) and store.apply(
                "trace", "i", Batch(after=0, scanned=1)
            )
        assert answers(store) == before


@pytest.mark.parametrize("selector", [Selector(user="u1"), Selector(tenant="acme"), Selector(trace_id=f"{5:032x}")])
def test_erased_spans_leave_nothing_behind(place: Place, tmp_path: Path, selector: Selector) -> None:
    """Spans, their part of every total, and refused records of these sequences; as if they had never been there."""
    spans = traffic(600)
    condition, value = selector.condition()
    name = condition.split(" ")[0]
    with Store.open(place) as store, Store.open(tmp_path / "never.db") as never:
        filled(store, spans)
        refusal = Refusal(700, 1, "malformed: x", "trace.span", b"secret")
        store.apply("trace", "i", Batch(after=600, scanned=700, refused=[refusal]))
        kept = [s for s in spans if getattr(s, name) != value]
        assert store.erase(selector, stream="trace", sequences=[700]) == len(spans) - len(kept) > 0
        filled(never, kept, page=1000)
        assert answers(store) == answers(never)
        assert store.erase(selector) == 0


def test_one_of_trace_user_and_tenant_is_named() -> None:
    """None, or two, is nobody's."""
    for given in ({}, {"user": "u", "tenant": "t"}):
        with pytest.raises(InvalidArgument):
            Selector(**given)


def test_old_spans_go_and_their_totals_stay(place: Place) -> None:
    """By age, in pieces; by size, oldest first. Whole hours before are still answered."""
    spans = traffic(800)
    day = (START // 86400 + 2) * 86400 * NS
    with Store.open(place) as store:
        filled(store, spans)
        everything = seed_stats(store)
        first_day = metrics(store, Where(until_ns=day))
        gone = 0
        while deleted := store.retain(before_ns=day, limit=100):
            gone += deleted
        assert gone == sum(s.time_ns < day for s in spans) > 100
        assert store.one("SELECT min(time_ns) FROM spans")[0] >= day  # type: ignore[index]
        assert seed_stats(store) == everything
        assert metrics(store, Where(until_ns=day)) == first_day
        left = store.count()
        assert store.retain(bytes_max=1, limit=50) == 50
        assert store.count() == left - 50
        assert store.retain(bytes_max=2**60) == 0


def test_a_store_that_is_too_large_loses_what_is_too_much_and_no_more(place: Place) -> None:
    """The oldest, until it fits; then nothing, although files do not shrink."""
    chance = random.Random(1)
    pads = [f'{{"pad":"{chance.randbytes(2000).hex()}"}}' for _ in range(600)]
    with Store.open(place) as store:
        filled(
            store, [made(n, span_id=f"{n:016x}", time_ns=START * NS + n, attrs=pad) for n, pad in enumerate(pads, 1)]
        )
        most = store.size_bytes() // 2
        for _ in range(200):
            if not store.retain(bytes_max=most):
                break
        assert store.size_bytes() <= most
        assert 200 < store.count() < 330
        assert store.one("SELECT max(sequence) FROM spans") == (600,)


def test_a_store_that_was_built_again_knows_old_minutes_again(place: Place, tmp_path: Path) -> None:
    """What retention took is back with its stream, and a window that begins within an hour is answered as exactly."""
    spans = traffic(400)
    oldest = min(s.time_ns for s in spans)
    with Store.open(place) as store, Store.open(tmp_path / "fresh.db") as fresh:
        filled(store, spans)
        filled(fresh, spans)
        while store.retain(before_ns=oldest + 40 * 3600 * NS):
            pass
        with store.rebuilding():
            filled(store, spans)
        for minutes in range(0, 40 * 60, 37):
            where = Where(since_ns=oldest + minutes * 60 * NS)
            assert metrics(store, where) == metrics(fresh, where)


PRICES = b"""
version = "v%d"
[[price]]
model = "a"
input_per_million = %d
output_per_million = 2
"""


def test_costs_are_made_again_by_another_price_table(place: Place, tmp_path: Path) -> None:
    """What a span stated stays; what a table made, or nobody knew, follows the new table, and so do the totals."""
    old, new = (parse_prices(PRICES % (n, n), "t") for n in (1, 3))
    bare = [envelope(n, attrs={"model": "a", "tokens_in": 1000 * n, "tokens_out": 10}) for n in range(1, 30)]
    stated = [envelope(n, attrs={"model": "a", "tokens_in": 10, "cost_usd": 0.25}) for n in range(30, 40)]
    unknown = [envelope(n, attrs={"model": "zzz", "tokens_in": 10, "tokens_out": 1}) for n in range(40, 45)]
    records = [record(e, n) for n, e in enumerate([*bare, *stated, *unknown], 1)]
    with Store.open(place) as store, Store.open(tmp_path / "fresh.db") as fresh:
        filled(store, [r for x in records if (r := row_of(x, old))])
        filled(fresh, [r for x in records if (r := row_of(x, new))])
        assert seed_stats(store).cost_unknown_spans == 5
        assert answers(store) != answers(fresh)
        assert store.reprice(new) == 29
        assert answers(store) == answers(fresh)
        assert store.reprice(new) == 0
        assert store.one("SELECT cost_usd, price FROM spans ORDER BY sequence") == ((3000 + 20) / 1e6, "v3")


def test_series_beyond_the_cap_are_counted_together(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names from outside cannot make totals without end; erasing finds them where they were counted."""
    monkeypatch.setattr(module, "SERIES_MAX", 3)
    spans = [made(n, operation=f"op{n}", user_id=f"u{n}") for n in range(1, 11)]
    with Store.open(place) as store:
        filled(store, spans, page=4)
        found = {m.group["operation"]: m.spans for m in metrics(store, group_by=("operation",))}
        assert found == {"op1": 1, "op2": 1, "op3": 1, OTHER: 7}
        assert store.erase(Selector(user="u9")) == 1
        found = {m.group["operation"]: m.spans for m in metrics(store, group_by=("operation",))}
        assert found[OTHER] == 6


def test_small_state_is_kept_by_name(place: Place) -> None:
    """Bytes in, the same bytes out, also after a rebuild."""
    with Store.open(place) as store:
        assert store.load("alerts") is None
        store.save("alerts", b"one")
        store.save("alerts", b"\x00two")
        with store.rebuilding():
            pass
        assert store.load("alerts") == b"\x00two"


def test_attributes_are_compared_as_text(place: Place) -> None:
    """Strings, numbers, booleans, dotted and odd names; what is absent matches nothing."""
    spans = [
        envelope(1, attrs={"a.b": "x", "n": 5, "t": True, "o'd %?": "odd"}),
        envelope(2, attrs={"a": {"b": "x"}, "n": 6, "t": False}),
    ]
    with Store.open(place) as store:
        filled(store, [r for n, e in enumerate(spans, 1) if (r := row_of(record(e, n)))])
        for key, value, expected in (
            ("a.b", "x", [1]), ("n", "5", [1]), ("t", "true", [1]), ("t", "false", [2]), ("o'd %?", "odd", [1]),
            ("none", "x", []), ("a", '{"b":"x"}', [2]),
        ):  # fmt: skip
            page = queries.spans(store, Where(attrs=((key, value),)), limit=5)
            assert [s.sequence for s in page.spans] == expected, key
        with pytest.raises(InvalidArgument):
            Where(attrs=(('q"', "x"),))
        assert [m.group["attr.n"] for m in metrics(store, group_by=("attr.n",))] == ["5", "6"]


def test_pages_follow_one_another_without_holes(place: Place) -> None:
    """Spans and traces by cursor: everything once, in order, also with equal times."""
    spans = [s._replace(time_ns=START * NS + s.sequence // 10) for s in traffic(300)]
    with Store.open(place) as store:
        filled(store, spans)
        for where, oldest in ((Where(), False), (Where(tenant="acme"), True)):
            seen: list[int] = []
            cursor = ""
            while True:
                page = queries.spans(store, where, limit=17, cursor=cursor, oldest_first=oldest)
                seen += [s.sequence for s in page.spans]
                cursor = page.next
                if not cursor:
                    break
            expected = [s.sequence for s in spans if where.tenant is None or s.tenant == where.tenant]
            assert seen == (expected if oldest else expected[::-1])
        names: list[str] = []
        cursor = ""
        while True:
            traces = queries.traces(store, limit=10, cursor=cursor)
            names += [t.trace_id for t in traces.traces]
            cursor = traces.next
            if not cursor:
                break
        assert names == list(dict.fromkeys(s.trace_id for s in reversed(spans)))
        for bad in ("x", "1.2", "1.2.x", "-1.0.0", f"{2**63}.1.1"):
            with pytest.raises(InvalidArgument, match="cursor"):
                queries.spans(store, limit=1, cursor=bad)


def test_the_cost_of_a_trace_does_not_depend_on_where_its_rows_lie(place: Place) -> None:
    """Amounts are added in one order, though a changed row moves: else a repriced and a rebuilt store would differ."""
    costs = (0.1, 0.2, 0.3)
    with Store.open(place) as store:
        store.apply("trace", "i", Batch(after=0, scanned=3, rows=[made(n, cost_usd=c) for n, c in enumerate(costs, 1)]))
        before = queries.traces(store, limit=1)
        store._db.execute("UPDATE spans SET price = 'x' WHERE cost_usd = 0.1")
        store._db.execute("ANALYZE")  # so that PostgreSQL reads a small table as it lies
        assert queries.traces(store, limit=1) == before


def test_a_tenant_sees_its_own_spans_only(place: Place) -> None:
    """Every question that takes a tenant answers with nothing of another's, also inside one trace."""
    mine = made(1, tenant="acme", trace_id="t1")
    theirs = made(2, tenant="evil", trace_id="t1", model="secret", cost_usd=9.0)
    with Store.open(place) as store:
        filled(store, [mine, theirs])
        where = Where(tenant="acme")
        assert [s.sequence for s in queries.trace_page(store, "t1", limit=9, tenant="acme").spans] == [1]
        (summary,) = queries.traces(store, where, limit=9).traces
        assert (summary.spans, summary.models, summary.cost_usd) == (1, ["m1"], 0.5)
        assert [m.spans for m in metrics(store, where)] == [1]
        assert seed_stats(store, where).total_cost_usd == 0.5
        with pytest.raises(NotFound):
            queries.trace_page(store, "t1", limit=9, tenant="nobody")


# ----------------------------------------------------------------- files


def test_a_store_is_made_with_its_directory(tmp_path: Path) -> None:
    """However deep."""
    path = tmp_path / "deep" / "er" / "t.db"
    Store.open(path).close()
    assert path.is_file()
    with pytest.raises(NotFound):
        Store.read(tmp_path / "none" / "t.db")
    assert not (tmp_path / "none").exists()


def test_deleted_values_are_overwritten_in_the_file(tmp_path: Path) -> None:
    """After an erasure neither the file nor its log holds them."""
    path = tmp_path / "t.db"
    with Store.open(path) as store:
        store.apply("t", "i", Batch(after=0, scanned=2, rows=[made(1, user_id="u-gone", attrs='{"k":"4711-geheim"}')]))
        store.erase(Selector(user="u-gone"))
        for file in tmp_path.iterdir():
            assert b"geheim" not in file.read_bytes(), file


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
