"""What a run leaves in the stream, and what is computed from it. The stream is the only store of runs.

A run is a manifest (`eval.run`, subject `eval.run.<run>`) and one `eval.result` per harness, sample and repeat (subject
`eval.result.<run>`). The payloads are the seed's, with more keys: readers that do not know them ignore them.

What counts: of the results of one (harness, sample, repeat) the first without an error; while there is none, the first.
A forked or replayed run begins with the results of its parent up to the sequence its manifest names, by reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

from mist.broker.base import SEQUENCE_MAX, Page, Record, Stream
from mist.broker.patience import again
from mist.errors import Conflict, MistError, NotFound
from mist.protocol.codec import decode
from mist.protocol.payloads import EVAL_RESULT, EVAL_RUN
from mist.protocol.subject import subject_for
from mist.tools.matchspec.grading import Score
from mist.tools.matchspec.statistics import wilson
from mist.tools.matchspec.suite import Digests, Gate

STREAM = "eval"
PAGE = 1000


class HarnessInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A harness as its run's manifest keeps it. `model` is the label, `settings` its parameters, `graders` theirs."""

    name: str
    model: str
    samples: int
    epochs: int = 1
    reducer: str = "mean"
    pass_score: float | None = None
    settings: dict[str, Any] = {}
    graders: list[dict[str, Any]] = []
    data_digest: str = ""

    @property
    def total(self) -> int:
        return self.samples * self.epochs


class Parent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a run came from. `fork` and `replay` take over the parent's results up to the sequence `through` by
    reference; a `replay` then answers with the parent's recorded inference, a `rescore` grades the parent's recorded
    outputs anew and takes over nothing."""

    run: str
    how: Literal["fork", "replay", "rescore"]
    through: int = 0
    taken: int = 0
    """How many results `through` covers."""
    changed: list[str] = []
    """Which parts of the parent's digests this run changes."""


class Manifest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Payload of `eval.run`, the first record of a run: the seed's keys, then ours. `samples` over all harnesses, `total`
    = results of a complete run. `infer_after`: where the stream of answers ended when the run began."""

    suite: str
    tasks: list[str] = []
    baseline: bool = False
    infer_url: str = ""
    tags: dict[str, str] = {}
    run: str = ""
    digest: str = ""
    models: list[str] = []
    samples: int = 0
    total: int = 0
    harnesses: list[HarnessInfo] = []
    digests: Digests = Digests()
    gate: Gate = Gate()
    seed: int | None = None
    versions: dict[str, str] = {}
    """Of what the run began with: mist, python, msgspec. Told, not compared."""
    parent: Parent | None = None
    baseline_run: str = ""
    infer_stream: str = ""
    infer_after: int = 0


ErrorKind = Literal["", "no_answer", "model", "timeout", "grader"]


class Result(Struct, frozen=True, omit_defaults=True, gc=False):
    """Payload of `eval.result`: the seed's keys, then ours. `task` is the sample's id, `key` its stable key, `index` its
    place in the harness's data (from 0), `epoch` which repeat (from 1). `answer` is what the first grader that found
    something compared. `error` says why there was nothing to judge (that is a failure too, and counted). Counts and
    costs are None where nobody stated them. Texts are excerpts (`run.py` names the limits); `output_sha256` is of the
    whole output."""

    suite: str
    task: str
    passed: bool
    score: float
    baseline_score: float
    delta: float
    duration_ms: int
    error: str = ""
    run: str = ""
    harness: str = ""
    model: str = ""
    key: str = ""
    index: int = 0
    epoch: int = 1
    scores: list[Score] = []
    answer: str | None = None
    error_kind: ErrorKind = ""
    input: str = ""
    expected: str = ""
    output: str = ""
    output_cut: bool = False
    output_sha256: str = ""
    tags: tuple[str, ...] = ()
    tokens_in: int | None = None
    tokens_out: int | None = None
    cost_usd: float | None = None
    latency_ms: float | None = None
    attempts: int = 1
    request_id: str = ""
    trace_id: str = ""
    cluster: str = ""
    """What the gate's `cluster` is for this sample."""


class Brief(Struct, frozen=True, kw_only=True, gc=False):
    """A result without its texts: what counting needs, decoded in one pass."""

    task: str
    passed: bool
    score: float
    error: str = ""
    run: str = ""
    harness: str = ""
    model: str = ""
    key: str = ""
    index: int = 0
    epoch: int = 1
    error_kind: ErrorKind = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    cost_usd: float | None = None
    latency_ms: float | None = None
    attempts: int = 1
    request_id: str = ""


