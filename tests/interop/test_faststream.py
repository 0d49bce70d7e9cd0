"""Programs that know nothing of MIST read what it stores, and it reads what they store: FastStream, nats-py, redis-py.

What they rely on is in docs/how-to/use-nats.md and use-redis.md: the body is the envelope's JSON, subjects and fields
have stated names.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

import mist
from mist.protocol.payloads import TRACE_SPAN, TraceSpan
from mist.testing.servers import run_nats, run_redis
from tests.conftest import run

nats = pytest.importorskip("nats", reason="needs nats-py: pip install 'mist-stack[nats]'")
redis = pytest.importorskip("redis.asyncio", reason="needs redis-py: pip install 'mist-stack[redis]'")
pytest.importorskip("faststream", reason="needs faststream (dependency group bench)")

from faststream.nats import JStream, NatsBroker, NatsMessage  # noqa: E402
from faststream.redis import RedisBroker, StreamSub  # noqa: E402

COUNT = 20
# FastStream and its dependency injection warn about Python features they use; they are not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def nats_url() -> Iterator[str]:
    with run_nats() as server:
        yield server.url


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with run_redis() as server:
        yield server.url


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


def plain(url: str) -> str:
    return url.partition("?")[0]


def span(n: int) -> TraceSpan:
    return TraceSpan(
        trace_id=f"{n:032x}", span_id=f"{n:016x}", operation="chat", start_ns=1, end_ns=2, status="ok",
        attrs={"model": "m", "tokens_in": n},
    )  # fmt: skip


async def published(url: str, stream: str) -> list[dict[str, Any]]:
    """Envelopes through mist.Client, as the JSON they must arrive as."""
    async with mist.connect(url) as broker, mist.Client(broker, source="interop") as client:
        envelopes = [client.envelope(TRACE_SPAN, span(n)) for n in range(COUNT)]
        await client.publish(stream, envelopes)
    return [json.loads(mist.protocol.codec.encode(e)) for e in envelopes]


async def filled(seen: list[Any], count: int) -> None:
    async with asyncio.timeout(20):
        while len(seen) < count:
            await asyncio.sleep(0.01)


def test_faststream_subscribes_to_a_stream_on_nats(nats_url: str) -> None:
    """The body is the envelope; the record's id is in the header Nats-Msg-Id, the subject says the type."""

    async def body() -> None:
        sent = await published(nats_url, "fs-read")
        broker = NatsBroker(plain(nats_url), logger=None)
        seen: list[Any] = []
        heads: list[tuple[str, str]] = []

        @broker.subscriber("mist.fs-read.>", stream=JStream("fs-read", declare=False), deliver_policy="all")
        async def handle(message: dict[str, Any], raw: NatsMessage) -> None:
            seen.append(message)
            heads.append((raw.raw_message.subject, raw.headers["Nats-Msg-Id"]))

        await broker.start()
        try:
            await filled(seen, COUNT)
        finally:
            await broker.stop()
        assert seen == sent
        assert heads == [("mist.fs-read.trace.span", e["id"]) for e in sent]

    run(body())


def test_a_plain_nats_client_reads_a_stream(nats_url: str) -> None:
    """nats-py's pull subscription, fetch and ack."""

    async def body() -> None:
        sent = await published(nats_url, "np-read")
        nc = await nats.connect(plain(nats_url))
        try:
            sub = await nc.jetstream().pull_subscribe("mist.np-read.>", durable="plain", stream="np-read")
            got = await sub.fetch(COUNT, timeout=10)
            for m in got:
                await m.ack()
            assert [json.loads(m.data) for m in got] == sent
        finally:
            await nc.close()

    run(body())


def test_what_faststream_publishes_on_nats_is_read(nats_url: str) -> None:
    """A stream of theirs: listed, read with its own subjects, located, consumed; it is not ours to change."""

    async def body() -> None:
        broker = NatsBroker(plain(nats_url), logger=None)
        await broker.connect()
        try:
            await broker.stream.add_stream(name="fs-orders", subjects=["orders.*"])
        except AttributeError:
            nc = await nats.connect(plain(nats_url))
            await nc.jetstream().add_stream(name="fs-orders", subjects=["orders.*"])
            await nc.close()
        for n in range(COUNT):
            await broker.publish({"n": n}, f"orders.{n % 2}", stream="fs-orders")
        await broker.stop()
        async with mist.connect(nats_url) as ours:
            assert "fs-orders" in await ours.streams()
            stream = await ours.open("fs-orders", create=False)
            page = await stream.read(limit=100)
            assert [json.loads(r.data) for r in page.records] == [{"n": n} for n in range(COUNT)]
            assert {r.subject for r in page.records} == {"orders.0", "orders.1"}
            some = await stream.read(subjects=("orders.1",), limit=100)
            assert [json.loads(r.data)["n"] for r in some.records] == list(range(1, COUNT, 2))
            consumer = await stream.consumer("mine")
            got = await consumer.fetch(limit=COUNT, wait_s=10)
            assert await consumer.ack(got) == len(got) == COUNT

    run(body())


def test_faststream_subscribes_to_a_stream_on_redis(redis_url: str) -> None:
    """A group's subscriber finds the envelope's JSON in the field `data`."""

    async def body() -> None:
        sent = await published(redis_url, "fs-read")
        broker = RedisBroker(redis_url, logger=None)
        seen: list[Any] = []
        client = redis.Redis.from_url(redis_url)
        await client.xgroup_create("fs-read", "fs", "0")
        await client.aclose()

        @broker.subscriber(stream=StreamSub("fs-read", group="fs", consumer="me", polling_interval=10))
        async def handle(message: dict[str, Any]) -> None:
            seen.append(message)

        await broker.start()
        try:
            await filled(seen, COUNT)
        finally:
            await broker.stop()
        assert [json.loads(m["data"]) if isinstance(m.get("data"), str) else m for m in seen] == sent

    run(body())


def test_redis_cli_reads_a_stream(redis_url: str) -> None:
    """`XRANGE trace - +`: entries `0-N`, fields with names, the envelope's JSON in `data`."""

    async def body() -> None:
        sent = await published(redis_url, "cli-read")
        client = redis.Redis.from_url(redis_url, decode_responses=True)
        entries = await client.xrange("cli-read", "-", "+")
        await client.aclose()
        assert [i for i, _ in entries] == [f"0-{n + 1}" for n in range(COUNT)]
        assert [json.loads(fields["data"]) for _, fields in entries] == sent
        assert [fields["id"] for _, fields in entries] == [e["id"] for e in sent]
        assert {fields["subject"] for _, fields in entries} == {"trace.span"}

    run(body())


def test_what_faststream_publishes_on_redis_is_read(redis_url: str) -> None:
    """A stream of theirs: listed, read and consumed; the bytes FastStream wrote come as they are."""

    async def body() -> None:
        broker = RedisBroker(redis_url, logger=None)
        await broker.connect()
        for n in range(COUNT):
            await broker.publish({"n": n}, stream="fs-orders")
        await broker.stop()
        async with mist.connect(redis_url) as ours:
            assert "fs-orders" in await ours.streams()
            stream = await ours.open("fs-orders", create=False)
            page = await stream.read(limit=100)
            assert len(page.records) == COUNT
            for n, record in enumerate(page.records):
                assert f'{{"n":{n}}}'.encode() in record.data.replace(b" ", b"")
            consumer = await stream.consumer("mine")
            got = await consumer.fetch(limit=COUNT, wait_s=10)
            assert await consumer.ack(got) == len(got) == COUNT

    run(body())
