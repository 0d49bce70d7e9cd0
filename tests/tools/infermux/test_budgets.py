"""The ledger: nothing is granted twice, nothing is forgotten; by tasks, by processes, over kills and full disks."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

from mist.errors import Closed, InvalidArgument, RateLimited, StorageFull
from mist.tools.infermux import budgets as budgets_module
from mist.tools.infermux.books import Books, Entry, Reservation, Reserve, Settle, cells_of, ends_in_s, period_of
from mist.tools.infermux.budgets import ORPHAN_S, Ledger, dollars
from mist.tools.infermux.chat import Caller
from mist.tools.infermux.figures import timeseries
from mist.tools.infermux.settings import BudgetSettings

ANN = Caller(key="ann", team="red", project="x")
BOB = Caller(key="bob", team="red")
NOON_NS = 1_795_608_000_000_000_000  # 2026-11-25 12:00 UTC
CENT = 10_000_000


def entry(nano: int | None, caller: Caller = ANN, **more: Any) -> Entry:
    return Entry(time_ns=NOON_NS, caller=caller, provider="p", model="m", nano=nano, **more)


def budget(limit: str = "1.00", **more: Any) -> BudgetSettings:
    return BudgetSettings(limit_usd=limit, **more)


class Clock:
    def __init__(self) -> None:
        self.ns = NOON_NS

    def __call__(self) -> int:
        return self.ns


async def used(ledger: Ledger, one: BudgetSettings) -> dict[str, int]:
    await ledger.flush()
    return {s.name: s.used_nano for s in await ledger.states([one])}


def check_sums(path: Path) -> None:
    """Every total is the sum of what was spent and what is reserved."""
    db = sqlite3.connect(path)
    for kind, name, period, nano in db.execute("SELECT * FROM totals").fetchall():
        where = "1" if kind == "all" else f"{kind} = '{name}'"
        spent = db.execute(f"SELECT ifnull(sum(nano), 0) FROM costs WHERE {where} AND day LIKE '{period}%'").fetchone()[
            0
        ]
        held = db.execute(
            f"SELECT ifnull(sum(nano), 0) FROM reservations WHERE {where} AND"
            f" strftime('%Y-%m-%d', time_ns / 1000000000, 'unixepoch') LIKE '{period}%'"
        ).fetchone()[0]
        assert nano == spent + held, (kind, name, period)
    by_day, by_hour = [
        db.execute(f"SELECT sum(calls), sum(nano) FROM {name}").fetchone() for name in ("costs", "hours")
    ]
    assert by_day == by_hour
    db.close()


def test_reserve_settle_release(tmp_path: Path) -> None:
    """What is reserved counts, what is settled counts as it was, what is released does not; a refusal says all of it."""

    async def body() -> None:
        each = budget(key="*")
        ledger = await Ledger.open(tmp_path / "l.db", time_ns=Clock())
        one = await ledger.reserve(ANN, 60 * CENT, [each])
        with pytest.raises(RateLimited) as refused:
            await ledger.reserve(ANN, 41 * CENT, [each])
        assert refused.value.meta == {
            "reason": "budget_exceeded", "budget": "key */month", "limit_usd": "1.00", "used_usd": "0.60", "wanted_usd": "0.41",
        }  # fmt: skip
        assert not refused.value.retryable
        assert refused.value.retry_after_s == 5.5 * 86400  # December
        two = await ledger.reserve(ANN, 40 * CENT, [each])
        three = await ledger.reserve(BOB, 100 * CENT, [each])
        ledger.settle(one, entry(5 * CENT, tokens_in=7))
        ledger.release(two)
        assert await used(ledger, each) == {"ann": 5 * CENT, "bob": 100 * CENT}
        ledger.settle(three, entry(None, BOB))  # nobody knows what it cost: it counts as nothing, and is counted
        ledger.book(entry(3, tokens_out=9))
        assert await used(ledger, each) == {"ann": 5 * CENT + 3, "bob": 0}
        assert ledger.outstanding == 0
        lines = await ledger.report("key", "model")
        assert [(n.by["key"], n.by["model"], n.calls, n.nano, n.unknown) for n in lines] == [
            ("ann", "m", 2, 5 * CENT + 3, 0), ("bob", "m", 1, 0, 1),
        ]  # fmt: skip
        assert [(n.tokens_in, n.tokens_out) for n in await ledger.report(since="2026-11", until="2026-11")] == [(7, 9)]
        assert await ledger.report("team", until="2026-10") == []
        assert await ledger.report(since="2026-11-26") == []
        await ledger.aclose()
        await ledger.aclose()
        with pytest.raises(Closed):
            ledger.release(one)
        check_sums(tmp_path / "l.db")
        assert list((tmp_path / "l.db.owners").iterdir()) == []

    run(body())


def test_scopes_and_periods(tmp_path: Path) -> None:
    """Key, team, project, everybody; a day, a month, ever. All must have room, none is charged when one refuses."""

    async def body() -> None:
        clock = Clock()
        ledger = await Ledger.open(tmp_path / "l.db", time_ns=clock)
        team, day, ever = (
            budget("0.50", team="red"),
            budget("0.30", key="ann", period="day"),
            budget("0.70", period="total"),
        )
        all_of_them = [team, day, ever]
        ledger.settle(await ledger.reserve(ANN, 30 * CENT, all_of_them), entry(30 * CENT))
        for caller, nano, refuser in ((ANN, 1, "key ann/day"), (BOB, 21 * CENT, "team red/month")):
            with pytest.raises(RateLimited) as refused:
                await ledger.reserve(caller, nano, all_of_them)
            assert refused.value.meta["budget"] == refuser
        clock.ns += 86400 * 10**9  # tomorrow
        ledger.settle(await ledger.reserve(ANN, 20 * CENT, all_of_them), entry(20 * CENT))
        clock.ns += 30 * 86400 * 10**9  # next month
        ledger.release(await ledger.reserve(BOB, 20 * CENT, all_of_them))
        with pytest.raises(RateLimited) as refused:
            await ledger.reserve(Caller(), 21 * CENT, all_of_them)
        assert (refused.value.meta["budget"], refused.value.retry_after_s) == ("all/total", None)
        await ledger.reserve(Caller(team="blue"), 20 * CENT, all_of_them)
        await ledger.aclose()
        check_sums(tmp_path / "l.db")

    run(body())


def test_a_new_budget_knows_what_was(tmp_path: Path) -> None:
    """Totals are kept whether a budget asks for them or not; also of calls that nothing was reserved for."""

    async def body() -> None:
        ledger = await Ledger.open(tmp_path / "l.db", time_ns=Clock())
        ledger.book(entry(99 * CENT))
        with pytest.raises(RateLimited):
            await ledger.reserve(ANN, 2 * CENT, [budget(project="x")])
        await ledger.aclose()

    run(body())


def test_alerts_and_overrides(tmp_path: Path) -> None:
    """An alert is told once, when its limit is passed; an override says which model to ask, and counts on."""

    async def body() -> None:
        told: list[tuple[str, str]] = []
        ledger = await Ledger.open(
            tmp_path / "l.db", time_ns=Clock(), on_alert=lambda b, caller: told.append((b.name, caller.key))
        )
        alert = budget("0.10", action="alert")
        for _ in range(3):
            await ledger.reserve(ANN, 6 * CENT, [alert])
        assert told == [("all/month", "ann")]
        cheap = budget("0.10", action="model_override", model_override="small")
        with pytest.raises(RateLimited) as refused:
            await ledger.reserve(ANN, CENT, [cheap])
        assert refused.value.meta["model_override"] == "small"
        await ledger.reserve(ANN, CENT, [cheap], exempt=frozenset({cheap.name}))
        assert await used(ledger, cheap) == {"": 19 * CENT}
        await ledger.aclose()

    run(body())


def test_64_callers_never_get_a_cent_too_much(tmp_path: Path) -> None:
    """64 tasks want some 20 dollars out of 3, settle less than they reserved, are cancelled at random: at no moment is more
    granted than there is, and in the end it is all accounted for."""

    async def body() -> None:
        import random

        rng = random.Random(7)
        limit = budget("3.00", team="red")
        ledger = await Ledger.open(tmp_path / "l.db", time_ns=Clock())
        granted = spent = 0
        refused = 0

        async def caller(n: int) -> None:
            nonlocal granted, spent, refused
            for _ in range(8):
                want = rng.randrange(1, 9 * CENT)
                try:
                    reservation = await ledger.reserve(Caller(key=f"k{n}", team="red"), want, [limit])
                except RateLimited:
                    refused += 1
                    continue
                granted += want
                assert granted <= 300 * CENT
                await asyncio.sleep(0)
                cost = rng.randrange(0, want + 1)
                granted -= want - cost
                spent += cost
                ledger.settle(reservation, entry(cost, Caller(key=f"k{n}", team="red")))

        tasks = [asyncio.create_task(caller(n)) for n in range(64)]
        for n in range(40):
            await asyncio.sleep(0.001)
            if n % 8 == 7:
                victim = tasks[n]
                victim.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [r for r in results if r is not None and not isinstance(r, asyncio.CancelledError)] == []
        assert refused > 0
        total = (await used(ledger, limit))["red"]
        assert total <= 300 * CENT
        # a task that was cancelled between grant and settling leaves its reservation, which counts
        held = ledger._books.of_owner(ledger._owner)
        assert ledger.outstanding == len(held)
        assert total == spent + sum(r.nano for r in held)
        await ledger.aclose()
        check_sums(tmp_path / "l.db")

    run(body())


CHILD = """
import asyncio, sys
from pathlib import Path
from mist.errors import RateLimited
from mist.tools.infermux.books import Entry
from mist.tools.infermux.budgets import Ledger
from mist.tools.infermux.chat import Caller
from mist.tools.infermux.settings import BudgetSettings

