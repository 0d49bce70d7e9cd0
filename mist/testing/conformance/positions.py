"""Where things are: trims, times, incarnations, opening again."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from mist.broker.base import Checkpoint, ConsumerConfig, StreamConfig
from mist.errors import Conflict, CursorAhead, InvalidArgument, NotFound, SequenceExpired, Unsupported
from mist.testing.conformance.harness import (
    Env,
    Harness,
    blocked,
    case,
    data_of,
    messages,
    read_all,
    sequences_of,
    take,
    worker_config,
)


class Positions(Harness):
    @case("append", "trim")
    async def test_a_trimmed_range_is_refused(self, env: Env) -> None:
        """Below the first kept record lies SequenceExpired with that record's sequence; never a silent skip."""
        stream = await env.stream()
        s = await stream.append(messages(10))
        assert await stream.trim(before=s[4]) == 4
        for after in (0, *s[:3]):
            for subjects in ((">",), ("none",)):
                with pytest.raises(SequenceExpired) as refused:
                    await stream.read(after=after, subjects=subjects)
                assert (refused.value.after, refused.value.first) == (after, s[4])
        assert sequences_of(await read_all(stream, after=s[3])) == s[4:]
        assert sequences_of(await read_all(stream, after=s[4])) == s[5:]
        info = await stream.info()
        assert (info.first, info.last, info.records) == (s[4], s[-1], 6)

    @case("append", "trim")
    async def test_trim_again_and_trim_everything(self, env: Env) -> None:
        """Trimming what is gone removes nothing; trimming all leaves an empty stream that goes on numbering."""
        stream = await env.stream()
        s = await stream.append(messages(6))
        assert await stream.trim(before=s[3]) == 3
        assert await stream.trim(before=s[3]) == 0
        assert await stream.trim(before=1) == 0
        assert await stream.trim(before=s[-1] + 1) == 3
        info = await stream.info()
        assert (info.first, info.last, info.records) == (s[-1] + 1, s[-1], 0)
        assert await read_all(stream, after=s[-1]) == []
        with pytest.raises(SequenceExpired):
            await stream.read(after=s[-1] - 1)
        (next_,) = await stream.append(messages(1, start=6))
        assert next_ > s[-1]
        if self.dense:
            assert next_ == s[-1] + 1
        assert data_of(await read_all(stream, after=s[-1])) == [b"6"]

    @case("append", "trim")
    async def test_trim_past_the_end_is_refused(self, env: Env) -> None:
        """Nothing is removed when `before` lies beyond last + 1."""
        stream = await env.stream()
        s = await stream.append(messages(3))
        with pytest.raises(CursorAhead):
            await stream.trim(before=s[-1] + 2)
        with pytest.raises(InvalidArgument):
            await stream.trim(before=-1)
        assert len(await read_all(stream)) == 3

    @case("append", "trim", "persistent")
    async def test_a_trim_survives_reopening(self, env: Env) -> None:
        """What was trimmed stays gone, and numbering goes on, also when everything was trimmed."""
        stream = await env.stream()
        s = await stream.append(messages(5))
        await stream.trim(before=s[2])
        await env.restart()
        stream = await env.stream()
        assert sequences_of(await read_all(stream, after=s[1])) == s[2:]
        with pytest.raises(SequenceExpired):
            await stream.read(after=0)
        await stream.trim(before=s[-1] + 1)
        await env.restart()
        stream = await env.stream()
        info = await stream.info()
        assert (info.first, info.last, info.records) == (s[-1] + 1, s[-1], 0)
        assert (await stream.append(messages(1)))[0] > s[-1]

    @case("append", "trim")
    async def test_a_trim_leaves_a_waiting_read_alone(self, env: Env) -> None:
        """A reader waiting at the end lost nothing by a trim of what it has read."""
        stream = await env.stream()
        s = await stream.append(messages(4))
        reading = asyncio.create_task(stream.read(after=s[-1], wait_s=env.patience_s * 2))
        await blocked(reading)
        await stream.trim(before=s[-1] + 1)
        await blocked(reading)
        await stream.append(messages(1, start=4))
        assert data_of((await asyncio.wait_for(reading, env.patience_s)).records) == [b"4"]

    @case("append", "trim", "consumers")
    async def test_consumers_pass_over_what_was_trimmed(self, env: Env) -> None:
        """Trimmed records are neither delivered nor pending nor lag; their deliveries do not hold up `pending_max`."""
        stream = await env.stream()
        s = await stream.append(messages(10))
        consumer = await stream.consumer("c", worker_config(pending_max=3))
        held = await take(env, consumer, 3)
        assert await consumer.nak(held[:1]) == 1
        await stream.trim(before=s[5])
        got = await take(env, consumer, 3)
        assert sequences_of(got) == s[5:8]
        assert [d.attempt for d in got] == [1, 1, 1]
        info = await consumer.info()
        assert (info.pending, info.lag) == (3, 5)
        assert info.floor >= s[4]
        if env.broker.capabilities.pending:
            assert [p.sequence for p in await consumer.pending()] == s[5:8]
        assert await consumer.ack(got) == 3
        assert sequences_of(await take(env, consumer, 2)) == s[8:]
        fresh = await stream.consumer("late", worker_config())
        assert sequences_of(await take(env, fresh, 5)) == s[5:]

    @case("append", "trim", "consumers")
    async def test_a_trim_makes_room_for_a_waiting_fetch(self, env: Env) -> None:
        """A fetch that waits because of `pending_max` goes on when the pending records are trimmed away."""
        stream = await env.stream()
        s = await stream.append(messages(4))
        consumer = await stream.consumer("c", worker_config(pending_max=2))
        await take(env, consumer, 2)
        fetching = asyncio.create_task(consumer.fetch(wait_s=env.patience_s * 2))
        await blocked(fetching)
        await stream.trim(before=s[2])
        assert sequences_of(await asyncio.wait_for(fetching, env.patience_s)) == s[2:]

    @case("append", "locate")
    async def test_locate_by_time_agrees_with_a_scan(self, env: Env) -> None:
        """The first sequence at or after a time; last + 1 beyond the last; the first kept one for times before."""
        stream = await env.stream()
        assert await stream.locate(0) == 1
        for n in range(12):
            await stream.append(messages(1 + n % 3, start=n))
            await asyncio.sleep(0.003)
        records = await read_all(stream)
        times = [r.timestamp_ns for r in records]
        probes = {0, 1, times[0] - 1, times[-1] + 1, times[-1] + 10**15, *times, *(t - 1 for t in times)}
        for probe in sorted(probes | {(a + b) // 2 for a, b in pairwise(times)}):
            scan = next((r.sequence for r in records if r.timestamp_ns >= probe), records[-1].sequence + 1)
            assert await stream.locate(probe) == scan, probe
        for wild in (-1, -(2**63), 2**63, 2**70):
            try:
                found = await stream.locate(wild)
            except InvalidArgument:
                continue
            assert found == (records[0].sequence if wild < 0 else records[-1].sequence + 1)

    @case("append", "locate", "trim")
    async def test_locate_after_a_trim(self, env: Env) -> None:
        """A time whose records are gone gives the first kept one."""
        stream = await env.stream()
        s = []
        for n in range(5):
            s += await stream.append(messages(1, start=n))
            await asyncio.sleep(0.003)
        times = [r.timestamp_ns for r in await read_all(stream)]
        await stream.trim(before=s[3])
        assert await stream.locate(times[0]) == s[3]
        assert await stream.locate(times[4]) == (s[4] if times[4] > times[3] else s[3])
        await stream.trim(before=s[-1] + 1)
        assert await stream.locate(0) == s[-1] + 1

    @case("append", "delete")
    async def test_the_incarnation_changes(self, env: Env) -> None:
        """Deleting and making again gives another incarnation; old records, ids and handles are gone."""
        stream = await env.stream()
        assert stream.incarnation
        assert stream.incarnation == (await stream.info()).incarnation
        await stream.append(messages(5, ids="i" if env.broker.capabilities.dedupe else ""))
        await env.broker.delete(stream.name)
        assert stream.name not in await env.broker.streams()
        with pytest.raises(NotFound):
            await env.broker.open(stream.name, create=False)
        again = await env.stream()
        assert again.incarnation != stream.incarnation
        assert (await again.info()).records == 0
        assert len(await again.append(messages(2, ids="i" if env.broker.capabilities.dedupe else ""))) == 2
        assert data_of(await read_all(again)) == [b"0", b"1"]
        for call in (
            lambda: stream.read(),
            lambda: stream.append(messages(1)),
            lambda: stream.info(),
        ):
            with pytest.raises(NotFound):
                await call()
        assert len(await read_all(again)) == 2, "an old handle wrote into the new stream"

    @case("append", "delete", "consumers")
    async def test_deleting_a_stream_wakes_its_waiters(self, env: Env) -> None:
        """Waiting reads and fetches of a deleted stream end with NotFound."""
        stream = await env.stream()
        consumer = await stream.consumer("c")
        waiting = [
            asyncio.create_task(stream.read(wait_s=env.patience_s * 3)),
            asyncio.create_task(consumer.fetch(wait_s=env.patience_s * 3)),
        ]
        await asyncio.gather(*(blocked(w) for w in waiting))
        await env.broker.delete(stream.name)
        ended = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), env.patience_s)
        assert [type(e) for e in ended] == [NotFound, NotFound]

    @case("append", "delete", "consumers")
    async def test_deleting_a_stream_deletes_its_consumers(self, env: Env) -> None:
        """A consumer of the deleted stream is unknown to the new one; old handles refuse."""
        stream = await env.stream()
        await stream.append(messages(3))
        old = await stream.consumer("c")
        (held,) = await take(env, old, 1)
        await env.broker.delete(stream.name)
        again = await env.stream()
        await again.append(messages(2))
        assert await again.consumers() == []
        with pytest.raises(NotFound):
            await again.consumer("c", create=False)
        new = await again.consumer("c", worker_config())
        assert await new.ack([held]) == 0, "a delivery of the old stream settled a record of the new one"
        assert [d.attempt for d in await take(env, new, 2)] == [1, 1]
        with pytest.raises(NotFound):
            await old.fetch()

    @case("delete", "checkpoints")
    async def test_deleting_a_stream_deletes_its_checkpoints(self, env: Env) -> None:
        """Only that stream's."""
        one, two = await env.stream("one"), await env.stream("two")
        for stream in (one, two):
            await env.broker.checkpoints.save(
                Checkpoint(stream=stream.name, name="c", incarnation=stream.incarnation, sequence=0)
            )
        await env.broker.delete(one.name)
        assert await env.broker.checkpoints.load(one.name, "c") is None
        assert await env.broker.checkpoints.list(one.name) == []
        assert await env.broker.checkpoints.load(two.name, "c") is not None

    @case()
    async def test_deleting_what_is_not_there(self, env: Env) -> None:
        """NotFound; the same for opening it without create, which makes nothing."""
        with pytest.raises(NotFound):
            await env.broker.open(env.name(), create=False)
        if env.broker.capabilities.delete:
            with pytest.raises(NotFound):
                await env.broker.delete(env.name())
        assert env.name() not in await env.broker.streams()

    @case("append")
    async def test_streams_are_listed(self, env: Env) -> None:
        """Sorted, each once."""
        for suffix in ("b", "a", "c"):
            await (await env.stream(suffix)).append(messages(1))
        names = await env.broker.streams()
        assert names == sorted(set(names))
        assert {env.name(s) for s in "abc"} <= set(names)

    @case("append")
    async def test_streams_with_the_same_subjects_do_not_mix(self, env: Env) -> None:
        """Two streams carrying one subject keep their own records, numbers and positions."""
        one, two = await env.stream("one"), await env.stream("two")
        await one.append(messages(3))
        await two.append(messages(5, start=10))
        assert data_of(await read_all(one)) == [b"0", b"1", b"2"]
        assert data_of(await read_all(two, subjects=("a.b",))) == [b"10", b"11", b"12", b"13", b"14"]

    @case("append")
    async def test_opening_again(self, env: Env) -> None:
        """Another handle is the same stream: same incarnation, same records, its appends seen by both."""
        one = await env.stream()
        two = await env.broker.open(env.name(), create=False)
        assert (one.name, one.incarnation, one.size_bytes_max) == (two.name, two.incarnation, two.size_bytes_max)
        await one.append(messages(1))
        await two.append(messages(1, start=1))
        assert data_of(await read_all(one)) == data_of(await read_all(two)) == [b"0", b"1"]

    @case("append", "persistent")
    async def test_reopening_resumes(self, env: Env) -> None:
        """After closing and connecting again: same incarnation, same records, numbering goes on, reading goes on."""
        stream = await env.stream()
        s = await stream.append(messages(20))
        seen = (await stream.read(limit=8)).records
        incarnation = stream.incarnation
        await env.restart()
        assert env.name() in await env.broker.streams()
        stream = await env.broker.open(env.name(), create=False)
        assert stream.incarnation == incarnation
        rest = await read_all(stream, after=seen[-1].sequence)
        assert sequences_of([*seen, *rest]) == s
        more = await stream.append(messages(3, start=20))
        assert more[0] > s[-1]
        assert data_of(await read_all(stream)) == [b"%d" % n for n in range(23)]

    @case("append", "delete", "persistent")
    async def test_a_deletion_survives_reopening(self, env: Env) -> None:
        """A deleted stream does not come back, and the one made after it keeps its own incarnation."""
        stream = await env.stream()
        await stream.append(messages(3))
        await env.broker.delete(stream.name)
        await env.restart()
        assert env.name() not in await env.broker.streams()
        again = await env.stream()
        assert again.incarnation != stream.incarnation
        await env.restart()
        assert (await env.stream()).incarnation == again.incarnation
        assert await read_all(await env.stream()) == []

    @case()
    async def test_the_stated_durability(self, env: Env) -> None:
        """`info` states a durability, and it is the configuration's; one that was asked for is given or refused."""
        info = await (await env.stream()).info()
        assert info.durability in ("memory", "process", "power", "replicated")
        assert info.config.durability == info.durability
        given = 0
        for level in ("memory", "process", "power", "replicated"):
            try:
                stream = await env.stream(level, StreamConfig(durability=level))
            except (InvalidArgument, Unsupported):
                continue
            given += 1
            info = await stream.info()
            assert (info.durability, info.config.durability) == (level, level)
            again = await (await env.broker.open(stream.name)).info()
            assert again.durability == level
            others = {"memory", "process", "power", "replicated"} - {level}
            for other in sorted(others):
                with pytest.raises((Conflict, InvalidArgument, Unsupported)):
                    await env.broker.open(stream.name, config=StreamConfig(durability=other))  # type: ignore[arg-type]
        assert given, "no durability can be asked for"

    @case()
    async def test_info_is_about_this_broker(self, env: Env) -> None:
        """Name, incarnation and capabilities in `info` are the broker's and the stream's."""
        stream = await env.stream()
        info = await stream.info()
        assert info.name == stream.name == env.name()
        assert info.capabilities == env.broker.capabilities
        assert env.broker.backend
        assert await env.broker.ping() >= 0
        for name in ("full", "age_s_max", "bytes_max", "records_max"):
            assert getattr(info.config, name) is not None, f"info().config.{name} does not say what is in force"

    @case("append", "retention")
    async def test_another_configuration_is_a_conflict(self, env: Env) -> None:
        """Opening with other settings than the stream has: Conflict. With the same, or fewer, or none: fine."""
        config = self.stream_config(StreamConfig(records_max=1000, full="refuse"))
        stream = await env.broker.open(env.name(), config=config)
        for fine in (None, config, StreamConfig(), StreamConfig(records_max=1000), (await stream.info()).config):
            again = await env.broker.open(env.name(), config=fine)
            assert again.incarnation == stream.incarnation
        for other in (
            StreamConfig(records_max=999),
            StreamConfig(full="drop_oldest"),
            StreamConfig(records_max=1000, age_s_max=3600.0),
        ):
            for create in (True, False):
                with pytest.raises(Conflict):
                    await env.broker.open(env.name(), config=other, create=create)
        assert (await stream.info()).config.records_max == 1000

    @case()
    async def test_configurations_that_cannot_be_right(self, env: Env) -> None:
        """Negative, infinite or not a number: refused before anything is made."""
        for wrong in (
            StreamConfig(records_max=-1),
            StreamConfig(bytes_max=-1),
            StreamConfig(age_s_max=-0.1),
            StreamConfig(age_s_max=float("nan")),
            StreamConfig(age_s_max=float("inf")),
            StreamConfig(dedupe_window_s=float("nan")),
            StreamConfig(dedupe_ids_max=-5),
        ):
            with pytest.raises((InvalidArgument, Unsupported)):
                await env.broker.open(env.name(), config=wrong)
        assert env.name() not in await env.broker.streams()
        stream = await env.stream()
        if not env.broker.capabilities.consumers:
            return
        nan, inf = float("nan"), float("inf")
        for bad in (
            ConsumerConfig(after=-1),
            ConsumerConfig(ack_wait_s=0.0),
            ConsumerConfig(ack_wait_s=nan),
            ConsumerConfig(ack_wait_s=inf),
            ConsumerConfig(attempts_max=-1),
            ConsumerConfig(pending_max=0),
            ConsumerConfig(subjects=()),
            ConsumerConfig(subjects=("a..b",)),
            ConsumerConfig(subjects=("\ud800",)),
        ):
            with pytest.raises(InvalidArgument):
                await stream.consumer("c", bad)
        for bad_name in ("", "a.b", "a b", "-x", "x" * 200, "a/b", "\ud800"):
            with pytest.raises(InvalidArgument):
                await stream.consumer(bad_name)
        assert await stream.consumers() == []
