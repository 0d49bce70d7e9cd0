"""From an answer to a result: every field is what it says, as results are made by position."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mist.tools.matchspec.asking import Answer
from mist.tools.matchspec.data import Rows
from mist.tools.matchspec.graders import grader
from mist.tools.matchspec.grading import Score
from mist.tools.matchspec.judging import EXCERPT_CHARS_MAX, OUTPUT_CHARS_MAX, Judge
from mist.tools.matchspec.results import Result
from mist.tools.matchspec.suite import Harness, Recorded, Sample

SAMPLE = Sample("s1", "how many?", "4", tags=("t",), metadata={"document": 7})


def judge(sample: Sample, answer: Answer | str, **more: object) -> Result:
    graders = (grader({"type": "numeric", "name": "n"}),)
    harness = Harness(name="h", samples=[sample], model=Recorded(label="m"), graders=graders)
    found = Judge("suite", harness, "run", **more).at_once(sample, answer, "key", 3, 2)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_a_result_says_everything_in_its_place() -> None:
    answer = Answer(
        output="It is 4", tokens_in=1, tokens_out=2, cost_usd=0.5, latency_ms=7.9, request_id="q", trace_id="t1"
    )
    assert judge(SAMPLE, answer, cluster="document", baseline=lambda key, epoch: 0.25) == Result(
        suite="suite", task="s1", passed=True, score=1.0, baseline_score=0.25, delta=0.75, duration_ms=7, error="",
        run="run", harness="h", model="m", key="key", index=3, epoch=2, scores=[Score("n", 1.0, True)], answer="4",
        error_kind="", input="how many?", expected="4", output="It is 4", output_cut=False,
        output_sha256=hashlib.sha256(b"It is 4").hexdigest(), tags=("t",), tokens_in=1, tokens_out=2, cost_usd=0.5,
        latency_ms=7.9, attempts=1, request_id="q", trace_id="t1", cluster="7",
    )  # fmt: skip


def test_what_is_too_long_is_cut_and_its_digest_is_of_all_of_it() -> None:
    text = "4" + "x" * OUTPUT_CHARS_MAX
    found = judge(Sample("s", "i" * 2000, "4"), text)
    assert (found.output_cut, len(found.output), len(found.input)) == (True, OUTPUT_CHARS_MAX, EXCERPT_CHARS_MAX)
    assert found.output_sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (found.tokens_in, found.cost_usd, found.request_id, found.cluster) == (None, None, "", "")


def test_an_expectation_that_cannot_be_read_is_an_error_of_the_grader() -> None:
    found = judge(Sample("s", "", "four"), "4")
    assert (found.passed, found.error_kind, found.error.partition(":")[0]) == (False, "grader", "grader n")


def test_lines_are_samples_whether_they_need_rereading_or_not(tmp_path: Path) -> None:
    """A line with a number, a name or no id between plain ones is read as before, and so is what follows it."""
    path = tmp_path / "d.jsonl"
    path.write_text(
        '{"id": "a", "input": "x", "expected": "1", "grader": ["g"], "tags": ["t"], "metadata": {"k": 1}, "output": "o"}\n'
        '{"id": "b", "input": "x", "expected": 1.50, "grader": "g"}\n'
        '{"input": ["x"], "expected": "1"}\n'
        '{"id": "d", "input": "x", "expected": "1"}\n'
    )
    assert list(Rows(path)) == [
        Sample("a", "x", "1", ("g",), ("t",), {"k": 1}, "o"), Sample("b", "x", "1.50", ("g",)),
        Sample("3", '["x"]', "1"), Sample("d", "x", "1"),
    ]  # fmt: skip
