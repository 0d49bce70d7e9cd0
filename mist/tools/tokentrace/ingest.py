"""The ingest: pages of the stream into the store, effectively once, from wherever the store stands.

The store's row is the authority for the position; it is mirrored to the broker's checkpoints (at most once a second,
and when the work ends) so that lag can be seen from outside. A record that is not a span of ours is put in quarantine
with its reason; damage and expired records become a row of `gaps`; neither stops the ingest. A stream that was deleted
and made again does: WrongIncarnation, until somebody says what to do.
Memory: two pages (`PAGE` records, and the contract's byte bound).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

import msgspec
from msgspec import Struct

from mist.broker.base import Broker, Checkpoint, Page, Stream
from mist.broker.patience import AWAY_S, again
from mist.client.blobs import Blobs, beside, whole
from mist.errors import DataLoss, MistError, Refused, SequenceExpired, WrongIncarnation
from mist.kit.prices import Prices
from mist.kit.waiting import in_thread, sleep_unless
from mist.tools.tokentrace.rollup import Minutes, count_in
from mist.tools.tokentrace.spans import BadSpan, Row, values_of
from mist.tools.tokentrace.store import Batch, Gap, PositionMoved, Refusal, Store

T = TypeVar("T")

STREAM = "trace"
CHECKPOINT = "tokentrace"
PAGE = 8000
"""Records of one page, which is one transaction. Trace ids are random: the more spans a transaction holds, the more of them
share a page of the index that it has to write."""
_COUNTED = 500
"""Rows that are counted into the totals at a time, while the processor's cache still holds them."""
WAIT_S = 0.5
"""How long one read waits at the end; also how soon a stop is noticed there."""
MIRROR_S = 1.0
RETRY_S_MAX = 5.0
LAST_MIRROR_S = 5.0
"""How long a worker that was asked to stop waits for a broker that is away."""


class Progress(Struct):
    """What one ingest did. `busy_s` is the time spent storing pages, for an honest rate."""

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
                f"the store {store.place} stands in an earlier stream {stream.name}, which was deleted and made again",
                hint="`mist trace worker --restart` goes on with the new one; spans already stored stay",
            )
        store.forget(stream.name)
        return first_after
    return found.sequence if found else first_after


def batch_of(page: Page, after: int, prices: Prices | None = None, blobs: Blobs | None = None) -> Batch:
    """What this page does to the store. `prices` makes the costs that spans do not state; `blobs` is where payloads lie that
    are beside the stream, the only thing that is read here."""
    rows: list[Row] = []
    minutes: Minutes = {}
    refused: list[Refusal] = []
    for record in page.records:
        try:
            if record.headers and blobs is not None:
                record = whole(record, blobs)
            row = values_of(record, prices)
        except (BadSpan, MistError) as exc:
            refused.append(Refusal(record.sequence, record.timestamp_ns, str(exc), record.subject, record.data))
            continue
        if row is not None:
            rows.append(row)
            if len(rows) % _COUNTED == 0:
                count_in(minutes, rows[-_COUNTED:])
    if left := len(rows) % _COUNTED:
        count_in(minutes, rows[-left:])
    other = len(page.records) - len(rows) - len(refused)
    return Batch(after=after, scanned=page.scanned, rows=rows, minutes=minutes, refused=refused, other=other)


class Options(Struct, frozen=True, kw_only=True):
    """How an ingest works. `record` names this worker in the append-only table `applied`; empty = it is not written."""

    prices: Prices | None = None
    record: str = ""
    page_records: int = PAGE
    wait_s: float = WAIT_S
    mirror: bool = True
    blobs: Blobs | None = None
    """Where large payloads lie; None = where the broker says, if it does."""


