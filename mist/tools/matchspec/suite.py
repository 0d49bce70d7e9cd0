"""A suite: samples, the recorded answers of one or more models, and the graders that judge them.

A suite file is TOML; its data are JSON lines beside it. Everything is checked before anything runs: unknown keys,
unknown graders, empty expectations, doubled ids, no samples, no answers are errors, never a pass.

    name = "capitals"
    data = "capitals.jsonl"          # {"id": "1", "input": "…", "expected": "…", "grader": "…"?} per line
    answers = "answers.jsonl"        # {"id": "1", "model": "m", "output": "…"} per line
    [fields]                         # where the data file calls them otherwise
    input = "question"
    expected = "answer"
    [[graders]]                      # all must pass, unless the sample names its own
    type = "numeric"
    marker = "A:"
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from mist.errors import InvalidArgument, NotFound, Refused
from mist.tools.matchspec.graders import Grader, describe, grader

LINE_BYTES_MAX = 10 * 1024 * 1024


class Sample(Struct, frozen=True):
    """`graders` are the names of those that judge it; empty = all of the suite."""

    id: str
    input: str
    expected: str
    graders: tuple[str, ...] = ()


class Suite(Struct, frozen=True, kw_only=True):
    """`answers[model][sample id]` is the recorded output; a missing one is an error result, never a pass."""

    name: str
    samples: list[Sample]
    models: list[str]
    answers: dict[str, dict[str, str]]
    graders: list[Grader]
    digest: str

    @property
    def total(self) -> int:
        return len(self.samples) * len(self.models)

    def graders_of(self, sample: Sample) -> list[Grader]:
        if not sample.graders:
            return self.graders
        return [g for g in self.graders if g.name in sample.graders]


class _Fields(Struct, frozen=True, forbid_unknown_fields=True):
    id: str = "id"
    input: str = "input"
    expected: str = "expected"
    grader: str = "grader"


class _File(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    data: str
    answers: str
    graders: list[dict[str, Any]]
    fields: _Fields = _Fields()
    samples_max: int | None = None


class _Answer(Struct, frozen=True):
    id: str | int
    model: str
    output: str


def suite_of(
    name: str, samples: list[Sample], answers: dict[str, dict[str, str]], graders: list[Grader], *, where: str
) -> Suite:
    """A checked suite. Raises InvalidArgument for whatever would let a run pass without having judged anything."""
    if not name:
        raise InvalidArgument(f"{where}: the suite has no name")
    if not graders:
        raise InvalidArgument(f"{where}: the suite has no graders, nothing would be judged")
    if not samples:
        raise InvalidArgument(f"{where}: the suite has no samples, nothing would be judged")
    if not answers:
        raise InvalidArgument(f"{where}: there are no recorded answers, nothing would be judged")
    names = [g.name for g in graders]
    if len(set(names)) != len(names):
        raise InvalidArgument(f"{where}: two graders are called the same", hint="give them a `name`")
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise InvalidArgument(f"{where}: sample id {sample.id!r} occurs twice")
        seen.add(sample.id)
        for wanted in sample.graders:
            if wanted not in names:
                raise InvalidArgument(
                    f"{where}: sample {sample.id} asks for the grader {wanted!r}, which the suite does not have",
                    hint=f"it has {', '.join(names)}",
                )
        for g in graders:
            if not sample.graders or g.name in sample.graders:
                try:
                    g.check(sample.expected)
                except InvalidArgument as exc:
                    raise InvalidArgument(f"{where}: sample {sample.id}: {exc.message}", hint=exc.hint) from exc
    for model, outputs in answers.items():
        strange = set(outputs) - seen
        if strange:
            raise InvalidArgument(
                f"{where}: {len(strange)} answers of {model} belong to no sample, for example {min(strange)!r}"
            )
    models = list(answers)
    digest = _digest(name, samples, models, answers, graders)
    return Suite(name=name, samples=samples, models=models, answers=answers, graders=graders, digest=digest)


def _digest(
    name: str, samples: list[Sample], models: list[str], answers: dict[str, dict[str, str]], graders: list[Grader]
) -> str:
    """SHA-256 over all that decides a run: change a word anywhere and it is another suite."""
    parts = [name, samples, models, [answers[m] for m in models], [describe(g) for g in graders]]
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()


def load(path: Path) -> Suite:
    """The suite in a TOML file. Raises NotFound, Refused, InvalidArgument with the place."""
    try:
        config = msgspec.convert(tomllib.loads(read_text(path)), _File)
    except tomllib.TOMLDecodeError as exc:
        raise InvalidArgument(f"{path}: not TOML: {exc}") from exc
    except msgspec.ValidationError as exc:
        raise InvalidArgument(f"{path}: {exc}", hint="docs/reference/matchspec.md lists the keys") from exc
    graders = [grader(spec, f"{path}: graders[{i}]") for i, spec in enumerate(config.graders)]
    samples: list[Sample] = []
    for number, row in json_lines(path.parent / config.data):
        if config.samples_max is not None and len(samples) >= config.samples_max:
            break
        samples.append(_sample(row, config.fields, f"{config.data}:{number}", number))
    known = {s.id for s in samples}
    answers: dict[str, dict[str, str]] = {}
    for number, row in json_lines(path.parent / config.answers):
        where = f"{config.answers}:{number}"
        try:
            answer = msgspec.convert(row, _Answer)
        except msgspec.ValidationError as exc:
            raise InvalidArgument(f"{where}: {exc}", hint='{"id": …, "model": …, "output": …}') from exc
        id = str(answer.id)
        if config.samples_max is not None and id not in known:
            continue  # an answer to a sample that was left out on purpose
        if answers.setdefault(answer.model, {}).setdefault(id, answer.output) is not answer.output:
            raise InvalidArgument(f"{where}: a second answer of {answer.model} to sample {id!r}")
    return suite_of(config.name, samples, answers, graders, where=str(path))


def _sample(row: dict[str, Any], fields: _Fields, where: str, number: int) -> Sample:
    expected = row.get(fields.expected)
    if not isinstance(expected, str | int | float) or isinstance(expected, bool):
        raise InvalidArgument(f"{where}: no text or number under {fields.expected!r}")
    asked = row.get(fields.grader, [])
    names = [asked] if isinstance(asked, str) else asked
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise InvalidArgument(f"{where}: {fields.grader!r} is not the name of a grader, or a list of names")
    return Sample(str(row.get(fields.id, number)), str(row.get(fields.input, "")), str(expected), tuple(names))


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON-lines file. Raises InvalidArgument naming the line."""
    for number, line in lines(path):
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise InvalidArgument(f"{path}:{number}: not JSON: {exc}") from exc
        if not isinstance(row, dict):
            raise InvalidArgument(f"{path}:{number}: not a JSON object")
        yield number, row


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of the lines that are not empty."""
    try:
        with path.open("rb") as f:
            for number, line in enumerate(iter(lambda: f.readline(LINE_BYTES_MAX + 1), b""), 1):
                if len(line) > LINE_BYTES_MAX:
                    raise InvalidArgument(f"{path}:{number}: longer than {LINE_BYTES_MAX} bytes")
                if line.strip():
                    yield number, line
    except FileNotFoundError as exc:
        raise NotFound(f"no file {path}") from exc
    except OSError as exc:
        raise Refused(f"{path}: {exc.strerror or exc}") from exc


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as exc:
        raise NotFound(f"no file {path}") from exc
    except UnicodeDecodeError as exc:
        raise InvalidArgument(f"{path}: not UTF-8 text") from exc
    except OSError as exc:
        raise Refused(f"{path}: {exc.strerror or exc}") from exc
