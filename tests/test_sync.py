"""mist.sync: the plain calls, emit's bounds and counters, the end of the program, fork."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run

import mist
import mist.sync
from mist.broker.base import Broker, Message
from mist.client.client import to_message
from mist.errors import Ambiguous, Closed, InvalidArgument, MistError, NotFound, StorageFull, TimedOut, Unavailable
from mist.protocol.envelope import Envelope
from mist.sync import SyncClient
from mist.testing.faults import Fault, FaultyBroker, Plan, Script

_names = itertools.count()


def span(n: int) -> Envelope:
    return Envelope.new("trace.span", {"n": n}, source="test", id=f"span-{n}")


def sequences(url: str, stream: str = "s") -> list[str]:
    """What the stream holds, seen by another connection: ids in order."""

    async def read() -> list[str]:
        async with mist.connect(url) as broker:
            page = await (await broker.open(stream)).read(limit=100_000)
            return [r.id for r in page.records]

    return run(read())


@pytest.fixture
def url() -> str:
    return f"memory:sync-{next(_names)}"


@pytest.fixture
def client(url: str) -> Iterator[SyncClient]:
    with mist.sync.connect(url, source="test", stream="s") as opened:
        yield opened


def through(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> list[FaultyBroker]:
    """Connections of mist.sync made from now on fail by plan; the list gets them."""
    made: list[FaultyBroker] = []

    async def faulty(url: str) -> Broker:
        made.append(FaultyBroker(await mist.connect(url), plan))
        return made[-1]

    monkeypatch.setattr(mist.sync, "connect_broker", faulty)
    return made


def test_publish_and_replay(client: SyncClient) -> None:
    """The same calls as the asyncio client's, from plain code."""
    made = client.envelope("eval.result", {"passed": True})
    assert made.source == "test"
    assert client.publish("s", made, qualifier="r") == 1
    assert client.publish("s", [span(1), span(2), made]) == [2, 3, 1]
    assert [r.envelope.id for r in client.replay("s")] == [made.id, "span-1", "span-2"]
    assert [r.sequence for r in client.replay("s", after=1, to=2, subjects=("trace.>",))] == [2]
    with pytest.raises(NotFound):
        list(client.replay("absent"))


def test_a_named_replay_saves_per_record(client: SyncClient) -> None:
    """Also across threads the position moves record by record, not page by page."""
    client.publish("s", [span(i) for i in range(10)])
    seen = []
    with client.replay("s", name="job") as records:
        for r in records:
            seen.append(r.sequence)
            if r.sequence == 4:
                assert records.save() == 4
            if r.sequence == 7:
                break
        assert records.position == 7
        assert records.lag().records == 3
    with client.replay("s", name="job") as records:
        assert next(iter(records)).sequence == 7  # 7 was given but never asked past
        records.seek(8)
        assert [r.sequence for r in records] == [9, 10]


def test_foreign_data(client: SyncClient, url: str) -> None:
    """`on_bad` works as in the asyncio client."""
    client.publish("s", span(1))

    async def spoil() -> None:
        async with mist.connect(url) as broker:
            await (await broker.open("s")).append([Message("x", b"?")])

    run(spoil())
    assert [type(r).__name__ for r in client.replay("s", on_bad="yield")] == ["Received", "Bad"]
    assert len(list(client.replay("s", on_bad="skip"))) == 1
    with pytest.raises(MistError):
        list(client.replay("s"))


def test_follow_waits_for_what_comes(client: SyncClient) -> None:
    """A plain loop gets what another thread publishes later."""
    client.publish("s", span(0))
    got = []
    for r in client.follow("s"):
        got.append(r.envelope.id)
        if len(got) == 1:
            threading.Thread(target=client.publish, args=("s", span(1))).start()
        else:
            break
    assert got == ["span-0", "span-1"]


