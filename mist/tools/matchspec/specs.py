"""From the tables of a suite's files to its shapes: graders, models, samples, harnesses, gates. Notes problems, raises none."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import fields

from mist.errors import InvalidArgument, MistError
from mist.tools.matchspec.data import SUFFIXES, Fields, Rows
from mist.tools.matchspec.graders import Python as PythonGrader
from mist.tools.matchspec.graders import grader, grader_class, kind_of
from mist.tools.matchspec.grading import Grader
from mist.tools.matchspec.positions import Document, Problem, Problems, Scalar, Table, as_text, nearest, plain
from mist.tools.matchspec.reducers import reducer
from mist.tools.matchspec.settings import MatchSpecSettings
from mist.tools.matchspec.suite import (
    CONCURRENCY_MAX,
    EPOCHS_MAX,
    Command,
    Echo,
    Gate,
    Harness,
    Http,
    Infer,
    ModelSpec,
    Noop,
    Python,
    Recorded,
    Sample,
    Samples,
    lines,
)

MODELS = ("recorded", "infer", "http", "command", "python", "echo", "noop")
_MSGSPEC_PATH = re.compile(r" - at `\$((?:\.\w+|\[\d+\])+)`$")


class Reading:
    """What is being read: `root` is the folder that no path in the files may leave."""

    def __init__(self, root: Path, problems: Problems, settings: MatchSpecSettings) -> None:
        self.root = root.resolve()
        self.problems = problems
        self.settings = settings

    def path(self, table: Table, key: str | int, text: str, folder: Path) -> Path | None:
        """The file that a text names, relative to the folder of the file it stands in."""
        found = folder / text
        resolved = found.resolve()
        short = Path(os.path.normpath(found))
        label = "" if isinstance(key, int) else f"{key}: "
        if not resolved.is_relative_to(self.root):
            table.wrong(
                f"{label}{text} lies outside of {self.root}",
                "files of a suite lie in the folder of the file that is run, or below",
                key=key,
            )
        elif not resolved.is_file():
            table.wrong(f"{label}no file {text}", _nearest_file(resolved), key=key, missing=True)
        else:
            return short if short.resolve() == resolved else found
        return None


def _nearest_file(path: Path) -> str:
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.is_file())
    except OSError:
        return f"there is no folder {path.parent.name}"
    return nearest(path.name, names) if names else ""


def grader_of(table: Table, reading: Reading, folder: Path) -> Grader | None:
    """One grader entry: its settings stand beside `type`, or under `config` as the documents have it."""
    written = {k: v for k, v in table.value.items() if k != "config"}
    where = dict.fromkeys(written, table)
    config = table.table("config")
    if config is not None:
        for key, value in config.value.items():
            if key in written:
                config.wrong(f"{key} stands beside `config` too", key=key, at_key=True)
            written[key], where[key] = value, config
    if "type" not in table:
        table.wrong("type is missing", "it names the grader")
        return None
    try:
        kind = kind_of(plain(written["type"]))
    except InvalidArgument as exc:
        table.wrong(exc.message.removeprefix("grader: "), exc.hint, key="type")
        return None
    known = {f.encode_name: f.type for f in fields(grader_class(kind))}
    spec: dict[str, Any] = {"type": kind}
    wrong = False
    for key, value in written.items():
        if key == "type":
            continue
        if key not in known:
            where[key].wrong(
                f"unknown key {key[:60]!r} of the grader {kind}", nearest(key, known), key=key, at_key=True
            )
            wrong = True
        elif plain(value) is not None or key == "value":
            spec[key] = _as_wanted(value, known[key])
    if kind == "json_schema" and isinstance(spec.get("schema"), str):
        file = reading.path(where["schema"], "schema", spec["schema"], folder)
        if file is None:
            return None
        spec["schema"] = _json_file(file, where["schema"])
    if wrong:
        return None
    try:
        made = grader(spec)
    except InvalidArgument as exc:
        message = exc.message.removeprefix(f"grader ({kind}): ")
        at = _MSGSPEC_PATH.search(message)
        key = re.split(r"[.\[]", at[1])[1] if at else next((k for k in spec if k != "type" and k in exc.message), "")
        if key not in where:
            table.wrong(message, exc.hint)
        else:
            boolean = (
                "" if str(plain(written[key])).lower() not in ("yes", "no", "on", "off") else "write true or false"
            )
            where[key].wrong(_MSGSPEC_PATH.sub("", message), exc.hint or boolean, key=key)
        return None
    if isinstance(made, PythonGrader):
        target = made.function.rpartition(":")[0]
        if target.endswith(".py") and reading.path(where["function"], "function", target, folder) is None:
            return None
        made.within(folder)
        try:
            _ = made.call, made.code
        except MistError as exc:
            where["function"].wrong(exc.message, exc.hint, key="function")
            return None
    return made


def _as_wanted(value: Any, wanted: Any) -> Any:
    """What a field is given: where it holds texts, an unquoted value is the text as it was written."""
    if isinstance(value, Scalar) and wanted is str:
        return value.text
    if isinstance(value, list) and wanted == tuple[str, ...]:
        return [v.text if isinstance(v, Scalar) else v for v in value]
    return plain(value)


def _json_file(path: Path, table: Table) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as exc:
        table.wrong(f"{path.name}: not JSON: {exc}", key="schema")
        return {}


def graders_of(table: Table, reading: Reading, folder: Path) -> tuple[Grader, ...]:
    """All of a harness: names differ, and all have a weight or none has."""
    entries = table.tables("graders", required=True)
    made = [(entry, grader_of(entry, reading, folder)) for entry in entries]
    seen: set[str] = set()
    for entry, g in made:
        if g is not None and g.name in seen:
            entry.wrong(
                f"two graders are called {g.name!r}", "give them a `name`", key="name" if "name" in entry else ""
            )
        if g is not None:
            seen.add(g.name)
    good = [g for _, g in made if g is not None]
    unweighted = [entry for entry, g in made if g is not None and g.weight is None]
    if unweighted and len(unweighted) < len(good):
        unweighted[0].wrong("no weight, but others have one", "all graders of a harness have a weight, or none has")
    return tuple(good)


def model_of(table: Table, reading: Reading, folder: Path, samples: Samples | None) -> tuple[ModelSpec | None, float]:
    """The model, and the timeout it states for itself (0 = none)."""
    label = table.text("label")
    kind = table.one_of("type", MODELS, "") if "type" in table else table.text("type", required=True)
    timeout = 0.0
    model: ModelSpec | None = None
    match kind:
        case "recorded":
            label = table.text("label", required=True)
            answers = None
            file = table.text("answers")
            if file:
                found = reading.path(table, "answers", file, folder)
                answers = answers_of(found, table, label) if found is not None else {}
            model = Recorded(label=label, answers=answers)
        case "infer":
            model = Infer(
                model=table.text("model", "auto"),
                provider=table.text("provider"),
                params=_mapping(table, "params"),
                url=table.text("url"),
                label=label,
            )
        case "http":
            model = Http(
                endpoint=table.text("endpoint", required=True),
                method=table.text("method", "POST"),
                headers=_texts_of(table, "headers"),
                request_template=table.any("request_template"),
                response_path=table.text("response_path"),
                api_key_env=table.text("api_key_env"),
                label=label,
            )
        case "command":
            timeout = table.number("timeout_seconds", 0.0, above=0)
            command = table.texts("command")
            if not command:
                table.wrong("command is missing or empty", "write the program and its arguments as a list")
            via: Literal["stdin", "arg", "env"] = table.one_of("input_via", ("stdin", "arg", "env"), "stdin")
            model = Command(command=command, input_via=via, label=label)
        case "python":
            model = Python(target=table.text("target", required=True), label=label)
        case "echo":
            model = Echo(label=label or "echo")
        case "noop":
            model = Noop(label=label or "noop")
    if kind in MODELS:
        table.close()
    return model, timeout


def _mapping(table: Table, key: str) -> dict[str, Any]:
    inner = table.table(key)
    return plain(inner.value) if inner is not None else {}


def _texts_of(table: Table, key: str) -> dict[str, str]:
    inner = table.table(key)
    return {k: inner.text(k) for k in inner.value} if inner is not None else {}


class _Answer(msgspec.Struct, frozen=True):
    id: str | int
    output: str
    model: str = ""


def answers_by_model(
    path: Path, problems: Problems, *, known: Sequence[str] | None = None, named: bool = True
) -> dict[str, dict[str, str]]:
    """Lines `{"id", "model", "output"}`; without `named` the model may be left out. `known`: sample ids; answers to others
    are left out."""
    wanted = set(known) if known is not None else None
    answers: dict[str, dict[str, str]] = {}
    file = str(path)
    for number, line in lines(path):
        wrong = ""
        try:
            answer = msgspec.json.decode(line, type=_Answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            wrong = f'not a line {{"id": …, "model": …, "output": …}}: {exc}'
        else:
            id = str(answer.id)
            if wanted is not None and id not in wanted:
                continue
            if answers.setdefault(answer.model, {}).setdefault(id, answer.output) is not answer.output:
                wrong = f"a second answer of {answer.model} to sample {id!r}"
            elif named and not answer.model:
                wrong = "the answer names no `model`"
        if wrong:
            problems.add(
                Problem(file=file, line=number, column=1, message=wrong, source=line.decode("utf-8", "replace"))
            )
            if problems.full(file):
                break
    return answers


def answers_of(path: Path, table: Table, label: str) -> dict[str, str]:
    """The answers of one model: those under its label, or those without a model."""
    found = answers_by_model(path, table.problems, named=False)
    if label not in found and "" not in found and found:
        table.wrong(f"no answers of {label!r} in {path.name}", nearest(label, found), key="label")
    return found.get(label, found.get("", {}))


def samples_of(
    table: Table, key: str, reading: Reading, folder: Path
) -> tuple[Samples | None, Document | None, tuple[Any, ...]]:
    """The samples under `key`: a path, or a data set written there. With them, where they are in memory, the document they
    stand in and the path of the list."""
    value = table.raw(key, required=True)
    if value is None:
        return None, None, ()
    if isinstance(value, dict):
        inner = Table(table.doc, reading.problems, (*table.path, key), value)
        return examples_of(inner), table.doc, (*inner.path, "examples")
    text = table.text(key)
    path = reading.path(table, key, text, folder) if text else None
    if path is None:
        return None, None, ()
    if path.suffix in SUFFIXES:
        return rows_of(path, table, key), None, ()
    if path.suffix not in (".yml", ".yaml"):
        table.wrong(f"{key}: {text} is no data set", "they are .yml, .yaml, .jsonl, .ndjson or .csv", key=key)
        return None, None, ()
    doc = yaml_document(path, reading.problems)
    if doc is None:
        return None, None, ()
    file = Table(doc, reading.problems)
    file.version()
    return examples_of(file), doc, ("examples",)


def rows_of(path: Path, table: Table, key: str, fields: Fields | None = None, limit: int | None = None) -> Rows | None:
    """The data file that stands under a key."""
    try:
        rows = Rows(path, fields=fields, limit=limit)
    except MistError as exc:
        table.wrong(exc.message, exc.hint, key=key)
        return None
    if not len(rows):
        table.wrong(f"{path.name} has no samples, nothing would be judged", key=key)
    return rows


def yaml_document(path: Path, problems: Problems) -> Document | None:
    from mist.tools.matchspec import yaml
    from mist.tools.matchspec.suite import read_text

    if path.stat().st_size > yaml.FILE_BYTES_MAX:
        raise InvalidArgument(
            f"{path}: larger than {yaml.FILE_BYTES_MAX} bytes",
            hint="put large data into JSON lines: they are read line by line",
        )
    return yaml.read(read_text(path), str(path), problems)


def examples_of(table: Table) -> list[Sample]:
    """A data set in YAML: `name`, `description`, `examples` with id, input, expected, metadata, tags, grader, output."""
    table.text("name", required=True)
    table.text("description")
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for entry in table.tables("examples", required=True):
        id = entry.text("id", required=True)
        if id and id in seen:
            entry.wrong(f"the id {id!r} occurs twice", f"it stands in line {seen[id]} already", key="id")
        seen.setdefault(id, entry.doc.place((*entry.path, "id")).line)
        output = entry.raw("output")
        samples.append(
            Sample(
                id=id,
                input=_anything(entry, "input"),
                expected=_anything(entry, "expected"),
                graders=entry.texts("grader"),
                tags=entry.texts("tags"),
                metadata=_mapping(entry, "metadata"),
                output=None if output is None else entry.text("output"),
            )
        )
        if "input" not in entry.value:
            entry.wrong("input is missing", at_key=True)
        entry.close()
    table.close()
    return samples


def _anything(table: Table, key: str) -> str:
    """A text; a list or a table is its JSON."""
    found = table.raw(key)
    if isinstance(found, list | dict):
        return msgspec.json.encode(plain(found)).decode()
    return as_text(found) or ""


def check_samples(
    samples: list[Sample], graders: Sequence[Grader], doc: Document, at: tuple[Any, ...], problems: Problems
) -> None:
    """Every example against the graders that will judge it, each problem at its place."""
    names = [g.name for g in graders]
    for i, sample in enumerate(samples):
        path = (*at, i)
        for message, hint in unknown_graders(sample, names):
            problems.add(doc.problem((*path, "grader"), message, hint))
        for message, hint in complaints(sample, graders, "expected"):
            problems.add(doc.problem((*path, "expected"), message, hint))


def unknown_graders(sample: Sample, names: Sequence[str]) -> list[tuple[str, str]]:
    return [
        (f"sample {sample.id} asks for the grader {wanted!r}, which the suite does not have", nearest(wanted, names))
        for wanted in sample.graders
        if wanted not in names
    ]


def complaints(sample: Sample, graders: Sequence[Grader], key: str) -> list[tuple[str, str]]:
    """Why this sample's expectation cannot be graded fairly."""
    judging = [g for g in graders if not sample.graders or g.name in sample.graders]
    if not sample.expected.strip():
        reading = [g.name for g in judging if getattr(g, "reads_expected", True)]
        if reading:
            return [
                (f"sample {sample.id}: no text or number under {key!r}", f"the grader {reading[0]} compares with it")
            ]
    found = []
    for g in judging:
        try:
            g.check(sample.expected)
        except InvalidArgument as exc:
            found.append((f"sample {sample.id}: {exc.message}", exc.hint))
    return found


