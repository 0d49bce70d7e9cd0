"""The client: envelopes in, envelopes out, sizes, foreign data, checkpoints, closing."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from conftest import run

import mist
from mist.broker.base import Message, StreamConfig
from mist.client import Bad, Client, Received, decode_record
from mist.client.client import to_message
from mist.errors import (
    ChecksumMismatch,
    Closed,
    InvalidArgument,
    Malformed,
    NotFound,
    ProtocolError,
    StorageFull,
    TooDeep,
    TooLarge,
    WrongIncarnation,
)
from mist.protocol.codec import MSGPACK, encode, encode_msgpack
from mist.protocol.envelope import Envelope
from mist.testing.faults import Fault, FaultyBroker, Script


def span(n: int) -> Envelope:
    return Envelope.new("trace.span", {"n": n}, source="test", id=f"span-{n}")


def test_the_client_is_part_of_the_small_surface_and_loads_late() -> None:
    """`mist.Client` is the class; an unknown name is an AttributeError."""
    assert mist.Client is Client
    with pytest.raises(AttributeError):
        _ = mist.Server


def test_publish_and_replay_round_trip() -> None:
    """One envelope gives its sequence, several give theirs; what is read equals what was written."""

    async def case() -> None:
        async with mist.connect("memory:") as broker, Client(broker, source="test") as client:
            made = client.envelope("eval.result", {"passed": True}, correlation_id="c")
            assert (made.source, made.correlation_id) == ("test", "c")
            assert await client.publish("s", made, qualifier="run 7") == 1
            assert await client.publish("s", [span(1), span(2)]) == [2, 3]
            assert await client.publish("s", []) == []
            got = [r async for r in client.replay("s")]
            assert [r.envelope for r in got] == [made, span(1).__class__(**_fields(got[1])), got[2].envelope]
            assert [r.sequence for r in got] == [1, 2, 3]
            assert [r.subject for r in got] == ["eval.result.run=207", "trace.span", "trace.span"]
            assert got[1].envelope.decode(dict) == {"n": 1}
            assert [r.sequence async for r in client.replay("s", subjects=("eval.>",))] == [1]
            assert [r.sequence async for r in client.replay("s", after=1, to=2)] == [2]

    run(case())


def _fields(received: Received) -> dict[str, object]:
    return msgspec.structs.asdict(received.envelope)


def test_publishing_an_envelope_again_stores_nothing() -> None:
    """The message's id is the envelope's id, so the second publish gets the first one's sequence."""

    async def case() -> None:
        async with mist.connect("memory:") as broker, Client(broker) as client:
            assert await client.publish("s", span(1)) == 1
            assert await client.publish("s", [span(1), span(2), span(2)]) == [1, 2, 2]
            assert len([r async for r in client.replay("s")]) == 2

    run(case())


def test_concurrent_publishes_share_a_window() -> None:
    """A hundred tasks, one append."""

    async def case() -> None:
        broker = FaultyBroker(await mist.connect("memory:"), Script({}))
        async with broker, Client(broker) as client:
            assert await asyncio.gather(*[client.publish("s", span(i)) for i in range(100)]) == list(range(1, 101))
            assert sum(broker.appended) == 100
            assert len(broker.appended) <= 2

    run(case())


def test_an_envelope_above_the_limit_is_refused_before_it_is_sent() -> None:
    """At the limit it goes, one byte more is TooLarge and no append happens."""

    async def case() -> None:
        size = len(encode(span(1)))
        broker = FaultyBroker(await mist.connect("memory:"), Script({}))
        async with broker, Client(broker, size_bytes_max=size) as client:
            assert await client.publish("s", span(1)) == 1
            with pytest.raises(TooLarge) as caught:
                await client.publish("s", span(10))
            assert (caught.value.size_bytes, caught.value.size_bytes_max) == (size + 2, size)
            with pytest.raises(TooLarge):
                await client.publish("s", [span(2), span(10)])
            assert broker.calls["append"] == 1
        with pytest.raises(InvalidArgument):
            to_message(Envelope.new("x" * 300, None, source="t"))

    run(case())


async def _with_foreign_data(client: Client) -> None:
    stream = await client.stream("s")
    await client.publish("s", span(1))
    broken = msgspec.structs.replace(span(2), checksum=7)
    deep = b'{"version":"1","id":"i","source":"s","type":"t","timestamp_ns":1,"payload":' + b"[" * 90 + b"]" * 90 + b"}"
    await stream.append([
        Message("x", b"not json"),
        Message("x", encode(broken), broken.id),
        Message("x", deep),
        Message("x", encode_msgpack(span(3)), "span-3", ((("Content-Type"), MSGPACK),)),
    ])  # fmt: skip
    await client.publish("s", span(4))


