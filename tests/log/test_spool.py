"""A spool takes what is published while its broker is away, and gives it on once, in order, whatever is killed."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from log import shaky

import mist
import mist.sync
from mist.broker.base import Broker, Message, Record, StreamConfig
from mist.errors import Closed, Conflict, InvalidArgument, NotFound, StorageFull, TooLarge, Unsupported
from mist.log.files import Files
from mist.log.spool import SpoolBroker, SpoolInfo
from mist.log.spooldir import directory
from mist.protocol.codec import decode
from mist.protocol.url import parse_url
from mist.testing.conformance import BrokerConformance
from mist.transport import dial

ROOT = Path(__file__).parents[2]
_names = itertools.count(1)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> shaky.World:
    """A shaky broker of the test's own."""
    shaky.register(monkeypatch)
    return shaky.world(f"w{next(_names)}-{os.getpid()}")


@pytest.fixture
def url(world: shaky.World, tmp_path: Path) -> str:
    return f"spool+shaky:{world.name}?spool={tmp_path / 'spool'}"


async def spool(url: str, **options: Any) -> SpoolBroker:
    broker = await mist.connect(url, **options)
    assert isinstance(broker, SpoolBroker)
    return broker


async def behind(world: shaky.World, stream: str = "s") -> list[Record]:
    """What the broker behind holds."""
    async with mist.connect(f"memory:shaky-{world.name}") as broker:
        return await content(broker, stream)


async def content(broker: Broker, stream: str) -> list[Record]:
    out: list[Record] = []
    opened = await broker.open(stream, create=False)
    after = 0
    while True:
        page = await opened.read(after=after, limit=1000)
        out += page.records
        after = page.scanned
        if after >= page.last:
            return out


def numbered(first: int, count: int) -> list[Message]:
    return [Message("a.b", b"%d" % n, f"i{n}", (("k", str(n)),)) for n in range(first, first + count)]


def test_what_is_appended_arrives_as_it_was(url: str, world: shaky.World) -> None:
    """Subject, data, id and headers, in order; a message without an id gets one, the same at every try."""

    async def body() -> None:
        async with await spool(url) as broker:
            stream = await broker.open("s")
            assert await stream.append(numbered(1, 3)) == [1, 2, 3]
            assert await stream.append([Message("x", b"no id"), *numbered(2, 1)]) == [4, 2]
            assert await stream.append([]) == []
            await broker.flush()
            info = await stream.info()
            assert isinstance(info, SpoolInfo)
            assert (info.records, info.last, info.durability, info.destination) == (
                0,
                4,
                "power",
                f"shaky:{world.name}",
            )
            assert (info.figures.forwarded, info.warnings) == (4, ())
        records = await behind(world)
        assert [Message(r.subject, r.data, r.id, r.headers) for r in records[:3]] == numbered(1, 3)
        assert records[3].id == f"spool-{stream.incarnation}-4"
        assert len(records) == 4

    run(body())


def test_a_broker_that_is_away_keeps_nobody_waiting(url: str, world: shaky.World) -> None:
    """Away at the start: appends are taken, told as a backlog, kept over a restart, and forwarded when it is there."""
    world.away = True

    async def first() -> None:
        async with await spool(url) as broker:
            stream = await broker.open("s")
            await stream.append(numbered(1, 500))
            info = await stream.info()
            assert (info.records, info.first, info.last) == (500, 1, 500)
            assert "500 records wait here" in info.warnings[0]
            while broker.forwarder.error == "":
                await asyncio.sleep(0.01)
            facts = {f.what: f for f in await broker.describe()}
            assert "is away" in facts["forwarding"].warning

    async def second() -> None:
        async with await spool(url) as broker:
            stream = await broker.open("s")
            assert (await stream.info()).records == 500
            await stream.append(numbered(501, 10))
            world.away = False
            await broker.flush()
        assert [r.id for r in await behind(world)] == [f"i{n}" for n in range(1, 511)]

    run(first())
    run(second())


