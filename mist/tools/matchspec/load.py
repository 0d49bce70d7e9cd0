"""The front end: files to checked suites.

    matchspec.yml    `suites`: each with the paths of its harnesses, thresholds, statistics (and its head: settings.py)
    NAME.yml         one suite (`harnesses`), or one harness (`dataset`, `model`, `graders`), which is a suite by itself
    NAME.toml        one suite of recorded answers, or with a `[model]`
    NAME.jsonl       recorded solutions in the shape of GSM8K's
    NAME.py          SUITE, or suite(): a Suite, or a list of them; the file is run
    a folder         its matchspec.yml

Promises: whatever would let a run pass without judging is an error here, with file, line and column, and all that is wrong in a
file is said at once (at most 20). Paths are relative to the file they stand in and do not lead out of `root`,
which is the folder of the file that was named unless the caller or the setting `root` says more. Loading creates nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from mist.config import Layer
from mist.errors import InvalidArgument, MistError, NotFound
from mist.tools.matchspec import gsm8k, toml
from mist.tools.matchspec.data import Rows
from mist.tools.matchspec.positions import Problem, Problems, Table, plain
from mist.tools.matchspec.settings import FILE, MatchSpecSettings, layered
from mist.tools.matchspec.specs.graders import graders_of
from mist.tools.matchspec.specs.harness import gate_of, harness_of, harness_settings
from mist.tools.matchspec.specs.models import answers_by_model, model_of
from mist.tools.matchspec.specs.reading import Reading, yaml_document
from mist.tools.matchspec.specs.samples import complaints, fields_of, rows_of, unknown_graders
from mist.tools.matchspec.suite import Harness, Recorded, Suite, cluster_of, read_text, suite_of

GATE_KEYS = ("thresholds", "statistics", "gate")
HEAD = ("defaults", "output", "statistics", "concurrency", "timeout_seconds", "log_level")
"""Keys of matchspec.yml that are settings."""


class Loaded(Struct, frozen=True, kw_only=True):
    """What a file held. `settings` are those in force for it."""

    suites: list[Suite]
    settings: MatchSpecSettings


def load(
    path: Path,
    *,
    root: Path | None = None,
    layers: Sequence[Layer] = (),
    env: Mapping[str, str] = os.environ,
) -> Loaded:
    """The suites of a file, checked. `layers` are settings that the file's own stand above (mist.toml). Raises NotFound,
    Refused, and InvalidArgument with every problem of the file."""
    problems = Problems()
    found = _load(path, root, layers, env, problems)
    problems.raise_if_any()
    return found


def load_suite(path: Path, *, root: Path | None = None) -> Suite:
    """The one suite of a file. Raises InvalidArgument when it holds more."""
    suites = load(path, root=root).suites
    if len(suites) != 1:
        names = ", ".join(s.name for s in suites)
        raise InvalidArgument(f"{path} holds {len(suites)} suites: {names}", hint="name one")
    return suites[0]


def validate(
    paths: Sequence[Path],
    *,
    root: Path | None = None,
    layers: Sequence[Layer] = (),
    env: Mapping[str, str] = os.environ,
) -> list[Problem]:
    """Everything that is wrong with these files; empty when they can be run. Raises nothing for what they hold."""
    problems = Problems()
    for path in paths:
        try:
            _load(path, root, layers, env, problems)
        except MistError as exc:
            problems.add(_told(str(path), exc))
    return problems.sorted()


def _told(file: str, exc: MistError) -> Problem:
    """An error as a problem. What it says about the place in front of its message stands in the place then."""
    line, column = int(exc.meta.get("line", "1")), int(exc.meta.get("column", "1"))
    message = exc.message
    if "line" not in exc.meta and (found := re.match(re.escape(file) + r":(\d+): ", message)):
        line = int(found[1])
    for prefix in (f"{file}:{line}:{column}: ", f"{file}:{line}: ", f"{file}: "):
        message = message.removeprefix(prefix)
    return Problem(file=file, line=line, column=column, message=message, hint=exc.hint)


def _load(path: Path, root: Path | None, layers: Sequence[Layer], env: Mapping[str, str], problems: Problems) -> Loaded:
    if path.is_dir():
        path = path / FILE
    if not path.exists():
        raise NotFound(f"no file {path}")
    settings = layered(*layers, env=env)
    reading = Reading(root or (Path(settings.root) if settings.root else path.parent), problems, settings)
    match path.suffix:
        case ".yml" | ".yaml":
            return _yaml(path, reading, layers, env)
        case ".toml":
            doc = toml.read(read_text(path), str(path), problems)
            suite = _toml(Table(doc, problems), path, reading) if doc is not None else None
            return Loaded(suites=[suite] if suite else [], settings=settings)
        case ".py":
            return Loaded(suites=_python(path), settings=settings)
    if gsm8k.recognise(path):
        return Loaded(suites=[gsm8k.load(path)], settings=settings)
    raise InvalidArgument(
        f"{path} is neither a suite (.yml, .toml, .py) nor recorded solutions we know",
        hint="write a suite file that names it as its data: docs/how-to/run-an-eval.md",
    )


def _yaml(path: Path, reading: Reading, layers: Sequence[Layer], env: Mapping[str, str]) -> Loaded:
    doc = yaml_document(path, reading.problems)
    if doc is None:
        return Loaded(suites=[], settings=reading.settings)
    table = Table(doc, reading.problems)
    table.version()
    if "suites" in table.value or path.name == FILE:
        return _config(table, path, reading, layers, env)
    if "harnesses" in table.value:
        suite = _suite(table, path, reading)
    else:
        suite = _alone(table, path, reading)
    return Loaded(suites=[suite] if suite else [], settings=reading.settings)


def _config(table: Table, path: Path, reading: Reading, layers: Sequence[Layer], env: Mapping[str, str]) -> Loaded:
    head = {key: plain(table.raw(key)) for key in HEAD if key in table}
    try:
        reading.settings = layered(*layers, Layer(str(path), head), env=env)
    except InvalidArgument as exc:
        key = next((k for k in HEAD if k in exc.message), "")
        table.wrong(exc.message.removeprefix(f"{path}: "), exc.hint, key=key if key in table.value else "")
    suites: list[Suite] = []
    seen: set[str] = set()
    for entry in table.tables("suites", required=True):
        suite = _suite(entry, path, reading)
        if suite is not None:
            if suite.name in seen:
                entry.wrong(f"two suites are called {suite.name!r}", key="name")
            seen.add(suite.name)
            suites.append(suite)
    table.close()
    return Loaded(suites=suites, settings=reading.settings)


def _suite(table: Table, path: Path, reading: Reading) -> Suite | None:
    """A suite of harnesses: paths, or tables."""
    before = reading.problems.seen
    name = table.text("name", required=True)
    harnesses: list[Harness] = []
    for at, item in table.items("harnesses", required=True):
        if isinstance(item, dict):
            found = harness_of(Table(table.doc, reading.problems, at, item), reading, path.parent)
        else:
            found = _harness_file(table, at, item, path, reading)
        if found is not None:
            if found.name in {h.name for h in harnesses}:
                reading.problems.add(table.doc.problem(at, f"two harnesses are called {found.name!r}"))
            harnesses.append(found)
    names = list(dict.fromkeys(g.name for h in harnesses for g in h.graders))
    gate = gate_of(table, reading.settings, names)
    description, tags, seed = table.text("description"), table.texts("tags"), table.integer("seed", None)
    table.close()
    if reading.problems.seen > before:
        return None
    return _checked(
        lambda: suite_of(name, harnesses, where=str(path), gate=gate, description=description, tags=tags, seed=seed),
        table, harnesses, gate.cluster, reading,
    )  # fmt: skip


def _harness_file(
    table: Table, at: tuple[str | int, ...], item: object, path: Path, reading: Reading
) -> Harness | None:
    text = plain(item)
    if not isinstance(text, str):
        reading.problems.add(table.doc.problem(at, "a harness is the path of its file, or a table"))
        return None
    here = Table(table.doc, reading.problems, at[:-1], {at[-1]: item})
    file = reading.path(here, at[-1], text, path.parent)
    if file is None:
        return None
    doc = yaml_document(file, reading.problems)
    if doc is None:
        return None
    inner = Table(doc, reading.problems)
    inner.version()
    return harness_of(inner, reading, file.parent)


def _alone(table: Table, path: Path, reading: Reading) -> Suite | None:
    """A harness as the suite of itself. It may have the suite's keys too."""
    before = reading.problems.seen
    tags, seed = table.texts("tags"), table.integer("seed", None)
    for key in GATE_KEYS:
        table.raw(key)
    harness = harness_of(table, reading, path.parent)
    # what is wrong with the gate is said as well where the harness is wrong; then its graders are not known
    gate = gate_of(table, reading.settings, [] if harness is None else [g.name for g in harness.graders])
    if harness is None or reading.problems.seen > before:
        return None
    return _checked(
        lambda: suite_of(
            harness.name, [harness], where=str(path), gate=gate, description=harness.description, tags=tags, seed=seed
        ),
        table, [harness], gate.cluster, reading,
    )  # fmt: skip


