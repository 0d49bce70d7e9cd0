"""One stream: pages, waiting, positions, figures. Appending is append.py, consuming consumer.py."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from mist.broker.base import (
    ALL,
    BYTES_MAX,
    RECORD_BYTES_MAX,
    ConsumerConfig,
    Message,
    Page,
    Record,
    Stream,
    StreamConfig,
    StreamInfo,
    Verification,
    check_position,
    check_read,
    check_sequences,
)
from mist.errors import Conflict, CursorAhead, MistError, NotFound, SequenceExpired, Unavailable, Unsupported
from mist.protocol.subject import check_name, dead_stream, matcher
from mist_redis import durability
from mist_redis.append import Appender, possible
from mist_redis.consumer import RedisConsumer
from mist_redis.entry import foreign_subject, records
from mist_redis.faults import translate
from mist_redis.ids import MS_MAX, to_id, to_sequence
from mist_redis.resp import Lost, NotSent, ReplyError
from mist_redis.scripts import run
from mist_redis.waiting import KEEP, POLL_S

if TYPE_CHECKING:
    from mist_redis.broker import RedisBroker

SCAN = 1000
"""Entries one request reads."""
REPLY_BYTES_MAX = 64 * 1024 * 1024
"""What one reply may weigh, reckoned with the stream's largest record; LEAST entries are always asked for."""
LEAST = 8


class Look(Struct):
    """What a stream looked like at one moment."""

    last: int
    last_id: str
    first: int
    """last + 1 when it is empty."""
    records: int
    wake: str
    added: int
    """Entries ever added, -1 where the server does not count."""


