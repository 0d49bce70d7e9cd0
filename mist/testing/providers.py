"""Model providers on this machine that speak the real wire formats, and fail as real ones do.

    with run_providers() as there:
        there.fail("rate_limited", retry_after="7")           # the next request; then all is well again
        client = openai.OpenAI(base_url=there.openai_url, api_key=there.api_key)

One HTTP/1.1 server in a thread of this process, on a free port of 127.0.0.1: OpenAI's `/v1/chat/completions`,
`/v1/embeddings`, `/v1/models`, and Anthropic's `/v1/messages`; JSON and server-sent events, with the shapes, codes and
error bodies of the originals (the official clients read them: tests/tools/infermux/test_providers_server.py).

Says `Hello from MODEL.` unless `answer` says otherwise; where the question has tools and ends with a user, it calls the first
one. A token is a word. Requests are counted and kept (`seen`, the newest SEEN_MAX).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import hashlib
import json
import math
import struct
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, get_args

from msgspec import Struct

from mist.errors import InvalidArgument
from mist.testing._dialects import ANTHROPIC, OPENAI, Answer, Dialect, FaultName

__all__ = ["Answer", "Fault", "FaultName", "Providers", "Seen", "embedding", "run_providers"]

FAULTS: tuple[FaultName, ...] = get_args(FaultName)
SEEN_MAX = 1000
BODY_BYTES_MAX = 64 * 1024 * 1024
MODELS = ("gpt-4o-mini", "claude-haiku", "text-embedding-3-small")
DIMENSIONS = 8

_REASONS = {200: "OK", 307: "Temporary Redirect", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 429: "Too Many Requests", 500: "Internal Server Error", 503: "Service Unavailable", 529: "Overloaded"}  # fmt: skip


class Seen(NamedTuple):
    """A request that came. Header names in lower case."""

    path: str
    headers: dict[str, str]
    body: Any


class Fault(Struct, frozen=True, kw_only=True):
    """`after`: how many pieces of a stream come before it breaks off. `wait_s`: how long slow is."""

    name: FaultName
    retry_after: str = ""
    retry_after_ms: str = ""
    wait_s: float = 60.0
    after: int = 1


class Providers:
    """What `run_providers` gives. Everything here may be called from the test's thread."""

    def __init__(self, api_key: str) -> None:
        self.api_key = api_key
        self.port = 0
        self.seen: deque[Seen] = deque(maxlen=SEEN_MAX)
        self.requests = 0
        self.connections = 0
        self.open_connections = 0
        self.given_up = 0
        """Requests whose sender closed the connection before it had the answer."""
        self._next: deque[tuple[Fault, str]] = deque()
        self._always: dict[str, Fault] = {}
        self._answers: deque[Answer] = deque()
        self._lock = threading.Lock()

    @property
    def openai_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def anthropic_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, name: FaultName, *, model: str = "", times: int = 1, **fields: Any) -> None:
        """The next requests fail so; with a `model`, the next ones for it. `fields` are those of Fault."""
        if name not in FAULTS:
            raise InvalidArgument(f"no fault is called {name!r}", hint=", ".join(FAULTS))
        with self._lock:
            self._next.extend([(Fault(name=name, **fields), model)] * times)

    def fail_always(self, name: FaultName, *, model: str, **fields: Any) -> None:
        """Every request for this model, until `heal`."""
        with self._lock:
            self._always[model] = Fault(name=name, **fields)

    def heal(self) -> None:
        """No fault any more, and no answer that was prepared."""
        with self._lock:
            self._answers.clear()
            self._next.clear()
            self._always.clear()

    def answer(self, *answers: Answer) -> None:
        """What is said next, in order."""
        with self._lock:
            self._answers.extend(answers)

    def _fault(self, model: str) -> Fault | None:
        with self._lock:
            for at, (fault, only) in enumerate(self._next):
                if only in ("", model):
                    del self._next[at]
                    return fault
            return self._always.get(model)

    def _answer(self, body: Mapping[str, Any], tools: list[str], *, last_is_user: bool) -> Answer:
        with self._lock:
            if self._answers:
                return self._answers.popleft()
        if tools and last_is_user:
            return Answer(tool_calls=[(tools[0], {"city": "Paris"})])
        return Answer(text=f"Hello from {body.get('model')}.")


