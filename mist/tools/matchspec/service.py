"""MatchSpec as a service: runs that are begun by a request and go on without it.

Promises: a run that was accepted has its manifest in the stream, so that a restart goes on with it, and no finished sample is
run again; at most `at_once` run at the same time, at most WAITING_MAX more wait. A run whose suite is not what it was is not
gone on with, and says so. A run that ended is published as spans where a `trace` stream is given. On `stop` runs end after
what is in hand is stored.

Does not: load suites, open brokers or listeners, or authenticate: the caller hands those in, and api.py asks for the key.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from msgspec import Struct
from msgspec.structs import replace

from mist.broker.base import Broker, Record, Stream
from mist.errors import InvalidArgument, MistError, NotFound, Overloaded, Unavailable
from mist.kit.prices import Prices
from mist.tools.matchspec.graders.hands import Hands, equip
from mist.tools.matchspec.report import report_of
from mist.tools.matchspec.reports.values import Report, at
from mist.tools.matchspec.results import Manifest, read_heads, run_info
from mist.tools.matchspec.run import Runner
from mist.tools.matchspec.select import by_ids, by_tags, split
from mist.tools.matchspec.suite import CONCURRENCY_MAX, Suite
from mist.tools.matchspec.tracing import publish_spans

AT_ONCE = 2
WAITING_MAX = 100
KNOWN_MAX = 10_000
"""Runs whose outcome is kept in memory, so that a list of them reads no results again."""
FRESH_S = 60.0
"""A run that is not complete and not ours counts as running elsewhere when its last record is younger."""
BY, TAGS, AT_A_TIME = "by", "select", "concurrency"
"""Keys of a manifest's tags: who began the run, which samples it is of, and how many are asked at a time where that was said."""
SERVICE = "service"
Say = Callable[[str], None]


class Job:
    """A run whose manifest is stored, as far as this process works on it. `done` is set when it no longer does."""

    def __init__(self, run_id: str, suite: str, started_at: str) -> None:
        self.run_id = run_id
        self.suite = suite
        self.started_at = started_at
        self.done = asyncio.Event()
        self.completed = self.total = 0

    def at(self, completed: int, total: int) -> None:
        self.completed, self.total = completed, total


class State(Struct, frozen=True, kw_only=True):
    """A run as the list has it. `verdict` is None while it runs; `first` is its manifest's sequence."""

    run_id: str
    status: str
    suite: str
    started_at: str
    finished_at: str | None
    verdict: str | None
    total: int
    completed: int
    first: int
    error: str = ""


class _Outcome(Struct, frozen=True):
    """What a run came to, up to the record `last` of the stream."""

    last: int
    status: str
    verdict: str
    finished_at: str
    total: int
    completed: int
    settled: bool
    """Whether no further record changes it: an error may be replaced by a better result."""


