"""Model entries to who answers, and files of recorded answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from mist.tools.matchspec.positions import Problem, Problems, Table, nearest, plain
from mist.tools.matchspec.specs.reading import Reading
from mist.tools.matchspec.suite import Command, Echo, Http, Infer, ModelSpec, Noop, Python, Recorded, lines

MODELS = ("recorded", "infer", "http", "command", "python", "echo", "noop")


def model_of(table: Table, reading: Reading, folder: Path) -> tuple[ModelSpec | None, float]:
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
                params=mapping(table, "params"),
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


def mapping(table: Table, key: str) -> dict[str, Any]:
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
