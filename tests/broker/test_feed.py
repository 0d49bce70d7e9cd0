"""A feed stores every message once and in order, whatever becomes of its appends and of itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from conftest import run

import mist
from mist.broker.backoff import Backoff
from mist.broker.base import Message, Record, Stream, StreamConfig, check_messages
from mist.broker.feed import REFUSED, REPEATED, Feed, Place, Places
from mist.broker.patience import Patience, Steady
from mist.errors import (
    Ambiguous,
    Conflict,
    InvalidArgument,
    MistError,
    NotFound,
    PartialAppend,
    StorageFull,
    TimedOut,
    Unavailable,
    WrongSequence,
)

NOW = Backoff(first_s=0.0, most_s=0.0)
NO_IDS = StreamConfig(dedupe_window_s=0, dedupe_ids_max=0)


class Unreliable(Steady):
    """A stream whose appends end in every way the contract allows. Some arrive late: after their answer was given up."""

    def __init__(self, stream: Stream, rng: random.Random, *, trouble: float = 0.5) -> None:
        super().__init__(stream, Patience(backoff=NOW))
        self.rng = rng
        self.trouble = trouble
        self.late: list[tuple[Sequence[Message], int | None]] = []

    async def arrive(self) -> None:
        """What was on its way gets there, or is refused there."""
        for messages, expected in self.late:
            try:
                await self.stream.append(messages, expected_last=expected)
            except WrongSequence:
                continue
        self.late.clear()

    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        rng = self.rng
        if self.late and rng.random() < 0.5:
            await self.arrive()
        how = rng.choice(("lost", "stored", "late", "away", "partial")) if rng.random() < self.trouble else "well"
        if how in ("well", "stored"):
            answer = await self.stream.append(messages, expected_last=expected_last)
            if how == "well":
                return answer
            raise rng.choice((Ambiguous, TimedOut))("no answer")
        if how == "away":
            raise Unavailable("not now")
        if how == "partial" and len(messages) > 1:
            stored = await self.stream.append(messages[: len(messages) // 2], expected_last=expected_last)
            raise PartialAppend(stored, total=len(messages)) from rng.choice((Unavailable, Ambiguous))("cut")
        if how == "late":
            self.late.append((list(messages), expected_last))
        raise Ambiguous("no answer")

    async def read(self, **kw: Any) -> Any:
        if self.late and self.rng.random() < 0.5:
            await self.arrive()
        if self.rng.random() < self.trouble / 3:
            raise Unavailable("not now")
        return await self.stream.read(**kw)


def patience() -> Patience:
    return Patience(backoff=NOW)


async def content(stream: Stream) -> list[Record]:
    out: list[Record] = []
    after = 0
    while True:
        page = await stream.read(after=after, limit=1000)
        out += page.records
        after = page.scanned
        if after >= page.last:
            return out


def source(rng: random.Random, count: int, ids: str) -> list[Message]:
    """Messages with ids, without, or mixed; those without are often the same as their neighbours."""
    out = []
    for n in range(count):
        named = ids == "all" or (ids == "some" and rng.random() < 0.5)
        out.append(Message("a.b", b"%d" % (n if named else n // 4), f"i{n}" if named else ""))
    return out


@pytest.mark.parametrize("ids", ["all", "some", "none"])
@pytest.mark.parametrize("window", [True, False])
def test_everything_is_stored_once_and_in_order(ids: str, window: bool) -> None:
    """Through lost answers, late arrivals and former lives that were killed between storing and saving."""

    async def life(seed: int) -> None:
        rng = random.Random(seed)
        messages = source(rng, 120, ids)
        async with mist.connect("memory:") as broker:
            target = await broker.open("t", config=None if window else NO_IDS)
            await target.append([Message("other", b"%d" % n) for n in range(rng.randint(0, 3))])
            before = len(await content(target))
            places = Places(broker.checkpoints, "t")
            unreliable = Unreliable(target, rng)
            lives = 0
            while True:
                lives += 1
                place = await places.load("f")
                feed = Feed(unreliable, patience())
                at = place.sequence if place is not None else 0
                await feed.begin(place or Place("src", 0, before, target.incarnation))
                kill = rng.randint(1, 40) if lives < 8 else 1 << 30
                while at < len(messages):
                    step = rng.randint(1, 12)
                    putting = asyncio.ensure_future(feed.put(messages[at : at + step]))
                    while not putting.done() and kill:
                        kill -= 1
                        await asyncio.sleep(0)
                    if not kill:
                        putting.cancel()
                        await asyncio.gather(putting, return_exceptions=True)
                        break
                    await putting
                    at = min(at + step, len(messages))
                    if rng.random() < 0.4:
                        await places.save("f", Place("src", at, feed.at, target.incarnation))
                else:
                    break
            await unreliable.arrive()
            stored = (await content(target))[before:]
            assert [(r.data, r.id) for r in stored] == [(m.data, m.id) for m in messages], f"seed {seed}"

    for seed in range(40):
        run(life(seed))


def test_what_does_not_fit_is_passed_over_alone() -> None:
    """Too large or not a subject, seen here or refused there: its neighbours are stored, it is told."""

    class Choosy(Steady):
        async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
            check_messages(messages, 10)
            if any(m.subject == "not.there" for m in messages):
                raise InvalidArgument("no such subject in this stream")
            return await self.stream.append(messages, expected_last=expected_last)

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = Choosy(await broker.open("t"), patience())
            told: list[tuple[bytes, str]] = []
            feed = Feed(stream, patience(), on_refused=lambda m, e: told.append((m.data, e.code)))
            answer = await feed.put(
                [
                    Message("a", b"1"),
                    Message("a", b"x" * 11),
                    Message("not.there", b"2"),
                    Message("a b", b"3"),
                    Message("a", b"4", "id\nid"),
                    Message("a", b"5"),
                ]
            )
            assert answer == [1, REFUSED, REFUSED, REFUSED, REFUSED, 2]
            assert sorted(told) == [
                (b"2", "validation"), (b"3", "validation"), (b"4", "validation"), (b"x" * 11, "too_large"),
            ]  # fmt: skip
            assert await feed.put([Message("a", b"6", "i"), Message("a", b"7", "i")]) == [3, REPEATED]

    run(body())


def test_a_busy_stream_and_no_ids_end_in_a_conflict() -> None:
    """Where others write before every try, a conditional append can never win: that is said, not tried for ever."""

    class Busy(Steady):
        async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
            await self.stream.append([Message("other", b"")])
            return await self.stream.append(messages, expected_last=expected_last)

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = Busy(await broker.open("t"), patience())
            with pytest.raises(Conflict, match="others write"):
                await Feed(stream, patience()).put([Message("a", b"1")])
            assert await Feed(stream, patience()).put([Message("a", b"1", "id")]) == [103]

    run(body())


@pytest.mark.parametrize("error", [StorageFull("full"), NotFound("gone"), Conflict("no")])
def test_what_waiting_does_not_mend_is_raised(error: MistError) -> None:
    """A full store, a stream that is gone: at once."""

    class Broken(Steady):
        async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
            raise error

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            with pytest.raises(type(error)):
                await Feed(Broken(await broker.open("t"), patience()), patience()).put([Message("a", b"1")])

    run(body())


def test_places_keep_both_ends_in_one_row() -> None:
    """What was saved is loaded, whatever the incarnations look like; a plain checkpoint is a place as well."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            await broker.open("t")
            places = Places(broker.checkpoints, "t")
            assert await places.load("p") is None
            for place in (Place("a:b+c", 2**60, 17, "x:1:y"), Place("a", 3, 0, "b")):
                await places.save("p", place)
                assert await places.load("p") == place
            await places.forget("p")
            assert await places.load("p") is None

    run(body())


def test_patience_tells_when_somebody_is_away_and_back() -> None:
    """One hiccup is nobody's business; a second failure in a row is said once, and so is the return."""
    said: list[str] = []

    async def body() -> None:
        waits = Patience(
            on_away=lambda e, s: said.append(f"away {e.message}"), on_back=lambda s: said.append("back"), backoff=NOW
        )
        for failures in (1, 4):
            left = [failures]

            async def call(left: list[int] = left) -> int:
                left[0] -= 1
                if left[0] >= 0:
                    raise Unavailable("x")
                return 7

            assert await waits(call) == 7
        assert waits.error is None

    run(body())
    assert said == ["away x", "back"]
