"""Graders that ask: a judge, embeddings, traces, handed in as callables."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mist.errors import InvalidArgument, Malformed, TimedOut
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import INFER_RESPONSE, TRACE_SPAN, InferRequest, InferResponse, TraceSpan
from mist.tools.matchspec.graders import Ask, Hands, equip, grader
from mist.tools.matchspec.graders import hands as hands_module
from mist.tools.matchspec.graders.parsers import parse
from mist.tools.matchspec.grading import GradeInput, Verdict, describe

SEEN = GradeInput(output="4, {{expected}}", expected="four", input="2+2?", trace_id="t")


class Judge:
    """Answers from a list, and keeps what it was asked."""

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)
        self.asked: list[Envelope] = []

    async def __call__(self, question: Envelope) -> Envelope:
        self.asked.append(question)
        return Envelope.new(INFER_RESPONSE, InferResponse(content=self.replies.pop(0)), source="t")

    def prompt(self, n: int = 0) -> str:
        messages = self.asked[n].decode(InferRequest).messages
        assert messages
        return messages[-1].content


def ask(spec: dict[str, Any], hands: Hands, seen: GradeInput = SEEN) -> Verdict:
    (ready,) = equip([grader(spec)], hands)
    found: Verdict = asyncio.run(ready.grade_async(seen))  # type: ignore[union-attr]
    return found


JUDGE = {"type": "model_graded", "model": "judge"}


def test_a_judge_is_asked_once_and_kept() -> None:
    """By an envelope at temperature 0, whose id is made from the question; the output is no template."""
    judge, verdicts = Judge("Right.\nScore: 9"), {}
    hands = Hands(ask=judge, verdicts=verdicts)
    first, again = ask(JUDGE, hands), ask(JUDGE, hands)
    assert first == again
    assert (first.passed, first.score, first.reason) == (True, 0.9, "Right.")
    assert len(judge.asked) == len(verdicts) == 1
    request = judge.asked[0].decode(InferRequest)
    assert (request.model, request.params) == ("judge", {"temperature": 0})
    assert "2+2?" in judge.prompt()
    assert "4, {{expected}}" in judge.prompt()
    other = Judge("Score: 9")
    ask(JUDGE, Hands(ask=other))
    assert other.asked[0].id == judge.asked[0].id
    newer = Judge("Score: 1")
    assert not ask({**JUDGE, "version": "2"}, Hands(ask=newer, verdicts=verdicts)).passed
    assert newer.asked[0].id != judge.asked[0].id


def test_the_same_question_at_the_same_time_is_asked_once() -> None:
    """Two samples with one prompt; a failure is not kept, and the next one asks for itself."""
    judge = Judge("no verdict here", "Score: 10")
    hands = Hands(ask=judge)

    async def both() -> list[Verdict | BaseException]:
        (ready,) = equip([grader(JUDGE)], hands)
        return await asyncio.gather(*(ready.grade_async(SEEN) for _ in range(3)), return_exceptions=True)  # type: ignore[union-attr]

    failed, *passed = asyncio.run(both())
    assert isinstance(failed, InvalidArgument)
    assert [isinstance(v, Verdict) and v.passed for v in passed] == [True, True]
    assert (len(judge.asked), hands.asking) == (2, {})


def test_only_so_many_verdicts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes."""
    monkeypatch.setattr(hands_module, "VERDICTS_MAX", 2)
    kept = hands_module.Verdicts()
    for key in "abcb":
        kept[key] = key
    assert list(kept) == ["b", "c"]


@pytest.mark.parametrize(
    ("parser", "reply", "score"),
    [
        ("integer_0_10", "8", 0.8),
        ("integer_0_10", "It is fine, 3 of 4.\n\n**Score: 7/10**\n", 0.7),
        ("integer_0_10", "Rating: 10 out of 10.", 1.0),
        ("integer_0_10", "7/5", None),
        ("integer_0_10", "11", None),
        ("integer_0_10", "7 or 8", None),
        ("integer_0_10", "Score: high", None),
        ("integer_0_10", "", None),
        ("integer_0_10", "Score: 7\nThank you!", None),
        ("integer_0_10", "-3", None),
        ("integer_0_5", "Score: 4/5", 0.8),
        ("integer_0_5", "6", None),
        ("float_0_1", "Score: 0.25", 0.25),
        ("float_0_1", ".5", 0.5),
        ("float_0_1", "1.5", None),
        ("float_0_1", "nan", None),
        ("choice", "because\nAnswer: (A)", 1.0),
        ("choice", "B.", 0.0),
        ("choice", "A or B", None),
        ("choice", "C", None),
        ("json", '```json\n{"score": 0.5, "reason": "half"}\n```', 0.5),
        ("json", '{"pass": true}', 1.0),
        ("json", '{"score": true}', None),
        ("json", '{"score": 7}', None),
        ("json", '{"score": null}', None),
        ("json", "no", None),
    ],
)
def test_a_reply_says_its_score_plainly_or_has_none(parser: Any, reply: str, score: float | None) -> None:
    """Guessing at a verdict is how a judge becomes generous."""
    found = parse(parser, reply, {"A": 1.0, "B": 0.0})
    assert (found[0] if found else None) == (pytest.approx(score) if score is not None else None)


def test_a_reply_without_a_verdict_is_an_error() -> None:
    """Not a failure and not a pass; the end of the reply is shown."""
    with pytest.raises(InvalidArgument, match=r"no verdict .*as an AI"):
        ask(JUDGE, Hands(ask=Judge("Sorry, as an AI")))
    with pytest.raises(InvalidArgument, match="nobody was handed in"):
        ask(JUDGE, Hands())
    with pytest.raises(InvalidArgument, match="expected text is empty"):
        ask(JUDGE, Hands(ask=Judge("Score: 10")), GradeInput(output="x", expected=""))


