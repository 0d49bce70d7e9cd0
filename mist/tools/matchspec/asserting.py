"""MatchSpec for test frameworks: one output judged, or a suite run in memory; what fails is an AssertionError that says why.

    matchspec.assert_sample("It is Paris.", "paris", grader="contains", case_sensitive=False)
    matchspec.assert_suite("evals/capitals.yml")

A suite is run over the memory broker: nothing durable is left, and its gate decides. A grader that cannot judge is an
error, never a pass. Graders that ask somebody (judges) belong into a suite.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mist
from mist.errors import InvalidArgument
from mist.tools.matchspec.graders import grader as made
from mist.tools.matchspec.grading import GradeInput, Pure, Score, score_of
from mist.tools.matchspec.load import load
from mist.tools.matchspec.report import report_of
from mist.tools.matchspec.reports import Report, render
from mist.tools.matchspec.run import new_run_id, run_suite
from mist.tools.matchspec.suite import Suite

GraderSpec = str | Mapping[str, Any]


def judge_sample(
    output: str,
    expected: str = "",
    *,
    grader: GraderSpec | Sequence[GraderSpec] = "exact",
    input: str = "",
    metadata: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[Score]:
    """The verdict of each grader: a name with `settings`, a table as in a suite, or several of them (tables and names).
    Raises InvalidArgument for an unknown grader or setting, for one that asks somebody, and for an expectation against which
    every output would be as good."""
    specs: list[Any] = [grader] if isinstance(grader, str | Mapping) else list(grader)
    if not specs:
        raise InvalidArgument("no grader: nothing would be judged")
    if settings and len(specs) > 1:
        raise InvalidArgument("settings belong to one grader", hint='several are tables: {"type": "exact", …}')
    given = GradeInput(output=output, expected=expected, input=input, metadata=dict(metadata or {}))
    scores = []
    for spec in specs:
        table = {"type": spec} if isinstance(spec, str) else dict(spec)
        one = made({**table, **settings}, "assert_sample")
        if not isinstance(one, Pure):
            raise InvalidArgument(f"grader {one.name} asks somebody", hint="put it into a suite")
        one.check(expected)
        scores.append(score_of(one, one.grade(given)))
    return scores


def assert_sample(output: str, expected: str = "", **options: Any) -> list[Score]:
    """`judge_sample`, and an AssertionError unless every grader passed."""
    __tracebackhide__ = True
    scores = judge_sample(output, expected, **options)
    bad = [s for s in scores if not s.passed]
    if bad:
        said = "; ".join(f"{s.grader}: {s.error or s.reason or f'score {s.score:.3f}'}" for s in bad)
        raise AssertionError(f"{said}\n  expected: {expected!r}\n  got:      {output!r}")
    return scores


def run_in_memory(suite: Suite) -> Report:
    """The suite's report under its own gate. Not to be called within a running event loop."""

    async def body() -> Report:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("eval")
            id = new_run_id(suite.name)
            outcome = await run_suite(broker, stream, suite, run=id, collect=False)
            return await report_of(stream, id, gate=suite.gate, complete=not outcome.stopped)

    return asyncio.run(body())


def assert_suite(suite: Suite | Path | str) -> list[Report]:
    """Run the suite (or every suite of a file); an AssertionError with the report of the first whose verdict is FAIL."""
    __tracebackhide__ = True
    reports = []
    for one in [suite] if isinstance(suite, Suite) else load(Path(suite)).suites:
        report = run_in_memory(one)
        if not report.ok:
            raise AssertionError("\n" + render(report, "text"))
        reports.append(report)
    return reports


class MatchSpec:
    """What the fixture is: the functions of this module."""

    judge_sample = staticmethod(judge_sample)
    assert_sample = staticmethod(assert_sample)
    assert_suite = staticmethod(assert_suite)
