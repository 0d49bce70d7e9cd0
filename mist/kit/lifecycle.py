"""The life of a service: parts start in order, units work and are started again, everything stops in reverse order.

    async with Lifecycle(stop, say=print) as life:
        await life.enter("listener", server)
        life.at_drain("listener", server.close)
        life.supervise(Unit("worker"), work)
        await life.wait()

Promises: a part that cannot start takes down those before it, in reverse order. A unit that meets an error worth repeating
is started again after a growing pause; any other error, or a unit's return, ends them all, in order. The way down has one
deadline, `drain_s`, and one for the parts, `stop_s`: first the drain actions in order (say not ready, take nothing new,
answer what is under way), then every unit's `stop` is set and waited for; what has not ended in time is cancelled and named;
then the parts stop, last one first, each whatever the others did. Every error is kept: the first is raised and the others are
told to `say` and stand in its notes. A way down that took too long is an error, so that no exit code calls it a success.

Does not: handle signals (`mist.kit.signals` sets `stop`), or end a coroutine that ignores its cancellation: for that a second
signal is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import random
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from mist.errors import Internal, MistError, TimedOut, Unavailable
from mist.kit.retry import RetryPolicy
from mist.kit.waiting import sleep_unless

T = TypeVar("T")
Say = Callable[[str], None]

DRAIN_S = 30.0
STOP_S = 10.0
AGAIN = RetryPolicy(wait_s=0.2, wait_s_max=5.0, jitter=0.5)
"""The pauses before a unit is started again; its attempts and deadline do not count here."""


class Unit:
    """One supervised piece of work, as it and others see it. It sets `ready` when it works, ends when `stop` is set, and
    `down` is called when it failed and will be started again; `reason` says why it is not ready."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready = asyncio.Event()
        self.stop = asyncio.Event()
        self.reason = ""
        self.restarts = 0

    def down(self, reason: str) -> None:
        self.ready.clear()
        self.reason = reason

    async def check(self) -> None:
        """A health check. Raises Unavailable while it is not ready."""
        if not self.ready.is_set():
            raise Unavailable(self.reason or "not ready yet")


class Lifecycle:
    """`stop` is what ends it: set by a signal, by a unit, by anybody."""

    def __init__(
        self,
        stop: asyncio.Event,
        *,
        say: Say,
        drain_s: float = DRAIN_S,
        stop_s: float = STOP_S,
        again: RetryPolicy = AGAIN,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.stop = stop
        self._say = say
        self._drain_s = drain_s
        self._stop_s = stop_s
        self._again = again
        self._draw = draw
        self._parts: list[tuple[str, contextlib.AbstractAsyncContextManager[Any]]] = []
        self._actions: list[tuple[str, Callable[[], Awaitable[object] | None]]] = []
        self._units: dict[Unit, asyncio.Task[None]] = {}
        self._errors: list[Exception] = []
        self._ending = False

    async def enter(self, name: str, part: contextlib.AbstractAsyncContextManager[T]) -> T:
        """Start a part; it stops after the units, in reverse order."""
        self._open()
        found = await part.__aenter__()
        self._parts.append((name, part))
        return found

    def at_drain(self, name: str, action: Callable[[], Awaitable[object] | None]) -> None:
        """What is to happen first on the way down, before the units are told to stop."""
        self._open()
        self._actions.append((name, action))

    def supervise(self, unit: Unit, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work()` until it ends with `unit.stop`, again after errors that are worth it."""
        self._open()
        self._units[unit] = asyncio.create_task(self._supervised(unit, work), name=unit.name)

    async def connected(self, call: Callable[[], Awaitable[T]], *, wait_s: float = 0.0) -> T | None:
        """`await call()`, again after retryable errors for at most `wait_s` (0 = for ever), or None when `stop` was set
        first: a service waits for what it stands on."""
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s if wait_s else float("inf")
        failures = 0
        while True:
            task = asyncio.ensure_future(call())
            if not await self._unless_stopped(task):
                return None
            try:
                return task.result()
            except MistError as exc:
                if not exc.retryable or loop.time() >= until:
                    raise
                failures += 1
                pause = self._again.pause_s(failures, self._draw())
                self._say(f"{exc}; trying again in {pause:.1g} s")
                await sleep_unless(pause, self.stop)

    async def ready(self) -> bool:
        """Wait until every unit was ready once; False when `stop` was set before."""
        for unit in self._units:
            if not await self._unless_stopped(asyncio.ensure_future(unit.ready.wait())):
                return False
        return True

    async def wait(self) -> None:
        """Until it is time to go down."""
        await self.stop.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Raises what took it down, or went wrong on the way."""
        self._ending = True
        self.stop.set()
        try:
            await self._drain()
        finally:
            # a cancelled drain (somebody does not want to wait) still ends every unit and stops every part
            for task in self._units.values():
                task.cancel()
            if self._units:
                await asyncio.wait(self._units.values())
            await self._stop_parts()
        if exc is not None:
            self._tell_others(exc, self._errors)
            return
        if self._errors:
            first, *others = self._errors
            self._tell_others(first, others)
            raise first

    def _open(self) -> None:
        if self._ending:
            raise Internal("the service is going down: nothing can be started any more")

    def _tell_others(self, first: BaseException, others: list[Exception]) -> None:
        for error in others:
            first.add_note(f"also: {type(error).__name__}: {error}")
            self._say(f"also: {error}")

    # down

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._drain_s
        for name, action in self._actions:
            await self._one(f"draining {name}", action, until - loop.time())
        for unit in self._units:
            unit.stop.set()
        if not self._units:
            return
        _, late = await asyncio.wait(self._units.values(), timeout=max(0.0, until - loop.time()))
        if late:
            names = ", ".join(sorted(task.get_name() for task in late))
            self._errors.append(TimedOut(f"{names} did not end within {self._drain_s:g} s and was cancelled"))

    async def _stop_parts(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._stop_s
        while self._parts:
            name, part = self._parts.pop()
            await self._one(f"stopping {name}", partial(part.__aexit__, None, None, None), until - loop.time())

    async def _one(self, what: str, action: Callable[[], Awaitable[object] | None], left_s: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, left_s)) as limit:
                found = action()
                if inspect.isawaitable(found):
                    await found
        except TimeoutError as exc:
            if not limit.expired():
                self._errors.append(exc)
            else:
                self._errors.append(TimedOut(f"{what} took too long and was cancelled"))
        except Exception as exc:
            self._errors.append(exc)

    # units

    async def _supervised(self, unit: Unit, work: Callable[[], Awaitable[None]]) -> None:
        """One unit, again after errors that are worth it. Its end is everybody's end."""
        failures = 0
        try:
            while not unit.stop.is_set():
                try:
                    await work()
                    return
                except MistError as exc:
                    failures = 1 if unit.ready.is_set() else failures + 1
                    unit.down(str(exc))
                    if not exc.retryable or unit.stop.is_set():
                        raise
                    pause = self._again.pause_s(failures, self._draw())
                    unit.restarts += 1
                    self._say(f"{unit.name}: {exc}; starting it again in {pause:.1g} s")
                    await sleep_unless(pause, unit.stop)
        except Exception as exc:
            unit.down(str(exc))
            self._errors.append(exc)
        finally:
            self.stop.set()

    async def _unless_stopped(self, task: asyncio.Future[Any]) -> bool:
        """Wait for the task, but no longer than until `stop`: then it is cancelled. Whether it is done."""
        stopping = asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return task.done()
        finally:
            stopping.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
