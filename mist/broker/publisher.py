"""The publisher: the one batching window of this package, in front of one stream.

Everything that is accepted while one append is in flight goes into the next one, so a thousand tasks that each await
their own sequence share one append, and a lone caller waits for nobody. One append is in flight at a time: the order
of acceptance is the order of storing.

Promises
- Bounded memory: `pending_max` messages and `pending_bytes_max` bytes are accepted and unsettled; above that callers
  wait (or are refused, `send_nowait`), in order.
- Every message is settled once: its sequence, or an error, reaches the one who waits for it. What nobody waits for
  (`send`, a cancelled `publish`) reports its error at the next `flush` or `drain`. A cancelled `publish` that was
  accepted is not withdrawn.
- A fate that is unknown is repeated with the same ids, which the stream stores once, within bounds: `repeats_max`
  tries, `repeat_s_max` seconds and half of the stream's de-duplication window. Without de-duplication, or past the
  bounds, it ends as Ambiguous. Messages without an id get one, or a repeat could store them twice.
- A message that the stream refuses (too large, not valid) fails alone, not with its batch.

Does not survive its process: what is accepted and not settled is gone with it, as its callers know.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from types import TracebackType
from typing import Any, Protocol, Self

from mist.broker.backoff import Backoff
from mist.broker.base import DEFAULTS, Message, Stream, check_messages, plain
from mist.broker.clock import SYSTEM, Clock
from mist.errors import (
    Ambiguous,
    Closed,
    Internal,
    InvalidArgument,
    MistError,
    Overloaded,
    PartialAppend,
    StorageFull,
    TimedOut,
    TooLarge,
    TransportError,
    Unavailable,
)
from mist.protocol.ids import new_id
from mist.protocol.subject import check_subject

_UNSURE = (Ambiguous, TimedOut, TransportError)
_GUILTY = (TooLarge, InvalidArgument)
_MIB = 1024 * 1024


class _Sink(Protocol):
    """Where a message's outcome goes: a future, or the collector of `publish_many`."""

    def done(self) -> bool: ...
    def set_result(self, result: int, /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...


class _Group:
    """The outcome of `publish_many`: all sequences, or how far it went. After a failure the rest is not stored."""

    def __init__(self, future: asyncio.Future[list[int]], ids: list[str], stream: str) -> None:
        self._future = future
        self._ids = ids
        self._stream = stream
        self._sequences: list[int] = []
        self.failed = False

    def done(self) -> bool:
        return self._future.done()

    def set_result(self, sequence: int, /) -> None:
        self._sequences.append(sequence)
        if len(self._sequences) == len(self._ids):
            self._future.set_result(self._sequences)

    def set_exception(self, error: BaseException, /) -> None:
        self.failed = True
        cause = error
        if isinstance(error, Ambiguous):
            error = Ambiguous(error.message, ids=self._ids[len(self._sequences) :])
            error.__cause__ = cause.__cause__
        elif self._sequences:
            error = PartialAppend(self._sequences, total=len(self._ids), stream=self._stream)
            error.__cause__ = cause
        self._future.set_exception(error)


class _Waiting:
    """A caller waiting for room, with what is left of its messages."""

    def __init__(self, messages: Sequence[Message], sink: _Sink | None, gate: asyncio.Future[None]) -> None:
        self.messages = deque(messages)
        self.sink = sink
        self.gate = gate


_Entry = tuple[Message, _Sink | None]


class Publisher:
    """Publishes to `stream`. Belongs to one event loop; any number of its tasks may use it.

    `linger_s` lets a batch that is not full wait for more (0 = send at once, which is nearly always right).
    `on_error` is called for every message that failed with nobody waiting for it, before `flush` raises.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        batch_records_max: int = 1000,
        batch_bytes_max: int = 4 * _MIB,
        pending_max: int = 10_000,
        pending_bytes_max: int = 64 * _MIB,
        linger_s: float = 0.0,
        repeats_max: int = 10,
        repeat_s_max: float = 30.0,
        backoff: Backoff | None = None,
        on_error: Callable[[Message, MistError], None] | None = None,
        clock: Clock = SYSTEM,
        rand: Callable[[], float] = random.random,
    ) -> None:
        if min(batch_records_max, batch_bytes_max, pending_max, pending_bytes_max) < 1 or repeats_max < 0:
            raise InvalidArgument("publisher: limits must be positive")
        self._stream = stream
        self._batch_records_max = batch_records_max
        self._batch_bytes_max = batch_bytes_max
        self._pending_max = pending_max
        self._pending_bytes_max = pending_bytes_max
        self._linger_s = linger_s
        self._repeats_max = repeats_max
        self._repeat_s_max = repeat_s_max
        self._backoff = backoff or Backoff()
        self._on_error = on_error
        self._clock = clock
        self._rand = rand

        self._queue: deque[_Entry] = deque()
        self._in_flight: deque[_Entry] = deque()
        self._waiting: deque[_Waiting] = deque()
        self._flushers: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._hurry: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._bytes = 0
        self._accepted = 0
        self._settled = 0
        self._closing = False
        self._unseen: MistError | None = None
        self._unseen_count = 0
        self._group_failed = False

        self.stored = 0
        """Messages that have a sequence (new, or known to the stream already)."""
        self.failed = 0
        self.repeated = 0
        """Appends that were tried again."""

    @property
    def stream(self) -> Stream:
        return self._stream

    @property
    def pending(self) -> int:
        """Messages accepted and not settled."""
        return self._accepted - self._settled

    # accepting

    async def publish(self, message: Message) -> int:
        """Store one message; its sequence, when the stream's durability is reached."""
        message = self._checked(message)
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if self._waiting or not self._fits(message):
            await self._wait_for_room((message,), future)
        else:
            self._push(message, future)
        try:
            return await future
        except asyncio.CancelledError:
            self._unheard(future)
            raise

    async def publish_many(self, messages: Sequence[Message]) -> list[int]:
        """Store messages in order; their sequences. All or a prefix: PartialAppend tells how far and, as its cause, why.

        Longer than `pending_max` is fine: they enter as room comes.
        """
        if not messages:
            return []
        checked = [self._checked(m) for m in messages]
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        group = _Group(future, [m.id for m in checked], self._stream.name)
        try:
            await self._wait_for_room(checked, group)
            return await future
        except asyncio.CancelledError:
            future.cancel()
            self._unheard(future)
            raise

    async def send(self, message: Message) -> None:
        """Accept one message, waiting for room. Its error, if any, comes at `flush`."""
        message = self._checked(message)
        if self._waiting or not self._fits(message):
            await self._wait_for_room((message,), None)
        else:
            self._push(message, None)

    def send_nowait(self, message: Message) -> None:
        """Accept one message now. Raises Overloaded when there is no room."""
        message = self._checked(message)
        if self._waiting or not self._fits(message):
            raise Overloaded(f"publisher of stream {self._stream.name}: {self.pending} messages are pending")
        self._push(message, None)

    def _unheard(self, future: asyncio.Future[Any]) -> None:
        """Its caller was cancelled; an error that was already on its way goes to `flush`."""
        if future.done() and not future.cancelled() and isinstance(error := future.exception(), MistError):
            self._unseen = self._unseen or error
            self._unseen_count += 1

    def _checked(self, message: Message) -> Message:
        """Refuse what the stream would refuse before it shares a batch with others."""
        if self._closing:
            raise Closed(f"publisher of stream {self._stream.name}: closed")
        id, size_max = message.id, self._stream.size_bytes_max
        if message.headers or len(id) > 64 or not plain(id) or len(message.data) > size_max:
            check_messages((message,), size_max)
        else:
            check_subject(message.subject)
        if not id:
            return Message(message.subject, message.data, new_id(), message.headers)
        return message

    def _fits(self, message: Message) -> bool:
        pending = self._accepted - self._settled
        return not pending or (
            pending < self._pending_max and self._bytes + len(message.data) <= self._pending_bytes_max
        )

    def _push(self, message: Message, sink: _Sink | None) -> None:
        self._queue.append((message, sink))
        self._accepted += 1
        self._bytes += len(message.data)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        elif self._hurry is not None and len(self._queue) >= self._batch_records_max:
            self._hurry_up()

    async def _wait_for_room(self, messages: Sequence[Message], sink: _Sink | None) -> None:
        waiting = _Waiting(messages, sink, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._admit()
        try:
            await waiting.gate
        except asyncio.CancelledError:
            waiting.messages.clear()  # what was not accepted is withdrawn
            self._admit()
            raise

    def _admit(self) -> None:
        """Let those who wait for room in, in order, as far as there is room."""
        while self._waiting:
            first = self._waiting[0]
            while first.messages and self._fits(first.messages[0]):
                self._push(first.messages.popleft(), first.sink)
            if first.messages:
                return
            self._waiting.popleft()
            if not first.gate.done():
                first.gate.set_result(None)

    # storing

    async def _run(self) -> None:
        """Append until nothing is left. Lives only while there is something to do."""
        try:
            while self._queue:
                if self._linger_s > 0 and len(self._queue) < self._batch_records_max and not self._closing:
                    await self._linger()
                self._take()
                await self._store(len(self._in_flight), doubt=False)
                # those whose sequence has just come run now, and what they publish next shares the next batch
                await asyncio.sleep(0)
            self._group_failed = False
        except BaseException:
            self._abandon()
            raise
        finally:
            self._task = None

    async def _linger(self) -> None:
        self._hurry = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._linger_s):
                await self._hurry
        except TimeoutError:
            return
        finally:
            self._hurry = None

    def _hurry_up(self) -> None:
        if self._hurry is not None and not self._hurry.done():
            self._hurry.set_result(None)

    def _take(self) -> None:
        queue, batch = self._queue, self._in_flight
        size = 0
        while queue and len(batch) < self._batch_records_max:
            size += len(queue[0][0].data)
            if batch and size > self._batch_bytes_max:
                return
            batch.append(queue.popleft())

    async def _store(self, count: int, *, doubt: bool) -> None:
        """Settle the first `count` messages in flight. `doubt`: an earlier try of them may have stored some."""
        tries = 0
        first_failure_s = 0.0
        seen_last: int | None = None
        while count:
            count -= self._skip_failed_groups(count)
            messages = [e[0] for e in islice(self._in_flight, count)]
            try:
                sequences = await self._stream.append(messages)
            except PartialAppend as exc:
                done = min(len(exc.sequences), count)
                self._stored(exc.sequences[:done])
                count -= done
                if done:
                    tries = 0
                error = _why_partial(exc)
            except MistError as exc:
                error = exc
            except Exception as exc:  # nothing else may cross the contract; every waiter must still hear of it
                error = Internal(f"stream {self._stream.name}: append raised {exc!r}")
                error.__cause__ = exc
            else:
                self._stored(sequences)
                return
            if not count:
                return
            if isinstance(error, _GUILTY) and count > 1:
                half = count // 2
                await self._store(half, doubt=doubt)
                await self._store(count - half, doubt=doubt)
                return
            doubt = doubt or isinstance(error, _UNSURE)
            now = self._clock.monotonic()
            if not tries:
                first_failure_s = now
            tries += 1
            may, seen_last = await self._may_repeat(error, tries, now - first_failure_s, doubt, seen_last)
            if not may:
                self._fail(count, error, doubt=doubt)
                return
            self.repeated += 1
            await asyncio.sleep(max(self._backoff.delay_s(tries, self._rand), error.retry_after_s or 0.0))

    async def _may_repeat(
        self, error: MistError, tries: int, since_s: float, doubt: bool, seen_last: int | None
    ) -> tuple[bool, int | None]:
        """Whether another try is worth it and, where the fate is in doubt, safe; and the stream's end when last seen.

        A full store is not waited for: its callers are told at once.
        """
        if not error.retryable or isinstance(error, StorageFull):
            return False, seen_last
        if tries > self._repeats_max or since_s > self._repeat_s_max:
            return False, seen_last
        if not doubt:
            return True, seen_last
        try:
            info = await self._stream.info()
        except MistError as exc:
            return exc.retryable, seen_last  # the backend is away; asked again after the next try
        config = info.config.or_defaults(DEFAULTS)
        window_s, ids_max = config.dedupe_window_s or 0.0, config.dedupe_ids_max or 0
        if not info.capabilities.dedupe or not ids_max or not window_s or since_s > window_s / 2:
            return False, seen_last
        first_seen = info.last if seen_last is None else seen_last
        return info.last - first_seen <= ids_max // 2, first_seen

    def _skip_failed_groups(self, count: int) -> int:
        """Drop what belongs to a `publish_many` that has already failed; how many of the first `count` went."""
        batch = self._in_flight
        if not self._group_failed:
            return 0
        head = [batch.popleft() for _ in range(count)]
        kept = [e for e in head if not (isinstance(e[1], _Group) and e[1].failed)]
        dropped = count - len(kept)
        self.failed += dropped
        self._release([e for e in head if isinstance(e[1], _Group) and e[1].failed])
        batch.extendleft(reversed(kept))
        return dropped

    def _stored(self, sequences: Sequence[int]) -> None:
        batch = self._in_flight
        entries = [batch.popleft() for _ in sequences]
        self.stored += len(entries)
        for (_, sink), sequence in zip(entries, sequences, strict=True):
            if sink is not None and not sink.done():
                sink.set_result(sequence)
        self._release(entries)

    def _fail(self, count: int, error: MistError, *, doubt: bool) -> None:
        entries = [self._in_flight.popleft() for _ in range(count)]
        self._reject(entries, error, doubt=doubt)

    def _reject(self, entries: Sequence[_Entry], error: MistError, *, doubt: bool) -> None:
        self.failed += len(entries)
        for message, sink in entries:
            own = _own_error(error, message, doubt=doubt)
            if sink is None or sink.done():
                if isinstance(sink, _Group) and sink.failed:
                    continue  # its caller has been told
                self._unseen = self._unseen or own
                self._unseen_count += 1
                self._report(message, own)
            else:
                self._group_failed = self._group_failed or isinstance(sink, _Group)
                sink.set_exception(own)
        self._release(entries)

    def _report(self, message: Message, error: MistError) -> None:
        if self._on_error is None:
            return
        try:
            self._on_error(message, error)
        except Exception as exc:  # the callback's own fault must not cost others their outcome
            asyncio.get_running_loop().call_exception_handler(
                {"message": "publisher: on_error raised", "exception": exc}
            )

    def _release(self, entries: Sequence[_Entry]) -> None:
        self._settled += len(entries)
        self._bytes -= sum([len(m.data) for m, _ in entries])
        if self._waiting:
            self._admit()
        while self._flushers and self._flushers[0][0] <= self._settled:
            _, future = self._flushers.popleft()
            if not future.done():
                future.set_result(None)

    def _abandon(self) -> None:
        """The sending task was cancelled: what is in flight has an unknown fate, the rest was never sent."""
        self._closing = True
        for waiting in self._waiting:
            if not waiting.gate.done():
                waiting.gate.set_exception(Closed(f"publisher of stream {self._stream.name}: cancelled"))
        self._waiting.clear()
        in_flight, queued = list(self._in_flight), list(self._queue)
        self._in_flight.clear()
        self._queue.clear()
        self._reject(in_flight, Ambiguous("the publisher was cancelled during an append"), doubt=True)
        self._reject(queued, Closed("the publisher was cancelled, this was not sent"), doubt=False)

    # ending

    async def flush(self) -> None:
        """Wait until everything accepted so far is settled.

        Raises the first error, since the last flush, of a message that nobody waits for; a note says how many failed.
        """
        target = self._accepted
        if self._settled < target:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._flushers.append((target, future))
            self._hurry_up()
            await future
        error, count = self._unseen, self._unseen_count
        self._unseen, self._unseen_count = None, 0
        if error is not None:
            error.add_note(f"{count} message(s) failed with nobody waiting for them; this is the first error")
            raise error

    async def drain(self, *, timeout_s: float | None = None) -> None:
        """Refuse new messages, settle all accepted ones and those that wait for room, then raise as `flush` does.

        When the time runs out the rest is abandoned (in flight: Ambiguous, not sent: Closed) and TimedOut is raised.
        """
        self._closing = True
        try:
            async with asyncio.timeout(timeout_s):
                while self._waiting:
                    await asyncio.wait([self._waiting[-1].gate])
                await self.flush()
        except TimeoutError as exc:
            left = self.pending
            await self.abort()
            raise TimedOut(
                f"publisher of stream {self._stream.name}: {left} messages were not settled in {timeout_s} s"
            ) from exc

    async def abort(self) -> None:
        """Stop now: in flight becomes Ambiguous, what was not sent becomes Closed. Idempotent."""
        self._closing = True
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def aclose(self) -> None:
        """`drain` without a deadline; the repeats' bounds keep it finite. Idempotent."""
        await self.drain()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.drain()


def _why_partial(partial: PartialAppend) -> MistError:
    cause = partial.__cause__
    if isinstance(cause, MistError):
        return cause
    error = Unavailable(f"{partial.message}; this one was not")
    error.__cause__ = partial
    return error


def _own_error(error: MistError, message: Message, *, doubt: bool) -> MistError:
    """The error as one waiter gets it: an instance of its own (a shared one would collect every waiter's traceback),
    and Ambiguous whenever an earlier try may have stored the message."""
    if doubt:
        own: MistError = Ambiguous(
            error.message if isinstance(error, Ambiguous) else f"unknown fate, then: {error}", ids=[message.id]
        )
        own.__cause__ = error
        return own
    own = error.__class__.__new__(error.__class__, *error.args)
    own.__dict__.update({k: v for k, v in error.__dict__.items() if k != "__notes__"})
    own.__cause__ = error.__cause__
    return own
