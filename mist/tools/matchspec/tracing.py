"""A run as spans: `matchspec.eval` and one `matchspec.task` per result, so that a trace store shows quality beside cost.

A task lies in the trace of the answer it judges (`trace_id` of the result), else in the run's own. Its attribute `eval.score` is
what TokenTrace counts as quality; tokens and costs are not said again, the answer's span has them. A task that fails its
check is `ok`, as a call: its status is `error` only where nothing could be judged (the seed mixed wrong answers with outages).
Ids are made from the run and the result: spans that are published again are the same.
"""

from __future__ import annotations

import hashlib

from mist.broker.base import Message, Stream
from mist.broker.patience import again
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN, TraceSpan
from mist.protocol.subject import subject_for
from mist.tools.matchspec.asking import SOURCE
from mist.tools.matchspec.results import StoredResult, each_result, read_head

BATCH = 500


async def publish_spans(eval_stream: Stream, run: str, trace: Stream) -> int:
    """Publish the spans of a run that is there; how many. Raises NotFound."""
    head = await read_head(eval_stream, run)
    trace_id, root = _hex(32, run), _hex(16, run)
    passed = failed = published = 0
    last = head.timestamp_ns
    messages: list[Message] = []
    async for stored in each_result(eval_stream, head):
        passed += stored.result.passed
        failed += not stored.result.passed
        last = max(last, stored.timestamp_ns)
        messages.append(_message(_task(stored, run, trace_id, root)))
        if len(messages) >= BATCH:
            published += await _append(trace, messages)
            messages = []
    whole = TraceSpan(
        trace_id=trace_id, span_id=root, operation="matchspec.eval", start_ns=head.timestamp_ns, end_ns=last, status="ok",
        attrs={
            "suite": head.manifest.suite, "run": run, "passed": passed, "failed": failed, "total": head.manifest.total,
        },
    )  # fmt: skip
    return published + await _append(trace, [*messages, _message(whole)])


def _task(stored: StoredResult, run: str, trace_id: str, root: str) -> TraceSpan:
    r = stored.result
    attrs = {
        "suite": r.suite, "task": r.task, "run": run, "harness": r.harness, "eval.model": r.model, "passed": r.passed,
    }  # fmt: skip
    attrs |= {"error": r.error} if r.error else {"eval.score": r.score}
    ours = not r.trace_id
    end = stored.timestamp_ns
    return TraceSpan(
        trace_id=r.trace_id or trace_id, span_id=_hex(16, run, r.harness, r.key or r.task, str(r.epoch)),
        parent_id=root if ours else "", operation="matchspec.task", start_ns=end - r.duration_ms * 1_000_000, end_ns=end,
        status="error" if r.error else "ok", attrs=attrs,
    )  # fmt: skip


def _message(span: TraceSpan) -> Message:
    env = Envelope.new(TRACE_SPAN, span, source=SOURCE, id=_hex(32, span.trace_id, span.span_id))
    return Message(subject_for(TRACE_SPAN, SOURCE), encode(env), env.id)


async def _append(trace: Stream, messages: list[Message]) -> int:
    await again(lambda: trace.append(messages))
    return len(messages)


def _hex(digits: int, *parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:digits]
