"""`mist spool`: what waits in front of a broker, and getting it there."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any

import msgspec
import typer

from mist.cli.session import Session, current
from mist.cli.wrap import noun
from mist.errors import Closed, InvalidArgument
from mist.log.spool import SpoolBroker

app = noun("A log in front of a broker (spool+URL): what waits in it, and forwarding it.")
EVERY_S = 0.2
COLUMNS = ["stream", "waiting", "lag_s", "bytes", "forwarded", "refused", "dropped"]


async def _spool(session: Session, *, create: bool) -> SpoolBroker:
    url = session.url
    if not url.scheme.startswith("spool+"):
        raise InvalidArgument(f"{url.redacted()} is no spool", hint=f"mist -u spool+{url.redacted()} spool …")
    broker = await session.connect(url, create=create)
    assert isinstance(broker, SpoolBroker)  # noqa: S101  the scheme says so
    return broker


def _rows(figures: list[Any]) -> list[dict[str, Any]]:
    return [{**msgspec.to_builtins(f), "lag_s": round(f.lag_s, 3)} for f in figures]


@app.command("status")
async def status() -> None:
    """Show what waits, stream by stream, who forwards it, and why it does not get on.

    waiting: here and not yet at the broker behind; forwarded: there; refused: never taken, kept as dead letters of the
    spool; dropped: lost before they were sent (spool_full=drop_oldest, damage). Nothing is forwarded by looking.

    Examples:
      mist spool status -u spool+nats://localhost:4222
      mist -u 'spool+redis://localhost/0?spool=./spool' spool status --format json
    """
    session = current()
    broker = await _spool(session, create=False)
    session.out.rows(_rows(await broker.figures()), COLUMNS, empty=f"nothing was ever published through {broker.url}")
    for fact in await broker.describe():
        if fact.warning:
            session.out.warn(f"{fact.what}: {fact.value}: {fact.warning}")
        else:
            session.out.note(f"{fact.what}: {fact.value}")


@app.command("flush")
async def flush(
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on forwarding until stopped, for short-lived publishers.")
    ] = False,
) -> None:
    """Forward what waits and return when nothing does any more.

    A broker that is away is waited for: --timeout bounds it (exit 6; what waits stays). Where another process forwards,
    this one waits for it, and takes over when it ends.

    Examples:
      mist -u spool+nats://localhost:4222 spool flush --timeout 60
      mist -u spool+nats://localhost:4222 spool flush -f
    """
    session = current()
    broker = await _spool(session, create=True)
    begun = await broker.waiting()
    telling = asyncio.create_task(_tell(session, broker))
    try:
        with session.out.progress("forwarding", begun) as progress:
            while (waiting := await broker.waiting()) or follow:
                progress.at(max(0, begun - waiting))
                await asyncio.sleep(EVERY_S if waiting else 1.0)
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
    figures = await broker.figures()
    if session.out.format == "table":
        session.out.note(
            f"nothing waits in {broker.spool.path}; {sum(f.forwarded for f in figures):,} forwarded so far"
        )
    else:
        session.out.rows(_rows(figures), COLUMNS)


async def _tell(session: Session, broker: SpoolBroker) -> None:
    """One line on stderr for every new reason not to get on."""
    said = ""
    with contextlib.suppress(Closed):
        while True:
            running = broker.spool.forwarding()
            error = running.error if running is not None else ""
            if error and error != said:
                session.out.warn(f"{broker.destination}: {error}; trying again")
            elif said and not error:
                session.out.note(f"{broker.destination}: forwarding")
            said = error
            await asyncio.sleep(EVERY_S)
