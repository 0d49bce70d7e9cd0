"""Somebody else's code in a thread that nobody has to wait for.

    verdict = await aside(lambda: grade(answer))

Promises: the event loop goes on meanwhile; the call sees the caller's context variables; a cancelled caller goes on at once
and the call is left behind, as a thread cannot be ended. It does not keep the program from ending either. No more than
LEFT_MAX calls that were left behind may still be running: then nothing new is begun, and that is Overloaded. Threads are
used again. Does not: limit how many run at a time, which is the caller's (a Pool), or give a call up by itself (`asyncio.timeout`).

`waiting.in_thread` is for our own code, which has to have ended before what it works on is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

from mist.errors import Overloaded

LEFT_MAX = 16
IDLE_MAX = 8

T = TypeVar("T")
_Job = tuple[Callable[[], Any], asyncio.Future[Any], asyncio.AbstractEventLoop]

_lock = threading.Lock()
_idle: list[SimpleQueue[_Job]] = []
_left = 0


async def aside(work: Callable[[], T]) -> T:
    """The result of `work()`, or what it raised. Raises Overloaded."""
    global _left
    if _left >= LEFT_MAX:
        raise Overloaded(f"{_left} calls that took too long are still running", hint="what is called never ends")
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    with _lock:
        jobs = _idle.pop() if _idle else None
    if jobs is None:
        jobs = SimpleQueue()
        threading.Thread(target=_serve, args=(jobs,), name="aside", daemon=True).start()
    ended = _Ended()
    context = contextvars.copy_context()
    jobs.put((lambda: _counted(lambda: context.run(work), ended), future, loop))
    try:
        return await future
    except asyncio.CancelledError:
        with _lock:
            if not ended.told:
                ended.left = True
                _left += 1
        raise


class _Ended:
    """Whether a call has ended, and whether it was left behind before; the lock guards both."""

    told = left = False


def _counted(work: Callable[[], T], ended: _Ended) -> T:
    global _left
    try:
        return work()
    finally:
        with _lock:
            ended.told = True
            _left -= ended.left


def _serve(jobs: SimpleQueue[_Job]) -> None:
    while True:
        work, future, loop = jobs.get()
        result, error = None, None
        try:
            result = work()
        except BaseException as exc:  # whatever it is, it is the caller's
            error = exc
        with _lock:
            kept = len(_idle) < IDLE_MAX
            if kept:
                _idle.append(jobs)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_tell, future, result, error)
        del work, future, loop, result, error
        if not kept:
            return


def _tell(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration):  # a future takes none
        future.set_exception(RuntimeError(f"the call raised {type(error).__name__}"))
    else:
        future.set_exception(error)
