"""The demo's eval: a suite that asks models, and the recorded answers that the router gives in their place.

A directory with `suite.yml` (one harness per model), `samples.jsonl`, `recorded.jsonl`, and `mist.toml`, whose router has one
provider, of type `replay`. The demo's own suite is small sums, spellings and capitals, so that anybody can see why an
answer passes; `numeric`, `contains` and `exact` each judge a third. How many answers are right is decided while they
are written, not by the graders.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec

from mist.tools.matchspec.gsm8k import MARKER
from mist.tools.matchspec.gsm8k import load as load_gsm8k
from mist.tools.matchspec.suite import Recorded

SETTINGS = "mist.toml"
SKILL = {"tutor-large": 0.86, "tutor-small": 0.61}
CAPITALS = (
    ("France", "Paris"), ("Kenya", "Nairobi"), ("Peru", "Lima"), ("Japan", "Tokyo"), ("Norway", "Oslo"), ("Egypt", "Cairo"),
    ("Chile", "Santiago"), ("Ghana", "Accra"), ("Nepal", "Kathmandu"), ("Cuba", "Havana"), ("Latvia", "Riga"), ("Iran", "Tehran"),
)  # fmt: skip
CONCURRENCY = 32
TIMEOUT_S = 60
"""Of one answer: well above the time after which a request is given out again that a killed broker had half done."""
_GRADERS: list[dict[str, Any]] = [
    {"type": "numeric", "name": "numeric", "config": {"marker": "A:"}},
    {"type": "contains", "name": "contains", "config": {"case_sensitive": False}},
    {"type": "exact", "name": "exact"},
]
_GSM8K: list[dict[str, Any]] = [
    {"type": "numeric", "name": "numeric", "config": {"marker": MARKER, "expected_marker": MARKER}}
]
_SETTINGS = """\
# The demo's router: recorded answers, so that nothing is paid. Nobody needs its HTTP door here.
[infermux]
providers = [{ name = "recorded", type = "replay", recordings = %s }]
"""


def write_suite(directory: Path, *, seed: int, samples: int) -> tuple[Path, dict[str, int]]:
    """Write the demo's own suite. Returns the suite file and how many answers of each model are right by construction."""
    rng = random.Random(seed)
    right = dict.fromkeys(SKILL, 0)
    rows: list[dict[str, Any]] = []
    answers: dict[str, list[str]] = {model: [] for model in SKILL}
    for number in range(1, samples + 1):
        kind = ("numeric", "contains", "exact")[number % 3]
        question, expected, good, bad = _task(rng, kind)
        # numbered: the same question twice would have two recorded answers, and which came first would decide
        asked = f"{number}. {question}"
        rows.append({"id": f"s{number:04d}", "input": asked, "expected": expected, "grader": kind})
        for model, skill in SKILL.items():
            knows = rng.random() < skill
            right[model] += knows
            answers[model].append(good if knows else bad)
    return _write(directory, "demo-basics", rows, answers, _GRADERS), right


def write_recorded(directory: Path, file: Path) -> Path:
    """The same of GSM8K's recorded solutions: its questions are asked, its solutions are answered. Returns the suite file."""
    suite = load_gsm8k(file)
    samples = list(suite.harnesses[0].samples)
    rows: list[dict[str, Any]] = [{"id": s.id, "input": s.input, "expected": s.expected} for s in samples]
    answers: dict[str, list[str]] = {}
    for harness in suite.harnesses:
        model = harness.model
        found = (model.answers or {}) if isinstance(model, Recorded) else {}
        answers[harness.label] = [str(found[sample.id]) for sample in samples]
    return _write(directory, suite.name, rows, answers, _GSM8K)


def _write(
    directory: Path, name: str, rows: list[dict[str, Any]], answers: dict[str, list[str]], graders: list[dict[str, Any]]
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    encoder = msgspec.json.Encoder()
    (directory / "samples.jsonl").write_bytes(encoder.encode_lines(rows))
    recorded = [
        {"model": model, "messages": [{"role": "user", "content": row["input"]}], "content": text}
        for model, texts in answers.items()
        for row, text in zip(rows, texts, strict=True)
    ]
    file = directory / "recorded.jsonl"
    file.write_bytes(encoder.encode_lines(recorded))
    # JSON strings are TOML strings, and a JSON document is a YAML one
    (directory / SETTINGS).write_text(_SETTINGS % msgspec.json.encode(str(file.absolute())).decode(), encoding="utf-8")
    harnesses = [
        {
            "name": model, "dataset": "samples.jsonl", "model": {"type": "infer", "model": model},
            "concurrency": CONCURRENCY, "timeout_seconds": TIMEOUT_S, "graders": graders,
        }
        for model in answers
    ]  # fmt: skip
    suite = directory / "suite.yml"
    document = msgspec.json.encode({"version": 1, "name": name, "harnesses": harnesses})
    suite.write_bytes(msgspec.json.format(document, indent=2) + b"\n")
    return suite


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
