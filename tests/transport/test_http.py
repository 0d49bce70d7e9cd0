"""`http:` beyond the suite: the server's refusals byte by byte, the client's reading of answers."""

from __future__ import annotations

import asyncio
import gzip
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import msgspec
import pytest
from conftest import run

from mist import StreamConfig, connect
from mist.errors import (
    Ambiguous,
    Closed,
    InvalidArgument,
    Malformed,
    MissingField,
    MistError,
    NotFound,
    Overloaded,
    RateLimited,
    StorageFull,
    TimedOut,
    TooLarge,
    TransportError,
    Unavailable,
    Unsupported,
)
from mist.kit.server import AppServer, _listen, parse_address
from mist.protocol import codec
from mist.protocol.envelope import Envelope
from mist.testing.transports import envelope
from mist.transport import dial, serve
from mist.transport._status import CLASSES, error_for, make_error, retry_after
from mist.transport.server import HttpServer, Limits, ingest

NDJSON = {"content-type": "application/x-ndjson"}
JSON = {"content-type": "application/json"}


def lines(*envelopes: Envelope) -> bytes:
    return codec.encode_lines(envelopes)


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """How `post` reaches the app."""
    _way.append(request.param)
    yield
    _way.pop()


every_way = pytest.mark.parametrize("way", ["asgi", "http1", "uvicorn"], indirect=True)
"""Directly, by our own protocol, by uvicorn's: all have to say the same."""

_way = ["asgi"]


async def post(
    app: Any, body: Any, headers: dict[str, str], path: str = "/mist", method: str = "POST"
) -> httpx.Response:
    """One request to the app."""
    if _way[-1] == "asgi":
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return await client.request(method, path, content=body, headers=headers)
    http: Any = "auto" if _way[-1] == "http1" else "httptools"
    async with AppServer(app, http=http) as running, httpx.AsyncClient(base_url=running.url) as client:
        return await client.request(method, path, content=body, headers=headers)


class Taken:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []

    async def __call__(self, envelopes: list[Envelope]) -> list[int]:
        start = len(self.envelopes)
        self.envelopes += envelopes
        return list(range(start + 1, len(self.envelopes) + 1))


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = answer.json()
    assert body["code"] == code
    assert body["message"]
    assert set(body) <= {"code", "message", "meta", "cause"}
    return body


# what is accepted


@every_way
def test_single_envelope_has_an_empty_answer(way: None) -> None:
    """One document: 202 with an empty body, as the Go library's, whatever the content type; its sequence in a header."""

    async def case() -> None:
        sink = Taken()
        app = ingest(sink)
        for headers in (JSON, {"content-type": "application/json; charset=utf-8"}, {}):
            answer = await post(app, codec.encode(envelope(1)), headers)
            assert (answer.status_code, answer.content) == (202, b"")
        assert answer.headers["mist-sequence"] == "3"
        pretty = msgspec.json.format(codec.encode(envelope(payload={"a": [1, 2]})))
        assert (await post(app, pretty, JSON)).status_code == 202
        assert sink.envelopes[-1].data() == {"a": [1, 2]}

    run(case())


@every_way
def test_batches_say_how_many(way: None) -> None:
    """NDJSON and arrays are answered with the count and the sequences; an empty batch is accepted and stored nowhere."""

    async def case() -> None:
        sink = Taken()
        app = ingest(sink)
        answer = await post(app, lines(*[envelope(i) for i in range(5)]), NDJSON)
        assert (answer.status_code, answer.json()) == (202, {"accepted": 5, "first": 1, "last": 5})
        array = b" [%s, %s]" % (codec.encode(envelope(5)), codec.encode(envelope(6)))
        assert (await post(app, array, JSON)).json() == {"accepted": 2, "first": 6, "last": 7}
        unfinished = lines(envelope(7), envelope(8))[:-1]
        assert (await post(app, unfinished, NDJSON)).json()["accepted"] == 2
        assert (await post(app, b"\n\n", NDJSON)).json() == {"accepted": 0}
        assert (await post(app, b"[]", JSON)).json() == {"accepted": 0}
        assert [e.data()["n"] for e in sink.envelopes] == list(range(9))

    run(case())


