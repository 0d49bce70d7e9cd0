"""Erasing a trace, a user or a tenant: all of it, nothing else, with an audit record, and repeatable after a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import run

import mist
from mist.broker.base import Broker, Message, Record
from mist.broker.deadletter import bury, dead_letter
from mist.client.blobs import Blobs
from mist.client.client import Client
from mist.errors import InvalidArgument, NotFound, Unavailable, Unsupported
from mist.protocol.codec import MSGPACK, decode, encode, encode_msgpack
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN
from mist.testing.clock import FakeClock
from mist.tools.tokentrace.erase import (
    BEGUN,
    DONE,
    ErasureBegun,
    ErasureDone,
    concerns,
    digest,
    erase,
    find,
    unfinished,
)
from mist.tools.tokentrace.ingest import batch_of, ingest
from mist.tools.tokentrace.stats import stats
from mist.tools.tokentrace.store import Position, Selector, Store

from .spanning import TRACE, payload, record

USER = "u-4711@example.org"
WHY: dict[str, Any] = {"reason": "request 17 of the person", "by": "ops"}


def span(number: int, *, user: str = "", tenant: str = "", trace: str = TRACE) -> Message:
    attrs = {**payload()["attrs"], **({"user": user} if user else {})}
    body = payload(number, trace_id=trace, attrs=attrs)
    env = Envelope.new(TRACE_SPAN, body, source="svc", id=f"{number:032x}", tenant=tenant)
    return Message("trace.span.svc", encode(env), env.id)


async def filled(broker: Broker, store: Store) -> list[int]:
    """Ten spans of two users, three of them of ours; one bad record of ours; two not ingested yet, one of them ours; a dead
    letter of ours. Returns our sequences."""
    stream = await broker.open("trace")
    s = await stream.append([span(n, user=USER if n in (2, 5, 9) else "other") for n in range(10)])
    s += await stream.append([Message("trace.span", b'{"type":"trace.span","payload":{"user":"%s"' % USER.encode())])
    await ingest(broker, stream, store, until=s[-1])
    s += await stream.append([span(20, user=USER), span(21, user="other")])
    (ours,) = (await stream.read(after=s[1], limit=1)).records
    letter = dead_letter(ours, stream="trace", incarnation=stream.incarnation, consumer="c", attempts=5, reason="no")
    await bury(broker, [letter], stream="trace")
    return [s[2], s[5], s[9], s[10], s[11]]


async def everything(broker: Broker, stream: str) -> list[Record]:
    opened = await broker.open(stream, create=False)
    return (await opened.read(after=(await opened.info()).first - 1, limit=1000)).records


@pytest.mark.parametrize("where", ["memory", "log"])
def test_a_user_is_erased_everywhere(tmp_path: Path, where: str) -> None:
    """Stream with its unread end, quarantine, dead letters and store; the others and their totals stay."""

    async def body() -> None:
        url = "memory:" if where == "memory" else f"log:{tmp_path}/log"
        async with mist.connect(url) as broker:
            with Store.open(tmp_path / "t.db") as store:
                ours = await filled(broker, store)
                assert store.count() == 10
                assert store.count("quarantine") == 1
                stream = await broker.open("trace")
                assert (await find(stream, Selector(user=USER))).sequences == ours
                done = await erase(broker, "trace", store, Selector(user=USER), settle_s=0.0, **WHY)
                assert (done.records, done.dead_letters, done.spans, done.damaged) == (5, 1, 3, 0)
                assert done.behind  # nobody ingests: what was not read yet is gone from the stream
                left = await everything(broker, "trace")
                assert len(left) == 8
                assert not [r for r in left if USER.encode() in r.data]
                assert await everything(broker, "trace--dead") == []
                assert store.count() == 7
                assert store.count("quarantine") == 0
                await ingest(broker, stream, store, until=(await stream.info()).last)
                assert store.count() == 8
                assert stats(store).total == 8
                again = await erase(broker, "trace", store, Selector(user=USER), settle_s=0.0, **WHY)
                assert (again.records, again.dead_letters, again.spans, again.behind) == (0, 0, 0, False)
        if where == "log":
            files = [p for p in (tmp_path / "log").rglob("*") if p.is_file()]
            assert not [p for p in files if USER.encode() in p.read_bytes()]

    run(body())


def test_a_trace_and_a_tenant(tmp_path: Path) -> None:
    """The other two selectors; envelopes of other types go with their tenant."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            with Store.open(tmp_path / "t.db") as store:
                stream = await broker.open("trace")
                await stream.append([span(1, trace="t1"), span(2, trace="t2", tenant="acme"), span(3, trace="t1")])
                alert = Envelope.new("trace.alert", {"rule": "slow"}, source="x", tenant="acme")
                await stream.append([Message("trace.alert", encode(alert), alert.id)])
                await ingest(broker, stream, store, until=4)
                assert (await erase(broker, "trace", store, Selector(trace_id="t1"), **WHY)).records == 2
                assert [decode(r.data).tenant for r in await everything(broker, "trace")] == ["acme", "acme"]
                done = await erase(broker, "trace", None, Selector(tenant="acme"), **WHY)
                assert (done.records, done.spans) == (2, 0)
                assert await everything(broker, "trace") == []
                assert store.count() == 1

    run(body())


