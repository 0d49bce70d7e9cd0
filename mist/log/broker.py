"""The contract over a log directory.

Appends go to one writer thread per stream handle, which takes everything that came while it was busy as one block, one
sync. Reads happen in the event loop's thread: pages come from the page cache. State (SQLite) has one thread per broker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from mist.broker.base import (
    ALL,
    BYTES_MAX,
    RECORD_BYTES_MAX,
    Broker,
    Capabilities,
    Checkpoint,
    Checkpoints,
    Consumer,
    ConsumerConfig,
    ConsumerInfo,
    Delivery,
    Message,
    Page,
    Pending,
    Record,
    Stream,
    StreamConfig,
    StreamInfo,
    Verification,
    check_delay,
    check_position,
    check_read,
    check_sequences,
)
from mist.broker.checkpoint import check_key, check_save
from mist.broker.clock import SYSTEM, Clock
from mist.broker.deadletter import EXHAUSTED, bury, dead_letter
from mist.broker.notify import Notifier
from mist.errors import (
    Closed,
    CursorAhead,
    DataLoss,
    InvalidArgument,
    Locked,
    MistError,
    NotFound,
    SequenceExpired,
    StorageFull,
    Unavailable,
)
from mist.log.committer import Committer
from mist.log.files import REAL, Files, boot_id
from mist.log.format import TAIL_BYTES, Tail, decode_tail
from mist.log.journal import LOG_DEFAULTS, NEW, Journal, first_kept, remove_tree, storage_error
from mist.log.reader import Reader
from mist.log.reserve import Reserve
from mist.log.state import Lease, State, now_ms
from mist.log.watch import Watch
from mist.protocol.subject import check_name, check_stream, dead_stream, matcher
from mist.protocol.url import Url

P = ParamSpec("P")
T = TypeVar("T")

CAPABILITIES = Capabilities(persistent=True, processes=True, threads=True, erase=True, verify=True)
_RECHECK_S = 0.25
_OLD = ".old-"
_DAMAGED = ".damaged-"
_DELAY_S_MAX = 10 * 365 * 86400.0
_NETWORK_FS = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs", "fuse.glusterfs"})


async def connect(
    url: Url, *, create: bool = True, files: Files = REAL, clock: Clock = SYSTEM, boot: bytes | None = None,
    lock_wait_s: float = 10.0,
) -> LogBroker:  # fmt: skip
    """The adapter's door: `log:DIR`. The directory is made when absent and `create`.

    Raises InvalidArgument (no directory named, unsupported platform or file system), NotFound, Unavailable.
    """
    url.refuse_unknown("stream", "subject", "consumer", "from")
    if sys.platform == "win32":
        raise InvalidArgument("log: needs Linux or macOS", hint="use a server (nats://, redis://) on this platform")
    if not url.target:
        raise InvalidArgument("log: names no directory", hint="for example log:./data")
    path = os.path.abspath(url.target)
    try:
        if not files.is_dir(os.path.join(path, "streams")):
            if not create:
                raise NotFound(f"no log in {url.target}", hint="nothing was published there yet")
            if os.path.exists(path) and not os.path.isdir(path):
                raise InvalidArgument(f"log:{url.target} is a file, not a directory")
            _make_directory(files, path)
        kind = _file_system(path)
    except NotADirectoryError as exc:
        raise InvalidArgument(f"log:{url.target} leads through a file") from exc
    except OSError as exc:
        raise storage_error(exc, f"log:{url.target}") from exc
    if kind in _NETWORK_FS:
        raise InvalidArgument(
            f"log:{url.target} lies on a network file system ({kind}), whose locks and syncs cannot be relied on",
            hint="use a local disk, or a server",
        )
    return LogBroker(str(url), path, files, clock, boot or boot_id(), lock_wait_s)


def _make_directory(files: Files, path: str) -> None:
    """DIR and DIR/streams with all above them, and their names on the device: an acknowledged record is worth nothing
    in a directory that a power cut takes away."""
    above = [path]
    while not files.is_dir(above[-1]):
        above.append(os.path.dirname(above[-1]))
    for made in [*reversed(above[:-1]), os.path.join(path, "streams")]:
        with contextlib.suppress(FileExistsError):  # another process makes the same log
            files.mkdir(made)
        files.sync_dir(os.path.dirname(made))


def _file_system(path: str) -> str:
    """The type of the file system a path lies on; empty where the system does not tell."""
    try:
        with open("/proc/self/mountinfo") as f:
            lines = f.read().splitlines()
    except OSError:
        return ""
    real, best, kind = os.path.realpath(path), "", ""
    for line in lines:
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4].replace("\\040", " ")
        if len(point) >= len(best) and (real == point or real.startswith(point.rstrip("/") + "/")):
            best, kind = point, right.split(" ")[0]
    return kind


class LogBroker(Broker):
    backend = "log"
    capabilities = CAPABILITIES

    def __init__(self, url: str, path: str, files: Files, clock: Clock, boot: bytes, lock_wait_s: float) -> None:
        self.url = url
        self.path = path
        self.files = files
        self.clock = clock
        self.boot = boot
        self.lock_wait_s = lock_wait_s
        self._streams: dict[str, LogStream] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mist-state")
        self._state: State | None = None
        self._checkpoints = LogCheckpoints(self)
        self._closed = False

    def check_open(self) -> None:
        if self._closed:
            raise Closed("the broker is closed")

    async def thread(self, call: Callable[P, T], *args: P.args, **kw: P.kwargs) -> T:
        """Run a blocking call in the broker's own thread. Cancelling the caller does not stop the call."""
        self.check_open()
        running = asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(*args, **kw))
        try:
            while not (await asyncio.wait({running}, timeout=self.lock_wait_s))[0]:
                if self._state is not None and self._state.waits_for_lock:
                    raise Locked(
                        f"{self.url}: another process has held state.lock for {self.lock_wait_s:g} s",
                        hint="is it stopped or stuck? try again when it goes on",
                    )
        except BaseException:
            running.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody is left to look at it
            raise
        return running.result()

    async def with_state(self, call: Callable[[State], T]) -> T:
        return await self.thread(self.with_reserve, lambda: call(self._opened_state()))

    def with_reserve(self, call: Callable[[], T]) -> T:
        """In the broker's thread: a call that must work on a full disk. It is repeated when it met one, with the space
        that is kept for this. It must have left nothing behind when it raises StorageFull."""
        try:
            return call()
        except StorageFull:
            try:
                Reserve(self.files, self.path).give_up()
            except OSError as exc:
                raise storage_error(exc, f"{self.url}: reserve") from exc
            if self._state is not None:
                self._state.make_room()
            return call()

    def _opened_state(self) -> State:
        if self._state is None:
            try:
                self._state = State(self.files, self.path, self.boot)
            except OSError as exc:
                raise storage_error(exc, "state.db") from exc
        return self._state

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._state.warnings) if self._state is not None else ()

    def _stream_path(self, name: str) -> str:
        return os.path.join(self.path, "streams", name)

    async def open(self, name: str, *, create: bool = True, config: StreamConfig | None = None) -> LogStream:
        self.check_open()
        check_stream(name)
        asked = (config or StreamConfig()).validate()
        if asked.durability == "replicated":
            raise InvalidArgument("log: cannot give durability 'replicated'", hint="use a JetStream cluster")
        known = self._streams.get(name)
        if known is not None and not known.gone():
            asked.check_fits(known.journal.config, name)
            return known
        journal = await self.thread(self._open_journal, name, create, asked)
        try:
            asked.check_fits(journal.config, name)
        except BaseException:
            journal.close()
            raise
        current = self._streams.get(name)
        if current is not None and current is not known and not current.gone():
            journal.close()  # somebody else on this loop opened it meanwhile
            return current
        stream = self._streams[name] = LogStream(self, journal)
        return stream

    def _open_journal(self, name: str, create: bool, asked: StreamConfig) -> Journal:
        path = self._stream_path(name)
        try:
            for _ in range(5):
                if not self.files.is_dir(path):
                    if not create:
                        raise NotFound(f"no stream {name} in {self.url}")
                    config = asked.or_defaults(LOG_DEFAULTS)
                    Journal.create(self.files, self.clock, os.path.join(self.path, "streams"), name, config)
                journal = Journal(self.files, self.clock, path, self.boot)
                try:
                    tail = journal.published()
                    if tail is None:
                        with journal.locked():
                            tail = journal.tail
                except NotFound:
                    journal.close()
                    self._finish_delete(name)
                    continue
                except BaseException:
                    journal.close()
                    raise
                if tail.deleted:
                    journal.close()
                    self._finish_delete(name)
                    continue
                return journal
        except FileNotFoundError as exc:
            raise NotFound(f"no stream {name} in {self.url}") from exc
        except OSError as exc:
            raise storage_error(exc, f"stream {name}") from exc
        raise Unavailable(f"stream {name} is made and deleted all the time by others")

    def _finish_delete(self, name: str) -> None:
        """Take a stream that is marked as deleted out of the way. Safe to do twice, or by several: under a lock, and only
        what is marked; a stream made anew under the name stays, with what belongs to it."""
        path = self._stream_path(name)
        streams = os.path.join(self.path, "streams")
        with self._delete_lock():
            if not self._marked_deleted(path):
                return
            self._opened_state().forget_stream(name)  # now: behind the rename somebody may make it anew
            self.files.rename(path, os.path.join(streams, f"{_OLD}{name}-{os.urandom(6).hex()}"))
            self.files.sync_dir(streams)
        for old in self.files.listdir(streams):
            if old.startswith(_OLD):
                remove_tree(self.files, os.path.join(streams, old))

    @contextlib.contextmanager
    def _delete_lock(self) -> Iterator[None]:
        fd = self.files.open(os.path.join(self.path, "delete.lock"), create=True)
        try:
            until = time.monotonic() + self.lock_wait_s
            while not self.files.lock(fd, wait=False):
                if time.monotonic() > until:
                    raise Locked(f"{self.url}: another process has held delete.lock for {self.lock_wait_s:g} s")
                time.sleep(0.002)
            yield
        finally:
            self.files.close(fd)

    def _marked_deleted(self, path: str) -> bool:
        try:
            fd = self.files.open(os.path.join(path, "tail"), write=False)
        except FileNotFoundError:
            return False
        try:
            tail = decode_tail(self.files.pread(fd, TAIL_BYTES, 0))
        finally:
            self.files.close(fd)
        return tail is not None and bool(tail.deleted)

    def _abandon(self, name: str, why: MistError) -> None:
        """Take a stream of which nothing can be read out of the way, and keep it: deleting must always be possible."""
        path = self._stream_path(name)
        streams = os.path.join(self.path, "streams")
        if not self.files.is_dir(path):
            raise why
        with self._delete_lock():
            readable: Journal | None = None
            with contextlib.suppress(DataLoss, NotFound):
                readable = Journal(self.files, self.clock, path, self.boot)
            if readable is not None:
                readable.close()
                raise why  # somebody made it anew meanwhile
            self._opened_state().forget_stream(name)
            self.files.rename(path, os.path.join(streams, f"{_DAMAGED}{name}-{os.urandom(6).hex()}"))
            self.files.sync_dir(streams)

    async def streams(self) -> list[str]:
        self.check_open()
        try:
            names = self.files.listdir(os.path.join(self.path, "streams"))
        except OSError as exc:
            raise storage_error(exc, self.url) from exc
        return sorted(n for n in names if not n.startswith("."))

    async def delete(self, name: str) -> None:
        self.check_open()
        check_stream(name)
        await self.thread(self.with_reserve, lambda: self._delete(name))
        stream = self._streams.pop(name, None)
        if stream is not None:
            await stream.retire()

    def _delete(self, name: str) -> None:
        try:
            journal = self._open_journal(name, False, StreamConfig())
        except (DataLoss, NotFound) as exc:
            try:
                return self._abandon(name, exc)
            except OSError as error:
                raise storage_error(error, f"stream {name}: delete") from error
        try:
            with journal.locked():
                journal.mark_deleted()
        finally:
            journal.close()
        try:
            self._finish_delete(name)
        except OSError as exc:
            raise storage_error(exc, f"stream {name}: delete") from exc

    async def ping(self) -> float:
        self.check_open()
        start = self.clock.monotonic()
        try:
            self.files.listdir(os.path.join(self.path, "streams"))
        except OSError as exc:
            raise storage_error(exc, self.url) from exc
        return self.clock.monotonic() - start

    @property
    def checkpoints(self) -> LogCheckpoints:
        return self._checkpoints

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            await stream.retire()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(
            self._pool, self._close_state
        )  # behind a call whose caller was cancelled: it may open one
        await loop.run_in_executor(None, self._pool.shutdown)

    def _close_state(self) -> None:
        state, self._state = self._state, None
        if state is not None:
            state.close()


