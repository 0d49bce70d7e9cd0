"""Records to stdout in the format that was asked for; shared by tail, get, sub, consumer next, dlq show and replay."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from mist.cli.filters import split_path
from mist.cli.records import View, as_row, document, line, selected
from mist.cli.render import Lines, Output, escape
from mist.errors import InvalidArgument


class Emitter:
    """Writes views; `with` closes what a format needs closed."""

    def __init__(self, out: Output, select: str | None = None, *, follow: bool = False) -> None:
        if follow and out.format == "json":
            raise InvalidArgument("a stream that is followed has no last record", hint="use --format jsonl")
        self._out = out
        self._lines: Lines = out.lines()
        self._paths: list[tuple[str, tuple[str, ...]]] = []
        for name in (select or "").split(","):
            path = split_path(name.strip())
            if path:
                self._paths.append((name.strip(), path))
        if select is not None and not self._paths:
            raise InvalidArgument("--select names no field", hint="for example --select sequence,payload.attrs.model")

    def __enter__(self) -> Self:
        self._lines.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._lines.__exit__(exc_type, exc, tb)

    def views(self, views: list[View]) -> None:
        """One page, flushed, so that a follower and its reader see it at once."""
        for view in views:
            self._one(view)
        self._out.flush()

    def _one(self, view: View) -> None:
        out, lines = self._out, self._lines
        if self._paths:
            lines.row(selected(view, self._paths))
        elif out.json:
            lines.document(document(view))
        elif out.format == "csv":
            lines.row(as_row(view))
        elif out.format == "raw":
            out.write(view.record.data + b"\n")
        else:
            lines.line(escape(line(view)))
