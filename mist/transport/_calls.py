"""Calls of a sink by many requests at once: small ones of the same moment share one call.

Promises: every `put` is told its outcome once, by a call on this loop; requests that share a call do not share an error
that is the fault of one of them; what one call holds is bounded. One shared call is under way at a time, so while the sink
waits for the disk the next one is collected: a group commit without a timer. A large request has a call of its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from msgspec import Struct

from mist.errors import Closed, Unavailable
from mist.protocol.envelope import Envelope

ALONE = 100
"""Requests of so many envelopes have a call of their own."""
SHARED_MAX = 2000


class Replies(Struct, frozen=True):
    """What a sink that answers gives back instead of sequences."""

    envelopes: list[Envelope]


Stored = Sequence[int] | Replies | None
Done = Callable[[Stored, Exception | None], None]
_Entry = tuple[list[Envelope], Done]
_EVERYBODY = (Unavailable, Closed)
"""Errors that no other composition of the call would avoid."""


class Calls:
    def __init__(self, store: Callable[[list[Envelope]], Awaitable[Stored]], shared: bool) -> None:
        self._store = store
        self._shared = shared
        self._waiting: deque[_Entry] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = False

    def put(self, envelopes: list[Envelope], done: Done) -> None:
        """`done` gets what the sink gave for these envelopes, or its error."""
        if not self._shared or len(envelopes) >= ALONE:
            self._start(self._alone((envelopes, done)))
            return
        self._waiting.append((envelopes, done))
        if not self._running:
            self._running = True
            self._start(self._run())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        waiting = self._waiting
        try:
            while waiting:
                entries = [waiting.popleft()]
                count = len(entries[0][0])
                while waiting and count + len(waiting[0][0]) <= SHARED_MAX:
                    entries.append(waiting.popleft())
                    count += len(entries[-1][0])
                await self._together(entries)
                await asyncio.sleep(0)  # who was just answered may have sent the next one
        finally:
            self._running = False

    async def _together(self, entries: list[_Entry]) -> None:
        if len(entries) == 1:
            await self._alone(entries[0])
            return
        try:
            stored = await self._store([e for envelopes, _ in entries for e in envelopes])
        except _EVERYBODY as exc:
            for _, done in entries:
                done(None, exc)
        except Exception:
            for entry in entries:
                await self._alone(entry)
        except BaseException:
            _dropped(entries)
            raise
        else:
            _settle(entries, stored)

    async def _alone(self, entry: _Entry) -> None:
        try:
            stored = await self._store(entry[0])
        except Exception as exc:
            entry[1](None, exc)
        except BaseException:
            _dropped([entry])
            raise
        else:
            entry[1](stored, None)


def _settle(entries: list[_Entry], stored: Stored) -> None:
    sequences = () if stored is None or isinstance(stored, Replies) else stored
    at = 0
    whole = len(sequences) == sum([len(envelopes) for envelopes, _ in entries])
    for envelopes, done in entries:
        stop = at + len(envelopes)
        done(sequences[at:stop] if whole else None, None)
        at = stop


def _dropped(entries: list[_Entry]) -> None:
    for _, done in entries:
        done(None, Closed("the server was cancelled; whether this was stored is not known"))
