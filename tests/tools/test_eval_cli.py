"""`mist eval` as a person and a script use it, on the embedded log."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from .shell import Shell
from .suites import write_recorded_suite

DATA = Path(os.environ.get("MIST_TEST_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
SOLUTIONS = DATA / "gsm8k_model_solutions.jsonl"


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(monkeypatch, f"log:{tmp_path / 'log'}")


@pytest.fixture
def suite(tmp_path: Path) -> str:
    return str(write_recorded_suite(tmp_path / "suite", seed=1, samples=60)[0])


@pytest.mark.skipif(not SOLUTIONS.exists(), reason="the shared data are not here")
def test_the_recorded_solutions_give_the_four_published_rows(shell: Shell) -> None:
    """Exactly four rows with exactly the documented keys."""
    done = shell("eval", "run", str(SOLUTIONS), "--format", "json")
    assert done.code == 0
    assert [set(r) for r in done.json] == [{"suite", "model", "passed", "total", "rate", "ci_low", "ci_high"}] * 4
    assert [(r["model"], r["passed"], r["total"]) for r in done.json] == [
        ("6b_finetuning", 286, 1319),
        ("6b_verification", 515, 1319),
        ("175b_finetuning", 458, 1319),
        ("175b_verification", 742, 1319),
    ]
    assert all(r["ci_low"] < r["rate"] == r["passed"] / r["total"] < r["ci_high"] for r in done.json)


def test_a_complete_run_is_listed_shown_and_begun_anew(shell: Shell, suite: str) -> None:
    """A complete run is left alone: the same file again is another run."""
    first = shell("eval", "run", suite, "-j").json
    assert shell("eval", "run", suite, "-j").json == first
    runs = shell("eval", "ls", "-j").json
    assert [(r["done"], r["total"], r["complete"]) for r in runs] == [(120, 120, True)] * 2
    assert shell("eval", "show", runs[0]["run"], "-j").json == first
    failed = shell("eval", "show", runs[0]["run"], "--failed", "-n", "100", "-j").json
    assert len(failed) == sum(r["total"] - r["passed"] for r in first)


def test_an_unfinished_run_is_gone_on_with(shell: Shell, suite: str) -> None:
    """By the same command, with the same id; --new begins another; finished samples are not run again."""
    stopped = shell("eval", "run", suite, "--rate", "40", "--timeout", "0.5")
    assert stopped.code == 6
    (run,) = shell("eval", "ls", "-j").json
    assert 0 < run["done"] < 120
    assert not run["complete"]
    done = shell("eval", "run", suite)
    assert done.code == 0
    assert f"{run['done']} results were there, {120 - run['done']} are new" in done.err
    (same,) = shell("eval", "ls", "-j").json
    assert (same["run"], same["done"]) == (run["run"], 120)
    assert shell("eval", "run", suite, "--new").code == 0
    assert len(shell("eval", "ls", "-j").json) == 2


def test_results_are_replayed_from_any_position(shell: Shell, suite: str) -> None:
    """From the start, a sequence, the run's cursor; json counts what was replayed, jsonl gives each."""
    table = shell("eval", "run", suite, "--run", "r1", "-j").json
    whole = shell("eval", "replay", "r1", "-j").json
    assert (whole["results"], whole["eval"], whole["last"]) == (120, table, 121)
    part = shell("eval", "replay", "r1", "--from", "100", "-j").json
    assert (part["from"], part["results"], sum(r["total"] for r in part["eval"])) == (100, 22, 22)
    assert shell("eval", "replay", "r1", "--from", "cursor:eval-r1", "-j").json["results"] == 0
    lines = shell("eval", "replay", "r1", "--from", "+119", "-o", "jsonl").out.splitlines()
    assert [json.loads(line)["sequence"] for line in lines] == [120, 121]
    assert shell("eval", "replay", "r1", "--from", "500").code != 0


def test_a_gate_passes_only_what_is_complete_and_good_enough(shell: Shell, suite: str) -> None:
    """10 when a model is below, when it is unknown, and when the run is not complete."""
    table = shell("eval", "run", suite, "--run", "r1", "-j").json
    least = min(r["rate"] for r in table)
    assert shell("eval", "gate", "r1", "--min-rate", str(least)).code == 0
    assert shell("eval", "gate", "r1", "--min-rate", str(least), "--lower-bound").code == 10
    assert shell("eval", "gate", "r1", "--min-rate", str(least + 0.01)).code == 10
    assert shell("eval", "gate", "r1", "--min-rate", "0", "--model", "nobody").code == 10
    assert shell("eval", "run", suite, "--run", "r2", "--rate", "40", "--timeout", "0.3").code == 6
    unfinished = shell("eval", "gate", "r2", "--min-rate", "0")
    assert unfinished.code == 10
    assert "not complete" in unfinished.err


def test_two_runs_are_compared(shell: Shell, suite: str) -> None:
    """A run beside itself gains and loses nothing."""
    for run in ("a", "b"):
        assert shell("eval", "run", suite, "--run", run).code == 0
    assert [(d["gained"], d["lost"], d["p_value"]) for d in shell("eval", "diff", "a", "b", "-j").json] == [
        ([], [], 1.0)
    ] * 2


def test_missing_answers_end_with_partial_success(shell: Shell, suite: str) -> None:
    """Counted as failed, said, and exit code 9."""
    answers = Path(suite).parent / "answers.jsonl"
    lines = answers.read_text().splitlines(keepends=True)
    answers.write_text("".join(lines[:-1]))
    done = shell("eval", "run", suite, "-j")
    assert done.code == 9
    assert "1 samples had no recorded answer" in done.err
    assert {r["total"] for r in done.json} == {60}


def test_what_cannot_be_run_is_refused_before_anything_is_made(shell: Shell, tmp_path: Path) -> None:
    """An unknown file, an unknown shape, a run id that is no name; no log appears."""
    (tmp_path / "x.jsonl").write_text('{"question":"q"}\n')
    assert shell("eval", "run", "none.toml").code == 3
    assert shell("eval", "run", "x.jsonl").code == 2
    assert shell("eval", "ls").code == 3
    assert shell("eval", "show", "r").code == 3
    assert not (tmp_path / "log").exists()


def test_other_data_under_a_runs_name_is_a_conflict(shell: Shell, suite: str, tmp_path: Path) -> None:
    """Exit code 5; the run stays as it was."""
    assert shell("eval", "run", suite, "--run", "r1").code == 0
    other = str(write_recorded_suite(tmp_path / "other", seed=2, samples=60)[0])
    assert shell("eval", "run", other, "--run", "r1").code == 5
