"""C31, the bug bank: the log broken on purpose, one way at a time. Every bug must be caught by a campaign or a scenario.

A bug that nothing catches says that a check is missing. Each bug is a context manager that breaks the code while it is
open, and the checks that may catch it.
"""

# ruff: noqa: PT008 - a lambda shows what the broken method takes
from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NamedTuple
from unittest import mock

import mist.log.committer
import mist.log.journal
import mist.log.reader
import mist.log.segments
from mist.broker.base import Checkpoint, ConsumerConfig, Message, StreamConfig
from mist.broker.notify import Notifier
from mist.errors import CheckpointRegression, DataLoss, MistError, Unavailable
from mist.log.files import REAL, Files
from mist.log.format import Tail
from mist.log.journal import Journal
from mist.log.reader import Reader
from mist.log.segments import Segments
from mist.log.state import Lease, State
from mist.log.window import Window
from mist.testing.simfiles import Script, SimFiles

from . import faults
from .simbox import PATH, STREAMS, Box

Check = Callable[[int], Any]
Report = Callable[[str], None]


class Bug(NamedTuple):
    what: str
    breaks: Callable[[], AbstractContextManager[Any]]
    caught_by: Sequence[Check]


# -- scenarios: what no campaign meets by chance ----------------------------------------------------------------------


def stale_block(seed: int) -> None:
    """A block with a good checksum and the right sequences that is not the one written here is noticed."""
    files = SimFiles(STREAMS)
    Box.create(files, StreamConfig())
    box = Box(files, 1)
    for i in range(3):
        box.append([Message("a.b", b"x" * 100, f"id-{i}")])
    other = files.power_cut(Script())
    old = Box(other, 2)
    old.append([Message("a.b", b"x" * 102, "stale")])
    start, end = box.journal.tail.end, old.journal.tail.end
    box.append([Message("a.b", b"y" * 102, "fresh")])
    box.append([Message("a.b", b"z" * 102, "after")])
    path = f"{PATH}/{1:020d}.seg"
    data = bytearray(files.content(path))
    data[start:end] = other.content(path)[start:end]
    files.put(path, bytes(data))
    box = Box(files, 1)
    assert box.journal.verify().damage, "verify did not notice"
    for limit in (1, 1000):
        try:
            box.all(limit=limit)
        except DataLoss:
            continue
        raise AssertionError("a read did not notice")


def leases(seed: int) -> None:
    """Attempts survive a restart, the floor stays below what is not settled, a stale token settles nothing."""
    with tempfile.TemporaryDirectory() as folder:
        config = ConsumerConfig(ack_wait_s=0.001, attempts_max=3)
        state = State(REAL, folder, b"1" * 16)
        row = state.consumer("s", "i", "c", config, create=True)
        (first,) = state.take(row.id, config, limit=5, first=1, last=5)[0]
        state.settle(row.id, {_token(first): [2, 3]})
        floor = state.figures(row.id, 1)[0]
        assert floor == 0, f"the floor is {floor}, record 1 is not settled"
        state.close()
        state = State(REAL, folder, b"2" * 16)  # another boot: due at once
        (again,) = state.take(row.id, config, limit=5, first=1, last=5)[0]
        assert (again.attempt, again.open()) == (2, [1, 4, 5]), f"attempt {again.attempt} of {again.open()}"
        assert state.settle(row.id, {_token(first): [1]}) == 0, "a stale token settled"
        state.settle(row.id, {_token(again): [1, 4, 5]})
        assert state.figures(row.id, 1)[:3] == (5, 5, 0)
        saved = Checkpoint(stream="s", name="p", incarnation="i", sequence=9)
        state.save(saved, force=False)
        try:
            state.save(Checkpoint(stream="s", name="p", incarnation="i", sequence=8), force=False)
        except CheckpointRegression:
            pass
        else:
            raise AssertionError("a checkpoint went back")
        state.close()


def _token(lease: Lease) -> str:
    return f"{lease.root}.{lease.attempt}"


def wake_up(seed: int) -> None:
    """What happens between looking and waiting is not slept through."""

    async def run() -> bool:
        notifier = Notifier()
        generation = notifier.generation
        notifier.notify()
        return await notifier.wait(generation, 0.05)

    assert asyncio.run(run()), "a wake-up was lost"


