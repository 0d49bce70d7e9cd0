"""Runs that ask somebody: asked once, stored before judged, gone on with at no cost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from conftest import run

import mist
from mist.broker.base import Broker, Message
from mist.client.handler import Handler
from mist.errors import Ambiguous, Conflict, InvalidArgument, RateLimited, TransportError, Unavailable
from mist.kit.prices import Price, Prices
from mist.protocol.codec import decode, encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import INFER_REQUEST, INFER_RESPONSE
from mist.tools.matchspec.derive import replay
from mist.tools.matchspec.grading import GradeInput, Verdict
from mist.tools.matchspec.manifest import manifest_message
from mist.tools.matchspec.results import Result, Run
from mist.tools.matchspec.run import Limits, Outcome, run_suite
from mist.tools.matchspec.suite import Infer, Python, Recorded, Suite, suite_of

from .asked import Killed, Oracle, asking


def report(found: Run) -> list[Result]:
    """What a report is made of: the results without the times, in the order of the data."""
    return [msgspec.structs.replace(s.result, duration_ms=0, latency_ms=None, run="") for s in found.results]


async def go(broker: Broker, suite: Suite, name: str = "r", **options: Any) -> Outcome:
    return await run_suite(broker, await broker.open("eval"), suite, run=name, **options)


def test_every_sample_is_asked_once_and_its_answer_is_kept() -> None:
    """Question and answer lie on the stream of answers, correlated, under the run's subject; the result names them."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            oracle = Oracle(wrong_from=16)
            done = await go(broker, asking(), ask=oracle)
            assert (done.calls, done.recalled, done.ran, oracle.calls) == (20, 0, 20, 20)
            assert (done.tokens, round(done.usd, 9), done.unpriced) == (200, 0.2, 0)
            assert [s.result.task for s in done.run.results] == [f"s{i}" for i in range(1, 21)]
            assert sum(s.result.passed for s in done.run.results) == 15
            records = (await (await broker.open("infer")).read(limit=1000)).records
            pairs = [decode(r.data) for r in records]
            asked = {e.id for e in pairs if e.type == INFER_REQUEST}
            assert asked == {e.correlation_id for e in pairs if e.type == INFER_RESPONSE} == set(oracle.ids)
            assert {r.subject for r in records} == {"infer.request.r", "infer.response.r"}
            result = done.run.results[0].result
            assert (result.request_id in asked, result.cost_usd, result.tokens_in, result.latency_ms) == (
                True, 0.01, 10, 3,
            )  # fmt: skip
            assert result.trace_id == ""  # the oracle passes no trace context on

    run(body())


class DyingBroker:
    """A broker whose process dies before or after the second append to one of its streams, once it lives."""

    def __init__(self, broker: Broker, what: str, when: str) -> None:
        self._broker = broker
        self._stream = "infer" if what == "answers" else "eval"
        self._when = when
        self.appends = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    def revive(self) -> None:
        self.appends = 0

    async def open(self, name: str, **kw: Any) -> Any:
        stream = await self._broker.open(name, **kw)
        return DyingStream(stream, self) if name == self._stream else stream

    async def append(self, stream: Any, messages: Sequence[Message], **kw: Any) -> list[int]:
        self.appends += not messages[0].subject.startswith("eval.run")
        if self.appends < 2:
            return await stream.append(messages, **kw)  # type: ignore[no-any-return]
        if self._when == "after":
            await stream.append(messages, **kw)
        raise Killed


class DyingStream:
    def __init__(self, stream: Any, broker: DyingBroker) -> None:
        self._stream = stream
        self._broker = broker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def append(self, messages: Sequence[Message], **kw: Any) -> list[int]:
        return await self._broker.append(self._stream, messages, **kw)


