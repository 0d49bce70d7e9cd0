"""Streams and entries of others: listed, read, consumed, appended to; and plain clients on streams of ours."""

from __future__ import annotations

import asyncio
import json
import secrets

import pytest
from conftest import run
from redis import Redis

import mist
from mist.broker.base import Checkpoint, ConsumerConfig, Message, Record, Stream, header
from mist.errors import Conflict, CursorAhead, NotFound, SequenceExpired
from mist.kit.local import RedisServer
from mist.protocol.subject import encode_token
from mist_redis.entry import ENTRY, SHAPE


def fresh(tag: str) -> str:
    return f"{tag}-{secrets.token_hex(4)}"


async def everything(stream: Stream) -> list[Record]:
    out: list[Record] = []
    after = 0
    while True:
        page = await stream.read(after=after, limit=3)
        out += page.records
        after = page.scanned
        if after >= page.last:
            return out


def test_a_stream_somebody_else_made(shared: RedisServer, plain: Redis) -> None:
    """Listed, read in order with times, located, consumed, appended to and deleted like one of ours."""
    name = fresh("theirs")
    ids = [plain.xadd(name, {"data": f'{{"n":{n}}}'}) for n in range(4)]
    ids.append(plain.xadd(name, {"a": "1", "b": b"\xff"}))
    ids.append(plain.xadd(name, {"__data__": b"\x00raw"}))

    async def body() -> None:
        async with mist.connect(shared.url) as broker:
            assert name in await broker.streams()
            stream = await broker.open(name, create=False)
            records = await everything(stream)
            assert [header(r.headers, ENTRY).encode() for r in records] == ids
            assert [header(r.headers, SHAPE) for r in records] == ["data"] * 4 + ["fields", "__data__"]
            assert records[0].data == b'{"n":0}'
            assert json.loads(records[4].data) == {"a": "1", "b": "�"}
            assert records[5].data == b"\x00raw"
            assert {r.subject for r in records} == {encode_token(name)}
            info = await stream.info()
            assert (info.records, info.first, info.last) == (6, records[0].sequence, records[-1].sequence)
            assert await stream.locate(records[2].timestamp_ns) <= records[2].sequence
            consumer = await stream.consumer("c", ConsumerConfig(ack_wait_s=300.0))
            got = await consumer.fetch(limit=10)
            assert [d.record for d in got] == records
            figures = await consumer.info()
            assert (figures.pending, figures.lag) == (6, 6)
            assert await consumer.ack(got[:4]) == 4
            assert await consumer.nak(got[4:]) == 2
            assert [d.attempt for d in await consumer.fetch(limit=10)] == [2, 2]
            (mine,) = await stream.append([Message("a.b", b"ours", "id-1")])
            assert await stream.append([Message("a.b", b"ours", "id-1")]) == [mine]
            assert mine > records[-1].sequence
            assert (await everything(stream))[-1] == Record(mine, "a.b", b"ours", (mine >> 20) * 1_000_000, "id-1", ())
            assert await stream.trim(before=records[3].sequence) == 3
            with pytest.raises(SequenceExpired):
                await stream.read(after=records[0].sequence)
            with pytest.raises(CursorAhead):
                await stream.read(after=mine + 1)
            await broker.delete(name)
            with pytest.raises(NotFound):
                await stream.read()

    run(body())
    assert not plain.keys(f"mist:{{{name}}}:[^w]*")


def test_tailing_a_foreign_stream(shared: RedisServer, plain: Redis) -> None:
    """A waiting read, and a waiting fetch, wake for somebody's XADD."""
    name = fresh("tail")
    plain.xadd(name, {"data": "0"})

    async def body() -> None:
        async with mist.connect(shared.url) as broker:
            stream = await broker.open(name)
            last = (await stream.info()).last
            consumer = await stream.consumer("c", ConsumerConfig(after=last))
            waiting = [
                asyncio.create_task(stream.read(after=last, wait_s=20)), asyncio.create_task(consumer.fetch(wait_s=20)),
            ]  # fmt: skip
            await asyncio.sleep(0.1)
            await asyncio.to_thread(plain.xadd, name, {"data": "1"})
            page, got = await asyncio.gather(*waiting)
            assert page.records[0].data == got[0].record.data == b"1"  # type: ignore[attr-defined, index]

    run(body())


def test_small_explicit_ids(shared: RedisServer, plain: Redis) -> None:
    """`1-1`, `1-2`, `2-0` are a stream like any other."""
    name = fresh("small")
    for id in ("1-1", "1-2", "2-0", "1732000000000-5"):
        plain.xadd(name, {"data": id}, id=id)

    async def body() -> None:
        async with mist.connect(shared.url) as broker:
            stream = await broker.open(name)
            records = await everything(stream)
            assert [r.data for r in records] == [b"1-1", b"1-2", b"2-0", b"1732000000000-5"]
            assert [r.sequence for r in records] == sorted(r.sequence for r in records)
            assert (await stream.read(after=records[1].sequence)).records == records[2:]

    run(body())


def test_an_id_without_a_sequence_is_refused(shared: RedisServer, plain: Redis) -> None:
    """The reader is told which entry it is, and goes on when it is gone."""
    name = fresh("huge")
    plain.xadd(name, {"data": "1"}, id="5-5")
    plain.xadd(name, {"data": "2"}, id="99999999999999-1")

    async def body() -> None:
        async with mist.connect(shared.url) as broker:
            stream = await broker.open(name)
            with pytest.raises(Conflict, match="99999999999999-1"):
                await stream.read()

    run(body())


