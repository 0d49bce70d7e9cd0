"""C34: an eval killed while it runs, and gone on with.

The suite is recorded solutions (GSM8K's where the shared data are there, made-up ones of the same shape elsewhere) plus
one model that has to be asked. It is asked in one of two ways: by a callable in the killed process, which writes down
every call before it answers; or over the stream of answers, by a process that is not killed.

Judged: the report equals, result by result and in order, that of a run nobody killed; nothing is stored twice; a replay
from the middle gives it again and asks nobody; no question is asked twice but those that were in flight at a kill (at
most `concurrency` for each life of the callable's process, none at all over the stream).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec

from mist.broker.base import Broker, Message, Stream
from mist.broker.registry import connect
from mist.errors import MistError
from mist.protocol.codec import decode, encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import INFER_REQUEST, INFER_RESPONSE
from mist.tools.matchspec import gsm8k
from mist.tools.matchspec.derive import replay
from mist.tools.matchspec.results import Result, Run, read_run
from mist.tools.matchspec.run import run_suite
from mist.tools.matchspec.suite import Harness, Infer, Recorded, Suite, suite_of

from .campaign import Report, Trial, named
from .child import Args, opened, patiently, stopping
from .processes import Child, ChildFailed, Nursery
from .sites import Site, site

DATA = Path(os.environ.get("MIST_TEST_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
SOLUTIONS = DATA / "gsm8k_model_solutions.jsonl"
RUN = "killed"
CONCURRENCY = 4
_KILLS_EACH = 20
"""Kills of one run."""


def c34(
    budget_s: float, seed: int, report: Report, *, units: int | None = None, backend: str = "log"
) -> dict[str, Any]:
    """kill -9 of the runner at random instants, up to twenty times a run, until it is done."""
    trial = Trial(named("C34", backend), budget_s, seed, report, units)
    rng = random.Random(seed)
    rows = 150 if units is not None else 1319
    with Nursery(trial.folder) as nursery:
        way = rng.randrange(2)
        while trial.more():
            folder = trial.round()
            way = 1 - way
            try:
                with site(backend, folder) as where:
                    kills = min(_KILLS_EACH, trial.left)
                    trial.reached += evaluate(
                        trial, nursery, where, folder, rng, rows=rows, asked=rows, kills=kills, over_stream=bool(way)
                    )
            except ChildFailed as exc:
                trial.fail(str(exc))
                break
            trial.say(f"{trial.reached} kills")
    return trial.result()


def evaluate(
    trial: Trial,
    nursery: Nursery,
    where: Site,
    folder: Path,
    rng: random.Random,
    *,
    rows: int,
    asked: int,
    kills: int,
    over_stream: bool,
) -> int:
    """One run, killed so often (less often where it ends before), and judged. The number of kills."""
    data = write_data(folder / "solutions.jsonl", rows)
    calls, begun = folder / "calls", folder / "begun"
    calls.touch()
    begun.touch()
    total = len(_models(data)) * rows + asked
    # slow enough that the run outlasts its kills, each after 0.15 s of work on average
    rate = total / (0.15 * (kills + 1))
    common = {**where.common, "data": str(data), "asked": asked, "calls": str(calls), "begun": str(begun), "run": RUN}
    answering = nursery.start("answerer", {**common, "label": "answerer"}) if over_stream else None
    lives = done = 0
    while True:
        lives += 1
        child = nursery.start(
            "evaluator", {**common, "label": f"e{lives}", "rate": rate if done < kills else 0.0, "over": over_stream}
        )
        if done >= kills:
            child.finish(120.0, ask=False)
            break
        _wait_for_work(child, begun, lives)
        if child.wait(rng.uniform(0.0, 0.3)) is None:
            child.kill()
            done += 1
        elif child.status != 0:
            raise ChildFailed(f"the evaluator ended with {child.status}: {child.output()}")
        else:
            break
    if answering is not None:
        answering.finish()
    asyncio.run(_judge(trial, where, data, asked, calls, over_stream))
    trial.add(lives=lives, results=total)
    return done


def _wait_for_work(child: Child, begun: Path, lives: int) -> None:
    """Until this life has loaded its suite, so that the kill meets the run and not the start of the program."""
    until = time.monotonic() + 60
    while begun.stat().st_size < lives and child.wait(0.002) is None:
        if time.monotonic() > until:
            raise ChildFailed(f"the evaluator does not begin: {child.output()}")


async def _judge(trial: Trial, where: Site, data: Path, asked: int, calls: Path, over_stream: bool) -> None:
    suite = the_suite(data, asked)
    async with connect("memory:") as broker:
        whole = (await run_suite(broker, await broker.open("eval"), suite, run=RUN, ask=Answers(data, None))).run
    async with connect(where.url) as broker:
        stream = await broker.open("eval", create=False)
        found = await read_run(stream, RUN)
        _compare(trial, "the report", found, whole)
        if found.doubled:
            trial.fail(f"{found.doubled} results are stored twice")
        await _count_calls(trial, broker, calls, asked, over_stream)
        before = len(calls.read_text().splitlines())
        middle = sorted(s.sequence for s in found.results)[len(found.results) // 2]
        again = await replay(broker, stream, suite, source=RUN, after=middle, run="replayed", ask=Answers(data, calls))
        _compare(trial, "the replay", again.run, whole)
        if again.calls or len(calls.read_text().splitlines()) != before:
            trial.fail(f"the replay asked {again.calls} questions")
        if again.kept != len(found.results) // 2 + 1:
            trial.fail(f"the replay took over {again.kept} results of {len(found.results)}")


def report_of(run: Run) -> list[Result]:
    """What reports are made of, without times and names of runs."""
    return [
        msgspec.structs.replace(s.result, run="", duration_ms=0, latency_ms=None, request_id="", trace_id="")
        for s in run.results
    ]


def _compare(trial: Trial, what: str, found: Run, expected: Run) -> None:
    a, b = report_of(found), report_of(expected)
    if a == b and found.info.complete:
        return
    at = next((n for n, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
    trial.fail(
        f"{what}: {len(a)} results and not {len(b)}, first difference at {at}: {a[at : at + 1]}, {b[at : at + 1]}"
    )


async def _count_calls(trial: Trial, broker: Broker, calls: Path, asked: int, over_stream: bool) -> None:
    """How often each question was asked, by those who were asked."""
    lives: defaultdict[str, list[str]] = defaultdict(list)
    for line in calls.read_text().splitlines():
        life, _, id = line.partition(" ")
        lives[life].append(id)
    counted = Counter(id for ids in lives.values() for id in ids)
    repeated = {id for id, n in counted.items() if n > 1}
    trial.add(calls=sum(counted.values()), repeated=sum(counted.values()) - len(counted))
    if len(counted) != asked:
        trial.fail(f"{len(counted)} of {asked} questions were asked")
    if over_stream:
        records = [r async for r in _all(await broker.open("infer-requests"), INFER_REQUEST)]
        if repeated or len(records) != asked:
            trial.fail(
                f"over the stream {len(repeated)} questions were asked twice, {len(records)} lie there for {asked}"
            )
        return
    for number, ids in enumerate(lives.values()):
        if len(set(ids)) != len(ids):
            trial.fail("one life asked a question twice")
        later = {id for n, other in enumerate(lives.values()) if n > number for id in other}
        lost = later.intersection(ids)
        if len(lost) > CONCURRENCY:
            trial.fail(f"{len(lost)} questions of one life were asked again, {CONCURRENCY} could be in flight")


async def _all(stream: Stream, subject: str) -> Any:
    after = 0
    while True:
        page = await stream.read(after=after, subjects=(subject,), limit=1000)
        for record in page.records:
            yield record
        after = page.scanned
        if after >= page.last:
            return


def write_data(path: Path, rows: int) -> Path:
    """Recorded solutions: the first of GSM8K's, or made-up ones."""
    if SOLUTIONS.exists():
        with SOLUTIONS.open() as f:
            path.write_text("".join(line for _, line in zip(range(rows), f, strict=False)))
        return path
    lines = []
    for n in range(rows):
        solutions = {f"m{m}": {"solution": f"so\nA: {n if n % (m + 2) else 0}"} for m in range(4)}
        lines.append(json.dumps({"question": f"{n}?", "ground_truth": f"x\nA: {n}", **solutions}) + "\n")
    path.write_text("".join(lines))
    return path


