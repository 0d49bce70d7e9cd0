"""Positions: one hash per stream, beside it, so that it goes with it; one script loads, decides and stores.

Where the URL asks for `waitaof` or `wait_replicas`, a save waits for them like an append.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from mist.broker.base import Checkpoint, Checkpoints
from mist.broker.checkpoint import check_advance, check_key, check_save
from mist.errors import Internal, Unavailable
from mist.protocol.subject import check_stream
from mist_redis.resp import Command
from mist_redis.scripts import run

if TYPE_CHECKING:
    from mist_redis.broker import RedisBroker


class RedisCheckpoints(Checkpoints):
    def __init__(self, broker: RedisBroker) -> None:
        self._broker = broker

    async def _key(self, stream: str) -> tuple[str, str]:
        """The stream's key and its hash of positions."""
        names = self._broker.names
        candidates = names.candidates(stream)
        key = candidates[0]
        if len(candidates) > 1:
            key = await self._which(candidates)
        return key, names.beside(key, "checkpoints")

    async def _which(self, candidates: list[str]) -> str:
        for key in candidates:
            if (await self._broker.ask(key, [("EXISTS", *self._broker.names.keys(key))], what="checkpoints"))[0]:
                return key
        return candidates[0]

    async def save(self, checkpoint: Checkpoint, *, force: bool = False) -> Checkpoint:
        self._broker.check_open()
        check_save(checkpoint)
        what = f"stream {checkpoint.stream}: saving checkpoint {checkpoint.name}"
        names, settings = self._broker.names, self._broker.link.settings
        key, place = await self._key(checkpoint.stream)
        await self._broker.ask(names.positions, [("SADD", names.positions, key)], what=what)
        commands: list[Command] = [
            run(
                "checkpoint", (place,), checkpoint.name, checkpoint.incarnation, f"{checkpoint.sequence:019d}",
                "1" if force else "",
            )
        ]  # fmt: skip
        ms = int(settings.wait_timeout_s * 1000)
        if settings.waitaof:
            commands.append(("WAITAOF", 1, settings.wait_replicas, ms))
        elif settings.wait_replicas:
            commands.append(("WAIT", settings.wait_replicas, ms))
        answer, *waited = await self._broker.ask(place, commands, what=what)
        if answer[0] == b"no":
            stored = _stored(checkpoint.stream, checkpoint.name, answer[1:])
            check_advance(stored, checkpoint)
            raise Internal(f"{what}: the server refused what may follow")
        for reply in waited:
            got = reply[1] if isinstance(reply, list) else reply
            if got < settings.wait_replicas or (isinstance(reply, list) and reply[0] < 1):
                raise Unavailable(f"{what}: saved, but not yet where it was to be", hint="save it again")
        return replace(checkpoint, time_ns=int(answer[1]))

    async def load(self, stream: str, name: str) -> Checkpoint | None:
        self._broker.check_open()
        check_key(stream, name)
        _, place = await self._key(stream)
        (found,) = await self._broker.ask(place, [("HGET", place, name)], what=f"loading checkpoint {name}")
        return None if found is None else _stored(stream, name, msgspec.msgpack.decode(found))

    async def delete(self, stream: str, name: str) -> bool:
        self._broker.check_open()
        check_key(stream, name)
        _, place = await self._key(stream)
        (gone,) = await self._broker.ask(place, [("HDEL", place, name)], what=f"deleting checkpoint {name}")
        return bool(gone)

    async def list(self, stream: str = "") -> list[Checkpoint]:
        self._broker.check_open()
        what = "listing checkpoints"
        names = self._broker.names
        if stream:
            check_stream(stream)
            keys = [(await self._key(stream))[0]]
        else:
            (members,) = await self._broker.ask(names.positions, [("SMEMBERS", names.positions)], what=what)
            keys = [m.decode() for m in members]
        out: list[Checkpoint] = []
        for key in keys:
            of = names.name(key.encode())
            if of is None:
                continue
            place = names.beside(key, "checkpoints")
            (flat,) = await self._broker.ask(place, [("HGETALL", place)], what=what)
            out += [
                _stored(of, n.decode(), msgspec.msgpack.decode(v)) for n, v in zip(flat[::2], flat[1::2], strict=True)
            ]
        return sorted(out, key=lambda c: (c.stream, c.name))


def _stored(stream: str, name: str, values: Any) -> Checkpoint:
    incarnation, sequence, stamp = (v.decode() if isinstance(v, bytes) else v for v in values)
    return Checkpoint(stream=stream, name=name, incarnation=incarnation, sequence=int(sequence), time_ns=int(stamp))