def harness_settings(table: Table, settings: MatchSpecSettings, model_timeout: float = 0.0) -> dict[str, Any]:
    """How it is run, as arguments of Harness."""
    d = settings.defaults
    concurrency = table.integer("concurrency", d.concurrency, low=1, high=CONCURRENCY_MAX)
    timeout = table.number("timeout_seconds", model_timeout or d.timeout_seconds, above=0)
    epochs, reduce = table.integer("epochs", 1, low=1, high=EPOCHS_MAX), table.text("reducer", "mean")
    try:
        reducer(reduce, epochs)
    except InvalidArgument as exc:
        table.wrong(exc.message, exc.hint, key="reducer")
    return {
        "description": table.text("description"),
        "system": table.text("system"),
        "template": table.text("template"),
        "concurrency": settings.concurrency or concurrency,
        "timeout_s": settings.timeout_seconds or timeout,
        "retries": table.integer("retries", d.retries, low=0, high=1000),
        "retry_delay_s": table.number("retry_delay_ms", d.retry_delay_ms, low=0) / 1000,
        "epochs": epochs,
        "reducer": reduce,
        "pass_score": table.number("pass_score", None, above=0, high=1),
    }


def harness_of(table: Table, reading: Reading, folder: Path) -> Harness | None:
    """A harness file, or a harness written into a suite. None when something was wrong with it."""
    before = reading.problems.seen
    name = table.text("name", required=True)
    samples, doc, at = samples_of(table, "dataset", reading, folder)
    graders = graders_of(table, reading, folder)
    inner = table.table("model")
    if inner is None:
        table.wrong("model is missing", "it says who answers: model: {type: echo}", at_key=True)
    model, timeout = model_of(inner, reading, folder, samples) if inner is not None else (None, 0.0)
    settings = harness_settings(table, reading.settings, timeout)
    table.close()
    if doc is not None and isinstance(samples, list):
        check_samples(samples, graders, doc, at, reading.problems)
    if samples is None or model is None or reading.problems.seen > before:
        return None
    return Harness(name=name, samples=samples, model=model, graders=graders, **settings)


