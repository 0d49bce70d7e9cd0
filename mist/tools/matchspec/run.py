"""Running a suite: one durable `eval.result` per sample and model, from wherever the run stopped.

Promises: the manifest is the first record of a run; a finished sample is never run again, whenever and however the run
was stopped, because what is finished is read from the stream and nowhere else; results come in the suite's order; the
run's cursor (checkpoint `eval-<run>`) is saved after the results it covers. A run belongs to one suite digest:
changed data, answers or graders are another run. Two runners of one run at the same time do work twice, but store it
once (equal ids within the broker's window, and readers count the first).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from msgspec import Struct

from mist.broker.base import Broker, Checkpoint, Message, Stream
from mist.broker.patience import again
from mist.errors import Conflict, NotFound
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import EVAL_RESULT, EVAL_RUN
from mist.protocol.subject import check_name, encode_token
from mist.tools.matchspec.graders import describe
from mist.tools.matchspec.results import (
    Manifest,
    Result,
    Run,
    list_runs,
    read_run,
    result_id,
    result_subject,
    run_subject,
)
from mist.tools.matchspec.suite import Sample, Suite

SOURCE = "matchspec"
BATCH = 64
BATCH_BYTES_MAX = 4 * 1024 * 1024
OUTPUT_CHARS_MAX = 64 * 1024


class Outcome(Struct, frozen=True, kw_only=True):
    """What one call of `run_suite` did. `resumed_after`: where the run's cursor stood when it was picked up (None for a
    new run); `ran`: samples run now; `kept`: finished before."""

    run: Run
    ran: int
    kept: int
    resumed_after: int | None
    stopped: bool


def cursor_name(run: str) -> str:
    """The checkpoint of a run: `mist eval replay RUN --from cursor:eval-RUN`."""
    return check_name(f"eval-{run}")


def new_run_id(suite: str, *, now: datetime | None = None) -> str:
    """`<suite>-YYYYMMDD-HHMMSS-xxxx`, fit to be a name."""
    at = (now or datetime.now(UTC)).strftime("%Y%m%d-%H%M%S")
    return f"{encode_token(suite)[:60]}-{at}-{secrets.token_hex(2)}"


async def find_unfinished(stream: Stream, suite: Suite) -> str | None:
    """The newest run of exactly this suite that is not complete."""
    for info in await list_runs(stream):
        if info.digest == suite.digest and not info.complete:
            return info.run
    return None


def grade(suite: Suite, sample: Sample, model: str, run: str) -> Result:
    """Judge one recorded answer. Pure but for the clock. Every grader of the sample must pass."""
    began = time.perf_counter_ns()
    output = suite.answers[model].get(sample.id)
    graders = suite.graders_of(sample)
    error, answer, passed, score = "", None, False, 0.0
    if output is None:
        error = "no recorded answer"
    else:
        verdicts = [g.grade(output, sample.expected) for g in graders]
        passed = all(v.passed for v in verdicts)
        score = sum(v.passed for v in verdicts) / len(verdicts)
        answer = next((v.answer for v in verdicts if v.answer is not None), None)
    text = output or ""
    return Result(
        suite=suite.name,
        task=sample.id,
        passed=passed,
        score=score,
        baseline_score=0.0,
        delta=0.0,
        duration_ms=(time.perf_counter_ns() - began) // 1_000_000,
        error=error,
        run=run,
        model=model,
        graders=[g.name for g in graders],
        answer=answer if answer is None else answer[-1000:],
        expected=sample.expected[-1000:],
        output=text[:OUTPUT_CHARS_MAX],
        output_sha256=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() if output is not None else "",
    )


async def run_suite(
    broker: Broker,
    stream: Stream,
    suite: Suite,
    *,
    run: str,
    stop: asyncio.Event | None = None,
    rate: float = 0.0,
    batch: int = BATCH,
    on_progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Begin the run or go on with it, until it is complete or `stop` is set (what was judged is published first).

    `rate`: at most so many samples a second (0 = no limit). Raises Conflict when the run exists for another suite.
    """
    check_name(run)
    kept, resumed_after = await _begin(broker, stream, suite, run)
    finished = {(r.result.model, r.result.task) for r in kept.results} if kept is not None else set()
    manifest_id = _manifest_id(run)
    done, ran = len(finished), 0
    began = time.monotonic()
    size = max(1, min(batch, int(rate / 20) or 1)) if rate else batch
    for work in _batches(suite, finished, size):
        if stop is not None and stop.is_set():
            break
        if rate:
            early = ran / rate - (time.monotonic() - began)
            if early > 0:
                await _sleep(early, stop)
        last = await _publish(stream, suite, run, work, manifest_id)
        ran += len(work)
        done += len(work)
        await _save_cursor(broker, stream, run, last)
        if on_progress is not None:
            on_progress(done, suite.total)
        await asyncio.sleep(0)
    stopped = done < suite.total
    return Outcome(
        run=await again(lambda: read_run(stream, run)),
        ran=ran,
        kept=len(finished),
        resumed_after=resumed_after,
        stopped=stopped,
    )


