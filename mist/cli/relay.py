"""`mist relay`: envelopes from one transport to another, bytes of the payload untouched. The seed's verb."""

from __future__ import annotations

import math
import shlex
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from mist.cli.options import Rate
from mist.cli.session import Session, current
from mist.cli.transfer import patience, reach
from mist.errors import EndOfStream, InvalidArgument, ProtocolError, TooLarge
from mist.kit.parallel import RateLimiter
from mist.protocol.url import Url, has_scheme, parse_url

if TYPE_CHECKING:
    from mist.protocol.envelope import Envelope
    from mist.transport import Transport

T = TypeVar("T")
PARTIAL = 9
WAIT_S = 1.0


def _waiting(session: Session, url: Url) -> Callable[[Callable[[], Awaitable[T]]], Awaitable[T]]:
    """How to call what may be away: pipes and files do not come back."""
    return _once if url.scheme in ("stdio", "file", "chan") else patience(session, url.redacted())


async def _once(call: Callable[[], Awaitable[T]]) -> T:
    return await call()


async def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Where to receive: any transport's or broker's URL.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Where to send.")],
    count: Annotated[int | None, typer.Option("-n", "--count", min=1, metavar="N", help="Stop after N.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, max=10_000, metavar="N", help="At most N at a time.")] = 256,
    rate: Rate = None,
) -> None:
    """Copy envelopes from one transport to another until the source ends or you stop it.

    Payloads go over byte for byte. A document that is no acceptable envelope is told on stderr and passed over (exit 9).
    A broker that goes away is waited for, --timeout bounds it. Where SRC names a consumer, an envelope is acknowledged
    when DST has it, and the same command goes on; without one the position to go on from is printed when it is stopped.
    For streams, with stored positions and verification, there is `mist copy`.

    Examples:
      mist relay file:./spans.jsonl http://localhost:8080/mist
      producer | mist relay stdio: 'log:./data?stream=trace'
      mist relay 'log:./data?stream=trace&follow=0' stdio:
    """
    session = current()
    for text in (src, dst):
        if not has_scheme(text):
            raise InvalidArgument(f"{text}: not a URL", hint="for streams of one broker use `mist copy`")
    from mist.transport import dial

    async def _dial(url: Url) -> Transport:
        return await dial(url)

    source, target = parse_url(src), parse_url(dst)
    receives, sends = (_waiting(session, url) for url in (source, target))
    names = f"{source.redacted()} to {target.redacted()}"
    relayed = refused = 0
    pace = RateLimiter(rate or math.inf, burst=1)
    session.out.detail(f"relaying {names}")
    try:
        async with (
            await reach(session, source.redacted(), lambda: _dial(source)) as receiving,
            await reach(session, target.redacted(), lambda: _dial(target)) as sending,
        ):

            async def receive(limit: int) -> list[Envelope]:
                return await receives(lambda: receiving.receive_many(limit, wait_s=WAIT_S))

            def resume() -> str:
                at = getattr(receiving, "position", None)
                if source.get("consumer") or not isinstance(at, int):
                    return "the same command goes on where this one stopped" if source.get("consumer") else ""
                query = (*(kv for kv in source.query if kv[0] != "from"), ("from", f"+{at}"))
                again = Url(source.scheme, source.target, query).redacted()
                return f"resume with: mist relay {shlex.quote(again)} {shlex.quote(target.redacted())}"

            with session.out.progress("relaying", count or 0) as progress:
                while count is None or relayed < count:
                    limit = batch if count is None else min(batch, count - relayed)
                    try:
                        found = await receive(limit)
                    except EndOfStream:
                        break
                    except (ProtocolError, TooLarge) as exc:
                        session.out.warn(f"passed over: {exc.message}")
                        refused += 1
                        continue
                    await pace.take(len(found))
                    # repeated with the same ids: a stream stores them once, others may get them again
                    await sends(lambda found=found: sending.send_many(found))  # type: ignore[misc]
                    relayed += len(found)
                    progress.at(relayed)
                    session.resume = resume()
            session.resume = ""
    finally:
        if target.scheme != "stdio" and session.out.format != "table":
            session.out.item(
                {"source": source.redacted(), "destination": target.redacted(), "relayed": relayed, "refused": refused}
            )
        else:
            session.out.note(f"relayed {relayed:,} messages from {names}")
    if refused:
        session.fail_with(PARTIAL)
