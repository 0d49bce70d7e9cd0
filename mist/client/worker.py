"""A worker: fetches from a durable consumer and runs a handler for what it gets.

Promises
- At least once (all policies but ACK_FIRST): a delivery is settled after its handler; what this worker does not settle,
  because it crashed or was cut off, is delivered again after the consumer's `ack_wait_s`.
- It never holds more than it can work on: `concurrency` handlers (times `batch_max` for batch handlers) plus
  `prefetch`. With concurrency 1 handlers run in stream order.
- Handlers may take long: what is held is extended every third of `ack_wait_s`, up to `handle_s_max` per handler.
- A record that is no acceptable envelope becomes a dead letter with its reason and never reaches the handler; damage
  is counted, kept in `gaps` and passed over (or raised, with on_gap="raise"). Neither stops the stream.
- Settling is joined: everything settled in one turn of the loop, or while the broker was busy, goes in one call.
- Stopping: on `stop` nothing new is fetched, what was fetched is worked off within `drain_s`, then the rest is
  cancelled and given back. Cancelling `run` is the same with no time. Either way all acks are written before it returns
  or, within `flush_s`, given up.
- A backend that is away is tried again, with backoff, for `away_s_max`; then its error is raised.

Does not handle signals, does not create tasks that outlive `run`.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from msgspec import Struct

from mist.broker.backoff import Backoff
from mist.broker.base import BYTES_MAX, Consumer, Delivery, check_delay
from mist.broker.clock import SYSTEM, Clock
from mist.broker.cursor import GAPS_MAX, Gap, OnGap
from mist.client.blobs import Blobs
from mist.client.policy import NAK_BACKOFF, AckPolicy, nak_delay_s
from mist.client.received import decode_record
from mist.errors import DataLoss, InvalidArgument, MistError, TimedOut
from mist.protocol.envelope import Envelope

_AWAY = Backoff(first_s=0.05, most_s=5.0)
_UNSETTLED_MAX = 1000


class WorkerStats(Struct):
    """Counters since the worker was made.

    `processed`: records whose handler returned; `failed`: whose handler raised; `undecodable`: that hold no acceptable
    envelope; `dead`: made dead letters by this worker, for whatever reason; `redelivered`: deliveries with attempt > 1;
    `stale`: settled too late, somebody else has them now;
    `abandoned`: MANUAL deliveries that were never settled within `handle_s_max`; `given_back`: cut off by the end of a
    drain; `gaps`: damaged ranges passed over; `retries`: calls to a backend that was away.
    """

    fetched: int = 0
    processed: int = 0
    failed: int = 0
    undecodable: int = 0
    dead: int = 0
    redelivered: int = 0
    stale: int = 0
    abandoned: int = 0
    given_back: int = 0
    gaps: int = 0
    retries: int = 0


class Delivered:
    """An envelope handed to a handler. `attempt` starts at 1. Settle it with `ack`, `nak` or `term` (the first call
    counts, it never blocks), or leave that to the worker's policy."""

    __slots__ = ("_returned", "_settled", "_since_s", "_worker", "attempt", "delivery", "envelope")

    def __init__(self, worker: Worker, delivery: Delivery, envelope: Envelope, since_s: float) -> None:
        self._worker = worker
        self._settled = False
        self._returned = False
        self._since_s = since_s
        self.delivery = delivery
        self.envelope = envelope
        self.attempt = delivery.attempt

    @property
    def sequence(self) -> int:
        return self.delivery.record.sequence

    @property
    def subject(self) -> str:
        return self.delivery.record.subject

    @property
    def timestamp_ns(self) -> int:
        return self.delivery.record.timestamp_ns

    @property
    def settled(self) -> bool:
        return self._settled

    def ack(self) -> None:
        """Done."""
        self._worker._settle(self, "ack", "")

    def nak(self, *, delay_s: float | None = None) -> None:
        """Again, after `delay_s` (None = the worker's backoff for this attempt). Raises InvalidArgument."""
        if delay_s is None:
            delay_s = self._worker._delay_s(self.attempt)
        check_delay(delay_s)
        self._worker._settle(self, "nak", delay_s)

    def term(self, reason: str) -> None:
        """Never again: a dead letter with this reason."""
        self._worker._settle(self, "term", reason)

    def __repr__(self) -> str:
        return f"Delivered(sequence={self.sequence}, attempt={self.attempt}, type={self.envelope.type!r})"


