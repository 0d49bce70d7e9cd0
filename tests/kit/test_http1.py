"""Our HTTP/1.1 protocol, byte by byte: framing, order, limits, slow and rude clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from conftest import run

from mist.errors import TooLarge
from mist.kit.http1 import Door, Exchange, Http1, HttpLimits, Respond
from mist.kit.server import AppServer

HOST = b"host: x\r\n"


class Echo(Door):
    """Answers with the method and the body. `hold` keeps answers until `go`."""

    def __init__(self) -> None:
        self.inside = 0
        self.hold = False
        self.held: list[Callable[[], None]] = []
        self.size_max = 1000

    def begin(self, method: bytes, headers: list[tuple[bytes, bytes]]) -> Exchange:
        stated = int(dict(headers).get(b"content-length", b"0"))
        if stated > self.size_max:
            raise TooLarge("body", size_bytes=stated, size_bytes_max=self.size_max)
        self.inside += 1
        return _Echo(self, method)

    def refusal(self, error: Exception, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes, Any]:
        return (413 if isinstance(error, TooLarge) else 500), str(error).encode(), []


class _Echo(Exchange):
    def __init__(self, door: Echo, method: bytes) -> None:
        self.door = door
        self.body = method + b" "
        self.gone = False

    def feed(self, data: bytes) -> None:
        self.body += data
        if len(self.body) > self.door.size_max + 10:
            raise TooLarge("body", size_bytes=len(self.body), size_bytes_max=self.door.size_max)

    def end(self, respond: Respond) -> bytes | None:
        if self.body.endswith(b"for the app"):
            return self.body
        if self.door.hold:
            self.door.held.append(lambda: respond(200, self.body, []))
        else:
            respond(200, self.body, [])
        return None

    def left(self) -> None:
        assert not self.gone
        self.gone = True
        self.door.inside -= 1


class App:
    """`/door` is a door; `/app` answers what it gets; other paths do what they are named after."""

    def __init__(self) -> None:
        self.door = Echo()
        self.heard: list[str] = []
        self.sizes: list[int] = []
        self.go = asyncio.Event()

    def direct(self, path: str) -> Door | None:
        return self.door if path == "/door" else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.heard.append(f"{scope['method']} {path}?{scope['query_string'].decode()}")
        if path == "/slow":
            await self.go.wait()
        if path == "/unread":
            await _answer(send, b"no, thank you")
            return
        if path == "/bug":
            raise ZeroDivisionError("a bug")
        if path == "/half":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
            await send({"type": "http.response.body", "body": b"12345", "more_body": True})
            raise ZeroDivisionError("a bug")
        if path == "/evil":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"a\r\nb: c")]})
        if path == "/wait":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.heard.append("gone")
            return
        if path == "/flood":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for n in range(1000):
                await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": n < 999})
                self.sizes.append(n)
            return
        body, more = b"", True
        while more:
            event = await receive()
            if event["type"] == "http.disconnect":
                self.heard.append("gone")
                return
            body += event["body"]
            self.sizes.append(len(event["body"]))
            more = event["more_body"]
            if path == "/sip":
                await self.go.wait()
        if path == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for part in (b"one", b"", b"two"):
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        else:
            await _answer(send, b"app " + body)


async def _answer(send: Any, body: bytes) -> None:
    headers = [(b"Content-Length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch | None = None, **limits: Any) -> Any:
    """An app behind the protocol, and a function that connects to it."""
    app = App()
    if monkeypatch is not None:
        monkeypatch.setattr(Http1, "limits", HttpLimits(**limits))
    async with AppServer(app) as running:
        port = int(running.url.rpartition(":")[2])
        writers = []

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            return reader, writer

        try:
            yield app, connect
        finally:
            app.go.set()
            for writer in writers:
                writer.close()


async def answer(reader: asyncio.StreamReader, *, head: bool = False) -> tuple[int, dict[str, str], bytes]:
    """One answer, its body unframed."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    status = int(lines[0].split()[1])
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    body = b""
    if head or status == 100:
        return status, headers, b""
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body = await reader.read()
    return status, headers, body


