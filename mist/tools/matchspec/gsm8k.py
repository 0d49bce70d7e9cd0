"""The shape of GSM8K's recorded model solutions as a suite: one line per question, one object per model.

    {"question": …, "ground_truth": "…\\nA: 18", "<model>": {"solution": "…\\nA: 26", "is_correct": …}, …}

The rule: the first number after the last `A:` of the solution equals the one of the ground truth, as numbers, so that
`65,960` is `65960`. A solution without `A:` (11 of the 5,276 published ones) or without a number after it fails.
The published verdict `is_correct` is never decoded: the class that reads a model's object has no such field.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Raw, Struct

from mist.errors import InvalidArgument
from mist.tools.matchspec.graders import Numeric
from mist.tools.matchspec.suite import Sample, Suite, lines, recorded_suite

MARKER = "A:"


class _Solution(Struct, frozen=True):
    solution: str


class _Row(Struct, frozen=True):
    question: str
    ground_truth: str


def recognise(path: Path) -> bool:
    """Whether the first line of the file has this shape."""
    for _, line in lines(path):
        try:
            msgspec.json.decode(line, type=_Row)
            return bool(_solutions(line))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
    return False


def _solutions(line: bytes) -> dict[str, str]:
    fields = msgspec.json.decode(line, type=dict[str, Raw])
    return {
        name: msgspec.json.decode(raw, type=_Solution).solution
        for name, raw in fields.items()
        if name not in _Row.__struct_fields__ and bytes(raw).startswith(b"{")
    }


def load(path: Path) -> Suite:
    """The suite: named after the file, sample ids are line numbers, models in the order of the first line."""
    samples: list[Sample] = []
    answers: dict[str, dict[str, str]] = {}
    for number, line in lines(path):
        try:
            row = msgspec.json.decode(line, type=_Row)
            solutions = _solutions(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise InvalidArgument(f"{path}:{number}: not a line of recorded solutions: {exc}") from exc
        samples.append(Sample(str(number), row.question, row.ground_truth))
        for model, text in solutions.items():
            answers.setdefault(model, {})[str(number)] = text
    return recorded_suite(
        path.stem, samples, answers, [Numeric(marker=MARKER, expected_marker=MARKER)], where=str(path)
    )