@contextmanager
def run_providers(*, api_key: str = "sk-test-0123456789") -> Iterator[Providers]:
    """The server, gone at the end of the block."""
    there = Providers(api_key)
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        tasks: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            there.connections += 1
            there.open_connections += 1
            try:
                await _Connection(there, reader, writer).run()
            except _HangUp:
                pass  # what it was told to do
            except (ConnectionError, asyncio.IncompleteReadError):
                there.given_up += 1
            except asyncio.CancelledError:
                if not stop.is_set():
                    raise
            finally:
                there.open_connections -= 1
                tasks.discard(task)
                writer.transport.abort()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        there.port = server.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def body() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            loop.close()

    thread = threading.Thread(target=body, name="providers", daemon=True)
    thread.start()
    started.wait(10)
    try:
        yield there
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


class _HangUp(Exception):
    """Close, without another word."""


class _Connection:
    def __init__(self, there: Providers, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._there = there
        self._reader = reader
        self._writer = writer

    async def run(self) -> None:
        while True:
            try:
                head = await self._reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            first, *lines = head.decode("latin-1").split("\r\n")
            method, path, _ = first.split(" ", 2)
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
            }
            size = int(headers.get("content-length", "0"))
            assert size <= BODY_BYTES_MAX
            raw = await self._reader.readexactly(size)
            await self._serve(method, path.partition("?")[0], headers, raw)

    async def _serve(self, method: str, path: str, headers: dict[str, str], raw: bytes) -> None:
        there = self._there
        body = json.loads(raw) if raw else {}
        there.requests += 1
        there.seen.append(Seen(path, headers, body))
        dialect: Dialect = ANTHROPIC if path == "/v1/messages" else OPENAI
        model = str(body.get("model", ""))
        fault = there._fault(model)
        if fault is not None and fault.name not in _LATER:
            await self._fail(fault, dialect, model)
            return
        if dialect.key_of(headers) != there.api_key:
            await self._json(*dialect.error("credentials", model))
        elif method == "GET" and path == "/v1/models":
            data = [{"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "tests"} for name in MODELS]
            await self._json(200, {"object": "list", "data": data})
        elif path == "/v1/embeddings":
            await self._embed(body)
        elif path in ("/v1/chat/completions", "/v1/messages"):
            wrong = dialect.wrong(body, headers)
            if wrong:
                await self._json(*dialect.error("invalid", model, wrong))
            else:
                answer = there._answer(body, dialect.tools(body), last_is_user=_last_is_user(body))
                await self._say(dialect, body, answer, fault)
        else:
            await self._json(404, {"error": {"message": f"Unknown request URL: {method} {path}.", "type": "invalid_request_error", "param": None, "code": "unknown_url"}})  # fmt: skip

    async def _fail(self, fault: Fault, dialect: Dialect, model: str) -> None:
        match fault.name:
            case "hang_up":
                raise _HangUp
            case "slow_headers":
                await self._wait(fault.wait_s)
            case "redirect":
                await self._send(307, b"", {"location": "http://127.0.0.1:9/elsewhere?key=secret-value"})
            case "html":
                await self._send(
                    503, b"<html><body>503 Service Unavailable</body></html>", {"content-type": "text/html"}
                )
            case "bad_json":
                await self._send(200, b'{"id": "x", "choices": [{"mess', {"content-type": "application/json"})
            case "not_an_object":
                await self._send(200, b"[1, 2]", {"content-type": "application/json"})
            case "bad_utf8":
                await self._send(200, b'{"id": "\xff\xfe"}', {"content-type": "application/json"})
            case "compressed":
                await self._send(200, gzip.compress(b"{}"), {"content-type": "text/plain", "content-encoding": "gzip"})
            case "huge":
                await self._send(200, b'{"id": "' + b"x" * 100_000 + b'"}', {"content-type": "application/json"})
            case "refused_with_200":
                await self._json(200, dialect.error("overloaded", model)[1])
            case _:
                more = {"retry-after": fault.retry_after} if fault.retry_after else {}
                more |= {"retry-after-ms": fault.retry_after_ms} if fault.retry_after_ms else {}
                await self._json(*dialect.error(fault.name, model), more)

    async def _say(self, dialect: Dialect, body: dict[str, Any], answer: Answer, fault: Fault | None) -> None:
        if not body.get("stream"):
            message = dialect.whole(body, answer)
            if fault is not None and fault.name == "no_choices":
                message |= {"choices": [], "content": [], "stop_reason": None}
            data = json.dumps(message).encode()
            if fault is not None and fault.name in ("truncated", "slow_chunks"):
                head = _head(200, {"content-type": "application/json", "content-length": str(len(data))})
                self._writer.write(head + data[: len(data) // 2])
                if fault.name == "slow_chunks":
                    await self._wait(fault.wait_s)
                    self._writer.write(data[len(data) // 2 :])
                    return
                await self._writer.drain()
                raise _HangUp
            await self._send(200, data, {"content-type": "application/json"})
            return
        self._writer.write(
            _head(200, {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"})
        )
        said = 0
        for event, is_piece in dialect.events(body, answer):
            if fault is not None and (said >= fault.after) and await self._breaks(fault, dialect, body):
                return
            if (
                fault is not None
                and fault.name == "no_done"
                and (event.startswith(b"data: [DONE]") or b"message_stop" in event)
            ):
                break
            self._writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            said += is_piece
            await self._writer.drain()
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    async def _breaks(self, fault: Fault, dialect: Dialect, body: dict[str, Any]) -> bool:
        """Whether the stream ends here."""
        chunk: bytes
        match fault.name:
            case "truncated":
                await self._writer.drain()
                raise _HangUp
            case "slow_chunks":
                await self._writer.drain()
                await self._wait(fault.wait_s)
                return False
            case "error_in_stream":
                chunk = dialect.error_event()
            case "bad_piece":
                chunk = b'data: {"id": "x", "choi\n\n'
            case "no_choices":
                chunk = b""
            case _:
                return False
        if chunk:
            self._writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()
        return True

    async def _embed(self, body: dict[str, Any]) -> None:
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        count = int(body.get("dimensions", DIMENSIONS))
        data = []
        for at, text in enumerate(texts):
            vector = embedding(str(text), count)
            coded: Any = vector
            if body.get("encoding_format") == "base64":
                coded = base64.b64encode(struct.pack(f"<{count}f", *vector)).decode()
            data.append({"object": "embedding", "index": at, "embedding": coded})
        tokens = sum(len(str(text).split()) for text in texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        await self._json(200, {"object": "list", "data": data, "model": body["model"], "usage": usage})

    async def _json(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        await self._send(status, json.dumps(body).encode(), {"content-type": "application/json", **(headers or {})})

    async def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._writer.write(_head(status, {**headers, "content-length": str(len(body))}) + body)
        await self._writer.drain()

    async def _wait(self, seconds: float) -> None:
        """That long, or until the other side has gone."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                if not await self._reader.read(1):
                    raise ConnectionResetError


_LATER: frozenset[FaultName] = frozenset(
    {"slow_chunks", "truncated", "no_done", "error_in_stream", "no_choices", "bad_piece"}
)
"""Faults that come in the middle of an answer."""


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\nx-request-id: req_0123\r\nrequest-id: req_0123\r\n\r\n").encode()


def embedding(text: str, dimensions: int = DIMENSIONS) -> list[float]:
    """A unit vector made of the words: texts that share words are near one another. Exact in 32 bits."""
    sums = [0.0] * dimensions
    for word in text.lower().split():
        digest = hashlib.sha256(word.encode()).digest()
        for at in range(dimensions):
            sums[at] += digest[at % 32] - 127.5
    length = math.sqrt(sum(x * x for x in sums)) or 1.0
    out: list[float] = [struct.unpack("<f", struct.pack("<f", x / length))[0] for x in sums]
    return out


def _last_is_user(body: Mapping[str, Any]) -> bool:
    last = (body.get("messages") or [{}])[-1]
    content = last.get("content")
    results = isinstance(content, list) and any(part.get("type") == "tool_result" for part in content)
    return last.get("role") == "user" and not results