def _toml(table: Table, path: Path, reading: Reading) -> Suite | None:
    """Samples and the recorded answers of one or more models, one harness each; or a `[model]`."""
    before = reading.problems.seen
    name = table.text("name")
    if not name:
        table.wrong("the suite has no name", key="name" if "name" in table.value else "")
    fields = fields_of(table)
    limit = table.integer("samples_max", None, low=0)
    data = table.text("data", required=True)
    file = reading.path(table, "data", data, path.parent) if data else None
    rows = rows_of(file, table, "data", fields, limit) if file is not None else None
    graders = graders_of(table, reading, path.parent)
    if not graders and not table.value.get("graders"):
        table.wrong(
            "the suite has no graders, nothing would be judged", key="graders" if "graders" in table.value else ""
        )
    inner = table.table("model")
    model, timeout = model_of(inner, reading, path.parent) if inner is not None else (None, 0.0)
    settings = harness_settings(table, reading.settings, timeout)
    gate = gate_of(table, reading.settings, [g.name for g in graders])
    tags, seed = table.texts("tags"), table.integer("seed", None)
    asked = table.text("answers", required=inner is None)
    table.close()
    if inner is not None and asked:
        table.wrong("answers and model exclude each other: the answers are there, or somebody is asked", key="answers")
    answers_file = reading.path(table, "answers", asked, path.parent) if asked else None
    if rows is None or reading.problems.seen > before:
        return None
    harnesses: list[Harness] = []
    if model is not None:
        harnesses = [Harness(name=name, samples=rows, model=model, graders=graders, **settings)]
    elif answers_file is not None:
        known = [s.id for s in rows] if limit is not None else None
        answers = answers_by_model(answers_file, reading.problems, known=known)
        if not answers and reading.problems.seen == before:
            table.wrong("there are no recorded answers, nothing would be judged", key="answers")
        harnesses = [
            Harness(name=label, samples=rows, model=Recorded(label=label, answers=found), graders=graders, **settings)
            for label, found in answers.items()
        ]
    if reading.problems.seen > before:
        return None
    description = settings["description"]
    return _checked(
        lambda: suite_of(name, harnesses, where=str(path), gate=gate, description=description, tags=tags, seed=seed),
        table, harnesses, gate.cluster, reading,
    )  # fmt: skip


