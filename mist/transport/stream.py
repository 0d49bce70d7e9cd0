"""Any broker URL as a transport: a stream to send to, and a cursor or a named consumer to receive from.

    log:DIR?stream=NAME                             send; receive from the start, then wait for more
    log:DIR?stream=NAME&subject=eval.*.>&from=end   only these, only new ones
    log:DIR?stream=NAME&follow=0                    EndOfStream at the end instead of waiting
    log:DIR?stream=NAME&consumer=NAME               shared with other workers, acknowledged

`from=` takes `start`, `end`, `N` (that record), `+N` (after it), `-N` (the last N). For a consumer it counts when it is
made. Other parameters are the broker's.

Promises: a send returns when the stream's durability is reached, and an envelope sent twice within the stream's window
is stored once. Without a consumer, `position` is the sequence of the last one received, `+position` goes on behind it.
With one, an envelope is acknowledged by the next receive, by `ack()`, and by leaving `async with` without an error;
`ack=manual` leaves all to `ack()`. What was received and not acknowledged comes again, to somebody: at least once.
Damage, an expired range and a record that is no envelope raise for one call; the next goes on behind them (for a
consumer the record goes to the dead letters).

Does not: keep positions without a consumer. That is a named cursor of `mist.Client`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

from mist.broker.base import ALL, Broker, Consumer, ConsumerConfig, Delivery, Message, Record, Stream, header
from mist.broker.registry import connect
from mist.errors import (
    CursorAhead,
    DataLoss,
    EndOfStream,
    InvalidArgument,
    MistError,
    ProtocolError,
    SequenceExpired,
    TooLarge,
)
from mist.protocol import codec
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope
from mist.protocol.subject import subject_for
from mist.protocol.url import Url
from mist.transport.base import RECEIVE_LIMIT, Transport, check_limit, closed_error

PAGE = 1000
PREFETCH = 64
WAIT_S = 30.0
_OURS = frozenset({"stream", "subject", "consumer", "from", "follow", "ack", "prefetch"})


async def from_url(url: Url, *, config: ConsumerConfig | None = None, **options: Any) -> StreamTransport:
    """`config` is what a new consumer gets; `options` go to the broker's adapter."""
    follow, ack = url.get("follow", "1"), url.get("ack", "auto")
    if follow not in ("0", "1"):
        raise InvalidArgument(f"{url.redacted()}: follow={follow!r} is neither 1 nor 0")
    if ack not in ("auto", "manual"):
        raise InvalidArgument(f"{url.redacted()}: ack={ack!r} is not known", hint="auto or manual")
    prefetch = url.get("prefetch", str(PREFETCH))
    if not (prefetch.isascii() and prefetch.isdigit() and int(prefetch)):
        raise InvalidArgument(f"{url.redacted()}: prefetch={prefetch!r} is not a number above 0")
    place = await open_place(url, config=config, **options)
    return StreamTransport(
        place.stream, url=url.redacted(), after=place.after, subjects=place.subjects, consumer=place.consumer,
        follow=follow == "1", manual=ack == "manual", prefetch=int(prefetch), broker=place.broker,
    )  # fmt: skip


class Place(NamedTuple):
    """What a broker URL names, opened. Whoever asked closes the broker."""

    broker: Broker
    stream: Stream
    after: int
    subjects: tuple[str, ...]
    consumer: Consumer | None


async def open_place(
    url: Url, *, config: ConsumerConfig | None = None, subjects: tuple[str, ...] = ALL, **options: Any
) -> Place:
    """The stream of `?stream=`, the position of `from=`, the subjects of `subject=` (else `subjects`), the consumer of
    `consumer=`. Nothing stays open when it raises."""
    name = url.get("stream")
    if not name:
        raise InvalidArgument(f"{url.redacted()}: names no stream", hint=f"{url.scheme}:…?stream=NAME")
    start = _parse_start(url.get("from", "start"), url)
    bare = Url(url.scheme, url.target, tuple(kv for kv in url.query if kv[0] not in _OURS))
    broker = await connect(bare, **options)
    try:
        stream = await broker.open(name)
        after = await _after(stream, start)
        asked = url.all("subject")
        consumer = None
        if url.get("consumer"):
            consumer = await _consumer(stream, url.get("consumer"), config, after, asked, subjects)
        return Place(broker, stream, after, asked or subjects, consumer)
    except BaseException:
        await broker.aclose()
        raise


