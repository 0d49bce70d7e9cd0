"""Grader entries to graders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import fields

from mist.errors import InvalidArgument, MistError
from mist.tools.matchspec.graders import Python as PythonGrader
from mist.tools.matchspec.graders import grader, grader_class, kind_of
from mist.tools.matchspec.grading import Grader
from mist.tools.matchspec.positions import Scalar, Table, nearest, plain
from mist.tools.matchspec.specs.reading import Reading

_MSGSPEC_PATH = re.compile(r" - at `\$((?:\.\w+|\[\d+\])+)`$")


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
