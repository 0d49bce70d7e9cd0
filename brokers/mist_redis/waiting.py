"""Waiting for a stream: one blocking XREAD per waited-on stream, for all its readers and fetchers here.

It takes nothing: whoever wakes looks for itself, so a cancelled waiter holds no record and loses none. The read blocks
on the stream and on its `wake` key (acks that make room, naks, seeks, trims, deletion). Its connection is its own, with
a time limit made from the block time, and is closed when nobody has waited for a while. Above WATCHES_MAX streams the
waiters poll.
"""

from __future__ import annotations

import asyncio
from typing import Any

from mist.broker.notify import Notifier
from mist.errors import MistError, Unavailable
from mist_redis.link import Address, Link
from mist_redis.resp import Lost, NotSent, ReplyError, Wire, pack

BLOCK_S = 5.0
IDLE_S = 30.0
WATCHES_MAX = 64
POLL_S = 0.05
RETRY_S = 0.2
KEEP = 128
"""Entries a wake-up may bring along."""


class Watch:
    """The readers of one stream that wait."""

    def __init__(self, link: Link, key: str, wake_key: str) -> None:
        self._link = link
        self._key = key
        self._wake_key = wake_key
        self._notifier = Notifier()
        self._task: asyncio.Task[None] | None = None
        self._wire: Wire | None = None
        self._at: Address = ("", 0)
        self._waiting = 0
        self._idle: asyncio.TimerHandle | None = None
        self.last = "0-0"
        self.wake = "0-0"
        self.brought: tuple[str, list[Any]] = ("", [])
        """The id waited behind, and what came: complete unless it is KEEP long."""

    @property
    def generation(self) -> int:
        return self._notifier.generation

    @property
    def in_use(self) -> bool:
        return self._waiting > 0 or self._task is not None or self._wire is not None

    def notify(self) -> None:
        """Every waiter looks again."""
        self._notifier.notify()

    async def wait(self, generation: int, last: str, wake: str, timeout_s: float) -> None:
        """Until something happened that a look which saw `last` and `wake` has not seen, or the time is over."""
        if self._notifier.generation != generation:
            return
        if self._task is not None and (_less(last, self.last) or _less(wake, self.wake)):
            # what blocks now began behind a later look than this one, and would not wake for what lies between
            await asyncio.sleep(min(max(timeout_s, 0.0), POLL_S))
            return
        self._waiting += 1
        try:
            if self._task is None:
                # an XREAD that blocks already began behind an earlier look, and so wakes for all that came after it
                self.last, self.wake = last, wake
                self._task = asyncio.get_running_loop().create_task(self._run())
            await self._notifier.wait(generation, timeout_s)
        finally:
            self._waiting -= 1

    async def _run(self) -> None:
        try:
            while self._waiting:
                try:
                    await self._once()
                except (MistError, Lost, NotSent):
                    # the waiters look for themselves, and raise what they meet
                    await asyncio.sleep(RETRY_S)
                    self._notifier.notify()
        finally:
            self._task = None
            loop = asyncio.get_running_loop()
            if self._idle is not None:
                self._idle.cancel()
            self._idle = loop.call_later(IDLE_S, self._rest)
            if self._waiting:  # somebody came while we were ending
                self._notifier.notify()

    async def _once(self) -> None:
        if self._wire is None or not self._wire.alive:
            try:
                self._at = await self._link.address(self._key)
                self._wire = await self._link.dial(self._at)
            except Unavailable:
                await self._link.look_again()
                raise
        last, wake = self.last, self.wake
        frame = pack(
            [("XREAD", "COUNT", KEEP, "BLOCK", int(BLOCK_S * 1000), "STREAMS", self._key, self._wake_key, last, wake)]
        )
        (reply,) = await self._wire.call(frame, 1, BLOCK_S + self._link.settings.timeout_s)
        if reply is None:
            return
        if isinstance(reply, ReplyError):
            await self._link.leave(self._at)
            self._wire.abort("refused")
            raise NotSent(str(reply))
        came: list[Any] = []
        for key, entries in reply:
            if key == self._wake_key.encode():
                self.wake = entries[-1][0].decode()
            else:
                came = entries
                self.last = entries[-1][0].decode()
        self.brought = (last, came)
        self._notifier.notify()

    def _rest(self) -> None:
        self._idle = None
        if self._task is None and self._wire is not None:
            self._wire.abort()
            self._wire = None

    async def close(self) -> None:
        self._notifier.notify()
        if self._idle is not None:
            self._idle.cancel()
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._wire is not None:
            self._wire.abort()
            self._wire = None


def _less(a: str, b: str) -> bool:
    """Whether id `a` comes before id `b`."""
    left, right = a.split("-"), b.split("-")
    return (int(left[0]), int(left[1])) < (int(right[0]), int(right[1]))


class Watches:
    """The watches of one broker: one per stream and incarnation, because a remade stream numbers anew."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._all: dict[tuple[str, str], Watch] = {}

    def of(self, key: str, wake_key: str, incarnation: str) -> Watch:
        found = self._all.get((key, incarnation))
        if found is None:
            if len(self._all) >= WATCHES_MAX:
                for old in [k for k, w in self._all.items() if not w.in_use]:
                    del self._all[old]
            found = self._all[key, incarnation] = Watch(self._link, key, wake_key)
        return found

    @property
    def many(self) -> bool:
        """Whether one more waited-on stream would be too many connections: then its waiters poll."""
        return sum(w.in_use for w in self._all.values()) >= WATCHES_MAX

    async def close(self) -> None:
        for watch in list(self._all.values()):
            await watch.close()