@pytest.mark.parametrize("window", [True, False])
def test_an_unreliable_broker_gets_everything_once(url: str, world: shaky.World, window: bool) -> None:
    """Lost answers, parts of batches, spells of absence, and lives that end without a word in between."""
    world.trouble = 0.4
    if not window:
        world.config = StreamConfig(dedupe_window_s=0, dedupe_ids_max=0)
    total = 300

    async def life(number: int) -> None:
        rng = random.Random(number)
        broker = await spool(url)
        stream = await broker.open("s")
        at = (await stream.info()).last
        while at < total and rng.random() < 0.9:
            count = min(rng.randint(1, 9), total - at)
            await stream.append(numbered(at + 1, count))
            at += count
            await asyncio.sleep(0.002 * rng.random())
        assert broker._forwarding is not None
        if number < 6:
            broker._forwarding.cancel()  # no last save, no drain
            await asyncio.wait({broker._forwarding})
            broker._forwarding = None
        else:
            while at < total:
                await stream.append(numbered(at + 1, 1))
                at += 1
            await broker.flush()
        await broker.aclose()

    for number in range(7):
        run(life(number))
    assert [r.id for r in run(behind(world))] == [f"i{n}" for n in range(1, total + 1)]


def test_a_stream_that_forgot_the_ids_is_looked_through(url: str, world: shaky.World) -> None:
    """Killed between the broker's answer and the save, and back after the window: nothing is doubled."""

    async def body() -> None:
        world.config = StreamConfig(dedupe_window_s=0.01)
        broker = await spool(url)
        stream = await broker.open("s")
        await stream.append(numbered(1, 5))
        await broker.flush()
        await asyncio.sleep(0.6)  # its place is saved
        broker.forwarder._savers.clear()
        await stream.append(numbered(6, 5))
        while len(await behind(world)) < 10:
            await asyncio.sleep(0.005)
        assert broker._forwarding is not None
        broker._forwarding.cancel()
        await asyncio.wait({broker._forwarding})
        broker._forwarding = None
        await broker.aclose()
        await asyncio.sleep(0.05)
        async with await spool(url) as broker:
            await (await broker.open("s")).append(numbered(11, 1))
            await broker.flush()
        assert [r.id for r in await behind(world)] == [f"i{n}" for n in range(1, 12)]

    run(body())


def test_one_forwards_and_another_takes_over(url: str, world: shaky.World) -> None:
    """Two that have the spool open: one holds the lock, both publish, order is that of the spool; then the other goes on."""

    async def body() -> None:
        one, other = await spool(url), await spool(url)
        while not one.forwarder.ours:
            await asyncio.sleep(0.01)
        for n in range(1, 41, 2):
            await (await one.open("s")).append(numbered(n, 1))
            await (await other.open("s")).append(numbered(n + 1, 1))
        assert not other.forwarder.ours
        await other.flush()
        assert other.spool.forwarding() is not None
        await one.aclose()
        await (await other.open("s")).append(numbered(41, 1))
        await other.flush()
        assert other.forwarder.ours
        await other.aclose()
        assert [r.id for r in await behind(world)] == [f"i{n}" for n in range(1, 42)]

    run(body())


def test_a_full_spool_refuses_or_drops_as_it_was_told(url: str, world: shaky.World) -> None:
    """Refuse: StorageFull names the broker that is away, and room comes back with it. Drop: the oldest go, counted."""
    big = [Message("a", b"x" * 1000, f"b{n}") for n in range(64)]

    async def refuse() -> None:
        world.away = True
        async with await spool(f"{url}&spool_bytes=300000&spool_drain=0") as broker:
            stream = await broker.open("s")
            taken = 0
            with pytest.raises(StorageFull, match="spool of stream s is full"):  # noqa: PT012
                for n in range(100):
                    await stream.append([Message(m.subject, m.data, f"{m.id}-{n}") for m in big])
                    taken += len(big)
            assert taken >= 128
            world.away = False
            await broker.flush()
            await stream.append(numbered(1, 1))
            await broker.flush()
            assert len(await behind(world)) == taken + 1

    async def drop() -> None:
        world.away = True
        async with await spool(f"{url}2&spool_bytes=300000&spool_full=drop_oldest&spool_drain=0") as broker:
            stream = await broker.open("d")
            for n in range(20):
                await stream.append([Message(m.subject, m.data, f"{m.id}-{n}") for m in big])
            world.away = False
            await broker.flush()
            info = await stream.info()
            assert info.figures.dropped > 0
            assert info.figures.dropped + info.figures.forwarded == 20 * 64
            assert "were dropped" in info.warnings[-1]
            records = await behind(world, "d")
            assert len(records) == info.figures.forwarded
            assert records[-1].id == "b63-19"

    run(refuse())
    run(drop())