class RedisStream(Stream):
    size_bytes_max = RECORD_BYTES_MAX

    def __init__(
        self, broker: RedisBroker, name: str, key: str, incarnation: str, config: StreamConfig, created: int, big: int
    ) -> None:
        self.broker = broker
        self.name = name
        self.key = key
        self.incarnation = incarnation
        self.config = config
        self.created_ns = created
        self.own = created > 0
        self.incarnation_on_server = incarnation if self.own else ""
        self.keys = broker.names.keys(key)
        self.subject = foreign_subject(name)
        self.big = big
        """The largest record so far, as far as we know."""
        self.watch = broker.watches.of(key, broker.names.beside(key, "wake"), incarnation)
        self.waits: tuple[int, bool] = (broker.link.settings.wait_replicas, broker.link.settings.waitaof)
        self._waits_known = False
        self._appender = Appender(self)

    def translate(self, error: Exception, what: str) -> MistError:
        return translate(error, what)

    def gone(self) -> NotFound:
        return NotFound(f"stream {self.name} was deleted")

    async def script(self, name: str, *args: str | bytes | int, what: str, repeat: bool = True) -> list[Any]:
        """The answer of a script that is `ok`, or the error it means."""
        self.broker.check_open()
        what = f"stream {self.name}: {what}"
        try:
            (answer,) = await self.broker.link.run(self.key, [run(name, self.keys, *args)], what=what, repeat=repeat)
        except (Lost, NotSent) as exc:
            raise Unavailable(f"{what}: {exc}", hint="try again") from exc
        self.check(answer)
        return answer  # type: ignore[no-any-return]

    def check(self, answer: Any) -> None:
        if answer[0] == b"gone":
            raise self.gone()
        if answer[0] == b"ahead":
            raise CursorAhead(after=-1, last=self.sequence(answer[1]), stream=self.name)

    def sequence(self, id: bytes | str) -> int:
        return to_sequence(id, own=self.own)

    def id(self, sequence: int) -> str:
        return to_id(sequence, own=self.own)

    def records(self, entries: Sequence[Any]) -> list[Record]:
        return records(entries, own=self.own, subject=self.subject)

    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        self.broker.check_open()
        if not messages:
            return []
        if not self._waits_known:
            await self._find_waits()
        return await self._appender.append(messages, expected_last)

    async def _find_waits(self) -> None:
        """What an append waits for depends on the server's settings: asked once a handle, and at every `info`."""
        if self.waits != (0, False) or self.config.durability in ("power", "replicated"):
            facts = await self.broker.facts(self.key)
            self.waits = durability.waits(self.config.durability, facts, self.broker.link.settings)
        self._waits_known = True

    # --- reading ---

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
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while True:
            generation = self.watch.generation
            page, look = await self._page(after, match, limit, bytes_max)
            if page.records or wait_s <= 0:
                return page
            after = page.scanned  # nothing here matched; what was passed over needs no second look
            left = until - loop.time()
            if left <= 0:
                return page
            if page.scanned >= page.last:
                await self.wait(generation, look.last_id, look.wake, left)
                brought = self._brought(generation, after, match, limit, bytes_max)
                if brought is not None:
                    return brought

    async def wait(self, generation: int, last_id: str, wake: str, timeout_s: float) -> None:
        """Until something changed behind this look. Raises Closed."""
        if self.config.age_s_max:
            timeout_s = min(timeout_s, 60.0)
        if not self.watch.in_use and self.broker.watches.many:
            await asyncio.sleep(min(timeout_s, POLL_S))
        else:
            await self.watch.wait(generation, last_id, wake, timeout_s)
        self.broker.check_open()

    def _brought(
        self, generation: int, after: int, match: Callable[[str], bool] | None, limit: int, bytes_max: int
    ) -> Page | None:
        """What the wake-up brought along, when it is certainly all that follows: our own dense numbers, in one piece,
        and nothing that a look would refuse (deletion wakes by the other key)."""
        watch = self.watch
        behind, entries = watch.brought
        if not self.own or watch.generation != generation + 1 or not 0 < len(entries) < KEEP:
            return None
        if behind != self.id(after) or entries[0][0] != self.id(after + 1).encode():
            return None
        found = self.records(entries)
        if found[-1].sequence != after + len(found):
            return None
        out, scanned, _ = cut(found, after, match, limit, bytes_max)
        return Page(out, scanned, found[-1].sequence) if out else None

    def count(self, wanted: int) -> int:
        """How many entries one request may ask for: bounded by what the reply may weigh."""
        return max(1, min(wanted, SCAN, max(LEAST, REPLY_BYTES_MAX // max(self.big, 1))))

    async def _page(
        self, after: int, match: Callable[[str], bool] | None, limit: int, bytes_max: int
    ) -> tuple[Page, Look]:
        """One page, and the look that came after its entries were read: what it says about the entries is true, however
        others trim, append or delete in between."""
        out: list[Record] = []
        size = 0
        at = after
        while True:
            wanted = self.count(SCAN if match is not None else limit - len(out))
            what = f"stream {self.name}: read"
            entries, answer = await self.broker.ask(
                self.key,
                [("XRANGE", self.key, f"({self.id(at)}", "+", "COUNT", wanted), run("look", self.keys)],
                what=what,
            )
            look = self.looked(answer)
            if at > look.last:
                raise CursorAhead(after=at, last=look.last, stream=self.name)
            if self._expired(at, look):
                if out:
                    break  # what came before is whole; the next read meets the gap
                raise SequenceExpired(after=at, first=look.first, stream=self.name)
            if not entries:
                if at < look.last and not out:
                    # appended between the two commands, or removed from the end by somebody's XDEL
                    if look.records and not await self._nothing_behind(at):
                        continue
                    at = look.last
                break
            found = self.records(entries)
            more, at, full = cut(found, at, match, limit - len(out), bytes_max - size, first=not out)
            out += more
            size += sum(len(r.data) for r in more)
            self.saw(found)
            if full or len(entries) < wanted or len(out) >= limit or (match is not None and not out):
                break
        return Page(out, at, max(look.last, at)), look

    async def _nothing_behind(self, at: int) -> bool:
        (entries,) = await self.broker.ask(
            self.key, [("XRANGE", self.key, f"({self.id(at)}", "+", "COUNT", 1)], what=f"stream {self.name}: read"
        )
        return not entries

    def saw(self, found: Sequence[Record]) -> None:
        """Foreign streams do not say how large their records are: learn it."""
        if not self.own and found:
            self.big = max(self.big, max([len(r.data) for r in found]))

    def looked(self, answer: Any) -> Look:
        self.check(answer)
        _, incarnation, last_id, first_id, count, wake, big, added = answer
        if incarnation.decode() != self.incarnation_on_server:
            raise self.gone()
        self.big = max(self.big, big)
        last = self.sequence(last_id)
        first = self.sequence(first_id) if first_id else last + 1
        return Look(last, last_id.decode(), first, count, wake.decode(), added)

    def _expired(self, after: int, look: Look) -> bool:
        if after + 1 >= look.first:
            return False
        if self.own:
            return True
        # foreign ids have gaps everywhere: only what was removed makes one that matters
        if look.added >= 0:
            return look.added > look.records
        return after > 0

    # --- positions and figures ---

    async def look(self) -> Look:
        (answer,) = await self.broker.ask(self.key, [run("look", self.keys)], what=f"stream {self.name}: info")
        return self.looked(answer)

    async def info(self) -> StreamInfo:
        look = await self.look()
        usage, bytes_ = await self.broker.ask(
            self.key, [("MEMORY", "USAGE", self.key), ("HGET", self.keys[1], "bytes")],
            what=f"stream {self.name}: info", raw=True,
        )  # fmt: skip
        facts = await self.broker.facts(self.key)
        settings = self.broker.link.settings
        self.waits, self._waits_known = durability.waits(self.config.durability, facts, settings), True
        size = 0 if isinstance(usage, ReplyError) or usage is None or not look.records else int(usage)
        if self.config.bytes_max and not isinstance(bytes_, ReplyError):
            size = int(bytes_ or 0)
        return StreamInfo(
            name=self.name, incarnation=self.incarnation, first=look.first, last=look.last, records=look.records,
            bytes=size, durability=durability.in_force(self.config.durability, facts, settings),
            capabilities=self.broker.capabilities, config=self.config, created_ns=self.created_ns,
            size_bytes_max=self.size_bytes_max,
            warnings=durability.warnings(self.config.durability, facts, settings),
        )  # fmt: skip

    async def locate(self, time_ns: int) -> int:
        ms = max(0, min(-(-time_ns // 1_000_000), MS_MAX))
        _, id, last = await self.script("locate", self.incarnation_on_server, ms, what="locate")
        return self.sequence(id) if id else self.sequence(last) + 1

    async def trim(self, *, before: int) -> int:
        check_position(before, "before")
        try:
            _, count = await self.script(
                "trim",
                self.incarnation_on_server,
                self.id(before),
                self.id(max(before - 1, 0)),
                what="trim",
                repeat=False,
            )
        except CursorAhead as exc:
            raise CursorAhead(after=before - 1, last=exc.last, stream=self.name) from None
        return int(count)

    async def erase(self, sequences: Sequence[int]) -> int:
        """Redis marks the entries in their node and frees it when its last entry goes: no command shows them, but their
        bytes may be in its memory and files until then."""
        check_sequences(sequences)
        self.broker.check_open()
        if not self._waits_known:
            await self._find_waits()
        ids = [self.id(s) for s in sorted(set(sequences)) if possible(s, self.own)]
        return await self._appender.erase(ids)

    async def verify(self) -> Verification:
        self.broker.check_open()
        raise Unsupported("verify", self.broker.backend, hint="Redis keeps no checksum that a client could compare")

    # --- consumers ---

    async def consumer(self, name: str, config: ConsumerConfig | None = None, *, create: bool = True) -> RedisConsumer:
        self.broker.check_open()
        check_name(name)
        dead_stream(self.name)  # a name that leaves no room for dead letters must fail now, not at the first bad record
        if config is not None:
            config.validate()
        made = config or ConsumerConfig()
        try:
            answer = await self.script(
                "consumer", self.incarnation_on_server, name, "1" if create else "", secrets.token_hex(6),
                msgspec.json.encode(made), self.id(made.after), max(1, math.ceil(made.ack_wait_s * 1000)),
                made.pending_max, what=f"consumer {name}",
            )  # fmt: skip
        except CursorAhead as exc:
            raise CursorAhead(after=made.after, last=exc.last, stream=self.name) from None
        if answer[0] == b"absent":
            raise NotFound(f"stream {self.name} has no consumer {name}")
        if answer[0] == b"foreign":
            raise Conflict(
                f"stream {self.name}: the group {name} was made by another program",
                hint="its pending list has other rules: choose another consumer name",
            )
        existing = msgspec.json.decode(answer[2], type=ConsumerConfig)
        if config is not None and config != existing:
            raise Conflict(f"consumer {name} of stream {self.name} exists with another configuration")
        return RedisConsumer(self, name, existing, answer[1].decode())

    async def consumers(self) -> list[str]:
        await self.look()
        place = self.broker.names.beside(self.key, "groups")
        (names,) = await self.broker.ask(self.key, [("HKEYS", place)], what=f"stream {self.name}: consumers")
        return sorted(n.decode() for n in names)


def cut(
    found: Sequence[Record],
    after: int,
    match: Callable[[str], bool] | None,
    limit: int,
    bytes_max: int,
    *,
    first: bool = True,
) -> tuple[list[Record], int, bool]:
    """Of these records what a page takes, where the next one starts, and whether a bound was met. With `first` one
    record is taken whatever it weighs."""
    if match is None and len(found) <= limit and sum([len(r.data) for r in found]) <= bytes_max:
        return list(found), found[-1].sequence, len(found) == limit
    out: list[Record] = []
    size = 0
    for record in found:
        if match is None or match(record.subject):
            size += len(record.data)
            if (out or not first) and size > bytes_max:
                return out, after, True
            out.append(record)
        after = record.sequence
        if len(out) >= limit:
            return out, after, True
    return out, after, False
