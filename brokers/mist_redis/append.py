"""Appending: batches into one script call each, concurrent calls of one loop turn joined, fates told exactly.

A call goes to the server in parts of PART_MESSAGES and PART_BYTES at most, so that one script never holds the server
for long; each part is atomic, a later part that fails makes PartialAppend. Cancelling a caller withdraws nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from mist.broker.base import Message, check_messages
from mist.errors import (
    Ambiguous,
    Conflict,
    MistError,
    NotFound,
    PartialAppend,
    StorageFull,
    Unavailable,
    WrongSequence,
)
from mist_redis.ids import BITS, NoSequence, to_id, to_sequence
from mist_redis.link import COMMANDS, WRITES
from mist_redis.resp import Command, Lost, NotSent, ReplyError
from mist_redis.scripts import run

if TYPE_CHECKING:
    from mist_redis.stream import RedisStream

PART_MESSAGES = 1000
PART_BYTES = 4 * 1024 * 1024
_pack = msgspec.msgpack.Encoder().encode
_json = msgspec.json.Encoder().encode


class _Call:
    """One `append` and whoever waits for it."""

    __slots__ = ("expected", "future", "messages", "size")

    def __init__(self, messages: Sequence[Message], expected: int | None, future: asyncio.Future[list[int]]) -> None:
        self.messages = messages
        self.expected = expected
        self.future = future
        self.size = sum([len(m.data) for m in messages])

    @property
    def small(self) -> bool:
        """Whether it may share a part with others."""
        return self.expected is None and len(self.messages) <= PART_MESSAGES and self.size <= PART_BYTES


class Appender:
    """The appends of one handle."""

    def __init__(self, stream: RedisStream) -> None:
        self._stream = stream
        self._queue: list[_Call] = []

    async def append(self, messages: Sequence[Message], expected: int | None) -> list[int]:
        check_messages(messages, self._stream.size_bytes_max)
        loop = asyncio.get_running_loop()
        call = _Call(messages, expected, loop.create_future())
        if not self._queue:
            loop.call_soon(self._flush)
        self._queue.append(call)
        return await call.future

    def _flush(self) -> None:
        """Everything asked for in this turn of the loop, in order, in as few parts as it takes."""
        queue, self._queue = self._queue, []
        group: list[_Call] = []
        count = size = 0
        for call in queue:
            joins = call.small and count + len(call.messages) <= PART_MESSAGES and size + call.size <= PART_BYTES
            if group and not joins:
                self._start(group)
                group, count, size = [], 0, 0
            if not call.small:
                self._start([call])
                continue
            group.append(call)
            count += len(call.messages)
            size += call.size
        if group:
            self._start(group)

    def _start(self, group: list[_Call]) -> None:
        self._stream.broker.spawn(asyncio.get_running_loop().create_task(self._serve(group)))

    async def _serve(self, group: list[_Call]) -> None:
        """Store a group and tell every caller."""
        try:
            if len(group) == 1:
                await self._alone(group[0])
                return
            try:
                got = await self._send([m for c in group for m in c.messages], None)
            except (StorageFull, PartialAppend):
                for call in group:  # what is too much together may have room in part
                    await self._alone(call)
                return
            except Ambiguous as exc:
                for call in group:
                    _fail(call, Ambiguous(exc.message, ids=_ids(call.messages)), exc.__cause__)
                return
            at = 0
            for call in group:
                _answer(call, got[at : at + len(call.messages)])
                at += len(call.messages)
        except MistError as exc:
            for call in group:
                _fail(call, exc, exc.__cause__)
        except BaseException:
            for call in group:
                call.future.cancel()
            raise

    async def _alone(self, call: _Call) -> None:
        stored: list[int] = []
        expected = call.expected
        try:
            for part in _parts(call.messages):
                stored += await self._send(part, expected)
                if expected is not None:
                    expected = max(expected, *stored) if stored else expected
        except MistError as exc:
            if not stored:
                _fail(call, exc, exc.__cause__)
            elif isinstance(exc, Ambiguous):
                _fail(call, Ambiguous(exc.message, ids=_ids(call.messages)), exc.__cause__)
            else:
                _fail(call, PartialAppend(stored, total=len(call.messages), stream=self._stream.name), exc)
            return
        _answer(call, stored)

    async def _send(self, messages: Sequence[Message], expected: int | None) -> list[int]:
        """One part, one script call."""
        stream = self._stream
        command = run("append", stream.keys, _arguments(messages, expected, stream), *_data(messages))
        reply = await self._durably(command, f"stream {stream.name}: append", _ids(messages))
        return self._sequences(reply, len(messages), expected)

    async def erase(self, ids: Sequence[str]) -> int:
        """Erase the entries with these ids, as durably as appends are stored; how many there were."""
        stream = self._stream
        count = 0
        for at in range(0, len(ids), PART_MESSAGES):
            command = run("erase", stream.keys, stream.incarnation_on_server, *ids[at : at + PART_MESSAGES])
            try:
                reply = await self._durably(command, f"stream {stream.name}: erase", ())
            except Ambiguous as exc:
                raise Ambiguous(exc.message, hint="erase them again") from exc
            stream.check(reply)
            count += reply[1]
        return count

    async def _durably(self, command: Command, what: str, ids: Sequence[str]) -> Any:
        """The answer of a script that writes, when the stream's durability is reached. Raises Ambiguous with the ids."""
        stream = self._stream
        commands: list[Command] = [command]
        replicas, disk = stream.waits
        settings = stream.broker.link.settings
        wait_ms = int(settings.wait_timeout_s * 1000)
        if disk:
            commands.append(("WAITAOF", 1, replicas, wait_ms))
        elif replicas:
            commands.append(("WAIT", replicas, wait_ms))
        waiting = len(commands) > 1
        try:
            replies = await stream.broker.link.run(
                stream.key, commands, what=what, role=WRITES if waiting else COMMANDS, raw=waiting,
                timeout_s=settings.timeout_s + (settings.wait_timeout_s if waiting else 0),
            )  # fmt: skip
        except NotSent as exc:
            raise Unavailable(f"{what}: {exc}") from exc
        except Lost as exc:
            raise Ambiguous(f"{what}: {exc}", ids=ids) from exc
        if isinstance(replies[0], ReplyError):
            raise stream.translate(replies[0], what) from replies[0]
        if waiting and replies[0][0] == b"ok":
            self._waited(replies[1], replicas, disk, ids, what)
        return replies[0]

    def _waited(self, reply: Any, replicas: int, disk: bool, ids: Sequence[str], what: str) -> None:
        cause = reply if isinstance(reply, ReplyError) else None
        synced, acknowledged = (0, 0) if cause else reply if disk else (1, reply)
        if cause or acknowledged < replicas or synced < 1:
            raise Ambiguous(
                f"{what}: done, but only {acknowledged} of {replicas} replicas and {synced} disks say so in time",
                ids=ids,
            ) from cause

    def _sequences(self, reply: list[Any], count: int, expected: int | None) -> list[int]:
        stream = self._stream
        word = reply[0]
        if word == b"ok":
            ms = int(reply[1][:-1])
            first = reply[2] if stream.own and not ms else ms << BITS | reply[2]
            new = range(first, first + reply[3])
            if len(reply) == 4:
                return list(new)
            out: list[int] = [0] * count
            for at, id in zip(reply[4::2], reply[5::2], strict=True):
                out[at] = to_sequence(id, own=stream.own)
            fresh = iter(new)
            return [s or next(fresh) for s in out]
        if word == b"gone":
            raise NotFound(f"stream {stream.name} was deleted")
        if word == b"wrong":
            raise WrongSequence(expected=expected or 0, last=to_sequence(reply[1], own=stream.own), stream=stream.name)
        if word == b"full":
            raise StorageFull(
                f"stream {stream.name} is full", hint="trim it, or let it drop the oldest (full=drop_oldest)"
            )
        raise Conflict(f"stream {stream.name}: its last entry {reply[1].decode()} leaves no id to go on with")


