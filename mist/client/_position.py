"""Where a run over files stands: one small file, locked while the run lives, written in place in two turns.

Promises: what `save` wrote survives a power cut, and a cut in the middle of a save leaves the one before; a second
process is refused (Locked) while the first lives; the kernel frees the lock of a dead one.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from typing import Generic, TypeVar

import msgspec
from msgspec import Struct

from mist.errors import Locked, NotAuthorised, NotFound, StorageFull, TransportError

T = TypeVar("T", bound=Struct)
SLOT = 512


class _Slot(Struct):
    turn: int
    value: msgspec.Raw


class PositionFile(Generic[T]):
    """`value` is what was saved last, None in a new file. For `with`."""

    def __init__(self, path: str, type: type[T]) -> None:
        self.path = path
        self._turn = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                os.close(self._fd)
                raise Locked(f"{path}: another process is at this run", hint="wait for it, or end it") from exc
            found = [slot for at in (0, 1) if (slot := _read(self._fd, at)) is not None]
            latest = max(found, key=lambda slot: slot.turn, default=None)
            self.value: T | None = None
            if latest is not None:
                self._turn = latest.turn
                self.value = msgspec.json.decode(latest.value, type=type)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            os.close(self._fd)
            raise TransportError(f"{path}: not the position of such a run", retryable=False) from exc
        except OSError as exc:
            raise _error(exc, path) from exc

    def save(self, value: T) -> None:
        self._turn += 1
        body = msgspec.json.encode(_Slot(self._turn, msgspec.Raw(msgspec.json.encode(value))))
        data = (b"%08x " % zlib.crc32(body) + body).ljust(SLOT - 1) + b"\n"
        try:
            os.pwrite(self._fd, data, SLOT * (self._turn % 2))
            os.fdatasync(self._fd)
        except OSError as exc:
            raise _error(exc, self.path) from exc
        self.value = value

    def close(self) -> None:
        os.close(self._fd)


def _read(fd: int, at: int) -> _Slot | None:
    data = os.pread(fd, SLOT, SLOT * at).rstrip()
    crc, _, body = data.partition(b" ")
    if not body or crc != b"%08x" % zlib.crc32(body):
        return None
    return msgspec.json.decode(body, type=_Slot)


def _error(exc: OSError, path: str) -> TransportError | NotFound | NotAuthorised | StorageFull:
    why = f"{path}: {exc.strerror or exc}"
    if isinstance(exc, FileNotFoundError):
        return NotFound(why, hint="the folder has to exist")
    if isinstance(exc, PermissionError):
        return NotAuthorised(why)
    if exc.errno in (28, 122):
        return StorageFull(why)
    return TransportError(why)
