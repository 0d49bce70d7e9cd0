"""The segment files of one stream: listing, descriptors, index look-ups and the careful walk over blocks.

Reading only; nothing here changes a file. `walk` is the one place that decides what is a good block and what is damage.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from mist.log.files import Files
from mist.log.format import (
    BLOCK_HEADER,
    BLOCK_MAGIC,
    SEGMENT_HEADER,
    VERSION_ERASED,
    BadBytes,
    BlockHeader,
    SegmentHeader,
    block_header,
    block_ok,
    decode_index,
    decode_meta,
    decode_segment_header,
)

SEGMENT = ".seg"
INDEX = ".idx"
_NAME_CHARS = 20 + len(SEGMENT)
_FDS_MAX = 128
_CHUNK = 64 * 1024


def segment_name(base: int) -> str:
    return f"{base:020d}{SEGMENT}"


class Block(NamedTuple):
    """A block whose checksum holds."""

    offset: int
    header: BlockHeader
    data: bytes


class Gap(NamedTuple):
    """Bytes start..end of a segment that are no good block; the sequences first..last are missing with them."""

    start: int
    end: int
    first: int
    last: int
    why: str


class Segments:
    """The segments in one stream directory. Not thread-safe: every user has its own."""

    def __init__(self, files: Files, path: str, seed: int = 0, *, write: bool = False) -> None:
        self.files = files
        self.path = path
        self.seed = seed
        self._write = write
        self._fds: OrderedDict[int, int] = OrderedDict()
        self._indexes: dict[int, list[tuple[int, int, int]]] = {}
        self.bases: list[int] = []

    def refresh(self) -> list[int]:
        """Base sequences of all segment files, ascending; other files are ignored."""
        names = self.files.listdir(self.path)
        bases = [int(n[:20]) for n in names if len(n) == _NAME_CHARS and n.endswith(SEGMENT) and n[:20].isdecimal()]
        self.bases = sorted(b for b in bases if b > 0)
        for base in [b for b in self._fds if b not in self.bases]:
            self.forget(base)
        return self.bases

    def fd(self, base: int) -> int:
        """A descriptor of the segment, kept open. Raises FileNotFoundError when it was removed."""
        fd = self._fds.get(base)
        if fd is None:
            if len(self._fds) >= _FDS_MAX:
                self.forget(next(iter(self._fds)))
            fd = self._fds[base] = self.files.open(os.path.join(self.path, segment_name(base)), write=self._write)
        else:
            self._fds.move_to_end(base)
        return fd

    def forget(self, base: int) -> None:
        fd = self._fds.pop(base, None)
        self._indexes.pop(base, None)
        if fd is not None:
            self.files.close(fd)

    def drop_below(self, base: int) -> None:
        """Let go of segments that were removed: an open descriptor would keep their space from everybody."""
        for old in [b for b in self._fds if b < base]:
            self.forget(old)

    def close(self) -> None:
        for base in list(self._fds):
            self.forget(base)

    def header(self, base: int) -> SegmentHeader:
        """Raises BadBytes."""
        return decode_segment_header(self.files.pread(self.fd(base), SEGMENT_HEADER, 0))

    def next_base(self, base: int) -> int | None:
        at = bisect_right(self.bases, base)
        return self.bases[at] if at < len(self.bases) else None

    def holding(self, sequence: int) -> int:
        """The base of the segment that holds (or would hold) a sequence."""
        at = bisect_right(self.bases, sequence) - 1
        return self.bases[max(at, 0)]

    def index(self, base: int, *, fresh: bool = False) -> list[tuple[int, int, int]]:
        """Index entries (sequence, time, offset) of a segment; empty when there is no index file."""
        if fresh or base not in self._indexes:
            try:
                fd = self.files.open(os.path.join(self.path, f"{base:020d}{INDEX}"), write=False)
            except FileNotFoundError:
                return []
            try:
                self._indexes[base] = decode_index(self.files.pread(fd, self.files.size(fd), 0))
            finally:
                self.files.close(fd)
        return self._indexes[base]

    def block(self, base: int, offset: int) -> Block | None:
        """The good block that starts at `offset`, or None."""
        fd = self.fd(base)
        head = self.files.pread(fd, _CHUNK, offset)
        header = block_header(head)
        if header is None:
            return None
        data = head if header.size <= len(head) else self.files.pread(fd, header.size, offset)
        return Block(offset, header, data) if block_ok(data, header, self.seed) else None

    def start_for(self, base: int, sequence: int, *, time_ns: int | None = None) -> int:
        """An offset at or before the block that holds `sequence` (or is the last before `time_ns`), by the index.

        Every entry is checked against the block it points at; without a good one it is the first block's offset.
        """
        key = 1 if time_ns is not None else 0
        target = sequence if time_ns is None else time_ns - 1
        entries = self.index(base)
        if not entries or entries[-1][key] <= target:
            entries = self.index(base, fresh=True)
        at = bisect_right(entries, target, key=lambda e: e[key]) - 1
        while at >= 0:
            found = self.block(base, entries[at][2]) if entries[at][key] <= target else None
            if found is not None and (found.header.base, found.header.time_ns) == entries[at][:2]:
                return found.offset
            at -= 1
        return SEGMENT_HEADER

    def hop(self, base: int, offset: int, sequence: int, mark: int) -> int | None:
        """From a good block at `offset`, the offset of the block that holds `sequence`, by headers alone.

        None when the headers do not lead there in order: the caller looks with `walk`.
        """
        fd = self.fd(base)
        expected = 0
        chunk, start = b"", 0
        while True:
            if offset < start or offset + BLOCK_HEADER > start + len(chunk):
                chunk, start = self.files.pread(fd, _CHUNK, offset), offset
            header = block_header(chunk, offset - start)
            if header is None or (expected and header.base != expected) or header.last > mark or header.base > sequence:
                return None
            if header.last >= sequence:
                return offset
            expected = header.last + 1
            offset += header.size

    def erased(self, mark: int) -> array[int]:
        """The sequences of all erased records up to `mark`, in order. Looks into segments that were erased from only, there
        at headers and what they flag; in damage nothing is known to be erased."""
        out = array("Q")
        for base in self.bases:
            try:
                if base > mark or self.header(base).version < VERSION_ERASED:
                    continue
            except BadBytes:
                pass  # it may be one
            for block in self._flagged(base, mark):
                with suppress(BadBytes):
                    out.extend(decode_meta(block.data, block.header).gone(block.header))
        return out

    def _flagged(self, base: int, mark: int) -> Iterator[Block]:
        """The blocks of a segment that records were erased from, found by headers alone as far as these lead."""
        fd = self.fd(base)
        stop = min(mark, (self.next_base(base) or mark + 1) - 1)
        offset, expected = SEGMENT_HEADER, base
        chunk, start = b"", 0
        while expected <= stop:
            if offset < start or offset + BLOCK_HEADER > start + len(chunk):
                chunk, start = self.files.pread(fd, _CHUNK, offset), offset
            header = block_header(chunk, offset - start)
            found = self.block(base, offset) if header is not None and header.erased else None
            if header is None or header.base != expected or (header.erased and found is None):
                for item in self.walk(base, start=offset, expected=expected, mark=mark):
                    if isinstance(item, Block) and item.header.erased:
                        yield item
                return
            if found is not None:
                yield found
            expected = header.last + 1
            offset += header.size

    def walk(
        self, base: int, *, start: int = SEGMENT_HEADER, chain: int | None = None, expected: int | None = None,
        mark: int, end: int | None = None,
    ) -> Iterator[Block | Gap]:  # fmt: skip
        """Every good block from `start`, and every gap, in order; ends when sequences reach `mark` or the next segment.

        After a gap it searches for the next block with a good checksum and a later sequence. `chain` and `expected` are
        what the first block must continue, None where that is unknown.
        """
        fd = self.fd(base)
        size = self.files.size(fd) if end is None else end
        following = self.next_base(base)
        stop = mark if following is None else min(mark, following - 1)
        expected = base if expected is None and start == SEGMENT_HEADER else expected
        offset = start
        while expected is None or expected <= stop:
            found = self.block(base, offset)
            why = "damaged"
            if found is not None:
                h = found.header
                if expected is None or (h.base == expected and (chain is None or h.chain == chain)):
                    if h.last > stop:  # it reaches over into what was published elsewhere: not the block that was here
                        yield Gap(offset, size, expected or h.base, stop, "replaced by another block")
                        return
                    yield found
                    offset, expected, chain = offset + h.size, h.last + 1, h.crc
                    continue
                why = "replaced by another block"
            if expected is None:
                return
            again = self._resync(base, offset + 1, size, expected, stop)
            if again is None:
                yield Gap(offset, size, expected, stop, why)
                return
            if again.header.base > expected:
                yield Gap(offset, again.offset, expected, again.header.base - 1, why)
            else:
                yield Gap(offset, again.offset, expected, expected - 1, why)
            offset, expected, chain = again.offset, again.header.base, None

    def _resync(self, base: int, offset: int, size: int, expected: int, stop: int) -> Block | None:
        """The next block behind `offset` whose checksum holds and whose sequences fit."""
        fd = self.fd(base)
        while offset < size:
            chunk = self.files.pread(fd, 1 << 20, offset)
            if len(chunk) < len(BLOCK_MAGIC):
                return None
            at = chunk.find(BLOCK_MAGIC)
            while at >= 0:
                near = block_header(chunk, at) if at + BLOCK_HEADER <= len(chunk) else None
                if at + BLOCK_HEADER > len(chunk) or (
                    near is not None and expected <= near.base and near.last <= stop and offset + at + near.size <= size
                ):
                    found = self.block(base, offset + at)
                    if found is not None and expected <= found.header.base and found.header.last <= stop:
                        return found
                at = chunk.find(BLOCK_MAGIC, at + 1)
            offset += max(len(chunk) - len(BLOCK_MAGIC) + 1, 1)
        return None


__all__ = ["INDEX", "SEGMENT", "BadBytes", "Block", "Gap", "Segments", "segment_name"]
