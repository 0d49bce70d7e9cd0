"""The processes of campaigns. `python -m tests.campaigns.child ROLE '{"json": "arguments"}'`, or `helper`, which forks roles
on request (processes.py). Every role ends with code 0 on SIGTERM.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import random
import signal
import sqlite3
import sys
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

import msgspec

import mist.log.state  # noqa: F401  loaded before the fork, so that a child starts in milliseconds
from mist.broker.base import Broker, Checkpoint, ConsumerConfig, Delivery, Stream, StreamConfig
from mist.broker.registry import connect
from mist.errors import MistError
from mist.testing.history import Erase, Erased, Recorder, Trim, runs

from . import recording as rec
from .failpoints import FailingFiles, Failpoint
from .sites import BACKENDS, lacking

Args = dict[str, Any]
T = TypeVar("T")
AGAIN = frozenset({"locked", "unavailable", "storage_full", "timeout", "ambiguous"})
"""What a role tries again after a moment. Of an append `ambiguous` is repeated by its lane, with the same ids."""
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """SIGKILL when the parent dies."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


async def opened(stack: AsyncExitStack, args: Args) -> tuple[Broker, Stream]:
    """The campaign's broker (`url`) and stream, as the arguments say. Tries again for as long as the server is away."""
    options: Args = {}
    if args.get("failpoint"):
        options["files"] = FailingFiles(msgspec.convert(args["failpoint"], Failpoint))
    if args.get("boot"):
        options["boot"] = bytes.fromhex(args["boot"])
    if "lock_wait_s" in args:
        options["lock_wait_s"] = args["lock_wait_s"]
    for place, value in args.get("tuning", {}).items():
        module, _, name = place.partition(":")
        assert hasattr(importlib.import_module(module), name), f"no {name} in {module}"
        setattr(importlib.import_module(module), name, value)
    config = msgspec.convert(args["config"], StreamConfig) if args.get("config") else None
    broker = await stack.enter_async_context(await patiently(lambda: connect(args["url"], **options)))
    stream = await patiently(lambda: broker.open(args.get("stream", "s"), config=config))
    return broker, stream


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """The answer, however often it is Locked (its recovery waits for a stopped process) or away."""
    while True:
        try:
            return await call()
        except MistError as exc:
            if not exc.retryable or stopping().is_set():
                raise
            await asyncio.sleep(0.01)


_stopping: asyncio.Event | None = None


def stopping() -> asyncio.Event:
    """Set by SIGTERM."""
    global _stopping
    if _stopping is None:
        _stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _stopping.set)
    return _stopping


async def pause(seconds: float) -> None:
    """Sleep, or less when asked to end."""
    if seconds <= 0:
        await asyncio.sleep(0)
        return
    try:
        async with asyncio.timeout(seconds):
            await stopping().wait()
    except TimeoutError:
        return


# -- roles ------------------------------------------------------------------------------------------------------------


async def writer(args: Args) -> None:
    """Lanes that append numbered messages until asked to end, each repeating what a former life left open."""
    stop = stopping()
    rng = random.Random(args["seed"])
    path = Path(args["history"])
    lives = rec.former_life(path)
    recorder = Recorder(path)
    async with AsyncExitStack() as stack:
        stack.callback(recorder.close)
        _, stream = await opened(stack, args)

        async def lane(name: str, rng: random.Random) -> None:
            caller = rec.Lane(recorder, stream, name, size=rng.randint(*args["size"]), after=lives.get(name, (1, 0)))
            most = args.get("messages", 0)
            while (not stop.is_set() or (caller.open and args.get("settle"))) and not (most and caller.acked >= most):
                error = await caller.append(rng.randint(1, args["batch"]))
                if error in AGAIN:
                    await pause(0.02)
                elif args.get("pause_ms"):
                    await pause(rng.random() * args["pause_ms"] / 1000)

        async with asyncio.TaskGroup() as group:
            for i in range(args["lanes"]):
                group.create_task(lane(f"{args['label']}.{i}", random.Random(rng.random())))


async def reader(args: Args) -> None:
    """Follows the stream in pages of all sizes; now and then begins again from the start."""
    stop = stopping()
    rng = random.Random(args["seed"])
    recorder = Recorder(args["history"])
    async with AsyncExitStack() as stack:
        stack.callback(recorder.close)
        _, stream = await opened(stack, args)
        after = 0
        while not stop.is_set():
            again = rng.random() < 0.002
            asked = 0 if again else after
            start = rec.now()
            after = await rec.read(
                recorder, stream, args["label"], after=asked, limit=rng.choice((1, 7, 100, 1000)), wait_s=0.05
            )
            if after == asked and rec.now() - start < 20_000_000:
                await pause(0.02)  # refused at once: a server that is away is not asked ten thousand times a second


