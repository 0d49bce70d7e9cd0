"""The only place that prints: values on stdout, talk on stderr.

Formats: `table` for people, `json` (one document), `jsonl` (one line per value), `csv`, `raw` (the plain value). No ANSI
unless the stream is a terminal (NO_COLOR, FORCE_COLOR and TERM=dumb are respected); control characters in data are
escaped in tables; sequences above 2^53 are strings in JSON. A broken pipe travels up as BrokenPipeError.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import select
import shutil
import subprocess
import sys
import time
import traceback
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, BinaryIO, Self, TextIO

import msgspec

from mist.errors import MistError, NotFound, StorageFull, TransportError

FORMATS = ("table", "json", "jsonl", "csv", "raw")
SAFE_INTEGER = 2**53
PROGRESS_AFTER_S = 1.0
PROGRESS_EVERY_S = 5.0
_BUFFER_BYTES = 64 * 1024

Row = Mapping[str, Any]

active: Output | None = None
"""The output of the running command; errors are shown in its format."""


def seq(number: int) -> int | str:
    """A sequence as JSON carries it: a string where a double would lose digits."""
    return str(number) if number > SAFE_INTEGER else number


def escape(text: str) -> str:
    """Text that is safe on a terminal: everything unprintable as an escape."""
    if text.isprintable():
        return text
    out = []
    for c in text:
        if c.isprintable():
            out.append(c)
        elif c in "\n\r\t":
            out.append({"\n": "\\n", "\r": "\\r", "\t": "\\t"}[c])
        elif ord(c) < 256:
            out.append(f"\\x{ord(c):02x}")
        else:
            out.append(f"\\u{ord(c):04x}" if ord(c) < 65536 else f"\\U{ord(c):08x}")
    return "".join(out)


def width(text: str) -> int:
    """Columns that printable text takes on a terminal."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def clip(text: str, columns: int) -> str:
    """At most this many columns; a cut is marked."""
    if width(text) <= columns:
        return text
    out = ""
    used = 0
    for c in text:
        used += width(c)
        if used > columns - 1:
            break
        out += c
    return out + "…"


