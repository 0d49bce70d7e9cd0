"""What a report says, as values: the keys are those of the documents' results, then ours. `None` = not known."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from msgspec import Struct

OVERALL = "overall"
"""The name of the row about whole samples, beside those of the graders."""


class Grade(Struct, frozen=True, kw_only=True):
    """What one grader (or `overall`: the samples as a whole) reached over the samples of one model.

    `score` is the rate of passed samples or the mean score, as `metric` says, with its interval; `threshold` is what it must
    reach, None for a row that only informs. `passed`: it did, with enough samples and few enough errors; `why` says why not.
    `n` are the samples that counted, `clusters` what they fall into (None: each stands for itself); `errors` those that could not be judged. `baseline_score` and `delta` are those of the
    baseline run over the samples both have, `p_value` how surprising the difference is (Holm's, over all such rows).
    """

    name: str
    score: float | None
    threshold: float | None
    passed: bool
    n: int
    ci_lower: float | None
    ci_upper: float | None
    model: str = ""
    harness: str = ""
    metric: str = "pass_rate"
    passed_n: int = 0
    mean_score: float | None = None
    standard_error: float | None = None
    errors: int = 0
    baseline_score: float | None = None
    delta: float | None = None
    p_value: float | None = None
    clusters: int | None = None
    why: str = ""

    @property
    def size(self) -> str:
        """What the interval is over, for a reader."""
        return str(self.n) if self.clusters is None else f"{self.n} in {self.clusters} clusters"


class Example(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sample's result. `scores` by grader; `reasons` what the graders said to those that did not pass."""

    id: str
    input: str
    expected: str
    output: str
    scores: dict[str, float | None]
    passed: bool
    tags: list[str] = []
    model: str = ""
    harness: str = ""
    epoch: int = 0
    error: str = ""
    reasons: dict[str, str] = {}
    trace_id: str = ""
    latency_ms: float | None = None
    cost_usd: float | None = None

    @property
    def place(self) -> str:
        """Where it belongs, for a reader: harness and model, once where they are the same."""
        return " / ".join(dict.fromkeys(part for part in (self.harness, self.model) if part))


class Report(Struct, frozen=True, kw_only=True):
    """A finished run, judged. `status` is `passed`, `failed` or `error` (nothing could be judged); `verdict` PASS or FAIL.

    `examples` are those that failed, and the others where they were asked for; at most a limit, `examples_left_out` says
    how many more there are. `reasons` say why the verdict is FAIL: it is empty exactly when it is PASS.
    """

    run_id: str
    suite: str
    status: str
    verdict: str
    started_at: str
    finished_at: str
    duration_seconds: float
    grader_results: list[Grade]
    examples: list[Example]
    model_errors: int
    examples_left_out: int = 0
    reasons: list[str] = []
    warnings: list[str] = []
    total: int = 0
    completed: int = 0
    passed: int = 0
    failed: int = 0
    confidence: float = 0.95
    use_lower_bound: bool = False
    baseline: str = ""
    digest: str = ""
    cost_usd: float | None = None
    cost_unknown: int = 0
    tokens_in: int | None = None
    tokens_out: int | None = None
    latency_p95_ms: float | None = None
    description: str = ""
    tags: dict[str, Any] = {}

    @property
    def ok(self) -> bool:
        return self.verdict == "PASS"


def at(time_ns: int) -> str:
    """RFC 3339 in UTC, seconds."""
    return datetime.fromtimestamp(time_ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def printable(text: str, chars_max: int = 0) -> str:
    """One line that no terminal obeys: whatever is not printable (controls, line ends, directions) as its escape; a cut
    is marked."""
    if chars_max and len(text) > chars_max:
        text = text[: chars_max - 1] + "…"
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def failing(report: Report, limit: int) -> list[Example]:
    """The first failing examples; all with limit 0."""
    found = [e for e in report.examples if not e.passed]
    return found[:limit] if limit else found
