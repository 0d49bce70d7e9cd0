"""`mist doctor`: what is in force, and what is in the way. Each check is a row; nothing is changed or created."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from mist import __version__
from mist.broker.base import Broker
from mist.cli.session import Session, current
from mist.cli.settings import Settings
from mist.config import config_file, unknown_variables
from mist.errors import MistError, NotFound
from mist.protocol.url import Url

DISK_BYTES_MIN = 1024**3
LAG_WARN_S = 60.0
LOCK_WAIT_S = 1.0
UNREACHABLE = 7
PROBLEM = 10


async def command() -> None:
    """Check the broker: reachability, round trip, durability really in force, disk, settings, consumers that lag.

    Ends with 0 when all is well, 7 when the broker cannot be reached, 10 when a check failed.

    Examples:
      mist doctor
      mist -u log:./data doctor --format json
    """
    session = current()
    rows: list[dict[str, Any]] = []

    def say(check: str, state: str, detail: str) -> None:
        rows.append({"check": check, "state": state, "detail": detail})

    say("mist", "ok", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.release()}")
    path = config_file()
    say("configuration", "ok", str(path) if path else "no file; defaults, environment and flags")
    for name in unknown_variables(Settings, os.environ):
        say("configuration", "warn", f"{name} is set and means nothing")
    url = session.url
    say("url", "ok", f"{url.redacted()} (from {session.origins['url']})")
    reached = await _broker(session, url, say)
    session.out.rows(rows, ["check", "state", "detail"])
    if not reached:
        session.exit_code = UNREACHABLE
    elif any(r["state"] == "fail" for r in rows):
        session.exit_code = PROBLEM


async def _broker(session: Session, url: Url, say: Any) -> bool:
    if url.scheme == "log":
        _disk(Path(url.target or "."), say)
    start = time.monotonic()
    try:
        broker = await session.connect(url)
    except NotFound as exc:
        say("connect", "warn", f"{exc.message}: nothing was published yet")
        return True
    except MistError as exc:
        say("connect", "fail", str(exc))
        return False
    say("connect", "ok", f"{(time.monotonic() - start) * 1000:.1f} ms")
    try:
        say("round trip", "ok", f"{await broker.ping() * 1000:.3f} ms")
    except MistError as exc:
        say("round trip", "fail", str(exc))
        return False
    try:
        for fact in await broker.describe():
            say(fact.what, "warn" if fact.warning else "ok", fact.value + (f": {fact.warning}" if fact.warning else ""))
    except MistError as exc:
        say("server", "fail", str(exc))
    await _streams(broker, say)
    return True


async def _streams(broker: Broker, say: Any) -> None:
    names = await broker.streams()
    say("streams", "ok", f"{len(names)}")
    for name in names:
        try:
            stream = await broker.open(name, create=False)
            info = await stream.info()
            state = "ok" if info.durability in ("power", "replicated") else "warn"
            say(
                f"stream {name}", state, f"durability {info.durability}, {info.records:,} records, {info.bytes:,} bytes"
            )
            for warning in info.warnings:
                say(f"stream {name}", "warn", warning)
            for consumer in await stream.consumers() if info.capabilities.consumers else []:
                lag = await (await stream.consumer(consumer, create=False)).info()
                if lag.lag_s > LAG_WARN_S:
                    say(f"consumer {name}/{consumer}", "warn", f"{lag.lag:,} records, {lag.lag_s:.0f} s behind")
            if name.endswith("--dead") and info.records:
                say(
                    f"stream {name}",
                    "warn",
                    f"{info.records:,} dead letters: `mist dlq show {name.removesuffix('--dead')}`",
                )
        except MistError as exc:
            say(f"stream {name}", "fail", str(exc))


def _disk(path: Path, say: Any) -> None:
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    usage = shutil.disk_usage(place)
    state = "ok" if usage.free >= DISK_BYTES_MIN else "warn"
    say("disk", state, f"{_size(usage.free)} free of {_size(usage.total)} at {place.resolve()}")
    if path.exists() and not os.access(path, os.W_OK):
        say("disk", "fail", f"{path} cannot be written by this user")
    _locks(path, say)


def _locks(path: Path, say: Any) -> None:
    """Is a lock of the log held for long? Every writer holds one for milliseconds; a stopped process holds it for ever."""
    for lock in sorted({*path.glob("*.lock"), *path.glob("streams/*/lock")}):
        until = time.monotonic() + LOCK_WAIT_S
        try:
            with lock.open("rb") as file:
                while not _free(file.fileno()):
                    if time.monotonic() > until:
                        say("locks", "fail", f"{lock} is held; a stopped process? `fuser {lock}` names it")
                        break
                    time.sleep(0.02)
        except OSError as exc:
            say("locks", "fail", f"{lock}: {exc.strerror}")


def _free(descriptor: int) -> bool:
    """Whether a shared lock can be had, without keeping it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


def _size(count: int) -> str:
    return f"{count / 1024**3:.1f} GiB" if count >= 1024**3 else f"{count / 1024**2:.1f} MiB"
