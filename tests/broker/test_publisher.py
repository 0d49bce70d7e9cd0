"""The publisher: batches, bounds, order, repeats with ids, every outcome told once, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from conftest import run
from hypothesis import given, settings
from hypothesis import strategies as st

import mist
from mist.broker.backoff import Backoff
from mist.broker.base import Message, Stream, StreamConfig
from mist.broker.cursor import Cursor
from mist.broker.publisher import Publisher
from mist.errors import (
    Ambiguous,
    Closed,
    Internal,
    InvalidArgument,
    MistError,
    Overloaded,
    PartialAppend,
    StorageFull,
    TimedOut,
    TooLarge,
    Unavailable,
)
from mist.testing.faults import Dice, Fault, FaultyBroker, Plan, Script

FAST = Backoff(first_s=0.0001, most_s=0.001)


def message(n: int, id: str = "") -> Message:
    return Message("a.b", b"%d" % n, id or f"id-{n}")


async def stored(stream: Stream) -> list[int]:
    return [int(r.data) async for r in Cursor(stream).replay()]


async def faulty(plan: Plan, config: StreamConfig | None = None) -> tuple[FaultyBroker, Stream, Stream]:
    """A broker that fails by plan, the failing stream, and the same stream unharmed."""
    inner = await mist.connect("memory:")
    broker = FaultyBroker(inner, plan)
    stream = await broker.open("s", config=config)
    return broker, stream, await inner.open("s")


async def settle(*coros: Coroutine[Any, Any, Any]) -> list[Any]:
    return await asyncio.gather(*coros, return_exceptions=True)


def test_what_accumulates_during_one_append_goes_into_the_next() -> None:
    """A thousand tasks that await their own sequence share appends; nobody waits for a timer."""

    async def case() -> None:
        broker, stream, _ = await faulty(lambda _: Fault(turns=3))
        async with broker, Publisher(stream) as publisher:
            sequences = await asyncio.gather(*[publisher.publish(message(i)) for i in range(1000)])
            assert sequences == list(range(1, 1001))
            assert len(broker.appended) == 1

            async def often(task: int) -> None:
                for i in range(10):
                    await publisher.publish(message(i, f"{task}-{i}"))

            broker.appended.clear()
            await asyncio.gather(*[often(t) for t in range(100)])
            assert broker.appended == [100] * 10

    run(case())


def test_batches_are_bounded_by_count_and_by_bytes() -> None:
    """No append is larger than asked for; one message above the byte bound still goes, alone."""

    async def case() -> None:
        broker, stream, whole = await faulty(lambda _: None)
        async with broker:
            async with Publisher(stream, batch_records_max=7) as publisher:
                assert await publisher.publish_many([message(i) for i in range(20)]) == list(range(1, 21))
            assert broker.appended == [7, 7, 6]
            broker.appended.clear()
            async with Publisher(stream, batch_bytes_max=250) as publisher:
                await publisher.publish_many([Message("a", b"1" * size) for size in (100, 100, 100, 300, 10)])
            assert broker.appended == [2, 1, 1, 1]
            assert (await whole.info()).records == 25

    run(case())


def test_callers_wait_for_room_in_order_and_send_nowait_is_refused() -> None:
    """Above `pending_max` or `pending_bytes_max` callers wait, and enter in the order they came."""

    async def case() -> None:
        gate = asyncio.Event()
        broker, stream, whole = await faulty(lambda op: Fault(gate=gate) if op == "append" else None)
        async with broker:
            publisher = Publisher(stream, pending_max=5, batch_records_max=3)
            tasks = [asyncio.create_task(publisher.publish(message(i))) for i in range(20)]
            many = asyncio.create_task(publisher.publish_many([message(i) for i in range(20, 40)]))
            for _ in range(10):
                await asyncio.sleep(0)
            assert publisher.pending == 5
            with pytest.raises(Overloaded):
                publisher.send_nowait(message(99))
            gate.set()
            assert await asyncio.gather(*tasks) == list(range(1, 21))
            assert await many == list(range(21, 41))
            assert await stored(whole) == list(range(40))

            gate.clear()
            by_bytes = Publisher(stream, pending_bytes_max=10)
            await by_bytes.send(Message("a", b"1" * 100))  # alone it may pass the bound
            with pytest.raises(Overloaded):
                by_bytes.send_nowait(message(98))
            gate.set()
            await by_bytes.drain()
            by_count = Publisher(stream, pending_max=1)
            by_count.send_nowait(message(97))
            await by_count.drain()

    run(case())


def test_a_lost_reply_is_repeated_with_the_same_ids() -> None:
    """Ambiguous after storing, before storing, twice: stored once, and the first sequence comes back."""

    async def case() -> None:
        lost = Ambiguous("lost")
        script = Script({"append": [Fault(after=lost), Fault(before=lost), None, Fault(after=lost)]})
        broker, stream, whole = await faulty(script)
        async with broker, Publisher(stream, backoff=FAST) as publisher:
            assert await publisher.publish(message(0)) == 1
            assert await publisher.publish(Message("a", b"1")) == 2
            assert publisher.repeated == 3
            assert await stored(whole) == [0, 1]

    run(case())


@pytest.mark.parametrize("config", [StreamConfig(dedupe_ids_max=0), StreamConfig(dedupe_window_s=0)])
def test_without_deduplication_an_unknown_fate_is_told_not_repeated(config: StreamConfig) -> None:
    """A stream that keeps no ids could store a repeat twice, so the caller gets Ambiguous with its own id."""

    async def case() -> None:
        script = Script({"append": [Fault(after=Ambiguous("lost"))]})
        broker, stream, whole = await faulty(script, config)
        async with broker, Publisher(stream, backoff=FAST) as publisher:
            outcome = await settle(publisher.publish(message(0)), publisher.publish(message(1)))
            assert [type(o) for o in outcome] == [Ambiguous, Ambiguous]
            assert [o.ids for o in outcome] == [["id-0"], ["id-1"]]
            assert outcome[0] is not outcome[1]
            assert await stored(whole) == [0, 1]
            assert publisher.repeated == 0

    run(case())


def test_repeats_are_bounded_and_doubt_is_never_forgotten() -> None:
    """After the last repeat the error is Ambiguous if any try may have stored it, else the error itself."""

    async def case() -> None:
        away = Fault(before=Unavailable("away"))
        broker, stream, _ = await faulty(lambda op: away if op == "append" else None)
        async with broker, Publisher(stream, backoff=FAST, repeats_max=3) as publisher:
            with pytest.raises(Unavailable):
                await publisher.publish(message(0))
            assert broker.calls["append"] == 4
            assert publisher.failed == 1

        script = Script({"append": [Fault(after=Ambiguous("lost")), *[away] * 9]})
        broker, stream, whole = await faulty(script)
        async with broker, Publisher(stream, backoff=FAST, repeats_max=3) as publisher:
            with pytest.raises(Ambiguous) as caught:
                await publisher.publish(message(0))
            assert isinstance(caught.value.__cause__, Unavailable)
            assert await stored(whole) == [0]

        broker, stream, _ = await faulty(lambda op: Fault(before=Ambiguous("x")) if op == "append" else away)
        async with broker, Publisher(stream, backoff=FAST, repeats_max=2) as publisher:
            with pytest.raises(Ambiguous):
                await publisher.publish(message(0))

    run(case())


def test_a_full_store_is_told_at_once() -> None:
    """StorageFull is not waited for."""

    async def case() -> None:
        broker, stream, _ = await faulty(lambda _: None, StreamConfig(records_max=1, full="refuse"))
        async with broker, Publisher(stream) as publisher:
            await publisher.publish(message(0))
            with pytest.raises(StorageFull):
                await publisher.publish(message(1))
            assert broker.calls["append"] == 2

    run(case())


def test_a_partial_append_keeps_its_prefix_and_tries_the_rest() -> None:
    """The prefix has its sequences at once; the rest is appended again, or fails with the cause."""

    async def case() -> None:
        script = Script({"append": [Fault(stored=2, before=Unavailable("cut")), Fault(stored=0), None]})
        broker, stream, whole = await faulty(script)
        async with broker, Publisher(stream, backoff=FAST) as publisher:
            assert await asyncio.gather(*[publisher.publish(message(i)) for i in range(5)]) == [1, 2, 3, 4, 5]
            assert broker.appended == [5, 3, 3]
            assert await stored(whole) == [0, 1, 2, 3, 4]

        script = Script({"append": [Fault(stored=2, before=StorageFull("full"))]})
        broker, stream, _ = await faulty(script)
        async with broker, Publisher(stream, backoff=FAST) as publisher:
            outcome = await settle(*[publisher.publish(message(i)) for i in range(4)])
            assert outcome[:2] == [1, 2]
            assert [type(o) for o in outcome[2:]] == [StorageFull, StorageFull]

    run(case())


def test_publish_many_is_all_or_a_prefix() -> None:
    """A group that fails in the middle tells how far it went, and its rest is not stored behind the hole."""

    async def case() -> None:
        full = Fault(stored=1, before=StorageFull("full"))
        script = Script({"append": [None, full]})
        broker, stream, whole = await faulty(script)
        async with broker, Publisher(stream, batch_records_max=3) as publisher:
            many, one = await settle(
                publisher.publish_many([message(i) for i in range(10)]), publisher.publish(message(10))
            )
            assert isinstance(many, PartialAppend)
            assert (many.sequences, many.total) == ([1, 2, 3, 4], 10)
            assert isinstance(many.__cause__, StorageFull)
            assert one == 5
            assert await stored(whole) == [0, 1, 2, 3, 10]
            assert publisher.pending == 0
            assert await publisher.publish_many([]) == []

        script = Script({"append": [None, Fault(after=Ambiguous("lost"))]})
        broker, stream, whole = await faulty(script, StreamConfig(dedupe_ids_max=0))
        async with broker, Publisher(stream, batch_records_max=3) as publisher:
            with pytest.raises(Ambiguous) as caught:
                await publisher.publish_many([message(i) for i in range(8)])
            assert caught.value.ids == [f"id-{i}" for i in range(3, 8)]
            assert await stored(whole) == list(range(6))

    run(case())


def test_a_bad_message_fails_alone() -> None:
    """What the stream refuses is refused before it shares a batch; what only the server refuses is found by halving."""

    async def case() -> None:
        broker, stream, whole = await faulty(lambda _: None)
        async with broker, Publisher(stream) as publisher:
            big = Message("a", b"x" * (stream.size_bytes_max + 1), "big")
            outcome = await settle(
                publisher.publish(message(0)),
                publisher.publish(big),
                publisher.publish(Message("not a subject", b"")),
                publisher.publish(Message("a", b"", headers=(("a", "b\n"),))),
                publisher.publish(Message("a", b"", "id\r")),
                publisher.publish(message(1)),
            )
            assert [type(o) for o in outcome] == [int, TooLarge, *[InvalidArgument] * 3, int]

            append = stream.append

            async def picky(messages: list[Message], *, expected_last: int | None = None) -> list[int]:
                if any(m.data == b"13" for m in messages):
                    raise TooLarge("server", size_bytes=13, size_bytes_max=12)
                return await append(messages, expected_last=expected_last)

            stream.append = picky  # type: ignore[method-assign, assignment]
            outcome = await settle(*[publisher.publish(message(i)) for i in range(2, 22)])
            assert [i for i, o in enumerate(outcome, 2) if isinstance(o, TooLarge)] == [13]
            assert await stored(whole) == [i for i in range(22) if i != 13]

    run(case())


def test_send_reports_at_flush_and_drain() -> None:
    """What nobody waits for raises at the next flush, once, and is given to `on_error` one by one."""

    async def case() -> None:
        failed: list[tuple[bytes, type[MistError]]] = []

        def on_error(m: Message, error: MistError) -> None:
            failed.append((m.data, type(error)))

        script = Script({"append": [Fault(before=StorageFull("full")), None, Fault(before=StorageFull("full"))]})
        broker, stream, whole = await faulty(script)
        async with broker:
            publisher = Publisher(stream, on_error=on_error)
            await publisher.send(message(0))
            await publisher.send(message(1))
            with pytest.raises(StorageFull) as caught:
                await publisher.flush()
            assert "2 message(s)" in caught.value.__notes__[0]
            await publisher.flush()
            await publisher.send(message(2))
            await publisher.flush()
            await publisher.send(message(3))
            with pytest.raises(StorageFull):
                await publisher.drain()
            await publisher.drain()
            with pytest.raises(Closed):
                await publisher.send(message(4))
            assert failed == [(b"0", StorageFull), (b"1", StorageFull), (b"3", StorageFull)]
            assert await stored(whole) == [2]

    run(case())


def test_linger_waits_for_company_but_not_for_a_full_batch_or_a_flush() -> None:
    """With `linger_s` a batch waits; a full batch, a flush and a drain end the wait."""

    async def case() -> None:
        broker, stream, _ = await faulty(lambda _: None)
        async with broker:
            publisher = Publisher(stream, linger_s=3600, batch_records_max=3)
            await publisher.send(message(0))
            await asyncio.sleep(0)
            await publisher.send(message(1))
            await publisher.flush()
            assert broker.appended == [2]
            await asyncio.gather(*[publisher.publish(message(i)) for i in range(2, 5)])
            assert broker.appended == [2, 3]
            await publisher.send(message(5))
            await publisher.drain()
            assert broker.appended == [2, 3, 1]
            quick = Publisher(stream, linger_s=0.001)
            await quick.publish(message(6))

    run(case())


def test_a_cancelled_publish_is_not_withdrawn_but_one_without_room_is() -> None:
    """Accepted is accepted; a caller still waiting for room takes its message back."""

    async def case() -> None:
        gate = asyncio.Event()
        broker, stream, whole = await faulty(lambda op: Fault(gate=gate) if op == "append" else None)
        async with broker, Publisher(stream, pending_max=2) as publisher:
            tasks = [asyncio.create_task(publisher.publish(message(i))) for i in range(4)]
            group = asyncio.create_task(publisher.publish_many([message(7), message(8)]))
            for _ in range(5):
                await asyncio.sleep(0)
            for task in (tasks[0], tasks[2], group):
                task.cancel()
            gate.set()
            outcome = await asyncio.gather(*tasks, group, return_exceptions=True)
            assert [type(o) for o in outcome] == [
                asyncio.CancelledError, int, asyncio.CancelledError, int, asyncio.CancelledError
            ]  # fmt: skip
            await publisher.flush()
            assert await stored(whole) == [0, 1, 3]

    run(case())


def test_the_error_of_a_cancelled_publish_comes_at_flush() -> None:
    """Nobody waits for it any more, so it is not lost but told at the next flush."""

    async def case() -> None:
        gate = asyncio.Event()
        full = Fault(gate=gate, before=StorageFull("full"))
        broker, stream, _ = await faulty(lambda op: full if op == "append" else None)
        async with broker:
            publisher = Publisher(stream)
            task = asyncio.create_task(publisher.publish(message(0)))
            late = asyncio.create_task(publisher.publish(message(1)))
            for _ in range(3):
                await asyncio.sleep(0)
            task.cancel()
            gate.set()
            while publisher.pending:
                await asyncio.sleep(0)
            late.cancel()  # its error is there already, the task has not seen it yet
            assert [type(o) for o in await asyncio.gather(task, late, return_exceptions=True)] == [
                asyncio.CancelledError
            ] * 2
            with pytest.raises(StorageFull) as caught:
                await publisher.flush()
            assert "2 message(s)" in caught.value.__notes__[0]

    run(case())


def test_draining_with_a_deadline_abandons_what_is_left() -> None:
    """In flight is Ambiguous, what was never sent is Closed, and the drain says how many."""

    async def case() -> None:
        never = asyncio.Event()
        broker, stream, _ = await faulty(lambda op: Fault(gate=never) if op == "append" else None)
        async with broker:
            publisher = Publisher(stream, batch_records_max=1, pending_max=2)
            tasks = [asyncio.create_task(publisher.publish(message(i))) for i in range(3)]
            for _ in range(3):
                await asyncio.sleep(0)
            with pytest.raises(TimedOut):
                await publisher.drain(timeout_s=0.01)
            outcome = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(o) for o in outcome] == [Ambiguous, Closed, Closed]
            assert publisher.pending == 0
            await publisher.abort()

    run(case())


def test_a_foreign_exception_of_an_adapter_reaches_every_waiter_as_internal() -> None:
    """A bug below must not leave anybody waiting."""

    async def case() -> None:
        broker, stream, _ = await faulty(lambda _: None)

        async def broken(messages: list[Message], *, expected_last: int | None = None) -> list[int]:
            raise ZeroDivisionError

        stream.append = broken  # type: ignore[method-assign, assignment]
        async with broker, Publisher(stream) as publisher:
            outcome = await settle(publisher.publish(message(0)), publisher.publish(message(1)))
            assert [type(o) for o in outcome] == [Internal, Internal]
            assert isinstance(outcome[0].__cause__, ZeroDivisionError)

    run(case())


def test_limits_must_be_positive() -> None:
    """A bound of nothing would wait for ever."""

    async def case() -> None:
        async with mist.connect("memory:") as broker:
            with pytest.raises(InvalidArgument):
                Publisher(await broker.open("s"), pending_max=0)

    run(case())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rate=st.floats(0.0, 0.6),
    batch=st.integers(1, 9),
    pending=st.integers(1, 12),
    plan=st.lists(st.sampled_from(["publish", "many", "send", "cancel"]), min_size=1, max_size=25),
)
def test_nothing_is_lost_doubled_or_reordered_under_random_faults(
    seed: int, rate: float, batch: int, pending: int, plan: list[str]
) -> None:
    """What was acknowledged is stored once at the sequence told, in the order of calls; what failed for sure is not
    there; what is Ambiguous is there at most once."""

    async def case() -> None:
        dice = Dice(seed, {"append": rate, "info": rate / 2})
        broker, stream, whole = await faulty(dice)
        async with broker:
            publisher = Publisher(stream, batch_records_max=batch, pending_max=pending, backoff=FAST, repeats_max=6)
            tasks: list[tuple[list[str], asyncio.Task[Any]]] = []
            number = 0

            def take(count: int) -> list[Message]:
                nonlocal number
                number += count
                return [message(n) for n in range(number - count, number)]

            for kind in plan:
                messages = take(3 if kind == "many" else 1)
                call: Coroutine[Any, Any, Any] = {
                    "publish": lambda m: publisher.publish(m[0]),
                    "cancel": lambda m: publisher.publish(m[0]),
                    "send": lambda m: publisher.send(m[0]),
                    "many": lambda m: publisher.publish_many(m),
                }[kind](messages)
                task = asyncio.create_task(call)
                tasks.append(([m.id for m in messages], task))
                await asyncio.sleep(0)
                if kind == "cancel":
                    task.cancel()
            outcome = await asyncio.gather(*[t for _, t in tasks], return_exceptions=True)
            drained: BaseException | None = None
            try:
                await publisher.drain()
            except MistError as exc:
                drained = exc
            assert publisher.pending == 0

            records = [r async for r in Cursor(whole).replay()]
            at = {r.id: r.sequence for r in records}
            assert len(at) == len(records), "an id was stored twice"
            order = [int(r.data) for r in records]
            assert order == sorted(order), "stored out of order"
            sent: list[str] = []
            for (ids, _), kind, result in zip(tasks, plan, outcome, strict=True):
                if isinstance(result, PartialAppend):
                    stored_count = len(result.sequences)
                    assert [at[i] for i in ids[:stored_count]] == result.sequences
                    assert not [i for i in ids[stored_count:] if i in at]
                elif isinstance(result, Ambiguous):
                    assert set(result.ids) <= set(ids)
                elif isinstance(result, MistError):
                    assert not [i for i in ids if i in at]
                elif isinstance(result, asyncio.CancelledError):
                    assert kind == "cancel"
                elif kind == "send":
                    sent.extend(ids)
                else:
                    assert [at[i] for i in ids] == ([result] if isinstance(result, int) else result)
            if drained is None:
                assert all(i in at for i in sent)

    run(case())
