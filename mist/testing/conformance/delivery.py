"""Deliveries: what is settled, what comes back, what becomes a dead letter, and what a stale token may do."""

from __future__ import annotations

import asyncio
import time

import pytest

from mist.broker.base import HEADERS_BYTES_MAX, Consumer, Delivery, Message, Record, Stream, header
from mist.broker.deadletter import ATTEMPTS, CONSUMER, ORIGINAL_ID, REASON, SEQUENCE, STREAM, original
from mist.errors import InvalidArgument
from mist.protocol.subject import dead_stream
from mist.testing.conformance.harness import (
    Env,
    Harness,
    blocked,
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


async def dead_letters(env: Env, stream: Stream, count: int) -> list[Record]:
    """The dead letters of a stream, when there are this many (and not more)."""

    async def look() -> list[Record]:
        if dead_stream(stream.name) not in await env.broker.streams():
            return []
        found = await read_all(await env.broker.open(dead_stream(stream.name), create=False))
        assert len(found) <= count, f"{len(found)} dead letters, {count} expected"
        return found if len(found) == count else []

    return await eventually(look, within_s=env.patience_s, what=f"{count} dead letters of {stream.name}")


class DeliveryState(Harness):
    @case("append", "consumers")
    async def test_ack_is_final(self, env: Env) -> None:
        """An acked record is never delivered again; acking again settles nothing."""
        stream = await env.stream()
        await stream.append(messages(5))
        consumer = await stream.consumer("c", worker_config(ack_wait_s=0.2))
        got: list[Delivery] = []
        settled = 0
        async with asyncio.timeout(env.patience_s):
            while settled < 5:  # on a slow machine an ack may come too late; then the record comes again
                got = await consumer.fetch(wait_s=0.2)
                settled += await consumer.ack(got)
        assert await consumer.ack(got) == 0
        assert await consumer.nak(got) == 0
        assert await consumer.term(got) == 0
        assert await consumer.extend(got) == 0
        assert await consumer.fetch(wait_s=0.5) == []
        info = await consumer.info()
        assert (info.pending, info.lag, info.floor) == (0, 0, (await stream.info()).last)

    @case("append", "consumers")
    async def test_the_same_delivery_twice_in_one_call(self, env: Env) -> None:
        """It is settled once and counted once."""
        stream = await env.stream()
        await stream.append(messages(6))
        consumer = await stream.consumer("c", worker_config(attempts_max=2))
        a, b, c, d = await take(env, consumer, 4)
        assert await consumer.extend([a, a]) == 1
        assert await consumer.ack([a, a]) == 1
        assert await consumer.nak([b, b]) == 1
        assert await consumer.term([c, c], reason="twice") == 1
        assert await consumer.ack([d, a, b, c]) == 1
        assert len(await dead_letters(env, stream, 1)) == 1
        (again,) = await take(env, consumer, 1)
        assert (again.record.sequence, again.attempt) == (b.record.sequence, 2)
        assert await consumer.ack([]) == await consumer.nak([]) == await consumer.term([]) == 0

    @case("append", "consumers")
    async def test_nak_gives_it_back(self, env: Env) -> None:
        """A nak without delay is served at once, before new records, with attempt + 1 and another token."""
        stream = await env.stream()
        s = await stream.append(messages(4))
        consumer = await stream.consumer("c", worker_config())
        first = await take(env, consumer, 2)
        assert await consumer.nak(first[:1]) == 1
        (again,) = await take(env, consumer, 1)
        assert again.record == first[0].record
        assert again.attempt == 2
        assert again.token != first[0].token
        assert sequences_of(await take(env, consumer, 2)) == s[2:]
        await nothing_to_fetch(consumer)

    @case("append", "consumers")
    async def test_nak_with_a_delay(self, env: Env) -> None:
        """A delayed nak is not served before its delay, a waiting fetch gets it after, and others go on meanwhile."""
        stream = await env.stream()
        s = await stream.append(messages(2))
        consumer = await stream.consumer("c", worker_config())
        (first,) = await take(env, consumer, 1)
        began = time.monotonic()
        assert await consumer.nak([first], delay_s=0.4) == 1
        (second,) = await take(env, consumer, 1)
        assert second.record.sequence == s[1]
        got = await consumer.fetch(wait_s=env.patience_s)
        took = time.monotonic() - began
        assert [(d.record.sequence, d.attempt) for d in got] == [(s[0], 2)]
        assert took >= 0.35, f"it came after {took} s, the delay was 0.4 s"
        for wrong in (-1.0, float("nan"), float("inf")):
            with pytest.raises(InvalidArgument):
                await consumer.nak(got, delay_s=wrong)
        assert await consumer.ack(got) == 1

    @case("append", "consumers")
    async def test_an_abandoned_delivery_returns(self, env: Env) -> None:
        """After ack_wait_s the record comes again with attempt + 1, also to a fetch that was waiting before."""
        stream = await env.stream()
        s = await stream.append(messages(2))
        consumer = await stream.consumer("c", worker_config(ack_wait_s=0.3, attempts_max=0))
        began = time.monotonic()
        first = await consumer.fetch(limit=2, wait_s=env.patience_s)
        assert [d.attempt for d in first] == [1] * len(first)
        last: dict[int, int] = {d.record.sequence: d.attempt for d in first}
        while min(last.values()) < 3 or len(last) < 2:
            got = await consumer.fetch(wait_s=env.patience_s)
            assert got, "an abandoned delivery did not come back"
            for d in got:
                assert d.attempt == last.get(d.record.sequence, 0) + 1
                last[d.record.sequence] = d.attempt
        assert time.monotonic() - began >= 0.5
        assert sorted(last) == s

    @case("append", "consumers")
    async def test_extend_holds(self, env: Env) -> None:
        """While its worker extends in time, a delivery is nobody else's."""
        stream = await env.stream()
        await stream.append(messages(1))
        consumer = await stream.consumer("c", worker_config(ack_wait_s=1.0, attempts_max=0))
        (held,) = await take(env, consumer, 1)
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            extended = time.monotonic()
            if not await consumer.extend([held]):  # this machine slept longer than the ack wait: start again
                (held,) = await take(env, consumer, 1)
                end = time.monotonic() + 2.5
                continue
            other = await consumer.fetch(wait_s=0.2)
            if time.monotonic() - extended < 0.9:
                assert other == [], "an extended delivery was given to somebody else"
            elif other:
                (held,) = other
                end = time.monotonic() + 2.5
        assert await consumer.extend([held]) == 1
        assert await consumer.ack([held]) == 1

    @case("append", "consumers")
    async def test_a_stale_token_is_a_no_op(self, env: Env) -> None:
        """After redelivery the old delivery settles, returns, kills and extends nothing."""
        stream = await env.stream()
        await stream.append(messages(1))
        consumer = await stream.consumer("c", worker_config())
        (old,) = await take(env, consumer, 1)
        await consumer.nak([old])
        (new,) = await take(env, consumer, 1)
        assert await consumer.ack([old]) == 0
        assert await consumer.nak([old]) == 0
        assert await consumer.term([old], reason="not mine") == 0
        assert await consumer.extend([old]) == 0
        assert (await consumer.info()).pending == 1
        await nothing_to_fetch(consumer)
        assert dead_stream(stream.name) not in await env.broker.streams()
        assert await consumer.ack([new]) == 1

    @case("append", "consumers")
    async def test_tokens_that_were_never_given(self, env: Env) -> None:
        """Made-up deliveries, and those of another consumer, are nobody's: no-ops, not errors."""
        stream = await env.stream()
        await stream.append(messages(2))
        one = await stream.consumer("one", worker_config())
        two = await stream.consumer("two", worker_config())
        mine, _ = await take(env, one, 2)
        theirs, _ = await take(env, two, 2)
        forged = [
            Delivery(mine.record, 1, token)
            for token in ("", "x", "0", "1.1", "-1", "9" * 40, "\x00", "a b", "\ud800", mine.token + "0")
            if token != mine.token
        ]
        for wrong in ([theirs], forged):
            if theirs.token == mine.token and wrong == [theirs]:
                continue  # tokens of two consumers may look alike; then this delivery is the consumer's own
            assert await one.ack(wrong) == 0
            assert await one.nak(wrong) == 0
            assert await one.extend(wrong) == 0
            assert await one.term(wrong) == 0
        unknown = Delivery(Record(10**12, "a", b"", 1), 1, mine.token)
        assert await one.ack([unknown]) == 0
        assert (await one.info()).pending == (await two.info()).pending == 2

    @case("append", "consumers")
    async def test_attempts_used_up_make_a_dead_letter(self, env: Env) -> None:
        """After attempts_max abandoned deliveries the record is a dead letter with its reason; the next is served."""
        stream = await env.stream()
        message = Message("job.run", b"\x00poison\xff", "id-1", (("Content-Type", "x/y"), ("a", "1"), ("a", "2")))
        (bad,) = await stream.append([message])
        (good,) = await stream.append(messages(1, start=7))
        consumer = await stream.consumer("worker", worker_config(ack_wait_s=0.5, attempts_max=2))
        attempts: dict[int, list[int]] = {bad: [], good: []}

        async def work() -> bool:
            for d in await consumer.fetch(wait_s=0.3):
                attempts[d.record.sequence].append(d.attempt)
                if d.record.sequence == good:
                    await consumer.ack([d])
            return dead_stream(stream.name) in await env.broker.streams() and bool(attempts[good])

        await eventually(work, within_s=env.patience_s, what="a dead letter")
        (letter,) = await dead_letters(env, stream, 1)
        assert attempts[bad] == [1, 2]
        assert (letter.subject, letter.data) == ("job.run", b"\x00poison\xff")
        assert header(letter.headers, STREAM) == stream.name
        assert header(letter.headers, SEQUENCE) == str(bad)
        assert header(letter.headers, CONSUMER) == "worker"
        assert header(letter.headers, ATTEMPTS) == "2"
        assert header(letter.headers, ORIGINAL_ID) == "id-1"
        assert header(letter.headers, REASON)
        assert [h for h in letter.headers if not h[0].startswith("Mist-")] == list(message.headers)
        assert original(letter) == message

        async def settled() -> bool:
            info = await consumer.info()
            return (info.pending, info.lag, info.floor) == (0, 0, good)

        await eventually(settled, within_s=env.patience_s, what="the dead letter's original is settled")
        assert sequences_of(await read_all(stream)) == [bad, good], "a dead letter is a copy: the stream keeps its own"

    @case("append", "consumers")
    async def test_naks_use_up_attempts(self, env: Env) -> None:
        """The nak of the last attempt makes a dead letter; with attempts_max=0 a record comes for ever."""
        stream = await env.stream()
        s = await stream.append(messages(3))
        consumer = await stream.consumer("c", worker_config(attempts_max=3))
        for attempt in (1, 2, 3):
            (d,) = await take(env, consumer, 1)
            assert (d.record.sequence, d.attempt) == (s[0], attempt)
            assert await consumer.nak([d]) == 1
        assert sequences_of(await take(env, consumer, 2)) == s[1:]
        (letter,) = await dead_letters(env, stream, 1)
        assert header(letter.headers, ATTEMPTS) == "3"
        patient = await stream.consumer("patient", worker_config(attempts_max=0))
        for attempt in range(1, 15):
            (d,) = await take(env, patient, 1)
            assert (d.record.sequence, d.attempt) == (s[0], attempt)
            await patient.nak([d])
        await dead_letters(env, stream, 1)

    @case("append", "consumers")
    async def test_a_dead_letter_beside_good_records_loses_neither(self, env: Env) -> None:
        """A fetch that finds a record out of attempts together with others still returns the others, once."""
        stream = await env.stream()
        s = await stream.append(messages(6))
        consumer = await stream.consumer("c", worker_config(ack_wait_s=1.0, attempts_max=1))
        first = await consumer.fetch(limit=2, wait_s=env.patience_s)
        dying = set(sequences_of(first))
        patient: dict[int, int] = {}

        async def work() -> bool:
            for d in await consumer.fetch(limit=3, wait_s=0.2):
                assert d.attempt == 1
                patient[d.record.sequence] = patient.get(d.record.sequence, 0) + 1
                await consumer.ack([d])
            return dead_stream(stream.name) in await env.broker.streams() and set(s) <= dying | set(patient)

        await asyncio.sleep(1.1)  # the first two are overdue, and now lie beside four new ones
        await eventually(work, within_s=env.patience_s, what="every record is served or dead")
        letters = await dead_letters(env, stream, len(dying))
        assert {int(header(letter.headers, SEQUENCE)) for letter in letters} == dying
        assert patient == dict.fromkeys(set(s) - dying, 1), "a fetched record was withheld or given twice"

    @case("append", "consumers")
    async def test_term_makes_a_dead_letter(self, env: Env) -> None:
        """A termed record is never delivered again; its dead letter holds the reason, safely written, and the bytes."""
        stream = await env.stream()
        await stream.append(messages(5, ids="t"))
        consumer = await stream.consumer("c", worker_config())
        got = await take(env, consumer, 3)
        assert await consumer.term(got[:1], reason="bad\r\nMist-Stream: evil\x00\ud800 žluť") == 1
        assert await consumer.term(got[1:2], reason="x" * 100_000) == 1
        assert await consumer.term(got[2:]) == 1
        letters = await dead_letters(env, stream, 3)
        assert data_of(letters) == [b"0", b"1", b"2"]
        reasons = [header(letter.headers, REASON) for letter in letters]
        assert "evil" in reasons[0]
        assert "žluť" in reasons[0]
        assert all(r and not set("\r\n\x00") & set(r) for r in reasons)
        assert header(letters[0].headers, STREAM) == stream.name
        assert [header(letter.headers, ATTEMPTS) for letter in letters] == ["1"] * 3
        assert await consumer.ack(got) == 0
        rest = await take(env, consumer, 2)
        assert [d.record.data for d in rest] == [b"3", b"4"]

    @case("append", "consumers")
    async def test_a_record_with_the_most_headers_can_die(self, env: Env) -> None:
        """Headers at their limit leave room for the dead letter's own: the consumer is not stuck on it."""
        stream = await env.stream()
        full = (("first", "1"), ("h", "x" * (HEADERS_BYTES_MAX - 7)))
        wide = (("first", "1"), *((f"{n:02}", "é" * 511) for n in range(63)))  # 1,024 bytes each, half the characters
        await stream.append(
            [Message("a", b"full", "", full), Message("a", b"wide", "é" * 128, wide), Message("a", b"next")]
        )
        consumer = await stream.consumer("c", worker_config(attempts_max=1))
        for headers in (full, wide):
            (d,) = await take(env, consumer, 1)
            assert d.record.headers == headers
            assert await consumer.term([d], reason="ž" * 10_000) == 1
        letters = await dead_letters(env, stream, 2)
        assert data_of(letters) == [b"full", b"wide"]
        for letter in letters:
            assert header(letter.headers, "first") == "1"
            assert header(letter.headers, SEQUENCE)
        assert header(letters[1].headers, "00") == "é" * 511, "more headers were left out than had to be"
        assert [d.record.data for d in await take(env, consumer, 1)] == [b"next"]

    @case("append", "consumers")
    async def test_dead_letters_of_dead_letters(self, env: Env) -> None:
        """A dead-letter stream is a stream: it can be read, consumed, and has dead letters of its own."""
        stream = await env.stream()
        await stream.append(messages(1))
        consumer = await stream.consumer("c", worker_config())
        await consumer.term(await take(env, consumer, 1), reason="first")
        await dead_letters(env, stream, 1)
        dead = await env.broker.open(dead_stream(env.name()), create=False)
        env.name("s--dead")
        second = await dead.consumer("undertaker", worker_config())
        got = await take(env, second, 1)
        assert await second.term(got, reason="second") == 1
        (letter,) = await dead_letters(env, dead, 1)
        assert header(letter.headers, REASON) == "second"
        assert header(letter.headers, STREAM) == dead.name
        assert letter.data == b"0"

    @case("append", "consumers")
    async def test_pending_max_bounds_all_workers(self, env: Env) -> None:
        """Several workers together hold at most pending_max deliveries; an ack lets a waiting fetch go on."""
        stream = await env.stream()
        await stream.append(messages(30))
        workers = [await stream.consumer("c", worker_config(pending_max=7)) for _ in range(3)]
        held: list[Delivery] = []
        for worker in workers:
            held += await worker.fetch(limit=5, wait_s=0.1)
        while len(held) < 7:
            held += await take(env, workers[0], 1)
        assert len(held) == 7
        for worker in workers:
            await nothing_to_fetch(worker)
        assert (await workers[0].info()).pending == 7
        waiting = asyncio.create_task(workers[1].fetch(limit=5, wait_s=env.patience_s * 2))
        await blocked(waiting)
        assert await workers[0].ack(held[2:4]) == 2
        more = await asyncio.wait_for(waiting, env.patience_s)
        assert 1 <= len(more) <= 2
        # a record given back still counts: it may come again, but no new one on top
        assert await workers[0].nak(held[:1]) == 1
        room = 2 - len(more) + 1
        got = await workers[2].fetch(limit=10, wait_s=0.5)
        assert 1 <= len(got) <= room
        assert held[0].record.sequence in sequences_of(got)

    @case("append", "consumers")
    async def test_pending_max_with_a_filter(self, env: Env) -> None:
        """Records that do not match take no room, and do not stop those that do."""
        stream = await env.stream()
        for n in range(12):
            await stream.append([Message("noise", b"%d" % n), Message("job", b"%d" % n)])
        consumer = await stream.consumer("c", worker_config(subjects=("job",), pending_max=2))
        seen: list[bytes] = []
        while len(seen) < 12:
            got = await take(env, consumer, min(2, 12 - len(seen)))
            seen += [d.record.data for d in got]
            await nothing_to_fetch(consumer)  # also with a limit below what would match
            await consumer.ack(got)
        assert seen == [b"%d" % n for n in range(12)]

    @case("append", "consumers")
    async def test_out_of_order_acks_keep_the_floor(self, env: Env) -> None:
        """The floor never passes a record that is not settled, and jumps when the gap closes."""
        stream = await env.stream()
        s = await stream.append(messages(6))
        consumer = await stream.consumer("c", worker_config())
        d = await take(env, consumer, 6)
        for n in (5, 1, 3, 2):
            assert await consumer.ack([d[n]]) == 1
            info = await consumer.info()
            assert info.floor < s[0]
        assert (info.pending, info.delivered, info.lag) == (2, s[-1], 2)
        assert await consumer.ack([d[0]]) == 1
        assert s[3] <= (await consumer.info()).floor < s[4]
        assert await consumer.ack([d[4]]) == 1
        info = await consumer.info()
        assert (info.floor, info.pending, info.lag) == (s[-1], 0, 0)

    @case("append", "consumers", "persistent")
    async def test_a_restart_keeps_pending_and_attempts(self, env: Env) -> None:
        """After closing and connecting again: settled stays settled, pending comes again, attempts count on."""
        stream = await env.stream()
        s = await stream.append(messages(6))
        consumer = await stream.consumer("c", worker_config(ack_wait_s=0.5, attempts_max=3))
        held: list[Delivery] = []
        async with asyncio.timeout(env.patience_s):
            while not {s[0], s[2]} <= {d.record.sequence for d in held}:
                held += await consumer.fetch(limit=4, wait_s=1.0)
        await consumer.ack([d for d in held if d.record.sequence == s[2]])
        before = {d.record.sequence: d.attempt for d in held}
        await env.restart()
        stream = await env.stream()
        assert await stream.consumers() == ["c"]
        consumer = await stream.consumer("c", create=False)
        assert consumer.config == worker_config(ack_wait_s=0.5, attempts_max=3)
        assert (await consumer.info()).floor < s[0]
        assert (await consumer.info()).pending >= 1
        attempts: dict[int, list[int]] = {}

        async def work() -> bool:
            for d in await consumer.fetch(wait_s=0.3):
                attempts.setdefault(d.record.sequence, []).append(d.attempt)
                if d.record.sequence != s[0]:
                    await consumer.ack([d])
            return dead_stream(stream.name) in await env.broker.streams() and s[-1] in attempts

        await eventually(work, within_s=env.patience_s, what="the abandoned record is dead, the others served")
        assert s[2] not in attempts, "a settled record came again after the restart"
        assert attempts[s[0]] == list(range(before[s[0]] + 1, 4)), "attempts were forgotten by the restart"
        assert set(attempts) == {x for x in s if x != s[2]}

    @case("append", "consumers", "persistent")
    async def test_acks_work_after_a_restart(self, env: Env) -> None:
        """A delivery fetched before the restart is still its worker's while the ack wait lasts, or stale: never lost."""
        stream = await env.stream()
        s = await stream.append(messages(3))
        consumer: Consumer = await stream.consumer("c", worker_config(ack_wait_s=1.0, attempts_max=0))
        held = await take(env, consumer, 3)
        await env.restart()
        consumer = await (await env.stream()).consumer("c")
        settled = set(sequences_of(held[:1])) if await consumer.ack(held[:1]) else set()
        async with asyncio.timeout(env.patience_s):
            while settled < set(s):
                for d in await consumer.fetch(wait_s=1.0):
                    assert d.record.sequence not in settled, "an acked record came again"
                    assert d.attempt >= 2
                    if await consumer.ack([d]):
                        settled.add(d.record.sequence)
        assert (await consumer.info()).lag == 0
