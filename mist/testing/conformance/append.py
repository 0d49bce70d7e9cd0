"""Appending: numbering, order, sizes, conditions, duplicates, and what a failure tells."""

from __future__ import annotations

import asyncio

import pytest

from mist.broker.base import Message, Stream, StreamConfig
from mist.errors import InvalidArgument, MistError, PartialAppend, TooLarge, Unsupported, WrongSequence
from mist.testing.conformance.harness import Env, Harness, case, data_of, messages, read_all, sequences_of


class Append(Harness):
    @case("append")
    async def test_sequences_start_at_one_and_grow(self, env: Env) -> None:
        """Sequences are integers >= 1, in the order of the messages; ours start at 1 and are dense."""
        stream = await env.stream()
        got = await stream.append(messages(3)) + await stream.append(messages(1)) + await stream.append(messages(4))
        assert len(got) == 8
        assert all(type(s) is int and s >= 1 for s in got)
        assert got == sorted(set(got))
        if self.dense:
            assert got == list(range(1, 9))
        info = await stream.info()
        assert (info.first, info.last, info.records) == (got[0], got[-1], 8)

    @case("append")
    async def test_order_is_kept(self, env: Env) -> None:
        """What was appended in order is read in order, whatever the batch sizes were."""
        stream = await env.stream()
        sent: list[bytes] = []
        for size in (1, 2, 7, 30, 1, 100, 3):
            batch = messages(size, start=len(sent))
            sent += [m.data for m in batch]
            await stream.append(batch)
        assert data_of(await read_all(stream)) == sent

    @case("append")
    async def test_empty_append_is_a_no_op(self, env: Env) -> None:
        """No messages: an empty list comes back and nothing is touched, not even `expected_last` is looked at."""
        stream = await env.stream()
        assert await stream.append([]) == []
        await stream.append(messages(2))
        before = await stream.info()
        assert await stream.append([]) == []
        if env.broker.capabilities.conditional_append:
            assert await stream.append([], expected_last=10**9) == []
        after = await stream.info()
        assert (after.last, after.records) == (before.last, before.records)

    @case("append")
    async def test_concurrent_appends_are_whole(self, env: Env) -> None:
        """Batches of tasks that append at once each keep their order, and every sequence is given once."""
        stream = await env.stream()

        async def write(who: int) -> list[int]:
            got: list[int] = []
            for n in range(12):
                got += await stream.append([Message(f"w.{who}", b"%d.%d" % (n, i)) for i in range(3)])
            return got

        answers = await asyncio.gather(*(write(w) for w in range(5)))
        records = await read_all(stream)
        assert sorted(s for a in answers for s in a) == sequences_of(records)
        for who, answer in enumerate(answers):
            mine = [r for r in records if r.subject == f"w.{who}"]
            assert sequences_of(mine) == answer == sorted(answer)
            assert data_of(mine) == [b"%d.%d" % (n, i) for n in range(12) for i in range(3)]

    @case("append")
    async def test_partial_append_reports_its_prefix(self, env: Env) -> None:
        """A failing store keeps a prefix of the batch, and PartialAppend (or no record at all) says how far."""
        stream = await env.stream()
        await stream.append(messages(2))
        broken = self.failing_append(env.broker, after=3)
        if broken is None:
            pytest.skip("the adapter gives no way to make an append fail half-way (hook `failing_append`)")
        stored: list[int] = []
        async with broken:
            with pytest.raises(MistError) as failure:
                await stream.append(messages(10, start=2))
            if isinstance(failure.value, PartialAppend):
                stored = failure.value.sequences
                assert failure.value.total == 10
                assert 0 < len(stored) < 10
        records = await read_all(stream)
        assert data_of(records) == [b"%d" % n for n in range(2 + len(stored))]
        assert sequences_of(records)[2:] == stored
        rest = await stream.append(messages(10 - len(stored), start=2 + len(stored)))
        assert data_of(await read_all(stream)) == [b"%d" % n for n in range(12)]
        assert rest == sorted(rest)

    @case("append")
    async def test_size_at_the_limit_and_one_past(self, env: Env) -> None:
        """Data of size_bytes_max is stored and comes back; one byte more is refused before anything is stored."""
        stream = await env.stream()
        most = stream.size_bytes_max
        assert (await stream.info()).size_bytes_max == most
        big = b"\x00\xff" * (most // 2) + b"x" * (most % 2)
        (first,) = await stream.append([Message("big", big)])
        page = await stream.read(limit=1)
        assert page.records[0].data == big
        del page
        with pytest.raises(TooLarge) as refused:
            await stream.append([Message("ok", b""), Message("big", big + b"x"), Message("ok", b"")])
        assert (refused.value.size_bytes, refused.value.size_bytes_max) == (most + 1, most)
        info = await stream.info()
        assert (info.records, info.last) == (1, first)

    @case("append")
    async def test_a_bad_message_anywhere_stores_nothing(self, env: Env) -> None:
        """A batch with one message that cannot be right is refused as a whole."""
        stream = await env.stream()
        good = messages(3)
        for bad in (Message("", b""), Message("a..b", b""), Message("a.*", b""), Message("a", b"", "x" * 257)):
            for at in (0, 1, 3):
                with pytest.raises(InvalidArgument):
                    await stream.append([*good[:at], bad, *good[at:]])
        assert (await stream.info()).records == 0

    @case("append", "conditional_append")
    async def test_conditional_append(self, env: Env) -> None:
        """`expected_last` stores when it holds, and refuses with both numbers when it does not."""
        stream = await env.stream()
        first = await stream.append(messages(2), expected_last=0)
        second = await stream.append(messages(2, start=2), expected_last=first[-1])
        for wrong in (0, first[-1], second[-1] + 1):
            with pytest.raises(WrongSequence) as refused:
                await stream.append(messages(1, start=9), expected_last=wrong)
            assert (refused.value.expected, refused.value.last) == (wrong, second[-1])
        assert data_of(await read_all(stream)) == [b"0", b"1", b"2", b"3"]

    @case("append", "conditional_append")
    async def test_conditional_append_has_one_winner(self, env: Env) -> None:
        """Of many who append under the same condition exactly one wins, and the losers store nothing."""
        stream = await env.stream()
        last = 0
        for round_ in range(5):

            async def attempt(who: int, last: int = last, round_: int = round_) -> list[int]:
                return await stream.append([Message("w", b"%d.%d" % (round_, who))], expected_last=last)

            answers = await asyncio.gather(*(attempt(w) for w in range(8)), return_exceptions=True)
            won = [a for a in answers if isinstance(a, list)]
            assert len(won) == 1, f"{len(won)} of 8 appends with the same expected_last were accepted"
            assert all(isinstance(a, WrongSequence) for a in answers if not isinstance(a, list))
            assert won[0][0] > last
            last = won[0][0]
        assert len(await read_all(stream)) == 5

    @case("append", "conditional_append", "trim")
    async def test_conditional_append_after_trim(self, env: Env) -> None:
        """The last sequence stays the last one when every record was trimmed away."""
        stream = await env.stream()
        last = (await stream.append(messages(4)))[-1]
        await stream.trim(before=last + 1)
        with pytest.raises(WrongSequence):
            await stream.append(messages(1), expected_last=0)
        assert (await stream.append(messages(1), expected_last=last))[0] > last

    @case("append", "dedupe")
    async def test_duplicate_ids_across_batches(self, env: Env) -> None:
        """An id seen before is not stored again and gets the first one's sequence; new ones around it are stored."""
        stream = await env.stream()
        first = await stream.append(messages(3, ids="i"))
        again = await stream.append(messages(5, start=1, ids="i"))
        assert again[:2] == first[1:]
        assert again[2] > first[-1]
        assert again[2:] == sorted(set(again[2:]))
        assert data_of(await read_all(stream)) == [b"0", b"1", b"2", b"3", b"4", b"5"]
        assert await stream.append(messages(6, ids="i")) == [*first, *again[2:]]
        assert (await stream.info()).records == 6

    @case("append", "dedupe")
    async def test_duplicate_ids_within_one_batch(self, env: Env) -> None:
        """The first of two messages with one id in a batch is stored, both get its sequence."""
        stream = await env.stream()
        got = await stream.append(
            [Message("a", b"1", "x"), Message("a", b"2", "y"), Message("a", b"3", "x"), Message("a", b"4", "y")]
        )
        assert got[2:] == got[:2]
        assert data_of(await read_all(stream)) == [b"1", b"2"]

    @case("append", "dedupe")
    async def test_concurrent_duplicates_are_stored_once(self, env: Env) -> None:
        """The same ids appended by many tasks at once are stored once, and all learn the same sequences."""
        stream = await env.stream()
        batch = messages(10, ids="c")
        answers = await asyncio.gather(*(stream.append(batch) for _ in range(6)))
        assert all(a == answers[0] for a in answers)
        assert data_of(await read_all(stream)) == [m.data for m in batch]

    @case("append", "dedupe")
    async def test_no_id_is_never_a_duplicate(self, env: Env) -> None:
        """Messages without an id are stored every time."""
        stream = await env.stream()
        same = Message("a", b"same")
        got = await stream.append([same, same]) + await stream.append([same])
        assert len(set(got)) == 3

    @case("append", "dedupe")
    async def test_ids_belong_to_one_stream(self, env: Env) -> None:
        """An id known in one stream is new in another."""
        one, two = await env.stream("one"), await env.stream("two")
        await one.append(messages(2, ids="i"))
        await two.append(messages(2, ids="i"))
        assert (await two.info()).records == 2

    @case("append", "dedupe", "conditional_append")
    async def test_duplicates_come_before_the_condition(self, env: Env) -> None:
        """Repeating a conditional append that was stored gives its sequences; only something new is refused."""
        stream = await env.stream()
        first = await stream.append(messages(2, ids="i"), expected_last=0)
        await stream.append(messages(1, start=7))
        assert await stream.append(messages(2, ids="i"), expected_last=0) == first
        with pytest.raises(WrongSequence):
            await stream.append(messages(3, ids="i"), expected_last=0)
        assert (await stream.info()).records == 3

    @case("append", "dedupe", "persistent")
    async def test_duplicate_ids_after_reopening(self, env: Env) -> None:
        """The window survives a restart: repeating after it stores nothing twice."""
        stream = await env.stream()
        first = await stream.append(messages(20, ids="i"))
        await env.restart()
        stream = await env.stream()
        assert await stream.append(messages(20, ids="i")) == first
        more = await stream.append(messages(22, ids="i"))
        assert more[:20] == first
        assert len(await read_all(stream)) == 22

    @case("append", "dedupe", "persistent")
    async def test_ids_survive_appends_without_ids(self, env: Env) -> None:
        """After a restart, appending without ids first does not make the stream forget the ids before it."""
        stream = await env.stream()
        first = await stream.append(messages(5, ids="i"))
        await env.restart()
        stream = await env.stream()
        await stream.append(messages(3, start=5))
        assert await stream.append(messages(5, ids="i")) == first
        assert len(await read_all(stream)) == 8

    @case("append", "dedupe", "threads")
    async def test_ids_of_another_connection(self, env: Env) -> None:
        """What another connection stored is known here, also when only appends without ids came in between."""
        here = await env.stream()
        there = await (await env.another()).open(env.name())
        for n in range(4):
            first = await there.append(messages(3, start=3 * n, ids="i"))
            await here.append(messages(n, subject="plain"))
            assert await here.append(messages(3, start=3 * n, ids="i")) == first
            mine = await here.append(messages(2, start=2 * n, ids="h"))
            await there.append(messages(1, subject="plain"))
            assert await there.append(messages(2, start=2 * n, ids="h")) == mine

    @case("append", "dedupe")
    async def test_the_window_by_count(self, env: Env) -> None:
        """The last `dedupe_ids_max` ids are known; an id far behind them is new. Or the setting is refused."""
        try:
            stream = await env.stream(config=StreamConfig(dedupe_ids_max=8))
        except (Unsupported, InvalidArgument):
            return
        for n in range(40):
            await stream.append(messages(1, start=n, ids="i"))
        before = await stream.info()
        assert len(await stream.append(messages(8, start=32, ids="i"))) == 8
        assert (await stream.info()).last == before.last, "an id within the window was stored twice"
        (again,) = await stream.append(messages(1, ids="i"))
        assert again > before.last, "an id far behind the window is still taken for a duplicate"

    @case("append", "dedupe")
    async def test_the_window_by_time(self, env: Env) -> None:
        """An id older than `dedupe_window_s` is new again. Or the setting is refused."""
        try:
            stream = await env.stream(config=StreamConfig(dedupe_window_s=0.2))
        except (Unsupported, InvalidArgument):
            return
        first = await stream.append(messages(1, ids="i"))
        assert await _new_again(env, stream) > first[0]


async def _new_again(env: Env, stream: Stream) -> int:
    (known,) = await stream.append(messages(1, ids="i"))
    async with asyncio.timeout(env.patience_s):
        while True:
            await asyncio.sleep(0.1)
            (got,) = await stream.append(messages(1, ids="i"))
            if got != known:
                return got
