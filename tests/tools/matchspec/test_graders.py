"""Every grader: what it decides, and that none of them passes by accident."""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

from mist.errors import InvalidArgument, MistError, TimedOut
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import INFER_RESPONSE, InferResponse, TraceSpan
from mist.tools.matchspec import grading
from mist.tools.matchspec.graders import GRADERS, Hands, equip, grader, patterns
from mist.tools.matchspec.grading import Asking, GradeInput, Grader, Pure, Score, code_of, describe, failed, score_of

HERE = "tests.tools.matchspec.test_graders"


def always(score: Any) -> Any:
    """For the python grader."""
    return lambda _given: score


like = always(0.5)

ONE_OF_EACH: list[dict[str, Any]] = [
    {"type": "exact"},
    {"type": "contains"},
    {"type": "prefix"},
    {"type": "suffix"},
    {"type": "choice", "choices": ["A", "B", "yes"]},
    {"type": "regex", "pattern": ".*"},
    {"type": "regex", "pattern": "^{{expected}}", "flags": "i"},
    {"type": "numeric"},
    {"type": "levenshtein"},
    {"type": "rouge_l"},
    {"type": "bleu"},
    {"type": "set_overlap"},
    {"type": "set_overlap", "of": "json"},
    {"type": "is_json"},
    {"type": "json_schema", "schema": {"type": "object"}},
    {"type": "json_path", "path": "a"},
    {"type": "json_path", "path": "a", "test": "exists"},
    {"type": "python", "function": f"{HERE}:like"},
    {"type": "semantic_similarity"},
    {"type": "llm_judge", "model": "judge"},
    {"type": "llm_judge", "model": "judge", "pairwise": True},
    {"type": "cost", "max_usd": 1},
    {"type": "latency", "max_ms": 1},
    {"type": "tokens", "max_out": 5},
    {"type": "trace", "no_errors": True},
]
OK_SPAN = TraceSpan(trace_id="t", span_id="s", operation="x", start_ns=0, end_ns=1, status="ok")


def said(content: str) -> Any:
    async def ask(question: Envelope) -> Envelope:
        return Envelope.new(INFER_RESPONSE, InferResponse(content=content), source="t", correlation_id=question.id)

    return ask


async def embed(_model: str, texts: list[str]) -> list[list[float]]:
    return [[float(len(t)), float(t.count("a")) - 1.0] for t in texts]


async def trace(_id: str) -> list[TraceSpan]:
    return [OK_SPAN]


HANDS = Hands(ask=said("Fine.\nScore: 10"), embed=embed, trace=trace)


def scored(g: Grader, seen: GradeInput) -> Score:
    """As the runner does it: an error of the grader is a score that has not passed."""
    try:
        if isinstance(g, Asking):
            (ready,) = equip([g], HANDS)
            return score_of(g, asyncio.run(ready.grade_async(seen)))
        assert isinstance(g, Pure)
        return score_of(g, g.grade(seen))
    except MistError as exc:
        return failed(g, str(exc))


def look(output: str, expected: str = "", **more: Any) -> GradeInput:
    return GradeInput(output=output, expected=expected, **more)


def decides(spec: dict[str, Any], output: str, expected: str) -> Score:
    g = grader(spec)
    g.check(expected)
    score = scored(g, look(output, expected))
    assert not score.error, score.error
    return score


