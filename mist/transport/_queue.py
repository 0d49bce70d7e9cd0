"""A bounded queue between two ends of one process: a deque, and a future for each side that waits.

Promises: order; never more than `size` items; a `put` waits for room, a `get` for an item, and neither wakes in vain
for long; a cancelled wait takes and loses nothing; the two ends may live in different threads and event loops. Closing
either end wakes everybody.

Why not asyncio.Queue: it makes a future per item where this makes one per wait, has no batches, does not close, and
belongs to one loop. Several producers in different threads may overshoot `size` by one item each.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from mist.errors import Closed, EndOfStream, Overloaded

T = TypeVar("T")
Waiters = deque["asyncio.Future[None]"]


class Queue(Generic[T]):
    """`name` is how errors call it."""

    def __init__(self, size: int, name: str) -> None:
        self.size = size
        self._name = name
        self._items: deque[T] = deque()
        self._getters: Waiters = deque()
        self._putters: Waiters = deque()
        self._ended = False  # the producer is done
        self._abandoned = False  # the consumer is gone
        self._room_due = False

    def __len__(self) -> int:
        return len(self._items)

    # the producing end

    def put_nowait(self, items: Sequence[T]) -> None:
        """All of them or, when they do not fit, none: Overloaded."""
        self._check_put()
        if len(self._items) + len(items) > self.size:
            raise Overloaded(f"{self._name} is full: {len(self._items)} of {self.size}", hint="receive, or wait")
        self._items.extend(items)
        self._wake(self._getters)

    async def put(self, item: T) -> None:
        if len(self._items) < self.size and not self._putters:
            self._check_put()
            self._items.append(item)
            if self._getters:
                self._wake(self._getters)
        else:
            await self.put_many((item,))

    async def put_many(self, items: Sequence[T]) -> None:
        """In order, as room comes; other producers' items may lie between those of one long call."""
        self._check_put()
        done = 0
        waited = not self._putters  # newcomers queue up behind those who wait
        while done < len(items):
            room = self.size - len(self._items) if waited else 0
            if room > 0:
                self._items.extend(items[done : done + room])
                done += room
                self._wake(self._getters)
                continue
            await self._park(self._putters, None, for_room=True)
            waited = True
            self._check_put()
        if self._putters and len(self._items) < self.size:
            self._wake(self._putters)

    def end(self) -> None:
        """Nothing more will come: consumers take what is there, then get EndOfStream."""
        self._ended = True
        self._wake_all()

    # the consuming end

    async def get_many(self, limit: int, wait_s: float | None) -> list[T]:
        """Between 1 and `limit` items; none when the time ran out. EndOfStream after the last."""
        items = self._items
        until: float | None = None
        while not items:
            if self._abandoned:
                raise Closed(f"{self._name} is closed")
            if self._ended:
                raise EndOfStream(f"{self._name}: the other end is closed")
            if wait_s is not None:
                now = asyncio.get_running_loop().time()
                until = now + wait_s if until is None else until
                if until <= now:
                    return []
                await self._park(self._getters, until - now, for_room=False)
            else:
                await self._park(self._getters, None, for_room=False)
        if self._abandoned:
            raise Closed(f"{self._name} is closed")
        if len(items) <= limit:
            out = list(items)
            items.clear()
        else:
            out = [items.popleft() for _ in range(limit)]
            if self._getters:
                self._wake(self._getters)
        if self._putters:
            self._make_room()
        return out

    async def get(self) -> T:
        if self._items and not self._abandoned:
            item = self._items.popleft()
            if self._putters:
                self._make_room()
            return item
        return (await self.get_many(1, None))[0]

    def abandon(self) -> None:
        """Nobody will take what is there: producers get EndOfStream, waiting consumers Closed."""
        self._abandoned = True
        self._wake_all()

    # waiting and waking

    def _check_put(self) -> None:
        if self._ended:
            raise Closed(f"{self._name} is closed")
        if self._abandoned:
            raise EndOfStream(f"{self._name}: the other end is closed")

    def _may_go(self, for_room: bool) -> bool:
        if self._ended or self._abandoned:
            return True
        return len(self._items) < self.size if for_room else bool(self._items)

    async def _park(self, waiters: Waiters, timeout_s: float | None, *, for_room: bool) -> None:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        waiters.append(turn)
        # The other end, perhaps in another thread, changes the queue and then looks for waiters; we are one now and
        # look at the queue again. One of the two sees the other.
        if self._may_go(for_room):
            _drop(waiters, turn)
            return
        timer = None if timeout_s is None else loop.call_later(timeout_s, _settle, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._wake(waiters)  # the wake-up was for us, and we are leaving: somebody else must have it
            raise
        finally:
            _drop(waiters, turn)
            if timer is not None:
                timer.cancel()

    def _make_room(self) -> None:
        """Wake producers when half is free; otherwise at the end of this turn, so that a consumer that goes on taking
        is not interrupted for every single place."""
        if len(self._items) * 2 <= self.size:
            self._wake(self._putters)
        elif not self._room_due:
            self._room_due = True
            asyncio.get_running_loop().call_soon(self._room)

    def _room(self) -> None:
        self._room_due = False
        if len(self._items) < self.size:
            self._wake(self._putters)

    def _wake(self, waiters: Waiters) -> None:
        """One of them."""
        while waiters:
            try:
                turn = waiters.popleft()
            except IndexError:  # another thread was faster
                return
            if self._hand(turn, waiters):
                return

    def _hand(self, turn: asyncio.Future[None], waiters: Waiters) -> bool:
        loop = turn.get_loop()
        if loop is _running():
            if turn.done():
                return False
            turn.set_result(None)
            return True
        try:
            loop.call_soon_threadsafe(self._hand_there, turn, waiters)
        except RuntimeError:
            return False  # that loop is closed, and its waiter with it
        return True

    def _hand_there(self, turn: asyncio.Future[None], waiters: Waiters) -> None:
        if turn.cancelled():
            self._wake(waiters)
        else:
            _settle(turn)

    def _wake_all(self) -> None:
        for waiters in (self._getters, self._putters):
            for _ in range(len(waiters)):
                self._wake(waiters)


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _settle(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


def _drop(waiters: Waiters, turn: asyncio.Future[None]) -> None:
    try:
        waiters.remove(turn)
    except ValueError:
        return  # whoever woke us took it out