def test_what_concerns_a_selector() -> None:
    """Columns of spans; other types and unreadable bytes by the whole text, never by a part of it."""
    user = Selector(user="u1")
    assert concerns(record(span(1, user="u1").data), user)
    assert not concerns(record(span(1, user="u12").data), user)
    assert not concerns(record(span(1, user="other", trace="u1").data), user)
    assert concerns(record(b'{"user":"u1"'), user)
    assert not concerns(record(b'{"user":"u12"'), user)
    other = Envelope.new("data.entities", {"for": ["u1"]}, source="x")
    assert concerns(record(other), user)
    assert not concerns(record(Envelope.new("data.entities", {"for": ["u12"]}, source="x")), user)
    packed = Record(1, "s", encode_msgpack(other), 0, "", (("Content-Type", MSGPACK),))
    assert concerns(packed, user)
    quoted = Selector(user='a"b\\c')
    assert concerns(record(b'xx "a\\"b\\\\c" xx'), quoted)


def test_the_audit_record_names_nobody() -> None:
    """Who, when, why and how many, and a digest that only who knows the value can find."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            await (await broker.open("trace")).append([span(1, user=USER)])
            done = await erase(broker, "trace", None, Selector(user=USER), **WHY)
            first, second = await everything(broker, "audit")
            assert USER.encode() not in first.data + second.data
            begun = decode(first.data)
            assert (begun.type, decode(second.data).type) == (BEGUN, DONE)
            told = begun.decode(ErasureBegun)
            assert told.digest == digest(told.salt, "user", USER)
            assert (told.kind, told.by, told.reason, told.stream) == ("user", "ops", WHY["reason"], "trace")
            assert decode(second.data).decode(ErasureDone) == done
            assert done.erasure == told.erasure
            assert await unfinished(broker) == []

    run(body())


@pytest.mark.parametrize("dies_in", ["stream", "dead", "store", "note"])
def test_an_interrupted_erasure_shows_and_can_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    """Whatever fails half-way: the audit stream has a beginning without an end, and running it again finishes."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            with Store.open(tmp_path / "t.db") as store:
                await filled(broker, store)
                stream = await broker.open("trace")
                real = type(stream).erase
                name = {"stream": "trace", "dead": "trace--dead"}.get(dies_in, "")
                with monkeypatch.context() as patch:
                    if name:

                        async def dying(self: Any, sequences: Any) -> int:
                            if self.name == name:
                                raise Unavailable("gone")
                            return await real(self, sequences)

                        patch.setattr(type(stream), "erase", dying)
                    elif dies_in == "store":
                        patch.setattr(Store, "erase", _fails)
                    else:
                        patch.setattr("mist.tools.tokentrace.erase.ErasureDone", _fails)
                    with pytest.raises(Unavailable):
                        await erase(broker, "trace", store, Selector(user=USER), settle_s=0.0, **WHY)
                (begun,) = await unfinished(broker)
                assert begun.kind == "user"
                done = await erase(broker, "trace", store, Selector(user=USER), settle_s=0.0, **WHY)
                assert not [r for r in await everything(broker, "trace") if USER.encode() in r.data]
                assert await everything(broker, "trace--dead") == []
                assert store.count() == 7
                assert store.count("quarantine") == 0
                assert [u.erasure for u in await unfinished(broker)] == [begun.erasure]
                assert done.erasure != begun.erasure

    run(body())