class LogStream(Stream):
    size_bytes_max = RECORD_BYTES_MAX

    def __init__(self, broker: LogBroker, journal: Journal) -> None:
        self.broker = broker
        self.journal = journal
        self.name = journal.name
        self.incarnation = journal.incarnation
        self.changed = Notifier()
        self._reader = Reader(journal)
        self._watch: Watch | None = None
        self._committer = Committer(journal, asyncio.get_running_loop(), self.changed, broker.lock_wait_s)
        self._retired = False
        self._lock = threading.Lock()

    def _check(self) -> None:
        self.broker.check_open()
        if self._retired:
            raise NotFound(f"stream {self.name} was deleted")

    def gone(self) -> bool:
        """Whether this handle's stream was deleted, by anybody."""
        if self._retired:
            return True
        tail = self.journal.published()
        return tail is not None and bool(tail.deleted)

    async def retire(self) -> None:
        """Finish accepted appends, wake waiters, close the files."""
        if self._retired:
            return
        self._retired = True
        finished = await self._committer.aclose()
        self.changed.notify()
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._reader.close()
        if finished:
            self.journal.close()

    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        self._check()
        if not messages:
            return []
        committer = self._committer
        if committer.full:
            await committer.room()
        try:
            return await committer.append(messages, expected_last)
        except StorageFull:
            self._let_go()
            raise

    async def read(
        self,
        *,
        after: int = 0,
        subjects: Sequence[str] = ALL,
        limit: int = 256,
        bytes_max: int = BYTES_MAX,
        wait_s: float = 0.0,
    ) -> Page:
        match = matcher(subjects)
        check_read(after=after, limit=limit, bytes_max=bytes_max, wait_s=wait_s)
        until = 0.0
        while True:
            self._check()
            generation = self.changed.generation
            await self._expire()
            self._check()
            page = self._page(after, match, limit, bytes_max)
            if page.records or wait_s <= 0:
                return page
            now = self.broker.clock.monotonic()
            until = until or now + wait_s
            if page.scanned < page.last:
                after = page.scanned
                await asyncio.sleep(0)
                continue
            if now >= until:
                return page
            after = page.scanned
            if self.watch():
                continue  # something may have come between the read and the watch
            await self.changed.wait(generation, until - now)

    def _page(self, after: int, match: Any, limit: int, bytes_max: int) -> Page:
        try:
            return self._reader.page(after=after, match=match, limit=limit, bytes_max=bytes_max)
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}: read") from exc

    def watch(self) -> bool:
        """Notice from now on what other processes publish. True when this call began it: look once more."""
        if self._watch is not None:
            return False
        try:
            self._watch = Watch(os.path.join(self.journal.path, "tail"), self.changed.notify)
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}: inotify") from exc
        return True

    async def _expire(self) -> None:
        age = self.journal.config.age_s_max
        if not age:
            return
        tail = self._reader.tail()
        if tail.first <= tail.durable and tail.first_time_ns + age * 1e9 < self.broker.clock.time_ns():
            await self.broker.thread(self._locked, Journal.expire)

    def _locked(self, call: Callable[[Journal], T]) -> T:
        """In a thread: a call under the stream's lock, with files of its own."""
        try:
            journal = Journal(self.journal.files, self.journal.clock, self.journal.path, self.journal.boot)
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}") from exc
        try:
            with journal.locked():
                return call(journal)
        finally:
            journal.close()

    async def info(self) -> StreamInfo:
        self._check()
        await self._expire()
        self._check()
        tail = self._reader.tail()
        config = self.journal.config
        erased = self._erased(tail)
        return StreamInfo(
            name=self.name, incarnation=self.incarnation, first=first_kept(tail, erased), last=tail.durable,
            records=tail.durable - tail.first + 1 - (len(erased) - bisect_left(erased, tail.first)), bytes=tail.bytes, durability=config.durability or "power",
            capabilities=CAPABILITIES, config=config, created_ns=self.journal.created_ns,
            size_bytes_max=self.size_bytes_max, warnings=(*self.journal.warnings, *self.broker.warnings),
        )  # fmt: skip

    def _erased(self, tail: Tail) -> array[int]:
        """The sequences of the erased records, in order."""
        try:
            return self._reader.erased(tail)
        except FileNotFoundError:
            return self._reader.erased(self._reader.tail())  # a segment went while we looked
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}: info") from exc

    async def locate(self, time_ns: int) -> int:
        self._check()
        await self._expire()
        self._check()
        try:
            return self._reader.locate(time_ns)
        except OSError as exc:
            raise storage_error(exc, f"stream {self.name}: locate") from exc

    async def trim(self, *, before: int) -> int:
        check_position(before, "before")
        self._check()
        gone: int = await self.broker.thread(self.broker.with_reserve, lambda: self._locked(lambda j: j.trim(before)))
        self._let_go()
        self.changed.notify()  # what was leased below it is gone: there may be room for others
        return gone

    async def erase(self, sequences: Sequence[int]) -> int:
        check_sequences(sequences)
        self._check()
        count = 0
        damage: list[tuple[int, int, str]] = []
        wanted = sorted(set(sequences))
        left = wanted
        while left:
            # one segment at a time: appends go on in between
            part = await self.broker.thread(
                self.broker.with_reserve, lambda some=left: self._locked(lambda j: j.erase(some))
            )
            count += part.records
            damage += part.damage
            left = left[bisect_right(left, part.upto) :]
        if wanted:
            await self.broker.with_state(lambda s: s.erase(self.name, wanted))
            self._let_go()
            self.changed.notify()
        if damage:
            first, last, why = damage[0]
            raise DataLoss(first=first, last=last, resume_after=last, stream=self.name, why=why)
        return count

    def _let_go(self) -> None:
        """Close what the reader holds of removed segments, so that their space is free for the next append."""
        tail = self.journal.published()
        if tail is not None:
            self._reader.drop_below(tail)

    async def verify(self) -> Verification:
        self._check()
        await self._expire()

        def run() -> Verification:
            try:
                journal = Journal(self.journal.files, self.journal.clock, self.journal.path, self.journal.boot)
                try:
                    return journal.verify()
                finally:
                    journal.close()
            except OSError as exc:
                raise storage_error(exc, f"stream {self.name}: verify") from exc

        return await asyncio.to_thread(run)

    async def consumer(self, name: str, config: ConsumerConfig | None = None, *, create: bool = True) -> LogConsumer:
        check_name(name)
        dead_stream(self.name)  # a name without room for its dead letters shows now, not at the first one
        self._check()
        if config is not None:
            config.validate()
            last = self._reader.tail().durable
            if config.after > last:
                raise CursorAhead(after=config.after, last=last, stream=self.name)
        row = await self.broker.with_state(
            lambda s: s.consumer(self.name, self.incarnation, name, config, create=create)
        )
        return LogConsumer(self, name, row.id, row.config)

    async def consumers(self) -> list[str]:
        self._check()
        return await self.broker.with_state(lambda s: s.consumers(self.name, self.incarnation))


