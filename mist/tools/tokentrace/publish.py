"""Envelopes to the trace stream, durably, in batches, at a steady pace where one is asked for.

A batch is acknowledged when its append returns. Transient failures are repeated with the same ids (the broker stores a
known id once within its window) until the broker has been away for a minute, then raised.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from msgspec import Struct

from mist.broker.base import Message, Stream
from mist.broker.patience import again
from mist.client.blobs import Blobs, outlined
from mist.errors import InvalidArgument
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.protocol.subject import subject_for
from mist.tools.tokentrace.files import BadRow

BATCH = 500
BATCH_BYTES_MAX = 4 * 1024 * 1024


class Published(Struct):
    """What became of it. `append_s` is the time spent waiting for the broker."""

    acknowledged: int = 0
    last: int = 0
    append_s: float = 0.0
    refused: list[BadRow] = []
    refused_count: int = 0


REFUSED_KEPT = 100
Acked = Callable[[Sequence[Envelope], Sequence[int]], None]
Gate = Callable[[int], Awaitable[None]]


async def publish(
    stream: Stream,
    rows: Iterable[Envelope | BadRow],
    *,
    rate: float = 0.0,
    batch: int = BATCH,
    on_acked: Acked | None = None,
    gate: Gate | None = None,
    blobs: Blobs | None = None,
) -> Published:
    """Append them in order, large payloads beside the stream where `blobs` says where. `rate`: at most so many a second (0 = as fast as it goes). `on_acked` is called after each
    acknowledged batch with its envelopes and sequences; `gate` before each batch with the number acknowledged."""
    out = Published()
    began = time.monotonic()
    if rate:
        batch = max(1, min(batch, int(rate / 20) or 1))
    waiting: list[Envelope] = []
    messages: list[Message] = []
    size = 0

    async def flush() -> None:
        nonlocal size
        if not messages:
            return
        if gate is not None:
            await gate(out.acknowledged)
        if rate:
            early = out.acknowledged / rate - (time.monotonic() - began)
            if early > 0:
                await asyncio.sleep(early)
        at = time.perf_counter()
        sequences = await again(lambda: stream.append(messages))
        out.append_s += time.perf_counter() - at
        out.acknowledged += len(sequences)
        out.last = max(out.last, *sequences)
        if on_acked is not None:
            on_acked(waiting, sequences)
        waiting.clear()
        messages.clear()
        size = 0

    for row in rows:
        if isinstance(row, BadRow):
            out.refused_count += 1
            if len(out.refused) < REFUSED_KEPT:
                out.refused.append(row)
            continue
        small, headers = outlined(row, blobs)
        data = encode(small)
        waiting.append(row)
        messages.append(Message(subject_of(row.type, row.source), data, row.id, headers))
        size += len(data)
        if len(messages) >= batch or size >= BATCH_BYTES_MAX:
            await flush()
    await flush()
    return out


def subject_of(type: str, source: str) -> str:
    """`trace.span.<source>`; a source too long for a subject is left out of it."""
    try:
        return subject_for(type, source)
    except InvalidArgument:
        return subject_for(type)
