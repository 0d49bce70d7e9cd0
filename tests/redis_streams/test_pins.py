"""What of redis-py and hiredis we rely on beyond their documents, by name: when an update breaks this, look at link.py."""

from __future__ import annotations

import asyncio
import inspect

import hiredis
from conftest import run
from redis.asyncio import Sentinel
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import Connection, SSLConnection

from mist.kit.local import RedisServer
from mist.protocol.url import parse_url
from mist_redis.link import Link
from mist_redis.url import parse


def test_a_connection_of_redis_py_gives_its_transport(shared: RedisServer) -> None:
    """`Connection._reader` and `_writer` are StreamReader and StreamWriter, and nothing is left unread after connect."""

    async def body() -> None:
        connection = Connection(port=shared.port, protocol=2, driver_info=None, client_name="pin")
        await connection.connect()
        assert isinstance(connection._reader, asyncio.StreamReader)
        assert isinstance(connection._writer, asyncio.StreamWriter)
        assert not connection._reader._buffer, "a reply was left in the reader"  # type: ignore[attr-defined]
        await connection.disconnect()
        wire = await Link(parse(parse_url(shared.url))).dial(("127.0.0.1", shared.port))
        assert await wire.call(b"PING\r\n", 1, 5) == [b"PONG"]
        wire.abort()

    run(body())


def test_the_arguments_we_pass_are_known() -> None:
    for kind in (Connection, SSLConnection):
        names: set[str] = set()
        for cls in kind.__mro__:
            names |= set(inspect.signature(cls.__init__).parameters)
        assert {"host", "port", "db", "username", "password", "client_name", "driver_info", "protocol"} <= names
        assert {"socket_timeout", "socket_connect_timeout", "socket_keepalive"} <= names
    assert {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"} <= names
    for method in ("initialize", "get_node_from_key", "get_primaries", "keyslot", "aclose"):
        assert hasattr(RedisCluster, method)
    assert hasattr(Sentinel, "discover_master")


def test_hiredis_answers_errors_as_values_and_false_for_not_yet() -> None:
    reader = hiredis.Reader()
    reader.feed(b"*2\r\n-MOVED 1 a:1\r\n$-1\r\n+O")
    first = reader.gets()
    assert isinstance(first[0], hiredis.ReplyError)
    assert str(first[0]) == "MOVED 1 a:1"
    assert first[1] is None
    assert reader.gets() is False
    assert (
        hiredis.pack_command(("SET", b"\x00", 5, "é"))
        == b"*4\r\n$3\r\nSET\r\n$1\r\n\x00\r\n$1\r\n5\r\n$2\r\n\xc3\xa9\r\n"
    )
