"""C09c: a NATS cluster loses its leader, then a follower. C10f: a Redis primary dies and its replica is promoted.

Three NATS nodes with `replicas=3` promise that nothing acknowledged is lost with a node. Redis replicates after it has
answered: a failover takes the last records with it, unless every append waits for a replica (`wait_replicas=1`). Both are tried,
without waiting the loss is measured, with waiting there must be none. One thing no setting of Redis gives: a record is readable
before a replica has it, so a reader may have seen what a failover takes back. That is counted too.
"""

from __future__ import annotations

import json
import random
import socket
import time
import urllib.request
from contextlib import ExitStack
from typing import Any

from mist.broker.base import ConsumerConfig
from mist.kit.local import LocalServer, NatsServer
from mist.testing.history import Checker
from mist.testing.proxy import FaultProxy
from mist.testing.servers import run_nats_cluster, run_redis_pair

from .campaign import Report, Trial
from .network import Crew
from .processes import ChildFailed, Nursery
from .scene import Scene
from .sites import Site

_CYCLES = 2
_LINK_S = 0.02
"""How far the replica is behind. On one machine it would hardly be, and no failover would lose anything."""


# -- NATS -------------------------------------------------------------------------------------------------------------


def leader_of(nodes: list[NatsServer], timeout_s: float = 30) -> NatsServer:
    """The node that leads the campaign's stream. Raises ChildFailed when there is none in time."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        for node in nodes:
            for name in _leaders(node) if node.alive else ():
                for other in nodes:
                    if other.alive and name == _name(other):
                        return other
        time.sleep(0.05)
    raise ChildFailed(f"no leader in {timeout_s:g} s")


def _get(node: NatsServer, path: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{node.monitor_port}{path}", timeout=2) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except (OSError, ValueError):
        return {}


def _leaders(node: NatsServer) -> list[str]:
    """The leaders of the campaign's stream as this node knows them."""
    accounts = _get(node, "/jsz?streams=true").get("account_details") or []
    streams = [s for a in accounts for s in a.get("stream_detail") or []]
    return [
        s["cluster"]["leader"] for s in streams if "leader" in s.get("cluster", {}) and not s["name"].startswith("KV")
    ]


def _name(node: NatsServer) -> str:
    return str(_get(node, "/varz").get("server_name", ""))


