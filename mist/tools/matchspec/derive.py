"""Runs made of other runs: fork, replay, rescore; what a run would still cost; the history of one sample.

    fork      its own run: the parent's results up to a point are taken over by reference, the rest is asked anew with
              whatever changed (model, graders, prompts; not the data)
    replay    its own run of the same suite: results up to a cursor are taken over, the rest is judged again on the
              parent's recorded inference; nobody is asked, what was not recorded is an error
    rescore   its own run: the parent's recorded outputs under new graders or expectations; nobody is asked

Each is made by its first record, so that a killed one is gone on with like any run: call it again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import Any

import msgspec
from msgspec import Struct

from mist.broker.base import SEQUENCE_MAX, Broker, Record, Stream
from mist.errors import Conflict, InvalidArgument, NotFound
from mist.kit.parallel import Pool
from mist.kit.prices import Prices
from mist.tools.matchspec.asking import Answer, request_id
from mist.tools.matchspec.judging import Judge
from mist.tools.matchspec.manifest import changed_parts, differences
from mist.tools.matchspec.models import at_once
from mist.tools.matchspec.recorded import Recalled, Shelf
from mist.tools.matchspec.results import (
    Counting,
    Head,
    Parent,
    Result,
    StoredBrief,
    brief_of,
    each_brief,
    of_run,
    read_head,
    records,
    result_of,
)
from mist.tools.matchspec.run import WAITING_MAX, Item, Outcome, Runner, run_suite
from mist.tools.matchspec.suite import Harness, Infer, Suite, sample_key

CHARS_PER_TOKEN = 4
"""A rule of thumb for English, used where nothing better is known, and said so."""


async def fork(
    broker: Broker, stream: Stream, suite: Suite, *, source: str, at: int, run: str, **options: Any
) -> Outcome:
    """Begin `run` as a fork of `source` after its first `at` results (in the order of the stream), or go on with it.
    `options` are those of `run_suite`. Raises NotFound; Conflict where the data changed: results of other data would be
    taken over; InvalidArgument for an `at` beyond the results."""
    if await _begun(stream, run):
        return await run_suite(broker, stream, suite, run=run, **options)
    head = await read_head(stream, source)
    _same_data(head, suite)
    if at < 0:
        raise InvalidArgument(f"a fork at {at} cannot be", hint="how many results of the source are taken over")
    counting = Counting(head)
    through, taken = 0, 0
    async for record, _ in _in_order(stream, head, counting):
        if taken >= at:
            break
        through, taken = record.sequence, taken + 1
    if taken < at:
        raise InvalidArgument(f"run {source} has {taken} results, a fork at {at} cannot be")
    parent = Parent(run=source, how="fork", through=through, taken=taken, changed=changed_parts(head.manifest, suite))
    return await run_suite(broker, stream, suite, run=run, parent=parent, **options)


async def replay(
    broker: Broker, stream: Stream, suite: Suite, *, source: str, after: int, run: str, **options: Any
) -> Outcome:
    """Begin `run` as a replay of `source` from a cursor, or go on with it: results with a sequence up to `after` are taken
    over. Raises NotFound; Conflict for another suite."""
    if await _begun(stream, run):
        return await run_suite(broker, stream, suite, run=run, **options)
    head = await read_head(stream, source)
    found = differences(head.manifest, suite)
    if found:
        raise Conflict(f"run {source} is of another suite: {'; '.join(found)}", hint="fork it, or rescore it")
    counting = Counting(head)
    taken = 0
    async for record, _ in _in_order(stream, head, counting):
        taken += record.sequence <= after
    parent = Parent(run=source, how="replay", through=max(0, min(after, SEQUENCE_MAX)), taken=taken)
    return await run_suite(broker, stream, suite, run=run, parent=parent, **options)


async def rescore(
    broker: Broker,
    stream: Stream,
    suite: Suite,
    *,
    source: str,
    run: str,
    stop: asyncio.Event | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    collect: bool = True,
) -> Outcome:
    """Begin `run` as a new grading of the outputs that `source` recorded, or go on with it. Samples are matched by harness
    and id, so that expectations may have changed. A sample without a recorded output, or whose output was cut, is an
    error. Raises NotFound; Conflict when nothing matches."""
    head = await read_head(stream, source)
    outputs = Shelf(stream)
    counting = Counting(head)
    async for record, brief in _in_order(stream, head, counting):
        if not brief.result.error or brief.result.error_kind == "grader":
            outputs.put(_place(brief.result.harness, brief.result.task, brief.result.epoch), record)
    if not any(_place(h.name, s.id, 1) in outputs for h in suite.harnesses for s in h.samples):
        raise Conflict(f"run {source} recorded no output of a sample of suite {suite.name}")
    parent = Parent(run=source, how="rescore", taken=0, changed=changed_parts(head.manifest, suite))
    runner = Runner(broker, stream, suite, run, stop=stop, on_progress=on_progress)
    await runner.begin(parent, "")
    await _rescored(runner, suite, outputs)
    return await runner.outcome(collect)


async def _rescored(runner: Runner, suite: Suite, outputs: Shelf) -> None:
    try:
        for harness in suite.harnesses:
            judge = runner.judge(harness)

            async def one(item: Item, judge: Judge = judge, harness: Harness = harness) -> Result | None:
                if judge.slow and runner.ended():
                    return None  # left for whoever goes on with the run
                index, sample, epoch, _ = item
                key = sample_key(harness.name, sample)
                record = await outputs.get(_place(harness.name, sample.id, epoch))
                stored = result_of(record) if record is not None else None
                if stored is None or stored.result.task != sample.id:
                    return judge.error(sample, key, index, epoch, "no recorded output", "no_answer")
                if stored.result.output_cut:
                    return judge.error(sample, key, index, epoch, "the recorded output was cut", "no_answer")
                answer = _answer_of(stored.result)
                result = None if judge.asks else judge.at_once(sample, answer, key, index, epoch)
                if result is None:
                    result = await judge.asking(sample, answer, key, index, epoch, timeout_s=harness.timeout_s)
                return result

            pool = Pool(harness.concurrency)
            size = harness.concurrency * WAITING_MAX if judge.slow else runner.batch
            items = runner.items(harness)
            while not runner.ended() and (some := list(islice(items, size))):
                found = await pool.map(one, some) if judge.slow else [await one(item) for item in some]
                judged = [runner.message(result, retried=False) for result in found if result is not None]
                if judged:
                    await runner.store(judged)
            if runner.why:
                return
    finally:
        await runner.save_cursor(force=True)


def _answer_of(result: Result) -> Answer:
    return Answer(
        output=result.output, tokens_in=result.tokens_in, tokens_out=result.tokens_out, cost_usd=result.cost_usd,
        latency_ms=result.latency_ms, request_id=result.request_id, trace_id=result.trace_id, recalled=True,
    )  # fmt: skip


def _place(harness: str, task: str, epoch: int) -> int:
    parts = msgspec.json.encode([harness, task, epoch])
    return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest())


async def _begun(stream: Stream, run: str) -> bool:
    try:
        await read_head(stream, run)
    except NotFound:
        return False
    return True


def _same_data(head: Head, suite: Suite) -> None:
    was = {h.name: h.data_digest for h in head.manifest.harnesses}
    for h in suite.harnesses:
        if h.name in was and was[h.name] != h.data_digest:
            raise Conflict(
                f"harness {h.name} has other data than run {head.manifest.run}: its results cannot be taken over",
                hint="a fork changes the model, graders, prompts or settings; for other data begin a new run",
            )


async def _in_order(stream: Stream, head: Head, counting: Counting) -> AsyncIterator[tuple[Record, StoredBrief]]:
    """The results of a run as they lie in the stream, errors in their place, each with its record."""
    async for record in of_run(stream, head):
        brief = brief_of(record)
        if brief is None:
            continue
        slot = counting.slots.of(brief.result)
        if counting.add(brief) or (slot is not None and counting.errors.get(slot) is brief):
            yield record, brief


class Plan(Struct, frozen=True, kw_only=True):
    """What a run would still do. `calls`: questions that would be put to a model (without repeats after failures);
    `recorded`: answers that lie in the stream already; `usd`: what the calls would cost, None where that cannot be said,
    and `how` says how it was reckoned, or why not."""

    run: str
    total: int
    finished: int
    errors: int
    left: int
    calls: int
    recorded: int
    usd: float | None
    how: str
    spent_usd: float = 0.0
    unpriced: int = 0


async def dry_run(
    broker: Broker,
    stream: Stream | None,
    suite: Suite,
    *,
    run: str = "",
    prices: Prices | None = None,
    time_ns: int = 0,
    infer_stream: str = "infer",
    retry_errors: bool = False,
) -> Plan:
    """What is left of a run (a new one without `run`). Reads, and asks nobody. Raises Conflict for another suite's run."""
    counting: Counting | None = None
    if run and stream is not None:
        try:
            head = await read_head(stream, run)
        except NotFound:
            head = None
        if head is not None:
            found = differences(head.manifest, suite)
            if found:
                raise Conflict(f"run {run} is of another suite: {'; '.join(found)}")
            counting = Counting(head)
            async for _ in each_brief(stream, head, counting):
                pass
    recalled = None
    if counting is not None:
        try:
            recalled = Recalled(await broker.open(infer_stream, create=False))
            await recalled.load(counting.head.manifest.infer_after)
        except NotFound:
            recalled = None
    finished = 0 if counting is None else counting.slots.done if retry_errors else counting.done
    calls = recorded = 0
    usd: float | None = 0.0
    how = "nobody has to be asked"
    for harness in suite.harnesses:
        if at_once(harness) is not None:
            continue
        first = counting.slots.first(harness.name) if counting is not None else 0
        model = harness.model
        params = model.params if isinstance(model, Infer) else {}
        tokens_out = params.get("max_tokens", params.get("max_completion_tokens"))
        for index, sample in enumerate(harness.samples):
            for epoch in range(1, harness.epochs + 1):
                slot = first + index * harness.epochs + epoch - 1
                if counting is not None and (
                    counting.slots.has(slot) or (slot in counting.errors and not retry_errors)
                ):
                    continue
                if recalled is not None:
                    key = sample_key(harness.name, sample)
                    if any(
                        recalled.has(request_id(run, harness.name, key, epoch, n)) for n in range(harness.retries + 1)
                    ):
                        recorded += 1
                        continue
                calls += 1
                if usd is None:
                    continue
                cost = None
                if prices is not None:
                    cost = prices.cost_usd(
                        provider=model.provider if isinstance(model, Infer) else "", model=harness.label,
                        time_ns=time_ns,
                        tokens_in=(len(harness.system) + len(harness.prompt(sample))) // CHARS_PER_TOKEN + 1,
                        tokens_out=tokens_out if isinstance(tokens_out, int) else None,
                    )  # fmt: skip
                if cost is None:
                    usd, how = None, _unpriced(harness.label, prices, tokens_out)
                else:
                    usd, how = usd + cost, f"at most: {CHARS_PER_TOKEN} characters a token, max_tokens of output each"
    if calls and counting is not None and not counting.unpriced and counting.usd:
        paid = counting.slots.done
        if paid:
            usd, how = counting.usd / paid * calls, f"as the {paid} finished ones on average"
    return Plan(
        run=run,
        total=suite.total,
        finished=finished,
        errors=len(counting.errors) if counting is not None else 0,
        left=suite.total - finished,
        calls=calls,
        recorded=recorded,
        usd=usd,
        how=how,
        spent_usd=counting.usd if counting is not None else 0.0,
        unpriced=counting.unpriced if counting is not None else 0,
    )


