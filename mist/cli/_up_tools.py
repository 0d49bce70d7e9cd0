"""The tools `mist up` runs, as coroutines over a Platform (see `_up_platform`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from mist.broker.base import Checkpoint, ConsumerConfig, Stream
from mist.cli._up_platform import Platform, Tool
from mist.client.blobs import beside, outlining
from mist.client.serving import serve
from mist.errors import DataLoss, InvalidArgument, MistError, SequenceExpired, Unavailable
from mist.kit.prices import load_prices
from mist.kit.waiting import sleep_unless
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import EVAL_RUN, HEALTH_PING, INFER_REQUEST, TRACE_SPAN
from mist.protocol.subject import subject_for
from mist.protocol.url import Url, redact
from mist.tools.infermux.settings import InferMuxSettings
from mist.tools.tokentrace import bare
from mist.tools.tokentrace.alerts.rules import Rule
from mist.tools.tokentrace.intake import Intake
from mist.tools.tokentrace.publish import subject_of
from mist.tools.tokentrace.service import Retention, Service
from mist.tools.tokentrace.settings import TokenTraceSettings
from mist.tools.tokentrace.stats import Metrics
from mist.tools.tokentrace.store import Store
from mist.transport import dial, server
from mist.transport.body import Limits

if TYPE_CHECKING:
    from mist.tools.matchspec.suite import Suite

DOOR = "/mist"
FORWARDED = "infermux-tokentrace"
"""The cursor of the router's spans that another TokenTrace has."""
FORWARDED_AT_ONCE = 64
FORWARD_AGAIN_S_MAX = 30.0
OTLP_REFUSED = ("/v1/metrics", "/v1/logs")
"""Doors that only say why nothing is taken there."""


def door(store: Callable[[], Path | str], *, intake: Intake, limits: Limits) -> Tool:
    """`POST /mist`: envelopes into the stream; 202 when they are as durable as the stream promises. A `health.ping` is
    answered with a `health.pong` instead. `POST /spans`: the same for bare spans."""

    accepted = 0

    async def run(platform: Platform) -> None:
        stream = await platform.stream()
        append = outlining(
            server.stream_sink(stream), stream, beside(platform.broker), lambda env: subject_for(env.type)
        )

        async def counted(envelopes: list[Envelope]) -> Sequence[int] | None:
            nonlocal accepted
            sequences: Sequence[int] | None = await append(envelopes)
            accepted += len(envelopes)
            return sequences

        platform.facts = lambda: {"accepted": accepted, **intake.facts()}
        sink = intake.before(counted)
        platform.doors[DOOR] = server.ingest(sink, path=DOOR, limits=limits, reply=platform.reply, shared=True)
        bare_limits = replace(limits, envelopes_max=bare.SPANS_MAX)
        platform.doors[bare.PATH] = server.ingest(
            sink, path=bare.PATH, limits=bare_limits, shared=True, read=bare.envelopes
        )
        platform.ready.set()
        await platform.stop.wait()

    return run


def otlp(store: Callable[[], Path | str], *, intake: Intake, limits: Limits, grpc_listen: str = "") -> Tool:
    """OpenTelemetry's spans into the stream: `POST /v1/traces`, and gRPC where an address is given."""

    from mist.tools.tokentrace.otlp.receive import PATH, Receiver, span_sink

    async def run(platform: Platform) -> None:
        stream = await platform.stream()
        within = replace(limits, size_bytes_max=min(limits.size_bytes_max, stream.size_bytes_max))
        plain = outlining(
            span_sink(stream), stream, beside(platform.broker), lambda env: subject_of(env.type, env.source)
        )
        sink = intake.before(plain)
        receiver = Receiver(sink, within)
        platform.doors |= dict.fromkeys((PATH, *OTLP_REFUSED), receiver)
        if not grpc_listen:
            platform.facts = receiver.store.facts
            platform.ready.set()
            await platform.stop.wait()
            return
        from mist.kit.server import parse_address
        from mist.tools.tokentrace.otlp.grpc import GrpcServer

        host, port = parse_address(grpc_listen)
        async with GrpcServer(sink, host=host, port=port, limits=within, store=receiver.store) as grpc:
            platform.facts = lambda: {"grpc": grpc.address, **receiver.store.facts()}
            platform.ready.set()
            await platform.stop.wait()

    return run


