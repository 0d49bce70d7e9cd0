"""Evaluating the evaluator: how far a grader's verdicts agree with those of people. Pure.

Labels are JSON lines `{"id": …, "passed": true}`, of a person, for the samples of one run; `grader` names whose verdict is
meant (else the sample as a whole), `model` and `epoch` which answer. A label for a sample that the run does not have, or that could not be
judged, is counted and said, never left out silently.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable

from msgspec import Struct

from mist.errors import InvalidArgument
from mist.tools.matchspec.reports.values import OVERALL
from mist.tools.matchspec.results import StoredResult
from mist.tools.matchspec.statistics import Agreement, agreement


class Label(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`passed` is what a person says of the output."""

    id: str | int
    passed: bool
    grader: str = ""
    model: str = ""
    epoch: int = 1


class Calibration(Struct, frozen=True, kw_only=True):
    """Of one grader. `agreement` is None when no label met a verdict. `too_kind`: passed by the grader and not by the
    person; `too_strict`: the other way round. `unmatched`: labels without a verdict."""

    grader: str
    n: int
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    kappa: float | None
    kappa_low: float | None
    kappa_high: float | None
    too_kind: list[str]
    too_strict: list[str]
    unmatched: int


async def calibrate(
    results: AsyncIterable[StoredResult], labels: Iterable[Label], *, confidence: float = 0.95
) -> list[Calibration]:
    """One row per grader named by a label, in their order. Raises InvalidArgument for no labels and for two of one answer."""
    wanted: dict[tuple[str, str, str, int], bool] = {}
    for label in labels:
        key = label.grader or OVERALL, str(label.id), label.model, label.epoch
        if key in wanted:
            raise InvalidArgument(f"two labels for sample {label.id!r} of grader {key[0]}")
        wanted[key] = label.passed
    if not wanted:
        raise InvalidArgument("there are no labels: nothing to compare the graders with")
    met: dict[str, list[tuple[str, bool, bool]]] = {grader: [] for grader, _, _, _ in wanted}
    used: set[tuple[str, str, str, int]] = set()
    async for stored in results:
        r = stored.result
        verdicts = {s.grader: s.passed for s in r.scores if not s.error}
        if not r.error:
            verdicts[OVERALL] = r.passed
        for grader, ours in verdicts.items():
            for model in (r.model, ""):
                key = grader, r.task, model, r.epoch
                if key in wanted:
                    used.add(key)
                    met[grader].append((r.task, ours, wanted[key]))
                    break
    return [
        _calibration(grader, found, sum(1 for k in wanted if k[0] == grader and k not in used), confidence)
        for grader, found in met.items()
    ]


def _calibration(grader: str, met: list[tuple[str, bool, bool]], unmatched: int, confidence: float) -> Calibration:
    found = Agreement(0, 0.0, 0.0, 1.0, None, None, None)
    if met:
        found = agreement([ours for _, ours, _ in met], [theirs for _, _, theirs in met], confidence=confidence)
    return Calibration(
        grader=grader, n=found.n, accuracy=found.accuracy if met else None,
        accuracy_low=found.accuracy_low if met else None, accuracy_high=found.accuracy_high if met else None,
        kappa=found.kappa, kappa_low=found.kappa_low, kappa_high=found.kappa_high,
        too_kind=[id for id, ours, theirs in met if ours and not theirs],
        too_strict=[id for id, ours, theirs in met if theirs and not ours], unmatched=unmatched,
    )  # fmt: skip