@pytest.mark.parametrize("where", ["answers before", "answers after", "results before", "results after"])
def test_killed_at_every_append_a_run_gives_the_report_of_one_that_was_not(where: str) -> None:
    """Killed before or after each append of answers or results: only questions that were in flight are asked twice."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            whole = await go(broker, asking(12), "whole", ask=Oracle(wrong_from=9), infer_stream="other")
            oracle = Oracle(wrong_from=9)
            dying = DyingBroker(broker, *where.split())
            kills = 0
            while True:
                try:
                    done = await go(dying, asking(12, concurrency=3), ask=oracle)  # type: ignore[arg-type]
                    break
                except (Killed, Ambiguous):  # the batching window tells its waiters so
                    kills += 1
                    dying.revive()
                    assert kills < 30
            assert kills
            assert [(r.task, r.passed, r.score, r.output) for r in report(done.run)] == [
                (r.task, r.passed, r.score, r.output) for r in report(whole.run)
            ]
            # lost at a kill: at most the three that were in flight
            assert oracle.calls <= 12 + 3 * kills
            assert done.run.doubled == 0

    run(body())


def test_a_question_that_lies_on_the_stream_is_not_asked_again() -> None:
    """The result is lost, the answer is not: going on asks nobody."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            oracle = Oracle()
            first = await go(broker, asking(5), ask=oracle)
            await broker.delete("eval")
            stream = await broker.open("eval")
            manifest = first.run.manifest
            await stream.append([manifest_message(manifest)])
            again = await go(broker, asking(5), ask=oracle)
            assert (again.calls, again.recalled, again.ran, oracle.calls) == (0, 5, 5, 5)
            assert report(again.run) == report(first.run)

    run(body())


async def serve(broker: Broker, oracle: Oracle) -> None:
    """Answers what lies on `infer-requests` into `infer`, each once; what the oracle refuses is answered with an error."""

    async def answer(request: Envelope) -> list[Envelope]:
        try:
            return [await oracle(request)]
        except TransportError as exc:
            payload = {"content": "", "error": exc.message, "error_code": "invalid", "finish_reason": "error"}
            return [Envelope.new(INFER_RESPONSE, payload, source="oracle")]

    handler = Handler("oracle", answer, accepts=(INFER_REQUEST,))
    questions, answers = await broker.open("infer-requests"), await broker.open("infer")
    after = 0
    while True:
        page = await questions.read(after=after, wait_s=1.0)
        for record in page.records:
            for out in await handler(decode(record.data)):
                await answers.append([Message(INFER_RESPONSE, encode(out), out.id)])
        after = page.scanned


def test_over_a_broker_a_question_is_published_once_and_its_answer_waited_for() -> None:
    """A runner that was killed with its questions out finds their answers."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            oracle = Oracle()
            suite = asking(6, timeout_s=20.0)
            running = asyncio.create_task(go(broker, suite))
            stream = await broker.open("infer-requests")
            while (await stream.info()).records < 4:
                await asyncio.sleep(0.001)
            running.cancel()
            await asyncio.wait({running})
            assert oracle.calls == 0
            serving = asyncio.create_task(serve(broker, oracle))
            done = await go(broker, suite)
            serving.cancel()
            await asyncio.wait({serving})
            assert (oracle.calls, max(oracle.asked.values()), done.calls) == (6, 1, 2)
            assert all(s.result.passed for s in done.run.results)

    run(body())


def test_an_answer_that_is_an_error_is_one_and_is_asked_for_anew_under_another_id() -> None:
    """It is not an empty text to be graded; going on asks nobody; with retry_errors it is another question."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            oracle = Oracle()
            oracle.failing = {"2": [TransportError("no such model")]}
            serving = asyncio.create_task(serve(broker, oracle))
            first = await go(broker, asking(3, retries=2))
            assert [s.result.error for s in first.run.results] == ["", "invalid: no such model", ""]
            assert (await go(broker, asking(3, retries=2))).calls == 0
            # the result is lost, the answer is not
            await broker.delete("eval")
            await (await broker.open("eval")).append([manifest_message(first.run.manifest)])
            second = await go(broker, asking(3, retries=2))
            assert (second.calls, report(second.run)[1].error) == (0, "invalid: no such model")
            third = await go(broker, asking(3, retries=2), retry_errors=True)
            assert (third.calls, third.run.info.errors, oracle.asked["2"]) == (1, 0, 2)
            again = await replay(
                broker, await broker.open("eval"), asking(3, retries=2), source="r", after=0, run="again"
            )
            assert [(r.task, r.error, r.output) for r in report(again.run)] == [
                (r.task, r.error, r.output) for r in report(third.run)
            ]
            serving.cancel()
            await asyncio.wait({serving})

    run(body())


