"""TOML suite files as Documents. `tomllib` reads them and says where they are no TOML; the places of their keys are looked up
in the text: exact for keys at the beginning of a line, the line of the table or key they belong to for others."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from mist.tools.matchspec.positions import Document, Path, Place, Problems, problem_at

_TABLE = re.compile(r"[ \t]*(\[\[?)[ \t]*([\w.\-\"' ]+?)[ \t]*\]\]?[ \t]*(?:#.*)?$")
_KEY = re.compile(r"[ \t]*([\w\-]+|\"[^\"]*\"|'[^']*')[ \t]*=[ \t]*")
_AT = re.compile(r"\(at line (\d+), column (\d+)\)")


def read(text: str, file: str, problems: Problems) -> Document | None:
    """The document; None when it cannot be read, and the problems say why and where."""
    lines = text.split("\n")  # as tomllib counts them
    try:
        value: Any = tomllib.loads(text)
    except (RecursionError, ValueError) as exc:  # TOMLDecodeError is one
        at = _AT.search(str(exc))
        place = Place(int(at[1]), int(at[2])) if at else Place(len(lines) or 1, 1)
        problems.add(problem_at(file, lines, place, f"not TOML: {_AT.sub('', str(exc)).strip()}"))
        return None
    keys, values = _places(lines)
    return Document(file=file, lines=lines, value=value, keys=keys, values=values)


def _places(lines: list[str]) -> tuple[dict[Path, Place], dict[Path, Place]]:
    keys: dict[Path, Place] = {}
    values: dict[Path, Place] = {(): Place()}
    table: Path = ()
    counts: dict[Path, int] = {}
    quotes = ""
    for number, line in enumerate(lines, 1):
        if quotes:  # inside a text of several lines
            if quotes in line:
                quotes = ""
            continue
        found = _TABLE.match(line)
        if found:
            name = tuple(part.strip().strip("\"'") for part in found[2].split("."))
            if found[1] == "[[":
                counts[name] = counts.get(name, -1) + 1
            table = _numbered(name, counts)
            values[table] = keys[table] = Place(number, line.index("[") + 1)
            continue
        found = _KEY.match(line)
        if found:
            path = (*table, found[1].strip("\"'"))
            keys.setdefault(path, Place(number, found.start(1) + 1))
            values.setdefault(path, Place(number, found.end() + 1))
            rest = line[found.end() :]
            for three in ('"""', "'''"):
                if rest.startswith(three) and three not in rest[3:]:
                    quotes = three
    return keys, values


def _numbered(name: tuple[str, ...], counts: dict[Path, int]) -> Path:
    """The path of a table's header: names of arrays of tables are followed by the number of the last one."""
    path: Path = ()
    for i in range(1, len(name) + 1):
        path = (*path, name[i - 1])
        if name[:i] in counts:
            path = (*path, counts[name[:i]])
    return path
