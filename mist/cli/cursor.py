"""`mist cursor`: named replay positions. A named cursor is a checkpoint; this is the view for people who replay."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from msgspec import Struct

from mist.broker.base import Checkpoint
from mist.broker.clock import SYSTEM
from mist.cli import checkpoint as stored
from mist.cli.checkpoint import Name, StreamName
from mist.cli.options import DryRun, StreamArg
from mist.cli.position import after_of, parse_position
from mist.cli.session import current
from mist.cli.wrap import noun
from mist.errors import Conflict, InvalidArgument, Malformed, NotFound, Unsupported
from mist.protocol.subject import check_name

app = noun("Named replay positions.")
Force = Annotated[bool, typer.Option("--force", help="Also backwards, and onto a stream that was made again.")]


class _Line(Struct, frozen=True, forbid_unknown_fields=False):
    stream: str
    name: str
    sequence: int | str
    incarnation: str


@app.command("ls")
async def ls(stream: Annotated[str, typer.Argument(metavar="STREAM", help="Only this stream's.")] = "") -> None:
    """List the named cursors, with how many records each is behind.

    Examples:
      mist cursor ls
      mist cursor ls eval --format json
    """
    session = current()
    rows = await stored.listing(session, stream)
    session.out.rows(rows, ["stream", "name", "sequence", "lag", "state", "saved"], empty="no cursors")


@app.command("show")
async def show(stream: StreamName, name: Name) -> None:
    """Show one cursor.

    Examples:
      mist cursor show eval report --format json
    """
    session = current()
    _, found = await stored.load(session, stream, name)
    session.out.item(stored.shape(found))


@app.command("set")
async def set_(
    stream: StreamArg,
    name: Name,
    position: Annotated[str, typer.Argument(metavar="POS", help="The record a reader is to start with.")],
    force: Force = False,
) -> None:
    """Put a cursor so that `--from cursor:NAME` starts with the record at POS. Going back needs --force.

    Examples:
      mist cursor set eval report start
      mist cursor set eval report @2026-01-31 --force
    """
    session = current()
    broker, source = await session.locate(stream)
    if broker is None:
        raise Unsupported("checkpoints", "file:")
    where = parse_position(position, now_ns=SYSTEM.time_ns())
    after = await after_of(where, source, broker.checkpoints, await source.info())
    saved = await broker.checkpoints.save(
        Checkpoint(stream=source.name, name=check_name(name), incarnation=source.incarnation, sequence=max(0, after)),
        force=force,
    )
    if session.out.format == "table":
        session.out.note(f"cursor {name} of stream {source.name} goes on after {saved.sequence}")
    else:
        session.out.item(stored.shape(saved))


@app.command("rm")
async def rm(stream: StreamName, name: Name, dry_run: DryRun = False) -> None:
    """Forget a cursor.

    Examples:
      mist cursor rm eval report -y
    """
    await stored.remove(current(), stream, name, dry_run)


@app.command("export")
async def export(stream: Annotated[str, typer.Argument(metavar="STREAM", help="Only this stream's.")] = "") -> None:
    """Write cursors to standard output, one JSON object a line, for `mist cursor import`.

    Examples:
      mist cursor export > cursors.jsonl
    """
    session = current()
    broker, name = await stored.broker_of(session, stream) if stream else (await session.connect(), "")
    for checkpoint in await broker.checkpoints.list(name):
        session.out.write(msgspec.json.encode(stored.shape(checkpoint)) + b"\n")


@app.command("import")
async def import_(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="What `cursor export` wrote.")] = "-",
    force: Force = False,
    rebind: Annotated[
        bool, typer.Option("--rebind", help="Take the stream as it is here: for a copy, whose incarnation differs.")
    ] = False,
) -> None:
    """Read cursors that were exported. A cursor of another incarnation is refused unless --rebind.

    Examples:
      mist cursor import cursors.jsonl
      mist -u log:./copy cursor import cursors.jsonl --rebind
    """
    session = current()
    data = sys.stdin.buffer.read() if file == "-" else _read(Path(file))
    try:
        lines = [msgspec.json.decode(text, type=_Line) for text in data.splitlines() if text.strip()]
        wanted = [(line, int(line.sequence)) for line in lines]
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as exc:
        raise Malformed(f"{file}: not exported cursors: {exc}") from exc
    broker = await session.connect()
    for line, sequence in wanted:
        source = await session.stream(line.stream)
        if line.incarnation != source.incarnation and not rebind:
            raise Conflict(
                f"cursor {line.name}: stream {line.stream} here is not the one it was saved on",
                hint="--rebind if this is a copy with the same sequences",
            )
        if sequence > (await source.info()).last:
            raise InvalidArgument(f"cursor {line.name}: {sequence} lies beyond the end of stream {line.stream}")
        await broker.checkpoints.save(
            Checkpoint(stream=line.stream, name=line.name, incarnation=source.incarnation, sequence=sequence),
            force=force,
        )
    session.out.note(f"{len(wanted)} cursors set")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise NotFound(f"no file {path}") from exc
    except OSError as exc:
        raise InvalidArgument(f"{path}: cannot be read: {exc.strerror}") from exc
