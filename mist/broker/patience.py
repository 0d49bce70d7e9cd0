"""Going on when a backend comes back: a call repeated while its error says that it is worth it, and a stream read so.

`Patience` has no end of its own unless it is given one: who calls it bounds it (a timeout, a cancellation, `away_s_max`). It
tells when somebody has been away for longer than one try, and when they are back. It repeats only what may be repeated:
the caller says which call that is. A full store is not waited for: whoever can make room has to know.

`again` is one call with an end, for reads, saved positions, and appends whose messages carry ids (the broker stores a known
id once within its window).
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from mist.broker.backoff import Backoff
from mist.broker.base import (
    ALL,
    BYTES_MAX,
    Consumer,
    ConsumerConfig,
    Message,
    Page,
    Stream,
    StreamInfo,
    Verification,
)
from mist.broker.clock import SYSTEM, Clock
from mist.errors import MistError, StorageFull

T = TypeVar("T")

SAY_EVERY_S = 30.0
BACKOFF = Backoff(first_s=0.1, most_s=3.0)
AWAY_S = 60.0
_SOON = Backoff(first_s=0.05, most_s=1.0)


def worth_waiting(error: MistError) -> bool:
    """Whether the same call may succeed later, without anybody changing it."""
    return error.retryable and not isinstance(error, StorageFull)


class Patience:
    """One per backend. `on_away` gets the error and for how long it has been so, at the second failure in a row and then
    every half minute; `on_back` for how long it was; `on_retry` gets every error that is waited out. Away for longer than
    `away_s_max`, the last error is raised."""

    def __init__(
        self,
        *,
        on_away: Callable[[MistError, float], None] | None = None,
        on_back: Callable[[float], None] | None = None,
        on_retry: Callable[[MistError], None] | None = None,
        away_s_max: float = math.inf,
        backoff: Backoff = BACKOFF,
        clock: Clock = SYSTEM,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self._on_away = on_away
        self._on_back = on_back
        self._on_retry = on_retry
        self._away_s_max = away_s_max
        self._backoff = backoff
        self._clock = clock
        self._rand = rand
        self._since: float | None = None
        self._said: float | None = None
        self._failures = 0
        self.error: MistError | None = None
        """Why it is away; None while it answers."""

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        """Its answer, however long that takes. Raises what is not worth waiting for."""
        while True:
            try:
                answer = await call()
            except MistError as exc:
                await self.wait(exc)
            else:
                self.back()
                return answer

    async def wait(self, error: MistError) -> None:
        """After a failed try: sleep until the next one is due. Raises the error when it is not worth it."""
        if not worth_waiting(error):
            raise error
        now = self._clock.monotonic()
        if self._since is None:
            self._since = now
        if now - self._since > self._away_s_max:
            raise error
        self.error = error
        self._failures += 1
        if self._on_retry is not None:
            self._on_retry(error)
        if self._failures > 1 and (self._said is None or now - self._said >= SAY_EVERY_S):
            self._said = now
            if self._on_away is not None:
                self._on_away(error, now - self._since)
        await asyncio.sleep(max(self._backoff.delay_s(self._failures, self._rand), error.retry_after_s or 0.0))

    def back(self) -> None:
        """It answered."""
        if self._since is None:
            return
        since, said = self._since, self._said
        self._since = self._said = self.error = None
        self._failures = 0
        if said is not None and self._on_back is not None:
            self._on_back(self._clock.monotonic() - since)


async def again(
    call: Callable[[], Awaitable[T]],
    *,
    away_s_max: float = AWAY_S,
    on_retry: Callable[[MistError], None] | None = None,
    clock: Clock = SYSTEM,
) -> T:
    """Its answer. Raises what time does not heal, and the last error when the backend stays away for `away_s_max`."""
    return await Patience(on_retry=on_retry, away_s_max=away_s_max, backoff=_SOON, clock=clock)(call)


class Steady(Stream):
    """A stream whose reads wait for their backend to come back. Everything else is the stream's own."""

    def __init__(self, stream: Stream, patience: Patience) -> None:
        self.stream = stream
        self.name = stream.name
        self.incarnation = stream.incarnation
        self.size_bytes_max = stream.size_bytes_max
        self._patience = patience

    async def read(
        self,
        *,
        after: int = 0,
        subjects: Sequence[str] = ALL,
        limit: int = 256,
        bytes_max: int = BYTES_MAX,
        wait_s: float = 0.0,
    ) -> Page:
        return await self._patience(
            lambda: self.stream.read(after=after, subjects=subjects, limit=limit, bytes_max=bytes_max, wait_s=wait_s)
        )

    async def info(self) -> StreamInfo:
        return await self._patience(self.stream.info)

    async def locate(self, time_ns: int) -> int:
        return await self._patience(lambda: self.stream.locate(time_ns))

    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        return await self.stream.append(messages, expected_last=expected_last)

    async def trim(self, *, before: int) -> int:
        return await self.stream.trim(before=before)

    async def erase(self, sequences: Sequence[int]) -> int:
        return await self.stream.erase(sequences)

    async def verify(self) -> Verification:
        return await self.stream.verify()

    async def consumer(self, name: str, config: ConsumerConfig | None = None, *, create: bool = True) -> Consumer:
        return await self.stream.consumer(name, config, create=create)

    async def consumers(self) -> list[str]:
        return await self.stream.consumers()
