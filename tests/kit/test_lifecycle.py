"""Lifecycle: order, deadlines, errors; and real signals to a real process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from typing import Any

import pytest
from conftest import run

from mist.errors import Conflict, Internal, TimedOut, Unavailable
from mist.kit.lifecycle import Lifecycle, Unit
from mist.kit.retry import RetryPolicy

AT_ONCE = RetryPolicy(wait_s=0)


class World:
    """A lifecycle, and what happened in it."""

    def __init__(self, **kw: Any) -> None:
        self.stop = asyncio.Event()
        self.events: list[str] = []
        self.said: list[str] = []
        self.life = Lifecycle(self.stop, say=self.said.append, again=AT_ONCE, **kw)

    @contextlib.asynccontextmanager
    async def part(self, name: str, fails: BaseException | None = None, hangs: bool = False) -> AsyncIterator[str]:
        self.events.append(f"+{name}")
        yield name
        self.events.append(f"-{name}")
        if hangs:
            await asyncio.Event().wait()
        if fails is not None:
            raise fails

    def work(self, unit: Unit, result: Exception | None = None) -> Any:
        async def work() -> None:
            unit.ready.set()
            await unit.stop.wait()
            self.events.append(f"-{unit.name}")
            if result is not None:
                raise result

        return work


def test_up_in_order_down_in_reverse() -> None:
    """Drain actions, then units, then parts, the last one first."""

    async def case() -> None:
        w = World()
        async with w.life as life:
            assert await life.enter("a", w.part("a")) == "a"
            await life.enter("b", w.part("b"))
            life.at_drain("ready", lambda: w.events.append("not ready"))
            life.at_drain("door", lambda: asyncio.sleep(0, w.events.append("closed")))
            unit = Unit("u")
            life.supervise(unit, w.work(unit))
            assert await life.ready()
            w.stop.set()
            await life.wait()
        assert w.events == ["+a", "+b", "not ready", "closed", "-u", "-b", "-a"]

    run(case())


def test_a_part_that_cannot_start_takes_down_those_before() -> None:
    """In reverse order; its error is the one that is raised."""

    @contextlib.asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        raise Conflict("the port is taken")
        yield

    async def case() -> None:
        w = World()

        async def body() -> None:
            async with w.life as life:
                await life.enter("a", w.part("a"))
                await life.enter("b", w.part("b"))
                await life.enter("c", broken())

        with pytest.raises(Conflict):
            await body()
        assert w.events == ["+a", "+b", "-b", "-a"]

    run(case())


def test_every_error_is_kept_and_every_part_is_stopped() -> None:
    """The first is raised; the others are told and stand in its notes."""

    async def case() -> None:
        w = World()
        unit = Unit("u")

        async def body() -> None:
            async with w.life as life:
                await life.enter("a", w.part("a", fails=OSError("part a")))
                await life.enter("b", w.part("b", fails=RuntimeError("part b")))
                life.supervise(unit, w.work(unit, ValueError("unit")))
                assert await life.ready()
                w.stop.set()

        with pytest.raises(ValueError, match="unit") as caught:
            await body()
        assert w.events[-2:] == ["-b", "-a"]
        assert w.said == ["also: part b", "also: part a"]
        assert len(caught.value.__notes__) == 2

    run(case())


def test_what_does_not_end_is_cancelled_named_and_an_error() -> None:
    """Drain action, unit and part; one deadline for the first two."""

    async def case() -> None:
        w = World(drain_s=0.05, stop_s=0.05)
        unit = Unit("stubborn")

        async def stubborn() -> None:
            unit.ready.set()
            try:
                await asyncio.Event().wait()
            finally:
                w.events.append("cancelled")

        async def body() -> None:
            async with w.life as life:
                await life.enter("hangs", w.part("hangs", hangs=True))
                await life.enter("b", w.part("b"))
                life.at_drain("door", asyncio.Event().wait)
                life.supervise(unit, stubborn)
                assert await life.ready()

        with pytest.raises(TimedOut, match="draining door took too long"):
            await body()
        assert w.events == ["+hangs", "+b", "cancelled", "-b", "-hangs"]
        assert any("stubborn did not end within 0.05 s" in text for text in w.said)
        assert any("stopping hangs took too long" in text for text in w.said)

    run(case())


def test_a_unit_is_started_again_after_retryable_errors_only() -> None:
    """And its `down` is called every time; the others live on."""

    async def case() -> None:
        w = World()
        unit = Unit("u")
        runs: list[bool] = []

        async def shaky() -> None:
            runs.append(unit.ready.is_set())
            if len(runs) < 3:
                unit.ready.set()
                raise Unavailable("cloudy")
            raise Conflict("no way")

        async def body() -> None:
            async with w.life as life:
                life.supervise(unit, shaky)
                await life.wait()

        with pytest.raises(Conflict):
            await body()
        assert runs == [False, False, False]
        assert unit.restarts == 2
        assert (unit.ready.is_set(), unit.reason) == (False, "no way")
        with pytest.raises(Unavailable, match="no way"):
            await unit.check()

    run(case())


def test_a_unit_that_returns_ends_all() -> None:
    """Without an error."""

    async def case() -> None:
        w = World()
        one, two = Unit("one"), Unit("two")

        async def short() -> None:
            one.ready.set()

        async with w.life as life:
            life.supervise(one, short)
            life.supervise(two, w.work(two))
            await life.wait()
        assert w.events == ["-two"]

    run(case())


def test_nothing_starts_on_the_way_down() -> None:
    """A part or action registered late is refused, not forgotten."""

    async def case() -> None:
        w = World()

        async def late() -> None:
            with pytest.raises(Internal):
                w.life.at_drain("late", lambda: None)
            with pytest.raises(Internal):
                w.life.supervise(Unit("late"), late)
            with pytest.raises(Internal):
                await w.life.enter("late", w.part("late"))
            w.events.append("refused")

        async with w.life as life:
            life.at_drain("late", late)
        assert w.events == ["refused"]

    run(case())


def test_what_it_stands_on_is_waited_for() -> None:
    """Again after retryable errors, until `stop`."""

    async def case() -> None:
        w = World()
        tries: list[int] = []

        async def call() -> str:
            tries.append(1)
            if len(tries) < 3:
                raise Unavailable("not yet")
            return "there"

        async def hangs() -> str:
            w.stop.set()
            await asyncio.Event().wait()
            return "never"

        async with w.life as life:
            assert await life.connected(call) == "there"
            assert len(w.said) == 2
            assert await life.connected(hangs) is None
            assert not await life.ready() or not life._units

    run(case())


def test_cancelled_it_still_goes_down_in_order() -> None:
    """A caller without an event: the cancellation comes through after everything has stopped."""

    async def case() -> None:
        w = World()
        unit = Unit("u")

        async def body() -> None:
            async with w.life as life:
                await life.enter("a", w.part("a"))
                life.supervise(unit, w.work(unit))
                await life.wait()

        task = asyncio.create_task(body())
        await unit.ready.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert w.events == ["+a", "-u", "-a"]

    run(case())


PROGRAM = """
import asyncio, sys
from mist.kit.lifecycle import Lifecycle, Unit
from mist.kit.signals import AGAIN_S, Interrupted, drained, run

async def service(stop):
    async with Lifecycle(stop, say=print) as life:
        unit = Unit("u")
        async def work():
            unit.ready.set()
            print("up", flush=True)
            await unit.stop.wait()
            print("draining", flush=True)
            if sys.argv[1] == "stuck":
                await asyncio.Event().wait()
        life.supervise(unit, work)
        await life.wait()

try:
    run(lambda: drained(service))
except Interrupted as exc:
    print("down", flush=True)
    sys.exit(exc.exit_code)
"""


def started(how: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PROGRAM), how], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_drains_and_the_exit_code_says_which(number: int, code: int) -> None:
    """A real process."""
    with started("orderly") as process:
        process.send_signal(number)
        assert process.communicate(timeout=20)[0] == b"draining\ndown\n"
        assert process.returncode == code


def test_a_second_signal_forces_it() -> None:
    """With the exit code of the first; the same wish repeated within half a second is one."""
    with started("stuck") as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"draining\n"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.6)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 143