def _checked(
    make: Callable[[], Suite], table: Table, harnesses: Sequence[Harness], cluster: str, reading: Reading
) -> Suite | None:
    """The suite; or, when its checks refuse it, the samples that are to blame, each in its line."""
    before = reading.problems.seen
    try:
        return make()
    except MistError as exc:
        for harness in harnesses:
            if isinstance(harness.samples, Rows):
                _blame(harness.samples, harness, cluster, reading.problems)
        if reading.problems.seen == before:
            key = exc.meta.get("key", "")
            table.wrong(
                exc.message.removeprefix(f"{table.doc.file}: "), exc.hint, key=key if key in table.value else ""
            )
    return None


def _blame(rows: Rows, harness: Harness, cluster: str, problems: Problems) -> None:
    names = [g.name for g in harness.graders]
    seen: dict[str, int] = {}
    file = str(rows.path)
    for line, found in rows.tolerant():
        if problems.full(file):
            return
        if isinstance(found, Problem):
            problems.add(found)
            continue
        said: list[tuple[str, str]] = []
        if found.id in seen:
            said.append((f"sample id {found.id!r} occurs twice", f"it stands in line {seen[found.id]} already"))
        seen.setdefault(found.id, line)
        said.extend(unknown_graders(found, names))
        said.extend(complaints(found, harness.graders, rows.fields.expected))
        if cluster:
            try:
                cluster_of(found, cluster)
            except InvalidArgument as exc:
                said.append((f"sample {found.id}: {exc.message}", exc.hint))
        for message, hint in said:
            problems.add(rows.problem(line, message, hint))


def _python(path: Path) -> list[Suite]:
    from mist.tools.matchspec.graders.python import line_of, module_from

    module = module_from(path)
    found = getattr(module, "SUITE", None)
    if found is None and callable(getattr(module, "suite", None)):
        try:
            found = module.suite()
        except MistError:
            raise
        except Exception as exc:
            line = line_of(exc, path)
            raise InvalidArgument(
                f"{path}:{line}: suite(): {type(exc).__name__}: {exc}", meta={"line": str(line)}
            ) from exc
    many = found if isinstance(found, list | tuple) else [found]
    suites = [s for s in many if isinstance(s, Suite)]
    if not suites or len(suites) < len(many):
        raise InvalidArgument(
            f"{path}: no suite: it must have SUITE, or a function suite(), giving a Suite or a list of them",
            hint="make one with mist.tools.matchspec.suite.suite_of",
        )
    for suite in suites:
        if not suite.digest:
            raise InvalidArgument(f"{path}: suite {suite.name} was not checked", hint="make it with suite_of")
    return suites
