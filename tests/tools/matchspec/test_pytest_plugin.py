"""The pytest plug-in, used by pytest itself in one process of its own; and what it asserts, in this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mist.errors import InvalidArgument
from mist.tools.matchspec.asserting import MatchSpec, assert_sample, assert_suite, judge_sample

SUITE = """
version: 1
name: sums
dataset: {{name: d, examples: [{{id: a, input: "1+1", expected: "2", output: "{answer}"}}]}}
model: {{type: recorded, label: m}}
graders: [{{type: exact, name: right}}]
"""
TESTS = """
import sys

LOADED = [m for m in sys.modules if m == "mist" or m.startswith("mist.")]

def test_loading_the_plug_in_imports_nothing_of_mist():
    assert "mist_pytest" in sys.modules
    assert LOADED == []

def test_good(matchspec):
    matchspec.assert_sample("It is Paris.", "paris", grader="contains", case_sensitive=False)

def test_bad(matchspec):
    matchspec.assert_sample("It is Rome.", "Paris", grader="contains")
"""


def test_pytest_runs_suites_and_single_assertions_as_tests(tmp_path: Path) -> None:
    """A failing suite shows its report, a failing sample what was expected; a suite that cannot be right is a usage error."""
    (tmp_path / "test_it.py").write_text(TESTS)
    for name, answer in (("good", "2"), ("bad", "3")):
        (tmp_path / f"{name}.yml").write_text(SUITE.format(answer=answer))
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-v",
        "--rootdir=.",
        "--color=no",
    ]
    done = subprocess.run(
        [*argv, "--matchspec", "good.yml", "--matchspec=bad.yml", "test_it.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 3 passed" in done.stdout
    assert "good.yml::sums PASSED" in done.stdout
    assert 'a: expected "2", got "3"' in done.stdout
    assert "right  0.000" in done.stdout
    assert "asserting.py" not in done.stdout
    assert "got:      'It is Rome.'" in done.stdout


def test_a_sample_is_judged_by_one_grader_or_several() -> None:
    assert [s.passed for s in judge_sample("4", "4")] == [True]
    assert [s.grader for s in judge_sample("4 of 5", "4", grader=["contains", {"type": "numeric", "name": "n"}])] == [
        "contains", "n",
    ]  # fmt: skip
    with pytest.raises(AssertionError, match="numeric"):
        MatchSpec().assert_sample("5", "4", grader="numeric")


def test_what_would_pass_anything_is_refused() -> None:
    for options in ({"grader": "exakt"}, {"grader": []}, {"grader": "contains"}, {"grader": "llm_judge"}, {"odd": 1}):
        with pytest.raises(InvalidArgument):
            assert_sample("x", "", **options)
    with pytest.raises(InvalidArgument):
        assert_sample("x", "x", grader=["exact", "contains"], case_sensitive=False)


def test_a_suite_is_asserted_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "s.yml"
    path.write_text(SUITE.format(answer="2"))
    assert [r.verdict for r in assert_suite(path)] == ["PASS"]
    path.write_text(SUITE.format(answer="3"))
    with pytest.raises(AssertionError, match="FAIL"):
        assert_suite(path)
