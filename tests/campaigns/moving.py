"""C27: copy and mirror over every pair of log, NATS and Redis, while commands and servers are killed.

A run moves nine streams twice (copy, mirror), all at once, over one NATS server, one Redis server and one log. Meanwhile
commands and servers are killed (-9) at random instants and started again, and new records come in at the sources. Then
everything is let finish, the mirrors catch up, and source and destination are read and compared record by record: subject,
id, headers and bytes, in order. Some records have no id, and look like their neighbours; half of the destinations
compare no ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mist.broker.base import Broker, Headers, Message, Stream, StreamConfig
from mist.broker.feed import Feed
from mist.broker.patience import Patience, again
from mist.broker.registry import connect
from mist.errors import MistError
from mist.kit.local import LocalServer
from mist.testing.servers import run_nats, run_redis

from .campaign import Report, Trial
from .processes import ROOT

KINDS = ("log", "nats", "redis")
RECORDS = 2500
MORE = 250
CHAOS_S = 8.0
FINISH_S = 120.0
AWAY_S = 60.0


class Content(NamedTuple):
    """Of a stream: how many records, and a digest over all of each."""

    records: int
    sha256: str


class Move:
    """One command, started again whenever it was killed."""

    def __init__(self, verb: str, source: str, target: str, log: Path, rng: random.Random) -> None:
        self.verb = verb
        self.source = source
        self.target = target
        self.log = log
        self._rate = str(rng.choice((600, 1200, 2500)))
        self._process: subprocess.Popen[bytes] | None = None
        self.done = False
        self.failed = ""
        self._begun = 0.0

    def start(self, *, last: bool = False) -> None:
        argv = [sys.executable, "-m", "mist", self.verb, self.source, self.target, "-q", "--timeout", str(FINISH_S)]
        argv += [] if last else ["--rate", self._rate]
        argv += ["--once", "-o", "jsonl"] if self.verb == "mirror" and last else []
        with self.log.open("ab") as out:
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            self._process = subprocess.Popen(
                argv, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self.done = False
        self._begun = time.monotonic()

    def age_s(self) -> float:
        """For how long it has run: half a second of it is spent on starting Python."""
        return time.monotonic() - self._begun

    def look(self) -> bool:
        """Whether it runs. A command that ended by itself has done its work or failed."""
        if self._process is not None and self._process.poll() is not None and not self.done:
            self.done = True
            if self._process.returncode:
                self.failed = f"{self.name} ended with {self._process.returncode}: {self.output()}"
        return self._process is not None and not self.done

    def kill(self) -> bool:
        """kill -9; False when there was nothing to kill."""
        if self._process is None or not self.look():
            return False
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        return True

    def finish(self, until: float) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.1, until - time.monotonic()))
            if self.look():
                self.kill()
                self.failed = f"{self.name} did not end: {self.output()}"

    @property
    def name(self) -> str:
        return f"{self.verb} {self.source} {self.target}"

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]


def _messages(rng: random.Random, tag: str, count: int) -> list[Message]:
    """Named and nameless ones; the nameless often look like the one before."""
    out: list[Message] = []
    for n in range(count):
        headers: Headers = (("k", str(n % 5)), ("k", " blank ")) if rng.random() < 0.2 else ()
        if rng.random() < 0.4:
            out.append(Message(f"plain.{n % 2}", b"tick %d" % (n // 8), "", headers))
        else:
            data = rng.randbytes(rng.choice((0, 10, 200, 3000)))
            out.append(Message("named", data, f"{tag}-{n}", headers))
    return out


async def _fill(broker: Broker, name: str, messages: list[Message], step: int = 500) -> None:
    feed = Feed(await again(lambda: broker.open(name), away_s_max=AWAY_S), Patience())
    for at in range(0, len(messages), step):
        await feed.put(messages[at : at + step])


async def _content(stream: Stream) -> Content:
    digest = hashlib.sha256()
    count = 0
    info = await again(stream.info, away_s_max=AWAY_S)
    after = info.first - 1
    while True:
        page = await again(lambda after=after: stream.read(after=after, limit=1000), away_s_max=AWAY_S)  # type: ignore[misc]
        for r in page.records:
            digest.update(msgspec.msgpack.encode((r.subject, r.id, r.headers, r.data)))
        count += len(page.records)
        if page.scanned >= page.last:
            return Content(count, digest.hexdigest())
        after = page.scanned


def _at(url: str, stream: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}stream={stream}"


class _Round:
    def __init__(self, trial: Trial, folder: Path, rng: random.Random, servers: dict[str, LocalServer]) -> None:
        self.trial = trial
        self.rng = rng
        self.servers = servers
        self.urls = {"log": f"log:{folder / 'log'}", **{k: s.url for k, s in servers.items()}}
        self.moves = [
            Move(
                verb, _at(self.urls[a], f"from-{a}"), _at(self.urls[b], f"{verb}-{a}-{b}"),
                folder / f"{verb}-{a}-{b}.err", rng,
            )
            for verb in ("copy", "mirror") for a in KINDS for b in KINDS
        ]  # fmt: skip

    async def run(self) -> None:
        for kind in KINDS:
            async with connect(self.urls[kind]) as broker:
                await _fill(broker, f"from-{kind}", _messages(self.rng, kind, RECORDS))
                for verb in ("copy", "mirror"):
                    for a in KINDS:
                        forgets = self.rng.random() < 0.5
                        config = StreamConfig(dedupe_window_s=0, dedupe_ids_max=0) if forgets else None
                        await self._make(broker, f"{verb}-{a}-{kind}", config)
        waiting = list(self.moves)
        self.rng.shuffle(waiting)
        for move in waiting:
            move.start()
        until = time.monotonic() + CHAOS_S
        async with asyncio.TaskGroup() as group:
            group.create_task(self._add_more())
            group.create_task(self._kill_servers(until))
            group.create_task(self._kill_commands(until))
        await self._finish()
        await self._judge()

    async def _make(self, broker: Broker, name: str, config: StreamConfig | None) -> None:
        """Where a server cannot do without de-duplication, it keeps it."""
        try:
            await broker.open(name, config=config)
        except MistError as exc:
            if config is None or exc.retryable:
                raise
            self.trial.note(f"a stream without a window of ids is refused by {broker.backend}: {exc.message}")
            await broker.open(name)

    async def _add_more(self) -> None:
        """Sources grow while they are moved."""
        for part in range(3):
            await asyncio.sleep(CHAOS_S / 4)
            for kind in KINDS:
                async with await again(lambda kind=kind: self._connect(kind), away_s_max=AWAY_S) as broker:  # type: ignore[misc]
                    await _fill(broker, f"from-{kind}", _messages(self.rng, f"{kind}-{part}", MORE))

    async def _connect(self, kind: str) -> Broker:
        return await connect(self.urls[kind])

    async def _kill_servers(self, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(self.rng.uniform(0.3, 2.0))
            kind = self.rng.choice(sorted(self.servers))
            server = self.servers[kind]
            server.kill()
            self.trial.add(**{f"{kind}_killed": 1})
            await asyncio.sleep(self.rng.choice((0.0, 0.2, 1.0)))
            await asyncio.to_thread(server.start)

    async def _kill_commands(self, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(self.rng.uniform(0.05, 0.4))
            move = self.rng.choice(self.moves)
            if move.age_s() > self.rng.uniform(0.5, 3.0) and move.kill():
                self.trial.add(commands_killed=1)
                move.start()

    async def _finish(self) -> None:
        """Let the copies end, and kill the mirrors, which have no end; then each once more, for what came since."""
        until = time.monotonic() + FINISH_S
        for move in self.moves:
            if move.verb == "mirror":
                move.kill()
            else:
                await asyncio.to_thread(move.finish, until)
        for move in self.moves:  # one at a time: a machine with two cores has other work too
            if not move.failed:
                move.start(last=True)
                await asyncio.to_thread(move.finish, time.monotonic() + FINISH_S)
        for move in self.moves:
            if move.failed:
                self.trial.fail(move.failed)

    async def _judge(self) -> None:
        wanted: dict[str, Content] = {}
        for move in self.moves:
            for url in (move.source, move.target):
                if url not in wanted:
                    async with connect(url) as broker:
                        name = url.rpartition("stream=")[2]
                        wanted[url] = await _content(await broker.open(name, create=False))
            source, target = wanted[move.source], wanted[move.target]
            self.trial.add(compared=1, records=source.records)
            if source != target:
                self.trial.fail(f"{move.name}: {source} at the source, {target} at the destination: {move.output()}")


def c27(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """Copy and mirror over every pair of backends, both sides killed."""
    trial = Trial("C27", budget_s, seed, report, units)
    rng = random.Random(seed)
    while trial.more():
        folder = trial.round()
        with ExitStack() as stack:
            nats = stack.enter_context(run_nats(own_process=True))
            redis = stack.enter_context(run_redis(own_process=True))
            assert isinstance(nats, LocalServer)
            assert isinstance(redis, LocalServer)
            work = _Round(trial, folder, rng, {"nats": nats, "redis": redis})
            try:
                asyncio.run(work.run())
            except MistError as exc:
                trial.fail(f"{exc.__class__.__name__}: {exc}")
            finally:
                for move in work.moves:
                    move.kill()
        trial.reached += 1
        trial.say(f"{trial.reached} runs, {trial.counts.get('records', 0):,} records compared")
    return trial.result()
