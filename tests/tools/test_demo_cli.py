"""`mist demo` with real processes: the main job, the documented keys, and the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .shell import Shell

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MIST_TEST_DATA") or ROOT.parent / "shared" / "data")
KEYS = [
    "broker", "acknowledged", "stored", "lost", "duplicated", "worker_kills", "spans", "eval", "asked", "asked_again",
    "replayed_from", "elapsed_s", "data_dir", "ok",
]  # fmt: skip


def demo(tmp_path: Path, *args: str) -> tuple[int, str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MIST_")}
    done = subprocess.run(
        [sys.executable, "-m", "mist", "demo", *args],
        cwd=tmp_path,
        env={**env, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def whole(found: dict[str, Any]) -> None:
    """What every demo that ended well says."""
    assert list(found) == KEYS
    assert found["ok"] is True
    assert (found["lost"], found["duplicated"], found["worker_kills"]) == (0, 0, 1)
    assert (found["asked"], found["asked_again"]) == (sum(row["total"] for row in found["eval"]), 0)
    assert found["stored"] == found["acknowledged"] == sum(s["count"] for s in found["spans"])
    assert [set(s) for s in found["spans"]] == [
        {"model", "count", "errors", "latency_ms", "tokens_in", "tokens_out", "cost_usd", "cost_known"}
    ] * len(found["spans"])
    assert all(set(s["latency_ms"]) == {"p50", "p90", "p95", "p99"} for s in found["spans"])


@pytest.mark.slow
def test_the_demo_ends_well_and_leaves_data_that_other_commands_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One JSON object on stdout; afterwards the log holds what it says, under the usual names."""
    url = f"log:{tmp_path / 'd'}"
    code, out, err = demo(tmp_path, "--spans", "1000", "--questions", "60", "-u", url, "--format", "json")
    assert code == 0, err
    found = json.loads(out)
    whole(found)
    assert (found["acknowledged"], found["data_dir"], found["broker"]) == (1000, str(tmp_path / "d"), url)
    assert "killed the worker (SIGKILL) at sequence" in err
    shell = Shell(monkeypatch, url)
    models = {row["model"] for row in found["spans"]}
    stored = shell("trace", "stats", "-j").json["spans"]
    assert [row for row in stored if row["model"] in models] == found["spans"]  # the others are the router's calls
    (run,) = shell("eval", "ls", "-j").json
    assert shell("eval", "show", run["run"], "-j").json == found["eval"]
    assert run["first"] < found["replayed_from"] < run["last"]
    assert shell("demo", "--dir", str(tmp_path / "d")).code == 5  # a directory that is not empty


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "gsm8k_model_solutions.jsonl").exists(), reason="the shared data are not here")
def test_the_demo_on_real_files_reproduces_the_published_verdicts(tmp_path: Path) -> None:
    """The first of the real calls through the killed worker, and as many right answers as were published for the first of
    the questions; in a directory of its own. All of them: test_azure.py and test_suite.py."""
    data = tmp_path / "data"
    data.mkdir()
    calls, questions = 1500, 40
    for name, lines in (("azure_llm_conv_2023.csv", calls + 1), ("gsm8k_model_solutions.jsonl", questions)):
        text = (DATA / name).read_bytes().splitlines(keepends=True)
        (data / name).write_bytes(b"".join(text[:lines]))
    published = [json.loads(line) for line in (data / "gsm8k_model_solutions.jsonl").read_text().splitlines()]
    work = tmp_path / "work"
    work.mkdir()
    code, out, err = demo(work, "--data", str(data), "-j")
    assert code == 0, err
    found = json.loads(out)
    whole(found)
    assert found["acknowledged"] == calls
    assert [(s["model"], s["count"], s["cost_usd"]) for s in found["spans"]] == [("azure_llm_conv_2023", calls, None)]
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    assert [(r["model"], r["passed"], r["total"]) for r in found["eval"]] == [
        (model, sum(row[model]["is_correct"] for row in published), questions) for model in models
    ]
    assert [p.name for p in work.iterdir()] == [Path(found["data_dir"]).name]


def test_a_broker_that_processes_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """memory: lives in one process; said before anything is started."""
    monkeypatch.chdir(tmp_path)
    done = Shell(monkeypatch, "memory:")("demo")
    assert done.code == 2
    assert "processes" in done.err


def test_data_that_are_not_there_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No directory, or one that holds none of the files."""
    monkeypatch.chdir(tmp_path)
    shell = Shell(monkeypatch, f"log:{tmp_path / 'l'}")
    assert shell("demo", "--data", str(tmp_path / "none")).code == 3
    assert shell("demo", "--data", str(tmp_path)).code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown name, or a server beside a URL: nothing is made."""
    monkeypatch.chdir(tmp_path)
    shell = Shell(monkeypatch, f"log:{tmp_path / 'l'}")
    assert shell("demo", "--server", "kafka").code == 2
    assert shell("demo", "--server", "nats", "--url", "log:x").code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost", [0, 1])
def test_the_table_and_the_exit_code_say_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """For people: counters, both tables, the place and commands; one lost span is a failure that is said."""
    from mist.cli import _demo_run
    from mist.cli._demo_judge import Verdict
    from mist.tools.matchspec.results import Row
    from mist.tools.tokentrace.stats import ModelStats, Quantiles

    async def told(plan: _demo_run.Plan, say: object) -> _demo_run.Outcome:
        assert plan.suite_file.is_file()
        some = Quantiles(1, 2, 2.5, 3)
        row = Row(suite="s", model="m", passed=1, total=2, rate=0.5, ci_low=0.1, ci_high=0.9)
        return _demo_run.Outcome(
            traces=_demo_run.TraceFacts(
                verdict=Verdict(acknowledged=9, stored=9 - lost, lost=lost, duplicated=0, refused=0, unrecorded=0),
                spans=[ModelStats("gpt", 9 - lost, 0, some, some, some, None, 0)],
                worker_kills=1,
                broker_kills=0,
                broker_away_s=0.0,
                killed_at=4,
                resumed_after=4,
                published_per_s=1.0,
                appended_per_s=2.0,
                applied_per_s=3.0,
            ),
            evals=_demo_run.EvalFacts(
                run=plan.run,
                rows=[row],
                kept=1,
                total=2,
                replayed_from=2,
                replayed=1,
                asked=2,
                asked_again=0,
                complete=True,
            ),
            elapsed_s=1.5,
            durability="power",
            with_server=False,
        )

    monkeypatch.setattr(_demo_run, "run_demo", told)
    monkeypatch.chdir(tmp_path)
    url = f"log:{tmp_path / 'mine'}"
    done = Shell(monkeypatch, url)("demo")
    lines = done.out.splitlines()
    assert done.code == lost
    assert f"lost                {lost}" in lines
    assert "gpt" in done.out
    assert f"  mist -u {url} trace stats" in lines
    assert (lines[-1] == "ok") is not bool(lost)
