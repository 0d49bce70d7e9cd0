"""`mist ping`: is anybody there, and how far away."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated

import typer

from mist.cli.session import Session, current
from mist.errors import EndOfStream, InvalidArgument, TimedOut
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import HEALTH_PING, HEALTH_PONG
from mist.protocol.url import Url, parse_url

if TYPE_CHECKING:
    from mist.transport import Transport

SOURCE = "mist-cli"
TIMEOUT_S = 10.0


async def command(
    url: Annotated[str, typer.Argument(metavar="URL", help="A broker's or a transport's URL; -u if absent.")] = "",
    count: Annotated[int, typer.Option("-n", "--count", min=1, metavar="N", help="How many times.")] = 1,
    interval: Annotated[float, typer.Option("--interval", min=0.0, metavar="S", help="Seconds in between.")] = 1.0,
    wait: Annotated[float, typer.Option("--wait", min=0.0, metavar="S", help="Transports: wait for a pong.")] = 0.0,
) -> None:
    """Reach a URL and time it.

    A broker is asked for a round trip; nothing is stored. A transport (http, file, stdio, chan) is sent one health.ping
    envelope; with --wait a health.pong is waited for, and its absence is exit code 6.

    Examples:
      mist ping log:./data
      mist ping nats://localhost:4222 -n 5
      mist ping http://localhost:8080/mist
    """
    session = current()
    target = parse_url(url) if url else session.url
    rows = []
    for n in range(count):
        if n:
            await asyncio.sleep(interval)
        seconds, what = await _once(session, target, wait)
        row = {"url": target.redacted(), "ms": round(seconds * 1000, 3), "answer": what}
        rows.append(row)
        if session.out.format == "table":
            session.out.note(f"{what} {target.redacted()} ({seconds * 1000:.3f} ms)")
    if session.out.format != "table":
        if count == 1:
            session.out.item(rows[0])
        else:
            session.out.rows(rows, ["url", "ms", "answer"])


async def _once(session: Session, url: Url, wait_s: float) -> tuple[float, str]:
    if url.scheme not in ("http", "https", "file", "stdio", "chan"):
        broker = await session.connect(url)
        return await broker.ping(), "round trip to"
    if url.scheme == "chan":
        raise InvalidArgument("chan: joins two ends of one process, there is nobody to reach from here")
    from mist.transport import dial

    ping = Envelope.new(HEALTH_PING, {"from": SOURCE}, source=SOURCE)
    start = time.monotonic()
    try:
        async with asyncio.timeout(max(TIMEOUT_S, wait_s)), dial(url) as transport:
            await transport.send(ping)
            answered = not wait_s or await _pong(transport, start + wait_s)
    except TimeoutError as exc:
        raise TimedOut(f"{url.redacted()}: no answer within {TIMEOUT_S:g} s") from exc
    if not answered:
        raise TimedOut(f"{url.redacted()}: no pong within {wait_s:g} s")
    return time.monotonic() - start, "pong from" if wait_s else "ping sent to"


async def _pong(transport: Transport, until: float) -> bool:
    """Whether a health.pong came before `until`; other envelopes are passed over."""
    while (left := until - time.monotonic()) > 0:
        try:
            found = await transport.receive_many(1, wait_s=left)
        except EndOfStream:
            return False
        if found and found[0].type == HEALTH_PONG:
            return True
    return False
