"""The one writer's view of a stream directory: lock, recovery, commit, roll, trim, retention. Synchronous.

What makes it sound (log-format.md has the whole order):
- Everything that changes a file happens under an exclusive lock on `lock`, taken per commit, by any process.
- Before the first byte, the word in `lock` says which generation is being made (`dirty`). The commit is published by one
  pwrite of the tail page. A dirty word above the page's generation means that the holder died: whole blocks behind
  the published end are adopted, the rest is cut and kept aside.
- Another boot, or a directory that was copied: nothing in the page is trusted; the end is found from the segments.
- A failed sync poisons the segment: it is never synced or written again, the next write opens a new one.
Sequences are given out only here, one after the other; at most one block is ever unsynced.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
import time
import weakref
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from msgspec.structs import replace

from mist.broker.base import DEFAULTS, Damage, StreamConfig, Verification
from mist.broker.clock import Clock
from mist.errors import (
    Ambiguous,
    CursorAhead,
    DataLoss,
    Locked,
    MistError,
    NotFound,
    StorageFull,
    Unavailable,
    VersionUnsupported,
)
from mist.log.erasing import plan, remove_leftovers, rewrite
from mist.log.files import Files, write_all
from mist.log.format import (
    BLOCK_DATA_MAX,
    BLOCK_HEADER,
    INDEX_ENTRY,
    INDEX_EVERY,
    SEGMENT_HEADER,
    TAIL_BYTES,
    TRIM_BYTES,
    VERSION_ERASED,
    BadBytes,
    BlockHeader,
    Columns,
    NewerFormat,
    SegmentHeader,
    Tail,
    block_header,
    decode_meta,
    decode_segment_header,
    decode_tail,
    decode_trim,
    encode_block,
    encode_index_entry,
    encode_segment_header,
    encode_tail,
    encode_trim,
    seed_of,
)
from mist.log.reserve import Reserve
from mist.log.segments import INDEX, SEGMENT, Block, Gap, Segments, segment_name

_LOCK_WORDS = struct.Struct("<QQQ")  # generation being made, poisoned segment's base, pid of the last holder
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
LOG_DEFAULTS = replace(DEFAULTS, durability="power")
QUARANTINE = "quarantine"
STREAM = "stream"
TRIM = "trim"
NEW = ".new-"
_SCRATCH_MAX = 4 * 1024 * 1024
_RESERVE_MIN = 1024 * 1024
_COPY_BYTES = 1024 * 1024
_WARNINGS_MAX = 100
_ALL = 1 << 62


class Erased(NamedTuple):
    """How many records went, up to which of the sequences asked for all is done, and ranges that are damaged."""

    records: int
    upto: int
    damage: list[tuple[int, int, str]]


class _End(NamedTuple):
    """Where a segment ends: its last sequence (base - 1 without any), the offset behind it, its chain and time,
    whether the segment's header is good, and its last block."""

    durable: int
    end: int
    chain: int
    time_ns: int
    sound: bool
    last: Block | None = None


_open_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def _forked() -> None:
    """In a forked child: let go of the parent's locks. A child that kept the descriptor would keep a lock alive that the
    parent's death should free."""
    for journal in list(_open_journals):
        journal.abandon()


os.register_at_fork(after_in_child=_forked)


def storage_error(exc: OSError, what: str) -> MistError:
    """An OS error as ours, for an operation that certainly left nothing behind."""
    if exc.errno in _FULL:
        return StorageFull(
            f"{what}: {exc.strerror}", hint="free space or trim streams (`mist stream purge`); reading still works"
        )
    return Unavailable(f"{what}: {exc.strerror or exc}", hint="`mist doctor` shows the state of the disk")


