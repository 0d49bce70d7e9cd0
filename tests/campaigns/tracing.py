"""C32: the ingest of TokenTrace killed while it works."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import Any

import msgspec

from mist.broker.base import Message, Stream
from mist.broker.registry import connect
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.tools.tokentrace import queries
from mist.tools.tokentrace.ingest import Options, ingest
from mist.tools.tokentrace.stats import metrics, seed_stats
from mist.tools.tokentrace.store import Store

from .campaign import Report, Trial
from .child import Args, opened, pause, stopping
from .processes import Child, ChildFailed, Nursery

_CYCLES = 10
_AHEAD = 3000
"""So many spans lie before the workers when the killing begins, so that no kill meets an idle one."""
_PAGES = (7, 40, 250, 1500)
"""Records of one transaction: below, at and above the rows of one statement."""


def c32(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """kill -9 of two workers on one store while a writer appends spans, repeated ones and refuse among them.

    Every ten kills the workers go on to the end of the stream, and the store is judged against the stream: every span
    once with the record it came from, every refusal once, nothing applied twice by the append-only table, and every table
    equal to that of a store which nobody killed, every answer byte for byte.
    """
    trial = Trial("C32", budget_s, seed, report, units)
    rng = random.Random(seed)
    with Nursery(trial.folder) as nursery:
        while trial.more():
            folder = trial.round()
            try:
                _kill_workers(trial, nursery, folder, rng, min(_CYCLES, trial.left))
            except ChildFailed as exc:
                trial.fail(str(exc))
                break
            spans = asyncio.run(_judge(trial, folder))
            trial.say(f"{trial.reached} kills, {spans} spans in this round")
    return trial.result()


def _kill_workers(trial: Trial, nursery: Nursery, folder: Path, rng: random.Random, cycles: int) -> None:
    common = {"url": f"log:{folder / 'log'}", "store": str(folder / "t.db"), "config": {"durability": "process"}}

    def start(i: int) -> Child:
        return nursery.start("tracer", {**common, "label": f"w{i}", "page": rng.choice(_PAGES)})

    writer = nursery.start("spanner", {**common, "label": "p", "seed": rng.getrandbits(32), "ahead": _AHEAD})
    workers = [start(i) for i in range(2)]
    until = time.monotonic() + 30
    while not _stands(folder) and time.monotonic() < until:
        time.sleep(0.01)
    for _ in range(cycles):
        if not trial.more():
            break
        i = rng.randrange(2)
        time.sleep(rng.uniform(0.0, 0.25))
        if not workers[i].alive:
            raise ChildFailed(f"a worker ended by itself: {workers[i].output()}")
        workers[i].kill()
        workers[i] = start(i)
        trial.reached += 1
    for child in (writer, *workers):
        child.finish()


def _stands(folder: Path) -> bool:
    """Whether the workers have begun."""
    try:
        with closing(sqlite3.connect(f"file:{folder / 't.db'}?mode=ro", uri=True)) as db:
            return db.execute("SELECT count(*) FROM position").fetchone()[0] > 0
    except sqlite3.Error:
        return False


async def _judge(trial: Trial, folder: Path) -> int:
    """Go on to the end, then compare. Returns the number of spans."""
    async with connect(f"log:{folder / 'log'}") as broker:
        stream = await broker.open("s", create=False)
        last = (await stream.info()).last
        with Store.open(folder / "t.db") as store, Store.open(folder / "fresh.db") as fresh:
            before = store.position("s")
            await ingest(broker, stream, store, until=last, options=Options(record="end", mirror=False))
            await ingest(broker, stream, fresh, until=last, options=Options(mirror=False))
            first: dict[tuple[str, str], int] = {}
            handed: list[int] = []
            refused: list[int] = []
            async for sequence, key in _keys(stream, last):
                if key is None:
                    refused.append(sequence)
                else:
                    handed.append(sequence)
                    first.setdefault(key, sequence)
            _compare(trial, "spans", {(r[0], r[1]): r[2] for r in store.query(
                "SELECT trace_id, span_id, sequence FROM spans")}, first)  # fmt: skip
            _compare(trial, "rows of spans", store.count(), len(first))
            _compare(
                trial, "applied", [r[0] for r in store.query("SELECT sequence FROM applied ORDER BY rowid")], handed
            )
            _compare(trial, "quarantine", [r[0] for r in store.query("SELECT sequence FROM quarantine ORDER BY sequence")], refused)  # fmt: skip
            for table, order in _TABLES.items():
                rows = f"SELECT * FROM {table} ORDER BY {order}"
                _compare(trial, f"table {table}", list(store.query(rows)), list(fresh.query(rows)))
            _compare(trial, "table rollups", _totals(store), _totals(fresh))
            _compare(trial, "answers", _answers(store), _answers(fresh))
            trial.add(spans=len(first), repeated=len(handed) - len(first), refused=len(refused))
            trial.add(killed_before_the_end=before is not None and before.sequence < last)
            return len(first)


_TABLES = {"spans": "sequence", "series": "1, 2, 3, 4", "quarantine": "sequence", "gaps": "first"}


def _totals(store: Store) -> list[tuple[Any, ...]]:
    """The cells; a sketch is a map, whose order says nothing."""
    return [
        (*row[:-1], msgspec.msgpack.decode(row[-1], type=list[Any]))
        for row in store.query("SELECT * FROM rollups ORDER BY 1, 2, 3, 4, 5, 6")
    ]


def _answers(store: Store) -> bytes:
    return msgspec.json.encode([
        seed_stats(store), metrics(store, group_by=("model", "operation")), metrics(store, bucket="minute"),
        queries.spans(store, limit=100), queries.traces(store, limit=100),
    ])  # fmt: skip


async def _keys(stream: Stream, last: int) -> Any:
    """What the writer put there: (sequence, id of the span or None for refuse), read from the stream and by nothing of
    the tool's."""
    after = 0
    while after < last:
        page = await stream.read(after=after, limit=1000)
        for record in page.records:
            trace_id, _, span_id = record.subject.removeprefix("trace.span.").partition(".")
            yield record.sequence, (trace_id, span_id) if trace_id != "refuse" else None
        after = page.scanned


