"""The inference router in front of an upstream that answers at once, next to LiteLLM's proxy in the same rounds.

Added latency: questions at a fixed rate, whether or not earlier ones are answered, to the upstream itself and through each
router; what a router adds is the difference of the medians of one round. Throughput: as many questions as get answered, from
CONNECTIONS connections that always have one under way.

Upstream, generator and routers are processes of their own (`python -m bench.infermux ROLE …`). The generator keeps the request as
ready bytes and reads no more of an answer than where it ends; the row of the upstream says what it could do at most. InferMux
runs as `mist up` does: it checks a key, and records every call into its log. A last part asks routers whose TokenTrace is well, dead,
slow or full, an upstream that takes its time: none of that may be felt. LiteLLM runs one worker with a master key and
records nothing. It is installed from bench/peers/litellm.txt into the environment's folder `peers`, once; where that fails the
bench says so and goes on without it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench.common import Board, fresh
from mist.kit.local import free_port

ADDED = "InferMux: latency added to an instant upstream at 200 requests/s"
MANY = "InferMux: requests/s, not streamed, instant upstream, 64 connections"
FELT = "InferMux: what a TokenTrace that is dead, slow or full adds to a call, p99"
COLLECTORS = ("well", "dead", "slow", "full")
UPSTREAM_S = 0.02
"""How long the upstream takes where the p99 is looked at: far less than any model."""
RATE = 200
SECONDS = 10
CONNECTIONS = 64
COUNT = 20_000
START_S = 180.0
DRAIN_S = 10.0
"""How long the answers to what was asked at a fixed rate are waited for at the end."""
ASK_S = 20.0
"""The longest a run of throughput may take; what was answered by then counts."""
MODEL = "gpt-4o-mini"
ANSWER = {
    "id": "chatcmpl-bench", "object": "chat.completion", "created": 1_700_000_000, "model": MODEL,
    "choices": [{
        "index": 0, "logprobs": None, "finish_reason": "stop",
        "message": {"role": "assistant", "content": "The capital of France is Paris. " * 8, "refusal": None},
    }],
    "usage": {"prompt_tokens": 40, "completion_tokens": 64, "total_tokens": 104},
}  # fmt: skip
QUESTION = {
    "model": MODEL, "temperature": 0, "max_tokens": 200,
    "messages": [
        {"role": "system", "content": "You answer in one sentence, and only what you are asked."},
        {"role": "user", "content": "What is the capital of France? " * 5},
    ],
}  # fmt: skip
NAMES = {
    "direct": "the upstream itself: what the generator can do",
    "infermux": "InferMux (mist up --tools infermux), recording",
    "litellm": "LiteLLM's proxy, one worker",
}


# the upstream


class _Upstream(asyncio.Protocol):
    body = json.dumps(ANSWER).encode()
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        import httptools

        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    delay_s = 0.0

    def on_message_complete(self) -> None:
        if self.delay_s:
            asyncio.get_running_loop().call_later(self.delay_s, self._transport.write, self.answer)
        else:
            self._transport.write(self.answer)


class _Slow(_Upstream):
    delay_s = UPSTREAM_S


class _Well(_Upstream):
    """A TokenTrace that takes spans."""

    answer = b"HTTP/1.1 202 Accepted\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class _SlowCollector(_Well):
    delay_s = 2.0


class _FullCollector(_Upstream):
    answer = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"


_SERVERS = {"at-once": _Upstream, "upstream": _Slow, "well": _Well, "slow": _SlowCollector, "full": _FullCollector}


async def _upstream(kind: str) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_SERVERS[kind], "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)


# the generator


class _Client(asyncio.Protocol):
    """One connection; `free` is called when its answer is complete."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        import httptools

        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]
        self._parser = httptools.HttpResponseParser(self)

    def ask(self, began: float) -> None:
        self._began = began
        self._transport.write(self._run.request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        import httptools

        status = self._parser.get_status_code()
        self._parser = httptools.HttpResponseParser(self)
        self._run.answered(self, time.perf_counter() - self._began, status)

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.lost()


class _Run:
    """`rate` questions a second for `seconds`, or (0) as many as get answered, `count` at most, for `seconds` at most."""

    def __init__(self, request: bytes, rate: int, count: int, seconds: float) -> None:
        self.request = request
        self.times: list[float] = []
        self.failed = 0
        self._rate = rate
        self._left = count
        self._under_way = 0
        self._seconds = seconds
        self._idle: list[_Client] = []
        self._waiting: deque[float] = deque()
        self._closing = False
        self._done = asyncio.get_running_loop().create_future()

    async def run(self, clients: list[_Client]) -> dict[str, float]:
        loop = asyncio.get_running_loop()
        self._idle = list(clients)
        cpu, began = time.process_time(), time.perf_counter()
        if self._rate:
            for at in range(self._left):
                loop.call_at(loop.time() + at / self._rate, self._tick)
            limit = self._seconds + DRAIN_S
        else:
            limit = self._seconds
            for client in clients:
                self._next(client)
        try:
            async with asyncio.timeout(limit):
                await asyncio.shield(self._done)
        except TimeoutError:
            pass  # what is unanswered by now is said below
        took = time.perf_counter() - began
        self._closing = True
        ordered = sorted(self.times) or [float("inf")]
        return {
            "answered": len(self.times), "rate": len(self.times) / took, "cpu": (time.process_time() - cpu) / took, "failed": self.failed,
            "unanswered": self._under_way + len(self._waiting), "p50_ms": ordered[len(ordered) // 2] * 1000,
            "p99_ms": ordered[int(len(ordered) * 0.99)] * 1000,
        }  # fmt: skip

    def _tick(self) -> None:
        """The clock of a question starts here, whether or not a connection is free."""
        self._left -= 1
        self._under_way += 1
        if self._idle:
            self._idle.pop().ask(time.perf_counter())
        else:
            self._under_way -= 1
            self._waiting.append(time.perf_counter())

    def _next(self, client: _Client) -> None:
        if self._left:
            self._left -= 1
            self._under_way += 1
            client.ask(time.perf_counter())

    def answered(self, client: _Client, seconds: float, status: int) -> None:
        self._under_way -= 1
        if status == 200:
            self.times.append(seconds)
        else:
            self.failed += 1
        if not self._rate:
            self._next(client)
        elif self._waiting:
            self._under_way += 1
            client.ask(self._waiting.popleft())
        else:
            self._idle.append(client)
        if not self._left and not self._under_way and not self._waiting and not self._done.done():
            self._done.set_result(None)

    def lost(self) -> None:
        if not self._closing and not self._done.done():
            self._done.set_exception(RuntimeError("the server closed a connection"))


async def _generate(url: str, key: str, rate: int, count: int, seconds: float) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(QUESTION).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    run = _Run(head.encode() + body, rate, count, seconds)
    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(lambda: _Client(run), host, int(port)))[1] for _ in range(CONNECTIONS)]
    print(json.dumps(await run.run(clients)), flush=True)


