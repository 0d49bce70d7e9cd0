"""`mist consumer`: durable consumers, their lag, and working on them by hand.

A consumer is named as `STREAM CONSUMER`, as `STREAM/CONSUMER`, or by its name alone where only one stream has it.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
import typer

from mist.broker.base import Broker, Consumer, ConsumerConfig, ConsumerInfo, Stream
from mist.broker.clock import SYSTEM
from mist.cli.emit import Emitter
from mist.cli.options import DryRun, Select, StreamArg
from mist.cli.position import START, after_of, parse_position
from mist.cli.records import View
from mist.cli.render import moment, seq
from mist.cli.session import Session, current
from mist.cli.wrap import noun
from mist.errors import AlreadyExists, DataLoss, InvalidArgument, NotFound, Unsupported
from mist.protocol.subject import check_name
from mist.quantities import Duration

app = noun("Durable consumers of a stream.")
DIFFERENT = 10
WATCH_S = 2.0

First = Annotated[str, typer.Argument(metavar="STREAM", help="A stream, or STREAM/CONSUMER, or a consumer's name.")]
Second = Annotated[str, typer.Argument(metavar="CONSUMER", help="The consumer, when the first word is its stream.")]


def shape(info: ConsumerInfo) -> dict[str, Any]:
    """The documented JSON shape of a consumer: the lag's keys first, then its state and configuration."""
    return {
        **lag_shape(info),
        "floor": seq(info.floor),
        "delivered": seq(info.delivered),
        "config": msgspec.to_builtins(info.config),
    }


def lag_shape(info: ConsumerInfo) -> dict[str, Any]:
    return {
        "stream": info.stream,
        "consumer": info.name,
        "pending": info.pending,
        "lag": info.lag,
        "lag_s": round(info.lag_s, 3),
        "redelivered": info.redelivered,
    }


async def find(session: Session, first: str, second: str) -> tuple[Broker, Stream, Consumer]:
    """The consumer that one or two words name. Raises NotFound with what is there instead."""
    stream, name = first, second
    if not second and "/" in first and ":" not in first:
        stream, _, name = first.partition("/")
    if name:
        broker, source = await session.locate(stream)
        if broker is None:
            raise Unsupported("consumers", "file:")
        try:
            return broker, source, await source.consumer(check_name(name), create=False)
        except NotFound as exc:
            raise await _none(source, name) from exc
    broker = await session.connect()
    homes = []
    for each in await broker.streams():
        source = await broker.open(each, create=False)
        if await _has_consumers(source) and first in await source.consumers():
            homes.append(source)
    if not homes:
        raise NotFound(f"no consumer {first} on any stream of {broker.url}", hint="`mist consumer ls` shows them")
    if len(homes) > 1:
        raise InvalidArgument(
            f"{len(homes)} streams have a consumer {first}: {', '.join(s.name for s in homes)}",
            hint=f"say which: {homes[0].name}/{first}",
        )
    return broker, homes[0], await homes[0].consumer(first, create=False)


async def _has_consumers(stream: Stream) -> bool:
    return (await stream.info()).capabilities.consumers


async def _none(stream: Stream, name: str) -> NotFound:
    names = await stream.consumers()
    there = f"there are: {', '.join(names[:8])}" if names else "there are none"
    return NotFound(f"stream {stream.name} has no consumer {name}; {there}", hint="`mist consumer create` makes one")


async def _all(session: Session, stream: str) -> list[Consumer]:
    """Every consumer of a stream, or of all streams."""
    if stream:
        sources = [await session.stream(stream)]
    else:
        broker = await session.connect()
        sources = [await broker.open(name, create=False) for name in await broker.streams()]
    found = []
    for source in sources:
        if await _has_consumers(source):
            found.extend([await source.consumer(name, create=False) for name in await source.consumers()])
    return found


@app.command("ls")
async def ls(stream: Annotated[str, typer.Argument(metavar="STREAM", help="Only this stream's.")] = "") -> None:
    """List consumers with their lag.

    Examples:
      mist consumer ls
      mist c ls trace --format json
    """
    session = current()
    rows = [shape(await c.info()) for c in await _all(session, stream)]
    columns = ["stream", "consumer", "pending", "lag", "lag_s", "redelivered", "floor"]
    session.out.rows(rows, columns, empty=f"no consumers{f' on stream {stream}' if stream else ''}")


@app.command("info")
async def info(stream: First, consumer: Second = "") -> None:
    """Show one consumer: position, pending, lag, configuration.

    Examples:
      mist consumer info trace ingest
      mist consumer info ingest --format json
    """
    session = current()
    _, _, found = await find(session, stream, consumer)
    row = shape(await found.info())
    if session.out.format == "table":
        config = row.pop("config")
        row["config"] = " ".join(f"{k}={','.join(v) if isinstance(v, (list, tuple)) else v}" for k, v in config.items())
    session.out.item(row)


