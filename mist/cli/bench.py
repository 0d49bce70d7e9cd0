"""`mist bench`: what this machine and this backend give, in records per second and in latency.

It works on a stream of its own, `bench-<random>`, on the broker of -u, and deletes it afterwards. `--peers` runs what one
might use instead, one round after the other: on a temporary file beside a log, on the same server beside a server's
broker (an adapter's module `peers`). For the project's own gates see `make bench`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import secrets
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from mist.broker.base import ConsumerConfig, Message, Stream
from mist.broker.registry import adapter
from mist.cli.session import Session, current
from mist.cli.wrap import noun
from mist.errors import InvalidArgument, Unsupported
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN, TraceSpan

app = noun("Measure rates and latencies, on a stream that is made for it and removed.")

MESSAGES_MAX = 10_000_000
BATCH_MAX = 10_000

Count = Annotated[int, typer.Option("-n", "--count", help="How many records.", min=1, max=MESSAGES_MAX)]
Batch = Annotated[int, typer.Option("--batch", help="Records per append or page.", min=1, max=BATCH_MAX)]
Rounds = Annotated[int, typer.Option("--rounds", help="How often; the median counts.", min=1, max=100)]
Peers = Annotated[bool, typer.Option("--peers", help="Also run what one might use instead.")]
COLUMNS = ["what", "records_per_s", "megabytes_per_s", "p50_us", "p99_us", "rounds"]


def _envelopes(count: int) -> list[Envelope]:
    now = time.time_ns()
    out = []
    for i in range(count):
        attrs = {"model": "cirrus-small", "provider": "bench", "tokens_in": 800 + i % 97, "tokens_out": 120 + i % 31}
        span = TraceSpan(
            trace_id=f"{i // 8:032x}", span_id=f"{i:016x}", operation="chat", start_ns=now, end_ns=now + 812_000_000,
            status="ok", attrs=attrs,
        )  # fmt: skip
        out.append(Envelope.new(TRACE_SPAN, span, source="mist-bench"))
    return out


def _messages(count: int) -> list[Message]:
    return [Message(e.type, codec.encode(e), e.id) for e in _envelopes(count)]


def _batches(items: list[Message], size: int) -> Iterator[list[Message]]:
    for i in range(0, len(items), size):
        yield items[i : i + size]


@contextlib.asynccontextmanager
async def _stream(session: Session) -> AsyncIterator[Stream]:
    """A stream of our own on the broker of -u, removed at the end, also after an error."""
    if session.url.scheme == "file":
        raise InvalidArgument("bench needs a broker, not a file", hint="for example -u log:./bench-data")
    broker = await session.connect(create=True)
    name = f"bench-{secrets.token_hex(4)}"
    stream = await broker.open(name)
    session.out.detail(f"stream {name} on {broker.url}, durability {(await stream.info()).durability}")
    try:
        yield stream
    finally:
        await broker.delete(name)


def _row(what: str, count: int, size: int, seconds: list[float], waits: list[float] | None = None) -> dict[str, Any]:
    took = median(seconds)
    ordered = sorted(waits or [])
    return {
        "what": what,
        "records_per_s": round(count / took),
        "megabytes_per_s": round(size / took / 1e6, 1),
        "p50_us": round(ordered[len(ordered) // 2] * 1e6, 1) if ordered else None,
        "p99_us": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6, 1) if ordered else None,
        "rounds": len(seconds),
    }


async def _publish(stream: Stream, items: list[Message], batch: int) -> tuple[float, list[float]]:
    waits = []
    start = before = time.perf_counter()
    for group in _batches(items, batch):
        await stream.append(group)
        now = time.perf_counter()
        waits.append(now - before)
        before = now
    return time.perf_counter() - start, waits


@app.command("pub")
async def pub(count: Count = 100_000, batch: Batch = 1000, rounds: Rounds = 3, peers: Peers = False) -> None:
    """Append batches, each awaited; latency is per append.

    Examples:
      mist bench pub
      mist bench pub -u log:./bench-data --batch 1 -n 2000 --peers --format json
    """
    session = current()
    seconds: list[float] = []
    waits: list[float] = []
    rivals: dict[str, list[float]] = {}
    others = _peers(session, "PUBLISHING") if peers else {}
    async with _stream(session) as stream:
        with session.out.progress("appending", rounds) as progress:
            for i in range(rounds):
                items = _messages(count)
                took, more = await _publish(stream, items, batch)
                seconds.append(took)
                waits += more
                for name, rival in others.items():
                    rivals.setdefault(name, []).append(await rival(items, batch))
                progress.at(i + 1)
        durability = (await stream.info()).durability
    size = sum(len(m.data) for m in items)
    rows = [_row(f"mist, batches of {batch}, {durability}", count, size, seconds, waits)]
    rows += [_row(name, count, size, took) for name, took in rivals.items()]
    session.out.rows(rows, COLUMNS)


@app.command("sub")
async def sub(count: Count = 100_000, batch: Batch = 1000, rounds: Rounds = 3, peers: Peers = False) -> None:
    """Replay with decode, then consume with acks; latency is per page or fetch.

    Examples:
      mist bench sub
      mist bench sub -u nats://localhost:4222 --peers
      mist bench sub -n 1000000 --batch 256
    """
    session = current()
    read: list[float] = []
    read_waits: list[float] = []
    consumed: list[float] = []
    consumed_waits: list[float] = []
    rivals: dict[str, list[float]] = {}
    others = _peers(session, "CONSUMING") if peers else {}
    async with _stream(session) as stream:
        items = _messages(count)
        await _publish(stream, items, 1000)
        with session.out.progress("reading", rounds) as progress:
            for i in range(rounds):
                start = before = time.perf_counter()
                after = n = 0
                while n < count:
                    page = await stream.read(after=after, limit=batch)
                    n += len([codec.decode(r.data) for r in page.records])
                    after = page.scanned
                    read_waits.append(time.perf_counter() - before)
                    before = time.perf_counter()
                read.append(time.perf_counter() - start)
                consumer = await stream.consumer(f"bench-{i}", ConsumerConfig())
                start = before = time.perf_counter()
                n = 0
                while n < count:
                    deliveries = await consumer.fetch(limit=batch, wait_s=5.0)
                    for d in deliveries:
                        codec.decode(d.record.data)
                    n += await consumer.ack(deliveries)
                    consumed_waits.append(time.perf_counter() - before)
                    before = time.perf_counter()
                consumed.append(time.perf_counter() - start)
                for name, rival in others.items():
                    rivals.setdefault(name, []).append(await rival(items, batch))
                progress.at(i + 1)
    size = sum(len(m.data) for m in items)
    session.out.rows(
        [
            _row(f"replay and decode, pages of {batch}", count, size, read, read_waits),
            _row(f"consume, decode and ack, fetches of {batch}", count, size, consumed, consumed_waits),
            *(_row(name, count, size, took) for name, took in rivals.items()),
        ],
        COLUMNS,
    )


@app.command("e2e")
async def e2e(
    count: Count = 2000,
    rate: Annotated[float, typer.Option("--rate", help="Records per second.", min=1, max=100_000)] = 1000.0,
) -> None:
    """Latency from before an append to a follower on a connection of its own.

    Examples:
      mist bench e2e
      mist bench e2e --rate 200 -n 1000 --format json
    """
    session = current()
    waits: list[float] = []
    acks: list[float] = []
    async with _stream(session) as stream:
        other = await adapter(session.url.scheme)(session.url)
        async with other:
            follower = await other.open(stream.name, create=False)
            sent: dict[str, float] = {}

            async def follow() -> None:
                after = 0
                while len(waits) < count:
                    page = await follower.read(after=after, wait_s=1.0)
                    now = time.perf_counter()
                    waits.extend(now - sent[r.id] for r in page.records)
                    after = page.scanned

            start = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(follow())
                for i, message in enumerate(_messages(count)):
                    if (left := start + i / rate - time.perf_counter()) > 0:
                        await asyncio.sleep(left)
                    sent[message.id] = before = time.perf_counter()
                    await stream.append([message])
                    acks.append(time.perf_counter() - before)
            took = time.perf_counter() - start
    session.out.rows(
        [
            _row(f"append to follower, {rate:g}/s", count, 0, [took], waits),
            _row(f"append to its ack, {rate:g}/s", count, 0, [took], acks),
        ],
        COLUMNS,
    )


@app.command("codec")
async def codec_(count: Count = 100_000, rounds: Rounds = 5, peers: Peers = False) -> None:
    """Encode and decode envelopes in memory.

    Examples:
      mist bench codec
      mist bench codec --peers --format json
    """
    session = current()
    envelopes = _envelopes(count)
    encoded = [codec.encode(e) for e in envelopes]
    lines = codec.encode_lines(envelopes)
    cases: dict[str, Callable[[], object]] = {
        "encode": lambda: [codec.encode(e) for e in envelopes],
        "encode lines": lambda: codec.encode_lines(envelopes),
        "decode and verify": lambda: [codec.decode(d) for d in encoded],
        "decode lines": lambda: codec.decode_lines(lines),
        "decode from outside (screened)": lambda: [codec.decode_foreign(d) for d in encoded],
    }
    if peers:
        import json

        documents = [json.loads(d) for d in encoded]
        cases["peer: json.dumps"] = lambda: [json.dumps(d) for d in documents]
        cases["peer: json.loads"] = lambda: [json.loads(d) for d in encoded]
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    session.out.rows([_row(name, count, len(lines), took) for name, took in seconds.items()], COLUMNS)


Rival = Callable[[list[Message], int], Awaitable[float]]


def _peers(session: Session, kind: str) -> dict[str, Rival]:
    """What else does this work, each giving its seconds. Raises Unsupported where we know nothing to compare with."""
    url = session.url
    if url.scheme in ("log", "memory"):
        if kind != "PUBLISHING":
            raise Unsupported(
                "peers", url.scheme, hint="`mist bench pub --peers` has some; readers are in `make bench`"
            )

        def threaded(run: Callable[[Path, list[Message], int], None]) -> Rival:
            return lambda items, batch: asyncio.to_thread(_timed, run, items, batch)

        return {name: threaded(run) for name, run in _APPENDING.items()}
    package = adapter(url.scheme).__module__.partition(".")[0]
    try:
        module = importlib.import_module(f"{package}.peers")
    except ModuleNotFoundError as exc:
        raise Unsupported("peers", url.scheme, hint="its adapter names nothing to compare with") from exc

    def bound(run: Callable[[str, list[bytes], int], Awaitable[float]]) -> Rival:
        return lambda items, batch: run(str(url), [m.data for m in items], batch)

    return {name: bound(run) for name, run in getattr(module, kind).items()}


def _timed(run: Callable[[Path, list[Message], int], None], items: list[Message], batch: int) -> float:
    with tempfile.TemporaryDirectory(prefix="mist-bench-", dir=os.curdir) as folder:
        start = time.perf_counter()
        run(Path(folder), items, batch)
        return time.perf_counter() - start


def _sqlite(folder: Path, items: list[Message], batch: int) -> None:
    db = sqlite3.connect(folder / "log.db", isolation_level=None)
    db.execute("pragma journal_mode=wal")
    db.execute("pragma synchronous=full")
    db.execute("create table log(sequence integer primary key, id text unique, subject text, body blob)")
    for group in _batches(items, batch):
        db.execute("begin")
        db.executemany(
            "insert or ignore into log(id, subject, body) values(?,?,?)", [(m.id, m.subject, m.data) for m in group]
        )
        db.execute("commit")
    db.close()


def _plain(folder: Path, items: list[Message], batch: int) -> None:
    fd = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    for group in _batches(items, batch):
        os.write(fd, b"".join([m.data + b"\n" for m in group]))
        os.fdatasync(fd)
    os.close(fd)


_APPENDING: dict[str, Callable[[Path, list[Message], int], None]] = {
    "peer: SQLite WAL, synchronous=FULL, unique id": _sqlite,
    "peer: plain file, write + fdatasync": _plain,
}
