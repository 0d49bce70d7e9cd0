"""The platform in one process: tools side by side on one broker, one listener, one way down.

A tool is a coroutine function over a `Platform`: it says `ready`, works until `stop` is set, puts its things in order and
returns. A tool that meets an error worth repeating is started again after a growing pause; any other error, or one tool's
return, takes the whole process down, in order, and is what `run` raises.

The way down: nothing new is accepted and the requests under way are answered; then the tools finish what they have in
hand; whatever has not ended after `DRAIN_S` is cancelled and named. Health: `/healthz` answers while the process lives,
`/readyz` with 200 while the broker answers and every tool is ready, else with 503 and the reason.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from mist.broker.base import Broker, Stream, StreamConfig
from mist.errors import Internal, InvalidArgument, MistError, NotFound, TimedOut, Unavailable
from mist.kit.retry import RetryPolicy
from mist.transport.server import App, AppServer, Receive, Scope, Send

DRAIN_S = 30.0
PING_S = 2.0
AGAIN = RetryPolicy(wait_s=0.2, wait_s_max=5.0)
Tool = Callable[["Platform"], Awaitable[None]]
Say = Callable[[str], None]


class Platform:
    """What a tool sees. `facts` gives its counters, by name; they are shown by /readyz and at the end."""

    def __init__(self, broker: Broker, *, stream: str, config: StreamConfig | None, say: Say) -> None:
        self.broker = broker
        self._stream = stream
        self._config = config
        self.say = say
        self.stop = asyncio.Event()
        self.ready = asyncio.Event()
        self.facts: Callable[[], dict[str, Any]] = dict
        self.doors: dict[str, App] = {}

    async def stream(self) -> Stream:
        """The stream they all work on; made where it is not there. Raises Conflict when it is there with settings
        other than those that were asked for."""
        return await self.broker.open(self._stream, config=self._config)


class Health:
    """The listener's app: health, and the doors of the tools that are ready."""

    def __init__(self) -> None:
        self.broker: Broker | None = None
        self.tools: dict[str, Platform] = {}
        self.reasons: dict[str, str] = {}
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise Internal(f"a {scope['type']} connection reached an app that speaks HTTP only")
        path = scope["path"]
        for tool in self.tools.values():
            if path in tool.doors:
                await tool.doors[path](scope, receive, send)
                return
        headers: list[tuple[bytes, bytes]] = []
        if path not in ("/healthz", "/readyz") and not self.all_ready:
            # a door may be about to open there: a sender that was told 404 would give up
            status, body = 503, Unavailable("not everything is ready yet", hint="GET /readyz").to_wire()
            headers.append((b"retry-after", b"1"))
        elif path not in ("/healthz", "/readyz"):
            known = ["/healthz", "/readyz", *(p for t in self.tools.values() for p in t.doors)]
            status, body = 404, NotFound(f"nothing is served at {path}", hint=", ".join(known)).to_wire()
        elif scope["method"] not in ("GET", "HEAD"):
            status, body = 405, InvalidArgument(f"{scope['method']} is not served at {path}", hint="GET").to_wire()
            headers.append((b"allow", b"GET, HEAD"))
        elif path == "/healthz":
            status, body = 200, {"status": "ok"}
        else:
            report = await self.report()
            status, body = 200 if report["ready"] else 503, report
        data = msgspec.json.encode(body)
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else data})

    @property
    def all_ready(self) -> bool:
        return self.broker is not None and all(tool.ready.is_set() for tool in self.tools.values())

    async def report(self) -> dict[str, Any]:
        """`{"ready", "reason", "broker_ms", "tools": {name: {"ready", "reason", …facts}}}`."""
        reason = "draining" if self.draining else ""
        took: float | None = None
        if self.broker is None:
            reason = reason or "the broker is not connected yet"
        else:
            try:
                async with asyncio.timeout(PING_S):
                    took = round(await self.broker.ping() * 1000, 3)
            except TimeoutError:
                reason = reason or f"the broker did not answer within {PING_S:g} s"
            except MistError as exc:
                reason = reason or str(exc)
        tools = {
            name: {"ready": tool.ready.is_set(), "reason": self.reasons.get(name, ""), **tool.facts()}
            for name, tool in self.tools.items()
        }
        waiting = [name for name, tool in self.tools.items() if not tool.ready.is_set()]
        if waiting and not reason:
            reason = f"not ready: {', '.join(waiting)}"
        return {"ready": not reason, "reason": reason, "broker_ms": took, "tools": tools}


