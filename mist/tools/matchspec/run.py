"""Running a suite: one durable `eval.result` per harness, sample and repeat, from wherever the run stopped.

Promises
- The manifest is the first record of a run. Going on with another suite (data, models, graders or their code, prompts,
  repeats, seed) is refused, and the refusal says what differs.
- A finished sample is never run again, whenever and however the run was stopped, because what is finished is read from
  the stream and nowhere else. Killed at any instant and gone on with, a run gives the report of one that was not.
- An answer is stored (`infer.response`, on the stream of answers) before it is judged. So a kill costs at most the
  questions that were in flight: asked, and not answered or not stored yet; those are asked again under the same ids.
  Over a broker not even they: the question lies on the stream, and only its answer is waited for.
- Results are stored in the order of the data where nobody has to be asked, else as they finish; reports are in the order
  of the data. The run's cursor (checkpoint `eval-<run>`) is saved after the results it covers.
- A limit or a stop ends a run cleanly: no new question, what is in flight is stored; it can be gone on with.

Two runners of one run at the same time do work twice, and pay twice for what both ask, but store it once (equal ids
within the broker's window, and readers count the first). There is no lease: the one of a killed runner would hold up
its successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime

import msgspec
from msgspec import Struct

from mist.broker.base import Broker, Checkpoint, Message, Stream
from mist.broker.patience import again
from mist.broker.publisher import Publisher
from mist.client.client import to_message
from mist.errors import Conflict, Internal, Malformed, MistError, NotFound, TimedOut
from mist.kit.parallel import Pool, RateLimiter
from mist.kit.prices import Prices
from mist.kit.retry import RetryPolicy, retry
from mist.kit.waiting import sleep_unless
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import EVAL_RESULT, EVAL_RUN
from mist.protocol.subject import check_name, encode_token
from mist.protocol.url import Url, parse_url
from mist.tools.matchspec.asking import SOURCE, Answer, Ask, question, read_answer, request_id
from mist.tools.matchspec.judging import Judge
from mist.tools.matchspec.manifest import differences, manifest_for, manifest_message
from mist.tools.matchspec.models import Answerer, answerer, at_once
from mist.tools.matchspec.recorded import Recalled
from mist.tools.matchspec.results import (
    Counting,
    ErrorKind,
    Parent,
    Result,
    Row,
    Run,
    Table,
    each_brief,
    list_runs,
    read_head,
    read_run,
    result_subject,
    run_id_of,
)
from mist.tools.matchspec.suite import Harness, Infer, Sample, Suite, sample_key
from mist.transport.stream import open_place

BATCH = 512
BATCH_BYTES_MAX = 4 * 1024 * 1024
WAITING_MAX = 4
"""For each one judged at a time, so many may be done or wait before they are caught up with."""
STORE_EVERY_S = 0.5
"""What takes a grader its time is stored at least so often, as far as it is finished."""
INFER_STREAM = "infer"
QUESTIONS_STREAM = "infer-requests"
CURSOR_EVERY_S = 0.5
ANSWERS = "answers"
"""In the URL of a broker, the stream on which the questions of `stream` are answered."""
RETRY_WAIT_S_MAX = 60.0
LOOKED_FOR = 32
"""How many attempts of another run's question a replay looks for an answer to."""
CLOCKS_APART_S = 3600
"""How far the clocks of two brokers may be apart: from so long before the run's begin answers are looked for."""


class Limits(Struct, frozen=True, kw_only=True):
    """None = no limit. `usd` and `tokens` are of the whole run over all its resumptions, `seconds` of this call. Up to
    `concurrency` questions may be in flight when one is reached: their answers are kept and paid. A limit in dollars
    needs costs: an answer without one, and no price for it, stops the run; one in tokens needs both counts."""

    usd: float | None = None
    tokens: int | None = None
    seconds: float | None = None


