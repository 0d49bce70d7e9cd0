"""Appending to JetStream: a pipelined window of acknowledgements, atomic batches, and the way back from a refusal.

- window: all frames of an append leave in large writes, each with a number in its reply subject; the acknowledgements
  settle the numbers in order. Fastest where the server acknowledges before it syncs. One stream's acknowledgements come
  in the order of its messages as long as one server has it, which is why this is for one replica only.
- atomic (server 2.12+): up to 1,000 messages that are stored together or not at all, with one sync for all of them.
  Taken where the server syncs always, where a full stream refuses, where there are replicas, and for conditions on
  more than one message. Appends that wait for the one in flight are joined into the next.
- a refusal because of a known id, or of the condition: every id is asked about without storing anything (a publish
  under a condition that cannot hold tells a known id from a new one and gives its sequence), then what is new is
  stored. That is how a repeat of a stored conditional append succeeds. Which condition depends on the replicas. One:
  the last id (the ids are looked at first, which is not so for the last sequence). More: the last sequence, which
  the leader refuses before it proposes anything; the last id is looked at when the replicas apply what was proposed,
  and such a refusal stops a replicated stream of nats-server 2.14 and 2.15 for good ("critical write error").
  Before 2.12 any condition that is refused there leaves its id "in process": those servers are never asked.

Promises: the contract's `append`, except that on a server without atomic batches a failure in the middle of a window
(the disk full, an account's limit) can leave a hole: then the append raises Ambiguous, never PartialAppend.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Sequence

from mist.broker.base import Message
from mist.errors import (
    Ambiguous,
    Closed,
    MistError,
    NotFound,
    PartialAppend,
    StorageFull,
    TooLarge,
    Unavailable,
    WrongSequence,
)
from mist_nats import wire
from mist_nats.api import DUPLICATE_IN_BATCH, WRONG_LAST, WRONG_LAST_ID, Ack, ApiError, ack_of, translated
from mist_nats.headers import ID, QUIET_ID, message_lines, plain_ids
from mist_nats.link import CALL_S, Link, Lost
from mist_nats.wire import Frame

WINDOW = 4096
"""Unacknowledged messages of one connection."""
WINDOW_BYTES = 16 * 1024 * 1024
WRITE = 500
"""Messages of one write."""
BATCH = 1000
"""The server's limit of an atomic batch."""
BATCH_BYTES = 8 * 1024 * 1024
_ID_HEAD = len(b"NATS/1.0\r\nNats-Msg-Id: \r\n\r\n")
_NEVER = 2**63 - 1
"""No stream's last sequence."""
LOOKS = 8
"""How often an append starts anew because another writer stored one of its ids meanwhile."""


class _Segment:
    """The messages of one append in the window: numbers `base` to `base + count - 1`."""

    __slots__ = ("base", "bytes", "count", "done", "errors", "left", "sequences", "size")

    def __init__(self, base: int, count: int, size: int, done: asyncio.Future[None]) -> None:
        self.base = base
        self.count = count
        self.left = count
        self.size = size
        self.sequences = [0] * count
        self.errors: dict[int, Exception] = {}
        self.done = done


