"""Any bytes as the answer to a request: the client (mist/kit/http1_client.py) makes the same of them however they are cut, ends in an
answer or in an error of ours, and gives the body that the standard library's client gives."""

from __future__ import annotations

import asyncio
import http.client
import io
import sys
from typing import Any

from mist.errors import MistError, ProtocolError, TooLarge, Unavailable
from mist.kit._http1_connection import Connection
from mist.kit.http1_client import Origin, Pool, Response
from tests.fuzz.driver import Target, main

HEAD = b"HTTP/1.1 200 OK\r\n"
SEEDS = [
    HEAD + b"content-length: 2\r\n\r\nok",
    HEAD + b"content-type: application/json\r\nContent-Length: 13\r\n\r\n{\"choices\":1}",
    HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;x=y\r\no\r\n0a\r\n0123456789\r\n0\r\nx: y\r\n\r\n",
    HEAD + b"\r\nto the end",
    b"HTTP/1.0 200 OK\r\n\r\nold",
    b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 1\r\n\r\nx",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + HEAD + b"content-length: 2\r\n\r\nok",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n0\r\n\r\n",
    b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 7\r\ncontent-length: 0\r\nx: a\r\nx: b\r\n\r\n",
    HEAD + b"connection: close\r\ncontent-length: 2\r\n\r\nok",
    HEAD + b"content-length: 2\r\n\r\nok" + HEAD + b"content-length: 2\r\n\r\nno",
]  # fmt: skip
WORDS = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"HTTP/1.1 ", b"HTTP/1.0 ", b" 200 OK", b"100", b"101", b"204", b"content-length: ",
    b"Content-Length: 0\r\n", b"transfer-encoding: chunked\r\n", b"transfer-encoding: gzip, chunked\r\n", b"upgrade: x\r\n",
    b"connection: close\r\n", b"connection: keep-alive\r\n", b"0\r\n\r\n", b"ffffffffffffffff\r\n", b"-1", b"+2", b"\x00", b"\xff", b":", b";",
]  # fmt: skip


class _Transport:
    def __init__(self) -> None:
        self.closed = False

    def write(self, _data: bytes) -> None:
        pass

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


_loop = asyncio.new_event_loop()
Outcome = tuple[Any, ...]


async def _answered(parts: list[bytes], reset: bool) -> Outcome:
    """What becomes of a request whose answer comes in these parts, and then the end."""
    pool = Pool()
    connection = Connection(pool, Origin("x", 1))
    transport: Any = _Transport()
    connection.connection_made(transport)
    pool._all.add(connection)
    asking = asyncio.ensure_future(connection.ask(b"", b""))
    await asyncio.sleep(0)
    for part in parts:
        if not transport.closed:
            connection.data_received(part)
    quiet = not transport.closed
    if quiet and connection._answer is not None and not connection._answer.complete:
        transport.abort()
        connection.connection_lost(ConnectionResetError("x") if reset else None)
    try:
        answer = await asking
        body = await _read(answer)
    except MistError as exc:
        assert isinstance(exc, Unavailable | ProtocolError | TooLarge), "an error of the list"
        assert transport.closed, "a broken connection is closed"
        return (type(exc).__name__,)
    assert 200 <= answer.status < 1000, "an answer is no interim one"
    answer.release()
    kept = connection in pool._all
    assert kept != transport.closed, "kept or closed"
    await pool.aclose()
    return answer.status, tuple(answer.headers.items()), body, kept


async def _read(answer: Response) -> bytes:
    body = b""
    while part := await answer.read():
        body += part
    assert answer.complete, "nothing more comes after the end"
    return body


class _Socket:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def _by_the_library(data: bytes) -> bytes | None:
    found = http.client.HTTPResponse(_Socket(data), method="POST")  # type: ignore[arg-type]
    try:
        found.begin()
        return found.read()
    except (http.client.HTTPException, ValueError):
        return None


def check(data: bytes) -> bool:
    def come(parts: list[bytes], *, reset: bool = False) -> Outcome:
        return _loop.run_until_complete(_answered(parts, reset))

    whole = come([data] if data else [])
    bytewise = come([data[n : n + 1] for n in range(len(data))])
    assert whole == bytewise, "the same however it is cut"
    if whole[-1] is not True:
        broken = come([data] if data else [], reset=True)
        assert broken in (whole, ("ProtocolError",)), "a reset is no end of an answer"
    if len(whole) == 1:
        return False
    # of a 204 and a 304 that say chunked the library reads chunks; they end with their head (RFC 9112, 6.3)
    if whole[0] not in (204, 304) and not data.startswith(b"HTTP/1.1 1"):
        theirs = _by_the_library(data)
        assert theirs is None or theirs == whole[2], "the body that others read"
    return True


TARGET = Target("http_answer", SEEDS, WORDS, check)

if __name__ == "__main__":
    sys.exit(main(["http_answer"]))
