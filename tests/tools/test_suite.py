"""Suites: everything that would let a run pass without judging is refused when the suite is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mist.errors import InvalidArgument, NotFound
from mist.tools.matchspec import gsm8k
from mist.tools.matchspec.graders import grader
from mist.tools.matchspec.grading import GradeInput
from mist.tools.matchspec.load import load_suite as load
from mist.tools.matchspec.results import rows
from mist.tools.matchspec.suite import Suite

from .graded import grade

DATA = Path(os.environ.get("MIST_TEST_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
SOLUTIONS = DATA / "gsm8k_model_solutions.jsonl"
TEST = DATA / "gsm8k_test.jsonl"
PUBLISHED = {"6b_finetuning": 286, "6b_verification": 515, "175b_finetuning": 458, "175b_verification": 742}
real = pytest.mark.skipif(not SOLUTIONS.exists(), reason="the shared data are not here")

CONFIG = """
name = "s"
data = "d.jsonl"
answers = "a.jsonl"
[[graders]]
type = "numeric"
marker = "A:"
[[graders]]
type = "exact"
name = "word"
"""
SAMPLES = [
    {"id": "1", "input": "2+2?", "expected": 4, "grader": "numeric"},
    {"id": "2", "input": "hi?", "expected": "ho", "grader": ["word"]},
]
ANSWERS = [
    {"id": "1", "model": "m", "output": "A: 4"},
    {"id": "2", "model": "m", "output": "ho"},
    {"id": 1, "model": "n", "output": "A: 5"},
]


def write(tmp_path: Path, config: str = CONFIG, samples: list[Any] = SAMPLES, answers: list[Any] = ANSWERS) -> Path:
    for name, values in (("d.jsonl", samples), ("a.jsonl", answers)):
        (tmp_path / name).write_text("".join(v if isinstance(v, str) else json.dumps(v) + "\n" for v in values))
    (tmp_path / "s.toml").write_text(config)
    return tmp_path / "s.toml"


def verdicts(suite: Suite) -> dict[tuple[str, str], tuple[bool, str]]:
    found = {}
    for harness in suite.harnesses:
        for sample in harness.samples:
            r = grade(suite.name, harness, sample, "r")
            found[r.model, sample.id] = (r.passed, r.error)
    return found


def test_a_suite_is_loaded_and_judged(tmp_path: Path) -> None:
    """Each sample by its own grader; an answer that is missing is an error and a failure."""
    suite = load(write(tmp_path))
    assert (suite.name, suite.models, suite.total) == ("s", ["m", "n"], 4)
    assert verdicts(suite) == {
        ("m", "1"): (True, ""),
        ("m", "2"): (True, ""),
        ("n", "1"): (False, ""),
        ("n", "2"): (False, "no recorded answer"),
    }


def test_without_names_every_grader_must_pass(tmp_path: Path) -> None:
    """The score is the share that passed, `passed` wants all of them."""
    samples = [{"id": "1", "expected": "4"}]
    suite = load(write(tmp_path, samples=samples, answers=[{"id": "1", "model": "m", "output": "A: 4"}]))
    (harness,) = suite.harnesses
    result = grade(suite.name, harness, next(iter(harness.samples)), "r")
    assert (result.passed, result.score) == (False, 0.5)
    assert [(s.grader, s.passed) for s in result.scores] == [("numeric", True), ("word", False)]


def test_the_digest_changes_with_every_word(tmp_path: Path) -> None:
    """Data, answers, grader settings: another digest, so another run. The same bytes elsewhere: the same."""
    (tmp_path / "b").mkdir()
    base = load(write(tmp_path)).digest
    assert load(write(tmp_path / "b")).digest == base
    changed = [
        load(write(tmp_path, samples=[{**SAMPLES[0], "expected": 5}, SAMPLES[1]])).digest,
        load(write(tmp_path, answers=[*ANSWERS[:2], {**ANSWERS[2], "output": "A: 6"}])).digest,
        load(write(tmp_path, config=CONFIG + "trim_whitespace = false\n")).digest,
    ]
    assert len({base, *changed}) == 4


@pytest.mark.parametrize(
    ("config", "samples", "answers", "message"),
    [
        (CONFIG.replace("numeric", "numerik", 1), SAMPLES, ANSWERS, "unknown type 'numerik'"),
        (CONFIG.replace("marker", "markre"), SAMPLES, ANSWERS, "markre"),
        (CONFIG + "\n[extra]\n", SAMPLES, ANSWERS, "extra"),
        ("name = 's'\ndata = 'd.jsonl'\nanswers = 'a.jsonl'\ngraders = []", SAMPLES, ANSWERS, "no graders"),
        ("name = [", SAMPLES, ANSWERS, "not TOML"),
        (CONFIG.replace('"s"', '""'), SAMPLES, ANSWERS, "no name"),
        (CONFIG, [], ANSWERS[:0], "no samples"),
        (CONFIG, SAMPLES, [], "no recorded answers"),
        (CONFIG, [SAMPLES[0], SAMPLES[0]], ANSWERS[:1], "occurs twice"),
        (CONFIG, [{**SAMPLES[0], "grader": "nope"}], ANSWERS[:1], "asks for the grader 'nope'"),
        (CONFIG, [{**SAMPLES[0], "grader": 3}], ANSWERS[:1], "not the name of a grader"),
        (CONFIG, [{**SAMPLES[0], "expected": ""}], ANSWERS[:1], "no text or number under 'expected'"),
        (CONFIG, [{**SAMPLES[0], "expected": "four"}], ANSWERS[:1], "no number in the expected text 'four'"),
        (CONFIG, [{"id": "1"}], ANSWERS[:1], "no text or number under 'expected'"),
        (CONFIG, ["nonsense\n"], ANSWERS, r"d\.jsonl:1:5: not JSON"),
        (CONFIG, ["[]\n"], ANSWERS, r"d\.jsonl:1:1: not a JSON object"),
        (CONFIG, SAMPLES, [*ANSWERS, ANSWERS[0]], "a second answer of m"),
        (CONFIG, SAMPLES, [*ANSWERS, {"id": "9", "model": "m", "output": ""}], "belong to no sample"),
        (CONFIG, SAMPLES, [{"id": "1", "output": "x"}], "a.jsonl:1"),
    ],
)
def test_a_suite_that_cannot_judge_is_refused(
    tmp_path: Path, config: str, samples: list[Any], answers: list[Any], message: str
) -> None:
    """Before anything runs, and naming the place."""
    with pytest.raises(InvalidArgument, match=message):
        load(write(tmp_path, config, samples, answers))


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    """The suite's, or one it names."""
    with pytest.raises(NotFound):
        load(tmp_path / "none.toml")
    path = write(tmp_path)
    (tmp_path / "d.jsonl").unlink()
    with pytest.raises(NotFound, match=r"d\.jsonl"):
        load(path)