def the_suite(data: Path, asked: int) -> Suite:
    """The recorded models, in their middle one that is asked the first `asked` questions."""
    recorded = gsm8k.load(data)
    last = recorded.harnesses[-1]
    model = Infer(model="asked")
    some = Harness(
        name="asked", samples=list(last.samples)[:asked], model=model, graders=last.graders, concurrency=CONCURRENCY,
        timeout_s=60.0,
    )  # fmt: skip
    half = len(recorded.harnesses) // 2
    return suite_of("solutions", [*recorded.harnesses[:half], some, *recorded.harnesses[half:]], where=str(data))


def _models(data: Path) -> list[str]:
    return gsm8k.load(data).models


class Answers:
    """Answers with the last model's recorded solution. Every call is written down before it is answered."""

    def __init__(self, data: Path, calls: Path | None) -> None:
        last = gsm8k.load(data).harnesses[-1]
        assert isinstance(last.model, Recorded)
        assert last.model.answers is not None
        self._by_question = {s.input: last.model.answers[s.id] for s in last.samples}
        self._calls = os.open(calls, os.O_WRONLY | os.O_APPEND) if calls is not None else None

    async def __call__(self, request: Envelope) -> Envelope:
        if self._calls is not None:
            os.write(self._calls, f"{os.getpid()} {request.id}\n".encode())
        await asyncio.sleep(0.001)
        payload = {
            "model": "asked", "provider": "recorded", "tokens_in": 5, "tokens_out": 7, "cost_usd": 0.001,
            "content": self._by_question[request.data()["messages"][-1]["content"]],
        }  # fmt: skip
        return Envelope.new(INFER_RESPONSE, payload, source="recorded", id=f"a-{request.id}", correlation_id=request.id)


