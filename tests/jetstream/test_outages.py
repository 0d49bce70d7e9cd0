"""The server goes away: killed and started again, stopped; a leader is lost; workers crash between a nak and its burial."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from typing import cast

import pytest

import mist
from mist.broker.base import Broker, Checkpoint, ConsumerConfig, Message, Stream, StreamConfig, header
from mist.broker.deadletter import ATTEMPTS, SEQUENCE
from mist.errors import Ambiguous, MistError, PartialAppend, TimedOut, Unavailable
from mist.kit.local import NatsServer
from mist.protocol.subject import dead_stream
from mist.testing.conformance.harness import data_of, read_all
from mist.testing.servers import run_nats, run_nats_cluster
from mist_nats import link
from mist_nats.stream import NatsStream
from tests.conftest import run
from tests.jetstream.server import shared_url


async def write_until(stream: Stream, stop: asyncio.Event, acked: list[bytes], who: str) -> None:
    """Append with ids for ever, repeating what is unsure, and note what was acknowledged."""
    n = 0
    while not stop.is_set():
        batch = [Message("a", b"%b.%d.%d" % (who.encode(), n, i), f"{who}.{n}.{i}") for i in range(5)]
        while True:
            try:
                await stream.append(batch)
                break
            except (Ambiguous, Unavailable, TimedOut, PartialAppend):
                await asyncio.sleep(0.05)
        acked += [m.data for m in batch]
        n += 1
        await asyncio.sleep(0.002)  # always something under way, and most of the machine free for the servers


@pytest.mark.parametrize("sync", ["always", "2m"])
def test_a_kill_under_appends_loses_and_doubles_nothing(sync: str) -> None:
    """kill -9 and a restart in the middle of appends: every acknowledged record is there, once, in its writer's order."""

    async def go(server: NatsServer) -> None:
        async with mist.connect(server.url) as broker:
            stream = await broker.open("s")
            acked: list[list[bytes]] = [[], []]
            stop = asyncio.Event()
            writers = [asyncio.create_task(write_until(stream, stop, acked[w], str(w))) for w in range(2)]
            following = asyncio.create_task(follow(stream, stop))
            for _ in range(2):
                await asyncio.sleep(0.3)
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
                before = sum(map(len, acked))
                async with asyncio.timeout(20):
                    while sum(map(len, acked)) < before + 20:
                        await asyncio.sleep(0.02)
            stop.set()
            await asyncio.gather(*writers)
            await stream.append([Message("end", b"end")])
            stored = data_of(await read_all(stream))
            assert max(Counter(stored).values()) == 1
            for w in range(2):
                mine = [d for d in stored if d.startswith(b"%d." % w)]
                assert mine == acked[w]
            assert await asyncio.wait_for(following, 20) == stored

    with run_nats(own_process=True, sync_interval=sync) as server:
        run(go(server), 90)


async def follow(stream: Stream, stop: asyncio.Event) -> list[bytes]:
    """Waiting reads to the record of subject `end`, over every outage."""
    out: list[bytes] = []
    after = 0
    while True:
        try:
            page = await stream.read(after=after, wait_s=5.0)
        except (Unavailable, TimedOut):
            await asyncio.sleep(0.05)
            continue
        out += [r.data for r in page.records]
        after = page.scanned
        if page.records and page.records[-1].subject == "end":
            return out


def test_a_kill_under_a_consumer_delivers_everything() -> None:
    """A worker over a killed server gets every record at least once. The server writes acks down a moment after it
    confirmed them, so that a kill of the server itself may bring acked ones again; before the kill none comes."""

    async def go(server: NatsServer) -> None:
        async with mist.connect(server.url) as broker:
            stream = await broker.open("s")
            sequences = [s for n in range(20) for s in await stream.append([Message("a", b"%d" % n)] * 20)]
            consumer = await stream.consumer("c", ConsumerConfig(ack_wait_s=2.0, attempts_max=0))
            settled: set[int] = set()
            killed = False
            async with asyncio.timeout(60):
                while True:
                    try:
                        if settled == set(sequences) and (await consumer.info()).lag == 0:
                            break
                        got = await consumer.fetch(limit=30, wait_s=2.0)
                        again = settled & {d.record.sequence for d in got}
                        assert killed or not again, "an acked record came again"
                        if len(settled) > 150 and not killed:
                            killed = True
                            await asyncio.to_thread(server.kill)
                            await asyncio.to_thread(server.start)
                        if await consumer.ack(got) == len(got):
                            settled |= {d.record.sequence for d in got}
                    except (Unavailable, TimedOut):
                        await asyncio.sleep(0.05)

    with run_nats(own_process=True) as server:
        run(go(server), 90)