def test_foreign_data_is_raised_skipped_or_yielded() -> None:
    """Every record that is no acceptable envelope has its own error; a msgpack one is an envelope like any other."""

    async def case() -> None:
        async with mist.connect("memory:") as broker, Client(broker) as client:
            await _with_foreign_data(client)
            skipping = client.replay("s", on_bad="skip")
            assert [r.sequence async for r in skipping] == [1, 5, 6]
            assert skipping.bad_count == 3
            mixed = [r async for r in client.replay("s", on_bad="yield")]
            errors = [type(r.error) for r in mixed if isinstance(r, Bad)]
            assert errors == [Malformed, ChecksumMismatch, TooDeep]
            assert [(r.sequence, r.subject) for r in mixed][1:3] == [(2, "x"), (3, "x")]
            assert all(r.timestamp_ns for r in mixed)
            packed = mixed[4]
            assert isinstance(packed, Received)
            assert packed.envelope.decode(dict) == {"n": 3}

            raising = client.replay("s")
            seen: list[int] = []

            async def read() -> None:
                async for r in raising:
                    seen.append(r.sequence)  # noqa: PERF401 - what came before the error counts

            codes = []
            for _ in range(3):
                with pytest.raises(ProtocolError) as caught:
                    await read()
                codes.append((caught.value.code, caught.value.meta["sequence"]))
            await read()
            assert codes == [("malformed", "2"), ("checksum_mismatch", "3"), ("too_deep", "4")]
            assert seen == [1, 5, 6]
            with pytest.raises(InvalidArgument):
                client.replay("s", on_bad="drop")  # type: ignore[call-overload]

    run(case())


def test_a_named_replay_resumes_where_it_was() -> None:
    """The position lies in the broker under the reader's name; a stream made again refuses it."""

    async def case() -> None:
        async with mist.connect("memory:") as broker, Client(broker) as client:
            await client.publish("s", [span(i) for i in range(10)])
            seen = []
            async with client.replay("s", name="job", limit=3) as records:
                async for r in records:
                    seen.append(r.sequence)
                    if r.sequence == 5:
                        await records.save()
                        break
            async with client.replay("s", name="job") as records:
                assert records.position == 5
                assert (await records.lag()).records == 5
                seen += [r.sequence async for r in records]
            assert seen == list(range(1, 11))
            async with client.replay("s", name="job") as records:
                await records.seek(8)
                assert [r.sequence async for r in records] == [9, 10]

            await broker.checkpoints.save(
                (await broker.checkpoints.list())[0].__class__(
                    stream="s", name="old", incarnation="another", sequence=1
                )
            )
            with pytest.raises(WrongIncarnation):
                await client.replay("s", name="old").open()

    run(case())


def test_follow_gets_what_comes() -> None:
    """A follower wakes for new envelopes and can be cancelled."""

    async def case() -> None:
        async with mist.connect("memory:") as broker, Client(broker) as client:
            await client.publish("s", span(0))
            got: asyncio.Queue[int] = asyncio.Queue()

            async def follow() -> None:
                async for r in client.follow("s"):
                    got.put_nowait(r.sequence)

            task = asyncio.create_task(follow())
            assert await got.get() == 1
            await client.publish("s", span(1))
            assert await got.get() == 2
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(case())


def test_gaps_of_a_reader() -> None:
    """Skipped ranges are told."""

    async def case() -> None:
        async with mist.connect("memory:") as broker, Client(broker) as client:
            await client.stream("s", config=StreamConfig(records_max=2))
            await client.publish("s", [span(i) for i in range(5)])
            reader = client.replay("s", after=1, on_gap="skip")
            assert [r.sequence async for r in reader] == [4, 5]
            assert [(g.first, g.last) for g in reader.gaps] == [(2, 3)]

    run(case())


def test_a_stream_that_was_made_again_is_found_again() -> None:
    """The call that finds the old handle dead raises NotFound; the next one opens the new stream."""

    async def case() -> None:
        async with mist.connect("memory:") as broker, Client(broker) as client:
            await client.publish("s", span(1))
            await broker.delete("s")
            with pytest.raises(NotFound):
                await client.replay("s").open()
            with pytest.raises(NotFound):
                await client.publish("s", span(2))
            client.forget("s")
            assert await client.publish("s", span(3)) == 1

    run(case())


def test_own_publishers_flush_and_close_with_the_client() -> None:
    """`send` waits only for room; the client's flush and close settle it; the broker stays open."""

    async def case() -> None:
        async with mist.connect("memory:") as broker:
            client = Client(broker)
            own = await client.publisher("s")
            await own.send(span(1))
            assert await own.publish(span(2), qualifier="q") == 2
            assert await own.publish_many([span(3)]) == [3]
            await own.send(span(4))
            await client.flush()
            assert own.publisher.stored == 4
            await own.send(span(5))
            await client.aclose()
            await client.aclose()
            with pytest.raises(Closed):
                await own.send(span(6))
            with pytest.raises(Closed):
                await client.publish("other", span(6))
            assert (await (await broker.open("s")).info()).records == 5

            full = Client(FaultyBroker(broker, Script({"append": [Fault(before=StorageFull("full"))]})))
            async with await full.publisher("t") as own:
                await own.flush()
            own = await full.publisher("t")
            await own.send(span(1))
            with pytest.raises(StorageFull):
                await full.aclose()

    run(case())


def test_decode_record_checks_what_somebody_else_wrote() -> None:
    """A record without an id did not come through our client and gets the checks of a door to the outside."""

    async def case() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("s")
            nan = encode(span(1)).replace(b'{"n":1}', b'{"n":NaN}')
            await stream.append([Message("x", nan), Message("x", encode(span(1)))])
            bad, good = (await stream.read()).records
            with pytest.raises(ProtocolError):
                decode_record(bad)
            assert decode_record(good).id == "span-1"

    run(case())
