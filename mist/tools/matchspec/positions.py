"""Where a value stands in its file, and what is wrong there: everything a file gets wrong is said at once.

A `Document` is a file as plain values with the place of each. A `Table` reads one mapping of it: each accessor takes a key,
checks its value, and notes a `Problem` instead of raising, so that the next key is looked at too. `close` then complains about
the keys that nobody asked for. `Problems.raise_if_any` ends it. At most PROBLEMS_MAX are kept of a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar, overload

from msgspec import Struct

from mist.errors import InvalidArgument, NotFound

PROBLEMS_MAX = 20
LINE_CHARS_MAX = 160

Path = tuple[str | int, ...]
T = TypeVar("T", bound=str)


class Place(Struct, frozen=True):
    """Both count from 1; the column counts characters."""

    line: int = 1
    column: int = 1


class Problem(Struct, frozen=True, kw_only=True):
    """`source` is the line it stands in. `missing`: it names a file that is not there."""

    file: str
    line: int
    column: int
    message: str
    hint: str = ""
    source: str = ""
    missing: bool = False

    def __str__(self) -> str:
        text = f"{self.file}:{self.line}:{self.column}: {self.message}"
        if self.hint:
            text += f". {self.hint}"
        source = self.source.rstrip()
        if source.strip() and len(source) <= LINE_CHARS_MAX:
            gap = "".join("\t" if c == "\t" else " " for c in source[: self.column - 1])
            text += f"\n  {source}\n  {gap}^"
        return text


class Scalar(Struct, frozen=True):
    """A value that a file holds unquoted: as what it was understood, and as it was written."""

    value: Any
    text: str


class Document(Struct, frozen=True, kw_only=True):
    """`keys` and `values` have the place of keys and values by their path; what has none stands where its parent stands."""

    file: str
    lines: Sequence[str]
    value: Any
    keys: Mapping[Path, Place] = {}
    values: Mapping[Path, Place] = {}

    def place(self, path: Path, *, key: bool = False) -> Place:
        if key and path in self.keys:
            return self.keys[path]
        for length in range(len(path), -1, -1):
            found = self.values.get(path[:length])
            if found is not None:
                return found
        return Place()

    def problem(self, path: Path, message: str, hint: str = "", *, key: bool = False, missing: bool = False) -> Problem:
        return problem_at(self.file, self.lines, self.place(path, key=key), message, hint, missing=missing)


def problem_at(
    file: str, lines: Sequence[str], place: Place, message: str, hint: str = "", *, missing: bool = False
) -> Problem:
    source = lines[place.line - 1] if 0 < place.line <= len(lines) else ""
    return Problem(
        file=file, line=place.line, column=place.column, message=message, hint=hint, source=source, missing=missing
    )


class Problems:
    """What was found wrong, in the order of files and lines."""

    def __init__(self) -> None:
        self._found: list[Problem] = []
        self.seen = 0
        """Also those that were too many to be kept."""

    def add(self, problem: Problem) -> None:
        self.seen += 1
        if problem not in self._found and sum(p.file == problem.file for p in self._found) < PROBLEMS_MAX:
            self._found.append(problem)

    def full(self, file: str) -> bool:
        return sum(p.file == file for p in self._found) >= PROBLEMS_MAX

    def sorted(self) -> list[Problem]:
        order = list(dict.fromkeys(p.file for p in self._found))
        return sorted(self._found, key=lambda p: (order.index(p.file), p.line, p.column))

    def raise_if_any(self) -> None:
        """Raises InvalidArgument with all of them; NotFound when nothing is wrong but that files are not there."""
        found = self.sorted()
        if found:
            kind = NotFound if all(p.missing for p in found) else InvalidArgument
            raise kind("\n".join(str(p) for p in found), meta={"problems": str(len(found))})


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint: the nearest known word, or all of them."""
    known = list(known)
    near = get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"


def plain(value: Any) -> Any:
    """The value without the memory of how it was written."""
    match value:
        case Scalar():
            return value.value
        case dict():
            return {k: plain(v) for k, v in value.items()}
        case list():
            return [plain(v) for v in value]
    return value


_NAMES = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a table"}


def named(value: Any) -> str:
    value = plain(value)
    return "nothing" if value is None else _NAMES.get(type(value), f"a {type(value).__name__}")