class Row(Struct, frozen=True, kw_only=True):
    """One row of the eval table. The interval is Wilson's, 95 %; bounds and rate lie in 0..1."""

    suite: str
    model: str
    passed: int
    total: int
    rate: float
    ci_low: float
    ci_high: float


class RunInfo(Struct, frozen=True, kw_only=True):
    """A run and how far it came. `first` is the manifest's sequence, `last` the one of its last result."""

    run: str
    suite: str
    models: list[str]
    done: int
    total: int
    errors: int
    started_ns: int
    first: int
    last: int
    digest: str

    @property
    def complete(self) -> bool:
        return self.done >= self.total


class StoredResult(Struct, frozen=True):
    """A result and where it lies in the eval stream."""

    sequence: int
    timestamp_ns: int
    result: Result


class StoredBrief(Struct, frozen=True, gc=False):
    sequence: int
    timestamp_ns: int
    result: Brief


class Run(Struct, frozen=True):
    """All of a run, the results that count, in the order of its data. `doubled`: how many did not count."""

    info: RunInfo
    manifest: Manifest
    results: list[StoredResult]
    doubled: int


_manifest = msgspec.json.Decoder(Manifest).decode
_result = msgspec.json.Decoder(Result).decode


def result_subject(run: str) -> str:
    return subject_for(EVAL_RESULT, run)


def run_subject(run: str) -> str:
    return subject_for(EVAL_RUN, run)


def run_id_of(kind: str, run: str) -> str:
    """The envelope id of a run's manifest."""
    return hashlib.sha256(f"{kind}:{run}".encode()).hexdigest()[:32]


