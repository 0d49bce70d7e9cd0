"""Consumers: consumer groups, with the contract's bookkeeping beside the group's own pending list.

Redis keeps, per unsettled record, its holder, when it was handed out and how often (the attempt). Holders are `mist`
(handed out), `mist:back` (given back, due as the `due` set says) and `mist:dead` (on its way to the dead letters). A
token is `<attempt>.<moved>.<seeks>.<born>`: `born` names this consumer, `seeks` counts its seeks, `moved` every change
of hands of a lease. While `moved` has not changed since a fetch, what it gave can be settled without a look at single
leases; otherwise holder and attempt are compared one by one. Both happen inside one script.

The usual fetch is one round trip, `MULTI guard XREADGROUP release EXEC`: guard.lua lets XREADGROUP give something only
when nothing is due, there is room, and the answer's weight is bounded. Otherwise peek.lua says where we stand, XRANGE
reads (nothing is held yet), and claim.lua takes exactly what fits, if the consumer still stands there. Waiting blocks
on XREAD, which takes nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from mist.broker.base import (
    BYTES_MAX,
    SEQUENCE_MAX,
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
from mist.errors import CursorAhead, InvalidArgument, MistError, NotFound, Unavailable
from mist.protocol.subject import matcher
from mist_redis.faults import translate
from mist_redis.ids import OWN_MAX, runs
from mist_redis.resp import Command, Lost, NotSent, ReplyError
from mist_redis.scripts import run, whole

if TYPE_CHECKING:
    from mist_redis.stream import RedisStream

FETCH_MAX = 2000
"""Deliveries one request takes; a fetch gives no more."""
WORTH = 32
"""Below so many records a request weighed by the largest is no shortcut."""
HALVES = 512
"""From so many on a fetch is asked for in two halves."""
LIGHT = 256 * 1024
"""With records up to this size it costs nothing to speak of that a look brings the first and the last one into Lua."""
SETTLE_MAX = 20_000
"""Ids one request settles, unless one call brings more under one token."""
COUNT_ENTRIES_MAX = 100_000
"""How far lag is counted entry by entry, where the server does not know it."""
PENDING_PIECE = 1000
_pack = msgspec.msgpack.Encoder().encode


def _seconds(due_ms: bytes) -> float:
    """Until something is due, as the scripts say it; a millisecond more, because they round down."""
    return max(int(due_ms), 0) / 1000 + 0.001 if due_ms else math.inf


class _Stand(NamedTuple):
    """Where the consumer stood when there was nothing to give."""

    last_id: str
    wake: str
    due_s: float
    at_end: bool


class _Token(NamedTuple):
    attempt: int
    moved: str
    seeks: str


class _Group(NamedTuple):
    """Deliveries that were given under one token, in order."""

    seeks: str
    moved: str
    attempt: int
    sequences: list[int]


class RedisConsumer(Consumer):
    def __init__(self, stream: RedisStream, name: str, config: ConsumerConfig, born: str) -> None:
        self.name = name
        self.stream = stream.name
        self.config = config
        self._stream = stream
        self._born = born
        self._match = matcher(config.subjects)
        self._settling: list[tuple[str, Sequence[Delivery], asyncio.Future[int]]] = []
        self._known = (stream.incarnation_on_server, name, born)

    def _what(self, doing: str) -> str:
        return f"stream {self.stream}: consumer {self.name}: {doing}"

    def _check(self, answer: Any) -> None:
        if answer[0] == b"nobody":
            raise NotFound(f"consumer {self.name} of stream {self.stream} was deleted")
        self._stream.check(answer)

    async def _ask(
        self, commands: list[Command], doing: str, *, repeat: bool = True, begun: Callable[[], None] | None = None
    ) -> list[Any]:
        self._stream.broker.check_open()
        what = self._what(doing)
        try:
            return await self._stream.broker.link.run(self._stream.key, commands, what=what, repeat=repeat, begun=begun)
        except (Lost, NotSent) as exc:
            raise Unavailable(f"{what}: {exc}", hint="what was handed out comes again after ack_wait_s") from exc

    async def _script(self, name: str, *args: str | bytes | int, doing: str, repeat: bool = True) -> list[Any]:
        (answer,) = await self._ask([run(name, self._stream.keys, *self._known, *args)], doing, repeat=repeat)
        self._check(answer)
        return answer  # type: ignore[no-any-return]

    # --- handing out ---

    async def fetch(self, *, limit: int = 256, bytes_max: int = BYTES_MAX, wait_s: float = 0.0) -> list[Delivery]:
        check_read(limit=limit, bytes_max=bytes_max, wait_s=wait_s)
        stream = self._stream
        stream.broker.check_open()
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        limit = min(limit, FETCH_MAX)
        while True:
            generation = stream.watch.generation
            taking = loop.create_task(self._take(limit, bytes_max))
            try:
                out, stand = await asyncio.shield(taking)
            except asyncio.CancelledError:
                stream.broker.spawn(loop.create_task(self._unseen(taking)))
                raise
            if out:
                return out
            if stand is None or not stand.at_end:
                continue
            left = until - loop.time()
            if left <= 0:
                return []
            await stream.wait(generation, stand.last_id, stand.wake, min(left, stand.due_s))

    async def _unseen(self, taking: asyncio.Task[tuple[list[Delivery], _Stand | None]]) -> None:
        """Give back what a cancelled fetch took and nobody saw, with the attempt it had before."""
        try:
            out, _ = await taking
            if out:
                await self._settle("unseen", [out])
        except MistError:
            return  # then it comes again after its ack wait

    async def _take(self, limit: int, bytes_max: int) -> tuple[list[Delivery], _Stand | None]:
        """Deliveries, or where we stand without; neither: look again."""
        stream = self._stream
        if self._match is None and stream.own:
            big = max(stream.big, 1)
            count = min(limit, stream.count(limit), max(1, bytes_max // big), self.config.pending_max)
            if count >= min(limit, self.config.pending_max, WORTH):
                out, stand = await (self._in_halves if count >= HALVES else self._shortcut)(count, big)
                if out or stand is not None:
                    return out, stand
        return await self._carefully(limit, bytes_max)

    async def _in_halves(self, count: int, big: int) -> tuple[list[Delivery], _Stand | None]:
        """The same for many: the second half is asked for when the first begins to arrive, so that the server works on
        it while we unpack."""
        loop = asyncio.get_running_loop()
        later: list[asyncio.Task[tuple[list[Delivery], _Stand | None]]] = []
        half = count // 2

        def begun() -> None:
            later.append(loop.create_task(self._shortcut(count - half, big)))

        try:
            out, stand = await self._shortcut(half, big, begun)
        except BaseException:
            for task in later:
                self._stream.broker.spawn(task)
            raise
        if later:
            try:
                more, stand_later = await later[0]
            except MistError:
                if not out:
                    raise
                return out, None  # what came is whole; the next fetch meets the error
            out += more
            stand = stand_later if stand is not None else None
        return out, stand

    async def _shortcut(
        self, count: int, big: int, begun: Callable[[], None] | None = None
    ) -> tuple[list[Delivery], _Stand | None]:
        """New records in one round trip, or where we stand at the end; neither when something stands against it."""
        stream = self._stream
        commands: list[Command] = [
            ("MULTI",),
            whole("guard", stream.keys, *self._known, count, big),
            ("XREADGROUP", "GROUP", self.name, "mist", "COUNT", count, "STREAMS", stream.key, ">"),
            whole("release", stream.keys, self.name, "1" if big < LIGHT else ""),
            ("EXEC",),
        ]
        replies = await self._ask(commands, "fetch", repeat=False, begun=begun)
        guard, got, stands = replies[-1]
        if isinstance(guard, ReplyError):
            raise translate(guard, self._what("fetch")) from guard
        self._check(guard)
        if isinstance(got, ReplyError):
            raise translate(got, self._what("fetch")) from got
        if guard[0] != b"ok":
            return [], None
        if not got:
            if not isinstance(stands, list):
                return [], None
            last_id, wake, due_ms = stands
            return [], _Stand(last_id.decode(), wake.decode(), _seconds(due_ms), True)
        token = f"1.{guard[2].decode()}.{guard[1].decode()}.{self._born}"
        return [Delivery(r, 1, token) for r in stream.records(got[0][1])], None

    async def _carefully(self, limit: int, bytes_max: int) -> tuple[list[Delivery], _Stand | None]:
        """Due ones first, then new ones: look, read, and take what fits."""
        stream = self._stream
        answer = await self._script("peek", limit, doing="fetch")
        _, due, at, last_id, room, due_ms, wake, _, *big = answer
        stream.big = max(stream.big, *big) if big else stream.big
        most = self.config.attempts_max
        spent = [d for d in due if 0 < most <= d[1]]
        if spent:
            # the exhausted first and alone: burying awaits, and a delivery must never be held over an await
            await self._bury_spent(spent)
            return [], None
        due_s = _seconds(due_ms)
        records, gone = await self._read(due)
        if gone:
            await self._ask([("XACK", stream.key, self.name, *gone)], "fetch")
        taken: list[tuple[bytes, int, Record]] = []
        size = 0
        full = False
        for id, attempt, record in records:
            size += len(record.data)
            full = bool(taken) and size > bytes_max
            if full:
                break
            taken.append((id, attempt, record))
        new: list[Record] = []
        to, passed, at_end = b"", 0, True
        if not full and len(taken) < limit and (room > 0 or self._match is not None):
            wanted = stream.count(1000 if self._match is not None else min(limit - len(taken), room))
            (entries,) = await self._ask([("XRANGE", stream.key, f"({at.decode()}", "+", "COUNT", wanted)], "fetch")
            at_end = len(entries) < wanted
            found = stream.records(entries)
            stream.saw(found)
            for n, record in enumerate(found):
                if self._match is None or self._match(record.subject):
                    heavy = (taken or new) and size + len(record.data) > bytes_max
                    if len(new) >= room or len(taken) + len(new) >= limit or heavy:
                        at_end = True
                        break
                    size += len(record.data)
                    new.append(record)
                to, passed = entries[n][0], n + 1
        if not taken and not to:
            return [], _Stand(last_id.decode(), wake.decode(), due_s, at_end)
        return await self._claim(at, to, passed, new, taken), None

    async def _read(self, due: Sequence[Any]) -> tuple[list[tuple[bytes, int, Record]], list[bytes]]:
        """The records of due entries, and the ids of those that somebody removed."""
        if not due:
            return [], []
        key = self._stream.key
        out: list[tuple[bytes, int, Record]] = []
        gone: list[bytes] = []
        # in pieces, so that a reply's weight stays bounded
        step = self._stream.count(len(due))
        for start in range(0, len(due), step):
            piece = due[start : start + step]
            replies = await self._ask([("XRANGE", key, d[0], d[0]) for d in piece], "fetch")
            for (id, attempt, _), entries in zip(piece, replies, strict=True):
                if entries:
                    out.append((id, attempt, self._stream.records(entries)[0]))
                else:
                    gone.append(id)
        return out, gone

    async def _claim(
        self, at: bytes, to: bytes, passed: int, new: list[Record], due: list[tuple[bytes, int, Record]]
    ) -> list[Delivery]:
        """Take them, if the consumer still stands where we looked; what others took meanwhile is left out."""
        own = self._stream.own
        flat: list[str | int] = []
        for id, attempt, _ in due:
            flat += (id.decode(), attempt)
        sequences = [r.sequence for r in new]
        body = _pack((at.decode(), to.decode(), passed, runs(sequences, own=own) if new else [], flat, []))
        answer = await self._script("claim", body, doing="fetch", repeat=False)
        if answer[0] != b"ok":
            return []
        _, seeks, moved, got, _ = answer
        mine = set(got)
        tail = f"{moved.decode()}.{seeks.decode()}.{self._born}"
        out = [Delivery(r, attempt + 1, f"{attempt + 1}.{tail}") for id, attempt, r in due if id in mine]
        token = f"1.{tail}"
        out += [Delivery(r, 1, token) for r in new]
        return out

    # --- dead letters ---

    async def _bury_spent(self, spent: Sequence[Any]) -> None:
        """Records out of attempts: held by `mist:dead`, copied to the dead letters, then settled. A crash in between
        leaves them pending, and the next fetch after the ack wait does it again."""
        flat: list[str | int] = []
        for id, attempt, _ in spent:
            flat += (id.decode(), attempt)
        answer = await self._script("claim", _pack(("", "", 0, [], [], flat)), doing="fetch", repeat=False)
        mine = set(answer[4]) if answer[0] == b"ok" else set()
        records, gone = await self._read([d for d in spent if d[0] in mine])
        if gone:
            await self._ask([("XACK", self._stream.key, self.name, *gone)], "fetch")
        seeks = answer[1].decode() if mine else ""
        await self._bury([(r, attempt) for _, attempt, r in records], seeks, EXHAUSTED)

    async def _bury(self, dead: Sequence[tuple[Record, int]], seeks: str, reason: str) -> None:
        if not dead:
            return
        letters = [
            dead_letter(
                record, stream=self.stream, incarnation=self._stream.incarnation, consumer=self.name,
                attempts=attempt, reason=reason,
            )
            for record, attempt in dead
        ]  # fmt: skip
        await bury(self._stream.broker, letters, stream=self.stream)
        by_attempt: dict[int, list[int]] = {}
        for record, attempt in dead:
            by_attempt.setdefault(attempt, []).append(record.sequence)
        groups = [_Group(seeks, "", attempt, sorted(s)) for attempt, s in by_attempt.items()]
        await self._run_settle("dead", groups, 0)

    # --- settling ---

    def _token(self, text: str) -> _Token | None:
        attempt, _, rest = text.partition(".")
        moved, _, rest = rest.partition(".")
        seeks, _, born = rest.partition(".")
        if born != self._born or not all(p.isascii() and p.isdigit() and len(p) < 16 for p in (attempt, moved, seeks)):
            return None
        return _Token(int(attempt), moved, seeks)

    def _groups(self, deliveries: Sequence[Delivery]) -> list[_Group]:
        """Deliveries by token; tokens of others and made-up ones are left out."""
        by_token: dict[str, set[int]]
        if len({d.token for d in deliveries}) == 1:
            by_token = {deliveries[0].token: {d.record.sequence for d in deliveries}}
        else:
            by_token = {}
            for d in deliveries:
                by_token.setdefault(d.token, set()).add(d.record.sequence)
        out: list[_Group] = []
        for text, sequences in by_token.items():
            token = self._token(text)
            if token is not None:
                fine = sorted(sequences)
                if not (fine[0] > 0 and fine[-1] <= SEQUENCE_MAX):
                    fine = [s for s in fine if 0 < s <= SEQUENCE_MAX]
                if fine:
                    out.append(_Group(token.seeks, token.moved, token.attempt, fine))
        return out

    async def _settle(
        self, what: str, calls: Sequence[Sequence[Delivery]], *, delay_s: float = 0.0
    ) -> tuple[list[int], list[bytes]]:
        """How many of each call were still ours, and the ids that are now to be buried."""
        groups: list[_Group] = []
        owners: list[int] = []
        for n, deliveries in enumerate(calls):
            mine = self._groups(deliveries) if deliveries else []
            groups += mine
            owners += [n] * len(mine)
        counts = [0] * len(calls)
        found, dead = await self._run_settle(what, groups, min(math.ceil(delay_s * 1000), 1 << 50))
        for owner, count in zip(owners, found, strict=False):
            counts[owner] += int(count)
        return counts, dead

    async def _run_settle(self, what: str, groups: Sequence[_Group], delay_ms: int) -> tuple[list[int], list[bytes]]:
        """settle.lua, in calls of SETTLE_MAX ids at most."""
        counts: list[int] = []
        dead: list[bytes] = []
        at = 0
        while True:
            piece: list[_Group] = []
            ids: list[str] = []
            while at < len(groups) and (not piece or len(ids) + len(groups[at].sequences) <= SETTLE_MAX):
                ids += self._ids(groups[at].sequences)
                piece.append(groups[at])
                at += 1
            body = _pack((self.config.attempts_max, delay_ms, *[(*g[:3], len(g.sequences)) for g in piece]))
            _, found, died = await self._script("settle", what, body, *ids, doing=what, repeat=False)
            counts += found
            dead += died
            if at >= len(groups):
                return counts, dead

    def _ids(self, sequences: Sequence[int]) -> list[str]:
        if self._stream.own and sequences[-1] < OWN_MAX:
            return [f"0-{s}" for s in sequences]
        return [self._stream.id(s) for s in sequences]

    async def ack(self, deliveries: Sequence[Delivery]) -> int:
        return await self._joined("ack", deliveries)

    async def extend(self, deliveries: Sequence[Delivery]) -> int:
        return await self._joined("extend", deliveries)

    async def _joined(self, what: str, deliveries: Sequence[Delivery]) -> int:
        """Settle together with whatever else is settled in this turn of the loop: one script call."""
        self._stream.broker.check_open()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        if not self._settling:
            loop.call_soon(self._flush)
        self._settling.append((what, deliveries, future))
        return await future

    def _flush(self) -> None:
        waiting, self._settling = self._settling, []
        for what in ("ack", "extend"):
            mine = [(d, f) for w, d, f in waiting if w == what]
            if mine:
                task = asyncio.get_running_loop().create_task(self._serve(what, mine))
                self._stream.broker.spawn(task)

    async def _serve(self, what: str, waiting: list[tuple[Sequence[Delivery], asyncio.Future[int]]]) -> None:
        try:
            counts, _ = await self._settle(what, [d for d, _ in waiting])
        except MistError as exc:
            for _, future in waiting:
                if not future.done():
                    future.set_exception(exc)
            return
        except BaseException:
            for _, future in waiting:
                future.cancel()
            raise
        for (_, future), count in zip(waiting, counts, strict=True):
            if not future.done():
                future.set_result(count)

    async def nak(self, deliveries: Sequence[Delivery], *, delay_s: float = 0.0) -> int:
        check_delay(delay_s)
        return await self._give_up("nak", deliveries, delay_s, EXHAUSTED)

    async def term(self, deliveries: Sequence[Delivery], *, reason: str = "") -> int:
        return await self._give_up("term", deliveries, 0.0, reason)

    async def _give_up(self, what: str, deliveries: Sequence[Delivery], delay_s: float, reason: str) -> int:
        counts, dead = await self._settle(what, [deliveries], delay_s=delay_s)
        if dead:
            ids = {self._stream.sequence(id) for id in dead}
            seeks = "0"
            records: dict[int, tuple[Record, int]] = {}
            for d in deliveries:
                token = self._token(d.token)
                if token is not None and d.record.sequence in ids:
                    # of two deliveries of one record, the later attempt is the one that was ours
                    if d.record.sequence not in records or records[d.record.sequence][1] < token.attempt:
                        records[d.record.sequence] = (d.record, token.attempt)
                    seeks = max(seeks, token.seeks, key=int)
            await self._bury(list(records.values()), seeks, reason)
        return counts[0]

    # --- figures ---

    async def info(self) -> ConsumerInfo:
        stream = self._stream
        answer = await self._script("figures", doing="info")
        _, at, last_id, first_id, pending, low, moved, lag_ms, length, known = answer
        last = stream.sequence(last_id)
        first = stream.sequence(first_id) if first_id else last + 1
        delivered = max(stream.sequence(at), first - 1 if stream.own or not first_id else 0)
        if not lag_ms:
            undelivered = 0
            delivered = last
        elif stream.own and int(last_id.partition(b"-")[0]) == 0:
            undelivered = min(last - delivered, length)
        elif known >= 0:
            undelivered = known
        else:
            undelivered = await self._count(at, length)
        redelivered = await self._redelivered() if pending and moved != b"0" else 0
        floor = stream.sequence(low) - 1 if pending else delivered
        return ConsumerInfo(
            name=self.name, stream=self.stream, floor=floor, delivered=delivered, pending=pending,
            redelivered=redelivered, lag=undelivered + pending, lag_s=int(lag_ms) / 1000 if lag_ms else 0.0,
            config=self.config,
        )  # fmt: skip

    async def _count(self, at: bytes, length: int) -> int:
        """Entries behind an id, one by one and bounded: foreign ids, on a server that does not count (before 7.0)."""
        total = 0
        while total < COUNT_ENTRIES_MAX:
            wanted = self._stream.count(1000)
            (entries,) = await self._ask(
                [("XRANGE", self._stream.key, f"({at.decode()}", "+", "COUNT", wanted)], "info"
            )
            total += len(entries)
            if len(entries) < wanted:
                return total
            at = entries[-1][0]
        return length

    async def _redelivered(self) -> int:
        total = 0
        start = "-"
        while True:
            (entries,) = await self._ask([("XPENDING", self._stream.key, self.name, start, "+", PENDING_PIECE)], "info")
            total += sum(int(e[3]) > 1 for e in entries)
            if len(entries) < PENDING_PIECE:
                return total
            start = f"({entries[-1][0].decode()}"

    async def pending(self, *, limit: int = 1000) -> list[Pending]:
        if not 1 <= limit <= SEQUENCE_MAX:
            raise InvalidArgument(f"pending: limit={limit} cannot be right")
        out: list[Pending] = []
        start = "-"
        while len(out) < limit:
            wanted = min(PENDING_PIECE, limit - len(out))
            _, found = await self._script("pending", start, wanted, doing="pending")
            out += [Pending(self._stream.sequence(id), attempt, int(due) / 1000) for id, attempt, due in found]
            if len(found) < wanted:
                break
            start = f"({found[-1][0].decode()}"
        return out

    # --- moving and ending ---

    async def seek(self, after: int) -> None:
        check_position(after)
        try:
            await self._script("reset", "seek", self._stream.id(after), doing="seek")
        except CursorAhead as exc:
            raise CursorAhead(after=after, last=exc.last, stream=self.stream) from None

    async def delete(self) -> None:
        (answer,) = await self._ask([run("reset", self._stream.keys, *self._known, "delete", "0-0")], "delete")
        if answer[0] != b"nobody":
            self._check(answer)
