"""What a server's error reply means to the caller: one table from its first word to an error of mist.errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis import exceptions as theirs

from mist.errors import Conflict, Internal, MistError, NotAuthorised, NotFound, StorageFull, Unavailable, Unsupported
from mist_redis.resp import Lost, NotSent

_LATER = {
    "LOADING": "the server reads its data",
    "BUSY": "a script blocks the server",
    "MASTERDOWN": "the replica has lost its primary",
    "READONLY": "this server is a replica",
    "CLUSTERDOWN": "the cluster lacks a part",
    "TRYAGAIN": "the slot is moving",
    "NOREPLICAS": "too few replicas are in sync (min-replicas-to-write)",
    "UNBLOCKED": "the wait was ended by the server",
    "MAXCLIENTS": "the server takes no more clients",
    "EXECABORT": "the transaction was refused",
    "MOVED": "the slot has moved",
    "ASK": "the slot is moving",
}


def translate(error: Exception, what: str) -> MistError:
    """The error to raise for an error reply."""
    text = str(error)
    word = text.partition(" ")[0]
    if word in ("NOAUTH", "WRONGPASS", "NOPERM"):
        return NotAuthorised(f"{what}: {text}", hint="see `ACL WHOAMI` and docs/how-to/use-redis.md for the rights")
    if word == "OOM":
        return StorageFull(f"{what}: the server is at its maxmemory", hint="trim streams, or raise maxmemory")
    if word == "MISCONF":
        full = "space" in text
        kind = StorageFull if full else Unavailable
        return kind(f"{what}: {text}", hint="the server cannot write to its disk")
    if word == "WRONGTYPE":
        return Conflict(
            f"{what}: the key holds another type than a stream", hint="choose another stream name or prefix"
        )
    if word == "NOGROUP":
        return NotFound(
            f"{what}: its consumer group was removed by somebody else", hint="delete the consumer, make it again"
        )
    if word in _LATER:
        return Unavailable(f"{what}: {_LATER[word]} ({text[:200]})")
    if "max number of clients" in text:
        return Unavailable(f"{what}: {text}")
    if "unknown command" in text.lower():
        return Unsupported(text[:120], "redis", hint="Redis 6.2 or newer, or Valkey, is needed")
    return Internal(f"{what}: the server said {text[:300]!r}")


def connecting(error: Exception, where: str) -> MistError:
    """The error to raise when redis-py could not connect."""
    text = str(error)
    if isinstance(error, theirs.AuthenticationError | theirs.NoPermissionError) or text.startswith(
        ("NOAUTH", "WRONGPASS", "NOPERM")
    ):
        return NotAuthorised(f"redis: {where} rejects these credentials")
    if isinstance(error, theirs.TimeoutError | TimeoutError):
        return Unavailable(f"redis: {where} does not answer in time")
    return Unavailable(f"redis: cannot connect to {where}: {text[:300]}")


@contextmanager
def unavailable(what: str) -> Iterator[None]:
    """For calls that may be repeated: a connection that was lost on the way is Unavailable."""
    try:
        yield
    except (Lost, NotSent) as exc:
        raise Unavailable(f"{what}: {exc}", hint="try again") from exc
