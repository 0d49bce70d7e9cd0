"""`mist sub`: follow a stream as a worker, through a consumer."""

from __future__ import annotations

from typing import Annotated

import typer

from mist.broker.base import Consumer, ConsumerConfig, Delivery
from mist.broker.clock import SYSTEM
from mist.cli.emit import Emitter
from mist.cli.options import FilterOptions, Select, StreamArg
from mist.cli.position import START, after_of, parse_position
from mist.cli.records import View
from mist.cli.scan import filter_of, report_damage
from mist.cli.session import current
from mist.errors import DataLoss, Unsupported
from mist.protocol.ids import new_id
from mist.protocol.subject import check_name

WAIT_S = 30.0


async def command(
    stream: StreamArg,
    wanted: FilterOptions,
    consumer: Annotated[
        str | None, typer.Option("--consumer", metavar="NAME", help="A durable consumer; made if it is not there.")
    ] = None,
    from_: Annotated[str, typer.Option("--from", metavar="POS", help="Where a new consumer starts.")] = "end",
    ack: Annotated[bool, typer.Option("--ack/--no-ack", help="Ack what was printed; else it returns.")] = True,
    count: Annotated[
        int | None, typer.Option("-n", "--count", min=1, metavar="N", help="Stop after N records.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Fetch up to N at a time.")] = 256,
    select: Select = None,
) -> None:
    """Follow a stream as a worker: fetch, print, ack. Several of them with one --consumer share the records.

    Without --consumer it is a consumer of its own that is deleted at the end. Records are acked after they were
    printed and flushed, so that a broken pipe loses none. --subject is applied by the broker; what other filters leave
    out is acked without being printed.

    Examples:
      mist sub trace
      mist sub trace --consumer ingest --from start --format jsonl
      mist sub trace --consumer probe --no-ack -n 1
    """
    session = current()
    filters = filter_of(wanted)
    emitter = Emitter(session.out, select, follow=count is None)
    broker, source = await session.locate(stream)
    if broker is None:
        raise Unsupported("consumers", "file:")
    name = check_name(consumer) if consumer else f"mist-sub-{new_id()[:12]}"
    worker: Consumer
    if consumer and name in await source.consumers():
        worker = await source.consumer(name, create=False)
    else:
        position = parse_position(from_, now_ns=SYSTEM.time_ns())
        after = 0 if position == START else await after_of(position, source, broker.checkpoints, await source.info())
        worker = await source.consumer(name, ConsumerConfig(after=after, subjects=filters.subjects))
    shown = 0
    held: list[Delivery] = []
    try:
        with emitter:
            while count is None or shown < count:
                limit = batch if count is None else min(batch, count - shown)
                try:
                    held = await worker.fetch(limit=limit, wait_s=WAIT_S)
                except DataLoss as exc:
                    report_damage(session, exc)
                    continue
                views = [View(d.record) for d in held]
                match = [v for v in views if filters.test is None or filters.test(v)]
                emitter.views(match)
                shown += len(match)
                if ack and held:
                    await worker.ack(held)
                held = []
    finally:
        if held and ack:
            await worker.nak(held)  # fetched, not printed: the next worker gets them at once
        if not consumer:
            await worker.delete()
