"""`nats://…` and `tls://…`: streams in NATS JetStream. What a NATS user sees of them is in docs/how-to/use-nats.md."""

from __future__ import annotations

import asyncio
import secrets

from mist.broker.clock import SYSTEM, Clock
from mist.errors import InvalidArgument, TimedOut, Unavailable, Unsupported
from mist.protocol.url import Url
from mist_nats import api as js
from mist_nats.api import ApiError, translated
from mist_nats.broker import NatsBroker
from mist_nats.link import Link
from mist_nats.url import options

__all__ = ["NatsBroker", "connect"]

OLDEST = (2, 9)
LEADER_S = 10.0
"""How long a new cluster may take to choose its leader."""


async def connect(url: Url, *, clock: Clock = SYSTEM) -> NatsBroker:
    """The adapter's door. Raises Unavailable, NotAuthorised, InvalidArgument, Unsupported."""
    chosen = options(url)
    link = Link(url.redacted(), secrets.token_hex(11))
    client = dict(chosen.client)
    try:
        await link.connect(chosen.connect_timeout_s, len(chosen.servers), servers=list(chosen.servers), **client)
    except (ValueError, TypeError) as exc:
        raise InvalidArgument(f"{url.redacted()}: these credentials cannot be used ({type(exc).__name__})") from exc
    try:
        if link.version < OLDEST:
            raise Unsupported(f"the server's version {link.info.get('version', '?')} (older than 2.9)", "nats")
        broker = NatsBroker(url, chosen, link, clock)
        await _jetstream(broker)
        await broker.ask_sync()
    except BaseException:
        await link.aclose()
        raise
    return broker


async def _jetstream(broker: NatsBroker) -> None:
    """Raise one clear sentence where there is none. A cluster that has just started has no leader for a moment."""
    until = asyncio.get_running_loop().time() + LEADER_S
    while True:
        try:
            await broker.api.call("INFO", patient=bool(broker.link.info.get("jetstream")))
            return
        except ApiError as exc:
            if exc.err_code in js.NO_JETSTREAM:
                raise Unavailable(
                    f"{broker.url}: JetStream is not enabled for this account",
                    hint="enable it in the server's configuration: `jetstream {{ }}`, and for the account",
                    retryable=False,
                ) from exc
            raise translated(exc, broker.url) from exc
        except (Unavailable, TimedOut) as exc:
            if not broker.link.info.get("jetstream"):
                raise Unavailable(
                    f"{broker.url}: JetStream is not enabled on this server",
                    hint="start it with -js, or with `jetstream {}` in its configuration",
                    retryable=False,
                ) from exc
            if asyncio.get_running_loop().time() > until:
                raise
            await asyncio.sleep(0.1)