async def main(path, what):
    ledger = await Ledger.open(Path(path))
    limit, who, granted = BudgetSettings(limit_usd="0.50", team="red"), Caller(key=what, team="red"), 0
    if what == "hold":
        await asyncio.gather(*(ledger.reserve(who, 10_000_000, [limit], provider="p", model="m", request=f"r{n}") for n in range(20)))
        print("held", flush=True)
        await asyncio.sleep(60)
    print("ready", flush=True)
    sys.stdin.readline()
    async def one():
        nonlocal granted
        while True:
            try:
                r = await ledger.reserve(who, 3_000_000, [limit])
            except RateLimited:
                return
            granted += 1
            ledger.settle(r, Entry(time_ns=r.time_ns, caller=who, provider="p", model="m", nano=3_000_000))
    await asyncio.gather(*(one() for _ in range(16)))
    await ledger.aclose()
    print(granted, flush=True)
asyncio.run(main(*sys.argv[1:]))
"""


def child(path: Path, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), what], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def test_four_processes_share_one_budget(tmp_path: Path) -> None:
    """Together they get what there is, to the last part that fits: 166 times 0.003 of 0.50."""
    path = tmp_path / "l.db"
    children = [child(path, f"k{n}") for n in range(4)]
    try:
        assert [line(c) for c in children] == ["ready"] * 4
        for c in children:
            assert c.stdin is not None
            c.stdin.write("go\n")
            c.stdin.flush()
        granted = [int(line(c)) for c in children]
        assert [c.wait(30) for c in children] == [0] * 4
    finally:
        for c in children:
            end(c)
    assert sum(granted) == 166
    check_sums(path)


def test_a_kill_forgets_nothing(tmp_path: Path) -> None:
    """What a process held when it was killed counts whole; what is found recorded is settled as it was, what is not is booked
    whole after a day; a process that lives keeps its own."""
    path = tmp_path / "l.db"
    holder = child(path, "hold")
    try:
        assert line(holder) == "held"

        async def while_it_lives() -> None:
            ledger = await Ledger.open(path)
            assert await ledger.orphans() == []
            with pytest.raises(RateLimited):
                await ledger.reserve(BOB, 31 * CENT, [budget("0.50", team="red")])
            await ledger.aclose()

        run(while_it_lives())
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    finally:
        end(holder)

    clock = Clock()

    async def after_it() -> None:
        red = budget("0.50", team="red", period="total")
        ledger = await Ledger.open(path)
        orphans = await ledger.orphans()
        assert sorted(r.request for r in orphans) == sorted(f"r{n}" for n in range(20))
        clock.ns = orphans[1].time_ns
        with pytest.raises(RateLimited):
            await ledger.reserve(BOB, 31 * CENT, [red])
        ledger.settle(orphans[0], Entry(time_ns=0, caller=orphans[0].caller, provider="p", model="m", nano=CENT // 2))
        assert await used(ledger, red) == {"red": 20 * CENT - CENT // 2}
        assert ledger.outstanding == 0
        await ledger.aclose()
        clock.ns += int(ORPHAN_S * 1e9)
        late = await Ledger.open(path, time_ns=clock)
        assert len(await late.orphans()) == 19  # not too old yet
        await late.aclose()
        clock.ns += 10**9 * 60
        late = await Ledger.open(path, time_ns=clock)
        assert await late.orphans() == []
        assert await used(late, red) == {"red": 20 * CENT - CENT // 2}
        (found,) = await late.report("model")
        assert (found.calls, found.estimated, found.nano) == (20, 19, 20 * CENT - CENT // 2)
        await late.aclose()

    run(after_it())
    check_sums(path)
    assert list(path.with_name("l.db.owners").iterdir()) == []


def test_a_cancelled_reservation_holds_nothing(tmp_path: Path) -> None:
    """Cancelled before its commit, or between its commit and its task: either way it is released."""

    async def body() -> None:
        one = budget()
        ledger = await Ledger.open(tmp_path / "l.db", time_ns=Clock())
        for turns in range(12):
            task = asyncio.create_task(ledger.reserve(ANN, 90 * CENT, [one]))
            for _ in range(turns):
                await asyncio.sleep(0.0005 if turns > 4 else 0)
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                ledger.release(task.result())
            assert await used(ledger, one) in ({"": 0}, {"": 90 * CENT})
            assert await used(ledger, one) == {"": 0}
        # the future has its result, and the task is cancelled before it runs again
        task = asyncio.create_task(ledger.reserve(ANN, 90 * CENT, [one]))
        await asyncio.sleep(0)
        asks: list[Any] = []
        answer = ledger._answer
        ledger._answer = lambda found: (answer(found), asks.extend(found), task.cancel())  # type: ignore[method-assign,assignment]
        await asyncio.wait({task})
        ledger._answer = answer  # type: ignore[method-assign]
        assert task.cancelled()
        assert await used(ledger, one) == {"": 0}
        assert ledger.outstanding == 0
        await ledger.aclose()

    run(body())


def test_what_could_not_be_written_is_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk refuses reservations, and loses no settlement."""

    async def body() -> None:
        one = budget()
        ledger = await Ledger.open(tmp_path / "l.db", time_ns=Clock())
        reservation = await ledger.reserve(ANN, 50 * CENT, [one])
        real = ledger._books.apply

        def full(operations: Any) -> Any:
            raise StorageFull("the disk is full")

        ledger._books.apply = full  # type: ignore[method-assign]
        ledger.settle(reservation, entry(CENT))
        with pytest.raises(StorageFull):
            await ledger.reserve(ANN, CENT, [one])
        assert ledger.unwritten == 1
        ledger._books.apply = real  # type: ignore[method-assign]
        assert await used(ledger, one) == {"": CENT}
        assert ledger.unwritten == 0
        await ledger.aclose()

    run(body())
    assert "disk is full" in caplog.text


