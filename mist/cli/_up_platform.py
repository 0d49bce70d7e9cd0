"""The platform in one process: tools side by side on one broker, one listener, one way down. The parts are the service
kit's (`mist.kit`): lifecycle, health, site; here they are put together.

A tool is a coroutine function over a `Platform`: it says `ready`, works until `stop` is set, puts its things in order and
returns. The way down: not ready at once; nothing new is accepted and the requests under way are answered; then the tools
finish what they have in hand; whatever has not ended after `drain_s` is cancelled and named.

`/readyz` is 200 while the broker answers and every tool is ready, else 503 with the reason; it also shows the tools'
counters. Before all are ready a path nobody serves is 503: a door may be about to open there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from mist import __version__
from mist.broker.base import Broker, Stream, StreamConfig
from mist.errors import Unavailable
from mist.kit import resource
from mist.kit.health import Health
from mist.kit.lifecycle import DRAIN_S, Lifecycle, Say, Unit
from mist.kit.metrics import Metrics
from mist.kit.server import CLOSE_WAIT_S, App, AppServer, Site
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import HEALTH_PING

_access = logging.getLogger("mist.access")

NAME = "mist"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
Tool = Callable[["Platform"], Awaitable[None]]
Answerer = Callable[[Envelope, Mapping[bytes, bytes]], Awaitable[Envelope]]
"""What answers an envelope at the door, given its request's headers."""
Asked = Callable[[Envelope], Awaitable[Envelope]]


class Platform(Unit):
    """What a tool sees. `facts` gives its counters, by name: /readyz shows them, and the numbers among them are metrics;
    `metrics` is for more."""

    def __init__(
        self,
        name: str,
        broker: Broker,
        health: Health,
        metrics: Metrics,
        *,
        stream: str,
        config: StreamConfig | None,
        say: Say,
        answers: dict[str, Answerer],
        asks: dict[str, Asked],
    ) -> None:
        super().__init__(name)
        self.broker = broker
        self.metrics = metrics
        self._health = health
        self._stream = stream
        self._config = config
        self.say: Say = lambda text: say(f"{name}: {text}")
        self.facts: Callable[[], dict[str, Any]] = dict
        self.doors: dict[str, App] = {}
        self.answers = answers
        """Of all tools together: type of an envelope -> what answers one that comes alone to the door."""
        self.asks = asks
        """The same for tools of this process, which store question and answer themselves."""

    def reply(self, envelope: Envelope, headers: Mapping[bytes, bytes]) -> Envelope | Awaitable[Envelope] | None:
        """What an envelope is answered with instead of being stored: a `health.ping` with a `health.pong`, and what a tool
        has an answer for."""
        if envelope.type == HEALTH_PING:
            return self._health.pong(envelope)
        answer = self.answers.get(envelope.type)
        return answer(envelope, headers) if answer is not None else None

    def down(self, reason: str) -> None:
        super().down(reason)
        self.doors.clear()

    async def stream(self, name: str = "") -> Stream:
        """The stream they all work on, or another one; made where it is not there. Raises Conflict when it is there with
        settings other than those that were asked for."""
        return await self.broker.open(name or self._stream, config=self._config)


class Running:
    """The platform as the listener sees it: which tools there are, and whether they are ready."""

    def __init__(self) -> None:
        self.broker: Broker | None = None
        self.tools: dict[str, Platform] = {}
        self.health = Health(NAME, __version__, detail=self._detail)
        self.health.add_check("broker", self._ping)
        self.metrics = Metrics()
        self._measure()
        self.pages = {**self.health.pages(), **self.metrics.pages()}
        self.site = Site(self.pages, waiting=self._waiting, seen=self._seen)

    def add(self, tool: Platform) -> None:
        self.tools[tool.name] = tool
        self.health.add_check(tool.name, tool.check, cache_s=0)
        self.site.tables.insert(0, tool.doors)  # a tool may put more behind a page of ours

    def _measure(self) -> None:
        metrics = self.metrics
        resource.watch(metrics)
        self._requests = metrics.counter("mist_http_requests_total", "Requests.", ("method", "route", "status"))
        self._seconds = metrics.histogram("mist_http_request_seconds", "Until the answer was sent.", ("route",))
        metrics.watch(
            "mist_tool_ready",
            "1 while the tool works.",
            lambda: self._by_tool(lambda t: t.ready.is_set()),
            labels=("tool",),
        )
        metrics.watch(
            "mist_tool_restarts_total", "How often it was started again.", lambda: self._by_tool(lambda t: t.restarts),
            labels=("tool",), kind="counter",
        )  # fmt: skip
        metrics.watch("mist_tool_fact", "Numbers that /readyz shows.", self._numbers, labels=("tool", "fact"))

    def _seen(self, method: str, route: str, status: int, seconds: float) -> None:
        if _access.isEnabledFor(logging.DEBUG):
            fields = {"method": method, "route": route, "status": status, "took_ms": round(seconds * 1000, 3)}
            _access.debug("request", extra=fields)
        self._requests.add(method=method if method in METHODS else "other", route=route, status=str(status))
        self._seconds.observe(seconds, route=route)

    def _by_tool(self, number: Callable[[Platform], float]) -> dict[tuple[str, ...], float]:
        return {(name,): number(tool) for name, tool in self.tools.items()}

    def _numbers(self) -> dict[tuple[str, ...], float]:
        return {
            (name, fact): value
            for name, tool in self.tools.items()
            for fact, value in tool.facts().items()
            if isinstance(value, int | float)
        }

    async def _ping(self) -> None:
        if self.broker is None:
            raise Unavailable("not connected yet")
        await self.broker.ping()

    def _waiting(self) -> str:
        ready = self.broker is not None and all(tool.ready.is_set() for tool in self.tools.values())
        return "" if ready else "not everything is ready yet"

    def _detail(self) -> dict[str, Any]:
        return {"tools": {name: tool.facts() for name, tool in self.tools.items()}}


async def run(
    connect: Callable[[], Awaitable[Broker]],
    tools: Mapping[str, Tool],
    *,
    stream: str,
    config: StreamConfig | None = None,
    host: str,
    port: int,
    wait_s: float,
    drain_s: float = DRAIN_S,
    stop: asyncio.Event,
    say: Say,
    on_ready: Callable[[str, Running], None],
) -> dict[str, dict[str, Any]]:
    """Everything, until `stop` is set; returns the tools' facts. `on_ready` is told the listener's URL once, when all
    tools are ready for the first time. Raises the error that took the platform down; TimedOut when tools did not end.

    The broker is waited for at the start, `wait_s` at most (0 = for ever).
    """
    running = Running()
    close_s = max(CLOSE_WAIT_S, drain_s - CLOSE_WAIT_S)  # an answer may take long; the tools need some of the time
    async with Lifecycle(stop, say=say, drain_s=drain_s) as life:
        server = await life.enter("listener", AppServer(running.site, host=host, port=port, close_s=close_s))
        life.at_drain("health", running.health.drain)
        life.at_drain("listener", server.close)
        running.broker = broker = await life.connected(connect, wait_s=wait_s)
        if broker is None:
            return {}
        answers: dict[str, Answerer] = {}
        asks: dict[str, Asked] = {}
        for name, tool in tools.items():
            platform = Platform(
                name,
                broker,
                running.health,
                running.metrics,
                stream=stream,
                config=config,
                say=say,
                answers=answers,
                asks=asks,
            )
            running.add(platform)
            life.supervise(platform, partial(tool, platform))
        if await life.ready():
            on_ready(server.url, running)
        await life.wait()
    return {name: tool.facts() for name, tool in running.tools.items()}