def tokentrace(store: Callable[[], Path | str], *, settings: TokenTraceSettings | None = None) -> Tool:
    """Spans of the stream into the store, within its limits; and the questions of it over HTTP."""

    place = store()
    settings = settings or TokenTraceSettings()
    prices = load_prices(Path(settings.prices)) if settings.prices else None
    retention = Retention(retain_s=float(settings.retain), retain_bytes=int(settings.retain_bytes))

    now: list[Service] = []

    async def run(platform: Platform) -> None:
        stream = await platform.stream()
        service = Service(
            place, prices=prices, retention=retention, prometheus=platform.metrics.pages()["/metrics"],
            say=platform.say,
        )  # fmt: skip
        platform.facts = lambda: {"store": redact(str(place)), **service.facts()}
        if not now:  # a tool that is started again keeps its metrics
            _measure(platform, lambda: now[0].totals)
        now[:] = [service]

        def ready() -> None:
            platform.doors |= service.doors()
            platform.ready.set()

        await service.run(platform.broker, stream, platform.stop, ready=ready)

    return run


_LABELS = ("tenant", "operation", "model", "provider")
_TOTALS: tuple[tuple[str, str, Callable[[Metrics], float | None]], ...] = (
    ("tokentrace_spans_total", "Spans ever.", lambda m: m.spans),
    ("tokentrace_errors_total", "Spans ever with a status other than ok.", lambda m: m.errors),
    ("tokentrace_cost_usd_total", "Sum of the known costs.", lambda m: m.cost_usd.total),
    ("tokentrace_tokens_in_total", "Sum of the known input tokens.", lambda m: m.tokens_in.total),
    ("tokentrace_tokens_out_total", "Sum of the known output tokens.", lambda m: m.tokens_out.total),
)
_LATENCIES: tuple[tuple[str, Callable[[Metrics], float | None]], ...] = (
    ("tokentrace_latency_p50_ms", lambda m: m.latency_ms.p50),
    ("tokentrace_latency_p95_ms", lambda m: m.latency_ms.p95),
    ("tokentrace_latency_p99_ms", lambda m: m.latency_ms.p99),
)


def _measure(platform: Platform, totals: Callable[[], list[Metrics]]) -> None:
    """What Prometheus sees of the store, by the names of its totals."""

    def by(value: Callable[[Metrics], float | None]) -> dict[tuple[str, ...], float]:
        found = {tuple(m.group[name] or "" for name in _LABELS): value(m) for m in totals()}
        return {key: number for key, number in found.items() if number is not None}

    for name, text, value in _TOTALS:
        platform.metrics.watch(name, text, partial(by, value), labels=_LABELS, kind="counter")
    for name, value in _LATENCIES:
        platform.metrics.watch(name, "Of all spans ever.", partial(by, value), labels=_LABELS)


def alerts(store: Callable[[], Path | str], *, rules: Sequence[Rule]) -> Tool:
    """The alert rules of the settings, over the store; alerts go into the stream and to webhooks. Without rules it waits."""

    from mist.tools.tokentrace.alerts.api import AlertApi
    from mist.tools.tokentrace.alerts.service import Alerts, watch

    place = store()

    async def run(platform: Platform) -> None:
        def started(running: Alerts) -> None:
            platform.facts = running.facts
            platform.ready.set()

        platform.doors |= AlertApi(place, rules).doors()
        if not rules:
            platform.facts = lambda: {"rules": 0}
            platform.ready.set()
            await platform.stop.wait()
            return
        append = server.stream_sink(await platform.stream())
        with Store.open(place) as opened:
            await watch(opened, append, rules, stop=platform.stop, on_event=platform.say, on_start=started)

    return run


ASKED = (INFER_REQUEST, f"{INFER_REQUEST}.>", HEALTH_PING)
ASKED_WAIT_S = 10.0
"""How soon a request is answered by somebody else when the router or its broker died under it: who asks waits for it. What
takes longer is extended."""
LOCAL = frozenset({"127.0.0.1", "::1", "localhost"})
ROUTER_POLL_S = 0.05
AGAIN_S = 5.0
"""Before a broker that is away for long is asked again for requests; calls by HTTP go on meanwhile."""


