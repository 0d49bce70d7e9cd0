"""Rewriting one sealed segment without some of its records: what will change, and the new file. Synchronous.

What is not an erased record stays byte for byte: blocks without one are copied as they are, damage too, so that it is
still found and reported. Blocks keep their checksums (format.erase_from_block), so the chain through and behind the
segment holds. Does not replace anything: the journal does, under its lock.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from msgspec.structs import replace

from mist.log.files import Files, write_all
from mist.log.format import (
    INDEX_ENTRY,
    INDEX_EVERY,
    SEGMENT_HEADER,
    VERSION_ERASED,
    BadBytes,
    encode_index_entry,
    encode_segment_header,
    erase_from_block,
)
from mist.log.segments import Block, Gap, Segments, segment_name

ERASING = ".erasing"
"""Ends the name of a segment that is being rewritten. What a crash leaves of one is removed."""
_COPY_BYTES = 1024 * 1024


class Edit(NamedTuple):
    """Bytes offset..end of the segment become these."""

    offset: int
    end: int
    data: bytes


class Plan(NamedTuple):
    """What erasing from one segment comes to. `end` is where its last block ends, or its size where damage is behind."""

    edits: list[Edit]
    erased: list[int]
    damage: list[Gap]
    end: int


def plan(segments: Segments, base: int, wanted: Sequence[int], mark: int) -> Plan:
    """Look for these sequences (in order) in a segment that is not written to any more. Changes nothing."""
    doomed = frozenset(wanted)
    edits: list[Edit] = []
    erased: list[int] = []
    damage: list[Gap] = []
    upto = 0
    for sequence in wanted:
        if sequence <= upto:
            continue
        found = _holding(segments, base, sequence, mark)
        if isinstance(found, Block):
            h = found.header
            upto = h.last
            try:
                data, gone = erase_from_block(found.data, h, doomed, segments.seed)
            except BadBytes as exc:
                found = Gap(found.offset, found.offset + h.size, h.base, h.last, str(exc))
            else:
                if gone:
                    edits.append(Edit(found.offset, found.offset + h.size, data))
                    erased += gone
                continue
        upto = found.last
        damage.append(found)
    return Plan(edits, erased, damage, _end(segments, base, mark))


def _holding(segments: Segments, base: int, sequence: int, mark: int) -> Block | Gap:
    """The good block with this sequence, or the damage it lies in."""
    offset = segments.hop(base, segments.start_for(base, sequence), sequence, mark)
    block = segments.block(base, offset) if offset is not None else None
    if block is not None and block.header.base <= sequence <= block.header.last:
        return block
    for item in segments.walk(base, mark=mark):
        first, last = (item.first, item.last) if isinstance(item, Gap) else (item.header.base, item.header.last)
        if first <= sequence <= last:
            return item
    return Gap(SEGMENT_HEADER, SEGMENT_HEADER, sequence, sequence, "missing")


def _end(segments: Segments, base: int, mark: int) -> int:
    """Where the segment's last block ends. Behind it a superseded write may lie, which nobody reads and which may hold
    what must go. Where the end is damaged, the file's size."""
    last = (segments.next_base(base) or mark + 1) - 1
    for item in segments.walk(base, start=segments.start_for(base, last), mark=mark):
        if isinstance(item, Block) and item.header.last == last:
            return item.offset + item.header.size
    return segments.files.size(segments.fd(base))


def rewrite(segments: Segments, base: int, change: Plan) -> tuple[str, bytes]:
    """Make the new file, whole and durable, beside the old one. Returns its path and the index that fits it.

    On an error nothing is left. Raises OSError.
    """
    files = segments.files
    path = os.path.join(segments.path, segment_name(base) + ERASING)
    old = segments.fd(base)
    head = files.pread(old, SEGMENT_HEADER, 0)
    with suppress(BadBytes):  # a damaged header is copied, and found by who looks for damage
        head = encode_segment_header(replace(segments.header(base), version=VERSION_ERASED))
    fd = files.open(path, create=True)
    try:
        try:
            files.truncate(fd, 0)
            to = write_all(files, fd, [head], 0)
            at = SEGMENT_HEADER
            for edit in [*change.edits, Edit(change.end, change.end, b"")]:
                while at < edit.offset:
                    part = files.pread(old, min(_COPY_BYTES, edit.offset - at), at)
                    if not part:
                        raise OSError(5, "the segment is shorter than it was a moment ago")
                    to = write_all(files, fd, [part], to)
                    at += len(part)
                if edit.data:
                    to = write_all(files, fd, [edit.data], to)
                at = edit.end
            files.sync(fd)
        finally:
            files.close(fd)
    except OSError:
        with suppress(OSError):  # the next erasure or recovery removes it
            files.unlink(path)
        raise
    return path, _index(segments.index(base, fresh=True), change)


def _index(entries: list[tuple[int, int, int]], change: Plan) -> bytes:
    """The index of the old file as one of the new: offsets behind an edit move by what it took away."""
    starts = [e.offset for e in change.edits]
    moved = [0]
    for e in change.edits:
        moved.append(moved[-1] + len(e.data) - (e.end - e.offset))
    slots: dict[int, bytes] = {}
    for sequence, time_ns, offset in entries:
        to = (
            offset + moved[bisect_right(starts, offset - 1)]
        )  # an edited block starts where it did, but for those before
        slots.setdefault(to // INDEX_EVERY, encode_index_entry(sequence, time_ns, to))
    empty = bytes(INDEX_ENTRY)
    return b"".join(slots.get(k, empty) for k in range(max(slots, default=-1) + 1))


def remove_leftovers(files: Files, path: str) -> None:
    """Remove what crashes left of rewritten segments. Under lock."""
    for name in files.listdir(path):
        if name.endswith(ERASING):
            files.unlink(os.path.join(path, name))


__all__ = ["ERASING", "Edit", "Plan", "plan", "remove_leftovers", "rewrite"]