@app.command("create")
async def create(
    stream: StreamArg,
    consumer: Annotated[str, typer.Argument(metavar="CONSUMER", help="Its name.")],
    from_: Annotated[str, typer.Option("--from", metavar="POS", help="Where it starts.")] = "start",
    subject: Annotated[list[str], typer.Option("--subject", metavar="PATTERN", help="Only these. Repeatable.")] = [],  # noqa: B006
    ack_wait: Annotated[
        str, typer.Option("--ack-wait", metavar="AGE", help="An unacked delivery returns after.")
    ] = "30s",
    attempts_max: Annotated[
        int, typer.Option("--attempts-max", min=0, help="Then it is a dead letter; 0 = never.")
    ] = 5,
    pending_max: Annotated[int, typer.Option("--pending-max", min=1, help="Unacked deliveries at a time.")] = 65_536,
    if_absent: Annotated[bool, typer.Option("--if-absent", help="Succeed when it exists.")] = False,
) -> None:
    """Make a durable consumer of a stream that exists.

    Examples:
      mist consumer create trace ingest
      mist consumer create trace alerts --from end --subject 'trace.alert.>' --ack-wait 5s
    """
    session = current()
    broker, source = await session.locate(stream)
    if broker is None:
        raise Unsupported("consumers", "file:")
    check_name(consumer)
    if consumer in await source.consumers():
        if not if_absent:
            raise AlreadyExists(f"stream {source.name} has a consumer {consumer}", hint="--if-absent accepts it")
        found = await source.consumer(consumer, create=False)
    else:
        found_info = await source.info()
        position = parse_position(from_, now_ns=SYSTEM.time_ns())
        after = 0 if position == START else await after_of(position, source, broker.checkpoints, found_info)
        config = ConsumerConfig(
            after=after,
            subjects=tuple(subject) or (">",),
            ack_wait_s=float(Duration(ack_wait)),
            attempts_max=attempts_max,
            pending_max=pending_max,
        )
        found = await source.consumer(consumer, config)
    if session.out.format == "table":
        session.out.note(f"consumer {consumer} is on stream {source.name}")
    else:
        session.out.item(shape(await found.info()))


@app.command("rm")
async def rm(stream: First, consumer: Second = "", dry_run: DryRun = False) -> None:
    """Delete a consumer: its position and its pending deliveries are forgotten.

    Examples:
      mist consumer rm trace ingest -y
      mist consumer rm ingest --dry-run
    """
    session = current()
    _, source, found = await find(session, stream, consumer)
    state = await found.info()
    what = f"delete consumer {found.name} of stream {source.name}, at {state.floor} with {state.pending} pending"
    if dry_run:
        session.out.outcome(what, dry_run=True)
        session.fail_with(DIFFERENT)
        return
    session.confirm(what)
    await found.delete()
    session.out.outcome(f"deleted consumer {found.name} of stream {source.name}")


@app.command("lag")
async def lag(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="A stream, STREAM/CONSUMER, or a consumer.")] = "",
    consumer: Second = "",
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Again every two seconds, until interrupted.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, metavar="S", help="Seconds between two looks.")] = WATCH_S,
) -> None:
    """How far consumers are behind, in records and in seconds.

    JSON: {"stream","consumer","pending","lag","lag_s","redelivered"}; one object when one consumer is named, else a
    list. With --watch one line per consumer and look.

    Examples:
      mist consumer lag
      mist consumer lag trace ingest --format json
      mist c lag trace --watch
    """
    session = current()
    out = session.out
    consumers, single = await _wanted(session, stream, consumer)
    columns = ["stream", "consumer", "pending", "lag", "lag_s", "redelivered"]
    if watch and out.format == "json":
        raise InvalidArgument("--watch has no end, so no JSON document", hint="use --format jsonl")
    while True:
        rows = [lag_shape(await c.info()) for c in consumers]
        if not watch:
            if single and out.format != "table":
                out.item(rows[0])
            else:
                out.rows(rows, columns, empty="no consumers")
            return
        if out.terminal and out.format == "table":
            out.text("\x1b[H\x1b[2J" if out.color else "")
            out.text(f"{moment(SYSTEM.time_ns())}\n")
        out.rows(rows, columns, empty="no consumers")
        out.flush()
        await asyncio.sleep(every)


async def _wanted(session: Session, first: str, second: str) -> tuple[list[Consumer], bool]:
    if first and not second and "/" not in first and ":" not in first:
        broker = await session.connect()
        if first in await broker.streams():
            return await _all(session, first), False
    if first and (second or "?" not in first):
        return [(await find(session, first, second))[2]], True
    return await _all(session, first), False