class LogConsumer(Consumer):
    def __init__(self, stream: LogStream, name: str, id: int, config: ConsumerConfig) -> None:
        self.name = name
        self.stream = stream.name
        self.config = config
        self._stream = stream
        self._broker = stream.broker
        self._id = id
        self._match = matcher(config.subjects)

    async def fetch(self, *, limit: int = 256, bytes_max: int = BYTES_MAX, wait_s: float = 0.0) -> list[Delivery]:
        check_read(limit=limit, bytes_max=bytes_max, wait_s=wait_s)
        limit = min(limit, self.config.pending_max)
        clock = self._broker.clock
        until = clock.monotonic() + wait_s
        changed = self._stream.changed
        while True:
            self._stream._check()
            generation = changed.generation
            await self._stream._expire()
            out, again, due_s = await self._take(limit, bytes_max)
            if out:
                return out
            if again:
                continue
            left = until - clock.monotonic()
            if left <= 0:
                return out
            if self._stream.watch():
                continue
            # a nak or an ack in another process raises no event here: look again now and then
            await changed.wait(generation, min(left, _RECHECK_S if due_s is None else min(max(due_s, 0.0), _RECHECK_S)))

    async def _take(self, limit: int, bytes_max: int) -> tuple[list[Delivery], bool, float | None]:
        tail = self._stream._reader.tail()
        found: tuple[int, list[int], int] | None = None
        read: dict[int, Record] = {}
        if self._match is not None:
            delivered = await self._broker.with_state(lambda s: s.delivered(self._id))
            after = max(delivered, tail.first - 1)
            page = self._stream._page(after, self._match, limit, bytes_max)
            read = {r.sequence: r for r in page.records}
            found = (after, list(read), page.scanned)
        taking = asyncio.ensure_future(self._broker.with_state(
            lambda s: s.take(self._id, self.config, limit=limit, first=tail.first, last=tail.durable, found=found)
        ))  # fmt: skip
        try:
            given, exhausted, waiting, moved = await asyncio.shield(taking)
        except asyncio.CancelledError:
            # the transaction may still commit: what it leased to us goes back, unseen; those out of attempts come back
            # by themselves. Where giving back fails, the ack wait does it
            with contextlib.suppress(MistError):
                given, *_ = await taking
                await self._return(given)
            raise
        if exhausted:
            for lease in exhausted:
                records, passed = self._records(lease, lease.left, 1 << 62, {})
                await self._bury([Delivery(r, lease.attempt, _token(lease)) for r in records], EXHAUSTED)
                await self._settle_gone(lease, records, passed)
        out: list[Delivery] = []
        size = 0
        for i, lease in enumerate(given):
            try:
                records, passed = self._records(
                    lease, limit - len(out), bytes_max - size if out else bytes_max, read, more=bool(out)
                )
            except DataLoss as exc:
                await self._skip(lease, exc)
                await self._return(given[i + 1 :])
                if out:
                    await self._return_deliveries(out)
                raise
            token = _token(lease)
            out.extend([Delivery(r, lease.attempt, token) for r in records])
            if len(records) < lease.left:
                kept = await self._settle_gone(lease, records, passed)
                if kept:
                    await self._broker.with_state(
                        lambda s, t=token, k=kept: s.give_back(self._id, {t: k}, delay_ms=0, same_attempt=True)  # type: ignore[misc]
                    )
                    await self._return(given[i + 1 :])
                    break
            size += sum(len(r.data) for r in records)
        progressed = bool(exhausted or given) or (moved and found is not None)
        return out, progressed, None if waiting is None else (waiting - now_ms()) / 1000

    async def _settle_gone(self, lease: Lease, records: Sequence[Record], passed: int) -> list[int]:
        """Settle what was trimmed or erased while it was leased; what else is open and not among these records."""
        got = {r.sequence for r in records}
        rest = [s for s in lease.open() if s not in got]
        first = self._stream._reader.tail().first if rest else 0
        gone = [s for s in rest if s < first or s <= passed]
        if gone:
            await self._broker.with_state(lambda s: s.settle(self._id, {_token(lease): gone}))
        return [s for s in rest if s >= first and s > passed]

    def _records(
        self, lease: Lease, limit: int, bytes_max: int, read: dict[int, Record], *, more: bool = False
    ) -> tuple[list[Record], int]:
        """The open records of a lease, as far as the limits go, and up to where it was looked: what is missing up to there
        was erased or trimmed. Raises DataLoss."""
        if lease.sequences is not None and lease.done is None and read and lease.lo in read:
            wanted = lease.open()
            if all(s in read for s in wanted):
                return [read[s] for s in wanted][:limit], 0
        wanted_set = None if lease.done is None and lease.sequences is None else set(lease.open())
        out: list[Record] = []
        after, size = lease.lo - 1, 0
        passed = 0
        while after < lease.hi and len(out) < limit:
            left = bytes_max - size
            if left <= 0:
                break
            try:
                page = self._stream._page(after, None, min(lease.hi - after, 65_536), left)
            except SequenceExpired as exc:
                after = exc.first - 1
                continue
            except CursorAhead:
                break
            records = page.records
            if not records and page.scanned <= after:
                break
            after = page.scanned
            if wanted_set is not None or lease.hi < after:
                records = [
                    r for r in records if r.sequence <= lease.hi and (wanted_set is None or r.sequence in wanted_set)
                ]
            if (more or out) and records and len(records[0].data) > left:
                break
            out.extend(records)
            size += sum(len(r.data) for r in records)
            passed = after
        if len(out) > limit:
            return out[:limit], out[limit - 1].sequence
        return out, passed

    async def _skip(self, lease: Lease, loss: DataLoss) -> None:
        """Settle what is damaged, give the rest of the lease back unseen."""
        token = _token(lease)
        rest = [s for s in lease.open() if not loss.first <= s <= loss.last]

        def skip(state: State) -> None:
            state.skip(self._id, loss.first, loss.last)
            if rest:
                state.give_back(self._id, {token: rest}, delay_ms=0, same_attempt=True)

        await self._broker.with_state(skip)

    async def _return(self, leases: Sequence[Lease]) -> None:
        groups = {_token(lease): lease.open() for lease in leases}
        if groups:
            await self._broker.with_state(lambda s: s.give_back(self._id, groups, delay_ms=0, same_attempt=True))

    async def _return_deliveries(self, deliveries: Sequence[Delivery]) -> None:
        groups = _grouped(deliveries)
        await self._broker.with_state(lambda s: s.give_back(self._id, groups, delay_ms=0, same_attempt=True))

    async def ack(self, deliveries: Sequence[Delivery]) -> int:
        self._stream._check()
        if not deliveries:
            return 0
        groups = _grouped(deliveries)
        count = await self._broker.with_state(lambda s: s.settle(self._id, groups))
        if count:
            self._stream.changed.notify()
        return count

    async def nak(self, deliveries: Sequence[Delivery], *, delay_s: float = 0.0) -> int:
        check_delay(delay_s)
        self._stream._check()
        if not deliveries:
            return 0
        most = self.config.attempts_max
        spent = [d for d in deliveries if most and d.attempt >= most]
        back = [d for d in deliveries if not (most and d.attempt >= most)]
        count = 0
        if spent:
            ours = await self._ours(spent)
            await self._bury(ours, EXHAUSTED)
            count += len(ours)
        if back:
            groups = _grouped(back)
            count += await self._broker.with_state(
                lambda s: s.give_back(self._id, groups, delay_ms=int(min(delay_s, _DELAY_S_MAX) * 1000))
            )
        if count:
            self._stream.changed.notify()
        return count

    async def term(self, deliveries: Sequence[Delivery], *, reason: str = "") -> int:
        self._stream._check()
        ours = await self._ours(deliveries) if deliveries else []
        await self._bury(ours, reason)
        return len(ours)

    async def _ours(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Those still under their token, once each, with their wait started anew: nobody may fetch them meanwhile."""
        groups = _grouped(deliveries)

        def hold(state: State) -> set[int]:
            state.extend(self._id, self.config, groups)
            return state.ours(self._id, groups)

        ours = await self._broker.with_state(hold)
        return list({d.record.sequence: d for d in deliveries if d.record.sequence in ours}.values())

    async def _bury(self, deliveries: Sequence[Delivery], reason: str) -> None:
        letters = [
            dead_letter(
                d.record, stream=self.stream, incarnation=self._stream.incarnation, consumer=self.name,
                attempts=d.attempt, reason=reason,
            )
            for d in deliveries
        ]  # fmt: skip
        await bury(self._broker, letters, stream=self.stream)
        await self.ack(deliveries)

    async def extend(self, deliveries: Sequence[Delivery]) -> int:
        self._stream._check()
        if not deliveries:
            return 0
        groups = _grouped(deliveries)
        return await self._broker.with_state(lambda s: s.extend(self._id, self.config, groups))

    async def info(self) -> ConsumerInfo:
        self._stream._check()
        await self._stream._expire()
        tail = self._stream._reader.tail()
        floor, delivered, pending, redelivered = await self._broker.with_state(
            lambda s: s.figures(self._id, tail.first)
        )
        erased = self._stream._erased(tail)
        unread = max(tail.durable - delivered, 0) - (len(erased) - bisect_right(erased, delivered))
        lag_s = 0.0
        if unread:
            try:
                for record in self._stream._page(delivered, None, 1, 1).records:
                    lag_s = max(0.0, (self._broker.clock.time_ns() - record.timestamp_ns) / 1e9)
            except (DataLoss, SequenceExpired):
                lag_s = 0.0  # its oldest record is unreadable: its age is unknown
        return ConsumerInfo(
            name=self.name, stream=self.stream, floor=floor, delivered=delivered, pending=pending,
            redelivered=redelivered, lag=unread + pending, lag_s=lag_s, config=self.config,
        )  # fmt: skip

    async def pending(self, *, limit: int = 1000) -> list[Pending]:
        self._stream._check()
        first = self._stream._reader.tail().first
        return await self._broker.with_state(lambda s: s.pending(self._id, limit, first))

    async def seek(self, after: int) -> None:
        self._stream._check()
        check_position(after)
        tail = self._stream._reader.tail()
        if after > tail.durable:
            raise CursorAhead(after=after, last=tail.durable, stream=self.stream)
        to = max(after, tail.first - 1)
        await self._broker.with_state(lambda s: s.seek(self._id, to))
        self._stream.changed.notify()

    async def delete(self) -> None:
        self._stream._check()
        await self._broker.with_state(lambda s: s.delete_consumer(self._id))
        self._stream.changed.notify()


class LogCheckpoints(Checkpoints):
    def __init__(self, broker: LogBroker) -> None:
        self._broker = broker

    async def save(self, checkpoint: Checkpoint, *, force: bool = False) -> Checkpoint:
        self._broker.check_open()
        check_save(checkpoint)
        return await self._broker.with_state(lambda s: s.save(checkpoint, force=force))

    async def load(self, stream: str, name: str) -> Checkpoint | None:
        check_key(stream, name)
        return await self._broker.with_state(lambda s: s.load(stream, name))

    async def delete(self, stream: str, name: str) -> bool:
        check_key(stream, name)
        return await self._broker.with_state(lambda s: s.delete_checkpoint(stream, name))

    async def list(self, stream: str = "") -> list[Checkpoint]:
        if stream:
            check_stream(stream)
        return await self._broker.with_state(lambda s: s.checkpoints(stream))


def _token(lease: Lease) -> str:
    return f"{lease.root}.{lease.attempt}"


def _grouped(deliveries: Sequence[Delivery]) -> dict[str, list[int]]:
    """token -> sequences, each once."""
    first = deliveries[0].token
    if all(d.token == first for d in deliveries):
        return {first: list(dict.fromkeys([d.record.sequence for d in deliveries]))}
    out: dict[str, dict[int, None]] = {}
    for d in deliveries:
        out.setdefault(d.token, {})[d.record.sequence] = None
    return {token: list(sequences) for token, sequences in out.items()}


__all__ = ["NEW", "LogBroker", "connect"]
