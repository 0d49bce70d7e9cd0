"""`mist replay`: a stream's records sent again, in order, at the pace they came or faster."""

from __future__ import annotations

import asyncio
import re
import shlex
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from mist.broker.base import Message, Record, Stream
from mist.broker.clock import SYSTEM
from mist.broker.feed import REFUSED, Feed
from mist.broker.patience import Patience
from mist.cli.emit import Emitter
from mist.cli.options import Count, FilterOptions, OptionGroup, Select, StreamArg
from mist.cli.position import END, after_of, last_of, parse_position, since_position
from mist.cli.records import View
from mist.cli.render import seq
from mist.cli.scan import PARTIAL, Scan, filter_of
from mist.cli.session import STREAMLESS, Session, current
from mist.cli.transfer import Refusals, open_source, patience, reach, span_of
from mist.errors import InvalidArgument
from mist.protocol.url import has_scheme, parse_url, redact

if TYPE_CHECKING:
    from mist.transport import Transport

BATCH = 500


class ReplayOptions(OptionGroup, frozen=True, kw_only=True):
    """Where from, where to, how fast."""

    from_: Annotated[str, typer.Option("--from", metavar="POS", help="First record.")] = "start"
    until: Annotated[str | None, typer.Option("--until", metavar="POS", help="Last record, inclusive; or an age.")] = (
        None
    )
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="URL", help="A stream, a broker URL?stream=NAME, or a transport's URL."),
    ] = None
    speed: Annotated[str, typer.Option("--speed", metavar="1x|10x|max", help="Of the records' own pace.")] = "max"


async def command(
    stream: StreamArg,
    replay: ReplayOptions,
    wanted: FilterOptions,
    count: Count = None,
    select: Select = None,
) -> None:
    """Send a stream's records again from a position: to a transport, to another stream, or to standard output.

    Ids are kept: a stream that has seen one within its window does not store it again. The pace is that of the records'
    times at the broker. --to names the destination; the range ends with --until. A broker that goes away is waited for,
    --timeout bounds it; a destination stream gets nothing twice by that. Stopped, it says which --from goes on.

    Examples:
      mist replay trace --from @-1h --speed 10x --to http://localhost:8080/mist
      mist replay eval --from 4711 --to 'log:./lab?stream=eval'
      mist replay trace --from cursor:demo --speed 1x
    """
    session = current()
    factor = _speed(replay.speed)
    broker, source = await open_source(session, stream)
    info = await source.info()
    checkpoints = broker.checkpoints if broker is not None else None
    now = SYSTEM.time_ns()
    after = await after_of(parse_position(replay.from_, now_ns=now), source, checkpoints, info)
    end = END
    if replay.until is not None:
        aged = re.fullmatch(r"[\d.]+[a-z].*", replay.until)
        end = since_position(replay.until, now_ns=now) if aged else parse_position(replay.until, now_ns=now)
    to = await last_of(end, source, checkpoints, info)
    scan = Scan(session, source, filter_of(wanted), after=after, to=to, limit=count, from_start=replay.from_ == "start")
    pace = _Pace(factor)
    sent = 0
    where = f" --to {shlex.quote(replay.to)}" if replay.to else ""

    def resume(after: int) -> str:
        return f"resume with: {session.again(f'replay {shlex.quote(stream)} --from +{after}{where}')}"

    async with AsyncExitStack() as stack:
        destination = await _destination(session, replay.to, select, stack)
        session.resume = resume(after)
        with session.out.progress("replaying", span_of(info, after, to)) as progress:
            async for page in scan.pages():
                at = 0
                while at < len(page):
                    ready = await pace.ready(page, at)
                    await destination.send(page[at:ready])
                    sent += ready - at
                    at = ready
                    session.resume = resume(page[at - 1].record.sequence)
                progress.at(sent)
        session.resume = ""
    if destination.refused:
        session.out.warn(f"{destination.refused} records {destination.why} and were not sent")
        session.fail_with(PARTIAL)
    if replay.to:
        if session.out.format == "table":
            session.out.note(f"replayed {sent - destination.refused:,} records of {source.name} to {replay.to}")
        else:
            session.out.item(
                {
                    "source": source.name,
                    "destination": replay.to,
                    "sent": sent - destination.refused,
                    "position": seq(scan.position),
                }
            )
    elif not sent:
        session.out.note(f"no record of stream {source.name} in this range matches")