async def run(
    connect: Callable[[], Awaitable[Broker]],
    tools: Mapping[str, Tool],
    *,
    stream: str,
    config: StreamConfig | None = None,
    host: str,
    port: int,
    wait_s: float,
    stop: asyncio.Event,
    say: Say,
    on_ready: Callable[[str, Health], None],
) -> dict[str, dict[str, Any]]:
    """Everything, until `stop` is set; returns the tools' facts. `on_ready` is told the listener's URL once, when all
    tools are ready for the first time. Raises the error that took the platform down; TimedOut when tools did not end.

    The broker is waited for at the start, `wait_s` at most (0 = for ever).
    """
    health = Health()
    async with AppServer(health, host=host, port=port) as server:
        broker = await _connected(connect, wait_s, stop, say)
        if broker is None:
            return {}
        health.broker = broker
        health.tools = {name: Platform(broker, stream=stream, config=config, say=_named(say, name)) for name in tools}
        errors: list[Exception] = []
        async with asyncio.TaskGroup() as group:
            tasks = {
                name: group.create_task(_supervised(name, tool, health, errors, stop), name=name)
                for name, tool in tools.items()
            }
            announcing = group.create_task(_announce(health, server.url, on_ready))
            await stop.wait()
            announcing.cancel()
            health.draining = True
            await server.close()
            for tool in health.tools.values():
                tool.stop.set()
            _, late = await asyncio.wait(tasks.values(), timeout=DRAIN_S)
            for task in late:
                task.cancel()
        if late:
            names = ", ".join(t.get_name() for t in late)
            errors.append(TimedOut(f"{names} did not end within {DRAIN_S:g} s and was cancelled"))
    if errors:
        raise errors[0]
    return {name: tool.facts() for name, tool in health.tools.items()}


def _named(say: Say, name: str) -> Say:
    return lambda text: say(f"{name}: {text}")


async def _announce(health: Health, url: str, on_ready: Callable[[str, Health], None]) -> None:
    for tool in health.tools.values():
        await tool.ready.wait()
    on_ready(url, health)


async def _connected(
    connect: Callable[[], Awaitable[Broker]], wait_s: float, stop: asyncio.Event, say: Say
) -> Broker | None:
    """The broker, or None when we are to stop first."""
    loop = asyncio.get_running_loop()
    until = loop.time() + wait_s if wait_s else float("inf")
    failures = 0
    while True:
        task = asyncio.ensure_future(connect())
        if not await _unless(stop, task):
            return None
        try:
            return task.result()
        except MistError as exc:
            if not exc.retryable or loop.time() >= until:
                raise
            failures += 1
            pause = AGAIN.pause_s(failures, random.random())
            say(f"{exc}; trying again in {pause:.1g} s")
            await _pause(pause, stop)


async def _unless(stop: asyncio.Event, task: asyncio.Future[Broker]) -> bool:
    """Wait for the task, but no longer than until `stop`: then it is cancelled. Whether it is done."""
    stopping = asyncio.ensure_future(stop.wait())
    try:
        both: set[asyncio.Future[Any]] = {task, stopping}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return task.done()
    finally:
        stopping.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _supervised(name: str, tool: Tool, health: Health, errors: list[Exception], stop: asyncio.Event) -> None:
    """One tool, again after errors that are worth it. Its end is everybody's end."""
    platform = health.tools[name]
    failures = 0
    try:
        while True:
            try:
                await tool(platform)
                return
            except MistError as exc:
                platform.doors.clear()
                was_ready = platform.ready.is_set()
                platform.ready.clear()
                if not exc.retryable or platform.stop.is_set():
                    raise
                failures = 1 if was_ready else failures + 1
                pause = AGAIN.pause_s(failures, random.random())
                health.reasons[name] = str(exc)
                platform.say(f"{exc}; starting it again in {pause:.1g} s")
                await _pause(pause, platform.stop)
            if platform.stop.is_set():
                return
    except Exception as exc:
        errors.append(exc)
    finally:
        stop.set()


async def _pause(seconds: float, stop: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