class Journal:
    """One stream directory. Every method is called by one thread at a time; those marked "under lock" inside
    `locked()`."""

    def __init__(self, files: Files, clock: Clock, path: str, boot: bytes) -> None:
        self.files = files
        self.clock = clock
        self.path = path
        self.boot = boot
        self.name = os.path.basename(path)
        self.warnings: list[str] = []
        self.segments = Segments(files, path, write=True)
        self._lock_fd = files.open(os.path.join(path, "lock"), create=True)
        _open_journals.add(self)
        self._tail_fd = -1
        self._index: tuple[int, int] | None = None
        self._region = -1
        self._reserved = (0, 0)
        self._scratch = bytearray()  # fresh memory for every block would cost more in page faults than encoding it
        self._failed: set[int] = set()  # segments of which a sync failed here, for when the lock file cannot say so
        self._erasures = -1
        self.tail: Tail
        try:
            self._tail_fd = files.open(os.path.join(path, "tail"), create=True)
            header = self._any_header()
            self.incarnation = header.incarnation
            self.created_ns = header.stream_created_ns
            self.config = header.config
            self.segments.seed = seed_of(self.incarnation)
            self.identity = files.identity(path)
        except BaseException:
            self.close()
            raise

    # -- making and opening -------------------------------------------------------------------------------------------

    @staticmethod
    def create(files: Files, clock: Clock, streams: str, name: str, config: StreamConfig) -> None:
        """Make the directory of a new stream, durable and whole, or leave nothing that counts. Raises OSError.

        Somebody else may make it at the same moment: then theirs stands.
        """
        path = os.path.join(streams, f"{NEW}{name}-{secrets.token_hex(6)}")
        files.mkdir(path)
        now = clock.time_ns()
        header = SegmentHeader(
            stream=name, incarnation=secrets.token_hex(8), base=1, created_ns=now, chain=0, stream_created_ns=now,
            config=config,
        )  # fmt: skip
        _make_segment(files, path, header)
        _make_file(files, os.path.join(path, STREAM), encode_segment_header(header))
        _make_file(files, os.path.join(path, TRIM), encode_trim(0, 1).ljust(TRIM_BYTES, b"\0"))
        files.sync_dir(path)
        try:
            files.rename(path, os.path.join(streams, name))
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            remove_tree(files, path)
            return
        files.sync_dir(streams)

    def _any_header(self) -> SegmentHeader:
        """What the stream is: from its own file, or from the newest segment that can be read."""
        bases = self.segments.refresh()
        problem: Exception | None = None
        found: SegmentHeader | None = None
        try:
            found = self.stream_file()
            if bases:
                self.segments.header(bases[-1])  # is this still our format?
        except NewerFormat as exc:
            raise VersionUnsupported(f"stream {self.name}: {exc}", hint="upgrade mist to read this log") from exc
        except BadBytes as exc:
            problem = exc
        if found is not None:
            return found
        for base in reversed(bases):
            try:
                return self.segments.header(base)
            except BadBytes as exc:
                problem = exc
        if not bases and problem is None:
            raise NotFound(f"stream {self.name}: no segment in its directory")
        raise DataLoss(
            first=bases[0] if bases else 1, last=bases[-1] if bases else 1, resume_after=bases[-1] if bases else 1,
            stream=self.name, why=f"unreadable ({problem})",
        )  # fmt: skip

    def stream_file(self) -> SegmentHeader | None:
        """What the stream's own file says; None without one. Raises BadBytes."""
        try:
            fd = self.files.open(os.path.join(self.path, STREAM), write=False)
        except FileNotFoundError:
            return None
        try:
            return decode_segment_header(self.files.pread(fd, SEGMENT_HEADER, 0))
        finally:
            self.files.close(fd)

    def close(self) -> None:
        """Idempotent."""
        self.segments.close()
        if self._index is not None:
            self.files.close(self._index[1])
            self._index = None
        for fd in (self._tail_fd, self._lock_fd):
            if fd >= 0:
                self.files.close(fd)
        self._tail_fd = self._lock_fd = -1

    def abandon(self) -> None:
        """Close the lock's descriptor without unlocking. For a forked child, which must not use this journal."""
        if self._lock_fd >= 0:
            self.files.close(self._lock_fd)
            self._lock_fd = -1

    # -- the published page -------------------------------------------------------------------------------------------

    def published(self) -> Tail | None:
        """The tail page as it is now, without the lock; None when it is absent, torn, of another boot or a copy."""
        try:
            for _ in range(3):  # a read may meet a write half way; the page's checksum tells
                tail = decode_tail(self.files.pread(self._tail_fd, TAIL_BYTES, 0))
                if tail is not None:
                    break
            else:
                return None
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}: tail page") from exc
        ours = tail.boot == self.boot and (tail.device, tail.inode) == self.identity
        return tail if ours else None

    def _publish(self, tail: Tail) -> None:
        tail = replace(tail, generation=tail.generation + 1)
        data = encode_tail(tail)
        if self.files.pwrite(self._tail_fd, data, 0) != len(data):
            raise OSError(errno.EIO, "short write of the tail page")
        self.tail = tail

    def _set_dirty(self, generations: int = 1, *, poisoned: int = 0) -> None:
        words = _LOCK_WORDS.pack(self.tail.generation + generations, poisoned, os.getpid())
        if self.files.pwrite(self._lock_fd, words, 0) != len(words):
            raise OSError(errno.EIO, "short write of the lock file")

    def holder(self) -> int:
        """The process that last began to write, for messages."""
        data = self.files.pread(self._lock_fd, _LOCK_WORDS.size, 0)
        return int(_LOCK_WORDS.unpack(data)[2]) if len(data) == _LOCK_WORDS.size else 0

    def try_lock(self) -> bool:
        return self.files.lock(self._lock_fd, wait=False)

    def _try_lock(self) -> bool:
        try:
            return self.try_lock()
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}: lock") from exc

    def wait_lock(self) -> None:
        self.files.lock(self._lock_fd, wait=True)

    def unlock(self) -> None:
        self.files.unlock(self._lock_fd)

    @contextmanager
    def locked(self, wait_s: float = 10.0) -> Iterator[None]:
        """The lock, and a tail that is true. Raises Locked, NotFound, StorageFull or Unavailable."""
        until = time.monotonic() + wait_s
        pause = 0.0005
        while not self._try_lock():
            if time.monotonic() > until:
                raise Locked(
                    f"stream {self.name}: process {self.holder()} has held the lock for {wait_s:g} s",
                    hint="is it stopped or stuck? try again when it goes on",
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        try:
            self.enter()
            yield
        finally:
            self.unlock()

    def enter(self) -> None:
        """Under lock: make `tail` true, recovering what a dead holder or a reboot left."""
        tail = self.published()
        try:
            words = self.files.pread(self._lock_fd, _LOCK_WORDS.size, 0)
            dirty, poisoned, _ = _LOCK_WORDS.unpack(words) if len(words) == _LOCK_WORDS.size else (0, 0, 0)
            if tail is None:
                self._recover_all()
            elif dirty > tail.generation:
                self.tail = tail
                try:
                    self._recover_from(tail, poisoned=tail.segment in (poisoned, *self._failed))
                except FileNotFoundError:
                    self._recover_all()  # the segment itself is gone
            else:
                self.tail = tail
        except OSError as exc:
            self.segments.close()  # what is there now may be replaced before we look again
            raise storage_error(exc, f"stream {self.name}: recovery") from exc
        if self.tail.deleted:
            raise NotFound(f"stream {self.name} was deleted")
        if self.tail.erasures != self._erasures:
            self.segments.close()  # files were replaced: what is open, and what is remembered of it, is of old ones
            self._erasures = self.tail.erasures
        self.segments.drop_below(self.tail.first_segment)

    def current(self) -> Tail:
        """The published page, after recovery where that is needed. Safe beside the thread that commits."""
        tail = self.published()
        if tail is not None:
            return tail
        try:
            other = Journal(self.files, self.clock, self.path, self.boot)
        except FileNotFoundError as exc:
            raise NotFound(f"stream {self.name} was deleted") from exc
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}") from exc
        try:
            with other.locked():
                return other.tail
        finally:
            other.close()

    # -- commit -------------------------------------------------------------------------------------------------------

    def commit(self, columns: Columns) -> int:
        """Under lock: store one block and return its base sequence, at the stream's durability.

        Raises StorageFull or Unavailable when certainly nothing was stored, Ambiguous when that is not known.
        """
        tail = self.tail
        now = max(self.clock.time_ns(), tail.time_ns)
        base = tail.durable + 1
        buffer = self._scratch if len(columns.datas) > 1 else None
        parts, crc = encode_block(
            columns, base=base, time_ns=now, chain=tail.chain, seed=self.segments.seed, into=buffer
        )
        if len(self._scratch) > _SCRATCH_MAX:
            self._scratch = bytearray()  # one large block; `parts` still holds it
        size = len(parts[0]) + len(parts[1])
        try:
            if self._must_roll(tail, size, now):
                self._set_dirty(2)
                self._roll()
                tail = self.tail
            else:
                self._set_dirty(1)
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}: append") from exc
        try:
            fd = self.segments.fd(tail.segment)
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}: append") from exc
        try:
            self._reserve(fd, tail, size)
            end = write_all(self.files, fd, parts, tail.end)
        except OSError as exc:
            self._cut(fd, tail, exc)
            raise storage_error(exc, f"stream {self.name}: append") from exc
        if self.config.durability == "power":
            try:
                self.files.sync(fd)
            except OSError as exc:
                self._poison(tail, fd)
                raise Ambiguous(f"stream {self.name}: sync failed, {exc.strerror or exc}") from exc
        self._write_index(tail.segment, base, now, tail.end)
        try:
            first_time = tail.first_time_ns if tail.durable >= tail.first else now
            new = replace(
                tail, durable=base + len(columns.subjects) - 1, end=end, chain=crc, time_ns=now,
                bytes=tail.bytes + size, first_time_ns=first_time,
            )  # fmt: skip
            if self._limited:
                new = self._retained(new, now)
            self._publish(new)
        except OSError as exc:
            # the block is stored but not published: the next holder adopts it
            raise Ambiguous(f"stream {self.name}: publishing failed, {exc.strerror or exc}") from exc
        if new.first_segment != tail.first_segment:
            self._let_go(new)
        return base

    @property
    def _limited(self) -> bool:
        c = self.config
        return bool(c.age_s_max or c.records_max or c.bytes_max)

    def check_room(self, records: int, size: int, extra_records: int = 0, extra_bytes: int = 0) -> None:
        """Under lock: raise StorageFull when the stream refuses to grow by this much."""
        c, t = self.config, self.tail
        if c.full != "refuse":
            return
        held = t.durable - t.first + 1 + extra_records
        over = c.records_max and held + records > c.records_max
        if over or (c.bytes_max and t.bytes + extra_bytes + size > c.bytes_max):
            raise StorageFull(
                f"stream {self.name} is full", hint="trim it, or let it drop the oldest (full=drop_oldest)"
            )

    def _must_roll(self, tail: Tail, size: int, now: int) -> bool:
        if tail.end == SEGMENT_HEADER:
            return False  # a block larger than a segment gets one of its own
        if tail.end + size > segment_size(self.config):
            return True
        age = self.config.segment_age_s
        if not age:
            return False
        try:
            return now - self._segment_created(tail.segment) > age * 1e9
        except BadBytes:
            return True  # its age is unknown, and a header that can be read is wanted

    def _reserve(self, fd: int, tail: Tail, size: int) -> None:
        """Make room for a block ahead of its write, in steps that grow: a small stream stays small on disk, a large
        one rarely waits for the file system, and a full disk shows here and not inside a block."""
        segment, reserved = self._reserved
        if segment != tail.segment:
            reserved = self.files.size(fd)
        if tail.end + size > reserved:
            want = max(min(reserved * 2, segment_size(self.config)), tail.end + size, _RESERVE_MIN)
            Reserve(self.files, os.path.dirname(os.path.dirname(self.path))).keep()
            try:
                self.files.allocate(fd, want)
            except OSError as exc:
                if exc.errno not in _FULL:
                    raise
                want = tail.end + size  # room for no more than this block, perhaps
                self.files.allocate(fd, want)
            reserved = want
        self._reserved = (tail.segment, reserved)

    def _segment_created(self, base: int) -> int:
        if getattr(self, "_created", (0, 0))[0] != base:
            self._created = (base, self.segments.header(base).created_ns)
        return self._created[1]

    def _roll(self, *, poisoned: bool = False) -> None:
        """Under lock, dirty: seal the segment and publish a new, durable, empty one."""
        tail = self.tail
        fd = self.segments.fd(tail.segment)
        self._reserved = (0, 0)
        if self.files.size(fd) > tail.end:
            self.files.truncate(fd, tail.end)
        if not poisoned:
            self.files.sync(fd)  # its size; and at level `process`, a power cut costs the last segment at most
        base = tail.durable + 1
        self._new_segment(base, chain=tail.chain, time_ns=tail.time_ns)
        self._publish(_continued(tail, base))

    def _new_segment(self, base: int, *, chain: int, time_ns: int) -> None:
        header = SegmentHeader(
            stream=self.name, incarnation=self.incarnation, base=base, created_ns=max(self.clock.time_ns(), time_ns),
            chain=chain, stream_created_ns=self.created_ns, config=self.config,
        )  # fmt: skip
        self.segments.forget(base)
        _make_segment(self.files, self.path, header)
        self.files.sync_dir(self.path)
        self.segments.refresh()

    def _cut(self, fd: int, tail: Tail, cause: OSError) -> None:
        """Take back a block that was not written whole. Raises Ambiguous when even that fails."""
        try:
            self._reserved = (0, 0)
            self.files.truncate(fd, tail.end)
            self._publish(tail)
        except OSError as exc:
            raise Ambiguous(
                f"stream {self.name}: append failed ({cause.strerror}) and could not be taken back"
            ) from exc

    def _rewrite(self, fd: int, block: Block) -> None:
        """Write a block that somebody else wrote once more, before it is synced and counted as stored: when his sync
        failed, the system holds the bytes for clean, and ours would succeed without storing them."""
        write_all(self.files, fd, [block.data[: block.header.size]], block.offset)

    def _poison(self, tail: Tail, fd: int) -> None:
        """After a failed sync: never trust this descriptor's cache again; go on in a new segment."""
        self._failed.add(tail.segment)
        try:
            self._set_dirty(2, poisoned=tail.segment)
            self._roll(poisoned=True)
            self._set_dirty(0)
        except OSError as exc:
            self._warn(f"segment {tail.segment} is poisoned by a failed sync and no new one could be made: {exc}")
            return  # the lock file says so, or at least this handle knows: the next holder tries again before it writes
        self._warn(f"a sync of segment {tail.segment} failed; writing goes on in segment {self.tail.segment}")

    def _write_index(self, segment: int, base: int, time_ns: int, offset: int) -> None:
        """Note the block when it is this handle's first one in its region. A cache: failing is not failing to store."""
        region = offset // INDEX_EVERY
        if self._index is not None and self._index[0] == segment and region == self._region:
            return
        try:
            if self._index is None or self._index[0] != segment:
                if self._index is not None:
                    self.files.close(self._index[1])
                    self._index = None
                fd = self.files.open(os.path.join(self.path, f"{segment:020d}{INDEX}"), create=True)
                self._index = (segment, fd)
            self.files.pwrite(self._index[1], encode_index_entry(base, time_ns, offset), region * INDEX_ENTRY)
            self._region = region
        except OSError as exc:
            self._region = -1
            self._warn(f"the index of segment {segment} could not be written: {exc.strerror or exc}")

    # -- recovery -----------------------------------------------------------------------------------------------------

    def _recover_from(self, tail: Tail, *, poisoned: bool) -> None:
        """The last holder died or gave up between `dirty` and publishing; the page itself is true.

        He may have been erasing: then files were replaced, and what the page says of the first block is of an old one.
        """
        remove_leftovers(self.files, self.path)
        self.segments.close()
        bases = self.segments.refresh()
        self.tail = tail = self._placed(replace(tail, erasures=tail.erasures + 1), tail.first)
        orphans = [b for b in bases if b > tail.segment]
        fd = self.segments.fd(tail.segment)
        if poisoned:
            self._set_dirty(2, poisoned=tail.segment)
            self._drop_orphans(orphans)
            self._roll(poisoned=True)
            self._set_dirty(0)
            self.segments.refresh()
            return
        new = tail
        while (found := self.segments.block(new.segment, new.end)) is not None:
            h = found.header
            if h.base != new.durable + 1 or h.chain != new.chain:
                break
            self._rewrite(fd, found)
            new = replace(
                new, durable=h.last, end=new.end + h.size, chain=h.crc, time_ns=max(h.time_ns, new.time_ns),
                bytes=new.bytes + h.size, first_time_ns=new.first_time_ns if new.durable >= new.first else h.time_ns,
            )  # fmt: skip
        self._keep_torn(fd, new.segment, new.end)
        if self.config.durability == "power":
            try:
                self.files.sync(fd)
            except OSError:
                self._failed.add(tail.segment)
                self._set_dirty(1, poisoned=tail.segment)  # a second sync would succeed without having stored anything
                raise
        for base in orphans:
            if base == new.durable + 1 and new.end == tail.end and self._whole_header(base):
                self.files.sync_dir(self.path)  # who made it may have died before its name was on the device
                new = _continued(new, base)
            else:
                self._drop_orphans([base])
        if self._limited:
            new = self._retained(new, new.time_ns)
        self._publish(new)

    def _whole_header(self, base: int) -> bool:
        try:
            header = self.segments.header(base)
        except BadBytes:
            return False
        return header.base == base and header.incarnation == self.incarnation

    def _drop_orphans(self, orphans: list[int]) -> None:
        for base in orphans:
            self.segments.forget(base)
            self.files.unlink(os.path.join(self.path, segment_name(base)))
        if orphans:
            self.files.sync_dir(self.path)
            self.segments.refresh()

    def _recover_all(self) -> None:
        """Another boot, a copied directory or a lost page: find the end from the segments alone.

        A stream has no page before its first opening. Its names go to the device here, before anything is published:
        whoever made the directory or a segment may have died before that.

        The page of a former boot still says one thing for certain: up to its mark, sequences were shown to readers. Where
        the segments end below it, what is missing is damage, and its sequences are not given again.
        """
        self.segments.close()
        bases = self.segments.refresh()
        streams = os.path.dirname(self.path)
        for directory in (self.path, streams, os.path.dirname(streams)):
            self.files.sync_dir(directory)
        old = decode_tail(self.files.pread(self._tail_fd, TAIL_BYTES, 0))
        if old is not None and (old.device, old.inode) != self.identity:
            old = None  # a copy; it may show several instants
        shown = old.durable if old is not None else 0
        found: _End | None = None
        while bases and found is None:
            last = bases[-1]
            found = self._end_of(last)
            if not found.sound and found.durable < last:
                # nothing in it can be read: out of the way with it, the segment before tells where we are
                self._set_aside(last)
                shown = max(shown, last - 1)
                bases = self.segments.refresh()
                found = None
        if found is None:
            last = shown + 1
            self._new_segment(last, chain=0, time_ns=0)
            found = _End(shown, SEGMENT_HEADER, 0, 0, True)
        fd = self.segments.fd(last)
        self._keep_torn(fd, last, found.end)
        if found.last is not None:
            self._rewrite(fd, found.last)
        self.files.sync(fd)
        time_ns = max(found.time_ns, old.time_ns if old is not None else 0)
        for base in reversed(self.segments.bases[:-1]):
            time_ns = time_ns or self._last_time(base)
        first = max(self._read_trim(), old.first if old is not None else 1)
        durable = max(found.durable, shown)
        tail = Tail(
            generation=(old.generation if old is not None else 0) + 1, boot=self.boot, device=self.identity[0],
            inode=self.identity[1], durable=durable, segment=last, end=found.end, chain=found.chain, time_ns=time_ns,
            first=min(first, durable + 1), first_segment=last, first_offset=SEGMENT_HEADER, bytes=0,
            deleted=old.deleted if old is not None else 0,
            # without the old page nobody knows what number readers have seen: it has to be another one
            erasures=old.erasures + 1 if old is not None else int(secrets.token_hex(4), 16),
        )  # fmt: skip
        remove_leftovers(self.files, self.path)
        if found.durable < shown:
            self._warn(f"records {found.durable + 1} to {shown} are lost: they were published and are not there")
        tail = self._placed(tail, tail.first)
        if found.durable < shown or not found.sound:
            self.tail = tail
            self._roll()
            tail = self.tail
        if self._limited:
            tail = self._retained(tail, self.clock.time_ns())
        self._publish(tail)
        self._set_dirty(0)
        self._let_go(self.tail)

    def _end_of(self, base: int) -> _End:
        """Where a segment's good blocks end, searched from its last index entry on."""
        try:
            header = self.segments.header(base)
            if header.base != base or header.incarnation != self.incarnation:
                raise BadBytes("it belongs to another stream or place")
            chain, sound = header.chain, True
        except BadBytes as exc:
            chain, sound = 0, False
            self._warn(f"the header of segment {base} is damaged: {exc}")
        start = self.segments.start_for(base, _ALL)
        at_start = start == SEGMENT_HEADER
        durable, end, time_ns = base - 1, SEGMENT_HEADER, 0
        last: Block | None = None
        for item in self.segments.walk(
            base, start=start, chain=chain if at_start and sound and chain else None, expected=base if at_start else None,
            mark=_ALL,
        ):  # fmt: skip
            if isinstance(item, Gap):
                if item.last >= _ALL:
                    break  # nothing good behind: a torn tail, not damage
                self._warn(f"records {item.first} to {item.last} are damaged")
                continue
            last = item
            durable, end = item.header.last, item.offset + item.header.size
            chain, time_ns = item.header.crc, max(time_ns, item.header.time_ns)
        return _End(durable, end, chain, time_ns, sound, last)

    def _set_aside(self, base: int) -> None:
        """Move a segment of which nothing can be read to the quarantine."""
        self.segments.forget(base)
        name = segment_name(base)
        kept = f"{self._quarantine()}/{name}-{secrets.token_hex(4)}.damaged"
        self.files.rename(os.path.join(self.path, name), kept)
        self.files.sync_dir(self.path)
        self._warn(f"segment {base} cannot be read and is kept in {QUARANTINE}")

    def _quarantine(self) -> str:
        folder = os.path.join(self.path, QUARANTINE)
        if not self.files.is_dir(folder):
            self.files.mkdir(folder)
        return folder

    def _warn(self, text: str) -> None:
        """Keep a warning for `info`: each once, at most a hundred."""
        if text not in self.warnings and len(self.warnings) < _WARNINGS_MAX:
            self.warnings.append(text)

    def _last_time(self, base: int) -> int:
        time_ns = 0
        for item in self.segments.walk(base, start=self.segments.start_for(base, 1 << 62), mark=1 << 62):
            if isinstance(item, Block):
                time_ns = item.header.time_ns
        return time_ns

    def _keep_torn(self, fd: int, segment: int, end: int) -> None:
        """Cut what lies behind the last good block, keeping a copy when it is not just reserved space."""
        size = self.files.size(fd)
        if size <= end:
            if size < end:
                self._warn(f"segment {segment} is shorter than what was published in it")
            return
        torn = 0
        for at in range(end, size, _COPY_BYTES):
            part = self.files.pread(fd, _COPY_BYTES, at).rstrip(b"\0")
            torn = at + len(part) - end if part else torn
        if not torn:
            return
        where = f"{torn} bytes of an unfinished write were cut from segment {segment}"
        try:
            kept = f"{self._quarantine()}/{segment:020d}-{end}-{secrets.token_hex(4)}.torn"
            aside = self.files.open(kept, create=True)
            try:
                for at in range(0, torn, _COPY_BYTES):
                    write_all(self.files, aside, [self.files.pread(fd, min(_COPY_BYTES, torn - at), end + at)], at)
                self.files.sync(aside)
            finally:
                self.files.close(aside)
            self._warn(f"{where} and kept in {QUARANTINE}")
        except OSError as exc:
            if exc.errno not in _FULL:
                raise
            self._warn(f"{where}; the disk is too full to keep them")  # nobody was told that they are stored
        self._reserved = (0, 0)
        self.files.truncate(fd, end)

    # -- trim and retention -------------------------------------------------------------------------------------------

    def trim(self, before: int) -> int:
        """Under lock: remove records below `before`, durably. Returns how many went."""
        tail = self.tail
        if before > tail.durable + 1:
            raise CursorAhead(after=before - 1, last=tail.durable, stream=self.name)
        if before <= tail.first:
            try:
                if before > self._read_trim():
                    self._write_trim(before)  # they expired, which a power cut might take back
            except OSError as exc:
                raise storage_error(exc, f"stream {self.name}: trim") from exc
            return 0
        try:
            erased = sum(tail.first <= s < before for s in self.erased(tail))
            new = self._placed(tail, before)
            self._write_trim(before)
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}: trim") from exc
        try:
            self._set_dirty(1)
            self._publish(new)
        except OSError as exc:
            raise Ambiguous(
                f"stream {self.name}: trimmed on disk, but that could not be published: {exc.strerror or exc}",
                hint="trim again",
            ) from exc
        self._remove_segments(new.first_segment)
        return before - tail.first - erased

    def expire(self) -> None:
        """Under lock: let go what the age limit says."""
        try:
            new = self._retained(self.tail, self.clock.time_ns())
            if new.first == self.tail.first:
                return
            self._set_dirty(1)
            self._publish(new)
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}: retention") from exc
        self._let_go(new)

    def _let_go(self, tail: Tail) -> None:
        """Remove the segments below a published `first`, which is marked durably before: a removal that a power cut
        takes back, or keeps in part, must not bring expired records with holes between them."""
        if not any(b < tail.first_segment for b in self.segments.bases):
            return
        try:
            self._write_trim(tail.first)
        except OSError as exc:
            self._warn(f"expired segments stay for now, the mark could not be written: {exc.strerror or exc}")
            return
        self._remove_segments(tail.first_segment)

    def _retained(self, tail: Tail, now: int) -> Tail:
        c = self.config
        if c.full == "drop_oldest" and c.records_max and tail.durable - tail.first + 1 > c.records_max:
            tail = self._moved(tail, tail.durable - c.records_max + 1)
        if c.full == "drop_oldest" and c.bytes_max:
            while tail.bytes > c.bytes_max and tail.first <= tail.durable:
                after = self._moved(tail, self._block_last(tail) + 1)
                if after.first > tail.durable:
                    break  # the newest block stays, whatever its size
                tail = after
        if c.age_s_max:
            oldest = now - int(c.age_s_max * 1e9)
            while tail.first <= tail.durable and tail.first_time_ns < oldest:
                tail = self._moved(tail, self._block_last(tail) + 1)
        return tail

    def _head(self, tail: Tail, segment: int, offset: int) -> BlockHeader | None:
        """The header of the block at an offset when it can be believed: what follows fits, or its checksum holds."""
        fd = self.segments.fd(segment)
        head = block_header(self.files.pread(fd, BLOCK_HEADER, offset))
        if head is None or head.last > tail.durable:
            return None
        end = offset + head.size
        if segment == tail.segment and end == tail.end:
            fits = (head.last, head.crc) == (tail.durable, tail.chain)
        else:
            behind = block_header(self.files.pread(fd, BLOCK_HEADER, end))
            fits = behind is not None and (behind.base, behind.chain) == (head.last + 1, head.crc)
        if not fits:
            block = self.segments.block(segment, offset)
            head = block.header if block is not None else None
        return head

    def _block_last(self, tail: Tail) -> int:
        """The last sequence of the block, or of the damage, that holds `tail.first`."""
        head = self._head(tail, tail.first_segment, tail.first_offset)
        if head is not None and head.base <= tail.first <= head.last:
            return head.last
        self.segments.refresh()
        segment = self.segments.holding(tail.first)
        for item in self.segments.walk(segment, mark=tail.durable):
            first, last = (item.first, item.last) if isinstance(item, Gap) else (item.header.base, item.header.last)
            if first <= tail.first <= last:
                return last
        following = self.segments.next_base(segment)
        return following - 1 if following is not None and tail.first < following <= tail.durable else tail.durable

    def _moved(self, tail: Tail, first: int) -> Tail:
        """The tail with a later `first`, hopping over a few blocks; far moves are placed by the index."""
        segment, offset, size = tail.first_segment, tail.first_offset, tail.bytes
        for _ in range(64):
            if first > tail.durable:
                return replace(
                    tail, first=first, first_segment=tail.segment, first_offset=tail.end, bytes=0, first_time_ns=0
                )
            head = self._head(tail, segment, offset)
            if head is None or head.base > first:
                following = self.segments.next_base(segment)
                if head is None and following is not None and following <= first:
                    segment, offset = following, SEGMENT_HEADER
                    continue
                break
            if head.last >= first:
                return replace(
                    tail,
                    first=first,
                    first_segment=segment,
                    first_offset=offset,
                    bytes=size,
                    first_time_ns=head.time_ns,
                )
            offset, size = offset + head.size, size - head.size
        return self._placed(tail, first)

    def _placed(self, tail: Tail, first: int) -> Tail:
        """The tail with `first` and everything derived from it found anew."""
        bases = [b for b in self.segments.refresh() if b <= tail.segment]
        if first > tail.durable:
            return replace(
                tail, first=first, first_segment=tail.segment, first_offset=tail.end, bytes=0, first_time_ns=0
            )
        segment = self.segments.holding(first)
        offset, time_ns = SEGMENT_HEADER, 0
        for base in [b for b in bases if b >= segment]:
            start = self.segments.start_for(base, first) if base == segment else SEGMENT_HEADER
            for item in self.segments.walk(base, start=start, mark=tail.durable):
                if isinstance(item, Block) and item.header.last >= first:
                    offset, time_ns = item.offset if base == segment else offset, item.header.time_ns
                    break
            if time_ns:
                break  # of what is damaged up to here, this is the best known time
        size = 0
        for base in bases:
            if base >= segment:
                end = tail.end if base == tail.segment else self.files.size(self.segments.fd(base))
                size += end - (offset if base == segment else SEGMENT_HEADER)
        return replace(
            tail, first=first, first_segment=segment, first_offset=offset, bytes=max(size, 0),
            first_time_ns=time_ns or tail.time_ns,
        )  # fmt: skip

    def _remove_segments(self, below: int) -> None:
        """Delete segments that hold nothing kept. What a crash or an error leaves, a later call removes."""
        for base in [b for b in self.segments.bases if b < below]:
            self.segments.forget(base)
            for suffix in (SEGMENT, INDEX):
                try:
                    self.files.unlink(os.path.join(self.path, f"{base:020d}{suffix}"))
                except FileNotFoundError:
                    continue  # somebody was faster, or there never was an index
                except OSError as exc:
                    self._warn(f"segment {base} is of no use any more and could not be removed: {exc.strerror or exc}")
        try:
            self.segments.refresh()
        except OSError:
            self.segments.bases = [b for b in self.segments.bases if b >= below]

    def _read_trim(self) -> int:
        """The first kept sequence, by the newer good half of the mark; 1 without one."""
        try:
            fd = self.files.open(os.path.join(self.path, TRIM), write=False)
        except FileNotFoundError:
            return 1
        try:
            data = self.files.pread(fd, TRIM_BYTES, 0)
        finally:
            self.files.close(fd)
        marks = decode_trim(data)
        if not marks:
            self._warn("the trim mark cannot be read; trimmed records may show again")
            return 1
        return max(marks)[1]

    def _write_trim(self, first: int) -> None:
        """Make the mark durable. In place and in the half that is not the newest: it needs no room on a full disk, and a
        crash leaves one of the two marks."""
        path = os.path.join(self.path, TRIM)
        fd = self.files.open(path, create=True)
        try:
            marks = decode_trim(self.files.pread(fd, TRIM_BYTES, 0))
            count = max(marks)[0] + 1 if marks else 1
            write_all(self.files, fd, [encode_trim(count, first)], TRIM_BYTES // 2 * (count & 1))
            self.files.sync(fd)
        finally:
            self.files.close(fd)
        if not marks:
            self.files.sync_dir(self.path)

    # -- erasing ------------------------------------------------------------------------------------------------------

    def erased(self, tail: Tail) -> array[int]:
        """The sequences of the erased records that lie in the segments. Raises OSError."""
        return erased_in(self, self.segments, tail)

    def erase(self, sequences: Sequence[int]) -> Erased:
        """Under lock: erase those of these (in order) that lie in the first segment that holds any, durably. Call it again,
        after letting others have the lock, with what lies behind `upto`.

        Trimmed records whose bytes are still there go too, and do not count. Raises StorageFull or Unavailable when
        certainly nothing in this segment changed, Ambiguous otherwise: then call it again with the same.
        """
        tail = self.tail
        what = f"stream {self.name}: erase"
        try:
            bases = self.segments.refresh()
            live = [s for s in sequences if bases and bases[0] <= s <= tail.durable]
            if not live:
                return Erased(0, sequences[-1], [])
            base = self.segments.holding(live[0])
            if base == tail.segment:
                # what is being written stays as it is published; it is erased from when it is sealed
                self._set_dirty(1)
                self._roll()
                tail = self.tail
            following = self.segments.next_base(base) or tail.durable + 1
            wanted = [s for s in live if s < following]
            change = plan(self.segments, base, wanted, tail.durable)
            if change.edits:
                self._set_dirty(1)  # from here on, whoever comes after our death clears up
                self._mark_erased_from()
                path, index = rewrite(self.segments, base, change)
                self._drop_index(base)
                self.files.rename(path, os.path.join(self.path, segment_name(base)))
        except OSError as exc:
            raise storage_error(exc, what) from exc
        try:
            # also when all of these were erased already: whoever did it may have died before this
            self.files.sync_dir(self.path)
            if change.edits:
                self.segments.forget(base)
                self._publish(self._placed(replace(tail, erasures=tail.erasures + 1), tail.first))
                self._erasures = self.tail.erasures
        except OSError as exc:
            raise Ambiguous(f"{what}: {exc.strerror or exc}", hint="erase them again") from exc
        if change.edits:
            self._put_index(base, index)
        records = sum(s >= tail.first for s in change.erased)
        return Erased(records, wanted[-1], [(gap.first, gap.last, gap.why) for gap in change.damage])

    def _mark_erased_from(self) -> None:
        """Make the stream one that an older build refuses, durably, before the first of its blocks is replaced."""
        header: SegmentHeader | None = None
        with suppress(BadBytes):
            header = self.stream_file()
        if header is None:
            header = self._any_header()
        if header.version < VERSION_ERASED:
            target = os.path.join(self.path, STREAM)
            _make_file(self.files, target + ".tmp", encode_segment_header(replace(header, version=VERSION_ERASED)))
            self.files.rename(target + ".tmp", target)
            self.files.sync_dir(self.path)

    def _drop_index(self, base: int) -> None:
        with suppress(FileNotFoundError):
            self.files.unlink(os.path.join(self.path, f"{base:020d}{INDEX}"))

    def _put_index(self, base: int, content: bytes) -> None:
        """A cache: failing is not failing to erase."""
        try:
            fd = self.files.open(os.path.join(self.path, f"{base:020d}{INDEX}"), create=True)
            try:
                write_all(self.files, fd, [content], 0)
            finally:
                self.files.close(fd)
        except OSError as exc:
            self._warn(f"the index of segment {base} could not be written: {exc.strerror or exc}")

    # -- the rest -----------------------------------------------------------------------------------------------------

    def mark_deleted(self) -> None:
        """Under lock: from now on every handle, in every process, answers NotFound."""
        try:
            self._set_dirty(1)
            self._publish(replace(self.tail, deleted=1))
            self.files.sync(self._tail_fd)
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}: delete") from exc

    def verify(self) -> Verification:
        """Read every published byte. Needs no lock: what is published does not change (trimmed parts are left out)."""
        tail = self.published()
        if tail is None:
            with self.locked():
                tail = self.tail
        reader = Segments(self.files, self.path, self.segments.seed)
        try:
            while True:
                try:
                    return self._verified(reader, tail)
                except FileNotFoundError:
                    again = self.current()  # trimmed while we read; a segment that is simply gone is found by its name
                    if again.first_segment == tail.first_segment and again.segment == tail.segment:
                        raise
                    tail = again
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}: verify") from exc
        finally:
            reader.close()

    def _verified(self, reader: Segments, tail: Tail) -> Verification:
        damage: list[Damage] = []
        erased: set[int] = set()
        records = size = 0
        bases = [b for b in reader.refresh() if b <= tail.segment]
        chain: int | None = None
        if tail.first <= tail.durable and (not bases or tail.first < bases[0]):
            last = bases[0] - 1 if bases else tail.durable
            damage.append(Damage(tail.first, last, segment_name(tail.first_segment), "missing"))
        for base in bases:
            where = segment_name(base)
            try:
                header = decode_segment_header(self.files.pread(reader.fd(base), SEGMENT_HEADER, 0), strict=True)
                chain = header.chain if chain is None else chain
            except BadBytes as exc:
                damage.append(Damage(base, base - 1, f"{where}:0", str(exc)))
            end = SEGMENT_HEADER
            for item in reader.walk(base, chain=chain or None, mark=tail.durable):
                if isinstance(item, Gap):
                    chain = None
                    if item.last >= tail.first or item.last < item.first:
                        damage.append(Damage(max(item.first, tail.first), item.last, f"{where}:{item.start}", item.why))
                    continue
                h = item.header
                chain, end = h.crc, item.offset + h.size
                kept = h.last - max(h.base, tail.first) + 1
                if kept > 0:
                    records += kept
                    size += h.size
                    if h.erased:
                        try:
                            gone = decode_meta(item.data, h).gone(h)
                        except BadBytes as exc:
                            damage.append(Damage(max(h.base, tail.first), h.last, f"{where}:{item.offset}", str(exc)))
                            continue
                        erased.update(s for s in gone if s >= tail.first)
            if base != tail.segment and self.files.size(reader.fd(base)) > end and not damage:
                slack = self.files.pread(reader.fd(base), BLOCK_DATA_MAX, end).strip(b"\0")
                if slack:
                    self._warn(f"{where}: {len(slack)} bytes of a superseded write behind its last block")
        first = first_kept(tail, sorted(erased))
        return Verification(records=records - len(erased), bytes=size, first=first, last=tail.durable, damage=damage)