class _Destination:
    refused = 0
    why = "are no envelopes"

    async def send(self, views: list[View]) -> None:
        raise NotImplementedError


class _Stdout(_Destination):
    def __init__(self, emitter: Emitter) -> None:
        self._emitter = emitter

    async def send(self, views: list[View]) -> None:
        self._emitter.views(views)


class _Stream(_Destination):
    why = "are not taken there"

    def __init__(self, session: Session, stream: Stream, name: str) -> None:
        refusals = Refusals(session, name)
        self._sequences: dict[int, int] = {}
        self._feed = Feed(
            stream, patience(session, name), on_refused=lambda m, e: refusals(self._sequences.get(id(m), 0), e)
        )

    async def send(self, views: list[View]) -> None:
        messages = [_message(v.record) for v in views]
        self._sequences = {id(m): v.record.sequence for m, v in zip(messages, views, strict=True)}
        self.refused += (await self._feed.put(messages)).count(REFUSED)


class _Wire(_Destination):
    def __init__(self, transport: Transport, waits: Patience | None) -> None:
        self._transport = transport
        self._waits = waits

    async def send(self, views: list[View]) -> None:
        envelopes = [v.envelope for v in views if v.envelope is not None]
        self.refused += len(views) - len(envelopes)
        if self._waits is None:  # pipes and files do not come back
            await self._transport.send_many(envelopes)
        else:
            await self._waits(lambda: self._transport.send_many(envelopes))


def _message(record: Record) -> Message:
    return Message(record.subject, record.data, record.id, record.headers)


async def _destination(session: Session, to: str | None, select: str | None, stack: AsyncExitStack) -> _Destination:
    if to is None:
        return _Stdout(stack.enter_context(Emitter(session.out, select)))
    if has_scheme(to) and (parse_url(to).scheme in STREAMLESS or parse_url(to).scheme == "file"):
        from mist.transport import dial

        url = parse_url(to)
        waits = patience(session, url.redacted()) if url.scheme in ("http", "https") else None
        return _Wire(await stack.enter_async_context(dial(to)), waits)
    name = redact(session.target(to)[0].without_query())
    target = await reach(session, name, lambda: session.stream(to, create=True))
    return _Stream(session, target, name)


def _speed(text: str) -> float:
    """How many times faster than it came; 0 = as fast as it goes."""
    if text == "max":
        return 0.0
    try:
        factor = float(text.removesuffix("x"))
    except ValueError:
        factor = 0.0
    if not 0 < factor <= 1e6:
        raise InvalidArgument(f"--speed {text!r} cannot be right", hint="1x, 10x, 0.5x or max")
    return factor


class _Pace:
    """When each record is due, by its time at the broker."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._zero_ns = 0
        self._start = 0.0

    async def ready(self, page: list[View], at: int) -> int:
        """Wait for the record at `at`; returns the end of what is due with it."""
        if not self._factor:
            return min(at + BATCH, len(page))
        if not self._start:
            self._start, self._zero_ns = time.monotonic(), page[at].record.timestamp_ns
        early = self._due(page[at]) - time.monotonic()
        if early > 0:
            await asyncio.sleep(early)
        now = time.monotonic()
        end = at + 1
        while end < len(page) and end - at < BATCH and self._due(page[end]) <= now:
            end += 1
        return end

    def _due(self, view: View) -> float:
        return self._start + max(0, view.record.timestamp_ns - self._zero_ns) / 1e9 / self._factor
