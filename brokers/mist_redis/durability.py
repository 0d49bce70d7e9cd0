"""What an acknowledged append survives on this server, as the server itself says.

No append-only file: `memory`. With one, `appendfsync` no or everysec: `process`. always: `power`. With a WAITAOF that
waits (Redis 8) a stream may ask for `power` on an everysec server and pays the wait; with WAIT for `replicated`. Where the
server does not let us look (ACL), only what is certain is stated, with a warning.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from mist.broker.base import Durability, Fact
from mist.errors import InvalidArgument
from mist_redis.resp import Command, ReplyError
from mist_redis.url import Settings

_SETTINGS = ("appendonly", "appendfsync", "save", "maxmemory-policy", "min-replicas-to-write")
QUESTIONS: tuple[Command, ...] = (
    *(("CONFIG", "GET", name) for name in _SETTINGS),
    ("INFO", "persistence"),
    ("INFO", "replication"),
    ("INFO", "server"),
    ("COMMAND", "INFO", "WAITAOF"),
)
_ORDER: tuple[Durability, ...] = ("memory", "process", "power", "replicated")


class Facts(Struct, frozen=True, kw_only=True):
    """What one server said about itself."""

    aof: bool = False
    fsync: str = ""
    """Empty: it did not say."""
    saves: bool = False
    policy: str = ""
    replicas: int = 0
    replicas_min: int = 0
    waitaof: bool = False
    """Whether it can tell that a write is on the disk (never with appendfsync no), and waits for that."""
    hidden: bool = False
    """It did not let us see its settings."""
    server: str = ""
    """Product and version, where it says so."""

    @property
    def level(self) -> Durability:
        """Without any waiting."""
        if not self.aof:
            return "memory"
        return "power" if self.fsync == "always" else "process"


def facts(replies: list[Any]) -> Facts:
    """From the replies to QUESTIONS, errors among them."""
    config: dict[str, str] = {}
    hidden = False
    for reply in replies[: len(_SETTINGS)]:
        if isinstance(reply, ReplyError) or not reply:
            hidden = True
        else:
            config[reply[0].decode()] = reply[1].decode()
    persistence, replication, server = (_lines(r) for r in replies[len(_SETTINGS) : len(_SETTINGS) + 3])
    command = replies[len(_SETTINGS) + 3]
    known = isinstance(command, list) and bool(command) and bool(command[0])
    if "appendonly" in config:
        aof = config["appendonly"] == "yes"
    else:
        aof = persistence.get("aof_enabled") == "1"
    return Facts(
        aof=aof, fsync=config.get("appendfsync", ""), saves=bool(config.get("save")),
        policy=config.get("maxmemory-policy", ""), replicas=int(replication.get("connected_slaves", "0")),
        replicas_min=int(config.get("min-replicas-to-write", "0")),
        waitaof=known and aof and config.get("appendfsync") != "no" and _waits(server), hidden=hidden,
        server=_version(server),
    )  # fmt: skip


def _lines(reply: Any) -> dict[str, str]:
    if not isinstance(reply, bytes):
        return {}
    pairs = (line.partition(":") for line in reply.decode("utf-8", "replace").splitlines())
    return {k: v for k, _, v in pairs if v}


def _waits(server: dict[str, str]) -> bool:
    """Whether WAITAOF waits. With everysec, Redis before 8 and Valkey (9.1.2 too) may answer before the sync
    (redis/redis#13793): 20 answers with 3 syncs among them, and a power cut took what they had confirmed."""
    major = server.get("redis_version", "").partition(".")[0]
    return "valkey_version" not in server and major.isdigit() and int(major) >= 8


def _version(lines: dict[str, str]) -> str:
    if "valkey_version" in lines:
        return f"valkey {lines['valkey_version']}"
    return f"redis {lines.get('redis_version', '?')}"


def described(found: Facts, settings: Settings) -> list[Fact]:
    """For `mist doctor`."""
    aof = f"yes, appendfsync {found.fsync or 'not shown'}" if found.aof else "no"
    behind = found.replicas < found.replicas_min
    loses = {"process": "a power cut may take the last second: appendfsync always, or durability=power on Redis 8",
             "memory": "a restart loses what was not saved: appendonly yes"}  # fmt: skip
    hidden = "the server does not show its settings: allow `+config|get +info`"
    evicts = "" if found.policy in ("", "noeviction") else "whole streams may be evicted: use noeviction"
    return [
        Fact("server", f"{found.server}, {settings.kind}"),
        Fact("append-only file", aof, hidden if found.hidden else loses.get(found.level, "")),
        Fact("eviction", found.policy or "not shown", evicts),
        Fact(
            "replicas", f"{found.replicas} connected, min-replicas-to-write {found.replicas_min}",
            "fewer than it wants: it refuses writes" if behind else "",
        ),
        Fact("WAITAOF", "there, and waits" if found.waitaof else "not there, or not to be relied on"),
    ]  # fmt: skip


def default(found: Facts, settings: Settings) -> Durability:
    """What a stream gets that asks for nothing."""
    if settings.wait_replicas and found.replicas >= settings.wait_replicas:
        return "replicated"
    if settings.waitaof and found.waitaof:
        return "power"
    return found.level


def check(asked: Durability, found: Facts, settings: Settings) -> None:
    """Raise InvalidArgument when this server cannot give what a new stream asks for."""
    if asked == "replicated":
        need = max(settings.wait_replicas, 1)
        if found.replicas < need:
            raise InvalidArgument(
                f"redis: cannot give durability 'replicated': {found.replicas} replicas are connected, {need} needed",
                hint="add a replica, or ask for less",
            )
    elif asked == "power" and found.level != "power" and not found.waitaof:
        raise InvalidArgument(
            f"redis: cannot give durability 'power': appendonly is {'on' if found.aof else 'off'}, "
            f"appendfsync is {found.fsync or 'not shown'}",
            hint="set appendonly yes and appendfsync always",
        )
    elif asked == "process" and found.level == "memory":
        raise InvalidArgument(
            "redis: cannot give durability 'process': the server keeps no append-only file", hint="set appendonly yes"
        )


def in_force(config: Durability | None, found: Facts, settings: Settings) -> Durability:
    """What the stream's appends survive now, never more than it was made for."""
    wanted = config or found.level
    try:
        check(wanted, found, settings)
    except InvalidArgument:
        return found.level if _ORDER.index(found.level) < _ORDER.index(wanted) else "memory"
    return wanted


def waits(config: Durability | None, found: Facts, settings: Settings) -> tuple[int, bool]:
    """How many replicas an append waits for, and whether for the disk."""
    replicas = settings.wait_replicas or (1 if config == "replicated" else 0)
    disk = settings.waitaof or (config == "power" and found.fsync != "always")
    return replicas, disk and found.waitaof


def warnings(config: Durability | None, found: Facts, settings: Settings) -> tuple[str, ...]:
    """What an operator should know."""
    out: list[str] = []
    now = in_force(config, found, settings)
    if config is not None and _ORDER.index(now) < _ORDER.index(config):
        out.append(f"made for durability {config}, the server gives {now} now")
    if found.hidden:
        out.append(
            "the server does not show its settings, so only what is certain is stated: allow `+config|get +info`"
        )
    if not found.aof and found.saves:
        out.append("no append-only file, only snapshots: a crash loses everything since the last one (appendonly yes)")
    elif not found.aof:
        out.append("the server keeps nothing on disk: a restart loses every stream (appendonly yes)")
    if found.policy.startswith("allkeys-"):
        out.append(f"maxmemory-policy {found.policy} may evict whole streams: use noeviction")
    if found.replicas_min:
        out.append(f"min-replicas-to-write is {found.replicas_min}, {found.replicas} replicas are connected")
    if settings.waitaof and not found.waitaof:
        out.append("waitaof was asked for, the server has none that waits (Redis 8 has), or no append-only file")
    return tuple(out)
