"""What a run leaves in the stream, and what is computed from it. The stream is the only store of runs.

A run is a manifest (`eval.run`, subject `eval.run.<run>`) and one `eval.result` per sample and model (subject
`eval.result.<run>`). The payloads are the seed's, with more keys: readers that do not know them ignore them.
Of results with the same (model, sample) the first counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable
from math import comb, sqrt

import msgspec
from msgspec import Struct

from mist.broker.base import Record, Stream
from mist.errors import Conflict, MistError, NotFound
from mist.protocol.codec import decode
from mist.protocol.payloads import EVAL_RESULT, EVAL_RUN
from mist.protocol.subject import subject_for

STREAM = "eval"
PAGE = 1000
Z95 = 1.959963984540054
"""The 97.5 % point of the normal distribution: a two-sided interval of 95 %."""


class Manifest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Payload of `eval.run`: the seed's keys, then ours. `total` = samples x models."""

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
    graders: list[dict[str, object]] = []


class Result(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Payload of `eval.result`: the seed's keys, then ours. `task` is the sample's id. `answer` is what the grader
    compared; `error` is why there was nothing to grade (that is a failure too, and counted)."""

    suite: str
    task: str
    passed: bool
    score: float
    baseline_score: float
    delta: float
    duration_ms: int
    error: str = ""
    run: str = ""
    model: str = ""
    graders: list[str] = []
    answer: str | None = None
    expected: str = ""
    output: str = ""
    output_sha256: str = ""


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
    """All of a run, first results only, in stream order."""

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


def result_id(run: str, model: str, sample: str) -> str:
    """The envelope id of a result: the same for the same work, so that repeating it is stored once."""
    return hashlib.sha256(msgspec.json.encode([run, model, sample])).hexdigest()[:32]


def wilson(passed: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a rate. Nothing judged: (0, 1)."""
    if total == 0:
        return 0.0, 1.0
    p, z2 = passed / total, z * z
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    return max(0.0, centre - half) if passed else 0.0, min(1.0, centre + half) if passed < total else 1.0


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


async def read_run(stream: Stream, run: str) -> Run:
    """All of a run. Raises NotFound."""
    manifest: Manifest | None = None
    at: Record | None = None
    kept: dict[tuple[str, str], StoredResult] = {}
    doubled = 0
    async for record in records(stream, (run_subject(run), result_subject(run))):
        if manifest is None:
            manifest = manifest_of(record)
            at = record
        stored = result_of(record)
        if stored is None:
            continue
        key = (stored.result.model, stored.result.task)
        if key in kept:
            doubled += 1
        else:
            kept[key] = stored
    if manifest is None or at is None:
        raise NotFound(f"no run {run} in stream {stream.name}", hint="`mist eval ls` lists the runs")
    results = list(kept.values())
    return Run(_info(run, manifest, at, results), manifest, results, doubled)


def _info(run: str, manifest: Manifest, at: Record, results: list[StoredResult]) -> RunInfo:
    return RunInfo(
        run=run,
        suite=manifest.suite,
        models=manifest.models,
        done=len(results),
        total=manifest.total,
        errors=sum(1 for r in results if r.result.error),
        started_ns=at.timestamp_ns,
        first=at.sequence,
        last=max((r.sequence for r in results), default=at.sequence),
        digest=manifest.digest,
    )


async def list_runs(stream: Stream) -> list[RunInfo]:
    """Every run of the stream, newest first. One pass; memory: the keys of the results."""
    manifests: dict[str, tuple[Manifest, Record]] = {}
    seen: dict[str, dict[tuple[str, str], StoredResult]] = {}
    async for record in records(stream, (f"{EVAL_RUN}.>", f"{EVAL_RESULT}.>")):
        manifest = manifest_of(record)
        if manifest is not None:
            manifests.setdefault(manifest.run, (manifest, record))
            continue
        stored = result_of(record)
        if stored is not None:
            light = msgspec.structs.replace(stored.result, output="", expected="", answer=None)
            key = (light.model, light.task)
            seen.setdefault(light.run, {}).setdefault(key, StoredResult(stored.sequence, stored.timestamp_ns, light))
    out = [_info(run, m, at, list(seen.get(run, {}).values())) for run, (m, at) in manifests.items()]
    return sorted(out, key=lambda i: -i.first)


class Diff(Struct, frozen=True, kw_only=True):
    """Two runs of the same samples, one model. `gained`: failed in A, passed in B; `lost`: the other way round.
    `p_value`: exact two-sided McNemar test on gained and lost."""

    model: str
    common: int
    rate_a: float
    rate_b: float
    delta: float
    gained: list[str]
    lost: list[str]
    p_value: float


def diff(a: Run, b: Run) -> list[Diff]:
    """Per model that both have, over the samples both have. Raises Conflict when there is nothing to compare."""
    left = {(r.result.model, r.result.task): r.result.passed for r in a.results}
    right = {(r.result.model, r.result.task): r.result.passed for r in b.results}
    models = list(dict.fromkeys(m for m, _ in left if any(m == n for n, _ in right)))
    out = []
    for model in models:
        common = [task for m, task in left if m == model and (model, task) in right]
        if not common:
            continue
        gained = [t for t in common if not left[model, t] and right[model, t]]
        lost = [t for t in common if left[model, t] and not right[model, t]]
        rate_a = sum(left[model, t] for t in common) / len(common)
        rate_b = sum(right[model, t] for t in common) / len(common)
        out.append(
            Diff(
                model=model,
                common=len(common),
                rate_a=rate_a,
                rate_b=rate_b,
                delta=rate_b - rate_a,
                gained=gained,
                lost=lost,
                p_value=mcnemar(len(gained), len(lost)),
            )
        )
    if not out:
        raise Conflict(
            f"runs {a.info.run} and {b.info.run} have no model with common samples",
            hint="compare runs of the same data",
        )
    return out


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value: how surprising this split of the changed samples is if neither side were better."""
    n, k = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    tail = sum(comb(n, i) for i in range(k + 1))
    return min(1.0, (2 * tail) / (1 << n))
