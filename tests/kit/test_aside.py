"""Somebody else's code aside: the loop goes on, a cancelled caller does not wait, and what is left behind is bounded."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from contextvars import ContextVar

import pytest
from conftest import run

from mist.errors import Overloaded
from mist.kit import aside as module
from mist.kit.aside import aside

named: ContextVar[str] = ContextVar("named")


def test_the_loop_goes_on_and_the_result_or_error_comes_back() -> None:
    async def body() -> None:
        named.set("here")
        go = threading.Event()
        held = asyncio.create_task(aside(lambda: (go.wait(30), named.get())))
        assert await asyncio.gather(*(aside(lambda n=n: n * n) for n in range(20))) == [n * n for n in range(20)]
        assert not held.done()
        go.set()
        assert await held == (True, "here")
        with pytest.raises(ZeroDivisionError):
            await aside(lambda: 1 / 0)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await aside(lambda: next(iter([])))
        assert len(module._idle) <= module.IDLE_MAX

    run(body())


def test_a_cancelled_caller_leaves_the_call_behind_and_too_many_of_those_are_refused() -> None:
    async def body() -> None:
        go = threading.Event()
        try:
            for _ in range(module.LEFT_MAX):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.001):
                        await aside(lambda: go.wait(30))
            with pytest.raises(Overloaded):
                await aside(lambda: 1)
        finally:
            go.set()
        while module._left:
            await asyncio.sleep(0.001)
        assert await aside(lambda: 1) == 1

    run(body())


def test_a_call_that_never_ends_does_not_keep_the_program() -> None:
    code = (
        "import asyncio, threading\nfrom mist.kit.aside import aside\n"
        "async def main():\n    async with asyncio.timeout(0.01):\n        await aside(threading.Event().wait)\n"
        "try:\n    asyncio.run(main())\nexcept TimeoutError:\n    print('gone on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "gone on\n"
