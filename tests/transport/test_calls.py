"""Requests that share a call of the sink: who is told what, also when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from conftest import run

from mist.errors import Closed, InvalidArgument, MistError, StorageFull, Unavailable
from mist.protocol.envelope import Envelope
from mist.testing.transports import envelope
from mist.transport._calls import ALONE, SHARED_MAX, Calls, Stored


class Sink:
    """Gives sequences; refuses what `bad` names; fails as `error` says."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.error: Exception | None = None
        self.bad: set[int] = set()
        self.go = asyncio.Event()
        self.go.set()

    async def __call__(self, envelopes: list[Envelope]) -> Sequence[int]:
        numbers = [e.data()["n"] for e in envelopes]
        self.calls.append(numbers)
        await self.go.wait()
        if self.error is not None:
            raise self.error
        if self.bad & set(numbers):
            raise InvalidArgument(f"not {self.bad & set(numbers)}")
        return numbers


class Told:
    def __init__(self) -> None:
        self.of: dict[int, Stored | Exception] = {}

    def put(self, calls: Calls, *numbers: int) -> None:
        def done(stored: Stored, error: Exception | None) -> None:
            assert numbers[0] not in self.of
            self.of[numbers[0]] = error if error is not None else stored

        calls.put([envelope(n) for n in numbers], done)

    async def all(self, count: int) -> None:
        while len(self.of) < count:
            await asyncio.sleep(0)


def test_one_moment_is_one_call() -> None:
    """What is put in one turn, or while a call is under way, shares the next; sequences go to whom they belong."""

    async def case() -> None:
        sink, told = Sink(), Told()
        calls = Calls(sink, True)
        sink.go.clear()
        told.put(calls, 1)
        told.put(calls, 2, 3)
        await asyncio.sleep(0.01)
        for n in range(4, 9):
            told.put(calls, n)
            await asyncio.sleep(0)
        assert sink.calls == [[1, 2, 3]]
        sink.go.set()
        await told.all(7)
        assert sink.calls == [[1, 2, 3], [4, 5, 6, 7, 8]]
        assert told.of[2] == [2, 3]
        assert told.of[8] == [8]

    run(case())


def test_bounds() -> None:
    """A large request goes alone, beside the shared call; a shared call holds so many envelopes at most; not shared at all
    is one call each."""

    async def case() -> None:
        sink, told = Sink(), Told()
        calls = Calls(sink, True)
        sink.go.clear()
        told.put(calls, 1)
        await asyncio.sleep(0)
        told.put(calls, *range(1000, 1000 + ALONE))
        await asyncio.sleep(0)
        assert [len(c) for c in sink.calls] == [1, ALONE]
        count = SHARED_MAX // (ALONE - 1) + 2
        for n in range(count):
            told.put(calls, *[10_000 + n * ALONE + i for i in range(ALONE - 1)])
        sink.go.set()
        await told.all(count + 2)
        assert max(len(c) for c in sink.calls) <= SHARED_MAX
        sink.calls.clear()
        single = Calls(sink, False)
        for n in range(3):
            told.put(single, -n - 1)
        await told.all(count + 5)
        assert sink.calls == [[-1], [-2], [-3]]

    run(case())


def test_ones_fault_is_not_the_others() -> None:
    """A call that one envelope spoils is repeated request by request."""

    async def case() -> None:
        sink, told = Sink(), Told()
        sink.bad = {2}
        calls = Calls(sink, True)
        for n in range(4):
            told.put(calls, n)
        await told.all(4)
        assert isinstance(told.of[2], InvalidArgument)
        assert [told.of[n] for n in (0, 1, 3)] == [[0], [1], [3]]

    run(case())


@pytest.mark.parametrize("error", [StorageFull("full"), Closed("closed"), Unavailable("away")])
def test_everybodys_error_is_told_at_once(error: MistError) -> None:
    """A full or absent store is not asked again for each request."""

    async def case() -> None:
        sink, told = Sink(), Told()
        sink.error = error
        calls = Calls(sink, True)
        for n in range(4):
            told.put(calls, n)
        await told.all(4)
        assert list(told.of.values()) == [error] * 4
        assert len(sink.calls) == 1
        sink.error = None
        told.put(calls, 9)
        await told.all(5)
        assert told.of[9] == [9]

    run(case())


def test_cancelled_calls_are_told() -> None:
    """When the loop ends in the middle of a call, its requests hear of it."""
    told = Told()

    async def case() -> None:
        sink = Sink()
        sink.go.clear()
        calls = Calls(sink, True)
        told.put(calls, 1)
        told.put(calls, 2)
        told.put(calls, *range(100, 300))
        await asyncio.sleep(0.01)
        assert len(sink.calls) == 2

    run(case())
    assert [type(e) for e in told.of.values()] == [Closed] * 3
