"""C06: a file system that is really full. The child mounts a small one in a mount namespace of its own, so that nothing is
left behind; where that is not allowed, RLIMIT_FSIZE stands in for it, and the result says so.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import subprocess
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from mist.broker.base import Checkpoint, ConsumerConfig, Stream, StreamConfig
from mist.broker.registry import connect
from mist.errors import MistError
from mist.testing.history import Checker, Recorder, Trim

from . import recording as rec
from .campaign import Report, Trial
from .processes import ChildFailed, Nursery

_NEW_NAMESPACE = 0x0002_0000
_PRIVATE_RECURSIVE = (1 << 18) | (1 << 14)
_MB = 1024 * 1024


def c06(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """Fill a file system of 24 MB, read, ack, save, trim, refill; every other round a foreign file takes the last byte."""
    trial = Trial("C06", budget_s, seed, report, units)
    rng = random.Random(seed)
    kinds = ["ext4", "tmpfs"]
    with Nursery(trial.folder) as nursery:
        while trial.more():
            folder = trial.round()
            kind = kinds[0]
            kinds.reverse()
            rounds = min(rng.randint(2, 4), trial.left)
            child = nursery.start("full", {
                "folder": str(folder), "kind": kind, "rounds": rounds, "seed": rng.random(),
                "history": str(folder / "full.jsonl"), "result": str(folder / "result.json"),
            })  # fmt: skip
            try:
                child.finish(300, ask=False)
            except ChildFailed as exc:
                trial.fail(f"{kind}: {exc}")
                break
            result = json.loads((folder / "result.json").read_text())
            trial.note(f"file systems used: {result['used']}" if result["used"] == kind else result["used"])
            for failure in result["failures"]:
                trial.fail(f"{result['used']}: {failure}")
            checker = Checker()
            checker.add_files(sorted(folder.glob("*.jsonl")))
            trial.judge(checker)
            trial.reached += rounds
            trial.add(**{f"on_{result['used'].split(' ')[0]}": rounds}, refusals=result["refusals"])
            trial.say(f"{trial.reached} rounds, {result['used']}, {result['refusals']} refusals")
    return trial.result()


class Space:
    """The small file system, or what stands in for it."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.path = folder / "small"
        self.path.mkdir()
        self.used = kind
        why = self._mount(folder, kind)
        if why and kind == "ext4":
            self.used = f"tmpfs (instead of ext4: {why})"
            why = self._mount(folder, "tmpfs")
        if why:
            self.used = f"RLIMIT_FSIZE (a limit of 4 MB per file, NOT a full disk: {why})"
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 * _MB, resource.RLIM_INFINITY))

    @property
    def real(self) -> bool:
        return not self.used.startswith("RLIMIT")

    def _mount(self, folder: Path, kind: str) -> str:
        """Mount; returns why it is not possible."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_NEW_NAMESPACE):
            return f"unshare: {os.strerror(ctypes.get_errno())}"
        if libc.mount(b"none", b"/", None, _PRIVATE_RECURSIVE, None):
            return f"private mounts: {os.strerror(ctypes.get_errno())}"
        if kind == "tmpfs":
            return _tool("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(self.path))
        image = folder / "image"
        with image.open("wb") as f:
            f.truncate(24 * _MB)
        return _tool("mkfs.ext4", "-q", "-F", "-m", "0", str(image)) or _tool(
            "mount", "-o", "loop", str(image), str(self.path)
        )

    def take_the_rest(self) -> None:
        """A file of somebody else takes every byte that is left."""
        with (self.path / "foreign").open("ab", buffering=0) as f:
            for size in (_MB, 4096, 1):
                try:
                    while f.write(b"x" * size):
                        pass
                except OSError:
                    continue

    def give_back(self) -> None:
        (self.path / "foreign").unlink(missing_ok=True)


def _tool(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return f"{argv[0]} is not installed"
    return "" if done.returncode == 0 else f"{argv[0]}: {done.stderr.strip() or done.returncode}"


async def full(args: dict[str, Any]) -> None:
    """The child of C06."""
    rng = random.Random(args["seed"])
    space = Space(Path(args["folder"]), args["kind"])
    failures: list[str] = []
    refusals = 0
    recorder = Recorder(args["history"])
    async with AsyncExitStack() as stack:
        stack.callback(recorder.close)
        broker = await stack.enter_async_context(connect(f"log:{space.path / 'log'}"))
        config = StreamConfig(segment_bytes=4 * _MB if space.real else 64 * _MB, dedupe_ids_max=1_000_000)
        stream = await broker.open("s", config=config)
        work = rec.Work(recorder, await stream.consumer("c", ConsumerConfig(ack_wait_s=600)))
        lanes = [rec.Lane(recorder, stream, f"lane{i}", size=4000) for i in range(2)]
        deliveries, _ = await fill_and_fetch(lanes[0], work)
        for i in range(args["rounds"]):
            refusals += await fill(lanes, rng)
            hog = space.real and i % 2 == 1
            if hog:
                space.take_the_rest()
                refusals += await fill(lanes, rng)
            deliveries, errors = await live_on(recorder, broker, stream, work, deliveries, rng)
            if errors:
                failures.append(f"round {i + 1}{' with a foreign file' if hog else ''}: {errors}")
            space.give_back()
            if not space.real:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4 * _MB * (i + 2), resource.RLIM_INFINITY))
            before = lanes[0].acked
            for _ in range(20):
                if not await lanes[0].append(20):
                    break
            if lanes[0].acked == before:
                failures.append(f"round {i + 1}: nothing could be appended after the trim")
        await rec.read_all(recorder, stream, "end")
        await rec.read_all(recorder, stream, "again", limit=100)
        checked = await stream.verify()
        if checked.damage:
            failures.append(f"verify found damage: {checked.damage[:5]}")
    Path(args["result"]).write_text(json.dumps({"used": space.used, "failures": failures, "refusals": refusals}))


async def fill_and_fetch(lane: rec.Lane, work: rec.Work) -> tuple[list[Any], str]:
    for _ in range(10):
        await lane.append(20)
    return await work.fetch(limit=20)


async def fill(lanes: list[rec.Lane], rng: random.Random) -> int:
    """Append until every lane was refused five times in a row; how many refusals there were."""
    refusals = 0
    for lane in lanes:
        in_a_row = 0
        while in_a_row < 5:
            error = await lane.append(rng.randint(1, 40))
            if error and error not in ("storage_full", "partial_append"):
                raise AssertionError(f"a full disk made append raise {error}")
            in_a_row = in_a_row + 1 if error else 0
            refusals += bool(error)
    return refusals


async def live_on(
    recorder: Recorder, broker: Any, stream: Stream, work: rec.Work, deliveries: list[Any], rng: random.Random
) -> tuple[list[Any], dict[str, str]]:
    """What must work on a full disk: reading, acks, fetches, checkpoints, trimming. Returns what failed, and how."""
    info = await stream.info()
    after = rng.randint(info.first - 1, info.last)
    errors: dict[str, str] = {}
    position = await rec.read(recorder, stream, "beside", after=after, limit=500)
    if position == after < info.last:
        errors["reading"] = "no record"
    _, errors["ack"] = await work.settle("ack", deliveries)
    saved = await rec.save(
        recorder, broker.checkpoints,
        Checkpoint(stream=stream.name, name="full", incarnation=stream.incarnation, sequence=after),
    )  # fmt: skip
    errors["saving a checkpoint"] = saved if saved != "checkpoint_regression" else ""
    await rec.load(recorder, broker.checkpoints, stream.name, "full")
    deliveries, errors["fetch"] = await work.fetch(limit=20)
    before = rng.randint((info.first + info.last) // 2, info.last)
    recorder.write(Trim(start_ns=rec.now(), before=before))
    try:
        await stream.trim(before=before)
    except MistError as exc:
        errors["trim"] = str(exc)
    return [d for d in deliveries if d.record.sequence >= before], {k: v for k, v in errors.items() if v}
