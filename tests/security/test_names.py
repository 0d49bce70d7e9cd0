"""Names from outside reach nobody else's data, on any backend that is installed.

Tenants and qualifiers go through the one encoder; what is given raw (stream, consumer, checkpoint, subject, filter) is
either refused as InvalidArgument or means exactly itself.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import mist
from mist.broker.base import Broker, Checkpoint, ConsumerConfig, Message, Stream
from mist.errors import InvalidArgument
from mist.protocol.subject import decode_token, encode_token, subject_for, tenant_stream
from mist.testing.conformance.harness import data_of, read_all
from mist.testing.servers import run_nats, run_redis
from tests.campaigns.sites import lacking

NASTY = {
    "star": "*",
    "rest": ">",
    "everything": "*.>",
    "another's subject": "a.events",
    "another's subject, CRLF": "a\r\nSUB > 1\r\n",
    "newline": "a\nevents",
    "NUL": "a\x00",
    "blank": "a events",
    "blank only": " ",
    "tab": "\t",
    "10 kB": "x" * 10_240,
    "10 kB of stars": "*" * 10_240,
    "Cyrillic a": "а",
    "fullwidth a": "ａ",
    "a and a joiner": "a\u200d",
    "decomposed": "e\u0301",
    "composed": "\u00e9",
    "capital": "A",
    "emoji": "\U0001f600",
    "right to left": "\u202ea",
    "dead": "dead",
    "encoded dead": "=64ead",
    "a--dead": "a--dead",
    "--": "--",
    "-": "-",
    "=": "=",
    "encoded star": "=2A",
    "hash tag": "{a}",
    "open tag": "{",
    "key glob": "mist:*",
    "API": "$JS.API.>",
    "inbox": "_INBOX.>",
    "path": "../../etc/passwd",
    "backslash": "a\\b",
    "percent": "%2e%2e",
    "quote": "a'b\"c",
    "SQL": "a'; drop table stream; --",
    "slash": "a/events",
}
VICTIMS = ("a", "b", "events", "e")
BACKENDS = ("memory", "log", "nats", "redis")


@pytest.fixture(scope="module", params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A store of this backend."""
    backend: str = request.param
    if backend in ("nats", "redis") and (why := lacking(backend)):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    with ExitStack() as stack:
        match backend:
            case "memory":
                yield f"memory:names-{secrets.token_hex(4)}"
            case "log":
                yield f"log:{tmp_path_factory.mktemp('names') / 'log'}"
            case "nats":
                yield stack.enter_context(run_nats(own_process=True)).url
            case _:
                yield stack.enter_context(run_redis(own_process=True)).url


def test_tenants_reach_their_own_stream_only(url: str) -> None:
    """Each nasty tenant gets a stream of its own or none; what it appends, reads, consumes, trims and deletes is its own."""

    async def main() -> None:
        base = f"t{secrets.token_hex(3)}"
        async with mist.connect(url) as broker:
            victims = {t: await broker.open(tenant_stream(base, t)) for t in VICTIMS}
            plain = await broker.open(base)
            for t, stream in [*victims.items(), ("", plain)]:
                await stream.append([Message("events", f"secret of {t}".encode(), f"id-{t}")])
            names = {s.name for s in (*victims.values(), plain)}
            for what, tenant in NASTY.items():
                try:
                    name = tenant_stream(base, tenant)
                except InvalidArgument:
                    assert len(tenant) > 100, f"{what} is refused"
                    continue
                assert name not in names, f"{what} has somebody else's stream"
                names.add(name)
                await one_tenant(broker, name, what)
            for t, stream in [*victims.items(), ("", plain)]:
                assert data_of(await read_all(stream)) == [f"secret of {t}".encode()], (
                    f"the stream of {t!r} has changed"
                )
                assert (await stream.info()).records == 1
                assert await stream.consumers() == []
            listed = {n for n in await broker.streams() if n.startswith(base)}
            assert listed == {s.name for s in (*victims.values(), plain)}

    asyncio.run(asyncio.wait_for(main(), 90))


async def one_tenant(broker: Broker, name: str, what: str) -> None:
    stream = await broker.open(name)
    mine = f"of {what}".encode()
    await stream.append([Message("events", mine, "id-a")])
    assert data_of(await read_all(stream)) == [mine]
    consumer = await stream.consumer("all", ConsumerConfig(attempts_max=1))
    deliveries = await consumer.fetch(limit=100, wait_s=5)
    assert [d.record.data for d in deliveries] == [mine]
    await consumer.term(deliveries, reason="to the dead letters")
    await broker.checkpoints.save(
        Checkpoint(stream=name, name="here", incarnation=stream.incarnation, sequence=deliveries[0].record.sequence)
    )
    assert [c.stream for c in await broker.checkpoints.list(name)] == [name]
    await stream.trim(before=(await stream.info()).last + 1)
    await broker.delete(name)
    await broker.delete(f"{name}--dead")


def test_qualifiers_of_subjects_are_themselves_only(url: str) -> None:
    """The filter of one run finds the records of that run, whatever the run is called."""

    async def main() -> None:
        async with mist.connect(url) as broker:
            stream = await broker.open(f"s{secrets.token_hex(3)}")
            runs = {**NASTY, **{v: v for v in VICTIMS}}
            subjects: dict[str, str] = {}
            for what, run in runs.items():
                try:
                    subjects[what] = subject_for("eval.result", run)
                except InvalidArgument:
                    assert len(run) > 50, f"{what} is refused"
            assert len(set(subjects.values())) == len(subjects)
            await stream.append([Message(s, what.encode()) for what, s in subjects.items()])
            for what, subject in subjects.items():
                found = await stream.read(subjects=(subject,), limit=1000)
                assert [r.data for r in found.records] == [what.encode()], f"{what} reads others"

    asyncio.run(asyncio.wait_for(main(), 90))


