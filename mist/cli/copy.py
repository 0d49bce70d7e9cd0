"""`mist copy`: a stream's records to another stream or a file of envelopes."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated

import typer

from mist.cli.options import DryRun, FilterOptions, RangeOptions, Rate
from mist.cli.scan import Bounds, Scan, filter_of
from mist.cli.session import current
from mist.cli.transfer import (
    Transfer,
    open_sink,
    open_source,
    refuse_itself,
    report,
    resume_after,
    source_url,
    span_of,
    transfer_key,
)

Source = Annotated[str, typer.Argument(metavar="SRC", help="A stream's name, URL?stream=NAME, or file:PATH.")]
Destination = Annotated[
    str, typer.Argument(metavar="DST", help="The same; a URL without ?stream= takes the source's name.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Forget how far it got and begin again.")]
DIFFERENT = 10


async def command(
    src: Source,
    dst: Destination,
    span: RangeOptions,
    wanted: FilterOptions,
    rate: Rate = None,
    restart: Restart = False,
    dry_run: DryRun = False,
) -> None:
    """Copy a stream's records to another stream: data, not configuration.

    Ids, subjects, headers and bytes stay; sequence and time are the destination's. The same command goes on where it
    was stopped, and a second run copies what is new. At the end what was stored is read back and the digests are
    compared (exit 8 if they differ). Damaged ranges, and records that the destination does not take (too large, no such
    subject there), are passed over with a warning (exit 9). A broker that goes away is waited for, --timeout bounds it.

    Examples:
      mist copy trace log:./backup
      mist copy trace 'log:./backup?stream=trace-2026' --from @2026-01-01 --rate 5000
      mist copy file:./spans.jsonl trace
      mist copy eval file:./eval.jsonl --subject 'eval.result.*'
    """
    session = current()
    filters, bounds = filter_of(wanted), Bounds(span)
    broker, source = await open_source(session, src)
    info = await source.info()
    checkpoints = broker.checkpoints if broker is not None else None
    to = await bounds.to(source, checkpoints, info)
    key = transfer_key("copy", source_url(session, src), repr(wanted) if wanted != type(wanted)() else "")
    async with AsyncExitStack() as stack:
        if dry_run:
            after = await bounds.after(source, checkpoints, info)
            count = span_of(info, after, to)
            session.out.outcome(f"copy up to {count:,} records of {source.name} to {dst}", dry_run=True)
            if count:
                session.fail_with(DIFFERENT)
            return
        sink = await open_sink(session, dst, source.name if broker is not None else "", stack)
        refuse_itself(broker, source, sink)
        position = await resume_after(session, sink, key, source.incarnation, restart=restart)
        after = await bounds.after(source, checkpoints, info) if position is None else position
        scan = Scan(session, source, filters, after=after, to=to, from_start=position is None and bounds.start is None)
        transfer = Transfer(scan, sink, key=key, incarnation=source.incarnation, rate=rate)
        session.resume = "the same command goes on where this one stopped"
        with session.out.progress("copying", span_of(info, after, to)) as progress:
            await transfer.run(progress)
        session.resume = ""
        digest = await sink.check()
        report(session, sink, source=src, scan=scan, digest=digest, verb="copied")
