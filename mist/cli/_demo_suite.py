"""The demo's own eval: a suite file, its samples and two models' recorded answers, written to a directory.

Small sums, spellings and capitals, so that anybody can see why an answer passes; `numeric`, `contains` and `exact`
each judge a third. How many answers are right is decided while they are written, not by the graders.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec

SAMPLES = 600
SKILL = {"tutor-large": 0.86, "tutor-small": 0.61}
CAPITALS = (
    ("France", "Paris"), ("Kenya", "Nairobi"), ("Peru", "Lima"), ("Japan", "Tokyo"), ("Norway", "Oslo"), ("Egypt", "Cairo"),
    ("Chile", "Santiago"), ("Ghana", "Accra"), ("Nepal", "Kathmandu"), ("Cuba", "Havana"), ("Latvia", "Riga"), ("Iran", "Tehran"),
)  # fmt: skip
_SUITE = """\
# The demo's eval: recorded answers, three graders; each sample names the one that judges it.
name = "demo-basics"
data = "samples.jsonl"
answers = "answers.jsonl"

[[graders]]
type = "numeric"
marker = "A:"

[[graders]]
type = "contains"
case_sensitive = false

[[graders]]
type = "exact"
"""


def write_suite(directory: Path, *, seed: int, samples: int = SAMPLES) -> tuple[Path, dict[str, int]]:
    """Write suite.toml, samples.jsonl and answers.jsonl. Returns the suite file and how many answers of each model are
    right by construction."""
    rng = random.Random(seed)
    right = dict.fromkeys(SKILL, 0)
    rows: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for number in range(1, samples + 1):
        id = f"s{number:04d}"
        kind = ("numeric", "contains", "exact")[number % 3]
        question, expected, good, bad = _task(rng, kind)
        rows.append({"id": id, "input": question, "expected": expected, "grader": kind})
        for model, skill in SKILL.items():
            knows = rng.random() < skill
            right[model] += knows
            answers.append({"id": id, "model": model, "output": good if knows else bad})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "samples.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(rows))
    (directory / "answers.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(answers))
    suite = directory / "suite.toml"
    suite.write_text(_SUITE, encoding="utf-8")
    return suite, right


def _task(rng: random.Random, kind: str) -> tuple[str, str, str, str]:
    """Question, expected text, a right answer, a wrong one."""
    if kind == "numeric":
        a, b = rng.randrange(100, 9000), rng.randrange(100, 9000)
        total, wrong = a + b, a + b + rng.choice((-100, -10, 1, 10))
        return (
            f"{a} + {b} = ?",
            str(total),
            f"{a} and {b} make {total:,}.\nA: {total:,}",
            f"{a} and {b} make that.\nA: {wrong}",
        )
    if kind == "contains":
        at = rng.randrange(len(CAPITALS))
        country, city = CAPITALS[at]
        other = CAPITALS[(at + 1 + rng.randrange(len(CAPITALS) - 1)) % len(CAPITALS)][1]
        return (
            f"What is the capital of {country}?",
            city,
            f"It is {city.upper()}, of course.",
            f"I think it is {other}.",
        )
    word = "".join(rng.choice("bcdfglmnprst") + rng.choice("aeiou") for _ in range(3))
    return f"Spell {word} backwards.", word[::-1], word[::-1], word
