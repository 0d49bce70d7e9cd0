"""A long replay: after some full pages in quick succession the records are delivered instead of asked for.

A direct get costs the server three times what a delivery costs it, and its client waits while it answers; a consumer
takes milliseconds to make, which only pays for many pages. Promises: the pages are those that direct gets give. What was
read ahead is served for FRESH_S at most, nothing is passed over (a gap in the sequences ends the run, and the reader
looks directly), and the end of the stream is asked for when the run has come to it. Whoever may not make a consumer, or
meets a server that makes none, reads directly: nothing is lost but speed. One run per stream and connection, for the
reader that came first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mist.broker.base import Page, Record
from mist.errors import Closed, MistError
from mist_nats.api import ApiError
from mist_nats.tail import Tail

PAGES = 3
"""So many full pages in a row begin a run, of at least RECORDS_MIN records each."""
RECORDS_MIN = 256
BATCH = 4000
"""Records of one request: the next is made when half of them are read."""
FRESH_S = 1.0
"""How long a reader may pause: what was read ahead by then may have been trimmed, erased or deleted by others."""
MAKING_S = 1.0
AGAIN_S = 60.0
"""After a failure to make the consumer within MAKING_S the next attempt comes after this."""


class Run:
    """The run of one stream on one connection. `make` gives a tail that stands at a position, not started."""

    def __init__(self, make: Callable[[int], Tail]) -> None:
        self._make = make
        self._tail: Tail | None = None
        self._loop = asyncio.get_running_loop()
        self._pages = 0
        self._after = -1
        self._at = 0.0
        self._not_before = 0.0

    def passed(self, after: int, page: Page, limit: int) -> None:
        """A page was read directly."""
        now = self._loop.time()
        follows = after == self._after and now - self._at < FRESH_S
        full = len(page.records) == limit >= RECORDS_MIN
        self._pages = (self._pages if follows else 0) + 1 if full else 0
        self._after, self._at = page.scanned, now

    async def take(self, after: int, limit: int, bytes_max: int) -> tuple[list[Record], int, bool] | None:
        """As `Tail.take`, and whether that was all the server had. None: read directly."""
        tail = self._tail
        if tail is not None and (tail.dead or tail.idle_s > FRESH_S):
            self.end()
            tail = None
        if tail is None and self._pages >= PAGES and after == self._after and self._loop.time() >= self._not_before:
            tail = await self._begin(after)
        if tail is None or not tail.serves(after):
            return None
        await tail.fill(after + limit)
        if tail.dead:
            return None
        records, last = tail.take(after, limit, bytes_max)
        return (records, last, tail.ended) if records else None

    async def _begin(self, after: int) -> Tail | None:
        self._pages = 0
        tail = self._tail = self._make(after)
        try:
            async with asyncio.timeout(MAKING_S):
                await tail.start()
        except Closed:
            raise
        except (ApiError, MistError, TimeoutError):
            self._not_before = self._loop.time() + AGAIN_S
            self.end()
            return None
        except BaseException:
            self.end()
            raise
        return tail

    def end(self) -> None:
        """What was read ahead is not served any more."""
        tail, self._tail = self._tail, None
        self._pages = 0
        if tail is not None:
            tail.die()
