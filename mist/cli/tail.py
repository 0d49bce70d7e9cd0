"""`mist tail`: the last records, a range, or what comes next."""

from __future__ import annotations

import shlex
import time
from typing import Annotated

import typer

from mist.broker.base import Broker, Checkpoint, Stream
from mist.cli.emit import Emitter
from mist.cli.options import FilterOptions, RangeOptions, Select, StreamArg
from mist.cli.scan import Bounds, Scan, explain_empty, filter_of, last_matching
from mist.cli.session import Session, current
from mist.errors import InvalidArgument
from mist.protocol.subject import check_name

DEFAULT_COUNT = 10
SAVE_EVERY_S = 1.0


async def command(
    stream: StreamArg,
    span: RangeOptions,
    wanted: FilterOptions,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Wait for new records.")] = False,
    count: Annotated[
        int | None,
        typer.Option("-n", "--count", min=0, metavar="N", help="The last N (10), or the first N of a range."),
    ] = None,
    select: Select = None,
    save_cursor: Annotated[
        str | None, typer.Option("--save-cursor", metavar="NAME", help="Remember how far this got, as a named cursor.")
    ] = None,
) -> None:
    """Show the last records of a stream, a range of it, or follow it.

    Without a range these are the last 10, or the last N with -n. With --from or --since it is the range, or its first N.
    JSON lines are {"sequence","subject","timestamp_ns","envelope"}; the envelope's bytes are those that were published.

    Examples:
      mist tail trace -f
      mist tail trace -n 100 --type trace.span --where 'payload.attrs.latency_ms>500'
      mist tail trace --since 1h --format jsonl | jq .envelope.payload
      mist tail eval --from cursor:report --save-cursor report
      mist tail file:./spans.jsonl --grep timeout
    """
    session = current()
    filters = filter_of(wanted)
    bounds = Bounds(span)
    emitter = Emitter(session.out, select, follow=follow)
    broker, source = await session.locate(stream)
    info = await source.info()
    for warning in info.warnings:
        session.out.warn(f"stream {source.name}: {warning}")
    checkpoints = broker.checkpoints if broker is not None else None
    to = await bounds.to(source, checkpoints, info)
    saver = _Saver(broker, source, save_cursor)
    where = broker.url if broker is not None else "file:"
    with emitter:
        shown = 0
        limit = count
        if bounds.start is None:
            upper = info.last if to is None else min(to, info.last)
            wished = DEFAULT_COUNT if count is None else count
            views = await last_matching(session, source, filters, wished, to=upper) if wished else []
            emitter.views(views)
            shown, after, limit = len(views), upper, None
            await saver.at(after, last=True)
            if not follow:
                if not views and wished:
                    explain_empty(session, source, info, None, where)
                return
        else:
            after = await bounds.after(source, checkpoints, info)
        scan = Scan(
            session, source, filters, after=after, to=to, limit=limit, follow=follow,
            from_start=bounds.start is not None and bounds.start.kind == "start",
        )  # fmt: skip
        session.resume = _resume(session, stream, after)
        try:
            async for page in scan.pages():
                emitter.views(page)
                session.resume = _resume(session, stream, scan.position)
                await saver.at(scan.position)
        finally:
            await saver.at(scan.position, last=True)
        session.resume = ""
        if not shown + scan.matched and not follow:
            explain_empty(session, source, info, scan, where)


def _resume(session: Session, stream: str, after: int) -> str:
    return f"resume with: {session.again(f'tail {shlex.quote(stream)} --from +{after}')}"


class _Saver:
    """Saves the named cursor, after what it covers was flushed; at most once a second and at the end."""

    def __init__(self, broker: Broker | None, stream: Stream, name: str | None) -> None:
        if name is not None and broker is None:
            raise InvalidArgument("a file keeps no cursors", hint="note the line number, `--from +N` goes on after it")
        self._broker = broker
        self._stream = stream
        self._name = check_name(name) if name is not None else None
        self._next = 0.0
        self._saved = -1

    async def at(self, sequence: int, *, last: bool = False) -> None:
        if self._name is None or self._broker is None or sequence == self._saved:
            return
        now = time.monotonic()
        if now < self._next and not last:
            return
        self._next = now + SAVE_EVERY_S
        self._saved = sequence
        await self._broker.checkpoints.save(
            Checkpoint(
                stream=self._stream.name, name=self._name, incarnation=self._stream.incarnation, sequence=sequence
            )
        )