@pytest.mark.parametrize(
    ("spec", "output", "expected", "passed"),
    [
        ({"type": "exact_match"}, "Paris", "Paris", True),
        ({"type": "exact", "normalise": "NFC"}, "cafe\u0301", "café", True),
        ({"type": "exact"}, "cafe\u0301", "café", False),
        ({"type": "exact", "normalise": "NFKC"}, "ﬁve", "five", True),
        ({"type": "exact", "case_sensitive": False}, "STRASSE", "straße", True),
        ({"type": "prefix"}, " Paris, France", "Paris", True),
        ({"type": "prefix"}, "In Paris", "Paris", False),
        ({"type": "suffix"}, "It is Paris\n", "Paris", True),
        ({"type": "suffix"}, "Paris it is", "Paris", False),
        ({"type": "choice", "choices": ["A", "B"]}, "I thought A, but it is (B).", "B", True),
        ({"type": "choice", "choices": ["A", "B"]}, "ABBA", "B", False),
        ({"type": "choice", "choices": ["A", "B"], "marker": "Answer:"}, "B\nAnswer: A, not B", "A", True),
        ({"type": "choice", "choices": ["yes", "no"], "case_sensitive": False}, "No.", "no", True),
        ({"type": "choice", "choices": ["New", "New York"]}, "in New York", "New York", True),
        ({"type": "regex", "pattern": r"\bParis\b"}, "It is Paris.", "", True),
        ({"type": "regex", "pattern": r"\bParis\b"}, "Parisian", "", False),
        ({"type": "regex", "pattern": r"^= {{expected}}$", "flags": "m"}, "so\n= 1+1\n", "1+1", True),
        ({"type": "regex", "pattern": r"^= {{expected}}$", "flags": "m"}, "so\n= 111\n", "1+1", False),
        ({"type": "regex", "pattern": "a.b", "flags": "si"}, "A\nB", "", True),
        ({"type": "numeric", "relative_tolerance": 0.01}, "about 101", "100", True),
        ({"type": "numeric", "relative_tolerance": 0.01}, "about 101.1", "100", False),
        ({"type": "numeric", "pick": "first"}, "4 of 7", "4", True),
        ({"type": "numeric", "pick": "last", "marker": "A:"}, "A: 4 + 3 = 7", "7", True),
        ({"type": "is_json"}, '{"a": 1}', "", True),
        ({"type": "is_json"}, "{'a': 1}", "", False),
        ({"type": "is_json"}, "NaN", "", False),
        ({"type": "is_json", "of": "array"}, '{"a": 1}', "", False),
        ({"type": "is_json", "fenced": True}, "Here:\n```json\n[1]\n```\nDone.", "", True),
        ({"type": "is_json"}, "Here:\n```json\n[1]\n```\nDone.", "", False),
        ({"type": "json_path", "path": "$.a[0].b"}, '{"a": [{"b": "x"}]}', "x", True),
        ({"type": "json_path", "path": "a[-1]"}, '{"a": [1, 2.0]}', "2", True),
        ({"type": "json_path", "path": "a"}, '{"a": "2"}', "2", True),
        ({"type": "json_path", "path": "a"}, '{"a": true}', "1", False),
        ({"type": "json_path", "path": 'a["b c"]', "value": {"x": [1], "y": None}}, '{"a":{"b c":{"y":null,"x":[1.0]}}}', "", True),
        ({"type": "json_path", "path": "a", "test": "exists"}, '{"a": null}', "", True),
        ({"type": "json_path", "path": "b", "test": "exists"}, '{"a": null}', "", False),
        ({"type": "json_path", "path": "a", "test": "matches", "pattern": "^x+$"}, '{"a": "xx"}', "", True),
        ({"type": "json_path", "path": "a", "test": "matches", "pattern": "."}, '{"a": 5}', "", False),
    ],
)  # fmt: skip
def test_a_grader_decides(spec: dict[str, Any], output: str, expected: str, passed: bool) -> None:
    """The table of what passes; negated, it is turned round wherever there was something to compare."""
    score = decides(spec, output, expected)
    assert (score.passed, score.score) == (passed, 1.0 if passed else 0.0)
    turned = decides({**spec, "negate": True}, output, expected)
    assert turned.passed is not passed or not passed


# The BLEU and ROUGE-L values are sacrebleu 2.6.0's (sentence_bleu, exp smoothing, tokenize none) and rouge-score 0.1.2's;
# 3,000 random pairs agreed with both to 1e-15 when this was written, and the distances with the package Levenshtein.
@pytest.mark.parametrize(
    ("output", "expected", "bleu", "rouge_l", "edits"),
    [
        ("the cat sat on the mat", "the cat is on the mat", 0.379918, 0.833333, 3),
        (
            "It is a guide to action which ensures that the military always obeys the commands of the party",
            "It is a guide to action that ensures that the military will forever heed Party commands",
            0.411804, 0.647059, 34,
        ),
        ("the the the the the the the", "the cat is on the mat", 0.078098, 0.307692, 15),
        ("police kill the gunman", "police killed the gunman", 0.353553, 0.75, 2),
        ("the gunman kill police", "police killed the gunman", 0.353553, 0.5, 21),
        ("Hello, world!", "Hello world", 0.189959, 1.0, 2),
        ("kitten", "sitting", 0.0, 0.0, 3),
    ],
)  # fmt: skip
def test_likeness_is_the_papers(output: str, expected: str, bleu: float, rouge_l: float, edits: int) -> None:
    """Golden values; the pair of `police` is the one of Lin's paper, the `guide` and the seven `the` are Papineni's."""
    assert decides({"type": "bleu"}, output, expected).score == pytest.approx(bleu, abs=1e-6)
    assert decides({"type": "rouge_l"}, output, expected).score == pytest.approx(rouge_l, abs=1e-6)
    share = 1 - edits / max(len(output), len(expected))
    assert decides({"type": "levenshtein"}, output, expected).score == pytest.approx(share)


