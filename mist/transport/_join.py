"""Joins what several tasks write in one turn of the event loop into one write, and waits for it.

Promises: order of the calls is the order of the bytes; `put` returns when its bytes are written, or raises what the
write raised; the bytes that wait are bounded; a cancelled `put` is not withdrawn. One write is under way at a time, so
while a slow one runs (an fdatasync) the next is collected: a group commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

BYTES_MAX = 8 * 1024 * 1024


class Joiner:
    def __init__(self, write: Callable[[bytes], Awaitable[None]], bytes_max: int = BYTES_MAX) -> None:
        self._write = write
        self._bytes_max = bytes_max
        self._parts: list[bytes] = []
        self._size = 0
        self._batch: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._error: Exception | None = None

    async def put(self, data: bytes) -> None:
        while self._batch is not None and self._size + len(data) > self._bytes_max:
            await asyncio.wait([self._batch])
        if self._batch is None:
            loop = asyncio.get_running_loop()
            self._batch = loop.create_future()
            self._batch.add_done_callback(_seen)
            if self._task is None:
                self._task = loop.create_task(self._run())
        self._parts.append(data)
        self._size += len(data)
        batch = self._batch
        await asyncio.shield(batch)

    async def flush(self) -> None:
        """Wait until everything accepted is written or has failed (whoever put it has the error)."""
        while self._task is not None:
            await asyncio.wait([self._task])

    def abandon(self, error: Exception) -> None:
        """Give up what is under way and what waits: their senders get the error."""
        if self._task is not None:
            self._error = error
            self._task.cancel()

    async def _run(self) -> None:
        batch: asyncio.Future[None] | None = None
        try:
            while self._batch is not None:
                batch, self._batch = self._batch, None
                parts, self._parts, self._size = self._parts, [], 0
                try:
                    await self._write(parts[0] if len(parts) == 1 else b"".join(parts))
                except Exception as exc:
                    batch.set_exception(exc)
                else:
                    batch.set_result(None)
        finally:
            self._task = None
            for left in (batch, self._batch):  # cancelled: by `abandon`, or because the event loop ends
                if left is not None and not left.done():
                    if self._error is not None:
                        left.set_exception(self._error)
                    else:
                        left.cancel()
            self._batch = None


def _seen(batch: asyncio.Future[None]) -> None:
    """Every sender may be gone by now (cancelled); the error is then nobody's, and asyncio must not complain."""
    if not batch.cancelled():
        batch.exception()
