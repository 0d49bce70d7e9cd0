"""Workers: policies, bounds, joining of acks, dead letters, draining, cancellation, faults."""

from __future__ import annotations

import asyncio

import pytest
from conftest import run

import mist
from mist.broker.backoff import Backoff
from mist.broker.base import BYTES_MAX, Broker, Consumer, ConsumerConfig, Delivery, Message, header
from mist.broker.cursor import Cursor, Gap
from mist.client import AckPolicy, Client, Delivered, Worker
from mist.client.policy import nak_delay_s
from mist.errors import Ambiguous, DataLoss, InvalidArgument, NotFound, TimedOut, Unavailable
from mist.protocol.envelope import Envelope
from mist.testing.faults import Dice, Fault, FaultyBroker, FaultyConsumer, Plan, Script

QUICK = Backoff(first_s=0.0001, most_s=0.001)


def span(n: int) -> Envelope:
    return Envelope.new("trace.span", {"n": n}, source="test", id=f"span-{n}")


async def fill(broker: Broker, count: int) -> None:
    async with Client(broker) as client:
        await client.publish("s", [span(i) for i in range(1, count + 1)])


async def setup(plan: Plan, count: int) -> tuple[FaultyBroker, Client, Broker]:
    inner = await mist.connect("memory:")
    await fill(inner, count)
    broker = FaultyBroker(inner, plan)
    return broker, Client(broker), inner


async def consumer_info(broker: Broker) -> tuple[int, int]:
    """(floor, pending) of the consumer `c`."""
    info = await (await (await broker.open("s")).consumer("c", create=False)).info()
    return info.floor, info.pending


async def dead(broker: Broker) -> dict[int, str]:
    """Sequence -> reason."""
    stream = await broker.open("s--dead")
    return {
        int(header(r.headers, "Mist-Sequence")): header(r.headers, "Mist-Reason") async for r in Cursor(stream).replay()
    }


class Collect:
    """A handler that notes what it gets and stops its worker after `enough`."""

    def __init__(self, enough: int) -> None:
        self.seen: list[tuple[int, int]] = []
        self.enough = enough
        self.stop = asyncio.Event()
        self.fail: dict[int, int] = {}  # sequence -> how many attempts fail

    async def __call__(self, item: Delivered) -> None:
        self.seen.append((item.sequence, item.attempt))
        failing = item.attempt <= self.fail.get(item.sequence, 0)
        if not failing:
            self.enough -= 1
            if self.enough == 0:
                self.stop.set()
        if failing:
            raise ValueError(f"record {item.sequence}")


def test_a_worker_handles_in_order_and_acks_after() -> None:
    """With concurrency 1 handlers run in stream order; at the end everything is acked."""

    async def case() -> None:
        broker, client, inner = await setup(Script({}), 50)
        async with broker, client:
            collect = Collect(50)
            worker = await client.subscribe("s", "c", collect)
            stats = await worker.run(collect.stop)
            assert collect.seen == [(n, 1) for n in range(1, 51)]
            assert (stats.fetched, stats.processed, stats.failed, stats.stale) == (50, 50, 0, 0)
            assert await consumer_info(inner) == (50, 0)

    run(case())


def test_acks_are_joined() -> None:
    """What is settled in one turn, or while an ack is under way, goes in one call."""

    async def case() -> None:
        broker, client, inner = await setup(lambda op: Fault(turns=5 if op == "ack" else 0), 300)
        async with broker, client:
            collect = Collect(300)
            worker = await client.subscribe("s", "c", collect, concurrency=100)
            await worker.run(collect.stop)
            assert broker.calls["ack"] <= 10
            assert await consumer_info(inner) == (300, 0)

    run(case())


