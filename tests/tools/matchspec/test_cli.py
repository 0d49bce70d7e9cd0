"""`matchspec` and `mist eval` as CI uses them: verdicts, files, exit codes. In this process, on the embedded log."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mist.cli.matchspec import main, renamed
from tools.shell import Ran, Shell

SUITE = """
version: 1
name: {name}
dataset:
  name: sums
  examples:
    - {{id: a, input: "1+1", expected: "2", output: "{a}", tags: [smoke]}}
    - {{id: b, input: "2+2", expected: "4", output: "4"}}
    - {{id: c, input: "3+3", expected: "6", output: "6"}}
model: {{type: recorded, label: small}}
graders:
  - {{type: exact, name: right}}
{more}
"""


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return Shell(monkeypatch, f"log:{tmp_path / 'log'}")


@pytest.fixture
def matchspec(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The console script; its `mist` goes to the shell's log."""
    monkeypatch.setenv("MIST_URL", shell.url)

    def call(*args: str) -> Ran:
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", err)
            code = main(list(args))
        out.flush()
        return Ran(code, out.buffer.getvalue().decode(), err.getvalue())  # type: ignore[attr-defined]

    return call


def suite(name: str = "sums", a: str = "2", more: str = "") -> str:
    path = Path(f"{name}.yml")
    path.write_text(SUITE.format(name=name, a=a, more=more))
    return str(path)


def test_a_suite_that_meets_its_thresholds_exits_0_and_leaves_a_result_file(matchspec: Any) -> None:
    done = matchspec("run", suite(), "-o", "junit", "--badge", "b.svg")
    assert (done.code, done.out.splitlines()[-1]) == (0, "PASS")
    files = sorted(Path(".matchspec/results").iterdir())
    assert [f.suffix for f in files] == [".json", ".xml"]
    assert files[0].name.startswith("sums-2")
    assert json.loads(files[0].read_text())["verdict"] == "PASS"
    assert ElementTree.parse(files[1]).getroot().get("failures") == "0"  # noqa: S314 - our own file
    assert "PASS 1.00" in Path("b.svg").read_text()
    again = matchspec("report")
    assert (again.code, "PASS" in again.out) == (0, True)
    from_file = matchspec("report", str(files[0]), "--format", "markdown")
    assert (from_file.code, from_file.out.splitlines()[0]) == (0, "## MatchSpec: `sums`")


def test_a_suite_below_its_threshold_exits_1(matchspec: Any, shell: Shell) -> None:
    """And mist's own code for a gate is 10."""
    path = suite(a="3")
    done = matchspec("run", path, "--no-write")
    assert done.code == 1
    assert "right  0.667  ✗ (≥1.000)" in done.out
    assert 'a: expected "2", got "3"' in done.out
    assert not Path(".matchspec").exists()
    assert shell("eval", "run", path, "--judge").code == 10
    assert matchspec("run", suite("kind", a="3", more="thresholds: {overall: 0.6}"), "--no-write").code == 0


@pytest.mark.parametrize(
    ("more", "args"),
    [
        ("thresholds: {overall: 0.0, nobody: 0.1}", ()),  # a grader that is not there
        ("thresholds: {overall: 2}", ()),
        ("gate: {metric: vibes}", ()),
        ("thresholds: {overall: 0.0}\nsurprise: 1", ()),
        ("", ("--tags", "none")),
        ("", ("--suite", "none")),
        ("", ("--run", "not a name")),
    ],
)
def test_what_cannot_be_right_exits_2(matchspec: Any, more: str, args: tuple[str, ...]) -> None:
    done = matchspec("run", suite(more=more), "--no-write", *args)
    assert done.code == 2, done.out + done.err


@pytest.mark.parametrize(
    "text",
    [
        SUITE.format(name="s", a="2", more="").replace("type: exact", "type: exakt"),
        SUITE.format(name="s", a="2", more="").replace("  examples:", "  examples: []\n  extra:"),
        SUITE.split("graders:", maxsplit=1)[0].format(name="s", a="2") + "graders: []\n",
        "",
    ],
    ids=["unknown grader", "no samples", "no graders", "an empty file"],
)
def test_suites_that_judge_nothing_never_exit_0(matchspec: Any, text: str) -> None:
    Path("s.yml").write_text(text)
    assert matchspec("run", "s.yml", "--no-write").code == 2
    assert matchspec("validate", "s.yml").code == 2