class Service:
    """`run` works until it is stopped; `begin`, `states` and `report` are for who asks meanwhile."""

    def __init__(
        self,
        suites: Sequence[Suite],
        *,
        hands: Hands | None = None,
        prices: Prices | None = None,
        trace: Stream | None = None,
        at_once: int = AT_ONCE,
        say: Say = lambda _text: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.suites: Mapping[str, Suite] = {s.name: s for s in suites}
        self._hands = hands or Hands()
        self._prices = prices
        self._trace = trace
        self._gate = asyncio.Semaphore(at_once)
        self._at_once = at_once
        self._say = say
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._failed: dict[str, str] = {}
        self._known: OrderedDict[str, _Outcome] = OrderedDict()
        self._reading = asyncio.Lock()
        self._broker: Broker | None = None
        self._stream: Stream | None = None
        self._stop: asyncio.Event | None = None
        self._group: asyncio.TaskGroup | None = None
        self.begun = self.resumed = 0

    def facts(self) -> dict[str, int]:
        return {"suites": len(self.suites), "begun": self.begun, "resumed": self.resumed, "running": len(self._jobs)}

    @property
    def stream(self) -> Stream:
        if self._stream is None:
            raise Unavailable("not connected yet")
        return self._stream

    async def run(self, broker: Broker, stream: Stream, stop: asyncio.Event, *, ready: Callable[[], None]) -> None:
        """Until `stop`; goes on first with the runs that a service before began and did not finish."""
        self._broker, self._stream, self._stop = broker, stream, stop
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await self._resume()
                ready()
                await stop.wait()
        finally:
            self._group = None

    async def _resume(self) -> None:
        for id, (manifest, record) in (await read_heads(self.stream)).items():
            if manifest.tags.get(BY) != SERVICE:
                continue
            if (await run_info(self.stream, id)).complete:
                continue
            try:
                suite = self._part(manifest.suite, split(manifest.tags.get(TAGS, "")), manifest.tasks)
                if suite.digest != manifest.digest:
                    raise InvalidArgument(f"suite {suite.name} is not what it was when run {id} began")
                suite = _at_a_time(suite, manifest.tags.get(AT_A_TIME, ""))
                await self._start(id, suite, record.timestamp_ns, (), {})
                self.resumed += 1
            except MistError as exc:
                self._failed[id] = exc.message
                self._say(f"run {id} is not gone on with: {exc.message}")

    # ----------------------------------------------------------------- beginning

    async def begin(
        self,
        suite: str,
        *,
        tags: Sequence[str] = (),
        tasks: Sequence[str] = (),
        concurrency: int | None = None,
        baseline: str = "",
        id: str = "",
    ) -> Job:
        """A new run, its manifest stored; with the `id` of one that exists, that one is gone on with. Raises NotFound for the suite or the baseline, InvalidArgument where nothing of it
        is meant, Overloaded, Unavailable."""
        part = self._part(suite, tags, tasks)
        if concurrency is not None and not 1 <= concurrency <= CONCURRENCY_MAX:
            raise InvalidArgument(f"concurrency={concurrency} does not lie in 1..{CONCURRENCY_MAX}")
        now = datetime.fromtimestamp(self._clock(), UTC)
        id = id or f"run-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        if id in self._jobs:
            return self._jobs[id]
        told = {BY: SERVICE} | ({TAGS: ",".join(tags)} if tags else {})
        told |= {AT_A_TIME: str(concurrency)} if concurrency is not None else {}
        part = _at_a_time(part, told.get(AT_A_TIME, ""))
        job = await self._start(id, part, int(now.timestamp() * 1e9), tasks, told, baseline)
        self.begun += 1
        return job

    def _part(self, name: str, tags: Sequence[str], tasks: Sequence[str]) -> Suite:
        suite = self.suites.get(name)
        if suite is None:
            known = ", ".join(self.suites) or "none"
            raise NotFound(f"matchspec: unknown suite {name[:80]!r}", hint=f"there are {known}")
        part = by_tags(suite, tags)
        part = by_ids(part, tasks) if part is not None else None
        if part is None:
            raise InvalidArgument(f"suite {name} has no sample with these tags or names: nothing would be judged")
        return part

    async def _start(
        self, id: str, suite: Suite, began_ns: int, tasks: Sequence[str], tags: Mapping[str, str], baseline: str = ""
    ) -> Job:
        group, stop, broker = self._group, self._stop, self._broker
        if group is None or stop is None or broker is None or stop.is_set():
            raise Unavailable("no run is begun now: the service starts or stops")
        if len(self._jobs) >= self._at_once + WAITING_MAX:
            raise Overloaded(f"{len(self._jobs)} runs are under way or wait", retry_after_s=1)
        job = Job(id, suite.name, at(began_ns))
        equipped = tuple(replace(h, graders=equip(h.graders, self._hands)) for h in suite.harnesses)
        runner = Runner(
            broker, self.stream, replace(suite, harnesses=equipped), id, stop=stop, ask=self._hands.ask,
            prices=self._prices, on_progress=job.at,
        )  # fmt: skip
        self._jobs[id] = job
        try:
            await runner.begin(None, baseline, tasks=tasks, tags=tags)
        except BaseException:
            del self._jobs[id]
            raise
        job.at(runner.counting.done, suite.total)
        group.create_task(self._job(job, runner))
        return job

    async def _job(self, job: Job, runner: Runner) -> None:
        id = job.run_id
        try:
            async with self._gate:
                await runner.go()
            if self._trace is not None and not runner.why:
                await publish_spans(self.stream, id, self._trace)
        except MistError as exc:
            self._failed[id] = exc.message
            self._say(f"run {id}: {exc}")
        except Exception as exc:  # a model or grader of a user's may raise anything; the other runs go on
            self._failed[id] = f"{type(exc).__name__}: {exc}"
            self._say(f"run {id} failed: {type(exc).__name__}: {exc}")
        finally:
            del self._jobs[id]
            job.done.set()

    # ----------------------------------------------------------------- looking

    async def states(self) -> list[State]:
        """Every run of the stream, newest first."""
        heads = await read_heads(self.stream)
        found = [await self._state(id, manifest, record) for id, (manifest, record) in heads.items()]
        return sorted(found, key=lambda s: -s.first)

    async def state(self, id: str) -> State:
        """Raises NotFound."""
        head = (await read_heads(self.stream)).get(id)
        if head is None:
            raise NotFound(f"no run {id[:80]!r}", hint="GET /results lists them")
        return await self._state(id, *head)

    async def report(self, id: str) -> Report:
        """With examples. Raises NotFound."""
        return await report_of(self.stream, id)

    async def _state(self, id: str, manifest: Manifest, record: Record) -> State:
        found = State(
            run_id=id, suite=manifest.suite, status="running", started_at=at(record.timestamp_ns), finished_at=None,
            verdict=None, total=manifest.total, completed=0, first=record.sequence,
        )  # fmt: skip
        job = self._jobs.get(id)
        if job is not None:
            return replace(found, completed=job.completed)
        outcome = await self._outcome(id)
        found = replace(found, total=outcome.total, completed=outcome.completed)
        ended = replace(found, status=outcome.status, finished_at=outcome.finished_at, verdict=outcome.verdict)
        if outcome.completed >= outcome.total:
            return ended
        error = self._failed.get(id, "")
        if not error and self._clock() - datetime.fromisoformat(outcome.finished_at).timestamp() < FRESH_S:
            return found
        return replace(ended, status="error", error=error or "it was stopped before it was complete")

    async def _outcome(self, id: str) -> _Outcome:
        """Kept, where no further record can change it, or none came."""
        async with self._reading:  # who asks meanwhile finds it read
            last = (await self.stream.info()).last
            known = self._known.get(id)
            if known is None or not (known.settled or known.last == last):
                report = await report_of(self.stream, id, examples_max=0)
                settled = report.completed >= report.total and not report.model_errors
                known = self._known[id] = _Outcome(
                    last, report.status, report.verdict, report.finished_at, report.total, report.completed, settled
                )
            self._known.move_to_end(id)
            while len(self._known) > KNOWN_MAX:
                self._known.popitem(last=False)
            return known


def _at_a_time(suite: Suite, text: str) -> Suite:
    """The suite with so many questions at a time; else as its harnesses say."""
    concurrency = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0
    if not 1 <= concurrency <= CONCURRENCY_MAX:
        return suite
    return replace(suite, harnesses=tuple(replace(h, concurrency=concurrency) for h in suite.harnesses))