async def ingest(
    broker: Broker,
    stream: Stream,
    store: Store,
    *,
    until: int | None = None,
    stop: asyncio.Event | None = None,
    restart: bool = False,
    first_after: int = 0,
    options: Options = Options(),  # noqa: B008  # a frozen value
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
    mirrors = options.mirror and broker.capabilities.checkpoints
    mirrored, mirrored_at = -1, 0.0
    pause = 0.05
    async with _Ahead(stream, options, options.blobs or beside(broker)) as pages:
        while not (stop is not None and stop.is_set()) and (until is None or after < until):
            try:
                wait_s = options.wait_s if progress.position == mirrored or not mirrors else 0.0
                batch = await pages.next(after, wait_s)
                if batch is not None:
                    # while this one is stored the next one is read and understood
                    if until is None or batch.scanned < until:
                        pages.ask(batch.scanned)
                    after = await _store(stream, store, batch, progress, options, say)
                pause = 0.05
            except MistError as exc:
                if not exc.retryable:
                    raise
                say(f"{exc}; trying again in {pause:.2g} s")
                await sleep_unless(pause, stop)
                pause = min(pause * 2, RETRY_S_MAX)
                continue
            progress.position = after
            now = time.monotonic()
            if mirrors and after != mirrored and (batch is None or now - mirrored_at >= MIRROR_S):
                await _mirror(broker, stream, after)
                mirrored, mirrored_at = after, now
    if mirrors and progress.position != mirrored:
        await _mirror(broker, stream, progress.position, away_s_max=LAST_MIRROR_S)
    return progress


class _Ahead:
    """The next page of the stream, read and understood while the one before is stored. Reading is a pure function of
    the position: a page that turns out not to be wanted is dropped."""

    def __init__(self, stream: Stream, options: Options, blobs: Blobs | None) -> None:
        self._stream = stream
        self._options = options
        self._blobs = blobs
        self._after = -1
        self._task: asyncio.Task[Batch | None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._drop()

    def ask(self, after: int) -> None:
        self._after = after
        self._task = asyncio.create_task(self._read(after, 0.0))

    async def next(self, after: int, wait_s: float) -> Batch | None:
        """The page after this position, None when nothing came within `wait_s`."""
        task, self._task = self._task, None
        if task is not None and self._after == after:
            try:
                batch = await task
            except asyncio.CancelledError:
                task.cancel()
                raise
            if batch is not None:
                return batch
        elif task is not None:
            self._task = task
            await self._drop()
        return await self._read(after, wait_s)

    async def _read(self, after: int, wait_s: float) -> Batch | None:
        try:
            page = await self._stream.read(after=after, limit=self._options.page_records, wait_s=wait_s)
        except SequenceExpired as exc:
            return _gap_batch(after, exc.first - 1, "expired or trimmed before it was read")
        except DataLoss as exc:
            return _gap_batch(after, exc.resume_after, str(exc.message))
        if page.scanned == after:
            return None
        # a page of 8,000 takes 50 ms and more, during which the loop of a service could answer nobody
        return await in_thread(lambda: batch_of(page, after, self._options.prices, self._blobs))

    async def _drop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # what it says concerns a page that nobody wants


async def _store(
    stream: Stream, store: Store, batch: Batch, progress: Progress, options: Options, say: Callable[[str], None]
) -> int:
    """Store a page. Returns the position after it, or where another ingest has put it."""
    for gap in batch.gaps:
        say(f"records {gap.first} to {gap.last} of stream {stream.name} are missing: {gap.reason}")
    began = time.perf_counter()
    try:
        new = await in_thread(lambda: store.apply(stream.name, stream.incarnation, batch, record=options.record))
    except PositionMoved:
        moved = store.position(stream.name)
        return moved.sequence if moved else batch.after
    progress.busy_s += time.perf_counter() - began
    progress.records += len(batch.rows) + len(batch.refused)
    progress.spans += new
    progress.known += len(batch.rows) - new
    progress.refused += len(batch.refused)
    progress.other += batch.other
    progress.gaps += len(batch.gaps)
    return batch.scanned


async def rebuild(
    broker: Broker,
    streams: Sequence[Stream],
    store: Store,
    *,
    options: Options = Options(),  # noqa: B008
    stop: asyncio.Event | None = None,
    force: bool = False,
    on_event: Callable[[str], None] | None = None,
) -> Progress:
    """Make the store anew from its streams, up to what is their end now: all at once, or not at all when it fails, is
    stopped or dies. Meanwhile the old answers stand and other ingests of the store wait.

    Raises Refused when the store also holds spans of a stream that is not given, when a stream no longer begins where it
    did and spans would be lost (unless `force`), and when it was stopped.
    """
    ends = [(stream, await stream.info()) for stream in streams]
    others = store.streams() - {stream.name for stream in streams}
    if others:
        raise Refused(f"{store.place} also holds spans of {', '.join(sorted(others))}", hint="name all of its streams")
    for stream, info in ends:
        lost = store.one("SELECT count(*) FROM spans WHERE sequence < ?", (info.first,))
        if info.first > 1 and lost and lost[0] and not force:
            raise Refused(
                f"stream {stream.name} begins at sequence {info.first}: {lost[0]} spans of {store.place} are older and"
                " would be lost",
                hint="--force rebuilds without them",
            )
    options = msgspec.structs.replace(options, mirror=False)
    whole = Progress(0, 0)
    with store.rebuilding():
        for stream, info in ends:
            done = await ingest(
                broker, stream, store, until=info.last, stop=stop, first_after=info.first - 1, options=options,
                on_event=on_event,
            )  # fmt: skip
            if done.position < info.last:
                raise Refused(f"stopped at sequence {done.position} of {info.last}: the store is as it was before")
            whole = _sum(whole, done)
    for stream, _ in ends:
        position = store.position(stream.name)
        if broker.capabilities.checkpoints and position is not None:
            await _mirror(broker, stream, position.sequence)
    return whole


def _sum(one: Progress, other: Progress) -> Progress:
    counted = ("records", "spans", "known", "refused", "other", "gaps", "busy_s")
    return msgspec.structs.replace(other, **{name: getattr(one, name) + getattr(other, name) for name in counted})


def _gap_batch(after: int, resume_after: int, reason: str) -> Batch:
    return Batch(after=after, scanned=resume_after, gaps=[Gap(after + 1, resume_after, reason)])


async def _mirror(broker: Broker, stream: Stream, sequence: int, *, away_s_max: float = AWAY_S) -> None:
    if broker.capabilities.checkpoints:
        # force: the store's row decides; after a power cut it may be behind what was mirrored, and is right
        checkpoint = Checkpoint(stream=stream.name, name=CHECKPOINT, incarnation=stream.incarnation, sequence=sequence)
        await again(lambda: broker.checkpoints.save(checkpoint, force=True), away_s_max=away_s_max)