def test_a_run_in_which_every_call_fails_exits_3(matchspec: Any) -> None:
    """Even with a threshold of 0."""
    for rule in ("fail", "exclude"):
        path = suite(
            f"down-{rule}", more=f"thresholds: {{overall: 0.0}}\ngate: {{on_error: {rule}, errors_max_share: 1}}"
        )
        text = Path(path).read_text().replace("{type: recorded, label: small}", "{type: command, command: [false]}")
        Path(path).write_text(text)
        done = matchspec("run", path, "--no-write")
        assert done.code == 3, done.out + done.err
        assert "model_errors 3 of 3" in done.out


def test_a_ceiling_of_cost_fails_where_costs_are_not_known(matchspec: Any) -> None:
    done = matchspec("run", suite(more="gate: {cost_usd_max: 100}"), "--no-write")
    assert done.code == 1
    assert "the cost of 3 of 3 results is not known" in done.out


def test_a_run_that_was_stopped_by_a_limit_fails_and_can_be_gone_on_with(matchspec: Any) -> None:
    path = suite()
    stopped = matchspec("run", path, "--no-write", "--limit-s", "0")
    assert stopped.code in (1, 3)
    assert "not complete" in stopped.out + stopped.err
    assert matchspec("run", path, "--no-write", "--resume").code == 0
    assert matchspec("run", path, "--no-write", "--resume").code == 2  # nothing is unfinished now


def test_tags_choose_and_a_dry_run_runs_nothing(matchspec: Any, shell: Shell) -> None:
    planned = matchspec("run", suite(), "--dry-run")
    assert planned.code == 0
    assert not Path("log").exists()
    assert "1 of 1 samples passed" in matchspec("run", "sums.yml", "--tags", "smoke", "--no-write").out
    assert [r["total"] for r in shell("eval", "ls", "-j").json] == [1]


def test_the_first_failing_suite_ends_a_fail_fast_run(matchspec: Any, shell: Shell) -> None:
    first, second = suite("one", a="0"), suite("two")
    assert matchspec("run", first, second, "--fail-fast", "--no-write").code == 1
    assert [r["suite"] for r in shell("eval", "ls", "-j").json] == ["one"]
    assert matchspec("run", first, second, "--no-write", "--new").code == 1
    assert {r["suite"] for r in shell("eval", "ls", "-j").json} == {"one", "two"}


def test_a_baseline_fills_in_scores_and_a_loss_fails(matchspec: Any, shell: Shell) -> None:
    for name, out in (("good", "1"), ("bad", "0")):
        many = "".join(f"    - {{id: n{i}, input: q, expected: '1', output: '{out}'}}\n" for i in range(20))
        text = SUITE.format(name="s", a="2", more="thresholds: {overall: 0.1}")
        Path(f"{name}.yml").write_text(text.replace("model:", many + "model:", 1))
    assert matchspec("run", "good.yml", "--run", "before", "--no-write").code == 0
    worse = matchspec("run", "bad.yml", "--run", "after", "--baseline", "before", "--no-write")
    assert worse.code == 1
    assert "below the baseline, which is not chance" in worse.out
    assert "baseline 1.000" in worse.out
    report = json.loads(matchspec("report", "after", "--format", "json").out)
    (row,) = report["grader_results"]
    assert (row["baseline_score"], row["delta"] < -0.8, report["baseline"]) == (1.0, True, "before")


