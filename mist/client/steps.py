"""Durable steps of a long job: what is done is not done again, whoever was killed when.

    async with Run.open(broker, "nightly") as run:
        data = await run.step("download", download, type=Download)
        async with run.step("load", type=int) as step:
            if not step.done:
                step.result = await load(data)

Promises
- A step whose `await` returned, or whose block was left, is completed: its result is stored as durably as the stream
  `steps` is, and every later opening of the run gets it. A step that was cut off, failed, or whose result could not be stored
  is done again.
- A result is what its JSON is, read as `type`: the same value when the step is done and when it is remembered. What has no
  JSON form, or does not fit `type`, fails the step when it is done.
- One process at a time. A second one is refused (Locked) while the first lives; it takes over when the first has not been
  heard of for `lease_s`. The first one can then write nothing any more: every write compares the stream's end with what
  its writer has read, and finds the other's claim. Times are the broker's.
- One task at a time does a step; another task that asks for it waits and gets its result.
- Attempts are counted on over restarts. `inputs` (anything that has a JSON form) that differ from those of the completed
  step do it again.

Does not: undo. What a step did outside before it was cut off, it may do twice: give the outside the key `run/step`.
State: one stream, one subject per run (docs/adr/0015); needs a broker with conditional appends.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import defaultdict
from collections.abc import Awaitable, Callable, Generator, Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload

import msgspec
from msgspec import Raw, Struct

from mist.broker.base import Broker, Stream
from mist.broker.patience import again
from mist.client._ledger import Ledger, StepRecord
from mist.client._seedsteps import read_seed
from mist.client.client import to_message
from mist.client.received import decode_record
from mist.errors import (
    Closed,
    InvalidArgument,
    Locked,
    Malformed,
    MistError,
    NotFound,
    SequenceExpired,
    TransportError,
    WrongSequence,
)
from mist.kit.retry import RetryPolicy, retry, retryable
from mist.protocol.envelope import Envelope, encode_payload
from mist.protocol.ids import new_id
from mist.protocol.subject import subject_for

T = TypeVar("T")

STREAM = "steps"
TYPE = "run.step"
LEASE_S = 30.0
ONCE = RetryPolicy(attempts_max=1, deadline_s=None)
ERROR_CHARS_MAX = 2000
_IMPORT_BATCH = 500


class Imported(Struct, frozen=True):
    """What came of a checkpoint file: steps taken over, steps the run had already, lines that could not be read."""

    steps: int
    known: int
    bad_lines: list[int]


class Run:
    """One opening of a run, for `async with`. Made by `open`."""

    def __init__(self, broker: Broker, name: str, stream: str, lease_s: float, wait_s: float) -> None:
        if not name:
            raise InvalidArgument("a run needs a name")
        if not (lease_s > 0 and wait_s >= 0):
            raise InvalidArgument(f"run {name}: lease_s={lease_s}, wait_s={wait_s} cannot be right")
        self.name = name
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{new_id()[:8]}"
        self._subject = subject_for(TYPE, name)
        self._broker = broker
        self._stream_name = stream
        self._lease_s = lease_s
        self._wait_s = wait_s
        self._ledger = Ledger()
        self._stream: Stream | None = None
        self._read_to = 0  # the ledger holds everything up to here, with the broker's times
        self._end = 0  # the stream's last sequence as far as we know: what a write expects
        self._written = 0
        self._writing = asyncio.Lock()
        self._wrote = asyncio.Event()
        self._steps: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._renewing: asyncio.Task[None] | None = None

    @classmethod
    def open(
        cls, broker: Broker, name: str, *, stream: str = STREAM, lease_s: float = LEASE_S, wait_s: float = 0.0
    ) -> Run:
        """The run of that name, to be entered. Entering raises Locked when another process is at it, after waiting for up
        to `wait_s` for its end or the end of its lease."""
        return cls(broker, name, stream, lease_s, wait_s)

    async def __aenter__(self) -> Self:
        if self._stream is not None:
            raise InvalidArgument(f"run {self.name}: it is open already")
        self._stream = await again(lambda: self._broker.open(self._stream_name))
        try:
            await self._claim()
        except BaseException:
            self._stream = None
            raise
        self._renewing = asyncio.create_task(self._renew())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Give the run free. Where that cannot be written, the lease does it later."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait({self._renewing})
        try:
            await self._write(self._record("release"))
        except MistError as failed:
            if exc is not None:
                exc.add_note(f"run {self.name} was not given free: {failed}")
            elif not isinstance(failed, Locked):
                raise
        finally:
            self._stream = None

    @property
    def completed(self) -> list[str]:
        """The names of the completed steps, in the order of their completion."""
        return list(self._ledger.done)

    @overload
    def step(self, name: str, *, inputs: Any = None) -> Step[Any]: ...
    @overload
    def step(self, name: str, *, type: type[T], inputs: Any = None) -> Step[T]: ...
    @overload
    def step(
        self, name: str, work: Callable[[], Awaitable[object]], *, type: type[T], inputs: Any = None,
        retry: RetryPolicy = ONCE, classify: Callable[[Exception], bool] = retryable,
    ) -> Step[T]: ...  # fmt: skip
    @overload
    def step(
        self, name: str, work: Callable[[], Awaitable[object]], *, inputs: Any = None,
        retry: RetryPolicy = ONCE, classify: Callable[[Exception], bool] = retryable,
    ) -> Step[Any]: ...  # fmt: skip
    def step(
        self,
        name: str,
        work: Callable[[], Awaitable[object]] | None = None,
        *,
        type: Any = Any,
        inputs: Any = None,
        retry: RetryPolicy = ONCE,
        classify: Callable[[Exception], bool] = retryable,
    ) -> Step[Any]:
        """A step: awaited, with `work`, it gives the result; as `async with` it says whether it is `done`.

        `retry` and `classify` are those of mist.kit.retry, for `work`. `type` is anything msgspec reads; without it
        plain values. Raises InvalidArgument for an empty name or inputs without a JSON form.
        """
        if not name:
            raise InvalidArgument(f"run {self.name}: a step needs a name")
        return Step(self, name, work, type, _digest(inputs), retry, classify)

    async def reset(self) -> None:
        """Forget every step; the run goes on, with nothing done."""
        await self._write(self._record("reset"))

    async def import_seed(self, path: str | os.PathLike[str]) -> Imported:
        """Take over the completed steps of a checkpoint file of the Go library (`<run>.jsonl`). A step that this run has
        completed stays as it is; bad lines are told, not trusted. Raises NotFound, TransportError."""
        try:
            data = await asyncio.to_thread(Path(path).read_bytes)
        except FileNotFoundError as exc:
            raise NotFound(f"no checkpoint file {os.fspath(path)}") from exc
        except OSError as exc:
            raise TransportError(f"{os.fspath(path)}: {exc.strerror or exc}") from exc
        seed = read_seed(data)
        new = {name: raw for name, raw in seed.results.items() if name not in self._ledger.done}
        records = [self._record("completed", step=name, result=raw) for name, raw in new.items()]
        for at in range(0, len(records), _IMPORT_BATCH):
            await self._write(*records[at : at + _IMPORT_BATCH])
        return Imported(len(new), len(seed.results) - len(new), seed.bad_lines)

    # the stream

    def _record(self, kind: Any, **fields: Any) -> StepRecord:
        return StepRecord(kind, self.owner, **fields)

    async def _claim(self) -> None:
        """Become the holder. Whether a claim counts is read from the stream, not decided here."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._wait_s
        claim = self._record("claim", lease_s=self._lease_s)
        while True:
            await self._catch_up()
            try:
                [at] = await self._append([claim])
            except WrongSequence:
                continue
            claimed_ns = await self._catch_up(at)
            if self._ledger.holder == self.owner:
                return
            left_s = (self._ledger.until_ns - claimed_ns) / 1e9
            if loop.time() >= until:
                raise Locked(
                    f"run {self.name} is worked on by {self._ledger.holder}; its lease ends in {max(left_s, 0):.1f} s unless it is renewed",
                    hint="wait for it, or end that process and wait for the end of the lease",
                )
            # the holder may give the run free long before its lease ends
            await asyncio.sleep(max(0.01, min(left_s, self._lease_s / 10, until - loop.time())))

    async def _append(self, records: Sequence[StepRecord]) -> list[int]:
        """Append behind what we know to be the end. Raises WrongSequence when it is not; the fate is never unknown for
        long: a repeat has the same ids."""
        stream = self._opened()
        messages = []
        for record in records:
            self._written += 1
            envelope = Envelope.new(
                TYPE, record, source=self.owner, id=f"{self.owner}:{self._written}", correlation_id=self.name
            )
            messages.append(to_message(envelope, qualifier=self.name, size_bytes_max=stream.size_bytes_max))
        sequences = await again(lambda: stream.append(messages, expected_last=self._end))
        self._end = sequences[-1]
        return sequences

    async def _write(self, *records: StepRecord) -> None:
        """Append as the holder. Raises Locked once somebody else has taken over."""
        async with self._writing:
            while True:
                self._check_ours()
                try:
                    await self._append(records)
                except WrongSequence:
                    await self._catch_up()
                    continue
                for record in records:
                    self._ledger.note(record)
                self._wrote.set()
                return

    async def _catch_up(self, wanted: int = 0) -> int:
        """Read the run's records up to the present end; the time of the one with sequence `wanted`."""
        stream = self._opened()
        time_ns = 0
        while True:
            try:
                page = await again(lambda: stream.read(after=self._read_to, subjects=(self._subject,), limit=1000))
            except SequenceExpired as exc:
                self._read_to = exc.first - 1
                continue
            for record in page.records:
                self._ledger.read(decode_record(record).decode(StepRecord), record.timestamp_ns)
                if record.sequence == wanted:
                    time_ns = record.timestamp_ns
            self._read_to = page.scanned
            self._end = max(self._end, page.scanned)
            if page.scanned >= page.last:
                return time_ns

    def _opened(self) -> Stream:
        if self._stream is None:
            raise Closed(f"run {self.name} is not open")
        return self._stream

    def _check_ours(self) -> None:
        self._opened()
        if self._ledger.holder != self.owner:
            by = f" by {self._ledger.holder}" if self._ledger.holder else ""
            raise Locked(
                f"run {self.name} was taken over{by}: this process was not heard of for {self._lease_s:g} s",
                hint="open the run again",
                retryable=False,
            )

    async def _renew(self) -> None:
        """Be heard of three times in each lease. A failed try is no news: if the lease is lost, the next write says so."""
        while True:
            self._wrote.clear()
            try:
                async with asyncio.timeout(self._lease_s / 3):
                    await self._wrote.wait()
                    continue
            except TimeoutError:
                pass
            try:
                await self._write(self._record("renew"))
            except Locked:
                return
            except MistError:
                continue


