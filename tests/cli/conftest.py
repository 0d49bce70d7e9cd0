"""The command line in-process (`cli`), as a process (`spawn`), and streams made ready."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from conftest import run

import mist
from mist.broker.base import Message, StreamConfig
from mist.cli.main import main
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.protocol.subject import subject_for
from mist.testing.servers import MissingServer, run_nats, run_redis

_names = itertools.count(1)
ROOT = Path(__file__).parents[2]


class Result(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str
    raw: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.raw)

    @property
    def lines(self) -> list[Any]:
        return [msgspec.json.decode(line) for line in self.raw.splitlines()]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a home, a working directory and an environment of its own."""
    for name in list(os.environ):
        if name.startswith("MIST_") or name in ("NO_COLOR", "FORCE_COLOR", "PAGER", "TERM", "LINES", "COLUMNS"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


class Cli:
    """`cli("tail", "s", stdin=b"…")` runs one command in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def __call__(self, *args: str, stdin: bytes = b"") -> Result:
        out, err = io.BytesIO(), io.StringIO()
        with self._patch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", write_through=True))
            patch.setattr(sys, "stderr", err)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
            code = main(list(args))
            sys.stdout.flush()
            raw = out.getvalue()
        return Result(code, raw.decode("utf-8", "replace"), err.getvalue(), raw)

    def ok(self, *args: str, stdin: bytes = b"") -> Result:
        """The same, and it has to succeed."""
        result = self(*args, stdin=stdin)
        assert result.code == 0, (args, result)
        return result


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(monkeypatch)


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[str], str]]:
    """`servers("nats")` is the URL of a server, started at the first call and empty at every call."""
    with ExitStack() as stack:
        urls: dict[str, str] = {}

        async def empty(url: str) -> None:
            async with mist.connect(url) as broker:
                for name in await broker.streams():
                    await broker.delete(name)

        def give(kind: str) -> str:
            if kind not in urls:
                try:
                    server = stack.enter_context(run_nats() if kind == "nats" else run_redis())
                except MissingServer as exc:
                    if os.environ.get("CI"):
                        raise
                    pytest.skip(str(exc))
                urls[kind] = server.url
            run(empty(urls[kind]))
            return urls[kind]

        yield give


@pytest.fixture(params=["memory", "log", "nats", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path, servers: Callable[[str], str]) -> str:
    """A broker of its own for the test."""
    if request.param == "memory":
        return f"memory:cli-{os.getpid()}-{next(_names)}"
    return f"log:{tmp_path / 'data'}" if request.param == "log" else servers(request.param)


@pytest.fixture
def log(tmp_path: Path) -> str:
    return f"log:{tmp_path / 'data'}"


def envelope(n: int, type: str = "trace.span", **kw: Any) -> Envelope:
    """A small envelope, the same for the same n."""
    payload = kw.pop("payload", {"n": n, "attrs": {"latency_ms": n * 10, "model": f"m{n % 2}"}})
    return Envelope.new(
        type, payload, source=kw.pop("source", "test"), id=kw.pop("id", f"id-{n}"), timestamp_ns=n + 1, **kw
    )


def message(env: Envelope) -> Message:
    return Message(subject_for(env.type), encode(env), env.id)


def fill(url: str, stream: str, messages: list[Message] | int, *, config: StreamConfig | None = None) -> list[int]:
    """Append to a stream; an int makes that many spans."""
    if isinstance(messages, int):
        messages = [message(envelope(n)) for n in range(1, messages + 1)]

    async def work() -> list[int]:
        async with mist.connect(url) as broker:
            return await (await broker.open(stream, config=config)).append(messages)

    return run(work())


def with_broker(url: str, work: Callable[[Any], Any]) -> Any:
    """Run `await work(broker)`."""

    async def body() -> Any:
        async with mist.connect(url) as broker:
            return await work(broker)

    return run(body())


def records(url: str, stream: str) -> list[Any]:
    """Every record of a stream."""

    async def body(broker: Any) -> list[Any]:
        opened = await broker.open(stream, create=False)
        info = await opened.info()
        out: list[Any] = []
        after = info.first - 1
        while after < info.last:
            page = await opened.read(after=after, limit=1000)
            out.extend(page.records)
            after = page.scanned
        return out

    return with_broker(url, body)


def content(url: str, stream: str) -> list[tuple[str, bytes, str, Any]]:
    """What must be the same after a copy."""
    return [(r.subject, r.data, r.id, r.headers) for r in records(url, stream)]


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start `mist` as a process; whatever still runs at the end is stopped."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*args: str, **kw: Any) -> subprocess.Popen[bytes]:
        kw.setdefault("stdout", subprocess.PIPE)
        kw.setdefault("stderr", subprocess.PIPE)
        kw.setdefault("stdin", subprocess.DEVNULL)
        env = {**os.environ, "PYTHONPATH": str(ROOT), **kw.pop("env", {})}
        process = subprocess.Popen([sys.executable, "-m", "mist", *args], env=env, **kw)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr, process.stdin):
            if pipe is not None:
                pipe.close()