@settings(max_examples=50, deadline=None)
@given(st.text("ab c", max_size=12), st.text("ab c", max_size=12))
def test_the_fast_distances_are_the_plain_ones(a: str, b: str) -> None:
    """Bit-parallel against the tables of the textbooks."""
    from mist.tools.matchspec.graders.likeness import common, distance

    edits = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            edits[i][j] = min(edits[i - 1][j] + 1, edits[i][j - 1] + 1, edits[i - 1][j - 1] + (x != y))
            longest[i][j] = longest[i - 1][j - 1] + 1 if x == y else max(longest[i - 1][j], longest[i][j - 1])
    assert distance(a, b) == edits[-1][-1]
    assert common(a, b) == longest[-1][-1]


@pytest.mark.parametrize(
    ("measure", "score"), [("precision", 2 / 3), ("recall", 0.5), ("f1", 4 / 7), ("jaccard", 2 / 5)]
)
def test_sets_overlap(measure: str, score: float) -> None:
    """Three words against four, two in common; the same as JSON lists, where 1 is 1.0."""
    words = decides({"type": "set_overlap", "measure": measure}, "red, blue; pink pink", "blue red green grey")
    lists = decides({"type": "set_overlap", "measure": measure, "of": "json"}, "[1, 2.0, 9]", '[1.0, 2, "a", "b"]')
    assert words.score == lists.score == pytest.approx(score)


def test_a_schema_decides_and_says_where() -> None:
    """Draft 2020-12; the first place that is wrong stands in the reason."""
    spec = {
        "type": "json_schema",
        "schema": {
            "type": "object",
            "required": ["n"],
            "properties": {"n": {"type": "array", "items": {"type": "integer"}}},
        },
    }
    assert decides(spec, '{"n": [1, 2]}', "").passed
    score = decides(spec, '{"n": [1, "x"]}', "")
    assert not score.passed
    assert "$.n[1]" in score.reason


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "json_schema", "schema": {}},
        {"type": "json_schema", "schema": {"type": "nothing"}},
        {"type": "json_schema", "schema": {"$ref": "https://example.com/s.json"}},
        {"type": "json_schema", "schema": {"pattern": "(?=a)b"}},
        {"type": "regex", "pattern": ""},
        {"type": "regex", "pattern": "("},
        {"type": "regex", "pattern": "a", "flags": "x"},
        {"type": "regex", "pattern": "{{output}}"},
        {"type": "choice", "choices": ["A"]},
        {"type": "choice", "choices": ["A", "a"], "case_sensitive": False},
        {"type": "levenshtein", "pass_score": 0},
        {"type": "exact", "threshold": 1.5},
        {"type": "exact", "weight": -1},
        {"type": "json_path", "path": "a.*"},
        {"type": "json_path", "path": "$"},
        {"type": "json_path", "path": "a", "test": "exists", "value": 1},
        {"type": "json_path", "path": "a", "test": "matches"},
        {"type": "tokens"},
        {"type": "trace"},
        {"type": "trace", "operation": "x", "min_count": 3, "max_count": 2},
        {"type": "trace", "operation": "x", "equals": 2},
        {"type": "python", "function": "nothing"},
        {"type": "python", "function": "no.such.module:f"},
        {"type": "python", "function": f"{HERE}:nope"},
        {"type": "llm_judge", "model": ""},
        {"type": "llm_judge", "model": "m", "prompt_template": "Is {{input}} right?"},
        {"type": "llm_judge", "model": "m", "prompt_template": "{{output}} {{answer}}"},
        {"type": "llm_judge", "model": "m", "score_parser": "choice", "choices": {"A": 0.1, "B": 0.0}},
    ],
)
def test_settings_that_cannot_be_right_are_refused(spec: dict[str, Any]) -> None:
    """When the suite is loaded, not when it runs."""
    with pytest.raises(InvalidArgument):
        grader(spec).check("x")