def test_failures_are_repeated_as_often_as_the_harness_says() -> None:
    """A retryable error again, a permanent one not; what stays is an error result with its attempts and kind."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            oracle = Oracle()
            oracle.failing = {
                "1": [RateLimited("slow down"), Unavailable("away")],
                "2": [TransportError("no", retryable=False)],
                "3": [Unavailable("away")] * 9,
            }
            done = await go(broker, asking(4, retries=2), ask=oracle)
            found = {s.result.task: s.result for s in done.run.results}
            assert (found["s1"].passed, found["s1"].attempts) == (True, 3)
            assert (found["s2"].error, found["s2"].error_kind, oracle.asked["2"]) == ("no", "model", 1)
            assert (found["s3"].error_kind, found["s3"].attempts, found["s3"].scores[0].passed) == ("model", 3, False)
            assert (done.calls, oracle.calls, done.run.info.errors) == (8, 8, 2)
            # errors are finished too, until they are asked for
            assert (await go(broker, asking(4, retries=2), ask=oracle)).calls == 0
            oracle.failing["3"] = [Unavailable("still away")] * 3
            second = await go(broker, asking(4, retries=2), ask=oracle, retry_errors=True)
            assert (second.kept, second.calls, second.run.info.errors) == (2, 4, 1)
            assert {s.result.task for s in second.run.results if s.result.error} == {"s3"}
            third = await go(broker, asking(4, retries=2), ask=oracle, retry_errors=True)
            assert (third.kept, third.calls, third.run.info.errors, third.run.info.complete) == (3, 1, 0, True)
            assert len(set(oracle.ids[:8])) == 8, "a repeat is another question"

    run(body())


def test_an_answer_that_takes_too_long_is_an_error_of_its_sample() -> None:
    """The others are answered."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            oracle = Oracle()

            async def slow(request: Envelope) -> Envelope:
                if request.data()["messages"][-1]["content"] == "2":
                    await asyncio.Event().wait()
                return await oracle(request)

            done = await go(broker, asking(3, timeout_s=0.05), ask=slow)
            assert [(s.result.task, s.result.error_kind) for s in done.run.results] == [
                ("s1", ""), ("s2", "timeout"), ("s3", ""),
            ]  # fmt: skip

    run(body())


def test_whoever_is_asked_may_raise_anything() -> None:
    """It is an error of the sample: a wrong correlation, an answer that is none, a bug."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            oracle = Oracle()

            async def strange(request: Envelope) -> Envelope:
                text = request.data()["messages"][-1]["content"]
                if text == "1":
                    raise ZeroDivisionError("bug")
                if text == "2":
                    return Envelope.new(INFER_RESPONSE, {"content": "2"}, source="x", correlation_id="other")
                if text == "3":
                    return Envelope.new(INFER_RESPONSE, {"tokens": 3}, source="x", correlation_id=request.id)
                if text == "4":
                    payload = {"content": "4", "cost_usd": -1.0}
                    return Envelope.new(INFER_RESPONSE, payload, source="x", correlation_id=request.id)
                return await oracle(request)

            done = await go(broker, asking(5), ask=strange)
            assert [bool(s.result.error) for s in done.run.results] == [True, True, True, True, False]
            assert "ZeroDivisionError" in done.run.results[0].result.error

    run(body())


@pytest.mark.parametrize(
    ("limits", "usd", "why", "most"),
    [
        (Limits(usd=0.05), 0.01, "0.05 USD", 5 + 4),
        (Limits(tokens=100), 0.01, "100 tokens", 10 + 4),
        (Limits(usd=1.0), None, "cannot be kept", 4),
        (Limits(seconds=0.0), 0.01, "0 s", 0),
    ],
)
def test_a_limit_stops_a_run_which_can_be_gone_on_with(limits: Limits, usd: float | None, why: str, most: int) -> None:
    """It says why; what was in flight is kept; without the limit the run ends as if nothing had been."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            oracle = Oracle(usd=usd)
            first = await go(broker, asking(), ask=oracle, limits=limits)
            assert first.stopped
            assert why in first.why
            assert oracle.calls == first.ran <= most
            if limits.usd == 0.05:
                # what was spent is read from the stream: the limit is the run's, not the call's
                assert (await go(broker, asking(), ask=oracle, limits=limits)).ran == 0
            last = await go(broker, asking(), ask=oracle)
            assert (last.stopped, last.why, oracle.calls) == (False, "", 20)

    run(body())


