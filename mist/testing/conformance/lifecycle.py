"""Closing, cancelling, and what may come out: only errors of mist.errors, whatever goes in."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from mist.broker.base import Checkpoint, Message
from mist.errors import Closed, MistError
from mist.testing.conformance.harness import (
    Env,
    Harness,
    blocked,
    cancel,
    case,
    data_of,
    messages,
    read_all,
    sequences_of,
    take,
    worker_config,
)


class Lifecycle(Harness):
    @case("append")
    async def test_a_cancelled_read_loses_nothing(self, env: Env) -> None:
        """Cancelling a waiting read ends it; the next read at the same position gives everything."""
        stream = await env.stream()
        for n in range(5):
            last = (await stream.info()).last
            reading = asyncio.create_task(stream.read(after=last, wait_s=env.patience_s * 2))
            await blocked(reading)
            await cancel(reading)
            await stream.append(messages(1, start=n))
        reading = asyncio.create_task(stream.read())
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert data_of(await read_all(stream)) == [b"%d" % n for n in range(5)]

    @case("append")
    async def test_a_cancelled_follower_ends(self, env: Env) -> None:
        """Cancelling a loop of waiting reads beside a busy writer ends it: no call swallows the cancellation."""
        stream = await env.stream()

        async def follow() -> None:
            after = 0
            while True:
                after = (await stream.read(after=after, wait_s=5.0)).scanned

        for n in range(60):
            following = asyncio.create_task(follow())
            for _ in range(n % 7):
                await asyncio.sleep(0)
            await stream.append(messages(1))  # wakes it in the same instant as the cancellation comes
            for _ in range(n % 5):
                await asyncio.sleep(0)
            await cancel(following)

    @case("append", "consumers")
    async def test_a_cancelled_fetch_loses_nothing(self, env: Env) -> None:
        """Whatever the moment of the cancellation, every record is delivered (at the latest after its ack wait)."""
        stream = await env.stream()
        consumer = await stream.consumer("c", worker_config(ack_wait_s=1.0, attempts_max=0))
        settled: set[int] = set()
        for n in range(30):
            fetching = asyncio.create_task(consumer.fetch(wait_s=env.patience_s * 2))
            for _ in range(n % 6):
                await asyncio.sleep(0)
            await stream.append(messages(1, start=n))
            for _ in range(n % 5):
                await asyncio.sleep(0)
            fetching.cancel()
            (got,) = await asyncio.gather(fetching, return_exceptions=True)
            if isinstance(got, list):
                settled |= set(sequences_of(got)) if await consumer.ack(got) == len(got) else set()
            else:
                assert isinstance(got, asyncio.CancelledError), got
        everything = sequences_of(await read_all(stream))
        async with asyncio.timeout(env.patience_s):
            while settled != set(everything):
                for d in await consumer.fetch(wait_s=1.0):
                    if await consumer.ack([d]):
                        settled.add(d.record.sequence)
        assert (await consumer.info()).lag == 0

    @case("append", "consumers")
    async def test_a_waiting_fetch_that_is_cancelled_takes_nothing(self, env: Env) -> None:
        """A fetch cancelled while it waits at the end has no lease: the next fetch gets the record at once."""
        stream = await env.stream()
        consumer = await stream.consumer("c", worker_config())
        for n in range(5):
            fetching = asyncio.create_task(consumer.fetch(wait_s=env.patience_s * 2))
            await blocked(fetching)
            await cancel(fetching)
            s = await stream.append(messages(1, start=n))
            got = await take(env, consumer, 1)
            assert sequences_of(got) == s
            assert got[0].attempt == 1
            await consumer.ack(got)

    @case("append", "dedupe")
    async def test_repeating_a_cancelled_append_is_safe(self, env: Env) -> None:
        """A cancelled append was stored or not (or in part); with the same ids it is stored once after a repeat."""
        stream = await env.stream()
        for n in range(12):
            batch = messages(5, start=5 * n, ids="i")
            writing = asyncio.create_task(stream.append(batch))
            for _ in range(n % 6):
                await asyncio.sleep(0)
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            got = await stream.append(batch)
            assert len(set(got)) == 5
            assert await stream.append(batch) == got
        assert data_of(await read_all(stream)) == [b"%d" % n for n in range(60)]

    @case("append")
    async def test_a_cancelled_append_harms_no_other(self, env: Env) -> None:
        """Appends of other tasks at the same time are whole, in order, and have their sequences."""
        stream = await env.stream()

        async def write(who: int) -> list[int]:
            return await stream.append(messages(4, subject=f"w.{who}"))

        for n in range(10):
            tasks = [asyncio.create_task(write(who)) for who in range(4)]
            for _ in range(n % 3):
                await asyncio.sleep(0)
            tasks[n % 4].cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            records = {r.sequence: r for r in await read_all(stream)}
            for who, answer in enumerate(ended):
                if who == n % 4 and not isinstance(answer, list):
                    continue
                assert isinstance(answer, list), answer
                assert [records[s].data for s in answer] == [b"0", b"1", b"2", b"3"]
                assert {records[s].subject for s in answer} == {f"w.{who}"}

    @case("append", "consumers")
    async def test_close_wakes_every_waiter(self, env: Env) -> None:
        """Waiting reads and fetches raise Closed, promptly."""
        stream = await env.stream()
        other = await env.stream("other")
        consumer = await stream.consumer("c")
        tasks = [
            asyncio.create_task(stream.read(wait_s=env.patience_s * 3)),
            asyncio.create_task(stream.read(subjects=("none",), wait_s=float("inf"))),
            asyncio.create_task(other.read(wait_s=env.patience_s * 3)),
            asyncio.create_task(consumer.fetch(wait_s=env.patience_s * 3)),
            asyncio.create_task(consumer.fetch(wait_s=env.patience_s * 3)),
        ]
        await asyncio.gather(*(blocked(t) for t in tasks))
        await env.broker.aclose()
        ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), env.patience_s)
        assert [type(e) for e in ended] == [Closed] * len(tasks)

    @case("append")
    async def test_close_is_idempotent(self, env: Env) -> None:
        """Again, and by many at once, and without anything having been opened."""
        await env.stream()
        await asyncio.gather(*(env.broker.aclose() for _ in range(3)))
        await env.broker.aclose()
        unused = await env.another()
        await unused.aclose()
        await unused.aclose()
        async with await env.another() as broker:
            await broker.aclose()

    @case("append")
    async def test_close_finishes_accepted_appends(self, env: Env) -> None:
        """An append that was running when the broker closed is stored or raises; it never hangs or lies."""
        stream = await env.stream()
        writing = [asyncio.create_task(stream.append(messages(3, start=3 * n))) for n in range(8)]
        await asyncio.sleep(0)
        await env.broker.aclose()
        ended = await asyncio.wait_for(asyncio.gather(*writing, return_exceptions=True), env.patience_s)
        for answer in ended:
            assert isinstance(answer, list | MistError), answer
        if not env.broker.capabilities.persistent:
            return
        env.broker = await self.reconnect()
        records = {r.sequence: r.data for r in await read_all(await env.stream())}
        for n, answer in enumerate(ended):
            if isinstance(answer, list):
                assert [records[s] for s in answer] == [b"%d" % (3 * n + i) for i in range(3)]

    @case("append")
    async def test_use_after_close_raises_closed(self, env: Env) -> None:
        """Every call of the broker, its streams, consumers and checkpoints."""
        broker, caps = env.broker, env.broker.capabilities
        stream = await env.stream()
        await stream.append(messages(2))
        calls: list[tuple[str, Callable[[], Awaitable[Any]]]] = [
            ("open", lambda: broker.open(stream.name)),
            ("streams", broker.streams),
            ("ping", broker.ping),
            ("append", lambda: stream.append(messages(1))),
            ("append nothing", lambda: stream.append([])),
            ("read", stream.read),
            ("info", stream.info),
        ]
        if caps.delete:
            calls.append(("delete", lambda: broker.delete(stream.name)))
        if caps.locate:
            calls.append(("locate", lambda: stream.locate(0)))
        if caps.trim:
            calls.append(("trim", lambda: stream.trim(before=1)))
        if caps.erase:
            calls.append(("erase", lambda: stream.erase([1])))
        if caps.verify:
            calls.append(("verify", stream.verify))
        if caps.checkpoints:
            store = broker.checkpoints
            checkpoint = Checkpoint(stream=stream.name, name="c", incarnation=stream.incarnation, sequence=1)
            calls += [
                ("save", lambda: store.save(checkpoint)),
                ("load", lambda: store.load(stream.name, "c")),
                ("checkpoints.delete", lambda: store.delete(stream.name, "c")),
                ("list", store.list),
            ]
        if caps.consumers:
            consumer = await stream.consumer("c", worker_config())
            held = await take(env, consumer, 1)
            calls += [
                ("consumer", lambda: stream.consumer("c")),
                ("consumers", stream.consumers),
                ("fetch", consumer.fetch),
                ("ack", lambda: consumer.ack(held)),
                ("nak", lambda: consumer.nak(held)),
                ("term", lambda: consumer.term(held)),
                ("extend", lambda: consumer.extend(held)),
                ("consumer.info", consumer.info),
                ("pending", consumer.pending),
                ("seek", lambda: consumer.seek(0)),
                ("consumer.delete", consumer.delete),
            ]
        await broker.aclose()
        for name, call in calls:
            try:
                answer = await call()
            except Closed:
                continue
            pytest.fail(f"{name} after close answers {answer!r}, it must raise Closed")
        assert broker.url
        assert broker.backend

    @case("append")
    async def test_no_foreign_exception_escapes(self, env: Env) -> None:
        """Wild arguments of the right types end in an answer or an error of mist.errors, and harm nothing."""
        broker, caps = env.broker, env.broker.capabilities
        stream = await env.stream()
        await stream.append(messages(3))
        before = await read_all(stream)
        numbers = (-(2**80), -(2**63), -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 2**80)
        texts = ("", "\x00", "\ud800", "a\nb", "../../etc", "*", ">", "x" * 5000, "%s%n{}", "'; --", "ü", "-", "=")
        floats = (float("nan"), float("inf"), float("-inf"), -1.0, 1e300, -0.0)
        calls: list[Callable[[], Awaitable[Any]]] = []
        for n in numbers:
            calls += [
                partial(stream.read, after=n),
                partial(stream.read, limit=n),
                partial(stream.read, bytes_max=n),
                partial(stream.locate, n),
                partial(stream.trim, before=n if n > 2**20 else 0),
                partial(stream.append, [Message("a", b"wild")], expected_last=n),
            ]
        for t in texts:
            calls += [
                partial(broker.open, t, create=False),
                partial(broker.delete, t),
                partial(stream.read, subjects=(t,)),
                partial(stream.consumer, t, create=False),
                partial(broker.checkpoints.load, t, t),
                partial(broker.checkpoints.list, t),
            ]
        for f in floats:
            # every position holds a record, so no wait is ever begun
            calls.append(partial(stream.read, wait_s=f))
        if caps.consumers:
            consumer = await stream.consumer("c", worker_config(attempts_max=0))
            for n in numbers:
                calls += [
                    partial(consumer.fetch, limit=n),
                    partial(consumer.fetch, bytes_max=n),
                    partial(consumer.seek, n if n > 2**20 else 0),
                    partial(consumer.pending, limit=n),
                ]
            for f in floats:

                async def give_back(f: float = f) -> None:
                    await consumer.seek(0)
                    await consumer.nak(await consumer.fetch(wait_s=f), delay_s=f)

                calls.append(give_back)
        for call in calls:
            try:
                await call()
            except MistError:
                continue
        assert await read_all(stream) == before, "a refused call changed the stream"
        assert env.name() in await broker.streams()
        if caps.consumers:
            await consumer.seek(0)
            assert sequences_of(await take(env, consumer, 3)) == sequences_of(before)

    @case("append")
    async def test_error_messages_are_whole(self, env: Env) -> None:
        """Errors carry a code of the table and a message that names the stream."""
        stream = await env.stream()
        for call in (
            lambda: stream.read(after=10**6),
            lambda: env.broker.open(env.name("absent"), create=False),
        ):
            with pytest.raises(MistError) as error:
                await call()
            assert error.value.info
            assert "conf-" in str(error.value)

    @case("append")
    async def test_two_connections_to_one_store(self, env: Env) -> None:
        """Where the store outlives a connection, a second one sees it, and closing one leaves the other working."""
        caps = env.broker.capabilities
        if not (caps.threads or caps.processes or caps.persistent):
            pytest.skip("not declared: threads, processes or persistent")
        stream = await env.stream()
        await stream.append(messages(2))
        if caps.threads or caps.processes:
            other = await env.another()
        else:
            other = await env.restart()
        theirs = await other.open(env.name(), create=False)
        assert theirs.incarnation == stream.incarnation
        assert data_of(await read_all(theirs)) == [b"0", b"1"]
        if not (caps.threads or caps.processes):
            return
        reading = asyncio.create_task(theirs.read(after=(await theirs.info()).last, wait_s=env.patience_s * 2))
        await blocked(reading)
        third = await env.another()
        await third.aclose()
        await blocked(reading)
        await stream.append(messages(1, start=2))
        assert data_of((await asyncio.wait_for(reading, env.patience_s)).records) == [b"2"]
        for n in itertools.count(3):
            await theirs.append(messages(1, start=n))
            if n == 6:
                break
        assert len(await read_all(stream)) == 7
