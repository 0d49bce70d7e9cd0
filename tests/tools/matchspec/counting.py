"""Runs as values: a manifest, results, and the tally of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mist.tools.matchspec.grading import Score
from mist.tools.matchspec.results import HarnessInfo, Manifest, Result
from mist.tools.matchspec.suite import Gate
from mist.tools.matchspec.tally import Tally

GRADERS = [{"type": "exact", "name": ""}]


def manifest(samples: int, *names: str, graders: list[dict[str, Any]] | None = None, **more: Any) -> Manifest:
    """One harness per name, each with a model of that name."""
    cluster = more.pop("cluster", "")
    harnesses = [
        HarnessInfo(name=n, model=n, samples=samples, graders=GRADERS if graders is None else graders, **more)
        for n in names or ("m",)
    ]
    return Manifest(
        suite="s", run="r", models=[h.model for h in harnesses], samples=samples * len(harnesses),
        total=sum(h.total for h in harnesses), harnesses=harnesses,
        gate=Gate(cluster=cluster),
    )  # fmt: skip


def result(index: int, score: float = 1.0, *, harness: str = "m", error: str = "", **more: Any) -> Result:
    passed = score >= 1.0 and not error
    scores = more.pop("scores", [Score("exact", score, passed, error=error)])
    return Result(
        suite="s", task=f"q{index}", passed=more.pop("passed", passed), score=score, baseline_score=0.0, delta=0.0,
        duration_ms=0, run="r", harness=harness, model=harness, index=index, scores=scores, error=error, **more,
    )  # fmt: skip


def tally(
    scores: Sequence[float],
    *,
    ids: bool = False,
    harness: str = "m",
    clusters: Sequence[str] | None = None,
    **more: Any,
) -> Tally:
    """One harness; a negative score is an error. `clusters`: of each result, by the field `document`."""
    found = Tally(manifest(len(scores), harness, cluster="document" if clusters else "", **more), ids=ids)
    for index, score in enumerate(scores):
        said = {"cluster": clusters[index]} if clusters else {}
        found.add(result(index, max(score, 0.0), harness=harness, error="broken" if score < 0 else "", **said))
    return found