@every_way
def test_stream_sink_stores_before_the_answer(way: None) -> None:
    """Over a stream, what was answered 202 is in it: subject = type, id = envelope id, stored once when repeated."""

    async def case() -> None:
        async with connect("memory:") as broker:
            stream = await broker.open("s")
            app = ingest(stream)
            one = envelope(1, type="eval.result")
            for _ in range(2):
                assert (await post(app, codec.encode(one), JSON)).headers["mist-sequence"] == "1"
            record = (await stream.read()).records[0]
            assert (record.subject, record.id, record.data) == ("eval.result", one.id, codec.encode(one))
            assert (await stream.info()).last == 1

    run(case())


@every_way
def test_gzip_bodies(way: None) -> None:
    """gzip is read, in several members too; other encodings are 415."""

    async def case() -> None:
        sink = Taken()
        app = ingest(sink)
        body = gzip.compress(lines(envelope(0))) + gzip.compress(lines(envelope(1)))
        assert (await post(app, body, {**NDJSON, "content-encoding": "gzip"})).json()["accepted"] == 2
        refused(await post(app, body[:-9], {**NDJSON, "content-encoding": "gzip"}), 400, "malformed")
        refused(await post(app, b"plain", {**NDJSON, "content-encoding": "gzip"}), 400, "malformed")
        refused(await post(app, b"x", {**NDJSON, "content-encoding": "br"}), 415, "validation")
        assert len(sink.envelopes) == 2

    run(case())


# what is refused


@every_way
def test_bad_lines_are_named_and_nothing_is_stored(way: None) -> None:
    """One bad line refuses the whole request, with its number."""

    async def case() -> None:
        sink = Taken()
        app = ingest(sink)
        body = lines(envelope(0)) + b"\n" + b'{"version":"1","id":"","source":"s","type":"t"}\n' + lines(envelope(1))
        said = refused(await post(app, body, NDJSON), 400, "missing_field")
        assert said["meta"]["line"] == "3"
        assert said["message"].startswith("line 3: ")
        array = b"[%s, 7]" % codec.encode(envelope(0))
        assert refused(await post(app, array, JSON), 400, "malformed")["meta"]["item"] == "2"
        for bad, code in (
            (b"", "malformed"), (b"[1", "malformed"), (b"null", "malformed"),
            (codec.encode(envelope(payload=msgspec.Raw(b"[" * 80 + b"]" * 80))), "too_deep"),
            (codec.encode(envelope())[:-1] + b',"checksum":1}', "checksum_mismatch"),
        ):  # fmt: skip
            refused(await post(app, bad, JSON), 400, code)
        refused(await post(app, lines(envelope(0), envelope(1)), JSON), 400, "malformed")
        assert sink.envelopes == []

    run(case())


@every_way
def test_paths_and_methods(way: None) -> None:
    """Other methods are 405 with Allow, other paths 404, the trailing slash too."""

    async def case() -> None:
        app = ingest(Taken())
        for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH"):
            answer = await post(app, b"", {}, method=method)
            refused(answer, 405, "validation")
            assert answer.headers["allow"] == "POST"
        for path in ("/", "/mist/", "/other"):
            refused(await post(app, b"", {}, path=path), 404, "not_found")

    run(case())


@every_way
def test_size_limits(way: None) -> None:
    """413 for an envelope, a body, a count, an inflated body and a ratio above their limits; each at its limit passes."""

    async def case() -> None:
        one = codec.encode(envelope(0))
        size = len(one)
        at = ingest(Taken(), limits=Limits(size_bytes_max=size, body_bytes_max=3 * (size + 1), envelopes_max=3))
        assert (await post(at, one, JSON)).status_code == 202
        refused(await post(at, one + b" ", JSON), 413, "too_large")
        assert (await post(at, (one + b"\n") * 3, NDJSON)).status_code == 202
        refused(await post(at, (one + b"\n") * 3 + b"\n", NDJSON), 413, "too_large")

        async def chunks() -> Any:
            for _ in range(5):
                yield one + b"\n"

        refused(await post(at, chunks(), NDJSON), 413, "too_large")  # no content-length to go by
        count = ingest(Taken(), limits=Limits(envelopes_max=3))
        refused(await post(count, (one + b"\n") * 5, NDJSON), 413, "too_large")
        refused(await post(count, b"[" + b",".join([one] * 4) + b"]", JSON), 413, "too_large")
        packed = {**NDJSON, "content-encoding": "gzip"}
        refused(await post(at, gzip.compress((one + b"\n") * 4), packed), 413, "too_large")
        bomb = gzip.compress(b"\n" * 20_000_000)
        refused(await post(ingest(Taken()), bomb, packed), 413, "too_large")

    run(case())