def test_threads_share_one_client(client: SyncClient, url: str) -> None:
    """Publishing from many threads: every call gets its own sequence, nothing is lost."""
    out: list[int] = []

    def work(k: int) -> None:
        for i in range(20):
            out.append(client.publish("s", span(k * 100 + i)))
            client.emit(span(10_000 + k * 100 + i))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    client.flush()
    assert len(set(out)) == 160
    stored = sequences(url)
    assert len(stored) == len(set(stored)) == 320
    for k in range(8):  # per thread the order of emits is kept
        mine = [i for i in stored if i.startswith("span-10") and int(i[5:]) // 100 == 100 + k]
        assert mine == sorted(mine)


def test_emit_stores_soon_and_flush_waits_for_it(client: SyncClient, url: str) -> None:
    """What was taken is stored in order; the counters add up."""
    assert all(client.emit(span(i)) for i in range(2500))
    assert client.emit(span(9999), stream="other")
    client.flush()
    assert sequences(url) == [f"span-{i}" for i in range(2500)]
    assert sequences(url, "other") == ["span-9999"]
    stats = client.stats
    assert (stats.accepted, stats.stored, stats.failed, stats.dropped, stats.pending) == (2501, 2501, 0, 0, 0)


def test_emit_drops_above_its_bounds_and_never_waits(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that does not answer, emit takes what fits and counts the rest."""
    gate = asyncio.Event()
    through(monkeypatch, lambda op: Fault(gate=gate) if op == "append" else None)
    size = len(to_message(span(1)).data)
    client = mist.sync.connect(url, stream="s", emit_max=5)
    assert [client.emit(span(i)) for i in range(1, 8)] == [True] * 5 + [False] * 2
    by_bytes = mist.sync.connect(url, stream="t", emit_bytes_max=2 * size, size_bytes_max=size)
    assert [by_bytes.emit(span(i)) for i in range(1, 5)] == [True, True, False, False]
    assert not by_bytes.emit(span(1000))  # above the size limit
    assert by_bytes.stats.dropped == 3
    assert by_bytes.stats.last_error is not None
    with pytest.raises(TimedOut):
        client.flush(timeout_s=0.01)
    assert client.stats.pending == 5
    mist.sync._runtime()._loop.call_soon_threadsafe(gate.set)
    client.close()
    by_bytes.close()
    assert sequences(url) == [f"span-{i}" for i in range(1, 6)]
    assert not client.emit(span(9))
    assert (client.stats.stored, client.stats.dropped) == (5, 3)


def test_emit_counts_what_could_not_be_stored(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed append fails its envelopes, a lost reply is repeated, a full store is counted; later ones go on."""
    script = Script({"append": [Fault(before=StorageFull("full")), Fault(after=Ambiguous("lost"))]})
    through(monkeypatch, script)
    with mist.sync.connect(url, stream="s") as client:
        client.emit(span(1))
        client.flush()
        assert (client.stats.failed, client.stats.stored) == (1, 0)
        assert isinstance(client.stats.last_error, StorageFull)
        client.emit(span(2))
        client.flush()
        assert client.stats.stored == 1
        client.emit(span(3), stream="not a name")
        client.emit(span(4))
        client.flush()
        assert (client.stats.failed, client.stats.stored) == (2, 2)
        assert sequences(url) == ["span-2", "span-4"]


def test_a_backend_that_is_away_when_emit_starts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting is tried again; nothing is lost meanwhile."""
    failures = iter([Unavailable("away"), Unavailable("away")])

    async def connect(url: str) -> Broker:
        for failure in failures:
            raise failure
        return await mist.connect(url)

    monkeypatch.setattr(mist.sync, "connect_broker", connect)
    client = SyncClient(url, stream="s")
    assert client.emit(span(1))
    client.flush()
    assert client.stats.stored == 1
    client.close()


def test_a_bug_below_does_not_stop_emit(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign exception is counted as failed, and the next envelope is stored."""
    failures = iter([ZeroDivisionError()])

    async def connect(url: str) -> Broker:
        for failure in failures:
            raise failure
        return await mist.connect(url)

    monkeypatch.setattr(mist.sync, "connect_broker", connect)
    client = SyncClient(url, stream="s")
    client.emit(span(1))
    client.flush()
    assert client.stats.failed == 1
    client.emit(span(2))
    client.close()
    assert client.stats.stored == 1


def test_time_limits(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publish without an answer is Ambiguous with its ids; a close without an answer is TimedOut and still closes."""
    gate = asyncio.Event()
    made = through(monkeypatch, lambda op: Fault(gate=gate) if op == "append" else None)
    client = mist.sync.connect(url, stream="s")
    with pytest.raises(Ambiguous) as caught:
        client.publish("s", [span(1), span(2)], timeout_s=0.01)
    assert caught.value.ids == ["span-1", "span-2"]
    client.emit(span(3))

    def release() -> None:
        gate.set()

    mist.sync._runtime()._loop.call_soon_threadsafe(lambda: mist.sync._runtime()._loop.call_later(0.1, release))
    with pytest.raises(TimedOut):
        client.close(timeout_s=0.01)
    with pytest.raises(Closed):
        client.publish("s", span(4))
    assert made[0].inner._closed  # type: ignore[attr-defined]
    client.close()


def test_misuse_is_refused(client: SyncClient, url: str) -> None:
    """No stream for emit, a call from the loop's own thread, use after close, impossible limits."""
    nameless = mist.sync.connect(url)
    with pytest.raises(InvalidArgument):
        nameless.emit(span(1))
    nameless.close()
    assert mist.sync.SyncClient("memory:?stream=t")._stream == "t"
    with pytest.raises(InvalidArgument):
        SyncClient(url, emit_max=0)

    async def inside() -> Any:
        return client.publish("s", span(1))

    with pytest.raises(InvalidArgument):
        mist.sync._runtime().call(inside(), 5)
    reader = client.replay("s")
    client.close()
    with pytest.raises(Closed):
        list(reader)
    reader.close()


# whole programs

_PRELUDE = """
import asyncio, os, sys, mist, mist.sync
from mist.testing.faults import FaultyBroker, FaultyStream
from mist.protocol.envelope import Envelope

out = sys.argv[1]

class FileStream(FaultyStream):
    # every append is written to one file by a thread of the pool, slowly, as a real adapter may do it
    async def append(self, messages, *, expected_last=None):
        def write():
            import time
            time.sleep(0.02)
            with open(out, "a") as f:
                f.write("".join(f"{os.getpid()} {m.id}\\n" for m in messages))
        await asyncio.to_thread(write)
        return await self.inner.append(messages, expected_last=expected_last)

class FileBroker(FaultyBroker):
    async def open(self, name, *, create=True, config=None):
        return FileStream(self, await self.inner.open(name, create=create, config=config))

async def connect(url):
    return FileBroker(await mist.connect(url), lambda op: None)

mist.sync.connect_broker = connect

def span(n):
    return Envelope.new("trace.span", {"n": n}, source="test", id=str(n))
"""


def program(tmp_path: Path, body: str) -> tuple[list[tuple[int, str]], subprocess.CompletedProcess[str]]:
    """Run a program; (process, envelope id) as stored, and how it ended."""
    out = tmp_path / "out"
    out.touch()
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _PRELUDE + body, str(out)],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ},
    )  # fmt: skip
    lines = [line.split() for line in out.read_text().splitlines()]
    return [(int(pid), id) for pid, id in lines], done


