"""A file layer in memory that can lose power, and faults for any file layer.

    files = SimFiles("/log/streams")                  # these directories exist and are durable
    files.cut_after(7)                                # the 7th changing operation is the last one: PowerCut
    ...
    after = files.power_cut(Dice(seed))               # what a machine might find when it comes up again
    files.kill()                                      # or: the process dies, the kernel keeps everything

`SimFiles` is a drop-in for mist.log.files.Files. The kernel's view is what every call sees. What is on the disk is kept
apart: a file has durable content and a list of writes and size changes since its last sync, of which after a power cut
any subset may be there, in sectors of 512 bytes; a directory has durable entries and a list of creations, renames and
removals since its last sync, of which any subset may be there (a rename is there as a whole or not at all). File and
directory are independent: a synced file without a synced name is gone. That is more than any file system does to us.

A failed sync of a file drops what it should have written: each sector is on the disk or never will be, and the next
sync succeeds without it, as Linux does. A failed sync of a directory leaves its operations waiting (metadata is
journaled). Locks belong to descriptors, as with flock.

`Faults` fails chosen operations with OSError or makes writes short; both `SimFiles` and `FaultyFiles` (the real file
system) take it. Does not simulate: the clock, mmap, several machines, a device that lies about a sync.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from mist.log.files import Files

SECTOR = 512

CHANGING = frozenset(
    {"create", "pwrite", "pwritev", "sync", "sync_dir", "allocate", "truncate", "rename", "unlink", "mkdir", "rmdir"}
)
_ALLOCATING = frozenset({"create", "pwrite", "pwritev", "allocate", "rename", "mkdir", "sync", "sync_dir"})
_WRITING = frozenset({"pwrite", "pwritev"})
_ALL = CHANGING | {"open", "pread", "size", "listdir", "lock", "identity"}
SHORT = -1
"""Instead of an errno: the write stores only a part."""
AFFECTED: dict[int, frozenset[str]] = {
    errno.EIO: _ALL,
    errno.EINTR: _ALL,
    errno.ENOSPC: _ALLOCATING,
    errno.EROFS: CHANGING,
    SHORT: _WRITING,
}
"""Which operations an error can happen to; faults count only these."""


class PowerCut(BaseException):
    """The machine (or the process) stopped here. Nothing may catch it and go on; every later change raises it again."""


class Faults:
    """Fail the `at`-th operation (from 1) that this error can happen to, once or from then on for ever."""

    def __init__(self, error: int, at: int, *, forever: bool = False) -> None:
        self.error = error
        self.at = at
        self.forever = forever
        self.seen = 0
        self.hits = 0
        self.healed = False
        self.where: list[str] = []

    def heal(self) -> None:
        self.healed = True

    def check(self, kind: str, path: str) -> bool:
        """Raise OSError, or return True when this write is to be short."""
        if self.healed or kind not in AFFECTED[self.error]:
            return False
        self.seen += 1
        if self.seen != self.at and not (self.forever and self.seen > self.at):
            return False
        self.hits += 1
        if len(self.where) < 8:
            self.where.append(f"{kind} {os.path.basename(path)}")
        if self.error == SHORT:
            return True
        raise OSError(self.error, os.strerror(self.error), path)


class Chooser(Protocol):
    """Decides, one by one, what of the unsynced things is on the disk."""

    def coin(self) -> bool: ...


class Dice:
    """Random choices; how much survives is itself random, so that nearly nothing and nearly all come up often."""

    def __init__(self, seed: int | random.Random) -> None:
        self._rng = seed if isinstance(seed, random.Random) else random.Random(seed)
        self._share = self._rng.choice((0.0, 0.1, 0.5, 0.5, 0.5, 0.9, 1.0))

    def coin(self) -> bool:
        return self._rng.random() < self._share


class Script:
    """Given choices; False behind their end. `asked` counts how many there were to make."""

    def __init__(self, choices: Sequence[bool] = ()) -> None:
        self._choices = choices
        self.asked = 0

    def coin(self) -> bool:
        self.asked += 1
        return self._choices[self.asked - 1] if self.asked <= len(self._choices) else False


class _Content:
    """Bytes with a size; what lies behind `data` and below `size` is zeros."""

    __slots__ = ("data", "size")

    def __init__(self, data: bytes | bytearray = b"", size: int = 0) -> None:
        self.data = bytearray(data)
        self.size = size

    def copy(self) -> _Content:
        return _Content(self.data, self.size)

    def read(self, count: int, offset: int) -> bytes:
        end = min(offset + count, self.size)
        if end <= offset:
            return b""
        return bytes(self.data[offset:end]).ljust(end - offset, b"\0")

    def write(self, data: bytes, offset: int) -> None:
        if len(self.data) < offset:
            self.data.extend(bytes(offset - len(self.data)))
        self.data[offset : offset + len(data)] = data
        self.size = max(self.size, offset + len(data))

    def truncate(self, size: int) -> None:
        del self.data[size:]
        self.size = size


class _Change:
    """An unsynced change of a file: a write, or a new size (`grow`: only upwards)."""

    __slots__ = ("data", "grow", "offset")

    def __init__(self, offset: int, data: bytes | None, *, grow: bool = False) -> None:
        self.offset = offset
        self.data = data
        self.grow = grow

    def apply(self, to: _Content, choose: Chooser | None) -> None:
        """All of it, or what `choose` says, a write sector by sector."""
        if self.data is None:
            if (choose is None or choose.coin()) and (not self.grow or self.offset > to.size):
                if self.offset < to.size:
                    to.truncate(self.offset)
                to.size = self.offset
            return
        if choose is None:
            to.write(self.data, self.offset)
            return
        at = 0
        while at < len(self.data):
            stop = min(len(self.data), at + SECTOR - (self.offset + at) % SECTOR)
            if choose.coin():
                to.write(self.data[at:stop], self.offset + at)
            at = stop


class _Node:
    """A file or a directory, as the kernel sees it and as the disk has it."""

    def __init__(self, number: int, *, directory: bool) -> None:
        self.number = number
        self.directory = directory
        self.cache = _Content()
        self.disk = _Content()
        self.changes: list[_Change] = []
        self.entries: dict[str, _Node] = {}
        self.durable: dict[str, _Node] = {}
        self.waiting: list[_Entry] = []
        self.locked_by: int | None = None


class _Entry:
    """One unsynced operation on names: atomic, also over two directories."""

    def __init__(self, *changes: tuple[_Node, str, _Node | None]) -> None:
        self.changes = changes
        for directory in {id(c[0]): c[0] for c in changes}.values():
            directory.waiting.append(self)

    def sync(self) -> None:
        for directory, name, node in self.changes:
            if node is None:
                directory.durable.pop(name, None)
            else:
                directory.durable[name] = node
            if self in directory.waiting:
                directory.waiting.remove(self)


class SimFiles(Files):
    """See the module. `directories` exist from the start, durably."""

    def __init__(self, *directories: str, seed: int = 0) -> None:
        self._mutex = threading.RLock()
        self._free = threading.Condition(self._mutex)
        self._rng = random.Random(seed)
        self._numbers = iter(range(2, 1 << 62))
        self._root = _Node(1, directory=True)
        self._fds: dict[int, tuple[_Node, str, bool]] = {}
        self._next_fd = 1000
        self.faults: Faults | None = None
        self.operations = 0
        """How many changing operations there were."""
        self.trace: list[str] | None = None
        self._cut_at: int | None = None
        self._cut_on: tuple[str, str] | None = None
        self._cut_nth = 0
        self.dead = False
        for path in directories:
            node = self._root
            for part in _parts(path):
                if part not in node.entries:
                    node.entries[part] = node.durable[part] = self._node(directory=True)
                node = node.entries[part]

    # -- what a test does to it ---------------------------------------------------------------------------------------

    def cut_after(self, operations: int) -> None:
        """Stop at this changing operation, counted from now: it is done (a sync is not), then PowerCut is raised."""
        self.operations = 0
        self._cut_at = operations

    def cut_on(self, kind: str, part: str = "", *, nth: int = 1) -> None:
        """Stop at the nth operation of this kind whose path holds this text, in the same way."""
        self._cut_on = (kind, part)
        self._cut_nth = nth

    def never_cut(self) -> None:
        self._cut_at = self._cut_on = None

    def kill(self) -> SimFiles:
        """The processes are gone: descriptors and locks with them; the kernel and all it holds stay."""
        self._fds.clear()
        self._unlock_all(self._root)
        self.dead = False
        self.never_cut()
        self.faults = None
        return self

    def _unlock_all(self, node: _Node) -> None:
        node.locked_by = None
        for child in node.entries.values():
            self._unlock_all(child)

    def power_cut(self, choose: Chooser) -> SimFiles:
        """The file system as it may be found afterwards; this one is left as it is."""
        new = SimFiles(seed=self._rng.randrange(1 << 30))
        new._numbers = self._numbers
        # every choice is made, also about what turns out to be out of reach: so their number does not depend on them
        nodes: dict[int, _Node] = {}
        waiting: dict[int, _Entry] = {}
        look = [self._root]
        while look:
            node = look.pop()
            if id(node) in nodes:
                continue
            nodes[id(node)] = node
            look.extend(child for _, child in sorted({**node.entries, **node.durable}.items()))
            for entry in node.waiting:
                waiting[id(entry)] = entry
                look.extend(target for _, _, target in entry.changes if target is not None)
        decided = {key: choose.coin() for key in waiting}
        made: dict[int, _Node] = {}
        for key, old in nodes.items():
            node = made[key] = _Node(old.number, directory=old.directory)
            node.disk = old.disk.copy()
            for change in old.changes:
                change.apply(node.disk, choose)
            node.cache = node.disk.copy()
        for key, old in nodes.items():
            names = dict(old.durable)
            for entry in old.waiting:
                for directory, name, target in entry.changes if decided[id(entry)] else ():
                    if directory is old and target is None:
                        names.pop(name, None)
                    elif directory is old and target is not None:
                        names[name] = target
            made[key].durable = {name: made[id(target)] for name, target in names.items()}
            made[key].entries = dict(made[key].durable)
        new._root = made[id(self._root)]
        return new

    def unsettled(self) -> int:
        """How many choices a power cut now would have to make."""
        count = Script()
        self.power_cut(count)
        return count.asked

    def crash_states(self, *, most: int, seed: int) -> Iterator[SimFiles]:
        """Every file system a power cut may leave when these are at most `most`, else all, none and random ones."""
        choices = self.unsettled()
        if 1 << choices <= most:
            for bits in range(1 << choices):
                yield self.power_cut(Script([bool(bits >> i & 1) for i in range(choices)]))
            return
        rng = random.Random(seed)
        yield self.power_cut(Script([False] * choices))
        yield self.power_cut(Script([True] * choices))
        for _ in range(most - 2):
            yield self.power_cut(Dice(rng))

    def settle(self) -> None:
        """Everything is on the disk, as after a long quiet time."""
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            for entry in list(node.waiting):
                entry.sync()
            node.disk, node.changes = node.cache.copy(), []
            nodes.extend(node.entries.values())

    def content(self, path: str) -> bytes:
        """A file as the kernel sees it."""
        node = self._find(path)
        return node.cache.read(node.cache.size, 0)

    def put(self, path: str, data: bytes) -> None:
        """Give a file this content, in cache and on disk alike, made when absent: damage done by hand."""
        parent, name = self._parent(path)
        node = parent.entries.get(name)
        if node is None:
            node = parent.entries[name] = parent.durable[name] = self._node(directory=False)
        node.cache = _Content(data, len(data))
        node.disk = _Content(data, len(data))
        node.changes = []

    def flip(self, path: str, bit: int) -> None:
        """Flip one bit of a file, in cache and on disk alike. Twice is as before."""
        node = self._find(path)
        for content in (node.cache, node.disk):
            if len(content.data) <= bit >> 3 < content.size:
                content.write(b"\0", bit >> 3)
            content.data[bit >> 3] ^= 1 << (bit & 7)

    def paths(self) -> list[str]:
        """All files there are."""
        found: list[str] = []

        def go(node: _Node, path: str) -> None:
            for name, child in sorted(node.entries.items()):
                if child.directory:
                    go(child, f"{path}/{name}")
                else:
                    found.append(f"{path}/{name}")

        go(self._root, "")
        return found

    # -- the operations -----------------------------------------------------------------------------------------------

    def _node(self, *, directory: bool) -> _Node:
        return _Node(next(self._numbers), directory=directory)

    def _find(self, path: str) -> _Node:
        node = self._root
        for part in _parts(path):
            if not node.directory:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            if part not in node.entries:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            node = node.entries[part]
        return node

    def _parent(self, path: str) -> tuple[_Node, str]:
        parts = _parts(path)
        return self._find("/".join(parts[:-1])), parts[-1]

    def _fd(self, fd: int) -> tuple[_Node, str, bool]:
        if fd not in self._fds:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._fds[fd]

    def _before(self, kind: str, path: str) -> bool:
        """Whether a write is to be short. Raises OSError for an injected fault, PowerCut when all is over."""
        if kind in CHANGING and self.dead:
            raise PowerCut
        short = self.faults is not None and self.faults.check(kind, path)
        if kind in CHANGING:
            self.operations += 1
            if self.trace is not None:
                self.trace.append(f"{kind} {path}")
            if self._cut_on is not None and kind == self._cut_on[0] and self._cut_on[1] in path:
                self._cut_nth -= 1
                if not self._cut_nth:
                    self._cut_at = self.operations
            if self._cut_at == self.operations and kind in ("sync", "sync_dir"):
                self.dead = True
                raise PowerCut
        return short

    def _after(self) -> None:
        if self._cut_at is not None and self.operations >= self._cut_at:
            self.dead = True
            raise PowerCut

    def open(self, path: str, *, create: bool = False, write: bool = True) -> int:
        with self._mutex:
            parent, name = self._parent(path)
            node = parent.entries.get(name)
            making = node is None and create
            self._before("create" if making else "open", path)
            if node is None:
                if not create:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
                node = parent.entries[name] = self._node(directory=False)
                _Entry((parent, name, node))
            elif node.directory:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            self._next_fd += 1
            self._fds[self._next_fd] = (node, path, write)
            fd = self._next_fd
            if making:
                self._after()
            return fd

    def close(self, fd: int) -> None:
        with self._mutex:
            node = self._fd(fd)[0]
            if node.locked_by == fd:
                node.locked_by = None
                self._free.notify_all()
            del self._fds[fd]

    def size(self, fd: int) -> int:
        with self._mutex:
            node, path, _ = self._fd(fd)
            self._before("size", path)
            return node.cache.size

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        with self._mutex:
            node, path, _ = self._fd(fd)
            self._before("pread", path)
            return node.cache.read(count, offset)

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        data = self.pread(fd, len(buffer), offset)
        buffer[: len(data)] = data
        return len(data)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return self._write("pwrite", fd, bytes(data), offset)

    def pwritev(self, fd: int, parts: Sequence[bytes | bytearray], offset: int) -> int:
        return self._write("pwritev", fd, b"".join(parts), offset)

    def _write(self, kind: str, fd: int, data: bytes, offset: int) -> int:
        with self._mutex:
            node, path, write = self._fd(fd)
            if not write:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF), path)
            if self._before(kind, path):
                data = data[: len(data) // 2]
            if data:
                node.cache.write(data, offset)
                node.changes.append(_Change(offset, data))
            self._after()
            return len(data)

    def sync(self, fd: int) -> None:
        with self._mutex:
            node, path, _ = self._fd(fd)
            try:
                self._before("sync", path)
            except OSError:
                dice = Dice(self._rng)
                for change in node.changes:
                    change.apply(node.disk, dice if change.data is not None else None)
                node.changes = []
                raise
            for change in node.changes:
                change.apply(node.disk, None)
            node.changes = []
            self._after()

    def sync_dir(self, path: str) -> None:
        with self._mutex:
            node = self._find(path)
            self._before("sync_dir", path)
            for entry in list(node.waiting):
                entry.sync()
            self._after()

    def allocate(self, fd: int, size: int) -> None:
        with self._mutex:
            node, path, _ = self._fd(fd)
            self._before("allocate", path)
            if size > node.cache.size:
                node.cache.size = size
                node.changes.append(_Change(size, None, grow=True))
            self._after()

    def truncate(self, fd: int, size: int) -> None:
        with self._mutex:
            node, path, _ = self._fd(fd)
            self._before("truncate", path)
            if size != node.cache.size:
                if size < node.cache.size:
                    node.cache.truncate(size)
                node.cache.size = size
                node.changes.append(_Change(size, None))
            self._after()

    def rename(self, old: str, new: str) -> None:
        with self._mutex:
            source, old_name = self._parent(old)
            if old_name not in source.entries:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), old)
            target, new_name = self._parent(new)
            node = source.entries[old_name]
            there = target.entries.get(new_name)
            if there is not None and there.directory and there.entries:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), new)
            self._before("rename", old)
            del source.entries[old_name]
            target.entries[new_name] = node
            _Entry((source, old_name, None), (target, new_name, node))
            self._after()

    def unlink(self, path: str) -> None:
        with self._mutex:
            parent, name = self._parent(path)
            if name not in parent.entries:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            if parent.entries[name].directory:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            self._before("unlink", path)
            del parent.entries[name]
            _Entry((parent, name, None))
            self._after()

    def mkdir(self, path: str) -> None:
        with self._mutex:
            parent, name = self._parent(path)
            if name in parent.entries:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            self._before("mkdir", path)
            parent.entries[name] = node = self._node(directory=True)
            _Entry((parent, name, node))
            self._after()

    def rmdir(self, path: str) -> None:
        with self._mutex:
            parent, name = self._parent(path)
            if self._find(path).entries:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
            self._before("rmdir", path)
            del parent.entries[name]
            _Entry((parent, name, None))
            self._after()

    def listdir(self, path: str) -> list[str]:
        with self._mutex:
            node = self._find(path)
            self._before("listdir", path)
            return list(node.entries)

    def is_dir(self, path: str) -> bool:
        with self._mutex:
            try:
                return self._find(path).directory
            except (FileNotFoundError, NotADirectoryError):
                return False

    def identity(self, path: str) -> tuple[int, int]:
        with self._mutex:
            node = self._find(path)
            self._before("identity", path)
            return 1, node.number

    def lock(self, fd: int, *, wait: bool) -> bool:
        with self._mutex:
            node, path, _ = self._fd(fd)
            self._before("lock", path)
            while node.locked_by not in (None, fd):
                if not wait:
                    return False
                if not self._free.wait(30):
                    raise AssertionError(f"deadlock: {path} is held by descriptor {node.locked_by}")
            node.locked_by = fd
            return True

    def unlock(self, fd: int) -> None:
        with self._mutex:
            node = self._fd(fd)[0]
            if node.locked_by == fd:
                node.locked_by = None
                self._free.notify_all()


def _parts(path: str) -> list[str]:
    return [p for p in path.split("/") if p]


class FaultyFiles(Files):
    """The real file system, with faults."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults
        self._paths: dict[int, str] = {}
        self._mutex = threading.Lock()

    def _before(self, kind: str, path: str) -> bool:
        with self._mutex:
            return self.faults is not None and self.faults.check(kind, path)

    def open(self, path: str, *, create: bool = False, write: bool = True) -> int:
        self._before("create" if create and not os.path.exists(path) else "open", path)
        fd = super().open(path, create=create, write=write)
        self._paths[fd] = path
        return fd

    def close(self, fd: int) -> None:
        self._paths.pop(fd, None)
        super().close(fd)

    def size(self, fd: int) -> int:
        self._before("size", self._paths.get(fd, ""))
        return super().size(fd)

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        self._before("pread", self._paths.get(fd, ""))
        return super().pread(fd, count, offset)

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        self._before("pread", self._paths.get(fd, ""))
        return super().pread_into(fd, buffer, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if self._before("pwrite", self._paths.get(fd, "")):
            data = data[: len(data) // 2]
        return super().pwrite(fd, data, offset) if data else 0

    def pwritev(self, fd: int, parts: Sequence[bytes | bytearray], offset: int) -> int:
        if self._before("pwritev", self._paths.get(fd, "")):
            whole = b"".join(parts)
            return super().pwrite(fd, whole[: len(whole) // 2], offset)
        return super().pwritev(fd, parts, offset)

    def sync(self, fd: int) -> None:
        self._before("sync", self._paths.get(fd, ""))
        super().sync(fd)

    def sync_dir(self, path: str) -> None:
        self._before("sync_dir", path)
        super().sync_dir(path)

    def allocate(self, fd: int, size: int) -> None:
        self._before("allocate", self._paths.get(fd, ""))
        super().allocate(fd, size)

    def truncate(self, fd: int, size: int) -> None:
        self._before("truncate", self._paths.get(fd, ""))
        super().truncate(fd, size)

    def rename(self, old: str, new: str) -> None:
        self._before("rename", old)
        super().rename(old, new)

    def unlink(self, path: str) -> None:
        self._before("unlink", path)
        super().unlink(path)

    def mkdir(self, path: str) -> None:
        self._before("mkdir", path)
        super().mkdir(path)

    def rmdir(self, path: str) -> None:
        self._before("rmdir", path)
        super().rmdir(path)

    def listdir(self, path: str) -> list[str]:
        self._before("listdir", path)
        return super().listdir(path)

    def identity(self, path: str) -> tuple[int, int]:
        self._before("identity", path)
        return super().identity(path)

    def lock(self, fd: int, *, wait: bool) -> bool:
        self._before("lock", self._paths.get(fd, ""))
        return super().lock(fd, wait=wait)
