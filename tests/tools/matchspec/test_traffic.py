"""Answers that nobody asked for a test: read off the stream, graded, and their quality in the traces they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import run

import mist
from mist.broker.base import Stream
from mist.client.client import to_message
from mist.errors import NotFound
from mist.protocol.codec import decode
from mist.protocol.envelope import Envelope
from mist.tools.matchspec.asking import read_answer
from mist.tools.matchspec.graders import grader
from mist.tools.matchspec.report import report_of
from mist.tools.matchspec.run import run_suite
from mist.tools.matchspec.suite import Gate, Sample, Suite, recorded_suite
from mist.tools.matchspec.tracing import publish_spans
from mist.tools.matchspec.traffic import read_traffic, suite_of_traffic
from tools.shell import Shell

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


def exchange(
    id: str, question: Any, answer: str | None, *, model: str = "m", source: str = "app", **more: Any
) -> list[Envelope]:
    asked = {"model": "auto", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": question}]}
    said = {"content": answer or "", "model": model, "cost_usd": 0.5, "latency_ms": 12} | more
    if answer is None:
        said["error"] = "down"
    return [
        Envelope.new("infer.request", asked, source=source, id=id, traceparent=PARENT),
        Envelope.new("infer.response", said, source="infermux", correlation_id=id, traceparent=PARENT),
    ]


async def store(stream: Stream, *exchanges: Sequence[Envelope]) -> None:
    await stream.append([to_message(e) for one in exchanges for e in one])


def base(*specs: dict[str, Any], gate: Gate | None = None) -> Suite:
    samples = [Sample("known", "2+2?", "4"), Sample("other", "3+3?", "6")]
    graders = [grader(s) for s in specs or ({"type": "contains"}, {"type": "regex", "pattern": "[0-9]"})]
    return recorded_suite("sums", samples, {"m": {"known": "4"}}, graders, where="t", gate=gate)


def test_recorded_answers_are_judged_with_what_is_known_of_them() -> None:
    """Known questions by all graders, others by those that need no expectation; costs, times and traces come along."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            infer, evals, trace = [await broker.open(n) for n in ("infer", "eval", "trace")]
            await store(
                infer,
                exchange("a", "2+2?", "It is 4."),
                exchange("b", "how old?", "no idea"),
                exchange("c", [{"type": "text", "text": "2+2?"}], "5", model="n"),
                exchange("d", "2+2?", None),
                exchange("e", "2+2?", "4", source="matchspec"),
            )
            traffic = await read_traffic(infer, after=0)
            assert [(e.id, e.input, e.model, e.answer is None) for e in traffic.exchanges] == [
                ("a", "2+2?", "m", False), ("b", "how old?", "m", False), ("c", "2+2?", "n", False),
                ("d", "2+2?", "m", True),
            ]  # fmt: skip
            assert (traffic.last, traffic.unmatched, traffic.full) == (10, 0, False)
            made = suite_of_traffic(base(gate=Gate(overall=0.3, cost_usd_max=9)), traffic)
            assert (made.left_out, made.suite.name) == (0, "sums-traffic")
            assert [(h.name, len(h.samples)) for h in made.suite.harnesses] == [("m", 3), ("n", 1)]
            outcome = await run_suite(broker, evals, made.suite, run="r")
            told = {s.result.task: s.result for s in outcome.run.results}
            assert {t: (r.passed, [s.grader for s in r.scores]) for t, r in told.items()} == {
                "a": (True, ["contains", "regex"]), "b": (False, ["regex"]), "c": (False, ["contains", "regex"]),
                "d": (False, ["contains", "regex"]),
            }  # fmt: skip
            assert (told["a"].trace_id, told["a"].request_id, told["a"].cost_usd) == (TRACE, "a", 0.5)
            assert (told["d"].error_kind, told["d"].trace_id) == ("no_answer", "")
            report = await report_of(evals, "r")
            assert "the cost of 1 of 4 results is not known" in " ".join(report.reasons)
            assert await publish_spans(evals, "r", trace) == 5
            assert await publish_spans(evals, "r", trace) == 5
            spans = [decode(r.data).data() for r in (await trace.read()).records]
            assert len(spans) == 5  # published again they are the same
            quality = {s["attrs"]["task"]: s for s in spans if s["operation"] == "matchspec.task"}
            assert (quality["a"]["trace_id"], quality["a"]["attrs"]["eval.score"]) == (TRACE, 1.0)
            assert (quality["b"]["status"], quality["d"]["status"]) == ("ok", "error")

    run(body())