def _unpriced(label: str, prices: Prices | None, tokens_out: object) -> str:
    if prices is None:
        return "cannot be said: there is no price table"
    if not isinstance(tokens_out, int):
        return f"cannot be said: {label} has no max_tokens, or no price"
    return f"cannot be said: no price of {label}"


class Seen(Struct, frozen=True, kw_only=True):
    """One sample in one run."""

    run: str
    sequence: int
    timestamp_ns: int
    harness: str
    model: str
    epoch: int
    passed: bool
    score: float
    error: str
    counts: bool
    """Whether it is the one that counts: not a second one, not an error that was replaced later."""


async def history(stream: Stream, sample: str, *, harness: str = "") -> list[Seen]:
    """Every result of a sample over all runs, oldest first. `sample` is its id, or its stable key, which also tells that
    its text is the same."""
    found: list[StoredBrief] = []
    async for record in records(stream, ("eval.result.>",)):
        brief = brief_of(record)
        if brief is None or sample not in (brief.result.task, brief.result.key):
            continue
        if not harness or brief.result.harness == harness:
            found.append(brief)
    counted: dict[tuple[str, str, int], StoredBrief] = {}
    for stored in found:
        r = stored.result
        place = (r.run, r.harness or r.model, r.epoch)
        before = counted.get(place)
        if before is None or (before.result.error and not r.error):
            counted[place] = stored
    return [
        Seen(
            run=s.result.run, sequence=s.sequence, timestamp_ns=s.timestamp_ns, harness=s.result.harness,
            model=s.result.model, epoch=s.result.epoch, passed=s.result.passed, score=s.result.score,
            error=s.result.error,
            counts=counted[s.result.run, s.result.harness or s.result.model, s.result.epoch] is s,
        )
        for s in found
    ]  # fmt: skip
