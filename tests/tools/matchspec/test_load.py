"""The front end: suites as the documents promise them, and everything that is wrong with one, with its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mist.config import Layer
from mist.errors import AlreadyExists, Conflict, InvalidArgument, MistError, NotFound
from mist.tools.matchspec import suite as shapes
from mist.tools.matchspec.data import Fields, Rows
from mist.tools.matchspec.graders import Exact, Numeric, grader
from mist.tools.matchspec.load import load, load_suite, validate
from mist.tools.matchspec.positions import Problems
from mist.tools.matchspec.settings import EvalSettings, MatchSpecSettings, find_config, layered, layers_of
from mist.tools.matchspec.starter import init
from mist.tools.matchspec.yaml import read

CONFIG = """\
version: 1
defaults:
  concurrency: 8
  retry_delay_ms: 100
suites:
  - name: geography
    description: Where things are.
    harnesses:
      - evals/capitals.yml
    tags: [smoke, geo]
    thresholds:
      overall: 0.8
      word: 0.5
    statistics:
      use_lower_bound: true
      min_sample_size: 20
      min_sample_action: fail
    gate:
      metric: mean_score
      cost_usd_max: 2
"""
HARNESS = """\
version: 1
name: capitals
dataset: ../data/capitals.yml
model:
  type: http
  endpoint: http://127.0.0.1:1/v1
  headers: {x-env: no}
  request_template: '{"q": "{{input}}"}'
  response_path: choices[0].message.content
  api_key_env: KEY
graders:
  - type: exact_match
    name: word
    threshold: 0.9
    config:
      case_sensitive: false
  - type: numeric
    negate: true
timeout_seconds: 5
retries: 2
epochs: 3
reducer: pass@2
"""
DATA = """\
version: 1
name: capitals
examples:
  - id: fr
    input: Capital of France?
    expected: Paris 1
    tags: [smoke]
    metadata: {level: 1, note: no, since: 2024-01-01}
  - id: 007
    input: 1.0
    expected: 1.0
    grader: numeric
"""


def project(tmp_path: Path, **files: str) -> Path:
    """The files above, or what a test wants in their place."""
    texts = {"matchspec.yml": CONFIG, "evals/capitals.yml": HARNESS, "data/capitals.yml": DATA, **files}
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "matchspec.yml"


def told(tmp_path: Path, **files: str) -> list[str]:
    """The problems, paths shortened."""
    return [str(p).replace(f"{tmp_path}/", "") for p in validate([project(tmp_path, **files)])]


def test_a_suite_is_what_its_files_say(tmp_path: Path) -> None:
    """Config, harness, data set: every documented key reaches its place."""
    loaded = load(project(tmp_path))
    (suite,) = loaded.suites
    (harness,) = suite.harnesses
    assert (suite.name, suite.description, suite.tags, suite.total) == (
        "geography",
        "Where things are.",
        ("smoke", "geo"),
        6,
    )
    gate = suite.gate
    assert (gate.overall, gate.per_grader, gate.use_lower_bound) == (0.8, {"word": 0.5}, True)
    assert (gate.min_sample_size, gate.min_sample_action, gate.metric, gate.cost_usd_max) == (
        20,
        "fail",
        "mean_score",
        2.0,
    )
    assert harness.model == shapes.Http(
        endpoint="http://127.0.0.1:1/v1", headers={"x-env": "no"}, request_template='{"q": "{{input}}"}',
        response_path="choices[0].message.content", api_key_env="KEY",
    )  # fmt: skip
    assert harness.graders == (Exact(label="word", threshold=0.9, case_sensitive=False), Numeric(negate=True))
    assert (harness.concurrency, harness.timeout_s, harness.retries, harness.retry_delay_s) == (8, 5.0, 2, 0.1)
    assert (harness.epochs, harness.reducer) == (3, "pass@2")
    first, second = harness.samples
    assert (first.expected, first.tags) == ("Paris 1", ("smoke",))
    assert first.metadata == {"level": 1, "note": "no", "since": "2024-01-01"}
    assert (second.id, second.input, second.expected, second.graders) == ("007", "1.0", "1.0", ("numeric",))
    assert load(tmp_path).suites[0].digest == suite.digest


def test_everything_wrong_is_said_at_once_with_its_place(tmp_path: Path) -> None:
    """Line, column, caret, and the nearest word that is known."""
    harness = """\