def test_what_the_judge_fails_with_comes_through() -> None:
    """A timeout stays one, for whoever decides about repeats; a strange envelope is malformed."""

    async def slow(_question: Envelope) -> Envelope:
        raise TimedOut("no answer in 1 s")

    async def strange(_question: Envelope) -> Envelope:
        return Envelope.new(TRACE_SPAN, TraceSpan(), source="t")

    cases: list[tuple[Ask, type[Exception]]] = [(slow, TimedOut), (strange, Malformed)]
    for hand, error in cases:
        with pytest.raises(error):
            ask(JUDGE, Hands(ask=hand))


@pytest.mark.parametrize(
    ("replies", "score"),
    [
        (["Answer: A", "Answer: B"], 1.0),
        (["Answer: B", "Answer: A"], 0.0),
        (["Answer: A", "Answer: A"], 0.5),
        (["Answer: tie", "Answer: B"], 0.75),
    ],
)
def test_a_pair_is_judged_in_both_orders(replies: list[str], score: float) -> None:
    """A judge that likes the first place gives a tie, not a win."""
    judge = Judge(*replies)
    assert ask({**JUDGE, "pairwise": True}, Hands(ask=judge)).score == score
    assert judge.prompt(0).index("4, {{") < judge.prompt(0).index("four")
    assert judge.prompt(1).index("4, {{") > judge.prompt(1).index("four")


@pytest.mark.parametrize(
    ("vectors", "score", "passed"),
    [
        ([[1.0, 0.0], [2.0, 0.0]], 1.0, True),
        ([[1.0, 0.0], [0.0, 1.0]], 0.0, False),
        ([[1.0, 0.0], [-1.0, 0.0]], 0.0, False),
        ([[1.0, 1.0], [1.0, 0.0]], 0.7071, False),
    ],
)
def test_similarity_is_a_cosine_from_0(vectors: list[list[float]], score: float, passed: bool) -> None:
    """Below 0 counts as 0, and is stated."""

    async def embed(_model: str, _texts: list[str]) -> list[list[float]]:
        return vectors

    found = ask({"type": "semantic_similarity"}, Hands(embed=embed))
    assert (found.passed, found.score) == (passed, pytest.approx(score, abs=1e-4))
    assert ("cosine -1.0000" in found.reason) is (vectors[1][0] < 0)


@pytest.mark.parametrize("vectors", [[[1.0]], [[1.0], [1.0, 2.0]], [[0.0], [1.0]], [[], []], [[float("nan")], [1.0]]])
def test_vectors_that_cannot_be_compared_are_an_error(vectors: list[list[float]]) -> None:
    """One short, of two lengths, zero, empty, not finite."""

    async def embed(_model: str, _texts: list[str]) -> list[list[float]]:
        return vectors

    with pytest.raises(InvalidArgument):
        ask({"type": "semantic_similarity"}, Hands(embed=embed))


def span(operation: str, ms: int, status: str = "ok", **attrs: Any) -> TraceSpan:
    return TraceSpan(
        trace_id="t", span_id=operation, operation=operation, end_ns=ms * 10**6, status=status, attrs=attrs
    )


SPANS = [span("tool.search", 5, k=1), span("tool.search", 7, k=2), span("infer", 90, "error"), span("run", 100)]


@pytest.mark.parametrize(
    ("spec", "passed", "reason"),
    [
        ({"operation": "tool.*"}, True, ""),
        ({"operation": "tool.*", "min_count": 3}, False, "at least 3"),
        ({"operation": "tool.*", "max_count": 1}, False, "at most 1"),
        ({"operation": "shell", "max_count": 0}, True, ""),
        ({"operation": "infer", "max_count": 0}, False, "at most 0"),
        ({"operation": "shell"}, False, "at least 1"),
        ({"max_duration_ms": 100}, True, ""),
        ({"max_duration_ms": 99}, False, "took 100 ms"),
        ({"no_errors": True}, False, "has the status error"),
        ({"operation": "tool.*", "no_errors": True, "attribute": "k"}, True, ""),
        ({"operation": "tool.*", "attribute": "k", "equals": 1}, False, "k is '2'"),
        ({"attribute": "k"}, False, "no attribute k"),
    ],
)
def test_traces(spec: dict[str, Any], passed: bool, reason: str) -> None:
    """All that is said must hold."""

    async def trace(_id: str) -> list[TraceSpan]:
        return SPANS

    found = ask({"type": "trace", **spec}, Hands(trace=trace))
    assert found.passed is passed
    assert reason in found.reason


def test_a_trace_that_is_not_there_proves_nothing() -> None:
    """No id, no spans, nobody to ask: errors."""

    async def none(_id: str) -> list[TraceSpan]:
        return []

    spec = {"type": "trace", "operation": "shell", "max_count": 0}
    for hands, seen in (
        (Hands(trace=none), SEEN),
        (Hands(trace=none), GradeInput(output="x", expected="")),
        (Hands(), SEEN),
    ):
        with pytest.raises(InvalidArgument):
            ask(spec, hands, seen)


def test_whom_it_asks_is_no_setting() -> None:
    """Equipped or not, the digest is the same, and the one that was loaded stays as it was."""
    loaded = grader(JUDGE)
    (ready,) = equip([loaded], Hands(ask=Judge("Score: 1")))
    assert describe(ready) == describe(loaded)
    assert ready is not loaded
    with pytest.raises(InvalidArgument, match="nobody"):
        asyncio.run(loaded.grade_async(SEEN))  # type: ignore[union-attr]
