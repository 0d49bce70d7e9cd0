"""Checkpoints: saved atomically, never going back, never crossing incarnations."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from msgspec.structs import replace

from mist.broker.base import Checkpoint, Stream
from mist.errors import CheckpointRegression, InvalidArgument, MistError, WrongIncarnation
from mist.testing.conformance.harness import Env, Harness, case, messages


def at(stream: Stream, sequence: int, name: str = "c") -> Checkpoint:
    return Checkpoint(stream=stream.name, name=name, incarnation=stream.incarnation, sequence=sequence)


class CheckpointStore(Harness):
    @case("checkpoints")
    async def test_save_load_list_delete(self, env: Env) -> None:
        """What was saved is loaded and listed, with its time; what was deleted is gone."""
        store = env.broker.checkpoints
        one, two = await env.stream("one"), await env.stream("two")
        assert await store.load(one.name, "c") is None
        assert await store.delete(one.name, "c") is False
        saved = await store.save(at(one, 5))
        assert saved == replace(at(one, 5), time_ns=saved.time_ns)
        assert abs(saved.time_ns - time.time_ns()) < 3600 * 10**9
        assert await store.load(one.name, "c") == saved
        assert await store.load(two.name, "c") is None
        assert await store.load(one.name, "C") is None
        b = await store.save(at(two, 1, "b"))
        a = await store.save(at(one, 2, "a"))
        assert await store.list(one.name) == [a, saved]
        assert await store.list(two.name) == [b]
        everything = await store.list()
        assert everything == sorted(everything, key=lambda c: (c.stream, c.name))
        assert [c for c in everything if c.stream in (one.name, two.name)] == [a, saved, b]
        assert await store.delete(one.name, "c") is True
        assert await store.delete(one.name, "c") is False
        assert await store.load(one.name, "c") is None
        assert await store.list(one.name) == [a]

    @case("checkpoints")
    async def test_checkpoints_move_forward(self, env: Env) -> None:
        """The same sequence again and a higher one are fine; a lower one is refused, unless forced."""
        store, stream = env.broker.checkpoints, await env.stream()
        for sequence in (0, 3, 3, 10, 2**40, 2**62):
            assert (await store.save(at(stream, sequence))).sequence == sequence
        with pytest.raises(CheckpointRegression):
            await store.save(at(stream, 2**62 - 1))
        found = await store.load(stream.name, "c")
        assert found is not None
        assert found.sequence == 2**62
        assert (await store.save(at(stream, 4), force=True)).sequence == 4
        assert (await store.save(at(stream, 5))).sequence == 5
        with pytest.raises(CheckpointRegression):
            await store.save(at(stream, 4))

    @case("checkpoints")
    async def test_another_incarnation_is_refused(self, env: Env) -> None:
        """A position of a stream that was made again is not comparable, whether higher or lower; force replaces it."""
        store, stream = env.broker.checkpoints, await env.stream()
        await store.save(at(stream, 5))
        for sequence in (1, 5, 9):
            with pytest.raises(WrongIncarnation):
                await store.save(replace(at(stream, sequence), incarnation="another"))
        found = await store.load(stream.name, "c")
        assert found is not None
        assert (found.incarnation, found.sequence) == (stream.incarnation, 5)
        forced = await store.save(replace(at(stream, 1), incarnation="another"), force=True)
        assert await store.load(stream.name, "c") == forced
        with pytest.raises(WrongIncarnation):
            await store.save(at(stream, 6))

    @case("checkpoints")
    async def test_concurrent_savers_end_at_the_maximum(self, env: Env) -> None:
        """Savers in any order leave the highest position, and each is told whether it was refused."""
        store, stream = env.broker.checkpoints, await env.stream()
        sequences = list(range(1, 61))
        random.Random(7).shuffle(sequences)

        async def save(sequence: int) -> bool:
            try:
                return (await store.save(at(stream, sequence))).sequence == sequence
            except CheckpointRegression:
                return False

        answers = await asyncio.gather(*(save(s) for s in sequences))
        assert answers[sequences.index(60)], "the highest position was refused"
        found = await store.load(stream.name, "c")
        assert found is not None
        assert found.sequence == 60
        assert len(await store.list(stream.name)) == 1

    @case("checkpoints")
    async def test_checkpoints_that_cannot_be_right(self, env: Env) -> None:
        """A bad name, a negative or enormous sequence, no incarnation: refused, and nothing is stored."""
        store, stream = env.broker.checkpoints, await env.stream()
        good = at(stream, 1)
        for wrong in (
            replace(good, sequence=-1),
            replace(good, sequence=2**63),
            replace(good, sequence=2**80),
            replace(good, incarnation=""),
            replace(good, incarnation="\ud800"),
            replace(good, name=""),
            replace(good, name="a b"),
            replace(good, name="\ud800"),
            replace(good, stream="a.b"),
        ):
            for force in (False, True):
                with pytest.raises(InvalidArgument):
                    await store.save(wrong, force=force)
        assert await store.list(stream.name) == []
        for odd in ("", "a b", "\ud800", "x" * 300, "\x00"):
            try:
                assert await store.load(stream.name, odd) is None
                assert await store.load(odd, "c") is None
                assert await store.delete(stream.name, odd) is False
            except InvalidArgument:
                continue

    @case("checkpoints", "append", "trim")
    async def test_a_checkpoint_outlives_its_records(self, env: Env) -> None:
        """Trimming does not touch positions; a position is a number, not a record."""
        store, stream = env.broker.checkpoints, await env.stream()
        s = await stream.append(messages(4))
        await store.save(at(stream, s[0]))
        await stream.trim(before=s[-1] + 1)
        found = await store.load(stream.name, "c")
        assert found is not None
        assert found.sequence == s[0]
        assert (await store.save(at(stream, s[2]))).sequence == s[2]

    @case("checkpoints", "persistent")
    async def test_checkpoints_survive_reopening(self, env: Env) -> None:
        """After closing and connecting again they are there, equal, and still do not go back."""
        stream = await env.stream()
        saved = [await env.broker.checkpoints.save(at(stream, n, f"c{n}")) for n in range(5)]
        await env.broker.checkpoints.delete(stream.name, "c3")
        await env.restart()
        store = env.broker.checkpoints
        assert await store.list(stream.name) == [c for c in saved if c.name != "c3"]
        with pytest.raises(CheckpointRegression):
            await store.save(at(stream, 3, "c4"))
        with pytest.raises(WrongIncarnation):
            await store.save(replace(at(stream, 9, "c4"), incarnation="another"))
        assert (await store.save(at(stream, 7, "c4"))).sequence == 7

    @case("checkpoints")
    async def test_a_cancelled_save_keeps_one_whole_position(self, env: Env) -> None:
        """A save cancelled at any moment leaves the old position or the new one, and the next save works."""
        store, stream = env.broker.checkpoints, await env.stream()
        await store.save(at(stream, 1))
        for n in range(2, 22):
            saving = asyncio.create_task(store.save(at(stream, n)))
            for _ in range(n % 4):
                await asyncio.sleep(0)
            saving.cancel()
            (ended,) = await asyncio.gather(saving, return_exceptions=True)
            assert isinstance(ended, Checkpoint | asyncio.CancelledError | MistError), ended
            found = await store.load(stream.name, "c")
            assert found is not None
            assert 1 <= found.sequence <= n
        assert (await store.save(at(stream, 100))).sequence == 100
