"""A JetStream stream through the contract: append, read, positions, trim, consumers.

Reads are direct gets: records come from the first look, and what a gap in front of them means is decided by the
stream's state, asked afterwards (a trim between the two is then seen). One filter on a stream of one server is given to
the server; with several filters, or where replicas may answer from behind, records are read unfiltered and filtered
here, because only an unbroken run of sequences proves that nothing was passed over.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mist.broker.base import (
    ALL,
    BYTES_MAX,
    RECORD_BYTES_MAX,
    ConsumerConfig,
    Message,
    Page,
    Record,
    Stream,
    StreamInfo,
    Verification,
    check_messages,
    check_position,
    check_read,
    check_sequences,
)
from mist.errors import CursorAhead, InvalidArgument, NotFound, SequenceExpired, Unavailable, Unsupported
from mist.protocol.subject import matcher
from mist_nats import api as js
from mist_nats.api import Api, ApiError, translated
from mist_nats.direct import BATCH_MAX, SLACK, Batch, Request, Subjects, get
from mist_nats.headers import read_header
from mist_nats.leases import returned_of
from mist_nats.link import CALL_S
from mist_nats.names import META_INCARNATION, TAIL, prefix
from mist_nats.publish import Publisher
from mist_nats.running import BATCH as RUN_BATCH
from mist_nats.running import Run
from mist_nats.tail import BATCH as TAIL_BATCH
from mist_nats.tail import Tail
from mist_nats.wire import rfc3339, settle, time_ns

if TYPE_CHECKING:
    from mist_nats.broker import NatsBroker
    from mist_nats.consumer import NatsConsumer

TAILS_MAX = 8
EACH_MAX = 256
ERASE_AT_ONCE = 64
"""Requests under way at once while erasing: the server takes one message each."""
SCAN_BYTES = 8 * 1024 * 1024
POLL_S = 0.1
"""Between two looks at the end of a stream that cannot be followed."""
LAG_PAUSE_S = 0.005
"""Between two looks at a replica that is behind its leader."""
HEADERS_ROOM = 128 * 1024
TIMES_NS = -(2**62), 2**62


class Shared:
    """What all handles of one stream have in common on one connection."""

    def __init__(self, broker: NatsBroker, raw: str, info: js.StreamInfo) -> None:
        self.broker = broker
        self.api: Api = broker.api
        self.raw = raw
        """The server's name of it."""
        meta = broker.meta_of(info.config)
        self.ours = META_INCARNATION in meta
        self.incarnation = meta[META_INCARNATION] if self.ours else created_token(info.created)
        self.prefix = prefix(raw) if self.ours else ""
        self.subjects = Subjects(self.prefix)
        self.deleted = False
        self.doubt = 0
        """The connection's generation at which the stream was last seen to be this one; 0: look again."""
        self.tails: dict[tuple[str, ...], Tail] = {}
        self.run = Run(lambda after: self.tail(ALL, after, batch=RUN_BATCH, dense=True))
        self.update(info, meta)
        atomic = info.config.allow_atomic and self.api.link.version >= (2, 12)
        self.publisher = Publisher(
            broker.window, raw, self.prefix,
            atomic=atomic,
            prefer_atomic=atomic
            and (broker.sync.always or info.config.num_replicas > 1 or info.config.discard == "new"),
            dedupe=self.dedupes,
            replicated=info.config.num_replicas > 1,
        )  # fmt: skip

    def update(self, info: js.StreamInfo, meta: dict[str, str] | None = None) -> None:
        self.info = info
        meta = self.broker.meta_of(info.config) if meta is None else meta
        self.config, self.durability, self.warnings = self.broker.in_force(info, meta if self.ours else None)
        self.batched = info.config.allow_direct and self.api.link.version >= (2, 11)
        self.followable = info.config.retention == "limits"
        """Others delete what is acked: a consumer beside theirs is refused, or takes away."""
        self.holes = info.state.num_deleted > 0
        """Then the number of messages behind one does not tell the last sequence."""
        self.alone = info.config.num_replicas <= 1 and info.config.mirror is None
        self.doubt = self.api.link.generation

    @property
    def dedupes(self) -> bool:
        return not self.ours or bool(self.config.dedupe_window_s and self.config.dedupe_ids_max)

    def gone(self) -> None:
        """Deleted by us: every handle and waiter learns it now."""
        self.deleted = True
        self.forget()

    def tail(self, filters: Sequence[str], after: int, *, batch: int = TAIL_BATCH, dense: bool = False) -> Tail:
        """A tail at `after`, not started."""
        name = secrets.token_hex(6)
        return Tail(self.api, self.raw, self.subjects, filters, after, name, batch=batch, dense=dense)

    def forget(self) -> None:
        """Nothing that was read ahead is served any more: readers look for themselves."""
        self.run.end()
        for tail in list(self.tails.values()):
            tail.die()

    def filters(self, subjects: Sequence[str]) -> tuple[str, ...]:
        """As the server's subjects."""
        if tuple(subjects) == ALL or ">" in subjects:
            return ALL if not self.prefix else (f"{self.prefix}>",)
        return tuple(f"{self.prefix}{s}" for s in subjects)


