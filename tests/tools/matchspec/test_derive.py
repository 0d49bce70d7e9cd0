"""Runs made of other runs, what a run would still cost, and the history of a sample."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from conftest import run

import mist
from mist.broker.base import Broker, Stream
from mist.errors import Conflict, InvalidArgument, NotFound, Unavailable
from mist.kit.prices import Price, Prices
from mist.tools.matchspec.derive import Plan, dry_run, fork, history, replay, rescore
from mist.tools.matchspec.graders import grader
from mist.tools.matchspec.report import report_of
from mist.tools.matchspec.results import Run, list_runs, read_run
from mist.tools.matchspec.run import run_suite
from mist.tools.matchspec.suite import Gate, Infer, Sample, recorded_suite, suite_of

from .asked import Oracle, asking


def verdicts(found: Run) -> list[tuple[str, int, bool, float, str]]:
    return [
        (r.task, r.epoch, r.passed, r.score, r.error or r.output) for r in (stored.result for stored in found.results)
    ]


async def source(broker: Broker, **harness: Any) -> Stream:
    stream = await broker.open("eval")
    await run_suite(broker, stream, asking(10, **harness), run="a", ask=Oracle(wrong_from=8))
    return stream


@pytest.mark.parametrize("at", [0, 4, 10])
def test_a_fork_takes_results_over_and_asks_only_for_the_rest(at: int) -> None:
    """One change, its own run; the source stays as it was; a fork that was stopped is gone on with."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await source(broker)
            oracle = Oracle()
            changed = asking(10, model=Infer(model="better"))
            stop = asyncio.Event()

            def soon(done: int, total: int) -> None:
                if done > at:
                    stop.set()

            first = await fork(
                broker, stream, changed, source="a", at=at, run="b", ask=oracle, stop=stop, on_progress=soon
            )
            done = await fork(broker, stream, changed, source="a", at=at, run="b", ask=oracle)
            assert (first.kept, oracle.calls, done.run.info.complete) == (at, 10 - at, True)
            assert [s.result.run for s in done.run.results].count("a") == at
            assert [s.result.index for s in done.run.results] == list(range(10))
            parent = done.run.manifest.parent
            assert parent is not None
            assert (parent.run, parent.how, parent.taken, parent.changed) == ("a", "fork", at, ["models"])
            # a fork of the fork takes over from both
            third = await fork(broker, stream, changed, source="b", at=10, run="c", ask=oracle)
            assert (third.ran, verdicts(third.run)) == (0, verdicts(done.run))
            assert {(i.run, i.done, i.complete) for i in await list_runs(stream)} == {
                ("a", 10, True), ("b", 10, True), ("c", 10, True),
            }  # fmt: skip
            assert sum(s.result.passed for s in (await read_run(stream, "a")).results) == 7

    run(body())


def test_a_fork_of_other_data_or_beyond_the_end_is_refused() -> None:
    """Nothing is begun."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await source(broker)
            with pytest.raises(Conflict, match="other data"):
                await fork(broker, stream, asking(11), source="a", at=2, run="b")
            with pytest.raises(InvalidArgument, match="10 results"):
                await fork(broker, stream, asking(10), source="a", at=11, run="b")
            with pytest.raises(InvalidArgument):
                await fork(broker, stream, asking(10), source="a", at=-1, run="b")
            with pytest.raises(NotFound):
                await fork(broker, stream, asking(10), source="none", at=0, run="b")
            assert [i.run for i in await list_runs(stream)] == ["a"]

    run(body())


@pytest.mark.parametrize("after", [0, 6, 10**6])
def test_a_replay_from_any_cursor_gives_the_same_report_and_asks_nobody(after: int) -> None:
    """Results up to the cursor by reference, the rest from the recorded answers."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await source(broker, epochs=2)
            oracle = Oracle()
            suite = asking(10, epochs=2)
            done = await replay(broker, stream, suite, source="a", after=after, run="b", ask=oracle)
            assert (done.calls, oracle.calls, done.usd) == (0, 0, 0.0)
            assert done.kept == min(max(after - 1, 0), 20)
            assert done.recalled == 20 - done.kept
            whole = await read_run(stream, "a")
            assert verdicts(done.run) == verdicts(whole)
            keep = [msgspec.structs.replace(s.result, run="", duration_ms=0) for s in done.run.results]
            assert keep == [msgspec.structs.replace(s.result, run="", duration_ms=0) for s in whole.results]
            # of a replay too
            again = await replay(broker, stream, suite, source="b", after=0, run="c", ask=oracle)
            assert (again.calls, again.recalled, verdicts(again.run)) == (0, 20, verdicts(whole))

    run(body())