def test_stated_length_is_refused_unread() -> None:
    """A body that says it is too large is refused before any of it is read."""

    async def case() -> None:
        said: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("the body was read")

        async def send(event: Any) -> None:
            said.append(event)

        scope = {
            "type": "http", "path": "/mist", "method": "POST",
            "headers": [(b"content-length", b"99999999"), (b"content-type", b"application/x-ndjson")],
        }  # fmt: skip
        await ingest(Taken())(scope, receive, send)
        assert said[0]["status"] == 413

    run(case())


class Held:
    """A sink that waits until it may go on."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.entered = 0

    async def __call__(self, envelopes: list[Envelope]) -> None:
        self.entered += 1
        await self.go.wait()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


@every_way
def test_too_many_requests_and_bytes(way: None) -> None:
    """Above the number of requests or bytes under way: 503 with Retry-After; as soon as there is room, 202."""

    async def case(limits: Limits, held_requests: int) -> None:
        sink = Held()
        app = ingest(sink, limits=limits)
        body = codec.encode(envelope(payload="x" * 1000))
        waiting = [asyncio.create_task(post(app, body, JSON)) for _ in range(held_requests)]
        await until(lambda: sink.entered == held_requests)
        answer = await post(app, body, JSON)
        refused(answer, 503, "overloaded")
        assert answer.headers["retry-after"] == "2"
        sink.go.set()
        assert [(await w).status_code for w in waiting] == [202] * held_requests
        assert (await post(app, body, JSON)).status_code == 202

    run(case(Limits(inflight_requests_max=2, retry_after_s=2), 2))
    run(case(Limits(inflight_bytes_max=2500, retry_after_s=2), 2))


def test_slow_body() -> None:
    """A body that does not come is 408, and its place is free again."""

    async def case() -> None:
        async def never() -> Any:
            yield b"{"
            await asyncio.sleep(30)

        app = ingest(Taken(), limits=Limits(read_timeout_s=0.02, inflight_requests_max=1))
        refused(await post(app, never(), JSON), 408, "timeout")
        assert (await post(app, codec.encode(envelope()), JSON)).status_code == 202

    run(case())


def test_disconnected_sender_stores_nothing() -> None:
    """A sender that leaves before its body is complete stores nothing and is told nothing."""

    async def case() -> None:
        sink = Taken()
        events = [{"type": "http.request", "body": lines(envelope()), "more_body": True}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return events.pop(0)

        async def send(event: Any) -> None:
            raise AssertionError("nobody is there")

        await ingest(sink)({"type": "http", "path": "/mist", "method": "POST", "headers": []}, receive, send)
        assert sink.envelopes == []

    run(case())


@every_way
def test_sink_errors_become_answers(caplog: pytest.LogCaptureFixture, way: None) -> None:
    """A full or closed sink is 503 with Retry-After, other errors of ours their status, foreign ones 500 and logged."""

    async def case() -> None:
        async with connect("memory:") as broker:
            stream = await broker.open("s", config=StreamConfig(records_max=1, full="refuse"))
            app = ingest(stream)
            assert (await post(app, codec.encode(envelope()), JSON)).status_code == 202
            answer = await post(app, codec.encode(envelope()), JSON)
            refused(answer, 503, "storage_full")
            assert answer.headers["retry-after"] == "1"
        refused(await post(app, codec.encode(envelope()), JSON), 503, "closed")

        def failing(error: Exception) -> Callable[[list[Envelope]], Awaitable[None]]:
            async def sink(_: list[Envelope]) -> None:
                raise error

            return sink

        slow = await post(ingest(failing(RateLimited("slow down", retry_after_s=7))), codec.encode(envelope()), JSON)
        refused(slow, 429, "rate_limit")
        assert slow.headers["retry-after"] == "7"
        said = refused(
            await post(ingest(failing(ValueError("secret"))), codec.encode(envelope()), JSON), 500, "internal"
        )
        assert "secret" not in said["message"]

    run(case())
    assert "secret" in caplog.text


def test_lifespan() -> None:
    """Servers that speak the lifespan protocol get their answers."""

    async def case() -> None:
        events = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
        said: list[str] = []

        async def receive() -> Any:
            return events.pop(0)

        async def send(event: Any) -> None:
            said.append(event["type"])

        await ingest(Taken())({"type": "lifespan"}, receive, send)
        assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]

    run(case())


@every_way
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"version":"99","id":"1","source":"s","type":"t","timestamp_ns":1,"payload":null}', "version_unsupported"),
        (b'{"version":"1","source":"s","type":"t","timestamp_ns":1,"payload":null}', "missing_field"),
        (b'{"version":"1","id":"","source":"s","type":"t","timestamp_ns":1,"payload":null}', "missing_field"),
        (b'{"version":"1","id":"1","source":"s","type":"t","timestamp_ns":1,"payload":1,"checksum":7}', "checksum_mismatch"),
        (b'{"version":"1","id":"1","source":"s","type":"t","timestamp_ns":1,"payload":1} garbage', "malformed"),
        (b'{"version":"1","id":"1","source":"s","type":"t","timestamp_ns":1,"payload":[1e999]}', "not_finite"),
    ],
)  # fmt: skip
def test_what_the_seed_lets_in(way: None, body: bytes, code: str) -> None:
    """Each of these is 202 at the seed's doors. Here it is 400 with its code, and nothing is stored."""

    async def case() -> None:
        sink = Taken()
        said = refused(await post(ingest(sink), body, JSON), 400, code)
        assert all(value is not None for value in said.values())
        assert sink.envelopes == []

    run(case())