class Table:
    """The rows of results told one by one: one per (suite, model)."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], list[int]] = {}

    def add(self, suite: str, model: str, passed: bool) -> None:
        counts = self._counts.setdefault((suite, model), [0, 0])
        counts[0] += passed
        counts[1] += 1

    def rows(self, models: Iterable[str] = ()) -> list[Row]:
        """Models in the order given, then as they came."""
        order = {m: i for i, m in enumerate(models)}
        out = []
        for suite, model in sorted(self._counts, key=lambda k: order.get(k[1], len(order))):
            k, n = self._counts[suite, model]
            low, high = wilson(k, n)
            out.append(Row(suite=suite, model=model, passed=k, total=n, rate=k / n, ci_low=low, ci_high=high))
        return out


def rows(results: Iterable[Result], models: Iterable[str] = ()) -> list[Row]:
    """The table of these results."""
    table = Table()
    for r in results:
        table.add(r.suite, r.model, r.passed)
    return table.rows(models)


async def records(stream: Stream, subjects: tuple[str, ...], *, after: int | None = None) -> AsyncIterator[Record]:
    """The records with these subjects, up to the end as it is now. `after` None = from the first kept one. A backend
    that is away is waited for, within bounds."""
    async for page in _pages(stream, subjects, after):
        for record in page:
            yield record


async def _pages(stream: Stream, subjects: tuple[str, ...], after: int | None) -> AsyncIterator[list[Record]]:
    at = (await again(stream.info)).first - 1 if after is None else after
    while True:
        page = await _page(stream, at, subjects)
        yield page.records
        at = page.scanned
        if at >= page.last:
            return


async def _page(stream: Stream, after: int, subjects: tuple[str, ...]) -> Page:
    return await again(lambda: stream.read(after=after, subjects=subjects, limit=PAGE))


def manifest_of(record: Record) -> Manifest | None:
    """The manifest in a record, None when it is something else."""
    try:
        env = decode(record.data)
        return _manifest(env.payload) if env.type == EVAL_RUN else None
    except (MistError, msgspec.DecodeError):
        return None


def result_of(record: Record) -> StoredResult | None:
    """The result in a record, None when it is something else."""
    try:
        env = decode(record.data)
        if env.type != EVAL_RESULT:
            return None
        return StoredResult(record.sequence, record.timestamp_ns, _result(env.payload))
    except (MistError, msgspec.DecodeError):
        return None


class Head(Struct, frozen=True):
    """A run's manifest, where it lies, and those it descends from, the eldest first: (run, the last sequence of it that
    counts)."""

    manifest: Manifest
    sequence: int
    timestamp_ns: int
    ancestors: tuple[tuple[str, int], ...] = ()


class _BriefEnvelope(Struct, gc=False):
    version: str
    type: str
    payload: Brief
    checksum: int = 0


_brief_envelope = msgspec.json.Decoder(_BriefEnvelope).decode
_brief = msgspec.json.Decoder(Brief).decode


def brief_of(record: Record) -> StoredBrief | None:
    """The brief of the result in a record, None when it is something else."""
    try:
        env = _brief_envelope(record.data)
        if env.version != "1" or env.checksum:
            whole = decode(record.data)
            env = _BriefEnvelope(whole.version, whole.type, _brief(whole.payload))
    except (MistError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return StoredBrief(record.sequence, record.timestamp_ns, env.payload) if env.type == EVAL_RESULT else None


async def read_heads(stream: Stream) -> dict[str, tuple[Manifest, Record]]:
    """The manifest of every run, in the order of the stream. The first of a name is it."""
    found: dict[str, tuple[Manifest, Record]] = {}
    async for record in records(stream, (f"{EVAL_RUN}.>",)):
        manifest = manifest_of(record)
        if manifest is not None and manifest.run:
            found.setdefault(manifest.run, (manifest, record))
    return found


async def read_head(stream: Stream, run: str) -> Head:
    """Raises NotFound; Conflict for a run that descends from itself."""
    async for record in records(stream, (run_subject(run),)):
        manifest = manifest_of(record)
        if manifest is not None and manifest.run == run:
            if manifest.parent is None or manifest.parent.how == "rescore":
                return Head(manifest, record.sequence, record.timestamp_ns)
            return _descended(run, await read_heads(stream), stream.name)
    raise NotFound(f"no run {run} in stream {stream.name}", hint="`mist eval ls` lists the runs")


def _descended(run: str, heads: Mapping[str, tuple[Manifest, Record]], stream: str) -> Head:
    manifest, record = heads[run]
    ancestors: list[tuple[str, int]] = []
    through, child = SEQUENCE_MAX, manifest
    while child.parent is not None and child.parent.how != "rescore":
        name = child.parent.run
        if name not in heads:
            raise NotFound(f"no run {name} in stream {stream}, from which {run} took results")
        if name == run or any(name == n for n, _ in ancestors):
            raise Conflict(f"run {run} descends from itself")
        through = min(through, child.parent.through)
        ancestors.append((name, through))
        child = heads[name][0]
    return Head(manifest, record.sequence, record.timestamp_ns, tuple(reversed(ancestors)))


class Slots:
    """Which results of a run are there, in two bits each. A slot is (harness, index, epoch) as one number."""

    def __init__(self, manifest: Manifest) -> None:
        self._first: dict[str, tuple[int, HarnessInfo]] = {}
        self.total = 0
        for h in manifest.harnesses:
            self._first[h.name] = (self.total, h)
            self.total += h.total
        self._done = bytearray(self.total // 8 + 1)
        self._old: dict[tuple[str, str], int] = {}
        """Runs of before there were harnesses: their results are told apart by (model, task)."""
        self._without_harnesses = not manifest.harnesses
        self.done = 0

    def of(self, result: Result | Brief) -> int | None:
        """The slot of a result; None when it belongs to none (a stranger's)."""
        if self._without_harnesses:
            slot = self._old.setdefault((result.model, result.task), len(self._old))
            if slot >= 8 * len(self._done):
                self._done.extend(bytes(1 + slot // 8))
            return slot
        found = self._first.get(result.harness)
        if found is None:
            return None
        first, h = found
        if not (0 <= result.index < h.samples and 1 <= result.epoch <= h.epochs):
            return None
        return first + result.index * h.epochs + result.epoch - 1

    def first(self, harness: str) -> int:
        """The slot of a harness's first result."""
        return self._first[harness][0]

    def has(self, slot: int) -> bool:
        return bool(self._done[slot >> 3] & (1 << (slot & 7)))

    def take(self, slot: int) -> bool:
        """Whether it was free; it is taken now."""
        byte, bit = slot >> 3, 1 << (slot & 7)
        if self._done[byte] & bit:
            return False
        self._done[byte] |= bit
        self.done += 1
        return True


class Counting:
    """Which results of one run count, told one by one in the order of the stream. Memory: a bit per result, and the errors.

    `doubled`: how many do not count. `tokens` and `usd` are of all answers of the run itself, also of results that do not
    count; `unpriced` answers had no cost, `uncounted` ones did not say their tokens."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.slots = Slots(head.manifest)
        """Those without an error."""
        self.errors: dict[int, StoredResult | StoredBrief] = {}
        """The errors that nothing replaced yet, by slot."""
        self.last = head.sequence
        self.doubled = 0
        self.tokens = 0
        self.usd = 0.0
        self.unpriced = self.uncounted = 0
        self._through = dict(head.ancestors)

    @property
    def done(self) -> int:
        return self.slots.done + len(self.errors)

    @property
    def info(self) -> RunInfo:
        manifest = self.head.manifest
        return RunInfo(
            run=manifest.run, suite=manifest.suite, models=manifest.models, done=self.done, total=manifest.total,
            errors=len(self.errors), started_ns=self.head.timestamp_ns, first=self.head.sequence, last=self.last,
            digest=manifest.digest,
        )  # fmt: skip

    def add(self, stored: StoredResult | StoredBrief) -> bool:
        """Whether it counts for good. An error that counts for now lies in `errors`."""
        result = stored.result
        own = result.run == self.head.manifest.run
        if not own and stored.sequence > self._through.get(result.run, 0):
            return False
        slot = self.slots.of(result)
        if slot is None:
            return False
        before = self.errors.get(slot)
        if own:
            self.last = max(self.last, stored.sequence)
            if before is None or before.result.request_id != result.request_id:
                self.pay(result)
        if result.error:
            if self.slots.has(slot) or before is not None:
                self.doubled += 1
            else:
                self.errors[slot] = stored
            return False
        if not self.slots.take(slot):
            self.doubled += 1
            return False
        if before is not None:
            self.doubled += 1
            del self.errors[slot]
        return True

    def pay(self, result: Result | Brief) -> None:
        """Count what an answer cost. Replayed and rescored ones were paid by the run they came from."""
        parent = self.head.manifest.parent
        if parent is not None and parent.how != "fork":
            return
        if result.request_id:
            self.tokens += (result.tokens_in or 0) + (result.tokens_out or 0)
            self.uncounted += not result.error and (result.tokens_in is None or result.tokens_out is None)
            if result.cost_usd is None:
                self.unpriced += not result.error
            else:
                self.usd += result.cost_usd


async def each_result(stream: Stream, head: Head, counting: Counting | None = None) -> AsyncIterator[StoredResult]:
    """The results that count, each once, in one pass: those without an error in the order of the stream, then the errors
    that nothing replaced."""
    counting = counting or Counting(head)
    async for record in of_run(stream, head):
        stored = result_of(record)
        if stored is not None and counting.add(stored):
            yield stored
    for error in counting.errors.values():
        if isinstance(error, StoredResult):
            yield error


async def each_brief(stream: Stream, head: Head, counting: Counting | None = None) -> AsyncIterator[StoredBrief]:
    """`each_result`, without the texts and several times faster."""
    counting = counting or Counting(head)
    async for page in _pages_of_run(stream, head):
        for record in page:
            stored = brief_of(record)
            if stored is not None and counting.add(stored):
                yield stored
    for error in counting.errors.values():
        if isinstance(error, StoredBrief):
            yield error


def of_run(stream: Stream, head: Head) -> AsyncIterator[Record]:
    """The records that may be results of a run: its own and those of its ancestors."""
    subjects, after = _where(head)
    return records(stream, subjects, after=after)


def _pages_of_run(stream: Stream, head: Head) -> AsyncIterator[list[Record]]:
    return _pages(stream, *_where(head))


def _where(head: Head) -> tuple[tuple[str, ...], int | None]:
    # a run's results come after its manifest; its ancestors' come earlier
    after = None if head.ancestors else head.sequence - 1
    names = [*(name for name, _ in head.ancestors), head.manifest.run]
    return tuple(result_subject(name) for name in names), after


async def read_run(stream: Stream, run: str) -> Run:
    """All of a run, in memory. Raises NotFound."""
    counting = Counting(await read_head(stream, run))
    results = [stored async for stored in each_result(stream, counting.head, counting)]
    manifest = counting.head.manifest
    order = {h.name: i for i, h in enumerate(manifest.harnesses)}
    if order:
        results.sort(key=lambda s: (order[s.result.harness], s.result.index, s.result.epoch))
    return Run(counting.info, manifest, results, counting.doubled)


async def list_runs(stream: Stream) -> list[RunInfo]:
    """Every run of the stream, newest first: one pass for the manifests, one for all results."""
    heads = await read_heads(stream)
    counted: dict[str, list[Counting]] = {}
    found: list[Counting] = []
    for run in heads:
        try:
            counting = Counting(_descended(run, heads, stream.name))
        except MistError:  # what it took results from is gone
            continue
        found.append(counting)
        for name in (run, *(name for name, _ in counting.head.ancestors)):
            counted.setdefault(name, []).append(counting)
    async for record in records(stream, (f"{EVAL_RESULT}.>",)):
        stored = brief_of(record)
        if stored is not None:
            for counting in counted.get(stored.result.run, ()):
                counting.add(stored)
    return sorted((c.info for c in found), key=lambda i: -i.first)


async def run_info(stream: Stream, run: str) -> RunInfo:
    """How far a run came, in one pass and little memory. Raises NotFound."""
    counting = Counting(await read_head(stream, run))
    async for _ in each_brief(stream, counting.head, counting):
        pass
    return counting.info