def test_a_limit_in_tokens_needs_answers_that_say_theirs() -> None:
    """Unknown is not zero: such a limit would never be reached."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            done = await go(broker, asking(), ask=Oracle(tokens=None), limits=Limits(tokens=5))
            assert (done.stopped, done.ran <= 4) == (True, True)
            assert "the limit of 5 tokens cannot be kept" in done.why

    run(body())


def test_prices_tell_what_nobody_stated() -> None:
    """A table gives the cost of answers without one; then a limit in dollars can be kept."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            prices = Prices([Price(model="oracle", input_per_million=1000.0)], "1")
            done = await go(broker, asking(), ask=Oracle(usd=None), prices=prices, limits=Limits(usd=0.05))
            assert 5 <= done.ran <= 9
            assert done.run.results[0].result.cost_usd == pytest.approx(0.01)

    run(body())


def test_repeats_are_results_of_their_own_with_their_own_seed() -> None:
    """Three epochs: three questions of different ids, three results, one sample."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            seeds: list[int] = []
            oracle = Oracle()

            async def seeded(request: Envelope) -> Envelope:
                seeds.append(request.data()["params"]["seed"])
                return await oracle(request)

            base = asking(4, epochs=3, reducer="pass@2")
            suite = suite_of("asking", base.harnesses, seed=7, where="test")
            done = await go(broker, suite, ask=seeded)
            assert [(s.result.index, s.result.epoch) for s in done.run.results] == [
                (i, e) for i in range(4) for e in (1, 2, 3)
            ]
            assert sorted(seeds) == [7] * 4 + [8] * 4 + [9] * 4
            assert len(set(oracle.ids)) == 12
            assert len({s.result.key for s in done.run.results}) == 4

    run(body())


def test_a_resume_that_differs_is_refused_and_says_what_differs() -> None:
    """Data, model settings, graders, repeats, seed, prompts; how it is run is nobody's business."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            base = asking(3)
            await go(broker, base, ask=Oracle())
            (h,) = base.harnesses
            for changed, what in [
                (asking(4), "h: other data"),
                (asking(3, model=Infer(model="oracle", params={"temperature": 1})), r"other model settings \(params"),
                (
                    asking(
                        3,
                        graders=(*h.graders, Judged()),
                    ),
                    "h: other graders",
                ),
                (asking(3, epochs=2), "other repeats"),
                (asking(3, template="Say {{input}}"), "other prompts"),
                (suite_of("asking", [h], seed=1, where="t"), "another seed"),
                (suite_of("asking", [msgspec.structs.replace(h, name="x")], where="t"), "harness h is gone; harness x"),
            ]:
                with pytest.raises(Conflict, match=what):
                    await go(broker, changed, ask=Oracle())
            same = asking(3, concurrency=1, timeout_s=1.0, retries=5)
            assert (await go(broker, same, ask=Oracle())).ran == 0

    run(body())


class Judged(msgspec.Struct, frozen=True):
    """A grader that has to ask: it likes what is even, fails on 3, and never ends on 4."""

    name: str = "judged"
    negate: bool = False
    weight: float | None = None
    threshold: float | None = None

    def check(self, expected: str) -> None:
        return None

    async def grade_async(self, given: GradeInput) -> Verdict:
        if given.output == "3":
            raise Unavailable("the judge is out")
        if given.output == "4":
            await asyncio.Event().wait()
        return Verdict(int(given.output) % 2 == 0, 1.0 if int(given.output) % 2 == 0 else 0.25, given.output)