@every_way
def test_errors_in_plain_text(way: None) -> None:
    """Who accepts text and not JSON gets the sentence, as from the seed; with the same status and headers."""

    async def case() -> None:
        app = ingest(Taken())
        for accept in ("text/plain", "text/plain;q=0.9, text/html"):
            answer = await post(app, b"bad", {**JSON, "accept": accept})
            assert (answer.status_code, answer.headers["content-type"]) == (400, "text/plain; charset=utf-8")
            assert answer.text.startswith("envelope: ")
        refused(await post(app, b"bad", {**JSON, "accept": "application/json, text/plain"}), 400, "malformed")
        answer = await post(app, b"", {"accept": "text/plain"}, method="GET")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")

    run(case())


def test_concurrent_posts_share_appends() -> None:
    """Many posts at once into a log: fewer appends than posts, each post told its own sequence, each envelope stored once;
    one whose type makes no subject is refused alone."""

    async def case(place: str) -> None:
        async with connect(f"log:{place}") as broker:
            stream = await broker.open("s")
            appends: list[int] = []
            append = stream.append

            async def counted(messages: Any, **kw: Any) -> list[int]:
                appends.append(len(messages))
                return await append(messages, **kw)

            stream.append = counted  # type: ignore[method-assign]
            async with serve(stream) as door, httpx.AsyncClient() as client:
                bad = envelope(99, type="t" * 300)
                sent = [*[envelope(n) for n in range(40)], bad]
                answers = await asyncio.gather(*[client.post(door.url, content=codec.encode(e)) for e in sent])
            refused(answers.pop(), 400, "validation")
            sequences = [int(a.headers["mist-sequence"]) for a in answers]
            assert sorted(sequences) == list(range(1, 41))
            records = {r.sequence: r.id for r in (await stream.read()).records}
            assert [records[s] for s in sequences] == [e.id for e in sent[:-1]]
            assert len(appends) < 41

    with tempfile.TemporaryDirectory() as place:
        run(case(place))


# the server as a process part


def test_close_finishes_requests_under_way() -> None:
    """A request under way when the server closes is answered; later connections are refused."""

    async def case() -> None:
        sink = Held()
        server = serve(sink)
        await server.start()
        async with dial(server.url) as t:
            sending = asyncio.create_task(t.send(envelope()))
            await until(lambda: sink.entered == 1)
            closing = asyncio.create_task(server.close())
            await asyncio.sleep(0.15)
            assert not closing.done()
            sink.go.set()
            await sending
            await closing
            await server.close()
            with pytest.raises((Unavailable, Ambiguous)):
                await t.send(envelope())
        with pytest.raises(Closed):
            await server.start()

    run(case())


def test_address_in_use() -> None:
    """A taken port is a sentence; so are addresses that are none."""

    async def case() -> None:
        async with serve(Taken()) as server:
            port = int(server.url.split(":")[2].split("/")[0])
            with pytest.raises(TransportError, match="cannot listen"):
                await HttpServer(Taken(), port=port).start()

    run(case())
    assert parse_address(":80") == ("127.0.0.1", 80)
    assert parse_address("[::1]:80") == ("::1", 80)
    for bad in ("host", "host:", "host:x", "host:99999"):
        with pytest.raises(InvalidArgument):
            parse_address(bad)


