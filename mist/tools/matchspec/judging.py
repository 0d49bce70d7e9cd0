"""From an answer to a result: the graders of one harness, applied.

Pure but for graders that ask somebody, or that take their time and are called in a thread. A grader that fails, or takes
too long, makes an error of the sample, never a pass: `error_kind` tells the model's failures from the graders'.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from functools import partial

from mist.errors import MistError, TimedOut
from mist.kit.aside import aside
from mist.tools.matchspec.asking import Answer
from mist.tools.matchspec.grading import (
    Asking,
    GradeInput,
    Grader,
    Heavy,
    Pure,
    Score,
    Verdict,
    combine,
    failed,
    score_of,
)
from mist.tools.matchspec.results import ErrorKind, Result
from mist.tools.matchspec.suite import Harness, Sample, cluster_of

OUTPUT_CHARS_MAX = 64 * 1024
EXCERPT_CHARS_MAX = 1000
"""Of inputs, expectations and compared answers in a result."""
_UNTOLD = Answer(output="")
"""What is known about an answer that is a text and no more."""


class Judge:
    """One harness of one run. `baseline(key, epoch)` is the score to compare with, None where there is none; `cluster` the
    field of the metadata that the gate clusters by."""

    def __init__(
        self,
        suite: str,
        harness: Harness,
        run: str,
        *,
        baseline: Callable[[str, int], float | None] | None = None,
        cluster: str = "",
    ) -> None:
        self.suite = suite
        self.harness = harness
        self.run = run
        # by name, once: looking at a protocol takes longer than most graders do
        self._asking = {g.name: g for g in harness.graders if isinstance(g, Asking)}
        self._pure = {g.name: g for g in harness.graders if isinstance(g, Pure)}
        self._heavy = {g.name: g for g in harness.graders if isinstance(g, Heavy)}
        self.asks = len(self._pure) < len(harness.graders)
        """Whether every sample needs `asking`."""
        self.slow = self.asks or bool(self._heavy)
        """Whether some sample may need it."""
        self._name = harness.name
        self._label = harness.label
        self._weighted = harness.weights is not None
        self._baseline = baseline
        self._cluster = cluster
        self._of: dict[tuple[str, ...], tuple[Grader, ...]] = {(): tuple(harness.graders)}

    def graders(self, sample: Sample) -> tuple[Grader, ...]:
        found = self._of.get(sample.graders)
        if found is None:
            found = tuple(g for g in self.harness.graders if g.name in sample.graders)
            self._of[sample.graders] = found
        return found

    def at_once(self, sample: Sample, answer: Answer | str | None, key: str, index: int, epoch: int) -> Result | None:
        """The result where every grader is pure; None where one of them may take its time with this one, so that it is for
        `asking`. No `answer`: there is none, an error."""
        began = time.perf_counter_ns()
        if answer is None:
            return self.error(sample, key, index, epoch, "no recorded answer", "no_answer")
        graders = self.graders(sample)
        given = _given(sample, answer)
        if self._heavy and any(self._takes_time(g, given) for g in graders):
            return None
        scores = []
        compared = None
        for g in graders:
            try:
                verdict = g.grade(given)  # type: ignore[attr-defined]  # Pure: the caller looks at `asks`
                scores.append(score_of(g, verdict))
                if compared is None:
                    compared = verdict.answer
            except Exception as exc:  # a grader of a user may raise anything; the sample pays, not the run
                scores.append(failed(g, _why(exc)))
        return self._result(sample, answer, key, index, epoch, graders, scores, compared, began)

    async def asking(
        self, sample: Sample, answer: Answer | str | None, key: str, index: int, epoch: int, *, timeout_s: float
    ) -> Result:
        """The same where some graders have to ask somebody or take their time, each for no longer than `timeout_s`."""
        began = time.perf_counter_ns()
        if answer is None:
            return self.error(sample, key, index, epoch, "no recorded answer", "no_answer")
        graders = self.graders(sample)
        given = _given(sample, answer)
        scores = []
        compared = None
        for g in graders:
            try:
                asked = self._asking.get(g.name)
                if asked is not None:
                    verdict = await _in_time(asked.grade_async(given), timeout_s)
                elif self._takes_time(g, given):
                    verdict = await _in_time(aside(partial(self._pure[g.name].grade, given)), timeout_s)
                else:
                    verdict = self._pure[g.name].grade(given)
                scores.append(score_of(g, verdict))
                if compared is None:
                    compared = verdict.answer
            except Exception as exc:  # as above
                scores.append(failed(g, _why(exc)))
        return self._result(sample, answer, key, index, epoch, graders, scores, compared, began)

    def _takes_time(self, grader: Grader, given: GradeInput) -> bool:
        heavy = self._heavy.get(grader.name)
        try:
            return heavy is not None and heavy.heavy(given)
        except Exception:  # what is wrong says `grade`, and the sample pays
            return False

    def error(
        self,
        sample: Sample,
        key: str,
        index: int,
        epoch: int,
        error: str,
        kind: ErrorKind,
        *,
        attempts: int = 1,
        request_id: str = "",
    ) -> Result:
        """Nothing to judge: a failure that says why."""
        error = error[:EXCERPT_CHARS_MAX]
        return Result(
            suite=self.suite, task=sample.id, passed=False, score=0.0, baseline_score=0.0, delta=0.0, duration_ms=0,
            error=error, run=self.run, harness=self.harness.name, model=self._label, key=key, index=index, epoch=epoch,
            scores=[Score(g.name, 0.0, False, "", "no output") for g in self.graders(sample)], error_kind=kind,
            input=sample.input[:EXCERPT_CHARS_MAX], expected=sample.expected[-EXCERPT_CHARS_MAX:], tags=sample.tags,
            attempts=attempts, request_id=request_id, cluster=self._cluster_of(sample),
        )  # fmt: skip

    def _result(
        self,
        sample: Sample,
        answer: Answer | str,
        key: str,
        index: int,
        epoch: int,
        graders: tuple[Grader, ...],
        scores: list[Score],
        compared: str | None,
        began: int,
    ) -> Result:
        weights = [g.weight or 0.0 for g in graders] if self._weighted else None
        passed, score = combine(scores, weights, self.harness.pass_score)
        error = ""
        for s in scores:
            if s.error:
                error = f"grader {s.grader}: {s.error}"[:EXCERPT_CHARS_MAX]
                break
        base = self._baseline(key, epoch) if self._baseline is not None else None
        told = _UNTOLD if isinstance(answer, str) else answer
        text = answer if isinstance(answer, str) else answer.output
        if told.latency_ms is not None:
            duration_ms = int(told.latency_ms)
        else:
            duration_ms = (time.perf_counter_ns() - began) // 1_000_000
        # by position: thirty keywords take longer than all else here together
        return Result(
            self.suite, sample.id, passed and not error, score,  # suite, task, passed, score
            0.0 if base is None else base, 0.0 if base is None else score - base, duration_ms, error,
            self.run, self._name, self._label, key, index, epoch, scores,  # run, harness, model, key, index, epoch, scores
            compared if compared is None else compared[-EXCERPT_CHARS_MAX:],  # answer
            "grader" if error else "",  # error_kind
            sample.input[:EXCERPT_CHARS_MAX], sample.expected[-EXCERPT_CHARS_MAX:],
            text[:OUTPUT_CHARS_MAX], len(text) > OUTPUT_CHARS_MAX,  # output, output_cut
            hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), sample.tags,
            told.tokens_in, told.tokens_out, told.cost_usd, told.latency_ms,
            1, told.request_id, told.trace_id,  # attempts
            self._cluster_of(sample),
        )  # fmt: skip

    def _cluster_of(self, sample: Sample) -> str:
        return cluster_of(sample, self._cluster) if self._cluster else ""


def _given(sample: Sample, answer: Answer | str) -> GradeInput:
    if isinstance(answer, str):
        return GradeInput(
            output=answer, expected=sample.expected, input=sample.input, sample_id=sample.id,
            metadata=sample.metadata, tags=sample.tags,
        )  # fmt: skip
    return GradeInput(
        output=answer.output, expected=sample.expected, input=sample.input, sample_id=sample.id,
        metadata=sample.metadata, tags=sample.tags, cost_usd=answer.cost_usd, latency_ms=answer.latency_ms,
        tokens_in=answer.tokens_in, tokens_out=answer.tokens_out, trace_id=answer.trace_id,
    )  # fmt: skip


async def _in_time(verdict: Awaitable[Verdict], timeout_s: float) -> Verdict:
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return await verdict
    except TimeoutError as exc:
        if limit.expired():
            raise TimedOut(f"no verdict within {timeout_s:g} s") from exc
        raise


def _why(exc: Exception) -> str:
    return exc.message if isinstance(exc, MistError) else f"{type(exc).__name__}: {exc}"