def test_names_outside_our_grammar(shared: RedisServer, plain: Redis) -> None:
    """A key `user:events` is listed, and opened, as its encoded token; the exact name wins where both exist."""
    key = fresh("user:events")
    name = encode_token(key)
    plain.xadd(key, {"data": "1"})

    async def body() -> None:
        async with mist.connect(shared.url) as broker:
            assert name in await broker.streams()
            stream = await broker.open(name, create=False)
            assert [r.data for r in await everything(stream)] == [b"1"]
            await stream.append([Message("a", b"2")])
            consumer = await stream.consumer("c")
            assert len(await consumer.fetch()) == 2
            saved = await broker.checkpoints.save(
                Checkpoint(stream=name, name="p", incarnation=stream.incarnation, sequence=5)
            )
            assert await broker.checkpoints.load(name, "p") == saved
            assert saved in await broker.checkpoints.list()
            await broker.delete(name)
            assert name not in await broker.streams()

    run(body())
    assert plain.exists(key) == 0


def test_an_xadd_into_ours(shared: RedisServer, plain: Redis) -> None:
    """`XADD *` by somebody else bricks nothing: ours go on behind it, in order, and ids and consumers still hold."""
    name = fresh("mixed")

    async def body() -> None:
        async with mist.connect(shared.url) as broker:
            stream = await broker.open(name)
            consumer = await stream.consumer("c", ConsumerConfig(ack_wait_s=300.0))
            sent = await stream.append([Message("a", b"%d" % n, f"i{n}") for n in range(3)])
            id = await asyncio.to_thread(plain.xadd, name, {"data": "theirs"})
            sent += await stream.append([Message("a", b"%d" % n, f"i{n}") for n in range(2, 5)])
            assert sent == [1, 2, 3, 3, *sent[4:]]
            await asyncio.to_thread(plain.xadd, name, {"data": "again"})
            (last,) = await stream.append([Message("a", b"5")], expected_last=(await stream.info()).last)
            records = await everything(stream)
            assert [r.data for r in records] == [b"0", b"1", b"2", b"theirs", b"3", b"4", b"again", b"5"]
            assert [r.timestamp_ns for r in records] == sorted(r.timestamp_ns for r in records)
            assert header(records[3].headers, ENTRY).encode() == id
            assert records[-1].sequence == last
            assert await stream.append([Message("a", b"x", "i0"), Message("a", b"x", "i4")]) == [1, sent[-1]]
            got = await consumer.fetch(limit=100)
            assert [d.record for d in got] == records
            assert await consumer.ack(got[::2]) == 4
            info = await consumer.info()
            assert (info.pending, info.floor, info.delivered) == (4, 1, last)
            for r in records:
                found = await stream.locate(r.timestamp_ns)
                assert found == next(x.sequence for x in records if x.timestamp_ns >= r.timestamp_ns)

    run(body())


def test_a_key_of_another_type(shared: RedisServer, plain: Redis) -> None:
    name = fresh("list")
    plain.lpush(name, "x")

    async def body() -> None:
        async with mist.connect(shared.url) as broker:
            for call in (broker.open(name), broker.open(name, create=False), broker.delete(name)):
                with pytest.raises(Conflict, match="list"):
                    await call
            assert name not in await broker.streams()

    run(body())
    assert plain.lrange(name, 0, -1) == [b"x"]


def test_what_redis_cli_sees(shared: RedisServer, plain: Redis) -> None:
    """The stream under its own name, fields that can be read, consumers as groups."""
    name = fresh("seen")

    async def body() -> None:
        async with mist.connect(shared.url) as broker:
            stream = await broker.open(name)
            await stream.append([Message("a.b", b"{}", "id-1", (("k", "v"),)), Message("a.b", b"1")])
            consumer = await stream.consumer("worker")
            await consumer.fetch(limit=1)

    run(body())
    (first, fields), (second, _) = plain.xrange(name)  # type: ignore[misc]
    assert (first, second) == (b"0-1", b"0-2")
    assert fields.pop(b"time").isdigit()
    assert fields == {b"subject": b"a.b", b"data": b"{}", b"id": b"id-1", b"headers_json": b'[["k","v"]]'}
    (group,) = plain.xinfo_groups(name)
    assert (group["name"], group["pending"], group["last-delivered-id"]) == (b"worker", 1, b"0-1")
    assert group["lag"] == 1


def test_a_group_of_another_program_is_not_taken(shared: RedisServer, plain: Redis) -> None:
    name = fresh("groups")

    async def body() -> None:
        async with mist.connect(shared.url) as broker:
            stream = await broker.open(name)
            await asyncio.to_thread(plain.xgroup_create, name, "theirs")
            with pytest.raises(Conflict, match="theirs"):
                await stream.consumer("theirs")
            assert await stream.consumers() == []

    run(body())


def test_a_stream_removed_by_del_is_empty_not_broken(shared: RedisServer, plain: Redis) -> None:
    """Somebody's DEL takes the records; numbering goes on, and a consumer says what happened."""
    name = fresh("del")

    async def body() -> None:
        async with mist.connect(shared.url) as broker:
            stream = await broker.open(name)
            await stream.append([Message("a", b"1"), Message("a", b"2")])
            consumer = await stream.consumer("c")
            await asyncio.to_thread(plain.delete, name)
            with pytest.raises(SequenceExpired):
                await stream.read()
            assert (await stream.read(after=2)).records == []
            assert await stream.append([Message("a", b"3")]) == [3]
            with pytest.raises(NotFound):
                await consumer.fetch()
            await consumer.delete()
            again = await stream.consumer("c")
            assert [d.record.data for d in await again.fetch()] == [b"3"]

    run(body())
