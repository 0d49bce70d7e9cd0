"""The tools `mist up` runs, as coroutines over a Platform (see `_up_platform`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mist.cli._up_platform import Platform, Tool
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope
from mist.tools.tokentrace.alerts.rules import Rule
from mist.tools.tokentrace.ingest import Progress, ingest, start
from mist.tools.tokentrace.intake import Intake
from mist.tools.tokentrace.store import Store
from mist.transport import server

DOOR = "/mist"
OTLP_REFUSED = ("/v1/metrics", "/v1/logs")
"""Doors that only say why nothing is taken there."""


def door(store: Callable[[], Path], *, intake: Intake) -> Tool:
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

        platform.facts = lambda: {"accepted": accepted, **intake.facts()}
        platform.doors[DOOR] = server.ingest(intake.before(counted), path=DOOR, reply=platform.reply)
        platform.ready.set()
        await platform.stop.wait()

    return run


def otlp(store: Callable[[], Path], *, intake: Intake, grpc_listen: str = "") -> Tool:
    """OpenTelemetry's spans into the stream: `POST /v1/traces`, and gRPC where an address is given."""

    from mist.tools.tokentrace.otlp.receive import PATH, Receiver, span_sink

    async def run(platform: Platform) -> None:
        stream = await platform.stream()
        limits = server.Limits(size_bytes_max=min(SIZE_BYTES_MAX, stream.size_bytes_max))
        sink = intake.before(span_sink(stream))
        receiver = Receiver(sink, limits)
        platform.doors |= dict.fromkeys((PATH, *OTLP_REFUSED), receiver)
        if not grpc_listen:
            platform.facts = receiver.store.facts
            platform.ready.set()
            await platform.stop.wait()
            return
        from mist.kit.server import parse_address
        from mist.tools.tokentrace.otlp.grpc import GrpcServer

        host, port = parse_address(grpc_listen)
        async with GrpcServer(sink, host=host, port=port, limits=limits, store=receiver.store) as grpc:
            platform.facts = lambda: {"grpc": grpc.address, **receiver.store.facts()}
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


def alerts(store: Callable[[], Path], *, rules: Sequence[Rule]) -> Tool:
    """The alert rules of the settings, over the store; alerts go into the stream and to webhooks. Without rules it waits."""

    from mist.tools.tokentrace.alerts.service import Alerts, watch

    path = store() if rules else None

    async def run(platform: Platform) -> None:
        def started(running: Alerts) -> None:
            platform.facts = running.facts
            platform.ready.set()

        if path is None:
            platform.facts = lambda: {"rules": 0}
            platform.ready.set()
            await platform.stop.wait()
            return
        append = server.stream_sink(await platform.stream())
        with Store.open(path) as opened:
            await watch(opened, append, rules, stop=platform.stop, on_event=platform.say, on_start=started)

    return run