def test_a_replay_asks_nobody_for_what_was_not_recorded() -> None:
    """It is an error, and never paid for."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await source(broker)
            await broker.delete("infer")
            oracle = Oracle()
            done = await replay(broker, stream, asking(10), source="a", after=6, run="b", ask=oracle)
            assert (oracle.calls, done.calls, done.kept, done.run.info.errors) == (0, 0, 5, 5)
            assert "asks nobody" in done.run.results[-1].result.error
            with pytest.raises(Conflict, match="another suite"):
                await replay(broker, stream, asking(10, template="x {{input}}"), source="a", after=0, run="c")

    run(body())


def test_rescoring_grades_the_recorded_outputs_and_nothing_else() -> None:
    """New graders, new expectations; what had no output is an error; its own run with a reference to the source."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("eval")
            oracle = Oracle(wrong_from=8)
            oracle.failing = {"2": [Unavailable("away")]}
            await run_suite(broker, stream, asking(10), run="a", ask=oracle)
            calls = oracle.calls
            strict = asking(10, graders=(grader({"type": "exact"}), grader({"type": "contains", "negate": True})))
            done = await rescore(broker, stream, strict, source="a", run="b")
            assert (oracle.calls, done.calls, done.run.info.complete) == (calls, 0, True)
            assert [s.score for s in done.run.results[0].result.scores] == [1.0, 0.0]
            assert (done.run.results[1].result.error, done.run.info.errors) == ("no recorded output", 1)
            assert done.run.results[0].result.cost_usd == 0.01
            assert (done.usd, done.run.manifest.parent) != (0.01, None)
            assert done.usd == 0.0
            # expectations may change: samples are matched by id
            other = [Sample(f"s{i}", str(i), "0") for i in range(1, 11)]
            lenient = await rescore(broker, stream, asking(10, samples=other), source="a", run="c")
            assert [s.result.passed for s in lenient.run.results] == [False] * 7 + [True] * 3
            assert (await rescore(broker, stream, strict, source="a", run="b")).ran == 0
            with pytest.raises(Conflict, match="recorded no output"):
                await rescore(broker, stream, asking(10, name="other"), source="a", run="d")

    run(body())


def test_rescoring_gives_a_run_its_clusters() -> None:
    """Another cluster is another suite: going on is refused, and rescoring asks nobody."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("eval")
            samples = [Sample(f"s{i}", str(i), str(i), metadata={"document": i // 4}) for i in range(8)]
            oracle = Oracle()
            before = asking(8, samples=samples)
            await run_suite(broker, stream, before, run="a", ask=oracle)
            clustered = suite_of(
                before.name, before.harnesses, where="t", gate=Gate(overall=0.5, cluster="document"), seed=before.seed
            )
            with pytest.raises(Conflict, match="clusters by document, not nothing"):
                await run_suite(broker, stream, clustered, run="a", ask=oracle)
            assert not (await report_of(stream, "a", gate=clustered.gate)).ok
            await rescore(broker, stream, clustered, source="a", run="b")
            assert oracle.calls == 8
            found = await report_of(stream, "b")
            assert [(g.n, g.clusters, g.passed) for g in found.grader_results] == [(8, 2, True)]

    run(body())


def test_an_output_that_was_cut_is_not_graded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grading half of it would be another result."""
    monkeypatch.setattr("mist.tools.matchspec.judging.OUTPUT_CHARS_MAX", 10)

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("eval")
            samples = [Sample("1", "q", "1"), Sample("2", "q", "2")]
            suite = recorded_suite(
                "s", samples, {"m": {"1": "x" * 20 + " 1", "2": "2"}}, [grader({"type": "numeric"})], where="t"
            )
            whole = await run_suite(broker, stream, suite, run="a")
            assert [(s.result.passed, s.result.output_cut) for s in whole.run.results] == [(True, True), (True, False)]
            done = await rescore(broker, stream, suite, source="a", run="b")
            assert [s.result.error for s in done.run.results] == ["the recorded output was cut", ""]

    run(body())


def test_a_dry_run_says_what_is_left_and_what_it_costs() -> None:
    """By the table before it began, by what was paid once it has; asks nobody and stores nothing."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            model = Infer(model="oracle", params={"max_tokens": 100})
            suite = asking(10, model=model, epochs=2)
            prices = Prices([Price(model="oracle", input_per_million=0.0, output_per_million=1000.0)], "1")
            nothing = await dry_run(broker, None, suite, prices=prices)
            assert (nothing.total, nothing.left, nothing.calls, nothing.usd) == (20, 20, 20, pytest.approx(2.0))
            unknown: Plan = await dry_run(broker, None, suite)
            assert (unknown.usd, "no price table" in unknown.how) == (None, True)
            assert (await dry_run(broker, None, asking(3), prices=prices)).usd is None  # no max_tokens
            stream = await broker.open("eval")
            stop = asyncio.Event()
            first = await run_suite(
                broker, stream, suite, run="a", ask=Oracle(), stop=stop,
                on_progress=lambda done, total: stop.set() if done >= 8 else None,
            )  # fmt: skip
            plan = await dry_run(broker, stream, suite, run="a", prices=prices)
            assert (plan.finished, plan.left, plan.calls) == (first.ran, 20 - first.ran, 20 - first.ran)
            assert plan.usd == pytest.approx(0.01 * plan.calls)
            assert plan.spent_usd == pytest.approx(0.01 * first.ran)
            assert (await stream.info()).records == 1 + first.ran
            known = recorded_suite(
                "s", [Sample("1", "", "1")], {"m": {"1": "1"}}, [grader({"type": "exact"})], where="t"
            )
            free = await dry_run(broker, stream, known)
            assert (free.calls, free.usd, free.left) == (0, 0.0, 1)
            with pytest.raises(Conflict):
                await dry_run(broker, stream, known, run="a")

    run(body())


def test_the_history_of_a_sample_goes_over_all_runs() -> None:
    """By its id, or by its key, which a changed sample does not have; it says which result counts."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("eval")
            oracle = Oracle(wrong_from=3)
            oracle.failing = {"3": [Unavailable("away")]}
            suite = asking(3)
            await run_suite(broker, stream, suite, run="a", ask=oracle)
            await run_suite(broker, stream, suite, run="a", ask=oracle, retry_errors=True)
            await run_suite(broker, stream, asking(3), run="b", ask=Oracle())
            seen = await history(stream, "s3")
            assert [(s.run, s.passed, bool(s.error), s.counts) for s in seen] == [
                ("a", False, True, False), ("a", False, False, True), ("b", True, False, True),
            ]  # fmt: skip
            key = (await read_run(stream, "a")).results[2].result.key
            assert await history(stream, key) == seen
            assert await history(stream, "s3", harness="other") == []

    run(body())
