"""Servers as they are out there: passwords, ACL users, hidden settings, no memory, other durabilities, gone and back."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from pathlib import Path

import pytest
from conftest import run
from redis import Redis

import mist
from mist.broker.base import Checkpoint, ConsumerConfig, Message, Record, Stream, StreamConfig
from mist.errors import Ambiguous, InvalidArgument, MistError, NotAuthorised, StorageFull, Unavailable

from .conftest import Start

SECRET = "hunter2-geheim"


def batch(start: int, count: int = 10) -> list[Message]:
    return [Message("a", b"%d" % n, f"i{n}") for n in range(start, start + count)]


def test_a_password_and_where_it_shows(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the URL, a file or the environment; wrong or missing is NotAuthorised; it stands in no error and no URL."""
    server = start(extra=["--requirepass", SECRET])
    host = f"127.0.0.1:{server.port}"
    file = tmp_path / "password"
    file.write_text(SECRET + "\n")

    async def body() -> None:
        for url in (
            f"redis://:{SECRET}@{host}/0",
            f"redis://default:{SECRET}@{host}",
            f"redis://{host}?password_file={file}",
        ):
            async with mist.connect(url) as broker:
                assert SECRET not in broker.url
                assert SECRET not in repr(broker)
                await (await broker.open("s")).append(batch(0))
        for url in (f"redis://{host}", f"redis://:wrong-{SECRET}@{host}"):
            with pytest.raises(NotAuthorised) as refused:
                await mist.connect(url)
            assert SECRET not in str(refused.value)
        monkeypatch.setenv("MIST_REDIS_PASSWORD", SECRET)
        async with mist.connect(f"redis://{host}") as broker:
            assert await broker.streams() == ["s"]

    run(body())


def test_an_acl_user(start: Start) -> None:
    """A user who may do what docs/how-to/use-redis.md lists can do everything; one without a right is told."""
    server = start()
    with Redis(port=server.port) as admin:
        admin.execute_command(
            "ACL", "SETUSER", "mist", "on", f">{SECRET}", "~*", "resetchannels", "-@all", "+@stream", "+@hash", "+@set",
            "+@sortedset", "+@scripting", "+@transaction", "+@connection", "+ping", "+type", "+exists", "+unlink", "+expire",
            "+pexpire", "+scan", "+time", "+info", "+config|get", "+memory|usage", "+command|info",
        )  # fmt: skip
        admin.execute_command(
            "ACL", "SETUSER", "reader", "on", f">{SECRET}", "~*", "-@all", "+@read", "+@connection", "+info"
        )

    async def body() -> None:
        async with mist.connect(f"redis://mist:{SECRET}@127.0.0.1:{server.port}") as broker:
            stream = await broker.open("s")
            await stream.append(batch(0))
            assert (await stream.info()).warnings == ()
            consumer = await stream.consumer("c")
            got = await consumer.fetch()
            assert await consumer.nak(got[:1]) == 1
            assert await consumer.ack(got) == 9
            await stream.trim(before=3)
            await broker.checkpoints.save(Checkpoint(stream="s", name="c", incarnation=stream.incarnation, sequence=1))
            assert await broker.streams() == ["s"]
        with pytest.raises(NotAuthorised):
            async with mist.connect(f"redis://reader:{SECRET}@127.0.0.1:{server.port}") as broker:
                await broker.open("other")
        async with mist.connect(f"redis://mist:{SECRET}@127.0.0.1:{server.port}") as broker:
            await broker.delete("s")

    run(body())


def test_settings_that_are_hidden(start: Start) -> None:
    """Only what is certain is stated, and the warning says which right shows more."""
    server = start(appendfsync="always")
    with Redis(port=server.port) as admin:
        admin.execute_command("ACL", "SETUSER", "some", "on", f">{SECRET}", "~*", "+@all", "-config")

    async def body() -> None:
        async with mist.connect(f"redis://some:{SECRET}@127.0.0.1:{server.port}") as broker:
            info = await (await broker.open("s")).info()
            assert info.durability == "process"
            assert any("config|get" in w for w in info.warnings)
        async with mist.connect(server.url) as broker:
            info = await (await broker.open("sure")).info()
            assert (info.durability, info.warnings) == ("power", ())

    run(body())


