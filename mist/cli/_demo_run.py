"""What the demo does: two stories at the same time, told by real processes, and the judge at the end.

Traces: a producer publishes durably while a worker copies the stream into its store; halfway the worker is killed with
SIGKILL and started again. A server of the demo's own is killed and started again a little earlier. Evals: a run asks models
through the router, which gives recorded answers; it is killed halfway, gone on with, and replayed from its cursor.
Nothing here prints; `say` tells what happens.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from mist.broker.base import Broker, Stream
from mist.broker.patience import again
from mist.broker.registry import connect
from mist.cli._demo_children import Child, Nursery, nursery, until
from mist.cli._demo_judge import Verdict, judge
from mist.cli._demo_producer import Order, Report
from mist.cli._demo_suite import SETTINGS
from mist.errors import MistError, TimedOut, Unsupported
from mist.kit.local import LocalServer
from mist.protocol.codec import decode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import InferRequest
from mist.tools.matchspec.results import Row, read_run, result_subject, rows
from mist.tools.matchspec.run import cursor_name
from mist.tools.matchspec.suite import Suite
from mist.tools.tokentrace.publish import BATCH
from mist.tools.tokentrace.stats import ModelStats, stats
from mist.tools.tokentrace.store import Store

PRODUCE_S = 5.0
EVAL_S = 4.0
RATE_MIN = 2000.0
HOLD_AT = 0.75
KILL_JITTER_S = 0.1
DRAINED, KILLED = 143, -9
TRACES, EVALS = "trace", "eval"
QUESTIONS, ANSWERS, STARTED = "infer-requests", "infer", "infer.started"
Say = Callable[[str], None]


class Plan(Struct, frozen=True, kw_only=True):
    """`files` is the demo's own directory inside `data_dir`. `right`: passes known by construction, empty for real data.
    `server`: the server the demo started and may kill, None when the broker is somebody else's or needs none."""

    url: str
    data_dir: Path
    files: Path
    store: Path
    spans: int
    seed: int
    run: str
    trace_file: Path | None
    suite_file: Path
    right: dict[str, int]
    limit_s: float
    server: LocalServer | None = None


class TraceFacts(Struct, frozen=True, kw_only=True):
    """The story of the spans. `applied_per_s`: rows the second worker stored per second of work."""

    verdict: Verdict
    spans: list[ModelStats]
    worker_kills: int
    broker_kills: int
    broker_away_s: float
    killed_at: int
    resumed_after: int
    published_per_s: float
    appended_per_s: float
    applied_per_s: float


class EvalFacts(Struct, frozen=True, kw_only=True):
    """The story of the eval. `kept`: results that were there when the run was gone on with. `asked`: questions of the run that
    the router answered; `asked_again`: calls beyond one for each."""

    run: str
    rows: list[Row]
    kept: int
    total: int
    replayed_from: int
    replayed: int
    asked: int
    asked_again: int
    complete: bool


class Outcome(Struct, frozen=True, kw_only=True):
    traces: TraceFacts
    evals: EvalFacts
    elapsed_s: float
    durability: str
    with_server: bool

    @property
    def ok(self) -> bool:
        t = self.traces
        table_whole = sum(s.count for s in t.spans) == t.verdict.stored
        return (
            t.verdict.ok
            and table_whole
            and (not self.with_server or t.broker_kills > 0)
            and t.worker_kills > 0
            and t.resumed_after == t.killed_at
            and self.evals.complete
        )


