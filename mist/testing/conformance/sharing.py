"""One store under several event loops in threads, and under several processes, where these are declared."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from mist.broker.base import Broker, Checkpoint
from mist.errors import WrongSequence
from mist.testing._child import save_all
from mist.testing.conformance.harness import (
    Env,
    Harness,
    blocked,
    case,
    data_of,
    messages,
    read_all,
    sequences_of,
    take,
    worker_config,
)


async def in_threads(harness: Harness, *works: Callable[[Broker], Awaitable[Any]]) -> list[Any]:
    """Run each work in a thread with an event loop and a connection of its own."""

    async def one(work: Callable[[Broker], Awaitable[Any]]) -> Any:
        async with asyncio.timeout(harness.patience_s * 2), await harness.reconnect() as broker:
            return await work(broker)

    def in_thread(work: Callable[[Broker], Awaitable[Any]]) -> Any:
        return asyncio.run(one(work))

    return await asyncio.gather(*(asyncio.to_thread(in_thread, work) for work in works))


async def child(harness: Harness, action: str, **arguments: Any) -> Process:
    """A process that connects to the store by URL and does one thing (mist/testing/_child.py)."""
    assert harness.url, "the capability `processes` needs `url`: children connect by it"
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from mist.testing._child import main; main()",
        json.dumps({"url": harness.url, "action": action, **arguments}),
        stdin=PIPE,
        stdout=PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


async def answer(process: Process) -> Any:
    """What the child said, when it has ended well."""
    out, _ = await process.communicate()
    assert process.returncode == 0, f"the child process failed with {process.returncode} (its error is above)"
    return json.loads(out.decode().splitlines()[-1])


async def ready(process: Process) -> None:
    """Wait until the child says that it stands where it should."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    assert line.strip() == b'"ready"', f"the child said {line!r}"