def cell(value: Any) -> str:
    """One value as a table or CSV shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    if isinstance(value, str):
        return value
    if isinstance(value, msgspec.Raw):
        return bytes(value).decode("utf-8", "replace")
    if isinstance(value, (dict, list, tuple)):
        return msgspec.json.encode(value).decode()
    return str(value)


def moment(time_ns: int) -> str:
    """Unix nanoseconds as RFC 3339 in UTC, milliseconds."""
    if time_ns <= 0:
        return "-"
    try:
        stamp = datetime.fromtimestamp(time_ns // 1_000_000_000, UTC)
    except (OverflowError, ValueError, OSError):
        return str(time_ns)
    return f"{stamp:%Y-%m-%dT%H:%M:%S}.{time_ns // 1_000_000 % 1000:03d}Z"


class Output:
    """stdout and stderr of one invocation."""

    def __init__(
        self, *, format: str | None = None, quiet: bool = False, verbose: bool = False, pager: bool = False
    ) -> None:
        self.format = format if format in FORMATS else "table"
        self.quiet = quiet
        self.verbose = verbose
        self._pager = pager
        self._out: TextIO = sys.stdout
        self._err: TextIO = sys.stderr
        self._bytes: BinaryIO | None = getattr(sys.stdout, "buffer", None)
        self._pending = bytearray()
        self.terminal = _is_terminal(self._out)
        self.terminal_err = _is_terminal(self._err)
        self.color = _color(self.terminal)
        self.color_err = _color(self.terminal_err)
        self.columns = shutil.get_terminal_size().columns if self.terminal else 0

    # stdout

    @property
    def json(self) -> bool:
        return self.format in ("json", "jsonl")

    def write(self, data: bytes) -> None:
        """Bytes to stdout, buffered until `flush` or 64 KiB."""
        self._pending += data
        if len(self._pending) >= _BUFFER_BYTES:
            self.flush()

    def text(self, text: str) -> None:
        self.write(text.encode("utf-8", "backslashreplace"))

    def flush(self) -> None:
        """Everything written so far is handed to the system.

        Raises BrokenPipeError when the reader is gone, StorageFull or TransportError when it cannot be written.
        """
        try:
            self._flush()
        except BrokenPipeError:
            raise
        except OSError as exc:
            self.abandon()
            full = exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            kind = StorageFull if full else TransportError
            raise kind(f"standard output: {exc.strerror}", hint="what was printed is not complete") from exc

    def _flush(self) -> None:
        data, self._pending = self._pending, bytearray()
        if self._bytes is not None:
            self._out.flush()
            left = memoryview(data)
            while left:
                # unbuffered (PYTHONUNBUFFERED) a write may be short when a signal comes, and None when it would block
                written: int | None = self._bytes.write(left)
                if written is None:
                    select.select([], [self._bytes], [])
                else:
                    left = left[written:]
            self._bytes.flush()
        else:
            self._out.write(data.decode("utf-8", "replace"))
            self._out.flush()

    def abandon(self) -> None:
        """The reader of stdout is gone: point it nowhere, so that the interpreter's last flush cannot fail."""
        self._pending.clear()
        try:
            descriptor = self._out.fileno()
        except (OSError, ValueError, io.UnsupportedOperation):
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def rows(self, rows: Iterable[Row], columns: Sequence[str], *, empty: str = "") -> None:
        """A finished list. JSON and CSV hold every key of a row, a table only `columns`; raw the first of them."""
        found = list(rows)
        if self.format == "json":
            self.write(_pretty(found))
        elif self.format == "jsonl":
            for row in found:
                self.write(msgspec.json.encode(row) + b"\n")
        elif self.format == "csv":
            self.text(csv_lines([list(found[0]) if found else list(columns), *(list(r.values()) for r in found)]))
        elif self.format == "raw":
            self.text("".join(f"{cell(r[columns[0]])}\n" for r in found))
        elif found:
            self._page(self._table(found, columns))
        if not found and empty:
            self.note(empty)

    def item(self, row: Row) -> None:
        """One object: a table shows one line per key."""
        if self.format == "json":
            self.write(_pretty(row))
        elif self.format == "jsonl":
            self.write(msgspec.json.encode(row) + b"\n")
        elif self.format == "csv":
            self.text(csv_lines([list(row), list(row.values())]))
        elif self.format == "raw":
            self.text("".join(f"{escape(cell(v))}\n" for v in row.values()))
        else:
            broad = max((len(k) for k in row), default=0)
            for key, value in row.items():
                self.text(f"{self.strong(key.ljust(broad))}  {escape(cell(value))}\n")

    def value(self, text: str, row: Row) -> None:
        """One plain value where the format is for people or raw, an object otherwise."""
        if self.format in ("table", "raw"):
            self.text(text + "\n")
        else:
            self.item(row)

    def lines(self) -> Lines:
        """A list whose length is not known yet: a writer for one record at a time."""
        return Lines(self)

    def strong(self, text: str, *, err: bool = False) -> str:
        return f"\x1b[1m{text}\x1b[0m" if (self.color_err if err else self.color) else text

    def _table(self, rows: Sequence[Row], columns: Sequence[str]) -> str:
        cells = [[escape(cell(row.get(c))) for c in columns] for row in rows]
        numeric = [
            all(isinstance(row.get(c), (int, float)) and not isinstance(row.get(c), bool) for row in rows)
            for c in columns
        ]
        wide = [max(width(c), *(width(line[i]) for line in cells)) for i, c in enumerate(columns)]
        out = []
        for n, line in enumerate([list(columns), *cells]):
            parts = []
            for i, text in enumerate(line):
                gap = " " * (wide[i] - width(text))
                parts.append(gap + text if numeric[i] else text + gap)
            joined = "  ".join(parts).rstrip()
            if self.columns:
                joined = clip(joined, self.columns)
            out.append(self.strong(joined) if n == 0 else joined)
        return "\n".join(out) + "\n"

    def _page(self, text: str) -> None:
        lines = text.count("\n")
        program = os.environ.get("PAGER") or "less -FRX"
        words = program.split()
        if (
            not self._pager
            or not self.terminal
            or not _is_terminal(sys.stdin)
            or lines < shutil.get_terminal_size().lines
            or not words
            or shutil.which(words[0]) is None
        ):
            self.text(text)
            return
        self.flush()
        subprocess.run(words, input=text.encode(), check=False)

    # stderr

    def note(self, text: str) -> None:
        """Talk: not with --quiet."""
        if not self.quiet:
            self._say(text)

    def outcome(self, what: str, *, dry_run: bool = False) -> None:
        """What a command did, or would do: talk for people, one object with a machine format."""
        if self.format in ("table", "raw"):
            self.note(f"would {what}" if dry_run else what)
        else:
            self.item({"what": what, "dry_run": dry_run})

    def warn(self, text: str) -> None:
        """Something the reader must know, also with --quiet."""
        self._say(text, f"{self.strong('warning:', err=True)} ")

    def detail(self, text: str) -> None:
        """Talk for --verbose."""
        if self.verbose:
            self._say(text)

    def _say(self, text: str, head: str = "") -> None:
        self._err.write(head + "\n".join(escape(line) for line in text.split("\n")) + "\n")
        self._err.flush()

    def error(self, exc: MistError) -> None:
        """One line: what. why. next step. With a JSON format one object."""
        if self.json:
            body = {"code": exc.code, "message": exc.message, "hint": exc.hint, "retryable": exc.retryable}
            self._err.write(msgspec.json.encode({"error": body}).decode() + "\n")
        else:
            first, _, more = f"{exc.message}{_why(exc)}".partition("\n")
            line = joined(escape(first), escape(exc.hint))
            self._err.write(f"{self.strong('error:', err=True)} {line}\n" + (f"{more}\n" if more else ""))
        self._err.flush()

    def bug(self, exc: BaseException) -> None:
        """An exception nobody expected: one line, and where it happened with --verbose."""
        if self.verbose:
            self._err.write("".join(traceback.format_exception(exc)))
        what = escape(f"{exc.__class__.__name__}: {exc}")
        if self.json:
            body = {
                "code": "internal",
                "message": what,
                "hint": "a bug of ours: please report it with the output of --verbose",
                "retryable": False,
            }
            self._err.write(msgspec.json.encode({"error": body}).decode() + "\n")
        else:
            self._err.write(f"error: {what}. A bug of ours: please report it with the output of --verbose\n")
        self._err.flush()

    # asking

    @property
    def can_ask(self) -> bool:
        return _is_terminal(sys.stdin) and self.terminal_err

    def ask(self, question: str) -> bool:
        """One question on stderr, one line from the terminal. Only y and yes are yes."""
        self.flush()
        self._err.write(f"{question} [y/N] ")
        self._err.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def progress(self, what: str, total: int = 0) -> Progress:
        return Progress(self, what, total)


