"""Group commit: one thread per stream handle turns waiting appends into blocks, one sync each.

Everything that came while a sync was under way goes into the next block. The thread takes the stream's lock first and the
waiting appends after, so an append that cannot get the lock in time can be withdrawn and fails with a definite error.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain

from mist.broker.base import RECORD_BYTES_MAX, Headers, Message, check_columns, check_messages, plain
from mist.broker.notify import Notifier
from mist.errors import Ambiguous, Closed, Internal, Locked, MistError, PartialAppend, Unavailable, WrongSequence
from mist.log.format import BLOCK_DATA_MAX, BLOCK_RECORDS_MAX, Columns, Tail
from mist.log.journal import Journal, storage_error
from mist.log.reader import Reader
from mist.log.window import Window
from mist.protocol.subject import check_subject

_QUEUE_BYTES_MAX = 64 * 1024 * 1024
_QUEUE_MESSAGES_MAX = 200_000
_OVERHEAD = 64


class _Append:
    """One waiting append. `result` fills up while its messages go into blocks; `stored` of them are published."""

    __slots__ = ("columns", "count", "error", "expected_last", "future", "messages", "result", "size", "stored")

    def __init__(
        self,
        messages: Sequence[Message],
        columns: Columns | None,
        expected_last: int | None,
        size: int,
        future: asyncio.Future[list[int]],
    ) -> None:
        self.messages = messages
        self.columns = columns
        self.count = len(messages)
        self.expected_last = expected_last
        self.size = size
        self.future = future
        self.result: list[int] = []
        self.stored = 0
        self.error: MistError | None = None

    def fail(self, exc: MistError, stream: str) -> None:
        """The first error counts. A stored prefix makes it PartialAppend; an unknown fate names our own ids."""
        if self.error is not None or self.stored == len(self.messages):
            return
        if isinstance(exc, Ambiguous):
            self.error = Ambiguous(exc.message, ids=[m.id for m in self.messages if m.id])
        elif self.stored:
            self.error = PartialAppend(self.result[: self.stored], total=len(self.messages), stream=stream)
        else:
            self.error = exc
            return
        self.error.__cause__ = exc


class Committer:
    def __init__(
        self, journal: Journal, loop: asyncio.AbstractEventLoop, changed: Notifier, lock_wait_s: float
    ) -> None:
        self._journal = journal
        self._loop = loop
        self._changed = changed
        self._lock_wait_s = lock_wait_s
        self._mutex = threading.Lock()
        self._wake = threading.Event()
        self._queue: list[_Append] = []
        self._bytes = 0
        self._count = 0
        self._room = Notifier()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._watching = False
        self._reader: Reader | None = None
        self._erasures = -1
        config = journal.config
        self._window = Window(ids_max=config.dedupe_ids_max or 0, window_s=config.dedupe_window_s or 0.0)

    def append(self, messages: Sequence[Message], expected_last: int | None) -> asyncio.Future[list[int]]:
        """Check the messages and put them in the queue. The future gives the sequences, once stored; cancelling it does
        not withdraw the append. Raises TooLarge and InvalidArgument. See `room` for the queue's bound."""
        columns: Columns | None = None
        if len(messages) == 1:
            message = messages[0]
            size = len(message.data)
            if message.headers or len(message.id) > 64 or size > RECORD_BYTES_MAX or not plain(message.id):
                check_messages(messages, RECORD_BYTES_MAX)
            else:
                check_subject(message.subject)
        else:
            ids = [m.id for m in messages]
            headers = [m.headers for m in messages]
            columns = Columns([m.subject for m in messages], [m.data for m in messages], ids, headers)
            check_columns(columns.subjects, columns.datas, ids, headers, RECORD_BYTES_MAX)
            size = sum(map(len, columns.datas))
        if self._closing:
            raise Closed("the broker is closed")
        future: asyncio.Future[list[int]] = self._loop.create_future()
        request = _Append(messages, columns, expected_last, size, future)
        with self._mutex:
            self._queue.append(request)
            self._bytes += size
            self._count += request.count
        if not self._wake.is_set():
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"mist-log-{self._journal.name}", daemon=True)
                self._thread.start()
            self._wake.set()
        return future

    @property
    def full(self) -> bool:
        """Whether so much is waiting that a caller must wait in `room` first."""
        return self._bytes > _QUEUE_BYTES_MAX or self._count > _QUEUE_MESSAGES_MAX

    async def room(self) -> None:
        """Wait until the queue is below its bound."""
        while self.full and not self._closing:
            generation = self._room.generation
            if self.full:
                await self._room.wait(generation, None)

    async def aclose(self) -> bool:
        """Finish what was accepted, then end the thread. False when it could not end: leave its files open."""
        self._closing = True
        self._wake.set()
        self._room.notify()
        thread, self._thread = self._thread, None
        if thread is not None:
            await self._loop.run_in_executor(None, thread.join, self._lock_wait_s + 1)
            if thread.is_alive():
                return False  # it waits for a lock that a stopped process holds; its appends have failed
        if self._reader is not None:
            self._reader.close()
        return True

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        journal = self._journal
        while True:
            self._wake.wait()
            self._wake.clear()
            if not self._queue:
                if self._closing:
                    return
                continue
            try:
                if not journal.try_lock():
                    self._watch_lock()
                    journal.wait_lock()
            except OSError as exc:
                self._settle(self._swap(), storage_error(exc, f"stream {journal.name}: lock"))
                continue
            try:
                batch = self._swap()
                if batch:
                    self._commit(batch)
            finally:
                with suppress(OSError):  # the kernel drops the lock with the descriptor; nothing else can fail here
                    journal.unlock()
            if batch:
                self._settle(batch, None)
            if self._closing:
                self._wake.set()

    def _swap(self) -> list[_Append]:
        with self._mutex:
            batch, self._queue = self._queue, []
        return batch

    def _settle(self, batch: list[_Append], error: MistError | None) -> None:
        if error is not None:
            self._fail(batch, error)
        with self._mutex:
            self._bytes -= sum([r.size for r in batch])
            self._count -= sum([r.count for r in batch])
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._resolve, batch)

    def _resolve(self, batch: list[_Append]) -> None:
        self._changed.notify()
        self._room.notify()
        for request in batch:
            future = request.future
            if future.done():
                continue
            if request.error is None:
                future.set_result(request.result)
            else:
                future.set_exception(request.error)

    def _watch_lock(self) -> None:
        if self._watching:
            return
        self._watching = True
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(
                lambda: self._loop.call_later(self._lock_wait_s, self._give_up, set(self._queue))
            )

    def _give_up(self, waiting: set[_Append]) -> None:
        """On the loop: appends that still wait for the lock were certainly not stored; they fail now."""
        self._watching = False
        with self._mutex:
            stuck = [r for r in self._queue if r in waiting]
            self._queue = [r for r in self._queue if r not in waiting]
            left = bool(self._queue)
            self._bytes -= sum([r.size for r in stuck])
            self._count -= sum([r.count for r in stuck])
        error = Locked(
            f"stream {self._journal.name}: process {self._journal.holder()} has held the lock for {self._lock_wait_s:g} s",
            hint="is it stopped or stuck? nothing was stored; try again when it goes on",
        )
        for request in stuck:
            request.error = error
            if not request.future.done():
                request.future.set_exception(error)
        if stuck:
            self._room.notify()
        if left:
            self._watch_lock()

    def _commit(self, batch: list[_Append]) -> None:
        """Under lock: store what the batch holds; results and errors go into its requests."""
        try:
            self._journal.enter()
            if self._reader is not None:
                self._reader.drop_below(self._journal.tail)
            self._catch_up(batch)
            _Block(self._journal, self._window).store(batch)
        except MistError as exc:
            self._window.clear()
            self._fail(batch, exc)
        except OSError as exc:
            self._window.clear()
            self._fail(batch, storage_error(exc, f"stream {self._journal.name}: append"))
        except BaseException as exc:
            self._window.clear()
            error = Internal(f"stream {self._journal.name}: append failed unexpectedly: {exc!r}")
            error.__cause__ = exc
            self._fail(batch, error)

    def _fail(self, batch: list[_Append], exc: MistError) -> None:
        for request in batch:
            request.fail(exc, self._journal.name)

    def _catch_up(self, batch: list[_Append]) -> None:
        """Bring the id window up to what is published, when this batch has ids."""
        window, tail = self._window, self._journal.tail
        if tail.erasures != self._erasures:
            self._forget_erased(tail)
        if window.upto == tail.durable or not any(m.id for r in batch for m in r.messages):
            return
        if self._reader is None:
            self._reader = Reader(self._journal)
        after = window.upto
        if after < 0 or tail.durable - after > window.ids_max:
            window.clear()
            after = max(tail.first - 1, tail.durable - window.ids_max, 0)
            if window.window_ns:
                old = self._reader.locate(self._journal.clock.time_ns() - window.window_ns)
                after = max(after, old - 1)
        for base, count, time_ns, ids in self._reader.metas(after, tail):
            if ids:
                window.learn(base, time_ns, ids)
            window.upto = base + count - 1
        window.upto = tail.durable

    def _forget_erased(self, tail: Tail) -> None:
        """The ids of erased records are as if they had never been; those of trimmed ones stay known."""
        if self._window.upto >= 0:
            if self._reader is None:
                self._reader = Reader(self._journal)
            try:
                self._window.drop(self._reader.erased(tail))
            except OSError:
                self._window.clear()  # then it is read again from what is there
        self._erasures = tail.erasures


