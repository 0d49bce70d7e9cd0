"""A cursor: the live position of one reader of a stream; with a name, also a durable one.

Promises
- Order: records come once each, in sequence order, however often reads are cancelled in between.
- Done means asked past: what was handed out counts as done when the next record or page is asked for, or when `save`
  is called. A record whose handling raised is therefore not done, and a named cursor that is closed then, or whose
  process dies, gives it again: at least once, never silently lost.
- A named cursor saves what is done at most `autosave_s` seconds or `autosave_records` records late, and on close:
  atomically, with the stream's incarnation, never backwards. A checkpoint of another incarnation is refused.
- Gaps (records expired or damaged) are raised, or with on_gap="skip" passed over and kept in `gaps`. Never silent.

Does not decode records, does not share a position between readers (consumers do), and is for one task at a time.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Self

from msgspec import Struct

from mist.broker.base import ALL, BYTES_MAX, Checkpoint, Checkpoints, Page, Record, Stream, check_position
from mist.broker.clock import SYSTEM, Clock
from mist.errors import Closed, DataLoss, Internal, InvalidArgument, MistError, SequenceExpired, WrongIncarnation
from mist.protocol.subject import check_name, matcher

OnGap = Literal["raise", "skip"]
GAPS_MAX = 1000
"""How many skipped ranges a cursor remembers; `gap_count` counts them all."""


class Gap(Struct, frozen=True):
    """Sequences first..last (inclusive) were not read: `why` is the code of the error, `sequence_expired` or
    `data_loss`."""

    first: int
    last: int
    why: str


class Lag(NamedTuple):
    """`records` not yet handed out (for a filtered cursor unscanned ones count whether they match or not), and the age
    of the oldest of them in seconds, by the broker's record time; 0 when there is none."""

    records: int
    age_s: float