def test_graders_are_compared_with_people(shell: Shell) -> None:
    path = suite(a="3")
    assert shell("eval", "run", path, "--run", "r").code == 0
    Path("labels.jsonl").write_text(
        '{"id": "a", "passed": true, "grader": "right"}\n{"id": "b", "passed": true, "grader": "right"}\n'
        '{"id": "c", "passed": false, "grader": "right"}\n{"id": "zz", "passed": false, "grader": "right"}\n'
    )
    done = shell("eval", "calibrate", "r", "--labels", "labels.jsonl", "-j")
    assert done.code == 9
    assert "1 labels met no verdict" in done.err
    (row,) = done.json
    assert (row["grader"], row["n"], row["too_strict"], row["too_kind"]) == ("right", 3, ["a"], ["c"])
    assert row["accuracy"] == pytest.approx(1 / 3)
    Path("labels.jsonl").write_text('{"id": "a"}\n')
    wrong = shell("eval", "calibrate", "r", "--labels", "labels.jsonl")
    assert (wrong.code, "labels.jsonl:1" in wrong.err) == (2, True)


def test_runs_are_made_of_runs(shell: Shell) -> None:
    """Rescored with another expectation, forked, replayed from the middle; none of them asks anybody."""
    path = suite(a="3")
    assert shell("eval", "run", path, "--run", "r").code == 0
    Path("new.yml").write_text(Path(path).read_text().replace('expected: "2"', 'expected: "3"'))
    assert [r["passed"] for r in shell("eval", "rescore", "r", "new.yml", "--run", "s", "-j").json] == [3]
    again = shell("eval", "replay", "r", "--from", "3", "--suite", path, "--run", "t", "-j")
    assert [r["passed"] for r in again.json] == [2]
    assert "1 results taken over from r" in again.err
    assert shell("eval", "fork", "r", path, "--at", "2", "--run", "u", "-j").json == again.json
    (moved,) = shell("eval", "diff", "r", "s", "-j").json
    assert (moved["common"], moved["changed"]) == (2, 1)  # one has another expectation: no pair
    seen = shell("eval", "history", "a", "-j").json
    assert [(h["run"], h["passed"]) for h in seen] == [("s", True), ("r", False)]  # the others took it over


def test_init_and_validate(matchspec: Any) -> None:
    assert matchspec("init", "--with-examples").code == 0
    assert matchspec("init").code == 3  # nothing is overwritten
    assert matchspec("validate").code == 0
    assert matchspec("run", "--no-write").code in (0, 1)
    Path("matchspec.yml").write_text("version: 1\nsuites: [{name: x}]\n")
    wrong = matchspec("validate")
    assert (wrong.code, "matchspec.yml:2:" in wrong.out) == (2, True)


def test_help_and_usage(matchspec: Any) -> None:
    assert matchspec("--help").code == 0
    assert matchspec("run", "--help").code == 0
    assert matchspec("version").code == 0
    assert matchspec("nonsense").code == 2
    assert matchspec("run").code == 2  # no matchspec.yml here


def test_options_are_renamed_up_to_a_double_dash() -> None:
    names = {"-o": "--as", "--output": "--as"}
    assert renamed(["-o", "x", "--output=y", "--", "-o"], names) == ["--as", "x", "--as=y", "--", "-o"]


def test_no_command_reads_a_whole_run_into_memory(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a million samples is run, shown, replayed and graded again in the memory of a small one."""
    from mist.tools.matchspec import results, run

    async def whole(*_: object) -> None:
        raise AssertionError("a whole run was read")

    for module in (results, run):
        monkeypatch.setattr(module, "read_run", whole)
    suite("sums", a="3")
    ran = shell("eval", "run", "sums.yml", "--run", "a", "--format", "json")
    assert [(r["passed"], r["total"]) for r in json.loads(ran.out)] == [(2, 3)]
    failed = json.loads(shell("eval", "show", "a", "--failed", "-n", "1", "--format", "json").out)
    assert [(r["task"], r["output"]) for r in failed] == [("a", "3")]
    assert json.loads(shell("eval", "show", "a", "--format", "json").out) == json.loads(ran.out)
    again = json.loads(shell("eval", "replay", "a", "--from", "3", "--format", "json").out)
    assert (again["results"], again["eval"][0]["passed"]) == (2, 2)
    assert json.loads(shell("eval", "rescore", "a", "sums.yml", "--run", "b", "--format", "json").out)[0]["passed"] == 2
