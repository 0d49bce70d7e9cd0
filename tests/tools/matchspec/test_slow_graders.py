"""Graders that take their time: the loop, other samples and models' answers go on, and a timeout is an error, never a pass."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from conftest import run

import mist
from mist.errors import MistError
from mist.protocol.envelope import Envelope
from mist.tools.matchspec.derive import rescore
from mist.tools.matchspec.graders import grader, patterns
from mist.tools.matchspec.grading import GradeInput
from mist.tools.matchspec.run import run_suite
from mist.tools.matchspec.suite import Harness, Recorded, Sample, Suite, suite_of

from .asked import Oracle, asking

LONG_S = 30.0
"""What a test that fails waits for at most."""
go = threading.Event()
both = threading.Barrier(2)


def held(given: GradeInput) -> bool:
    """The first sample's verdict comes when the third was asked."""
    return given.sample_id != "s1" or go.wait(LONG_S)


async def waits(given: GradeInput) -> bool:
    while given.sample_id == "s1" and not go.is_set():
        await asyncio.sleep(0.001)
    return True


def hangs(given: GradeInput) -> bool:
    return go.wait(LONG_S)


def meets(given: GradeInput) -> bool:
    """Passes where two are graded at the same time."""
    try:
        both.wait(LONG_S)
    except threading.BrokenBarrierError:
        return False
    return True


@pytest.fixture(autouse=True)
def begin() -> Any:
    go.clear()
    both.reset()
    yield
    go.set()


def python(name: str, **more: Any) -> Any:
    return grader({"type": "python", "function": f"{__name__}:{name}", **more})


@pytest.mark.parametrize("name", ["held", "waits"])
def test_models_answer_while_a_python_grader_takes_its_time(name: str) -> None:
    class Freeing(Oracle):
        async def __call__(self, request: Envelope) -> Envelope:
            if request.data()["messages"][-1]["content"] == "3":
                go.set()
            return await super().__call__(request)

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            suite = asking(4, graders=(python(name),), concurrency=2)
            done = await run_suite(broker, await broker.open("eval"), suite, run="r", ask=Freeing())
            assert [s.result.passed for s in done.run.results] == [True] * 4

    run(body())


@pytest.mark.parametrize("negate", [False, True])
def test_a_grader_that_takes_too_long_is_an_error_and_not_a_pass(negate: bool) -> None:
    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("eval")
            suite = asking(2, graders=(python("hangs", negate=negate),), timeout_s=0.02)
            done = await run_suite(broker, stream, suite, run="r", ask=(oracle := Oracle()))
            assert [(s.result.passed, s.result.error_kind) for s in done.run.results] == [(False, "grader")] * 2
            assert "no verdict within 0.02 s" in done.run.results[0].result.error
            go.set()
            patient = asking(2, graders=(python("hangs", negate=negate),), timeout_s=LONG_S)
            again = await run_suite(broker, stream, patient, run="r", ask=oracle, retry_errors=True)
            assert ([s.result.passed for s in again.run.results], oracle.calls) == ([not negate] * 2, 2)

    run(body())


here: dict[str, Any] = {}
"""The `loop` and the `stop` of a run."""


def stops(given: GradeInput) -> bool:
    """Whoever runs it is told to stop, as by a signal."""
    told = threading.Event()
    here["loop"].call_soon_threadsafe(lambda: (here["stop"].set(), told.set()))
    return told.wait(LONG_S)


def test_a_stop_waits_for_what_is_being_graded_and_begins_nothing_new() -> None:
    """Also where answers are graded again; whoever goes on does the rest."""

    async def body() -> None:
        here["loop"] = asyncio.get_running_loop()
        async with mist.connect("memory:") as broker:
            stream = await broker.open("eval")
            suite = known(["a", "b", "c", "d"], python("stops"), concurrency=1)
            for left in (3, 2, 1, 0):
                here["stop"] = asyncio.Event()
                done = await run_suite(broker, stream, suite, run="a", stop=here["stop"])
                assert (done.ran, done.run.info.total - done.run.info.done) == (1, left)
            for left in (3, 2, 1, 0):
                here["stop"] = asyncio.Event()
                done = await rescore(broker, stream, suite, source="a", run="b", stop=here["stop"])
                assert (done.ran, done.run.info.total - done.run.info.done) == (1, left)

    run(body())


def known(outputs: list[str], *graders: Any, **more: Any) -> Suite:
    samples = [Sample(str(i), "?", "x", output=output) for i, output in enumerate(outputs)]
    harness = Harness(name="h", samples=samples, model=Recorded(label="m"), graders=graders, **more)
    return suite_of("known", [harness], where="t")


def test_a_pattern_in_a_process_of_its_own_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was put off lies in the stream in the order of the data; an error of it is one."""

    begun = threading.Event()

    def slow(pattern: str, flags: int, text: str) -> str | None:
        if "!" in text:
            raise MistError("took too long")
        begun.set()
        return text if go.wait(LONG_S) else None

    monkeypatch.setattr(patterns, "_in_a_child", slow)
    monkeypatch.setattr(patterns, "STEPS_MAX", 10**4)

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("eval")
            long = "a" * 200
            suite = known(["aab", long, "b", f"{long}!", "aab", long], grader({"type": "regex", "pattern": "a+b+"}))
            running = asyncio.ensure_future(run_suite(broker, stream, suite, run="r", batch=4))
            while not begun.is_set():
                await asyncio.sleep(0.001)
            go.set()  # by the loop, which goes on
            done = await running
            order = [s.sequence for s in done.run.results]
            assert [s.result.passed for s in done.run.results] == [True, True, False, False, True, True]
            assert (done.run.results[3].result.error_kind, order) == ("grader", sorted(order))

    run(body())


def test_recorded_answers_are_graded_several_at_a_time() -> None:
    """Also when they are graded again."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("eval")
            suite = known(["x", "y"], python("meets"), concurrency=2)
            done = await run_suite(broker, stream, suite, run="a")
            assert [s.result.passed for s in done.run.results] == [True, True]
            done = await rescore(broker, stream, suite, source="a", run="b")
            assert [s.result.passed for s in done.run.results] == [True, True]

    run(body())