class Outcome(Struct, frozen=True, kw_only=True):
    """What one call of `run_suite` did. `resumed_after`: where the run's cursor stood when it was picked up (None for a
    new run); `ran`: samples judged now; `kept`: finished before; `calls`: questions put to a model now, repeats
    included; `recalled`: answers found in the stream instead; `why` it stopped; `usd` and `tokens` of the whole run."""

    run: Run
    ran: int
    kept: int
    resumed_after: int | None
    stopped: bool
    why: str = ""
    calls: int = 0
    recalled: int = 0
    usd: float = 0.0
    unpriced: int = 0
    tokens: int = 0
    rows: list[Row] = []
    """The table of all its results that count."""
    unanswered: int = 0
    """Of them, those that had no answer to judge."""


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


def result_id(run: str, harness: str, key: str, epoch: int, mark: str = "") -> str:
    """The envelope id of a result: the same for the same work, so that repeating it is stored once."""
    return hashlib.sha256(_json([run, harness, key, epoch, mark])).hexdigest()[:32]


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
    ask: Ask | None = None,
    limits: Limits | None = None,
    prices: Prices | None = None,
    parent: Parent | None = None,
    baseline: str = "",
    retry_errors: bool = False,
    infer_stream: str = INFER_STREAM,
    questions_stream: str = QUESTIONS_STREAM,
    collect: bool = True,
    clock: Callable[[], float] = time.monotonic,
    draw: Callable[[], float] = random.random,
) -> Outcome:
    """Begin the run or go on with it, until it is complete, `stop` is set, or a limit is reached.

    `rate`: at most so many samples a second (0 = no limit). `ask`: who answers `infer` models without a URL; without it
    their questions go to `questions_stream` of this broker, and are answered on `infer_stream`, which also keeps
    what others answer. `parent`: where a new run comes from (`derive.py` makes it).
    `baseline`: the run whose scores results are compared with. `retry_errors`: run the samples again whose result is an
    error; the old result stays until a new one is none. `collect` False leaves the outcome's `run.results` empty, so that
    a run of any size takes the same memory. Raises Conflict when the run exists for another suite.
    """
    runner = Runner(
        broker, stream, suite, run, stop=stop, rate=rate, batch=batch, on_progress=on_progress, ask=ask, limits=limits,
        prices=prices, retry_errors=retry_errors, infer_stream=infer_stream, questions_stream=questions_stream, clock=clock, draw=draw,
    )  # fmt: skip
    await runner.begin(parent, baseline)
    await runner.go()
    return await runner.outcome(collect)


Item = tuple[int, Sample, int, int]
"""Index, sample, epoch, slot."""
_LATER = Message("", b"")
"""Stands where a result is still to come."""


