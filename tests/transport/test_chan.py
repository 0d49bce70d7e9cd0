"""`chan:` beyond the suite: names, the failing variant, threads."""

from __future__ import annotations

import asyncio
import threading

import pytest
from conftest import run

from mist.errors import Closed, Conflict, EndOfStream, InvalidArgument, Overloaded
from mist.testing.transports import envelope
from mist.transport import Transport, dial, pair
from mist.transport.chan import _names


def test_name_gives_two_ends() -> None:
    """The first and second dial are the two ends, both ways; a third is refused; closing both frees the name."""

    async def case() -> None:
        a, b = await dial("chan:x"), await dial("chan://x")
        await a.send(envelope(1))
        await b.send(envelope(2))
        assert (await b.receive()).data() == {"n": 1}
        assert (await a.receive()).data() == {"n": 2}
        with pytest.raises(Conflict, match="both ends are taken"):
            await dial("chan:x")
        await a.close()
        with pytest.raises(Conflict):
            await dial("chan:x")
        await b.close()
        async with dial("chan:x") as again:
            assert await again.receive_many(1, wait_s=0) == []

    run(case())
    assert not _names


def test_empty_name_is_a_private_loop_back() -> None:
    """`chan://` gives an end that receives what it sends, each dial its own."""

    async def case() -> None:
        async with dial("chan://") as one, dial("chan:") as other:
            await one.send(envelope(1))
            assert await other.receive_many(1, wait_s=0) == []
            assert (await one.receive()).data() == {"n": 1}
            waiting = asyncio.create_task(one.receive())
            await asyncio.sleep(0)
            await one.close()
            with pytest.raises(Closed):
                await waiting

    run(case())


def test_closed_before_the_other_end_is_dialled() -> None:
    """What an end sent before it closed is there for the other end, dialled later."""

    async def case() -> None:
        async with dial("chan:late") as a:
            await a.send_many([envelope(i) for i in range(3)])
        async with dial("chan:late") as b:
            assert [e.data()["n"] async for e in b] == [0, 1, 2]
            with pytest.raises(EndOfStream):
                await b.send(envelope())

    run(case())
    assert not _names


def test_full_fails_when_asked_to() -> None:
    """`full=fail` raises Overloaded at once, sends nothing of a batch that does not fit, and works again with room."""

    async def case() -> None:
        async with dial("chan:f?size=3&full=fail") as a, dial("chan:f?size=3") as b:
            await a.send_many([envelope(0), envelope(1)])
            with pytest.raises(Overloaded) as caught:
                await a.send_many([envelope(8), envelope(9)])
            assert caught.value.retryable
            await a.send(envelope(2))
            with pytest.raises(Overloaded):
                await a.send(envelope(9))
            assert [e.data()["n"] for e in await b.receive_many()] == [0, 1, 2]
            await a.send(envelope(3))

    run(case())


def test_close_wakes_a_waiting_sender() -> None:
    """A sender that waits for room gets EndOfStream when the other end closes, Closed when its own does."""

    async def case(closes: int, error: type[Exception]) -> None:
        ends = pair(1)
        await ends[0].send(envelope())
        waiting = asyncio.create_task(ends[0].send(envelope()))
        await asyncio.sleep(0)
        await ends[closes].close()
        with pytest.raises(error):
            await waiting
        for end in ends:
            await end.close()

    run(case(1, EndOfStream))
    run(case(0, Closed))


def test_one_free_place_is_enough() -> None:
    """A waiting sender goes on as soon as one place is free, without the queue being half empty."""

    async def case() -> None:
        a, b = pair(100)
        async with a, b:
            await a.send_many([envelope(i) for i in range(100)])
            waiting = asyncio.create_task(a.send(envelope(100)))
            await asyncio.sleep(0)
            await b.receive()
            await asyncio.wait_for(waiting, 5)

    run(case())


def test_cancelled_waits_pass_the_turn_on() -> None:
    """Of several waiting receives, cancelled ones never swallow the wake-up of another."""

    async def case() -> None:
        a, b = pair(4)
        async with a, b:
            for round in range(40):
                waiting = [asyncio.create_task(b.receive()) for _ in range(4)]
                await asyncio.sleep(0)
                await a.send(envelope(round))
                waiting[round % 4].cancel()
                if round % 2:
                    await asyncio.sleep(0)
                waiting[(round + 1) % 4].cancel()
                done, rest = await asyncio.wait(waiting, return_when=asyncio.ALL_COMPLETED, timeout=0.01)
                got = [t.result().data()["n"] for t in done if not t.cancelled()]
                for task in rest:
                    task.cancel()
                await asyncio.wait(waiting)
                if not got:
                    got = [(await b.receive()).data()["n"]]
                assert got == [round]

    run(case())


def test_ends_in_two_threads() -> None:
    """The ends may live in different event loops: everything crosses, in order, under back-pressure, to the end."""
    total = 5000
    a, b = pair(16)
    got: list[int] = []

    def consume() -> None:
        async def case() -> None:
            async with b:
                got.extend([e.data()["n"] async for e in b])

        asyncio.run(case())

    async def produce(t: Transport) -> None:
        async with t:
            for i in range(0, total, 10):
                if i % 20:
                    await t.send_many([envelope(i + k) for k in range(10)])
                else:
                    for k in range(10):
                        await t.send(envelope(i + k))

    thread = threading.Thread(target=consume)
    thread.start()
    run(produce(a))
    thread.join(30)
    assert not thread.is_alive()
    assert got == list(range(total))


def test_refusals() -> None:
    """Sizes and modes that cannot be, different sizes for one name, unknown parameters."""

    async def case() -> None:
        for url in ("chan:a?size=0", "chan:a?size=x", "chan:a?full=drop", "chan:a?sizes=3"):
            with pytest.raises(InvalidArgument):
                await dial(url)
        async with dial("chan:a?size=3"):
            with pytest.raises(Conflict, match="size=3"):
                await dial("chan:a?size=4")

    run(case())
    assert not _names
