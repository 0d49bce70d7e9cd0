"""Durable steps: typed results, one process at a time, kills at any instant, and the checkpoint files of the seed."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from msgspec import Struct

import mist
from mist.broker.base import Broker
from mist.client._ledger import Ledger, StepRecord
from mist.client._seedsteps import read_seed
from mist.client.steps import Run
from mist.errors import (
    Closed,
    InvalidArgument,
    Locked,
    Malformed,
    MistError,
    NotFinite,
    NotFound,
    StorageFull,
    TooLarge,
    Unavailable,
)
from mist.kit.retry import RetryPolicy
from mist.testing.faults import Dice, FaultyBroker
from mist.testing.servers import run_nats, run_redis

CHILD = Path(__file__).with_name("steps_child.py")
BACKENDS = ["memory", "log", "nats", "redis"]
QUICK = RetryPolicy(attempts_max=3, wait_s=0.001, deadline_s=None)


@contextmanager
def backend(name: str, tmp_path: Path) -> Iterator[str]:
    if name == "memory":
        yield f"memory:{tmp_path.name}"
    elif name == "log":
        yield f"log:{tmp_path}/log"
    else:
        with run_nats(own_process=True) if name == "nats" else run_redis(own_process=True) as server:
            yield server.url


class Download(Struct, frozen=True):
    path: str
    size: int


class Counted:
    """Work that counts its calls."""

    def __init__(self, value: Any, *errors: Exception) -> None:
        self.calls = 0
        self.value = value
        self.errors = list(errors)

    async def __call__(self) -> Any:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.value


@pytest.mark.parametrize("name", BACKENDS)
def test_steps_are_done_once_and_remembered_typed(name: str, tmp_path: Path) -> None:
    """Both shapes, over every broker: the second opening gets the same values, of the same type, and does nothing."""
    work = Counted(Download("/a", 2**53 + 1))

    async def once(broker: Broker) -> None:
        async with Run.open(broker, "nightly / 2026-11-25") as job:
            got = await job.step("download", work, type=Download)
            assert got == Download("/a", 9007199254740993)
            async with job.step("count", type=int) as step:
                if not step.done:
                    work.calls += 1
                    step.result = got.size + 1
            assert step.result == 2**53 + 2
            plain = await job.step("plain", Counted(Download("/b", 1)))
            assert plain == {"path": "/b", "size": 1}
            async with job.step("nothing") as step:
                pass
            assert step.result is None
            assert job.completed == ["download", "count", "plain", "nothing"]

    async def case() -> None:
        with backend(name, tmp_path) as url:
            async with mist.connect(url) as broker:
                for _ in range(3):
                    await once(broker)
                async with Run.open(broker, "another") as other:
                    assert other.completed == []
            if name != "memory":
                async with mist.connect(url) as broker:
                    await once(broker)
        assert work.calls == 2

    run(case(), 60)


def test_failed_and_cut_off_steps_are_done_again(tmp_path: Path) -> None:
    """An error passes through and is noted; cancellation in the middle leaves a step undone; attempts go on counting."""

    async def case() -> None:
        async with mist.connect("memory:") as broker:
            async with Run.open(broker, "r") as job:
                with pytest.raises(ZeroDivisionError):
                    await job.step("a", Counted(1, ZeroDivisionError("x")))
                with pytest.raises(KeyError):
                    async with job.step("a") as step:
                        raise KeyError("y")
                hanging = asyncio.create_task(job.step("a", lambda: asyncio.sleep(60))._awaited())
                await asyncio.sleep(0.01)
                hanging.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await hanging
            async with Run.open(broker, "r") as job:
                assert job.completed == []
                async with job.step("a", type=int) as step:
                    assert (step.done, step.attempt) == (False, 4)
                    step.result = 7
                assert await job.step("a", Counted(8), type=int) == 7
            records = (await (await broker.open("steps")).read()).records
            errors = [json.loads(r.data)["payload"].get("error") for r in records]
            assert [e for e in errors if e] == ["ZeroDivisionError: x", "KeyError: 'y'"]

    run(case())


def test_retries(tmp_path: Path) -> None:
    """What may help is tried again, each try an attempt; what cannot is not; none at all is refused (the seed: success
    without running)."""

    async def case() -> None:
        async with mist.connect("memory:") as broker, Run.open(broker, "r") as job:
            work = Counted("fine", Unavailable("1"), Unavailable("2"))
            assert await job.step("a", work, retry=QUICK) == "fine"
            assert work.calls == 3
            for error, calls in ((Unavailable("x"), 3), (InvalidArgument("x"), 1)):
                work = Counted("never", *[error] * 9)
                with pytest.raises(type(error)):
                    await job.step("b", work, retry=QUICK)
                assert work.calls == calls
            work = Counted("fine", ValueError("1"))
            assert await job.step("c", work, retry=QUICK, classify=lambda e: isinstance(e, ValueError)) == "fine"
            async with job.step("b") as step:
                assert step.attempt == 5
            with pytest.raises(InvalidArgument):
                RetryPolicy(attempts_max=0)

    run(case())


def test_results_that_cannot_be_kept_fail_the_step(tmp_path: Path) -> None:
    """NaN, no JSON form, not of the type, too large, a full disk: an error, and the step is not done (the seed: done, and
    nowhere stored)."""

    async def case() -> None:
        async with mist.connect("memory:") as broker, Run.open(broker, "r") as job:
            for value, error in (
                (float("nan"), NotFinite),
                (object(), Malformed),
                ("text", Malformed),
                ("x" * 12_000_000, TooLarge),
            ):
                with pytest.raises(error):
                    await job.step("a", Counted(value), type=str if len(str(value)) > 1000 else int)
                assert job.completed == []
            assert await job.step("a", Counted(1), type=int) == 1
        dice = Dice(1, {})
        async with FaultyBroker(await mist.connect("memory:"), dice) as broker, Run.open(broker, "r") as job:

            async def full(*_: Any, **__: Any) -> list[int]:
                raise StorageFull("no room")

            stream = job._opened()
            whole, stream.append = stream.append, full  # type: ignore[method-assign]
            with pytest.raises(StorageFull):
                await job.step("a", Counted(1))
            assert job.completed == []
            stream.append = whole  # type: ignore[method-assign]
            assert await job.step("a", Counted(1)) == 1

    run(case())


def test_other_inputs_do_it_again(tmp_path: Path) -> None:
    """A completed step is reused for the same inputs only; without inputs, whatever they were."""

    async def case() -> None:
        async with mist.connect("memory:") as broker, Run.open(broker, "r") as job:
            work = Counted(1)
            for inputs, calls in (({"a": 1}, 1), ({"a": 1}, 1), ({"a": 2}, 2), (None, 2)):
                await job.step("a", work, inputs=inputs)
                assert work.calls == calls

    run(case())


def test_one_task_at_a_time(tmp_path: Path) -> None:
    """The same step asked for by many tasks is done once, and all get its result."""

    async def case() -> None:
        async with mist.connect("memory:") as broker, Run.open(broker, "r") as job:
            work = Counted(5)
            assert await asyncio.gather(*[job.step("a", work) for _ in range(20)]) == [5] * 20
            assert work.calls == 1
            others = [Counted(n) for n in range(20)]
            assert await asyncio.gather(*[job.step(f"s{n}", w) for n, w in enumerate(others)]) == list(range(20))

    run(case())


def test_after_the_end(tmp_path: Path) -> None:
    """A closed run does nothing more (the seed: success, stored nowhere); a reset one goes on, and what follows is kept."""

    async def case() -> None:
        async with mist.connect("memory:") as broker:
            async with Run.open(broker, "r") as job:
                await job.step("a", Counted(1))
                await job.reset()
                assert job.completed == []
                assert await job.step("b", Counted(2)) == 2
            with pytest.raises(Closed):
                await job.step("c", Counted(1))
            async with Run.open(broker, "r") as job:
                assert job.completed == ["b"]
            for name in ("", "x" * 300):
                with pytest.raises(InvalidArgument):
                    Run.open(broker, name)
            with pytest.raises(InvalidArgument):
                Run.open(broker, "r", lease_s=0)
            async with Run.open(broker, "r") as job:
                with pytest.raises(InvalidArgument):
                    job.step("")
                with pytest.raises(InvalidArgument):
                    await job.step("a")
                async with job.step("b") as step:
                    with pytest.raises(InvalidArgument):
                        step.result = 3

    run(case())


@pytest.mark.parametrize("name", BACKENDS)
def test_a_second_opening_is_refused_then_takes_over(name: str, tmp_path: Path) -> None:
    """Refused with a sentence while the first lives; after its lease has ended the second one has the run, and the first can
    write nothing; given free, it can be had at once."""

    async def case() -> None:
        with backend(name, tmp_path) as url:
            async with mist.connect(url) as broker:
                first = Run.open(broker, "r", lease_s=0.6)
                async with first:
                    await first.step("a", Counted(1))
                    with pytest.raises(Locked, match=r"is worked on by .*; its lease ends in"):
                        async with Run.open(broker, "r"):
                            pass
                    await asyncio.sleep(0.9)  # renewed meanwhile
                    with pytest.raises(Locked):
                        async with Run.open(broker, "r"):
                            pass
                    assert await first.step("b", Counted(2)) == 2
                    first._renewing.cancel()  # type: ignore[union-attr]  # as if it were stopped
                    async with Run.open(broker, "r", wait_s=30) as second:
                        assert second.completed == ["a", "b"]
                        work = Counted(3)
                        with pytest.raises(Locked, match="taken over"):
                            await first.step("c", work)
                        assert work.calls == 0
                        with pytest.raises(Locked):
                            async with first.step("d"):
                                pass
                        assert await second.step("c", Counted(4)) == 4
                async with Run.open(broker, "r") as third:
                    assert third.completed == ["a", "b", "c"]

    run(case(), 60)


def test_runs_do_not_disturb_one_another(tmp_path: Path) -> None:
    """Many runs on one stream, all writing at once: each write waits for no other run, and none is lost."""

    async def job(broker: Broker, name: str) -> None:
        async with Run.open(broker, name) as one:
            for n in range(10):
                assert await one.step(f"{n}", Counted(n)) == n

    async def case() -> None:
        async with mist.connect(f"log:{tmp_path}") as broker:
            await asyncio.gather(*[job(broker, f"run {n}") for n in range(8)])
            for n in range(8):
                async with Run.open(broker, f"run {n}") as one:
                    assert one.completed == [str(i) for i in range(10)]

    run(case(), 60)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_while_the_broker_fails_now_and_then(seed: int, tmp_path: Path) -> None:
    """Appends and reads fail, some after they were stored: every step is done once and remembered."""
    rates = {"append": 0.3, "read": 0.2}

    async def case() -> None:
        calls: dict[str, int] = {}
        async with FaultyBroker(await mist.connect("memory:"), Dice(seed, rates)) as broker:
            for _ in range(3):
                async with Run.open(broker, "r") as job:
                    for n in range(12):

                        async def work(n: int = n) -> int:
                            calls[str(n)] = calls.get(str(n), 0) + 1
                            return n

                        assert await job.step(str(n), work) == n
        assert calls == {str(n): 1 for n in range(12)}

    run(case(), 60)


def test_the_ledger_decides_by_record_times() -> None:
    """A claim counts from the very end of the lease on, not a nanosecond before; late records of a lost holder do not."""
    done = StepRecord("completed", "a", step="s")
    for claimed_ns, holder in ((1_999_999_999, "a"), (2_000_000_000, "b")):
        ledger = Ledger()
        ledger.read(StepRecord("claim", "a", lease_s=1.0), 500_000_000)
        ledger.read(StepRecord("renew", "a"), 1_000_000_000)
        ledger.read(StepRecord("claim", "b", lease_s=1.0), claimed_ns)
        assert ledger.holder == holder
        ledger.read(done, claimed_ns + 1)
        assert list(ledger.done) == (["s"] if holder == "a" else [])
    ledger.read(StepRecord("release", "b"), 3_000_000_000)
    ledger.read(StepRecord("claim", "c", lease_s=1.0), 3_000_000_001)
    assert ledger.holder == "c"


# real processes


def spawn(url: str, journal: Path, count: int, lease_s: float, stop_at: int = -1) -> subprocess.Popen[bytes]:
    argv = [sys.executable, CHILD, url, "job", journal, str(count), str(lease_s), str(stop_at)]
    return subprocess.Popen(argv, stderr=subprocess.PIPE)


def lines(journal: Path) -> list[str]:
    return journal.read_text().splitlines() if journal.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log", "nats", "redis"])
def test_kill_minus_nine_at_any_instant(name: str, tmp_path: Path) -> None:
    """Killed again and again: what was told as done is never begun again, everything is done in the end, once completed."""
    count, rounds = 40, 10 if name == "log" else 6
    journal = tmp_path / "journal"
    with backend(name, tmp_path) as url:
        for round in range(rounds):
            before = sum(line.startswith("open") for line in lines(journal))
            child = spawn(url, journal, count, 0.3)
            while sum(line.startswith("open") for line in lines(journal)) == before and child.poll() is None:
                time.sleep(0.002)
            time.sleep(0.011 * (round % 4) + 0.002 * round)
            child.kill()
            child.communicate()
        child = spawn(url, journal, count, 0.3)
        _, told = child.communicate(timeout=60)
        assert child.returncode == 0, told
        found = run(completed_of(url))
    said = lines(journal)
    assert said[-1] == f"finished {count}"
    assert sorted(found) == sorted(f"step {n}" for n in range(count))
    for n in range(count):
        first_told = said.index(f"told {n}")
        assert f"began {n}" not in said[first_told:], f"step {n} was done again after it had been told as done"


async def completed_of(url: str) -> list[str]:
    """The steps of the effective `completed` records, one entry for each record."""
    ledger, out = Ledger(), []
    async with mist.connect(url) as broker:
        stream = await broker.open("steps")
        after = 0
        while True:
            page = await stream.read(after=after)
            for record in page.records:
                payload = json.loads(record.data)["payload"]
                step = StepRecord(
                    payload["kind"], payload["owner"], payload.get("lease_s", 0.0), payload.get("step", "")
                )
                ledger.read(step, record.timestamp_ns)
                if step.kind == "completed" and ledger.holder == step.owner:
                    out.append(step.step)
            after = page.scanned
            if after >= page.last:
                return out


def test_a_stopped_process_is_fenced_off(tmp_path: Path) -> None:
    """One that has the run is stopped in a step: another takes over after the lease; woken up, the first one is refused with
    exit code 5."""
    url, journal = f"log:{tmp_path}/log", tmp_path / "journal"
    first = spawn(url, journal, 10, 0.5, stop_at=3)
    while "began 3" not in lines(journal):
        time.sleep(0.005)
        assert first.poll() is None

    async def take_over() -> list[str]:
        async with mist.connect(url) as broker, Run.open(broker, "job", wait_s=20) as job:
            done = job.completed
            assert done == ["step 0", "step 1", "step 2"]
            first.send_signal(signal.SIGCONT)
            _, told = await asyncio.to_thread(first.communicate, timeout=30)
            assert first.returncode == Locked("").exit_code
            assert b"was taken over" in told
            await job.step("mine", Counted(1))
            return done

    try:
        done = run(take_over(), 60)
    finally:
        first.kill()
        first.communicate()

    async def again() -> list[str]:
        async with mist.connect(url) as broker, Run.open(broker, "job") as job:
            return job.completed

    assert run(again()) == [*done, "mine"]


# the seed's files


def seed_line(step: str, status: str, **more: Any) -> bytes:
    record = {"step": step, "status": status, "timestamp": "2026-02-15T10:00:00.123456789Z", **more}
    return json.dumps(record).encode() + b"\n"


def test_seed_files_are_read_as_the_seed_replays_them() -> None:
    """The last record of a step wins; a bad line costs itself only; what was glued to a torn line is found; integers keep
    their value."""
    data = (
        seed_line("a", "running")
        + seed_line("a", "completed", result={"n": 9007199254740993})
        + seed_line("b", "completed", result=1)
        + seed_line("b", "failed", error="x", attempt=2)
        + seed_line("c", "completed")
        + b'{"step":"d","status":"comp'
        + seed_line("e", "completed", result="glued")
        + b"\n\0\0\0\n"
        + seed_line("f", "completed", result="after")
        + seed_line("g", "running")
        + seed_line("h", "skipped")
        + b'{"step":"i","status":"completed","result":{"step":"x","status":"completed"}\n'
        + b'{"step":"f","status":"run'
    )
    seed = read_seed(data)
    assert {k: bytes(v) for k, v in seed.results.items()} == {
        "a": b'{"n": 9007199254740993}', "c": b"null", "e": b'"glued"', "f": b'"after"',
    }  # fmt: skip
    assert seed.bad_lines == [6, 12, 13]
    assert read_seed(b"").results == {}
    for cut in range(len(data)):
        read_seed(data[:cut])


def test_seed_file_import(tmp_path: Path) -> None:
    """Its completed steps are the run's, once; what the run did itself stays; a missing file is said."""
    path = tmp_path / "nightly.jsonl"
    path.write_bytes(
        seed_line("a", "completed", result=9007199254740993) + seed_line("b", "completed", result=2) + b"torn"
    )

    async def case() -> None:
        async with mist.connect("memory:") as broker:
            async with Run.open(broker, "nightly") as job:
                assert await job.step("b", Counted(20)) == 20
                got = await job.import_seed(path)
                assert (got.steps, got.known, got.bad_lines) == (1, 1, [3])
                again = await job.import_seed(path)
                assert (again.steps, again.known) == (0, 2)
            async with Run.open(broker, "nightly") as job:
                assert await job.step("a", Counted(0), type=int) == 2**53 + 1
                assert await job.step("b", Counted(0)) == 20
                with pytest.raises(NotFound):
                    await job.import_seed(tmp_path / "none")
                with pytest.raises(MistError):
                    await job.import_seed(tmp_path)

    run(case())
