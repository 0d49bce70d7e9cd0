"""The ingest: effectively once, whatever dies between two instructions, and nothing stops it but a new stream."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from conftest import run

import mist
from mist.broker.base import Broker, Checkpoint, Message, Stream
from mist.errors import SequenceExpired, Unavailable, WrongIncarnation
from mist.tools.tokentrace import ingest as module
from mist.tools.tokentrace.ingest import CHECKPOINT, Options, ingest
from mist.tools.tokentrace.store import Batch, Store

from .spanning import message


class Killed(BaseException):
    """The process is gone at this instruction."""


async def spans(stream: Stream, first: int, count: int) -> int:
    return (await stream.append([message(n) for n in range(first, first + count)]))[-1]


def test_everything_up_to_the_end_is_stored_and_mirrored(tmp_path: Path) -> None:
    """Spans once each; the broker's checkpoint shows the store's position."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            last = await spans(stream, 1, 250)
            with Store.open(tmp_path / "t.db") as store:
                progress = await ingest(broker, stream, store, until=last, options=Options(page_records=100))
                assert store.count() == 250
            assert (progress.spans, progress.position, progress.started_after) == (250, 250, 0)
            saved = await broker.checkpoints.load("trace", CHECKPOINT)
            assert saved is not None
            assert (saved.sequence, saved.incarnation) == (250, stream.incarnation)

    run(body())


@pytest.mark.parametrize("before_commit", [True, False])
def test_a_kill_around_any_commit_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before_commit: bool
) -> None:
    """Killed right before or right after each transaction, and started again: every record has its effect once, by the
    append-only record too."""
    apply = Store.apply

    def dying(self: Store, stream: str, incarnation: str, batch: Batch, *, record: str = "") -> int:
        if before_commit:
            raise Killed
        apply(self, stream, incarnation, batch, record=record)
        raise Killed

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            last = await spans(stream, 1, 100)
            for attempt in range(12):
                with Store.open(tmp_path / "t.db") as store:
                    monkeypatch.setattr(Store, "apply", dying if attempt % 2 == 0 else apply)
                    try:
                        await ingest(
                            broker,
                            stream,
                            store,
                            until=last if attempt == 11 else 20,
                            options=Options(page_records=7, record="w"),
                        )
                    except Killed:
                        continue
            with Store.read(tmp_path / "t.db") as store:
                assert store.count() == 100
                assert [r[0] for r in store.query("SELECT sequence FROM applied")] == list(range(1, 101))

    run(body())


def test_two_workers_on_one_store_share_the_work(tmp_path: Path) -> None:
    """The one that commits first wins the page, the other goes on from there: each record applied once."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            last = await spans(stream, 1, 500)
            with Store.open(tmp_path / "t.db") as one, Store.open(tmp_path / "t.db") as two:
                done = await asyncio.gather(
                    ingest(broker, stream, one, until=last, options=Options(page_records=11, record="one")),
                    ingest(broker, stream, two, until=last, options=Options(page_records=13, record="two")),
                )
                assert sum(p.spans for p in done) == 500
                assert [r[0] for r in one.query("SELECT sequence FROM applied ORDER BY rowid")] == list(range(1, 501))

    run(body())


def test_what_is_no_span_goes_to_quarantine_and_the_rest_is_stored(tmp_path: Path) -> None:
    """Garbage, an impossible span and an envelope of another type between good ones."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            await spans(stream, 1, 3)
            other = mist.Envelope.new("trace.alert", {}, source="s")
            from mist.protocol.codec import encode

            await stream.append(
                [Message("x", b"\xff\x00garbage"), message(9, start_ns=5, end_ns=4), Message("a", encode(other))]
            )
            last = await spans(stream, 20, 3)
            with Store.open(tmp_path / "t.db") as store:
                progress = await ingest(broker, stream, store, until=last)
                reasons = [r for (r,) in store.query("SELECT reason FROM quarantine ORDER BY sequence")]
            assert (progress.spans, progress.refused, progress.other) == (6, 2, 1)
            assert reasons[0].startswith("malformed: ")
            assert reasons[1] == "invalid: the span ends before it starts"

    run(body())