def infermux(
    store: Callable[[], Path | str],
    *,
    settings: InferMuxSettings,
    url: Url,
    limits: Limits,
    host: str = "127.0.0.1",
    door: bool = False,
    tokentrace: str = "",
) -> Tool:
    """The inference router: OpenAI's routes and its own, `infer.request` at `/mist` and from a stream; its calls into the
    streams of `infermux.stream` and of the platform, and their spans to another TokenTrace where a URL is given. `door`: the
    tool of that name serves `/mist`."""

    from mist.tools.infermux.budgets import Ledger
    from mist.tools.infermux.calls import SPAN
    from mist.tools.infermux.handler import answered, handler
    from mist.tools.infermux.probes import probe
    from mist.tools.infermux.reconcile import reconcile
    from mist.tools.infermux.router import Router
    from mist.tools.infermux.service import InferMux, watch

    if not (settings.keys or settings.open or host in LOCAL):
        raise InvalidArgument(
            f"without keys the router answers this machine alone, not {host}",
            hint="keys in [infermux] of mist.toml, or open = true",
        )
    place = Path(store())
    prices = load_prices(Path(settings.prices)) if settings.prices else None
    now: list[InferMux] = []

    async def requests(platform: Platform, service: InferMux) -> None:
        asked = Url(url.scheme, url.target, (("stream", settings.requests), ("consumer", "infermux")))
        await serve(
            handler(service.calls), asked, out=settings.stream, stop=platform.stop, concurrency=settings.workers,
            config=ConsumerConfig(subjects=ASKED, ack_wait_s=ASKED_WAIT_S), drain_s=float(settings.drain),
            report=lambda error, id: platform.say(f"request {id}: {error}"),
        )  # fmt: skip

    async def settle(platform: Platform, ledger: Ledger) -> None:
        """What a router that died had reserved, as far as the record says what it cost. What is not done now is done at the
        next start."""
        try:
            settled = await reconcile(ledger, platform.broker, settings.stream)
        except MistError as exc:
            if not exc.retryable:
                raise
            platform.say(f"reservations of a router that died stay as they are for now: {exc}")
        else:
            if settled:
                platform.say(f"{settled} reservations of a router that died are settled by the record")

    async def run(platform: Platform) -> None:
        trace = await platform.stream()
        infer = await platform.stream(settings.stream)
        ledger = await Ledger.open(place)
        try:
            router = Router.from_settings(settings, prices=prices, ledger=ledger)
            service = InferMux(
                settings, router, infer=infer, trace=trace, ledger=ledger, metrics=platform.metrics, say=platform.say
            )
        except BaseException:
            await ledger.aclose()
            raise
        if not now:  # a tool that is started again keeps its metrics
            watch(platform.metrics, lambda: now[0])
        now[:] = [service]
        try:
            platform.facts = service.facts
            platform.answers[INFER_REQUEST] = service.answer
            platform.asks[INFER_REQUEST] = lambda asked: answered(service.calls, asked, SPAN, errors=False)
            platform.doors |= service.doors()
            if not door:
                platform.doors[DOOR] = server.ingest(_requests_only, path=DOOR, limits=limits, reply=platform.reply)
            async with asyncio.TaskGroup() as group:
                if settings.requests:
                    await platform.stream(settings.requests)
                    group.create_task(_away(platform, lambda: requests(platform, service)))
                if tokentrace:
                    group.create_task(_away(platform, lambda: _forward(platform, trace, tokentrace)))
                passing = [
                    group.create_task(settle(platform, ledger)),
                    group.create_task(probe(router, say=platform.say)),
                ]
                platform.ready.set()
                await platform.stop.wait()
                for task in passing:
                    task.cancel()
        except* MistError as found:
            raise found.exceptions[0] from None
        finally:
            platform.answers.pop(INFER_REQUEST, None)
            platform.asks.pop(INFER_REQUEST, None)
            await service.aclose(float(settings.drain))

    return run


async def _away(platform: Platform, work: Callable[[], Awaitable[None]]) -> None:
    """Work that stands on a broker or another service, again after it was away: what does not need that goes on."""
    while not platform.stop.is_set():
        try:
            await work()
        except MistError as exc:
            if not exc.retryable:
                raise
            platform.say(f"{exc}; trying again in {AGAIN_S:g} s")
            await sleep_unless(AGAIN_S, platform.stop)


async def _requests_only(envelopes: list[Envelope]) -> Sequence[int]:
    """The sink of a door that answers and stores nothing."""
    if len(envelopes) > 1:
        raise InvalidArgument("one request at a time is answered here", hint="POST /mist with one envelope")
    raise InvalidArgument(f"expected type {INFER_REQUEST}, got {envelopes[0].type}", meta={"id": envelopes[0].id})