async def _consumer(
    stream: Stream,
    name: str,
    config: ConsumerConfig | None,
    after: int,
    asked: tuple[str, ...],
    default: tuple[str, ...],
) -> Consumer:
    """The one that exists goes on where it stands, whatever `from` says: a worker that restarts names both."""
    if config is None and name in await stream.consumers():
        consumer = await stream.consumer(name, create=False)
        if asked and asked not in (ALL, consumer.config.subjects):
            raise InvalidArgument(
                f"consumer {name} exists with the subjects {', '.join(consumer.config.subjects)}",
                hint="leave subject= out, or choose another name",
            )
        return consumer
    return await stream.consumer(name, config or ConsumerConfig(after=after, subjects=asked or default))


class StreamTransport(Transport):
    """Over a stream that is open. `broker` is closed with it when given."""

    def __init__(
        self,
        stream: Stream,
        *,
        url: str = "",
        after: int = 0,
        subjects: Sequence[str] = ALL,
        consumer: Consumer | None = None,
        follow: bool = True,
        manual: bool = False,
        prefetch: int = PREFETCH,
        broker: Broker | None = None,
    ) -> None:
        self.url = url or f"stream {stream.name}"
        self.size_bytes_max = min(stream.size_bytes_max, SIZE_BYTES_MAX)
        self.position = after
        """The sequence of the last record received (or found bad): receiving goes on behind it."""
        self._stream = stream
        self._subjects = tuple(subjects)
        self._consumer = consumer
        self._follow = follow
        self._manual = manual
        self._prefetch = prefetch
        self._broker = broker
        self._reading = asyncio.Lock()
        self._scanned = after
        self._last = -1
        self._records: deque[Record] = deque()
        self._fetched: deque[Delivery] = deque()
        self._handed: list[Delivery] = []
        self._renewed = 0.0
        self._closed = False
        self._closing: asyncio.Future[None] | None = None

    # sending

    async def send_many(self, envelopes: Sequence[Envelope]) -> None:
        """Raises what `Stream.append` raises: PartialAppend, Ambiguous, StorageFull…"""
        self._check_open()
        messages = []
        for envelope in envelopes:
            data = codec.encode(envelope)
            if len(data) > self.size_bytes_max:
                raise codec.refuse(
                    TooLarge(f"envelope {envelope.id}", size_bytes=len(data), size_bytes_max=self.size_bytes_max)
                )
            messages.append(Message(subject_for(envelope.type), data, envelope.id))
        await self._stream.append(messages)

    # receiving

    async def receive_many(self, limit: int = RECEIVE_LIMIT, wait_s: float | None = None) -> list[Envelope]:
        check_limit(limit)
        self._check_open()
        loop = asyncio.get_running_loop()
        until = None if wait_s is None else loop.time() + wait_s
        async with self._reading:
            self._check_open()
            if self._consumer is not None:
                return await self._receive_deliveries(self._consumer, limit, until)
            return await self._receive_records(limit, until)

    async def _receive_records(self, limit: int, until: float | None) -> list[Envelope]:
        loop = asyncio.get_running_loop()
        while not self._records:
            left = WAIT_S if until is None else min(WAIT_S, max(0.0, until - loop.time()))
            try:
                page = await self._or_closed(
                    self._stream.read(
                        after=self._scanned, subjects=self._subjects, limit=max(PAGE, limit),
                        wait_s=left if self._follow else 0.0,
                    )
                )  # fmt: skip
            except DataLoss as exc:
                self.position = self._scanned = exc.resume_after
                raise
            except SequenceExpired as exc:
                self.position = self._scanned = exc.first - 1
                raise
            self._scanned = page.scanned
            self._records.extend(page.records)
            if page.records:
                break
            if not self._follow and page.scanned >= page.last:
                raise EndOfStream(f"{self.url}: no more records")
            if until is not None and loop.time() >= until:
                return []
        out: list[Envelope] = []
        while self._records and len(out) < limit:
            record = self._records[0]
            try:
                envelope = _decode(record, self._stream.name)
            except MistError:
                if out:
                    break  # its turn comes with the next call
                self._records.popleft()
                self.position = record.sequence
                raise
            self._records.popleft()
            self.position = record.sequence
            out.append(envelope)
        return out

    async def _receive_deliveries(self, consumer: Consumer, limit: int, until: float | None) -> list[Envelope]:
        if not self._manual:
            await self._settle(consumer)
        await self._renew(consumer)
        loop = asyncio.get_running_loop()
        while not self._fetched:
            left = WAIT_S if until is None else min(WAIT_S, max(0.0, until - loop.time()))
            await self._or_closed(self._fetch(consumer, max(limit, self._prefetch), left if self._follow else 0.0))
            self._renewed = loop.time()
            if self._fetched:
                break
            if not self._follow and (await consumer.info()).lag == 0:
                raise EndOfStream(f"{self.url}: nothing left to deliver")
            if until is not None and loop.time() >= until:
                return []
            if not self._follow:
                await asyncio.sleep(0.05)  # the rest is with other workers: theirs to finish, or to come back
        out: list[Envelope] = []
        while self._fetched and len(out) < limit:
            delivery = self._fetched[0]
            try:
                envelope = _decode(delivery.record, self._stream.name)
            except MistError as exc:
                if out:
                    break
                self._fetched.popleft()
                await consumer.term([delivery], reason=f"{exc.code}: {exc.message}")
                self.position = max(self.position, delivery.record.sequence)
                raise
            self._fetched.popleft()
            self._handed.append(delivery)
            self.position = max(self.position, delivery.record.sequence)
            out.append(envelope)
        return out

    async def _fetch(self, consumer: Consumer, limit: int, wait_s: float) -> None:
        """Straight into our hands: a receive that is cancelled just when they arrive keeps them for the next one."""
        self._fetched.extend(await consumer.fetch(limit=limit, wait_s=wait_s))

    async def _settle(self, consumer: Consumer) -> int:
        if not self._handed:
            return 0
        handed = list(self._handed)
        settled = await consumer.ack(handed)
        del self._handed[: len(handed)]
        return settled

    async def _renew(self, consumer: Consumer) -> None:
        """What waits here must not go to another worker because this one is slow."""
        held = [*self._handed, *self._fetched]
        now = asyncio.get_running_loop().time()
        if not held or now - self._renewed < consumer.config.ack_wait_s / 3:
            return
        self._renewed = now
        if await consumer.extend(held) < len(held) and self._fetched:
            # Some ran out in the meantime, and which is not said: give all back and ask again.
            fetched = list(self._fetched)
            self._fetched.clear()
            await consumer.nak(fetched)

    async def ack(self) -> int:
        """Settle everything received so far. 0 without a consumer."""
        self._check_open()
        return await self._settle(self._consumer) if self._consumer is not None else 0

    async def _or_closed(self, waiting: Any) -> Any:
        """The answer of a wait that `close` ends."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(waiting)
        try:
            await asyncio.wait([task, self._closing], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _cancelled(task)
            raise
        if not task.done():
            await _cancelled(task)
        self._check_open()
        return task.result()

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error(self.url)

    async def close(self) -> None:
        """What was fetched ahead and never received goes back at once; what was received and not acknowledged comes
        again after the consumer's ack_wait_s."""
        if self._closed:
            return
        self._closed = True
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)
        async with self._reading:
            try:
                if self._consumer is not None and self._fetched:
                    fetched = list(self._fetched)
                    self._fetched.clear()
                    await self._consumer.nak(fetched)
            finally:
                if self._broker is not None:
                    await self._broker.aclose()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if exc is None and not self._manual and not self._closed:
                await self.ack()
        finally:
            await self.close()


