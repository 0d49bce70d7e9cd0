"""The results of a run as numbers: per harness and grader one score and one state per result. Pure.

Takes results in any order and gives the same figures: every result has its place (index and repeat), sums go over places.
Memory: nine bytes per result and grader; texts are kept of the first `examples_max` failing samples (and so many passing
ones), in the order of the data, and the ids of all with `ids`.

A score that is no number in 0..1 is an error of the grader, as is one whose result has an error.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator
from math import ceil, fsum

from msgspec import Struct

from mist.tools.matchspec.reducers import reducer
from mist.tools.matchspec.reports.values import OVERALL, Example
from mist.tools.matchspec.results import HarnessInfo, Manifest, Result

EXAMPLES_MAX = 1000
EXAMPLE_CHARS_MAX = 20_000
ABSENT, FAILED, PASSED, ERROR = range(4)


class Value(Struct, frozen=True, gc=False):
    """One sample, its repeats reduced. `rate` is 1 or 0 without repeats."""

    index: int
    score: float
    rate: float
    cluster: int = 0
    """A hash of the sample's cluster, where results have one."""


class Reduced(Struct, frozen=True):
    """`values` of the samples that count; of the attempts `errors` could not be judged, `judged` could."""

    values: list[Value]
    errors: int
    judged: int


class Column:
    """One grader's scores and states (or those of the samples as a whole), by the place of the result."""

    def __init__(self, size: int) -> None:
        self.scores = array("d", bytes(8 * size))
        self.states = bytearray(size)

    def put(self, at: int, score: float, passed: bool, error: str) -> bool:
        """Whether it is an error."""
        if error or not 0.0 <= score <= 1.0:  # NaN is neither
            self.states[at], self.scores[at] = ERROR, 0.0
            return True
        self.states[at], self.scores[at] = PASSED if passed else FAILED, score
        return False


class HarnessTally:
    """The numbers of one harness. `weights` of its graders where they have some; `thresholds` of their own."""

    def __init__(self, info: HarnessInfo, *, clustered: bool = False) -> None:
        self.info = info
        self.overall = Column(info.total)
        names = [(str(g.get("name") or g.get("type") or ""), g) for g in info.graders]
        self.graders = {name: Column(info.total) for name, _ in names}
        self.thresholds = {name: g.get("threshold") for name, g in names}
        self.informing = {name for name, g in names if g.get("weight") == 0}
        self.ids: list[str] = []
        self.texts = array("q")
        self.clusters = array("q", bytes(8 * info.samples)) if clustered else None

    def place(self, result: Result) -> int | None:
        if not (0 <= result.index < self.info.samples and 1 <= result.epoch <= self.info.epochs):
            return None
        return result.index * self.info.epochs + result.epoch - 1

    def column(self, name: str) -> Column:
        if name == OVERALL:
            return self.overall
        found = self.graders.get(name)
        if found is None:
            found = self.graders[name] = Column(self.info.total)
        return found

    def reduced(self, name: str, *, exclude_errors: bool) -> Reduced:
        """Errors count as failed attempts, or not at all; a sample without attempts that count is none."""
        column = self.column(name)
        states, scores, epochs = column.states, column.scores, self.info.epochs
        errors, judged = states.count(ERROR), states.count(FAILED) + states.count(PASSED)
        of = self.clusters or bytes(self.info.samples)
        dropped = (ABSENT, ERROR) if exclude_errors else (ABSENT,)
        if epochs == 1:
            values = [
                Value(i, scores[i], 1.0 if state == PASSED else 0.0, of[i])
                for i, state in enumerate(states)
                if state not in dropped
            ]
            return Reduced(values, errors, judged)
        reduce = reducer(self.info.reducer, epochs)
        values = []
        for index in range(self.info.samples):
            at = [i for i in range(index * epochs, (index + 1) * epochs) if states[i] not in dropped]
            if at:
                score, rate = reduce([scores[i] for i in at], [states[i] == PASSED for i in at])
                values.append(Value(index, score, rate, of[index]))
        return Reduced(values, errors, judged)