class Step(Generic[T]):
    """One step of a run. `done` says whether it was completed before; `attempt` which one this is, counted over restarts."""

    def __init__(
        self,
        run: Run,
        name: str,
        work: Callable[[], Awaitable[object]] | None,
        type: Any,
        inputs: str,
        policy: RetryPolicy,
        classify: Callable[[Exception], bool],
    ) -> None:
        self.name = name
        self.done = False
        self.attempt = 0
        self._run = run
        self._work = work
        self._type = type
        self._inputs = inputs
        self._policy = policy
        self._classify = classify
        self._value: Any = None
        self._locked = False

    @property
    def result(self) -> T:
        """What the step gave. To be set in the block of a step that is not `done`; None if it is not."""
        return self._value  # type: ignore[no-any-return]

    @result.setter
    def result(self, value: object) -> None:
        if self.done:
            raise InvalidArgument(f"run {self._run.name}: step {self.name} is done, its result stays")
        self._value = value

    def __await__(self) -> Generator[Any, None, T]:
        return self._awaited().__await__()

    async def _awaited(self) -> T:
        if self._work is None:
            raise InvalidArgument(f"run {self._run.name}: step {self.name} has no work", hint="or use `async with`")
        work = self._work
        async with self._run._steps[self.name]:
            if not self._remembered():

                async def attempt() -> object:
                    await self._begin()
                    try:
                        return await work()
                    except Exception as exc:
                        await self._fail(exc)
                        raise

                await self._complete(await retry(attempt, self._policy, classify=self._classify))
        return self.result

    async def __aenter__(self) -> Self:
        if self._work is not None:
            raise InvalidArgument(f"run {self._run.name}: step {self.name} has work, await it")
        lock = self._run._steps[self.name]
        await lock.acquire()
        try:
            if not self._remembered():
                await self._begin()
        except BaseException:
            lock.release()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if self.done:
                return
            if exc is None:
                await self._complete(self._value)
            elif isinstance(exc, Exception):
                await self._fail(exc)
        finally:
            self._run._steps[self.name].release()

    def _remembered(self) -> bool:
        self._run._check_ours()
        found = self._run._ledger.done.get(self.name)
        if found is None or (found.inputs != self._inputs and self._inputs):
            return False
        self._value = self._decode(bytes(found.result))
        self.attempt = found.attempt
        self.done = True
        return True

    async def _begin(self) -> None:
        self.attempt = self._run._ledger.attempts.get(self.name, 0) + 1
        await self._run._write(self._run._record("running", step=self.name, attempt=self.attempt))

    async def _complete(self, value: object) -> None:
        try:
            raw = encode_payload(value)
            decoded = self._decode(raw)
            record = self._run._record(
                "completed", step=self.name, attempt=self.attempt, inputs=self._inputs, result=Raw(raw)
            )
            await self._run._write(record)
        except Locked:
            raise
        except MistError as exc:
            await self._fail(exc)
            raise
        self._value = decoded
        self.done = True

    async def _fail(self, error: Exception) -> None:
        """Note that it failed. If that cannot be written the step counts as cut off, which is the same."""
        text = f"{type(error).__name__}: {error}"[:ERROR_CHARS_MAX]
        text = text.encode(errors="replace").decode()
        try:
            await self._run._write(self._run._record("failed", step=self.name, attempt=self.attempt, error=text))
        except MistError as exc:
            error.add_note(f"the failure of step {self.name} was not noted: {exc}")

    def _decode(self, raw: bytes) -> Any:
        try:
            return msgspec.json.decode(raw, type=self._type)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise Malformed(
                f"run {self._run.name}: the result of step {self.name} is no {getattr(self._type, '__name__', self._type)}: {exc}",
                hint="has the type changed since the step was done? other `inputs` do it again",
            ) from exc


def _digest(inputs: Any) -> str:
    return "" if inputs is None else blake2b(encode_payload(inputs), digest_size=16).hexdigest()