def test_a_part_of_the_stream_is_read_and_nothing_twice() -> None:
    async def body() -> None:
        async with mist.connect("memory:") as broker:
            infer = await broker.open("infer")
            await store(infer, *[exchange(f"q{i}", "2+2?", "4") for i in range(5)])
            await infer.append([to_message(exchange("q0", "", "late")[1])])
            part = await read_traffic(infer, after=2, to=6)
            assert ([e.id for e in part.exchanges], part.last) == (["q1", "q2"], 6)
            assert (await read_traffic(infer, after=3, to=6)).unmatched == 1  # its question lies before
            few = await read_traffic(infer, after=0, limit=2)
            assert ([e.id for e in few.exchanges], few.full, few.last) == (["q0", "q1"], True, 4)
            assert [e.id for e in (await read_traffic(infer, after=few.last)).exchanges] == ["q2", "q3", "q4"]
            assert len((await read_traffic(infer, after=0)).exchanges) == 5
            assert (await read_traffic(infer, after=0, models=["x"])).exchanges == []

    run(body())


def test_a_stated_latency_of_0_is_known_and_a_measured_one_is_better() -> None:
    """Routers state whole milliseconds. Without a measurement, as for an answer found after a kill, 0 is what is known: else
    a latency grader could not decide, and the run that was killed had another report."""
    _, fast = exchange("a", "2+2?", "4", latency_ms=0)
    assert read_answer(fast).latency_ms == 0
    assert read_answer(fast, latency_ms=0.4).latency_ms == 0.4
    assert read_answer(exchange("a", "2+2?", "4")[1], latency_ms=0.4).latency_ms == 12
    assert read_answer(exchange("a", "2+2?", "4", latency_ms=None)[1]).latency_ms is None


def test_traffic_that_nothing_can_judge_is_refused() -> None:
    async def body() -> None:
        async with mist.connect("memory:") as broker:
            infer = await broker.open("infer")
            await store(infer, exchange("a", "something else", "4"))
            with pytest.raises(NotFound, match="1 answers have no expectation"):
                suite_of_traffic(base({"type": "exact"}), await read_traffic(infer, after=0))
            with pytest.raises(NotFound):
                suite_of_traffic(base(), await read_traffic(infer, after=2))

    run(body())


def test_traffic_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged from a cursor on, which is moved; quality is seen by TokenTrace beside the trace it belongs to."""
    monkeypatch.chdir(tmp_path)
    shell = Shell(monkeypatch, f"log:{tmp_path / 'log'}")
    Path("s.yml").write_text(
        "version: 1\nname: s\ndataset: {name: d, examples: [{id: a, input: '2+2?', expected: '4', output: '4'}]}\n"
        "model: {type: recorded, label: m}\ngraders: [{type: contains}]\n"
    )

    async def fill(*exchanges: Sequence[Envelope]) -> None:
        async with mist.connect(shell.url) as broker:
            await store(await broker.open("infer"), *exchanges)

    run(fill(exchange("a", "2+2?", "4"), exchange("b", "2+2?", "5")))
    options = ["s.yml", "--from-stream", "infer", "--save-cursor", "seen", "--spans", "trace", "-j"]
    done = shell("eval", "run", *options)
    assert [(r["model"], r["passed"], r["total"]) for r in done.json] == [("m", 1, 2)]
    assert "go on with: --from cursor:seen" in done.err
    assert shell("eval", "run", *options, "--from", "cursor:seen").code == 3
    run(fill(exchange("c", "2+2?", "4")))
    assert [r["total"] for r in shell("eval", "run", *options, "--from", "cursor:seen").json] == [1]
    assert shell("eval", "run", "s.yml", "--save-cursor", "x").code == 2
    assert shell("trace", "rebuild", "-y").code == 0
    spans = shell("trace", "show", TRACE, "-j").json
    assert sorted(s["score"] for s in spans["spans"]) == [0.0, 1.0, 1.0]
