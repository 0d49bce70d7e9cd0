"""docs/reference/graders.md: every grader is there, with all its settings, and its examples are true."""

from __future__ import annotations

import asyncio
import re
from math import sqrt
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mist.errors import MistError
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import INFER_RESPONSE, InferResponse, TraceSpan
from mist.tools.matchspec.graders import ALIASES, GRADERS, Hands, equip, grader, settings_of
from mist.tools.matchspec.grading import Asking, GradeInput, score_of
from mist.tools.matchspec.positions import Problems, plain
from mist.tools.matchspec.yaml import read

PAGE = (Path(__file__).parents[3] / "docs" / "reference" / "graders.md").read_text()
FENCES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
CASE = re.compile(r"^# (passes|fails|error): (.*?) =>(?: (.*?))??(?: \[(\w+)=(.*)\])?$", re.MULTILINE)
COMMON = {"type", "name", "negate", "weight", "threshold"}
TEXT = {"case_sensitive", "trim_whitespace", "normalise", "marker", "expected_marker"}


def hands(what: str, value: str) -> Hands:
    """Whoever answers as the example says."""

    async def ask(question: Envelope) -> Envelope:
        return Envelope.new(INFER_RESPONSE, InferResponse(content=value.replace("\\n", "\n")), source="t")

    async def embed(_model: str, _texts: list[str]) -> list[list[float]]:
        cosine = float(value)
        return [[1.0, 0.0], [cosine, sqrt(1 - cosine**2)]]

    async def trace(_id: str) -> list[TraceSpan]:
        operation, ms, status = value.split()
        return [TraceSpan(trace_id="t", span_id="s", operation=operation, end_ns=int(ms) * 10**6, status=status)]

    return Hands(ask=ask, embed=embed, trace=trace)


def outcome(spec: dict[str, Any], output: str, expected: str, what: str, value: str) -> str:
    (g,) = equip([grader(spec)], hands(what, value))
    facts = {what: msgspec.json.decode(value)} if what in GradeInput.__struct_fields__ else {}
    seen = GradeInput(output=output.replace("\\n", "\n"), expected=expected, trace_id="t", **facts)
    try:
        g.check(expected)
        verdict = asyncio.run(g.grade_async(seen)) if isinstance(g, Asking) else g.grade(seen)
    except MistError:
        return "error"
    return "passes" if score_of(g, verdict).passed else "fails"


@pytest.mark.parametrize("fence", FENCES, ids=lambda f: str(f.split("\n")[0]))
def test_the_examples_are_true(fence: str) -> None:
    """What is said to pass passes, what is said to fail fails."""
    doc = read(fence, "graders.md", Problems())
    assert doc is not None
    cases = CASE.findall(fence)
    assert len(cases) == fence.count("\n# ")
    for said, output, expected, what, value in cases:
        assert outcome(plain(doc.value), output, expected, what, value) == said, (output, expected)


def test_every_grader_and_setting_is_there() -> None:
    """In the section of the grader, by its name in code marks."""
    assert {f.split("\n")[0].removeprefix("type: ") for f in FENCES} == set(GRADERS)
    assert all(f"`{alias}` is `{kind}`" in PAGE for alias, kind in ALIASES.items())
    sections = PAGE.split("\n## ")
    for kind in GRADERS:
        (section,) = [s for s in sections if f"\ntype: {kind}\n" in s]
        told = set(re.findall(r"`(\w+)`", section))
        if "text settings" in section:
            told |= TEXT
        assert set(settings_of(kind)) - COMMON - told == set(), kind
    assert set(re.findall(r"`(\w+)`", sections[0])) >= COMMON