def test_a_failed_commit_changes_nothing(tmp_path: Path) -> None:
    """The totals in memory go back as well."""
    books = Books.open(tmp_path / "l.db")
    books.apply([reserve("a", 5)])
    books._db.execute("CREATE TEMP TRIGGER t BEFORE INSERT ON reservations BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(Exception, match="no"):
        books.apply([Settle("a", entry(1)), reserve("b", 7)])
    books._db.execute("DROP TRIGGER t")
    assert books.cell(("key", "ann", "")) == 5
    books.apply([Settle("a", entry(1)), Settle("a", entry(1)), Settle("nobody's", None)])
    assert books.cell(("key", "ann", "")) == 1
    books.close()
    check_sums(tmp_path / "l.db")


def reserve(id: str, nano: int, limits: tuple[BudgetSettings, ...] = (), caller: Caller = ANN) -> Reserve:
    return Reserve(
        reservation=Reservation(id=id, owner="o", time_ns=NOON_NS, caller=caller, provider="p", model="m", request="", nano=nano),
        budgets=limits,
    )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("rsux"), st.integers(0, 7), st.integers(0, 60), st.booleans()), max_size=25),
    st.integers(1, 4),
)
def test_any_order_over_two_files_handles(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any], batch: int
) -> None:
    """Against a model: two openings of one file take turns, in batches; never above the limit, and totals are sums."""
    path = tmp_path_factory.mktemp("ledger") / "l.db"
    both = [Books.open(path), Books.open(path)]
    limits = (budget("0.0000001", team="red"),)  # 100
    held: dict[str, int] = {}
    spent = 0
    for begin in range(0, len(steps), batch):
        operations: list[Any] = []
        expected: list[bool] = []
        for verb, n, nano, _ in steps[begin : begin + batch]:
            id = f"r{n}"
            if verb == "r" and id not in held:
                fits = spent + sum(held.values()) + nano <= 100
                expected.append(fits)
                operations.append(reserve(id, nano, limits))
                if fits:
                    held[id] = nano
            elif verb in "su":
                cost = min(nano, held.pop(id, 0)) if id in held else None
                spent += cost or 0 if verb == "s" else 0
                operations.append(Settle(id, entry(cost or 0) if verb == "s" else None))
                expected.append(True)
        outcomes = both[begin // batch % 2].apply(operations)
        assert [o.refused is None for o in outcomes] == expected
        assert spent + sum(held.values()) <= 100
    for books in both:
        books.close()
    check_sums(path)


def test_periods() -> None:
    """In UTC; the end of December is January."""
    assert period_of("day", NOON_NS) == "2026-11-25"
    assert period_of("month", NOON_NS) == "2026-11"
    assert ends_in_s("day", NOON_NS) == 12 * 3600
    december = NOON_NS + 36 * 86400 * 10**9 + 43_199 * 10**9
    assert (period_of("day", december), ends_in_s("month", december), ends_in_s("day", december)) == (
        "2026-12-31",
        1.0,
        1.0,
    )
    assert ends_in_s("total", december) is None
    assert len(set(cells_of(ANN, NOON_NS))) == 12
    assert [dollars(n) for n in (0, 1, CENT, 1_500_000_000)] == ["0.00", "0.000000001", "0.01", "1.50"]


def test_what_is_no_ledger(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"not a database at all" * 100)
    other = sqlite3.connect(tmp_path / "y.db")
    other.execute("CREATE TABLE t (a)")
    other.close()
    for name in ("x.db", "y.db"):
        with pytest.raises(InvalidArgument, match=name):
            run(Ledger.open(tmp_path / name))
    assert budgets_module.FLUSH_S > 0


def test_a_ledger_without_hours_gets_them(tmp_path: Path) -> None:
    async def body() -> None:
        path = tmp_path / "l.db"
        await (await Ledger.open(path, time_ns=Clock())).aclose()
        with sqlite3.connect(path) as db:
            db.execute("DROP TABLE hours")
            db.execute("PRAGMA user_version=1")
        clock = Clock()
        ledger = await Ledger.open(path, time_ns=clock)
        for hours, nano in ((0, 3), (1, 4), (5, 5)):
            ledger.book(
                Entry(time_ns=NOON_NS + hours * 3600 * 10**9, caller=ANN, provider="p", model="m", nano=nano * CENT)
            )
        found = await timeseries(ledger, "7", "2h", NOON_NS + 6 * 3600 * 10**9)
        assert [(p["start"][11:16], p["total_usd"], p["requests"]) for p in found["points"]] == [
            ("12:00", 0.07, 2), ("14:00", 0.0, 0), ("16:00", 0.05, 1), ("18:00", 0.0, 0),
        ]  # fmt: skip
        await ledger.aclose()
        check_sums(path)

    run(body())


def test_recorded_answers_settle_what_a_dead_process_had_reserved(tmp_path: Path) -> None:
    """One whose answer is recorded costs what it did; one whose cost is unknown, or that failed, stays whole; once is enough."""
    from mist.broker.registry import connect
    from mist.client.client import Client
    from mist.protocol.envelope import Envelope
    from mist.protocol.payloads import INFER_RESPONSE, InferResponse
    from mist.tools.infermux.reconcile import reconcile

    async def body() -> None:
        dead = await Ledger.open(tmp_path / "l.db")
        for request in ("q1", "q1", "q2", "q3", ""):
            await dead.reserve(ANN, 10 * CENT, [], provider="p", model="m", request=request)
        await dead.aclose()  # it leaves without settling, which is all that is seen of a kill
        ledger = await Ledger.open(tmp_path / "l.db")
        async with connect("memory:") as broker:
            assert await reconcile(ledger, broker) == 0
            async with Client(broker) as client:
                for request, more in (
                    ("q1", {"cost_usd": 0.02}), ("q2", {"cost_usd": None}), ("q3", {"cost_usd": 0.0, "error_code": "timeout"}),
                    ("q9", {"cost_usd": 5.0}),
                ):  # fmt: skip
                    answer = InferResponse(model="m", provider="p", **more)  # type: ignore[arg-type]
                    envelope = Envelope.new(INFER_RESPONSE, answer, source="infermux", correlation_id=request)
                    await client.publish("infer", envelope)
            assert await reconcile(ledger, broker) == 2
            assert await reconcile(ledger, broker) == 0
        assert await used(ledger, budget(period="total")) == {"": 42 * CENT}
        assert len(await ledger.orphans()) == 3
        await ledger.aclose()

    run(body())