Handler = Callable[[Delivered], Awaitable[object]]
BatchHandler = Callable[[list[Delivered]], Awaitable[object]]
_Key = tuple[str, float | str]


class Worker:
    """Runs `handler` (of one `Delivered`) or `batch_handler` (of up to `batch_max` of them) over `consumer`."""

    def __init__(
        self,
        consumer: Consumer,
        handler: Handler | None = None,
        *,
        batch_handler: BatchHandler | None = None,
        batch_max: int = 100,
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
        clock: Clock = SYSTEM,
        rand: Callable[[], float] = random.random,
        blobs: Blobs | None = None,
    ) -> None:
        if (handler is None) == (batch_handler is None):
            raise InvalidArgument("worker: give either handler or batch_handler")
        if min(batch_max, concurrency, bytes_max) < 1 or prefetch < 0 or handle_s_max <= 0:
            raise InvalidArgument("worker: limits must be positive")
        self._consumer = consumer
        self._one = handler
        self._many = batch_handler
        self._batch_max = batch_max if batch_handler is not None else 1
        self._policy = policy
        self._concurrency = concurrency
        self._slots = concurrency * self._batch_max + prefetch
        self._bytes_max = bytes_max
        self._backoff = backoff
        self._handle_s_max = handle_s_max
        self._drain_s = drain_s
        self._flush_s = flush_s
        self._fetch_wait_s = fetch_wait_s
        self._away_s_max = away_s_max
        self._on_gap = on_gap
        self._on_error = on_error
        self._clock = clock
        self._rand = rand
        self._blobs = blobs

        self.stats = WorkerStats()
        self.gaps: deque[Gap] = deque(maxlen=GAPS_MAX)
        self._stop = asyncio.Event()
        self._running = False
        self._stopping = False
        self._waiting = False  # the fetch task may be cancelled here without losing anything
        self._ready: deque[Delivered] = deque()
        self._held: dict[int, Delivered] = {}  # unsettled and leased to us, by identity
        self._occupied = 0  # of the slots
        self._runners: list[asyncio.Task[None]] = []
        self._idle: deque[asyncio.Future[None]] = deque()
        self._room = asyncio.Event()
        self._unsent: dict[_Key, list[Delivery]] = {}  # settled here, not yet at the broker
        self._unsent_count = 0
        self._dirty = asyncio.Event()
        self._flushing = asyncio.Lock()

    def stop(self) -> None:
        """Begin the graceful end of `run`. For the same loop; idempotent."""
        self._stop.set()

    async def run(self, stop: asyncio.Event | None = None) -> WorkerStats:
        """Work until `stop` (or `stop()`), then drain and return the counters. Once at a time.

        Raises what the broker raises and time does not heal, DataLoss with on_gap="raise", and CancelledError.
        """
        if self._running:
            raise InvalidArgument("worker: it runs already")
        if stop is not None:
            self._stop = stop
        self._running, self._stopping = True, False
        failure: BaseException | None = None
        try:
            try:
                await self._serve()
            except BaseExceptionGroup as group:
                failure = _first(group)
            except BaseException as exc:
                failure = exc
            await self._finish(after=failure)
            if failure is not None:
                raise failure
        finally:
            self._running = False
        return self.stats

    # the tasks

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as group:
            services = [group.create_task(self._send_settled()), group.create_task(self._extend_held())]
            fetching = group.create_task(self._fetch(group))
            await self._stop.wait()
            self._stopping = True
            if self._waiting:
                fetching.cancel()
            try:
                async with asyncio.timeout(self._drain_s):
                    await asyncio.wait([fetching])
                    while self._occupied:
                        self._room.clear()
                        await self._room.wait()
            except TimeoutError:
                self._ready.clear()  # given back at the end, with what is cancelled now
            for task in (fetching, *self._runners, *services):
                task.cancel()

    async def _finish(self, *, after: BaseException | None = None) -> None:
        """Give back what is unfinished and write all settling, within `flush_s`."""
        self._runners.clear()
        self._idle.clear()
        self._ready.clear()
        for item in list(self._held.values()):
            self.stats.given_back += 1
            item._returned = True
            self._settle(item, "nak", 0.0)
        self._occupied = 0
        try:
            async with asyncio.timeout(self._flush_s):
                await self._flush()
        except (MistError, TimeoutError) as exc:
            left = f"{self._unsent_count} settled deliveries were not written and come again"
            if after is None:
                raise TimedOut(f"worker of consumer {self._consumer.name}: {left}") from exc
            after.add_note(f"{left}: {exc!r}")
        finally:
            self._unsent.clear()
            self._unsent_count = 0

    async def _fetch(self, group: asyncio.TaskGroup) -> None:
        """Keep the slots full, until stopped. May be cancelled wherever it only waits."""
        task = asyncio.current_task()
        tries, away_since_s = 0, 0.0
        while not self._stopping:
            self._waiting = True
            free = self._slots - self._occupied
            if free <= 0 or self._unsent_count >= max(_UNSETTLED_MAX, self._slots):
                self._room.clear()
                await self._room.wait()
                continue
            try:
                deliveries = await self._consumer.fetch(
                    limit=free, bytes_max=self._bytes_max, wait_s=self._fetch_wait_s
                )
                self._waiting = False
                items = self._decode(deliveries)
                if task is not None and task.cancelling() and not self._stopping:
                    # the adapter swallowed the cancellation; what it handed out is ours to give back
                    self._held.update((id(item), item) for item in items)
                    raise asyncio.CancelledError
                if items and self._policy is AckPolicy.ACK_FIRST:
                    # if this fails they are dropped unhandled and come again: at most once, and not lost
                    self.stats.stale += len(items) - await self._consumer.ack([i.delivery for i in items])
            except DataLoss as exc:
                self.stats.gaps += 1
                self.gaps.append(Gap(exc.first, exc.last, exc.code))
                if self._on_gap == "raise":
                    raise
                continue
            except MistError as exc:
                self._waiting = True
                tries, away_since_s = await self._away(exc, tries, away_since_s)
                continue
            tries = 0
            if items:
                self._accept(items, group)

    async def _away(self, error: MistError, tries: int, since_s: float) -> tuple[int, float]:
        """Wait before the next try of a call that failed, or raise when time will not heal it."""
        now = self._clock.monotonic()
        since_s = since_s if tries else now
        if not error.retryable or now - since_s > self._away_s_max:
            raise error
        self.stats.retries += 1
        await asyncio.sleep(max(_AWAY.delay_s(tries + 1, self._rand), error.retry_after_s or 0.0))
        return tries + 1, since_s

    def _decode(self, deliveries: Sequence[Delivery]) -> list[Delivered]:
        """What holds an envelope; what does not is put among the dead letters, whatever the policy."""
        now = self._clock.monotonic()
        stats = self.stats
        stats.fetched += len(deliveries)
        items = []
        for delivery in deliveries:
            if delivery.attempt > 1:
                stats.redelivered += 1
            try:
                items.append(Delivered(self, delivery, decode_record(delivery.record, self._blobs), now))
            except MistError as exc:
                stats.undecodable += 1
                self._put("term", f"{exc.code}: {exc.message}", delivery)
        return items

    def _accept(self, items: Sequence[Delivered], group: asyncio.TaskGroup) -> None:
        self._occupied += len(items)
        self._ready.extend(items)
        for item in items:
            if self._policy is AckPolicy.ACK_FIRST:
                item._settled = True
            else:
                self._held[id(item)] = item
        wanted = -(-len(self._ready) // self._batch_max)
        while wanted > 0 and self._idle:
            idle = self._idle.popleft()
            if not idle.done():
                idle.set_result(None)
                wanted -= 1
        while wanted > 0 and len(self._runners) < self._concurrency:
            self._runners.append(group.create_task(self._run_handlers()))
            wanted -= 1

    async def _run_handlers(self) -> None:
        """One handler at a time, for ever."""
        ready = self._ready
        task = asyncio.current_task()
        while True:
            if not ready:
                idle: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._idle.append(idle)
                await idle
                continue
            items = [ready.popleft() for _ in range(min(self._batch_max, len(ready)))]
            await self._handle(items)
            if task is not None and task.cancelling():
                raise asyncio.CancelledError  # the handler swallowed it

    async def _handle(self, items: list[Delivered]) -> None:
        task = asyncio.current_task()
        error: Exception | None = None
        try:
            async with asyncio.timeout(self._handle_s_max):
                if self._many is not None:
                    await self._many(items)
                elif self._one is not None:
                    await self._one(items[0])
        except asyncio.CancelledError as exc:
            if task is None or task.cancelling():
                raise  # we are being stopped: `_finish` gives these back
            error = RuntimeError("the handler was cancelled from within")
            error.__cause__ = exc
        except Exception as exc:  # a handler may raise anything; the policy decides what becomes of the record
            error = exc
        if error is None:
            self.stats.processed += len(items)
        else:
            self.stats.failed += len(items)
        for item in items:
            self._after(item, error)

    def _after(self, item: Delivered, error: Exception | None) -> None:
        """The handler is through with this one: settle it as the policy says, and free its slot."""
        policy = self._policy
        if error is not None and self._on_error is not None:
            try:
                self._on_error(item, error)
            except Exception as exc:  # the callback's own fault must not cost the record its policy
                asyncio.get_running_loop().call_exception_handler(
                    {"message": "worker: on_error raised", "exception": exc}
                )
        item._returned = True
        if item._settled:
            self._free()
        elif error is None:
            if policy is not AckPolicy.MANUAL:
                item.ack()
        elif policy is AckPolicy.ACK:
            item.ack()
        elif policy is AckPolicy.REJECT_ON_ERROR:
            item.term(f"{type(error).__name__}: {error}")
        else:
            item.nak()

    def _free(self) -> None:
        self._occupied -= 1
        self._room.set()

    # settling

    def _delay_s(self, attempt: int) -> float:
        return nak_delay_s(self._backoff, attempt, self._rand)

    def _settle(self, item: Delivered, verb: str, how: float | str) -> None:
        if item._settled:
            return
        item._settled = True
        self._held.pop(id(item), None)
        attempts_max = self._consumer.config.attempts_max
        if verb == "nak" and attempts_max and item.attempt >= attempts_max:
            self.stats.dead += 1
        self._put(verb, how, item.delivery)
        if item._returned:
            self._free()

    def _put(self, verb: str, how: float | str, delivery: Delivery) -> None:
        if verb == "term":
            self.stats.dead += 1
        self._unsent.setdefault((verb, how), []).append(delivery)
        self._unsent_count += 1
        self._dirty.set()

    async def _send_settled(self) -> None:
        while True:
            await self._dirty.wait()
            await asyncio.sleep(0)  # what else is settled in this turn comes along
            await self._flush()

    async def _flush(self) -> None:
        """Write everything settled so far. Repeating is safe: a token settles once."""
        async with self._flushing:
            tries, away_since_s = 0, 0.0
            self._dirty.clear()
            while self._unsent:
                (verb, how), listed = next(iter(self._unsent.items()))
                batch = listed[:]
                try:
                    ours = await self._send(verb, how, batch)
                except MistError as exc:
                    tries, away_since_s = await self._away(exc, tries, away_since_s)
                    continue
                tries = 0
                self.stats.stale += len(batch) - ours
                del listed[: len(batch)]
                self._unsent_count -= len(batch)
                if not listed:
                    del self._unsent[verb, how]
                self._room.set()

    async def _send(self, verb: str, how: float | str, batch: list[Delivery]) -> int:
        if verb == "ack":
            return await self._consumer.ack(batch)
        if verb == "nak":
            return await self._consumer.nak(batch, delay_s=float(how))
        return await self._consumer.term(batch, reason=str(how))

    async def _extend_held(self) -> None:
        """Keep what is held ours while handlers work; give up on MANUAL ones that nobody settles."""
        while True:
            await asyncio.sleep(self._consumer.config.ack_wait_s / 3)
            now = self._clock.monotonic()
            for key, item in list(self._held.items()):
                if item._returned and now - item._since_s > self._handle_s_max:
                    item._settled = True
                    del self._held[key]
                    self.stats.abandoned += 1
                    self._free()
            await self._extend()

    async def _extend(self) -> None:
        tries, away_since_s = 0, 0.0
        while self._held:
            try:
                await self._consumer.extend([item.delivery for item in self._held.values()])
            except MistError as exc:
                tries, away_since_s = await self._away(exc, tries, away_since_s)
            else:
                return


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first real error of a task group; the others stay visible as its cause."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