class Window:
    """The unacknowledged messages of one connection."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.prefix = link.box + b".a."
        self._loop = asyncio.get_running_loop()
        self._next = 1
        self._segments: dict[int, _Segment] = {}
        self._open = 0
        self._open_bytes = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        link.on_acks = self._acks
        link.on_ack_frames = self._frames
        link.on_lost.append(self._lost)

    async def publish(self, frames: Sequence[tuple[bytes, bytes]], size: int) -> _Segment:
        """Send (before the reply subject, its tail, after it) and wait for all acknowledgements; what each came to is
        in the segment. Raises Unavailable and Closed when nothing was sent."""
        link = self.link
        until = self._loop.time() + CALL_S
        await link.ready(until)
        await self._room(until)
        if not link.connected:
            await link.ready(until)
        count = len(frames)
        segment = _Segment(self._next, count, size, self._loop.create_future())
        self._next += count
        self._segments[segment.base] = segment
        self._open += count
        self._open_bytes += size
        timer = self._loop.call_later(CALL_S, self._late, segment)
        try:
            number = segment.base
            for start in range(0, count, WRITE):
                part = frames[start : start + WRITE]
                link.send(b"".join([b"%b%d%b" % (a, n, b) for n, (a, b) in enumerate(part, number)]))
                number += len(part)
                if number < segment.base + count and not segment.done.done():
                    await link.writable()
                    while self._open_in(segment, number) > WINDOW and not segment.done.done():
                        await self._turn()
            await asyncio.shield(segment.done)
        except Lost:
            self._fail(segment, Lost("the connection was lost"))
        except asyncio.CancelledError:
            if number < segment.base + count:  # the rest was never sent: nobody will answer for it
                self._fail(segment, Lost("cancelled"))
            raise
        finally:
            if segment.done.done():  # else its caller was cancelled, and what was sent still ends in time
                timer.cancel()
        return segment

    async def finish(self) -> None:
        """Wait for the acknowledgements of what was accepted."""
        while self._segments and self.link.connected:
            await self._turn()

    def _open_in(self, segment: _Segment, sent: int) -> int:
        return sent - segment.base - (segment.count - segment.left)

    async def _room(self, until: float) -> None:
        while self._open and (self._open >= WINDOW or self._open_bytes >= WINDOW_BYTES):
            try:
                async with asyncio.timeout_at(until):
                    await self._turn()
            except TimeoutError as exc:
                raise Unavailable(f"{self.link.name}: no acknowledgement within {CALL_S:g} s") from exc

    async def _turn(self) -> None:
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def _find(self, number: int) -> _Segment | None:
        for segment in self._segments.values():
            if segment.base <= number < segment.base + segment.count:
                return segment
        return None

    def _acks(self, acks: list[tuple[bytes, bytes]]) -> None:
        numbers = [int(n) for n, _ in acks]
        sequences = [int(s) for _, s in acks]
        at, total = 0, len(numbers)
        while at < total:
            number = numbers[at]
            segment = self._find(number)
            if segment is None:
                at += 1
                continue
            offset = number - segment.base
            size = min(total - at, segment.count - offset)
            if size > 1 and numbers[at : at + size] == list(range(number, number + size)):
                segment.sequences[offset : offset + size] = sequences[at : at + size]
            else:
                size = 1
                segment.sequences[offset] = sequences[at]
            self._settled(segment, size)
            at += size
        self._wake()

    def _frames(self, frames: list[Frame]) -> None:
        """What is no plain acknowledgement: an error, or nobody there."""
        for subject, _, header, data in frames:
            number = int(subject.rpartition(b".")[2])
            segment = self._find(number)
            if segment is None:
                continue
            try:
                ack = ack_of(data) if data else Ack()
            except ValueError:
                ack = Ack()
            if ack.error is not None:
                segment.errors[number - segment.base] = ApiError(
                    ack.error.code, ack.error.err_code, ack.error.description
                )
            elif ack.seq:
                segment.sequences[number - segment.base] = ack.seq
            else:
                text = wire.status_text(header) or "no acknowledgement in it"
                segment.errors[number - segment.base] = ApiError(wire.status(header), 0, text)
            self._settled(segment, 1)
        self._wake()

    def _settled(self, segment: _Segment, count: int) -> None:
        segment.left -= count
        self._open -= count
        if segment.left <= 0:
            self._end(segment)

    def _end(self, segment: _Segment) -> None:
        if self._segments.pop(segment.base, None) is not None:
            self._open -= max(segment.left, 0)
            self._open_bytes -= segment.size
            if not segment.done.done():
                segment.done.set_result(None)
            self._wake()

    def _fail(self, segment: _Segment, exc: Exception) -> None:
        for offset, sequence in enumerate(segment.sequences):
            if not sequence and offset not in segment.errors:
                segment.errors[offset] = exc
        self._end(segment)

    def _late(self, segment: _Segment) -> None:
        self._fail(segment, TimeoutError(f"no acknowledgement within {CALL_S:g} s"))

    def _lost(self) -> None:
        for segment in list(self._segments.values()):
            self._fail(segment, Lost("the connection was lost"))
        self._open = self._open_bytes = 0
        self._wake()


class _Job:
    __slots__ = ("done", "expected_last", "messages")

    def __init__(self, messages: Sequence[Message], expected_last: int | None, done: asyncio.Future[list[int]]) -> None:
        self.messages = messages
        self.expected_last = expected_last
        self.done = done


class _Stored(Exception):
    """An append that ended early: these sequences, then the cause."""

    def __init__(self, sequences: list[int], cause: Exception) -> None:
        super().__init__(str(cause))
        self.sequences = sequences
        self.cause = cause


class Publisher:
    """Appends to one stream over one connection, shared by its handles."""

    def __init__(
        self,
        window: Window,
        name: str,
        prefix: str,
        *,
        atomic: bool,
        prefer_atomic: bool,
        dedupe: bool,
        replicated: bool,
    ) -> None:
        self.window = window
        self.link = window.link
        self.name = name
        self.prefix = prefix
        """What the server's subjects have before ours."""
        self.atomic = atomic
        self.prefer_atomic = prefer_atomic
        self.dedupe = dedupe
        self.replicated = replicated
        self.askable = not replicated or self.link.version >= (2, 12)
        """A publish with an id can be refused without the server keeping the id."""
        self._id_header = ID if dedupe else QUIET_ID
        self._subjects: dict[str, bytes] = {}
        self._starts: dict[str, bytes] = {}
        self._jobs: deque[_Job] = deque()
        self._runner: asyncio.Task[None] | None = None

    async def append(self, messages: Sequence[Message], expected_last: int | None) -> list[int]:
        """Raises what the contract's append raises; `messages` were checked."""
        if expected_last is not None and not self.askable and self.dedupe and any(m.id for m in messages):
            raise Unavailable(
                f"stream {self.name} is replicated by a nats-server before 2.12, which keeps the id of a refused message: "
                "no `expected_last` for messages with ids", retryable=False, hint="nats-server 2.12 or newer",
            )  # fmt: skip
        if not self.prefer_atomic and (expected_last is None or len(messages) == 1):
            return await self._windowed(messages, expected_last)
        job = _Job(messages, expected_last, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        # not withdrawn when its caller is cancelled: others may be joined with it
        job.done.add_done_callback(_looked_at)
        return await asyncio.shield(job.done)

    async def finish(self) -> None:
        """Wait for what was accepted."""
        if self._runner is not None:
            await asyncio.gather(self._runner, return_exceptions=True)

    # --- building frames ---

    def _subject(self, subject: str) -> bytes:
        found = self._subjects.get(subject)
        if found is None:
            if len(self._subjects) > 4096:
                self._subjects.clear()
            found = self._subjects[subject] = f"{self.prefix}{subject}".encode()
        return found

    def _start(self, subject: str) -> bytes:
        """`HPUB <subject> <inbox>`, up to the number in the reply subject."""
        if len(self._starts) > 4096:
            self._starts.clear()
        found = self._starts[subject] = b"HPUB %b %b" % (self._subject(subject), self.window.prefix)
        return found

    def _frames(self, messages: Sequence[Message], last: int | None = None) -> tuple[list[tuple[bytes, bytes]], int]:
        """Per message what goes before and after the number in its reply subject; and their size. `last` is the
        condition of the first one, or of each in turn."""
        box = self.window.prefix
        most = self.link.max_payload
        out = []
        total = 0
        simple = self.dedupe and last is None and plain_ids([m.id for m in messages])
        starts = self._starts
        for at, m in enumerate(messages):
            if simple and not m.headers:
                data = m.data
                before = starts.get(m.subject) or self._start(m.subject)
                if not m.id:
                    before = before[1:]  # PUB
                    after = b" %d\r\n%b\r\n" % (len(data), data)
                else:
                    id = m.id.encode()
                    lead = _ID_HEAD + len(id)
                    after = b" %d %d\r\nNATS/1.0\r\nNats-Msg-Id: %b\r\n\r\n%b\r\n" % (lead, lead + len(data), id, data)
            else:
                lines, spilled = message_lines(m, self._id_header)
                if last is not None:
                    lines += b"Nats-Expected-Last-Sequence: %d\r\n" % (last + at)
                if not lines:
                    before = b"PUB %b %b" % (self._subject(m.subject), box)
                    after = b" %d\r\n%b\r\n" % (len(m.data), m.data)
                else:
                    head = b"NATS/1.0\r\n%b\r\n" % lines
                    size = len(head) + len(m.data) + len(spilled)
                    if size > most:
                        raise TooLarge(f"message {at} with its headers", size_bytes=size, size_bytes_max=most)
                    before = b"HPUB %b %b" % (self._subject(m.subject), box)
                    after = b" %d %d\r\n%b%b%b\r\n" % (len(head), size, head, m.data, spilled)
            total += len(before) + len(after)
            out.append((before, after))
        return out, total

    # --- the window ---

    async def _windowed(self, messages: Sequence[Message], last: int | None) -> list[int]:
        frames, size = self._frames(messages, last)
        segment = await self.window.publish(frames, size)
        if not segment.errors:
            return self._all(segment.sequences)
        first = min(segment.errors)
        cause = segment.errors[first]
        if last is not None and len(messages) == 1 and isinstance(cause, ApiError) and cause.err_code in WRONG_LAST:
            return await self._careful(messages, last, cause)
        if isinstance(cause, ApiError) and all(isinstance(e, ApiError) for e in segment.errors.values()):
            if not any(segment.sequences[first:]):
                return _ended(segment.sequences[:first], len(messages), self._error(cause), self.name)
            raise Ambiguous(
                f"stream {self.name}: {len(segment.errors)} of {len(messages)} messages were refused in the middle "
                f"({cause.description})", ids=[messages[i].id for i in sorted(segment.errors)],
            ) from cause  # fmt: skip
        unknown = [messages[i].id for i in sorted(segment.errors)]
        raise self._ambiguous(unknown, cause) from cause

    def _all(self, sequences: list[int]) -> list[int]:
        """A server before 2.11 acknowledges an id that is still in process with the sequence 0."""
        if 0 in sequences:
            raise Ambiguous(f"stream {self.name}: append: the server has an id of it in process")
        return sequences

    def _ambiguous(self, ids: Sequence[str], cause: Exception) -> Ambiguous:
        return Ambiguous(f"stream {self.name}: append: {cause}", ids=[i for i in ids if i])

    def _error(self, cause: ApiError) -> MistError:
        if cause.err_code in WRONG_LAST:
            return WrongSequence(expected=-1, last=_last_of(cause), stream=self.name)
        if cause.code == 503 and not cause.err_code:
            return NotFound(f"stream {self.name} was deleted")
        return translated(cause, f"stream {self.name}: append")

    # --- atomic batches ---

    async def _run(self) -> None:
        try:
            while self._jobs:
                jobs, seen, size = [self._jobs.popleft()], 0, 0
                seen, size = len(jobs[0].messages), _bytes(jobs[0].messages)
                while self._jobs and jobs[0].expected_last is None and self._jobs[0].expected_last is None:
                    more = self._jobs[0].messages
                    seen, size = seen + len(more), size + _bytes(more)
                    if seen > BATCH or size > BATCH_BYTES:
                        break
                    jobs.append(self._jobs.popleft())
                await self._store(jobs)
        finally:
            self._runner = None
            for job in self._jobs:
                if not job.done.done():
                    job.done.set_exception(Closed("the broker is closed"))
            self._jobs.clear()

    async def _store(self, jobs: list[_Job]) -> None:
        if len(jobs) > 1:
            messages = [m for job in jobs for m in job.messages]
            try:
                sequences = await self._once(messages, None)
            except ApiError:
                pass  # one of them, perhaps: each for itself
            except Exception as exc:
                for job in jobs:
                    job.done.set_exception(self._for(job, exc))
                return
            else:
                at = 0
                for job in jobs:
                    job.done.set_result(sequences[at : at + len(job.messages)])
                    at += len(job.messages)
                return
        for job in jobs:
            try:
                result = await self._whole(job.messages, job.expected_last)
            except Exception as exc:
                job.done.set_exception(self._for(job, exc))
            else:
                job.done.set_result(result)

    def _for(self, job: _Job, exc: Exception) -> Exception:
        if isinstance(exc, (Lost, TimeoutError)) and not isinstance(exc, MistError):
            error = self._ambiguous([m.id for m in job.messages], exc)
            error.__cause__ = exc
            return error
        return exc

    async def _whole(self, messages: Sequence[Message], last: int | None) -> list[int]:
        """One append, in as many batches as it takes."""
        out: list[int] = []
        start = 0
        while start < len(messages):
            end, size = start, 0
            while end < len(messages) and end - start < BATCH and (end == start or size < BATCH_BYTES):
                size += len(messages[end].data)
                end += 1
            part = messages[start:end]
            try:
                try:
                    if last is not None and len(part) > 1 and not self.atomic:
                        # a chain of conditions breaks at a known id: ask about them first
                        raise ApiError(400, DUPLICATE_IN_BATCH, "not asked yet")
                    got = await self._once(part, last)
                except ApiError as exc:
                    got = await self._careful(part, last, exc)
            except MistError as exc:
                return _ended(out, len(messages), exc, self.name)
            except (Lost, TimeoutError) as exc:
                raise self._ambiguous([m.id for m in messages[start:]], exc) from exc
            out += got
            start = end
            if last is not None:
                last = got[-1]
        return out

    async def _once(self, messages: Sequence[Message], last: int | None) -> list[int]:
        """All of them or none. Raises ApiError when refused, Lost and TimeoutError when unknown."""
        index: dict[str, int] = {}
        places: list[int] = []
        new: list[Message] = []
        for m in messages:
            at = index.get(m.id) if m.id and self.dedupe else None
            if at is None:
                at = len(new)
                new.append(m)
                if m.id:
                    index[m.id] = at
            places.append(at)
        sequences = await self._batch(new, last)
        return sequences if len(new) == len(messages) else [sequences[at] for at in places]

    async def _batch(self, messages: Sequence[Message], last: int | None) -> list[int]:
        if len(messages) == 1 or not self.atomic:
            frames, size = self._frames(messages, last)
            segment = await self.window.publish(frames, size)
            if segment.errors:
                first = min(segment.errors)
                if first:
                    raise _ended_error(
                        segment.sequences[:first], len(messages), self._error_of(segment.errors[first]), self.name
                    )
                raise segment.errors[first]
            return self._all(segment.sequences)
        until = asyncio.get_running_loop().time() + CALL_S
        batch = secrets.token_hex(8).encode()
        count = len(messages)

        def build(reply: bytes) -> bytes:
            out = []
            for at, m in enumerate(messages, 1):
                lines, spilled = message_lines(m, self._id_header)
                if last is not None and at == 1:
                    lines += b"Nats-Expected-Last-Sequence: %d\r\n" % last
                lines += b"Nats-Batch-Id: %b\r\nNats-Batch-Sequence: %d\r\n" % (batch, at)
                if at == count:
                    lines += b"Nats-Batch-Commit: 1\r\n"
                size = len(lines) + 12 + len(m.data) + len(spilled)
                if size > self.link.max_payload:
                    raise TooLarge(
                        f"message {at - 1} with its headers", size_bytes=size, size_bytes_max=self.link.max_payload
                    )
                data = m.data + spilled if spilled else m.data
                out.append(wire.hpub(self._subject(m.subject), lines, data, reply if at == count else b""))
            return b"".join(out)

        frame = await self.link.request(build, until)
        if not frame[3]:
            raise ApiError(wire.status(frame[2]), 0, wire.status_text(frame[2]))
        ack = ack_of(frame[3])
        if ack.error is not None:
            raise ApiError(ack.error.code, ack.error.err_code, ack.error.description)
        return list(range(ack.seq - count + 1, ack.seq + 1))

    def _error_of(self, cause: Exception) -> MistError:
        if isinstance(cause, ApiError):
            return self._error(cause)
        return self._ambiguous((), cause)

    # --- after a refusal ---

    async def _careful(self, messages: Sequence[Message], last: int | None, refusal: ApiError) -> list[int]:
        """Known ids first, then the condition, then the rest. Raises Lost and TimeoutError when unknown."""
        out = [0] * len(messages)
        for _ in range(LOOKS):
            if (
                refusal.err_code != DUPLICATE_IN_BATCH
                and refusal.err_code not in WRONG_LAST
                and not self._full(refusal)
            ):
                raise self._error(refusal) from refusal
            places = [i for i, s in enumerate(out) if not s]
            asked = [i for i in places if messages[i].id and self.dedupe and self.askable]
            if asked:
                for i, sequence in zip(asked, await self._known([messages[i].id for i in asked]), strict=True):
                    out[i] = sequence
            missing = [i for i in places if not out[i]]
            if not missing:
                return out
            if refusal.err_code in WRONG_LAST:
                raise WrongSequence(expected=last or 0, last=_last_of(refusal), stream=self.name) from refusal
            if len(missing) == len(messages) and self._full(refusal):
                raise self._error(refusal) from refusal
            try:
                got = await self._once([messages[i] for i in missing], last)
            except ApiError as exc:
                if self._full(exc) and self._full(refusal):
                    raise self._error(exc) from exc
                refusal = exc
                continue
            for i, sequence in zip(missing, got, strict=True):
                out[i] = sequence
            return out
        raise Unavailable(f"stream {self.name}: other writers stored ids of this append {LOOKS} times meanwhile")

    def _full(self, exc: ApiError) -> bool:
        return isinstance(self._error(exc), StorageFull)

    async def _known(self, ids: Sequence[str]) -> list[int]:
        """The sequence of each id, 0 where it is new: asked by a publish whose condition cannot hold."""
        if self.replicated:
            never, refused = b"Nats-Expected-Last-Sequence: %d\r\n" % _NEVER, WRONG_LAST
        else:
            never, refused = b"Nats-Expected-Last-Msg-Id: %b\r\n" % secrets.token_hex(16).encode(), WRONG_LAST_ID
        out: list[int] = []
        subject = self._subject("mist.probe") if self.prefix else next(iter(self._subjects.values()))
        for start in range(0, len(ids), WINDOW):
            frames = []
            for id in ids[start : start + WINDOW]:
                lines, _ = message_lines(Message("x", b"", id), ID)
                lines += never
                head = len(lines) + 12
                frames.append(
                    (
                        b"HPUB %b %b" % (subject, self.window.prefix),
                        b" %d %d\r\nNATS/1.0\r\n%b\r\n\r\n" % (head, head, lines),
                    )
                )
            segment = await self.window.publish(frames, 256 * len(frames))
            for cause in segment.errors.values():
                if not isinstance(cause, ApiError):
                    raise cause
                if cause.err_code not in refused:
                    raise self._error(cause) from cause
            out += segment.sequences
        return out


def _last_of(cause: ApiError) -> int:
    """The stream's last sequence, out of `wrong last sequence: 7`."""
    digits = cause.description.rpartition(": ")[2]
    return int(digits) if digits.isdigit() else -1


def _looked_at(done: asyncio.Future[list[int]]) -> None:
    if not done.cancelled():
        done.exception()  # its caller may have been cancelled: then nobody else asks


def _bytes(messages: Sequence[Message]) -> int:
    return sum(map(len, [m.data for m in messages]))


def _ended_error(sequences: list[int], total: int, cause: MistError, stream: str) -> MistError:
    if isinstance(cause, Ambiguous) or not sequences:
        return cause
    error = PartialAppend(sequences, total=total, stream=stream)
    error.__cause__ = cause
    return error


def _ended(sequences: list[int], total: int, cause: MistError, stream: str) -> list[int]:
    """A prefix was stored: say how far. Nothing: the cause itself."""
    if isinstance(cause, PartialAppend):
        sequences = [*sequences, *cause.sequences]
        raise PartialAppend(sequences, total=total, stream=stream) from cause.__cause__
    raise _ended_error(sequences, total, cause, stream)