def test_a_stopped_server_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP: calls end with an error in bounded time; after SIGCONT everything goes on."""
    for module in ("api", "publish", "consumer", "direct", "stream", "checkpoints", "broker", "link"):
        monkeypatch.setattr(f"mist_nats.{module}.CALL_S", 1.0)

    async def go(server: NatsServer) -> None:
        async with mist.connect(server.url) as broker:
            stream = await broker.open("s")
            await stream.append([Message("a", b"1", "1")])
            server.pause()
            with pytest.raises(Ambiguous) as unsure:
                await stream.append([Message("a", b"2", "2")])
            assert unsure.value.ids == ["2"]
            with pytest.raises((TimedOut, Unavailable)):
                await stream.read()
            with pytest.raises((TimedOut, Unavailable)):
                await broker.ping()
            server.resume()
            async with asyncio.timeout(20):
                while True:
                    try:
                        await stream.append([Message("a", b"2", "2")])
                        break
                    except (Ambiguous, Unavailable, TimedOut):
                        await asyncio.sleep(0.1)
            assert data_of(await read_all(stream)) == [b"1", b"2"]

    with run_nats(own_process=True) as server:
        run(go(server), 60)


def test_a_half_open_connection_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers no pings loses us: we connect again when it can, though nothing closed the connection."""
    monkeypatch.setattr(link, "PING_S", 0.1)

    async def go(server: NatsServer) -> None:
        async with mist.connect(server.url) as broker:
            stream = await broker.open("s")
            first = broker.link.generation  # type: ignore[attr-defined]
            server.pause()
            await asyncio.sleep(1.0)
            server.resume()
            async with asyncio.timeout(20):
                while broker.link.generation == first:  # type: ignore[attr-defined]
                    await asyncio.sleep(0.05)
            assert await stream.append([Message("a", b"1")]) == [1]

    with run_nats(own_process=True) as server:
        run(go(server), 60)


def test_closing_while_the_server_is_stopped_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """aclose does not wait for a server that reads nothing."""
    for module in ("publish", "broker", "link"):
        monkeypatch.setattr(f"mist_nats.{module}.CALL_S", 1.0)

    async def go(server: NatsServer) -> None:
        broker = await mist.connect(server.url)
        stream = await broker.open("s")
        server.pause()
        big = [Message("a", b"x" * 1_000_000) for _ in range(20)]
        writing = asyncio.create_task(stream.append(big))
        await asyncio.sleep(0.1)
        async with asyncio.timeout(15):
            await broker.aclose()
        (ended,) = await asyncio.gather(writing, return_exceptions=True)
        assert isinstance(ended, MistError)
        server.resume()

    with run_nats(own_process=True) as server:
        run(go(server), 60)