def post(path: str, body: bytes, more: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\n%s%scontent-length: %d\r\n\r\n%s" % (path.encode(), HOST, more, len(body), body)


def test_a_door_gives_a_request_to_the_app() -> None:
    """With its whole body and query, in its place among pipelined ones; the connection goes on."""

    async def body() -> None:
        async with serving() as (app, connect):
            reader, writer = await connect()
            given = b"POST /door?a=1 HTTP/1.1\r\n" + HOST + b"content-length: 11\r\n\r\nfor the app"
            plain = b"POST /door HTTP/1.1\r\n" + HOST + b"content-length: 2\r\n\r\nhi"
            app.door.hold = True
            writer.write(plain + given)
            while not app.door.held:
                await asyncio.sleep(0)
            app.door.hold = False
            app.door.held.pop()()
            writer.write(plain)
            answers = b""
            while answers.count(b"POST ") < 3:
                answers += await reader.read(65536)
            assert [a.rpartition(b"\r\n\r\n")[2] for a in answers.split(b"HTTP/1.1 200 OK")[1:]] == [
                b"POST hi", b"app POST for the app", b"POST hi",
            ]  # fmt: skip
            assert app.heard == ["POST /door?a=1"]
            assert app.door.inside == 0

    run(body())


def test_keep_alive_and_pipelining_in_order() -> None:
    """Doors and apps mixed in one write, answered in order on one connection, also where an early one takes longest."""

    async def case() -> None:
        async with serving() as (app, connect):
            reader, writer = await connect()
            app.door.hold = True
            writer.write(post("/door", b"1") + post("/app?a=b", b"2") + post("/door", b"3") + post("/slow", b"4"))
            while len(app.door.held) < 2:
                await asyncio.sleep(0.001)
            for release in reversed(app.door.held):
                release()
            app.go.set()
            assert [(await answer(reader))[2] for _ in range(4)] == [b"POST 1", b"app 2", b"POST 3", b"app 4"]
            app.door.hold = False
            writer.write(b"GET /door HTTP/1.1\r\n%s\r\n" % HOST)
            assert (await answer(reader))[2] == b"GET "
            assert app.heard == ["POST /app?a=b", "POST /slow?"]
            assert app.door.inside == 0

    run(case())


CHUNKED = (
    b"POST /%s HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n2\r\nab\r\n3;x=y\r\ncde\r\n0\r\nt: r\r\n\r\n"
)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 50, 1000])
def test_bytes_may_be_cut_anywhere(step: int) -> None:
    """Requests in pieces of any size, chunked ones with extensions and trailers too, give the same answers."""

    async def case() -> None:
        async with serving() as (_, connect):
            reader, writer = await connect()
            data = post("/door", b"hello") + CHUNKED % b"door" + CHUNKED % b"app" + post("/app", b"bye")
            for at in range(0, len(data), step):
                writer.write(data[at : at + step])
                await writer.drain()
                await asyncio.sleep(0)
            got = [(await answer(reader))[2] for _ in range(4)]
            assert got == [b"POST hello", b"POST abcde", b"app abcde", b"app bye"]

    run(case())


def test_answers_of_apps() -> None:
    """Chunked where the length is not stated, without a body to HEAD, to the end of the connection in HTTP/1.0."""

    async def case() -> None:
        async with serving() as (app, connect):
            reader, writer = await connect()
            writer.write(b"GET /stream HTTP/1.1\r\n%s\r\n" % HOST)
            status, headers, body = await answer(reader)
            assert (status, headers["transfer-encoding"], body) == (200, "chunked", b"onetwo")
            assert "date" in headers
            writer.write(b"HEAD /app HTTP/1.1\r\n%s\r\n" % HOST)
            _, headers, _ = await answer(reader, head=True)
            assert headers["content-length"] == "4"
            writer.write(b"GET /app HTTP/1.1\r\n%sconnection: close\r\n\r\n" % HOST)
            _, headers, body = await answer(reader)
            assert (headers["connection"], body, await reader.read()) == ("close", b"app ", b"")
            reader, writer = await connect()
            writer.write(b"GET /stream HTTP/1.0\r\n\r\n")
            _, headers, body = await answer(reader)
            assert "transfer-encoding" not in headers
            assert body == b"onetwo"
            reader, writer = await connect()
            writer.write(b"GET http://proxy.example/app%20x?q=%31 HTTP/1.1\r\n" + HOST + b"\r\n")
            assert (await answer(reader))[0] == 200
            assert app.heard[-1] == "GET /app x?q=%31"

    run(case())


