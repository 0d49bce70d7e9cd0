"""The demo's suite with its answers in the file, for tests that ask nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from mist.cli._demo_suite import write_suite

_TOML = """\
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


def write_recorded_suite(directory: Path, *, seed: int, samples: int) -> tuple[Path, dict[str, int]]:
    """As `write_suite`, in TOML."""
    _, right = write_suite(directory, seed=seed, samples=samples)
    ids = {row["input"]: row["id"] for row in _lines(directory / "samples.jsonl")}
    answers = [
        {"id": ids[row["messages"][0]["content"]], "model": row["model"], "output": row["content"]}
        for row in _lines(directory / "recorded.jsonl")
    ]
    (directory / "answers.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(answers))
    suite = directory / "suite.toml"
    suite.write_text(_TOML, encoding="utf-8")
    return suite, right


def _lines(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = msgspec.json.Decoder().decode_lines(path.read_bytes())
    return rows
