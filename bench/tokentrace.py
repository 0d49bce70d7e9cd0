"""TokenTrace: from the stream to queryable, questions over a large store, a very large trace, memory, rebuild.

Spans as they are met: random trace ids, four models, eight attributes, an envelope of about 500 bytes, one span started
every millisecond. Each ingest is a process of its own, from opening the stream to the last commit, into an empty store.
The floor is the same rows, ready made, put into the same tables by `sqlite3.executemany`, a transaction for each page:
what no ingest into SQLite can beat without doing something smarter. Questions go over HTTP, one after the other, to a
process that does nothing else. `python -m bench.tokentrace ROLE …` is one of these processes.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.common import BATCH, Board, fresh, interleaved

INGEST = "TokenTrace: from the log to queryable"
ASK = "TokenTrace: questions over HTTP"
MEMORY = "TokenTrace: resident memory of the ingest"
LONG = "the-long-one"
T0 = 1_790_000_000_000_000_000
STEP_NS = 1_000_000
MODELS = (("openai", "gpt-4o-mini"), ("openai", "gpt-4o"), ("anthropic", "claude-sonnet"), ("google", "gemini-flash"))
REQUESTS = 200
_BODY = (
    b'{"version":"1","id":"%032x","source":"infermux","type":"trace.span","timestamp_ns":%d,"payload":{"trace_id":"%s",'
    b'"span_id":"%016x","parent_id":"%s","operation":"chat.completion","start_ns":%d,"end_ns":%d,"status":"%s","attrs":{'
    b'"model":"%s","provider":"%s","tokens_in":%d,"tokens_out":%d,"cost_usd":%.8f,"ttft_ms":%.3f,"session":"s-%d",'
    b'"stream":true}}}'
)


def span(i: int, trace_id: bytes, parent: bytes, chance: random.Random) -> bytes:
    """An envelope with span `i`."""
    provider, model = MODELS[int(chance.random() ** 2 * 4)]
    took_ns = int(chance.lognormvariate(6.5, 0.8) * 1e6)
    tokens_in, tokens_out = int(chance.lognormvariate(6, 1)), int(chance.lognormvariate(5, 1))
    start = T0 + i * STEP_NS
    return _BODY % (
        i, start + took_ns, trace_id, i, parent, start, start + took_ns, b"error" if i % 50 == 7 else b"ok",
        model.encode(), provider.encode(), tokens_in, tokens_out, (tokens_in + 4 * tokens_out) * 1.5e-7,
        took_ns / 9e6, i % 977,
    )  # fmt: skip


def spans(count: int, per_trace: int, *, first: int = 0) -> Iterator[bytes]:
    """Spans of traces of that many spans, those of one trace beside one another; 0 = all of the trace LONG."""
    chance = random.Random(first + per_trace)
    trace_id = LONG.encode()
    for i in range(first, first + count):
        root = per_trace > 0 and i % per_trace == 0
        if root:
            trace_id = b"%032x" % chance.getrandbits(128)
        yield span(i, trace_id, b"" if root else b"%016x" % (i - 1), chance)


# the processes


async def _fill(log: str, count: int, per_trace: int, first: int) -> None:
    """Append spans to the stream."""
    import mist

    async with mist.connect(f"log:{log}") as broker:
        stream = await broker.open("trace")
        found = spans(count, per_trace, first=first)
        for at in range(first, first + count, BATCH):
            some = [mist.Message("trace.span", data, f"{at + n:032x}") for n, data in zip(range(BATCH), found)]  # noqa: B905
            await stream.append(some)


async def _ingest(log: str, place: str, marks: list[int], *, rebuilding: bool = False) -> None:
    """Ingest up to each mark and say what that took and holds."""
    import mist
    from mist.tools.tokentrace.ingest import ingest, rebuild
    from mist.tools.tokentrace.store import Store

    began = time.perf_counter()
    async with mist.connect(f"log:{log}") as broker:
        stream = await broker.open("trace", create=False)
        with Store.open(place) as store:
            for mark in marks:
                if rebuilding:
                    done = await rebuild(broker, [stream], store)
                else:
                    done = await ingest(broker, stream, store, until=mark)
                used = resource.getrusage(resource.RUSAGE_SELF)
                print(json.dumps({
                    "spans": done.spans, "s": time.perf_counter() - began, "busy_s": done.busy_s,
                    "cpu_s": used.ru_utime + used.ru_stime, "mb": _resident_mb(), "cpu": time.process_time(),
                }), flush=True)  # fmt: skip


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


async def _floor(log: str, place: str, count: int) -> None:
    """The rows of the stream, made before the clock runs, by executemany into the tables of a store."""
    import mist
    from mist.tools.tokentrace import sqlite
    from mist.tools.tokentrace.ingest import PAGE, batch_of
    from mist.tools.tokentrace.schema import COLUMNS
    from mist.tools.tokentrace.store import Store

    pages = []
    async with mist.connect(f"log:{log}") as broker:
        stream = await broker.open("trace", create=False)
        after = 0
        while after < count:
            page = await stream.read(after=after, limit=PAGE)
            pages.append([tuple(row) for row in batch_of(page, after).rows])
            after = page.scanned
    Store.open(place).close()
    driver = sqlite.SqliteDriver.open(Path(place))
    sql = f"INSERT INTO spans ({','.join(COLUMNS)}) VALUES ({','.join('?' * len(COLUMNS))}) ON CONFLICT DO NOTHING"
    began, cpu = time.perf_counter(), time.process_time()
    for rows in pages:
        driver.begin()
        driver.execute_many(sql, rows)
        driver.commit()
    took, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    driver.close()
    print(json.dumps({"spans": count, "s": took, "cpu_s": cpu_s}), flush=True)


async def _serve(place: str) -> None:
    """The questions of a store, until the input ends."""
    from mist.kit.server import AppServer, Site
    from mist.tools.tokentrace.api import Api
    from mist.tools.tokentrace.readers import Readers

    readers = Readers(place)
    async with AppServer(Site(Api(readers).doors()), path="") as http:
        print(http.url, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    readers.close()


# the parts


def _process(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.tokentrace", *map(str, args)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def _answers(*args: object) -> list[dict[str, float]]:
    process = _process(*args)
    out, _ = process.communicate()
    assert process.returncode == 0, args
    return [json.loads(line) for line in out.splitlines()]


def _rate(base: Path, role: str, log: Path, count: int, seen: dict[str, list[dict[str, float]]], name: str) -> float:
    """Spans per second of one process into an empty store."""
    place = fresh(base, "tokentrace-store") / "t.db"
    (figures,) = _answers(role, log, place, count)
    assert figures["spans"] == count
    db = sqlite3.connect(place)
    assert db.execute("SELECT count(*) FROM spans").fetchone()[0] == count
    db.close()
    seen.setdefault(name, []).append(
        {**figures, "bytes": sum(f.stat().st_size for f in place.parent.iterdir()) / count}
    )
    return count / figures["s"]


def ingesting(board: Board, base: Path, rounds: int, scale: float) -> None:
    board.head(INGEST)
    count = int(300_000 * scale) // BATCH * BATCH
    logs = {per: fresh(base, f"tokentrace-log-{per}") for per in (1, 20)}
    for per, log in logs.items():
        _answers("fill", log, count, per, 0)
    seen: dict[str, list[dict[str, float]]] = {}
    cases = {
        "ingest, a trace per span": ("ingest", logs[1]),
        "ingest, traces of 20 spans": ("ingest", logs[20]),
        "floor: executemany of ready rows, a trace per span": ("floor", logs[1]),
        "floor: executemany of ready rows, traces of 20 spans": ("floor", logs[20]),
    }
    got = interleaved(
        {name: partial(_rate, base, role, log, count, seen, name) for name, (role, log) in cases.items()}, rounds
    )
    for name, values in got.items():
        board.row(INGEST, name, values, "spans/s")
        board.row(INGEST, "    CPU, whole process", [f["cpu_s"] * 1e6 / count for f in seen[name]], "us/span")
        board.row(INGEST, "    on the disk", [f["bytes"] for f in seen[name]], "B/span")
    for name in list(cases)[:2]:
        board.verdict(INGEST, name, sorted(got[name])[rounds // 2], 60_000, unit="/s")
    _rebuilding(board, base, logs[1], count, max(1, rounds // 2))
    _postgres(board, logs[1], count, max(1, rounds // 2))


def _rebuilding(board: Board, base: Path, log: Path, count: int, rounds: int) -> None:
    place = fresh(base, "tokentrace-store") / "t.db"
    _answers("ingest", log, place, count)
    rates = [count / _answers("rebuild", log, place, count)[0]["s"] for _ in range(rounds)]
    board.row(INGEST, "rebuild, a trace per span, one transaction", rates, "spans/s")


def _postgres(board: Board, log: Path, count: int, rounds: int) -> None:
    from mist.testing.postgres import run_postgres
    from mist.testing.servers import MissingServer
    from mist.tools.tokentrace.postgres import SCHEMA

    try:
        with run_postgres(own_process=True) as server:
            import psycopg

            rates = []
            for _ in range(rounds):
                with psycopg.connect(server.url, autocommit=True) as db:
                    db.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE".encode())
                rates.append(count / _answers("ingest", log, server.url, count)[0]["s"])
    except (MissingServer, ImportError) as exc:
        print(f"  PostgreSQL: not measured: {exc}", file=sys.stderr)
        return
    board.row(INGEST, "ingest into PostgreSQL, a trace per span", rates, "spans/s")


@contextmanager
def _serving(place: Path) -> Iterator[http.client.HTTPConnection]:
    process = _process("serve", place)
    try:
        assert process.stdout is not None
        host = process.stdout.readline().strip().removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=120)
        yield connection
        connection.close()
    finally:
        process.kill()
        process.communicate()


def _asked(connection: http.client.HTTPConnection, path: str, times: list[float]) -> dict[str, object]:
    began = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    times.append((time.perf_counter() - began) * 1000)
    assert answer.status == 200, body
    found: dict[str, object] = json.loads(body)
    return found


def asking(board: Board, base: Path, scale: float) -> None:
    """Over a million spans and one trace of a tenth of that, which began in the middle of them."""
    board.head(ASK)
    count, long = int(1_000_000 * scale), int(100_000 * scale)
    log = fresh(base, "tokentrace-log-ask")
    for number, per, first in ((count // 2, 20, 0), (long, 0, count // 2), (count - count // 2, 20, count // 2 + long)):
        _answers("fill", log, number, per, first)
    place = fresh(base, "tokentrace-ask") / "t.db"
    _answers("ingest", log, place, count + long)
    since, until = T0 + 61_234_567_890, T0 + int(count * 0.9) * STEP_NS + 12_345
    window = f"since={since}&until={until}"
    with _serving(place) as connection:
        assert _asked(connection, "/stats", [])["total_spans"] == count + long
        first = _asked(connection, f"/traces/{LONG}?limit=100", [])
        assert first["count"] == 100
        questions = {
            "/stats": ("/stats", 50.0),
            "/stats, a window of 90 % that cuts minutes": (f"/stats?{window}", 0.0),
            "/metrics by model, the same window": (f"/metrics?{window}&groupby=model", 0.0),
            "/metrics by model and minute, the same window": (f"/metrics?{window}&groupby=model&bucket=minute", 0.0),
            f"/traces/ID of {long:,} spans, first 100": (f"/traces/{LONG}?limit=100", 200.0),
            f"/traces/ID of {long:,} spans, next 100": (f"/traces/{LONG}?limit=100&cursor={first['next']}", 200.0),
            "/traces, newest 100": ("/traces?limit=100", 0.0),
            "/errors, newest 100": ("/errors?limit=100", 0.0),
        }
        times: dict[str, list[float]] = {name: [] for name in questions}
        for _ in range(max(1, int(REQUESTS * min(1.0, scale)))):
            for name, (path, _) in questions.items():
                _asked(connection, path, times[name])
    for name, (_, target) in questions.items():
        ordered = sorted(times[name])
        median = board.row(ASK, name, ordered, "ms")
        board.row(ASK, "    p99", [ordered[int(len(ordered) * 0.99)]], "ms")
        if target:
            board.verdict(ASK, f"{name}, median", median, target, at_least=False, unit=" ms")


def remembering(board: Board, base: Path, count: int) -> None:
    """Of one process that ingests that many spans, at a tenth, a fifth, two fifths and at the end."""
    board.head(MEMORY)
    log = fresh(base, "tokentrace-log-memory")
    _answers("fill", log, count, 20, 0)
    marks = [count // 10, count // 5, count * 2 // 5, count]
    found = _answers("ingest", log, fresh(base, "tokentrace-memory") / "t.db", ",".join(map(str, marks)))
    last = 0.0
    for n, (mark, figures) in enumerate(zip(marks, found, strict=True)):
        board.row(MEMORY, f"after {mark:,} spans", [figures["mb"]], "MB")
        board.row(MEMORY, "    rate since the mark before", [(mark - (marks[n - 1] if n else 0)) / (figures["s"] - last)], "spans/s")  # fmt: skip
        last = figures["s"]
    # at the first mark of a small count SQLite's page cache may not be full yet
    grown = found[-1]["mb"] / found[1]["mb"]
    board.verdict(MEMORY, f"at {marks[-1]:,} spans to that at {marks[1]:,}", grown, 1.1, at_least=False)


def run(board: Board, base: Path, rounds: int, scale: float, memory_spans: int) -> None:
    ingesting(board, base, rounds, scale)
    asking(board, base, scale)
    if memory_spans:
        remembering(board, base, memory_spans)


def main() -> None:
    role, place, *rest = sys.argv[1:]
    if role == "fill":
        asyncio.run(_fill(place, int(rest[0]), int(rest[1]), int(rest[2])))
    elif role in ("ingest", "rebuild"):
        marks = [int(mark) for mark in rest[1].split(",")]
        asyncio.run(_ingest(place, rest[0], marks, rebuilding=role == "rebuild"))
    elif role == "floor":
        asyncio.run(_floor(place, rest[0], int(rest[1])))
    else:
        asyncio.run(_serve(place))


if __name__ == "__main__":
    main()
