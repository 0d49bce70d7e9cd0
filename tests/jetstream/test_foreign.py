"""Streams that somebody else made, and what somebody else sees of ours: plain nats-py on the other side."""

from __future__ import annotations

import asyncio
import json
import secrets

import nats
import nats.js.api
import pytest

import mist
from mist.broker.base import Checkpoint, Message, StreamConfig
from mist.errors import Conflict, InvalidArgument
from tests.conftest import run
from tests.jetstream.server import shared_url


def plain() -> str:
    return shared_url().split("?")[0]


def name(what: str) -> str:
    return f"{what}_{secrets.token_hex(4)}"


def test_a_foreign_stream_is_read_consumed_and_written() -> None:
    """Its own subjects and limits, its headers as they are, data that is no envelope; listed, counted, replayed."""

    async def go() -> None:
        raw = name("ORDERS")
        nc = await nats.connect(plain())
        js = nc.jetstream()
        await js.add_stream(name=raw, subjects=[f"{raw}.*", f"{raw}.x.>"], max_msgs=100, description="not ours")
        for n in range(10):
            headers = {"X-Kind": "a b", "Nats-Msg-Id": f"m{n}"} if n % 2 else None
            await js.publish(f"{raw}.{'new' if n % 2 else 'paid'}", b"\xff%d" % n, headers=headers)
        async with mist.connect(shared_url()) as broker:
            assert raw in await broker.streams()
            stream = await broker.open(raw, create=False)
            info = await stream.info()
            assert (info.records, info.first, info.last) == (10, 1, 10)
            assert info.config.records_max == 100
            assert info.incarnation == (await broker.open(raw)).incarnation
            page = await stream.read()
            assert [r.data for r in page.records] == [b"\xff%d" % n for n in range(10)]
            assert page.records[1].subject == f"{raw}.new"
            assert (page.records[1].id, page.records[1].headers) == ("m1", (("X-Kind", "a b"),))
            paid = await stream.read(subjects=(f"{raw}.paid",))
            assert [r.sequence for r in paid.records] == [1, 3, 5, 7, 9]
            waiting = asyncio.create_task(stream.read(after=10, wait_s=20))
            await asyncio.sleep(0.1)
            await js.publish(f"{raw}.new", b"late")
            assert [r.data for r in (await waiting).records] == [b"late"]
            await js.add_consumer(raw, durable_name="theirs", ack_policy=nats.js.api.AckPolicy.EXPLICIT)
            assert await stream.consumers() == ["theirs"]
            for which in ("theirs", "mine"):
                consumer = await stream.consumer(which)
                got = await consumer.fetch(limit=11, wait_s=5)
                assert len(got) == 11
                assert await consumer.ack(got) == 11
                assert (await consumer.info()).lag == 0
            assert await stream.append([Message(f"{raw}.new", b"ours", "id-1", (("a", "b"),))]) == [12]
            with pytest.raises(InvalidArgument, match="is no subject of stream"):
                await stream.append([Message("elsewhere", b"")])
            with pytest.raises(Conflict):
                await broker.open(raw, config=StreamConfig(records_max=5))
            saved = Checkpoint(stream=raw, name="c", incarnation=stream.incarnation, sequence=3)
            assert (await broker.checkpoints.save(saved)).sequence == 3
            assert await stream.locate(page.records[4].timestamp_ns) == 5
            await broker.delete(raw)
        await nc.close()

    run(go(), 60)


def test_names_that_we_cannot_write_are_encoded() -> None:
    """A stream whose name is outside our grammar is listed and opened by its token; buckets are not listed."""

    async def go() -> None:
        raw = f"größe+{secrets.token_hex(4)}"
        nc = await nats.connect(plain())
        js = nc.jetstream()
        await js.add_stream(name=raw, subjects=[f"s{secrets.token_hex(4)}.>"])
        await js.create_key_value(bucket=name("bucket"))
        async with mist.connect(shared_url()) as broker:
            token = mist.protocol.subject.encode_token(raw)
            names = await broker.streams()
            assert token in names
            assert not [n for n in names if n.startswith("KV_")]
            assert (await (await broker.open(token, create=False)).info()).records == 0
            await broker.delete(token)
            assert token not in await broker.streams()
        await nc.close()

    run(go())