def solutions(tmp_path: Path, **outputs: Any) -> Path:
    path = tmp_path / "recorded.jsonl"
    path.write_text(json.dumps({"question": "q", "ground_truth": "so\nA: 65,960", **outputs}) + "\n")
    return path


def test_recorded_solutions_are_recognised_by_shape(tmp_path: Path) -> None:
    """Whatever the file and the models are called, with or without the published verdict."""
    path = solutions(tmp_path, x={"solution": "A: 65960"}, y={"solution": "A: 1", "is_correct": True})
    assert gsm8k.recognise(path)
    suite = gsm8k.load(path)
    assert (suite.name, suite.models) == ("recorded", ["x", "y"])
    assert verdicts(suite) == {("x", "1"): (True, ""), ("y", "1"): (False, "")}


def test_other_json_lines_are_not_recognised(tmp_path: Path) -> None:
    """A question without solutions, an answer file, garbage, nothing."""
    path = tmp_path / "x.jsonl"
    for text in ('{"question":"q","answer":"#### 4"}', '{"question":"q","ground_truth":"A: 1"}', "garbage", "", "[]"):
        path.write_text(text)
        assert not gsm8k.recognise(path)
    assert not gsm8k.recognise(solutions(tmp_path, note="no object"))


@real
def test_the_published_counts_come_from_the_texts_alone(tmp_path: Path) -> None:
    """Four rows, 286, 515, 458 and 742 of 1,319; the same with every published verdict turned round or left out."""
    rows_of_file = [json.loads(line) for line in SOLUTIONS.read_text().splitlines()]
    for row in rows_of_file:
        for model in PUBLISHED:
            verdict = row[model].pop("is_correct")
            if len(row["question"]) % 2:
                row[model]["is_correct"] = not verdict
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(json.dumps(r) + "\n" for r in rows_of_file))
    for path in (SOLUTIONS, turned):
        suite = gsm8k.load(path)
        table = rows((grade(suite.name, h, s, "r") for h in suite.harnesses for s in h.samples), suite.models)
        assert [(r.model, r.passed, r.total) for r in table] == [(m, n, 1319) for m, n in PUBLISHED.items()]


@real
def test_our_verdict_agrees_with_the_published_one_sample_by_sample() -> None:
    """Not only the counts: all 5,276 verdicts. Comparing the texts instead of the numbers would miss ten of them."""
    suite = gsm8k.load(SOLUTIONS)
    published = [json.loads(line) for line in SOLUTIONS.read_text().splitlines()]
    text = grader({"type": "exact", "marker": "A:", "expected_marker": "A:"})
    by_text = 0
    for harness in suite.harnesses:
        for sample, row in zip(harness.samples, published, strict=True):
            answer = row[harness.label]
            assert grade(suite.name, harness, sample, "r").passed is answer["is_correct"], (sample.id, harness.label)
            by_text += text.grade(GradeInput(output=answer["solution"], expected=sample.expected)).passed
    assert sum(PUBLISHED.values()) - by_text == 10


@real
def test_the_gsm8k_test_file_can_be_the_data_of_a_suite(tmp_path: Path) -> None:
    """question/answer with ####, by [fields] and expected_marker."""
    questions = [json.loads(line) for line in TEST.read_text().splitlines()]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    answers = [
        {"id": n, "model": "echo", "output": q["answer"].rpartition("####")[2]} for n, q in enumerate(questions, 1)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    (tmp_path / "s.toml").write_text(
        'name = "gsm8k"\ndata = "d.jsonl"\nanswers = "a.jsonl"\n[fields]\ninput = "question"\nexpected = "answer"\n'
        '[[graders]]\ntype = "numeric"\nexpected_marker = "####"\n'
    )
    suite = load(tmp_path / "s.toml")
    (harness,) = suite.harnesses
    assert sum(grade(suite.name, harness, s, "r").passed for s in harness.samples) == 1319