def test_a_question_that_died_with_its_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cluster the server that has the question may be killed, and ours is not: nobody says anything, the next leader
    would answer. What changes something is not repeated."""
    monkeypatch.setattr("mist_nats.link.AGAIN_S", 0.05)
    monkeypatch.setattr("mist_nats.direct.AGAIN_S", 0.05)
    gone: list[bytes] = []

    async def go() -> None:
        async with mist.connect(shared_url()) as broker:
            stream = cast(NatsStream, await broker.open(f"again-{secrets.token_hex(4)}"))
            await stream.append([Message("a", b"x")])
            send = stream.shared.api.link.send

            def dies(data: bytes) -> None:
                if any(q in data and not any(q in g for g in gone) for q in (b"STREAM.INFO", b"DIRECT.GET", b"PURGE")):
                    gone.append(data)
                else:
                    send(data)

            monkeypatch.setattr(stream.shared.api.link, "send", dies)
            async with asyncio.timeout(5):
                assert (await stream.info()).last == 1
                assert len((await stream.read()).records) == 1
            monkeypatch.setattr("mist_nats.api.CALL_S", 0.2)
            with pytest.raises(TimedOut):
                await stream.trim(before=2)
            assert len(gone) == 3
            await broker.delete(stream.name)

    run(go())


def test_attempts_are_used_up_over_a_crash() -> None:
    """A worker that crashed after the last attempt: the next one buries the record instead of handing it out."""

    async def go() -> None:
        name = f"out-{secrets.token_hex(4)}"
        async with mist.connect(shared_url()) as broker:
            stream = await broker.open(name)
            (bad, good) = await stream.append([Message("a", b"bad"), Message("a", b"good")])
            config = ConsumerConfig(ack_wait_s=0.5, attempts_max=2)
        for attempt in (1, 2):  # each worker takes it and is gone
            async with mist.connect(shared_url()) as broker:
                consumer = await (await broker.open(name)).consumer("c", config)
                seen: dict[int, int] = {}
                async with asyncio.timeout(20):
                    while bad not in seen:
                        seen |= {d.record.sequence: d.attempt for d in await consumer.fetch(limit=1, wait_s=1.0)}
                assert seen[bad] == attempt
        async with mist.connect(shared_url()) as broker:
            consumer = await (await broker.open(name)).consumer("c", config)
            got: list[int] = []
            async with asyncio.timeout(20):
                while dead_stream(name) not in await broker.streams() or good not in got:
                    got += [d.record.sequence for d in await consumer.fetch(wait_s=0.3) if await consumer.ack([d])]
            assert bad not in got
            page = await (await broker.open(dead_stream(name))).read()
            assert header(page.records[0].headers, SEQUENCE) == str(bad)
            assert header(page.records[0].headers, ATTEMPTS) == "2"
            await broker.delete(dead_stream(name))
            await broker.delete(name)

    run(go(), 60)


def test_another_connection_deletes_and_makes_again() -> None:
    """Handles of a stream or consumer that somebody else deleted and made again refuse; they never touch the new one."""

    async def settle(broker: Broker) -> None:
        await broker.ping()
        await asyncio.sleep(0.05)  # the server's advisory is on its way

    async def go() -> None:
        name = f"stale-{secrets.token_hex(4)}"
        async with mist.connect(shared_url()) as one, mist.connect(shared_url()) as two:
            mine = await one.open(name)
            await mine.append([Message("a", b"old")])
            consumer = await mine.consumer("c")
            held = await consumer.fetch(wait_s=5)
            theirs = await (await two.open(name)).consumer("c")
            await theirs.delete()
            await (await two.open(name)).consumer("c")
            await settle(one)
            with pytest.raises(mist.errors.NotFound):
                await consumer.ack(held)
            waiting = asyncio.create_task(mine.read(after=1, wait_s=30))
            await asyncio.sleep(0.1)
            await two.delete(name)
            new = await two.open(name)
            with pytest.raises(mist.errors.NotFound):
                await asyncio.wait_for(waiting, 10)
            await settle(one)
            for call in (mine.append([Message("a", b"x")]), mine.read(), mine.info(), mine.trim(before=1)):
                with pytest.raises(mist.errors.NotFound):
                    await call
            assert (await new.info()).records == 0
            await two.delete(name)

    run(go(), 60)


@pytest.mark.slow
def test_a_cluster_loses_its_leader_and_nothing_else() -> None:
    """Three replicas: the stream's leader is killed under appends, and a follower later; nothing acknowledged is lost."""

    async def go(servers: list[NatsServer]) -> None:
        async with mist.connect(servers[0].url) as broker:
            stream = await broker.open("s", config=StreamConfig(durability="replicated"))
            info = await stream.info()
            assert info.durability == "replicated"
            acked: list[list[bytes]] = [[]]
            stop = asyncio.Event()
            writer = asyncio.create_task(write_until(stream, stop, acked[0], "0"))
            following = asyncio.create_task(follow(stream, stop))
            await asyncio.sleep(0.5)
            leader = (await stream.state()).cluster.leader  # type: ignore[attr-defined]
            for node in (next(s for s in servers if f'"{leader}"' in (s.directory / "nats.conf").read_text().split("\n")[0]),
                         servers[1]):  # fmt: skip
                before = len(acked[0])
                await asyncio.to_thread(node.kill)
                async with asyncio.timeout(40):
                    while len(acked[0]) < before + 20:
                        await asyncio.sleep(0.05)
                await asyncio.to_thread(node.launch)
                await asyncio.to_thread(node.await_answer)
            stop.set()
            await writer
            while True:
                try:
                    await stream.append([Message("end", b"end", "end")])
                    break
                except (Ambiguous, Unavailable, TimedOut):
                    await asyncio.sleep(0.1)
            stored = await asyncio.wait_for(following, 40)
            assert stored[:-1] == acked[0]
            saved = await broker.checkpoints.save(
                Checkpoint(stream="s", name="c", incarnation=stream.incarnation, sequence=7)
            )
            assert await broker.checkpoints.load("s", "c") == saved

    with run_nats_cluster() as servers:
        run(go(servers), 110)