async def trimmer(args: Args) -> None:
    """Trims to random positions until asked to end."""
    stop = stopping()
    rng = random.Random(args["seed"])
    recorder = Recorder(args["history"])
    async with AsyncExitStack() as stack:
        stack.callback(recorder.close)
        _, stream = await opened(stack, args)
        while not stop.is_set():
            await pause(rng.random() * args.get("pause_ms", 50) / 1000)
            try:
                info = await stream.info()
                before = rng.randint(info.first, max(info.first, info.last - args.get("keep", 500)))
                recorder.write(Trim(start_ns=rec.now(), before=before))
                await stream.trim(before=before)
            except MistError as exc:
                if not exc.retryable:
                    raise


async def eraser(args: Args) -> None:
    """Erases some of the records that it reads, here and there, until asked to end."""
    stop = stopping()
    rng = random.Random(args["seed"])
    recorder = Recorder(args["history"])
    async with AsyncExitStack() as stack:
        stack.callback(recorder.close)
        _, stream = await opened(stack, args)
        while not stop.is_set():
            try:
                info = await stream.info()
                page = await stream.read(after=rng.randint(info.first - 1, info.last), limit=rng.choice((1, 20, 200)))
                sequences = [r.sequence for r in page.records if rng.random() < 0.3]
                if sequences:
                    start = rec.now()
                    recorder.write(Erase(start_ns=start, sequences=runs(sequences)))
                    await stream.erase(sequences)
                    recorder.write(Erased(start_ns=start, end_ns=rec.now(), sequences=runs(sequences)))
            except MistError as exc:
                if not exc.retryable:
                    raise
            await pause(rng.random() * args.get("pause_ms", 10) / 1000)


async def saver(args: Args) -> None:
    """Saves rising checkpoints under its names as fast as it can, loading now and then."""
    stop = stopping()
    rng = random.Random(args["seed"])
    recorder = Recorder(args["history"])
    async with AsyncExitStack() as stack:
        stack.callback(recorder.close)
        broker, stream = await opened(stack, args)
        at = {n: max(0, await rec.load(recorder, broker.checkpoints, stream.name, n)) for n in args["names"]}
        while not stop.is_set():
            name = rng.choice(args["names"])
            at[name] += rng.randint(0, 3)
            error = await rec.save(
                recorder, broker.checkpoints,
                Checkpoint(stream=stream.name, name=name, incarnation=stream.incarnation, sequence=at[name]),
            )  # fmt: skip
            if error == "checkpoint_regression" or rng.random() < 0.1:
                at[name] = max(at[name], await rec.load(recorder, broker.checkpoints, stream.name, name))
            await pause(0.02 if error in AGAIN else args.get("pause_ms", 0) / 1000)


async def worker(args: Args) -> None:
    """Fetches, stores the effect in a SQLite sink (each sequence once), then acks. `poison`: see `_poisoned`."""
    stop = stopping()
    rng = random.Random(args["seed"])
    recorder = Recorder(args["history"])
    async with AsyncExitStack() as stack:
        stack.callback(recorder.close)
        _, stream = await opened(stack, args)
        config = msgspec.convert(args["consumer_config"], ConsumerConfig)
        consumer = await patiently(lambda: stream.consumer(args["consumer"], config))
        work = rec.Work(recorder, consumer)
        sink = stack.enter_context(closing(open_sink(args["sink"]))) if "sink" in args else None
        while not stop.is_set():
            deliveries, error = await work.fetch(limit=rng.randint(1, args["fetch"]), wait_s=0.05)
            if error:
                await pause(0.02)
            good, bad = _parted(deliveries, args.get("poison", 0))
            if sink is not None and good:
                apply(sink, good, args["label"])
            if args.get("slow_ms"):
                await pause(rng.random() * args["slow_ms"] / 1000)
            if good and rng.random() < 0.2:  # some in the wrong order, in two calls
                half = len(good) // 2
                await settled(work, "ack", good[half:])
                good = good[:half]
            await settled(work, "ack", good)
            for d in bad:
                await _poisoned(work, d)
            if rng.random() < args.get("look", 0.02):
                await looked(work)
        await looked(work)


async def settled(work: rec.Work, how: str, deliveries: list[Delivery], **options: Any) -> None:
    """Settle, again while somebody stopped holds the lock; a stale delivery is no error."""
    while deliveries:
        _, error = await work.settle(how, deliveries, **options)
        if error not in AGAIN:
            break
        await asyncio.sleep(0.02)


