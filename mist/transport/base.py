"""The light contract: three verbs over any URL. Read this first, then the file of the scheme you use.

Promises, each one a case in mist.testing.transports:

order        what one sender sends arrives in the order it was sent; concurrent senders never tear one another apart.
payload      arrives byte for byte, whatever carries it.
waiting      `send` waits where there is no room, `receive` waits where there is nothing yet. Nothing is dropped.
cancelling   a receive loses nothing; the next one gets it. A cancelled send is not withdrawn: it may still arrive.
the end      is EndOfStream, when the other side is done and everything it sent was received. `async for` ends there.
bad input    raises its error for one call, naming where it lies; the next call goes on behind it.
size         an envelope above `size_bytes_max` raises TooLarge before anything is sent; a larger one that comes in is
             passed over with TooLarge.
closing      is idempotent, finishes what was accepted, and wakes every waiter. Use after it raises Closed.
errors       are all in mist.errors (or CancelledError).

Does not: remember what was delivered. Positions, acknowledgement and redelivery belong to brokers (`stream.py` lends
them to this contract). A transport belongs to the event loop it is used on, except where its module says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from mist.errors import Closed, EndOfStream, InvalidArgument
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope

RECEIVE_LIMIT = 256


class Transport(ABC):
    """One end of a connection. Made by `mist.transport.dial(url)`."""

    url: str
    """As it may be printed: secrets replaced."""
    size_bytes_max: int = SIZE_BYTES_MAX
    """The largest encoded envelope."""

    @abstractmethod
    async def send_many(self, envelopes: Sequence[Envelope]) -> None:
        """Deliver them in order; returns when they are where this transport promises to put them.

        No envelopes: touches nothing. Raises TooLarge before anything is sent, EndOfStream when nobody will read it.
        """

    @abstractmethod
    async def receive_many(self, limit: int = RECEIVE_LIMIT, wait_s: float | None = None) -> list[Envelope]:
        """Between 1 and `limit` envelopes, waiting up to `wait_s` for the first one (None = as long as it takes).

        Empty only when that time ran out. Raises EndOfStream at the end, and the error of a bad one when that is
        the next.
        """

    @abstractmethod
    async def close(self) -> None:
        """Idempotent. What was accepted is finished first; waiting calls raise Closed."""

    async def send(self, envelope: Envelope) -> None:
        """Deliver one."""
        await self.send_many((envelope,))

    async def receive(self) -> Envelope:
        """The next one, waiting for it. Raises EndOfStream at the end."""
        while True:
            envelopes = await self.receive_many(1)
            if envelopes:
                return envelopes[0]

    async def ack(self) -> int:
        """Settle what was received, where the URL names a consumer; how many were settled. Elsewhere a no-op: 0."""
        return 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Envelope:
        try:
            return await self.receive()
        except EndOfStream:
            raise StopAsyncIteration from None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"


def closed_error(url: str) -> Closed:
    return Closed(f"{url} is closed")


def check_limit(limit: int) -> int:
    """The limit of a `receive_many`, if it can be one."""
    if limit < 1:
        raise InvalidArgument(f"receive_many: limit={limit} cannot be right", hint="ask for at least one")
    return limit
