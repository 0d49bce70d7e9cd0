"""What a process may use and what it does use.

    memory = Limiter("inbox bytes", 64 * 1024 * 1024)
    async with memory.hold(len(body)): ...

A `Limiter` counts slots, bytes or whatever its weights mean. Promises: never more than `size` is out; who asked first
is served first, so that a large request is not starved by small ones; what is given back without having been taken is an
error and changes nothing; a cancelled request takes nothing. `snapshot` says what the process uses: memory, descriptors, tasks,
processor time. `watch` shows both as metrics. Does not: enforce anything on memory that is not asked for here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from msgspec import Struct

from mist.errors import InvalidArgument, Overloaded
from mist.kit.metrics import Metrics


class Limiter:
    """`active` is out now, `total` was ever given, `waiting` how many requests wait."""

    def __init__(self, name: str, size: int) -> None:
        if size < 1:
            raise InvalidArgument(f"resource {name}: a size of {size} cannot be")
        self.name = name
        self.size = size
        self.active = 0
        self.total = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def available(self) -> int:
        return self.size - self.active

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def try_acquire(self, weight: int = 1) -> bool:
        """False when it would have to wait: too little is left, or others wait already. Raises InvalidArgument for a
        weight that can never fit."""
        self._check(weight)
        if self._queue or weight > self.available:
            return False
        self._take(weight)
        return True

    async def acquire(self, weight: int = 1, *, wait_s: float | None = None) -> None:
        """Wait for one's turn. Raises Overloaded when it does not come within `wait_s`."""
        if self.try_acquire(weight):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (weight, turn)
        self._queue.append(entry)
        try:
            async with asyncio.timeout(wait_s) as limit:
                await turn
        except BaseException as exc:
            if turn.done() and not turn.cancelled():
                self.release(weight)  # it was given to us in the same moment
            else:
                if entry in self._queue:  # `_serve` takes cancelled ones out too
                    self._queue.remove(entry)
                self._serve()  # a smaller one behind us may fit
            if isinstance(exc, TimeoutError) and limit.expired():
                raise Overloaded(f"resource {self.name}: {weight} not free within {wait_s:g} s") from exc
            raise

    def release(self, weight: int = 1) -> None:
        """Give back. Raises InvalidArgument when more is given back than is out."""
        self._check(weight)
        if weight > self.active:
            raise InvalidArgument(f"resource {self.name}: {weight} given back, but only {self.active} is out")
        self.active -= weight
        self._serve()

    @contextlib.asynccontextmanager
    async def hold(self, weight: int = 1, *, wait_s: float | None = None) -> AsyncIterator[None]:
        await self.acquire(weight, wait_s=wait_s)
        try:
            yield
        finally:
            self.release(weight)

    def _check(self, weight: int) -> None:
        if not 0 <= weight <= self.size:
            raise InvalidArgument(f"resource {self.name}: {weight} of {self.size} can never be had")

    def _take(self, weight: int) -> None:
        self.active += weight
        self.total += 1

    def _serve(self) -> None:
        while self._queue and self._queue[0][0] <= self.available:
            weight, turn = self._queue.popleft()
            if not turn.done():
                self._take(weight)
                turn.set_result(None)


class Snapshot(Struct, frozen=True):
    """What this process uses now. None = this system does not tell."""

    rss_bytes: int | None
    open_fds: int | None
    fds_max: int | None
    tasks: int
    cpus: int
    cpu_s: float


def snapshot() -> Snapshot:
    """Cheap: a few reads of /proc. `tasks` are those of the running event loop."""
    return Snapshot(_rss(), _open_fds(), _fds_max(), _tasks(), _cpus(), time.process_time())


def watch(metrics: Metrics, limiters: Sequence[Limiter] = ()) -> None:
    """Show the process, under the names that Prometheus clients use, and the limiters."""
    start = time.time()

    def known(read: Callable[[], int | None]) -> Callable[[], dict[tuple[str, ...], float]]:
        def values() -> dict[tuple[str, ...], float]:
            found = read()
            return {} if found is None else {(): found}

        return values

    metrics.watch("process_resident_memory_bytes", "Memory in use.", known(_rss))
    metrics.watch("process_open_fds", "Open file descriptors.", known(_open_fds))
    metrics.watch("process_max_fds", "How many may be open.", known(_fds_max))
    metrics.watch("process_cpu_seconds_total", "Processor time.", time.process_time, kind="counter")
    metrics.watch("process_start_time_seconds", "When it started, Unix time.", lambda: start)
    metrics.watch("mist_cpus", "Processors it may use.", _cpus)
    metrics.watch("mist_tasks", "Tasks of the event loop.", _tasks)
    if limiters:
        by_name: dict[tuple[str, ...], Limiter] = {(limiter.name,): limiter for limiter in limiters}
        if len(by_name) < len(limiters):
            raise InvalidArgument("two resources have one name")

        def show(name: str, help: str, read: Callable[[Limiter], int]) -> None:
            metrics.watch(
                name, help, lambda: {key: read(limiter) for key, limiter in by_name.items()}, labels=("resource",)
            )  # fmt: skip

        show("mist_resource_active", "What is out.", lambda limiter: limiter.active)
        show("mist_resource_size", "What there is.", lambda limiter: limiter.size)
        show("mist_resource_waiting", "Requests that wait.", lambda limiter: limiter.waiting)


def _rss() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _open_fds() -> int | None:
    for place in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(place)) - 1  # the listing itself has one open
        except OSError:
            continue
    return None


def _fds_max() -> int | None:
    try:
        import resource  # not on every system
    except ImportError:
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # no loop runs in this thread
        return 0


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
