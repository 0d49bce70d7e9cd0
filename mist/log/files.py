"""The one small layer under segments, marks and indexes. Tests replace it to tear, drop and fail operations.

Every method is one system call or a fixed short sequence of them, takes and returns plain values, and raises OSError.
Nothing here retries, buffers or translates.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Sequence

PAGE = 4096


class Files:
    """The real file system (Linux; macOS with F_FULLFSYNC)."""

    def open(self, path: str, *, create: bool = False, write: bool = True) -> int:
        """A descriptor; with `create` the file is made when absent, mode 0600."""
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        return os.open(path, flags, 0o600)

    def close(self, fd: int) -> None:
        os.close(fd)

    def size(self, fd: int) -> int:
        return os.fstat(fd).st_size

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        """Up to `count` bytes; fewer only at the end of the file."""
        data = os.pread(fd, count, offset)
        if len(data) == count or not data:
            return data
        parts = [data]
        got = len(data)
        while got < count and (more := os.pread(fd, count - got, offset + got)):
            parts.append(more)
            got += len(more)
        return b"".join(parts)

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Fill the buffer; how many bytes there were, fewer only at the end of the file."""
        got = 0
        while got < len(buffer) and (more := os.preadv(fd, [buffer[got:]], offset + got)):
            got += more
        return got

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """One write call; may be short."""
        return os.pwrite(fd, data, offset)

    def pwritev(self, fd: int, parts: Sequence[bytes | bytearray], offset: int) -> int:
        """One gathering write call; may be short."""
        return os.pwritev(fd, parts, offset)

    def sync(self, fd: int) -> None:
        """Data and the metadata needed to read it are on the device (fdatasync; F_FULLFSYNC on macOS)."""
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fdatasync(fd)

    def sync_dir(self, path: str) -> None:
        """Creations, renames and removals in this directory are on the device."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def allocate(self, fd: int, size: int) -> None:
        """Reserve `size` bytes from the start, reading as zeros where nothing was written."""
        if sys.platform == "darwin":
            os.ftruncate(fd, max(size, os.fstat(fd).st_size))
        else:
            os.posix_fallocate(fd, 0, size)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        os.mkdir(path, 0o700)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def listdir(self, path: str) -> list[str]:
        return os.listdir(path)

    def is_dir(self, path: str) -> bool:
        return os.path.isdir(path)

    def identity(self, path: str) -> tuple[int, int]:
        """Device and inode of a directory: a copied one differs."""
        st = os.stat(path)
        return st.st_dev, st.st_ino

    def lock(self, fd: int, *, wait: bool) -> bool:
        """Take the exclusive lock of this descriptor's file; False when it is held and `wait` is off."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def unlock(self, fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)


REAL = Files()


def write_all(files: Files, fd: int, parts: Sequence[bytes | bytearray], offset: int) -> int:
    """Write all parts one behind the other and return the end offset, going on after short writes.

    Raises OSError; how much was written then is unknown to the caller, who must cut back.
    """
    total = sum(map(len, parts))
    done = files.pwritev(fd, parts, offset)
    if done == total:
        return offset + total
    rest = b"".join(parts)
    while done < total:
        wrote = files.pwrite(fd, rest[done:], offset + done)
        if wrote <= 0:
            raise OSError(28, "short write: no space left on device")
        done += wrote
    return offset + total


def boot_id() -> bytes:
    """16 bytes that differ after every boot of the machine."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return bytes.fromhex(f.read().strip().replace("-", ""))
    except OSError:
        import subprocess

        out = subprocess.run(["sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True, check=True)
        return bytes.fromhex(out.stdout.strip().replace("-", ""))
