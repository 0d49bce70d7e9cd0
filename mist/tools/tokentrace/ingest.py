"""The ingest: pages of the stream into the store, effectively once, from wherever the store stands.

The store's row is the authority for the position; it is mirrored to the broker's checkpoints (at most once a second,
and when the work ends) so that lag can be seen from outside. A record that is not a span of ours is put in quarantine
with its reason; damage and expired records become a row of `gaps`; neither stops the ingest. A stream that was deleted
and made again does: WrongIncarnation, until somebody says what to do.
Memory: one page (`PAGE` records, and the contract's byte bound).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from msgspec import Struct

from mist.broker.base import Broker, Checkpoint, Page, Stream
from mist.broker.patience import AWAY_S, again
from mist.errors import DataLoss, MistError, SequenceExpired, WrongIncarnation
from mist.tools.tokentrace.spans import BadSpan, SpanRow, row_of
from mist.tools.tokentrace.store import Batch, Gap, PositionMoved, Refusal, Store

T = TypeVar("T")

STREAM = "trace"
CHECKPOINT = "tokentrace"
PAGE = 1000
WAIT_S = 0.5
"""How long one read waits at the end; also how soon a stop is noticed there."""
MIRROR_S = 1.0
RETRY_S_MAX = 5.0
LAST_MIRROR_S = 5.0
"""How long a worker that was asked to stop waits for a broker that is away."""


class Progress(Struct):
    """What one ingest did. `busy_s` is the time spent in pages with records, for an honest rate."""

    started_after: int
    position: int
    records: int = 0
    spans: int = 0
    known: int = 0
    refused: int = 0
    other: int = 0
    gaps: int = 0
    busy_s: float = 0.0


def start(store: Store, stream: Stream, *, restart: bool = False, first_after: int = 0) -> int:
    """The `after` to go on from. A store that has no position begins after `first_after`. `restart` accepts a stream
    that was made again and begins it so too."""
    found = store.position(stream.name)
    if found is not None and found.incarnation != stream.incarnation:
        if not restart:
            raise WrongIncarnation(
                f"the store {store.path} stands in an earlier stream {stream.name}, which was deleted and made again",
                hint="`mist trace worker --restart` goes on with the new one; spans already stored stay",
            )
        store.forget(stream.name)
        return first_after
    return found.sequence if found else first_after


def batch_of(page: Page, after: int, progress: Progress) -> Batch:
    """Pure: what this page does to the store."""
    rows: list[SpanRow] = []
    refused: list[Refusal] = []
    for record in page.records:
        try:
            row = row_of(record)
        except BadSpan as exc:
            refused.append(Refusal(record.sequence, record.timestamp_ns, str(exc), record.subject, record.data))
            continue
        if row is None:
            progress.other += 1
        else:
            rows.append(row)
    return Batch(after=after, scanned=page.scanned, rows=rows, refused=refused)


async def ingest(
    broker: Broker,
    stream: Stream,
    store: Store,
    *,
    until: int | None = None,
    stop: asyncio.Event | None = None,
    restart: bool = False,
    first_after: int = 0,
    record: str = "",
    page_records: int = PAGE,
    wait_s: float = WAIT_S,
    on_event: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Progress:
    """Copy until the store stands at sequence `until` (None = for ever) or `stop` is set; the page in hand is
    finished. Several may run on one store: the first to commit a page wins, the others read on from there.

    `progress` is filled as the work goes on, for callers who want to look while it runs.

    Errors worth repeating (Unavailable, a locked store) are waited out with growing pauses; others are raised.
    """
    say = on_event or (lambda _text: None)
    after = start(store, stream, restart=restart, first_after=first_after)
    progress = progress or Progress(after, after)
    progress.started_after = progress.position = after
    mirrored, mirrored_at = -1, 0.0
    pause = 0.05
    while not (stop is not None and stop.is_set()) and (until is None or after < until):
        try:
            at_end_s = wait_s if progress.position == mirrored or not broker.capabilities.checkpoints else 0.0
            after, busy = await _one_page(stream, store, after, progress, record, page_records, at_end_s, say)
            pause = 0.05
        except MistError as exc:
            if not exc.retryable:
                raise
            say(f"{exc}; trying again in {pause:.2g} s")
            await _pause(pause, stop)
            pause = min(pause * 2, RETRY_S_MAX)
            continue
        progress.position = after
        now = time.monotonic()
        if after != mirrored and (not busy or now - mirrored_at >= MIRROR_S):
            await _mirror(broker, stream, after)
            mirrored, mirrored_at = after, now
    if progress.position != mirrored:
        await _mirror(broker, stream, progress.position, away_s_max=LAST_MIRROR_S)
    return progress


async def _one_page(
    stream: Stream,
    store: Store,
    after: int,
    progress: Progress,
    record: str,
    page_records: int,
    wait_s: float,
    say: Callable[[str], None],
) -> tuple[int, bool]:
    """Read one page and store it. Returns the new position and whether there was anything."""
    try:
        page = await stream.read(after=after, limit=page_records, wait_s=wait_s)
    except SequenceExpired as exc:
        batch = _gap_batch(after, exc.first - 1, "expired or trimmed before it was read")
    except DataLoss as exc:
        batch = _gap_batch(after, exc.resume_after, str(exc.message))
    else:
        if page.scanned == after:
            return after, False
        began = time.perf_counter()
        batch = await _in_thread(lambda: batch_of(page, after, progress))
        progress.busy_s += time.perf_counter() - began
    for gap in batch.gaps:
        say(f"records {gap.first} to {gap.last} of stream {stream.name} are missing: {gap.reason}")
    began = time.perf_counter()
    try:
        new = await _in_thread(lambda: store.apply(stream.name, stream.incarnation, batch, record=record))
    except PositionMoved:
        moved = store.position(stream.name)
        return (moved.sequence if moved else after), True
    progress.busy_s += time.perf_counter() - began
    progress.records += len(batch.rows) + len(batch.refused)
    progress.spans += new
    progress.known += len(batch.rows) - new
    progress.refused += len(batch.refused)
    progress.gaps += len(batch.gaps)
    return batch.scanned, True


async def _in_thread(work: Callable[[], T]) -> T:
    """Run in a thread; a cancelled caller still waits for it, so that nobody closes the store under a transaction."""
    future = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait({future})
        raise


def _gap_batch(after: int, resume_after: int, reason: str) -> Batch:
    return Batch(after=after, scanned=resume_after, gaps=[Gap(after + 1, resume_after, reason)])


async def _mirror(broker: Broker, stream: Stream, sequence: int, *, away_s_max: float = AWAY_S) -> None:
    if broker.capabilities.checkpoints:
        # force: the store's row decides; after a power cut it may be behind what was mirrored, and is right
        checkpoint = Checkpoint(stream=stream.name, name=CHECKPOINT, incarnation=stream.incarnation, sequence=sequence)
        await again(lambda: broker.checkpoints.save(checkpoint, force=True), away_s_max=away_s_max)


async def _pause(seconds: float, stop: asyncio.Event | None) -> None:
    if stop is None:
        await asyncio.sleep(seconds)
        return
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