class _FullDisk(Files):
    """No room for segments while `full`."""

    full = False

    def pwritev(self, fd: int, parts: Sequence[bytes | bytearray], offset: int) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().pwritev(fd, parts, offset)


def test_a_full_disk_is_told_and_what_was_taken_goes_on(url: str, world: shaky.World) -> None:
    """ENOSPC: StorageFull for the new ones, the others are forwarded, and with room all is well again."""

    async def body() -> None:
        files = _FullDisk()
        async with await spool(url, log={"files": files}) as broker:
            stream = await broker.open("s")
            await stream.append(numbered(1, 10))
            files.full = True
            with pytest.raises(StorageFull):
                await stream.append(numbered(11, 1))
            await broker.flush()
            files.full = False
            await stream.append(numbered(11, 1))
            await broker.flush()
        assert [r.id for r in await behind(world)] == [f"i{n}" for n in range(1, 12)]

    run(body())


def test_what_the_broker_never_takes_becomes_a_dead_letter(url: str, world: shaky.World, tmp_path: Path) -> None:
    """Too large for it, found out after it was acknowledged: the others arrive, this one is kept and told."""
    world.size_bytes_max = 100
    world.away = True

    async def body() -> None:
        async with await spool(url) as broker:
            stream = await broker.open("s")
            await stream.append([*numbered(1, 2), Message("a", b"x" * 101, "big"), *numbered(3, 2)])
            world.away = False
            await broker.flush()
            info = await stream.info()
            assert (info.figures.forwarded, info.figures.refused) == (4, 1)
            assert "were not taken" in info.warnings[0]
            assert await broker.streams() == ["s"]
        assert [r.id for r in await behind(world)] == ["i1", "i2", "i3", "i4"]
        async with mist.connect(f"log:{tmp_path / 'spool'}") as log:
            (letter,) = await content(log, "s--dead")
            assert letter.data == b"x" * 101
            assert "too large" in dict(letter.headers)["Mist-Reason"]
        async with await spool(url) as broker:  # by now it knows
            stream = await broker.open("s")
            assert stream.size_bytes_max == 100
            with pytest.raises(TooLarge):
                await stream.append([Message("a", b"x" * 101)])

    run(body())


def test_a_spool_belongs_to_one_broker(url: str, world: shaky.World, tmp_path: Path, monkeypatch: Any) -> None:
    """Another broker's spool is refused; settings that cannot be right too; without ?spool= each broker has its own."""

    async def body() -> None:
        async with await spool(url) as broker:
            await broker.open("s")
        for other in (f"spool+memory:x?spool={tmp_path / 'spool'}", f"spool+shaky:other?spool={tmp_path / 'spool'}"):
            for create in (True, False):
                with pytest.raises(Conflict, match="is for shaky:"):
                    await mist.connect(other, create=create)
        for wrong in (f"{url}&spool_full=maybe", f"{url}&spool_bytes=-1", "spool+spool+memory:", "spool+nowhere:x"):
            with pytest.raises(InvalidArgument):
                await mist.connect(wrong)
        with pytest.raises(NotFound):
            await mist.connect(f"spool+memory:x?spool={tmp_path / 'absent'}", create=False)
        broker = await spool(url, forward=False)
        await broker.aclose()
        with pytest.raises(Closed):
            await broker.open("s")

    run(body())
    monkeypatch.setenv("MIST_SPOOL", str(tmp_path / "base"))
    urls = [
        "spool+nats://me:secret@host:4222", "spool+nats://me:other@host:4222?stream=s", "spool+nats://you@host:4222",
        "spool+redis://host/0", "spool+redis://host/1", "spool+log:./a", "spool+log:./b",
    ]  # fmt: skip
    places = [directory(parse_url(u)) for u in urls]
    assert places[0] == places[1]
    assert len(set(places)) == len(urls) - 1
    assert {p.parent for p in places} == {tmp_path / "base"}
    assert "secret" not in "".join(map(str, places))


