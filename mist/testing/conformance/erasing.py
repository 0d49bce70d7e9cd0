"""Erasing single records: what is gone, and that nothing else is."""

from __future__ import annotations

import asyncio

import pytest

from mist.broker.base import Message, Record, Stream
from mist.broker.cursor import Cursor
from mist.broker.deadletter import SEQUENCE
from mist.errors import InvalidArgument, NotFound, SequenceExpired
from mist.protocol.subject import dead_stream
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

SECRET = b"a-secret-that-must-go"


class Erasing(Harness):
    @case("append", "erase")
    async def test_erased_records_are_gone_and_the_others_stay(self, env: Env) -> None:
        """From the middle, in one batch and over several; every other record keeps sequence, time, id and headers."""
        stream = await env.stream()
        s: list[int] = []
        for n in range(4):
            s += await stream.append(
                [Message(f"a.b{i % 3}", b"%d.%d" % (n, i), f"i{n}.{i}", (("h", f"v{i}"),)) for i in range(10)]
            )
        before = await read_all(stream)
        gone = [s[1], s[12], s[13], s[38]]
        assert await stream.erase(gone) == 4
        kept = [r for r in before if r.sequence not in gone]
        for limit in (1, 3, 256):
            assert await read_all(stream, limit=limit) == kept
        for r in kept:
            page = await stream.read(after=r.sequence - 1, limit=1)
            assert page.records == [r]
        for sequence in gone:  # a read that starts in the gap
            after = [r for r in kept if r.sequence > sequence]
            assert await read_all(stream, after=sequence) == after
            assert await read_all(stream, after=sequence - 1) == after
        for subject in ("a.b0", "a.b1", "a.b2", "none"):
            assert await read_all(stream, subjects=(subject,), limit=2) == [r for r in kept if r.subject == subject]
        info = await stream.info()
        assert (info.first, info.last, info.records) == (s[0], s[-1], 36)
        (more,) = await stream.append(messages(1, start=50))
        assert more > s[-1]
        assert sequences_of(await read_all(stream)) == [*(r.sequence for r in kept), more]

    @case("append", "erase")
    async def test_erasing_is_idempotent(self, env: Env) -> None:
        """Again, twice in one call, unknown ones and none: no error, and only what was there counts."""
        stream = await env.stream()
        s = await stream.append(messages(6))
        assert await stream.erase([]) == 0
        assert await stream.erase([s[2], s[2], s[4], s[-1] + 1000]) == 2
        assert await stream.erase([s[4], s[2]]) == 0
        assert await stream.erase(tuple(s[:3])) == 2
        with pytest.raises(InvalidArgument):
            await stream.erase([s[3], -1])
        assert sequences_of(await _kept(stream)) == [s[3], s[5]]
        assert (await stream.info()).records == 2

    @case("append", "erase")
    async def test_the_oldest_and_the_newest(self, env: Env) -> None:
        """`first` moves behind erased oldest records, `last` never goes back; all of them leaves an empty stream."""
        stream = await env.stream()
        s = await stream.append(messages(6))
        assert await stream.erase([s[0], s[1], s[-1]]) == 3
        info = await stream.info()
        assert (info.first, info.last, info.records) == (s[2], s[-1], 3)
        assert sequences_of(await _kept(stream)) == s[2:5]
        page = await stream.read(after=s[4])
        assert (page.records, page.scanned, page.last) == ([], s[-1], s[-1])
        assert (await stream.read(after=s[-1])).records == []
        assert await stream.erase(s) == 3
        info = await stream.info()
        assert (info.first, info.last, info.records) == (s[-1] + 1, s[-1], 0)
        assert await _kept(stream) == []
        (new,) = await stream.append(messages(1, start=6))
        assert new > s[-1]
        assert sequences_of(await _kept(stream)) == [new]
        assert (await stream.info()).first == new

    @case("append", "erase", "trim")
    async def test_erasing_beside_trims(self, env: Env) -> None:
        """Trimmed ones are no error; a later trim counts what was still there."""
        stream = await env.stream()
        s = await stream.append(messages(10))
        assert await stream.trim(before=s[3]) == 3
        assert await stream.erase([s[0], s[2], s[5], s[6]]) == 2
        assert await stream.trim(before=s[7]) == 2
        assert sequences_of(await _kept(stream)) == s[7:]
        info = await stream.info()
        assert (info.first, info.records) == (s[7], 3)
        assert await stream.erase([s[7]]) == 1
        assert await stream.trim(before=s[8]) == 0
        assert await stream.trim(before=s[-1] + 1) == 2
        assert (await stream.info()).records == 0

    @case("append", "erase")
    async def test_a_waiting_reader_steps_over_the_gap(self, env: Env) -> None:
        """A reader behind, in and before the gap; one that waits at the end is not disturbed."""
        stream = await env.stream()
        s = await stream.append(messages(8))
        page = await stream.read(after=s[1], limit=2)  # whatever a reader keeps of the rest of a page must go too
        assert sequences_of(page.records) == s[2:4]
        reading = asyncio.create_task(stream.read(after=s[-1], wait_s=env.patience_s * 2))
        await blocked(reading)
        assert await stream.erase([s[4], s[5], s[-1]]) == 3
        assert sequences_of((await stream.read(after=page.scanned, limit=2)).records) == [s[6]]
        await blocked(reading)
        new = await stream.append(messages(1, start=8))
        assert sequences_of((await asyncio.wait_for(reading, env.patience_s)).records) == new

    @case("append", "erase")
    async def test_other_connections_see_the_gap(self, env: Env) -> None:
        """Also one that has read the records before, and one that goes on appending."""
        stream = await env.stream()
        s = await stream.append(messages(9))
        if env.broker.capabilities.processes or env.broker.capabilities.threads:
            other = await (await env.another()).open(env.name())
        else:
            other = stream
        assert sequences_of((await other.read(limit=4)).records) == s[:4]
        assert await stream.erase([s[4], s[6]]) == 2
        assert sequences_of((await other.read(after=s[3])).records) == [s[5], s[7], s[8]]
        assert sequences_of(await read_all(other)) == [q for q in s if q not in (s[4], s[6])]
        more = await other.append(messages(2, start=9))
        assert await other.erase([s[5], more[0]]) == 2
        left = [*s[:4], s[7], s[8], more[1]]
        assert sequences_of(await read_all(stream)) == left
        assert (await stream.info()).records == (await other.info()).records == len(left)

    @case("append", "erase", "persistent")
    async def test_erasing_survives_reopening(self, env: Env) -> None:
        """What was erased stays gone, and the figures stay right."""
        stream = await env.stream()
        s = await stream.append(messages(10, ids="i"))
        assert await stream.erase([s[0], s[3], s[-1]]) == 3
        before = await _kept(stream)
        await env.restart()
        stream = await env.stream()
        assert await _kept(stream) == before
        info = await stream.info()
        assert (info.first, info.last, info.records) == (s[1], s[-1], 7)
        (new,) = await stream.append(messages(1, start=100))
        assert new > s[-1]
        assert await stream.erase([s[3]]) == 0

    @case("append", "erase")
    async def test_the_bytes_are_gone_from_the_storage(self, env: Env) -> None:
        """Data, id, headers and subject are not found in what the backend keeps on disk; the others are."""
        stream = await env.stream()
        secret = SECRET.decode()
        batch = messages(20, size=200)
        batch[7] = Message(
            f"a.{secret}-subject", SECRET + b"-data" * 50, f"{secret}-id", ((f"{secret}-h", f"{secret}-v"),)
        )
        s = await stream.append(batch)
        await stream.append(messages(3, start=20))
        stored = await self.stored(env.broker, env.name())
        if stored is None:
            pytest.skip("the adapter promises nothing here, or gives no way to look (hook `stored`)")
        for part in (b"-data", b"-id", b"-subject", b"-h", b"-v"):
            assert SECRET + part in stored
        assert await stream.erase([s[7]]) == 1

        async def nowhere() -> bool:
            now = await self.stored(env.broker, env.name())
            assert now is not None
            assert b"00000006" in now, "another record's bytes went"
            assert b"00000008" in now, "another record's bytes went"
            return SECRET not in now

        await eventually(nowhere, within_s=env.patience_s, what="the erased bytes are not in the storage any more")

    @case("append", "erase", "dedupe")
    async def test_the_id_of_an_erased_record(self, env: Env) -> None:
        """Published again it is a new record, or it still counts as seen and nothing is stored; others stay known."""
        stream = await env.stream()
        s = await stream.append(messages(4, ids="i"))
        assert await stream.erase([s[1]]) == 1
        (again,) = await stream.append(messages(1, start=1, ids="i"))
        assert again == s[1] or again > s[-1]
        left = [s[0], s[2], s[3], *([again] if again > s[-1] else [])]
        assert sequences_of(await read_all(stream)) == left
        assert await stream.append([m for m in messages(4, ids="i") if m.id != "i1"]) == [s[0], s[2], s[3]]
        assert sequences_of(await read_all(stream)) == left

    @case("append", "erase", "consumers")
    async def test_consumers_step_over_erased_records(self, env: Env) -> None:
        """Not yet delivered ones are not delivered, and do not hold up the others or the bound on pending ones."""
        stream = await env.stream()
        s = await stream.append(messages(12))
        consumer = await stream.consumer("c", worker_config(pending_max=4))
        filtered = await stream.consumer("f", worker_config(subjects=("a.*",)))
        gone = [s[0], s[3], s[4], s[5], s[6], s[-1]]
        assert await stream.erase(gone) == 6
        want = [q for q in s if q not in gone]
        got = await take(env, consumer, 4)
        assert sequences_of(got) == want[:4]
        assert [d.attempt for d in got] == [1, 1, 1, 1]
        assert await consumer.ack(got) == 4
        assert sequences_of(rest := await take(env, consumer, 2)) == want[4:]
        assert await consumer.ack(rest) == 2
        await nothing_to_fetch(consumer)
        info = await consumer.info()
        assert (info.pending, info.lag, info.lag_s) == (0, 0, 0.0)
        assert sequences_of(await take(env, filtered, 6)) == want
        await nothing_to_fetch(filtered)

    @case("append", "erase", "consumers")
    async def test_an_erased_delivery_is_settled(self, env: Env) -> None:
        """Handed out or given back: it is not pending, does not come again, and becomes no dead letter."""
        stream = await env.stream()
        s = await stream.append(messages(8))
        consumer = await stream.consumer("c", worker_config(ack_wait_s=1.0, attempts_max=2, pending_max=6))
        held = await take(env, consumer, 6)
        assert await consumer.nak(held[4:], delay_s=0.2) == 2
        assert await stream.erase([s[1], s[2], s[4]]) == 3

        async def settled() -> bool:
            return (await consumer.info()).pending <= 3

        await eventually(settled, within_s=env.patience_s, what="the erased deliveries are settled")
        if env.broker.capabilities.pending:
            assert not {p.sequence for p in await consumer.pending()} & {s[1], s[2], s[4]}
        await consumer.ack([held[1], held[2]])  # whether it still counts is nobody's promise
        await consumer.ack([held[0]])
        seen: dict[int, int] = {}
        async with asyncio.timeout(env.patience_s):
            while not {s[3], s[5], s[6], s[7]} <= seen.keys():
                for d in await consumer.fetch(wait_s=0.5):
                    seen[d.record.sequence] = d.attempt
                    await consumer.ack([d])
        assert not seen.keys() & {s[1], s[2], s[4]}, "an erased record was delivered"
        assert seen[s[5]] == 2
        assert (await consumer.info()).pending == 0
        try:
            dead = await env.broker.open(dead_stream(stream.name), create=False)
        except NotFound:
            return
        letters = [dict(r.headers)[SEQUENCE] for r in await read_all(dead)]
        assert not set(letters) & {str(s[1]), str(s[2]), str(s[4])}

    @case("append", "erase")
    async def test_a_cursor_steps_over_the_gap(self, env: Env) -> None:
        """In the middle of a replay, with the strict `on_gap`."""
        stream = await env.stream()
        s = await stream.append(messages(10))
        cursor = Cursor(stream, limit=3)
        got: list[int] = []
        async for record in cursor.replay():
            got.append(record.sequence)
            if record.sequence == s[2]:
                await stream.erase([s[3], s[4], s[9]])
        assert got == [q for q in s if q not in (s[3], s[4], s[9])]
        assert cursor.position == s[-1]
        await cursor.aclose()

    @case("append", "erase", "locate")
    async def test_locate_beside_a_gap(self, env: Env) -> None:
        """A time leads to a record that is there."""
        stream = await env.stream()
        s: list[int] = []
        for n in range(4):
            s += await stream.append(messages(2, start=2 * n))
            await asyncio.sleep(0.005)
        records = {r.sequence: r for r in await read_all(stream)}
        assert await stream.erase([s[2], s[4], s[5]]) == 3
        assert await stream.locate(records[s[3]].timestamp_ns) == s[3]
        assert await stream.locate(records[s[5]].timestamp_ns) == s[6]
        assert await stream.erase([s[6], s[7]]) == 2
        assert await stream.locate(records[s[6]].timestamp_ns) == s[-1] + 1

    @case("append", "erase", "verify")
    async def test_verify_stays_clean(self, env: Env) -> None:
        """Erasing is no damage, and verify counts what is left."""
        stream = await env.stream()
        s: list[int] = []
        for n in range(5):
            s += await stream.append(messages(20, start=20 * n, size=100))
        for gone in ([s[10]], s[20:60], [s[-1]]):
            await stream.erase(gone)
            answer = await stream.verify()
            assert answer.damage == []
        assert (answer.records, answer.first, answer.last) == (58, s[0], s[-1])


async def _kept(stream: Stream) -> list[Record]:
    """All records. A read from the start may refuse where the oldest ones were erased; it says where to go on."""
    try:
        return await read_all(stream)
    except SequenceExpired as exc:
        return await read_all(stream, after=exc.first - 1)
