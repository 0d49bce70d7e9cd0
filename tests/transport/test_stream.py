"""Broker URLs as transports, beyond the suite: positions, filters, acknowledgement, damage."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import run

from mist import ConsumerConfig, Message, StreamConfig, connect
from mist.errors import CursorAhead, DataLoss, EndOfStream, InvalidArgument, MissingField, SequenceExpired
from mist.protocol import codec
from mist.testing.transports import envelope
from mist.transport import dial
from mist.transport.stream import StreamTransport


async def fill(url: str, count: int, type: str = "test.case", start: int = 0) -> None:
    async with dial(url) as t:
        await t.send_many([envelope(i, type=type) for i in range(start, start + count)])


async def numbers(url: str, **options: Any) -> list[int]:
    async with dial(url, **options) as t:
        return [e.data()["n"] async for e in t]


@pytest.mark.parametrize(
    ("start", "wanted"),
    [
        ("start", [0, 1, 2, 3, 4]),
        ("3", [2, 3, 4]),
        ("+3", [3, 4]),
        ("%2B3", [3, 4]),
        ("-2", [3, 4]),
        ("-99", [0, 1, 2, 3, 4]),
        ("end", []),
    ],
)
def test_from(request: pytest.FixtureRequest, start: str, wanted: list[int]) -> None:
    """`from=` takes start, end, N, +N and -N."""
    base = f"memory:{request.node.name.encode().hex()[:60]}?stream=s"

    async def case() -> None:
        await fill(base, 5)
        assert await numbers(f"{base}&follow=0&from={start}") == wanted

    run(case())


def test_start_of_a_trimmed_stream() -> None:
    """`from=start` begins at the first kept record; a range that expires underneath raises once, then goes on."""

    async def case() -> None:
        async with connect("memory:trimmed") as broker:
            stream = await broker.open("s")
            await fill("memory:trimmed?stream=s", 5)
            await stream.trim(before=3)
            assert await numbers("memory:trimmed?stream=s&follow=0") == [2, 3, 4]
            async with dial("memory:trimmed?stream=s&follow=0&from=%2B3") as t:
                await fill("memory:trimmed?stream=s", 5, start=5)
                await stream.trim(before=8)
                with pytest.raises(SequenceExpired):
                    await t.receive()
                assert [e.data()["n"] async for e in t] == [7, 8, 9]
            with pytest.raises(CursorAhead):
                await dial("memory:trimmed?stream=s&from=%2B99")

    run(case())


def test_filter_and_position() -> None:
    """`subject=` filters, several of them too; the position is the record's sequence and resumes behind it."""
    base = "memory:filtered?stream=s"

    async def case() -> None:
        for i in range(10):
            await fill(base, 1, type="a.x" if i % 2 else "b.y", start=i)
        assert await numbers(f"{base}&follow=0&subject=a.*") == [1, 3, 5, 7, 9]
        assert len(await numbers(f"{base}&follow=0&subject=a.x&subject=b.>")) == 10
        async with dial(f"{base}&follow=0&subject=a.>") as t:
            await t.receive_many(2)
            assert t.position == 4  # type: ignore[attr-defined]
        assert await numbers(f"{base}&follow=0&from=%2B4&subject=a.>") == [5, 7, 9]

    run(case())


def test_sent_twice_is_stored_once() -> None:
    """The envelope's id is the message's: a repeated send adds nothing."""

    async def case() -> None:
        one = envelope(1)
        async with dial("memory:twice?stream=s") as t:
            await t.send(one)
            await t.send_many([one, envelope(2)])
        assert await numbers("memory:twice?stream=s&follow=0") == [1, 2]

    run(case())


def test_record_that_is_no_envelope() -> None:
    """It raises, naming stream and sequence; the next receive goes on; a consumer makes it a dead letter."""

    async def case() -> None:
        async with connect("memory:foreign") as broker:
            stream = await broker.open("s")
            await stream.append([Message("x", b'{"version":"1","id":"i","source":"","type":"t"}')])
            await fill("memory:foreign?stream=s", 1)
            async with dial("memory:foreign?stream=s&follow=0") as t:
                with pytest.raises(MissingField, match="stream s: record 1") as caught:
                    await t.receive()
                assert caught.value.meta["sequence"] == "1"
                assert t.position == 1  # type: ignore[attr-defined]
                assert (await t.receive()).data() == {"n": 0}
            async with dial("memory:foreign?stream=s&follow=0&consumer=c") as t:
                with pytest.raises(MissingField):
                    await t.receive()
                assert (await t.receive()).data() == {"n": 0}
            dead = await (await broker.open("s--dead", create=False)).read()
            assert len(dead.records) == 1
            assert dict(dead.records[0].headers)["Mist-Reason"].startswith("missing_field")

    run(case())


def test_msgpack_records() -> None:
    """A record marked as msgpack is the same envelope."""

    async def case() -> None:
        one = envelope(7, checksum=True)
        async with connect("memory:pack") as broker:
            stream = await broker.open("s")
            headers = (("Content-Type", codec.MSGPACK),)
            await stream.append([Message("x", codec.encode_msgpack(one), headers=headers)])
            async with dial("memory:pack?stream=s") as t:
                assert await t.receive() == one

    run(case())


def test_damage_raises_once() -> None:
    """A damaged range is an error for one call, then the records behind it come."""

    async def case() -> None:
        async with connect("memory:") as broker:
            stream = await broker.open("s")
            await stream.append([Message("t", codec.encode(envelope(i))) for i in range(1, 9)])
            read = stream.read

            async def damaged(*, after: int = 0, limit: int = 256, **rest: Any) -> Any:
                if 2 <= after < 5:
                    raise DataLoss(first=3, last=5, resume_after=5)
                return await read(after=after, limit=min(limit, 2 - after) if after < 2 else limit, **rest)

            stream.read = damaged  # type: ignore[method-assign, assignment]
            async with StreamTransport(stream, follow=False) as t:
                assert [e.data()["n"] for e in await t.receive_many()] == [1, 2]
                with pytest.raises(DataLoss):
                    await t.receive_many()
                assert [e.data()["n"] for e in await t.receive_many()] == [6, 7, 8]

    run(case())