# the client


def client(handler: Callable[[httpx.Request], httpx.Response]) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(handler))


@asynccontextmanager
async def dialled(url: str, handler: Callable[[httpx.Request], httpx.Response]) -> Any:
    async with client(handler) as c, dial(url, client=c) as t:
        yield t


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://h", "http://h/mist"),
        ("http://h/", "http://h/mist"),
        ("http://h:81/infer", "http://h:81/infer"),
        ("https://h/a/b?x=1&batch=0&y=a%20b&timeout_s=3", "https://h/a/b?x=1&y=a%20b"),
        ("http://[::1]:5", "http://[::1]:5/mist"),
    ],
)
def test_target(url: str, target: str) -> None:
    """A URL without a path means /mist; parameters that are not ours are the target's."""
    seen: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(202)

    async def case() -> None:
        async with dialled(url, handler) as t:
            await t.send(envelope())

    run(case())
    assert seen == [target]


def test_request_form() -> None:
    """One envelope is plain JSON, with its traceparent as a header; several are NDJSON; batch=0 sends each alone."""
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(202)

    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def case() -> None:
        sent = [envelope(i) for i in range(3)]
        async with dialled("http://h", handler) as t:
            await t.send(envelope(9, traceparent=trace))
            await t.send_many(sent)
            await t.send_many(sent[:1])
        async with dialled("http://h?batch=0", handler) as t:
            await t.send_many(sent)
        assert seen[0].headers["content-type"] == "application/json"
        assert seen[0].headers["traceparent"] == trace
        assert seen[1].headers["content-type"] == "application/x-ndjson"
        assert seen[1].content == lines(*sent)
        assert [r.content for r in seen[2:]] == [codec.encode(e) for e in [sent[0], *sent]]

    run(case())


def test_large_batches_are_several_requests() -> None:
    """At most 1000 envelopes and 8 MiB in a request; an error says how many were delivered before."""
    sizes: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sizes.append(request.content.count(b"\n"))
        assert len(request.content) <= 8 * 1024 * 1024
        return httpx.Response(202 if len(sizes) < 3 else 503)

    async def case() -> None:
        async with dialled("http://h", handler) as t:
            with pytest.raises(Unavailable) as caught:
                await t.send_many([envelope(i) for i in range(2500)])
            assert caught.value.meta["accepted"] == "2000"
            sizes.clear()
            await t.send_many([envelope(payload="x" * 3_000_000) for _ in range(4)])

    run(case())
    assert sum(sizes) == 4
    assert len(sizes) == 2


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, InvalidArgument), (404, NotFound), (408, TimedOut), (413, TooLarge), (418, TransportError),
        (429, RateLimited), (500, TransportError), (502, Unavailable), (503, Unavailable), (504, Ambiguous),
        (507, StorageFull),
    ],
)  # fmt: skip
def test_status_to_error(status: int, error: type[MistError]) -> None:
    """Each status is the error its reader can act on, with the server's plain-text reason."""

    async def case() -> None:
        async with dialled("http://h", lambda _: httpx.Response(status, text="because of this\n")) as t:
            with pytest.raises(error, match=f"answered {status}: because of this") as caught:
                await t.send(envelope())
            assert type(caught.value) is error
            assert caught.value.meta["status"] == str(status)

    run(case())


def test_structured_answers_come_back_as_they_were() -> None:
    """The flat error JSON of a server is the same class here, with its coordinates, retry_after_s and text."""

    async def case() -> None:
        async with serve(Taken()) as server, dial(server.url) as t:
            async with httpx.AsyncClient() as raw:
                body = b'{"version":"1","id":"","source":"s","type":"t"}'
                answer = await raw.post(server.url, content=body)
            error = error_for(answer.status_code, answer.headers, answer.content, "x")
            assert isinstance(error, MissingField)
            assert error.field == "id"
            await t.send(envelope())

        def full(_: httpx.Request) -> httpx.Response:
            wire = Overloaded("no room").to_wire()
            return httpx.Response(503, json=wire, headers={"Retry-After": "12"})

        async with dialled("http://h", full) as t:
            with pytest.raises(Overloaded, match="no room") as caught:
                await t.send(envelope())
            assert caught.value.retry_after_s == 12

    run(case())


