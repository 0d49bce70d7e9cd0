"""`http(s)://host[:port][/path]` — posts envelopes; with `listen=` receives them too.

    http://host                  means http://host/mist
    http://host?batch=0          one request for each envelope: what servers built on the Go library take
    http://host?listen=ADDR:PORT also serves POST /mist there, for receive
    http:?listen=ADDR:PORT       only receives

Promises: one envelope goes as `application/json`, several as NDJSON, a bounded number and size in each request; a send
returns when the server has said 2xx, and what that means is the server's promise; connections are pooled, every phase
has a time limit; redirects are not followed but raised; the reason a server gives is in the error, `retry_after_s` too.
A request whose fate is unknown (the answer did not come) raises Ambiguous.

Receiving: accepted envelopes wait in a bounded queue of this process (durability `memory`) and 503 with Retry-After
tells senders to come back when it is full. For a promise that survives, serve a stream: `mist.transport.serve`.

Needs the extra `client` (httpx) for sending and `server` (uvicorn) for receiving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from mist.errors import (
    Ambiguous,
    InvalidArgument,
    MistError,
    Overloaded,
    TimedOut,
    TransportError,
    Unavailable,
    Unsupported,
)
from mist.protocol import codec
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope
from mist.protocol.tracecontext import parse_traceparent
from mist.protocol.url import Url, redact
from mist.transport._lines import encode_lines
from mist.transport._queue import Queue
from mist.transport._status import error_for
from mist.transport.base import RECEIVE_LIMIT, Transport, check_limit, closed_error

if TYPE_CHECKING:
    import httpx

    from mist.transport.server import HttpServer

TIMEOUT_S = 10.0
BATCH_ENVELOPES_MAX = 1000
BATCH_BYTES_MAX = 8 * 1024 * 1024
ANSWER_BYTES_MAX = 64 * 1024
INBOX_SIZE = 256
CONNECTIONS_MAX = 20
_OURS = frozenset({"batch", "listen", "timeout_s"})


def from_url(
    url: Url,
    *,
    headers: dict[str, str] | None = None,
    timeout_s: float | None = None,
    client: httpx.AsyncClient | None = None,
    size_bytes_max: int = SIZE_BYTES_MAX,
    inbox_size: int = INBOX_SIZE,
) -> HttpTransport:
    """`headers` go with every request (authorization). `client` replaces the pool and stays open."""
    text = url.get("timeout_s", "")
    try:
        seconds = timeout_s if timeout_s is not None else float(text) if text else TIMEOUT_S
    except ValueError:
        raise InvalidArgument(f"{url.redacted()}: timeout_s={text!r} is not a number") from None
    if seconds <= 0:
        raise InvalidArgument(f"{url.redacted()}: timeout_s={seconds} cannot be right")
    batch = url.get("batch", "1")
    if batch not in ("0", "1"):
        raise InvalidArgument(f"{url.redacted()}: batch={batch!r} is neither 1 nor 0")
    return HttpTransport(
        _target(url), listen=url.get("listen", ""), batch=batch == "1", headers=headers, timeout_s=seconds,
        client=client, size_bytes_max=size_bytes_max, inbox_size=inbox_size,
    )  # fmt: skip


def _target(url: Url) -> str:
    """What is posted to; "" for a URL without a host, which only listens."""
    rest = [(k, v) for k, v in url.query if k not in _OURS]
    if not url.target.removeprefix("//"):
        if not url.get("listen"):
            raise InvalidArgument(f"{url.redacted()}: names no host", hint="for example http://localhost:8081")
        return ""
    try:
        parts = urlsplit(f"{url.scheme}:{url.target}")
        port = parts.port
    except ValueError as exc:
        raise InvalidArgument(f"{url.redacted()}: {exc}") from exc
    if not parts.hostname:
        raise InvalidArgument(f"{url.redacted()}: names no host", hint="for example http://localhost:8081")
    del port  # looked at only to be refused here and not at the first send
    path = parts.path if parts.path not in ("", "/") else "/mist"
    query = "?" + urlencode(rest, quote_via=quote) if rest else ""
    return f"{url.scheme}://{parts.netloc}{path}{query}"


class HttpTransport(Transport):
    def __init__(
        self,
        target: str,
        *,
        listen: str = "",
        batch: bool = True,
        headers: dict[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
        client: httpx.AsyncClient | None = None,
        size_bytes_max: int = SIZE_BYTES_MAX,
        inbox_size: int = INBOX_SIZE,
    ) -> None:
        self.url = redact(target) or "http:"
        self.size_bytes_max = size_bytes_max
        self._target = target
        self._listen = listen
        self._batch = batch
        self._headers = dict(headers or {})
        self._timeout_s = timeout_s
        self._client = client
        self._own_client = client is None
        self._inbox: Queue[Envelope] | None = None
        self._inbox_size = inbox_size
        self._server: HttpServer | None = None
        self._closed = False
        self._under_way = 0
        self._idle: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Begin to listen, where the URL asks for it. `dial` has done this."""
        if self._target and self._client is None:
            _httpx()  # a missing package is better known now than at the first send
        if not self._listen:
            return
        from mist.kit.server import parse_address
        from mist.transport.server import HttpServer

        host, port = parse_address(self._listen)
        self._inbox = Queue(self._inbox_size, self.url)
        inbox = self._inbox

        async def take(envelopes: list[Envelope]) -> None:
            inbox.put_nowait(envelopes)

        self._server = HttpServer(take, host=host, port=port, size_bytes_max=self.size_bytes_max)
        await self._server.start()

    @property
    def listening(self) -> str:
        """The URL that others send to, when this listens."""
        return self._server.url if self._server is not None else ""

    # sending

    async def send(self, envelope: Envelope) -> None:
        self._check_open()
        body = codec.encode(envelope)
        if len(body) > self.size_bytes_max:
            encode_lines((envelope,), self.size_bytes_max)  # raises, naming it
        headers = {"content-type": codec.JSON}
        if envelope.traceparent and parse_traceparent(envelope.traceparent):
            headers["traceparent"] = envelope.traceparent
        await self._post(body, headers, (envelope,))

    async def send_many(self, envelopes: Sequence[Envelope]) -> None:
        """In requests of at most 1000 envelopes and 8 MiB. An error says in `meta["accepted"]` how many envelopes
        earlier requests delivered; repeating all is safe where the server knows their ids."""
        self._check_open()
        # Everything is encoded first: TooLarge has to come before anything is sent.
        requests = list(self._requests(envelopes)) if self._batch and len(envelopes) > 1 else []
        if not requests:
            for e in envelopes:
                if len(e.payload) > self.size_bytes_max >> 1:
                    encode_lines((e,), self.size_bytes_max)
            for done, envelope in enumerate(envelopes):
                try:
                    await self.send(envelope)
                except MistError as exc:
                    exc.meta.setdefault("accepted", str(done))
                    raise
            return
        done = 0
        for part, body in requests:
            try:
                await self._post(body, {"content-type": codec.NDJSON}, part)
            except MistError as exc:
                exc.meta["accepted"] = str(done)
                if exc.http_status == 400 and not exc.hint:
                    exc.hint = "a server built on the Go library takes one envelope a request: add ?batch=0"
                raise
            done += len(part)

    def _requests(self, envelopes: Sequence[Envelope]) -> list[tuple[Sequence[Envelope], bytes]]:
        out: list[tuple[Sequence[Envelope], bytes]] = []
        todo = [envelopes[i : i + BATCH_ENVELOPES_MAX] for i in range(0, len(envelopes), BATCH_ENVELOPES_MAX)]
        todo.reverse()
        while todo:
            part = todo.pop()
            body = encode_lines(part, self.size_bytes_max).data
            if len(body) > BATCH_BYTES_MAX and len(part) > 1:
                half = len(part) // 2
                todo += [part[half:], part[:half]]
            else:
                out.append((part, body))
        return out

    async def _post(self, body: bytes, headers: dict[str, str], envelopes: Sequence[Envelope]) -> None:
        self._under_way += 1
        try:
            await self._request(body, headers, envelopes)
        finally:
            self._under_way -= 1
            if not self._under_way and self._idle is not None and not self._idle.done():
                self._idle.set_result(None)

    async def _request(self, body: bytes, headers: dict[str, str], envelopes: Sequence[Envelope]) -> None:
        if not self._target:
            raise Unsupported("send", "http", hint="the URL names nobody to post to: http://host?listen=…")
        httpx = _httpx()
        if self._client is None:
            self._client = httpx.AsyncClient(
                timeout=httpx.Timeout(self._timeout_s),
                limits=httpx.Limits(
                    max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_MAX, keepalive_expiry=30.0
                ),
            )
        try:
            async with self._client.stream(
                "POST", self._target, content=body, headers={**self._headers, **headers}, follow_redirects=False
            ) as answer:
                status, said, got = answer.status_code, answer.headers, b""
                async for chunk in answer.aiter_bytes():
                    got += chunk
                    if len(got) > ANSWER_BYTES_MAX:
                        break
        except httpx.PoolTimeout as exc:
            raise Overloaded(
                f"{self.url}: all {CONNECTIONS_MAX} connections were busy for {self._timeout_s} s"
            ) from exc
        except httpx.ConnectTimeout as exc:
            raise TimedOut(f"{self.url}: no connection within {self._timeout_s} s") from exc
        except httpx.ConnectError as exc:
            raise Unavailable(f"{self.url}: cannot connect: {exc}", hint="is the server running?") from exc
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as exc:
            raise InvalidArgument(f"{self.url}: {exc}") from exc
        except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as exc:
            raise Ambiguous(
                f"{self.url}: the connection failed before the answer came ({type(exc).__name__})",
                ids=[e.id for e in envelopes],
            ) from exc
        except httpx.HTTPError as exc:
            raise TransportError(f"{self.url}: {exc}") from exc
        if not 200 <= status < 300:
            raise error_for(status, said, got, self.url)

    # receiving

    async def receive_many(self, limit: int = RECEIVE_LIMIT, wait_s: float | None = None) -> list[Envelope]:
        check_limit(limit)
        self._check_open()
        if self._inbox is None:
            raise Unsupported(
                "receive", "http",
                hint="it only posts; to be posted to, say where to listen: http://host?listen=127.0.0.1:8081",
            )  # fmt: skip
        return await self._inbox.get_many(limit, wait_s)

    async def close(self) -> None:
        """Finishes the requests under way, both ways. What was accepted by listening and not received is gone."""
        if self._closed:
            return
        self._closed = True
        if self._server is not None:
            await self._server.close()
        if self._inbox is not None:
            self._inbox.end()
            self._inbox.abandon()
        if self._under_way:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle  # each has its time limits
        if self._client is not None and self._own_client:
            await self._client.aclose()

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error(self.url)


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as exc:
        raise InvalidArgument(
            "http: needs a package that is not installed (httpx)", hint="pip install 'mist-stack[client]'"
        ) from exc
    return httpx