def test_a_hole_in_the_middle_is_passed_over() -> None:
    """Somebody deleted single messages: what is left comes, and positions stay what they are."""

    async def go() -> None:
        ours = name("holes")
        nc = await nats.connect(plain())
        js = nc.jetstream()
        async with mist.connect(shared_url()) as broker:
            stream = await broker.open(ours)
            await stream.append([Message("a", b"%d" % n) for n in range(1, 11)])
            for sequence in (4, 5, 10):
                await js.delete_msg(ours, sequence)
            page = await stream.read()
            assert [r.sequence for r in page.records] == [1, 2, 3, 6, 7, 8, 9]
            assert [r.sequence for r in (await stream.read(after=3)).records] == [6, 7, 8, 9]
            page = await stream.read(after=9)
            assert (page.records, page.scanned, page.last) == ([], 10, 10)
            assert [r.sequence for r in (await stream.read(after=3, subjects=("a", "b"))).records] == [6, 7, 8, 9]
            await broker.delete(ours)
        await nc.close()

    run(go())


def test_a_plain_subscriber_reads_what_we_wrote() -> None:
    """Subject, JSON body and headers of our records, and positions in a key-value bucket."""

    async def go() -> None:
        ours = name("ours")
        nc = await nats.connect(plain())
        js = nc.jetstream()
        async with mist.connect(shared_url()) as broker:
            stream = await broker.open(ours)
            await stream.append([Message("trace.span", b'{"a":1}', "id-1", (("Content-Type", "application/json"),))])
            await stream.append([Message("odd", b"data", "ü", (("a", "1"), ("a", "2")))])
            sub = await js.pull_subscribe(f"mist.{ours}.>", durable="plain", stream=ours)
            one, two = await sub.fetch(2, timeout=5)
            assert (one.subject, one.data) == (f"mist.{ours}.trace.span", b'{"a":1}')
            assert one.headers == {"Nats-Msg-Id": "id-1", "Content-Type": "application/json"}
            assert two.data == b"data"
            assert two.headers["Nats-Msg-Id"] == "==C3=BC"
            assert json.loads(two.headers["Mist-Headers"]) == [["a", "1"], ["a", "2"]]
            await broker.checkpoints.save(
                Checkpoint(stream=ours, name="worker", incarnation=stream.incarnation, sequence=2)
            )
            kv = await js.key_value("mist_checkpoints")
            entry = await kv.get(f"{ours}.worker")
            assert json.loads(entry.value or b"")["sequence"] == 2
            await kv.delete(f"{ours}.worker")
            assert await broker.checkpoints.load(ours, "worker") is None
            assert await broker.checkpoints.list(ours) == []
            await broker.delete(ours)
        await nc.close()

    run(go())


def test_faststream_reads_and_writes_our_streams() -> None:
    """A FastStream subscriber gets the JSON body; what its broker publishes is a record here."""
    faststream = pytest.importorskip("faststream.nats")

    async def go() -> None:
        ours = name("fs")
        async with mist.connect(shared_url()) as broker:
            stream = await broker.open(ours)
            app = faststream.NatsBroker(plain(), logger=None)
            got: asyncio.Queue[dict[str, int]] = asyncio.Queue()

            @app.subscriber(f"mist.{ours}.>", stream=faststream.JStream(ours, declare=False))
            async def handle(message: dict[str, int]) -> None:
                got.put_nowait(message)

            await app.start()
            await stream.append([Message("a.b", b'{"n":1}', "1", (("content-type", "application/json"),))])
            assert await asyncio.wait_for(got.get(), 10) == {"n": 1}
            await app.publish({"n": 2}, f"mist.{ours}.c", stream=ours)
            record = (await stream.read(after=1, wait_s=10)).records[0]
            assert (record.subject, json.loads(record.data)) == ("c", {"n": 2})
            await app.stop()
            await broker.delete(ours)

    run(go())


def test_a_work_queue_stream_warns() -> None:
    """Records of a work queue go when they are acked: it can be read, and info says so."""

    async def go() -> None:
        raw = name("WORK")
        nc = await nats.connect(plain())
        js = nc.jetstream()
        await js.add_stream(name=raw, subjects=[f"{raw}.>"], retention=nats.js.api.RetentionPolicy.WORK_QUEUE)
        await js.publish(f"{raw}.a", b"1")
        async with mist.connect(shared_url()) as broker:
            stream = await broker.open(raw)
            assert [r.data for r in (await stream.read()).records] == [b"1"]
            assert any("retention workqueue" in w for w in (await stream.info()).warnings)
            consumer = await stream.consumer("c")
            assert await consumer.ack(await consumer.fetch(wait_s=5)) == 1
            await broker.delete(raw)
        await nc.close()

    run(go())