@app.command("next")
async def next_(
    stream: First,
    consumer: Second = "",
    count: Annotated[int, typer.Option("-n", "--count", min=1, metavar="N", help="How many.")] = 1,
    wait: Annotated[
        float, typer.Option("--wait", min=0, metavar="S", help="Wait up to S seconds for the first.")
    ] = 0.0,
    ack: Annotated[bool, typer.Option("--ack", help="Done: never again.")] = False,
    nak: Annotated[bool, typer.Option("--nak", help="Again, later.")] = False,
    term: Annotated[bool, typer.Option("--term", help="Never again: to the dead letters.")] = False,
    delay: Annotated[
        float, typer.Option("--delay", min=0, metavar="S", help="With --nak: not before S seconds.")
    ] = 0.0,
    reason: Annotated[str, typer.Option("--reason", help="With --term: why.")] = "termed by hand",
    select: Select = None,
) -> None:
    """Fetch the next deliveries of a consumer and show them; settle them with --ack, --nak or --term.

    Without one of these they stay with this consumer and return after its ack wait. Ends with 3 when there are none.

    Examples:
      mist consumer next trace ingest
      mist consumer next ingest -n 10 --ack --format jsonl
      mist consumer next ingest --term --reason 'broken payload'
    """
    session = current()
    if ack + nak + term > 1:
        raise InvalidArgument("--ack, --nak and --term exclude each other")
    _, source, found = await find(session, stream, consumer)
    try:
        deliveries = await found.fetch(limit=count, wait_s=wait)
    except DataLoss as exc:
        session.out.warn(exc.message)
        session.fail_with(9)
        deliveries = await found.fetch(limit=count, wait_s=wait)
    if not deliveries:
        state = await found.info()
        raise NotFound(
            f"consumer {found.name} of stream {source.name} has nothing to deliver; {state.pending} pending",
            hint="--wait S waits for more",
        )
    with Emitter(session.out, select) as emitter:
        emitter.views([View(d.record) for d in deliveries])
    repeated = [d for d in deliveries if d.attempt > 1]
    if repeated:
        session.out.note(f"{len(repeated)} of them again, up to attempt {max(d.attempt for d in repeated)}")
    if ack:
        settled = await found.ack(deliveries)
    elif nak:
        settled = await found.nak(deliveries, delay_s=delay)
    elif term:
        settled = await found.term(deliveries, reason=reason)
    else:
        session.out.note(f"not settled: back after {found.config.ack_wait_s:g} s")
        return
    if settled < len(deliveries):
        session.out.warn(f"{len(deliveries) - settled} were no longer ours")
        session.fail_with(9)


@app.command("pending")
async def pending(
    stream: First,
    consumer: Second = "",
    count: Annotated[int, typer.Option("-n", "--count", min=1, metavar="N", help="At most N.")] = 1000,
) -> None:
    """List unsettled deliveries: sequence, attempt, seconds until they return.

    Examples:
      mist consumer pending trace ingest
      mist consumer pending ingest -n 20 --format json
    """
    session = current()
    _, _, found = await find(session, stream, consumer)
    rows = [
        {"sequence": seq(p.sequence), "attempt": p.attempt, "due_s": round(p.due_s, 3)}
        for p in await found.pending(limit=count)
    ]
    session.out.rows(rows, ["sequence", "attempt", "due_s"], empty=f"consumer {found.name} has nothing pending")


@app.command("seek")
async def seek(
    stream: First,
    consumer: Second = "",
    to: Annotated[str, typer.Option("--to", metavar="POS", help="Start with this record next.")] = "",
    dry_run: DryRun = False,
) -> None:
    """Move a consumer: pending deliveries and attempts are forgotten, the next fetch starts with the record at POS.

    Examples:
      mist consumer seek trace ingest --to @-1h
      mist consumer seek ingest --to +4711 -y
      mist consumer seek ingest --to end --dry-run
    """
    session = current()
    if not to:
        raise InvalidArgument("seek needs --to POS", hint="start, end, N, +N, -N, @TIME, cursor:NAME")
    await _move(session, stream, consumer, to, dry_run)


@app.command("reset")
async def reset(stream: First, consumer: Second = "", dry_run: DryRun = False) -> None:
    """Move a consumer back to the first kept record.

    Examples:
      mist consumer reset trace ingest -y
    """
    await _move(current(), stream, consumer, "start", dry_run)


async def _move(session: Session, first: str, second: str, to: str, dry_run: bool) -> None:
    broker, source, found = await find(session, first, second)
    position = parse_position(to, now_ns=SYSTEM.time_ns())
    after = await after_of(position, source, broker.checkpoints, await source.info())
    state = await found.info()
    what = (
        f"move consumer {found.name} of stream {source.name} from {state.floor} to {after}, "
        f"forgetting {state.pending} pending"
    )
    if dry_run:
        session.out.outcome(what, dry_run=True)
        if after != state.floor or state.pending:
            session.fail_with(DIFFERENT)
        return
    session.confirm(what)
    await found.seek(after)
    if session.out.format == "table":
        session.out.note(f"consumer {found.name} goes on after {after}")
    else:
        session.out.item(shape(await found.info()))