@pytest.mark.parametrize("what", NASTY)
def test_the_encoder_is_injective_and_plain(what: str) -> None:
    """Nothing of any backend's syntax is in a token, and it can be read back."""
    token = encode_token(NASTY[what])
    assert decode_token(token) == NASTY[what]
    assert not set(token) & set(".*>$/\\ \t\r\n\x00{}[]'\"%:?"), token
    assert "--" not in token
    assert token.isascii()


def test_raw_names_are_refused_or_mean_themselves(url: str) -> None:
    """Streams, consumers, checkpoints: no name reads, lists or changes what another name has."""

    async def main() -> None:
        base = f"r{secrets.token_hex(3)}"
        async with mist.connect(url) as broker:
            victim = await broker.open(base)
            await victim.append([Message("a.events", b"secret", "id")])
            work = await victim.consumer("work")
            kept = Checkpoint(stream=base, name="a", incarnation=victim.incarnation, sequence=1)
            await broker.checkpoints.save(kept)
            for what, name in NASTY.items():
                await raw_stream(broker, name, what)
                await raw_consumer(victim, name, what)
                await raw_checkpoint(broker, victim, name, what)
            assert data_of(await read_all(victim)) == [b"secret"]
            assert (await work.info()).lag == 1
            assert "work" in await victim.consumers()
            found = await broker.checkpoints.load(base, "a")
            assert found is not None
            assert found.sequence == 1

    asyncio.run(asyncio.wait_for(main(), 90))


async def raw_stream(broker: Broker, name: str, what: str) -> None:
    """A name nobody gave to a stream finds none of the streams that are there."""
    for create in (False, True):
        try:
            stream = await broker.open(name, create=create)
        except InvalidArgument:
            continue
        except mist.errors.NotFound:
            continue
        assert data_of(await read_all(stream)) == [], f"{what} opened somebody's stream"
        await broker.delete(name)
    try:
        assert await broker.checkpoints.list(name) == [] or name == "", f"{what} lists others' checkpoints"
    except InvalidArgument:
        return


async def raw_consumer(stream: Stream, name: str, what: str) -> None:
    try:
        consumer = await stream.consumer(name)
    except InvalidArgument:
        return
    assert consumer.name == name
    assert set(await stream.consumers()) == {"work", name}, what
    await consumer.delete()


async def raw_checkpoint(broker: Broker, stream: Stream, name: str, what: str) -> None:
    mine = Checkpoint(stream=stream.name, name=name, incarnation=stream.incarnation, sequence=1)
    try:
        assert await broker.checkpoints.load(stream.name, name) is None, f"{what} finds somebody's checkpoint"
        await broker.checkpoints.save(mine)
        assert {c.name for c in await broker.checkpoints.list(stream.name)} == {"a", name}
        assert await broker.checkpoints.delete(stream.name, name)
    except InvalidArgument:
        return


def test_raw_subjects_and_filters(url: str) -> None:
    """A subject with a wildcard, white space or a control is refused; a filter is a filter or refused, and CRLF in a filter
    never becomes a second command."""

    async def main() -> None:
        async with mist.connect(url) as broker:
            stream = await broker.open(f"f{secrets.token_hex(3)}")
            other = await broker.open(f"{stream.name}-other")
            await other.append([Message("a.events", b"secret")])
            await stream.append([Message("mine", b"mine")])
            for what, text in NASTY.items():
                try:
                    await stream.append([Message(text, what.encode())])
                except InvalidArgument:
                    pass
                else:
                    assert not set(text) & set("*> \t\r\n\x00"), f"{what} was taken for a subject"
                try:
                    found = await stream.read(subjects=(text,), limit=1000)
                except InvalidArgument:
                    continue
                assert all(r.data != b"secret" for r in found.records)
                if text not in (">", "*", "*.>"):
                    assert {r.subject for r in found.records} <= {text}, f"{what} matched more than itself"
            assert data_of(await read_all(other)) == [b"secret"]

    asyncio.run(asyncio.wait_for(main(), 90))


def test_ids_and_headers_cannot_break_out(url: str) -> None:
    """CR, LF and NUL in ids and headers are refused; everything else comes back as it was, in its own record."""

    async def main() -> None:
        async with mist.connect(url) as broker:
            stream = await broker.open(f"h{secrets.token_hex(3)}")
            kept: list[Message] = []
            for i, text in enumerate(NASTY.values()):
                m = Message("s", b"%d" % i, text, (("Name", text), ("Nats-Msg-Id", "x"), ("Mist-Sequence", "1")))
                try:
                    await stream.append([m])
                except InvalidArgument:
                    assert set(text) & set("\r\n\x00") or len(text) > 256
                else:
                    kept.append(m)
            page = await stream.read(limit=1000)
            assert [(r.subject, r.data, r.id, r.headers) for r in page.records] == [
                (m.subject, m.data, m.id, m.headers) for m in kept
            ]

    asyncio.run(asyncio.wait_for(main(), 90))


def test_the_folder_of_a_log_holds_nothing_outside_it(tmp_path: Path) -> None:
    """No name of a stream, consumer or checkpoint makes a file anywhere else."""

    async def main() -> None:
        async with mist.connect(f"log:{tmp_path / 'in' / 'log'}") as broker:
            for name in NASTY.values():
                try:
                    stream = await broker.open(tenant_stream("t", name))
                    await stream.append([Message("s", b"x")])
                    await broker.open(name)
                except InvalidArgument:
                    continue

    asyncio.run(main())
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["log"]