class Runner:
    """One call's work on one run: `begin`, then `go`, then `outcome`."""

    counting: Counting
    """What was there when it began, and what was paid since."""

    def __init__(
        self,
        broker: Broker,
        stream: Stream,
        suite: Suite,
        run: str,
        *,
        stop: asyncio.Event | None = None,
        rate: float = 0.0,
        batch: int = BATCH,
        on_progress: Callable[[int, int], None] | None = None,
        ask: Ask | None = None,
        limits: Limits | None = None,
        prices: Prices | None = None,
        retry_errors: bool = False,
        infer_stream: str = INFER_STREAM,
        questions_stream: str = QUESTIONS_STREAM,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.broker = broker
        self.stream = stream
        self.suite = suite
        self.run = check_name(run)
        self.batch = max(1, min(batch, int(rate / 20) or 1) if rate else batch)
        self.prices = prices
        self.clock = clock
        self.draw = draw
        self.why = ""
        self.calls = self.recalled = self.ran = self.kept = 0
        self.resumed_after: int | None = None
        self._stop = stop
        self._limiter = RateLimiter(rate, burst=1, clock=clock, sleep=lambda s: sleep_unless(s, stop)) if rate else None
        self._on_progress = on_progress
        self._ask = ask
        self._limits = limits or Limits()
        self._retry_errors = retry_errors
        self._infer_stream = infer_stream
        self._questions_stream = questions_stream
        self._began = self._cursor_at = clock()
        self._last = 0
        self._subject = result_subject(run)
        self._manifest_id = run_id_of(EVAL_RUN, run)
        self._scores: dict[tuple[str, int], float] | None = None

    # what is there already

    async def begin(
        self,
        parent: Parent | None = None,
        baseline: str = "",
        *,
        tasks: Sequence[str] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """The manifest, and what is finished. A new run's manifest says `tasks` and `tags`: which part of a suite this is,
        for who has to find it again."""
        try:
            head = await read_head(self.stream, self.run)
            fresh = False
        except NotFound:
            manifest = manifest_for(
                self.suite, self.run, parent=parent, baseline_run=baseline, infer_stream=self._infer_stream,
                infer_after=await self._answers_end(), tasks=tasks, tags=tags,
            )  # fmt: skip
            await again(lambda: self.stream.append([manifest_message(manifest)]))
            head = await read_head(self.stream, self.run)
            fresh = True
        found = differences(head.manifest, self.suite)
        if found:
            raise Conflict(
                f"run {self.run} is of another suite: {'; '.join(found)}",
                hint="give this run another name, or fork it (`mist eval fork`)",
            )
        self.head = head
        self.counting = Counting(head)
        if not fresh or head.ancestors:
            async for _ in each_brief(self.stream, head, self.counting):
                pass
        self.kept = self.counting.slots.done if self._retry_errors else self.counting.done
        self._last = self.counting.last
        if not fresh:
            cursor = None
            if self.broker.capabilities.checkpoints:
                name = cursor_name(self.run)
                cursor = await again(lambda: self.broker.checkpoints.load(self.stream.name, name))
            # the cursor is saved after the results; where a kill came between, the results are the truth
            self.resumed_after = cursor.sequence if cursor is not None else self.counting.last
        if head.manifest.baseline_run:
            self._scores = await self._baseline(head.manifest.baseline_run)

    async def _answers_end(self) -> int:
        """The position from which on this run's answers lie."""
        if all(at_once(h) is not None for h in self.suite.harnesses):
            return 0
        try:
            opened = await again(lambda: self.broker.open(self._infer_stream, create=False))
        except NotFound:
            return 0
        return (await again(opened.info)).last

    async def _baseline(self, run: str) -> dict[tuple[str, int], float]:
        head = await read_head(self.stream, run)
        return {(s.result.key, s.result.epoch): s.result.score async for s in each_brief(self.stream, head)}

    def items(self, harness: Harness) -> Iterator[Item]:
        """What is left of a harness, in order."""
        slots, errors = self.counting.slots, {} if self._retry_errors else self.counting.errors
        slot = slots.first(harness.name)
        if harness.epochs == 1 and not slots.done and not errors:
            for index, sample in enumerate(harness.samples):
                yield index, sample, 1, slot + index
            return
        for index, sample in enumerate(harness.samples):
            for epoch in range(1, harness.epochs + 1):
                if not slots.has(slot) and slot not in errors:
                    yield index, sample, epoch, slot
                slot += 1

    # running

    async def go(self) -> None:
        try:
            for harness in self.suite.harnesses:
                if self.ended():
                    break
                judge = self.judge(harness)
                known = at_once(harness)
                if known is not None and not judge.asks:
                    await self._at_once(harness, judge, known)
                else:
                    await self._asking(harness, judge, known)
        finally:
            await self.save_cursor(force=True)

    def judge(self, harness: Harness) -> Judge:
        scores = self._scores
        compare = None if scores is None else lambda key, epoch: scores.get((key, epoch))
        return Judge(self.suite.name, harness, self.run, baseline=compare, cluster=self.suite.gate.cluster)

    def ended(self) -> bool:
        """Whether nothing new is to be begun; then `why` says it."""
        if self.why:
            return True
        if self._stop is not None and self._stop.is_set():
            self.why = "stopped"
            return True
        limits, counting = self._limits, self.counting
        if limits.seconds is not None and self.clock() - self._began >= limits.seconds:
            self.why = f"the limit of {limits.seconds:g} s is reached"
        elif limits.tokens is not None and counting.uncounted:
            self.why = f"the limit of {limits.tokens} tokens cannot be kept: an answer does not say how many it took"
        elif limits.tokens is not None and counting.tokens >= limits.tokens:
            self.why = f"the limit of {limits.tokens} tokens is reached: {counting.tokens} were used"
        elif limits.usd is not None and counting.unpriced:
            self.why = f"the limit of {limits.usd:g} USD cannot be kept: the cost of an answer is not known"
        elif limits.usd is not None and counting.usd >= limits.usd:
            self.why = f"the limit of {limits.usd:g} USD is reached: {counting.usd:.6g} USD were spent"
        return bool(self.why)

    async def _at_once(self, harness: Harness, judge: Judge, known: Callable[[Sample], Answer | str | None]) -> None:
        """Answers that are there, and graders that decide at once: a batch is judged while the one before is stored. What
        takes a grader its time is judged at the end of the batch, `concurrency` samples at a time."""
        storing: asyncio.Task[list[int]] | None = None
        stored = 0
        messages: list[Message] = []
        later: list[tuple[int, Item, str]] = []
        later_max = WAITING_MAX * harness.concurrency
        size = 0
        handed_over = self.clock()
        name, errors = harness.name, self.counting.errors

        async def slowly(waiting: Iterator[tuple[int, Item, str]]) -> None:
            nonlocal size
            for at, (index, sample, epoch, slot), key in waiting:
                if self.ended():
                    return  # left for whoever goes on with the run
                result = await judge.asking(sample, known(sample), key, index, epoch, timeout_s=harness.timeout_s)
                if slot not in errors or not result.error:
                    message = messages[at] = self.message(result, retried=slot in errors)
                    size += len(message.data)

        async def catch_up() -> None:
            """The messages of those that were put off, each in its place."""
            nonlocal later
            waiting = iter(later)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(harness.concurrency, len(later))):
                    group.create_task(slowly(waiting))
            later = []

        async def settle() -> None:
            nonlocal storing
            if storing is not None:
                task, storing = storing, None
                await self._stored(await task, stored)

        async def hand_over() -> None:
            nonlocal storing, stored, messages, size, handed_over
            if later:
                await catch_up()
            await settle()
            batch, messages, size = [m for m in messages if m is not _LATER] if judge.slow else messages, [], 0
            handed_over = self.clock()
            stored = len(batch)
            if not batch:
                return
            storing = asyncio.create_task(self._append(batch))
            if self._limiter is not None:
                await settle()
                await self._limiter.take(stored)
            await asyncio.sleep(0)  # let the append begin before the next batch is judged

        try:
            for item in self.items(harness):
                index, sample, epoch, slot = item
                key = sample_key(name, sample)
                result = judge.at_once(sample, known(sample), key, index, epoch)
                retried = slot in errors
                if result is None:
                    later.append((len(messages), item, key))
                    message = _LATER
                elif retried and result.error:
                    continue  # the old result stays
                else:
                    message = self.message(result, retried=retried)
                messages.append(message)
                size += len(message.data)
                if len(later) >= later_max:
                    await catch_up()
                    due = self.clock() - handed_over >= STORE_EVERY_S or self.ended()
                else:
                    due = False
                if due or len(messages) >= self.batch or size >= BATCH_BYTES_MAX:
                    await hand_over()
                    if self.ended():
                        break
            if messages:
                await hand_over()
            await settle()
        finally:
            if storing is not None:
                storing.cancel()
                await asyncio.wait({storing})

    async def store(self, messages: list[Message]) -> None:
        """Append them, and say so."""
        await self._stored(await self._append(messages), len(messages))

    async def _append(self, messages: list[Message]) -> list[int]:
        """Their sequences; the ids are made from run, harness, sample key and epoch, so that a repeat stores nothing twice."""
        return await again(lambda: self.stream.append(messages))

    async def _stored(self, sequences: list[int], count: int) -> None:
        # a repeated batch may be answered with earlier sequences, and another runner may be ahead
        self._last = max(self._last, *sequences)
        self.ran += count
        await self.save_cursor()
        if self._on_progress is not None:
            self._on_progress(self.kept + self.ran, self.suite.total)

    async def _asking(
        self, harness: Harness, judge: Judge, known: Callable[[Sample], Answer | str | None] | None
    ) -> None:
        """Somebody is asked, for the answer or for the verdict: `concurrency` samples at a time."""
        async with AsyncExitStack() as stack:
            results = await stack.enter_async_context(_publishing(self.stream, harness))
            asker = None if known is not None else await self._asker(harness, stack)

            async def items() -> AsyncIterator[Item]:
                for item in self.items(harness):
                    if self._limiter is not None:
                        await self._limiter.take()
                    if self.ended():
                        return
                    yield item

            async def one(item: Item) -> int | None:
                try:
                    return await judged(item)
                except BaseException as exc:
                    # nothing new is asked whose answer could not be stored
                    self.why = self.why or f"{type(exc).__name__}: {exc}"
                    raise

            async def judged(item: Item) -> int | None:
                index, sample, epoch, slot = item
                key = sample_key(harness.name, sample)
                if asker is not None:
                    result = await asker.result(judge, item, key)
                else:
                    told = known(sample) if known is not None else None
                    result = await judge.asking(sample, told, key, index, epoch, timeout_s=harness.timeout_s)
                if result.error_kind in ("model", "timeout") and self._stop is not None and self._stop.is_set():
                    return None  # who answers may have been stopped as well: left for whoever goes on with the run
                before = self.counting.errors.get(slot)
                retried = before is not None
                if before is None or before.result.request_id != result.request_id:
                    self.counting.pay(result)
                if retried and result.error:
                    return None  # the old result stays
                return await results.publish(self.message(result, retried=retried))

            pool = Pool(harness.concurrency)
            async with pool.completed(one, items()) as done:
                async for _, outcome in done:
                    sequence = outcome.get()
                    await self._stored([sequence] if sequence is not None else [0], 1)

    async def _asker(self, harness: Harness, stack: AsyncExitStack) -> _Asker:
        manifest = self.head.manifest
        model = harness.model
        after, began_ns = manifest.infer_after, self.head.timestamp_ns
        names = [self.run]
        if manifest.parent is not None and manifest.parent.how == "replay":
            for name, _ in reversed(self.head.ancestors):
                elder = await read_head(self.stream, name)
                after, began_ns = min(after, elder.manifest.infer_after), min(began_ns, elder.timestamp_ns)
                names.append(name)
        answers_name = manifest.infer_stream or self._infer_stream
        questions: Stream | None = None
        if isinstance(model, Infer) and model.url and not model.url.startswith(("http:", "https:")):
            url = parse_url(model.url)
            place = await open_place(Url(url.scheme, url.target, tuple(q for q in url.query if q[0] != ANSWERS)))
            stack.push_async_callback(place.broker.aclose)
            questions = place.stream
            opened = await place.broker.open(url.get(ANSWERS, answers_name))
            began_ns -= CLOCKS_APART_S * 1_000_000_000
            after = await again(lambda: opened.locate(began_ns)) - 1
        else:
            opened = await again(lambda: self.broker.open(answers_name))
            if isinstance(model, Infer) and not model.url and self._ask is None:
                questions = await again(lambda: self.broker.open(self._questions_stream))
        recalled = Recalled(opened)
        offline = len(names) > 1
        if self.resumed_after is not None or offline:
            after = await recalled.load(after)
            if questions is not None:
                asked = questions
                await recalled.load(await again(lambda: asked.locate(began_ns)) - 1, stream=asked)
        who = None
        if not offline:
            who = answerer(
                harness, ask=self._ask, questions=questions, answers=opened, after=after, asked=recalled.asked
            )
            stack.push_async_callback(who.aclose)
        answers = await stack.enter_async_context(_publishing(opened, harness))
        return _Asker(self, harness, who, recalled, answers, names)

    def message(self, result: Result, *, retried: bool) -> Message:
        id = result_id(self.run, result.harness, result.key, result.epoch, "retried" if retried else "")
        env = _ResultEnvelope(
            version="1",
            id=id,
            source=SOURCE,
            type=EVAL_RESULT,
            timestamp_ns=time.time_ns(),
            payload=result,
            correlation_id=self.run,
            causation_id=self._manifest_id,
        )
        try:
            data = _encode(env)
        except UnicodeEncodeError:  # a lone surrogate in an output: written as `?`, its digest is of the original
            data = _encode(msgspec.structs.replace(env, payload=_writable(result)))
        return Message(self._subject, data, id)

    async def save_cursor(self, *, force: bool = False) -> None:
        now = self.clock()
        if not self.broker.capabilities.checkpoints or not self._last:
            return
        if not force and now - self._cursor_at < CURSOR_EVERY_S:
            return
        self._cursor_at = now
        checkpoint = Checkpoint(
            stream=self.stream.name,
            name=cursor_name(self.run),
            incarnation=self.stream.incarnation,
            sequence=self._last,
        )
        # force: another runner may be ahead
        await again(lambda: self.broker.checkpoints.save(checkpoint, force=True))

    async def outcome(self, collect: bool) -> Outcome:
        table = Table()
        suite = self.head.manifest.suite
        unanswered = 0
        if collect:
            run = await read_run(self.stream, self.run)
            for stored in run.results:
                table.add(suite, stored.result.model, stored.result.passed)
                unanswered += stored.result.error_kind == "no_answer"
        else:
            counting = Counting(self.head)
            async for brief in each_brief(self.stream, self.head, counting):
                table.add(suite, brief.result.model, brief.result.passed)
                unanswered += brief.result.error_kind == "no_answer"
            run = Run(counting.info, self.head.manifest, [], counting.doubled)
        counting = self.counting
        return Outcome(
            run=run,
            ran=self.ran,
            kept=self.kept,
            resumed_after=self.resumed_after,
            stopped=not run.info.complete,
            why=self.why,
            calls=self.calls,
            recalled=self.recalled,
            usd=counting.usd,
            unpriced=counting.unpriced,
            tokens=counting.tokens,
            rows=table.rows(run.manifest.models),
            unanswered=unanswered,
        )


@contextlib.asynccontextmanager
async def _publishing(stream: Stream, harness: Harness) -> AsyncIterator[Publisher]:
    """A batching window. Where the run ends by an error, that one is raised and not what became of the window."""
    publisher = Publisher(stream, pending_max=harness.concurrency * WAITING_MAX)
    try:
        yield publisher
    except BaseException:
        await publisher.abort()
        raise
    await publisher.aclose()


class _Asker:
    """The questions of one harness: an answer from the stream where there is one, else asked, with repeats, and stored."""

    def __init__(
        self,
        runner: Runner,
        harness: Harness,
        who: Answerer | None,
        recalled: Recalled,
        answers: Publisher,
        names: list[str],
    ) -> None:
        self._runner = runner
        self._harness = harness
        self._who = who
        self._recalled = recalled
        self._answers = answers
        self._names = names
        """This run, then those whose answers are its own."""

    async def result(self, judge: Judge, item: Item, key: str) -> Result:
        index, sample, epoch, slot = item
        runner = self._runner
        before = runner.counting.errors.get(slot)
        # a question that ended in an error is asked anew under a new id, unless its answer came after all
        offset = before.result.attempts if before is not None and before.result.error_kind != "grader" else 0
        attempts = 0
        try:
            answer, offset = await self._recall(key, epoch, offset)
            if answer is None:
                answer, attempts = await self._asked(sample, key, epoch, offset)
            else:
                runner.recalled += 1
        except _Failed as failed:
            return judge.error(
                sample, key, index, epoch, failed.told, failed.kind, attempts=offset + failed.attempts,
                request_id=failed.request_id,
            )  # fmt: skip
        result = await judge.asking(sample, self._priced(answer), key, index, epoch, timeout_s=self._harness.timeout_s)
        return msgspec.structs.replace(result, attempts=offset + attempts) if offset + attempts > 1 else result

    async def _recall(self, key: str, epoch: int, offset: int) -> tuple[Answer | None, int]:
        """The answer that is there, and the number of the next attempt. A question that was put in vain before an error is
        not waited for again."""
        error: _Failed | None = None
        for name in self._names:
            attempt = 0
            while True:
                id = request_id(name, self._harness.name, key, epoch, attempt)
                if self._recalled.has(id):
                    try:
                        return await self._recalled.get(id), attempt
                    except MistError as exc:
                        error = error or _Failed(exc.message, "model", attempt + 1, id)
                least = max(offset, self._harness.retries, LOOKED_FOR if self._who is None else 0)
                if attempt >= least and not self._recalled.asked(id):
                    break
                attempt += 1
            if offset:
                offset = max(offset, attempt)
        if error is not None and not offset:
            raise error  # an answer that is an error counts until errors are tried again
        return None, offset

    async def _asked(self, sample: Sample, key: str, epoch: int, offset: int) -> tuple[Answer, int]:
        runner, harness, who = self._runner, self._harness, self._who
        if who is None:
            raise _Failed("no recorded inference, and a replay asks nobody", "no_answer", 1, "")
        attempts = 0
        same = False
        id = ""

        async def attempt() -> tuple[Envelope, Envelope, Answer]:
            nonlocal attempts, id, same
            if not same:
                attempts += 1
            q = question(runner.run, harness, sample, key, epoch, seed=runner.suite.seed, attempt=offset + attempts - 1)
            if q.id != id and not self._recalled.asked(q.id):
                runner.calls += 1
            id = q.id
            # over a broker a late answer is still one: the same question is waited for again, not put again
            same = who.records
            began = runner.clock()
            env = await who.ask(q)
            if env.correlation_id != q.id:
                raise Malformed(f"question {q.id}: the answer is one to {env.correlation_id or 'nothing'}")
            same = False
            return q.request, env, read_answer(env, latency_ms=(runner.clock() - began) * 1000)

        policy = RetryPolicy(
            attempts_max=harness.retries + 1, wait_s=harness.retry_delay_s, factor=2.0, wait_s_max=RETRY_WAIT_S_MAX,
            jitter=0.5, attempt_s=harness.timeout_s, deadline_s=None,
        )  # fmt: skip
        try:
            request, env, answer = await retry(attempt, policy, clock=runner.clock, draw=runner.draw)
        except MistError as exc:
            kind: ErrorKind = "timeout" if isinstance(exc, TimedOut) else "model"
            raise _Failed(exc.message, kind, attempts, id) from exc
        except Exception as exc:  # who answers in process may raise anything; the sample pays, not the run
            error = Internal(f"{type(exc).__name__}: {exc}")
            raise _Failed(error.message, "model", attempts, id) from exc
        if not who.records:
            size_max = self._answers.stream.size_bytes_max
            messages = [to_message(e, qualifier=runner.run, size_bytes_max=size_max) for e in (request, env)]
            await self._answers.publish_many(messages)
        return answer, attempts

    def _priced(self, answer: Answer) -> Answer:
        prices = self._runner.prices
        if answer.cost_usd is not None or prices is None:
            return answer
        cost = prices.cost_usd(
            provider=answer.provider, model=answer.model or self._harness.label, time_ns=time.time_ns(),
            tokens_in=answer.tokens_in, tokens_out=answer.tokens_out,
        )  # fmt: skip
        return msgspec.structs.replace(answer, cost_usd=cost)


class _Failed(Exception):
    """Nobody answered."""

    def __init__(self, told: str, kind: ErrorKind, attempts: int, request_id: str) -> None:
        super().__init__(told)
        self.told = told
        self.kind: ErrorKind = kind
        self.attempts = attempts
        self.request_id = request_id


class _ResultEnvelope(Struct, frozen=True, kw_only=True, gc=False):
    """An `eval.result` envelope, encoded in one go: the keys of `Envelope`, in its order."""

    version: str
    id: str
    source: str
    type: str
    timestamp_ns: int
    payload: Result
    correlation_id: str
    causation_id: str


_encode = _json = msgspec.json.Encoder().encode


def _writable(result: Result) -> Result:
    """The result with every lone surrogate as `?`."""

    def plain(text: str) -> str:
        return text.encode("utf-8", "replace").decode()

    return msgspec.structs.replace(
        result,
        output=plain(result.output),
        answer=None if result.answer is None else plain(result.answer),
        input=plain(result.input),
        expected=plain(result.expected),
        error=plain(result.error),
        scores=[msgspec.structs.replace(s, reason=plain(s.reason), error=plain(s.error)) for s in result.scores],
    )