def window_expiry(seed: int) -> None:
    """An id counts as known for the window and not longer."""
    window = Window(ids_max=10, window_s=1.0)
    assert not window.known(["a"])
    window.stored(1, 0, ["a"])
    window.expire(500_000_000)
    assert window.known(["a"])
    assert window.find("a") == 1
    window.expire(2_000_000_000)
    assert not window.known(["a"]), "an id never expires"


# -- the bugs ---------------------------------------------------------------------------------------------------------


class _Through(Files):
    """Passes everything on to another file layer; a bug overrides one method."""

    def __init__(self, real: Files) -> None:
        self._real = real
        for name in (n for n in dir(Files) if not n.startswith("_") and n not in type(self).__dict__):
            setattr(self, name, getattr(real, name))


@contextmanager
def _commit_on(layer: type[_Through], after: Callable[[Any], None] = lambda layer: None) -> Iterator[None]:
    """Commits go through a broken file layer."""
    real = Journal.commit

    def commit(self: Journal, columns: Any) -> int:
        kept = self.files
        self.files = broken = layer(kept)
        try:
            return real(self, columns)
        finally:
            self.files = kept
            after(broken)

    with mock.patch.object(Journal, "commit", commit):
        yield


class _NoSync(_Through):
    def sync(self, fd: int) -> None:
        pass


class _SyncAgain(_Through):
    def sync(self, fd: int) -> None:
        try:
            self._real.sync(fd)
        except OSError:
            self._real.sync(fd)


class _SyncLater(_Through):
    def __init__(self, real: Files) -> None:
        super().__init__(real)
        self.later: list[int] = []

    def sync(self, fd: int) -> None:
        self.later.append(fd)


def _sync_later(layer: Any) -> None:
    for fd in layer.later:
        with suppress(OSError):  # closed by now
            layer._real.sync(fd)


def _no_sync_dir(path: str | None) -> AbstractContextManager[Any]:
    real = SimFiles.sync_dir

    def sync_dir(self: SimFiles, which: str) -> None:
        if path is not None and which != path:
            real(self, which)

    return mock.patch.object(SimFiles, "sync_dir", sync_dir)


def _not_dirty_before_a_roll() -> AbstractContextManager[Any]:
    real = Journal._set_dirty

    def set_dirty(self: Journal, generations: int = 1, *, poisoned: int = 0) -> None:
        if generations != 2:
            real(self, generations, poisoned=poisoned)

    return mock.patch.object(Journal, "_set_dirty", set_dirty)


def _cut_at_damage() -> AbstractContextManager[Any]:
    real = Segments.walk

    def walk(self: Segments, base: int, **kw: Any) -> Iterator[Any]:
        for item in real(self, base, **kw):
            if isinstance(item, mist.log.segments.Gap) and kw["mark"] == 1 << 62:
                return
            yield item

    return mock.patch.object(Segments, "walk", walk)


def _past_the_mark() -> AbstractContextManager[Any]:
    real = Reader.tail

    def tail(self: Reader) -> Tail:
        found = real(self)
        block = self._segments.block(found.segment, found.end)
        if block is None or block.header.base != found.durable + 1:
            return found
        from msgspec.structs import replace

        return replace(found, durable=block.header.last, end=found.end + block.header.size)

    return mock.patch.object(Reader, "tail", tail)


@contextmanager
def _no_chain() -> Iterator[None]:
    real_walk, real_page = Segments.walk, mist.log.reader.block_header

    def walk(self: Segments, base: int, **kw: Any) -> Iterator[Any]:
        return real_walk(self, base, **kw)

    def any_chain(data: bytes, at: int = 0) -> Any:
        header = real_page(data, at)
        return header and header._replace(chain=_Same(header.chain))

    with (
        mock.patch.object(mist.log.segments, "block_header", any_chain),
        mock.patch.object(mist.log.reader, "block_header", any_chain),
        mock.patch.object(Segments, "walk", walk),
    ):
        yield