class Tally:
    """`add` the results of a run (those that count, each once), then read. `done`: results that are there."""

    def __init__(self, manifest: Manifest, *, ids: bool = False, examples_max: int = EXAMPLES_MAX) -> None:
        self.manifest = manifest
        clustered = bool(manifest.gate.cluster)
        self.harnesses = {
            h.name: HarnessTally(h, clustered=clustered) for h in manifest.harnesses or _before_harnesses(manifest)
        }
        self.total = sum(h.info.total for h in self.harnesses.values())
        self.done = self.errors = self.passed = self.failed = 0
        self.cost_unknown = self.latency_unknown = 0
        self.unclustered = 0
        """Results without a cluster."""
        self._costs = array("d")
        self._latencies = array("d")
        self.tokens_in: int | None = None
        self.tokens_out: int | None = None
        self._order = {name: at for at, name in enumerate(self.harnesses)}
        self._keeps_ids = ids
        self._examples_max = examples_max
        self._failing: list[tuple[tuple[int, int, int], Example]] = []
        self._passing: list[tuple[tuple[int, int, int], Example]] = []
        if ids:
            for h in self.harnesses.values():
                h.ids = [""] * h.info.samples
                h.texts = array("q", bytes(8 * h.info.samples))

    def add(self, result: Result) -> None:
        """A result that belongs to no harness of the manifest, or to a place that is taken, is not counted."""
        old = not self.manifest.harnesses
        h = self.harnesses.get(result.model if old else result.harness)
        at = None if h is None else h.overall.states.find(ABSENT) if old else h.place(result)
        if h is None or at is None or at < 0 or h.overall.states[at] != ABSENT:
            return
        error = result.error or next((s.error for s in result.scores if s.error), "")
        if h.overall.put(at, result.score, result.passed, error):
            self.errors += 1
        for score in result.scores:
            h.column(score.grader).put(
                at, score.score, score.passed, score.error or ("" if result.error_kind == "grader" else result.error)
            )
        passed = h.overall.states[at] == PASSED
        self.done += 1
        self.passed += passed
        self.failed += not passed
        self._spent(result)
        self.unclustered += not result.cluster
        if h.clusters is not None:
            h.clusters[at // h.info.epochs] = hash(result.cluster)
        if self._keeps_ids:
            h.ids[at // h.info.epochs] = result.task
            h.texts[at // h.info.epochs] = hash((result.input, result.expected))
        self._keep(h, at, result, passed)

    def _spent(self, result: Result) -> None:
        if result.cost_usd is None:
            self.cost_unknown += 1
        else:
            self._costs.append(result.cost_usd)
        if result.latency_ms is None:
            self.latency_unknown += 1
        else:
            self._latencies.append(result.latency_ms)
        if result.tokens_in is not None:
            self.tokens_in = (self.tokens_in or 0) + result.tokens_in
        if result.tokens_out is not None:
            self.tokens_out = (self.tokens_out or 0) + result.tokens_out

    def _keep(self, h: HarnessTally, at: int, result: Result, passed: bool) -> None:
        kept = self._passing if passed else self._failing
        # the heap's top is the last one in the order of the data
        order = (-self._order[h.info.name], -at, 0)
        if len(kept) < self._examples_max:
            heapq.heappush(kept, (order, _example(h.info, result, passed)))
        elif kept and order > kept[0][0]:
            heapq.heapreplace(kept, (order, _example(h.info, result, passed)))

    @property
    def cost_usd(self) -> float | None:
        """Of the results whose cost is known; None when none is."""
        return fsum(sorted(self._costs)) if self._costs else None

    def latency_ms(self, share: float) -> float | None:
        """The percentile of the known latencies (nearest rank); None when none is known."""
        if not self._latencies:
            return None
        ordered = sorted(self._latencies)
        return ordered[max(0, ceil(share * len(ordered)) - 1)]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(h.info.model for h in self.harnesses.values()))

    def of_model(self, model: str) -> Iterator[HarnessTally]:
        return (h for h in self.harnesses.values() if h.info.model == model)

    def examples(self) -> tuple[list[Example], int]:
        """The first failing ones and then, as far as there is room, passing ones, in the order of the data; and how many
        were left out."""
        room = max(0, self._examples_max - len(self._failing))
        passing = sorted(self._passing, key=_first, reverse=True)[:room]
        kept = sorted([*self._failing, *passing], key=_first, reverse=True)
        return [example for _, example in kept], self.done - len(kept)


def _first(kept: tuple[tuple[int, int, int], Example]) -> tuple[int, int, int]:
    return kept[0]


def _before_harnesses(manifest: Manifest) -> list[HarnessInfo]:
    """Runs of before there were harnesses: one per model."""
    return [HarnessInfo(name=m, model=m, samples=manifest.samples) for m in manifest.models]


def _example(info: HarnessInfo, result: Result, passed: bool) -> Example:
    error = result.error or next((f"{s.grader}: {s.error}" for s in result.scores if s.error), "")
    return Example(
        id=result.task,
        input=result.input[:EXAMPLE_CHARS_MAX],
        expected=result.expected[:EXAMPLE_CHARS_MAX],
        output=result.output[:EXAMPLE_CHARS_MAX],
        scores={s.grader: None if s.error else s.score for s in result.scores},
        passed=passed,
        tags=list(result.tags),
        model=info.model,
        harness=info.name,
        epoch=result.epoch if info.epochs > 1 else 0,
        error=error,
        reasons={s.grader: s.reason for s in result.scores if s.reason and not s.passed},
        trace_id=result.trace_id,
        latency_ms=result.latency_ms,
        cost_usd=result.cost_usd,
    )
