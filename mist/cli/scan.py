"""Reading a range of a stream the way every read verb does: pages of views, filtered, damage reported and passed over.

A scan without `follow` ends at what was the last record when it began. Damage is a warning with its range on stderr and
exit code 9 at the end; a record that expired under the reader is an error, never a silent gap.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from mist.broker.base import Checkpoints, Stream, StreamInfo
from mist.broker.clock import SYSTEM
from mist.cli.filters import Filter, compile_filter
from mist.cli.manifest import Gap
from mist.cli.options import FilterOptions, RangeOptions
from mist.cli.position import START, Position, after_of, last_of, parse_position, since_position
from mist.cli.records import View
from mist.cli.session import Session
from mist.errors import DataLoss, Internal, InvalidArgument, SequenceExpired

PAGE = 1000
FOLLOW_WAIT_S = 30.0
PARTIAL = 9


class Bounds:
    """The parsed `--from --to --since --until` of one command."""

    def __init__(self, options: RangeOptions) -> None:
        now = SYSTEM.time_ns()
        if options.from_ and options.since:
            raise InvalidArgument("--from and --since exclude each other")
        if options.to and options.until:
            raise InvalidArgument("--to and --until exclude each other")
        self.start: Position | None = None
        self.end: Position | None = None
        if options.from_:
            self.start = parse_position(options.from_, now_ns=now)
        elif options.since:
            self.start = since_position(options.since, now_ns=now)
        if options.to:
            self.end = parse_position(options.to, now_ns=now)
        elif options.until:
            self.end = since_position(options.until, now_ns=now)

    async def after(self, stream: Stream, checkpoints: Checkpoints | None, info: StreamInfo) -> int:
        await check_readable(stream, info)
        return await after_of(self.start or START, stream, checkpoints, info)

    async def to(self, stream: Stream, checkpoints: Checkpoints | None, info: StreamInfo) -> int | None:
        return None if self.end is None else await last_of(self.end, stream, checkpoints, info)


def filter_of(options: FilterOptions) -> Filter:
    return compile_filter(
        subject=options.subject, type=options.type, source=options.source, id=options.id, trace_id=options.trace_id,
        grep=options.grep, where=options.where, invert=options.invert,
    )  # fmt: skip


class Scan:
    """One pass. `position` is the last sequence that was looked at, `seen` and `matched` count records."""

    def __init__(
        self,
        session: Session,
        stream: Stream,
        wanted: Filter,
        *,
        after: int,
        to: int | None = None,
        limit: int | None = None,
        follow: bool = False,
        from_start: bool = False,
    ) -> None:
        self._session = session
        self._stream = stream
        self._wanted = wanted
        self._to = to
        self._limit = limit
        self._follow = follow
        self._from_start = from_start
        self.position = after
        self.matched = 0
        self.damaged = 0

    async def pages(self) -> AsyncIterator[list[View]]:
        """Non-empty pages of matching records, until the end of the range."""
        end = self._to
        info = await self._stream.info()
        await check_readable(self._stream, info)
        if not self._follow:
            last = info.last
            end = last if end is None else min(end, last)
        while end is None or self.position < end:
            room = PAGE if self._limit is None else self._limit - self.matched
            if room <= 0:
                return
            views, at = await self._page(room if self._wanted.test is None else PAGE, end)
            if self._limit is not None and len(views) > room:
                views = views[:room]
                at = views[-1].record.sequence
            self.matched += len(views)
            self.position = at
            if views:
                yield views

    async def _page(self, limit: int, end: int | None) -> tuple[list[View], int]:
        try:
            page = await self._stream.read(
                after=self.position,
                subjects=self._wanted.subjects,
                limit=min(limit, PAGE),
                wait_s=FOLLOW_WAIT_S if self._follow else 0.0,
            )
        except DataLoss as exc:
            report_damage(self._session, exc)
            self.damaged += 1
            return [], exc.resume_after
        except SequenceExpired as exc:
            if not self._from_start:
                raise
            return [], exc.first - 1  # `start` means whatever is the first kept record by now
        self._from_start = False
        test = self._wanted.test
        views: list[View] = []
        if test is None and page.records and (end is None or page.records[-1].sequence <= end):
            at = max(page.scanned, self.position)
            return list(map(View, page.records)), at if end is None else min(at, end)
        for record in page.records:
            if end is not None and record.sequence > end:
                return views, end
            view = View(record)
            if test is None or test(view):
                views.append(view)
        at = max(page.scanned, self.position)
        if at == self.position and not self._follow and not page.records and at < page.last:
            raise Internal(f"stream {self._stream.name}: reading does not get past {at}")
        if at == self.position and not self._follow:
            return views, end if end is not None else at  # trimmed or deleted under us: the end moved here
        return views, at if end is None else min(at, end)


async def check_readable(stream: Stream, info: StreamInfo) -> None:
    """A stream that is for publishing only is not an empty one. Raises its refusal, which says where to read."""
    if not info.capabilities.read:
        await stream.read()


def report_damage(session: Session, exc: DataLoss) -> None:
    """Warn of a damaged range; the command ends with 9."""
    session.out.flush()
    session.gaps.append(Gap(exc.first, exc.last, exc.message))
    session.out.warn(f"{exc.message}; going on after {exc.resume_after}")
    session.fail_with(PARTIAL)


async def last_matching(session: Session, stream: Stream, wanted: Filter, count: int, *, to: int) -> list[View]:
    """The last `count` matching records up to `to`, found by reading back in growing steps."""
    info = await stream.info()
    await check_readable(stream, info)
    to = min(to, info.last)
    dense = info.records == info.last - info.first + 1
    found: list[View] = []
    step = count if dense and wanted.everything else max(count * 2, 256)
    # sequences may be sparse (a foreign stream of Redis numbers by the millisecond): step over records, not over numbers
    spread = max(1, (info.last - info.first + 1) // max(1, info.records))
    step, most = step * spread, 1_000_000 * spread
    high = to
    while high >= info.first and len(found) < count:
        low = max(info.first - 1, high - step)
        scan = Scan(session, stream, wanted, after=low, to=high, from_start=low == info.first - 1)
        part = [view async for page in scan.pages() for view in page]
        found = part + found
        high = low
        step = min(step * 2, most)
    return found[-count:]


def explain_empty(session: Session, stream: Stream, info: StreamInfo, scan: Scan | None, where: str) -> None:
    """Why nothing was shown, on stderr."""
    if info.records == 0:
        more = "; what it held is gone" if info.last else ""
        session.out.note(f"stream {stream.name} in {where} is empty{more}")
    else:
        session.out.note(f"no record of stream {stream.name} in {where} matches (it holds {info.first} to {info.last})")