async def _cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel it and wait until it is over; its result or error is nobody's now."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()


def _decode(record: Record, stream: str) -> Envelope:
    try:
        if header(record.headers, "Content-Type") == codec.MSGPACK:
            return codec.decode_msgpack(record.data)
        return codec.decode(record.data)
    except (ProtocolError, TooLarge) as exc:
        exc.message = f"stream {stream}: record {record.sequence}: {exc.message}"
        exc.args = (exc.message,)
        exc.meta.update(stream=stream, sequence=str(record.sequence))
        raise


def _parse_start(text: str, url: Url) -> tuple[str, int]:
    plus = text.startswith(("+", " "))  # a + in a query means a space to everybody else
    text = text.strip()
    if text in ("", "start"):
        return "start", 0
    if text == "end":
        return "last", 0
    digits = text.lstrip("+-")
    if not (digits.isascii() and digits.isdigit()):
        raise InvalidArgument(
            f"{url.redacted()}: from={text!r} is not a position", hint="start, end, N, +N (after N) or -N (the last N)"
        )
    if text.startswith("-"):
        return "last", int(digits)
    return "after", int(digits) if plus else max(int(digits) - 1, 0)


async def _after(stream: Stream, start: tuple[str, int]) -> int:
    kind, number = start
    if kind == "after" and not number:
        return 0
    info = await stream.info()
    if kind == "start":
        return info.first - 1
    if kind == "last":
        return max(info.first - 1, info.last - number)
    if number > info.last:
        raise CursorAhead(after=number, last=info.last, stream=stream.name)
    return number
