"""The frame of the suite: what an adapter's author fills in, and what every case is given.

A case is an `async def test_*(self, env)` under `@case(...)`: it runs on a fresh event loop with a connected broker and
stream names nobody else uses, under a time limit. `case("trim")` says which capabilities it needs; where the broker
does not declare one, the case tests the refusal instead. Does not: start servers, or judge speed.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

import mist
from mist.broker.base import (
    ALL,
    BYTES_MAX,
    Broker,
    Checkpoint,
    Consumer,
    ConsumerConfig,
    Delivery,
    Message,
    Record,
    Stream,
    StreamConfig,
)
from mist.errors import MistError, NotFound, Unsupported
from mist.protocol.subject import STREAM_CHARS_MAX, dead_stream

T = TypeVar("T")
H = TypeVar("H", bound="Harness")

NO_CALL = frozenset({"persistent", "processes", "threads"})
"""Capabilities without a call that could refuse: undeclared, their cases are skipped."""


class Harness:
    """What an adapter's author overrides. Setting `url` (in a fixture, one store per test) is enough for most."""

    url: str = ""
    """Where `connect` and `reconnect` go, and what child processes connect to."""
    dense: bool = True
    """Sequences start at 1 and have no gaps. False where the server numbers and only order is promised."""
    patience_s: float = 20.0
    """How long something that must happen may take before the case fails. Never how long a case waits when all is
    well."""
    case_timeout_s: float = 90.0

    async def connect(self) -> Broker:
        """A broker on a store for this test alone (or on a shared server: every stream name of the suite is unique)."""
        return await mist.connect(self.url)

    async def reconnect(self) -> Broker:
        """One more connection to the same store."""
        return await mist.connect(self.url)

    def stream_config(self, config: StreamConfig) -> StreamConfig:
        """The configuration the suite asks for, completed: an adapter that keeps segments makes them small here, so
        that retention shows after a few records."""
        return config

    def failing_append(self, broker: Broker, *, after: int) -> AbstractAsyncContextManager[None] | None:
        """A block in which the storage of this broker takes `after` more messages and then fails. None: no way."""
        return None

    async def damage(self, broker: Broker, stream: str, first: int, last: int) -> tuple[int, int] | None:
        """Damage the stored records first..last and return the range that is unreadable now (blocks may make it
        wider). The suite connects again afterwards. None: no way."""
        return None

    async def stored(self, broker: Broker, stream: str) -> bytes | None:
        """Every byte that the backend keeps of a stream where others could read it (its files), so that the suite can
        look for what must be gone. None: no way, or the backend promises nothing about bytes."""
        return None

    async def _run_case(self, body: Callable[[Any, Env], Awaitable[None]], needs: Sequence[str]) -> None:
        async with asyncio.timeout(self.case_timeout_s):
            env = Env(self, await self.connect())
            try:
                # without `read` there is nothing to judge the rest by: an adapter like that brings tests of its own
                missing = [n for n in (*needs, "read") if not getattr(env.broker.capabilities, n)]
                if missing:
                    await expect_refusal(env, missing[0])
                else:
                    await body(self, env)
            except BaseException:
                await env.close(failed=True)
                raise
            await env.close()


def case(*needs: str) -> Callable[[Callable[[H, Env], Awaitable[None]]], Callable[[H], None]]:
    """Make an async case a plain test method."""

    def wrap(body: Callable[[H, Env], Awaitable[None]]) -> Callable[[H], None]:
        def test(self: H) -> None:
            asyncio.run(self._run_case(body, needs))

        # not functools.wraps: pytest would look through it and take `env` for a fixture
        test.__name__, test.__qualname__ = body.__name__, body.__qualname__
        test.__doc__, test.__module__ = body.__doc__, body.__module__
        return test

    return wrap


