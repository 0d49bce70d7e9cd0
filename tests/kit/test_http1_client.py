"""Our HTTP/1.1 client, byte by byte: framing, kept connections, limits, slow and rude servers. (Any bytes: tests/fuzz.)"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from conftest import run

from mist.errors import MistError, ProtocolError, TimedOut, TooLarge, Unavailable
from mist.kit import http1_client
from mist.kit._http1_connection import AHEAD_BYTES_MAX, HEAD_BYTES_MAX, HEADERS_MAX, INTERIM_MAX
from mist.kit.http1_client import Origin, Pool, Response

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
RESET = object()
WAIT = object()
Step = bytes | object


class Server:
    """Each connection does what its script says: for each request in turn bytes to write, RESET, WAIT (until the client has
    gone), or a list of these; after its last request it closes."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.connections = 0
        self.requests = 0
        self.origin = Origin("127.0.0.1", 0)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        script = self.scripts[min(self.connections, len(self.scripts) - 1)]
        self.connections += 1
        try:
            for steps in script:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(2)
                self.requests += 1
                for step in steps if isinstance(steps, list) else [steps]:
                    if step is RESET:
                        linger = struct.pack("ii", 1, 0)
                        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                        writer.transport.abort()
                        return
                    if step is WAIT:
                        await reader.read(1)
                        continue
                    writer.write(step)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has gone
        finally:
            writer.close()


@asynccontextmanager
async def serving(*scripts: list[Any], **options: Any) -> AsyncIterator[tuple[Server, Pool]]:
    there = Server(*scripts)
    server = await asyncio.start_server(there.connected, "127.0.0.1", 0)
    there.origin = Origin("127.0.0.1", server.sockets[0].getsockname()[1])
    pool = Pool(**options)
    try:
        yield there, pool
    finally:
        await pool.aclose()
        server.close()


async def ask(there: Server, pool: Pool, *, repeatable: bool = True) -> tuple[int, bytes]:
    answer = await pool.post(there.origin, HEAD, b"{}", repeatable=repeatable)
    try:
        return answer.status, await whole(answer)
    finally:
        answer.release()


async def half_and_ask(there: Server, pool: Pool) -> None:
    """The script waits in the middle of its answer: it goes on when half of it is read."""
    answer = await pool.post(there.origin, HEAD, b"{}")
    assert await answer.read() == b"ok"
    (connection,) = pool._all
    connection._transport.write(b"x")
    await answer.read()


async def whole(answer: Response) -> bytes:
    body = b""
    while piece := await answer.read():
        body += piece
    return body


def given(*scripts: list[Any], **options: Any) -> Callable[[Callable[[Server, Pool], Awaitable[None]]], None]:
    """Run the decorated case with that server."""

    def decorate(case: Callable[[Server, Pool], Awaitable[None]]) -> None:
        async def body() -> None:
            async with serving(*scripts, **options) as (there, pool):
                await case(there, pool)

        run(body())

    return decorate