versions: 1
name:
dataset: ../data/capitls.yml
model: {type: ecko}
graders:
  - type: exakt
  - type: regex
    pattern: '('
    weight: 2
  - type: numeric
    tolerances: 5
  - type: contains
    threshold: 1.2
concurrency: 0
retries: 1.5
"""
    assert told(tmp_path, **{"evals/capitals.yml": harness}) == [
        "evals/capitals.yml:1:1: the file must say version: 1\n  versions: 1\n  ^",
        "evals/capitals.yml:1:1: unknown key 'versions'. did you mean 'version'?\n  versions: 1\n  ^",
        "evals/capitals.yml:2:6: name is empty\n  name:\n       ^",
        (
            "evals/capitals.yml:3:10: dataset: no file ../data/capitls.yml. did you mean 'capitals.yml'?\n"
            "  dataset: ../data/capitls.yml\n           ^"
        ),
        "evals/capitals.yml:4:15: type: unknown 'ecko'. did you mean 'echo'?\n  model: {type: ecko}\n                ^",
        "evals/capitals.yml:6:11: unknown type 'exakt'. did you mean 'exact'?\n    - type: exakt\n            ^",
        (
            "evals/capitals.yml:8:14: not a regular expression: missing ), unterminated subpattern at position 0\n"
            "      pattern: '('\n               ^"
        ),
        (
            "evals/capitals.yml:11:5: unknown key 'tolerances' of the grader numeric. did you mean 'tolerance'?\n"
            "      tolerances: 5\n      ^"
        ),
        "evals/capitals.yml:13:16: Expected `float` <= 1.0\n      threshold: 1.2\n                 ^",
        "evals/capitals.yml:14:14: concurrency = 0: it is 1 or more and 1024 or less\n  concurrency: 0\n               ^",
        "evals/capitals.yml:15:10: retries is 1.5, not a whole number\n  retries: 1.5\n           ^",
    ]


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("matchspec.yml", "version: 1", "version: 2", "matchspec.yml:1:10: the file must say version: 1"),
        ("matchspec.yml", "concurrency: 8", "concurrency: many", "matchspec.yml:3:3: defaults.concurrency"),
        ("matchspec.yml", "concurrency: 8", "concurrencies: 8", "unknown key 'defaults.concurrencies'. did you mean"),
        ("matchspec.yml", "overall: 0.8", "overall: 80", "matchspec.yml:12:16: overall = 80: it is 0 or more and 1 or less"),
        ("matchspec.yml", "word: 0.5", "words: 0.5", "matchspec.yml:13:7: no grader is called 'words'. did you mean 'word'?"),
        ("matchspec.yml", "metric: mean_score", "metric: mode", "metric: unknown 'mode'"),
        ("matchspec.yml", "- evals/capitals.yml", "- evals/capital.yml", "matchspec.yml:9:9: no file evals/capital.yml. did you mean"),
        ("matchspec.yml", "- evals/capitals.yml", "- ../capitals.yml", "lies outside of"),
        ("matchspec.yml", "harnesses:\n      - evals/capitals.yml", "harnesses: []", "harnesses is empty"),
        ("matchspec.yml", "use_lower_bound: true", "use_lower_bound: yes", "is a text, not true or false"),
        ("matchspec.yml", "tags:", "tags: x\n    tags:", "the key 'tags' occurs twice. it stands in line 10 already"),
        ("matchspec.yml", "suites:", "suits:", "unknown key 'suits'. did you mean 'suites'?"),
        ("evals/capitals.yml", "negate: true", "weight: 1", "capitals.yml:12:5: no weight, but others have one"),
        ("evals/capitals.yml", "type: numeric", "type: exact\n    name: word", "two graders are called 'word'"),
        ("evals/capitals.yml", "reducer: pass@2", "reducer: pass@9", "capitals.yml:22:10: reducer: pass@9 needs 9 repeats"),
        ("evals/capitals.yml", "case_sensitive: false", "threshold: 1", "threshold stands beside `config` too"),
        ("evals/capitals.yml", "type: http", "type: http\n  endpoints: x", "unknown key 'endpoints'. did you mean 'endpoint'?"),
        ("data/capitals.yml", "id: 007", "id: fr", "data/capitals.yml:9:9: the id 'fr' occurs twice. it stands in line 4"),
        ("data/capitals.yml", "grader: numeric", "grader: numerik", "12:13: sample 007 asks for the grader 'numerik'"),
        ("data/capitals.yml", "Paris 1", "Paris", "6:15: sample fr: grader numeric: no number in the expected text 'Paris'"),
        ("data/capitals.yml", "    expected: Paris 1\n", "", "4:5: sample fr: no text or number under 'expected'"),
        ("data/capitals.yml", "expected: Paris 1", "xpected: Paris 1", "unknown key 'xpected'. did you mean 'expected'?"),
        ("data/capitals.yml", "expected: Paris 1", "expected: ", "no text or number under 'expected'"),
        ("data/capitals.yml", "expected: Paris 1", "expected: *x", "*x stands before its anchor"),
        ("data/capitals.yml", "expected: Paris 1", "expected: !!python/object:os.system x", "is not taken"),
        ("data/capitals.yml", "expected: Paris 1", "expected: [", "not YAML"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(tmp_path: Path, file: str, old: str, new: str, said: str) -> None:
    """In every file, at its place; and `load` raises what `validate` says."""
    text = {"matchspec.yml": CONFIG, "evals/capitals.yml": HARNESS, "data/capitals.yml": DATA}[file]
    assert old in text
    problems = told(tmp_path, **{file: text.replace(old, new, 1)})
    assert any(said in p for p in problems), problems
    with pytest.raises((InvalidArgument, NotFound)) as caught:
        load(tmp_path)
    assert all(p in str(caught.value).replace(f"{tmp_path}/", "") for p in problems)


def test_no_more_than_twenty_of_a_file(tmp_path: Path) -> None:
    """The rest comes when these are mended."""
    data = "version: 1\nname: n\nexamples:\n" + "".join(f"  - {{id: {i}, input: x}}\n" for i in range(50))
    assert len(told(tmp_path, **{"data/capitals.yml": data})) == 20
    with pytest.raises(InvalidArgument):
        load(tmp_path)


def test_nothing_leads_out_of_the_folder(tmp_path: Path) -> None:
    """Neither by dots, nor absolutely, nor by a link; the caller may name a wider root."""
    inside = tmp_path / "inside"
    (tmp_path / "secret.yml").write_text(DATA)
    (inside / "data").mkdir(parents=True)
    (inside / "data" / "link.yml").symlink_to(tmp_path / "secret.yml")
    for path in ("../../secret.yml", str(tmp_path / "secret.yml"), "../data/link.yml"):
        config = project(inside, **{"evals/capitals.yml": HARNESS.replace("../data/capitals.yml", path)})
        assert "lies outside of" in str(validate([config])[0])
    assert validate([config], root=tmp_path) == []
    assert validate([config], env={"MATCHSPEC_ROOT": str(tmp_path)}) == []


def test_aliases_and_nesting_are_bounded() -> None:
    """The billion laughs end at NODES_MAX, and a thousand brackets at DEPTH_MAX."""
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    for text, said in ((laughs, "aliases followed"), ("[" * 1000, "nested deeper"), ("a: &a [*a]", "inside it")):
        problems = Problems()
        assert read(text, "f.yml", problems) is None
        assert said in str(problems.sorted()[0])
    good = read("a: &x {b: 1.10}\nc: *x\n", "f.yml", Problems())
    assert good is not None
    assert good.value["a"] == good.value["c"]


def rows(tmp_path: Path, name: str, text: str, **more: Any) -> Rows:
    (tmp_path / name).write_text(text)
    return Rows(tmp_path / name, **more)


def test_json_lines_are_read_one_by_one(tmp_path: Path) -> None:
    """Numbers as they are written, JSON as its text, other keys left alone, empty lines skipped; every time anew."""
    lines = [
        {
            "id": 7,
            "input": "x",
            "expected": "y",
            "grader": "g",
            "tags": ["t"],
            "metadata": {"a": 1},
            "output": "o",
            "z": 1,
        },
        {"input": [{"role": "user"}], "expected": ["a", 1]},
    ]
    text = json.dumps(lines[0]) + "\n\n" + json.dumps(lines[1]) + '\n{"expected": 1.10}'
    found = rows(tmp_path, "d.jsonl", text)
    assert len(found) == 3
    first, second, third = found
    assert first == shapes.Sample("7", "x", "y", ("g",), ("t",), {"a": 1}, "o")
    assert (second.id, second.input, second.expected) == ("3", '[{"role": "user"}]', '["a", 1]')
    assert (third.id, third.expected) == ("4", "1.10")
    assert list(found) == [first, second, third]
    assert len(rows(tmp_path, "d.jsonl", text, limit=2)) == 2
    renamed = rows(
        tmp_path, "e.jsonl", '{"question": "q", "answer": "a"}\n', fields=Fields(input="question", expected="answer")
    )
    assert [(s.input, s.expected) for s in renamed] == [("q", "a")]
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write("\n{}")
    with pytest.raises(Conflict, match="changed"):
        list(found)


def test_csv_is_read_by_its_header(tmp_path: Path) -> None:
    """Quoted cells may have new lines; metadata.x is metadata; a row of another width is a problem of its line."""
    found = rows(tmp_path, "d.csv", 'id,input,expected,tags,metadata.lang\na,"2,\n2",4,x; y,de\n\n,3,3,,en\n')
    assert len(found) == 2
    first, second = found
    assert first == shapes.Sample("a", "2,\n2", "4", (), ("x", "y"), {"lang": "de"})
    assert (second.id, second.metadata) == ("5", {"lang": "en"})
    with pytest.raises(InvalidArgument, match=r"e\.csv:2:1: 1 cells in 2 columns"):
        list(rows(tmp_path, "e.csv", "input,expected\n1\n"))
    with pytest.raises(InvalidArgument, match="no column 'input'"):
        list(rows(tmp_path, "f.csv", "a,b\n1,2\n"))


def test_bad_lines_are_named_all_at_once(tmp_path: Path) -> None:
    """The fast path stops at the first; what is said then comes from a second look."""
    harness = HARNESS.replace("../data/capitals.yml", "../data/d.jsonl")
    data = '{"id": 1, "input": "x", "expected": 1}\n{"id": 1, "expected": true}\nnonsense\n{"id": 3, "expected": 2, "tags": "t"}\n'
    assert told(tmp_path, **{"evals/capitals.yml": harness, "data/d.jsonl": data + '{"id": 1, "expected": 1}\n'}) == [
        (
            "data/d.jsonl:2:23: no text or number under 'expected'. put it in quotes\n"
            '  {"id": 1, "expected": true}\n                        ^'
        ),
        "data/d.jsonl:3:5: not JSON: JSON is malformed: invalid character (byte 4)\n  nonsense\n      ^",
        (
            "data/d.jsonl:4:34: Expected `array`, got `str` - at `$.tags`\n"
            '  {"id": 3, "expected": 2, "tags": "t"}\n                                   ^'
        ),
        "data/d.jsonl:5:1: sample id '1' occurs twice. it stands in line 1 already",
    ]


def test_toml_has_places_too(tmp_path: Path) -> None:
    """Tables, arrays of tables, texts of several lines; and TOML's own errors."""
    (tmp_path / "d.jsonl").write_text('{"id": "1", "input": "x", "expected": "4"}\n')
    text = 'name = "s"\ndescription = """\nname = 3\n"""\ndata = "d.jsonl"\n[model]\ntype = "ecko"\n'
    text += '[[graders]]\ntype = "exact"\n[[graders]]\ntype = "numeric"\ntolerance = -1\n[gate]\nmetric = "x"\n'
    path = tmp_path / "s.toml"
    path.write_text(text)
    assert [(p.line, p.column) for p in validate([path])] == [(7, 8), (12, 13), (14, 10)]
    path.write_text('name = "s"\ndata = \n')
    assert [(p.line, p.column) for p in validate([path])] == [(2, 8)]
    path.write_text(text.replace("ecko", "echo").replace("-1", "1").replace('"x"', '"pass_rate"'))
    suite = load_suite(path)
    assert suite.harnesses[0].model == shapes.Echo()


