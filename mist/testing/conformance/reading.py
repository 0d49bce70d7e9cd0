"""Reading: pages, filters, bounds, waiting, and that nothing ever appears behind a reader."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from mist.broker.base import ALL, Message, Page
from mist.errors import CursorAhead, InvalidArgument
from mist.testing.conformance.harness import (
    Env,
    Harness,
    blocked,
    case,
    data_of,
    messages,
    read_all,
    sequences_of,
)

FILTERS = (ALL, ("a.*",), ("a.x",), ("*.y",), ("b.>", "a.y"), ("a.>", "a.x"), ("none",), ("*",))
EXPECTED = {
    ALL: "a.x a.y b.x b.y.z c a.x b.x c b.y.z a.y a.x",
    ("a.*",): "a.x a.y a.x a.y a.x",
    ("a.x",): "a.x a.x a.x",
    ("*.y",): "a.y a.y",
    ("b.>", "a.y"): "a.y b.x b.y.z b.x b.y.z a.y",
    ("a.>", "a.x"): "a.x a.y a.x a.y a.x",
    ("none",): "",
    ("*",): "c c",
}


def mixed() -> list[Message]:
    return [Message(s, b"%d" % n) for n, s in enumerate(EXPECTED[ALL].split())]


class Reading(Harness):
    @case("append")
    async def test_after_is_exclusive(self, env: Env) -> None:
        """Reading after a sequence gives the records behind it; after the last one, none; after 0, all."""
        stream = await env.stream()
        sequences = await stream.append(messages(6))
        assert sequences_of((await stream.read(after=0)).records) == sequences
        for at, sequence in enumerate(sequences):
            page = await stream.read(after=sequence)
            assert sequences_of(page.records) == sequences[at + 1 :]
            assert page.last == sequences[-1]
            assert page.scanned >= page.last

    @case("append")
    async def test_reading_an_empty_stream(self, env: Env) -> None:
        """A new stream gives an empty page at position 0, and says that it is empty."""
        stream = await env.stream()
        assert await stream.read() == Page([], 0, 0)
        info = await stream.info()
        assert (info.first, info.last, info.records) == (1, 0, 0)

    @case("append")
    async def test_replay_is_identical(self, env: Env) -> None:
        """The same position gives the same records, through another handle, with other pages, and after more came."""
        stream = await env.stream()
        await stream.append(mixed())
        once = await read_all(stream)
        assert await read_all(stream, limit=2) == once
        await stream.append(mixed())
        other = await env.broker.open(env.name(), create=False)
        assert (await read_all(other))[: len(once)] == once

    @case("append")
    async def test_paging_at_every_limit(self, env: Env) -> None:
        """Pages of every size, filtered or not, give what one big page gives: no overlap, no gap."""
        stream = await env.stream()
        await stream.append(mixed())
        for subjects in FILTERS:
            whole = await read_all(stream, subjects=subjects, limit=1000)
            assert [r.subject for r in whole] == EXPECTED[subjects].split()
            for limit in range(1, len(mixed()) + 2):
                assert await read_all(stream, subjects=subjects, limit=limit) == whole, (subjects, limit)
            for record in whole:
                rest = await read_all(stream, after=record.sequence, subjects=subjects, limit=2)
                assert rest == [r for r in whole if r.sequence > record.sequence]

    @case("append")
    async def test_filtered_paging_reaches_a_late_match(self, env: Env) -> None:
        """A rare subject behind thousands of others is found; `scanned` moves while nothing matches."""
        stream = await env.stream()
        for start in range(0, 3000, 1000):
            await stream.append(messages(1000, start=start, subject="noise"))
        (late,) = await stream.append([Message("signal.late", b"here")])
        await stream.append(messages(10, subject="noise"))
        found = await read_all(stream, subjects=("signal.*",), limit=1)
        assert sequences_of(found) == [late]

    @case("append")
    async def test_pages_respect_their_byte_bound(self, env: Env) -> None:
        """A page's data stays within bytes_max, but every page gives at least one record."""
        stream = await env.stream()
        for start in range(0, 12, 4):
            await stream.append(messages(4, start=start, size=1000))
        whole = await read_all(stream)
        for bytes_max in (1, 999, 1000, 1001, 2500, 3000, 12_000):
            page = await stream.read(bytes_max=bytes_max)
            assert max(1, bytes_max // 2000) <= len(page.records) <= max(1, bytes_max // 1000), bytes_max
            assert await read_all(stream, bytes_max=bytes_max) == whole

    @case("append")
    async def test_a_waiting_read_wakes(self, env: Env) -> None:
        """A read at the end waits and gives what is appended meanwhile, from this and from another handle."""
        stream = await env.stream()
        for start in range(3):
            last = (await stream.info()).last
            reading = asyncio.create_task(stream.read(after=last, wait_s=env.patience_s * 2))
            await blocked(reading)
            other = await env.broker.open(env.name())
            await other.append(messages(1, start=start))
            page = await asyncio.wait_for(reading, env.patience_s)
            assert data_of(page.records) == [b"%d" % start]

    @case("append")
    async def test_many_waiting_reads_all_wake(self, env: Env) -> None:
        """Every one of many waiting readers gets the record."""
        stream = await env.stream()
        reads = [asyncio.create_task(stream.read(wait_s=env.patience_s * 2)) for _ in range(10)]
        await asyncio.gather(*(blocked(r) for r in reads))
        await stream.append(messages(1))
        pages = await asyncio.wait_for(asyncio.gather(*reads), env.patience_s)
        assert [data_of(p.records) for p in pages] == [[b"0"]] * 10

    @case("append")
    async def test_a_filtered_waiting_read_wakes_for_its_subject(self, env: Env) -> None:
        """Records that do not match neither end in its pages nor keep a waiting filtered read from the one that does."""
        stream = await env.stream()

        async def follow() -> list[bytes]:
            after = 0
            while True:
                page = await stream.read(after=after, subjects=("b",), wait_s=env.patience_s)
                assert page.scanned >= after
                if page.records:
                    return data_of(page.records)
                after = page.scanned

        following = asyncio.create_task(follow())
        await blocked(following)
        for n in range(5):
            await stream.append(messages(3, start=n, subject="a"))
        await blocked(following)
        await stream.append([Message("b", b"mine")])
        assert await asyncio.wait_for(following, env.patience_s) == [b"mine"]

    @case("append")
    async def test_a_wait_expires_empty(self, env: Env) -> None:
        """When nothing comes the wait ends with an empty page at the same position; without a wait, at once."""
        stream = await env.stream()
        last = (await stream.append(messages(2)))[-1]
        began = time.monotonic()
        page = await stream.read(after=last, wait_s=0.15)
        assert time.monotonic() - began >= 0.1, "it did not wait"
        assert (page.records, page.scanned, page.last) == ([], last, last)
        assert (await stream.read(after=last)).records == []
        page = await stream.read(after=0, subjects=("other",), wait_s=0.1)
        assert page.records == []
        assert page.scanned == last

    @case("append")
    async def test_nothing_appears_behind_a_reader(self, env: Env) -> None:
        """A follower with small pages, beside concurrent writers, sees every record once and in order."""
        stream = await env.stream()
        writers, rounds = 4, 25
        total = writers * sum(1 + n % 5 for n in range(rounds))

        async def write(who: int) -> None:
            for n in range(rounds):
                await stream.append(messages(1 + n % 5, start=n, subject=f"w.{who}"))
                await asyncio.sleep(0)

        async def follow(limit: int, *subjects: str) -> list[int]:
            seen: list[int] = []
            after = 0
            want = total if subjects == ALL else total // writers
            while len(seen) < want:
                page = await stream.read(after=after, limit=limit, subjects=subjects, wait_s=0.5)
                seen += sequences_of(page.records)
                after = page.scanned
            return seen

        async with asyncio.timeout(env.patience_s * 2):
            async with asyncio.TaskGroup() as group:
                followers = [
                    group.create_task(follow(7, *ALL)),
                    group.create_task(follow(1, *ALL)),
                    group.create_task(follow(3, "w.2")),
                ]
                for who in range(writers):
                    group.create_task(write(who))
        records = await read_all(stream)
        assert len(records) == total
        assert followers[0].result() == followers[1].result() == sequences_of(records)
        assert followers[2].result() == [r.sequence for r in records if r.subject == "w.2"]

    @case("append")
    async def test_a_position_past_the_end_is_refused(self, env: Env) -> None:
        """Beyond the last record lies CursorAhead, also with a wait: that position is another stream's."""
        stream = await env.stream()
        with pytest.raises(CursorAhead):
            await stream.read(after=1)
        last = (await stream.append(messages(3)))[-1]
        for wait_s in (0.0, 0.2):
            with pytest.raises(CursorAhead) as refused:
                await stream.read(after=last + 1, wait_s=wait_s)
            assert (refused.value.after, refused.value.last) == (last + 1, last)
        with pytest.raises(CursorAhead):
            await stream.read(after=last + 10**6, subjects=("none",))

    @case("append")
    async def test_reads_that_cannot_be_right(self, env: Env) -> None:
        """A limit or byte bound below one, a negative position, a broken or missing filter: InvalidArgument."""
        stream = await env.stream()
        await stream.append(messages(1))
        wrongs: tuple[dict[str, Any], ...] = (
            {"limit": 0},
            {"limit": -1},
            {"bytes_max": 0},
            {"after": -1},
            {"wait_s": float("nan")},
            {"subjects": ()},
            {"subjects": ("",)},
            {"subjects": ("a.>.b",)},
            {"subjects": ("a b",)},
            {"subjects": "a"},
        )
        for wrong in wrongs:
            with pytest.raises(InvalidArgument):
                await stream.read(**wrong)
        assert len(await read_all(stream)) == 1

    @case("append")
    async def test_record_times(self, env: Env) -> None:
        """A record's time is its append time in Unix nanoseconds, and never goes back along the sequence."""
        stream = await env.stream()
        for n in range(20):
            await stream.append(messages(2, start=n))
        times = [r.timestamp_ns for r in await read_all(stream)]
        assert times == sorted(times)
        assert abs(times[-1] - time.time_ns()) < 3600 * 10**9, "not Unix nanoseconds of about now"