def test_fetching_is_bounded_by_free_slots() -> None:
    """Never more running than `concurrency`, never more held than that and `prefetch`."""

    async def case() -> None:
        broker, client, _ = await setup(Script({}), 40)
        limits: list[int] = []
        async with broker, client:
            running = most = 0
            done = asyncio.Event()
            handled = 0

            async def handler(item: Delivered) -> None:
                nonlocal running, most, handled
                running += 1
                most = max(most, running)
                await asyncio.sleep(0)
                running -= 1
                handled += 1
                if handled == 40:
                    done.set()

            worker = await client.subscribe("s", "c", handler, concurrency=4, prefetch=3)
            fetch = worker._consumer.fetch

            async def watched(*, limit: int = 256, bytes_max: int = BYTES_MAX, wait_s: float = 0.0) -> list[Delivery]:
                limits.append(limit)
                out = await fetch(limit=limit, bytes_max=bytes_max, wait_s=wait_s)
                assert len(worker._held) + len(out) <= 7
                return out

            worker._consumer.fetch = watched  # type: ignore[method-assign]
            await worker.run(done)
            assert most == 4
            assert max(limits) == 7

    run(case())


def test_nack_on_error_tries_again_with_the_next_attempt() -> None:
    """A failed record comes again with attempt + 1, others go on; out of attempts it is a dead letter."""

    async def case() -> None:
        broker, client, inner = await setup(Script({}), 5)
        async with broker, client:
            collect = Collect(4)
            collect.fail = {2: 2, 4: 99}
            config = ConsumerConfig(attempts_max=3)
            errors: list[tuple[int, str]] = []
            worker = await client.subscribe(
                "s", "c", collect, config=config, backoff=QUICK, concurrency=2,
                on_error=lambda item, exc: errors.append((item.sequence, str(exc))),
            )  # fmt: skip
            task = asyncio.create_task(worker.run())
            await collect.stop.wait()
            while worker.stats.dead < 1 or await consumer_info(inner) != (5, 0):
                await asyncio.sleep(0.001)
            worker.stop()
            stats = await task
            assert sorted(collect.seen) == [(1, 1), (2, 1), (2, 2), (2, 3), (3, 1), (4, 1), (4, 2), (4, 3), (5, 1)]
            assert (stats.processed, stats.failed, stats.dead, stats.redelivered) == (4, 5, 1, 4)
            assert await dead(inner) == {4: "attempts used up"}
            assert errors.count((4, "record 4")) == 3

    run(case())


@pytest.mark.parametrize("policy", [AckPolicy.ACK, AckPolicy.ACK_FIRST, AckPolicy.REJECT_ON_ERROR])
def test_policies_that_never_try_again(policy: AckPolicy) -> None:
    """ACK and ACK_FIRST count the error; REJECT_ON_ERROR makes a dead letter with the error as its reason."""

    async def case() -> None:
        broker, client, inner = await setup(Script({}), 3)
        async with broker, client:
            collect = Collect(2)
            collect.fail = {2: 99}
            worker = await client.subscribe("s", "c", collect, policy=policy)
            stats = await worker.run(collect.stop)
            assert collect.seen == [(1, 1), (2, 1), (3, 1)]
            assert (stats.processed, stats.failed) == (2, 1)
            assert await consumer_info(inner) == (3, 0)
            rejected = policy is AckPolicy.REJECT_ON_ERROR
            assert await dead(inner) == ({2: "ValueError: record 2"} if rejected else {})
            assert stats.dead == int(rejected)

    run(case())


def test_ack_first_acks_before_the_handler() -> None:
    """When the handler runs nothing is pending any more; if the ack fails nothing is handled and nothing is lost."""

    async def case() -> None:
        script = Script({"ack": [Fault(before=Unavailable("away"))]})
        broker, client, inner = await setup(script, 3)
        async with broker, client:
            seen: list[tuple[int, int]] = []
            stop = asyncio.Event()

            async def handler(item: Delivered) -> None:
                assert item.settled
                assert (await consumer_info(inner))[1] == 0
                seen.append((item.sequence, item.attempt))
                if len(seen) == 3:
                    stop.set()

            config = ConsumerConfig(ack_wait_s=0.01)
            worker = await client.subscribe("s", "c", handler, config=config, policy=AckPolicy.ACK_FIRST, concurrency=3)
            await worker.run(stop)
            assert sorted(seen) == [(1, 2), (2, 2), (3, 2)]

    run(case())


