"""A block device with a volatile write cache, whose power can be cut: what was not flushed is gone.

`CutDisk(folder)` makes an ext4 image, serves it as the one file of a FUSE file system (this module speaks the protocol
itself, over /dev/fuse), puts a loop device on that file and mounts it. So every write and every flush that the file
system sends to its device passes through our hands, in order:

- a write goes to the image as it is *now*, and into the cache;
- a flush moves the cache to the image that is *stable*;
- `cut(path)` between two requests leaves the stable image at `path`: nothing unflushed is in it, or, with `share`, each
  unflushed block of 4 KiB with that chance (a device may have written any of them). From then on every request fails with EIO.

What this is sound for: an append that was acknowledged before the cut and is not in the image was acknowledged too early,
because the file system never got a completed flush for it. What it leaves out: devices that lie about flushes, and torn
blocks below 4 KiB. The kernel itself goes on living, but nothing of its page cache reaches the image any more.

Needs root, loop devices, /dev/fuse, mkfs.ext4; `missing()` says what is not there. Mounts live in a mount namespace of
the calling process (`private_mounts`), so that none is left when it dies.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import select
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 4096
CACHE_BYTES_MAX = 64 * 1024 * 1024
"""A device writes its cache back by itself when it is full."""
_NEW_NAMESPACE = 0x0002_0000
_PRIVATE_RECURSIVE = (1 << 18) | (1 << 14)
_NO_DEV_SUID = 2 | 4


def missing() -> str:
    """Why it cannot work here, or ''."""
    if not sys.platform.startswith("linux"):
        return "this needs Linux"
    if os.geteuid() != 0:
        return "this needs root (it mounts a file system)"
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.path.exists(device):
            return f"there is no {device}"
    for tool in ("mkfs.ext4", "mount", "umount", "losetup"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as exc:
        return f"/dev/fuse: {exc.strerror}"
    return ""


def private_mounts() -> None:
    """From now on what this process mounts is seen by it and its children only, and goes with them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NAMESPACE) or libc.mount(b"none", b"/", None, _PRIVATE_RECURSIVE, None):
        raise OSError(ctypes.get_errno(), "cannot get a mount namespace of our own")


