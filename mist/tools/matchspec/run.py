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

import msgspec
from msgspec import Struct

from mist.broker.base import Broker, Checkpoint, Message, Stream
from mist.broker.patience import again
from mist.errors import Conflict, InvalidArgument, NotFound
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import EVAL_RESULT, EVAL_RUN
from mist.protocol.subject import check_name, encode_token
from mist.tools.matchspec.grading import GradeInput, Pure, Score, combine, describe, failed, score_of
from mist.tools.matchspec.results import (
    HarnessInfo,
    Manifest,
    Result,
    Run,
    list_runs,
    read_run,
    result_subject,
    run_id_of,
    run_subject,
)
from mist.tools.matchspec.suite import Harness, Recorded, Sample, Suite, model_settings, sample_key

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


def grade(suite: Suite, harness: Harness, sample: Sample, run: str, *, index: int = 0, epoch: int = 1) -> Result:
    """Judge one recorded answer. Pure but for the clock. Every grader of the sample must pass."""
    began = time.perf_counter_ns()
    model = harness.model
    output = None
    if isinstance(model, Recorded):
        output = sample.output if model.answers is None else model.answers.get(sample.id)
    graders = [g for g in harness.graders if not sample.graders or g.name in sample.graders]
    error, answer = "", None
    scores: list[Score] = []
    if output is None:
        error = "no recorded answer"
        scores = [failed(g, error) for g in graders]
    else:
        given = GradeInput(
            output=output,
            expected=sample.expected,
            input=sample.input,
            sample_id=sample.id,
            metadata=sample.metadata,
            tags=sample.tags,
        )
        for g in graders:
            if not isinstance(g, Pure):
                raise InvalidArgument(f"grader {g.name} has to ask somebody: it cannot grade at once")
            verdict = g.grade(given)
            scores.append(score_of(g, verdict))
            answer = verdict.answer if answer is None else answer
    weights = None if harness.weights is None else [g.weight or 0.0 for g in graders]
    passed, score = combine(scores, weights, harness.pass_score)
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
        harness=harness.name,
        model=harness.label,
        key=sample_key(harness.name, sample),
        index=index,
        epoch=epoch,
        scores=scores,
        answer=answer if answer is None else answer[-1000:],
        error_kind="no_answer" if error else "",
        input=sample.input[:1000],
        expected=sample.expected[-1000:],
        output=text[:OUTPUT_CHARS_MAX],
        output_cut=len(text) > OUTPUT_CHARS_MAX,
        output_sha256=hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() if output is not None else "",
        tags=sample.tags,
    )


def result_id(run: str, harness: str, key: str, epoch: int) -> str:
    """The envelope id of a result: the same for the same work, so that repeating it is stored once."""
    return hashlib.sha256(msgspec.json.encode([run, harness, key, epoch])).hexdigest()[:32]


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
    finished = {_slot(r.result) for r in kept.results} if kept is not None else set()
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


Work = tuple[Harness, int, Sample, int]
"""Harness, index, sample, epoch."""


def _slot(result: Result) -> tuple[str, int, int]:
    return result.harness, result.index, result.epoch


def _batches(suite: Suite, finished: set[tuple[str, int, int]], size: int) -> Iterator[list[Work]]:
    work: list[Work] = []
    for harness in suite.harnesses:
        for index, sample in enumerate(harness.samples):
            for epoch in range(1, harness.epochs + 1):
                if (harness.name, index, epoch) not in finished:
                    work.append((harness, index, sample, epoch))
                    if len(work) >= size:
                        yield work
                        work = []
    if work:
        yield work


def _manifest_id(run: str) -> str:
    return run_id_of(EVAL_RUN, run)


def _manifest_message(suite: Suite, run: str) -> Message:
    manifest = Manifest(
        suite=suite.name,
        run=run,
        digest=suite.digest,
        digests=suite.digests,
        models=suite.models,
        samples=sum(len(h.samples) for h in suite.harnesses),
        total=suite.total,
        gate=suite.gate,
        seed=suite.seed,
        harnesses=[
            HarnessInfo(
                name=h.name,
                model=h.label,
                samples=len(h.samples),
                epochs=h.epochs,
                reducer=h.reducer,
                pass_score=h.pass_score,
                settings=model_settings(h.model),
                graders=[describe(g) for g in h.graders],
                data_digest=h.data_digest,
            )
            for h in suite.harnesses
        ],
    )
    env = Envelope.new(EVAL_RUN, manifest, source=SOURCE, id=_manifest_id(run), correlation_id=run)
    return Message(run_subject(run), encode(env), env.id)


async def _publish(stream: Stream, suite: Suite, run: str, work: list[Work], manifest_id: str) -> int:
    subject = result_subject(run)
    messages: list[Message] = []
    size, last = 0, 0
    for harness, index, sample, epoch in work:
        result = grade(suite, harness, sample, run, index=index, epoch=epoch)
        env = Envelope.new(
            EVAL_RESULT,
            result,
            source=SOURCE,
            id=result_id(run, harness.name, result.key, epoch),
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
    """Their sequences; the ids are made from run, harness, sample key and epoch, so that a repeat stores nothing twice."""
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