def test_manual_settling_also_after_the_handler_returned() -> None:
    """MANUAL: ack later, nak, term; the first call counts; an error gives back what was not settled."""

    async def case() -> None:
        broker, client, inner = await setup(Script({}), 4)
        async with broker, client:
            kept: list[Delivered] = []
            seen: list[tuple[int, int]] = []

            async def handler(item: Delivered) -> None:
                seen.append((item.sequence, item.attempt))
                if item.attempt > 1:
                    item.ack()
                elif item.sequence == 1:
                    kept.append(item)
                elif item.sequence == 2:
                    with pytest.raises(InvalidArgument):
                        item.nak(delay_s=-1)
                    item.nak(delay_s=0)
                    item.ack()  # too late: the first call counts
                elif item.sequence == 3:
                    item.term("not\nwanted")
                else:
                    raise ValueError("unsettled")

            worker = await client.subscribe(
                "s", "c", handler, policy=AckPolicy.MANUAL, concurrency=2, backoff=QUICK,
                config=ConsumerConfig(ack_wait_s=0.03),
            )  # fmt: skip
            task = asyncio.create_task(worker.run())
            while await consumer_info(inner) != (0, 1):
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)  # longer than the ack wait: what is held is extended
            assert "sequence=1" in repr(kept[0])
            kept[0].ack()
            while await consumer_info(inner) != (4, 0):
                await asyncio.sleep(0.001)
            worker.stop()
            stats = await task
            assert sorted(seen) == [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2)]
            assert (stats.stale, stats.dead) == (0, 1)
            assert await dead(inner) == {3: "not wanted"}

    run(case())


def test_manual_deliveries_that_nobody_settles_are_let_go() -> None:
    """After `handle_s_max` they are no longer extended, come again, and their slot is free."""

    async def case() -> None:
        broker, client, inner = await setup(Script({}), 1)
        async with broker, client:
            attempts: list[int] = []
            again = asyncio.Event()

            async def handler(item: Delivered) -> None:
                attempts.append(item.attempt)
                if item.attempt == 2:
                    item.ack()
                    again.set()

            worker = await client.subscribe(
                "s", "c", handler, policy=AckPolicy.MANUAL, handle_s_max=0.02, config=ConsumerConfig(ack_wait_s=0.03)
            )
            stats = await worker.run(again)
            assert attempts == [1, 2]
            assert stats.abandoned == 1
            assert await consumer_info(inner) == (1, 0)

    run(case())


def test_batch_handlers() -> None:
    """A batch handler gets up to `batch_max`; an error gives all of the batch back but what it settled itself."""

    async def case() -> None:
        broker, client, inner = await setup(Script({}), 25)
        async with broker, client:
            sizes: list[int] = []
            done: set[int] = set()
            stop = asyncio.Event()

            async def handler(items: list[Delivered]) -> None:
                sizes.append(len(items))
                if len(sizes) == 1:
                    items[0].ack()
                    done.add(items[0].sequence)
                    raise ValueError("first batch")
                done.update(i.sequence for i in items)
                if len(done) == 25:
                    stop.set()

            worker = await client.subscribe("s", "c", batch_handler=handler, batch_max=10, backoff=QUICK)
            stats = await worker.run(stop)
            assert max(sizes) == 10
            assert (stats.processed, stats.failed, stats.redelivered) == (24, 10, 9)
            assert await consumer_info(inner) == (25, 0)

    run(case())