WHOLE: list[tuple[str, Any, int, bytes, bool]] = [
    ("a length", OK, 200, b"ok", True),
    ("byte by byte", [bytes([b]) for b in OK], 200, b"ok", True),
    ("no body", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", 200, b"", True),
    ("chunks", CHUNKED + b"1\r\no\r\n1;x=y\r\nk\r\n0\r\n\r\n", 200, b"ok", True),
    ("a trailer", [CHUNKED, b"2\r\nok\r\n0\r\nx: y\r\n", b"\r\n"], 200, b"ok", True),
    ("interim answers", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK], 200, b"ok", True),
    ("204", b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
    ("304 with a length", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", 304, b"", True),
    ("304 with chunks", b"HTTP/1.1 304 x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n", 304, b"", False),
    ("to the end", b"HTTP/1.1 200 OK\r\n\r\nok", 200, b"ok", False),
    ("HTTP/1.0", b"HTTP/1.0 200 OK\r\n\r\nok", 200, b"ok", False),
    ("HTTP/1.0 with a length", b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", 200, b"ok", False),
    ("HTTP/1.0, kept", b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok", 200, b"ok", True),
    ("close", b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", 200, b"ok", False),
    ("an offer to upgrade", b"HTTP/1.1 200 OK\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nok", 200, b"ok", True),
    ("surplus", OK + OK, 200, b"ok", False),
    ("surplus that is no HTTP", OK + b"\x00\x00", 200, b"ok", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "script", "status", "body", "kept"), WHOLE, ids=[w[0] for w in WHOLE])
def test_whole_answers(name: str, script: Any, status: int, body: bytes, kept: bool) -> None:
    """And whether their connection is kept. Those that are not kept are not asked again."""

    @given([script, OK] if kept else [script], [OK])
    async def _(there: Server, pool: Pool) -> None:
        assert await ask(there, pool) == (status, body)
        assert await ask(there, pool) == (200, b"ok")
        assert (there.connections, there.requests) == (1 if kept else 2, 2)


BROKEN: list[tuple[str, Any, type[MistError]]] = [
    ("closed before an answer", [], Unavailable),
    ("reset before an answer", [RESET], Unavailable),
    ("closed in the head", [b"HTTP/1.1 200 OK\r\ncont"], ProtocolError),
    ("closed after an interim answer", [b"HTTP/1.1 100 Continue\r\n\r\n"], ProtocolError),
    ("short of its length", [b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok"], ProtocolError),
    ("closed in a chunk", [CHUNKED + b"5\r\nok"], ProtocolError),
    ("closed before the last chunk", [CHUNKED + b"2\r\nok\r\n"], ProtocolError),
    ("closed in the trailer", [CHUNKED + b"2\r\nok\r\n0\r\n"], ProtocolError),
    ("a chunk without a size", [CHUNKED + b"zz\r\nok\r\n0\r\n\r\n"], ProtocolError),
    ("reset in a body to the end", [b"HTTP/1.1 200 OK\r\n\r\nok", WAIT, RESET], ProtocolError),
    ("no HTTP", [b"hello\r\n\r\n"], ProtocolError),
    ("a coding that nobody asked for", [CHUNKED.replace(b"chunked", b"gzip, chunked") + b"2\r\nok\r\n0\r\n\r\n", WAIT], ProtocolError),
    ("two lengths", [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok"], ProtocolError),
    ("another protocol", [b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nok"], ProtocolError),
    ("interim answers for ever", [b"HTTP/1.1 102 Processing\r\n\r\n" * (INTERIM_MAX + 1) + OK], ProtocolError),
    ("a head that does not end", [b"HTTP/1.1 200 OK\r\nx: " + b"x" * HEAD_BYTES_MAX, WAIT], TooLarge),
    ("too many headers", [b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * (HEADERS_MAX + 2), WAIT], TooLarge),
    ("an extension that does not end", [CHUNKED + b"1;x=" + b"x" * 2 * HEAD_BYTES_MAX, WAIT], TooLarge),
]  # fmt: skip


@pytest.mark.parametrize(("name", "script", "kind"), BROKEN, ids=[b[0] for b in BROKEN])
def test_broken_answers(name: str, script: Any, kind: type[MistError]) -> None:
    """Each its class; the connection is not used again, the pool is."""

    @given([script], [OK])
    async def _(there: Server, pool: Pool) -> None:
        with pytest.raises(kind) as found:
            await half_and_ask(there, pool) if RESET in script and WAIT in script else await ask(there, pool)
        assert type(found.value) is kind
        assert there.requests == 1
        assert not pool._all
        assert await ask(there, pool) == (200, b"ok")


def test_at_the_limits_is_well() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n" + b"x: y\r\n" * (HEADERS_MAX - 1)
    last = b"\r\n\r\nok"
    large = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx: "
    large += b"x" * (HEAD_BYTES_MAX - len(large) - 4)

    @given(
        [
            [head + b"\r\nok"],
            [large, last],
            [b"HTTP/1.1 102 Processing\r\n\r\n" * INTERIM_MAX + OK],
            [CHUNKED + b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n"],
        ]
    )
    async def _(there: Server, pool: Pool) -> None:
        for _ in range(3):
            assert await ask(there, pool) == (200, b"ok")
        assert await ask(there, pool) == (200, b"x" * 50_000)
        assert there.connections == 1


def test_a_kept_connection_that_was_closed_is_no_answer() -> None:
    """The request goes out once more, on a new connection, where it may; never twice more, and never after a byte came."""

    @given([OK, [RESET]], [OK], [OK, [b"H"]], [OK])
    async def _(there: Server, pool: Pool) -> None:
        assert await ask(there, pool) == await ask(there, pool) == (200, b"ok")
        assert (there.connections, there.requests) == (2, 3)
        await asyncio.sleep(0.01)  # the second script ended: its connection is known to be gone
        assert not pool._all
        assert await ask(there, pool) == (200, b"ok")
        with pytest.raises(ProtocolError):
            await ask(there, pool)
        assert (there.connections, there.requests) == (3, 5)

    @given([OK, [RESET]], [[RESET]], [OK])
    async def _(there: Server, pool: Pool) -> None:
        assert await ask(there, pool) == (200, b"ok")
        with pytest.raises(Unavailable):
            await ask(there, pool)  # the new one is closed as well
        assert (there.connections, there.requests) == (2, 3)

    @given([OK, [RESET]], [OK])
    async def _(there: Server, pool: Pool) -> None:
        assert await ask(there, pool) == (200, b"ok")
        with pytest.raises(Unavailable):
            await ask(there, pool, repeatable=False)
        assert (there.connections, there.requests) == (1, 2)


def test_who_leaves_takes_the_connection_along() -> None:
    """Cancelled before the head, left in the middle, closed; what is under way when the pool closes ends."""

    @given([[WAIT]])
    async def _(there: Server, pool: Pool) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await ask(there, pool)
        assert not pool._all

    @given([[CHUNKED + b"2\r\nok\r\n", WAIT]], [[CHUNKED + b"2\r\nok\r\n", WAIT]], [[WAIT]])
    async def _(there: Server, pool: Pool) -> None:
        for leave in (Response.release, Response.close):
            answer = await pool.post(there.origin, HEAD, b"{}")
            assert await answer.read() == b"ok"
            leave(answer)
            leave(answer)
            assert not pool._all
        asking = asyncio.create_task(ask(there, pool))
        while there.requests < 3:
            await asyncio.sleep(0)
        await pool.aclose()
        with pytest.raises(Unavailable):
            await asking
        with pytest.raises(MistError):
            await ask(there, pool)

    @given([[OK, WAIT]], [OK])
    async def _(there: Server, pool: Pool) -> None:
        """Something is said to nobody: that connection is not asked."""
        assert await ask(there, pool) == (200, b"ok")
        (kept,) = pool._all
        kept._transport.write(b"x")  # the script goes on
        there.scripts[0].append(OK)
        kept.data_received(OK)
        assert not pool._all
        assert await ask(there, pool) == (200, b"ok")


def test_a_large_body_waits_for_its_reader() -> None:
    """No more is taken than AHEAD_BYTES_MAX and a read; it is all there in the end, and the connection is kept."""
    size = 8 * 1024 * 1024

    @given([[b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size, b"x" * size], OK])
    async def _(there: Server, pool: Pool) -> None:
        answer = await pool.post(there.origin, HEAD, b"{}")
        (connection,) = pool._all
        while not connection._paused:
            await asyncio.sleep(0)
        assert answer._size <= AHEAD_BYTES_MAX + 512 * 1024
        assert len(await whole(answer)) == size
        answer.release()
        assert await ask(there, pool) == (200, b"ok")
        assert there.connections == 1


def test_requests_wait_for_a_connection() -> None:
    """In line, and one who is cancelled there leaves his turn to the next; idle ones of others make room."""

    @given([OK] * 9, connections_max=1)
    async def _(there: Server, pool: Pool) -> None:
        first = await pool.post(there.origin, HEAD, b"{}")
        waiting = [asyncio.create_task(ask(there, pool)) for _ in range(4)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        first.release()
        assert await asyncio.gather(*waiting[1:]) == [(200, b"ok")] * 3
        assert (there.connections, len(pool._all)) == (1, 1)
        async with serving([OK]) as (other, _):
            assert await ask(other, pool) == (200, b"ok")

    @given([[RESET]], [OK], connections_max=1)
    async def _(there: Server, pool: Pool) -> None:
        """A connection that breaks makes room, too."""
        asked = await asyncio.gather(ask(there, pool), ask(there, pool), return_exceptions=True)
        assert {type(a) for a in asked} == {Unavailable, tuple}


def test_what_does_not_come_in_time() -> None:
    """A head, the next piece, a connection: the first two close theirs, who waited in line leaves the others in it."""

    def soon(seconds: float = 0.02) -> float:
        return asyncio.get_running_loop().time() + seconds

    @given([[WAIT]], [[CHUNKED + b"2\r\nok\r\n", WAIT]], [[WAIT, OK], OK], connections_max=1)
    async def _(there: Server, pool: Pool) -> None:
        with pytest.raises(TimedOut):
            await pool.post(there.origin, HEAD, b"{}", deadline_s=soon(0.2))
        assert not pool._all
        answer = await pool.post(there.origin, HEAD, b"{}", deadline_s=soon(30.0))
        assert await answer.read(0.0) == b"ok"  # it is there
        with pytest.raises(TimedOut):
            await answer.read(soon())
        assert not pool._all
        slow = asyncio.create_task(ask(there, pool))
        while there.requests < 3:
            await asyncio.sleep(0)
        with pytest.raises(TimedOut):
            await pool.post(there.origin, HEAD, b"{}", deadline_s=soon())
        (connection,) = pool._all
        connection._transport.write(b"x")  # the script goes on
        assert await slow == await ask(there, pool) == (200, b"ok")


def test_idle_connections_end() -> None:
    @given([OK, OK], [OK], keepalive_s=0.02)
    async def _(there: Server, pool: Pool) -> None:
        assert await ask(there, pool) == (200, b"ok")
        while pool._all:
            await asyncio.sleep(0.005)
        assert pool._sweep is None or not pool._idle
        assert await ask(there, pool) == (200, b"ok")
        assert there.connections == 2


def test_the_second_address_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that refuses costs nothing, one that leads nowhere a head start; families come by turns."""
    monkeypatch.setattr(http1_client, "NEXT_ADDRESS_S", 0.01)

    @given([OK] * 3)
    async def _(there: Server, pool: Pool) -> None:
        def address(host: str) -> Any:
            return (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, there.origin.port))

        async def found(*_args: Any, **_more: Any) -> Any:
            return [address("127.0.0.2"), address("127.0.0.1")]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", found)
        assert await ask(there, pool) == (200, b"ok")
        hanging = asyncio.Event()
        at = Pool._at

        async def slow(pool: Pool, origin: Origin, address: Any) -> Any:
            if address[4][0] == "127.0.0.2":
                await hanging.wait()
            return await at(pool, origin, address)

        monkeypatch.setattr(Pool, "_at", slow)
        other = Pool()
        assert await ask(there, other) == (200, b"ok")
        assert other._connecting == 0
        await other.aclose()

    v4, v6 = (socket.AF_INET, "a"), (socket.AF_INET6, "b")
    assert http1_client._by_turns([v6, v6, v4]) == [v6, v4, v6]


def test_who_is_not_there_is_not_available() -> None:
    async def main() -> None:
        pool = Pool(connect_timeout_s=0.05)
        with pytest.raises(Unavailable, match="Connect"):
            await pool.post(Origin("127.0.0.1", 9), HEAD, b"{}")
        with pytest.raises(Unavailable):
            await pool.post(Origin("a..b", 9), HEAD, b"{}")

        async def never(*_args: Any) -> Any:
            await asyncio.Event().wait()

        pool._resolved = never  # type: ignore[method-assign]
        with pytest.raises(Unavailable, match="no connection in time"):
            await pool.post(Origin("127.0.0.1", 9), HEAD, b"{}")
        assert pool._connecting == 0
        await pool.aclose()

    run(main())