def test_an_unknown_grader_names_the_nearest() -> None:
    """Never a pass, never a default."""
    with pytest.raises(InvalidArgument, match=r"unknown type 'Exact'. did you mean 'exact'"):
        grader({"type": "Exact"})
    with pytest.raises(InvalidArgument, match=r"did you mean 'rouge_l'"):
        grader({"type": "rouge-l"})
    with pytest.raises(InvalidArgument, match=r"known: exact, contains"):
        grader({"type": 7})
    with pytest.raises(InvalidArgument, match=r"unknown key 'patterm'. did you mean 'pattern'"):
        grader({"type": "regex", "patterm": "x"})


def test_the_list_above_has_every_grader() -> None:
    """So that the properties below hold for all."""
    assert {s["type"] for s in ONE_OF_EACH} == set(GRADERS)


@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=lambda s: str(s["type"]))
@pytest.mark.parametrize("negate", [False, True])
def test_no_grader_passes_on_nothing(spec: dict[str, Any], negate: bool) -> None:
    """An empty output does not pass, turned round or not. An empty expectation is refused, or has no part in the verdict."""
    g = grader({**spec, "negate": negate})
    for output in ("", " \n\t"):
        assert not scored(g, look(output, "A 4", cost_usd=0.0, latency_ms=0, tokens_out=0, trace_id="t")).passed
    for expected in ("", "  "):
        if g.reads_expected:  # type: ignore[attr-defined]
            with pytest.raises(InvalidArgument):
                g.check(expected)
        else:
            g.check(expected)
            facts: dict[str, Any] = {"cost_usd": 0.5, "latency_ms": 3, "tokens_out": 2, "trace_id": "t"}
            with_it, without = (scored(g, look('{"a": 1}', e, **facts)) for e in ("b", expected))
            assert with_it == without


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(ONE_OF_EACH),
    st.one_of(st.text(max_size=20), st.sampled_from(["A", "4", "[1]", '{"a": 4}', "yes 4 A"])),
    st.sampled_from(["A", "4", "[1, 2]", "yes", "b 4"]),
    st.sampled_from([None, 0.0, 0.5, 2.0, math.nan, -1.0]),
)
def test_scores_are_shares_and_negation_turns_them_round(
    spec: dict[str, Any], output: str, expected: str, amount: float | None
) -> None:
    """In 0..1 and finite; twice negated is not negated; an error is an error either way, and never passes."""
    count = int(amount) if amount is not None and math.isfinite(amount) else None
    facts: dict[str, Any] = {
        "cost_usd": amount,
        "latency_ms": amount,
        "tokens_out": count,
        "trace_id": "t" if amount else "",
    }
    seen = look(output, expected, **facts)
    plain, turned = scored(grader(spec), seen), scored(grader({**spec, "negate": True}), seen)
    for score in (plain, turned):
        assert 0.0 <= score.score <= 1.0
        assert not (score.error and (score.passed or score.score))
    assert bool(plain.error) is bool(turned.error)
    if not plain.error and (plain.passed or turned.passed):  # else there was no answer
        assert turned.passed is not plain.passed
        assert 1.0 - (1.0 - turned.score) == pytest.approx(1.0 - plain.score)