class Sharing(Harness):
    @case("append", "threads")
    async def test_threads_append_together(self, env: Env) -> None:
        """Appends of loops in several threads are whole, ordered each, and numbered once."""
        stream = await env.stream()

        def writer(who: int) -> Callable[[Broker], Awaitable[list[int]]]:
            async def write(broker: Broker) -> list[int]:
                mine = await broker.open(env.name())
                return [s for n in range(20) for s in await mine.append(messages(2, start=2 * n, subject=f"w.{who}"))]

            return write

        answers = await in_threads(self, *(writer(w) for w in range(4)))
        records = await read_all(stream)
        assert sorted(s for a in answers for s in a) == sequences_of(records)
        for who, sequences in enumerate(answers):
            mine = [r for r in records if r.subject == f"w.{who}"]
            assert sequences_of(mine) == sequences
            assert data_of(mine) == [b"%d" % n for n in range(40)]

    @case("append", "threads")
    async def test_a_thread_wakes_another(self, env: Env) -> None:
        """A read waiting in one thread's loop gets what another thread appends."""
        stream = await env.stream()
        reading = asyncio.create_task(stream.read(wait_s=env.patience_s * 2))
        await blocked(reading)

        async def write(broker: Broker) -> None:
            await (await broker.open(env.name())).append(messages(1))

        await in_threads(self, write)
        assert data_of((await asyncio.wait_for(reading, env.patience_s)).records) == [b"0"]

    @case("append", "consumers", "threads")
    async def test_threads_share_a_consumer(self, env: Env) -> None:
        """Workers in threads get every record exactly once between them."""
        stream = await env.stream()
        total = 200
        done = threading.Event()
        seen: Counter[int] = Counter()
        lock = threading.Lock()

        async def work(broker: Broker) -> None:
            consumer = await (await broker.open(env.name())).consumer("c", worker_config())
            while not done.is_set():
                got = await consumer.fetch(limit=7, wait_s=0.05)
                assert await consumer.ack(got) == len(got)
                with lock:
                    seen.update(sequences_of(got))
                    if sum(seen.values()) >= total:
                        done.set()

        async def write(broker: Broker) -> None:
            mine = await broker.open(env.name())
            for start in range(0, total, 20):
                await mine.append(messages(20, start=start))

        await in_threads(self, work, work, work, write)
        assert seen == Counter(sequences_of(await read_all(stream)))

    @case("append", "conditional_append", "threads")
    async def test_threads_race_for_a_condition(self, env: Env) -> None:
        """Threads that count up with conditional appends lose no step."""
        stream = await env.stream()

        async def count(broker: Broker) -> None:
            mine = await broker.open(env.name())
            won = 0
            while won < 15:
                last = (await mine.info()).last
                try:
                    await mine.append(messages(1), expected_last=last)
                    won += 1
                except WrongSequence:
                    continue

        await in_threads(self, count, count, count)
        assert len(await read_all(stream)) == 45

    @case("checkpoints", "threads")
    async def test_threads_save_checkpoints(self, env: Env) -> None:
        """Whoever is last, the highest position stays."""
        stream = await env.stream()

        def saver(first: int) -> Callable[[Broker], Awaitable[None]]:
            async def save(broker: Broker) -> None:
                await save_all(broker, stream.name, stream.incarnation, list(range(first, 61, 3)))

            return save

        await in_threads(self, saver(1), saver(2), saver(3))
        found = await env.broker.checkpoints.load(stream.name, "c")
        assert found is not None
        assert found.sequence == 60

    @case("append", "processes")
    async def test_processes_append_together(self, env: Env) -> None:
        """Appends of several processes are whole, ordered each, and numbered once; ids are known to all."""
        stream = await env.stream()
        children = [
            await child(self, "append", stream=env.name(), subject=f"w.{w}", ids=f"{w}.", batches=15, size=4)
            for w in range(3)
        ]
        answers = await asyncio.gather(*(answer(c) for c in children))
        records = await read_all(stream)
        assert sorted(s for a in answers for s in a) == sequences_of(records)
        for who, sequences in enumerate(answers):
            mine = [r for r in records if r.subject == f"w.{who}"]
            assert sequences_of(mine) == sequences
            assert data_of(mine) == [b"%d" % n for n in range(60)]
        if env.broker.capabilities.dedupe:
            assert await stream.append(messages(60, subject="w.1", ids="1.")) == answers[1]

    @case("append", "processes")
    async def test_a_process_wakes_another(self, env: Env) -> None:
        """A waiting read gets what another process appends, and the other way round."""
        stream = await env.stream()
        reading = asyncio.create_task(stream.read(wait_s=env.patience_s * 2))
        await blocked(reading)
        await answer(await child(self, "append", stream=env.name(), subject="a", ids="", batches=1, size=1))
        assert data_of((await asyncio.wait_for(reading, env.patience_s)).records) == [b"0"]
        last = (await stream.info()).last
        theirs = await child(self, "read", stream=env.name(), after=last, wait_s=env.patience_s * 2)
        await ready(theirs)
        await stream.append(messages(1, start=5))
        assert await answer(theirs) == ["5"]

    @case("append", "consumers", "processes")
    async def test_processes_share_a_consumer(self, env: Env) -> None:
        """Workers in several processes get every record exactly once between them."""
        stream = await env.stream()
        await stream.consumer("c", worker_config())
        children = [await child(self, "consume", stream=env.name(), consumer="c", limit=n) for n in (1, 5, 20)]
        for c in children:
            await ready(c)
        s: list[int] = []
        for start in range(0, 150, 15):
            s += await stream.append(messages(15, start=start))
        await stream.append(messages(len(children), subject="stop"))
        answers = await asyncio.gather(*(answer(c) for c in children))
        assert sorted(x for a in answers for x in a) == s

    @case("append", "consumers", "processes")
    async def test_a_killed_worker_loses_nothing(self, env: Env) -> None:
        """What a process held when it was killed comes again after the ack wait, with the next attempt."""
        stream = await env.stream()
        s = await stream.append(messages(4))
        consumer = await stream.consumer("c", worker_config(ack_wait_s=2.0, attempts_max=0))
        doomed = await child(self, "hold", stream=env.name(), consumer="c", limit=3)
        await ready(doomed)
        doomed.kill()
        await doomed.communicate()
        got = await take(env, consumer, 4)
        assert sorted(sequences_of(got)) == s
        attempts = {d.record.sequence: d.attempt for d in got}
        assert [attempts[x] for x in s] == [2, 2, 2, 1]

    @case("append", "conditional_append", "processes")
    async def test_processes_race_for_a_condition(self, env: Env) -> None:
        """Processes that count up with conditional appends lose no step."""
        stream = await env.stream()
        children = [await child(self, "count", stream=env.name(), steps=10) for _ in range(3)]
        await asyncio.gather(*(answer(c) for c in children))
        assert len(await read_all(stream)) == 30

    @case("checkpoints", "processes")
    async def test_processes_save_checkpoints(self, env: Env) -> None:
        """Whichever process is last, the highest position stays."""
        stream = await env.stream()
        children = [
            await child(
                self, "save", stream=env.name(), incarnation=stream.incarnation, sequences=list(range(first, 61, 3))
            )
            for first in (1, 2, 3)
        ]
        await asyncio.gather(*(answer(c) for c in children))
        found = await env.broker.checkpoints.load(stream.name, "c")
        assert found == Checkpoint(
            stream=stream.name, name="c", incarnation=stream.incarnation, sequence=60,
            time_ns=found.time_ns if found else 0,
        )  # fmt: skip
