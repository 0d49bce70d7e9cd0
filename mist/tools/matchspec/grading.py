"""What a grader is: values in, a verdict out; and how the verdicts of one sample become its score.

A grader is pure (`grade`), or it has to ask somebody, or takes its time (`grade_async`: a judge, embeddings, traces, a
user's function). A pure one whose time depends on what is graded says so (`heavy`), and is then asked where it can be, else
called in a thread: nobody else's sample waits for it. What no grader can do is pass by accident: one that fails,
or takes too long, is an error of the sample, which `negate` does not turn round.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import msgspec
from msgspec import Struct

from mist.errors import InvalidArgument

REASON_CHARS_MAX = 1000


class GradeInput(Struct, frozen=True, kw_only=True, gc=False):
    """Everything a grader may look at. Counts and costs are None where nobody stated them: unknown is not zero."""

    output: str
    expected: str
    input: str = ""
    sample_id: str = ""
    metadata: dict[str, Any] = {}
    tags: tuple[str, ...] = ()
    cost_usd: float | None = None
    latency_ms: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    trace_id: str = ""


class Verdict(Struct, frozen=True, gc=False):
    """`score` lies in 0..1. `answer` is what the grader compared, as text; None when it found nothing to compare."""

    passed: bool
    score: float
    answer: str | None = None
    reason: str = ""


@runtime_checkable
class Grader(Protocol):
    """`name` is what samples, gates and results call it. `negate`: a verdict counts turned round (`score` as 1 - score),
    but for one without an answer: nothing to compare is a failure either way.
    `weight`: its part of the sample's score; all graders of a harness have one, or none. `threshold`: what its
    aggregate over the harness must reach at the gate (None = what the gate says)."""

    @property
    def name(self) -> str: ...

    @property
    def negate(self) -> bool: ...

    @property
    def weight(self) -> float | None: ...

    @property
    def threshold(self) -> float | None: ...

    def check(self, expected: str) -> None:
        """Raise InvalidArgument when no output could be graded fairly against this."""


@runtime_checkable
class Pure(Grader, Protocol):
    """Decides by itself, at once."""

    def grade(self, given: GradeInput) -> Verdict: ...


@runtime_checkable
class Heavy(Pure, Protocol):
    """Decides by itself, and mostly at once."""

    def heavy(self, given: GradeInput) -> bool:
        """Whether this one may take longer than others should wait (some 10 ms). `grade` is then called in a thread."""


@runtime_checkable
class Asking(Grader, Protocol):
    """Asks somebody else, and may fail with a MistError: an error of the sample, never a pass."""

    async def grade_async(self, given: GradeInput) -> Verdict: ...


class Score(Struct, frozen=True, omit_defaults=True, gc=False):
    """One grader's part of a result, negation done. `error`: it could not decide; then `passed` is False, `score` 0."""

    grader: str
    score: float
    passed: bool
    reason: str = ""
    error: str = ""


def score_of(grader: Grader, verdict: Verdict) -> Score:
    """What a verdict counts as. Raises InvalidArgument for a score outside 0..1 (NaN as well)."""
    if not 0.0 <= verdict.score <= 1.0:
        raise InvalidArgument(f"grader {grader.name}: a score of {verdict.score} does not lie in 0..1")
    reason = verdict.reason[:REASON_CHARS_MAX]
    if grader.negate and verdict.answer is not None:
        return Score(grader.name, 1.0 - verdict.score, not verdict.passed, reason)
    return Score(grader.name, verdict.score, verdict.passed, reason)


def failed(grader: Grader, error: str) -> Score:
    return Score(grader.name, 0.0, False, "", error[:REASON_CHARS_MAX])


def combine(scores: Sequence[Score], weights: Sequence[float] | None, pass_score: float | None) -> tuple[bool, float]:
    """(passed, score) of a sample. The score is the mean, weighted where there are weights. Passed: every grader passed
    (those of weight 0 only inform), or the score reaches `pass_score` where the harness has one. An error never passes."""
    if not scores:
        return False, 0.0
    if len(scores) == 1 and weights is None and pass_score is None:
        return scores[0].passed, scores[0].score
    if weights is None:
        score = sum(s.score for s in scores) / len(scores)
        passed = all(s.passed for s in scores)
    else:
        total = sum(weights)
        score = sum(s.score * w for s, w in zip(scores, weights, strict=True)) / total if total else 0.0
        passed = total > 0 and all(s.passed for s, w in zip(scores, weights, strict=True) if w)
    if pass_score is not None:
        passed = score >= pass_score and not any(s.error for s in scores)
    return passed, score


def describe(grader: Grader) -> dict[str, Any]:
    """The grader's settings as plain values: part of a run's digest, and of its manifest."""
    settings: dict[str, Any] = msgspec.to_builtins(grader)
    return settings


_PACKAGE = __package__ or ""
_sources: dict[str, str] = {}


def code_of(grader: Grader) -> str:
    """SHA-256 of the source that decides: the grader's own (`code`, where it is text that a user wrote) and that of its
    module and of the modules of this package which that one uses. Changed grader code is another run."""
    own = str(getattr(grader, "code", ""))
    return hashlib.sha256(f"{_source_digest(type(grader).__module__)}{own}".encode()).hexdigest()


def _source_digest(module: str) -> str:
    known = _sources.get(module)
    if known is None:
        reached: set[str] = set()
        left = [module]
        while left:
            name = left.pop()
            if name in reached or name not in sys.modules:
                continue
            reached.add(name)
            for value in vars(sys.modules[name]).values():
                origin = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
                if isinstance(origin, str) and origin.startswith(_PACKAGE + "."):
                    left.append(origin)
        digest = hashlib.sha256()
        for name in sorted(reached):
            file = getattr(sys.modules[name], "__file__", None)
            digest.update(name.encode() + b"\0")
            digest.update(Path(file).read_bytes() if file and file.endswith(".py") else b"")
        known = _sources[module] = digest.hexdigest()
    return known