def test_the_gate_is_looked_at_where_the_harness_is_wrong_too(tmp_path: Path) -> None:
    path = tmp_path / "s.yml"
    path.write_text(
        "version: 1\nname: s\ndataset: {name: d, examples: [{id: a, input: x, expected: x}]}\nmodel: {type: echo}\n"
        "graders: [{type: exakt}]\nthresholds: {overall: 1.2}\nstatistics: {cluster: [a]}\n"
    )
    assert [(p.line, p.column) for p in validate([path])] == [(5, 18), (6, 23), (7, 23)]


def test_what_a_python_suite_or_a_line_of_solutions_gets_wrong_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("def suite():\n    x = 1\n    raise ValueError(x)\n")
    (tmp_path / "s.jsonl").write_text('{"question": "q", "ground_truth": "A: 1", "m": {"solution": "A: 1"}}\n{"a\n')
    found = validate([tmp_path / "s.py", tmp_path / "s.jsonl"])
    assert [(p.line, p.message.partition(":")[0]) for p in found] == [
        (3, "suite()"), (2, "not a line of recorded solutions"),
    ]  # fmt: skip


def test_what_clusters_is_in_every_sample_and_in_the_digest(tmp_path: Path) -> None:
    lines = [{"id": i, "input": "x", "expected": "x", "metadata": {"document": i // 2}} for i in range(4)]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = "version: 1\nname: s\ndataset: d.jsonl\nmodel: {type: echo}\ngraders: [{type: exact}]\n"
    path = tmp_path / "s.yml"
    path.write_text(text)
    plain = load_suite(path)
    path.write_text(text + "statistics:\n  cluster: document\n")
    suite = load_suite(path)
    assert (suite.gate.cluster, suite.digest == plain.digest) == ("document", False)
    assert [shapes.cluster_of(s, "document") for s in suite.harnesses[0].samples] == ["0", "0", "1", "1"]
    path.write_text(text)
    assert load(path, env={"MATCHSPEC_STATISTICS_CLUSTER": "document"}).suites[0].digest == suite.digest
    data.write_text(data.read_text().replace('"document": 1', '"documents": 1'))
    path.write_text(text + "statistics: {cluster: document}\n")
    said = "sample 2: no 'document' in the metadata, by which the gate clusters. did you mean 'documents'?"
    assert [str(p).splitlines()[0] for p in validate([path])] == [
        f"{data}:{n}:1: {said.replace('2', str(n - 1), 1)}" for n in (3, 4)
    ]
    inline = text.replace("d.jsonl", "{name: d, examples: [{id: a, input: x, expected: x}]}")
    path.write_text(inline + "statistics: {cluster: document}\n")
    (problem,) = validate([path])
    assert (problem.line, problem.hint) == (6, "this sample has none")


MODELS = [
    ("{type: infer, model: m, url: 'http://h', params: {top_p: 0.5}}", shapes.Infer(model="m", url="http://h", params={"top_p": 0.5})),
    ("{type: command, command: [cat, -n], input_via: arg}", shapes.Command(command=("cat", "-n"), input_via="arg")),
    ("{type: python, target: 'm:f', label: x}", shapes.Python(target="m:f", label="x")),
    ("{type: noop}", shapes.Noop()),
    ("{type: recorded, label: m, answers: a.jsonl}", shapes.Recorded(label="m", answers={"fr": "Paris", "007": "1"})),
]  # fmt: skip


@pytest.mark.parametrize(("text", "model"), MODELS)
def test_models(tmp_path: Path, text: str, model: shapes.ModelSpec) -> None:
    """Each kind, from a harness that is a suite by itself, its data written into it."""
    examples = DATA.split("examples:\n")[1]
    harness = f"version: 1\nname: h\nmodel: {text}\ngraders: [{{type: contains}}]\nthresholds: {{contains: 0.5}}\n"
    harness += f"tags: [a]\ndataset:\n  name: d\n  examples:\n{examples.replace('grader: numeric', 'tags: []')}"
    (tmp_path / "h.yml").write_text(harness)
    answers = [("fr", "m", "Paris"), ("007", "m", "1"), ("fr", "n", "x")]
    lines = (json.dumps({"id": i, "model": m, "output": o}) for i, m, o in answers)
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    suite = load_suite(tmp_path / "h.yml")
    assert suite.harnesses[0].model == model
    assert (suite.gate.per_grader, suite.tags) == ({"contains": 0.5}, ("a",))


def test_a_suite_in_python(tmp_path: Path) -> None:
    """SUITE or suite(), made with the shapes; what the file raises is its error, with the line."""
    path = tmp_path / "mine.py"
    good = (
        "from mist.tools.matchspec.graders import Exact\n"
        "from mist.tools.matchspec.suite import Echo, Harness, Sample, suite_of\n"
        "def suite():\n"
        "    h = Harness(name='h', samples=[Sample('1', 'a', 'a')], model=Echo(), graders=(Exact(),))\n"
        "    return [suite_of(n, [h], where=__file__) for n in ('one', 'two')]\n"
    )
    path.write_text(good)
    assert [s.name for s in load(path).suites] == ["one", "two"]
    with pytest.raises(InvalidArgument, match="holds 2 suites: one, two"):
        load_suite(path)
    for text, place, said in (
        ("x = 1\nraise KeyError('k')\n", (2, 1), "KeyError"),
        ("x = (\n", (1, 5), "was never closed"),
        ("x = 1\n", (1, 1), "no suite"),
        (good.replace("('one', 'two')", "()"), (1, 1), "no suite"),
        (good.replace("graders=(Exact(),)", "graders=()"), (1, 1), "no graders"),
    ):
        path.write_text(text)
        (problem,) = validate([path])
        assert (problem.line, problem.column) == place
        assert said in problem.message


def test_where_the_config_is_looked_for(tmp_path: Path) -> None:
    """The one that is named, MATCHSPEC_CONFIG, ./matchspec.yml, the one at home."""
    home = tmp_path / "home" / ".matchspec" / "config.yml"
    env = {"HOME": str(tmp_path / "home")}
    assert find_config(env=env, cwd=tmp_path) is None
    home.parent.mkdir(parents=True)
    home.write_text(CONFIG)
    assert find_config(env=env, cwd=tmp_path) == home
    here = project(tmp_path)
    assert find_config(env=env, cwd=tmp_path) == here
    assert find_config(env={**env, "MATCHSPEC_CONFIG": str(home)}, cwd=tmp_path) == home
    assert find_config(str(here), env={"MATCHSPEC_CONFIG": str(home)}, cwd=tmp_path) == here
    with pytest.raises(NotFound, match=r"none\.yml"):
        find_config(str(tmp_path / "none.yml"), env=env)


def test_which_setting_wins(tmp_path: Path) -> None:
    """mist.toml, then matchspec.yml, then variables; `concurrency` by itself overrules the harness."""
    below = layers_of(MatchSpecSettings(), EvalSettings(timeout=7, parallel=3))
    config = project(tmp_path)
    loaded = load(config, layers=below, env={"MATCHSPEC_DEFAULTS_RETRIES": "4", "MATCHSPEC_OUTPUT_DIR": "out"})
    harness = loaded.suites[0].harnesses[0]
    assert (harness.concurrency, harness.timeout_s, loaded.settings.output.dir) == (3, 7.0, "out")
    assert loaded.settings.defaults.retries == 4
    assert layered(*below, env={"MATCHSPEC_CONCURRENCY": "9"}).concurrency == 9
    for name in ("MATCHSPEC_DEFAULTS_CONCURRENCY", "MATCHSPEC_STATISTICS_CONFIDENCE_LEVEL"):
        with pytest.raises(InvalidArgument, match="cannot be right"):
            layered(env={name: "0"})
    with pytest.raises(InvalidArgument, match="mine: unknown key 'x'"):
        layered(Layer("mine", {"x": 1}), env={})


@pytest.mark.parametrize("with_examples", [False, True])
def test_init_writes_what_validates(tmp_path: Path, with_examples: bool) -> None:
    """And never over what is there, unless it is told to."""
    written = init(tmp_path / "new", with_examples=with_examples)
    assert validate([tmp_path / "new"]) == []
    assert [s.name for s in load(tmp_path / "new").suites] == (["first", "examples"] if with_examples else ["first"])
    written[0].write_text("mine")
    with pytest.raises(AlreadyExists):
        init(tmp_path / "new", with_examples=with_examples)
    assert written[0].read_text() == "mine"
    init(tmp_path / "new", with_examples=with_examples, force=True)
    assert validate([tmp_path / "new"]) == []


def test_python_graders_come_from_the_suite(tmp_path: Path) -> None:
    """A file beside the harness; one that is elsewhere, or has no such function, is refused at its place."""

    def named(function: str) -> str:
        return HARNESS.replace("type: numeric\n    negate: true", f"type: python\n    function: {function}")

    good = {
        "evals/mine.py": "def ok(given): return True\n",
        "data/capitals.yml": DATA.replace("grader: numeric", "tags: []"),
    }
    assert told(tmp_path, **{"evals/capitals.yml": named("mine.py:ok"), **good}) == []
    before = load(tmp_path).suites[0].digests.code
    assert "no function no in mine.py" in told(tmp_path, **{"evals/capitals.yml": named("mine.py:no"), **good})[0]
    (said,) = told(tmp_path, **{"evals/capitals.yml": named("../../mine.py:ok"), **good})
    assert "evals/capitals.yml:18:15: function: ../../mine.py lies outside" in said
    project(
        tmp_path, **{"evals/capitals.yml": named("mine.py:ok"), **good, "evals/mine.py": "def ok(given): return 1\n"}
    )
    assert load(tmp_path).suites[0].digests.code != before


def test_a_schema_may_be_a_file(tmp_path: Path) -> None:
    """In the folder of the harness; not JSON is said there."""
    harness = HARNESS.replace(
        "type: numeric\n    negate: true", "type: json_schema\n    name: numeric\n    schema: s.json"
    )
    assert told(tmp_path, **{"evals/capitals.yml": harness, "evals/s.json": '{"type": "object"}'}) == []
    said = told(tmp_path, **{"evals/capitals.yml": harness, "evals/s.json": "{"})
    assert "s.json: not JSON" in said[0]


TOML = 'name = "s"\ndata = "d.jsonl"\n[model]\ntype = "echo"\n[[graders]]\ntype = "numeric"\ntolerance = 0.5\n'
LINES = '{"id": "1", "input": "x", "expected": "4", "tags": ["a"]}\n{"id": "2", "expected": 4.5}\n'


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["matchspec.yml", "evals/capitals.yml", "data/capitals.yml", "s.toml", "d.jsonl"]),
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 6), st.text("-:{}[]\"'&*!#\n\t ,|>%@`x1.é\x00=", max_size=4)), max_size=4),
)  # fmt: skip
def test_no_damage_to_a_file_brings_anything_but_problems(
    tmp_path: Path, file: str, edits: list[tuple[int, int, str]]
) -> None:
    """Characters replaced at random: it loads, or it says what is wrong, in a place that exists."""
    text = {
        "matchspec.yml": CONFIG,
        "evals/capitals.yml": HARNESS,
        "data/capitals.yml": DATA,
        "s.toml": TOML,
        "d.jsonl": LINES,
    }[file]
    for at, length, new in edits:
        text = text[:at] + new + text[at + length :]
    project(tmp_path, **{"s.toml": TOML, "d.jsonl": LINES, file: text})
    for path in (tmp_path / "matchspec.yml", tmp_path / "s.toml"):
        problems = validate([path])
        for p in problems:
            assert p.line >= 1
            assert p.column >= 1
        if problems:
            with pytest.raises(MistError):
                load(path)
        else:
            load(path)


def test_a_missing_extra_is_one_sentence_with_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML and schemas need packages that the core does not."""
    config = project(tmp_path)
    schema = grader({"type": "json_schema", "schema": {"type": "object"}})
    for name in ("yaml", "jsonschema_rs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidArgument, match=r"needs PyYAML. pip install 'mist-stack\[evals\]'"):
        load(config)
    with pytest.raises(InvalidArgument, match=r"needs jsonschema-rs. pip install 'mist-stack\[evals\]'"):
        schema.check("")
