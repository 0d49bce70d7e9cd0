"""The memory broker keeps every promise of the contract, and a few that need a clock under control."""

from __future__ import annotations

import secrets

import pytest
from conftest import run

import mist
from mist.broker.base import ConsumerConfig, Message, StreamConfig
from mist.errors import InvalidArgument
from mist.testing.clock import FakeClock
from mist.testing.conformance import BrokerConformance


class TestMemory(BrokerConformance):
    @pytest.fixture(autouse=True)
    def _store(self) -> None:
        self.url = f"memory:conformance-{secrets.token_hex(4)}"


def test_a_store_without_a_name_is_private() -> None:
    """`memory:` is a new store per connect, `memory:NAME` the same one in this process."""

    async def main() -> None:
        name = f"memory:{secrets.token_hex(4)}"
        for url, expected in (("memory:", []), (name, ["s"])):
            async with mist.connect(url) as one, mist.connect(url) as two:
                await one.open("s")
                assert await two.streams() == expected
        async with mist.connect(name) as later:
            assert await later.streams() == ["s"]

    run(main())


def test_record_time_never_goes_back() -> None:
    """The wall clock may be set back; record times stay, also behind records that were trimmed away."""
    clock = FakeClock()

    async def main() -> None:
        async with mist.connect("memory:", clock=clock) as broker:
            stream = await broker.open("s")
            await stream.append([Message("a", b"")])
            first = (await stream.read()).records[0].timestamp_ns
            clock.jump_wall(-3600)
            await stream.append([Message("a", b"")])
            assert (await stream.read(after=1)).records[0].timestamp_ns == first
            await stream.trim(before=3)
            await stream.append([Message("a", b"")])
            assert (await stream.read(after=2)).records[0].timestamp_ns == first
            clock.jump_wall(7200)
            await stream.append([Message("a", b"")])
            assert (await stream.read(after=3)).records[0].timestamp_ns == first + 3600 * 10**9

    run(main())


def test_windows_and_bounds_follow_the_clock() -> None:
    """Dedupe window, age and ack wait end when their time has passed, not before, and not by the wall clock's jumps."""
    clock = FakeClock()

    async def main() -> None:
        async with mist.connect("memory:", clock=clock) as broker:
            stream = await broker.open("s", config=StreamConfig(age_s_max=100, dedupe_window_s=10))
            one = Message("a", b"1", "id")
            assert await stream.append([one]) == [1]
            clock.advance(9.9)
            assert await stream.append([one]) == [1]
            clock.advance(0.2)
            assert await stream.append([one]) == [2]
            consumer = await stream.consumer("c", ConsumerConfig(ack_wait_s=30))
            assert [d.attempt for d in await consumer.fetch()] == [1, 1]
            clock.jump_wall(10**6 * -1)
            clock.advance(29.9)
            assert await consumer.fetch() == []
            clock.advance(0.2)
            assert [d.attempt for d in await consumer.fetch()] == [2, 2]
            clock.jump_wall(10**6)
            clock.advance(60)
            assert (await stream.info()).first == 2
            clock.advance(60)
            assert (await stream.info()).records == 0
            assert (await consumer.info()).pending == 0

    run(main())


def test_without_a_window_nothing_is_a_duplicate() -> None:
    """A window of 0 s or 0 ids: no de-duplication between appends."""

    async def main() -> None:
        async with mist.connect("memory:") as broker:
            for n, config in enumerate((StreamConfig(dedupe_window_s=0), StreamConfig(dedupe_ids_max=0))):
                stream = await broker.open(f"s{n}", config=config)
                assert await stream.append([Message("a", b"", "x")]) == [1]
                assert await stream.append([Message("a", b"", "x")]) == [2]

    run(main())


def test_what_expired_takes_no_room() -> None:
    """Under full="refuse", records beyond their age do not make the stream full."""
    clock = FakeClock()

    async def main() -> None:
        async with mist.connect("memory:", clock=clock) as broker:
            stream = await broker.open("s", config=StreamConfig(records_max=2, full="refuse", age_s_max=10))
            await stream.append([Message("a", b""), Message("a", b"")])
            clock.advance(11)
            assert await stream.append([Message("a", b""), Message("a", b"")]) == [3, 4]

    run(main())


def test_the_clock_only_moves_forward() -> None:
    """Monotonic time has no way back."""
    with pytest.raises(ValueError, match="forward"):
        FakeClock().advance(-1)


def test_one_text_is_no_filter_list() -> None:
    """subjects="abc" would mean the filters a, b and c to Python."""

    async def main() -> None:
        async with mist.connect("memory:") as broker:
            with pytest.raises(InvalidArgument, match="one text"):
                await (await broker.open("s")).read(subjects="abc")

    run(main())