def test_expect_continue() -> None:
    """The word is said when the body is wanted, by door and app; a refused request hears the refusal instead."""

    async def case() -> None:
        async with serving() as (_, connect):
            expect = b"expect: 100-continue\r\n"
            for path, said in (("/door", b"POST abc"), ("/app", b"app abc")):
                reader, writer = await connect()
                writer.write(post(path, b"abc", expect)[:-3])
                assert (await answer(reader))[0] == 100
                writer.write(b"abc")
                assert (await answer(reader))[2] == said
            reader, writer = await connect()
            writer.write(b"POST /door HTTP/1.1\r\n%s%scontent-length: 5000\r\n\r\n" % (HOST, expect))
            status, headers, _ = await answer(reader)
            assert (status, headers["connection"]) == (413, "close")
            reader, writer = await connect()
            writer.write(b"POST /unread HTTP/1.1\r\n%s%scontent-length: 5000\r\n\r\n" % (HOST, expect))
            assert (await answer(reader))[2] == b"no, thank you"

    run(case())


def test_a_refused_sender_that_goes_on_gets_its_answer() -> None:
    """413 before the body is through: whoever still sends reads the answer, not a reset connection."""

    async def case() -> None:
        async with serving() as (app, connect):
            for path, status in (("/door", 413), ("/unread", 200)):
                reader, writer = await connect()
                writer.write(b"POST %s HTTP/1.1\r\n%stransfer-encoding: chunked\r\n\r\n" % (path.encode(), HOST))
                for _ in range(50):
                    writer.write(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
                    await asyncio.sleep(0)
                got, headers, _ = await answer(reader)
                assert (got, headers["connection"]) == (status, "close")
                assert await reader.read() == b""
            assert app.door.inside == 0

    run(case())


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET /door HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /door HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabc",
        b"POST /door HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /door HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /door HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /app HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunkedd\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_http(data: bytes) -> None:
    """400 and the end of the connection; two lengths, or a length beside chunks, are how requests are smuggled."""

    async def case() -> None:
        async with serving() as (app, connect):
            reader, writer = await connect()
            writer.write(data + post("/door", b"smuggled"))
            got = await reader.read()
            assert got.startswith(b"HTTP/1.1 400 ")
            assert got.count(b"HTTP/1.1") == 1
            assert b"smuggled" not in got
            assert app.door.inside == 0

    run(case())


def test_limits_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """431 for too many headers, too many bytes, a header or trailer that does not end; at the limit it is served."""

    async def case() -> None:
        async with serving(monkeypatch, head_bytes_max=2000, headers_max=10) as (app, connect):
            for data, status in (
                (post("/door", b"", b"a: b\r\n" * 8), 200),
                (post("/door", b"", b"a: b\r\n" * 20), 431),
                (post("/door", b"", b"a: " + b"b" * 1900 + b"\r\n"), 200),
                (post("/door", b"", b"a: " + b"b" * 2100 + b"\r\n"), 431),
                (b"GET /" + b"x" * 5000, 431),
                (b"GET / HTTP/1.1\r\na: " + b"b" * 5000, 431),
                (CHUNKED[:-4] % b"door" + b"b" * 5000, 431),
                (b"POST /door HTTP/1.1\r\n%stransfer-encoding: chunked\r\n\r\n1;" % HOST + b"x" * 5000, 431),
            ):
                reader, writer = await connect()
                for at in range(0, len(data), 500):
                    writer.write(data[at : at + 500])
                    await asyncio.sleep(0.001)
                assert (await answer(reader))[0] == status, data[:60]
            assert app.door.inside == 0

    run(case())


def test_slow_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that trickles is 408, a body that stalls before a door too; a silent connection is closed without a word."""

    async def case() -> None:
        async with serving(monkeypatch, head_s_max=0.1) as (app, connect):
            app.door.body_s_max = 0.1
            reader, writer = await connect()
            assert await reader.read() == b""
            reader, writer = await connect()
            trickling = asyncio.create_task(_trickle(writer, b"GET /door HTTP/1.1\r\n" + b"a: b\r\n" * 50))
            assert (await answer(reader))[0] == 408
            assert await reader.read() == b""
            trickling.cancel()
            reader, writer = await connect()
            writer.write(post("/door", b"abc")[:-1])
            status, headers, _ = await answer(reader)
            assert (status, headers["connection"]) == (408, "close")
            assert app.door.inside == 0
            reader, writer = await connect()
            writer.write(post("/door", b"abc") + b"GET /d")  # a slow head behind a whole request
            assert [(await answer(reader))[0] for _ in range(2)] == [200, 408]

    run(case())


async def _trickle(writer: asyncio.StreamWriter, data: bytes) -> None:
    for at in range(len(data)):
        writer.write(data[at : at + 1])
        await asyncio.sleep(0.005)


def test_clients_that_leave() -> None:
    """In the middle of a body, or while they are waited for: the door's place is free again, the app hears of it."""

    async def case() -> None:
        async with serving() as (app, connect):
            for data in (post("/door", b"abc")[:-1], post("/app", b"abc")[:-1], post("/wait", b"")):
                _, writer = await connect()
                writer.write(data)
                await asyncio.sleep(0.05)
                writer.close()
            app.door.hold = True
            _, writer = await connect()
            writer.write(post("/door", b"abc"))
            while not app.door.held:
                await asyncio.sleep(0.001)
            writer.close()
            while app.door.inside or app.heard.count("gone") < 2:
                await asyncio.sleep(0.001)
            app.door.held[0]()  # nobody is there to be told

    run(case())


def test_apps_that_fail(caplog: pytest.LogCaptureFixture) -> None:
    """500 before the answer began, the end of the connection in its middle; a header with a line break is never sent."""

    async def case() -> None:
        async with serving() as (_, connect):
            for path, status in (("/bug", 500), ("/evil", 500)):
                reader, writer = await connect()
                writer.write(post(path, b""))
                got, headers, _ = await answer(reader)
                assert (got, "b" in headers) == (status, False)
            reader, writer = await connect()
            writer.write(post("/half", b""))
            with pytest.raises(asyncio.IncompleteReadError):
                await answer(reader)
            reader, writer = await connect()
            writer.write(b"GET /app HTTP/1.1\r\n%sconnection: upgrade\r\nupgrade: websocket\r\n\r\nframes" % HOST)
            assert (await answer(reader))[2] == b"app "
            assert await reader.read() == b""

    run(case())
    assert "a bug" in caplog.text


def test_bodies_and_answers_are_not_hoarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app that does not read stops its sender; a client that does not read stops the app, and is cut off in the end."""

    async def case() -> None:
        async with serving(monkeypatch, write_s_max=1.0) as (app, connect):
            reader, writer = await connect()
            size = 20_000_000
            writer.write(b"POST /sip HTTP/1.1\r\n%scontent-length: %d\r\n\r\n" % (HOST, size))
            writer.write(b"x" * size)
            await asyncio.sleep(0.2)
            assert sum(app.sizes) < 1_000_000
            app.go.set()
            assert len((await answer(reader))[2]) == size + 4
            app.sizes.clear()
            reader, writer = await connect()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(b"GET /flood HTTP/1.1\r\n%s\r\n" % HOST)
            before = -1
            while not app.sizes or len(app.sizes) > before:
                before = len(app.sizes)
                await asyncio.sleep(0.05)
            assert before < 900
            while len(app.sizes) < 1000:  # cut off: what the app still sends goes nowhere
                await asyncio.sleep(0.05)
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await answer(reader)

    run(case(), 60)


def test_pipelines_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """More requests than may wait in one connection: reading pauses, and goes on when some are answered."""

    async def case() -> None:
        async with serving(monkeypatch, pipeline_max=4) as (app, connect):
            app.door.hold = True
            reader, writer = await connect()
            for n in range(40):
                writer.write(post("/door", b"%d" % n))
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            assert len(app.door.held) < 40
            for n in range(40):
                while not app.door.held:
                    await asyncio.sleep(0.001)
                app.door.held.pop(0)()
                assert (await answer(reader))[2] == b"POST %d" % n

    run(case())
