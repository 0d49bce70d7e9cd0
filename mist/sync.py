"""MIST for programs without asyncio: publish, replay, and an `emit` that never gets in the way.

    client = mist.sync.connect("log:./data", source="app")
    client.publish("trace", client.envelope("trace.span", {...}))     # returns its sequence when it is durable
    client.emit(client.envelope("trace.span", {...}), stream="trace")  # returns at once
    for received in client.replay("trace"): ...
    client.close()

One thread with one event loop per process does the work for all clients. Everything here may be called from any thread
but that one, and must not be called from a coroutine (it would block that loop); `emit` may be called from anywhere.

`emit` promises: it never waits for a broker; it holds at most `emit_max` envelopes and `emit_bytes_max` bytes, drops what
does not fit and counts it; what it took is stored in order, repeated with the same ids where its fate is unknown, and
counted as failed where it could not be stored. At the end of the program what is left is written within `exit_flush_s`
seconds. What is lost then, or by a signal that kills the process, is lost.

Fork: a child starts with an empty queue (the parent stores what the parent emitted), counters at zero and a connection
of its own at its first use. The parent's connections are neither used nor closed by the child.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # noqa: F401 - its own end-of-program hook must be registered before ours
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, overload

from msgspec import Struct

from mist.broker.backoff import Backoff
from mist.broker.base import ALL, BYTES_MAX, Broker, Message
from mist.broker.cursor import Lag, OnGap
from mist.broker.publisher import Publisher
from mist.broker.registry import connect as connect_broker
from mist.client.client import Client, to_message
from mist.client.reader import Reader
from mist.client.received import Bad, OnBad, Received
from mist.errors import Ambiguous, Closed, Internal, InvalidArgument, MistError, TimedOut
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope
from mist.protocol.url import parse_url

T = TypeVar("T")
R = TypeVar("R", bound=Received | Bad)

_BATCH = 1000
_FOLLOW_WAIT_S = 1.0
_RECONNECT = Backoff(first_s=0.05, most_s=5.0)
_RECONNECT_S_MAX = 30.0
_log = logging.getLogger("mist.sync")


class EmitStats(Struct, frozen=True):
    """Of one client in this process: `accepted` = `stored` + `failed` + `pending`; `dropped` were never accepted."""

    accepted: int
    stored: int
    failed: int
    dropped: int
    pending: int
    last_error: MistError | None


def connect(
    url: str,
    *,
    source: str = "",
    stream: str = "",
    emit_max: int = 10_000,
    emit_bytes_max: int = 64 * 1024 * 1024,
    exit_flush_s: float = 5.0,
    size_bytes_max: int = SIZE_BYTES_MAX,
    timeout_s: float | None = 30.0,
) -> SyncClient:
    """A connected client. `stream` (or `?stream=` of the URL) is where `emit` writes unless told otherwise.

    Raises what `mist.connect` raises, and TimedOut.
    """
    client = SyncClient(
        url, source=source, stream=stream, emit_max=emit_max, emit_bytes_max=emit_bytes_max,
        exit_flush_s=exit_flush_s, size_bytes_max=size_bytes_max,
    )  # fmt: skip
    client.open(timeout_s=timeout_s)
    return client


class SyncClient:
    """Made by `connect`. Thread-safe. Closed by `close`, `with`, or at the end of the program."""

    def __init__(
        self,
        url: str,
        *,
        source: str = "",
        stream: str = "",
        emit_max: int = 10_000,
        emit_bytes_max: int = 64 * 1024 * 1024,
        exit_flush_s: float = 5.0,
        size_bytes_max: int = SIZE_BYTES_MAX,
    ) -> None:
        if emit_max < 1 or emit_bytes_max < 1 or exit_flush_s < 0:
            raise InvalidArgument("sync client: limits must be positive")
        self.url = url
        self.source = source
        self.exit_flush_s = exit_flush_s
        self._stream = stream or parse_url(url).get("stream")
        self._emit_max = emit_max
        self._emit_bytes_max = emit_bytes_max
        self._size_bytes_max = size_bytes_max
        self._closed = False
        self._reset()
        _clients.add(self)

    def _reset(self) -> None:
        """A connection and a queue of this process's own."""
        # reentrant: emit may be called by a signal handler or a finaliser that interrupts an emit of this thread
        self._lock = threading.RLock()
        self._queue: deque[tuple[str, Message]] = deque()
        self._bytes = 0
        self._pumping = False
        self._accepted = self._settled = self._failed = self._dropped = 0
        self._last_error: MistError | None = None
        self._link = _Link(self.url, self.source, self._size_bytes_max, self._emit_failed)

    def _forked(self) -> None:
        _abandoned.append(self._link)
        self._reset()

    # plain calls

    def open(self, *, timeout_s: float | None = 30.0) -> None:
        """Connect now; otherwise the first use does."""
        self._call(self._link.client(), timeout_s)

    def envelope(self, type: str, payload: Any = None, **fields: Any) -> Envelope:
        """A new envelope from this client's source. `fields` as in `Envelope.new`."""
        return Envelope.new(type, payload, **{"source": self.source, **fields})

    @overload
    def publish(
        self, stream: str, envelopes: Envelope, *, qualifier: str = "", timeout_s: float | None = None
    ) -> int: ...
    @overload
    def publish(
        self, stream: str, envelopes: Sequence[Envelope], *, qualifier: str = "", timeout_s: float | None = None
    ) -> list[int]: ...
    def publish(
        self,
        stream: str,
        envelopes: Envelope | Sequence[Envelope],
        *,
        qualifier: str = "",
        timeout_s: float | None = None,
    ) -> int | list[int]:
        """As `Client.publish`: the sequence or sequences, when durable. When `timeout_s` runs out the fate is unknown:
        Ambiguous, with the ids."""
        link = self._link

        async def store() -> int | list[int]:
            client = await link.client()
            if isinstance(envelopes, Envelope):
                return await client.publish(stream, envelopes, qualifier=qualifier)
            return await client.publish(stream, envelopes, qualifier=qualifier)

        try:
            return self._call(store(), timeout_s)
        except _OutOfTime as exc:
            ids = [e.id for e in ([envelopes] if isinstance(envelopes, Envelope) else envelopes)]
            raise Ambiguous(f"publish to {stream}: no answer within {timeout_s} s", ids=ids) from exc

    @overload
    def replay(
        self, stream: str, *, after: int | None = None, to: int | None = None, subjects: Sequence[str] = ALL,
        name: str = "", limit: int = 1000, bytes_max: int = BYTES_MAX, on_gap: OnGap = "raise",
        on_bad: Literal["raise", "skip"] = "raise",
    ) -> SyncReader[Received]: ...  # fmt: skip
    @overload
    def replay(
        self, stream: str, *, after: int | None = None, to: int | None = None, subjects: Sequence[str] = ALL,
        name: str = "", limit: int = 1000, bytes_max: int = BYTES_MAX, on_gap: OnGap = "raise",
        on_bad: Literal["yield"],
    ) -> SyncReader[Received | Bad]: ...  # fmt: skip
    def replay(
        self, stream: str, *, after: int | None = None, to: int | None = None, subjects: Sequence[str] = ALL,
        name: str = "", limit: int = 1000, bytes_max: int = BYTES_MAX, on_gap: OnGap = "raise",
        on_bad: OnBad = "raise",
    ) -> SyncReader[Any]:  # fmt: skip
        """As `Client.replay`, to be iterated with a plain `for`. With a name, use it in a `with`."""
        return SyncReader(self, lambda client: client.replay(
            stream, after=after, to=to, subjects=subjects, name=name, limit=limit, bytes_max=bytes_max,
            on_gap=on_gap, on_bad=on_bad,
        ))  # fmt: skip

    @overload
    def follow(
        self, stream: str, *, after: int | None = None, subjects: Sequence[str] = ALL, name: str = "",
        limit: int = 1000, bytes_max: int = BYTES_MAX, on_gap: OnGap = "raise",
        on_bad: Literal["raise", "skip"] = "raise",
    ) -> SyncReader[Received]: ...  # fmt: skip
    @overload
    def follow(
        self, stream: str, *, after: int | None = None, subjects: Sequence[str] = ALL, name: str = "",
        limit: int = 1000, bytes_max: int = BYTES_MAX, on_gap: OnGap = "raise", on_bad: Literal["yield"],
    ) -> SyncReader[Received | Bad]: ...  # fmt: skip
    def follow(
        self, stream: str, *, after: int | None = None, subjects: Sequence[str] = ALL, name: str = "",
        limit: int = 1000, bytes_max: int = BYTES_MAX, on_gap: OnGap = "raise", on_bad: OnBad = "raise",
    ) -> SyncReader[Any]:  # fmt: skip
        """As `Client.follow`: the loop waits for what comes, until it is left or interrupted."""
        return SyncReader(self, lambda client: client.follow(
            stream, after=after, subjects=subjects, name=name, limit=limit, bytes_max=bytes_max,
            on_gap=on_gap, on_bad=on_bad,
        ))  # fmt: skip

    def _call(self, coro: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        if self._closed:
            coro.close()
            raise Closed(f"the sync client of {self.url} is closed")
        return _runtime().call(coro, timeout_s)

    # emit

    def emit(self, envelope: Envelope, *, stream: str = "", qualifier: str = "") -> bool:
        """Take the envelope to be stored soon; False when it was dropped (no room, too large, closed) and counted.

        Raises only InvalidArgument, when neither this call nor the client names a stream.
        """
        name = stream or self._stream
        if not name:
            raise InvalidArgument("emit: which stream?", hint="connect(url, stream=NAME) or emit(…, stream=NAME)")
        try:
            message = to_message(envelope, qualifier=qualifier, size_bytes_max=self._size_bytes_max)
        except MistError as exc:
            with self._lock:
                self._dropped += 1
                self._last_error = exc
            return False
        size = len(message.data)
        with self._lock:
            pending = self._accepted - self._settled
            if self._closed or pending >= self._emit_max or (pending and self._bytes + size > self._emit_bytes_max):
                self._dropped += 1
                return False
            self._queue.append((name, message))
            self._accepted += 1
            self._bytes += size
            wake = not self._pumping
            self._pumping = True
        if wake:
            _runtime().soon(self._pump)
        return True

    @property
    def stats(self) -> EmitStats:
        """What became of the emitted envelopes so far."""
        with self._lock:
            stored = self._settled - self._failed
            return EmitStats(
                self._accepted, stored, self._failed, self._dropped, self._accepted - self._settled, self._last_error
            )

    def flush(self, *, timeout_s: float | None = 30.0) -> None:
        """Wait until every envelope emitted so far is stored or counted as failed. Raises TimedOut."""
        try:
            self._call(self._emitted(self._accepted), timeout_s)
        except _OutOfTime as exc:
            raise TimedOut(f"{self.stats.pending} emitted envelopes were not stored within {timeout_s} s") from exc

    def close(self, *, timeout_s: float | None = 30.0) -> None:
        """Flush, then disconnect. Idempotent. Raises TimedOut when the flush did not end in time."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        _clients.discard(self)
        link = self._link

        async def end() -> None:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._emitted(self._accepted)
            except TimeoutError:
                left = self.stats.pending
                raise TimedOut(f"{left} emitted envelopes were not stored within {timeout_s} s") from None
            finally:
                await link.aclose()

        _runtime().call(end(), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # on the loop's thread

    async def _emitted(self, target: int) -> None:
        link = self._link
        while self._settled < target:
            waiter = asyncio.get_running_loop().create_future()
            link.flushers.append(waiter)
            await waiter

    async def _pump(self) -> None:
        """Store what was emitted, batch by batch, until nothing is left."""
        link = self._link
        while True:
            with self._lock:
                if not self._queue:
                    self._pumping = False
                    return
                batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
            try:
                await self._store(link, batch)
            except Exception as exc:  # a bug below; the pump must go on, and nothing may count as stored
                with self._lock:
                    self._failed += len(batch)
                    self._last_error = Internal(f"emit: {exc!r}")
            finally:  # also when cancelled: what was taken is accounted for
                with self._lock:
                    self._settled += len(batch)
                    self._bytes -= sum(len(m.data) for _, m in batch)
                flushers, link.flushers = link.flushers, []
                for waiter in flushers:
                    if not waiter.done():
                        waiter.set_result(None)

    async def _store(self, link: _Link, batch: list[tuple[str, Message]]) -> None:
        by_stream: dict[str, list[Message]] = {}
        for name, message in batch:
            by_stream.setdefault(name, []).append(message)
        for name, messages in by_stream.items():
            try:
                publisher = await link.publisher(name)
            except MistError as exc:
                with self._lock:
                    self._failed += len(messages)
                    self._last_error = exc
                continue
            for message in messages:
                try:
                    await publisher.send(message)
                except MistError as exc:  # what this stream refuses: larger than its limit, not a subject
                    self._emit_failed(message, exc)
            try:
                await publisher.flush()
            except MistError as exc:
                self._last_error = exc  # counted one by one in _emit_failed

    def _emit_failed(self, message: Message, error: MistError) -> None:
        with self._lock:
            self._failed += 1
            self._last_error = error


class SyncReader(Generic[R]):
    """Made by `SyncClient.replay` and `follow`: a plain iterable of `Received` (and `Bad`, with on_bad="yield").

    A record is done when the next is asked for, as with every cursor; with a name, use it in a `with` so that the last
    position is saved.
    """

    def __init__(self, client: SyncClient, make: Callable[[Client], Reader[R]]) -> None:
        self._client = client
        self._link = client._link
        self._make = make
        self._made: Reader[R] | None = None

    def _reader(self) -> Reader[R]:
        if self._client._link is not self._link:
            raise Closed("this reader belongs to the parent process", hint="open one in the child")
        if self._made is None:

            async def make() -> Reader[R]:
                reader = self._make(await self._link.client())
                await reader.open()
                return reader

            self._made = self._client._call(make())
        return self._made

    def __iter__(self) -> Iterator[R]:
        reader = self._reader()
        while True:
            page = self._client._call(reader.load(wait_s=_FOLLOW_WAIT_S))
            if page is None:
                return
            yield from reader.hand(page)

    @property
    def position(self) -> int:
        return self._reader().position

    def seek(self, after: int) -> None:
        self._client._call(self._reader().seek(after))

    def lag(self) -> Lag:
        return self._client._call(self._reader().lag())

    def save(self, *, force: bool = False) -> int:
        """Everything given so far is done; store that position now."""
        return self._client._call(self._reader().save(force=force))

    def close(self) -> None:
        """Save what is done (with a name). Idempotent."""
        if self._made is not None and self._client._link is self._link and not self._client._closed:
            self._client._call(self._made.aclose())

    def __enter__(self) -> Self:
        self._reader()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class _Link:
    """One client's connection, on the loop's thread: opened once, patiently, with a publisher per emitted stream."""

    def __init__(
        self, url: str, source: str, size_bytes_max: int, on_error: Callable[[Message, MistError], None]
    ) -> None:
        self._url = url
        self._source = source
        self._size_bytes_max = size_bytes_max
        self._on_error = on_error
        self._opening = asyncio.Lock()
        self._broker: Broker | None = None
        self._client: Client | None = None
        self._publishers: dict[str, Publisher] = {}
        self.flushers: list[asyncio.Future[None]] = []

    async def client(self) -> Client:
        async with self._opening:
            if self._client is None:
                self._broker = await connect_broker(self._url)
                self._client = Client(self._broker, source=self._source, size_bytes_max=self._size_bytes_max)
            return self._client

    async def publisher(self, stream: str) -> Publisher:
        """For emit: a backend that is away is tried again for a while, as an append would be."""
        found = self._publishers.get(stream)
        tries, until = 0, time.monotonic() + _RECONNECT_S_MAX
        while found is None:
            try:
                opened = await (await self.client()).stream(stream)
            except MistError as exc:
                tries += 1
                if not exc.retryable or time.monotonic() > until:
                    raise
                await asyncio.sleep(_RECONNECT.delay_s(tries))
            else:
                found = self._publishers[stream] = Publisher(opened, on_error=self._on_error)
        return found

    async def aclose(self) -> None:
        broker = self._broker
        if broker is None:
            return
        for publisher in self._publishers.values():
            await publisher.abort()
        try:
            if self._client is not None:
                await self._client.aclose()
        finally:
            await broker.aclose()


# the one loop of this process


class _OutOfTime(TimedOut):
    """Our own deadline ran out (a TimedOut of the backend is not this)."""


class _Runtime:
    """A daemon thread that runs an event loop until the end of the program."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._main, name="mist-sync", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def call(self, coro: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        """The coroutine's result, computed on the loop. Interrupting the wait cancels it."""
        if threading.get_ident() == self._thread.ident:
            coro.close()
            raise InvalidArgument("mist.sync: called from its own thread", hint="use the asyncio Client there")
        future = asyncio.run_coroutine_threadsafe(coro, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError as exc:
            if future.done() and not future.cancelled() and future.exception() is exc:
                raise
            future.cancel()
            raise _OutOfTime(f"no answer within {timeout_s} s") from None
        except BaseException:
            future.cancel()
            raise

    def soon(self, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine function on the loop, waiting for nothing."""
        self._loop.call_soon_threadsafe(self._spawn, job)

    def _spawn(self, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = self._loop.create_task(job())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self, timeout_s: float) -> None:
        """Cancel what is left and end the thread."""

        async def end() -> None:
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.wait(rest, timeout=timeout_s) if rest else None

        self.call(end(), timeout_s + 1.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)


_clients: set[SyncClient] = set()
_abandoned: list[object] = []
"""In a forked child: the parent's loop and connections. Kept, so that no finaliser closes what the parent still uses
(closing an inherited loop would take the parent's wake-up pipe out of the epoll set that both share)."""
_current: _Runtime | None = None
_starting = threading.RLock()


def _runtime() -> _Runtime:
    global _current
    with _starting:
        if _current is None:
            _current = _Runtime()
        return _current


def _after_fork() -> None:
    global _current, _starting
    _starting = threading.RLock()
    if _current is not None:
        _abandoned.append(_current)
        _current = None
    for client in list(_clients):
        client._forked()


def _at_exit() -> None:
    """Close every client within the longest of their deadlines, then end the thread."""
    global _current
    if _current is None:
        return
    clients = [c for c in _clients if not c._closed]
    until = time.monotonic() + max((c.exit_flush_s for c in clients), default=0.0)
    for client in clients:
        try:
            client.close(timeout_s=max(0.0, min(client.exit_flush_s, until - time.monotonic())))
        except MistError as exc:
            _log.warning("%s: %s", client.url, exc)
    _current.stop(1.0)
    _current = None


os.register_at_fork(after_in_child=_after_fork)
# Before atexit, Python closes its thread pools, and an adapter may need one to finish an append. This hook is what the
# pools themselves use; where it is missing, atexit comes next.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
