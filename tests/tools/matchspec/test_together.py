"""MatchSpec with InferMux and TokenTrace: in one process from the command line, and side by side in `mist up`."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from cli.test_up import started, until
from conftest import run

import mist
from mist.cli.matchspec import main
from mist.protocol.codec import decode
from tools.shell import Shell

Spawn = Callable[..., "subprocess.Popen[bytes]"]
SUITE = """
version: 1
name: echoes
dataset:
  name: d
  examples: [{examples}]
model: {{type: infer, model: echo}}
concurrency: 1
graders:
  - {{type: contains, name: says}}
  - {{type: latency, max_ms: 60000}}
"""


def suite(n: int) -> str:
    examples = ", ".join(f'{{id: "{i}", input: "say {i}", expected: "say {i}"}}' for i in range(n))
    Path("echoes.yml").write_text(SUITE.format(examples=examples))
    return "echoes.yml"


async def kinds(url: str, stream: str, source: str = "") -> list[str]:
    async with mist.connect(url) as broker:
        found = [decode(r.data) for r in (await (await broker.open(stream)).read(limit=5000)).records]
    return [env.type for env in found if source in ("", env.source)]


def test_the_router_of_mist_toml_answers_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions and answers lie on the stream, once each, and the calls' spans in the traces that the results name. A
    second run of the same command is another run; one that is gone on with asks nothing."""
    monkeypatch.chdir(tmp_path)
    shell = Shell(monkeypatch, f"log:{tmp_path / 'log'}")
    path = suite(3)
    done = shell("eval", "run", path, "--run", "r", "--ask", "local", "-j")
    assert (done.code, [(r["model"], r["passed"]) for r in done.json]) == (0, [("echo", 3)]), done.err
    assert run(kinds(shell.url, "infer")).count("infer.response") == 3
    assert run(kinds(shell.url, "infer")).count("infer.request") == 3
    again = shell("eval", "run", path, "--run", "r", "--ask", "local", "-j")
    assert "3 results were there, 0 are new" in again.err
    assert run(kinds(shell.url, "infer")).count("infer.response") == 3
    spans = [d for d in run(kinds(shell.url, "trace")) if d == "trace.span"]
    assert len(spans) == 3
    results = [json.loads(line) for line in shell("eval", "replay", "r", "-o", "jsonl").out.splitlines()]
    assert shell("trace", "rebuild", "-y").code == 0
    found = shell("trace", "show", results[0]["trace_id"], "-j").json["spans"]
    assert found
    # a grader that looks at the trace of the answer finds it in the store
    Path("traced.yml").write_text(Path(path).read_text() + "  - {type: trace, no_errors: true}\n")
    assert shell("eval", "rescore", "r", "traced.yml", "--run", "t", "-j").json[0]["passed"] == 3


def test_a_service_that_is_killed_goes_on_with_its_runs(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real `matchspec serve` beside the router: POST /run, kill -9, start again: no answer that was stored is asked for again."""
    monkeypatch.chdir(tmp_path)
    n = 40
    url = f"log:{tmp_path / 'log'}"
    options = ("--tools", "infermux,matchspec", "--suites", suite(n))
    process, found = started(spawn, url, *options)
    base = found["health"].removesuffix("/health")
    with httpx.Client(base_url=base, trust_env=False, timeout=30) as client:
        begun = client.post("/run", json={"suite": "echoes"}).json()
        until(lambda: client.get(begun["results_url"]).json().get("progress", {"completed": n})["completed"] > 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, found = started(spawn, url, *options)
    base = found["health"].removesuffix("/health")
    with httpx.Client(base_url=base, trust_env=False, timeout=30) as client:
        until(lambda: client.get(begun["results_url"]).json()["status"] != "running")
        report = client.get(begun["results_url"]).json()
        assert (report["status"], report["verdict"], report["passed"]) == ("passed", "PASS", n)
        refused = client.post(
            "/mist",
            content=b'{"version":"1","id":"x","source":"t","type":"eval.run","timestamp_ns":1,"payload":{"suite":"echoes"}}',
        )
        assert (refused.status_code, "/eval" in refused.text) == (400, True)
    # the one that was answered and not stored when the process died may have been asked again
    assert n <= run(kinds(url, "infer", "infermux")).count("infer.response") <= n + 1


def test_serve_is_mist_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("mist.cli.main.main", lambda argv: seen.append(list(argv)) or 0)
    assert main(["-u", "log:x", "serve", "--host", "0.0.0.0", "-p", "9", "--config", "s.yml"]) == 0  # noqa: S104
    assert seen == [["-u", "log:x", "up", "--suites", "s.yml", "--tools", "matchspec", "--usual-listen", "0.0.0.0:9"]]
