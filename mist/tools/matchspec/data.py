"""Data sets that are read line by line: a million samples are never a million samples in memory.

`.jsonl`: one JSON object per line; `.csv`: one row per sample, the first row names the columns. Read are `id`, `input`,
`expected`, `grader` (a name or a list), `tags`, `metadata` and `output` (a recorded answer), or what `Fields` calls them;
other keys are left alone, for these files come from elsewhere. Without an id the line's number is it. A number as
`expected` is the text as it was written; a list or an object is its JSON.

The file is the same whenever it is iterated: a change of its size or time in between is Conflict.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType, defstruct

from mist.errors import Conflict, InvalidArgument, NotFound, Refused
from mist.tools.matchspec.positions import Problem, nearest
from mist.tools.matchspec.suite import LINE_BYTES_MAX, Sample, lines

SUFFIXES = (".jsonl", ".ndjson", ".csv")
BLOCK = 1024 * 1024
_PATH = re.compile(r"at `\$\.(\w+)")
_BYTE = re.compile(r"\(byte (\d+)\)")
_SPACE = b" \t\r\n\x0b\x0c"


class Fields(Struct, frozen=True):
    """What a data file calls them."""

    id: str = "id"
    input: str = "input"
    expected: str = "expected"
    grader: str = "grader"
    tags: str = "tags"
    metadata: str = "metadata"
    output: str = "output"


class Rows:
    """The samples of a file. `limit`: only the first so many. `line` is that of the sample that was given last."""

    def __init__(self, path: Path, *, fields: Fields | None = None, limit: int | None = None) -> None:
        self.path = path
        self.line = 0
        self.fields = fields or Fields()
        self._limit = limit
        self._stamp = self._now()
        count = _count_csv(path) if path.suffix == ".csv" else _count_lines(path)
        self._length = count if limit is None else min(limit, count)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sample]:
        for line, sample in self.numbered():
            self.line = line
            yield sample

    def numbered(self) -> Iterator[tuple[int, Sample]]:
        """(line, sample). Raises InvalidArgument at the first line that cannot be read."""
        for line, found in self.tolerant():
            if isinstance(found, Problem):
                raise InvalidArgument(str(found))
            yield line, found

    def tolerant(self) -> Iterator[tuple[int, Sample | Problem]]:
        """The same, but a line that cannot be read is given as its problem, and the next one follows."""
        if self._now() != self._stamp:
            raise Conflict(f"{self.path} was changed while it was in use", hint="load the suite again")
        rows = self._csv() if self.path.suffix == ".csv" else self._json()
        for done, found in enumerate(rows):
            if self._limit is not None and done == self._limit:
                return
            yield found

    def problem(self, line: int, message: str, hint: str = "", *, column: int = 1, source: str = "") -> Problem:
        return Problem(file=str(self.path), line=line, column=column, message=message, hint=hint, source=source)

    def _now(self) -> tuple[int, int]:
        try:
            found = os.stat(self.path)
        except FileNotFoundError as exc:
            raise NotFound(f"no file {self.path}") from exc
        except OSError as exc:
            raise Refused(f"{self.path}: {exc.strerror or exc}") from exc
        return found.st_size, found.st_mtime_ns

    def _json(self) -> Iterator[tuple[int, Sample | Problem]]:
        decode = msgspec.json.Decoder(_row_of(self.fields)).decode
        plainly: Callable[[bytes], Any] | None = msgspec.json.Decoder(_plain_row_of(self.fields)).decode
        for number, line in lines(self.path):
            if plainly is not None:
                try:
                    row = plainly(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    plainly = None  # a file is mostly of one kind
                else:
                    yield (
                        number,
                        Sample(row.id, row.input, row.expected, row.grader, row.tags, row.metadata, row.output),
                    )
                    continue
            try:
                yield number, self._sample(decode(line), number)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
                yield number, self._refused(number, line, exc)
            except _NoText as exc:
                text = line.decode("utf-8", "replace")
                what = f"no text or number under {exc.key!r}"
                column = _column(text, exc.key)
                yield number, self.problem(number, what, "put it in quotes", column=column, source=text)

    def _refused(self, number: int, line: bytes, exc: Exception) -> Problem:
        text = line.decode("utf-8", "replace")
        if isinstance(exc, msgspec.ValidationError):
            if not text.lstrip().startswith("{"):
                return self.problem(number, "not a JSON object", source=text)
            at = _PATH.search(str(exc))
            key = at[1] if at else ""
            what = str(exc)
            if key == self.fields.grader:
                what = f"{key!r} is not the name of a grader, or a list of names"
            return self.problem(number, what, column=_column(text, key), source=text)
        byte = _BYTE.search(str(exc))
        column = len(line[: int(byte[1])].decode("utf-8", "replace")) + 1 if byte else 1
        return self.problem(number, f"not JSON: {exc}", column=column, source=text)

    def _sample(self, row: Any, number: int) -> Sample:
        f = self.fields
        graders = row.grader
        return Sample(
            id=str(number) if row.id is UNSET else str(row.id),
            input="" if row.input is UNSET else _text(row.input, f.input, anything=True),
            expected="" if row.expected is UNSET else _text(row.expected, f.expected),
            graders=(graders,) if isinstance(graders, str) else tuple(graders),
            tags=tuple(row.tags),
            metadata=row.metadata,
            output=row.output,
        )

    def _csv(self) -> Iterator[tuple[int, Sample | Problem]]:
        f = self.fields
        with _opened(self.path) as file:
            reader = csv.reader(file, strict=True)
            try:
                header = next(reader, [])
                at = {name: i for i, name in enumerate(header)}
                if f.expected not in at and f.input not in at:
                    what = f"no column {f.input!r} and none {f.expected!r}"
                    yield 1, self.problem(1, what, nearest(f.input, header), source=",".join(header))
                    return
                extra = [(name[9:], i) for name, i in at.items() if name.startswith("metadata.")]
                for row in reader:
                    number = reader.line_num
                    if not row:
                        continue
                    if len(row) != len(header):
                        yield number, self.problem(number, f"{len(row)} cells in {len(header)} columns")
                        continue

                    def cell(name: str, row: list[str] = row) -> str:
                        return row[at[name]] if name in at else ""

                    yield (
                        number,
                        Sample(
                            id=cell(f.id) or str(number),
                            input=cell(f.input),
                            expected=cell(f.expected),
                            graders=tuple(filter(None, (g.strip() for g in cell(f.grader).split(";")))),
                            tags=tuple(filter(None, (t.strip() for t in cell(f.tags).split(";")))),
                            metadata={name: row[i] for name, i in extra},
                            output=cell(f.output) if f.output in at else None,
                        ),
                    )
            except csv.Error as exc:
                yield reader.line_num, self.problem(reader.line_num, f"not CSV: {exc}")
            except UnicodeDecodeError:
                yield reader.line_num + 1, self.problem(reader.line_num + 1, "not UTF-8 text")


class _NoText(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _text(raw: Raw, key: str, *, anything: bool = False) -> str:
    data = bytes(raw)
    if data[:1] == b'"':
        text: str = msgspec.json.decode(data)
        return text
    if data == b"null":
        return ""
    if data in (b"true", b"false") and not anything:
        raise _NoText(key)
    return data.decode()


def _column(text: str, key: str) -> int:
    """Where the value of the key begins in a line of JSON, as well as a search tells."""
    found = re.search(rf'"{re.escape(key)}"\s*:\s*', text) if key else None
    return found.end() + 1 if found else 1


def _opened(path: Path) -> Any:
    csv.field_size_limit(LINE_BYTES_MAX)
    return path.open(encoding="utf-8-sig", newline="")


def _row_of(f: Fields) -> type[Struct]:
    """The class that reads a line: what is not named is skipped by the decoder."""
    names = {name: getattr(f, name) for name in Fields.__struct_fields__}
    return defstruct(
        "Row",
        [
            ("id", str | int | UnsetType, UNSET),
            ("input", Raw | UnsetType, UNSET),
            ("expected", Raw | UnsetType, UNSET),
            ("grader", str | list[str], msgspec.field(default_factory=list)),
            ("tags", list[str], msgspec.field(default_factory=list)),
            ("metadata", dict[str, Any], msgspec.field(default_factory=dict)),
            ("output", str | None, None),
        ],
        rename=names,
        frozen=True,
        gc=False,
    )


def _plain_row_of(f: Fields) -> type[Struct]:
    """The class of a line whose values are those of a sample already. It reads no line otherwise than `_sample` does, and
    refuses those it cannot read."""
    return defstruct(
        "PlainRow",
        [
            ("id", str),
            ("input", str),
            ("expected", str),
            ("grader", tuple[str, ...], ()),
            ("tags", tuple[str, ...], ()),
            ("metadata", dict[str, Any], msgspec.field(default_factory=dict)),
            ("output", str | None, None),
        ],
        rename={name: getattr(f, name) for name in Fields.__struct_fields__},
        frozen=True,
        gc=False,
    )


def _count_lines(path: Path) -> int:
    """Lines that are not empty, read in blocks."""
    count, open_line = 0, False
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                whole = block.split(b"\n")
                for i, part in enumerate(whole):
                    filled = bool(part.strip(_SPACE))
                    open_line = open_line or filled
                    if i < len(whole) - 1:
                        count += open_line
                        open_line = False
    except OSError as exc:
        raise Refused(f"{path}: {exc.strerror or exc}") from exc
    return count + open_line


def _count_csv(path: Path) -> int:
    try:
        with _opened(path) as file:
            return max(0, sum(1 for row in csv.reader(file) if row) - 1)
    except (csv.Error, UnicodeDecodeError, OSError) as exc:
        raise InvalidArgument(f"{path}: not CSV: {exc}") from exc
