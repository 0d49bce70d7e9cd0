"""A directory of a development server: held by one server at a time, and known to others while it is.

The lock is `mist-dev.lock`, whose descriptor the server inherits: it is held exactly as long as the server
lives, also when the `mist dev` that started it was killed, and no stale file can claim the directory. What the file says
(which server, where) is written under the lock and believed only while somebody holds it.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from mist.cli._tools import state_home
from mist.errors import Locked, NotFound, Refused, TimedOut
from mist.kit.lock import FileLock, is_held

LOCK = "mist-dev.lock"
STOP_S = 10.0
START_S = 30.0
"""How long a directory may be held without saying by whom: the server is being started."""
_POLL_S = 0.02


class Held(Struct, frozen=True, kw_only=True):
    """The server in a directory. `fresh`: the directory goes when the server is stopped."""

    server: str
    url: str
    port: int
    pid: int
    directory: str
    monitor_port: int = 0
    fresh: bool = False


def root() -> Path:
    """Where the directories lie that nobody named."""
    return state_home() / "dev"


def fresh(server: str) -> Path:
    """A new empty directory below `root`. Raises Refused when it cannot be made."""
    try:
        root().mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{server}-", dir=root()))
    except OSError as exc:
        raise Refused(f"{root()}: {exc.strerror or exc}", hint="name a directory with --dir") from exc


@contextmanager
def held(folder: Path) -> Iterator[FileLock]:
    """Hold the directory (made if absent); the server is to inherit the lock's descriptor. Raises Locked, naming the
    holder, when somebody does already."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire()
    except Locked:
        raise _locked(folder) from None
    except Refused as exc:
        raise Refused(exc.message, hint="name a directory with --dir") from exc
    try:
        lock.note(b"")  # not we hold it, but the server that is about to start
        yield lock
    finally:
        lock.release()


def _locked(folder: Path) -> Locked:
    holder = said(folder)
    if holder is None:
        return Locked(f"{folder}: a server is being started there", hint="wait for it, or take another --dir")
    return Locked(
        f"{folder} is held by {holder.server} (pid {holder.pid}) at {holder.url}",
        hint=f"use that one, stop it with `{stop_command(folder)}`, or take another --dir",
    )


def stop_command(folder: Path) -> str:
    """How somebody stops the server there."""
    return f"mist dev stop {folder.name}" if folder.parent == root() else f"mist dev stop --dir {folder}"


def say(lock: FileLock, holder: Held) -> None:
    """Write down who holds it, for others."""
    lock.note(msgspec.json.encode(holder))


def said(folder: Path) -> Held | None:
    """What the file says, true or not. None while the server is being started, or when there is no such directory."""
    try:
        return msgspec.json.decode((folder / LOCK).read_bytes(), type=Held)
    except (OSError, msgspec.DecodeError):
        return None


def taken(folder: Path) -> bool:
    """Whether a server lives there."""
    return is_held(folder / LOCK)


def directories() -> list[Path]:
    """The known places below `root`."""
    return sorted(p.parent for p in root().glob(f"*/{LOCK}"))


def stop(folder: Path) -> str:
    """Stop the server there: SIGTERM, SIGKILL when that is not enough. Returns what was done. A fresh directory goes.

    Raises NotFound when there is no such directory, TimedOut when it is held and nobody says by whom.
    """
    if not (folder / LOCK).exists():
        raise NotFound(f"no server of `mist dev` in {folder}", hint="`mist dev ls` shows them")
    until = time.monotonic() + START_S
    holder = said(folder)
    while taken(folder) and holder is None:
        if time.monotonic() > until:
            raise TimedOut(f"{folder} is held, and nobody says by whom", hint=f"`fuser {folder / LOCK}` names it")
        time.sleep(_POLL_S)
        holder = said(folder)
    what = "was not running"
    if holder is not None and taken(folder):
        if not _holds(holder.pid, folder):
            raise Locked(f"{folder} is held by another process than {holder.pid}", hint=f"see `fuser {folder / LOCK}`")
        what = "stopped"
        if not _end(folder, holder.pid, signal.SIGTERM):
            what = "killed: it did not end by itself"
            if not _end(folder, holder.pid, signal.SIGKILL):
                raise TimedOut(
                    f"{folder} is still held after SIGKILL to {holder.pid}", hint=f"see `fuser {folder / LOCK}`"
                )
    if holder is not None and holder.fresh:
        remove(folder)
        what += ", its directory removed"
    return what


def remove(folder: Path) -> None:
    """A fresh directory with all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)


def _holds(pid: int, folder: Path) -> bool:
    """Whether this process has the lock open, where the system tells: no signal goes to a stranger."""
    descriptors = Path(f"/proc/{pid}/fd")
    if not Path("/proc/self/fd").is_dir():
        return True
    with suppress(OSError):
        lock = (folder / LOCK).stat()
        for entry in descriptors.iterdir():
            with suppress(OSError):
                if os.path.samestat(entry.stat(), lock):
                    return True
    return False


def _end(folder: Path, pid: int, how: signal.Signals) -> bool:
    """Send the signal and wait until the directory is free; whether it is."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, how)
    until = time.monotonic() + STOP_S
    while taken(folder):
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_S)
    return True
