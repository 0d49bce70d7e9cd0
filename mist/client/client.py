"""A client: envelopes over one broker.

Promises: a message's id is its envelope's id, so that publishing an envelope twice stores it once (within the stream's
de-duplication window); its subject is the envelope's type, and a qualifier after it where one is given. An envelope
above the size limit is refused before anything is sent. All publishing to one stream shares one batching window.

The client does not own the broker: closing it settles what was published through it and leaves the broker open.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any, Literal, Self, overload

from mist.broker.backoff import Backoff
from mist.broker.base import ALL, BYTES_MAX, Broker, ConsumerConfig, Headers, Message, Stream, StreamConfig
from mist.broker.cursor import Cursor, OnGap
from mist.broker.publisher import Publisher
from mist.client.blobs import Blobs, beside, outlined
from mist.client.policy import NAK_BACKOFF, AckPolicy
from mist.client.reader import Reader
from mist.client.received import Bad, OnBad, Received
from mist.client.worker import BatchHandler, Delivered, Handler, Worker
from mist.errors import Closed, MistError, NotFound, TooLarge
from mist.protocol.codec import encode
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope
from mist.protocol.subject import subject_for

_subject_for = lru_cache(maxsize=4096)(subject_for)


def to_message(
    envelope: Envelope, *, qualifier: str = "", size_bytes_max: int = SIZE_BYTES_MAX, headers: Headers = ()
) -> Message:
    """The message that stores an envelope. Raises TooLarge, InvalidArgument (a type that makes no subject)."""
    data = encode(envelope)
    if len(data) > size_bytes_max:
        raise TooLarge(f"envelope {envelope.id}", size_bytes=len(data), size_bytes_max=size_bytes_max)
    return Message(_subject_for(envelope.type, qualifier), data, envelope.id, headers)


class EnvelopePublisher:
    """Publishes envelopes to one stream. `publisher` is the batching window below; see there for the promises."""

    def __init__(
        self, publisher: Publisher, *, size_bytes_max: int = SIZE_BYTES_MAX, blobs: Blobs | None = None
    ) -> None:
        self.publisher = publisher
        self._whole_bytes_max = size_bytes_max
        self._size_bytes_max = min(size_bytes_max, publisher.stream.size_bytes_max)
        self._blobs = blobs

    def message(self, envelope: Envelope, qualifier: str = "") -> Message:
        return to_message(envelope, qualifier=qualifier, size_bytes_max=self._size_bytes_max)

    async def publish(self, envelope: Envelope, *, qualifier: str = "") -> int:
        """Store it; its sequence."""
        return await self.publisher.publish(await self._message(envelope, qualifier))

    async def publish_many(self, envelopes: Sequence[Envelope], *, qualifier: str = "") -> list[int]:
        """Store them in order; their sequences. All or a prefix (PartialAppend)."""
        if self._blobs is None:
            return await self.publisher.publish_many([self.message(e, qualifier) for e in envelopes])
        return await self.publisher.publish_many([await self._message(e, qualifier) for e in envelopes])

    async def send(self, envelope: Envelope, *, qualifier: str = "") -> None:
        """Accept it, waiting for room. Its error, if any, comes at `flush`."""
        await self.publisher.send(await self._message(envelope, qualifier))

    async def _message(self, envelope: Envelope, qualifier: str) -> Message:
        """The message, a large payload stored beside the stream first. The limit of an envelope is that of the whole."""
        blobs = self._blobs
        size = len(bytes(envelope.payload)) if blobs is not None else 0
        if blobs is None or size <= blobs.over_bytes:
            return self.message(envelope, qualifier)
        if size > self._whole_bytes_max:
            raise TooLarge(f"envelope {envelope.id}", size_bytes=size, size_bytes_max=self._whole_bytes_max)
        small, headers = await asyncio.to_thread(outlined, envelope, blobs)
        return to_message(small, qualifier=qualifier, size_bytes_max=self._size_bytes_max, headers=headers)

    async def flush(self) -> None:
        """Wait for everything accepted so far; raises the first error nobody waited for."""
        await self.publisher.flush()

    async def aclose(self) -> None:
        """Settle everything accepted; refuse what comes after. Raises as `flush`."""
        await self.publisher.drain()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()


class Client:
    """Speaks envelopes over `broker`. `source` is what `envelope` writes as the sender. With `blobs`, large payloads go
    beside the stream and come back whole; those of a log that others stored so come back whole without it, too."""

    def __init__(
        self, broker: Broker, *, source: str = "", size_bytes_max: int = SIZE_BYTES_MAX, blobs: Blobs | None = None
    ) -> None:
        self.broker = broker
        self.source = source
        self._size_bytes_max = size_bytes_max
        self._blobs = blobs
        self._reading = blobs or beside(broker)
        self._streams: dict[str, Stream] = {}
        self._shared: dict[str, EnvelopePublisher] = {}
        self._own: list[EnvelopePublisher] = []
        self._opening = asyncio.Lock()
        self._closed = False

    def envelope(self, type: str, payload: Any = None, **fields: Any) -> Envelope:
        """A new envelope from this client's source. `fields` as in `Envelope.new`."""
        return Envelope.new(type, payload, **{"source": self.source, **fields})

    async def stream(self, name: str, *, create: bool = True, config: StreamConfig | None = None) -> Stream:
        """The stream of that name; opened once per client, made when absent and `create`."""
        if self._closed:
            raise Closed("the client is closed")
        found = self._streams.get(name)
        if found is None or config is not None:
            found = self._streams[name] = await self.broker.open(name, create=create, config=config)
        return found

    def forget(self, stream: str) -> None:
        """Open the stream anew at its next use (somebody deleted it and made it again)."""
        self._streams.pop(stream, None)
        shared = self._shared.pop(stream, None)
        if shared is not None:
            self._own.append(shared)

    # publishing

    @overload
    async def publish(self, stream: str, envelopes: Envelope, *, qualifier: str = "") -> int: ...
    @overload
    async def publish(self, stream: str, envelopes: Sequence[Envelope], *, qualifier: str = "") -> list[int]: ...
    async def publish(
        self, stream: str, envelopes: Envelope | Sequence[Envelope], *, qualifier: str = ""
    ) -> int | list[int]:
        """Store one envelope or several in order; returns its sequence, or theirs, when the stream's durability is
        reached. Publishing an envelope again stores nothing and gives the first sequence.

        Raises TooLarge and InvalidArgument before anything is sent; PartialAppend; Ambiguous when the fate stays
        unknown after the repeats; StorageFull, Unavailable.
        """
        shared = self._shared.get(stream) or await self._open_shared(stream)
        try:
            if isinstance(envelopes, Envelope):
                return await shared.publish(envelopes, qualifier=qualifier)
            return await shared.publish_many(envelopes, qualifier=qualifier)
        except NotFound:
            if self._shared.get(stream) is shared:
                self.forget(stream)
            raise

    async def _open_shared(self, stream: str) -> EnvelopePublisher:
        async with self._opening:
            found = self._shared.get(stream)
            if found is None:
                publisher = Publisher(await self.stream(stream))
                found = self._shared[stream] = EnvelopePublisher(
                    publisher, size_bytes_max=self._size_bytes_max, blobs=self._blobs
                )
            return found

    async def publisher(
        self,
        stream: str,
        *,
        pending_max: int = 10_000,
        pending_bytes_max: int = 64 * 1024 * 1024,
        batch_records_max: int = 1000,
        linger_s: float = 0.0,
        repeats_max: int = 10,
        repeat_s_max: float = 30.0,
        on_error: Callable[[Message, MistError], None] | None = None,
    ) -> EnvelopePublisher:
        """A publisher of its own (own window, own bounds, own `flush`). Closed with the client, if not before."""
        below = Publisher(
            await self.stream(stream), pending_max=pending_max, pending_bytes_max=pending_bytes_max,
            batch_records_max=batch_records_max, linger_s=linger_s, repeats_max=repeats_max,
            repeat_s_max=repeat_s_max, on_error=on_error,
        )  # fmt: skip
        own = EnvelopePublisher(below, size_bytes_max=self._size_bytes_max, blobs=self._blobs)
        self._own.append(own)
        return own

    # reading

    @overload
    def replay(
        self, stream: str, *, after: int | None = None, to: int | None = None, subjects: Sequence[str] = ALL,
        name: str = "", limit: int = 1000, bytes_max: int = BYTES_MAX, on_gap: OnGap = "raise",
        on_bad: Literal["raise", "skip"] = "raise",
    ) -> Reader[Received]: ...  # fmt: skip
    @overload
    def replay(
        self, stream: str, *, after: int | None = None, to: int | None = None, subjects: Sequence[str] = ALL,
        name: str = "", limit: int = 1000, bytes_max: int = BYTES_MAX, on_gap: OnGap = "raise",
        on_bad: Literal["yield"],
    ) -> Reader[Received | Bad]: ...  # fmt: skip
    def replay(
        self, stream: str, *, after: int | None = None, to: int | None = None, subjects: Sequence[str] = ALL,
        name: str = "", limit: int = 1000, bytes_max: int = BYTES_MAX, on_gap: OnGap = "raise",
        on_bad: OnBad = "raise",
    ) -> Reader[Received] | Reader[Received | Bad]:  # fmt: skip
        """Envelopes after `after` (exclusive; None = from the first kept) up to the end as of now, or to sequence `to`.

        A `name` makes the position durable: it is loaded from its checkpoint and saved as the reader goes on. The
        stream must exist. Raises, at first use, NotFound, WrongIncarnation; while reading SequenceExpired, DataLoss,
        CursorAhead and, with on_bad="raise", ProtocolErrors.
        """
        return Reader(
            self._open_cursor(stream, after, subjects, name, limit, bytes_max, on_gap),
            follow=False, to=to, on_bad=on_bad, blobs=self._reading,
        )  # fmt: skip

    @overload
    def follow(
        self, stream: str, *, after: int | None = None, subjects: Sequence[str] = ALL, name: str = "",
        limit: int = 1000, bytes_max: int = BYTES_MAX, on_gap: OnGap = "raise",
        on_bad: Literal["raise", "skip"] = "raise", wait_s: float = 30.0,
    ) -> Reader[Received]: ...  # fmt: skip
    @overload
    def follow(
        self, stream: str, *, after: int | None = None, subjects: Sequence[str] = ALL, name: str = "",
        limit: int = 1000, bytes_max: int = BYTES_MAX, on_gap: OnGap = "raise",
        on_bad: Literal["yield"], wait_s: float = 30.0,
    ) -> Reader[Received | Bad]: ...  # fmt: skip
    def follow(
        self, stream: str, *, after: int | None = None, subjects: Sequence[str] = ALL, name: str = "",
        limit: int = 1000, bytes_max: int = BYTES_MAX, on_gap: OnGap = "raise",
        on_bad: OnBad = "raise", wait_s: float = 30.0,
    ) -> Reader[Received] | Reader[Received | Bad]:  # fmt: skip
        """As `replay`, but waits at the end for what comes. For new records only: `after=(await s.info()).last`."""
        return Reader(
            self._open_cursor(stream, after, subjects, name, limit, bytes_max, on_gap),
            follow=True, to=None, on_bad=on_bad, wait_s=wait_s, blobs=self._reading,
        )  # fmt: skip

    def _open_cursor(
        self,
        stream: str,
        after: int | None,
        subjects: Sequence[str],
        name: str,
        limit: int,
        bytes_max: int,
        on_gap: OnGap,
    ) -> Callable[[], Any]:
        async def opening() -> Cursor:
            # a fresh handle: one from before a delete would say NotFound for ever
            opened = await self.broker.open(stream, create=False)
            return await Cursor.open(
                opened, after=after, subjects=subjects, limit=limit, bytes_max=bytes_max, on_gap=on_gap,
                checkpoints=self.broker.checkpoints if name else None, name=name,
            )  # fmt: skip

        return opening

    async def subscribe(
        self,
        stream: str,
        consumer: str,
        handler: Handler | None = None,
        *,
        batch_handler: BatchHandler | None = None,
        batch_max: int = 100,
        config: ConsumerConfig | None = None,
        policy: AckPolicy = AckPolicy.NACK_ON_ERROR,
        concurrency: int = 1,
        prefetch: int = 0,
        bytes_max: int = BYTES_MAX,
        backoff: Backoff = NAK_BACKOFF,
        handle_s_max: float = 3600.0,
        drain_s: float = 30.0,
        flush_s: float = 5.0,
        fetch_wait_s: float = 30.0,
        away_s_max: float = 300.0,
        on_gap: OnGap = "skip",
        on_error: Callable[[Delivered, Exception], None] | None = None,
        rand: Callable[[], float] = random.random,
    ) -> Worker:
        """A worker over the durable consumer of that name (made when absent, from the stream's start unless `config`
        says otherwise). Nothing is fetched before `run`. Raises Conflict when it exists with another configuration.
        """
        opened = await self.broker.open(stream)
        return Worker(
            await opened.consumer(consumer, config), handler, batch_handler=batch_handler, batch_max=batch_max,
            policy=policy, concurrency=concurrency, prefetch=prefetch, bytes_max=bytes_max, backoff=backoff,
            handle_s_max=handle_s_max, drain_s=drain_s, flush_s=flush_s, fetch_wait_s=fetch_wait_s,
            away_s_max=away_s_max, on_gap=on_gap, on_error=on_error, rand=rand, blobs=self._reading,
        )  # fmt: skip

    # ending

    async def flush(self) -> None:
        """Wait for everything published so far through this client; raises the first error nobody waited for."""
        for publisher in (*self._shared.values(), *self._own):
            await publisher.flush()

    async def aclose(self, *, timeout_s: float | None = None) -> None:
        """Settle what was published; then refuse everything. Leaves the broker open. Idempotent.

        Every publisher is drained, then the first error is raised.
        """
        self._closed = True
        first: MistError | None = None
        for publisher in (*self._shared.values(), *self._own):
            try:
                await publisher.publisher.drain(timeout_s=timeout_s)
            except MistError as exc:
                first = first or exc
        if first is not None:
            raise first

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()
