"""The directory of a spool: a log, and beside it whose spool it is, who forwards, and how that goes.

DIR/streams, DIR/state.db   a log: the records that wait, and per stream how far it was forwarded
DIR/destination.json        the broker behind, without its password; a spool of another broker is refused
DIR/forward.lock            held by the process that forwards
DIR/forward.json            its number and why it does not get on, for `mist spool status`; rewritten when that changes
DIR/dropped.json            records that were dropped before they were forwarded, per stream (full=drop_oldest, damage)
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from mist.broker.clock import SYSTEM
from mist.errors import Conflict, InvalidArgument, Malformed
from mist.log.journal import storage_error
from mist.protocol.subject import encode_token
from mist.protocol.url import Url, parse_url, redact

PREFIX = "spool+"
PARAMETERS = frozenset({"spool", "spool_bytes", "spool_full", "spool_drain", "stream", "subject", "consumer"})
"""Ours, and those that name something behind a broker: none of them is the broker's own."""
VARIABLE = "MIST_SPOOL"
S = TypeVar("S", bound=Struct)


class Destination(Struct, frozen=True):
    """`size_bytes_max` is the largest record the broker behind takes, as far as it is known: 0 = not yet."""

    url: str
    size_bytes_max: int = 0


class Forwarding(Struct, frozen=True):
    """What the forwarding process says of itself. `error` is empty while it gets on."""

    pid: int
    since_ns: int
    error: str = ""


class Figures(Struct, frozen=True, kw_only=True):
    """One stream of a spool. `forwarded` counts what the broker behind took or already had, `refused` what it will never
    take (kept as dead letters of the spool), `dropped` what was lost before it could be sent. `lag_s` is the age of the
    oldest record that waits."""

    stream: str
    waiting: int
    bytes: int
    lag_s: float
    forwarded: int
    refused: int
    dropped: int


def behind(url: Url) -> Url:
    """The URL of the broker behind a spool. Raises InvalidArgument where there is none."""
    if not url.scheme.startswith(PREFIX) or url.scheme.startswith(PREFIX * 2):
        raise InvalidArgument(f"{url.redacted()}: not a spool", hint="spool+nats://host:4222, spool+redis://host")
    bare = Url(url.scheme, url.target, tuple(kv for kv in url.query if kv[0] not in PARAMETERS))
    return parse_url(str(bare)[len(PREFIX) :])


def identity(url: Url) -> str:
    """What makes two URLs the same destination: everything but the password and the parameters."""
    target = url.target
    if url.scheme == "log":
        target = os.path.abspath(target)
    return redact(f"{url.scheme}:{target}")


def directory(url: Url, default: str = "") -> Path:
    """Where the spool of this URL lies: `?spool=DIR`, else a folder of its own below `default`, MIST_SPOOL, or the
    user's state directory."""
    given = url.get("spool")
    if given:
        return Path(given).absolute()
    base = default or os.environ.get(VARIABLE, "")
    if not base:
        state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
        base = str(Path(state) / "mist" / "spool")
    name = identity(behind(url))
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    host = encode_token(name.partition("//")[2].rpartition("@")[2].partition("/")[0] or name.partition(":")[0])
    return (Path(base) / f"{host[:40]}-{digest}").absolute()


class SpoolDirectory:
    """The small files of one spool."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    def belong_to(self, url: Url) -> None:
        """Raise Conflict when the spool is another broker's; note whose it is when it is new."""
        mine = identity(url)
        found = self.destination()
        if found is None:
            self._write("destination.json", Destination(mine))
        elif found.url != mine:
            raise Conflict(
                f"the spool in {self.path} is for {found.url}, not for {mine}",
                hint="name another directory with ?spool=DIR; where the broker has moved, write its new URL into "
                f"{self.path / 'destination.json'}",
            )

    def destination(self) -> Destination | None:
        return self._read("destination.json", Destination)

    def learn_size(self, size_bytes_max: int) -> None:
        """What the broker behind says it takes."""
        found = self.destination()
        if found is not None and found.size_bytes_max != size_bytes_max:
            self._write("destination.json", Destination(found.url, size_bytes_max))

    def forwarding(self) -> Forwarding | None:
        """What the forwarding process said last; None when no process forwards now."""
        return self._read("forward.json", Forwarding) if self._held() else None

    def say(self, error: str) -> None:
        self._write("forward.json", Forwarding(os.getpid(), SYSTEM.time_ns(), error))

    def dropped(self) -> dict[str, int]:
        try:
            return msgspec.json.decode((self.path / "dropped.json").read_bytes(), type=dict[str, int])
        except FileNotFoundError:
            return {}
        except msgspec.DecodeError as exc:
            raise Malformed(f"{self.path / 'dropped.json'}: cannot be read: {exc}") from exc

    def add_dropped(self, stream: str, count: int) -> None:
        found = self.dropped()
        self._write("dropped.json", found | {stream: found.get(stream, 0) + count})

    # the lock

    def take(self) -> bool:
        """Become the process that forwards; False when there is one."""
        fd = self._open_lock()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._lock = fd
        return True

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _held(self) -> bool:
        if self._lock is not None:
            return True
        fd = self._open_lock()
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def _open_lock(self) -> int:
        try:
            return os.open(self.path / "forward.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise storage_error(exc, f"{self.path / 'forward.lock'}") from exc

    # files

    def _read(self, name: str, kind: type[S]) -> S | None:
        try:
            return msgspec.json.decode((self.path / name).read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as exc:
            raise Malformed(f"{self.path / name}: cannot be read: {exc}") from exc

    def _write(self, name: str, value: Struct | dict[str, int]) -> None:
        """Replaced as a whole. Not synced: none of it is needed to forward every record."""
        temporary = self.path / f".{name}.{os.getpid()}"
        try:
            temporary.write_bytes(msgspec.json.encode(value) + b"\n")
            temporary.replace(self.path / name)
        except OSError as exc:
            raise storage_error(exc, str(self.path / name)) from exc