def _parts(messages: Sequence[Message]) -> list[Sequence[Message]]:
    """The messages in parts within both bounds, each with one message at least."""
    if len(messages) <= PART_MESSAGES and sum(len(m.data) for m in messages) <= PART_BYTES:
        return [messages]
    out: list[Sequence[Message]] = []
    part: list[Message] = []
    size = 0
    for m in messages:
        if part and (len(part) == PART_MESSAGES or size + len(m.data) > PART_BYTES):
            out.append(part)
            part, size = [], 0
        part.append(m)
        size += len(m.data)
    out.append(part)
    return out


def _data(messages: Sequence[Message]) -> list[bytes]:
    return [m.data for m in messages]


def _arguments(messages: Sequence[Message], expected: int | None, stream: RedisStream) -> bytes:
    """All but the data, as one argument: what Lua unpacks in one call costs a third of as many arguments."""
    ids: list[str] | int = [m.id for m in messages]
    headers: list[bytes | str] | int = 0
    if not any(ids):  # type: ignore[arg-type]
        ids = 0
    if any(m.headers for m in messages):
        headers = [_json(m.headers).decode() if m.headers else "" for m in messages]
    subjects: list[str] | str = [m.subject for m in messages]
    if subjects.count(subjects[0]) == len(subjects):
        subjects = subjects[0]
    sizes = [len(m.data) for m in messages]
    wanted = ""
    if expected is not None:
        # a position no entry can have holds never
        wanted = to_id(expected, own=stream.own) if possible(expected, stream.own) else "-"
    return _pack((stream.incarnation_on_server, wanted, subjects, ids, headers, sum(sizes), max(sizes)))


def possible(sequence: int, own: bool) -> bool:
    if sequence < 0 or sequence >= 1 << 63:
        return False
    try:
        return to_sequence(to_id(sequence, own=own), own=own) == sequence
    except NoSequence:
        return False


def _ids(messages: Sequence[Message]) -> list[str]:
    return [m.id for m in messages if m.id]


def _answer(call: _Call, sequences: list[int]) -> None:
    if not call.future.done():
        call.future.set_result(sequences)


def _fail(call: _Call, error: MistError, cause: BaseException | None) -> None:
    if not call.future.done():
        if error.__cause__ is None:
            error.__cause__ = cause
        call.future.set_exception(error)
