"""`mist validate`: are these envelopes? The seed's verb, on lines or on concatenated documents."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated

import typer

from mist.cli.filestream import open_lines
from mist.cli.session import current
from mist.errors import MistError
from mist.protocol import codec
from mist.protocol.envelope import SIZE_BYTES_MAX

INVALID = 10
_TOKEN = re.compile(rb'["{}\[\]]')
_STRING_END = re.compile(rb'["\\]')


def command(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="JSON lines or concatenated JSON; - = stdin.")] = "-",
) -> None:
    """Check envelopes: shape, version, checksum, size, depth. Prints {"valid":N,"invalid":M}; exit 10 if M > 0.

    Every bad document is a line on stderr with its line number. Nothing stops the count: what cannot be read is one
    invalid document, and reading goes on with the next line.

    Examples:
      mist validate spans.jsonl
      cat spans.jsonl | mist validate
    """
    session = current()
    valid = invalid = 0
    source: IO[bytes] = sys.stdin.buffer if file == "-" else open_lines(Path(file))
    try:
        for line, document in documents(source):
            try:
                codec.decode_foreign(document)
                valid += 1
            except MistError as exc:
                invalid += 1
                session.out.note(f"line {line}: {exc.message}")
    finally:
        if file != "-":
            source.close()
    row = {"valid": valid, "invalid": invalid}
    if session.out.format in ("table", "raw", "jsonl", "json"):
        session.out.text(f'{{"valid":{valid},"invalid":{invalid}}}\n')
    else:
        session.out.item(row)
    if invalid:
        session.exit_code = INVALID


def documents(source: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The JSON documents in a stream of bytes, each with the line it starts on.

    Documents may share a line or span several. A document that does not end within the size limit, at the end of the
    input, or before a line that is a whole document by itself, is given as it is up to the end of its first line.
    """
    number = 0
    pending: list[tuple[int, bytes]] = []  # lines that were read ahead

    def next_line() -> tuple[int, bytes] | None:
        nonlocal number
        if pending:
            return pending.pop(0)
        line = source.readline(SIZE_BYTES_MAX + 2)
        if not line:
            return None
        number += 1
        if not line.endswith(b"\n") and len(line) > SIZE_BYTES_MAX:
            while (more := source.readline(1 << 20)) and not more.endswith(b"\n"):
                pass  # one document too large: its size is what is wrong with it, the rest is not needed
        return number, line

    while (entry := next_line()) is not None:
        at, line = entry
        rest = line.lstrip(b" \t\r\n\xef\xbb\xbf") if at == 1 else line.lstrip()
        while rest:
            end = document_end(rest)
            if end:
                yield at, rest[:end]
                rest = rest[end:].lstrip()
                continue
            if rest[:1] not in (b"{", b"["):
                yield at, rest.rstrip()
                break
            ahead: list[tuple[int, bytes]] = []
            whole, end = rest, 0
            while not end and len(whole) <= SIZE_BYTES_MAX and (more := next_line()) is not None:
                ahead.append(more)
                if more[1][:1] == b"{" and document_end(more[1]) == len(more[1].rstrip()):
                    break
                whole += more[1]
                end = document_end(whole)
            if not end:
                pending[:0] = ahead
                yield at, rest.rstrip()
                break
            yield at, whole[:end]
            at = ahead[-1][0]
            rest = whole[end:].lstrip()


def document_end(data: bytes) -> int:
    """Where the object or array at the start of `data` ends, by its brackets; 0 when it does not."""
    if data[:1] not in (b"{", b"["):
        return 0
    depth = at = 0
    while match := _TOKEN.search(data, at):
        token = match[0]
        at = match.end()
        if token == b'"':
            while True:
                stop = _STRING_END.search(data, at)
                if stop is None:
                    return 0
                at = stop.end()
                if stop[0] == b'"':
                    break
                at += 1
        elif token in (b"{", b"["):
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return at
    return 0
