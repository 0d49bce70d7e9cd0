"""The demo's producer, a process of its own: `python -m mist.cli._demo_producer '{"stream": …}'`, with the broker's URL
in MIST_URL.

Publishes the made-up traffic or a file's rows durably at a steady pace, and writes every acknowledged span to an append-only file
after its append has returned. At `hold_at` spans it waits for a line on standard input: the demo sends it when the
worker has been killed, so that the kill always falls into the middle. One JSON line on standard output at the end.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from mist.broker.registry import connect
from mist.cli._demo_judge import acknowledged_line
from mist.cli._demo_traffic import span_of, traffic
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TraceSpan
from mist.tools.tokentrace.files import envelopes_of
from mist.tools.tokentrace.publish import BATCH, publish


class Order(Struct, frozen=True, kw_only=True):
    """What to publish and where to write it down. `file` = "" makes traffic up."""

    stream: str
    acknowledged: str
    count: int
    seed: int
    run: str
    file: str = ""
    rate: float = 0.0
    batch: int = BATCH
    hold_at: int = 0


class Report(Struct, frozen=True, kw_only=True):
    """`append_s` is the time spent in durable appends, without the pauses that keep the pace."""

    acknowledged: int
    refused: int
    last: int
    append_s: float
    elapsed_s: float


async def produce(order: Order, url: str) -> Report:
    began = time.monotonic()
    rows = (
        envelopes_of(Path(order.file))
        if order.file
        else traffic(order.count, seed=order.seed, run=order.run, base_ns=time.time_ns() - span_of(order.count))
    )
    record = os.open(order.acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    held = order.hold_at <= 0

    def write_down(envelopes: Sequence[Envelope], sequences: Sequence[int]) -> None:
        lines = []
        for env, sequence in zip(envelopes, sequences, strict=True):
            span = env.decode(TraceSpan)
            lines.append(acknowledged_line(sequence, span.trace_id, span.span_id))
        data = b"".join(lines)
        if os.write(record, data) != len(data):
            raise OSError(f"{order.acknowledged}: a short write")

    async def hold(acknowledged: int) -> None:
        nonlocal held
        if not held and acknowledged >= order.hold_at:
            held = True
            await asyncio.to_thread(sys.stdin.readline)

    try:
        async with connect(url) as broker:
            stream = await broker.open(order.stream)
            done = await publish(stream, rows, rate=order.rate, batch=order.batch, on_acked=write_down, gate=hold)
    finally:
        os.close(record)
    return Report(
        acknowledged=done.acknowledged,
        refused=done.refused_count,
        last=done.last,
        append_s=done.append_s,
        elapsed_s=time.monotonic() - began,
    )


if __name__ == "__main__":
    report = asyncio.run(produce(msgspec.json.decode(sys.argv[1], type=Order), os.environ["MIST_URL"]))
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
