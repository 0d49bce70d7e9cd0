"""A durable pull consumer through the contract: fetch, settle, seek, and dead letters after the last attempt.

The server keeps who was given what and how often, without a limit of deliveries; the limit is ours: a record that comes
once more than `attempts_max` is buried and acked instead of handed out, which also covers a crash between the last nak
and its burial. Everything that comes goes into one buffer per consumer and connection first, so that a fetch that is
cancelled, or that buries for a while, loses nothing. Acks of one loop turn leave in one write and are confirmed by one
request: the server takes them in order, so the confirmation of the last is that of all.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Collection, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import msgspec

from mist.broker.base import (
    ALL,
    BYTES_MAX,
    Consumer,
    ConsumerConfig,
    ConsumerInfo,
    Delivery,
    Pending,
    Record,
    check_delay,
    check_position,
    check_read,
)
from mist.broker.deadletter import EXHAUSTED, bury, dead_letter
from mist.errors import Closed, Conflict, CursorAhead, InvalidArgument, NotFound, TimedOut, Unavailable, Unsupported
from mist.protocol.subject import check_name, dead_stream
from mist_nats import api as js
from mist_nats import wire
from mist_nats.api import ApiError, translated
from mist_nats.direct import Request, get
from mist_nats.headers import plain_headers, read_header
from mist_nats.leases import Leases, leases_of
from mist_nats.link import CALL_S, Inbox, Lost
from mist_nats.names import META_CONFIG, META_IDENTITY
from mist_nats.wire import Frame

if TYPE_CHECKING:
    from mist_nats.stream import NatsStream, Shared

FETCH_MAX = 4096
"""Deliveries of one fetch."""
AHEAD_MIN = 256
AHEAD_AFTER = 3
"""Reading ahead begins after this many full fetches in a row, of at least AHEAD_MIN deliveries each."""
IDLE_S = 1.0
"""What was read ahead and is not fetched goes back to the server after this, or a quarter of the ack wait."""
ATTEMPTS_MAX = 2**62
EXPIRES_S = 25.0
"""A waiting request is made anew after this."""
BEAT_S = 5.0
MISSED_S = 12.0
QUIET_S = 0.25
"""How long a fetch that does not wait gives the server to say that there is nothing (it says nothing when the
consumer's pending_max is reached)."""
TRY_S = 1.0
"""When acks without a confirmation are sent again."""
GRACE_S = 0.005
"""How long a fetch that has something waits for the end of its answer."""
ACK, NAK, TERM, PROGRESS = b"+ACK", b"-NAK", b"+TERM", b"+WPI"
DELAY_S_MAX = 4e9
"""More than a hundred years; the server counts nanoseconds in 63 bits."""
TICK_S_MAX = 0.5
"""How often it is noted that the loop runs, at most a twentieth of the ack wait."""
GONE_S = 1.0
"""How long a consumer may be missing while another process makes it anew at another position (servers before 2.14)."""


class _Pull:
    """One request for deliveries."""

    __slots__ = ("ahead", "beats", "box", "done", "ended", "got", "heard", "wanted")

    def __init__(self, box: Inbox, wanted: int, done: asyncio.Future[None], now: float) -> None:
        self.box = box
        self.wanted = wanted
        self.got = 0
        self.done = done
        self.ended = ""
        self.heard = now
        self.ahead = False
        self.beats = False


class Deliveries:
    """What one connection knows of one consumer; shared by its handles."""

    def __init__(self, shared: Shared, name: str, identity: str, config: ConsumerConfig) -> None:
        self.shared = shared
        self.api = shared.api
        self.link = shared.api.link
        self.name = name
        self.identity = identity
        self.config = config
        self.leases: Leases = leases_of(f"{shared.incarnation}/{name}/{identity}")
        self.buffer: deque[tuple[Delivery, float]] = deque()
        """What came and is nobody's yet, each with the monotonic time from which on it may have been under way: see
        `_tick`."""
        self.spent = False
        """Whether something in the buffer came once too often."""
        self.streak = 0
        self.ahead: _Pull | None = None
        self.deleted = False
        self.doubt = self.link.generation
        """As Shared.doubt."""
        self._newest = 0
        self._reset_seen = False
        self._pulls: set[_Pull] = set()
        self._loop = asyncio.get_running_loop()
        self._acks: list[tuple[bytes, list[str]]] = []
        self._confirm: asyncio.Future[bool] | None = None
        self.subject = self.api.subject(f"CONSUMER.MSG.NEXT.{shared.raw}.{name}")
        self._aging: asyncio.TimerHandle | None = None
        self._ticking: asyncio.TimerHandle | None = None
        self._alive = self._ticked = 0.0
        self.link.on_lost.append(self.suspect)

    # --- life ---

    def forget(self, sequences: Collection[int]) -> None:
        """These records were erased."""
        kept = [e for e in self.buffer if e[0].record.sequence not in sequences]
        self.buffer.clear()
        self.buffer.extend(kept)
        self.leases.drop(sequences)
        self.wake()

    def suspect(self) -> None:
        """Something may have happened to the consumer: look before the next call, and let waiting ones look now."""
        self.doubt = 0
        for pull in list(self._pulls):
            _settle(pull.done)

    def gone(self) -> None:
        self.deleted = True
        if self.suspect in self.link.on_lost:
            self.link.on_lost.remove(self.suspect)
        self.suspect()

    # --- receiving ---

    def arrived(self, frames: list[Frame], pull: _Pull | None) -> None:
        received = self._alive
        leases, subjects, append = self.leases, self.shared.subjects, self.buffer.append
        epoch, most = leases.epoch, self.config.attempts_max or ATTEMPTS_MAX
        newest, count = self._newest, 0
        first = wire.deliveries(leases.prefix.encode(), newest, frames) if leases.prefix else None
        if first is not None and (ids := plain_headers([f[2] for f in frames])) is not None:
            # the usual run: first deliveries of records with an id and nothing else, taken by column
            sequences, times, tails, newest = first
            records = map(Record, sequences, map(subjects, [f[0] for f in frames]), [f[3] for f in frames], times, ids)
            self.buffer.extend(
                zip(map(Delivery, records, repeat(1), map(epoch.__add__, tails)), repeat(received), strict=False)
            )
            count, frames = len(frames), []
        for raw, reply, header, data in frames:
            at = wire.delivery(reply)
            if at is None:
                self._said(header, pull)
                continue
            prefix, tail, tried, sequence_, number_, time_ns = at.groups()
            number, sequence, attempt = int(number_), int(sequence_), int(tried)
            if number <= newest:
                self._was_reset()
                epoch = leases.epoch
            newest = number
            if header:
                id, headers, data = read_header(header, data)
            else:
                id, headers = "", ()
            record = Record(sequence, subjects(raw), data, int(time_ns), id, headers)
            append((Delivery(record, attempt, epoch + tail.decode()), received))
            count += 1
            if attempt > 1:
                leases.returned.pop(sequence, None)
                if attempt > most:
                    self.spent = True
            if not leases.prefix:
                leases.prefix = prefix.decode()
        self._newest = newest
        if not count:
            return
        self._age_later()
        if pull is None:
            self.wake()
            return
        pull.got += count
        pull.heard = self._loop.time()
        if pull.got >= pull.wanted:
            pull.ended = "full"
            _settle(pull.done)
        elif not pull.ended and not pull.ahead and not pull.done.done():
            self._loop.call_later(GRACE_S, _settle, pull.done)

    def _said(self, header: bytes, pull: _Pull | None) -> None:
        code = wire.status(header)
        if pull is None:
            return
        pull.heard = self._loop.time()
        if code in (0, 100) or b"Batch Completed" in header:
            return
        text = wire.status_text(header)
        pull.ended = text
        if code == 503 or (code == 409 and "MaxBytes" not in text):
            self.doubt = 0
        _settle(pull.done)

    def _age_later(self) -> None:
        if self._aging is None:
            self._aging = self._loop.call_later(self._idle_s(), self._age)

    def _idle_s(self) -> float:
        return min(IDLE_S, self.config.ack_wait_s / 4)

    def _age(self) -> None:
        """Give back what nobody fetched for a while: another worker may want it."""
        self._aging = None
        if not self.buffer or self.deleted or not self.link.connected:
            return
        if time.monotonic() - self.buffer[-1][1] < self._idle_s():
            self._age_later()
            return
        cut = len(self.leases.epoch)
        tails = [d.token[cut:] for d, _ in self.buffer]
        self.buffer.clear()
        self.spent = False
        self.streak = 0
        self.link.send(wire.settle(self.leases.prefix, tails, NAK))

    def _running(self) -> None:
        """A request goes out: note from now on that the loop runs."""
        if self._ticking is None:
            self._alive = self._ticked = time.monotonic()
            self._ticking = self._loop.call_later(self._tick_s(), self._tick)

    def _tick_s(self) -> float:
        return min(TICK_S_MAX, self.config.ack_wait_s / 20)

    def _tick(self) -> None:
        """A process that was stopped for longer than the ack wait finds deliveries in its socket that are no longer
        its own. So what arrives counts from the tick before the last one: then everything sent earlier had been read."""
        self._alive, self._ticked = self._ticked, time.monotonic()
        self._ticking = self._loop.call_later(self._tick_s(), self._tick) if self._pulls else None

    def read_ahead(self, limit: int, bytes_max: int) -> None:
        """Ask for the next page while this one is worked on: only for a reader who took several full ones in a row."""
        if self.ahead is not None or not self.link.connected:
            return
        pull = _Pull(self.link.inbox(), limit, self._loop.create_future(), self._loop.time())
        pull.ahead = True
        pull.box.handler = lambda frames: self.arrived(frames, pull)
        self.ahead = pull
        self._pulls.add(pull)
        self._running()
        timer = self._loop.call_later(QUIET_S, _settle, pull.done)

        def ended(_: object) -> None:
            timer.cancel()
            self._pulls.discard(pull)
            self.ahead = None
            self._end(pull)

        pull.done.add_done_callback(ended)
        request = {"batch": limit, "no_wait": True, "max_bytes": bytes_max}
        self.link.send(wire.pub(self.subject, msgspec.json.encode(request), pull.box.subject))
        self.link.flush()  # now: the caller works before this loop turns again, and the server meanwhile

    def _end(self, pull: _Pull) -> None:
        if pull.ended and not (pull.beats and pull.ended == "full"):  # then a 409 Batch Completed follows
            self.link.release(pull.box)
        else:
            # The server drops a request whose inbox nobody listens on. What it sent before still comes.
            self.link.drop(pull.box, lambda frames: self.arrived(frames, None))

    def _was_reset(self) -> None:
        """The consumer's numbers began again: somebody made it seek."""
        self._reset_seen = True
        self.buffer.clear()
        self.leases.forget()

    async def pull(self, limit: int, bytes_max: int, until: float) -> str:
        """Ask once, and wait until something is in the buffer, the answer has ended, or it is loop time `until`.
        Returns how it ended. Raises Unavailable, Closed."""
        loop, link = self._loop, self.link
        await link.ready(max(until, loop.time() + CALL_S))
        now = loop.time()
        wait_s = min(until - now, EXPIRES_S)
        waits = wait_s > 0
        request: dict[str, object] = {"batch": limit, "no_wait": True}
        if bytes_max > 0:
            request["max_bytes"] = bytes_max
        if waits:
            request["expires"] = max(int(wait_s * 1e9), 1_000_000)
            if wait_s >= 2 * BEAT_S + 1:
                request["idle_heartbeat"] = int(BEAT_S * 1e9)
        pull = _Pull(link.inbox(), limit, loop.create_future(), now)
        pull.box.handler = lambda frames: self.arrived(frames, pull)
        self._pulls.add(pull)
        self._running()
        ends = now + (wait_s + QUIET_S if waits else QUIET_S)
        timer = loop.call_at(ends, _settle, pull.done)
        pull.beats = "idle_heartbeat" in request
        beat = loop.call_later(MISSED_S, self._listen, pull) if pull.beats else None
        link.send(wire.pub(self.subject, msgspec.json.encode(request), pull.box.subject))
        try:
            await pull.done
        finally:
            timer.cancel()
            if beat is not None:
                beat.cancel()
            self._pulls.discard(pull)
            self._end(pull)
        return pull.ended

    def _listen(self, pull: _Pull) -> None:
        """A request that hears no heartbeat is dead: its server went away without a word."""
        if pull.done.done():
            return
        if self._loop.time() - pull.heard > MISSED_S:
            _settle(pull.done)
        else:
            self._loop.call_later(BEAT_S, self._listen, pull)

    def wake(self) -> None:
        for pull in list(self._pulls):
            _settle(pull.done)

    # --- settling ---

    async def settle(self, tails: list[str], what: bytes) -> bool:
        """Send and have it confirmed, with everything else of this loop turn. False: the server forgot that it gave
        them, they come again. Raises Unavailable, TimedOut, Closed, NotFound."""
        if not tails:
            return True
        self._acks.append((what, tails))
        if self._confirm is None:
            self._confirm = self._loop.create_future()
            task = asyncio.ensure_future(self._flush(self._confirm))
            task.add_done_callback(_seen)
        return await asyncio.shield(self._confirm)

    async def _flush(self, confirm: asyncio.Future[bool]) -> None:
        confirm.add_done_callback(_seen)
        await asyncio.sleep(0)
        acks, self._acks, self._confirm = self._acks, [], None
        try:
            known = await self._deliver(acks)
        except BaseException as exc:
            if not confirm.done():
                confirm.set_exception(exc)
        else:
            if not confirm.done():
                confirm.set_result(known)

    async def _unknown(self, number: int) -> bool:
        """Whether the server does not know of the delivery of that number any more: it was killed before it had
        written it down, and gives the record again. It answers no ack of such a delivery."""
        try:
            info = await self.api.call(f"CONSUMER.INFO.{self.shared.raw}.{self.name}", type=js.ConsumerInfo)
        except (ApiError, Unavailable, TimedOut):
            return False  # not now: the next try tells
        if info.delivered.consumer_seq >= number:
            return False
        self._was_reset()
        self._newest = info.delivered.consumer_seq
        return True

    async def _deliver(self, acks: list[tuple[bytes, list[str]]]) -> bool:
        prefix = self.leases.prefix
        what, tails = acks[-1]
        last = tails[-1]
        body = b"".join([wire.settle(prefix, t, w) for w, t in acks[:-1]]) + wire.settle(prefix, tails[:-1], what)
        end = (prefix + last).encode()
        until = self._loop.time() + CALL_S
        while True:
            now = self._loop.time()
            try:
                frame = await self.link.request(
                    lambda reply: body + wire.pub(end, what, reply), min(until, now + TRY_S)
                )
            except Lost as exc:
                if self.link.closed:
                    raise Closed("the broker is closed") from exc
                continue  # acks may be repeated: the second one settles nothing
            except TimeoutError as exc:
                if await self._unknown(int(last.split(".")[2])):
                    return False
                if now + TRY_S < until:
                    continue  # a server that has just started may have dropped it
                raise TimedOut(f"consumer {self.name}: no confirmation within {CALL_S:g} s") from exc
            if not wire.status(frame[2]):
                return True
            # nobody there: the consumer has no leader for a moment, or it is gone
            try:
                await self.api.call(f"CONSUMER.INFO.{self.shared.raw}.{self.name}", type=js.ConsumerInfo)
            except ApiError as exc:
                self.suspect()
                raise NotFound(f"consumer {self.name} was deleted") from exc
            if now + TRY_S >= until:
                raise Unavailable(f"consumer {self.name}: the server takes no acks of it")
            await asyncio.sleep(0.1)


def _settle(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _seen(done: asyncio.Future[Any]) -> None:
    if not done.cancelled():
        done.exception()


class NatsConsumer(Consumer):
    def __init__(self, stream: NatsStream, state: Deliveries) -> None:
        self.name = state.name
        self.stream = stream.name
        self.config = state.config
        self._stream = stream
        self._state = state
        self._api = state.api

    # --- whether it is still there ---

    def _open(self) -> None:
        self._stream._open()
        if self._state.deleted:
            raise NotFound(f"consumer {self.name} of stream {self.stream} was deleted")

    async def check(self) -> None:
        self._open()
        if self._stream.shared.doubt != self._api.link.generation:
            await self._stream.check()
        if self._state.doubt != self._api.link.generation:
            await self._look()

    async def _look(self) -> js.ConsumerInfo:
        """CONSUMER.INFO, when it is still this consumer."""
        loop = asyncio.get_running_loop()
        until = loop.time() + GONE_S
        while True:
            generation = self._api.link.generation
            try:
                info = await self._api.call(
                    f"CONSUMER.INFO.{self._stream.shared.raw}.{self.name}", type=js.ConsumerInfo
                )
            except ApiError as exc:
                self._open()
                if exc.err_code not in (js.CONSUMER_NOT_FOUND, js.STREAM_NOT_FOUND):
                    raise translated(exc, f"consumer {self.name} of stream {self.stream}") from exc
                if exc.err_code == js.CONSUMER_NOT_FOUND and loop.time() < until:
                    await asyncio.sleep(0.05)
                    continue
                await self._stream.state()
                self._state.gone()
                raise NotFound(f"consumer {self.name} of stream {self.stream} was deleted") from exc
            self._open()
            if identity_of(info) != self._state.identity:
                self._state.gone()
                raise NotFound(f"consumer {self.name} of stream {self.stream} was deleted and made again")
            self._state.doubt = generation
            return info

    # --- fetch ---

    async def fetch(self, *, limit: int = 256, bytes_max: int = BYTES_MAX, wait_s: float = 0.0) -> list[Delivery]:
        check_read(limit=limit, bytes_max=bytes_max, wait_s=wait_s)
        limit, bytes_max = min(limit, FETCH_MAX), min(bytes_max, BYTES_MAX)
        state = self._state
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        alone = False
        while True:
            self._open()
            if state.doubt != self._api.link.generation:
                await self.check()
            if not state.buffer and state.ahead is not None:
                await asyncio.shield(state.ahead.done)
            if state.buffer:
                if state.spent:
                    await self._bury_spent()
                out = self._take(limit, bytes_max)
                if out:
                    state.streak = state.streak + 1 if len(out) == limit >= AHEAD_MIN else 0
                    if state.streak >= AHEAD_AFTER and len(state.buffer) < limit:
                        state.read_ahead(limit, bytes_max)
                    return out
            state.streak = 0 if not state.ahead and state.streak < AHEAD_AFTER else state.streak
            ended = await state.pull(1 if alone else limit, 0 if alone else bytes_max, until)
            alone = "MaxBytes" in ended  # a record larger than the bound comes by itself
            if not state.buffer and not alone and loop.time() >= until:
                self._open()
                return []

    def _take(self, limit: int, bytes_max: int) -> list[Delivery]:
        """Out of the buffer, as the caller's."""
        state = self._state
        buffer, leases = state.buffer, state.leases
        now = time.monotonic()
        wait_s = self.config.ack_wait_s
        while buffer and now - buffer[0][1] > wait_s * 0.75:
            buffer.popleft()  # the server gives it again any moment
        count, size = 0, 0
        for d, _ in buffer:
            size += len(d.record.data)
            if count == limit or (count and size > bytes_max):
                break
            count += 1
        if not count:
            return []
        oldest = buffer[0][1]
        out = [buffer.popleft()[0] for _ in range(count)]
        if not out[0].token.startswith(leases.epoch):
            return []  # another connection of this process made the consumer seek: the server gives anew
        leases.give([d.record.sequence for d in out], [d.token for d in out], wait_s, oldest)
        if now - oldest > wait_s * 0.25:
            # it lay here for a while: its owner gets a whole ack wait nevertheless
            state.link.send(wire.settle(leases.prefix, self._tails(out), PROGRESS))
            state.link.flush()  # now: the caller may work for long before this loop turns again
            leases.renew(out, wait_s)
        return out

    async def _bury_spent(self) -> None:
        """What came once too often is a dead letter; it stays in the buffer until it is one."""
        most = self.config.attempts_max
        state = self._state
        spent = [d for d, _ in state.buffer if most and d.attempt > most]
        if spent:
            rows = [(d.record, d.attempt - 1, t) for d, t in zip(spent, self._tails(spent), strict=True)]
            await self._bury(rows, EXHAUSTED)
            gone = {id(d) for d in spent}
            kept = [e for e in state.buffer if id(e[0]) not in gone]
            state.buffer.clear()
            state.buffer.extend(kept)
        state.spent = any(most and d.attempt > most for d, _ in state.buffer)

    async def _bury(self, dead: Sequence[tuple[Record, int, str]], reason: str) -> None:
        """Dead letters first, then the acks: a crash in between makes a second letter with the same id, never none."""
        if not dead:
            return
        letters = [
            dead_letter(
                record, stream=self.stream, incarnation=self._stream.incarnation, consumer=self.name,
                attempts=attempt, reason=reason,
            )
            for record, attempt, _ in dead
        ]  # fmt: skip
        await bury(self._stream._broker, letters, stream=self.stream)
        await self._state.settle([tail for _, _, tail in dead], TERM)

    # --- settle ---

    def _tails(self, deliveries: Sequence[Delivery]) -> list[str]:
        cut = len(self._state.leases.epoch)
        return [d.token[cut:] for d in deliveries]

    async def ack(self, deliveries: Sequence[Delivery]) -> int:
        await self.check()
        ours = self._state.leases.take(deliveries)
        return len(ours) if await self._state.settle(self._tails(ours), ACK) else 0

    async def nak(self, deliveries: Sequence[Delivery], *, delay_s: float = 0.0) -> int:
        check_delay(delay_s)
        await self.check()
        ours = self._state.leases.take(deliveries)
        most = self.config.attempts_max
        spent = [d for d in ours if most and d.attempt >= most]
        again = [d for d in ours if not (most and d.attempt >= most)]
        what = b'-NAK {"delay": %d}' % int(min(delay_s, DELAY_S_MAX) * 1e9) if delay_s > 0 else NAK
        if what is NAK:
            self._state.leases.returned |= {
                d.record.sequence: t for d, t in zip(again, self._tails(again), strict=True)
            }
        await self._state.settle(self._tails(again), what)
        await self._bury([(d.record, d.attempt, t) for d, t in zip(spent, self._tails(spent), strict=True)], EXHAUSTED)
        return len(ours)

    async def term(self, deliveries: Sequence[Delivery], *, reason: str = "") -> int:
        await self.check()
        ours = self._state.leases.take(deliveries)
        await self._bury([(d.record, d.attempt, t) for d, t in zip(ours, self._tails(ours), strict=True)], reason)
        return len(ours)

    async def extend(self, deliveries: Sequence[Delivery]) -> int:
        await self.check()
        ours = self._state.leases.renew(deliveries, self.config.ack_wait_s)
        return len(ours) if await self._state.settle(self._tails(ours), PROGRESS) else 0

    # --- figures and positions ---

    async def info(self) -> ConsumerInfo:
        await self.check()
        stream = await self._stream.state()
        info = await self._look()
        kept = stream.state.first_seq if stream.state.messages else stream.state.last_seq + 1
        delivered = max(info.delivered.stream_seq, kept - 1)
        if not info.num_pending:
            delivered = max(delivered, stream.state.last_seq)
        floor = max(info.ack_floor.stream_seq, kept - 1)
        if not info.num_ack_pending:
            floor = max(floor, delivered)
        lag_s = 0.0
        if info.num_pending:
            oldest = await self._oldest(info.delivered.stream_seq)
            if oldest:
                lag_s = max(0.0, (self._stream._broker.clock.time_ns() - oldest) / 1e9)
        return ConsumerInfo(
            name=self.name, stream=self.stream, floor=floor, delivered=delivered, pending=info.num_ack_pending,
            redelivered=info.num_redelivered, lag=info.num_pending + info.num_ack_pending, lag_s=lag_s,
            config=self.config,
        )  # fmt: skip

    async def _oldest(self, after: int) -> int:
        """The time of the first undelivered record, 0 when it went meanwhile."""
        shared = self._stream.shared
        times = []
        for pattern in shared.filters(self.config.subjects):
            if not shared.info.config.allow_direct:
                got = await self._stream._message(after + 1)
                times += [got[1]] if got else []
                break
            batch = await get(
                self._api, shared.raw, Request(seq=after + 1, next_by_subj=pattern), shared.subjects,
                asyncio.get_running_loop().time() + CALL_S,
            )  # fmt: skip
            times += [r.timestamp_ns for r in batch.records]
        return min(times, default=0)

    async def pending(self, *, limit: int = 1000) -> list[Pending]:
        self._open()
        raise Unsupported("pending", self._stream._broker.backend)

    async def seek(self, after: int) -> None:
        self._open()
        check_position(after)
        await self.check()
        info = await self._stream.state()
        last = info.state.last_seq
        if after > last:
            raise CursorAhead(after=after, last=last, stream=self.stream)
        first = info.state.first_seq if info.state.messages else last + 1
        start = max(after + 1, first)
        state = self._state
        state._reset_seen = False
        state.buffer.clear()
        state.leases.forget()
        if self._api.link.version < (2, 14) or not await self._reset(start):
            await self._make_again(start)
        if not state._reset_seen:  # else what came since is from behind the seek already
            state.buffer.clear()
            state.leases.forget()
            state._newest = 0
        state.wake()

    async def _reset(self, start: int) -> bool:
        try:
            await self._api.call(f"CONSUMER.RESET.{self._stream.shared.raw}.{self.name}", {"seq": start})
        except ApiError as exc:
            if exc.err_code == js.RESET_BELOW_START:
                return False
            raise translated(exc, f"consumer {self.name}: seek") from exc
        return True

    async def _make_again(self, start: int) -> None:
        """Delete and create under the same identity: handles of other processes look and go on."""
        raw = self._stream.shared.raw
        body = body_of(self.name, self.config, self._state.identity, self._stream, start)
        try:
            await self._api.call(f"CONSUMER.DELETE.{raw}.{self.name}")
            await self._api.call(f"CONSUMER.CREATE.{raw}.{self.name}", {"stream_name": raw, "config": body})
        except ApiError as exc:
            raise translated(exc, f"consumer {self.name}: seek") from exc

    async def delete(self) -> None:
        self._stream._open()
        if self._state.deleted:
            return
        try:
            await self._look()
            await self._api.call(f"CONSUMER.DELETE.{self._stream.shared.raw}.{self.name}")
        except NotFound:
            self._stream._open()
        except ApiError as exc:
            if exc.err_code not in (js.CONSUMER_NOT_FOUND, js.STREAM_NOT_FOUND):
                raise translated(exc, f"consumer {self.name}: deleting it") from exc
        self._state.gone()


def identity_of(info: js.ConsumerInfo) -> str:
    """Ours are given one; others are known by when they were made."""
    return info.config.metadata.get(META_IDENTITY) or _described(info).get(META_IDENTITY) or info.created


def _described(info: js.ConsumerInfo) -> dict[str, str]:
    try:
        return msgspec.json.decode(info.config.description, type=dict[str, str])
    except msgspec.MsgspecError:
        return {}


def config_of(info: js.ConsumerInfo, shared: Shared) -> ConsumerConfig:
    """The configuration it was made with. Raises InvalidArgument for a consumer that is not ours and not like ours."""
    meta = info.config.metadata if META_CONFIG in info.config.metadata else _described(info)
    c = info.config
    if META_CONFIG in meta:
        return msgspec.json.decode(meta[META_CONFIG], type=ConsumerConfig)
    if c.deliver_subject or c.ack_policy != "explicit":
        raise InvalidArgument(
            f"consumer {info.name} was made by others: {'push' if c.deliver_subject else 'ack ' + c.ack_policy}",
            hint="only pull consumers with explicit acks can be fetched from",
        )
    filters = c.filter_subjects or ([c.filter_subject] if c.filter_subject else list(ALL))
    cut = len(shared.prefix)
    return ConsumerConfig(
        after=max(c.opt_start_seq - 1, 0),
        subjects=tuple(f[cut:] if f.startswith(shared.prefix) else f for f in filters),
        ack_wait_s=c.ack_wait / 1e9,
        attempts_max=max(c.max_deliver, 0),
        pending_max=c.max_ack_pending if c.max_ack_pending > 0 else 2**31,
    )


def body_of(name: str, config: ConsumerConfig, identity: str, stream: NatsStream, start: int) -> dict[str, object]:
    """The server's configuration for ours. `start` is the first sequence, 0 or 1 for all."""
    shared = stream.shared
    meta = {META_IDENTITY: identity, META_CONFIG: msgspec.json.encode(config).decode()}
    body: dict[str, object] = {
        "name": name, "durable_name": name, "ack_policy": "explicit", "ack_wait": max(int(min(config.ack_wait_s, DELAY_S_MAX) * 1e9), 1),
        "max_deliver": -1, "max_ack_pending": min(config.pending_max, 2**31), "replay_policy": "instant",
    }  # fmt: skip
    if start > 1:
        body |= {"deliver_policy": "by_start_sequence", "opt_start_seq": start}
    else:
        body["deliver_policy"] = "all"
    filters = shared.filters(config.subjects)
    if ">" in config.subjects:
        filters = ()
    if len(filters) == 1:
        body["filter_subject"] = filters[0]
    elif filters:
        if stream._api.link.version < (2, 10):
            raise Unsupported("consumers with several filters (the server is older than 2.10)", "nats")
        body["filter_subjects"] = _disjoint(filters)
    if stream._api.link.version >= (2, 10):
        body["metadata"] = meta
    else:
        body["description"] = msgspec.json.encode(meta).decode()
    return body


def _disjoint(filters: Sequence[str]) -> list[str]:
    """Without those that another one covers: the server refuses filters that overlap."""
    return [f for f in dict.fromkeys(filters) if not any(g != f and _covers(g, f) for g in filters)]


def _covers(wide: str, narrow: str) -> bool:
    """Whether every subject of `narrow` is one of `wide`."""
    a, b = wide.split("."), narrow.split(".")
    for at, token in enumerate(a):
        if token == ">":
            return len(b) > at
        if at >= len(b) or b[at] == ">" or (token != "*" and token != b[at]):
            return False
    return len(a) == len(b)


async def open_consumer(stream: NatsStream, name: str, config: ConsumerConfig | None, *, create: bool) -> NatsConsumer:
    """The contract's `consumer`."""
    check_name(name)
    dead_stream(stream.name)  # a record must have somewhere to go
    if config is not None:
        config.validate()
    shared, broker, api = stream.shared, stream._broker, stream._api
    info: js.ConsumerInfo | None = None
    try:
        info = await api.call(f"CONSUMER.INFO.{shared.raw}.{name}", type=js.ConsumerInfo)
    except ApiError as exc:
        if exc.err_code == js.STREAM_NOT_FOUND:
            await stream.state()
        if exc.err_code != js.CONSUMER_NOT_FOUND:
            raise translated(exc, f"consumer {name} of stream {stream.name}") from exc
    if info is None:
        if not create:
            raise NotFound(f"stream {stream.name} has no consumer {name}")
        info = await _create(stream, name, config or ConsumerConfig())
    found = config_of(info, shared)
    if config is not None and config != found:
        raise Conflict(f"consumer {name} of stream {stream.name} exists with another configuration")
    identity = identity_of(info)
    key = (shared.raw, shared.incarnation, name)
    state = broker.deliveries.get(key)
    if state is None or state.deleted or state.identity != identity:
        if state is not None and not state.deleted:
            state.gone()
        state = broker.deliveries[key] = Deliveries(shared, name, identity, found)
    stream._open()
    return NatsConsumer(stream, state)


async def _create(stream: NatsStream, name: str, config: ConsumerConfig) -> js.ConsumerInfo:
    shared, api = stream.shared, stream._api
    last = (await stream.state()).state.last_seq
    if config.after > last:
        raise CursorAhead(after=config.after, last=last, stream=stream.name)
    body = body_of(name, config, secrets.token_hex(8), stream, config.after + 1)
    request: dict[str, object] = {"stream_name": shared.raw, "config": body}
    if api.link.version >= (2, 10):
        request["action"] = "create"
    try:
        return await api.call(f"CONSUMER.CREATE.{shared.raw}.{name}", request, js.ConsumerInfo)
    except ApiError as exc:
        if exc.err_code in js.CONSUMER_EXISTS:  # somebody else was faster
            return await api.call(f"CONSUMER.INFO.{shared.raw}.{name}", type=js.ConsumerInfo)
        raise translated(exc, f"consumer {name} of stream {stream.name}: making it") from exc