@pytest.mark.parametrize(
    ("appendfsync", "level"), [("off", "memory"), ("no", "process"), ("everysec", "process"), ("always", "power")]
)
def test_the_durability_in_force(start: Start, appendfsync: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the server is set; more than it gives is refused with what to set, and a later change is a warning."""
    # as if this server's WAITAOF waited (test_waitaof.py): what a stream does with one that does is tested here
    monkeypatch.setattr("mist_redis.durability._waits", lambda server: True)
    server = start(appendfsync=appendfsync)

    async def body() -> None:
        async with mist.connect(server.url) as broker:
            stream = await broker.open("s")
            info = await stream.info()
            assert (info.durability, info.config.durability) == (level, level)
            assert any("keeps nothing on disk" in w for w in info.warnings) == (level == "memory")
            with pytest.raises(InvalidArgument, match="replicas"):
                await broker.open("r", config=StreamConfig(durability="replicated"))
            if level == "memory":
                with pytest.raises(InvalidArgument) as refused:
                    await broker.open("p", config=StreamConfig(durability="power"))
                assert "appendonly" in str(refused.value)
                return
            if appendfsync == "no":
                with pytest.raises(InvalidArgument, match="appendfsync is no"):
                    await broker.open("p", config=StreamConfig(durability="power"))
                return
            # with WAITAOF an everysec server gives `power` to a stream that waits for the disk
            strong = await broker.open("p", config=StreamConfig(durability="power"))
            assert await strong.append(batch(0)) == list(range(1, 11))
            assert (await strong.info()).durability == "power"
            with Redis(port=server.port) as admin:
                admin.config_set("appendonly", "no")
            info = await stream.info()
            assert info.durability == "memory"
            assert any(f"made for durability {level}" in w for w in info.warnings)
            if appendfsync == "everysec":
                with pytest.raises(Ambiguous) as unsure:
                    await strong.append(batch(10))
                assert unsure.value.ids[0] == "i10"

    run(body())


def test_no_memory_left(start: Start) -> None:
    """Appends are refused as StorageFull and change nothing; reading and acking go on; afterwards all is well."""
    server = start()

    async def body() -> None:
        async with mist.connect(server.url) as broker:
            stream = await broker.open("s")
            consumer = await stream.consumer("c", ConsumerConfig(ack_wait_s=300.0))
            await stream.append(batch(0))
            with Redis(port=server.port) as admin:
                admin.config_set("maxmemory", 1)
                with pytest.raises(StorageFull):
                    await stream.append(batch(10))
                assert len((await stream.read()).records) == 10
                got = await consumer.fetch()
                assert await consumer.ack(got) == 10
                admin.config_set("maxmemory", 0)
            assert await stream.append(batch(10)) == list(range(11, 21))

    run(body())


def test_an_evicting_server_is_warned_about(start: Start) -> None:
    server = start(extra=["--maxmemory-policy", "allkeys-lru"])

    async def body() -> None:
        async with mist.connect(server.url) as broker:
            assert any("evict" in w for w in (await (await broker.open("s")).info()).warnings)

    run(body())


def test_nobody_there() -> None:
    async def body() -> None:
        with pytest.raises(Unavailable):
            await mist.connect("redis://127.0.0.1:1/0?connect_timeout_s=1")
        with pytest.raises(Unavailable):
            await mist.connect("redis+sentinel://127.0.0.1:1/x?connect_timeout_s=1")
        with pytest.raises(Unavailable):
            await mist.connect("redis+cluster://127.0.0.1:1?connect_timeout_s=1")

    run(body())


async def keep_on(stream: Stream, done: asyncio.Event, sent: list[int]) -> int:
    """Append ten messages after another until told to stop, repeating every failed batch; how often it failed."""
    failures = 0
    n = 0
    while not done.is_set():
        try:
            await stream.append(batch(n))
        except (Ambiguous, Unavailable):
            failures += 1
            await asyncio.sleep(0.02)
            continue
        sent.extend(range(n, n + 10))
        n += 10
        await asyncio.sleep(0)
    return failures


async def drain(stream: Stream, done: asyncio.Event, seen: dict[int, int]) -> None:
    """Consume and ack everything until `done` and nothing is left."""
    consumer = None
    while True:
        try:
            consumer = consumer or await stream.consumer("c", ConsumerConfig(ack_wait_s=1.0, attempts_max=0))
            got = await consumer.fetch(limit=50, wait_s=0.2)
            for d in got:
                seen[int(d.record.data)] = d.record.sequence
            await consumer.ack(got)
            if done.is_set() and (await consumer.info()).lag == 0:
                return
        except MistError:
            await asyncio.sleep(0.05)


def check_whole(records: list[Record], sent: list[int]) -> None:
    """Everything acknowledged is there, once, in order."""
    numbers = [int(r.data) for r in records]
    assert numbers == sorted(set(numbers))
    assert set(sent) <= set(numbers)


async def read_all(stream: Stream) -> list[Record]:
    out: list[Record] = []
    while True:
        page = await stream.read(after=out[-1].sequence if out else 0, limit=1000)
        out += page.records
        if page.scanned >= page.last:
            return out


def test_killed_and_started_again(start: Start) -> None:
    """A server that is killed under appends and a consumer, twice: nothing acknowledged is lost, nothing doubled."""
    server = start()

    async def body() -> None:
        done, drained = asyncio.Event(), asyncio.Event()
        sent: list[int] = []
        seen: dict[int, int] = {}
        async with mist.connect(server.url) as broker:
            stream = await broker.open("s")
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(keep_on(stream, done, sent))
                group.create_task(drain(stream, drained, seen))
                for _ in range(2):
                    await asyncio.sleep(0.3)
                    server.kill()
                    await asyncio.sleep(0.2)
                    await asyncio.to_thread(server.start)
                    had = len(sent)
                    while len(sent) < had + 100:
                        await asyncio.sleep(0.02)
                done.set()
                assert await writing > 0
                drained.set()
            check_whole(await read_all(stream), sent)
            assert set(seen) >= set(sent)

    run(body(), 60)


def test_paused_longer_than_the_timeout(start: Start) -> None:
    """A stopped server answers nothing: calls end in time, appends as Ambiguous, and all is well afterwards."""
    server = start()

    async def body() -> None:
        async with mist.connect(f"{server.url}?timeout_s=0.5&connect_timeout_s=0.5") as broker:
            stream = await broker.open("s")
            await stream.append(batch(0))
            os.kill(server.pid, signal.SIGSTOP)
            try:
                with pytest.raises(Ambiguous) as unsure:
                    await stream.append(batch(10))
                assert unsure.value.ids == [f"i{n}" for n in range(10, 20)]
                with pytest.raises(Unavailable):
                    await stream.read()
            finally:
                os.kill(server.pid, signal.SIGCONT)
            assert await stream.append(batch(10)) == list(range(11, 21))
            assert len((await stream.read()).records) == 20

    run(body())


def test_a_waiting_read_survives_a_restart(start: Start) -> None:
    """A reader that waits while the server goes and comes gets an error it may repeat, or the record."""
    server = start()

    async def body() -> None:
        async with mist.connect(server.url) as broker:
            stream = await broker.open("s")
            await stream.append(batch(0))

            async def follow() -> bytes:
                while True:
                    try:
                        page = await stream.read(after=10, wait_s=30)
                    except Unavailable:
                        await asyncio.sleep(0.05)
                        continue
                    if page.records:
                        return page.records[0].data

            following = asyncio.create_task(follow())
            await asyncio.sleep(0.2)
            await asyncio.to_thread(server.restart)
            await stream.append(batch(10, 1))
            assert await asyncio.wait_for(following, 20) == b"10"

    run(body())


def test_a_server_that_forgot_its_scripts(start: Start) -> None:
    """SCRIPT FLUSH, or a new primary: they are sent again by themselves."""
    server = start()

    async def body() -> None:
        async with mist.connect(server.url) as broker:
            stream = await broker.open("s")
            consumer = await stream.consumer("c")
            for n in range(3):
                with Redis(port=server.port) as admin:
                    admin.script_flush()
                await stream.append(batch(10 * n))
                assert len(await consumer.fetch()) == 10

    run(body())


def test_a_prefix_keeps_programs_apart(start: Start) -> None:
    """Keys, listings and checkpoints of two prefixes do not meet."""
    server = start()

    async def body() -> None:
        async with mist.connect(f"{server.url}?prefix=one:") as one, mist.connect(f"{server.url}?prefix=two:") as two:
            name = f"s{secrets.token_hex(3)}"
            stream = await one.open(name)
            await stream.append(batch(0))
            await one.checkpoints.save(Checkpoint(stream=name, name="c", incarnation=stream.incarnation, sequence=1))
            assert await one.streams() == [name]
            assert await two.streams() == []
            assert await two.checkpoints.list() == []
            with Redis(port=server.port) as plain:
                assert all(k.startswith(b"one:") for k in plain.scan_iter())
                assert plain.xlen(f"one:{name}") == 10

    run(body())
