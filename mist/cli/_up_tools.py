"""The tools `mist up` runs, as coroutines over a Platform (see `_up_platform`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mist.cli._up_platform import Platform, Tool
from mist.protocol.envelope import Envelope
from mist.tools.tokentrace.ingest import Progress, ingest, start
from mist.tools.tokentrace.store import Store
from mist.transport import server

DOOR = "/mist"


def door(store: Callable[[], Path]) -> Tool:
    """`POST /mist`: envelopes into the stream; 202 when they are as durable as the stream promises. A `health.ping` is
    answered with a `health.pong` instead."""

    accepted = 0

    async def run(platform: Platform) -> None:
        stream = await platform.stream()
        append = server.stream_sink(stream)

        async def counted(envelopes: list[Envelope]) -> Sequence[int] | None:
            nonlocal accepted
            sequences = await append(envelopes)
            accepted += len(envelopes)
            return sequences

        platform.facts = lambda: {"accepted": accepted}
        platform.doors[DOOR] = server.ingest(counted, path=DOOR, reply=platform.reply)
        platform.ready.set()
        await platform.stop.wait()

    return run


def tokentrace(store: Callable[[], Path]) -> Tool:
    """Spans of the stream into the store that `mist trace` asks; spans and position in one transaction."""

    path = store()

    async def run(platform: Platform) -> None:
        stream = await platform.stream()
        with Store.open(path) as opened:
            after = start(opened, stream)
            progress = Progress(after, after)
            platform.facts = lambda: {
                "store": str(path), "position": progress.position, "spans": progress.spans, "refused": progress.refused,
            }  # fmt: skip
            platform.ready.set()
            await ingest(platform.broker, stream, opened, stop=platform.stop, on_event=platform.say, progress=progress)

    return run
