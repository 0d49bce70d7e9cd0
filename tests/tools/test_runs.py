"""Runs: durable results, resumed from what the stream holds, compared and counted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import run
from hypothesis import given
from hypothesis import strategies as st

import mist
from mist.broker.base import Broker, Message, Stream
from mist.errors import Ambiguous, Conflict, InvalidArgument, NotFound
from mist.protocol.codec import decode
from mist.protocol.payloads import EvalResult
from mist.tools.matchspec.compare import Comparison, compare
from mist.tools.matchspec.graders import grader
from mist.tools.matchspec.report import count
from mist.tools.matchspec.results import list_runs, read_run, records, result_of, rows
from mist.tools.matchspec.run import cursor_name, find_unfinished, new_run_id, run_suite
from mist.tools.matchspec.statistics import mcnemar, wilson
from mist.tools.matchspec.suite import Sample, Suite, recorded_suite


class Killed(BaseException):
    """The process is gone at this instruction."""


def suite(count: int = 20, right: int = 15, name: str = "s") -> Suite:
    """`m` answers `right` samples correctly, `n` all."""
    samples = [Sample(str(i), "?", str(i)) for i in range(1, count + 1)]
    answers = {
        "m": {s.id: s.id if int(s.id) <= right else "0" for s in samples},
        "n": {s.id: f"it is {s.id}" for s in samples},
    }
    return recorded_suite(name, samples, answers, [grader({"type": "numeric"})], where="test")


async def opened(broker: Broker) -> Stream:
    return await broker.open("eval")


def test_a_run_is_a_manifest_and_one_result_per_sample_and_model() -> None:
    """In the suite's order, under the run's subjects, readable by the seed's payload class."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await opened(broker)
            outcome = await run_suite(broker, stream, suite(), run="r1", batch=7)
            assert (outcome.ran, outcome.kept, outcome.stopped, outcome.resumed_after) == (40, 0, False, None)
            page = await stream.read(limit=1000)
            assert [r.subject for r in page.records] == ["eval.run.r1"] + ["eval.result.r1"] * 40
            first = decode(page.records[1].data)
            assert first.decode(EvalResult) == EvalResult("s", "1", True, 1.0, 0.0, 0.0, 0)
            assert (first.correlation_id, first.causation_id) == ("r1", decode(page.records[0].data).id)
            stored = [result_of(r) for r in page.records[1:]]
            assert [(s.result.task, s.result.model) for s in stored if s] == [
                (str(i), m) for m in ("m", "n") for i in range(1, 21)
            ]
            cursor = await broker.checkpoints.load("eval", cursor_name("r1"))
            assert cursor is not None
            assert cursor.sequence == 41
            table = rows((r.result for r in outcome.run.results), outcome.run.manifest.models)
            assert [(r.model, r.passed, r.total, r.rate) for r in table] == [("m", 15, 20, 0.75), ("n", 20, 20, 1.0)]

    run(body())


