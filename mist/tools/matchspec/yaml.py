"""YAML for suites, harnesses and data sets: safe, small, and without surprises. Bytes to a Document.

What differs from YAML 1.1 as most libraries read it, on purpose:
- only `true` and `false` (also True, TRUE …) are booleans: `no`, `yes`, `on`, `off` are texts;
- where a text is wanted, an unquoted value is the text as it was written: `1.0` stays `1.0`, `007` stays `007`,
  `2024-01-01` stays that; only where a number is wanted is it one. Dates are always texts, and so are `.inf` and `.nan`;
- a key that occurs twice in a table is refused; so are tags (`!!…`) but for `!!str`, and more than one document;
- aliases are followed to at most NODES_MAX values in all, nesting to DEPTH_MAX; `<<` is a key like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mist.errors import InvalidArgument
from mist.tools.matchspec.positions import Document, Path, Place, Problems, Scalar, problem_at

NODES_MAX = 200_000
DEPTH_MAX = 50
FILE_BYTES_MAX = 10 * 1024 * 1024
"""Data larger than this belong into JSON lines, which are read line by line."""
INSTALL = "pip install 'mist-stack[evals]'"

_STR = "tag:yaml.org,2002:str"
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


class _Wrong(Exception):
    def __init__(self, event: Any, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.place = _place(event)
        self.hint = hint


def read(text: str, file: str, problems: Problems) -> Document | None:
    """The document; None when it cannot be read, and the problems say why and where."""
    try:
        import yaml
    except ImportError as exc:
        raise InvalidArgument(f"{file}: YAML needs PyYAML", hint=INSTALL) from exc
    lines = text.splitlines()
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    try:
        return _Reader(yaml, iter(yaml.parse(text, Loader=loader)), file, lines).document()
    except _Wrong as exc:
        problems.add(problem_at(file, lines, exc.place, str(exc), exc.hint))
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        place = Place(mark.line + 1, mark.column + 1) if mark is not None else Place()
        what = ", ".join(part for part in (exc.context, exc.problem) if part)
        problems.add(problem_at(file, lines, place, f"not YAML: {what}"))
    except yaml.YAMLError as exc:
        problems.add(problem_at(file, lines, Place(), f"not YAML: {str(exc).splitlines()[0]}"))
    return None


def _place(event: Any) -> Place:
    return Place(event.start_mark.line + 1, event.start_mark.column + 1)


class _Reader:
    def __init__(self, yaml: Any, events: Iterator[Any], file: str, lines: list[str]) -> None:
        self.yaml = yaml
        self.events = events
        self.file = file
        self.lines = lines
        self.keys: dict[Path, Place] = {}
        self.values: dict[Path, Place] = {}
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.nodes = 0

    def document(self) -> Document:
        value = None
        documents = 0
        for event in self.events:
            if isinstance(event, self.yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _Wrong(event, "a second document in one file")
                value = self.node(next(self.events), (), 0)
        return Document(file=self.file, lines=self.lines, value=value, keys=self.keys, values=self.values)

    def node(self, event: Any, path: Path, depth: int) -> Any:
        self.values[path] = _place(event)
        if isinstance(event, self.yaml.AliasEvent):
            found = self.anchors.get(event.anchor)
            if found is None:
                raise _Wrong(event, f"*{event.anchor} stands before its anchor, or inside it")
            self.count(event, found[1])
            return found[0]
        before = self.nodes
        self.count(event, 1)
        if depth > DEPTH_MAX:
            raise _Wrong(event, f"nested deeper than {DEPTH_MAX}")
        if isinstance(event, self.yaml.ScalarEvent):
            value = self.scalar(event)
        else:
            if event.tag is not None:
                raise _Wrong(event, f"the tag {event.tag} is not taken", "write the value without it")
            value = (
                self.mapping(path, depth) if isinstance(event, self.yaml.MappingStartEvent) else self.list(path, depth)
            )
        if event.anchor:
            self.anchors[event.anchor] = (value, self.nodes - before)
        return value

    def count(self, event: Any, nodes: int) -> None:
        self.nodes += nodes
        if self.nodes > NODES_MAX:
            raise _Wrong(event, f"more than {NODES_MAX} values, aliases followed", "put large data into JSON lines")

    def mapping(self, path: Path, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for event in self.events:
            if isinstance(event, self.yaml.MappingEndEvent):
                break
            if not isinstance(event, self.yaml.ScalarEvent):
                raise _Wrong(event, "a key must be a text")
            key = event.value
            if key in out:
                first = self.keys[(*path, key)].line
                raise _Wrong(event, f"the key {key[:60]!r} occurs twice", f"it stands in line {first} already")
            self.keys[(*path, key)] = _place(event)
            out[key] = self.node(next(self.events), (*path, key), depth + 1)
        return out

    def list(self, path: Path, depth: int) -> list[Any]:
        out: list[Any] = []
        for event in self.events:
            if isinstance(event, self.yaml.SequenceEndEvent):
                break
            out.append(self.node(event, (*path, len(out)), depth + 1))
        return out

    def scalar(self, event: Any) -> Any:
        text: str = event.value
        if event.tag not in (None, _STR):
            raise _Wrong(event, f"the tag {event.tag} is not taken", "write the value without it")
        if event.tag == _STR or not event.implicit[0]:
            return text
        if text in _WORDS:
            return Scalar(_WORDS[text], text)
        if _INT.fullmatch(text):
            return Scalar(int(text), text)
        if _FLOAT.fullmatch(text):
            return Scalar(float(text), text)
        return text
