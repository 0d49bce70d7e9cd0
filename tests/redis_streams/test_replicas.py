"""A primary with a replica, sentinels that fail over, and a cluster: real ones."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run
from redis import Redis
from redis.exceptions import RedisError

import mist
from mist.broker.base import Checkpoint, ConsumerConfig, StreamConfig
from mist.errors import Ambiguous, MistError, Unavailable
from mist.kit.local import LocalServer, RedisServer, free_port, redis_binary, redis_server
from mist.testing.proxy import FaultProxy
from mist.testing.servers import MissingServer, run_redis_pair

from .conftest import missing
from .test_servers import batch, check_whole, keep_on, read_all


def eventually(probe: object, within_s: float = 20.0) -> None:
    until = time.monotonic() + within_s
    while True:
        with contextlib.suppress(RedisError):
            if probe():  # type: ignore[operator]
                return
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def pair() -> Iterator[tuple[RedisServer, RedisServer]]:
    try:
        with run_redis_pair(flavour="valkey", appendfsync="everysec") as servers:
            with Redis(port=servers[1].port) as replica:
                eventually(lambda: replica.info("replication")["master_link_status"] == "up")
            yield servers
    except MissingServer as exc:
        missing(str(exc))


def test_waiting_for_a_replica(pair: tuple[RedisServer, RedisServer]) -> None:
    """`replicated` is given where a replica acknowledges; when it is gone, an append is Ambiguous, and safe to repeat."""
    primary, replica = pair

    async def body() -> None:
        async with mist.connect(f"{primary.url}?wait_timeout_s=0.5") as broker:
            stream = await broker.open("s", config=StreamConfig(durability="replicated"))
            assert await stream.append(batch(0)) == list(range(1, 11))
            assert (await stream.info()).durability == "replicated"
            with Redis(port=replica.port) as there:
                assert there.xlen("s") == 10
            plain = await broker.open("plain")
            assert (await plain.info()).durability == "process"
            replica.kill()
            with pytest.raises(Ambiguous) as unsure:
                await stream.append(batch(10))
            assert len(unsure.value.ids) == 10
            await plain.append(batch(0))

            async def warned() -> bool:
                info = await stream.info()
                return info.durability == "process" and any(
                    "made for durability replicated" in w for w in info.warnings
                )

            async with asyncio.timeout(20):
                while not await warned():
                    await asyncio.sleep(0.1)
            await asyncio.to_thread(replica.start)
            async with asyncio.timeout(20):
                while True:
                    with contextlib.suppress(Ambiguous):
                        assert await stream.append(batch(10)) == list(range(11, 21))
                        break
        async with mist.connect(f"{primary.url}?wait_replicas=1") as broker:
            stream = await broker.open("t")
            assert (await stream.info()).durability == "replicated"
            await stream.append(batch(0))
            await broker.checkpoints.save(Checkpoint(stream="t", name="c", incarnation=stream.incarnation, sequence=5))

    run(body(), 60)


class Sentinel(LocalServer):
    def answers(self) -> bool:
        with contextlib.suppress(RedisError), Redis(port=self.port, socket_timeout=1) as redis:
            return bool(redis.ping())
        return False


@contextlib.contextmanager
def sentinel(folder: Path, primary: RedisServer) -> Iterator[Sentinel]:
    port = free_port()
    folder.mkdir()
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nsentinel monitor main 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds main 1500\nsentinel failover-timeout main 3000\n"
    )
    server = Sentinel(
        "sentinel", [redis_binary("valkey"), str(config), "--sentinel"],
        url=f"redis+sentinel://127.0.0.1:{port}/main", port=port, directory=folder,
    )  # fmt: skip
    server.start()
    try:
        yield server
    finally:
        server.kill()


def test_a_failover(pair: tuple[RedisServer, RedisServer], tmp_path: Path) -> None:
    """The primary is killed under appends: they fail as such, go on at the new primary, and repeating stored nothing
    twice. With `wait_replicas` nothing acknowledged is lost."""
    primary, replica = pair

    async def body(url: str, watcher: Sentinel) -> None:
        done = asyncio.Event()
        sent: list[int] = []
        async with mist.connect(f"{url}?wait_replicas=1&wait_timeout_s=1&timeout_s=2&connect_timeout_s=1") as broker:
            stream = await broker.open("s")
            consumer = await stream.consumer("c", ConsumerConfig(ack_wait_s=1.0, attempts_max=0))
            waiting = asyncio.create_task(stream.read(after=0, wait_s=30))
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(keep_on(stream, done, sent))
                while len(sent) < 50:
                    await asyncio.sleep(0.02)
                primary.kill()

                def promoted() -> bool:
                    with Redis(port=replica.port) as there:
                        return bool(there.info("replication")["role"] == "master")

                await asyncio.to_thread(eventually, promoted, 40)
                # the new primary has no replica yet: appends that wait for one stay unsure until it has
                with Redis(port=replica.port) as there:
                    assert there.xlen("s") >= len(sent)
                primary.argv += ["--replicaof", "127.0.0.1", str(replica.port)]
                await asyncio.to_thread(primary.start)
                had = len(sent)
                async with asyncio.timeout(40):
                    while len(sent) < had + 50:
                        await asyncio.sleep(0.05)
                done.set()
                assert await writing > 0
            assert (await waiting).records
            check_whole(await read_all(stream), sent)
            seen: set[int] = set()
            async with asyncio.timeout(30):
                while not set(sent) <= seen:
                    try:
                        got = await consumer.fetch(limit=100, wait_s=0.5)
                        await consumer.ack(got)
                    except Unavailable:
                        continue
                    seen |= {int(d.record.data) for d in got}

    with sentinel(tmp_path / "sentinel", primary) as watcher:
        with Redis(port=watcher.port) as asked:
            eventually(lambda: asked.sentinel_slaves("main"))
        run(body(watcher.url, watcher), 110)


def test_a_repeated_batch_behind_a_demoted_primary(pair: tuple[RedisServer, RedisServer], tmp_path: Path) -> None:
    """What it repeats is known there and not written again, so only the wait for others tells that it is a replica."""
    primary, replica = pair

    async def body(url: str, asked: Redis) -> None:
        async with mist.connect(f"{url}?wait_replicas=1&wait_timeout_s=0.5") as broker:
            stream = await broker.open("s")
            await stream.append(batch(0))
            with Redis(port=primary.port) as old, Redis(port=replica.port) as new:
                new.replicaof("NO", "ONE")
                old.replicaof("127.0.0.1", replica.port)  # an operator's: the connections stay
                await asyncio.to_thread(eventually, lambda: old.info("replication")["master_link_status"] == "up")
            with pytest.raises(Ambiguous, match="0 of 1 replicas"):
                await stream.append(batch(0))
            with pytest.raises(Unavailable, match="is not the primary any more"):
                await stream.append(batch(0))  # the sentinel does not know yet
            asked.execute_command("SENTINEL", "REMOVE", "main")
            asked.execute_command("SENTINEL", "MONITOR", "main", "127.0.0.1", replica.port, 1)
            async with asyncio.timeout(30):
                while True:
                    with contextlib.suppress(Ambiguous, Unavailable):
                        assert await stream.append(batch(0)) == list(range(1, 11))
                        break
                    await asyncio.sleep(0.05)

    with sentinel(tmp_path / "sentinel", primary) as watcher, Redis(port=watcher.port) as asked:
        eventually(lambda: asked.sentinel_slaves("main"))
        run(body(watcher.url, asked), 60)


def test_an_address_that_leads_to_another_primary(pair: tuple[RedisServer, RedisServer]) -> None:
    """A name or a virtual address moves, the connection made before stays with the old primary until it refuses."""
    primary, replica = pair

    async def body() -> None:
        with FaultProxy("127.0.0.1", primary.port) as address:
            async with mist.connect(address.through(primary.url)) as broker:
                stream = await broker.open("s")
                await stream.append(batch(0))
                with Redis(port=primary.port) as old, Redis(port=replica.port) as new:
                    eventually(lambda: new.xlen("s") == 10)
                    new.replicaof("NO", "ONE")
                    old.replicaof("127.0.0.1", replica.port)
                address.retarget("127.0.0.1", replica.port)
                with pytest.raises(Unavailable, match="this server is a replica"):
                    await stream.append(batch(10))
                assert await stream.append(batch(10)) == list(range(11, 21))

    run(body(), 30)


def test_readers_leave_a_demoted_primary(pair: tuple[RedisServer, RedisServer], tmp_path: Path) -> None:
    """It goes on answering reads with what it has, and here it hears nothing new: whoever waits there, and whoever only
    looks, turns to the new primary."""
    primary, replica = pair

    async def body(url: str, asked: Redis) -> None:
        async with mist.connect(url) as one, mist.connect(url) as two:
            looking, waiting = await one.open("s"), await two.open("s")
            await looking.append(batch(0))
            assert len((await looking.read()).records) == 10

            async def wait() -> int:
                while True:
                    with contextlib.suppress(Unavailable):
                        return len((await waiting.read(after=10, wait_s=60)).records)

            blocked = asyncio.create_task(wait())
            with Redis(port=primary.port) as old, Redis(port=replica.port) as new:
                await asyncio.to_thread(eventually, lambda: old.info("clients")["blocked_clients"] == 1)
                new.replicaof("NO", "ONE")
                old.replicaof("127.0.0.1", free_port())  # an operator's: the connections stay
            asked.execute_command("SENTINEL", "REMOVE", "main")
            asked.execute_command("SENTINEL", "MONITOR", "main", "127.0.0.1", replica.port, 1)
            async with asyncio.timeout(20), mist.connect(url) as writer:
                assert (await (await writer.open("s")).append(batch(10)))[-1] == 20
                assert await blocked > 0
                while not (await looking.read(after=10)).records:
                    await asyncio.sleep(0.05)

    with sentinel(tmp_path / "sentinel", primary) as watcher, Redis(port=watcher.port) as asked:
        eventually(lambda: asked.sentinel_slaves("main"))
        run(body(watcher.url, asked), 60)


def whole(client: Redis) -> bool:
    """Whether this node knows the other two and all slots."""
    info = client.execute_command("CLUSTER", "INFO")
    return b"cluster_state:ok" in info and b"cluster_known_nodes:3" in info


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[RedisServer]]:
    """Three primaries that share the slots."""
    nodes = []
    with contextlib.ExitStack() as stack:
        for n in range(3):
            try:
                node = redis_server(
                    tmp_path / f"node{n}", flavour="valkey", appendfsync="everysec",
                    extra=[
                        "--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-require-full-coverage",
                        # by default the bus is 10,000 ports higher, which a free port may not bear
                        "no", "--cluster-port", str(free_port()),
                    ],
                )  # fmt: skip
            except MistError as exc:
                missing(str(exc))
                raise
            stack.callback(node.kill)
            node.start()
            nodes.append(node)
        clients = [stack.enter_context(Redis(port=n.port)) for n in nodes]
        for n, client in enumerate(clients):
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", n * 5461, 16383 if n == 2 else n * 5461 + 5460)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
        for client in clients[1:]:
            bus = nodes[0].argv[nodes[0].argv.index("--cluster-port") + 1]
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, bus)
        for client in clients:
            eventually(lambda c=client: whole(c))
        yield nodes


def test_a_cluster(cluster: list[RedisServer], tmp_path: Path) -> None:
    """Streams spread over the nodes, each with its state in its slot; a slot that moves is followed; a node that is
    killed takes its streams away for a while, and no others."""
    hosts = ",".join(f"127.0.0.1:{n.port}" for n in cluster)

    async def body() -> None:
        async with mist.connect(f"redis+cluster://{hosts}?connect_timeout_s=1&timeout_s=2") as broker:
            names = [f"s{n}" for n in range(12)]
            streams = [await broker.open(name) for name in names]
            await asyncio.gather(*(s.append(batch(0)) for s in streams))
            counts = []
            for node in cluster:
                with Redis(port=node.port) as there:
                    counts.append(there.dbsize())
            assert all(counts), "every node has something"
            for stream in streams:
                consumer = await stream.consumer("c", ConsumerConfig(attempts_max=1))
                got = await consumer.fetch(limit=5)
                assert await consumer.ack(got[:3]) == 3
                assert await consumer.term(got[3:], reason="x") == 2
                await broker.checkpoints.save(
                    Checkpoint(stream=stream.name, name="p", incarnation=stream.incarnation, sequence=3)
                )
            assert [n for n in await broker.streams() if "--" not in n] == sorted(names)
            assert len(await broker.checkpoints.list()) == 12
            waiting = asyncio.create_task(streams[0].read(after=10, wait_s=20))
            await asyncio.sleep(0.1)
            await streams[0].append(batch(10, 1))
            assert (await waiting).records[0].data == b"10"
            consumer = await streams[1].consumer("c")
            with moving(cluster, "s1"):
                # no script runs while its keys are here and there: it would store a record and not its id
                for call in (streams[1].append(batch(10)), streams[1].read(), consumer.fetch(), consumer.info()):
                    with pytest.raises(Unavailable):
                        await call
            assert await streams[1].append(batch(10)) == list(range(11, 21))
            assert await streams[1].append(batch(10)) == list(range(11, 21))
            assert len((await streams[1].read()).records) == 20
            assert (await consumer.info()).lag == 15
            victim = cluster[2]
            victim.kill()
            told = await asyncio.gather(*(s.append(batch(50)) for s in streams), return_exceptions=True)
            assert any(isinstance(t, list) for t in told)
            assert any(isinstance(t, Unavailable | Ambiguous) for t in told)
            assert all(isinstance(t, list | Unavailable | Ambiguous) for t in told), told
            await asyncio.to_thread(victim.start)
            async with asyncio.timeout(30):
                for stream in streams:
                    while True:
                        with contextlib.suppress(Unavailable, Ambiguous):
                            await stream.append(batch(50))
                            break
                        await asyncio.sleep(0.1)
            for stream in streams:
                numbers = [int(r.data) for r in (await stream.read(limit=100)).records]
                assert numbers == sorted(set(numbers))
                assert numbers[-1] == 59
            await broker.delete("s3")
            assert "s3" not in await broker.streams()

    run(body(), 90)


@contextlib.contextmanager
def moving(nodes: list[RedisServer], key: str) -> Iterator[None]:
    """Move the slot of a key to the next node, entry by entry, as redis-cli does; inside, a part of its keys is there."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Redis(port=n.port)) for n in nodes]
        slot = clients[0].cluster("KEYSLOT", key)
        ids = [c.cluster("MYID") for c in clients]
        ids = [i.decode() if isinstance(i, bytes) else i for i in ids]
        has = next(n for n, c in enumerate(clients) if c.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot))
        to = (has + 1) % len(nodes)
        clients[to].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[has])
        clients[has].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[to])

        def migrate(*keys: str | bytes) -> None:
            clients[has].execute_command("MIGRATE", "127.0.0.1", nodes[to].port, "", 0, 5000, "KEYS", *keys)

        migrate(key, f"mist:{{{key}}}:meta")
        yield
        migrate(*clients[has].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100))
        for client in (clients[to], clients[has], *clients):
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[to])