# the routers


class _Running:
    """`url` takes questions with `key`; `pid` is whose CPU time counts (0: nobody's)."""

    def __init__(self, url: str, key: str, pid: int) -> None:
        self.url = url
        self.key = key
        self._pid = pid

    def cpu_s(self) -> float:
        if not self._pid:
            return 0.0
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait(self, process: subprocess.Popen[Any], log: Path) -> None:
        """Until a question is answered."""
        request = urllib.request.Request(  # noqa: S310 - our own address
            f"{self.url}/v1/chat/completions",
            json.dumps(QUESTION).encode(),
            {"content-type": "application/json", "authorization": f"Bearer {self.key}"},
        )
        deadline, why = time.monotonic() + START_S, ""
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
                    assert json.load(answer)["choices"][0]["message"]["content"]
                return
            except (OSError, urllib.error.URLError) as exc:
                why = str(exc)
                time.sleep(0.2)
        raise RuntimeError(f"no answer from {self.url}: {why}; {log.read_text(errors='replace')[-1500:]}")


@contextmanager
def _process(argv: list[str], place: Path, env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    log = place / "output.log"
    with log.open("wb") as output:
        process = subprocess.Popen(argv, cwd=place, env={**os.environ, **env}, stdout=output, stderr=output)
    try:
        yield process, log
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _infermux(base: Path, upstream: str, tokentrace: str = "", name: str = "infermux") -> Iterator[_Running]:
    place, key, port = fresh(base, name), secrets.token_hex(16), free_port()
    place.joinpath("mist.toml").write_text(
        f'url = "log:./log"\n'
        f'[[infermux.providers]]\nname = "upstream"\ntype = "openai"\nbase_url = "{upstream}/v1"\n'
        f'api_key_env = "BENCH_UPSTREAM_KEY"\nmodels = ["{MODEL}"]\n'
        f'[[infermux.keys]]\nname = "bench"\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
    )
    argv = [sys.executable, "-m", "mist", "up", "--tools", "infermux", "--listen", f"127.0.0.1:{port}"]
    argv += ["--tokentrace", tokentrace] if tokentrace else []
    with _process(argv, place, {"BENCH_UPSTREAM_KEY": "sk-bench"}) as (process, log):
        running = _Running(f"http://127.0.0.1:{port}", key, process.pid)
        running.wait(process, log)
        yield running


@contextmanager
def _litellm(base: Path, upstream: str) -> Iterator[_Running]:
    program = _installed()
    place, key, port = fresh(base, "litellm"), f"sk-{secrets.token_hex(32)}", free_port()
    place.joinpath("config.yaml").write_text(
        f"model_list:\n  - model_name: {MODEL}\n    litellm_params:\n      model: openai/{MODEL}\n"
        f"      api_base: {upstream}/v1\n      api_key: sk-bench\n"
    )
    argv = [
        str(program), "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1",
        "--telemetry", "False",
    ]  # fmt: skip
    env = {"LITELLM_MASTER_KEY": key, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    with _process(argv, place, env) as (process, log):
        running = _Running(f"http://127.0.0.1:{port}", key, process.pid)
        running.wait(process, log)
        yield running


def _installed() -> Path:
    """LiteLLM's program, installed once for each state of the pinned file. Raises CalledProcessError, OSError."""
    pins = Path(__file__).parent / "peers" / "litellm.txt"
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()[:12]
    place = Path(sys.prefix) / "peers" / f"litellm-{digest}"
    if not (place / "installed").exists():
        print("  installing LiteLLM into an environment of its own, once (minutes)", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True, capture_output=True)
        pip = [str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        subprocess.run([*pip, "--no-deps", "-r", str(pins)], check=True, capture_output=True, text=True)
        (place / "installed").touch()
    return place / "bin" / "litellm"


# the bench


@contextmanager
def _upstreams(kind: str = "at-once") -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.infermux", "upstream", kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def _asked(running: _Running, rate: int, count: int, seconds: float) -> dict[str, float]:
    """What the generator says, and the CPU time of the router for each answer in us."""
    before = running.cpu_s()
    args = [running.url, running.key, str(rate), str(count), str(seconds)]
    out = subprocess.run(
        [sys.executable, "-m", "bench.infermux", "generate", *args], check=True, capture_output=True, text=True,
        timeout=seconds + DRAIN_S + 60,
    )  # fmt: skip
    found: dict[str, float] = json.loads(out.stdout)
    found["us"] = (running.cpu_s() - before) * 1e6 / max(1.0, found["answered"])
    return found


def run(board: Board, base: Path, rounds: int, scale: float) -> None:
    with ExitStack() as stack:
        upstream = stack.enter_context(_upstreams())
        routers = {"direct": _Running(upstream, "sk-bench", 0)}
        routers["infermux"] = stack.enter_context(_infermux(base, upstream))
        try:
            routers["litellm"] = stack.enter_context(_litellm(base, upstream))
        except (OSError, subprocess.CalledProcessError, RuntimeError) as exc:
            said = (getattr(exc, "stderr", "") or "").strip()[-300:]
            print(f"  LiteLLM: not measured: {exc} {said}", file=sys.stderr, flush=True)
        seconds = max(1.0, SECONDS * scale)
        _added(board, routers, rounds, seconds)
        _throughput(board, routers, rounds, max(500, int(COUNT * scale)))
    _felt(board, base, rounds, max(1.0, SECONDS * scale))


def _felt(board: Board, base: Path, rounds: int, seconds: float) -> None:
    """The same questions at the same time of a round, through four routers that differ in the TokenTrace behind them."""
    board.head(FELT)
    with ExitStack() as stack:
        upstream = stack.enter_context(_upstreams("upstream"))
        routers = {}
        for kind in COLLECTORS:
            url = f"http://127.0.0.1:{free_port()}" if kind == "dead" else stack.enter_context(_upstreams(kind))
            routers[kind] = stack.enter_context(_infermux(base, upstream, url, f"infermux-{kind}"))
        got: dict[str, list[dict[str, float]]] = {name: [] for name in routers}
        for running in routers.values():
            _asked(running, RATE, RATE, 1)
        for at in range(rounds):
            for name in (*COLLECTORS[at % 4 :], *COLLECTORS[: at % 4]):
                got[name].append(_asked(routers[name], RATE, int(RATE * seconds), seconds))
    for name, figures in got.items():
        board.row(FELT, f"a TokenTrace that is {name}: p99", [f["p99_ms"] for f in figures], "ms")
        board.row(FELT, "    p50", [f["p50_ms"] for f in figures], "ms")
    well = statistics.median(f["p99_ms"] for f in got["well"])
    for name in COLLECTORS[1:]:
        ratio = statistics.median(f["p99_ms"] for f in got[name]) / well
        board.verdict(FELT, f"p99, {name} to well", ratio, 1.05, at_least=False, unit="x")


def _added(board: Board, routers: dict[str, _Running], rounds: int, seconds: float) -> None:
    board.head(ADDED)
    count = int(RATE * seconds)
    got: dict[str, list[dict[str, float]]] = {name: [] for name in routers}
    for running in routers.values():
        _asked(running, RATE, max(50, count // 10), seconds / 10)
    for _ in range(rounds):
        for name, running in routers.items():
            got[name].append(_asked(running, RATE, count, seconds))
    for name, figures in got.items():
        board.row(ADDED, NAMES[name], [f["p50_ms"] for f in figures], "ms p50")
        board.row(ADDED, "    p99", [f["p99_ms"] for f in figures], "ms")
        if name != "direct":
            board.row(ADDED, "    CPU of the router for each", [f["us"] for f in figures], "us")
            _whole(board, ADDED, figures)
    added = {
        name: [f["p50_ms"] - d["p50_ms"] for f, d in zip(got[name], got["direct"], strict=True)]
        for name in routers
        if name != "direct"
    }
    for name, values in added.items():
        board.row(ADDED, f"added by {NAMES[name]}", values, "ms p50")
    board.verdict(ADDED, "added, median", statistics.median(added["infermux"]), 1.0, at_least=False, unit=" ms")


def _throughput(board: Board, routers: dict[str, _Running], rounds: int, count: int) -> None:
    board.head(MANY)
    got: dict[str, list[dict[str, float]]] = {name: [] for name in routers}
    for _ in range(rounds):
        for name, running in routers.items():
            got[name].append(_asked(running, 0, count, ASK_S))
    for name, figures in got.items():
        board.row(MANY, NAMES[name], [f["rate"] for f in figures], "requests/s")
        board.row(MANY, "    p50", [f["p50_ms"] for f in figures], "ms")
        board.row(MANY, "    p99", [f["p99_ms"] for f in figures], "ms")
        board.row(MANY, "    generator CPU", [f["cpu"] for f in figures], "s/s")
        if name != "direct":
            board.row(MANY, "    CPU of the router for each", [f["us"] for f in figures], "us")
            if failed := [f["failed"] for f in figures if f["failed"]]:
                board.row(MANY, "    not answered with 200", failed, "requests")
    ours = [f["rate"] for f in got["infermux"]]
    board.verdict(MANY, "requests/s", statistics.median(ours), 1500, unit="/s")
    if "litellm" in got:
        theirs = [f["rate"] for f in got["litellm"]]
        ratio = statistics.median([a / b for a, b in zip(ours, theirs, strict=True)])
        board.verdict(MANY, "to LiteLLM's proxy", ratio, 1.0)


def _whole(board: Board, subject: str, figures: list[dict[str, float]]) -> None:
    """Latencies mean little where not all was answered."""
    missed = [f["failed"] + f["unanswered"] for f in figures]
    if any(missed):
        board.row(subject, "    not answered, or not with 200", missed, "requests")


def main() -> None:
    role, *args = sys.argv[1:]
    import uvloop

    if role == "upstream":
        uvloop.run(_upstream(*args))
    else:
        url, key, rate, count, seconds = args
        uvloop.run(_generate(url, key, int(rate), int(count), float(seconds)))


if __name__ == "__main__":
    main()