def created_token(created: str) -> str:
    """The incarnation of somebody else's stream: when it was made."""
    return format(time_ns(created.encode()), "x") if created.endswith("Z") else created or "0"


class NatsStream(Stream):
    def __init__(self, broker: NatsBroker, name: str, shared: Shared) -> None:
        self.name = name
        self.shared = shared
        self.incarnation = shared.incarnation
        self._broker = broker
        self._api = broker.api

    @property
    def size_bytes_max(self) -> int:  # type: ignore[override]
        room = self._api.link.max_payload
        most = self.shared.info.config.max_msg_size
        if most > 0:
            room = min(room, most)
        return min(RECORD_BYTES_MAX, room - min(HEADERS_ROOM, room // 2))

    # --- whether it is still there ---

    def _open(self) -> None:
        self._broker.check_open()
        if self.shared.deleted:
            raise NotFound(f"stream {self.name} was deleted")

    async def check(self) -> None:
        """Raises Closed and NotFound; asks the server when something may have happened to the stream."""
        self._open()
        if self.shared.doubt != self._api.link.generation:
            await self.state()

    async def state(self) -> js.StreamInfo:
        """STREAM.INFO, when it is still this stream."""
        self._open()
        try:
            info = await self._api.call(f"STREAM.INFO.{self.shared.raw}", type=js.StreamInfo)
        except ApiError as exc:
            self._open()
            if exc.err_code == js.STREAM_NOT_FOUND:
                self.shared.gone()
                raise NotFound(f"stream {self.name} was deleted") from exc
            raise translated(exc, f"stream {self.name}") from exc
        meta = self._broker.meta_of(info.config)
        now = meta.get(META_INCARNATION) or created_token(info.created)
        if now != self.incarnation:
            self.shared.gone()
            raise NotFound(f"stream {self.name} was deleted and made again")
        self._open()
        self.shared.update(info)
        return info

    # --- append ---

    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        self._open()
        if self.shared.doubt != self._api.link.generation:
            await self.check()
        if not messages:
            return []
        check_messages(messages, self.size_bytes_max)
        if expected_last is not None:
            check_position(expected_last, "expected_last")
        if not self.shared.ours:
            self._check_subjects(messages)
        for pause_s in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.0, None):
            try:
                return await self.shared.publisher.append(messages, expected_last)
            except NotFound as exc:  # nobody took it, so nothing is stored: deleted, or a server that is not ready yet
                await self.state()
                if pause_s is None:
                    raise Unavailable(f"stream {self.name}: the server takes no messages for it") from exc
                await asyncio.sleep(pause_s)
        raise AssertionError("unreachable")

    def _check_subjects(self, messages: Sequence[Message]) -> None:
        match = matcher(self.shared.info.config.subjects or ["$none"])
        for at, m in enumerate(messages):
            if match is not None and not match(m.subject):
                raise InvalidArgument(
                    f"message {at}: {m.subject[:80]!r} is no subject of stream {self.name}",
                    hint=f"it takes {', '.join(self.shared.info.config.subjects[:5])}",
                )

    # --- read ---

    async def read(
        self,
        *,
        after: int = 0,
        subjects: Sequence[str] = ALL,
        limit: int = 256,
        bytes_max: int = BYTES_MAX,
        wait_s: float = 0.0,
    ) -> Page:
        check_read(after=after, limit=limit, bytes_max=bytes_max, wait_s=wait_s)
        match = matcher(subjects)
        key = ALL if match is None else tuple(subjects)
        bytes_max = min(bytes_max, BYTES_MAX)
        limit = min(limit, BATCH_MAX)
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        first = True
        while True:
            if self.shared.deleted or self._broker.closed or self.shared.doubt != self._api.link.generation:
                await self.check()
            tail = self.shared.tails.get(key) if wait_s > 0 else None
            if tail is not None and tail.serves(after):
                records, last = tail.take(after, limit, bytes_max)
                if records:
                    return Page(records, records[-1].sequence, last)
                if loop.time() < until:
                    await tail.wait(after, until)
                    first = False
                    continue
            page = await self._look(after, key, match, limit, bytes_max)
            if page.records or wait_s <= 0 or (loop.time() >= until and not first):
                return page
            first = False
            after = page.scanned  # nothing here matched; what was passed over needs no second look
            if page.scanned < page.last:
                continue
            if not self.shared.followable:
                await asyncio.sleep(max(0.0, min(POLL_S, until - loop.time())))
                continue
            tail = self.shared.tails.get(key)
            if tail is None or not tail.serves(after):
                await self._follow(key, after)

    async def _follow(self, key: tuple[str, ...], after: int) -> None:
        """Make a tail that stands at `after`."""
        tails = self.shared.tails
        old = tails.pop(key, None)
        if old is not None:
            old.die()
        for other in [k for k, t in tails.items() if t.dead]:
            del tails[other]
        while len(tails) >= TAILS_MAX:
            tails.pop(next(iter(tails))).die()
        filters = ALL if key == ALL else self.shared.filters(key)
        if len(filters) > 1 and self._api.link.version < (2, 10):
            filters = ALL
        tail = tails[key] = self.shared.tail(filters, after)
        try:
            await tail.start()
        except ApiError as exc:
            tail.die()
            if exc.err_code == js.STREAM_NOT_FOUND or exc.code == 404:
                await self.state()
            raise translated(exc, f"stream {self.name}: following its end") from exc
        except BaseException:
            tail.die()
            raise

    async def _look(
        self, after: int, key: tuple[str, ...], match: Callable[[str], bool] | None, limit: int, bytes_max: int
    ) -> Page:
        """One page of what is there now."""
        if not self.shared.batched and not self.shared.followable:
            return await self._look_at_each(after, match, limit, bytes_max)
        if not self.shared.batched:
            return await self._look_one_by_one(after, match, limit, bytes_max)
        if match is None:
            return await self._run(after, limit, bytes_max)
        if len(key) == 1 and self.shared.alone:
            return await self._look_filtered(after, self.shared.filters(key)[0], limit, bytes_max)
        return await self._scan(after, match, limit, bytes_max)

    async def _batch(self, **request: object) -> Batch:
        until = asyncio.get_running_loop().time() + CALL_S
        batch = await get(self._api, self.shared.raw, Request(**request), self.shared.subjects, until)  # type: ignore[arg-type]
        if batch.none and batch.more < 0:
            await self.state()  # nobody answers for this stream: deleted, most likely
            await asyncio.sleep(LAG_PAUSE_S)
        return batch

    async def _run(self, after: int, limit: int, bytes_max: int) -> Page:
        """Everything, directly or, in a long replay, as it is delivered."""
        run = self.shared.run
        plain = self.shared.followable and not self.shared.holes
        got = await run.take(after, limit, bytes_max) if plain else None
        if got is None:
            page = await self._look_at_all(after, limit, bytes_max)
            run.passed(after, page, limit)
            return page
        records, last, ended = got
        if ended:  # written since then
            last = max(last, await self._last())
        return Page(records, records[-1].sequence, last)

    async def _look_at_all(self, after: int, limit: int, bytes_max: int) -> Page:
        batch = await self._batch(seq=after + 1, batch=limit, max_bytes=bytes_max + SLACK, next_by_subj=">")
        records = batch.records
        if records and records[0].sequence == after + 1 and self.shared.alone and not self.shared.holes:
            last = records[-1].sequence + max(batch.more, 0)
            return _page(records, last, bytes_max)
        info = await self.state()
        first, last = _bounds(info.state)
        if after > last:
            raise CursorAhead(after=after, last=last, stream=self.name)
        if after + 1 < first:
            raise SequenceExpired(after=after, first=first, stream=self.name)
        if records:
            return _page(records, max(last, records[-1].sequence), bytes_max)
        if last > after:
            # written between the two looks, or gone from the middle, or the replica that answered is behind
            if self.shared.alone and info.state.messages and not await self._anything(after):
                return Page([], last, last)
            await asyncio.sleep(LAG_PAUSE_S if not self.shared.alone else 0)
            return Page([], after, last)
        return Page([], after, last)

    async def _anything(self, after: int) -> bool:
        batch = await self._batch(seq=after + 1, batch=1, next_by_subj=">")
        return bool(batch.records)

    async def _look_filtered(self, after: int, pattern: str, limit: int, bytes_max: int) -> Page:
        _, before = self._placed(after, await self.state())
        batch = await self._batch(seq=after + 1, batch=limit, max_bytes=bytes_max + SLACK, next_by_subj=pattern)
        self._placed(after, await self.state())  # a trim between the two must not be passed over
        if not batch.records:
            return Page([], max(before, after), before)
        page = _page(batch.records, max(before, batch.records[-1].sequence), bytes_max)
        if batch.more == 0 and len(page.records) == len(batch.records):
            return Page(page.records, max(before, page.scanned), page.last)
        return page if page.last > page.scanned else Page(page.records, page.scanned, page.scanned + batch.more)

    def _placed(self, after: int, info: js.StreamInfo) -> tuple[int, int]:
        first, last = _bounds(info.state)
        if after > last:
            raise CursorAhead(after=after, last=last, stream=self.name)
        if after + 1 < first:
            raise SequenceExpired(after=after, first=first, stream=self.name)
        return first, last

    async def _scan(self, after: int, match: Callable[[str], bool], limit: int, bytes_max: int) -> Page:
        """Read everything, keep what matches; a long stretch without a match ends as an empty page."""
        out: list[Record] = []
        size = seen = 0
        while True:
            page = await self._look_at_all(after, BATCH_MAX, BYTES_MAX)
            for record in page.records:
                seen += len(record.data) + SLACK
                if match(record.subject):
                    size += len(record.data)
                    if out and size > bytes_max:
                        return Page(out, after, page.last)
                    out.append(record)
                after = record.sequence
                if len(out) >= limit:
                    return Page(out, after, page.last)
            after = page.scanned
            if after >= page.last or seen >= SCAN_BYTES or (not page.records and out):
                return Page(out, after, page.last)

    async def _look_one_by_one(
        self, after: int, match: Callable[[str], bool] | None, limit: int, bytes_max: int
    ) -> Page:
        """On a server without batches of direct gets: a tail stands in, which is an ordered consumer."""
        info = await self.state()
        _, last = self._placed(after, info)
        if after >= last:
            return Page([], after, last)
        loop = asyncio.get_running_loop()
        until = loop.time() + CALL_S
        tail = self.shared.tails.get(ALL)
        if tail is None or not tail.serves(after):
            await self._follow(ALL, after)
            tail = self.shared.tails[ALL]
        while loop.time() < until and not tail.dead:
            await tail.fill(after + limit)
            records, end = tail.take(after, limit, bytes_max)
            if records:
                self._placed(after, await self.state())
                kept = [r for r in records if match is None or match(r.subject)]
                return Page(kept, records[-1].sequence, max(last, end))
            if tail.left == 0:
                return Page([], last, last)  # only holes behind `after`
            await tail.wait(after, until)
        return Page([], after, last)

    async def _look_at_each(self, after: int, match: Callable[[str], bool] | None, limit: int, bytes_max: int) -> Page:
        """By single requests to the leader: for work queues, where nothing else leaves everything in its place."""
        _, last = self._placed(after, await self.state())
        out: list[Record] = []
        size = 0
        for _ in range(EACH_MAX):
            message = await self._stored(after + 1) if after < last else None
            if message is None:
                return Page(out, last, last)
            id, headers, data = read_header(message.hdrs, message.data)
            subject = self.shared.subjects(message.subject.encode())
            if match is None or match(subject):
                size += len(data)
                if out and size > bytes_max:
                    break
                out.append(Record(message.seq, subject, data, time_ns(message.time.encode()), id, headers))
            after = message.seq
            if len(out) >= limit:
                break
        return Page(out, after, max(last, after))

    # --- positions ---

    async def info(self) -> StreamInfo:
        info = await self.state()
        first, last = _bounds(info.state)
        s = self.shared
        return StreamInfo(
            name=self.name, incarnation=self.incarnation, first=first, last=last, records=info.state.messages,
            bytes=info.state.bytes, durability=s.durability, capabilities=self._broker.capabilities, config=s.config,
            created_ns=time_ns(info.created.encode()) if info.created.endswith("Z") else 0,
            size_bytes_max=self.size_bytes_max, warnings=s.warnings,
        )  # fmt: skip

    async def locate(self, time_ns: int) -> int:
        info = await self.state()
        first, last = _bounds(info.state)
        if time_ns >= TIMES_NS[1] or first > last:
            return last + 1
        if time_ns <= 0:
            return first
        if self.shared.batched and self.shared.alone:
            batch = await self._batch(batch=1, start_time=rfc3339(time_ns))
            if not batch.records:
                return (await self._last()) + 1
            return batch.records[0].sequence
        low, high = first, last + 1
        while low < high:
            middle = (low + high) // 2
            got = await self._message(middle)
            if got is None or got[1] >= time_ns:
                high = middle
            else:
                low = got[0] + 1
        return low

    async def _last(self) -> int:
        return _bounds((await self.state()).state)[1]

    async def _message(self, sequence: int) -> tuple[int, int] | None:
        """Sequence and time of the first message at or behind `sequence`."""
        message = await self._stored(sequence)
        return None if message is None else (message.seq, time_ns(message.time.encode()))

    async def _stored(self, sequence: int) -> js.Stored | None:
        """The first message at or behind `sequence`, from the stream's leader."""
        try:
            got = await self._api.call(
                f"STREAM.MSG.GET.{self.shared.raw}", {"seq": sequence, "next_by_subj": ">"}, js.Got
            )
        except ApiError as exc:
            if exc.code == 404:
                return None
            raise translated(exc, f"stream {self.name}") from exc
        return got.message

    async def trim(self, *, before: int) -> int:
        self._open()
        check_position(before, "before")
        last = await self._last()
        if before > last + 1:
            raise CursorAhead(after=before - 1, last=last, stream=self.name)
        if before <= 1:
            return 0
        try:
            done = await self._api.call(f"STREAM.PURGE.{self.shared.raw}", {"seq": before}, js.Purged)
        except ApiError as exc:
            raise translated(exc, f"stream {self.name}: trim") from exc
        self.shared.run.end()
        # A purge makes the server (2.15.1) forget what was given back and waits to be delivered: give it back again.
        for ack_prefix, tails in returned_of(self.incarnation, before):
            self._api.link.send(settle(ack_prefix, tails, b"-NAK"))
        self._broker.wake(self.shared.raw)
        return done.purged

    async def erase(self, sequences: Sequence[int]) -> int:
        """The server overwrites what it removes. Its mirrors, and what other connections were sent, keep theirs; an id stays
        in its window until that is over."""
        self._open()
        check_sequences(sequences)
        first, last = _bounds((await self.state()).state)
        wanted = [s for s in sorted(set(sequences)) if first <= s <= last]
        count = 0
        for at in range(0, len(wanted), ERASE_AT_ONCE):
            part = wanted[at : at + ERASE_AT_ONCE]
            done = await asyncio.gather(*map(self._erase, part), return_exceptions=True)
            self.shared.holes = True
            self._broker.forget(self.shared.raw, {s for s, d in zip(part, done, strict=True) if d is True})
            for error in done:
                if isinstance(error, BaseException):
                    raise error
            count += sum(map(bool, done))
        if count:
            self.shared.forget()
            self._broker.wake(self.shared.raw)
        return count

    async def _erase(self, sequence: int) -> bool:
        """Whether it was there."""
        raw = self.shared.raw
        try:
            await self._api.call(f"STREAM.MSG.DELETE.{raw}", {"seq": sequence, "no_erase": False})
        except ApiError as exc:
            if exc.err_code in js.NO_MESSAGE:
                return False
            if exc.err_code == js.DELETE_FAILED:  # it also says so when there is none
                message = await self._stored(sequence)
                if message is None or message.seq != sequence:
                    return False
            raise translated(exc, f"stream {self.name}: erase") from exc
        return True

    async def verify(self) -> Verification:
        self._open()
        raise Unsupported("verify", self._broker.backend)

    # --- consumers ---

    async def consumer(self, name: str, config: ConsumerConfig | None = None, *, create: bool = True) -> NatsConsumer:
        await self.check()
        from mist_nats.consumer import open_consumer

        return await open_consumer(self, name, config, create=create)

    async def consumers(self) -> list[str]:
        await self.check()
        found: list[str] = []
        while True:
            try:
                page = await self._api.call(f"CONSUMER.NAMES.{self.shared.raw}", {"offset": len(found)}, js.Names)
            except ApiError as exc:
                raise translated(exc, f"stream {self.name}: consumers") from exc
            found += page.consumers or []
            if not page.consumers or len(found) >= page.total:
                return sorted(n for n in found if not n.startswith(TAIL))


def _bounds(state: js.State) -> tuple[int, int]:
    """First kept and last sequence; first is last + 1 when there is none."""
    return (state.first_seq, state.last_seq) if state.messages else (state.last_seq + 1, state.last_seq)


def _page(records: list[Record], last: int, bytes_max: int) -> Page:
    """A page within its bytes: the server stops a little behind them."""
    size = 0
    for at, record in enumerate(records):
        size += len(record.data)
        if at and size > bytes_max:
            records = records[:at]
            break
    return Page(records, records[-1].sequence, max(last, records[-1].sequence))
