"""`mist get`: one record, decoded."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from mist.broker.base import Broker, Stream, header
from mist.cli.filters import compile_filter, split_path
from mist.cli.options import Select, StreamArg
from mist.cli.records import View, as_row, document, selected
from mist.cli.render import Output, escape, moment
from mist.cli.scan import check_readable, last_matching
from mist.cli.session import Session, current
from mist.errors import CursorAhead, InvalidArgument, MistError, NotFound


async def command(
    stream: StreamArg,
    which: Annotated[str, typer.Argument(metavar="SEQ|first|last", help="A sequence, `first` or `last`.")] = "",
    id: Annotated[str | None, typer.Option("--id", metavar="ID", help="The record with this envelope id.")] = None,
    blobs: Annotated[
        str, typer.Option("--blobs", metavar="DIR", help="Where large payloads lie; for log:DIR it is DIR/blobs.")
    ] = "",
    select: Select = None,
) -> None:
    """Show one record, decoded.

    With --format raw these are the bytes of the record and nothing else.

    Examples:
      mist get trace last
      mist get trace 4711 --format jsonl
      mist get trace --id 3f2c9a1e5b7d4c6f8a0b1c2d3e4f5a6b
      mist get trace first --select payload.operation,payload.attrs
    """
    session = current()
    if bool(which) == (id is not None):
        raise InvalidArgument("name one record: a sequence, first, last, or --id ID", hint="see `mist get --help`")
    broker, source = await session.locate(stream)
    view = await (_by_id(session, source, id) if id is not None else _by_sequence(source, which))
    view = _whole(session, broker, view, blobs)
    _show(session.out, view, select)


def _whole(session: Session, broker: Broker | None, view: View, directory: str) -> View:
    """With its payload, where that lies beside the stream and can be had; else the reference, and a warning."""
    from mist.client.blobs import REF, Blobs, beside, whole

    reference = header(view.record.headers, REF)
    if not reference:
        return view
    blobs = Blobs(directory) if directory else beside(broker) if broker is not None else None
    if blobs is None:
        session.out.warn(f"the payload lies beside the stream ({reference}); --blobs DIR says where")
        return view
    try:
        return View(whole(view.record, blobs))
    except MistError as exc:
        session.out.warn(exc.message)
        session.fail_with(9)
        return view


async def _by_sequence(stream: Stream, which: str) -> View:
    info = await stream.info()
    await check_readable(stream, info)
    if info.records == 0:
        raise NotFound(f"stream {stream.name} is empty")
    if which in ("first", "last"):
        sequence = info.first if which == "first" else info.last
    elif which.isascii() and which.isdigit() and 0 < len(which) < 20:
        sequence = int(which)
    else:
        raise InvalidArgument(f"not a record: {which[:40]!r}", hint="a sequence, `first` or `last`")
    missing = NotFound(f"stream {stream.name} has no record {sequence}", hint=f"it holds {info.first} to {info.last}")
    if sequence < 1:
        raise missing
    try:
        page = await stream.read(after=sequence - 1, limit=1)
    except CursorAhead as exc:
        raise missing from exc
    record = page.records[0] if page.records else None
    if record is None or (record.sequence != sequence and which != "first"):
        raise missing
    return View(record)


async def _by_id(session: Session, stream: Stream, id: str) -> View:
    info = await stream.info()
    found = await last_matching(session, stream, compile_filter(id=[id]), 1, to=info.last)
    if not found:
        raise NotFound(
            f"stream {stream.name} has no record with id {id}", hint=f"looked at {info.first} to {info.last}"
        )
    return found[0]


def _show(out: Output, view: View, select: str | None) -> None:
    record = view.record
    if out.format == "raw" and select is None:
        out.write(record.data + (b"\n" if out.terminal else b""))
        return
    if select is not None:
        paths = [(n.strip(), split_path(n.strip())) for n in select.split(",") if split_path(n.strip())]
        out.item(selected(view, paths))
        return
    if out.json:
        data = document(view)
        out.write((msgspec.json.format(data, indent=2) if out.format == "json" else data) + b"\n")
        return
    if out.format == "csv":
        out.item(as_row(view))
        return
    env = view.envelope
    out.text(f"{out.strong('sequence')}   {record.sequence}\n")
    out.text(f"{out.strong('subject')}    {escape(record.subject)}\n")
    out.text(f"{out.strong('stored')}     {moment(record.timestamp_ns)}\n")
    for name, value in record.headers:
        out.text(f"{out.strong('header')}     {escape(name)}: {escape(value)}\n")
    if env is None:
        if view.error is not None:
            out.text(f"{out.strong('foreign')}    {escape(view.error.message)}\n")
        out.text(_lines(record.data))
        return
    rows = {
        "type": env.type,
        "id": env.id,
        "source": env.source,
        "sent": moment(env.timestamp_ns),
        "version": env.version,
        "checksum": str(env.checksum) if env.checksum else "",
        "correlation": env.correlation_id,
        "causation": env.causation_id,
        "traceparent": env.traceparent,
        "tenant": env.tenant,
    }
    for name, value in rows.items():
        if value:
            out.text(f"{out.strong(name)}{' ' * (11 - len(name))}{escape(value)}\n")
    out.text(_lines(msgspec.json.format(bytes(env.payload), indent=2)))


def _lines(data: bytes) -> str:
    """Text over several lines, each safe on a terminal."""
    return "".join(f"{escape(text)}\n" for text in data.decode("utf-8", "backslashreplace").split("\n"))
