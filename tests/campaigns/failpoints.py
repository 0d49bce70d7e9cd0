"""A file layer that stops or kills its own process at one chosen operation.

A kill at a random instant hardly ever meets the few microseconds that matter; a failpoint always does.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from msgspec import Struct

from mist.log.files import Files

T = TypeVar("T")

KINDS = ("pwritev", "pwrite", "sync", "sync_dir", "rename", "truncate", "allocate", "unlink")


class Failpoint(Struct, frozen=True, kw_only=True):
    """At the `nth` operation of this kind: a signal to oneself `before` it, `after` it, or after `half` of a write."""

    kind: str
    nth: int
    when: str = "after"
    signal: int = signal.SIGKILL


def random_failpoint(rng: random.Random) -> Failpoint:
    """Mostly the operations of every commit; now and then those of a roll or a trim."""
    kind = rng.choices(KINDS, weights=(6, 6, 5, 2, 3, 3, 2, 2))[0]
    common = kind in ("pwritev", "pwrite", "sync")
    halves = ("before", "after", "half") if kind in ("pwritev", "pwrite") else ("before", "after")
    return Failpoint(kind=kind, nth=rng.randint(1, 60 if common else 3), when=rng.choice(halves))


class FailingFiles(Files):
    def __init__(self, failpoint: Failpoint) -> None:
        self._point = failpoint
        self._left = failpoint.nth

    def _now(self, kind: str) -> bool:
        if kind != self._point.kind:
            return False
        self._left -= 1
        return self._left == 0

    def _strike(self) -> None:
        # to this thread: a signal to the process may reach another one first, and this one would run on
        signal.pthread_kill(threading.get_ident(), self._point.signal)

    def _around(self, kind: str, call: Callable[[], T]) -> T:
        now = self._now(kind)
        if now and self._point.when == "before":
            self._strike()
        result = call()
        if now and self._point.when != "before":
            self._strike()
        return result

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        def write() -> int:
            if self._left == 0 and self._point.kind == "pwrite" and self._point.when == "half":
                return super(FailingFiles, self).pwrite(fd, data[: len(data) // 2], offset)
            return super(FailingFiles, self).pwrite(fd, data, offset)

        return self._around("pwrite", write)

    def pwritev(self, fd: int, parts: Sequence[bytes], offset: int) -> int:
        def write() -> int:
            if self._left == 0 and self._point.kind == "pwritev" and self._point.when == "half":
                whole = b"".join(parts)
                return super(FailingFiles, self).pwrite(fd, whole[: len(whole) // 2], offset)
            return super(FailingFiles, self).pwritev(fd, parts, offset)

        return self._around("pwritev", write)

    def sync(self, fd: int) -> None:
        self._around("sync", lambda: super(FailingFiles, self).sync(fd))

    def sync_dir(self, path: str) -> None:
        self._around("sync_dir", lambda: super(FailingFiles, self).sync_dir(path))

    def rename(self, old: str, new: str) -> None:
        self._around("rename", lambda: super(FailingFiles, self).rename(old, new))

    def truncate(self, fd: int, size: int) -> None:
        self._around("truncate", lambda: super(FailingFiles, self).truncate(fd, size))

    def allocate(self, fd: int, size: int) -> None:
        self._around("allocate", lambda: super(FailingFiles, self).allocate(fd, size))

    def unlink(self, path: str) -> None:
        self._around("unlink", lambda: super(FailingFiles, self).unlink(path))
