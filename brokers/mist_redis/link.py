"""Connections: who to ask for a key, one connection per server and role, errors of the way.

redis-py opens connections (TLS, ACL users, SELECT, SETNAME), asks sentinels and keeps the map of a cluster; then its
transport is handed to a Wire of ours. This module alone knows redis-py's internals: `Connection._writer` and `_reader`
(tests/redis_streams/test_pins.py names them). Promises: a redirected, refused or never sent command is sent again to the right
server; one whose reply was lost is not, unless the caller says that it may be (`repeat`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from redis import exceptions as theirs
from redis.asyncio import Sentinel
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import Connection, SSLConnection

from mist.errors import Closed, Internal, Unavailable
from mist_redis.faults import connecting, translate
from mist_redis.resp import Command, Lost, NotSent, ReplyError, Wire, first_error, pack
from mist_redis.scripts import SCRIPTS
from mist_redis.url import Settings

Address = tuple[str, int]
COMMANDS = "commands"
WRITES = "writes"
"""Appends that wait for replicas or the disk have a connection of their own: what stands behind a WAIT waits too."""
ROLE_S = 1.0
"""How old the knowledge may be that a server which sentinels named is a primary. A demoted one goes on answering reads."""
REDIRECTS_MAX = 8
PAUSE_S = 0.05


class Link:
    """Every connection of one broker."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._wires: dict[tuple[Address, str], Wire] = {}
        self._locks: dict[tuple[Address, str], asyncio.Lock] = {}
        self._primary: Address | None = None
        self._cluster: RedisCluster | None = None
        self._moved: dict[int, Address] = {}
        self._resolving = asyncio.Lock()
        self.closed = False

    def _check_open(self) -> None:
        if self.closed:
            raise Closed("the broker is closed")

    # --- who to ask ---

    async def address(self, key: bytes | str) -> Address:
        """The server that has this key now. Raises Unavailable."""
        kind = self.settings.kind
        if kind == "single":
            return self.settings.hosts[0]
        if kind == "sentinel":
            return self._primary or await self._ask_sentinels()
        cluster = await self._map()
        slot = cluster.keyslot(key)
        if slot in self._moved:
            return self._moved[slot]
        try:
            node = cluster.get_node_from_key(key if isinstance(key, str) else key.decode("utf-8", "surrogateescape"))
        except (theirs.RedisError, theirs.RedisClusterException, KeyError, IndexError) as exc:
            raise Unavailable(f"redis: no server of the cluster has slot {slot}") from exc
        if node is None:
            raise Unavailable(f"redis: no server of the cluster has slot {slot}")
        return node.host, int(node.port)

    async def primaries(self) -> list[Address]:
        """Every server that has streams."""
        if self.settings.kind != "cluster":
            return [await self.address(b"")]
        return [(n.host, int(n.port)) for n in (await self._map()).get_primaries()]

    async def _ask_sentinels(self) -> Address:
        s = self.settings
        async with self._resolving:
            if self._primary is not None:
                return self._primary
            options: dict[str, Any] = {
                "socket_timeout": s.connect_timeout_s, "socket_connect_timeout": s.connect_timeout_s, **_tls(s)
            }  # fmt: skip
            if s.tls:
                options["ssl"] = True
            sentinel = Sentinel(  # type: ignore[no-untyped-call]
                list(s.hosts), sentinel_kwargs=options
            )
            try:
                host, port = await sentinel.discover_master(s.primary)
            except (theirs.RedisError, OSError) as exc:
                raise Unavailable(f"redis: no sentinel knows a primary {s.primary!r}: {str(exc)[:200]}") from exc
            finally:
                for each in sentinel.sentinels:
                    await each.aclose()
            self._primary = (host, int(port))
            return self._primary

    async def _map(self) -> RedisCluster:
        if self._cluster is not None:
            return self._cluster
        s = self.settings
        async with self._resolving:
            if self._cluster is None:
                options: dict[str, Any] = {**_tls(s)}
                if s.tls:
                    options["ssl"] = True
                cluster = RedisCluster(
                    startup_nodes=[ClusterNode(h, p) for h, p in s.hosts], username=s.user or None,
                    password=s.password or None, socket_timeout=s.connect_timeout_s, protocol=2,
                    socket_connect_timeout=s.connect_timeout_s, require_full_coverage=False, **options,
                )  # fmt: skip
                try:
                    await cluster.initialize()
                except (theirs.RedisError, theirs.RedisClusterException, OSError) as exc:
                    await cluster.aclose()
                    raise connecting(exc, "the cluster") from exc
                self._cluster = cluster
                self._moved.clear()
        return self._cluster

    async def look_again(self) -> None:
        """Forget who has what: the next call asks the sentinels or the cluster anew."""
        self._primary = None
        cluster, self._cluster = self._cluster, None
        self._moved.clear()
        if cluster is not None:
            await cluster.aclose()

    # --- connections ---

    async def dial(self, address: Address) -> Wire:
        """A new connection. Raises Unavailable, NotAuthorised."""
        self._check_open()
        s = self.settings
        host, port = address
        kind = SSLConnection if s.tls else Connection
        connection = kind(
            host=host, port=port, db=s.db, username=s.user or None, password=s.password or None,
            socket_connect_timeout=s.connect_timeout_s, socket_timeout=s.connect_timeout_s, client_name=s.name,
            driver_info=None, protocol=2, socket_keepalive=True, **_tls(s),
        )  # fmt: skip
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except (theirs.RedisError, OSError, TimeoutError) as exc:
            raise connecting(exc, f"{host}:{port}") from exc
        except ValueError as exc:
            raise connecting(exc, f"{host}:{port}") from exc
        reader, writer = connection._reader, connection._writer
        if reader is None or writer is None:
            raise Internal("redis-py connected and has no transport")
        connection._reader = connection._writer = None
        wire = Wire()
        wire.kept = (reader, writer)  # a StreamWriter that goes away closes its transport
        wire.connection_made(writer.transport)
        writer.transport.set_protocol(wire)
        try:
            self._check_open()
            if s.kind == "sentinel":
                await self._check_primary(wire, address)
        except BaseException:
            wire.abort()
            raise
        return wire

    async def _check_primary(self, wire: Wire, address: Address) -> None:
        """Sentinels may still name who was the primary: https://redis.io/docs/latest/develop/reference/sentinel-clients/

        HELLO tells the role to users who may ask for nothing else. Raises Unavailable.
        """
        try:
            (reply,) = await wire.call(pack([_ROLE]), 1, self.settings.connect_timeout_s)
        except (Lost, NotSent) as exc:
            raise Unavailable(f"redis: {address[0]}:{address[1]} does not say its role: {exc}") from exc
        if not _is_primary(reply):
            raise Unavailable(f"redis: {address[0]}:{address[1]} is not the primary any more", hint="try again")
        wire.role_at = asyncio.get_running_loop().time()

    async def wire(self, address: Address, role: str = COMMANDS) -> Wire:
        """The connection to a server in a role, made when there is none."""
        key = (address, role)
        found = self._wires.get(key)
        if found is not None and found.alive:
            return found
        async with self._locks.setdefault(key, asyncio.Lock()):
            found = self._wires.get(key)
            if found is None or not found.alive:
                found = self._wires[key] = await self.dial(address)
            return found

    async def run(
        self,
        key: bytes | str,
        commands: Sequence[Command],
        *,
        what: str,
        role: str = COMMANDS,
        repeat: bool = False,
        timeout_s: float = 0.0,
        address: Address | None = None,
        raw: bool = False,
        begun: Callable[[], None] | None = None,
    ) -> list[Any]:
        """The replies to these commands, in order; the first error among them raised in our words unless `raw`.

        Raises Lost when the connection ended after sending (with `repeat`: after a second time), Unavailable when there
        is no connection, Closed.
        """
        lost = 0
        asking = False
        at = address
        for _ in range(REDIRECTS_MAX):
            self._check_open()
            try:
                where = at or await self.address(key)
                wire = await self.wire(where, role)
            except Unavailable:
                await self.look_again()
                raise
            # it holds for one command, or for one transaction
            each = asking and commands[0] != ("MULTI",)
            sent = [c for command in commands for c in (_ASKING, command)] if each else commands
            if asking and not each:
                sent = [_ASKING, *commands]
            now = asyncio.get_running_loop().time()
            doubted = self.settings.kind == "sentinel" and now - wire.role_at > ROLE_S
            if doubted:  # in the same write: it costs no round trip
                sent = [_ROLE, *sent]
            try:
                replies = await wire.call(pack(sent), len(sent), timeout_s or self.settings.timeout_s, begun)
            except NotSent:
                continue  # it ended between looking and sending; nothing was sent
            except Lost:
                self._check_open()
                await self.look_again()
                lost += 1
                if not repeat or lost > 1:
                    raise
                continue
            if asking:
                replies = replies[1::2] if each else replies[1:]
            if doubted:
                said, *replies = replies
                wire.role_at = now
                if not _is_primary(said):
                    await self.leave(where)
                    if repeat:  # what it answered may be old; writes it refuses by itself
                        await asyncio.sleep(PAUSE_S)
                        continue
            error = first_error(replies)
            if error is None:
                return replies
            asking = False
            again = await self._again(str(error), error, replies, where)
            if again is None:
                if raw:
                    return replies
                raise translate(error, what) from error
            if again == "load":
                commands = [_in_full(c) for c in commands]
            elif isinstance(again, tuple):
                at, asking = again, True
            else:
                at = address
        raise Unavailable(f"{what}: sent from server to server {REDIRECTS_MAX} times")

    async def _again(self, text: str, error: Exception, replies: list[Any], where: Address) -> str | Address | None:
        """What to do about an error that means "not here, not now": None is nothing, it stands."""
        if text.startswith("EXECABORT"):  # the reason stands before it
            text = next((str(r) for r in replies if isinstance(r, ReplyError) and "MOVED" in str(r)), text)
        word = text.partition(" ")[0]
        if word == "NOSCRIPT":
            return "load"
        if word == "MOVED":
            _, slot, place = text.split(" ")[:3]
            self._moved[int(slot)] = _place(place, where)
            return "moved"
        if word == "ASK":
            return _place(text.split(" ")[2], where)
        if word in ("TRYAGAIN", "CLUSTERDOWN"):
            await asyncio.sleep(PAUSE_S)
            if word == "CLUSTERDOWN":
                await self.look_again()
            return "later"
        if word == "UNBLOCKED" or "cannot be used with replica instances" in text:
            # a repeated batch writes nothing, so a primary that became a replica refuses only the wait for others
            await self.leave(where)
            return None
        if word == "READONLY":
            # a primary that became a replica: it refused, so the command may go to the new one
            await self.leave(where)
            if self.settings.kind == "single":  # a name may lead elsewhere by the next call
                return None
            await asyncio.sleep(PAUSE_S)
            return "later"
        return None

    async def leave(self, address: Address) -> None:
        """This server is not the one to ask any more."""
        await self.look_again()
        for key in [k for k in self._wires if k[0] == address]:
            self._wires.pop(key).abort("another server is the primary now")

    async def close(self) -> None:
        """End every connection; calls under way raise Closed."""
        self.closed = True
        for wire in self._wires.values():
            wire.abort()
        self._wires.clear()
        await self.look_again()


_ROLE: Command = ("HELLO",)
_ASKING: Command = ("ASKING",)


def _is_primary(told: Any) -> bool:
    """From the answer to _ROLE; a server that does not say is taken for one."""
    return (
        not isinstance(told, list)
        or dict(zip(told[::2], told[1::2], strict=False)).get(b"role", b"master") == b"master"
    )


def _place(text: str, beside: Address) -> Address:
    host, _, port = text.rpartition(":")
    return host or beside[0], int(port)


def _tls(s: Settings) -> dict[str, Any]:
    if not s.tls:
        return {}
    return {
        "ssl_ca_certs": s.tls_ca or None, "ssl_certfile": s.tls_cert or None, "ssl_keyfile": s.tls_key or None,
        "ssl_cert_reqs": "required", "ssl_check_hostname": True,
    }  # fmt: skip


def _in_full(command: Command) -> Command:
    """An EVALSHA the server does not know, with its text: it knows it from then on."""
    if command[0] == "EVALSHA":
        return ("EVAL", SCRIPTS[command[1]], *command[2:])
    return command