class _Block:
    """The block being filled, across the requests of one batch."""

    def __init__(self, journal: Journal, window: Window) -> None:
        self.journal = journal
        self.window = window
        self.now = journal.clock.time_ns()
        self.next = journal.tail.durable + 1
        # a batch without ids needs no window, so it did not bring it up to date: what it lacks must still be read
        self.current = window.upto == journal.tail.durable
        self.parts: list[tuple[_Append, int]] = []
        self.messages: list[Message] = []
        self.size = 0

    def store(self, batch: list[_Append]) -> None:
        self.window.expire(self.now)
        if self._store_at_once(batch):
            return
        for request in batch:
            messages = request.messages
            room = BLOCK_RECORDS_MAX - len(self.messages)
            if len(messages) <= room and request.size + self.size <= BLOCK_DATA_MAX:
                self._admit(request, messages, request.size)
                continue
            self._flush()
            at = 0
            while at < len(messages) and request.error is None:
                stop, size = at, 0
                while stop < len(messages) and stop - at < BLOCK_RECORDS_MAX:
                    size += len(messages[stop].data)
                    if stop > at and size > BLOCK_DATA_MAX:
                        break
                    stop += 1
                self._admit(request, messages[at:stop], size)
                self._flush()
                at = stop
        self._flush()

    def _store_at_once(self, batch: list[_Append]) -> bool:
        """The common case: one block takes all, nothing is conditional or known. False: nothing was done."""
        count = sum([r.count for r in batch])
        if (
            count > BLOCK_RECORDS_MAX
            or sum([r.size for r in batch]) > BLOCK_DATA_MAX
            or self.journal.config.full == "refuse"
            or any(r.expected_last is not None for r in batch)
        ):
            return False
        columns = batch[0].columns
        if columns is None or len(batch) > 1:
            messages = list(chain.from_iterable([r.messages for r in batch]))
            columns = Columns(
                [m.subject for m in messages], [m.data for m in messages],
                [m.id for m in messages], [m.headers for m in messages],
            )  # fmt: skip
        ids = columns.ids or []
        given = ids if all(ids) else [i for i in ids if i]
        if given and self.window.known(given):
            return False
        base = self.next
        if given:
            self.window.stored(base, self.now, ids)
        at = base
        for request in batch:
            stop = at + request.count
            request.result = list(range(at, stop))
            self.parts.append((request, request.count))
            at = stop
        self.next = at
        self._write(Columns(
            columns.subjects, columns.datas, ids if given else None, columns.headers if any(columns.headers or ()) else None
        ))  # fmt: skip
        return True

    def _admit(self, request: _Append, messages: Sequence[Message], size: int) -> None:
        ids = [m.id for m in messages]
        given = ids if all(ids) else [i for i in ids if i]
        new = messages
        sequences: list[int] | None = None
        if given and self.window.known(given):
            sequences, new = self._without_known(messages)
            size = sum(len(m.data) for m in new)
        if new:
            expected = request.expected_last
            try:
                if expected is not None and not request.result and expected != self.next - 1:
                    raise WrongSequence(expected=expected, last=self.next - 1, stream=self.journal.name)
                stored = size + _OVERHEAD * len(new)
                waiting = len(self.messages)
                self.journal.check_room(len(new), stored, waiting, self.size + _OVERHEAD * waiting)
            except MistError as exc:
                request.fail(exc, self.journal.name)
                if given and sequences is None:
                    self.window.forget(given)
                return
        base = self.next
        if sequences is None:
            sequences = list(range(base, base + len(messages)))
            if given:
                self.window.stored(base, self.now, ids)
        elif new:
            self.window.stored(base, self.now, [m.id for m in new])
        request.result = request.result + sequences if request.result else sequences
        self.parts.append((request, len(request.result)))
        self.messages.extend(new)
        self.next += len(new)
        self.size += size

    def _without_known(self, messages: Sequence[Message]) -> tuple[list[int], list[Message]]:
        sequences: list[int] = []
        new: list[Message] = []
        fresh: dict[str, int] = {}
        for m in messages:
            known = (fresh.get(m.id) or self.window.find(m.id)) if m.id else 0
            if not known:
                known = self.next + len(new)
                new.append(m)
                if m.id:
                    fresh[m.id] = known
            sequences.append(known)
        return sequences, new

    def _flush(self) -> None:
        messages, self.messages = self.messages, []
        self.size = 0
        if not messages:
            self._write(None)
            return
        ids = [m.id for m in messages]
        headers: list[Headers] = [m.headers for m in messages]
        self._write(Columns(
            [m.subject for m in messages], [m.data for m in messages],
            ids if any(ids) else None, headers if any(headers) else None,
        ))  # fmt: skip

    def _write(self, columns: Columns | None) -> None:
        """Store the block of `parts`. On failure its requests get the error, and it goes on to those behind it."""
        parts, self.parts = self.parts, []
        try:
            if columns is not None:
                self.journal.commit(columns)
        except MistError as exc:
            for request, _ in parts:
                request.fail(exc, self.journal.name)
            if isinstance(exc, Ambiguous):
                raise Unavailable(f"stream {self.journal.name}: not stored, an earlier write failed") from exc
            raise
        for request, stored in parts:
            request.stored = stored
        if self.current:
            self.window.upto = self.next - 1