@pytest.mark.parametrize("code", sorted(CLASSES))
def test_every_error_survives_the_wire(code: str) -> None:
    """Every class of the tree can be made from an answer, printed, and read for its attributes."""
    error = make_error(CLASSES[code], "text", meta={"size_bytes": "7", "field": "f"})
    assert type(error) is CLASSES[code]
    assert str(error) == "text"
    assert error.to_wire()["code"] == code
    assert getattr(error, "size_bytes", 7) == 7


def test_redirects_are_errors() -> None:
    """A redirect is not followed: it names the place, and nothing claims to be delivered."""

    async def case() -> None:
        for status in (301, 302, 303, 307, 308):
            answer = httpx.Response(status, headers={"Location": "http://elsewhere/mist"})
            async with dialled("http://h", lambda _, a=answer: a) as t:  # type: ignore[misc]
                with pytest.raises(TransportError, match="elsewhere") as caught:
                    await t.send(envelope())
                assert not caught.value.retryable

    run(case())


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (httpx.ConnectError("refused"), Unavailable),
        (httpx.ConnectTimeout("slow"), TimedOut),
        (httpx.PoolTimeout("busy"), Overloaded),
        (httpx.ReadTimeout("slow"), Ambiguous),
        (httpx.ReadError("reset"), Ambiguous),
        (httpx.RemoteProtocolError("closed"), Ambiguous),
        (httpx.LocalProtocolError("bad"), TransportError),
    ],
)
def test_failures_on_the_way(raised: Exception, error: type[MistError]) -> None:
    """What cannot have arrived is Unavailable or TimedOut, what may have is Ambiguous with the ids."""

    def handler(_: httpx.Request) -> httpx.Response:
        raise raised

    async def case() -> None:
        one = envelope()
        async with dialled("http://h", handler) as t:
            with pytest.raises(error) as caught:
                await t.send(one)
        assert type(caught.value) is error
        if isinstance(caught.value, Ambiguous):
            assert caught.value.ids == [one.id]

    run(case())


def test_retry_after_forms() -> None:
    """Seconds, a date, nonsense."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert retry_after("3") == 3
    assert retry_after("Thu, 01 Jan 2026 00:00:05 GMT", now) == 5
    assert retry_after("Wed, 31 Dec 2025 00:00:05 GMT", now) == 0
    assert retry_after("soon") is None
    assert retry_after("") is None


def test_receive_needs_listen() -> None:
    """A client that only posts refuses to receive, with the way out; one that only listens refuses to send."""

    async def case() -> None:
        async with dial("http://127.0.0.1:9") as t:
            with pytest.raises(Unsupported, match="listen="):
                await t.receive()
            with pytest.raises(Unavailable):
                await t.send(envelope())
        async with dial("http:?listen=127.0.0.1:0") as t:
            with pytest.raises(Unsupported):
                await t.send(envelope())

    run(case())


def test_listener_says_503_when_full() -> None:
    """A full inbox answers 503 with Retry-After and takes nothing of the batch; after a receive it takes more."""

    async def case() -> None:
        async with dial("http:?listen=127.0.0.1:0", inbox_size=3) as t:  # noqa: SIM117 (t is needed for the next)
            async with dial(t.listening) as sender:  # type: ignore[attr-defined]
                await sender.send_many([envelope(0), envelope(1)])
                with pytest.raises(Overloaded) as caught:
                    await sender.send_many([envelope(8), envelope(9)])
                assert caught.value.retry_after_s == 1
                await sender.send(envelope(2))
                assert [e.data()["n"] for e in await t.receive_many()] == [0, 1, 2]
                await sender.send(envelope(3))
                with pytest.raises(Malformed):
                    await sender._request(b"bad", JSON, ())  # type: ignore[attr-defined]
                assert [e.data()["n"] for e in await t.receive_many()] == [3]

    run(case())


def test_bad_urls() -> None:
    """URLs that cannot be right are refused at dial, passwords not shown."""

    async def case() -> None:
        for url in (
            "http:",
            "http://",
            "http://h:99999999",
            "http://h?batch=2",
            "http://h?timeout_s=x",
            "http://h?timeout_s=0",
        ):
            with pytest.raises(InvalidArgument):
                await dial(url)
        async with dial("http://u:secret@127.0.0.1:9") as t:
            assert "secret" not in t.url

    run(case())


def test_answers_are_not_delayed() -> None:
    """The listener names its protocol, which is what makes asyncio switch off Nagle's algorithm on its connections."""
    with _listen(socket.AF_INET, "127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
