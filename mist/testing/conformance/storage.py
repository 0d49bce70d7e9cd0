"""Retention, a full store, verification and damage."""

from __future__ import annotations

import asyncio

import pytest

from mist.broker.base import Record, Stream, StreamConfig
from mist.errors import DataLoss, SequenceExpired, StorageFull
from mist.testing.conformance.harness import (
    Env,
    Harness,
    case,
    data_of,
    eventually,
    messages,
    nothing_to_fetch,
    read_all,
    sequences_of,
    take,
    worker_config,
)


class Storage(Harness):
    @case("append", "retention")
    async def test_retention_by_count(self, env: Env) -> None:
        """Above records_max the oldest go, and only those; the cut is visible as SequenceExpired."""
        stream = await env.stream(config=StreamConfig(records_max=10, full="drop_oldest"))
        s: list[int] = []
        for n in range(50):
            s += await stream.append(messages(1, start=n))
            assert (await stream.info()).records >= min(n + 1, 10), "records went that were within the bound"

        async def bounded() -> bool:
            return (await stream.info()).records <= 10

        await eventually(bounded, within_s=env.patience_s, what="at most records_max records")
        info = await stream.info()
        assert info.first == s[-10]
        assert sequences_of(await read_all(stream, after=info.first - 1)) == s[-10:]
        with pytest.raises(SequenceExpired) as refused:
            await stream.read(after=0)
        assert refused.value.first == s[-10]

    @case("append", "retention")
    async def test_retention_by_bytes(self, env: Env) -> None:
        """Above bytes_max the oldest go; the newest stay; the stream stays near its bound."""
        stream = await env.stream(config=StreamConfig(bytes_max=512 * 1024, full="drop_oldest"))
        s: list[int] = []
        for n in range(60):
            s += await stream.append(messages(8, start=8 * n, size=8192))

        async def bounded() -> bool:
            info = await stream.info()
            return info.first > s[0] and info.bytes <= 2 * 512 * 1024

        await eventually(bounded, within_s=env.patience_s, what="the stream shrinks to about bytes_max")
        info = await stream.info()
        kept = await read_all(stream, after=info.first - 1)
        assert sequences_of(kept) == s[-len(kept) :]
        assert len(kept) >= 8, "the newest batch is gone too"

    @case("append", "retention")
    async def test_retention_by_age(self, env: Env) -> None:
        """Records older than age_s_max go without anybody trimming; numbering goes on."""
        stream = await env.stream(config=StreamConfig(age_s_max=0.5))
        s = await stream.append(messages(5))
        assert len(await read_all(stream, after=(await stream.info()).first - 1)) in (0, 5)

        async def expired() -> bool:
            await stream.append(messages(1))  # some backends look at ages when they are written to
            return (await stream.info()).first > s[-1]

        await eventually(expired, within_s=env.patience_s, what="old records go")
        with pytest.raises(SequenceExpired):
            await stream.read(after=s[0])
        assert (await stream.append(messages(1)))[0] > s[-1]

    @case("append", "retention", "consumers")
    async def test_retention_does_not_stop_consumers(self, env: Env) -> None:
        """Records dropped under a consumer are passed over, pending or not; the rest is delivered."""
        stream = await env.stream(config=StreamConfig(records_max=10, full="drop_oldest"))
        consumer = await stream.consumer("c", worker_config(pending_max=4, attempts_max=0))
        await stream.append(messages(6))
        held = await take(env, consumer, 4)
        s: list[int] = []
        for n in range(30):
            s += await stream.append(messages(1, start=6 + n))

        async def bounded() -> bool:
            return (await stream.info()).records == 10

        await eventually(bounded, within_s=env.patience_s, what="records_max holds")
        assert await consumer.nak(held) in range(5)
        got = await take(env, consumer, 4)
        await consumer.ack(got)
        got += (second := await take(env, consumer, 4))
        await consumer.ack(second)
        got += await take(env, consumer, 2)
        assert sequences_of(got) == s[-10:]
        info = await consumer.info()
        assert (info.pending, info.lag) == (2, 2)

    @case("append", "retention")
    async def test_a_full_stream_refuses(self, env: Env) -> None:
        """With full=refuse an append above the bound raises StorageFull and stores nothing; reading goes on."""
        stream = await env.stream(config=StreamConfig(records_max=5, full="refuse"))
        ids = "i" if env.broker.capabilities.dedupe else ""
        s = await stream.append(messages(5, ids=ids))
        with pytest.raises(StorageFull):
            await stream.append(messages(1, start=5, ids=ids))
        assert data_of(await read_all(stream)) == [b"0", b"1", b"2", b"3", b"4"]
        if env.broker.capabilities.dedupe:
            assert await stream.append(messages(5, ids="i")) == s, "a repeat of what is stored needs no room"
        if env.broker.capabilities.consumers:
            consumer = await stream.consumer("c", worker_config())
            got = await take(env, consumer, 5)
            assert await consumer.ack(got[:3]) == 3
            assert await consumer.term(got[3:], reason="full") == 2
            assert (await consumer.info()).lag == 0
        if env.broker.capabilities.trim:
            assert await stream.trim(before=s[2]) == 2
            (new,) = await stream.append(messages(1, start=5, ids=ids))
            assert new > s[-1]
            assert data_of(await read_all(stream, after=s[1])) == [b"2", b"3", b"4", b"5"]

    @case("append", "retention")
    async def test_a_stream_full_of_bytes_refuses(self, env: Env) -> None:
        """The same by bytes: refused somewhere near the bound, everything acknowledged before is there."""
        bound = 512 * 1024
        stream = await env.stream(config=StreamConfig(bytes_max=bound, full="refuse"))
        s: list[int] = []

        async def fill() -> None:
            while len(s) * 8192 < 4 * bound:
                s.extend(await stream.append(messages(1, start=len(s), size=8192)))

        with pytest.raises(StorageFull):
            await fill()
        assert len(s) * 8192 >= bound // 4, "refused long before it was full"
        assert sequences_of(await read_all(stream)) == s

    @case("append", "retention")
    async def test_without_bounds_everything_stays(self, env: Env) -> None:
        """The default keeps all records."""
        stream = await env.stream()
        config = (await stream.info()).config
        assert (config.age_s_max, config.bytes_max, config.records_max) == (0, 0, 0)
        for start in range(0, 2000, 500):
            await stream.append(messages(500, start=start))
        assert len(await read_all(stream)) == 2000

    @case("append", "retention", "persistent")
    async def test_the_configuration_survives_reopening(self, env: Env) -> None:
        """Bounds still hold after connecting again."""
        config = StreamConfig(records_max=5, full="refuse")
        stream = await env.stream(config=config)
        await stream.append(messages(4))
        before = (await stream.info()).config
        await env.restart()
        stream = await env.broker.open(env.name(), create=False)
        assert (await stream.info()).config == before
        await stream.append(messages(1))
        with pytest.raises(StorageFull):
            await stream.append(messages(1))

    @case("append", "verify")
    async def test_verify_finds_nothing_wrong(self, env: Env) -> None:
        """A clean stream, empty, filled or trimmed, has no damage, and the counts are those of `info`."""
        stream = await env.stream()
        assert (await stream.verify()).damage == []
        s: list[int] = []
        for n in range(5):
            s += await stream.append(messages(20, start=20 * n, size=100))
        answer = await stream.verify()
        assert (answer.records, answer.first, answer.last, answer.damage) == (100, s[0], s[-1], [])
        assert answer.bytes >= 100 * 100
        if env.broker.capabilities.trim:
            await stream.trim(before=s[30])
            answer = await stream.verify()
            assert (answer.records, answer.first, answer.damage) == (70, s[30], [])

    @case("append")
    async def test_damage_is_never_skipped_silently(self, env: Env) -> None:
        """A read returns what lies before the damage, then raises its range; behind it everything is whole."""
        stream = await env.stream()
        s: list[int] = []
        for n in range(4):
            s += await stream.append(messages(10, start=10 * n, size=300))
        before = {r.sequence: r for r in await read_all(stream)}
        bad = await self.damage(env.broker, env.name(), s[12], s[17])
        if bad is None:
            pytest.skip("the adapter gives no way to damage stored records (hook `damage`)")
        first, last = bad
        assert first <= s[12] <= s[17] <= last, "the hook damaged something else"
        await env.restart()
        stream = await env.broker.open(env.name(), create=False)
        for limit in (1, 7, 256):
            seen: dict[int, Record] = {}
            with pytest.raises(DataLoss) as loss:
                await _follow_into_damage(stream, limit, seen)
            assert (loss.value.first, loss.value.last) == (first, last)
            assert seen == {q: r for q, r in before.items() if q < first}, "records before the damage were withheld"
            rest = await read_all(stream, after=loss.value.resume_after, limit=limit)
            assert rest == [r for q, r in sorted(before.items()) if q > last]
        with pytest.raises(DataLoss):
            await stream.read(after=first)
        if env.broker.capabilities.verify:
            found = (await stream.verify()).damage
            assert [(d.first, d.last) for d in found] == [(first, last)]
            assert found[0].where
            assert found[0].why
        more = await stream.append(messages(3, start=40))
        assert more[0] > s[-1], "a sequence was given again after damage"

    @case("append", "consumers")
    async def test_damage_stops_no_consumer(self, env: Env) -> None:
        """A fetch raises DataLoss once per damaged range, the next ones go on behind it."""
        stream = await env.stream()
        s: list[int] = []
        for n in range(3):
            s += await stream.append(messages(10, start=10 * n, size=300))
        consumer = await stream.consumer("c", worker_config())
        bad = await self.damage(env.broker, env.name(), s[12], s[14])
        if bad is None:
            pytest.skip("the adapter gives no way to damage stored records (hook `damage`)")
        await env.restart()
        consumer = await (await env.broker.open(env.name())).consumer("c")
        losses: list[tuple[int, int]] = []
        got: list[int] = []
        want = [q for q in s if not bad[0] <= q <= bad[1]]
        async with asyncio.timeout(env.patience_s):
            while len(got) < len(want) or not losses:
                try:
                    page = await consumer.fetch(limit=6, wait_s=0.2)
                except DataLoss as exc:
                    losses.append((exc.first, exc.last))
                    continue
                got += sequences_of(page)
                await consumer.ack(page)
        assert got == want
        assert losses == [bad]
        await nothing_to_fetch(consumer)
        assert (await consumer.info()).floor == s[-1]


async def _follow_into_damage(stream: Stream, limit: int, seen: dict[int, Record]) -> None:
    after = 0
    while True:
        page = await stream.read(after=after, limit=limit)
        seen.update({r.sequence: r for r in page.records})
        after = page.scanned
        assert page.scanned < page.last, "the damage was skipped silently"