def test_a_grader_that_fails_is_an_error_and_is_judged_again_without_asking_the_model() -> None:
    """Also when it is negated, and when it does not answer in time."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            oracle = Oracle()
            suite = asking(5, graders=(Judged(negate=True),), timeout_s=0.05)
            done = await go(broker, suite, ask=oracle)
            found = [(s.result.passed, s.result.score, s.result.error_kind) for s in done.run.results]
            assert found == [
                (True, 0.75, ""), (False, 0.0, ""), (False, 0.0, "grader"), (False, 0.0, "grader"), (True, 0.75, ""),
            ]  # fmt: skip
            second = await go(broker, suite, ask=oracle, retry_errors=True)
            assert (second.calls, second.recalled, second.run.info.errors, oracle.calls) == (0, 2, 2, 5)
            assert round(second.usd, 9) == 0.05, "what was judged twice was paid once"

    run(body())


def test_a_prompt_is_made_of_template_and_system() -> None:
    """And the parameters go along."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            seen: list[Any] = []

            async def look(request: Envelope) -> Envelope:
                seen.append(request.data())
                return Envelope.new(INFER_RESPONSE, {"content": "1"}, source="x", correlation_id=request.id)

            model = Infer(model="m", provider="p", params={"temperature": 0})
            await go(broker, asking(1, model=model, system="Be brief.", template="Q: {{input}}?"), ask=look)
            assert seen == [
                {
                    "model": "m", "provider": "p", "params": {"temperature": 0},
                    "messages": [
                        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q: 1?"},
                    ],
                    "meta": {"run": "r", "harness": "h", "sample": "s1", "epoch": "1"},
                }
            ]  # fmt: skip

    run(body())


def test_a_baseline_fills_the_deltas() -> None:
    """Score minus the baseline's score of the same sample."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            await go(broker, asking(4), "base", ask=Oracle(wrong_from=3))
            done = await go(broker, asking(4), "new", ask=Oracle(wrong_from=4), baseline="base")
            assert [(s.result.baseline_score, s.result.delta) for s in done.run.results] == [
                (1, 0), (1, 0), (0, 1), (0, 0),
            ]  # fmt: skip
            assert done.run.manifest.baseline_run == "base"

    run(body())


def test_harnesses_that_know_and_that_ask_share_a_run() -> None:
    """One suite, one manifest, one total; a harness's results are told apart."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            (h,) = asking(3).harnesses
            echo = msgspec.structs.replace(h, name="e", model=Python(target=f"{__name__}:twice", label="twice"))
            suite = suite_of("two", [h, echo], where="t")
            done = await go(broker, suite, ask=Oracle())
            assert [(s.result.harness, s.result.output) for s in done.run.results] == [
                ("h", "1"), ("h", "2"), ("h", "3"), ("e", "2"), ("e", "4"), ("e", "6"),
            ]  # fmt: skip
            assert (done.run.info.total, done.run.manifest.models) == (6, ["oracle", "twice"])
            # a python model's answers are recorded as well
            assert (await (await broker.open("infer")).info()).records == 12

    run(body())


def twice(text: str) -> str:
    return str(2 * int(text))


def test_text_without_a_utf8_form_ends_no_run() -> None:
    """A suite with it is refused, an answer with it is an error of its sample, a reason is stored with a question mark."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            (h,) = asking(1).harnesses
            known = msgspec.structs.replace(h, model=Recorded(label="m", answers={"s1": "\ud800 1"}))
            with pytest.raises(InvalidArgument, match="no JSON form"):
                suite_of("s", [known], where="t")
            strange = msgspec.structs.replace(h, model=Python(target=f"{__name__}:lone"))
            done = await go(broker, suite_of("s", [strange], where="t"))
            assert (done.run.results[0].result.error_kind, done.run.info.errors) == ("model", 1)
            reasoned = msgspec.structs.replace(h, graders=(Reasoned(),))
            done = await go(broker, suite_of("s", [reasoned], where="t"), "r2", ask=Oracle())
            assert done.run.results[0].result.scores[0].reason == "? is why"

    run(body())


def lone(text: str) -> str:
    return "\ud800 1"


class Reasoned(Judged, frozen=True):
    async def grade_async(self, given: GradeInput) -> Verdict:
        return Verdict(True, 1.0, None, "\ud800 is why")


def test_a_harness_that_cannot_be_right_is_refused() -> None:
    """Before anything runs."""
    for bad in (
        {"concurrency": 0}, {"epochs": 0}, {"timeout_s": 0.0}, {"retries": -1}, {"reducer": "best"},
        {"reducer": "pass@2"}, {"pass_score": 0.0}, {"graders": ()}, {"samples": []},
        {"graders": (Judged(weight=0.0),)}, {"graders": (Judged(weight=1.0), Judged(name="b"))},
    ):  # fmt: skip
        with pytest.raises(InvalidArgument):
            asking(3, **bad)  # type: ignore[arg-type]