def test_a_pattern_that_could_run_away_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matched in a process of its own, and stopped there: an error, not a hang and not a pass. A tame text still passes."""
    spec = {"type": "regex", "pattern": "^(a+)+$"}
    assert decides(spec, "aaaa", "").passed
    monkeypatch.setattr(patterns, "SECONDS_MAX", 0.3)
    with pytest.raises(TimedOut, match="took longer"):
        grader(spec).grade(look("a" * 60 + "b"))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("pattern", "degree"),
    [
        ("Paris", 1), (r"\bA: (\d+)", 2), (".*a.*b", 3), ("(a+)+", None), ("(a|aa)+", None), ("(?:a?){20}", None),
        ("a?" * 13, None), ("a?b?", 1), ("(?=.*a).+", 3), (r"(a)\1", 2), ("a{1,9999}", 2), ("a{3}", 1),
    ],
)  # fmt: skip
def test_the_worst_case_of_a_pattern_is_known(pattern: str, degree: int | None) -> None:
    """None is exponential: it never runs where the run could wait for it."""
    assert patterns.degree(pattern) == degree


def test_a_python_grader_is_a_function_of_the_suite(tmp_path: Path) -> None:
    """bool, score, Verdict; everything else it does is an error. Its source is in the digest, its folder is not."""
    (tmp_path / "mine.py").write_text(
        "from mist.tools.matchspec.grading import Verdict\n"
        "def short(given): return len(given.output) < 5\n"
        "def half(given): return 0.5\n"
        "def own(given): return Verdict(True, 0.9, given.output, 'fine')\n"
        "def boom(given): raise KeyError(given.output)\n"
        "def odd(given): return 'yes'\n"
        "def high(given): return 1.5\n"
        "def nan(given): return float('nan')\n"
        "def leave(given): raise SystemExit(0)\n"
        "async def later(given): return 0.25\n"
    )

    def made(name: str, **more: Any) -> Any:
        g: Any = grader({"type": "python", "function": f"mine.py:{name}", **more})
        g.within(tmp_path)
        return g

    found = {n: scored(made(n), look("abc")) for n in ("short", "half", "own", "boom", "odd", "high", "nan", "leave")}
    assert {n: (s.passed, s.score) for n, s in found.items() if not s.error} == {
        "short": (True, 1.0), "half": (False, 0.5), "own": (True, 0.9),
    }  # fmt: skip
    assert "KeyError" in found["boom"].error
    assert not any(found[n].passed for n in ("boom", "odd", "high", "nan", "leave"))
    assert scored(made("half", pass_score=0.5), look("abc")).passed
    with pytest.raises(InvalidArgument, match="coroutine"):
        made("later").grade(look("abc"))
    assert run(made("later").grade_async(look("abc"))).score == 0.25
    assert run(made("short").grade_async(look("abc"))).passed
    assert not run(made("later").grade_async(look(" "))).passed
    before = code_of(made("short"))
    assert str(tmp_path) not in str(describe(made("short")))
    (tmp_path / "mine.py").write_text("def short(given): return True\n")
    assert code_of(made("short")) != before
    (tmp_path / "mine.py").write_text("def short(given):\n  return (\n")
    with pytest.raises(InvalidArgument, match=r"mine\.py:2:"):
        made("short").check("")
    for name in [n for n in sys.modules if n.startswith("matchspec_mine_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("spec", "facts", "passed"),
    [
        ({"type": "cost", "max_usd": 0.01}, {"cost_usd": 0.01}, True),
        ({"type": "cost", "max_usd": 0.01}, {"cost_usd": 0.02}, False),
        ({"type": "cost", "max_usd": 0.01}, {}, None),
        ({"type": "latency", "max_ms": 200}, {"latency_ms": 199.9}, True),
        ({"type": "latency", "max_ms": 200}, {}, None),
        ({"type": "tokens", "max_total": 10}, {"tokens_in": 5, "tokens_out": 5}, True),
        ({"type": "tokens", "max_total": 10}, {"tokens_in": 5}, None),
        ({"type": "tokens", "max_in": 4, "max_out": 9}, {"tokens_in": 5, "tokens_out": 5}, False),
    ],
)
def test_budgets(spec: dict[str, Any], facts: dict[str, Any], passed: bool | None) -> None:
    """What is not known (None here) is an error, never within a budget."""
    score = scored(grader(spec), look("x", **facts))
    assert (bool(score.error), score.passed) == (passed is None, bool(passed))


def test_the_digest_of_the_code_reaches_what_a_grader_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through modules it imports as modules."""
    monkeypatch.setattr(grading, "_sources", {})
    before = code_of(grader({"type": "bleu"}))
    monkeypatch.setattr(grading, "_sources", {})
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: read(p) + (b"#" if p.name == "likeness.py" else b""))
    assert code_of(grader({"type": "bleu"})) != before
