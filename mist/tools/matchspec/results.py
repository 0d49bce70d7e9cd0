"""What a run leaves in the stream, and what is computed from it. The stream is the only store of runs.

A run is a manifest (`eval.run`, subject `eval.run.<run>`) and one `eval.result` per harness, sample and repeat (subject
`eval.result.<run>`). The payloads are the seed's, with more keys: readers that do not know them ignore them.

What counts: of the results of one (harness, sample, repeat) the first without an error; while there is none, the first.
A forked or replayed run begins with the results of its parent up to the sequence its manifest names, by reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable
from typing import Any, Literal

import msgspec
from msgspec import Struct

from mist.broker.base import SEQUENCE_MAX, Record, Stream
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


class Result(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
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


def rows(results: Iterable[Result], models: Iterable[str] = ()) -> list[Row]:
    """The table of these results, one row per (suite, model), models in the order given, then as they come."""
    passed: dict[tuple[str, str], int] = {}
    total: dict[tuple[str, str], int] = {}
    for r in results:
        key = (r.suite, r.model)
        total[key] = total.get(key, 0) + 1
        passed[key] = passed.get(key, 0) + r.passed
    order = {m: i for i, m in enumerate(models)}
    out = []
    for suite, model in sorted(total, key=lambda k: order.get(k[1], len(order))):
        n, k = total[suite, model], passed[suite, model]
        low, high = wilson(k, n)
        out.append(Row(suite=suite, model=model, passed=k, total=n, rate=k / n, ci_low=low, ci_high=high))
    return out


async def records(stream: Stream, subjects: tuple[str, ...], *, after: int | None = None) -> AsyncIterator[Record]:
    """The records with these subjects, up to the end as it is now. `after` None = from the first kept one."""
    at = (await stream.info()).first - 1 if after is None else after
    while True:
        page = await stream.read(after=at, subjects=subjects, limit=PAGE)
        for record in page.records:
            yield record
        at = page.scanned
        if at >= page.last:
            return


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


async def read_head(stream: Stream, run: str) -> Head:
    """Raises NotFound; Conflict for a run that descends from itself."""
    chain: list[tuple[Manifest, Record]] = []
    wanted = run
    while wanted:
        found = None
        async for record in records(stream, (run_subject(wanted),)):
            manifest = manifest_of(record)
            if manifest is not None and manifest.run in (wanted, ""):
                found = manifest, record
                break
        if found is None:
            what = f"no run {wanted} in stream {stream.name}"
            raise NotFound(
                what if wanted == run else f"{what}, from which {run} took results",
                hint="`mist eval ls` lists the runs",
            )
        if any(m.run == wanted for m, _ in chain):
            raise Conflict(f"run {wanted} descends from itself")
        chain.append(found)
        parent = found[0].parent
        wanted = parent.run if parent is not None and parent.how != "rescore" else ""
    manifest, record = chain[0]
    limits: list[tuple[str, int]] = []
    through = SEQUENCE_MAX
    for child, (elder, _) in zip((m for m, _ in chain), chain[1:], strict=False):
        if child.parent is not None:
            through = min(through, child.parent.through)
            limits.append((elder.run, through))
    return Head(manifest, record.sequence, record.timestamp_ns, tuple(reversed(limits)))


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

    def of(self, result: Result) -> int | None:
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


async def each_result(stream: Stream, head: Head, seen: Counts | None = None) -> AsyncIterator[StoredResult]:
    """The results that count, each once, in one pass: those without an error in the order of the stream, then the errors
    that nothing replaced. Memory: a bit per result, and the errors."""
    run = head.manifest.run
    limits = dict(head.ancestors)
    slots = Slots(head.manifest)
    errors: dict[int, StoredResult] = {}
    seen = seen if seen is not None else Counts()
    async for record in records(stream, tuple(result_subject(r) for r in (*limits, run))):
        stored = result_of(record)
        if stored is None or record.sequence > limits.get(stored.result.run, SEQUENCE_MAX):
            continue
        slot = slots.of(stored.result)
        if slot is None:
            continue
        if stored.result.error:
            if slots.has(slot) or slot in errors:
                seen.doubled += 1
            else:
                errors[slot] = stored
        elif slots.take(slot):
            if errors.pop(slot, None) is not None:
                seen.doubled += 1
            yield stored
        else:
            seen.doubled += 1
    for stored in errors.values():
        yield stored


class Counts:
    """Told by `each_result` on its way."""

    def __init__(self) -> None:
        self.doubled = 0


async def read_run(stream: Stream, run: str) -> Run:
    """All of a run, in memory. Raises NotFound."""
    head = await read_head(stream, run)
    counts = Counts()
    results = [stored async for stored in each_result(stream, head, counts)]
    order = {h.name: i for i, h in enumerate(head.manifest.harnesses)}
    if order:
        results.sort(key=lambda s: (order[s.result.harness], s.result.index, s.result.epoch))
    return Run(_info(run, head, results), head.manifest, results, counts.doubled)


def _info(run: str, head: Head, results: list[StoredResult]) -> RunInfo:
    return RunInfo(
        run=run,
        suite=head.manifest.suite,
        models=head.manifest.models,
        done=len(results),
        total=head.manifest.total,
        errors=sum(1 for r in results if r.result.error),
        started_ns=head.timestamp_ns,
        first=head.sequence,
        last=max(head.sequence, max((r.sequence for r in results), default=0)),
        digest=head.manifest.digest,
    )


async def list_runs(stream: Stream) -> list[RunInfo]:
    """Every run of the stream, newest first: one pass for the manifests, one for each run's results."""
    found: dict[str, RunInfo] = {}
    async for record in records(stream, (f"{EVAL_RUN}.>",)):
        manifest = manifest_of(record)
        if manifest is None or not manifest.run or manifest.run in found:
            continue
        try:
            found[manifest.run] = await run_info(stream, manifest.run)
        except NotFound:  # its parent is gone
            continue
    return sorted(found.values(), key=lambda i: -i.first)


async def run_info(stream: Stream, run: str) -> RunInfo:
    """How far a run came. Raises NotFound."""
    head = await read_head(stream, run)
    light = [
        StoredResult(s.sequence, s.timestamp_ns, msgspec.structs.replace(s.result, output="", input="", expected=""))
        async for s in each_result(stream, head)
    ]
    return _info(run, head, light)
