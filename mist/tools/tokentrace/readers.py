"""Questions beside the ingest: a few read-only connections to one store, each question in a thread, none without an end.

Promises: at most `connections` questions run at a time, `waiting_max` more wait, the next is Overloaded; a question that
takes longer than `deadline_s` is interrupted in the database and raises TimedOut; its connection is used again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mist.errors import Closed, Overloaded, TimedOut
from mist.tools.tokentrace.store import Store

T = TypeVar("T")

CONNECTIONS = 4
WAITING_MAX = 100
DEADLINE_S = 30.0


class Readers:
    """Connections are opened when they are first needed. Belongs to its event loop."""

    def __init__(
        self,
        place: Path | str,
        *,
        connections: int = CONNECTIONS,
        waiting_max: int = WAITING_MAX,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._place = place
        self._free: list[Store] = []
        self._slots = asyncio.Semaphore(connections)
        self._waiting = 0
        self._waiting_max = waiting_max
        self._deadline_s = deadline_s
        self._closed = False

    async def ask(self, question: Callable[[Store], T]) -> T:
        """The answer. Raises what the question raises, Overloaded, TimedOut, NotFound where there is no store."""
        if self._closed:
            raise Closed("the store is closed")
        if self._slots.locked() and self._waiting >= self._waiting_max:
            raise Overloaded(f"{self._waiting} questions are waiting", retry_after_s=1)
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            store = self._free.pop() if self._free else await asyncio.to_thread(Store.read, self._place)
            try:
                return await self._within_deadline(store, question)
            finally:
                self._give_back(store)
        finally:
            self._slots.release()

    def _give_back(self, store: Store) -> None:
        if self._closed:
            store.close()
        else:
            self._free.append(store)

    async def _within_deadline(self, store: Store, question: Callable[[Store], T]) -> T:
        work = asyncio.ensure_future(asyncio.to_thread(question, store))
        try:
            await asyncio.wait({work}, timeout=self._deadline_s)
        finally:
            late = not work.done()
            # the thread is ours until it has ended: nobody may use its connection before
            while not work.done():
                store.interrupt()
                await asyncio.wait({work}, timeout=0.05)
        if late:
            work.exception()  # it was interrupted, and says so in its own way
            raise TimedOut(
                f"the question took longer than {self._deadline_s:g} s", hint="a shorter window, or fewer conditions"
            )
        return work.result()

    def close(self) -> None:
        """Idempotent. Questions under way end first."""
        self._closed = True
        while self._free:
            self._free.pop().close()