class Env:
    """What a case works with: a broker, stream names of its own, more connections, and clean-up."""

    def __init__(self, harness: Harness, broker: Broker) -> None:
        self.harness = harness
        self.broker = broker
        self.patience_s = harness.patience_s
        self._tag = secrets.token_hex(5)
        self._names: list[str] = []
        self._others: list[Broker] = []

    def name(self, suffix: str = "s") -> str:
        """A stream name of this case; the same suffix gives the same name."""
        name = f"conf-{self._tag}-{suffix}"
        if name not in self._names:
            self._names.append(name)
        return name

    async def stream(self, suffix: str = "s", config: StreamConfig | None = None) -> Stream:
        asked = None if config is None else self.harness.stream_config(config)
        return await self.broker.open(self.name(suffix), config=asked)

    async def another(self) -> Broker:
        """A second connection to the same store, closed at the end of the case."""
        broker = await self.harness.reconnect()
        self._others.append(broker)
        return broker

    async def restart(self) -> Broker:
        """Close the broker and connect again: what is persistent is still there."""
        await self.broker.aclose()
        self.broker = await self.harness.reconnect()
        return self.broker

    async def close(self, *, failed: bool = False) -> None:
        """Remove what the case made and close every connection. After a failed case its error matters, not ours."""
        try:
            await self._remove()
        except MistError:
            if not failed:
                raise
        finally:
            for broker in (*self._others, self.broker):
                await broker.aclose()

    async def _remove(self) -> None:
        if not self.broker.capabilities.delete:
            return
        await self.broker.aclose()
        self.broker = await self.harness.reconnect()
        there = set(await self.broker.streams())
        for name in self._names:
            for each in (name, dead_stream(name)) if len(name) + 6 <= STREAM_CHARS_MAX else (name,):
                if each in there:
                    try:
                        await self.broker.delete(each)
                    except NotFound:
                        continue


async def expect_refusal(env: Env, capability: str) -> None:
    """An undeclared capability: the calls it is about raise Unsupported and change nothing."""
    if capability in NO_CALL:
        pytest.skip(f"not declared: {capability} (there is no call that could refuse)")
    if capability == "append":
        with pytest.raises(Unsupported):
            await (await env.stream()).append([Message("a", b"")])
    elif capability == "conditional_append":
        stream = await env.stream()
        with pytest.raises(Unsupported):
            await stream.append([Message("a", b"")], expected_last=0)
        assert (await stream.info()).records == 0
    elif capability == "dedupe":
        with pytest.raises(Unsupported):
            await env.broker.open(env.name(), config=StreamConfig(dedupe_window_s=60.0))
    elif capability == "retention":
        for config in (StreamConfig(records_max=5), StreamConfig(bytes_max=9999), StreamConfig(age_s_max=60.0)):
            with pytest.raises(Unsupported):
                await env.broker.open(env.name(), config=config)
    elif capability == "checkpoints":
        checkpoint = Checkpoint(stream=env.name(), name="c", incarnation="i", sequence=1)
        for call in (
            lambda: env.broker.checkpoints.save(checkpoint),
            lambda: env.broker.checkpoints.load(env.name(), "c"),
            lambda: env.broker.checkpoints.delete(env.name(), "c"),
            lambda: env.broker.checkpoints.list(),
        ):
            with pytest.raises(Unsupported):
                await call()
    elif capability == "pending":
        stream = await env.stream()
        if env.broker.capabilities.append:
            await stream.append([Message("a", b"")])
        consumer = await stream.consumer("c")
        with pytest.raises(Unsupported):
            await consumer.pending()
        assert (await consumer.info()).pending == 0
    elif capability == "delete":
        await env.stream()
        with pytest.raises(Unsupported):
            await env.broker.delete(env.name())
        assert env.name() in await env.broker.streams()
    else:
        stream = await env.stream()
        calls: dict[str, list[Callable[[], Coroutine[Any, Any, object]]]] = {
            "read": [stream.read, lambda: stream.read(limit=1, wait_s=0.01)],
            "consumers": [lambda: stream.consumer("c"), stream.consumers],
            "trim": [lambda: stream.trim(before=1)],
            "erase": [lambda: stream.erase([1]), lambda: stream.erase([])],
            "locate": [lambda: stream.locate(0)],
            "verify": [stream.verify],
        }
        for refused in calls[capability]:
            with pytest.raises(Unsupported):
                await refused()


