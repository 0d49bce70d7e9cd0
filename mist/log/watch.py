"""Tell a Notifier when a file is written by anybody: inotify on Linux, short polling elsewhere.

One watcher per stream handle, started at the first wait. Only the tail page is watched: an event on a segment comes
before its sync. Polling grows from 0.2 to 10 ms while nothing happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
from collections.abc import Callable

_IN_MODIFY = 0x2
_IN_NONBLOCK = 0o4000
_IN_CLOEXEC = 0o2000000


class Watch:
    """Calls `changed()` on the running loop after the file at `path` was written. Close it on the same loop."""

    def __init__(self, path: str, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._fd = -1
        self._task: asyncio.Task[None] | None = None
        if sys.platform == "linux":
            self._fd = _inotify(path)
            self._loop.add_reader(self._fd, self._readable)
        else:
            self._task = self._loop.create_task(self._poll())

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 4096)
        self._changed()

    async def _poll(self) -> None:
        last, pause = 0, 0.0002
        while True:
            now = os.stat(self._path).st_mtime_ns
            if now != last:
                last, pause = now, 0.0002
                self._changed()
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 0.01)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        if self._task is not None:
            self._task.cancel()
            self._task = None


def _inotify(path: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    if libc.inotify_add_watch(fd, os.fsencode(path), _IN_MODIFY) < 0:
        number = ctypes.get_errno()
        os.close(fd)
        raise OSError(number, os.strerror(number), path)
    return int(fd)
