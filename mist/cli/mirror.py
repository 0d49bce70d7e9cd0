"""`mist mirror`: a copy that does not end."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AsyncExitStack
from typing import Annotated

import typer

from mist.broker.base import Stream
from mist.broker.clock import SYSTEM
from mist.cli.copy import Destination, Restart, Source
from mist.cli.options import FilterOptions, Rate
from mist.cli.render import seq
from mist.cli.scan import Scan, filter_of
from mist.cli.session import Session, current
from mist.cli.transfer import (
    Sink,
    Transfer,
    complain,
    open_sink,
    open_source,
    refuse_itself,
    resume_after,
    source_url,
    span_of,
    transfer_key,
)
from mist.errors import InvalidArgument

EVERY_S = 5.0
LAST_REPORT_S = 2.0


async def command(
    src: Source,
    dst: Destination,
    wanted: FilterOptions,
    every: Annotated[
        float, typer.Option("--every", min=0.1, metavar="S", help="Seconds between two lag reports.")
    ] = EVERY_S,
    rate: Rate = None,
    restart: Restart = False,
    until_idle: Annotated[bool, typer.Option("--once", help="End when the destination has caught up.")] = False,
) -> None:
    """Copy a stream continuously: first what is there, then what comes, with a stored place and its lag.

    Stop it and start it again at any time: it goes on where it stopped, and stores nothing twice. A broker that goes away is
    waited for. With --format jsonl a
    lag report is one object: {"source","destination","position","last","lag","lag_s","stored","repeated"}.

    Examples:
      mist mirror trace log:./replica
      mist mirror trace nats://localhost:4222 --format jsonl
    """
    session = current()
    if session.out.format == "json" and not until_idle:
        raise InvalidArgument("a mirror has no end, so no JSON document", hint="use --format jsonl")
    filters = filter_of(wanted)
    broker, source = await open_source(session, src)
    info = await source.info()
    key = transfer_key("mirror", source_url(session, src), repr(wanted) if wanted != type(wanted)() else "")
    async with AsyncExitStack() as stack:
        sink = await open_sink(session, dst, source.name if broker is not None else "", stack)
        refuse_itself(broker, source, sink)
        position = await resume_after(session, sink, key, source.incarnation, restart=restart)
        after = info.first - 1 if position is None else position
        scan = Scan(
            session, source, filters, after=after, follow=not until_idle, from_start=position is None,
        )  # fmt: skip
        transfer = Transfer(scan, sink, key=key, incarnation=source.incarnation, rate=rate, follow=True)
        reporter = _Reporter(session, source, sink, transfer, src, every)
        session.resume = "the same command goes on where this one stopped"
        watching = asyncio.create_task(reporter.run())
        try:
            with session.out.progress("mirroring") as progress:
                await transfer.run(progress)
            await sink.check()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_REPORT_S):  # a source that is away must not hold us
                    await reporter.now()
        session.resume = ""
        complain(session, sink)


class _Reporter:
    """Lag in records and seconds: on stderr for people, as values with a machine format."""

    def __init__(
        self, session: Session, source: Stream, sink: Sink, transfer: Transfer, name: str, every: float
    ) -> None:
        self._session = session
        self._source = source
        self._sink = sink
        self._transfer = transfer
        self._name = name
        self._every = every

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            await self.now()

    async def now(self) -> None:
        info = await self._source.info()
        last = info.last
        lag = span_of(info, self._transfer.position, None)
        age = (
            max(0.0, (SYSTEM.time_ns() - self._transfer.last_time_ns) / 1e9)
            if lag and self._transfer.last_time_ns
            else 0.0
        )
        out = self._session.out
        if out.format == "table":
            out.note(f"{self._name} to {self._sink.name}: at {self._transfer.position}, {lag:,} behind ({age:.1f} s)")
            return
        out.item(
            {
                "source": self._name, "destination": self._sink.name, "position": seq(self._transfer.position),
                "last": seq(last), "lag": lag, "lag_s": round(age, 3), "stored": self._sink.stored,
                "repeated": self._sink.repeated,
            }
        )  # fmt: skip
        out.flush()