# -- roles ------------------------------------------------------------------------------------------------------------


async def evaluator(args: Args) -> None:
    """Goes on with the run until it is complete."""
    data = Path(args["data"])
    ask = None if args["over"] else Answers(data, Path(args["calls"]))
    async with AsyncExitStack() as stack:
        broker, stream = await opened(stack, {**args, "stream": "eval"})
        suite = the_suite(data, args["asked"])
        _mark(Path(args["begun"]))
        done = await run_suite(
            broker, stream, suite, run=args["run"], stop=stopping(), rate=args["rate"], batch=64, ask=ask
        )
        assert not done.stopped, done.why
        assert done.kept + done.ran == suite.total, f"{done.ran} were run, {done.kept} were there"


def _mark(begun: Path) -> None:
    with begun.open("a") as f:
        f.write(".")


async def answerer(args: Args) -> None:
    """Answers the questions on the stream of answers, each record once, until asked to end."""
    answers = Answers(Path(args["data"]), Path(args["calls"]))
    async with AsyncExitStack() as stack:
        broker, stream = await opened(stack, {**args, "stream": "infer-requests"})
        into = await patiently(lambda: broker.open("infer"))
        after = 0
        while not stopping().is_set():
            try:
                page = await stream.read(after=after, subjects=(INFER_REQUEST,), wait_s=0.05)
            except MistError as exc:
                if not exc.retryable:
                    raise
                continue
            found = [await answers(decode(record.data)) for record in page.records]
            await into.append([Message(INFER_RESPONSE, encode(env), env.id) for env in found])
            after = page.scanned
