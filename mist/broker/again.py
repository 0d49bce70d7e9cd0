"""Repeat a call while its error says that time may heal it: a broker that is restarting, a connection that was cut.

For calls that are safe to repeat: reads, saving a position, appends whose messages carry ids (the broker stores a known id
once within its window). Waits with full jitter between tries and gives up, raising the last error, when the backend
has been away for `away_s_max`. A full store is raised at once: waiting makes no room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from mist.broker.backoff import Backoff
from mist.broker.clock import SYSTEM, Clock
from mist.errors import MistError, StorageFull

T = TypeVar("T")

AWAY_S = 60.0
_BACKOFF = Backoff(first_s=0.05, most_s=1.0)


async def again(
    call: Callable[[], Awaitable[T]],
    *,
    away_s_max: float = AWAY_S,
    on_retry: Callable[[MistError], None] | None = None,
    clock: Clock = SYSTEM,
) -> T:
    """`await call()`, repeated. `on_retry` is told every error that is waited out. Raises what time does not heal."""
    tries, since_s = 0, 0.0
    while True:
        try:
            return await call()
        except MistError as exc:
            now = clock.monotonic()
            since_s = since_s if tries else now
            if not exc.retryable or isinstance(exc, StorageFull) or now - since_s > away_s_max:
                raise
            tries += 1
            if on_retry is not None:
                on_retry(exc)
            pause = max(_BACKOFF.delay_s(tries), exc.retry_after_s or 0.0)
        await asyncio.sleep(pause)