def test_what_belongs_to_the_broker_is_refused_with_its_name(url: str, world: shaky.World) -> None:
    """Reading, conditions, retention, consumers: the hint says where to go."""

    async def body() -> None:
        async with await spool(url) as broker:
            stream = await broker.open("s")
            for call in (
                lambda: stream.read(), lambda: stream.append(numbered(1, 1), expected_last=0), lambda: stream.locate(0),
                lambda: stream.consumer("c"), lambda: broker.checkpoints.list(), lambda: broker.delete("s"),
                lambda: broker.open("t", config=StreamConfig(records_max=3)),
            ):  # fmt: skip
                with pytest.raises(Unsupported, match=f"shaky:{world.name}"):
                    await call()
            with pytest.raises(InvalidArgument, match="make it at"):
                await broker.open("t", config=StreamConfig(dedupe_window_s=3))
            with pytest.raises(InvalidArgument):
                await broker.open("s--dead")
            assert (await stream.info()).records == 0

    run(body())


def test_everything_that_publishes_works_over_it(url: str, world: shaky.World) -> None:
    """mist.Client, its publisher, mist.sync with emit, and a transport."""

    async def body() -> None:
        async with mist.connect(url) as broker, mist.Client(broker, source="t") as client:
            await client.publish("c", client.envelope("a.b", {"n": 1}))
            async with await client.publisher("c") as publisher:
                for n in range(2, 50):
                    await publisher.send(client.envelope("a.b", {"n": n}))
        async with dial(f"{url}&stream=c") as transport:
            await transport.send(client.envelope("a.b", {"n": 50}))

    run(body())
    with mist.sync.connect(url, source="t", stream="c") as client:
        assert client.publish("c", client.envelope("a.b", {"n": 51})) == 51
        for n in range(52, 60):
            assert client.emit(client.envelope("a.b", {"n": n}))
        client.flush()
    records = run(behind(world, "c"))
    assert [decode(r.data).data()["n"] for r in records] == list(range(1, 60))


_PUBLISHER = """
import asyncio, sys
import mist
from mist.broker.base import Message

async def main(url, lane, history):
    with open(history, "ab", buffering=0) as told:
        done = open(history, "rb").read().count(b"\\n")
        async with mist.connect(url) as broker:
            stream = await broker.open("s")
            n = done
            while True:
                count = 1 + n % 7
                await stream.append([Message("a", b"%d" % i, f"{lane}-{i}") for i in range(n, n + count)])
                for i in range(n, n + count):
                    told.write(b"%d\\n" % i)
                n += count

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("window", [True, False])
def test_killed_publishers_lose_and_double_nothing(tmp_path: Path, window: bool) -> None:
    """Two processes share one spool and are killed (-9) again and again, the one that forwards as well."""
    target = f"log:{tmp_path / 'target'}"
    url = f"spool+{target}?spool={tmp_path / 'spool'}"

    async def make() -> None:
        async with mist.connect(target) as broker:
            config = None if window else StreamConfig(dedupe_window_s=0, dedupe_ids_max=0)
            await broker.open("s", config=config)

    run(make())
    rng = random.Random(1 + window)
    histories = [tmp_path / "one", tmp_path / "other"]

    def start(lane: int) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-c", _PUBLISHER, url, str(lane), str(histories[lane])]
        return subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)

    children = [start(0), start(1)]
    try:
        while not all(h.exists() and h.stat().st_size for h in histories):
            assert all(c.poll() is None for c in children)
            time.sleep(0.01)
        for _ in range(6):
            time.sleep(rng.uniform(0.2, 0.5))
            lane = rng.randrange(2)
            children[lane].send_signal(signal.SIGKILL)
            _, err = children[lane].communicate()
            assert children[lane].returncode == -signal.SIGKILL, err.decode()
            children[lane] = start(lane)
        time.sleep(0.3)
    finally:
        for child in children:
            child.kill()
            child.communicate()

    async def judge() -> list[Record]:
        async with await spool(url) as broker:
            await broker.open("s")
            async with asyncio.timeout(60):
                await broker.flush()
        async with mist.connect(target) as there:
            return await content(there, "s")

    records = run(judge())
    ids = [r.id for r in records]
    assert len(ids) == len(set(ids)), "doubled"
    for lane, history in enumerate(histories):
        assert history.exists(), "nothing was acknowledged"
        acked = [int(n) for n in history.read_bytes().split(b"\n")[:-1]]
        stored = [int(i.partition("-")[2]) for i in ids if i.startswith(f"{lane}-")]
        assert stored == sorted(stored), "out of order"
        assert set(acked) <= set(stored), "lost"
        assert acked


class TestSpool(BrokerConformance):
    """What a spool declares of the contract; what it does not declare is refused."""

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.url = f"spool+memory:conf-{tmp_path.name}?spool={tmp_path / 'spool'}&spool_drain=0"