def test_the_end_of_the_program_flushes(tmp_path: Path) -> None:
    """A program that emits and just ends loses nothing, even if its adapter needs the thread pool to store."""
    stored, done = program(
        tmp_path,
        """
client = mist.sync.connect("memory:", stream="s")
for i in range(3000):
    assert client.emit(span(i))
""",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [id for _, id in stored] == [str(i) for i in range(3000)]


def test_the_end_of_the_program_has_a_deadline(tmp_path: Path) -> None:
    """A backend that never answers holds the program for `exit_flush_s`; what is left is told in one line."""
    stored, done = program(
        tmp_path,
        """
async def never(self, messages, *, expected_last=None):
    await asyncio.Event().wait()

FileStream.append = never
client = mist.sync.connect("memory:", stream="s", exit_flush_s=0.05)
for i in range(7):
    client.emit(span(i))
""",
    )
    assert (done.returncode, stored) == (0, [])
    assert "7 emitted envelopes were not stored" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("ending", ["os._exit(0)", "sys.exit(0)"])
def test_fork(tmp_path: Path, ending: str) -> None:
    """A child stores what it emits and nothing of its parent's; the parent goes on undisturbed."""
    stored, done = program(
        tmp_path,
        f"""
client = mist.sync.connect("memory:", stream="s")
reader = client.replay("s")
client.publish("s", span("first"))
list(reader)
for i in range(500):
    client.emit(span(f"parent-{{i}}"))
child = os.fork()
if child == 0:
    assert client.stats.accepted == 0 and client.stats.pending == 0
    assert client.emit(span("child-emit"))
    client.publish("s", span("child-publish"))
    try:
        list(reader)
    except mist.errors.Closed:
        client.publish("s", span("child-refused-the-old-reader"))
    if {ending!r} == "os._exit(0)":
        client.flush()
    else:
        client.emit(span("child-at-exit"))
    {ending}
status = os.waitpid(child, 0)[1]
assert status == 0, status
client.publish("s", span("after"))
for i in range(500, 600):
    client.emit(span(f"parent-{{i}}"))
client.flush()
assert client.stats.stored == 600, client.stats
print(child)
""",
    )
    assert (done.returncode, done.stderr) == (0, "")
    child = int(done.stdout)
    assert max(Counter(id for _, id in stored).values()) == 1
    of_child = {id for pid, id in stored if pid == child}
    expected = {"child-emit", "child-publish", "child-refused-the-old-reader"}
    assert of_child == expected | ({"child-at-exit"} if ending == "sys.exit(0)" else set())
    assert [id for pid, id in stored if id.startswith("parent-")] == [f"parent-{i}" for i in range(600)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_multiprocessing_flushes_too(tmp_path: Path) -> None:
    """Such a child ends without atexit; what it emitted is stored all the same."""
    stored, done = program(
        tmp_path,
        """
import multiprocessing

client = mist.sync.connect("memory:", stream="s")
client.emit(span("parent"))

def work():
    client.emit(span("child"))

if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    assert child.exitcode == 0
""",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(id for _, id in stored) == ["child", "parent"]
