"""C09 and C10: the server killed, restarted and stopped under load. C11: partitions through the fault proxy.

Producers, a follower, workers and a saver of checkpoints run in processes of their own. After every fault all of them must go
on by themselves, within a bound and without having grown; at the end the history checker judges: nothing acknowledged is lost,
nothing is stored twice, every producer's messages are in order, every record was delivered, no checkpoint went back.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import msgspec

from mist.broker.base import ConsumerConfig
from mist.testing.proxy import FaultProxy, Mode

from .campaign import Report, Trial, named
from .processes import Child, ChildFailed, Nursery
from .scene import Scene
from .sites import Site, site

RESUME_S = 40.0
"""After the last fault everybody has got answers again by then: the pings of a keepalive, a backoff, and a busy machine."""
GROWTH_BYTES_MAX = 64 * 1024 * 1024
LONG_S = 4.0
"""Longer than every timeout of a site with short ones (sites.py)."""
_CYCLES = 5
_ACK_WAIT_S = 1.5
_GOOD = {
    "writer": b'"sequences":[[',
    "reader": b'"records":[[',
    "worker": b'"deliveries":[[',
    "saver": b'"op":"saved"',
}


class Member:
    """A child, the way it takes to the server, and the number of good answers it has noted."""

    def __init__(self, crew: Crew, role: str, label: str, url: str, args: dict[str, Any]) -> None:
        self._crew = crew
        self._args = args
        self._url = url
        self.role = role
        self.label = label
        self._history = crew.scene.folder / f"{label}.jsonl"
        self._at = 0
        self.good = 0
        self.child = self._start()
        self._size = 0

    def _start(self) -> Child:
        return self._crew.scene.start(self.role, self.label, **{"url": self._url, **self._args})

    def again(self) -> None:
        """kill -9, and a new life."""
        self.child.kill()
        self.child = self._start()
        self._size = 0

    def look(self) -> int:
        """Good answers so far."""
        if self._history.exists():
            with self._history.open("rb") as f:
                f.seek(self._at)
                new = f.read()
            whole = new.rfind(b"\n") + 1
            self._at += whole
            needle = _GOOD[self.role]
            self.good += sum(needle in line and b'"error"' not in line for line in new[:whole].split(b"\n"))
        return self.good

    def grown(self) -> int:
        """Bytes by which its memory grew since it was first looked at."""
        with open(f"/proc/{self.child.pid}/statm") as f:
            size = int(f.read().split()[1]) * 4096
        self._size = self._size or size
        return size - self._size


class Crew:
    """Everybody who uses the stream. `ways` are the URLs they connect to, one after the other."""

    def __init__(self, scene: Scene, ways: list[str], *, producers: int = 3, workers: int = 2) -> None:
        self.scene = scene
        self._slowest_s = 0.0
        turn = [0]

        def member(role: str, label: str, **args: Any) -> Member:
            turn[0] += 1
            return Member(self, role, label, ways[turn[0] % len(ways)], args)

        self.producers = [
            member("writer", f"p{i}", lanes=2, size=(40, 400), batch=20, pause_ms=15, settle=True)
            for i in range(producers)
        ]
        self.follower = member("reader", "follower")
        self.workers = [
            member(
                "worker", f"w{i}", consumer="c", consumer_config=msgspec.to_builtins(scene.config),
                sink=str(scene.sink), fetch=64,
            )
            for i in range(workers)
        ]  # fmt: skip
        self.saver = member("saver", "saver", names=["shared"], pause_ms=5)
        self.all = [*self.producers, self.follower, *self.workers, self.saver]

    def going(self, since: str, trial: Trial) -> None:
        """Wait until everybody has got two more good answers. Raises ChildFailed when somebody does not go on."""
        before = {m.label: m.look() for m in self.all}
        start = time.monotonic()
        waiting = list(self.all)
        while waiting:
            for m in waiting:
                if not m.child.alive:
                    raise ChildFailed(f"{m.label} has ended after {since}: {m.child.output()}")
            waiting = [m for m in waiting if m.look() < before[m.label] + 2]
            took = time.monotonic() - start
            if waiting and took > RESUME_S:
                raise ChildFailed(f"{took:.0f} s after {since} still without an answer: {[m.label for m in waiting]}")
            time.sleep(0.01)
        took_ms = int((time.monotonic() - start) * 1000)
        trial.counts["slowest_resume_ms"] = max(trial.counts.get("slowest_resume_ms", 0), took_ms)

    def small(self, trial: Trial) -> None:
        """Nobody has grown."""
        for m in self.all:
            grown = m.grown()
            trial.counts["most_grown_bytes"] = max(trial.counts.get("most_grown_bytes", 0), grown)
            if grown > GROWTH_BYTES_MAX:
                trial.fail(f"{m.label} grew by {grown / 1e6:.0f} MB")

    def end(self, trial: Trial, *, forgets: bool) -> int:
        """Everybody ends in order, and the history is judged. Returns the number of records."""
        for m in self.producers:
            m.child.finish(RESUME_S)
        self.scene.drain()
        for m in (self.follower, *self.workers, self.saver):
            m.child.finish(RESUME_S)
        records, letters = self.scene.end(trial, forgets=forgets)
        effects = self.scene.effects(self.scene.sink)
        if len(effects) != records:
            trial.fail(f"the sink holds {len(effects)} rows for {records} records")
        if letters:
            trial.fail(f"{len(letters)} dead letters without a reason to be there")
        return records


def rounds(
    trial: Trial, backend: str, one: Callable[[Crew, Site, random.Random], None], *, forgets: bool,
    ways: Callable[[ExitStack, Site], list[str]] = lambda stack, where: [where.url], options: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Rounds of `one` with a fresh server and crew each, until the trial has enough. `options(rng)`: the server's."""
    rng = random.Random(trial.seed)
    with Nursery(trial.folder) as nursery:
        while trial.more():
            folder = trial.round()
            try:
                with ExitStack() as stack:
                    where = stack.enter_context(site(backend, folder, **(options(rng) if options else {})))
                    config = ConsumerConfig(ack_wait_s=_ACK_WAIT_S, attempts_max=0)
                    scene = Scene(nursery, folder, where, config, rng)
                    scene.fill(10)
                    crew = Crew(scene, ways(stack, where))
                    crew.going("the start", trial)
                    crew.small(trial)
                    one(crew, where, rng)
                    crew.small(trial)
                    records = crew.end(trial, forgets=forgets)
            except (ChildFailed, ConnectionError) as exc:
                trial.fail(str(exc))
                break
            trial.say(f"{trial.reached} so far, {records} records in this round, histories agree")
    return trial.result()