def cluster(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """Three nodes, R3: kill -9 of the stream's leader under load, then of a follower, each started again afterwards."""
    trial = Trial("C09c", budget_s, seed, report, units)
    rng = random.Random(seed)
    with Nursery(trial.folder) as nursery:
        while trial.more():
            folder = trial.round()
            try:
                with run_nats_cluster(sync_interval=rng.choice(("always", '"2m"'))) as nodes:
                    where = Site("nats", f"{nodes[0].url}&replicas=3")
                    scene = Scene(nursery, folder, where, ConsumerConfig(ack_wait_s=3, attempts_max=0), rng)
                    scene.fill(10)
                    crew = Crew(scene, [where.url])
                    crew.going("the start", trial)
                    for i in range(min(2 * _CYCLES, trial.left)):
                        time.sleep(rng.uniform(0.2, 0.8))
                        leader = leader_of(nodes)
                        victim = rng.choice([n for n in nodes if n is not leader]) if i % 2 else leader
                        what = "follower" if i % 2 else "leader"
                        victim.kill()
                        crew.going(f"the death of the {what}", trial)
                        victim.start()
                        crew.going(f"the return of the {what}", trial)
                        trial.reached += 1
                        trial.add(**{f"{what}s_killed": 1})
                        trial.say(f"{trial.reached} nodes killed")
                    records = crew.end(trial, forgets=True)
            except (ChildFailed, ConnectionError) as exc:
                trial.fail(str(exc))
                break
            trial.say(f"{trial.reached} nodes killed, {records} records in this round, histories agree")
    return trial.result()


# -- Redis ------------------------------------------------------------------------------------------------------------


def command(server: LocalServer, text: str) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as s:
        s.sendall(f"{text}\r\n".encode())
        return s.recv(65536)


def _until_linked(replica: LocalServer, timeout_s: float = 30) -> None:
    until = time.monotonic() + timeout_s
    while b"master_link_status:up" not in command(replica, "INFO replication"):
        if time.monotonic() > until:
            raise ChildFailed(f"the replica did not follow in {timeout_s:g} s")
        time.sleep(0.02)


_SERIOUS = frozenset({"lost", "moved", "doubled", "order", "hole", "unread"})
"""What must not happen to acknowledged records with `wait_replicas=1`."""


def failover(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """kill -9 of the primary under load, promotion of the replica behind the same address; the old primary comes back as
    its replica. Every other round appends wait for the replica."""
    trial = Trial("C10f", budget_s, seed, report, units)
    rng = random.Random(seed)
    waits = bool(seed % 2)
    with Nursery(trial.folder) as nursery:
        while trial.more():
            folder = trial.round()
            try:
                with ExitStack() as stack:
                    pair = list(stack.enter_context(run_redis_pair()))
                    for server in pair:  # a full copy begins at once, not when more replicas may have come
                        command(server, "CONFIG SET repl-diskless-sync-delay 0")
                    link = stack.enter_context(FaultProxy("127.0.0.1", pair[0].port))
                    command(pair[1], f"REPLICAOF 127.0.0.1 {link.port}")
                    _until_linked(pair[1])
                    link.delay(_LINK_S)
                    proxy = stack.enter_context(FaultProxy("127.0.0.1", pair[0].port))
                    url = proxy.through(pair[0].url) + ("?wait_replicas=1" if waits else "")
                    where = Site("redis", url)
                    scene = Scene(nursery, folder, where, ConsumerConfig(), rng)
                    args = {"lanes": 3, "size": (40, 400), "batch": 20, "settle": True}
                    producers = [scene.start("writer", f"p{i}", **args) for i in range(2)]
                    follower = scene.start("reader", "follower")
                    time.sleep(rng.uniform(0.5, 1.2))
                    _fail_over(pair, proxy, link)
                    time.sleep(rng.uniform(0.3, 1.0))
                    for child in (*producers, follower):
                        child.finish(40)
                    scene.read()
            except (ChildFailed, ConnectionError) as exc:
                trial.fail(str(exc))
                break
            checker = Checker(remote=True)
            checker.add_files(sorted(folder.glob("*.jsonl")))
            _judge(trial, checker, waits=waits)
            trial.reached += 1
            waits = not waits
            trial.say(f"{trial.reached} failovers: {trial.counts}")
    return trial.result()


def _fail_over(pair: list[Any], proxy: FaultProxy, link: FaultProxy) -> None:
    old, new = pair
    link.cut()  # what was on its way to the replica is lost with its primary
    old.kill()
    if not command(new, "REPLICAOF NO ONE").startswith(b"+OK"):
        raise ChildFailed("the replica was not promoted")
    proxy.retarget("127.0.0.1", new.port)
    proxy.cut()
    old.argv += ["--repl-diskless-sync-delay", "0"]
    old.start()  # nobody can reach it but us: the address leads to the new one
    command(old, f"REPLICAOF 127.0.0.1 {new.port}")
    _until_linked(old)


def _judge(trial: Trial, checker: Checker, *, waits: bool) -> None:
    verdict = checker.check()
    how = "waiting" if waits else "not_waiting"
    trial.add(**{f"acked_{how}": verdict.counts["acked"], f"lost_{how}": verdict.totals.get("lost", 0)})
    trial.add(**{f"read_and_taken_back_{how}": verdict.totals.get("replay", 0)})
    if waits and _SERIOUS & set(verdict.totals):
        trial.fail(str(verdict))
    if not waits:
        trial.note("without wait_replicas a failover loses what the replica had not got: see lost_not_waiting")