async def run_demo(plan: Plan, say: Say) -> Outcome:
    """All of it. Raises TimedOut above `limit_s`, Internal when a child fails, Unsupported for a broker that several
    processes cannot share."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(plan.limit_s):
            async with connect(plan.url) as broker:
                if not broker.capabilities.processes:
                    raise Unsupported("processes", broker.backend, hint="use log:DIR or a server")
                trace_stream = await broker.open(TRACES)
                durability = (await trace_stream.info()).durability
                say(f"broker {broker.url}, streams {TRACES} and {EVALS}, durability {durability}")
                async with nursery(plan.files, plan.url) as children, asyncio.TaskGroup() as tasks:
                    evals = tasks.create_task(_evals(plan, broker, children, say))
                    traces = tasks.create_task(_traces(plan, trace_stream, children, say))
    except TimeoutError as exc:
        raise TimedOut(f"the demo is not done after {plan.limit_s:g} s", hint=f"its logs: {plan.files}") from exc
    except BaseExceptionGroup as group:
        found = group.subgroup(MistError)
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]  # type: ignore[assignment]
        raise (found or group) from group
    return Outcome(
        traces=traces.result(),
        evals=evals.result(),
        elapsed_s=time.monotonic() - began,
        durability=durability,
        with_server=plan.server is not None,
    )


async def _traces(plan: Plan, stream: Stream, children: Nursery, say: Say) -> TraceFacts:
    acknowledged = plan.files / "acknowledged.txt"
    info = await stream.info()
    rate = max(plan.spans / PRODUCE_S, RATE_MIN)
    order = Order(
        stream=TRACES,
        acknowledged=str(acknowledged),
        count=plan.spans,
        seed=plan.seed,
        run=plan.run,
        file=str(plan.trace_file or ""),
        rate=rate,
        batch=max(1, min(BATCH, plan.spans // 40)),
        hold_at=int(plan.spans * HOLD_AT),
    )

    async def worker(name: str) -> Child:
        # fmt: off
        return await children.start(
            name, "-m", "mist", "trace", "worker", "--stream", TRACES, "--store", str(plan.store), "--record", name,
            "--from", f"+{info.last}", "--format", "json",
        )
        # fmt: on

    first = await worker("worker-1")
    text = msgspec.json.encode(order).decode()
    producer = await children.start("producer", "-m", "mist.cli._demo_producer", text)
    say(f"publishing {plan.spans:,} spans at {rate:,.0f}/s, a worker ingests them")
    broker_kills, away_s = 0, 0.0
    if plan.server is not None:
        await until(lambda: _applied(plan.store) >= plan.spans // 4 or None, first)
        away_s = await asyncio.to_thread(_kill_and_restart, plan.server)
        broker_kills = 1
        say(f"killed the broker (SIGKILL) and started it again, away for {away_s:.1f} s; everybody else went on")
    await until(lambda: _applied(plan.store) >= plan.spans // 2 or None, first)
    # not always between two transactions: the page that is in work when the kill comes is what it is about
    await asyncio.sleep(random.uniform(0, KILL_JITTER_S))
    publishing = producer.running
    first.kill()
    await first.ended(-9)
    killed_at = _position(plan.store)
    producer.tell(b"go on\n")
    say(f"killed the worker (SIGKILL) at sequence {killed_at}" + (", the producer goes on" if publishing else ""))
    second = await worker("worker-2")
    report = msgspec.json.decode(await producer.ended(0), type=Report)
    say(f"producer done: {report.acknowledged:,} spans acknowledged")
    await until(lambda: _position(plan.store) >= report.last or None, second)
    second.terminate()
    work: dict[str, Any] = msgspec.json.decode(await second.ended(DRAINED))
    say(f"the second worker went on after sequence {work['started_after']} and is done")
    with Store.read(plan.store) as store:
        verdict = judge(acknowledged, store)
        found = stats(store)
    # the router's calls are spans of the same stream, some of them here already: another story
    routed = set(_suite(plan).models)
    return TraceFacts(
        verdict=verdict,
        spans=[row for row in found.spans if row.model not in routed],
        worker_kills=1,
        broker_kills=broker_kills,
        broker_away_s=away_s,
        killed_at=killed_at,
        resumed_after=work["started_after"],
        published_per_s=report.acknowledged / report.elapsed_s,
        appended_per_s=report.acknowledged / max(report.append_s, 1e-9),
        applied_per_s=work["records"] / max(work["busy_s"], 1e-9),
    )


def _kill_and_restart(server: LocalServer) -> float:
    """Seconds from SIGKILL until the server answers again."""
    began = time.monotonic()
    server.kill()
    server.start()
    return time.monotonic() - began


def _applied(path: Path) -> int:
    """How many rows the workers have applied so far."""
    return _look(path, "SELECT max(rowid) FROM applied")


def _position(path: Path) -> int:
    return _look(path, "SELECT max(sequence) FROM position")


def _look(path: Path, sql: str) -> int:
    try:
        with Store.read(path) as store:
            row = store.one(sql)
    except MistError:
        return 0  # not made yet, or just being made; a worker that cannot make it ends, and that is noticed
    return int(row[0]) if row and row[0] is not None else 0


async def _evals(plan: Plan, broker: Broker, children: Nursery, say: Say) -> EvalFacts:
    stream = await broker.open(EVALS)
    total = _suite(plan).total
    began = {name: (await again((await broker.open(name)).info)).last for name in (QUESTIONS, ANSWERS)}

    async def mist(name: str, *args: str) -> Child:
        return await children.start(name, "-m", "mist", "eval", *args, "--stream", EVALS, "--format", "json")

    # fmt: off
    router = await children.start(
        "router", "-m", "mist", "up", "--tools", "infermux", "--listen", "127.0.0.1:0",
        env={"MIST_CONFIG": str(plan.suite_file.with_name(SETTINGS))},
    )
    # fmt: on
    suite = str(plan.suite_file)
    say(f"eval run {plan.run}: {total:,} questions through the router, one durable result each")
    # a run that ended before it could be killed (a machine that stalls for seconds) is begun again, slower
    for slower in (1, 4, 16):
        run = plan.run if slower == 1 else f"{plan.run}-{slower}"
        rate = str(total / EVAL_S / slower)
        first = await mist(f"eval-1-{slower}", "run", suite, "--run", run, "--ask", "stream", "--rate", rate)
        await _results(stream, run, total // 2, first, router)
        first.kill()
        await first.ended(KILLED, 0)
        stopped = await again(functools.partial(read_run, stream, run))
        if not stopped.info.complete:
            break
    cursor = await again(lambda: broker.checkpoints.load(EVALS, cursor_name(run)))
    at = cursor.sequence if cursor is not None else stopped.info.last
    say(f"killed the eval (SIGKILL) with {stopped.info.done:,} of {total:,} results, its cursor at sequence {at}")
    second = await mist("eval-2", "run", suite, "--run", run, "--ask", "stream")
    table = msgspec.json.decode(await second.ended(0), type=list[Row])
    third = await mist("eval-replay", "replay", run, "--from", f"+{at}")
    replayed: dict[str, Any] = msgspec.json.decode(await third.ended(0))
    whole = await again(functools.partial(read_run, stream, run))
    say(f"went on, and replayed {replayed['results']:,} results from sequence {at} to completion")
    asked, calls = await _asked(broker, run, began)
    router.terminate()
    await router.ended(DRAINED)
    before = sum(1 for r in whole.results if r.sequence <= at)
    return EvalFacts(
        run=run,
        rows=table,
        kept=stopped.info.done,
        total=total,
        replayed_from=at,
        replayed=replayed["results"],
        asked=asked,
        asked_again=calls - asked,
        complete=(
            whole.info.complete
            and whole.info.total == total
            and whole.doubled == 0
            and 0 < stopped.info.done < total
            and before + replayed["results"] == total
            # a server that is killed gives out again what was acknowledged within its last moments: a second call then
            and asked == total
            and (calls == total or plan.server is not None)
            and table == rows((r.result for r in whole.results), whole.manifest.models)
            and (not plan.right or {r.model: r.passed for r in table} == plan.right)
        ),
    )


async def _asked(broker: Broker, run: str, began: dict[str, int]) -> tuple[int, int]:
    """(questions of the run, calls the router made for them)."""
    ids: set[str] = set()
    async for env in _envelopes(broker, QUESTIONS, began[QUESTIONS]):
        payload = env.decode()
        if isinstance(payload, InferRequest) and payload.meta.get("run") == run:
            ids.add(env.id)
    calls = 0
    async for env in _envelopes(broker, ANSWERS, began[ANSWERS]):
        calls += env.type == STARTED and env.correlation_id in ids
    return len(ids), calls


async def _envelopes(broker: Broker, name: str, after: int) -> AsyncIterator[Envelope]:
    """What the stream holds behind a position."""
    stream = await broker.open(name)
    while True:
        page = await again(functools.partial(stream.read, after=after, limit=1000))
        for record in page.records:
            yield decode(record.data)
        if page.scanned == after:
            return
        after = page.scanned


def _suite(plan: Plan) -> Suite:
    from mist.tools.matchspec.load import load_suite

    return load_suite(plan.suite_file)


async def _results(stream: Stream, run: str, wanted: int, child: Child, router: Child) -> None:
    """Wait until the run has this many results in the stream."""
    subjects = (result_subject(run),)
    found, after = 0, (await again(stream.info)).first - 1
    while found < wanted:
        page = await again(functools.partial(stream.read, after=after, subjects=subjects, limit=1000, wait_s=0.2))
        found += len(page.records)
        after = page.scanned
        if not page.records and not child.running:
            await child.ended(0)  # done already, or an error
        if not router.running:
            await router.ended()
