"""A stage for consumers: one stream, its producers, workers and sinks in processes of their own, and the judgement."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from mist.broker.base import ConsumerConfig, StreamConfig, header
from mist.broker.deadletter import REASON, SEQUENCE
from mist.broker.registry import connect
from mist.errors import NotFound
from mist.testing.history import Checker, Recorder

from . import recording as rec
from .campaign import Trial
from .child import open_sink
from .processes import Child, ChildFailed, Nursery
from .sites import Site


class Scene:
    """One site with a stream `s` and a consumer `c`, its workers and sinks."""

    def __init__(
        self, nursery: Nursery, folder: Path, where: Site, config: ConsumerConfig, rng: random.Random, **worker: Any
    ) -> None:
        self.nursery = nursery
        self.site = where
        self.folder = folder
        self.config = config
        self.rng = rng
        self.sink = folder / "sink.db"
        open_sink(str(self.sink)).close()  # SQLite cannot be turned to WAL by several at once
        self.common = where.common
        self._worker = worker

    def start(self, role: str, label: str, **args: Any) -> Child:
        return self.nursery.start(role, {
            **self.common, "label": label, "history": str(self.folder / f"{label}.jsonl"), "seed": self.rng.random(),
            **args,
        })  # fmt: skip

    def worker(self, number: int) -> Child:
        return self.start(
            "worker", f"w{number}", consumer="c", consumer_config=msgspec.to_builtins(self.config),
            sink=str(self.sink), fetch=64, **self._worker,
        )  # fmt: skip

    def fill(self, count: int) -> None:
        """Append that many messages from here, recorded."""

        async def append() -> None:
            recorder = Recorder(self.folder / "fill.jsonl")
            try:
                async with connect(self.site.url) as broker:
                    config = msgspec.convert(self.site.config, StreamConfig) if self.site.config else None
                    stream = await broker.open("s", config=config)
                    lane = rec.Lane(recorder, stream, "fill", size=200)
                    while lane.acked < count:
                        await lane.append(min(500, count - lane.acked))
            finally:
                recorder.close()

        asyncio.run(append())

    def drain(self, timeout_s: float = 90) -> None:
        """Wait until nothing is left to do. Raises ChildFailed when it stays."""

        async def wait() -> str:
            async with connect(self.site.url) as broker:
                consumer = await (await broker.open("s")).consumer("c", self.config)
                until = time.monotonic() + timeout_s
                while (info := await consumer.info()).lag:
                    if time.monotonic() > until:
                        listed = (await consumer.pending())[:5] if broker.capabilities.pending else "not listed"
                        return f"{info}; {listed}"
                    await asyncio.sleep(0.02)
            return ""

        left = asyncio.run(wait())
        if left:
            raise ChildFailed(f"work is left after {timeout_s:g} s: {left}")

    def end(self, trial: Trial, *, forgets: bool = False) -> tuple[int, list[tuple[int, str]]]:
        """Read everything twice, look at the consumer, check the histories. Returns the records and the dead letters.
        `forgets`: the server was killed and may know less of its consumers than it did."""

        async def look() -> tuple[int, list[tuple[int, str]]]:
            recorder = Recorder(self.folder / "end.jsonl")
            try:
                async with asyncio.timeout(300), connect(self.site.url) as broker:
                    stream = await broker.open("s", create=False)
                    await rec.read_all(recorder, stream, "end")
                    await rec.read_all(recorder, stream, "again", limit=777)
                    work = rec.Work(recorder, await stream.consumer("c", self.config))
                    await work.look(final=True)
                    try:
                        dead = await rec.record_dead(recorder, await broker.open("s--dead", create=False))
                    except NotFound:
                        dead = []
                    letters = [(int(header(r.headers, SEQUENCE)), header(r.headers, REASON)) for r in dead]
                    return (await stream.info()).records, letters
            finally:
                recorder.close()

        records, letters = asyncio.run(look())
        checker = Checker(dense=self.site.dense, remote=self.site.remote, forgets=forgets)
        checker.add_files(sorted(self.folder.glob("*.jsonl")))
        trial.judge(checker)
        return records, letters

    def read(self) -> None:
        """Read everything twice, recorded, and judge nothing."""

        async def look() -> None:
            recorder = Recorder(self.folder / "end.jsonl")
            try:
                async with asyncio.timeout(300), connect(self.site.url) as broker:
                    stream = await broker.open("s", create=False)
                    await rec.read_all(recorder, stream, "end")
                    await rec.read_all(recorder, stream, "again", limit=777)
            finally:
                recorder.close()

        asyncio.run(look())

    def effects(self, sink: Path) -> list[int]:
        """The sequences in a sink."""
        with closing(sqlite3.connect(sink)) as db:
            return [row[0] for row in db.execute("select sequence from effect order by 1")]
