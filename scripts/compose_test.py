"""Run compose/ for real: `make compose-test`.

Starts the servers of the tests through testcontainers; brings up compose.yaml and compose.cluster.yaml, waits for health,
posts spans through the door, runs `mist demo` over NATS and over Redis, kills servers with SIGKILL in the middle, counts, and
brings everything down again with its volumes. Base images that the engine does not hold are not pulled but stood in for
(scripts/stand_ins.py), and removed at the end; only the engine's build cache stays.

    python scripts/compose_test.py                 needs an engine that answers, and compose
    python scripts/compose_test.py --own-engine    starts a dockerd of its own (as root) in a temporary directory

Ends with 0 when all checks held, 1 when one did not, 77 when it cannot run here; then it says what is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import httpx  # noqa: E402

import mist  # noqa: E402
from mist.broker.base import Message, StreamConfig  # noqa: E402
from mist.errors import MistError  # noqa: E402
from mist.kit.local import free_port  # noqa: E402
from mist.protocol.codec import encode  # noqa: E402
from mist.protocol.payloads import TraceSpan  # noqa: E402
from scripts import stand_ins  # noqa: E402

CANNOT = 77
HEALTHY_S = 120.0
PROJECT = f"mist-test-{os.getpid()}"
OURS = ("mist-stack:local", "mist-nats:local")
DEMO_SPANS = 20_000
CLUSTER_RECORDS = 1_000
DEAD_S = 3.0


_PLATFORM = ("MIST_PORT", "OTLP_GRPC_PORT", "TRACE_PORT")
"""What the platform publishes: the door, OTLP over gRPC, the questions."""


class CannotRun(Exception):
    """Something of this machine is missing."""


class Failed(Exception):
    """A check did not hold."""


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def check(holds: bool, what: str) -> None:
    """Say what holds; raise when it does not."""
    if not holds:
        raise Failed(what)
    say(f"ok: {what}")


def out(argv: list[str], *, env: dict[str, str] | None = None, may_fail: bool = False, timeout_s: float = 600) -> str:
    """What a command prints. Raises Failed with the end of what it said when it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=timeout_s, cwd=ROOT)
    if done.returncode and not may_fail:
        raise Failed(f"{' '.join(argv)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


# the engine


@contextlib.contextmanager
def engine(own: bool) -> Iterator[list[str]]:
    """`docker …` that reaches an engine. Raises CannotRun."""
    docker = shutil.which("docker")
    if docker is None:
        raise CannotRun("no docker on PATH (Debian: apt-get install docker.io docker-compose)")
    if not own:
        found = subprocess.run([docker, "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True)
        if found.returncode:
            hint = "; as root, --own-engine starts one" if os.geteuid() == 0 and shutil.which("dockerd") else ""
            raise CannotRun(f"no engine answers: {found.stderr.strip().splitlines()[-1]}{hint}")
        say(f"engine {found.stdout.strip()}")
        yield [docker]
        return
    dockerd = shutil.which("dockerd")
    if dockerd is None or os.geteuid() != 0:
        raise CannotRun("--own-engine needs root and a dockerd on PATH (Debian: apt-get install docker.io)")
    undo = _network()
    folder = Path(tempfile.mkdtemp(prefix="mist-engine-"))
    host = f"unix://{folder}/docker.sock"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [dockerd, "--host", host, "--data-root", str(folder / "data"), "--exec-root", str(folder / "run"),
             "--pidfile", str(folder / "pid")],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        os.environ["DOCKER_HOST"] = host
        until = time.monotonic() + 60
        while subprocess.run([docker, "version"], capture_output=True).returncode:
            if process.poll() is not None or time.monotonic() > until:
                raise CannotRun(f"dockerd does not start here: {(folder / 'log').read_text()[-600:]}")
            time.sleep(0.2)
        say(f"engine {out([docker, 'version', '--format', '{{.Server.Version}}']).strip()}, started for this test")
        yield [docker]
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
        undo()
        say(
            f"engine stopped, {folder} {'is left' if folder.exists() else 'removed'}, bridge and packet filter as before"
        )


def _network() -> Callable[[], None]:
    """What a dockerd changes for all of the machine and leaves behind: the filter's rules, a bridge, forwarding. Returns
    how to put it back."""
    forwarding = Path("/proc/sys/net/ipv4/ip_forward")
    before = forwarding.read_text()
    bridge = Path("/sys/class/net/docker0").exists()
    rules = {
        restore: subprocess.run([save], capture_output=True).stdout
        for save, restore in (("iptables-save", "iptables-restore"), ("ip6tables-save", "ip6tables-restore"))
        if shutil.which(save) and shutil.which(restore)
    }

    def undo() -> None:
        if not bridge and shutil.which("ip"):
            subprocess.run(["ip", "link", "delete", "docker0"], capture_output=True)
        for restore, text in rules.items():
            # a table that had no rules is not in the text: empty it by name
            empty = b"".join(
                b"*%s\n%sCOMMIT\n" % (table, b"".join(b":%s ACCEPT\n" % chain for chain in chains))
                for table, chains in TABLES.items()
                if b"*" + table not in text
            )
            subprocess.run([restore], input=empty + text, capture_output=True)
        forwarding.write_text(before)

    return undo


TABLES = {b"filter": (b"INPUT", b"FORWARD", b"OUTPUT"), b"nat": (b"PREROUTING", b"INPUT", b"OUTPUT", b"POSTROUTING")}
"""The packet filter's tables that a dockerd writes to, with their own chains."""


def compose_command(docker: list[str]) -> list[str]:
    """`docker compose` or docker-compose, whichever is there."""
    for words in ([*docker, "compose"], ["docker-compose"]):
        if shutil.which(words[0]) and subprocess.run([*words, "version"], capture_output=True).returncode == 0:
            say(out([*words, "version"]).splitlines()[0])
            return words
    raise CannotRun("neither `docker compose` nor docker-compose is there (Debian: apt-get install docker-compose)")


def pinned() -> list[str]:
    """The base images that the Dockerfiles and the compose files name."""
    found: dict[str, None] = {}
    for path in (ROOT / "Dockerfile", ROOT / "compose/nats/Dockerfile"):
        found |= dict.fromkeys(re.findall(r"^ARG \w+_IMAGE=(\S+)", path.read_text(), re.MULTILINE))
    for path in sorted((ROOT / "compose").glob("*.yaml")):
        found |= dict.fromkeys(re.findall(r"^ +image: (\S+)", path.read_text(), re.MULTILINE))
    return [image for image in found if image not in OURS]


@contextlib.contextmanager
def images(docker: list[str]) -> Iterator[None]:
    """All base images are there: the real ones, or stand-ins that are removed afterwards. Raises CannotRun."""
    made: list[str] = []
    before = [i for i in OURS if _has(docker, i)]
    folder = Path(tempfile.mkdtemp(prefix="mist-stand-ins-"))
    try:
        for image in pinned():
            if _has(docker, image):
                say(f"{image} is there{' (a stand-in)' if stand_ins.is_one(docker, image) else ''}")
                continue
            try:
                stand_ins.build(docker, image, folder)
            except stand_ins.CannotBuild as exc:
                raise CannotRun(f"the engine has no {image}, and no stand-in can be made: {exc}") from exc
            made.append(image)
            say(f"{image} is not there: stood in for, {_version(docker, image)}")
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for image in [*(i for i in OURS if i not in before), *made]:
            subprocess.run([*docker, "image", "rm", "--force", image], capture_output=True)
        for label in (stand_ins.LABEL, "mist.stage"):
            subprocess.run([*docker, "image", "prune", "--force", "--filter", f"label={label}"], capture_output=True)


def _has(docker: list[str], image: str) -> bool:
    return subprocess.run([*docker, "image", "inspect", image], capture_output=True).returncode == 0


def _version(docker: list[str], image: str) -> str:
    program = {"nats": "nats-server", "valkey": "valkey-server", "python": "python"}[image.split(":")[0].split("/")[-1]]
    return out([*docker, "run", "--rm", "--network", "none", image, program, "--version"]).strip()


# one compose file, up


class Up:
    """A compose file that is up: its services, its ports."""

    def __init__(self, docker: list[str], compose: list[str], file: str, env: dict[str, str]) -> None:
        self.docker = docker
        self.file = file
        self.words = [*compose, "--project-name", PROJECT, "--file", str(ROOT / "compose" / file)]
        self.env = {**os.environ, "COMPOSE_ANSI": "never", **env}

    def up(self, **env: str) -> None:
        """Bring it up, with these settings from now on, and wait for every service's health."""
        self.env |= env
        out([*self.words, "up", "--detach", "--build"], env=self.env)
        self.healthy()

    def healthy(self) -> None:
        until = time.monotonic() + HEALTHY_S
        while True:
            states = {c["Name"].lstrip("/"): c["State"] for c in self.containers()}
            bad = {n: s["Health"]["Status"] if s["Running"] else s["Status"] for n, s in states.items()}
            bad = {n: s for n, s in bad.items() if s != "healthy"}
            if states and not bad:
                say(f"ok: {self.file}: {len(states)} services are healthy")
                return
            if time.monotonic() > until:
                logs = "".join(out([*self.docker, "logs", "--tail", "20", n], may_fail=True) for n in bad)
                raise Failed(f"{self.file}: not healthy after {HEALTHY_S:g} s: {bad}\n{logs}")
            time.sleep(0.5)

    def containers(self) -> list[dict[str, Any]]:
        ids = out([*self.docker, "ps", "--all", "--quiet", "--filter", LABEL]).split()
        found: list[dict[str, Any]] = json.loads(out([*self.docker, "inspect", *ids])) if ids else []
        return found

    def id(self, service: str) -> str:
        words = ["ps", "--all", "--quiet", "--filter", LABEL, "--filter", f"label=com.docker.compose.service={service}"]
        return out([*self.docker, *words]).strip()

    def mist(self, service: str, *args: str) -> Any:
        """A command of ours inside a service's container, as JSON."""
        return json.loads(out([*self.docker, "exec", self.id(service), "mist", *args, "-j"]))

    def kill(self, service: str) -> None:
        out([*self.docker, "kill", "--signal", "KILL", self.id(service)])
        say(f"{service} killed (SIGKILL)")

    def stop(self, service: str) -> None:
        out([*self.docker, "stop", self.id(service)])

    def start(self, service: str) -> None:
        out([*self.docker, "start", self.id(service)])
        self.healthy()

    def down(self) -> None:
        """Containers, networks and volumes go. Raises Failed when something stays."""
        out([*self.words, "down", "--volumes", "--remove-orphans", "--timeout", "50"], env=self.env)
        left = [
            line
            for noun in (["ps", "--all"], ["volume", "ls"], ["network", "ls"])
            for line in out([*self.docker, *noun, "--quiet", "--filter", LABEL]).split()
        ]
        check(not left, f"{self.file} is down, no container, volume or network is left")


LABEL = f"label=com.docker.compose.project={PROJECT}"


@contextlib.contextmanager
def running(docker: list[str], compose: list[str], file: str, env: dict[str, str]) -> Iterator[Up]:
    up = Up(docker, compose, file, env)
    try:
        yield up
    except BaseException:
        with contextlib.suppress(Failed):
            print(out([*up.words, "logs", "--no-color", "--tail", "15"], env=up.env)[-6000:], flush=True)
        raise
    finally:
        up.down()


# what is checked


def hardened(up: Up) -> None:
    """What the compose files promise about every container is what the engine made of it."""
    for c in up.containers():
        name, host = c["Name"].lstrip("/"), c["HostConfig"]
        user = c["Config"]["User"].split(":")[0]
        limits = host["Memory"] and host["NanoCpus"] and host["PidsLimit"]
        if user in ("", "0", "root") or not host["ReadonlyRootfs"] or not limits or host["CapDrop"] != ["ALL"]:
            raise Failed(f"{name} is not hardened: user {user!r}, {host}")
        if not any("no-new-privileges" in o for o in host["SecurityOpt"] or []):
            raise Failed(f"{name} may gain privileges")
    say(f"ok: {up.file}: not root, read-only, no capabilities, no new privileges, memory, cpus and pids limited")


def span(n: int) -> bytes:
    payload = TraceSpan(
        trace_id=f"{n:032x}", span_id=f"{n:016x}", operation="chat", start_ns=n, end_ns=n + 1_000_000, status="ok",
        attrs={"model": "m", "tokens_in": n},
    )  # fmt: skip
    return encode(mist.Envelope.new("trace.span", payload, source="compose-test", id=f"compose-{n}"))


def post(port: int, first: int, count: int) -> int:
    """Post spans until they are acknowledged; posting again what was not is safe. Returns how many tries failed."""
    body = b"".join(span(n) + b"\n" for n in range(first, first + count))
    failed = 0
    until = time.monotonic() + HEALTHY_S
    while True:
        try:
            answer = httpx.post(
                f"http://127.0.0.1:{port}/mist", content=body, timeout=20, trust_env=False,
                headers={"content-type": "application/x-ndjson"},
            )  # fmt: skip
            if answer.status_code == 202:
                return failed
            said = f"{answer.status_code} {answer.text}"
        except httpx.TransportError as exc:
            said = repr(exc)
        failed += 1
        if time.monotonic() > until:
            raise Failed(f"posts are not taken: {said}")
        time.sleep(0.5)


def stored(up: Up, want: int) -> None:
    """The store of the tokentrace service comes to hold exactly so many spans."""
    until = time.monotonic() + HEALTHY_S
    total = -1
    while total < want:
        with contextlib.suppress(Failed):
            total = up.mist("tokentrace", "trace", "stats")["total"]
        if time.monotonic() > until:
            break
        time.sleep(0.3)
    check(total == want, f"{total} of {want} acknowledged spans are in the store")


def door_and_worker(up: Up, port: int, broker: str) -> None:
    """Spans through the door, the broker killed under them, everything there once."""
    post(port, 1, 1000)
    stored(up, 1000)
    if broker:
        up.kill(broker)
        with ThreadPoolExecutor(1) as pool:
            posting = pool.submit(post, port, 1001, 1000)
            time.sleep(DEAD_S)
            check(not posting.done(), f"nothing is acknowledged while {broker} is dead")
            up.start(broker)
            say(f"ok: 1,000 more are acknowledged after {posting.result()} refused tries")
    else:
        post(port, 1001, 1000)
    stored(up, 2000)
    info = up.mist("tokentrace", "stream", "info", "trace")
    check(info["durability"] == "power", f"the stream says durability {info['durability']}")


def demo(url: str) -> None:
    """`mist demo` of this checkout against a published port."""
    with tempfile.TemporaryDirectory(prefix="mist-demo-") as folder:
        text = out([sys.executable, "-m", "mist", "demo", "-u", url, "--dir", folder, "--spans", str(DEMO_SPANS), "-j"],
                   env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    found = json.loads(text)
    keys = ("acknowledged", "stored", "lost", "duplicated", "worker_kills", "elapsed_s", "ok")
    say(f"mist demo -u {url}: " + ", ".join(f"{k} {found[k]}" for k in keys))
    check(found["ok"] and found["lost"] == found["duplicated"] == 0, f"mist demo over {url.split(':')[0]}")


def containers_of_tests() -> None:
    """mist.testing.servers takes containers from this engine, through testcontainers."""
    env = {**os.environ, "MIST_TEST_DOCKER": "required"}
    text = out([sys.executable, "-m", "pytest", "-q", "tests/testing/test_containers.py"], env=env)
    check(" skipped" not in text, f"testcontainers: {text.strip().splitlines()[-1]}")


def one_machine(docker: list[str], compose: list[str]) -> None:
    ports = {n: str(free_port()) for n in ("NATS_PORT", "NATS_MONITOR_PORT", "REDIS_PORT", *_PLATFORM)}
    door = int(ports["MIST_PORT"])
    with running(docker, compose, "compose.yaml", ports) as up:
        up.up()
        hardened(up)
        door_and_worker(up, door, "nats")
        up.stop("infermux")  # it would answer the demo's questions, of which it knows nothing
        demo(f"nats://127.0.0.1:{ports['NATS_PORT']}?monitor={ports['NATS_MONITOR_PORT']}")
        up.up(MIST_URL="redis://redis:6379/0")
        door_and_worker(up, door, "redis")
        up.stop("infermux")
        demo(f"redis://127.0.0.1:{ports['REDIS_PORT']}/0")
        up.up(MIST_URL="log:/data/log")
        door_and_worker(up, door, "")


def cluster(docker: list[str], compose: list[str]) -> None:
    names = ("NATS1_PORT", "NATS2_PORT", "NATS3_PORT", "NATS_MONITOR_PORT", *_PLATFORM)
    ports = {n: str(free_port()) for n in names}
    seeds = ",".join(f"127.0.0.1:{ports[f'NATS{i}_PORT']}" for i in (1, 2, 3))
    url = f"nats://{seeds}?monitor={ports['NATS_MONITOR_PORT']}"
    with running(docker, compose, "compose.cluster.yaml", ports) as up:
        up.up()
        hardened(up)
        asyncio.run(lose_nodes(up, url, int(ports["MIST_PORT"])))


async def lose_nodes(up: Up, url: str, door: int) -> None:
    """Append without a pause while the stream's leader, then a follower, is killed: nothing acknowledged is lost."""
    async with mist.connect(url) as broker:
        stream = await broker.open("acked", config=StreamConfig(durability="replicated"))
        info = await stream.info()
        check(info.durability == "replicated", f"stream acked is {info.durability}")
        acked: dict[str, int] = {}
        repeats = 0
        enough = asyncio.Event()

        async def append() -> None:
            """Ten at a time, as fast as they are acknowledged, again with the same ids where the fate is unknown."""
            nonlocal repeats
            n = 0
            while not enough.is_set():
                batch = [Message("acked.n", b"%d" % i, f"n-{i}") for i in range(n, n + 10)]
                until = time.monotonic() + HEALTHY_S
                while True:
                    try:
                        sequences = await stream.append(batch)
                        break
                    except MistError as exc:
                        if not exc.retryable or time.monotonic() > until:
                            raise
                        repeats += 1
                        await asyncio.sleep(0.1)
                acked.update(zip((m.id for m in batch), sequences, strict=True))
                n += 10

        async def more(count: int) -> None:
            want = len(acked) + count
            while len(acked) < want and not appending.done():
                await asyncio.sleep(0.01)
            if appending.done():
                await appending

        appending = asyncio.create_task(append())
        posted = 0
        for role in ("leader", "follower"):
            await more(CLUSTER_RECORDS)
            leading = await asyncio.to_thread(leader, up)
            node = leading if role == "leader" else next(n for n in NODES if n != leading)
            say(f"{len(acked)} acknowledged; {node} is a {role} of the stream")
            await asyncio.to_thread(up.kill, node)
            before = len(acked)
            await more(CLUSTER_RECORDS)
            await asyncio.to_thread(post, door, posted, 500)
            posted += 500
            say(f"ok: {len(acked) - before} more acknowledged, and 500 through the door, with {node} dead")
            await asyncio.to_thread(up.start, node)
        enough.set()
        await appending
        say(f"{repeats} appends were repeated with the same ids")
        await asyncio.to_thread(stored, up, posted)
        found: dict[str, int] = {}
        after = doubled = 0
        while True:
            page = await stream.read(after=after, limit=1000)
            for record in page.records:
                doubled += record.id in found
                found[record.id] = record.sequence
            after = page.scanned
            if after >= page.last:
                break
        lost = [i for i, sequence in acked.items() if found.get(i) != sequence]
        check(
            not lost and not doubled, f"{len(acked)} acknowledged, {len(lost)} lost, {doubled} doubled on three nodes"
        )


NODES = ("nats1", "nats2", "nats3")


def leader(up: Up) -> str:
    """The node that leads the stream, asked of any node that knows."""
    for node in NODES:
        words = ["exec", up.id(node), "wget", "-q", "-O", "-", "http://127.0.0.1:8222/jsz?accounts=1&streams=1"]
        text = out([*up.docker, *words], may_fail=True)
        for account in json.loads(text or "{}").get("account_details", []):
            for stream in account.get("stream_detail", []):
                name = (stream.get("cluster") or {}).get("leader")
                if "acked" in stream["name"] and name:
                    return str(name)
    raise Failed("no node knows the leader of the stream acked")


PARTS: dict[str, Callable[[list[str], list[str]], None]] = {
    "testcontainers": lambda docker, compose: containers_of_tests(),
    "compose.yaml": one_machine,
    "compose.cluster.yaml": cluster,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--own-engine", action="store_true", help="start a dockerd for this test (root)")
    parser.add_argument("--only", choices=PARTS, help="this part only")
    options = parser.parse_args(argv)
    try:
        with engine(options.own_engine) as docker:
            compose = compose_command(docker)
            with images(docker):
                for part in (options.only,) if options.only else PARTS:
                    say(f"--- {part}")
                    PARTS[part](docker, compose)
    except CannotRun as exc:
        print(f"compose-test cannot run here: {exc}", file=sys.stderr)
        return CANNOT
    except (Failed, MistError) as exc:
        print(f"FAILED: {exc}", file=sys.stderr)
        return 1
    say("all checks held")
    return 0


BEGAN = time.monotonic()

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