# consumers


async def pending(url: str) -> tuple[int, int]:
    async with connect(url) as broker:
        info = await (await (await broker.open("s")).consumer("c")).info()
        return info.floor, info.pending


def test_acknowledged_by_the_next_receive() -> None:
    """Receiving again acknowledges what was received before, leaving `async with` cleanly the rest."""
    base = "memory:acked"

    async def case() -> None:
        await fill(f"{base}?stream=s", 10)
        async with dial(f"{base}?stream=s&consumer=c") as t:
            await t.receive_many(3)
            assert (await pending(base))[0] == 0
            await t.receive()
            assert (await pending(base))[0] == 3
            assert await t.ack() == 1
            assert (await pending(base))[0] == 4
            await t.receive()
        assert (await pending(base))[0] == 5
        assert await numbers(f"{base}?stream=s&consumer=c&follow=0") == [5, 6, 7, 8, 9]
        assert await pending(base) == (10, 0)

    run(case())


def test_not_acknowledged_comes_again() -> None:
    """What was received when an error left `async with`, or a plain close, is delivered again; what was only fetched
    ahead goes back at once."""
    base = "memory:again"
    config = ConsumerConfig(ack_wait_s=0.05)

    async def case() -> None:
        await fill(f"{base}?stream=s", 4)

        async def failing() -> None:
            async with dial(f"{base}?stream=s&consumer=c", config=config) as t:
                await t.receive()
                raise RuntimeError("the program failed")

        with pytest.raises(RuntimeError):
            await failing()
        t = await dial(f"{base}?stream=s&consumer=c")
        assert [e.data()["n"] for e in await t.receive_many(3)] == [1, 2, 3]
        await t.close()
        async with dial(f"{base}?stream=s&consumer=c&follow=0") as t:
            assert sorted([e.data()["n"] async for e in t]) == [0, 1, 2, 3]

    run(case())


def test_manual_ack() -> None:
    """`ack=manual` acknowledges only when told to."""
    base = "memory:manual"

    async def case() -> None:
        await fill(f"{base}?stream=s", 4)
        async with dial(f"{base}?stream=s&consumer=c&ack=manual") as t:
            await t.receive_many(1)
            await t.receive_many(1)
            assert (await pending(base))[0] == 0
            assert await t.ack() == 2
            await t.receive()
        assert (await pending(base))[0] == 2

    run(case())


def test_slow_worker_keeps_what_it_fetched() -> None:
    """A worker slower than ack_wait_s renews what waits in it: nothing goes to another one meanwhile."""
    base = "memory:slow"

    async def case() -> None:
        await fill(f"{base}?stream=s", 6)
        config = ConsumerConfig(ack_wait_s=0.3)
        async with (
            dial(f"{base}?stream=s&consumer=c", config=config) as slow,
            dial(f"{base}?stream=s&consumer=c") as other,
        ):
            got = []
            for _ in range(6):
                got.append((await slow.receive()).data()["n"])
                assert await other.receive_many(1, wait_s=0) == []
                await asyncio.sleep(0.12)
        assert got == [0, 1, 2, 3, 4, 5]

    run(case())


def test_two_workers_share() -> None:
    """Two transports of one consumer get each record once between them; the end comes when all is settled."""
    base = "memory:shared?stream=s"

    async def case() -> None:
        await fill(base, 300)
        url = f"{base}&consumer=c&follow=0&prefetch=7"
        got = await asyncio.gather(numbers(url), numbers(url))
        assert sorted(got[0] + got[1]) == list(range(300))
        assert got[0]
        assert got[1]

    run(case())


def test_existing_consumer_goes_on() -> None:
    """A consumer that exists goes on where it stands, with its own settings; another filter is refused."""
    base = "memory:exists?stream=s"

    async def case() -> None:
        await fill(base, 4)
        async with dial(f"{base}&consumer=c&from=3&subject=test.>") as t:
            assert (await t.receive()).data() == {"n": 2}
        assert await numbers(f"{base}&consumer=c&from=start&follow=0") == [3]
        with pytest.raises(InvalidArgument, match="exists with the subjects"):
            await dial(f"{base}&consumer=c&subject=other")

    run(case())


def test_refusals() -> None:
    """No stream, unknown values and unknown parameters are refused, and nothing is left open."""

    async def case() -> None:
        for url in (
            "memory:", "memory:?stream=a%20b", "memory:?stream=s&follow=x", "memory:?stream=s&ack=never",
            "memory:?stream=s&from=soon", "memory:?stream=s&prefetch=0", "memory:?stream=s&streams=t", "nowhere:x?stream=s",
        ):  # fmt: skip
            with pytest.raises(InvalidArgument):
                await dial(url)

    run(case())


def test_transport_over_an_open_stream() -> None:
    """StreamTransport works over a stream the program has open, and does not close its broker."""

    async def case() -> None:
        async with connect("memory:") as broker:
            stream = await broker.open("s", config=StreamConfig(records_max=100))
            async with StreamTransport(stream, follow=False) as t:
                await t.send(envelope(1))
                assert (await t.receive()).data() == {"n": 1}
                with pytest.raises(EndOfStream):
                    await t.receive()
                assert await t.ack() == 0
            assert (await stream.info()).last == 1

    run(case())