class Lines:
    """Writes a list of unknown length, one entry at a time; `with` closes a JSON array also when it is interrupted."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._count = 0

    def __enter__(self) -> Self:
        if self._out.format == "json":
            self._out.write(b"[")
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc_type is not None and issubclass(exc_type, BrokenPipeError):
            return
        if self._out.format == "json":
            self._out.write(b"\n]\n" if self._count else b"]\n")
        self._out.flush()

    def document(self, data: bytes) -> None:
        """One encoded JSON value; only with the formats json and jsonl."""
        if self._out.format == "json":
            self._out.write(b",\n" if self._count else b"\n")
            self._out.write(data)
        else:
            self._out.write(data + b"\n")
        self._count += 1

    def row(self, row: Row) -> None:
        """One object in any format; a table without alignment over lines that are not there yet."""
        if self._out.json:
            self.document(msgspec.json.encode(row))
            return
        if self._out.format == "csv":
            self._out.text(csv_lines(([list(row)] if not self._count else []) + [list(row.values())]))
        elif self._out.format == "raw":
            self._out.text(" ".join(cell(v) for v in row.values()) + "\n")
        else:
            self.line("  ".join(escape(cell(v)) for v in row.values()))
            return
        self._count += 1

    def line(self, text: str) -> None:
        """One line of a table, cut to the terminal's width."""
        self._out.text((clip(text, self._out.columns) if self._out.columns else text) + "\n")
        self._count += 1


class Progress:
    """Progress on stderr once work takes more than a second: a bar on a terminal, a line every 5 s with -v otherwise."""

    def __init__(self, out: Output, what: str, total: int) -> None:
        self._out = out
        self._what = what
        self._total = total
        self._done = 0
        self._start = time.monotonic()
        self._next = self._start + PROGRESS_AFTER_S
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._shown and self._out.terminal_err:
            self._out._err.write("\r\x1b[K")
            self._out._err.flush()

    def at(self, done: int) -> None:
        """Tell how much is done; prints when it is time to."""
        self._done = done
        now = time.monotonic()
        if now < self._next or self._out.quiet:
            return
        text = self._line(now)
        if self._out.terminal_err:
            self._next = now + 0.2
            self._out._err.write(f"\r\x1b[K{clip(text, shutil.get_terminal_size().columns - 1)}")
            self._out._err.flush()
            self._shown = True
        else:
            self._next = now + PROGRESS_EVERY_S
            self._out.detail(text)

    def _line(self, now: float) -> str:
        rate = self._done / max(now - self._start, 1e-9)
        if not self._total:
            return f"{self._what}: {self._done:,} ({rate:,.0f}/s)"
        part = min(1.0, self._done / self._total)
        bar = "#" * int(part * 24)
        return f"{self._what}: [{bar:<24}] {part:4.0%} {self._done:,} of {self._total:,} ({rate:,.0f}/s)"


def csv_lines(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow(["" if v is None else v if isinstance(v, (str, int, float)) else cell(v) for v in row])
    return text.getvalue()


def _pretty(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def joined(what: str, next_step: str) -> str:
    """`what. next step`, whatever the first ends with."""
    what, next_step = what.rstrip("."), next_step.rstrip(".")
    if not what or not next_step:
        return what or next_step
    return f"{what}{' ' if what[-1] in '?!' else '. '}{next_step}"


def _why(exc: MistError) -> str:
    """What the cause says that the message does not."""
    cause = exc.__cause__
    if not isinstance(cause, OSError) or isinstance(exc, NotFound):
        return ""
    said = cause.strerror or str(cause)
    return "" if said in exc.message else f": {said}"


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _color(terminal: bool) -> bool:
    env = os.environ
    if env.get("NO_COLOR"):
        return False
    if env.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return terminal and env.get("TERM", "") != "dumb"