def messages(count: int, *, start: int = 0, subject: str = "a.b", ids: str = "", size: int = 0) -> list[Message]:
    """`count` different messages; with `ids`, each has the id `<ids><number>`."""
    return [
        Message(subject, b"%d" % n if not size else (b"%08d" % n).ljust(size, b"."), f"{ids}{n}" if ids else "")
        for n in range(start, start + count)
    ]


async def read_all(
    stream: Stream,
    *,
    after: int = 0,
    subjects: Sequence[str] = ALL,
    limit: int = 256,
    bytes_max: int = BYTES_MAX,
) -> list[Record]:
    """Every record up to the end, page by page, checking on the way what holds for every page."""
    out: list[Record] = []
    stuck = 0
    while True:
        page = await stream.read(after=after, subjects=subjects, limit=limit, bytes_max=bytes_max)
        assert len(page.records) <= limit, "a page is longer than its limit"
        assert len(page.records) < 2 or sum(len(r.data) for r in page.records) <= bytes_max, "a page above bytes_max"
        assert page.scanned >= after, "scanned went back"
        sequences = [after, *(r.sequence for r in page.records)]
        assert all(a < b for a, b in pairwise(sequences)), f"not increasing: {sequences}"
        assert page.scanned >= sequences[-1], "scanned lies before a record of its own page"
        out += page.records
        if page.scanned >= page.last:
            return out
        stuck = stuck + 1 if page.scanned == after else 0
        assert stuck < 3, f"read does not get on: after={after}, last={page.last}, and no record"
        after = page.scanned


async def eventually(probe: Callable[[], Awaitable[T]], *, within_s: float, what: str) -> T:
    """Ask until the answer is true. Fails with `what` when the time is over."""
    until = time.monotonic() + within_s
    while True:
        answer = await probe()
        if answer:
            return answer
        assert time.monotonic() < until, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.02)


async def take(
    env: Env, consumer: Consumer, count: int, *, limit: int = 256, bytes_max: int = BYTES_MAX
) -> list[Delivery]:
    """Fetch until `count` deliveries came, and not one more."""
    out: list[Delivery] = []
    until = time.monotonic() + env.patience_s
    while len(out) < count:
        assert time.monotonic() < until, f"{len(out)} of {count} deliveries within {env.patience_s} s"
        out += await consumer.fetch(limit=min(limit, count - len(out)), bytes_max=bytes_max, wait_s=0.2)
    return out


async def nothing_to_fetch(consumer: Consumer) -> None:
    """There is no delivery now, and a fetch says so when its wait is over. Only sound while leases are long."""
    async with asyncio.timeout(20):
        assert await consumer.fetch(limit=10, wait_s=0.05) == []
        assert await consumer.fetch(limit=1, wait_s=0.01) == []


def worker_config(**settings: Any) -> ConsumerConfig:
    """A consumer whose leases do not run out while a slow machine thinks."""
    return replace(ConsumerConfig(ack_wait_s=300.0), **settings)


async def blocked(task: asyncio.Task[Any]) -> None:
    """Give a task time to reach its wait; fails when it ends instead."""
    for _ in range(5):
        await asyncio.sleep(0.01)
        assert not task.done(), f"it did not wait: {task.exception() or task.result()!r}"


async def cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended as cancelled."""
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=20)
    assert done, "a cancelled call goes on as if nothing had been"
    assert task.cancelled(), "a cancelled call swallowed its cancellation"


def sequences_of(items: Sequence[Record] | Sequence[Delivery]) -> list[int]:
    return [i.sequence if isinstance(i, Record) else i.record.sequence for i in items]


def data_of(records: Sequence[Record]) -> list[bytes]:
    return [r.data for r in records]
