"""The broker: streams by name, own and foreign, made, listed and deleted."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

import msgspec
from msgspec.structs import replace

from mist.broker.base import DEFAULTS, Broker, Capabilities, Fact, StreamConfig
from mist.errors import Closed, Conflict, NotFound, TimedOut, Unsupported
from mist.protocol.subject import check_stream
from mist_redis import durability
from mist_redis.checkpoints import RedisCheckpoints
from mist_redis.faults import unavailable
from mist_redis.link import Address, Link
from mist_redis.names import Names
from mist_redis.resp import Command, Lost
from mist_redis.scripts import run
from mist_redis.stream import RedisStream
from mist_redis.waiting import Watches

CAPABILITIES = Capabilities(persistent=True, processes=True, threads=True, erase=True)
FOREIGN = "foreign"
"""The incarnation of a stream somebody else made: Redis keeps nothing that tells a remade one from a trimmed one."""
OLDEST = (6, 2)
SCAN_KEYS_MAX = 200_000
"""How many keys a listing looks at for streams of others; ours are always listed."""
CLOSE_S = 10.0


class RedisBroker(Broker):
    backend = "redis"
    capabilities = CAPABILITIES

    def __init__(self, url: str, link: Link) -> None:
        self.url = url
        self.link = link
        self.names = Names(link.settings.prefix, cluster=link.settings.kind == "cluster")
        self.watches = Watches(link)
        self.running: set[asyncio.Task[Any]] = set()
        """Appends under way: close waits for them."""
        self._checkpoints = RedisCheckpoints(self)
        self._closed = False
        self._ended: asyncio.Future[None] | None = None

    def check_open(self) -> None:
        if self._closed:
            raise Closed("the broker is closed")

    async def begin(self) -> None:
        """Connect, and refuse a server that is too old."""
        (info,) = await self.ask(b"", [("INFO", "server")], what="connecting")
        lines = dict(x.split(":", 1) for x in info.decode("utf-8", "replace").splitlines() if ":" in x)
        version = lines.get("redis_version", "0.0")
        numbers = tuple(int(p) for p in version.split(".")[:2] if p.isdigit())
        if numbers < OLDEST:
            raise Unsupported(f"Redis {version}", "redis", hint="Redis 6.2 or newer, or Valkey, is needed")

    async def ask(self, key: str | bytes, commands: list[Command], *, what: str, raw: bool = False) -> list[Any]:
        """Replies to commands that may be repeated. Raises Unavailable when they cannot be had."""
        self.check_open()
        with unavailable(what):
            return await self.link.run(key, commands, what=what, repeat=True, raw=raw)

    async def facts(self, key: str) -> durability.Facts:
        """What the server with this key says about its durability."""
        return durability.facts(await self.ask(key, list(durability.QUESTIONS), what="looking at the server", raw=True))

    async def open(self, name: str, *, create: bool = True, config: StreamConfig | None = None) -> RedisStream:
        self.check_open()
        candidates = self.names.candidates(name)
        asked = (config or StreamConfig()).validate()
        what = f"stream {name}: open"
        for key in candidates[1:]:  # a foreign key called by its encoded name, unless the exact one is there
            exact, other = await self.ask(candidates[0], [("EXISTS", candidates[0])], what=what), None
            if not exact[0]:
                other = await self._found(key, what)
            if other is not None and other[0] == b"foreign":
                return await self._opened(name, key, other, asked)
        key = candidates[0]
        found = await self._found(key, what)
        if found[0] == b"absent":
            if not create:
                raise NotFound(f"no stream {name} in {self.url}")
            found = await self._make(name, key, asked)
        if found[0] == b"type":
            raise Conflict(
                f"stream {name}: the key {key} holds a {found[1].decode()}",
                hint="choose another stream name, or a prefix in the URL",
            )
        return await self._opened(name, key, found, asked)

    async def _found(self, key: str, what: str) -> list[Any]:
        (found,) = await self.ask(key, [run("open", self.names.keys(key), "")], what=what)
        return found  # type: ignore[no-any-return]

    async def _make(self, name: str, key: str, asked: StreamConfig) -> list[Any]:
        facts = await self.facts(key)
        settings = self.link.settings
        if asked.durability is not None:
            durability.check(asked.durability, facts, settings)
        full = asked.or_defaults(replace(DEFAULTS, durability=durability.default(facts, settings)))
        fields: list[str | int] = []
        for field, value in (
            ("age", round((full.age_s_max or 0) * 1000)), ("bytes_max", int(full.bytes_max or 0)),
            ("records_max", int(full.records_max or 0)), ("full", full.full or ""),
            ("win", round((full.dedupe_window_s or 0) * 1000)), ("win_n", int(full.dedupe_ids_max or 0)),
        ):  # fmt: skip
            fields += (field, value)
        what = f"stream {name}: open"
        # the registry first: a name in it without a stream is passed over, a stream outside it might not be listed
        await self.ask(self.names.streams, [("SADD", self.names.streams, key)], what=what)
        made = run(
            "open",
            self.names.keys(key),
            "1",
            secrets.token_hex(8),
            str(time.time_ns()),
            msgspec.json.encode(full),
            *fields,
        )
        (found,) = await self.ask(key, [made], what=what)
        return found  # type: ignore[no-any-return]

    async def _opened(self, name: str, key: str, found: list[Any], asked: StreamConfig) -> RedisStream:
        if found[0] == b"foreign":
            level = (await self.facts(key)).level
            existing = replace(DEFAULTS, durability=level)
            incarnation, created, big = FOREIGN, 0, 0
        else:
            existing = msgspec.json.decode(found[2], type=StreamConfig)
            incarnation, created, big = found[1].decode(), int(found[3]), int(found[4])
        asked.check_fits(existing, name)
        return RedisStream(self, name, key, incarnation, existing, created, big)

    async def streams(self) -> list[str]:
        self.check_open()
        what = "listing streams"
        keys: set[bytes] = set()
        (registered,) = await self.ask(self.names.streams, [("SMEMBERS", self.names.streams)], what=what)
        for key in registered:
            text = key.decode()
            (there,) = await self.ask(text, [("EXISTS", *self.names.keys(text))], what=what)
            if there:
                keys.add(key)
        for address in await self.link.primaries():
            keys |= await self._scan(address, what)
        return sorted({n for n in map(self.names.name, keys) if n is not None})

    async def _scan(self, address: Address, what: str) -> set[bytes]:
        """Stream keys of one server, ours and others', among the first SCAN_KEYS_MAX keys."""
        cursor = b"0"
        found: set[bytes] = set()
        for _ in range(SCAN_KEYS_MAX // 1000):
            scan = ("SCAN", cursor, "MATCH", f"{self.names.prefix}*", "COUNT", 1000, "TYPE", "stream")
            with unavailable(what):
                ((cursor, keys),) = await self.link.run(b"", [scan], what=what, repeat=True, address=address)
            found.update(keys)
            if cursor == b"0":
                break
        return found

    async def delete(self, name: str) -> None:
        self.check_open()
        check_stream(name)
        what = f"stream {name}: delete"
        for key in self.names.candidates(name):
            (answer,) = await self.ask(key, [run("delete", self.names.keys(key))], what=what)
            if answer[0] == b"ok":
                await self.ask(self.names.streams, [("SREM", self.names.streams, key)], what=what)
                await self.ask(self.names.positions, [("SREM", self.names.positions, key)], what=what)
                return
            if answer[1] != b"none":
                raise Conflict(f"stream {name}: the key {key} holds a {answer[1].decode()}")
        raise NotFound(f"no stream {name} in {self.url}")

    async def ping(self) -> float:
        self.check_open()
        began = time.perf_counter()
        try:
            await self.link.run(b"", [("PING",)], what="ping")
        except Lost as exc:
            raise TimedOut(f"ping: {exc}") from exc
        return time.perf_counter() - began

    async def describe(self) -> list[Fact]:
        return durability.described(await self.facts(""), self.link.settings)

    @property
    def checkpoints(self) -> RedisCheckpoints:
        return self._checkpoints

    async def aclose(self) -> None:
        if self._ended is not None:
            await asyncio.shield(self._ended)
            return
        self._closed = True
        self._ended = asyncio.get_running_loop().create_future()
        try:
            if self.running:
                await asyncio.wait(self.running, timeout=CLOSE_S)
            await self.watches.close()
            await self.link.close()
        finally:
            self._ended.set_result(None)

    def spawn(self, task: asyncio.Task[Any]) -> None:
        """Keep a task until it ends; close waits for it. Its errors belong to whoever awaits it."""
        self.running.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self.running.discard(task)
        if not task.cancelled():
            task.exception()
