"""`mist relay`: envelopes from one transport to another, bytes of the payload untouched. The seed's verb."""

from __future__ import annotations

from typing import Annotated

import typer

from mist.cli.options import Rate
from mist.cli.pub import Pace
from mist.cli.session import current
from mist.errors import EndOfStream, InvalidArgument, ProtocolError, TooLarge
from mist.protocol.url import has_scheme, parse_url

PARTIAL = 9
WAIT_S = 1.0


async def command(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Where to receive: any transport's or broker's URL.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Where to send.")],
    count: Annotated[int | None, typer.Option("-n", "--count", min=1, metavar="N", help="Stop after N.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, max=10_000, metavar="N", help="At most N at a time.")] = 256,
    rate: Rate = None,
) -> None:
    """Copy envelopes from one transport to another until the source ends or you stop it.

    Payloads go over byte for byte. A document that is no acceptable envelope is told on stderr and passed over (exit 9).
    For streams, with positions and verification, there is `mist copy`.

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

    source, target = parse_url(src), parse_url(dst)
    names = f"{source.redacted()} to {target.redacted()}"
    relayed = refused = 0
    pace = Pace(rate)
    session.out.detail(f"relaying {names}")
    try:
        async with dial(source) as receiving, dial(target) as sending:
            with session.out.progress("relaying", count or 0) as progress:
                while count is None or relayed < count:
                    limit = batch if count is None else min(batch, count - relayed)
                    try:
                        found = await receiving.receive_many(limit, wait_s=WAIT_S)
                    except EndOfStream:
                        break
                    except (ProtocolError, TooLarge) as exc:
                        session.out.warn(f"passed over: {exc.message}")
                        refused += 1
                        continue
                    await pace.wait(len(found))
                    await sending.send_many(found)
                    relayed += len(found)
                    progress.at(relayed)
    finally:
        if target.scheme != "stdio" and session.out.format != "table":
            session.out.item(
                {"source": source.redacted(), "destination": target.redacted(), "relayed": relayed, "refused": refused}
            )
        else:
            session.out.note(f"relayed {relayed:,} messages from {names}")
    if refused:
        session.fail_with(PARTIAL)
