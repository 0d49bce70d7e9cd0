"""A broker for tests of what stands in front of one: in memory, away when told to be, and as unreliable as the contract
allows. `shaky:NAME`, registered with `register`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest

import mist.broker.memory as memory
from mist.broker import registry
from mist.broker.backoff import Backoff
from mist.broker.base import Message, Stream, StreamConfig
from mist.broker.patience import Patience, Steady
from mist.errors import Ambiguous, PartialAppend, TooLarge, Unavailable
from mist.protocol.url import Url

NOW = Backoff(first_s=0.0, most_s=0.0)


class World:
    """What happens to one shaky broker."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.away = False
        self.trouble = 0.0
        self.size_bytes_max = 1 << 30
        self.rng = random.Random(name)
        self.appends = 0
        self.config: StreamConfig | None = None

    def check(self) -> None:
        if self.away:
            raise Unavailable(f"shaky:{self.name} is away")


worlds: dict[str, World] = {}


def world(name: str) -> World:
    return worlds.setdefault(name, World(name))


def register(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(registry._BUILT_IN, "shaky", f"{__name__}:connect")


class Shaky(Steady):
    def __init__(self, stream: Stream, world: World) -> None:
        super().__init__(stream, Patience(backoff=NOW))
        self.size_bytes_max = min(stream.size_bytes_max, world.size_bytes_max)
        self._world = world

    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        world = self._world
        world.check()
        await asyncio.sleep(0)
        for m in messages:
            if len(m.data) > self.size_bytes_max:
                raise TooLarge("message", size_bytes=len(m.data), size_bytes_max=self.size_bytes_max)
        world.appends += 1
        if world.rng.random() >= world.trouble:
            return await self.stream.append(messages, expected_last=expected_last)
        how = world.rng.choice(("lost", "stored", "partial", "away"))
        if how == "away":
            raise Unavailable("not now")
        if how == "partial":
            half = await self.stream.append(messages[: len(messages) // 2], expected_last=expected_last)
            raise PartialAppend(half, total=len(messages)) from Ambiguous("cut")
        if how == "stored":
            await self.stream.append(messages, expected_last=expected_last)
        raise Ambiguous("no answer")

    async def read(self, **kw: Any) -> Any:
        self._world.check()
        return await self.stream.read(**kw)

    async def info(self) -> Any:
        self._world.check()
        return await self.stream.info()


async def connect(url: Url, **options: Any) -> memory.MemoryBroker:
    here = world(url.target)
    here.check()
    broker = await memory.connect(Url("memory", f"shaky-{url.target}"))
    real = broker.open

    async def opened(name: str, *, create: bool = True, config: StreamConfig | None = None) -> Any:
        here.check()
        return Shaky(await real(name, create=create, config=config or here.config), here)

    broker.open = opened  # type: ignore[method-assign]
    return broker
