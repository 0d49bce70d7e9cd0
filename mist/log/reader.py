"""Pages of records from a stream directory. Synchronous, reads only, never passes the durable mark.

A page is a pure function of `after`. What makes the next page cheap is a small memory of where the last ones ended
(segment, offset, the rest of a decoded block); it is a cache and may be dropped at any time.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from mist.broker.base import Page, Record
from mist.errors import CursorAhead, DataLoss, NotFound, SequenceExpired, Unavailable
from mist.log.format import (
    BLOCK_HEADER,
    SEGMENT_HEADER,
    BadBytes,
    BlockHeader,
    Meta,
    Tail,
    block_header,
    block_ok,
    decode_meta,
    decode_records,
    meta_ok,
)
from mist.log.journal import Journal, erased_in
from mist.log.segments import Block, Gap, Segments

_CHUNK_MIN = 128 * 1024
_CHUNK_MAX = 1024 * 1024
_LARGE = 64 * 1024
_BUFFER_MAX = 4 * 1024 * 1024
_SCAN_BYTES = 32 * 1024 * 1024
_PLACES = 256
_RESTS = 8

Match = Callable[[str], bool] | None
_Place = tuple[int, int, int | None]


class Reader:
    """One reader of one stream; use it from one thread."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._files = journal.files
        self._segments = Segments(journal.files, journal.path, journal.segments.seed)
        self._listed = (0, 0)
        self._erasures = -1
        self._erased: tuple[int, array[int]] = (-1, array("Q"))
        self._large = False  # whether the last block was: the next one is read alone
        self._buffer = bytearray()
        # after -> (segment, offset of the block that holds the next record, checksum of the block before it or None)
        self._places: OrderedDict[int, _Place] = OrderedDict()
        # after -> the undelivered records of that block, from the one after `after`, and where the next block starts
        # with the last sequence of the block (it may be an erased one)
        self._rests: OrderedDict[int, tuple[list[Record], int, int, _Place]] = OrderedDict()

    def close(self) -> None:
        self._segments.close()

    def tail(self) -> Tail:
        """The published page; recovers first where that is needed (another boot, a copied directory)."""
        tail = self._journal.current()
        if tail.deleted:
            raise NotFound(f"stream {self._journal.name} was deleted")
        self.drop_below(tail)
        return tail

    def drop_below(self, tail: Tail) -> None:
        """Let go of what was trimmed."""
        self._segments.drop_below(tail.first_segment)

    def page(self, *, after: int, match: Match, limit: int, bytes_max: int, tail: Tail | None = None) -> Page:
        """Raises SequenceExpired, CursorAhead, DataLoss, NotFound, Unavailable."""
        tail = tail or self.tail()
        self._check(after, tail)
        if after == tail.durable:
            return Page([], after, after)
        try:
            return self._page(after, match, limit, bytes_max, tail)
        except FileNotFoundError:
            now = self.tail()  # a segment went while we read: trimmed, or the stream was deleted
            self._check(after, now)
            self._forget()
            return self._page(after, match, limit, bytes_max, now)
        except OSError as exc:
            raise Unavailable(f"stream {self._journal.name}: read: {exc.strerror or exc}") from exc

    def _check(self, after: int, tail: Tail) -> None:
        if after > tail.durable:
            raise CursorAhead(after=after, last=tail.durable, stream=self._journal.name)
        if after + 1 < tail.first:
            raise SequenceExpired(after=after, first=tail.first, stream=self._journal.name)

    def _forget(self) -> None:
        self._listed = (0, 0)
        self._places.clear()
        self._rests.clear()

    def erased(self, tail: Tail) -> array[int]:
        """The sequences of all erased records, in order; those of trimmed ones may be among them. Raises OSError."""
        if self._erased[0] != tail.erasures:
            own = Segments(self._files, self._journal.path, self._segments.seed)
            try:
                self._erased = (tail.erasures, erased_in(self._journal, own, tail))
            finally:
                own.close()
        return self._erased[1]

    def _refresh(self, tail: Tail) -> None:
        if tail.erasures != self._erasures:
            self._segments.close()  # files were replaced: offsets, open files and decoded blocks are of old ones
            self._forget()
            self._erasures = tail.erasures
        key = (tail.segment, tail.first_segment)
        if key != self._listed:
            self._segments.refresh()
            # older files may still be there: they go after the page is published, and the key does not change again
            bases = [b for b in self._segments.bases if tail.first_segment <= b <= tail.segment]
            self._segments.bases = bases
            self._listed = key
            for after in [a for a, place in self._places.items() if place[0] not in bases]:
                del self._places[after]
            for after in [a for a, rest in self._rests.items() if rest[3][0] not in bases]:
                del self._rests[after]

    def _page(self, after: int, match: Match, limit: int, bytes_max: int, tail: Tail) -> Page:
        self._refresh(tail)
        mark = tail.durable
        out: list[Record] = []
        size = 0
        scanned = after
        rest = self._rests.pop(after, None)
        if rest is not None:
            records, at, last, (segment, offset, chain) = rest
            taken, at, size = _take(records, at, match, limit, bytes_max, out, 0)
            if not taken:
                scanned = records[at - 1].sequence if at else after
                self._remember_rest(scanned, records, at, last, (segment, offset, chain))
                return Page(out, scanned, mark)
            scanned = last
        else:
            segment, offset, chain = self._places.get(after) or self._find(after + 1, mark)
        fd = self._segments.fd(segment)
        chunk, start = b"", offset
        want = _CHUNK_MIN
        budget = _SCAN_BYTES
        retried = False
        looked: tuple[int, int] | None = None
        pread = self._files.pread
        seed = self._segments.seed
        while scanned < mark and len(out) < limit and budget > 0:
            following = self._segments.next_base(segment)
            if following is not None and scanned + 1 >= following:
                segment, offset, chunk = following, SEGMENT_HEADER, b""
                fd = self._segments.fd(segment)
                start = offset
            at = offset - start
            alone = self._alone(fd, offset) if self._large and not retried else None
            header = alone if alone is not None else block_header(chunk, at)
            if alone is None and (header is None or at + header.size > len(chunk)):
                count = max(header.size if header is not None and header.size < 1 << 28 else 0, want)
                if segment == tail.segment:
                    # a follower wants one block: not the reserved space behind it as well
                    count = min(count, max(tail.end - offset, BLOCK_HEADER))
                chunk = pread(fd, count, offset)
                start, at = offset, 0
                want = min(want * 2, _CHUNK_MAX)
                header = block_header(chunk)
                if header is not None and header.size > len(chunk) and header.size < 1 << 28:
                    chunk = pread(fd, header.size, offset)
            block: bytes | bytearray
            if alone is not None:
                block = self._buffer
            elif header is None:
                block = b""
            else:
                block = chunk[at : at + header.size] if at or len(chunk) != header.size else chunk
            if (
                header is None
                or not block_ok(block, header, seed)
                or not header.base <= scanned + 1 <= header.last <= mark
                or (chain is not None and header.chain != chain)
            ):
                if not retried:
                    retried, chunk = True, b""  # once more, with bytes read after this mark
                    continue
                if out:
                    break  # what is good comes first; the next page starts at the damage
                if (segment, offset) == looked:
                    raise Unavailable(
                        f"stream {self._journal.name}: record {scanned + 1} cannot be read", retryable=True
                    )
                # raises DataLoss, or finds it elsewhere: a damaged header before it led us here
                segment, offset = looked = self._elsewhere(segment, scanned, tail)
                chain = None
                fd, start, retried = self._segments.fd(segment), offset, False
                continue
            retried = False
            self._large = header.size > _LARGE
            budget -= header.size
            try:
                meta = decode_meta(block, header)
                if match is not None and not any(map(match, meta.subjects)):
                    scanned = header.last
                    offset += header.size
                    chain = header.crc
                    continue
                records = decode_records(block, header, meta)
            except BadBytes as exc:
                raise DataLoss(
                    first=header.base,
                    last=header.last,
                    resume_after=header.last,
                    stream=self._journal.name,
                    why=str(exc),
                ) from exc
            skip = scanned + 1 - header.base
            if skip and header.erased:
                skip = bisect_right(records, scanned, key=_sequence)
            if (
                not skip
                and match is None
                and len(out) + header.records <= limit
                and size + header.data_len <= bytes_max
            ):
                if out:
                    out.extend(records)
                else:
                    out = records
                size += header.data_len
                scanned = header.last
                offset += header.size
                chain = header.crc
                continue
            if match is None and size + header.data_len > bytes_max:
                size = sum([len(r.data) for r in out])  # it counted the framing of whole blocks too
            taken, stop, size = _take(records, skip, match, limit, bytes_max, out, size)
            if stop < len(records):
                if stop > skip:
                    scanned = records[stop - 1].sequence
                self._remember_rest(scanned, records, stop, header.last, (segment, offset + header.size, header.crc))
                return Page(out, scanned, mark)
            scanned = header.last
            offset += header.size
            chain = header.crc
            if not taken:
                break
        self._remember_place(scanned, (segment, offset, chain))
        return Page(out, scanned, mark)

    def _alone(self, fd: int, offset: int) -> BlockHeader | None:
        """Read the block at `offset` into the kept buffer; None where it does not fit or is not whole.

        Fresh memory for every large block costs more in page faults than reading and checking it.
        """
        header = block_header(self._files.pread(fd, BLOCK_HEADER, offset))
        if header is None or header.size > _BUFFER_MAX:
            return None
        if len(self._buffer) < header.size:
            self._buffer = bytearray(min(header.size * 2, _BUFFER_MAX))
        got = self._files.pread_into(fd, memoryview(self._buffer)[: header.size], offset)
        return header if got == header.size and block_header(self._buffer) == header else None

    def _remember_place(self, after: int, place: _Place) -> None:
        self._places[after] = place
        if len(self._places) > _PLACES:
            self._places.popitem(last=False)

    def _remember_rest(self, after: int, records: list[Record], at: int, last: int, place: _Place) -> None:
        self._rests[after] = (records, at, last, place)
        if len(self._rests) > _RESTS:
            self._rests.popitem(last=False)

    def _find(self, sequence: int, mark: int) -> _Place:
        """Segment and offset of the block that holds a sequence. Raises DataLoss when it lies in damage."""
        segment = self._segments.holding(sequence)
        start = self._segments.start_for(segment, sequence)
        offset = self._segments.hop(segment, start, sequence, mark)
        if offset is not None:
            return segment, offset, None
        return segment, self._find_carefully(segment, sequence, mark), None

    def _find_carefully(self, segment: int, sequence: int, mark: int) -> int:
        if sequence < segment:  # the segment before this one is gone
            raise DataLoss(
                first=sequence, last=segment - 1, resume_after=segment - 1, stream=self._journal.name, why="missing"
            )
        for item in self._segments.walk(segment, mark=mark):
            if isinstance(item, Block) and item.header.base <= sequence <= item.header.last:
                return item.offset
            if isinstance(item, Gap) and item.first <= sequence <= item.last:
                raise DataLoss(
                    first=sequence, last=item.last, resume_after=item.last, stream=self._journal.name, why=item.why
                )
        raise DataLoss(first=sequence, last=mark, resume_after=mark, stream=self._journal.name, why="missing")

    def _elsewhere(self, segment: int, scanned: int, tail: Tail) -> tuple[int, int]:
        """Where the record after `scanned` is, which is not where it should be. Raises DataLoss when it is nowhere."""
        self._forget()
        self._refresh(tail)
        return segment, self._find_carefully(segment, scanned + 1, tail.durable)

    def locate(self, time_ns: int) -> int:
        """The first kept sequence whose block time is >= time_ns; last + 1 when there is none."""
        try:
            return self._locate(time_ns, self.tail())
        except FileNotFoundError:  # a segment went while we looked
            self._forget()
            return self._locate(time_ns, self.tail())

    def _locate(self, time_ns: int, tail: Tail) -> int:
        self._refresh(tail)
        if tail.durable < tail.first or time_ns > tail.time_ns:
            return tail.durable + 1
        bases = self._segments.bases
        low, high = 0, len(bases) - 1
        while low < high:  # the last segment whose first block is older
            middle = (low + high + 1) // 2
            head = self._segments.block(bases[middle], SEGMENT_HEADER)
            if head is None or head.header.base > tail.durable or head.header.time_ns >= time_ns:
                high = middle - 1
            else:
                low = middle
        for base in bases[low:]:
            start = self._segments.start_for(base, 0, time_ns=time_ns)
            for item in self._segments.walk(base, start=start, mark=tail.durable):
                if isinstance(item, Block) and item.header.time_ns >= time_ns and item.header.last >= tail.first:
                    first = max(item.header.base, tail.first)
                    if not item.header.erased:
                        return first
                    with suppress(BadBytes):
                        kept = decode_meta(item.data, item.header).kept(item.header)
                        if kept and kept[-1] >= first:
                            return kept[bisect_right(kept, first - 1)]
        return tail.durable + 1

    def metas(self, after: int, tail: Tail) -> list[tuple[int, int, int, list[str] | None]]:
        """(base, count, time, ids) of the blocks behind `after`, without reading payloads; for the id window."""
        self._refresh(tail)
        out: list[tuple[int, int, int, list[str] | None]] = []
        if after >= tail.durable:
            return out
        expected = 0
        try:
            segment, offset, _ = self._places.get(after) or self._find(after + 1, tail.durable)
        except DataLoss:  # it begins in damage, which must not stop a writer: go on behind
            segment, offset, expected = self._segments.holding(after + 1), SEGMENT_HEADER, after + 1
            behind = self._gap_after(segment, after + 1, tail.durable)
            if behind is not None:
                offset, expected = behind
        chunk, start = b"", offset
        while expected <= tail.durable:
            following = self._segments.next_base(segment)
            if following is not None and expected >= following:
                segment, offset, chunk = following, SEGMENT_HEADER, b""
                start = offset
            at = offset - start
            header = block_header(chunk, at)
            if header is None or at + BLOCK_HEADER + header.meta_len > len(chunk):
                chunk, start, at = self._files.pread(self._segments.fd(segment), _CHUNK_MIN, offset), offset, 0
                header = block_header(chunk)
                if header is not None and BLOCK_HEADER + header.meta_len > len(chunk):
                    chunk = self._files.pread(self._segments.fd(segment), BLOCK_HEADER + header.meta_len, offset)
            if header is None or (expected and header.base != expected) or header.last > tail.durable:
                gap = self._gap_after(segment, expected or after + 1, tail.durable)
                if gap is None:
                    following = self._segments.next_base(segment)
                    if following is None:
                        return out
                    segment, gap = following, (SEGMENT_HEADER, following)
                offset, expected, chunk = gap[0], gap[1], b""
                start = offset
                continue
            meta: Meta | None = None
            block = chunk[at : at + BLOCK_HEADER + header.meta_len]
            with suppress(BadBytes):  # damage is the reader's to report; a window only loses these ids
                meta = decode_meta(block, header) if meta_ok(block, header, self._segments.seed) else None
            out.append((header.base, header.records, header.time_ns, meta.all_ids(header) if meta else None))
            offset += header.size
            expected = header.last + 1
        self._remember_place(tail.durable, (segment, offset, None))
        return out

    def _gap_after(self, segment: int, sequence: int, mark: int) -> tuple[int, int] | None:
        for item in self._segments.walk(segment, mark=mark):
            if isinstance(item, Block) and item.header.base >= sequence:
                return item.offset, item.header.base
        return None


def _sequence(record: Record) -> int:
    return record.sequence


def _take(
    records: list[Record], at: int, match: Match, limit: int, bytes_max: int, out: list[Record], size: int
) -> tuple[bool, int, int]:
    """Move matching records[at:] to `out` within the limits. Returns whether all were passed, the new `at`, the size."""
    for i in range(at, len(records)):
        record = records[i]
        if match is None or match(record.subject):
            if len(out) >= limit:
                return False, i, size
            more = size + len(record.data)
            if out and more > bytes_max:
                return False, i, size
            out.append(record)
            size = more
    return True, len(records), size
