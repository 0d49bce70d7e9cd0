"""`mist checkpoint`: every stored position, whoever saved it: workers, sinks, copies, named cursors."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mist.broker.base import Broker, Checkpoint
from mist.cli.options import DryRun
from mist.cli.render import moment, seq
from mist.cli.session import Session, current
from mist.cli.wrap import noun
from mist.errors import InvalidArgument, NotFound, Unsupported

app = noun("Stored positions.")
DIFFERENT = 10

StreamName = Annotated[str, typer.Argument(metavar="STREAM", help="The stream the position is of.")]
Name = Annotated[str, typer.Argument(metavar="CURSOR", help="The position's name.")]


def shape(checkpoint: Checkpoint) -> dict[str, Any]:
    """The documented JSON shape of a stored position."""
    return {
        "stream": checkpoint.stream,
        "name": checkpoint.name,
        "sequence": seq(checkpoint.sequence),
        "incarnation": checkpoint.incarnation,
        "time_ns": checkpoint.time_ns,
    }


async def broker_of(session: Session, stream: str) -> tuple[Broker, str]:
    """The broker that keeps the positions of this stream argument, and the stream's name there."""
    url, name = session.target(stream)
    if url.scheme == "file":
        raise Unsupported("checkpoints", "file:")
    if not name and stream:
        raise InvalidArgument(f"{url.redacted()}: which stream?", hint="add ?stream=NAME")
    return await session.connect(url), name


async def load(session: Session, stream: str, name: str) -> tuple[Broker, Checkpoint]:
    broker, stream_name = await broker_of(session, stream)
    found = await broker.checkpoints.load(stream_name, name)
    if found is None:
        others = [c.name for c in await broker.checkpoints.list(stream_name)]
        there = f"there are: {', '.join(others[:8])}" if others else "there are none"
        raise NotFound(f"no position {name} on stream {stream_name} in {broker.url}; {there}")
    return broker, found


async def listing(session: Session, stream: str) -> list[dict[str, Any]]:
    """Rows for `ls`: each position with how far it is behind, and whether its stream is still the same."""
    broker, name = await broker_of(session, stream) if stream else (await session.connect(), "")
    rows = []
    for checkpoint in await broker.checkpoints.list(name):
        row = shape(checkpoint)
        row["lag"] = None
        row["state"] = "stream is gone"
        try:
            info = await (await broker.open(checkpoint.stream, create=False)).info()
        except NotFound:
            pass
        else:
            if info.incarnation == checkpoint.incarnation:
                row["lag"] = max(0, info.last - checkpoint.sequence)
                row["state"] = "expired" if checkpoint.sequence + 1 < info.first else "ok"
            else:
                row["state"] = "of another stream"
        row["saved"] = moment(checkpoint.time_ns)
        rows.append(row)
    return rows


async def remove(session: Session, stream: str, name: str, dry_run: bool) -> None:
    broker, found = await load(session, stream, name)
    what = f"forget position {name} of stream {found.stream}, at {found.sequence}"
    if dry_run:
        session.out.outcome(what, dry_run=True)
        session.fail_with(DIFFERENT)
        return
    session.confirm(what)
    await broker.checkpoints.delete(found.stream, name)
    session.out.outcome(f"forgot position {name} of stream {found.stream}")


@app.command("ls")
async def ls(stream: Annotated[str, typer.Argument(metavar="STREAM", help="Only this stream's.")] = "") -> None:
    """List stored positions.

    State is `ok`, `expired` (records after it are gone), `of another stream` (the stream was made again, or a copy
    keeps its source's position here) or `stream is gone`.

    Examples:
      mist checkpoint ls
      mist checkpoint ls trace --format json
    """
    session = current()
    columns = ["stream", "name", "sequence", "lag", "state", "saved"]
    session.out.rows(await listing(session, stream), columns, empty="no stored positions")


@app.command("show")
async def show(stream: StreamName, name: Name) -> None:
    """Show one stored position.

    Examples:
      mist checkpoint show trace ingest
    """
    session = current()
    _, found = await load(session, stream, name)
    session.out.item(shape(found))


@app.command("rm")
async def rm(stream: StreamName, name: Name, dry_run: DryRun = False) -> None:
    """Forget a stored position.

    Examples:
      mist checkpoint rm trace ingest -y
    """
    await remove(current(), stream, name, dry_run)