@pytest.mark.parametrize("where", ["before append", "after append", "before cursor"])
def test_a_run_killed_anywhere_goes_on_without_doing_anything_twice(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Killed once per batch at this point, resumed every time: 40 results, no sample graded after it was stored."""
    stored: set[tuple[str, str]] = set()

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await opened(broker)
            append, save = stream.append, broker.checkpoints.save
            kills = 0

            async def dying_append(messages: Sequence[Message], **kw: Any) -> list[int]:
                nonlocal kills
                if messages[0].subject.startswith("eval.run") or kills % 2:
                    kills += 1
                    return await append(messages, **kw)
                kills += 1
                if where == "before append":
                    raise Killed
                await append(messages, **kw)
                raise Killed

            async def dying_save(*args: Any, **kw: Any) -> Any:
                nonlocal kills
                kills += 1
                if kills % 2:
                    raise Killed
                return await save(*args, **kw)

            if where == "before cursor":
                monkeypatch.setattr(broker.checkpoints, "save", dying_save)
            else:
                monkeypatch.setattr(stream, "append", dying_append)
            for _ in range(30):
                try:
                    outcome = await run_suite(broker, stream, suite(), run="r1", batch=5)
                except Killed:
                    found = await read_run(stream, "r1")
                    now = {(r.result.model, r.result.task) for r in found.results}
                    assert stored <= now
                    stored.update(now)
                    continue
                break
            assert outcome.kept >= len(stored)
            assert outcome.ran + outcome.kept == 40
            whole = await read_run(stream, "r1")
            assert (len(whole.results), whole.doubled, whole.info.complete) == (40, 0, True)
            assert (await stream.info()).records == 41

    run(body())


def test_a_stop_keeps_what_was_judged_and_the_rest_is_done_later() -> None:
    """Stopped after a third; resumed from its cursor; a run that is complete does nothing more."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await opened(broker)
            stop = asyncio.Event()

            def enough(done: int, total: int) -> None:
                assert total == 40
                if done >= 12:
                    stop.set()

            first = await run_suite(broker, stream, suite(), run="r1", batch=4, stop=stop, on_progress=enough)
            # the batch that was judged while the third was being stored is stored too
            assert (first.stopped, first.ran, first.run.info.complete) == (True, 16, False)
            assert await find_unfinished(stream, suite()) == "r1"
            second = await run_suite(broker, stream, suite(), run="r1", batch=4)
            assert (second.kept, second.ran, second.resumed_after) == (16, 24, 17)
            assert await find_unfinished(stream, suite()) is None
            third = await run_suite(broker, stream, suite(), run="r1")
            assert (third.kept, third.ran, third.stopped) == (40, 0, False)

    run(body())


def test_an_answer_that_was_lost_is_repeated_with_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ambiguous append is repeated; the broker stores it once; the count is right."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await opened(broker)
            append = stream.append
            calls = 0

            async def flaky(messages: Sequence[Message], **kw: Any) -> list[int]:
                nonlocal calls
                calls += 1
                sequences = await append(messages, **kw)
                if calls in (1, 3):
                    raise Ambiguous("the answer was lost")
                return sequences

            monkeypatch.setattr(stream, "append", flaky)
            outcome = await run_suite(broker, stream, suite(4), run="r1", batch=3)
            assert (len(outcome.run.results), outcome.run.doubled) == (8, 0)
            assert (await stream.info()).records == 9

    run(body())


def test_a_run_belongs_to_one_suite() -> None:
    """Other data under the same run id is refused; nothing is mixed."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await opened(broker)
            await run_suite(broker, stream, suite(), run="r1")
            with pytest.raises(Conflict, match="another suite"):
                await run_suite(broker, stream, suite(right=14), run="r1")
            with pytest.raises(InvalidArgument):
                await run_suite(broker, stream, suite(), run="not a name")
            with pytest.raises(NotFound):
                await read_run(stream, "r2")

    run(body())


def test_the_first_result_of_a_sample_counts() -> None:
    """A second one (two runners, ids forgotten) is counted as doubled and changes no table."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("eval", config=mist.StreamConfig(dedupe_window_s=0.0))
            await run_suite(broker, stream, suite(3), run="r1")
            page = await stream.read(after=1, limit=2)
            await stream.append([Message(r.subject, r.data) for r in page.records])
            found = await read_run(stream, "r1")
            assert (len(found.results), found.doubled) == (6, 2)

    run(body())


def test_runs_are_listed_newest_first_and_strangers_passed_over() -> None:
    """Records that are no results of ours, garbage included, do not break a listing."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await opened(broker)
            await run_suite(broker, stream, suite(3), run="r1")
            await stream.append(
                [Message("eval.result.r1", b"garbage"), Message("eval.run.x", b"{}"), Message("other", b"x")]
            )
            await run_suite(broker, stream, suite(2, right=1, name="t"), run="r2")
            found = await list_runs(stream)
            assert [(i.run, i.suite, i.done, i.total, i.complete) for i in found] == [
                ("r2", "t", 4, 4, True),
                ("r1", "s", 6, 6, True),
            ]

    run(body())


def test_a_missing_answer_is_an_error_result_and_never_a_pass() -> None:
    """It counts in the total, so a model that was not asked cannot look good."""
    samples = [Sample("1", "?", "1"), Sample("2", "?", "2")]
    partial = recorded_suite("s", samples, {"m": {"1": "1"}}, [grader({"type": "numeric"})], where="t")

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            outcome = await run_suite(broker, await opened(broker), partial, run="r")
            (row,) = rows(r.result for r in outcome.run.results)
            assert (row.passed, row.total, outcome.run.info.errors) == (1, 2, 1)

    run(body())


def test_replaying_from_a_sequence_gives_the_rest() -> None:
    """What is read after any position of the run and what lies before it are the whole run."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await opened(broker)
            await run_suite(broker, stream, suite(5), run="r1")
            for after in range(11):
                rest = [r async for r in records(stream, ("eval.result.r1",), after=after)]
                assert len(rest) == 10 - max(after - 1, 0)

    run(body())


def test_two_runs_are_compared_sample_by_sample() -> None:
    """Gained, lost, and the exact chance of such a split."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await opened(broker)
            for name, right in (("a", 15), ("b", 18), ("c", 3)):
                await run_suite(broker, stream, suite(right=right), run=name)

            async def diff(a: str, b: str) -> list[Comparison]:
                before, after = [(await count(stream, name, ids=True)).tally for name in (a, b)]
                return compare(before, after)

            up, same = await diff("a", "b")
            assert (up.model, up.gained, up.lost, up.p_value) == ("m", ["16", "17", "18"], [], 0.25)
            assert up.delta == pytest.approx(0.15)
            assert (same.model, same.gained, same.lost, same.p_value) == ("n", [], [], 1.0)
            down = (await diff("b", "c"))[0]
            assert (len(down.lost), down.p_value < 0.001) == (15, True)
            other = recorded_suite(
                "o", [Sample("x", "", "1")], {"z": {"x": "1"}}, [grader({"type": "exact"})], where="t"
            )
            await run_suite(broker, stream, other, run="d")
            with pytest.raises(Conflict, match="no model with common samples"):
                await diff("a", "d")

    run(body())


@pytest.mark.parametrize(
    ("passed", "total", "low", "high"),
    [(37, 50, 0.604, 0.841), (370, 500, 0.700, 0.777), (5, 5, 0.566, 1), (8, 8, 0.676, 1), (20, 20, 0.839, 1), (0, 5, 0, 0.434), (0, 0, 0, 1)],
)  # fmt: skip
def test_wilson_intervals_have_their_known_values(passed: int, total: int, low: float, high: float) -> None:
    """To three digits, from the textbook formula."""
    found = wilson(passed, total)
    assert found == (pytest.approx(low, abs=6e-4), pytest.approx(high, abs=6e-4))


@pytest.mark.parametrize(("rate", "total"), [(0.80, 16), (0.85, 22), (0.90, 35), (0.95, 73), (0.99, 381)])
def test_the_smallest_perfect_run_that_proves_a_rate(rate: float, total: int) -> None:
    """The least n whose lower limit reaches the rate when all pass."""
    assert wilson(total, total)[0] >= rate > wilson(total - 1, total - 1)[0]


@given(st.integers(0, 400), st.integers(1, 400))
def test_an_interval_holds_its_rate(passed: int, total: int) -> None:
    """Within 0..1, around the rate."""
    passed = min(passed, total)
    low, high = wilson(passed, total)
    assert 0 <= low <= passed / total <= high <= 1


def test_mcnemar_has_its_known_values() -> None:
    """Exact binomial, two-sided, never above 1."""
    assert (mcnemar(0, 0), mcnemar(1, 1), mcnemar(0, 6)) == (1.0, 1.0, 0.03125)
    assert mcnemar(2, 10) == pytest.approx(0.03857, abs=1e-5)
    assert mcnemar(700, 700) == 1.0


def test_run_ids_are_names() -> None:
    """Whatever the suite is called."""
    for name in ("gsm8k", "a b/ö", "--x", "y" * 200):
        assert cursor_name(new_run_id(name))
