"""A run of the stream to its report: read once, counted, judged. What `mist eval report` and the HTTP API give.

Reads one result at a time; see `tally.py` for what is kept. Does not write anything.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from mist.broker.base import Stream
from mist.tools.matchspec.gate import LATENCY_SHARE, Judgement, judge
from mist.tools.matchspec.reports.values import Grade, Report, at
from mist.tools.matchspec.results import Head, each_result, read_head
from mist.tools.matchspec.suite import Gate
from mist.tools.matchspec.tally import EXAMPLES_MAX, Tally


class Counted(Struct, frozen=True):
    """A run read and counted. `last_ns` is when its last result was stored."""

    head: Head
    tally: Tally
    last_ns: int


async def count(stream: Stream, run: str, *, ids: bool = False, examples_max: int = EXAMPLES_MAX) -> Counted:
    """Raises NotFound."""
    head = await read_head(stream, run)
    tally = Tally(head.manifest, ids=ids, examples_max=examples_max)
    last = head.timestamp_ns
    async for stored in each_result(stream, head):
        tally.add(stored.result)
        last = max(last, stored.timestamp_ns)
    return Counted(head, tally, last)


async def report_of(
    stream: Stream,
    run: str,
    *,
    gate: Gate | None = None,
    baseline: str = "",
    complete: bool = True,
    examples_max: int = EXAMPLES_MAX,
) -> Report:
    """The run's report under its own gate (or this one), against the baseline run its manifest names (or this one).
    Raises NotFound for either."""
    head = await read_head(stream, run)
    baseline = baseline or head.manifest.baseline_run
    counted = await count(stream, run, ids=bool(baseline), examples_max=examples_max)
    before = (await count(stream, baseline, ids=True, examples_max=0)).tally if baseline else None
    gate = gate or counted.head.manifest.gate
    judgement = judge(counted.tally, gate, baseline=before, complete=complete)
    return written(counted, gate, judgement, baseline=baseline)


def written(counted: Counted, gate: Gate, judgement: Judgement, *, baseline: str = "") -> Report:
    tally, manifest = counted.tally, counted.head.manifest
    examples, left_out = tally.examples()
    status = "passed" if judgement.ok else "failed" if judgement.judged else "error"
    return Report(
        run_id=manifest.run,
        suite=manifest.suite,
        status=status,
        verdict=judgement.verdict,
        started_at=at(counted.head.timestamp_ns),
        finished_at=at(counted.last_ns),
        duration_seconds=(counted.last_ns - counted.head.timestamp_ns) / 1e9,
        grader_results=judgement.grades,
        examples=examples,
        examples_left_out=left_out,
        model_errors=tally.errors,
        reasons=judgement.reasons,
        warnings=judgement.warnings,
        total=tally.total,
        completed=tally.done,
        passed=tally.passed,
        failed=tally.failed,
        confidence=gate.confidence,
        use_lower_bound=gate.use_lower_bound,
        baseline=baseline,
        digest=manifest.digest,
        cost_usd=tally.cost_usd,
        cost_unknown=tally.cost_unknown,
        tokens_in=tally.tokens_in,
        tokens_out=tally.tokens_out,
        latency_p95_ms=tally.latency_ms(LATENCY_SHARE),
        tags=dict(manifest.tags),
    )


def with_earlier(report: Report, earlier: Report) -> Report:
    """The report with the scores of an earlier one beside its own (two result files: no samples to pair, so no p-value)."""
    before = {(g.model, g.harness, g.name): g.score for g in earlier.grader_results}
    grades: list[Grade] = []
    for g in report.grader_results:
        score = before.get((g.model, g.harness, g.name))
        delta = None if score is None or g.score is None else g.score - score
        grades.append(replace(g, baseline_score=score, delta=delta, p_value=None))
    return replace(report, grader_results=grades, baseline=earlier.run_id)