# -- C09, C10 ---------------------------------------------------------------------------------------------------------


def restarts(
    budget_s: float, seed: int, report: Report, *, units: int | None = None, backend: str = "nats"
) -> dict[str, Any]:
    """kill -9 of the server and a restart on its data, under load; once a round it is stopped (SIGSTOP) for longer than every
    timeout instead. Beside it producers and workers are killed now and then."""
    trial = Trial("C09" if backend == "nats" else "C10", budget_s, seed, report, units)

    def one(crew: Crew, where: Site, rng: random.Random) -> None:
        kills = min(_CYCLES, trial.left)
        faults = ["kill"] * kills
        faults.insert(rng.randint(0, kills), "stop")
        for fault in faults:
            if not trial.more():
                return
            time.sleep(rng.uniform(0.1, 0.6))
            if fault == "kill":
                _kill(where, rng)
                trial.reached += 1
            else:
                where.server.pause()
                time.sleep(LONG_S)
                where.server.resume()
                trial.add(stops=1)
            if rng.random() < 0.3:
                rng.choice([*crew.producers, *crew.workers]).again()
                trial.add(clients_killed=1)
            crew.going(f"the server's {fault}", trial)
            trial.say(f"{trial.reached} kills")

    return rounds(trial, backend, one, forgets=backend == "nats", options=_weaker_or_not(backend))


def _weaker_or_not(backend: str) -> Callable[[random.Random], dict[str, Any]]:
    """kill -9 leaves the page cache: the settings that are not safe against a power cut must be safe against this."""
    if backend == "nats":
        return lambda rng: {"sync_interval": rng.choice(("always", '"2m"'))}
    return lambda rng: {"appendfsync": rng.choice(("always", "everysec"))}


def _kill(where: Site, rng: random.Random) -> None:
    where.server.kill()
    time.sleep(rng.choice((0, 0, rng.uniform(0, 0.8))))
    if rng.random() < 0.2:  # again, while it reads its data
        where.server.launch()
        time.sleep(rng.uniform(0, 0.1))
        where.server.kill()
    where.server.start()


# -- C11 --------------------------------------------------------------------------------------------------------------


def partitions(
    budget_s: float, seed: int, report: Report, *, units: int | None = None, backend: str = "nats"
) -> dict[str, Any]:
    """Two ways to the server, each through a proxy of its own, which go through random schedules of faults: refuse, drop, one
    way, stall, trickle, delay, half open, cuts in the middle of a frame; one step in ten outlasts every timeout."""
    trial = Trial(named("C11", backend), budget_s, seed, report, units)
    proxies: list[FaultProxy] = []

    def ways(stack: ExitStack, where: Site) -> list[str]:
        proxies[:] = [stack.enter_context(FaultProxy("127.0.0.1", where.server.port)) for _ in range(2)]
        return [p.through(where.url) for p in proxies]

    def one(crew: Crew, where: Site, rng: random.Random) -> None:
        for _ in range(min(_CYCLES, trial.left)):
            if not trial.more():
                return
            steps = [_step(rng, proxies) for _ in range(rng.randint(3, 6))]
            for p in proxies:
                p.forward()
            crew.going(" + ".join(steps), trial)
            crew.small(trial)
            trial.reached += 1
            trial.add(steps=len(steps))
            trial.say(f"{trial.reached} schedules")
        for p in proxies:
            c = p.counters
            trial.add(swallowed=c.swallowed_up + c.swallowed_down, resets=c.resets)

    return rounds(trial, backend, one, forgets=False, ways=ways)


def _step(rng: random.Random, proxies: list[FaultProxy]) -> str:
    """One fault on one way, for a while. Says which."""
    proxy = rng.choice(proxies)
    after = rng.choice((None, None, rng.randint(1, 3000)))
    kind = rng.choice(("refuse", "drop", "up", "down", "stall", "trickle", "delay", "half_open", "cut"))
    if kind == "cut":
        proxy.cut(after_bytes=after)
    elif kind in ("up", "down"):
        proxy.one_way("up" if kind == "up" else "down", after_bytes=after)
    elif kind == "trickle":
        proxy.trickle(rng.choice((1, 64, 1024)), 0.01, after_bytes=after)
    elif kind == "delay":
        proxy.delay(rng.uniform(0.01, 0.5), after_bytes=after)
    else:
        if kind == "refuse":
            proxy.cut()
        proxy.set(Mode(kind=kind), after_bytes=after)  # type: ignore[arg-type]
    lasts = LONG_S if rng.random() < 0.1 else rng.uniform(0.02, 0.8)
    time.sleep(lasts)
    if rng.random() < 0.5:
        proxy.forward()
    return f"{kind} for {lasts:.1f} s"


__all__ = ["Crew", "partitions", "restarts", "rounds"]
