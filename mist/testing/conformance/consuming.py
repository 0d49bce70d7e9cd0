"""Consumers as a whole: creation, start, filters, seek, delete, figures, bounds, waiting, sharing between tasks."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

import pytest

from mist.broker.base import ConsumerConfig, Delivery, Message
from mist.errors import Conflict, CursorAhead, InvalidArgument, NotFound
from mist.protocol.subject import STREAM_CHARS_MAX
from mist.testing.conformance.harness import (
    Env,
    Harness,
    blocked,
    case,
    eventually,
    messages,
    nothing_to_fetch,
    read_all,
    sequences_of,
    take,
    worker_config,
)


class Consuming(Harness):
    @case("append", "consumers")
    async def test_consumers_are_made_found_and_listed(self, env: Env) -> None:
        """Made on first use, found by name after, listed sorted; another configuration is a conflict."""
        stream = await env.stream()
        with pytest.raises(NotFound):
            await stream.consumer("c", create=False)
        assert await stream.consumers() == []
        config = worker_config(pending_max=9)
        made = await stream.consumer("c", config)
        assert (made.name, made.stream, made.config) == ("c", stream.name, config)
        for asked in (None, config):
            assert (await stream.consumer("c", asked)).config == config
            assert (await stream.consumer("c", asked, create=False)).config == config
        for other in (ConsumerConfig(), worker_config(pending_max=8), worker_config(pending_max=9, subjects=("a",))):
            with pytest.raises(Conflict):
                await stream.consumer("c", other)
        assert (await stream.consumer("a")).config == ConsumerConfig()
        await stream.consumer("B")
        assert await stream.consumers() == ["B", "a", "c"]
        assert (await made.info()).config == config

    @case("append", "consumers")
    async def test_fetch_delivers_in_order_with_attempt_one(self, env: Env) -> None:
        """New records come in order, each once, `limit` at most, with attempt 1."""
        stream = await env.stream()
        s = await stream.append(messages(23))
        consumer = await stream.consumer("c", worker_config())
        got: list[Delivery] = []
        while len(got) < 23:
            page = await consumer.fetch(limit=5, wait_s=env.patience_s)
            assert 1 <= len(page) <= 5
            got += page
        assert sequences_of(got) == s
        assert {d.attempt for d in got} == {1}
        assert len({(d.record.sequence, d.token) for d in got}) == 23
        await nothing_to_fetch(consumer)

    @case("append", "consumers")
    async def test_consumers_are_independent(self, env: Env) -> None:
        """Two consumers of one stream each get every record."""
        stream = await env.stream()
        s = await stream.append(messages(6))
        one, two = await stream.consumer("one", worker_config()), await stream.consumer("two", worker_config())
        await one.ack(await take(env, one, 6))
        assert sequences_of(await take(env, two, 6)) == s
        assert (await one.info()).lag == 0
        assert (await two.info()).lag == 6

    @case("append", "consumers")
    async def test_where_a_consumer_starts(self, env: Env) -> None:
        """`after` is exclusive; the end means new records only; beyond it is refused."""
        stream = await env.stream()
        s = await stream.append(messages(5))
        middle = await stream.consumer("middle", worker_config(after=s[1]))
        assert sequences_of(await take(env, middle, 3)) == s[2:]
        end = await stream.consumer("end", worker_config(after=s[-1]))
        await nothing_to_fetch(end)
        (new,) = await stream.append(messages(1, start=5))
        assert sequences_of(await take(env, end, 1)) == [new]
        with pytest.raises(CursorAhead):
            await stream.consumer("beyond", worker_config(after=new + 1))
        assert "beyond" not in await stream.consumers()

    @case("append", "consumers")
    async def test_a_waiting_fetch_wakes(self, env: Env) -> None:
        """A fetch at the end waits and gives what is appended meanwhile; without anything it ends empty."""
        stream = await env.stream()
        consumer = await stream.consumer("c", worker_config())
        began = time.monotonic()
        assert await consumer.fetch(wait_s=0.15) == []
        assert time.monotonic() - began >= 0.1, "it did not wait"
        assert await consumer.fetch() == []
        for n in range(3):
            fetching = asyncio.create_task(consumer.fetch(wait_s=env.patience_s * 2))
            await blocked(fetching)
            s = await stream.append(messages(1, start=n))
            got = await asyncio.wait_for(fetching, env.patience_s)
            assert sequences_of(got) == s
            await consumer.ack(got)

    @case("append", "consumers")
    async def test_fetches_respect_their_byte_bound(self, env: Env) -> None:
        """The data of a fetch stays within bytes_max, but a fetch gives at least one record; redeliveries too."""
        stream = await env.stream()
        s = await stream.append(messages(12, size=1000))
        consumer = await stream.consumer("c", worker_config(attempts_max=0))
        for attempt in (1, 2):
            got: list[Delivery] = []
            for bytes_max in (1, 2500, 999, 1000, 3999):
                page = await consumer.fetch(bytes_max=bytes_max, wait_s=env.patience_s)
                assert 1 <= len(page) <= max(1, bytes_max // 1000)
                got += page
            got += await take(env, consumer, 12 - len(got))
            assert sorted(sequences_of(got)) == s
            assert {d.attempt for d in got} == {attempt}
            assert await consumer.nak(got) == 12

    @case("append", "consumers")
    async def test_fetches_that_cannot_be_right(self, env: Env) -> None:
        """A limit or byte bound below one, a wait that is no number: InvalidArgument, and nothing is handed out."""
        stream = await env.stream()
        await stream.append(messages(2))
        consumer = await stream.consumer("c", worker_config())
        wrongs: tuple[dict[str, Any], ...] = ({"limit": 0}, {"limit": -3}, {"bytes_max": 0}, {"wait_s": float("nan")})
        for wrong in wrongs:
            with pytest.raises(InvalidArgument):
                await consumer.fetch(**wrong)
        assert (await consumer.info()).pending == 0

    @case("append", "consumers")
    async def test_a_filtered_consumer(self, env: Env) -> None:
        """Only matching records are delivered; the floor passes the others, also when nothing ever matches."""
        stream = await env.stream()
        sent = [Message(("a.x", "b", "a.y", "c")[n % 4], b"%d" % n) for n in range(40)]
        s = await stream.append(sent)
        consumer = await stream.consumer("c", worker_config(subjects=("a.*",)))
        got = await take(env, consumer, 20)
        assert [d.record.data for d in got] == [m.data for m in sent if m.subject.startswith("a.")]
        await nothing_to_fetch(consumer)
        await consumer.ack(got)

        async def passed() -> bool:
            info = await consumer.info()
            return (info.floor, info.lag) == (s[-1], 0)

        await eventually(passed, within_s=env.patience_s, what="the floor passes what does not match")
        none = await stream.consumer("none", worker_config(subjects=("zzz", "a.z.>")))
        await nothing_to_fetch(none)
        assert (await none.info()).floor == s[-1]

    @case("append", "consumers")
    async def test_a_filtered_fetch_reaches_a_late_match(self, env: Env) -> None:
        """A match behind thousands of other records comes with one fetch."""
        stream = await env.stream()
        for start in range(0, 3000, 1000):
            await stream.append(messages(1000, start=start, subject="noise"))
        (late,) = await stream.append([Message("signal", b"")])
        consumer = await stream.consumer("c", worker_config(subjects=("signal",)))
        assert sequences_of(await take(env, consumer, 1, limit=1)) == [late]

    @case("append", "consumers")
    async def test_seek(self, env: Env) -> None:
        """Seeking back delivers again with attempt 1, seeking ahead passes over; old deliveries become stale."""
        stream = await env.stream()
        s = await stream.append(messages(8))
        consumer = await stream.consumer("c", worker_config(pending_max=4))
        old = await take(env, consumer, 4)
        await consumer.ack(old[:1])
        await consumer.seek(s[1])
        info = await consumer.info()
        assert (info.pending, info.floor, info.lag, info.redelivered) == (0, s[1], 6, 0)
        if env.broker.capabilities.pending:
            assert await consumer.pending() == []
        assert await consumer.ack(old[1:]) == 0
        again = await take(env, consumer, 4)
        assert sequences_of(again) == s[2:6]
        assert {d.attempt for d in again} == {1}
        assert await consumer.ack(old[2:]) == 0, "a delivery from before the seek settled a later one"
        assert await consumer.nak(old[2:]) == 0
        assert await consumer.extend(old[2:]) == 0
        assert await consumer.term(old[2:]) == 0
        assert (await consumer.info()).pending == 4
        await consumer.seek(s[-1])
        await nothing_to_fetch(consumer)
        await consumer.seek(0)
        assert sequences_of(await take(env, consumer, 4)) == s[:4]
        with pytest.raises(CursorAhead):
            await consumer.seek(s[-1] + 1)
        with pytest.raises(InvalidArgument):
            await consumer.seek(-1)
        assert (await consumer.info()).pending == 4, "a refused seek changed something"

    @case("append", "consumers")
    async def test_a_seek_wakes_a_waiting_fetch(self, env: Env) -> None:
        """A fetch that waits at the end goes on where the seek put it."""
        stream = await env.stream()
        s = await stream.append(messages(3))
        consumer = await stream.consumer("c", worker_config(after=s[-1]))
        fetching = asyncio.create_task(consumer.fetch(wait_s=env.patience_s * 2))
        await blocked(fetching)
        await (await stream.consumer("c")).seek(s[0])
        assert sequences_of(await asyncio.wait_for(fetching, env.patience_s)) == s[1:]

    @case("append", "consumers", "trim")
    async def test_seek_below_the_first_kept_record(self, env: Env) -> None:
        """The consumer goes on with the first kept one."""
        stream = await env.stream()
        s = await stream.append(messages(6))
        consumer = await stream.consumer("c", worker_config())
        await consumer.ack(await take(env, consumer, 6))
        await stream.trim(before=s[3])
        await consumer.seek(0)
        assert (await consumer.info()).lag == 3
        assert sequences_of(await take(env, consumer, 3)) == s[3:]
        await stream.trim(before=s[-1] + 1)
        await consumer.seek(0)
        await nothing_to_fetch(consumer)
        info = await consumer.info()
        assert (info.lag, info.pending, info.lag_s) == (0, 0, 0.0)

    @case("append", "consumers")
    async def test_deleting_a_consumer(self, env: Env) -> None:
        """It is gone, twice is fine, its handles refuse; made again it starts anew and old deliveries are stale."""
        stream = await env.stream()
        s = await stream.append(messages(3))
        consumer = await stream.consumer("c", worker_config())
        other = await stream.consumer("c")
        old = await take(env, consumer, 3)
        waiting = asyncio.create_task(other.fetch(wait_s=env.patience_s * 2))
        await blocked(waiting)
        await consumer.delete()
        with pytest.raises(NotFound):
            await asyncio.wait_for(waiting, env.patience_s)
        await consumer.delete()
        assert await stream.consumers() == []
        for handle in (consumer, other):
            for call in (
                handle.fetch,
                partial(handle.ack, old),
                handle.info,
                partial(handle.seek, 0),
            ):
                with pytest.raises(NotFound):
                    await call()
        with pytest.raises(NotFound):
            await stream.consumer("c", create=False)
        new = await stream.consumer("c", worker_config(pending_max=5))
        again = await take(env, new, 3)
        assert sequences_of(again) == s
        assert {d.attempt for d in again} == {1}
        assert await new.ack(old) == 0, "a delivery of the deleted consumer settled one of the new consumer"
        assert await new.ack(again) == 3

    @case("append", "consumers")
    async def test_the_figures(self, env: Env) -> None:
        """floor, delivered, pending, redelivered, lag and lag_s say where the consumer is."""
        stream = await env.stream()
        consumer = await stream.consumer("c", worker_config())
        info = await consumer.info()
        assert (info.name, info.stream) == ("c", stream.name)
        assert (info.floor, info.delivered, info.pending, info.redelivered, info.lag, info.lag_s) == (0, 0, 0, 0, 0, 0)
        s = await stream.append(messages(10))
        await asyncio.sleep(0.05)
        info = await consumer.info()
        assert (info.floor, info.pending, info.lag) == (0, 0, 10)
        assert 0.04 <= info.lag_s < 3600
        got = await take(env, consumer, 4)
        info = await consumer.info()
        assert (info.delivered, info.pending, info.redelivered, info.lag) == (s[3], 4, 0, 10)
        await consumer.nak(got[:2])
        again = await take(env, consumer, 2)
        info = await consumer.info()
        assert (info.pending, info.redelivered, info.lag) == (4, 2, 10)
        await consumer.ack([*again, *got[2:]])
        info = await consumer.info()
        assert (info.floor, info.pending, info.redelivered, info.lag) == (s[3], 0, 0, 6)
        await consumer.ack(await take(env, consumer, 6))
        info = await consumer.info()
        assert (info.floor, info.delivered, info.lag, info.lag_s) == (s[-1], s[-1], 0, 0.0)

    @case("append", "consumers", "pending")
    async def test_pending_lists_the_unsettled(self, env: Env) -> None:
        """By sequence, with attempt and the time until it may be handed out again; bounded by limit."""
        stream = await env.stream()
        s = await stream.append(messages(5))
        consumer = await stream.consumer("c", worker_config(ack_wait_s=200.0))
        got = await take(env, consumer, 4)
        await consumer.ack(got[1:2])
        await consumer.nak(got[2:3])
        assert sequences_of(await take(env, consumer, 1)) == [s[2]]
        await consumer.nak(got[3:4], delay_s=100.0)
        pending = await consumer.pending()
        assert [(p.sequence, p.attempt) for p in pending] == [(s[0], 1), (s[2], 2), (s[3], 1)]
        assert all(50 < p.due_s <= 200 for p in pending)
        assert pending[2].due_s <= 100
        assert [p.sequence for p in await consumer.pending(limit=2)] == [s[0], s[2]]
        await consumer.ack(got[:1])
        assert [p.sequence for p in await consumer.pending()] == [s[2], s[3]]

    @case("append", "consumers")
    async def test_two_workers_share_without_overlap(self, env: Env) -> None:
        """Workers in tasks, through their own handles, get every record exactly once between them."""
        stream = await env.stream()
        total = 120
        taken: list[list[int]] = [[], [], []]

        async def work(who: int) -> None:
            consumer = await stream.consumer("c", worker_config())
            while sum(map(len, taken)) < total:
                got = await consumer.fetch(limit=1 + who * 3, wait_s=0.1)
                taken[who] += sequences_of(got)
                await asyncio.sleep(0.001)
                assert await consumer.ack(got) == len(got)

        async with asyncio.timeout(env.patience_s * 2):
            async with asyncio.TaskGroup() as group:
                for who in range(3):
                    group.create_task(work(who))
                for start in range(0, total, 10):
                    await stream.append(messages(10, start=start))
                    await asyncio.sleep(0.002)
        assert sorted(s for t in taken for s in t) == sequences_of(await read_all(stream))
        info = await (await stream.consumer("c")).info()
        assert (info.lag, info.pending) == (0, 0)

    @case("append", "consumers")
    async def test_two_fetches_at_once_never_share_a_record(self, env: Env) -> None:
        """Fetches of one handle that wait together divide what comes."""
        stream = await env.stream()
        consumer = await stream.consumer("c", worker_config())
        fetches = [asyncio.create_task(consumer.fetch(limit=2, wait_s=env.patience_s * 2)) for _ in range(5)]
        await asyncio.gather(*(blocked(f) for f in fetches))
        s = await stream.append(messages(10))
        got = await asyncio.wait_for(asyncio.gather(*fetches), env.patience_s)
        assert all(got)
        seen = [x for g in got for x in sequences_of(g)]
        assert len(seen) == len(set(seen)), f"one record went to two fetches: {sorted(seen)}"
        rest = await take(env, consumer, 10 - len(seen))
        assert sorted([*seen, *sequences_of(rest)]) == s

    @case("append", "consumers")
    async def test_a_stream_whose_name_leaves_no_room_for_dead_letters(self, env: Env) -> None:
        """The longest stream name has no dead-letter stream: a consumer is refused at once, or its letters work."""
        stream = await env.stream("x" * (STREAM_CHARS_MAX - len(env.name("x")) + 1))
        await stream.append(messages(2))
        try:
            consumer = await stream.consumer("c", worker_config(attempts_max=1))
        except InvalidArgument:
            return
        got = await take(env, consumer, 1)
        assert await consumer.nak(got) == 1
        assert len(await take(env, consumer, 1)) == 1
