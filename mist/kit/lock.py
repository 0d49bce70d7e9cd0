"""A file that one process at a time holds, and that says who.

    with FileLock("data/worker.lock") as lock: ...      # raises Locked, naming the holder

Promises: the lock is the kernel's (flock): it is held exactly as long as its descriptor lives, also in a child that inherited
it, and a killed holder leaves nothing stale. The file is never removed, because a lock on a removed file keeps nobody out; one that
somebody else removed is noticed, and its successor is locked. Who holds it (pid, host, since) stands in the file and is
believed only while it is held. Waiting is bounded. Only "somebody holds it" is Locked; every other failure is Refused with
its reason. For local file systems.

Not filelock: its native lock (4.3) does not say who holds it, hands its descriptor to nobody, and where flock is missing it
falls back to marker files that a killed holder leaves behind.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from msgspec import Struct

from mist.errors import Internal, Locked, Refused

PEEK_S = 0.2
"""Who looks whether a file is held (`is_held`) holds it for a moment: `acquire` outwaits that."""
_POLL_S = 0.02


class Owner(Struct, frozen=True):
    """Who holds a lock. `since_ns` is Unix time."""

    pid: int
    host: str
    since_ns: int


class FileLock:
    """Not reentrant; two of them exclude each other also in one process. Folders are made where they are missing."""

    def __init__(
        self,
        path: Path | str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.path = Path(path)
        self._clock = clock
        self._wall_ns = wall_ns
        self._sleep = sleep
        self._descriptor = -1

    @property
    def held(self) -> bool:
        return self._descriptor >= 0

    def fileno(self) -> int:
        """The descriptor that is the lock, for a child to inherit: it is then held as long as either lives."""
        if self._descriptor < 0:
            raise Internal(f"{self.path} is not held")
        return self._descriptor

    def try_acquire(self) -> bool:
        """False when somebody holds it. Raises Refused when it cannot be locked at all."""
        if self.held:
            raise Internal(f"{self.path} is held already, by this very object")
        try:
            descriptor = self._locked()
        except OSError as exc:
            raise Refused(f"{self.path}: {exc.strerror or exc}", hint="is the folder writable, and local?") from exc
        if descriptor < 0:
            return False
        self._descriptor = descriptor
        self.note(msgspec.json.encode(Owner(os.getpid(), socket.gethostname(), self._wall_ns())))
        return True

    def acquire(self, wait_s: float = 0.0) -> None:
        """Wait for it at most this long, or `PEEK_S`. Raises Locked with the holder's pid, host and age."""
        for pause in self._tries(wait_s):
            self._sleep(pause)

    async def acquire_async(self, wait_s: float = 0.0) -> None:
        """The same without blocking the event loop."""
        for pause in self._tries(wait_s):
            await asyncio.sleep(pause)

    def release(self) -> None:
        """Idempotent. A child that inherited the descriptor goes on holding it."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def note(self, data: bytes) -> None:
        """Say something else in the file than who holds it."""
        descriptor = self.fileno()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()

    def _tries(self, wait_s: float) -> Iterator[float]:
        until = self._clock() + max(wait_s, PEEK_S)
        while not self.try_acquire():
            left = until - self._clock()
            if left <= 0:
                raise self._refused(wait_s)
            yield min(_POLL_S, left)

    def _locked(self) -> int:
        """A descriptor that holds the lock of the file that lies there now; -1 when somebody has it."""
        while True:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same(descriptor, self.path):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return -1
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # removed while we waited for it: nobody else would meet us there

    def _refused(self, wait_s: float) -> Locked:
        waited = f" for more than {wait_s:g} s" if wait_s else ""
        found = owner(self.path)
        if found is None:
            return Locked(f"{self.path} is held{waited}", hint=f"`fuser {self.path}` names the process")
        age = max(0, self._wall_ns() - found.since_ns) // 1_000_000_000
        return Locked(
            f"{self.path} is held{waited} by process {found.pid} on {found.host}, since {age} s",
            hint="wait for it, or stop that process",
            meta={"pid": str(found.pid), "host": found.host, "since_ns": str(found.since_ns)},
        )


def is_held(path: Path | str) -> bool:
    """Whether somebody holds it now. Raises Refused when the file cannot be read."""
    try:
        with Path(path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise Refused(f"{path}: {exc.strerror or exc}") from exc
    return False


def owner(path: Path | str) -> Owner | None:
    """Who holds it; None when nobody does or the file says something else."""
    if not is_held(path):
        return None
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Owner)
    except (OSError, msgspec.DecodeError):
        return None


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