class Cursor:
    """Reads `stream` from `after` (exclusive; None = from the first kept record).

    With `checkpoints` and `name` the position is durable: a stored checkpoint wins over `after`, which is then only
    where a new name starts. Use it as `async with`, or call `aclose`, so that the last position is saved.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        after: int | None = None,
        subjects: Sequence[str] = ALL,
        limit: int = 1000,
        bytes_max: int = BYTES_MAX,
        on_gap: OnGap = "raise",
        checkpoints: Checkpoints | None = None,
        name: str = "",
        autosave_s: float = 1.0,
        autosave_records: int = 1000,
        clock: Clock = SYSTEM,
    ) -> None:
        check_position(after or 0)
        if limit < 1 or bytes_max < 1 or autosave_records < 1 or autosave_s <= 0:
            raise InvalidArgument(f"cursor: limit={limit}, bytes_max={bytes_max} cannot be right")
        if on_gap not in ("raise", "skip"):
            raise InvalidArgument(f'cursor: on_gap is "raise" or "skip", not {on_gap!r}')
        if bool(name) != (checkpoints is not None):
            raise InvalidArgument("cursor: a durable position needs both a name and the broker's checkpoints")
        matcher(subjects)
        self._stream = stream
        self._subjects = tuple(subjects)
        self._limit = min(limit, autosave_records) if name else limit
        self._bytes_max = bytes_max
        self._on_gap = on_gap
        self._checkpoints = checkpoints
        self.name = check_name(name) if name else ""
        self._autosave_s = autosave_s
        self._autosave_records = autosave_records
        self._clock = clock

        self._at = after or 0  # handed out up to here
        self._done = self._at  # and done with up to here
        self._from_first = after is None  # until the first page: an expired start is no gap
        self._page: Page | None = None  # the page being handed out; anything else in hand is stale
        self._reading = False
        self._closed = False
        self.gaps: deque[Gap] = deque(maxlen=GAPS_MAX)
        self.gap_count = 0

        self._loaded = not name
        self._moved = False
        self._saved = -1
        self._unsaved = 0  # records handed out since the last save
        self._saving = asyncio.Lock()
        self._saver: asyncio.Task[None] | None = None
        self._failure: MistError | None = None

    @classmethod
    async def open(
        cls,
        stream: Stream,
        *,
        after: int | None = None,
        subjects: Sequence[str] = ALL,
        limit: int = 1000,
        bytes_max: int = BYTES_MAX,
        on_gap: OnGap = "raise",
        checkpoints: Checkpoints | None = None,
        name: str = "",
        autosave_s: float = 1.0,
        autosave_records: int = 1000,
        clock: Clock = SYSTEM,
    ) -> Self:
        """A cursor whose checkpoint is already loaded. Raises WrongIncarnation."""
        cursor = cls(
            stream, after=after, subjects=subjects, limit=limit, bytes_max=bytes_max, on_gap=on_gap,
            checkpoints=checkpoints, name=name, autosave_s=autosave_s, autosave_records=autosave_records, clock=clock,
        )  # fmt: skip
        await cursor.load()
        return cursor

    # position

    @property
    def stream(self) -> Stream:
        return self._stream

    @property
    def position(self) -> int:
        """The `after` of what comes next: everything up to it was handed out or passed over."""
        return self._at

    @property
    def saved(self) -> int | None:
        """The position of the checkpoint as this cursor knows it; None when nothing was saved yet."""
        return None if self._saved < 0 else self._saved

    def seek(self, after: int) -> None:
        """Go on after `after`, also from within an iteration. Live only: a checkpoint never goes back unless forced."""
        check_position(after)
        self._at = self._done = after
        self._page = None
        self._from_first = False
        self._moved = True

    async def lag(self) -> Lag:
        """How far this cursor is behind the end of the stream now. Moves nothing."""
        info = await self._stream.info()
        if self._at >= info.last:
            return Lag(0, 0.0)
        after = max(self._at, info.first - 1)
        while True:
            try:
                page = await self._stream.read(
                    after=after, subjects=self._subjects, limit=1, bytes_max=self._bytes_max, wait_s=0.0
                )
            except SequenceExpired as exc:
                after = exc.first - 1
                continue
            except DataLoss as exc:
                after = exc.resume_after
                continue
            if page.records:
                age_s = (self._clock.time_ns() - page.records[0].timestamp_ns) / 1e9
                return Lag(max(1, min(info.last - after, info.records)), max(0.0, age_s))
            if page.scanned >= page.last or page.scanned <= after:
                return Lag(0, 0.0)
            after = page.scanned

    # reading

    async def next_page(self, wait_s: float = 0.0) -> Page:
        """The next page; empty at the end after waiting up to `wait_s`, or where a filter matched nothing yet.

        The page before it is done by asking. Raises SequenceExpired and DataLoss (position unchanged) unless skipped,
        CursorAhead, WrongIncarnation, Closed.
        """
        page = await self._read(wait_s)
        self._at = page.scanned
        return page

    async def pages(self, *, to: int | None = None) -> AsyncGenerator[Page, None]:
        """Non-empty pages up to the end as of now, or up to sequence `to` (inclusive) if that comes first."""
        async for page in self.pages_to_hand(to=to):
            self._at = page.scanned
            yield page

    async def replay(self, *, to: int | None = None) -> AsyncGenerator[Record, None]:
        """Records up to the end as of now, or up to sequence `to` (inclusive) if that comes first."""
        async for page in self.pages_to_hand(to=to):
            for record in self.hand(page):
                yield record

    async def follow(self, *, wait_s: float = 30.0) -> AsyncGenerator[Record, None]:
        """Records for ever: at the end it waits for new ones, in reads of up to `wait_s` each."""
        while True:
            for record in self.hand(await self._read(wait_s)):
                yield record

    async def pages_to_hand(self, *, to: int | None = None) -> AsyncGenerator[Page, None]:
        """As `pages`, without moving over what is given: give each page to `hand` before asking for the next."""
        await self.load()
        end = (await self._stream.info()).last
        if to is not None:
            end = min(end, to)
        while self._at < end:
            before = self._at
            page = await self._read(0.0)
            if page.scanned > end:
                cut = bisect_right(page.records, end, key=lambda r: r.sequence)
                page = self._page = Page(page.records[:cut], end, page.last)
            if page.records:
                yield page
                if self._page is not page:
                    continue  # the caller moved the cursor meanwhile
            self._at = page.scanned
            if page.scanned >= page.last:
                break
            if page.scanned <= before:
                raise Internal(f"stream {self._stream.name}: a read after {before} moved nowhere before the end")
        await self._asked()

    def hand(self, page: Page) -> Iterator[Record]:
        """The records of the page just read, one by one, moving the position with each of them.

        For callers that read pages in one place and use records in another (mist.sync does, across threads).
        """
        at = self._at
        for record in page.records:
            self._done = at
            self._at = at = record.sequence
            yield record
            if self._page is not page:
                return
        if self._page is page:
            self._done = self._at = page.scanned

    async def read_page(self, *, wait_s: float = 0.0) -> Page:
        """The next page without moving over it: give it to `hand`."""
        return await self._read(wait_s)

    async def _asked(self) -> None:
        """Something more was asked for, so everything handed out is done."""
        if self._closed:
            raise Closed(f"cursor on stream {self._stream.name}: closed")
        self._done = self._at
        self._page = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        await self.load()

    async def _read(self, wait_s: float) -> Page:
        if self._reading:
            raise InvalidArgument("cursor: two tasks read from it at once", hint="open one cursor per reader")
        self._reading = True
        try:
            await self._asked()
            page = await self._read_past_gaps(wait_s)
            if self._closed:
                raise Closed(f"cursor on stream {self._stream.name}: closed")
            count = len(page.records)
            if self.name:
                if self._unsaved and self._unsaved + count > self._autosave_records:
                    await self._save(self._done)
                self._unsaved += count
                if self._saver is None:
                    self._saver = asyncio.get_running_loop().create_task(self._save_every())
            self._page = page
            if not count:
                self._done = self._at = page.scanned
            return page
        finally:
            self._reading = False

    async def _read_past_gaps(self, wait_s: float) -> Page:
        while True:
            at = self._at
            try:
                page = await self._stream.read(
                    after=at, subjects=self._subjects, limit=self._limit, bytes_max=self._bytes_max, wait_s=wait_s
                )
            except SequenceExpired as exc:
                if self._from_first:
                    self._done = self._at = exc.first - 1
                    continue
                self._pass_over(exc, Gap(at + 1, exc.first - 1, exc.code), exc.first - 1)
            except DataLoss as exc:
                self._pass_over(exc, Gap(exc.first, exc.last, exc.code), exc.resume_after)
            else:
                if self._at == at:  # else somebody called seek meanwhile
                    self._from_first = False
                    return page

    def _pass_over(self, error: MistError, gap: Gap, resume_after: int) -> None:
        if self._on_gap == "raise" or resume_after <= self._at:
            raise error
        self.gaps.append(gap)
        self.gap_count += 1
        self._done = self._at = resume_after

    # the durable position

    async def load(self) -> int:
        """Take the position from the checkpoint, once; returns the position. Raises WrongIncarnation."""
        if self._loaded or self._checkpoints is None:
            return self._at
        found = await self._checkpoints.load(self._stream.name, self.name)
        if found is not None:
            if found.incarnation != self._stream.incarnation:
                raise WrongIncarnation(
                    f"cursor {self.name}: stream {self._stream.name} was deleted and made again since it was saved",
                    hint="delete the checkpoint to start on the new stream",
                )
            self._saved = found.sequence
            if not self._moved:
                self._at = self._done = found.sequence
                self._from_first = False
        self._loaded = True
        return self._at

    async def save(self, *, force: bool = False) -> int:
        """Everything handed out is done; store that position now and return it.

        Raises CheckpointRegression when the stored one is higher (another reader uses this name, or `seek` went back)
        unless forced, WrongIncarnation, InvalidArgument for a cursor without a name.
        """
        if self._checkpoints is None:
            raise InvalidArgument("cursor: it has no name to save under", hint="open it with name= and checkpoints=")
        await self.load()
        self._done = self._at
        await self._save(self._at, force=force, always=True)
        return self._saved

    async def _save(self, sequence: int, *, force: bool = False, always: bool = False) -> None:
        checkpoints = self._checkpoints
        if checkpoints is None:
            return
        async with self._saving:
            if sequence <= self._saved and not always:
                return
            page = self._page
            checkpoint = Checkpoint(
                stream=self._stream.name, name=self.name, incarnation=self._stream.incarnation, sequence=sequence
            )
            await checkpoints.save(checkpoint, force=force)
            self._saved = sequence
            # an upper bound is enough: what is left of the page in hand cannot be more than the page
            self._unsaved = 0 if page is None or sequence >= page.scanned else len(page.records)

    async def _save_every(self) -> None:
        """Saves while a handler takes its time or the stream is quiet. A failure that may pass is tried again; any
        other is raised by the next read, save or close."""
        while True:
            await asyncio.sleep(self._autosave_s)
            try:
                await self._save(self._done)
            except MistError as exc:
                if not exc.retryable:
                    self._failure = exc
                    return

    async def aclose(self) -> None:
        """Save what is done (of a named cursor) and stop. Idempotent. Raises what the save raises."""
        if self._closed:
            return
        self._closed = True
        self._page = None
        saver, self._saver = self._saver, None
        if saver is not None:
            saver.cancel()
            (result,) = await asyncio.gather(saver, return_exceptions=True)
            if isinstance(result, Exception):
                raise result
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self.name and self._loaded and self._done > self._saved:
            await self._save(self._done)

    async def __aenter__(self) -> Self:
        await self.load()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()