@pytest.mark.parametrize("policy", list(AckPolicy))
def test_an_undecodable_record_never_stops_the_stream(policy: AckPolicy) -> None:
    """It becomes a dead letter with its reason, under every policy, and the handler never sees it."""

    async def case() -> None:
        async with mist.connect("memory:") as broker, Client(broker) as client:
            await client.publish("s", span(1))
            await (await client.stream("s")).append([Message("x", b"poison")])
            await client.publish("s", span(2))
            seen: list[int] = []
            stop = asyncio.Event()

            async def handler(item: Delivered) -> None:
                seen.append(item.sequence)
                item.ack()
                if item.sequence == 3:
                    stop.set()

            worker = await client.subscribe("s", "c", handler, policy=policy)
            stats = await worker.run(stop)
            assert seen == [1, 3]
            assert (stats.undecodable, stats.dead, stats.processed) == (1, 1, 2)
            assert (await dead(broker))[2].startswith("malformed: ")
            assert await consumer_info(broker) == (3, 0)

    run(case())


def test_long_handlers_keep_their_delivery() -> None:
    """A handler longer than the ack wait is extended: nobody else gets the record meanwhile."""

    async def case() -> None:
        broker, client, inner = await setup(Script({"extend": [Fault(before=Unavailable("away"))]}), 1)
        async with broker, client:
            stop = asyncio.Event()

            async def handler(item: Delivered) -> None:
                while broker.calls["extend"] < 4:
                    await asyncio.sleep(0.005)
                stop.set()

            config = ConsumerConfig(ack_wait_s=0.3)
            worker = await client.subscribe("s", "c", handler, config=config)
            stats = await worker.run(stop)
            assert (stats.processed, stats.stale, stats.retries) == (1, 0, 1)
            assert await consumer_info(inner) == (1, 0)

    run(case())


def test_a_handler_above_its_time_limit_fails() -> None:
    """`handle_s_max` cancels it; the policy then decides as for any error."""

    async def case() -> None:
        broker, client, inner = await setup(Script({}), 1)
        async with broker, client:
            stop = asyncio.Event()

            async def handler(item: Delivered) -> None:
                if item.attempt == 1:
                    await asyncio.Event().wait()
                if item.attempt == 2:  # cancelled by somebody else, not by us: a failure, not an end
                    raise asyncio.CancelledError
                stop.set()

            worker = await client.subscribe("s", "c", handler, handle_s_max=0.01, backoff=QUICK)
            stats = await worker.run(stop)
            assert (stats.processed, stats.failed, stats.redelivered) == (1, 2, 2)
            assert await consumer_info(inner) == (1, 0)

    run(case())


def test_stop_drains_what_was_fetched() -> None:
    """After `stop` nothing new is fetched, running and fetched records are finished, acks are written."""

    async def case() -> None:
        broker, client, inner = await setup(Script({}), 20)
        async with broker, client:
            stop = asyncio.Event()
            go_on = asyncio.Event()
            seen: list[int] = []

            async def handler(item: Delivered) -> None:
                seen.append(item.sequence)
                stop.set()
                await go_on.wait()

            worker = await client.subscribe("s", "c", handler, concurrency=2, prefetch=3)
            task = asyncio.create_task(worker.run(stop))
            await stop.wait()
            for _ in range(5):
                await asyncio.sleep(0)
            assert not task.done()
            go_on.set()
            stats = await task
            assert seen == [1, 2, 3, 4, 5]
            assert (stats.processed, stats.given_back) == (5, 0)
            assert await consumer_info(inner) == (5, 0)

    run(case())


def test_the_drain_has_a_deadline() -> None:
    """What is not finished by then is cancelled and given back at once, for somebody else."""

    async def case() -> None:
        broker, client, inner = await setup(Script({}), 5)
        async with broker, client:
            stop = asyncio.Event()
            cancelled: list[int] = []

            async def handler(item: Delivered) -> None:
                if item.sequence == 1:
                    return
                stop.set()
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancelled.append(item.sequence)
                    if item.sequence == 2:
                        raise
                    # 3 swallows it and returns: it is done

            worker = await client.subscribe("s", "c", handler, concurrency=2, prefetch=2, drain_s=0.01)
            stats = await worker.run(stop)
            assert sorted(cancelled) == [2, 3]
            assert stats.given_back == stats.fetched - 2
            again = await (await inner.open("s")).consumer("c")
            taken = await again.fetch(limit=10)
            assert [(d.record.sequence, d.attempt) for d in taken if d.record.sequence in (1, 2, 3)] == [(2, 2)]

    run(case())


