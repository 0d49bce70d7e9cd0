"""The HTTP door: `POST /mist` into the embedded log, next to starlette's bare 202 handler on uvicorn.

Servers and the load generator are processes of their own: `python -m bench.http ROLE …`. The generator keeps requests as ready
bytes, one in flight on each connection, and looks at nothing but the status of an answer; what it could do at most is the
row of the bare protocol, which answers without reading the request.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.common import BATCH, Board, encoded, fresh, interleaved, ratio

ONE = "HTTP: one envelope per request, 64 connections"
MANY = "HTTP: NDJSON of 1000 per request, 4 connections"
CONNECTIONS = 64
CONNECTIONS_MANY = 4
ROLES = {
    "mist": "mist: POST /mist, stored in the log (power)",
    "mist-uvicorn": "mist: the same on uvicorn, without its own protocol",
    "starlette": "starlette's bare 202 on uvicorn, nothing stored",
    "bare": "bare protocol, nothing read: what the generator can do",
}


# the servers


async def _until_told(url: str) -> float:
    """Serve until a line comes on standard input; the CPU time that took."""
    print(url, flush=True)
    began = time.process_time()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    return time.process_time() - began


async def _mist(place: str, own: bool) -> None:
    import mist
    from mist.kit.server import AppServer
    from mist.transport.server import ingest

    async with mist.connect(f"log:{place}") as broker:
        stream = await broker.open("trace", config=mist.StreamConfig(durability="power"))
        async with AppServer(ingest(stream), path="/mist", http="auto" if own else "httptools") as http:
            cpu_s = await _until_told(http.url)
        print(json.dumps({"cpu_s": cpu_s, "records": (await stream.info()).records}), flush=True)


async def _starlette() -> None:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from mist.kit.server import AppServer

    async def accept(request: Request) -> Response:
        await request.body()
        return Response(status_code=202)

    app = Starlette(routes=[Route("/mist", accept, methods=["POST"])])
    async with AppServer(app, path="/mist", http="httptools") as http:
        print(json.dumps({"cpu_s": await _until_told(http.url)}), flush=True)


class _Bare(asyncio.Protocol):
    """Answers each request of known size, unread."""

    size = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]
        self._have = 0
        self._want = 0

    def data_received(self, data: bytes) -> None:
        if not self._want:
            head = data.index(b"\r\n\r\n") + 4
            at = data.index(b"content-length: ") + 16
            self._want = head + int(data[at : data.index(b"\r\n", at)])
        self._have += len(data)
        if self._have >= self._want:
            self._have = self._want = 0
            self._transport.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n")


async def _bare() -> None:
    server = await asyncio.get_running_loop().create_server(_Bare, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mist"
    print(json.dumps({"cpu_s": await _until_told(url)}), flush=True)


# the generator


class _Client(asyncio.Protocol):
    def __init__(self, todo: Iterator[bytes], done: asyncio.Future[None], times: list[float]) -> None:
        self._todo = todo
        self._done = done
        self._times = times
        self._sent = 0.0
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]

    def go(self) -> None:
        request = next(self._todo, None)
        if request is None:
            self._done.set_result(None)
            return
        self._sent = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        head = data.find(b"\r\n\r\n")
        at = data.find(b"content-length: ", 0, head if head >= 0 else 0)
        if head < 0 or (at >= 0 and head + 4 + int(data[at + 16 : data.index(b"\r", at)]) > len(data)):
            self._rest = data
            return
        self._rest = b""
        if not data.startswith(b"HTTP/1.1 202"):
            if not self._done.done():
                self._done.set_exception(RuntimeError(data[:400].decode(errors="replace")))
            return
        self._times.append(time.perf_counter() - self._sent)
        self.go()


async def _generate(url: str, count: int, batch: int, connections: int) -> None:
    host, port = url.split("/")[2].split(":")
    loop = asyncio.get_running_loop()
    start = time.time_ns()  # ids differ from run to run
    bodies = [encoded(start + i) for i in range(count)]
    if batch > 1:
        bodies = [b"".join(b + b"\n" for b in bodies[i : i + batch]) for i in range(0, count, batch)]
    kind = b"application/json" if batch == 1 else b"application/x-ndjson"
    head = b"POST /mist HTTP/1.1\r\nhost: %s:%s\r\ncontent-type: %s\r\n" % (host.encode(), port.encode(), kind)
    requests = [b"%scontent-length: %d\r\n\r\n%s" % (head, len(b), b) for b in bodies]
    todo = iter(requests)
    times: list[float] = []
    done = [loop.create_future() for _ in range(connections)]
    clients = []
    for future in done:
        _, client = await loop.create_connection(lambda f=future: _Client(todo, f, times), host, int(port))
        clients.append(client)
    cpu, begin = time.process_time(), time.perf_counter()
    for client in clients:
        client.go()
    await asyncio.gather(*done)
    took = time.perf_counter() - begin
    times.sort()
    print(json.dumps({
        "rate": count / took, "cpu": (time.process_time() - cpu) / took,
        "p50_ms": times[len(times) // 2] * 1000, "p99_ms": times[int(len(times) * 0.99)] * 1000,
    }), flush=True)  # fmt: skip


def _process(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.http", *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@contextmanager
def _serving(role: str, place: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    process = _process(role, str(place))
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.communicate()


def _measured(
    role: str, base: Path, count: int, batch: int, connections: int, seen: dict[str, list[dict[str, float]]]
) -> float:
    """Envelopes per second: a warm-up, then the run. What was answered is counted in the stream."""
    with _serving(role, fresh(base, "http")) as (url, server):
        warm = max(batch, count // 10 // batch * batch)
        figures: dict[str, float] = {}
        for many in (warm, count):
            with _process("generate", url, str(many), str(batch), str(connections)) as generator:
                answer, _ = generator.communicate(timeout=300)
                figures = json.loads(answer)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write("\n")
        server.stdin.flush()
        told = json.loads(server.stdout.readline())
        assert told.get("records", warm + count) == warm + count
        seen.setdefault(role, []).append({**figures, "us": told["cpu_s"] * 1e6 / (warm + count)})
        return figures["rate"]


def run(board: Board, base: Path, rounds: int, scale: float) -> None:
    for subject, count, batch, connections, target in (
        (ONE, int(40_000 * scale), 1, CONNECTIONS, 10_000),
        (MANY, int(200_000 * scale) // BATCH * BATCH, BATCH, CONNECTIONS_MANY, 150_000),
    ):
        board.head(subject)
        seen: dict[str, list[dict[str, float]]] = {}
        got = interleaved(
            {role: partial(_measured, role, base, count, batch, connections, seen) for role in ROLES}, rounds
        )
        for role, values in got.items():
            board.row(subject, ROLES[role], values, "env/s")
            for key, what in (
                ("us", "server CPU us/env"),
                ("p50_ms", "p50 ms"),
                ("p99_ms", "p99 ms"),
                ("cpu", "generator CPU s/s"),
            ):
                board.row(subject, f"    {what}", [figures[key] for figures in seen[role]], "")
        board.verdict(subject, "envelopes/s", sorted(got["mist"])[rounds // 2], target, unit="/s")
        if batch == 1:
            # 10,000 of the 22,000 that starlette answers on the machine for which the targets were set
            board.verdict(subject, "of starlette's bare 202", ratio(got["mist"], got["starlette"]), 0.45)


def main() -> None:
    role, *args = sys.argv[1:]
    import uvloop

    if role == "generate":
        uvloop.run(_generate(args[0], int(args[1]), int(args[2]), int(args[3])))
    elif role == "starlette":
        uvloop.run(_starlette())
    elif role == "bare":
        uvloop.run(_bare())
    else:
        uvloop.run(_mist(args[0], role == "mist"))


if __name__ == "__main__":
    main()