async def _forward(platform: Platform, trace: Stream, to: str) -> None:
    """The router's spans out of the stream to another TokenTrace, each until it is there. A cursor and no consumer: while the
    other one is away there is one position to keep, and not a lease for every span. Whether it is back is asked with one span
    and ever more seldom, and a page is small: calls are answered by the same loop, and wait for what is done here."""
    from mist.client.received import decode_record
    from mist.tools.infermux.envelopes import SOURCE

    subjects = (subject_for(TRACE_SPAN, SOURCE),)
    kept = platform.broker.checkpoints if platform.broker.capabilities.checkpoints else None
    found = await kept.load(trace.name, FORWARDED) if kept is not None else None
    ours = found is not None and found.incarnation == trace.incarnation
    after = found.sequence if found is not None and ours else (await trace.info()).first - 1

    async def send(spans: list[Envelope]) -> None:
        try:
            await other.send_many(spans)
        except MistError as exc:
            if exc.retryable:
                raise
            if len(spans) > 1:  # one of them is the reason
                for span in spans:
                    await send([span])
            else:
                platform.say(f"span {spans[0].id} was refused and is passed over: {exc.code}: {exc.message}")

    limit, pause = FORWARDED_AT_ONCE, AGAIN_S
    async with await dial(to) as other:
        while not platform.stop.is_set():
            try:
                page = await trace.read(after=after, subjects=subjects, limit=limit, wait_s=1.0)
                if page.records:
                    await send([decode_record(record) for record in page.records])
            except SequenceExpired as exc:
                after = exc.first - 1
                continue
            except DataLoss as exc:
                after = exc.resume_after
                continue
            except MistError as exc:
                if not exc.retryable:
                    raise
                platform.say(f"{exc}; trying again in {pause:g} s")
                await sleep_unless(pause, platform.stop)
                limit, pause = 1, min(2 * pause, FORWARD_AGAIN_S_MAX)
                continue
            if page.scanned == after:
                continue
            limit, pause = min(2 * limit, FORWARDED_AT_ONCE), AGAIN_S
            after = page.scanned
            if kept is not None:
                at = Checkpoint(stream=trace.name, name=FORWARDED, incarnation=trace.incarnation, sequence=after)
                await kept.save(at, force=True)


def matchspec(
    store: Callable[[], Path | str],
    *,
    suites: Callable[[], Sequence[Suite]],
    prices: str = "",
    key: str = "",
    door: bool = False,
    router: bool = False,
    host: str = "127.0.0.1",
) -> Tool:
    """Evals: runs that are begun by HTTP, in the stream `eval`. `router`: the tool infermux of this process answers `infer`
    models and judges; else their questions go over the stream of answers. `door`: another tool serves `/mist`."""

    from mist.cli._ask import traces_of
    from mist.tools.matchspec.api import Api
    from mist.tools.matchspec.graders.hands import Hands
    from mist.tools.matchspec.results import STREAM
    from mist.tools.matchspec.service import Service as Runs

    place, loaded = store(), suites()
    table = load_prices(Path(prices)) if prices else None

    async def run(platform: Platform) -> None:
        async def ask(request: Envelope) -> Envelope:
            # runs go on at once after a restart, and the router may not be there yet; the harness's timeout ends this
            while (answer := platform.asks.get(INFER_REQUEST)) is None:
                if platform.stop.is_set():
                    raise Unavailable("the tool infermux has ended")
                await sleep_unless(ROUTER_POLL_S, platform.stop)
            return await answer(request)

        async def elsewhere(request: Envelope, _: Mapping[bytes, bytes]) -> Envelope:
            raise InvalidArgument(
                "eval.run is not answered here", hint="POST the payload to /eval, or begin it at /run"
            )

        if not key and host not in LOCAL:
            platform.say(f"there is no MATCHSPEC_API_KEY: everybody who reaches {host} may begin runs")
        trace, stack = await platform.stream(), AsyncExitStack()
        given = Hands(ask=ask if router else None, trace=traces_of(place, stack))
        runs = Runs(loaded, hands=given, prices=table, trace=trace, say=platform.say)
        platform.facts = runs.facts
        stream = await platform.broker.open(STREAM)

        def ready() -> None:
            platform.doors |= Api(runs, key=key).doors(mist=not door)
            if door:
                platform.answers[EVAL_RUN] = elsewhere
            platform.ready.set()

        try:
            await runs.run(platform.broker, stream, platform.stop, ready=ready)
        finally:
            platform.answers.pop(EVAL_RUN, None)
            await stack.aclose()

    return run