def erased_in(journal: Journal, segments: Segments, tail: Tail) -> array[int]:
    """The erased sequences, by somebody's own view of the segments. Nothing is read of a stream that was never erased from.
    Raises OSError."""
    try:
        header = journal.stream_file()
    except BadBytes:
        header = None
    if header is not None and header.version < VERSION_ERASED:
        return array("Q")
    segments.refresh()
    return segments.erased(tail.durable)


def first_kept(tail: Tail, erased: Sequence[int]) -> int:
    """The oldest record's sequence, with the erased ones known; durable + 1 when there is none."""
    first = tail.first
    at = bisect_left(erased, first)
    while at < len(erased) and erased[at] == first:
        first, at = first + 1, at + 1
    return first


def segment_size(config: StreamConfig) -> int:
    """The size at which a stream rolls: as configured, and small enough that bytes_max can be kept."""
    size = config.segment_bytes or LOG_DEFAULTS.segment_bytes or 0
    if config.bytes_max:
        size = min(size, max(64 * 1024, config.bytes_max // 8))
    return max(size, SEGMENT_HEADER * 2)


def _continued(tail: Tail, base: int) -> Tail:
    """The tail when writing goes on in a new, empty segment."""
    if tail.durable < tail.first:
        tail = replace(tail, first_segment=base, first_offset=SEGMENT_HEADER)
    return replace(tail, segment=base, end=SEGMENT_HEADER)


def _make_segment(files: Files, path: str, header: SegmentHeader) -> None:
    """A new segment file, whole and durable before it has its name; the caller syncs the directory."""
    target = os.path.join(path, segment_name(header.base))
    _make_file(files, target + ".tmp", encode_segment_header(header))
    files.rename(target + ".tmp", target)


def _make_file(files: Files, path: str, content: bytes) -> None:
    fd = files.open(path, create=True)
    try:
        files.truncate(fd, 0)
        write_all(files, fd, [content], 0)
        files.sync(fd)
    finally:
        files.close(fd)


def remove_tree(files: Files, path: str) -> None:
    """Remove a stream directory of ours: files, and one level of quarantine. Others may remove it at the same time."""
    with suppress(FileNotFoundError):
        for name in files.listdir(path):
            full = os.path.join(path, name)
            if files.is_dir(full):
                remove_tree(files, full)
            else:
                with suppress(FileNotFoundError):
                    files.unlink(full)
        files.rmdir(path)