def _fails(*args: Any, **kw: Any) -> Any:
    raise Unavailable("gone")


def test_a_page_under_way_to_the_store_is_erased_too(tmp_path: Path) -> None:
    """An ingest that had read the records before they were erased stores them afterwards; the store is erased from again
    when it has passed."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            with Store.open(tmp_path / "t.db") as store:
                stream = await broker.open("trace")
                await stream.append([span(n, user=USER) for n in range(5)])
                page = await stream.read()
                real = store.position
                calls = 0

                def position(name: str) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == 2:  # only now the page in hand is stored
                        store.apply("trace", stream.incarnation, batch_of(page, 0))
                    found = real(name)
                    return found or Position(name, stream.incarnation, 0)

                store.position = position  # type: ignore[method-assign]
                done = await erase(broker, "trace", store, Selector(user=USER), **WHY)
                assert store.count() == 0
                assert (done.records, done.spans, done.behind) == (5, 5, False)

    run(body())


def test_payloads_beside_the_stream_go_too(tmp_path: Path) -> None:
    """What the selector is about is read there; the file goes unless another record has the same payload."""

    async def body() -> None:
        clock = FakeClock()
        store = Blobs(tmp_path / "blobs", over_bytes=1000, clock=clock)
        async with mist.connect("memory:") as broker, Client(broker, source="t", blobs=store) as client:
            big = payload(1, attrs={"user": USER, "prompt": "p" * 3000})
            other = payload(2, attrs={"user": "other", "prompt": "q" * 3000})
            for span_ in (big, other):
                await client.publish("trace", client.envelope(TRACE_SPAN, span_))
            shared = payload(3, attrs={"user": USER, "prompt": "r" * 3000})
            await client.publish("trace", client.envelope(TRACE_SPAN, shared))
            await client.publish("copy", client.envelope(TRACE_SPAN, shared))
            young = await erase(broker, "trace", None, Selector(trace_id="none"), blobs=store, **WHY)
            assert (young.records, young.blobs, young.blobs_left) == (0, 0, 0)
            clock.advance(61.0)
            done = await erase(broker, "trace", None, Selector(user=USER), blobs=store, **WHY)
            assert (done.records, done.blobs, done.blobs_left) == (2, 1, 0)
            left = [p.read_bytes() for p in (tmp_path / "blobs").rglob("*") if p.is_file()]
            assert not [c for c in left if b"p" * 3000 in c]
            assert [e.envelope.data()["attrs"]["user"] async for e in client.replay("trace")] == ["other"]
            assert len([e async for e in client.replay("copy")]) == 1

    run(body())


def test_refusals_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No reason, the value in the reason, no such stream, a backend that cannot: nothing is erased, nothing noted."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            with pytest.raises(NotFound):
                await erase(broker, "trace", None, Selector(user=USER), **WHY)
            await (await broker.open("trace")).append([span(1, user=USER)])
            for wrong in ({"reason": "", "by": "x"}, {"reason": "x", "by": ""}, {"reason": f"for {USER}", "by": "x"}):
                with pytest.raises(InvalidArgument):
                    await erase(broker, "trace", None, Selector(user=USER), **wrong)
            monkeypatch.setattr(type(broker), "capabilities", msgspec.structs.replace(broker.capabilities, erase=False))
            with pytest.raises(Unsupported):
                await erase(broker, "trace", None, Selector(user=USER), **WHY)
            assert await broker.streams() == ["trace"]
            assert len(await everything(broker, "trace")) == 1

    run(body())