def test_a_repeated_span_under_another_sequence_is_known(tmp_path: Path) -> None:
    """Published twice without ids: stored once, counted as known."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            last = (await stream.append([Message("trace.span", message(1).data) for _ in range(3)]))[-1]
            with Store.open(tmp_path / "t.db") as store:
                progress = await ingest(broker, stream, store, until=last)
                assert (store.count(), progress.known) == (1, 2)

    run(body())


def test_records_trimmed_before_they_were_read_become_a_gap(tmp_path: Path) -> None:
    """The range is written down and said; the ingest goes on behind it."""

    async def body() -> None:
        said: list[str] = []
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            last = await spans(stream, 1, 50)
            await stream.trim(before=21)
            with pytest.raises(SequenceExpired):
                await stream.read(after=0)
            with Store.open(tmp_path / "t.db") as store:
                progress = await ingest(broker, stream, store, until=last, on_event=said.append)
                assert store.one("SELECT first, last FROM gaps") == (1, 20)
                assert (store.count(), progress.gaps) == (30, 1)
        assert "records 1 to 20" in said[0]

    run(body())


def test_a_stream_made_again_is_refused_until_told(tmp_path: Path) -> None:
    """A position of another incarnation means nothing here; `restart` begins the new one and keeps the old spans."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            with Store.open(tmp_path / "t.db") as store:
                await ingest(broker, stream, store, until=await spans(stream, 1, 5))
                await broker.delete("trace")
                stream = await broker.open("trace")
                last = await spans(stream, 100, 2)
                with pytest.raises(WrongIncarnation, match="made again"):
                    await ingest(broker, stream, store, until=last)
                await ingest(broker, stream, store, until=last, restart=True)
                assert store.count() == 7

    run(body())


def test_the_stores_position_wins_over_the_mirrored_one(tmp_path: Path) -> None:
    """After a power cut the store may be behind its mirror: it is right, and moves the mirror back."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            last = await spans(stream, 1, 10)
            ahead = Checkpoint(stream="trace", name=CHECKPOINT, incarnation=stream.incarnation, sequence=999)
            await broker.checkpoints.save(ahead)
            with Store.open(tmp_path / "t.db") as store:
                await ingest(broker, stream, store, until=last)
                assert store.count() == 10
            saved = await broker.checkpoints.load("trace", CHECKPOINT)
            assert saved is not None
            assert saved.sequence == 10

    run(body())


def test_a_stop_ends_a_waiting_worker_after_its_page(tmp_path: Path) -> None:
    """A worker without an end waits for more, sees it, and ends when told to."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            stop = asyncio.Event()
            with Store.open(tmp_path / "t.db") as store:
                progress = module.Progress(0, 0)
                task = asyncio.create_task(
                    ingest(broker, stream, store, stop=stop, options=Options(wait_s=0.02), progress=progress)
                )
                for first in (1, 11):
                    last = await spans(stream, first, 10)
                    while progress.position < last:
                        await asyncio.sleep(0.005)
                stop.set()
                assert (await task).spans == 20

    run(body())


def test_a_broker_that_is_away_for_a_while_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transient errors are said and repeated; nothing is skipped."""
    failures = 3

    async def body() -> None:
        nonlocal failures
        said: list[str] = []
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            last = await spans(stream, 1, 30)
            read = stream.read

            async def flaky(**kw: object) -> object:
                nonlocal failures
                if failures:
                    failures -= 1
                    raise Unavailable("the broker is away")
                return await read(**kw)  # type: ignore[arg-type]

            monkeypatch.setattr(stream, "read", flaky)
            monkeypatch.setattr(module, "RETRY_S_MAX", 0.01)
            with Store.open(tmp_path / "t.db") as store:
                await ingest(broker, stream, store, until=last, on_event=said.append)
                assert store.count() == 30
        assert len(said) == 3

    run(body())


def test_a_store_without_a_position_begins_where_it_is_told(tmp_path: Path) -> None:
    """`first_after` counts once; afterwards the store knows."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            last = await spans(stream, 1, 20)
            with Store.open(tmp_path / "t.db") as store:
                await ingest(broker, stream, store, until=last, first_after=15)
                assert store.count() == 5
                more = await spans(stream, 30, 1)
                await ingest(broker, stream, store, until=more, first_after=0)
                assert store.count() == 6

    run(body())


def test_a_cancelled_ingest_leaves_a_whole_store(tmp_path: Path) -> None:
    """Cancelled in the middle of pages, closed at once, opened again: it goes on where it was."""

    async def body(broker: Broker) -> None:
        stream = await broker.open("trace")
        last = await spans(stream, 1, 2000)
        for _ in range(5):
            with Store.open(tmp_path / "t.db") as store:
                task = asyncio.create_task(ingest(broker, stream, store, options=Options(page_records=50, record="w")))
                while store.position("trace") is None and not task.done():
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        with Store.open(tmp_path / "t.db") as store:
            await ingest(broker, stream, store, until=last, options=Options(record="w"))
            assert [r[0] for r in store.query("SELECT sequence FROM applied ORDER BY rowid")] == list(range(1, 2001))

    async def connected() -> None:
        async with mist.connect("memory:") as broker:
            await body(broker)

    run(connected())