def _compare(trial: Trial, what: str, found: Any, expected: Any) -> None:
    if found == expected:
        return
    if isinstance(found, list):
        at = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
        what = f"{what}: {len(found)} and not {len(expected)}, first difference at {at}"
        found, expected = found[at : at + 3], expected[at : at + 3]
    trial.fail(f"{what}: found {str(found)[:300]}, expected {str(expected)[:300]}")


# -- roles ------------------------------------------------------------------------------------------------------------


async def tracer(args: Args) -> None:
    """The ingest as the tool runs it, until asked to end."""
    async with AsyncExitStack() as stack:
        broker, stream = await opened(stack, args)
        store = stack.enter_context(Store.open(args["store"]))
        options = Options(record=args["label"], page_records=args["page"], wait_s=0.02)
        await ingest(broker, stream, store, stop=stopping(), options=options)


async def spanner(args: Args) -> None:
    """Spans of a few models over a few minutes, one of twenty a repeated one, one of fifty nothing that can be read."""
    async with AsyncExitStack() as stack:
        _, stream = await opened(stack, args)
        rng = random.Random(args["seed"])
        messages = _messages(rng)
        sent = 0
        while not stopping().is_set():
            some = [next(messages) for _ in range(rng.randint(1, 200))]
            await stream.append(some)
            sent += len(some)
            if sent > args["ahead"]:
                await pause(0.02)


def _messages(rng: random.Random) -> Iterator[Message]:
    """The subject names the span for the judge."""
    made: list[Message] = []
    number = 0
    while True:
        number += 1
        if made and rng.random() < 0.05:
            again = rng.choice(made)
            yield Message(again.subject, again.data)
            continue
        if rng.random() < 0.02:
            yield Message("trace.span.refuse", rng.randbytes(rng.randrange(40)))
            continue
        trace_id, span_id = f"{rng.getrandbits(128):032x}", f"{number:016x}"
        start = 1_700_000_000_000_000_000 + rng.randrange(300) * 1_000_000_000
        span = {
            "trace_id": trace_id, "span_id": span_id, "operation": rng.choice(["chat", "embed"]), "start_ns": start,
            "end_ns": start + rng.randrange(10**10), "status": rng.choice(["ok", "error"]),
            "attrs": {"model": rng.choice("abc"), "tokens_in": rng.randrange(5000), "cost_usd": rng.random()},
        }  # fmt: skip
        data = encode(Envelope.new("trace.span", span, source="p", id=span_id))
        message = Message(f"trace.span.{trace_id}.{span_id}", data)
        made.append(message)
        del made[:-500]
        yield message