def test_cancelling_run_gives_back_and_writes_acks() -> None:
    """A cancelled worker leaves nothing leased: finished records are acked, unfinished ones are there for others."""

    async def case() -> None:
        for turns in range(0, 60, 3):
            broker, client, inner = await setup(lambda op: Fault(turns=1), 12)
            async with broker, client:
                done: set[int] = set()

                async def handler(item: Delivered, done: set[int] = done) -> None:
                    await asyncio.sleep(0)
                    done.add(item.sequence)

                worker = await client.subscribe("s", "c", handler, concurrency=3)
                task = asyncio.create_task(worker.run())
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                rest = await (await inner.open("s")).consumer("c")
                taken = {d.record.sequence for d in await rest.fetch(limit=50)}
                assert taken | done == set(range(1, 13))
                assert not taken & done

    run(case())


def test_a_backend_that_is_away_is_tried_again() -> None:
    """Failing fetches and acks, also with lost replies, end with every record handled and settled."""

    async def case() -> None:
        for seed in range(8):
            dice = Dice(seed, {"fetch": 0.3, "ack": 0.3, "nak": 0.3, "term": 0.3, "extend": 0.3})
            broker, client, inner = await setup(dice, 30)
            async with broker, client:
                await (await inner.open("s")).append([Message("x", b"poison")])
                collect = Collect(30)
                collect.fail = {7: 1, 9: 2}
                worker = await client.subscribe("s", "c", collect, concurrency=4, backoff=QUICK, flush_s=10)
                stats = await worker.run(collect.stop)
                assert {n for n, _ in collect.seen} == set(range(1, 31))
                assert stats.processed == 30
                while (await consumer_info(inner)) != (31, 0):
                    # only the poison may be left, if the stop came before its turn
                    assert await consumer_info(inner) == (30, 0)
                    await (await client.subscribe("s", "c", collect)).run(_soon())

    run(case())


def _soon() -> asyncio.Event:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, stop.set)
    return stop


def test_what_time_does_not_heal_is_raised() -> None:
    """A deleted consumer, or a backend away for longer than `away_s_max`, ends `run` with that very error."""

    async def case() -> None:
        broker, client, inner = await setup(Script({}), 1)
        async with broker, client:
            worker = await client.subscribe("s", "c", Collect(9))
            await (await (await inner.open("s")).consumer("c")).delete()
            with pytest.raises(NotFound):
                await worker.run()
            away = FaultyBroker(inner, lambda op: Fault(before=Unavailable("away")) if op == "fetch" else None)
            worker = await Client(away).subscribe("s", "c", Collect(9), away_s_max=0.0)
            with pytest.raises(Unavailable):
                await worker.run()
            deaf = FaultyBroker(inner, lambda op: Fault(before=Ambiguous("lost")) if op == "ack" else None)
            collect = Collect(1)
            worker = await Client(deaf).subscribe("s", "d", collect, flush_s=0.01)
            with pytest.raises(TimedOut):
                await worker.run(collect.stop)
            assert worker.stats.processed == 1

    run(case())


class _Damaged(FaultyConsumer):
    """The first fetch reports damage, once, as the contract says."""

    told = False

    async def fetch(self, *, limit: int = 256, bytes_max: int = BYTES_MAX, wait_s: float = 0.0) -> list[Delivery]:
        if not self.told:
            self.told = True
            raise DataLoss(first=1, last=2, resume_after=2, stream="s")
        return await super().fetch(limit=limit, bytes_max=bytes_max, wait_s=wait_s)