class Table:
    """One mapping of a document. The accessors give the default where the key is absent or wrong."""

    def __init__(self, doc: Document, problems: Problems, path: Path = (), value: Any = None) -> None:
        self.doc = doc
        self.problems = problems
        self.path = path
        found = doc.value if value is None else value
        if not isinstance(found, dict):
            self.wrong(f"{self._where()} is {named(found)}, not a table")
            found = {}
        self.value: dict[str, Any] = found
        self._asked: dict[str, None] = {}

    def _where(self) -> str:
        return _dotted(self.path) or "the file"

    def __contains__(self, key: str) -> bool:
        return plain(self.value.get(key)) is not None

    def wrong(
        self, message: str, hint: str = "", *, key: str | int = "", at_key: bool = False, missing: bool = False
    ) -> None:
        path = (*self.path, key) if key != "" else self.path
        self.problems.add(self.doc.problem(path, message, hint, key=at_key, missing=missing))

    def raw(self, key: str, *, required: bool = False) -> Any:
        """The value as it stands, with its Scalars; None where there is none."""
        self._asked[key] = None
        found = self.value.get(key)
        if plain(found) is None:
            if required and key in self.value:
                self.wrong(f"{key} is empty", key=key)
            elif required:
                self.wrong(f"{key} is missing", key="", at_key=True)
            return None
        return found

    def any(self, key: str, default: Any = None) -> Any:
        found = self.raw(key)
        return default if found is None else plain(found)

    def text(self, key: str, default: str = "", *, required: bool = False) -> str:
        """A text; an unquoted number, date, true or null is the text as it was written."""
        found = self.raw(key, required=required)
        if found is None:
            return default
        text = as_text(found)
        if text is None:
            self.wrong(f"{key} is {named(found)}, not a text", key=key)
            return default
        if required and not text.strip():
            self.wrong(f"{key} is empty", key=key)
        return text

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, or one text."""
        found = self.raw(key)
        if found is None:
            return ()
        if not isinstance(found, list):
            return (self.text(key),)
        out = []
        for i, item in enumerate(found):
            text = as_text(item)
            if text is None or not text:
                self.problems.add(self.doc.problem((*self.path, key, i), f"{key}[{i}] is {named(item)}, not a text"))
            else:
                out.append(text)
        return tuple(out)

    @overload
    def number(self, key: str, default: float, *, low: float = ..., high: float = ..., above: float = ...) -> float: ...
    @overload
    def number(
        self, key: str, default: None, *, low: float = ..., high: float = ..., above: float = ...
    ) -> float | None: ...
    def number(
        self,
        key: str,
        default: float | None,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        above: float = -math.inf,
    ) -> float | None:
        """A finite number in `low`..`high`, and above `above`."""
        found = plain(self.raw(key))
        if found is None:
            return default
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            self.wrong(f"{key} is {named(found)}, not a number", key=key)
        elif not low <= found <= high or not found > above:
            at_least = f"above {above:g}" if above > -math.inf else f"{low:g} or more" if low > -math.inf else ""
            at_most = f"{high:g} or less" if high < math.inf else ""
            self.wrong(f"{key} = {found:g}: it is {' and '.join(filter(None, (at_least, at_most)))}", key=key)
        else:
            return float(found)
        return default

    @overload
    def integer(self, key: str, default: int, *, low: int = ..., high: int = ...) -> int: ...
    @overload
    def integer(self, key: str, default: None, *, low: int = ..., high: int = ...) -> int | None: ...
    def integer(self, key: str, default: int | None, *, low: int = -(2**63), high: int = 2**63 - 1) -> int | None:
        found = plain(self.raw(key))
        if found is None:
            return default
        if isinstance(found, bool) or not isinstance(found, int):
            self.wrong(
                f"{key} is {named(found) if not isinstance(found, float) else found}, not a whole number", key=key
            )
        elif not low <= found <= high:
            at_most = f" and {high} or less" if high < 2**63 - 1 else ""
            self.wrong(f"{key} = {found}: it is {low} or more{at_most}", key=key)
        else:
            return found
        return default

    def boolean(self, key: str, default: bool) -> bool:
        found = plain(self.raw(key))
        if found is None:
            return default
        if not isinstance(found, bool):
            self.wrong(f"{key} is {named(found)}, not true or false", key=key)
            return default
        return found

    def one_of(self, key: str, known: Sequence[T], default: T) -> T:
        text = self.text(key, default)
        for word in known:
            if word == text:
                return word
        self.wrong(f"{key}: unknown {text[:60]!r}", nearest(text, known), key=key)
        return default

    def version(self) -> None:
        """`version: 1`, as every file of the documents' has it."""
        if self.integer("version", None) not in (1, None) or "version" not in self:
            self.wrong("the file must say version: 1", key="version" if "version" in self.value else "")

    def table(self, key: str) -> Table | None:
        found = self.raw(key)
        return None if found is None else Table(self.doc, self.problems, (*self.path, key), found)

    def items(self, key: str, *, required: bool = False) -> list[tuple[Path, Any]]:
        """The elements of a list with their paths."""
        found = self.raw(key, required=required)
        if found is None:
            return []
        if not isinstance(found, list):
            self.wrong(f"{key} is {named(found)}, not a list", key=key)
            return []
        if required and not found:
            self.wrong(f"{key} is empty", key=key)
        return [((*self.path, key, i), item) for i, item in enumerate(found)]

    def tables(self, key: str, *, required: bool = False) -> list[Table]:
        return [Table(self.doc, self.problems, path, item) for path, item in self.items(key, required=required)]

    def close(self) -> None:
        for key in self.value:
            if key not in self._asked:
                self.wrong(f"unknown key {str(key)[:60]!r}", nearest(str(key), self._asked), key=str(key), at_key=True)


def as_text(value: Any) -> str | None:
    """The text of a scalar as it was written; None for lists and tables."""
    match value:
        case Scalar():
            return value.text
        case bool() | None:
            return None if value is None else str(value).lower()
        case int() | float():
            return str(value)
        case str():
            return value
    return None


def _dotted(path: Path) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