async def looked(work: rec.Work) -> None:
    """Look, if anybody answers."""
    try:
        await work.look()
    except MistError as exc:
        if exc.code not in AGAIN:
            raise


def _parted(deliveries: list[Delivery], poison: int) -> tuple[list[Delivery], list[Delivery]]:
    if not poison:
        return deliveries, []
    good = [d for d in deliveries if d.record.sequence % poison]
    return good, [d for d in deliveries if not d.record.sequence % poison]


async def _poisoned(work: rec.Work, delivery: Delivery) -> None:
    """A message nobody can handle: a third is given back, a third refused for ever, a third never answered."""
    kind = delivery.record.sequence // 100 % 3
    if kind == 0:
        await settled(work, "nak", [delivery])
    elif kind == 1:
        await settled(work, "term", [delivery], reason=f"cannot read message {delivery.record.id}")


def open_sink(path: str) -> sqlite3.Connection:
    """Effects by sequence, and an append-only trail of every application."""
    db = sqlite3.connect(path, isolation_level=None, timeout=60)
    db.execute("pragma journal_mode=wal")
    db.execute("pragma synchronous=normal")
    db.execute("create table if not exists effect(sequence integer primary key, id text, worker text) without rowid")
    db.execute("create table if not exists position(id integer primary key check(id = 1), sequence integer)")
    return db


def apply(sink: sqlite3.Connection, deliveries: list[Delivery], worker: str) -> None:
    """Store effects in one transaction: a redelivered one changes nothing."""
    sink.execute("begin immediate")
    sink.executemany(
        "insert into effect values(?,?,?) on conflict do nothing",
        [(d.record.sequence, d.record.id, worker) for d in deliveries],
    )
    sink.execute("commit")


async def ingester(args: Args) -> None:
    """Reads from a position that lies in the sink, and stores rows and position in one transaction; no insert repeats."""
    stop = stopping()
    recorder = Recorder(args["history"])
    async with AsyncExitStack() as stack:
        stack.callback(recorder.close)
        _, stream = await opened(stack, args)
        sink = stack.enter_context(closing(open_sink(args["sink"])))
        while not stop.is_set():
            row = sink.execute("select sequence from position").fetchone()
            after = row[0] if row else 0
            try:
                page = await stream.read(after=after, limit=200, wait_s=0.05)
            except MistError as exc:
                if exc.code not in AGAIN:
                    raise
                await pause(0.02)
                continue
            if page.scanned == after:
                continue
            sink.execute("begin immediate")
            sink.executemany(
                "insert into effect values(?,?,?)", [(r.sequence, r.id, args["label"]) for r in page.records]
            )
            sink.execute("insert or replace into position values(1, ?)", (page.scanned,))
            sink.execute("commit")


Role = Callable[[Args], Awaitable[None]]
ROLES: dict[str, Role] = {
    f.__name__: f for f in (writer, reader, trimmer, eraser, saver, worker, ingester)
}  # fmt: skip


def _extra() -> None:
    """Roles that live beside their campaign."""
    from . import evals, full, slow, tracing

    ROLES.update(full=full.full, slow=slow.slow, tracer=tracing.tracer, spanner=tracing.spanner)
    ROLES.update(evaluator=evals.evaluator, answerer=evals.answerer)


# -- processes --------------------------------------------------------------------------------------------------------


def perform(role: str, args: Args) -> int:
    try:
        asyncio.run(_main(ROLES[role], args))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


async def _main(role: Role, args: Args) -> None:
    stopping()
    await role(args)


def _fork(request: Args) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_parent()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDWR)
        for target, fd in ((null, 0), (null, 1), (log, 2)):
            os.dup2(target, fd)
        faulthandler.enable()
        code = perform(request["role"], request["args"])
        sys.stderr.flush()
    finally:
        os._exit(code)


def helper() -> None:
    """Forks a role per line of input and reaps on request; ends with its input."""
    die_with_parent()
    for backend in BACKENDS:
        lacking(backend)  # imports the adapter where it is installed
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "role" in request:
            answer = {"pid": _fork(request)}
        elif "reap" in request:
            answer = {"status": os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])}
        else:
            answer = {}
        print(json.dumps(answer), flush=True)


def main(argv: list[str]) -> int:
    _extra()
    if argv[0] == "helper":
        helper()
        return 0
    return perform(argv[0], json.loads(argv[1]) if len(argv) > 1 else {})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