def test_damage_is_counted_and_passed_over_or_raised() -> None:
    """A worker goes on behind a damaged range unless told to raise; either way it is in `gaps`."""

    async def case() -> None:
        async with mist.connect("memory:") as inner:
            await fill(inner, 3)
            inner_consumer: Consumer = await (await inner.open("s")).consumer("c", ConsumerConfig(after=2))
            damaged = _Damaged(FaultyBroker(inner, Script({})), inner_consumer)
            collect = Collect(1)
            worker = Worker(damaged, collect)
            stats = await worker.run(collect.stop)
            assert collect.seen == [(3, 1)]
            assert stats.gaps == 1
            assert list(worker.gaps) == [Gap(1, 2, "data_loss")]
            damaged.told = False
            with pytest.raises(DataLoss):
                await Worker(damaged, collect, on_gap="raise").run()

    run(case())


def test_two_workers_share_one_consumer() -> None:
    """Each record is handled by one of them."""

    async def case() -> None:
        broker, client, inner = await setup(lambda op: Fault(turns=1), 60)
        async with broker, client:
            stop = asyncio.Event()
            seen: list[int] = []

            async def handler(item: Delivered) -> None:
                seen.append(item.sequence)
                await asyncio.sleep(0)
                if len(seen) == 60:
                    stop.set()

            workers = [await client.subscribe("s", "c", handler, concurrency=2) for _ in range(2)]
            stats = await asyncio.gather(*[w.run(stop) for w in workers])
            assert sorted(seen) == list(range(1, 61))
            assert min(s.processed for s in stats) > 0
            assert await consumer_info(inner) == (60, 0)

    run(case())


def test_misuse_is_refused() -> None:
    """No handler, two handlers, no slots, two runs at once."""

    async def case() -> None:
        broker, client, _ = await setup(Script({}), 1)
        async with broker, client:
            with pytest.raises(InvalidArgument):
                await client.subscribe("s", "c")
            with pytest.raises(InvalidArgument):
                await client.subscribe("s", "c", Collect(1), concurrency=0)
            worker = await client.subscribe("s", "c", Collect(9))
            task = asyncio.create_task(worker.run())
            await asyncio.sleep(0)
            with pytest.raises(InvalidArgument):
                await worker.run()
            worker.stop()
            await task

    run(case())


def test_the_backoff_has_full_jitter_in_steps() -> None:
    """Between a sixteenth of the ceiling and the ceiling, which doubles up to its limit."""
    backoff = Backoff(first_s=1.0, most_s=8.0)
    assert [backoff.ceiling_s(n) for n in (1, 2, 3, 4, 5, 500)] == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert nak_delay_s(backoff, 1, lambda: 0.001) == 1 / 16
    assert nak_delay_s(backoff, 2, lambda: 0.999) == 2.0
    assert backoff.delay_s(3, lambda: 0.5) == 2.0


class _Deaf(FaultyConsumer):
    """Swallows a cancellation, as asyncio.wait_for of Python 3.11 can."""

    async def fetch(self, *, limit: int = 256, bytes_max: int = BYTES_MAX, wait_s: float = 0.0) -> list[Delivery]:
        out = await super().fetch(limit=limit, bytes_max=bytes_max)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return out
        return []


@pytest.mark.parametrize("gently", [True, False])
def test_an_adapter_that_swallows_the_cancellation_of_a_fetch(gently: bool) -> None:
    """What it handed out is worked off by a drain, or given back when `run` is cancelled; nothing stays leased."""

    async def case() -> None:
        async with mist.connect("memory:") as inner:
            await fill(inner, 3)
            consumer = await (await inner.open("s")).consumer("c")
            collect = Collect(3)
            worker = Worker(_Deaf(FaultyBroker(inner, Script({})), consumer), collect, concurrency=3)
            task = asyncio.create_task(worker.run())
            for _ in range(5):
                await asyncio.sleep(0)
            if gently:
                worker.stop()
                await task
                assert await consumer_info(inner) == (3, 0)
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert [(d.record.sequence, d.attempt) for d in await consumer.fetch()] == [(1, 2), (2, 2), (3, 2)]

    run(case())