class _Same(int):
    """A checksum that fits every other."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def _never_cleared() -> AbstractContextManager[Any]:
    real = Window.clear

    def clear(self: Window) -> None:
        if not hasattr(self, "_set"):
            real(self)

    return mock.patch.object(Window, "clear", clear)


def _nothing_known() -> AbstractContextManager[Any]:
    return mock.patch.object(Window, "known", lambda self, ids: False)


@contextmanager
def _sleeps_through() -> Iterator[None]:
    async def wait(self: Notifier, generation: int, timeout_s: float | None) -> bool:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._waiters.add(waiter)
        try:
            await asyncio.wait_for(waiter, timeout_s)
        except TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)
        return True

    with mock.patch.object(Notifier, "wait", wait):
        yield


def _attempts_forgotten() -> AbstractContextManager[Any]:
    def again(db: Any, lease: Lease, attempt: int, until: int) -> Lease:
        db.execute("update lease set deadline=? where id=?", (until, lease.id))
        return lease._replace(deadline=until)

    return mock.patch.object(State, "_again", staticmethod(again))


def _floor_ahead() -> AbstractContextManager[Any]:
    real = State.figures

    def figures(self: State, consumer: int, first: int) -> tuple[int, int, int, int]:
        _, delivered, pending, redelivered = real(self, consumer, first)
        return delivered, delivered, pending, redelivered

    return mock.patch.object(State, "figures", figures)


def _any_checksum() -> AbstractContextManager[Any]:
    def block_ok(block: bytes, header: Any, seed: int) -> bool:
        return len(block) >= header.size

    stack = mock.patch.object(mist.log.segments, "block_ok", block_ok)
    reader = mock.patch.object(mist.log.reader, "block_ok", block_ok)

    @contextmanager
    def both() -> Iterator[None]:
        with stack, reader:
            yield

    return both()


def _no_trim_mark() -> AbstractContextManager[Any]:
    return mock.patch.object(Journal, "_write_trim", lambda self, first: None)


def _mark_forgotten() -> AbstractContextManager[Any]:
    """The page of a former boot is not looked at."""
    real = mist.log.journal.decode_tail

    def decode(data: bytes) -> Tail | None:
        tail = real(data)
        return tail if tail is None or tail.boot == _NOW[0] else None

    @contextmanager
    def patched() -> Iterator[None]:
        init = Journal.__init__

        def remember(self: Journal, files: Files, clock: Any, path: str, boot: bytes) -> None:
            _NOW[0] = boot
            init(self, files, clock, path, boot)

        with (
            mock.patch.object(mist.log.journal, "decode_tail", decode),
            mock.patch.object(Journal, "__init__", remember),
        ):
            yield

    return patched()


_NOW = [b""]


def _index_believed() -> AbstractContextManager[Any]:
    def start_for(self: Segments, base: int, sequence: int, *, time_ns: int | None = None) -> int:
        target = sequence if time_ns is None else time_ns - 1
        entries = [e for e in self.index(base, fresh=True) if e[1 if time_ns is not None else 0] <= target]
        return entries[-1][2] if entries else 4096

    return mock.patch.object(Segments, "start_for", start_for)


def _short_writes_believed() -> AbstractContextManager[Any]:
    def write_all(files: Files, fd: int, parts: Sequence[bytes], offset: int) -> int:
        files.pwritev(fd, parts, offset)
        return offset + sum(map(len, parts))

    return mock.patch.object(mist.log.journal, "write_all", write_all)


def _certain_when_unknown() -> AbstractContextManager[Any]:
    def unknown(message: str, **_: Any) -> MistError:
        return Unavailable(message)

    return mock.patch.object(mist.log.journal, "Ambiguous", unknown)


def _adopted_as_it_is() -> AbstractContextManager[Any]:
    """What another handle wrote, perhaps with a failed sync, is synced but not written again; and no handle remembers."""

    @contextmanager
    def patched() -> Iterator[None]:
        with (
            mock.patch.object(Journal, "_rewrite", lambda self, fd, block: None),
            mock.patch.object(Journal, "_failed", property(lambda self: set(), lambda self, value: None), create=True),
        ):
            yield

    return patched()


def _expiry_off() -> AbstractContextManager[Any]:
    return mock.patch.object(Window, "expire", lambda self, now_ns: None)


def _stale_tokens() -> AbstractContextManager[Any]:
    real = State._pick

    def pick(self: State, db: Any, consumer: int, root: int, attempt: int, sequences: Sequence[int]) -> list[int]:
        out: list[int] = []
        for any_attempt in range(10):
            out += real(self, db, consumer, root, any_attempt, sequences)
        return out

    return mock.patch.object(State, "_pick", pick)


def _backwards() -> AbstractContextManager[Any]:
    return mock.patch("mist.log.state.check_advance", lambda stored, new: None)


def _campaign(function: Callable[..., Any], cases: int) -> Check:
    def check(seed: int) -> None:
        function(60.0, seed, lambda text: None, cases=cases)

    return check


POWER = _campaign(faults.c02, 3000)
TORN = _campaign(faults.c03, 60)
ROT = _campaign(faults.c04, 300)
FAILING = _campaign(faults.c05, 1500)

BUGS: tuple[Bug, ...] = (
    Bug("acknowledged before the fsync", lambda: _commit_on(_NoSync), [POWER]),
    Bug("published before the fsync", lambda: _commit_on(_SyncLater, _sync_later), [POWER]),
    Bug("a failed fsync is tried again", lambda: _commit_on(_SyncAgain), [POWER, FAILING]),
    Bug("adopted on the word of another sync", _adopted_as_it_is, [FAILING]),
    Bug("no directory fsync when a stream is made", lambda: _no_sync_dir(STREAMS), [POWER]),
    Bug("no directory fsync at a roll", lambda: _no_sync_dir(PATH), [POWER]),
    Bug("no directory fsync at all", lambda: _no_sync_dir(None), [POWER]),
    Bug("not dirty before a roll", _not_dirty_before_a_roll, [POWER]),
    Bug("cut at damage in the middle", _cut_at_damage, [ROT]),
    Bug("readers pass the durable mark", _past_the_mark, [POWER]),
    Bug("the chain is not checked", _no_chain, [stale_block]),
    Bug("checksums are not checked", _any_checksum, [ROT]),
    Bug("ids of a failed append count as stored", _never_cleared, [FAILING]),
    Bug("duplicates are not looked for", _nothing_known, [POWER]),
    Bug("ids never expire", _expiry_off, [window_expiry]),
    Bug("a wake-up between looking and waiting is lost", _sleeps_through, [wake_up]),
    Bug("attempts are not persisted", _attempts_forgotten, [leases]),
    Bug("the floor passes what is not settled", _floor_ahead, [leases]),
    Bug("stale tokens settle", _stale_tokens, [leases]),
    Bug("checkpoints go back", _backwards, [leases]),
    Bug("trims are not marked durably", _no_trim_mark, [POWER]),
    Bug("published sequences are given again", _mark_forgotten, [TORN]),
    Bug("index entries are believed", _index_believed, [ROT]),
    Bug("short writes are taken for whole ones", _short_writes_believed, [FAILING]),
    Bug("refused for certain when the fate is unknown", _certain_when_unknown, [FAILING]),
)


def c31(budget_s: float, seed: int, report: Report, *, cases: int | None = None) -> dict[str, Any]:
    """Break the log in every known way; each must be caught. The checks themselves must pass on the log as it is."""
    caught: dict[str, str] = {}
    bugs = BUGS if cases is None else BUGS[:cases]
    for scenario in (stale_block, leases, wake_up, window_expiry):
        scenario(seed)
    for bug in bugs:
        for check in bug.caught_by:
            for attempt in range(3):
                try:
                    with bug.breaks():
                        check(seed + attempt)
                except (AssertionError, MistError, OSError, ValueError) as exc:
                    caught[bug.what] = str(exc).splitlines()[0][:160] if str(exc) else type(exc).__name__
                    break
            if bug.what in caught:
                break
        report(f"C31: {bug.what}: {caught.get(bug.what, 'NOT CAUGHT')}")
    missed = [b.what for b in bugs if b.what not in caught]
    assert not missed, f"seed {seed}: nothing catches: {missed}"
    return {"bugs": len(bugs), "caught": len(caught), "of": len(BUGS)}


__all__ = ["BUGS", "c31"]
