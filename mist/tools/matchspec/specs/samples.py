"""Data sets: where they lie, what stands in them, and whether the graders can judge it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mist.errors import InvalidArgument, MistError
from mist.tools.matchspec.data import SUFFIXES, Fields, Rows
from mist.tools.matchspec.grading import Grader
from mist.tools.matchspec.positions import Document, Problems, Table, as_text, nearest, plain
from mist.tools.matchspec.specs.models import mapping
from mist.tools.matchspec.specs.reading import Reading, yaml_document
from mist.tools.matchspec.suite import Sample, Samples


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
                metadata=mapping(entry, "metadata"),
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


def fields_of(table: Table) -> Fields:
    """`[fields]`: what a data file calls them."""
    inner = table.table("fields")
    if inner is None:
        return Fields()
    found = {name: inner.text(name, name) for name in Fields.__struct_fields__}
    inner.close()
    return Fields(**found)