async def _begin(broker: Broker, stream: Stream, suite: Suite, run: str) -> tuple[Run | None, int | None]:
    """The finished part of a run that exists, and its cursor; or the manifest of a new one."""
    try:
        found = await again(lambda: read_run(stream, run))
    except NotFound:
        await _stored(stream, [_manifest_message(suite, run)])
        found = await again(lambda: read_run(stream, run))
        fresh = True
    else:
        fresh = False
    if found.manifest.digest != suite.digest:
        raise Conflict(
            f"run {run} is of another suite: {found.manifest.suite} with other data, answers or graders",
            hint="give this run another name",
        )
    if fresh:
        return None, None
    cursor = None
    if broker.capabilities.checkpoints:
        cursor = await again(lambda: broker.checkpoints.load(stream.name, cursor_name(run)))
    # the cursor is saved after the results; where a kill came between, the results are the truth
    return found, cursor.sequence if cursor is not None else found.info.last


def _batches(suite: Suite, finished: set[tuple[str, str]], size: int) -> Iterator[list[tuple[Sample, str]]]:
    work: list[tuple[Sample, str]] = []
    for sample in suite.samples:
        for model in suite.models:
            if (model, sample.id) not in finished:
                work.append((sample, model))
                if len(work) >= size:
                    yield work
                    work = []
    if work:
        yield work


def _manifest_id(run: str) -> str:
    return hashlib.sha256(f"eval.run:{run}".encode()).hexdigest()[:32]


def _manifest_message(suite: Suite, run: str) -> Message:
    manifest = Manifest(
        suite=suite.name,
        run=run,
        digest=suite.digest,
        models=suite.models,
        samples=len(suite.samples),
        total=suite.total,
        graders=[describe(g) for g in suite.graders],
    )
    env = Envelope.new(EVAL_RUN, manifest, source=SOURCE, id=_manifest_id(run), correlation_id=run)
    return Message(run_subject(run), encode(env), env.id)


async def _publish(stream: Stream, suite: Suite, run: str, work: list[tuple[Sample, str]], manifest_id: str) -> int:
    subject = result_subject(run)
    messages: list[Message] = []
    size, last = 0, 0
    for sample, model in work:
        result = grade(suite, sample, model, run)
        env = Envelope.new(
            EVAL_RESULT,
            result,
            source=SOURCE,
            id=result_id(run, model, sample.id),
            correlation_id=run,
            causation_id=manifest_id,
        )
        message = Message(subject, encode(env), env.id)
        messages.append(message)
        size += len(message.data)
        if size >= BATCH_BYTES_MAX:
            last = max(await _stored(stream, messages))
            messages, size = [], 0
    if messages:
        last = max(await _stored(stream, messages))
    return last


async def _stored(stream: Stream, messages: list[Message]) -> list[int]:
    """Their sequences; the ids are made from run, model and sample, so that a repeat stores nothing twice."""
    return await again(lambda: stream.append(messages))


async def _save_cursor(broker: Broker, stream: Stream, run: str, sequence: int) -> None:
    if broker.capabilities.checkpoints:
        name = cursor_name(run)
        # force: a repeated batch may be answered with earlier sequences, and another runner may be ahead
        checkpoint = Checkpoint(stream=stream.name, name=name, incarnation=stream.incarnation, sequence=sequence)
        await again(lambda: broker.checkpoints.save(checkpoint, force=True))


async def _sleep(seconds: float, stop: asyncio.Event | None) -> None:
    if stop is None:
        await asyncio.sleep(seconds)
        return
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