def tool(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")


class CutDisk:
    """`path` is the mounted file system. The device is a process of its own: it must never wait for what waits for it."""

    def __init__(self, folder: Path, *, size_bytes: int = 2 << 30) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "disk"
        self._fuse = folder / "device"
        self.path.mkdir()
        self._fuse.mkdir()
        now = folder / "now.img"
        self._stable = folder / "stable.img"
        self._mounts = [self.path, self._fuse]
        with now.open("wb") as f:
            f.truncate(size_bytes)
        tool("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", str(now))
        tool("cp", "--sparse=always", str(now), str(self._stable))
        fd = os.open("/dev/fuse", os.O_RDWR)
        try:
            options = f"fd={fd},rootmode={stat.S_IFDIR:o},user_id=0,group_id=0,allow_other".encode()
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.mount(b"mist-cutdisk", os.fsencode(self._fuse), b"fuse", _NO_DEV_SUID, options):
                raise OSError(ctypes.get_errno(), "cannot mount FUSE")
            self._device = subprocess.Popen(
                [sys.executable, "-m", "tests.campaigns.cutdisk", str(fd), str(now), str(self._stable)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd], cwd=ROOT,
            )  # fmt: skip
        finally:
            os.close(fd)
        try:
            tool("mount", "-o", "loop,noatime", str(self._fuse / "disk.img"), str(self.path))
        except BaseException:
            self.close()
            raise

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._device.stdin is not None
        assert self._device.stdout is not None
        self._device.stdin.write(json.dumps(request).encode() + b"\n")
        self._device.stdin.flush()
        answer: dict[str, Any] = json.loads(self._device.stdout.readline())
        return answer

    def cut(self, *, share: float = 0.0, seed: int = 0) -> dict[str, Any]:
        """Cut the power, now. Says how many writes, flushes and unflushed bytes there were."""
        return self._ask({"cut": share, "seed": seed})

    def remount(self, where: Path) -> None:
        """After the cut, and after everything that used it has been killed: mount what is left elsewhere."""
        self._unmount()
        where.mkdir()
        tool("mount", "-o", "loop,noatime", str(self._stable), str(where))
        self._mounts.append(where)

    def _unmount(self) -> None:
        while self._mounts:
            # lazily: a process that was just killed may still be letting go
            subprocess.run(["umount", "-l", str(self._mounts.pop(0))], capture_output=True, timeout=60, check=False)

    def close(self) -> None:
        self._device.kill()
        self._device.wait()
        for pipe in (self._device.stdin, self._device.stdout):
            assert pipe is not None
            pipe.close()
        self._unmount()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


# -- the device: one file over FUSE -----------------------------------------------------------------------------------

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_FILE = 2
_KEEP_CACHE_AND_BIG = (1 << 0) | (1 << 5) | (1 << 22)  # async read, big writes, more than 32 pages
_WRITE_BYTES_MAX = 1 << 20


class Device:
    """Answers the kernel's requests, one after the other. A cut is between two of them."""

    def __init__(self, fd: int, now: str, stable: str) -> None:
        self._fd = fd
        self._now = os.open(now, os.O_RDWR)
        self._stable = os.open(stable, os.O_RDWR)
        self._size = os.fstat(self._now).st_size
        self._cache: list[tuple[int, bytes]] = []
        self._cached = 0
        self._dead = False
        self._writes = self._flushes = 0
        self._answers: dict[int, Callable[[int, bytes], bytes | int | None]] = {
            1: lambda node, body: self._lookup(body),
            2: lambda node, body: None,  # forget
            3: lambda node, body: struct.pack("<QII", 3600, 0, 0) + self._attr(node),
            4: lambda node, body: struct.pack("<QII", 3600, 0, 0) + self._attr(node),
            14: lambda node, body: struct.pack("<QII", 1, 0, 0),  # open
            15: lambda node, body: self.read(body),
            16: lambda node, body: self.write(body),
            17: lambda node, body: struct.pack("<QQQQQIIII24x", 1 << 20, 0, 0, 2, 0, BLOCK, 255, BLOCK, 0),
            18: lambda node, body: b"",  # release
            20: lambda node, body: self.flush(),
            25: lambda node, body: b"",  # close
            26: self._init,
            27: lambda node, body: struct.pack("<QII", 1, 0, 0),  # opendir
            28: lambda node, body: b"",  # an empty directory: nobody lists it
            29: lambda node, body: b"",
            36: lambda node, body: None,  # interrupt: every answer is immediate
            38: lambda node, body: b"",
            42: lambda node, body: None,
        }  # fmt: skip

    def _init(self, node: int, body: bytes) -> bytes:
        _, minor, readahead, flags = struct.unpack_from("<IIII", body)
        return struct.pack(
            "<IIIIHHIIHH32x", 7, min(minor, 31), readahead, flags & _KEEP_CACHE_AND_BIG, 64, 48, _WRITE_BYTES_MAX, 1,
            _WRITE_BYTES_MAX // 4096, 0,
        )  # fmt: skip

    def _attr(self, node: int) -> bytes:
        mode, size = (stat.S_IFREG | 0o600, self._size) if node == _FILE else (stat.S_IFDIR | 0o700, 0)
        return _ATTR.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, BLOCK, 0)

    def _lookup(self, body: bytes) -> bytes | int:
        if body.rstrip(b"\0") != b"disk.img":
            return errno.ENOENT
        return struct.pack("<QQQQII", _FILE, 0, 3600, 3600, 0, 0) + self._attr(_FILE)

    def read(self, body: bytes) -> bytes | int:
        _, offset, size = struct.unpack_from("<QQI", body)
        return errno.EIO if self._dead else os.pread(self._now, size, offset)

    def write(self, body: bytes) -> bytes | int:
        _, offset, size = struct.unpack_from("<QQI", body)
        if self._dead:
            return errno.EIO
        data = body[40 : 40 + size]
        os.pwrite(self._now, data, offset)
        self._cache.append((offset, data))
        self._cached += size
        self._writes += 1
        while self._cached > CACHE_BYTES_MAX:
            offset, data = self._cache.pop(0)
            self._cached -= len(data)
            os.pwrite(self._stable, data, offset)
        return struct.pack("<II", size, 0)

    def flush(self) -> bytes | int:
        if self._dead:
            return errno.EIO
        self._flushes += 1
        for offset, data in self._cache:
            os.pwrite(self._stable, data, offset)
        self._cache.clear()
        self._cached = 0
        return b""

    def cut(self, share: float, seed: int) -> dict[str, Any]:
        self._dead = True
        rng = random.Random(seed)
        kept = 0
        for offset, data in self._cache if share else ():
            for at in range(0, len(data), BLOCK):
                if rng.random() < share:
                    kept += os.pwrite(self._stable, data[at : at + BLOCK], offset + at)
        lost, self._cached = self._cached - kept, 0
        self._cache.clear()
        return {"writes": self._writes, "flushes": self._flushes, "unflushed": lost + kept, "kept": kept}

    def serve(self) -> None:
        """Until the file system is unmounted or the other process is gone."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(sys.stdin.fileno(), select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if sys.stdin.fileno() in ready:
                line = sys.stdin.buffer.readline()
                if not line:
                    return
                request = json.loads(line)
                print(json.dumps(self.cut(request["cut"], request["seed"])), flush=True)
            if self._fd in ready and not self._one():
                return

    def _one(self) -> bool:
        try:
            request = os.read(self._fd, _WRITE_BYTES_MAX + 8192)
        except OSError as exc:
            return exc.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT)  # and not ENODEV: unmounted
        _, opcode, unique, node, *_ = _IN.unpack_from(request)
        handler = self._answers.get(opcode)
        answer = handler(node, request[_IN.size :]) if handler else errno.ENOSYS
        if answer is None:
            return True
        error, body = (-answer, b"") if isinstance(answer, int) else (0, answer)
        try:
            os.write(self._fd, _OUT.pack(_OUT.size + len(body), error, unique) + body)
        except OSError as exc:
            if exc.errno != errno.ENOENT:  # the request was given up
                raise
        return True


if __name__ == "__main__":
    Device(int(sys.argv[1]), sys.argv[2], sys.argv[3]).serve()