def gate_of(table: Table, settings: MatchSpecSettings, graders: Sequence[str]) -> Gate:
    """`thresholds`, `statistics` and `gate` of a suite."""
    s = settings.statistics
    said: dict[str, Any] = {
        "confidence": s.confidence_level,
        "use_lower_bound": s.use_lower_bound,
        "min_sample_size": s.min_sample_size,
        "min_sample_action": s.min_sample_action,
    }
    thresholds = table.table("thresholds")
    if thresholds is not None:
        per: dict[str, float] = {}
        for key in thresholds.value:
            found = thresholds.number(key, None, low=0, high=1)
            if key == "overall":
                said |= {} if found is None else {"overall": found}
            elif graders and key not in graders:
                thresholds.wrong(
                    f"no grader is called {key!r}", nearest(key, ["overall", *graders]), key=key, at_key=True
                )
            elif found is not None:
                per[key] = found
        said["per_grader"] = per
    statistics = table.table("statistics")
    if statistics is not None:
        said["confidence"] = statistics.number("confidence_level", s.confidence_level, above=0, high=1 - 1e-9)
        said["use_lower_bound"] = statistics.boolean("use_lower_bound", s.use_lower_bound)
        said["min_sample_size"] = statistics.integer("min_sample_size", s.min_sample_size, low=0)
        said["min_sample_action"] = statistics.one_of("min_sample_action", ("warn", "fail"), s.min_sample_action)
        statistics.close()
    gate = table.table("gate")
    if gate is not None:
        said["metric"] = gate.one_of("metric", ("pass_rate", "mean_score"), "pass_rate")
        said["on_error"] = gate.one_of("on_error", ("fail", "exclude"), "fail")
        said["errors_max_share"] = gate.number("errors_max_share", 0.05, low=0, high=1)
        said["cost_usd_max"] = gate.number("cost_usd_max", None, low=0)
        said["latency_ms_max"] = gate.number("latency_ms_max", None, low=0)
        gate.close()
    return Gate(**said)


def fields_of(table: Table) -> Fields:
    """`[fields]`: what a data file calls them."""
    inner = table.table("fields")
    if inner is None:
        return Fields()
    found = {name: inner.text(name, name) for name in Fields.__struct_fields__}
    inner.close()
    return Fields(**found)
