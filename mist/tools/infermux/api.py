"""InferMux over HTTP: OpenAI's routes, the seed's, and the management routes, as doors of a site (mist/kit/server.py).

| route | |
|---|---|
| `POST /v1/chat/completions`, `/v1/completions` | OpenAI's; `stream` answers in server-sent events |
| `POST /v1/embeddings`, `GET /v1/models`, `/v1/models/{id}` | OpenAI's |
| `POST /infer`, `GET /providers` | the seed's |
| `GET /_infermux/{health,status,providers,costs,costs/by-caller,costs/by-model,metrics}` | figures |
| `POST /_infermux/providers/{name}/circuit/{open,close,reset}` | with the management token |

Promises: errors are OpenAI's JSON under `/v1/` and the flat error JSON elsewhere, with the status `openai_api.said` gives;
429 and 503 say when to come back. An answer's headers say who gave it and what it cost; a stream's say what is known when it
begins, its last event (where usage was asked for) the rest. A client that leaves ends its call upstream. A stream that is
silent says so in comments, so that nobody on the way takes it for dead; an error before its first piece has its own status,
unless a comment went out before.

Does not: TLS, CORS (a browser of another origin gets nothing it may read).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from mist import __version__
from mist.errors import InvalidArgument, MistError, NotFound
from mist.kit.server import App, Receive, Scope, Send
from mist.protocol.payloads import InferRequest
from mist.tools.infermux import openai_api
from mist.tools.infermux.access import Access
from mist.tools.infermux.calls import Calls, Streaming
from mist.tools.infermux.chat import Json
from mist.tools.infermux.envelopes import question, response_payload
from mist.tools.infermux.openai_api import BadBody, Events, error_body, now_s, said
from mist.transport.body import Answer, Gone, Intake, Limits, Request

if TYPE_CHECKING:
    from mist.tools.infermux.router import Routed

KEEP_ALIVE_S = 10.0
"""Silence of a stream after which a comment goes out."""
BODY_BYTES_MAX = 32 * 1024 * 1024
REQUEST_ID_CHARS_MAX = 128
LIMITS = Limits(body_bytes_max=BODY_BYTES_MAX, inflight_requests_max=4096)

_encode = msgspec.json.Encoder().encode
_infer_request = msgspec.json.Decoder(InferRequest).decode
Pairs = list[tuple[bytes, bytes]]
_JSON = (b"content-type", b"application/json")
_SSE: Pairs = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]  # fmt: skip


class Http:
    """One request and its answer."""

    __slots__ = ("_receive", "_send", "body", "headers", "method", "path", "query", "request_id", "started")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope.get("query_string", b"")
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.body = b""
        self.request_id = self.headers.get(b"x-request-id", b"")[:REQUEST_ID_CHARS_MAX]
        self.started = False
        self._receive = receive
        self._send = send

    @property
    def traceparent(self) -> str:
        return self.headers.get(b"traceparent", b"").decode("latin-1")

    async def read(self, request: Request) -> None:
        """The body. Raises as Request does."""
        self.body = await request.read(self.headers, self._receive)

    async def answer(self, status: int, body: bytes, headers: Pairs) -> None:
        self.started = True
        if self.request_id:
            headers.append((b"x-request-id", self.request_id))
        headers.append((b"content-length", b"%d" % len(body)))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else body})

    async def begin(self, headers: Pairs) -> None:
        self.started = True
        if self.request_id:
            headers.append((b"x-request-id", self.request_id))
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def piece(self, data: bytes, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    @asynccontextmanager
    async def there(self) -> AsyncIterator[None]:
        """The block is cancelled when the client leaves, and raises Gone then."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a server runs apps in tasks
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await self._receive())["type"] != "http.disconnect":
                pass
            gone = True
            task.cancel()

        watching = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if gone and task.uncancel() == 0:
                raise Gone from None
            raise
        finally:
            watching.cancel()


Route = Callable[[Http], Awaitable[None]]


class Api:
    """The doors over one `Calls`. `names()` is what may be asked for, and whose it is; `costs(path, query)` answers
    `/_infermux/costs…`; `metrics` is the page of `/_infermux/metrics`."""

    def __init__(
        self,
        calls: Calls,
        *,
        access: Access | None = None,
        limits: Limits = LIMITS,
        keep_alive_s: float = KEEP_ALIVE_S,
        names: Callable[[], dict[str, str]] = dict,
        costs: Callable[[str, bytes], Awaitable[Json]] | None = None,
        metrics: App | None = None,
        facts: Callable[[], Json] = dict,
    ) -> None:
        self.calls = calls
        self.access = access or Access()
        self._intake = Intake(limits)
        self._keep_alive_s = keep_alive_s
        self._names = names
        self._costs = costs
        self._metrics = metrics
        self._facts = facts

    def doors(self) -> dict[str, App]:
        return {
            "/v1/chat/completions": self._openai(self._chat),
            "/v1/completions": self._openai(self._completion),
            "/v1/embeddings": self._openai(self._embeddings),
            "/v1/models": self._openai(self._models, "GET"),
            "/v1/models/": self._openai(self._model, "GET"),
            "/infer": self._ours(self._infer),
            "/providers": self._ours(self._providers, "GET"),
            "/_infermux/": self._management,
        }

    # ------------------------------------------------------------------ OpenAI's routes

    async def _chat(self, http: Http) -> None:
        asked = openai_api.chat(
            http.body, caller=self.access.who(http.headers), meta={}, traceparent=http.traceparent
        )
        if asked.stream:
            await self._stream(http, asked, text=False)
            return
        async with http.there():
            request, routed = await self.calls.complete(asked.request)
        body = openai_api.chat_completion(routed.reply, request.id, now_s())
        await http.answer(200, body, [_JSON, *about(routed)])

    async def _completion(self, http: Http) -> None:
        asked = openai_api.completion(
            http.body, caller=self.access.who(http.headers), meta={}, traceparent=http.traceparent
        )
        if asked.stream:
            await self._stream(http, asked, text=True)
            return
        async with http.there():
            request, routed = await self.calls.complete(asked.request)
        body = openai_api.text_completion(routed.reply, request.id, now_s())
        await http.answer(200, body, [_JSON, *about(routed)])

    async def _stream(self, http: Http, asked: openai_api.Asked, *, text: bool) -> None:
        loop = asyncio.get_running_loop()
        quiet_since = loop.time()

        async def keep_alive(streaming: Streaming) -> None:
            nonlocal quiet_since
            while True:
                left = quiet_since + self._keep_alive_s - loop.time()
                if left > 0:
                    await asyncio.sleep(left)
                    continue
                if not http.started:
                    await http.begin([*_SSE, *known(streaming.known())])
                quiet_since = loop.time()
                await http.piece(openai_api.KEEP_ALIVE)

        async with http.there():
            try:
                async with self.calls.streaming(asked.request) as streaming:
                    events = Events(streaming.request.id, now_s(), include_usage=asked.include_usage, text=text)
                    ticking = asyncio.create_task(keep_alive(streaming))
                    try:
                        async for chunk in streaming.chunks:
                            data = events.chunk(chunk)
                            if not http.started:
                                await http.begin([*_SSE, *known(streaming.known())])
                            if data:
                                quiet_since = loop.time()
                                await http.piece(data)
                    finally:
                        ticking.cancel()
            except MistError as exc:
                if not http.started:
                    raise
                await http.piece(events.error(exc), more=False)
                return
            routed = streaming.known()
            if not http.started:
                await http.begin([*_SSE, *known(routed)])
            usage = routed.reply.usage if routed is not None else openai_api.Usage()
            await http.piece(events.end(usage, summary(routed) if routed is not None else {}), more=False)

    async def _embeddings(self, http: Http) -> None:
        asked = openai_api.embedding(http.body)
        caller = self.access.who(http.headers)
        async with http.there():
            found = await self.calls.embed(asked.model, asked.texts, asked.params, caller, http.traceparent)
        await http.answer(200, openai_api.embeddings(found.embeddings, as_base64=asked.base64), [_JSON, *about(found)])

    async def _models(self, http: Http) -> None:
        self.access.who(http.headers)
        await http.answer(200, openai_api.models(self._names()), [_JSON])

    async def _model(self, http: Http) -> None:
        self.access.who(http.headers)
        name = http.path.removeprefix("/v1/models/")
        names = self._names()
        if name not in names:
            raise NotFound(f"no model {name[:80]!r}", hint=f"known: {', '.join(names)}")
        await http.answer(200, openai_api.model(name, names[name]), [_JSON])

    # ------------------------------------------------------------------ the seed's

    async def _infer(self, http: Http) -> None:
        try:
            payload = _infer_request(http.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise BadBody(f"not an infer request: {exc}") from exc
        asked = question(payload)
        caller = self.access.who(http.headers)
        asked = msgspec.structs.replace(asked, caller=caller, traceparent=http.traceparent)
        async with http.there():
            request, routed = await self.calls.complete(asked)
        await http.answer(200, _encode(response_payload(request, routed)), [_JSON, *about(routed)])

    async def _providers(self, http: Http) -> None:
        self.access.who(http.headers)
        found = [{"name": state.name, "models": list(state.models)} for state in self.calls.router.providers()]
        await http.answer(200, _encode({"providers": found}), [_JSON])

    # ------------------------------------------------------------------ what they share

    def _openai(self, route: Route, method: str = "POST") -> App:
        return self._door(route, method, _openai_error)

    def _ours(self, route: Route, method: str = "POST") -> App:
        return self._door(route, method, _flat_error)

    def _door(self, route: Route, method: str, form: Callable[[MistError], bytes]) -> App:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            http = Http(scope, receive, send)
            try:
                if http.method != method and not (method == "GET" and http.method == "HEAD"):
                    error = InvalidArgument(f"{http.method} is not served at {http.path}", hint=method)
                    raise Answer(405, error, ((b"allow", method.encode()),))
                with self._intake.request() as request:  # under way until it is answered
                    if method == "POST":
                        await http.read(request)
                    await route(http)
            except Gone:
                return
            except Answer as exc:
                await http.answer(exc.status, form(exc.error), [_JSON, *exc.headers])
            except MistError as exc:
                if http.started:
                    raise
                await http.answer(said(exc).status, form(exc), [_JSON, *blame(exc)])

        return app

    # ------------------------------------------------------------------ management

    async def _management(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts = scope["path"].removeprefix("/_infermux/").split("/")
        if parts == ["metrics"] and self._metrics is not None:
            self.access.look(dict(scope["headers"]))
            await self._metrics(scope, receive, send)
        elif len(parts) == 4 and parts[0] == "providers" and parts[2] == "circuit":
            await self._ours(self._circuit)(scope, receive, send)
        else:
            await self._ours(self._figures, "GET")(scope, receive, send)

    async def _figures(self, http: Http) -> None:
        what = http.path.removeprefix("/_infermux/")
        if what == "health":
            await http.answer(200, b'{"status":"ok"}', [_JSON])
            return
        self.access.look(http.headers)
        if what == "status":
            found: Any = self._status()
        elif what == "providers":
            found = [self._provider(state) for state in self.calls.router.providers()]
        elif what.partition("/")[0] == "costs" and self._costs is not None:
            found = await self._costs(what, http.query)
        else:
            raise NotFound(f"nothing is served at {http.path}", hint="health, status, providers, costs, metrics")
        await http.answer(200, _encode(found), [_JSON])

    def _status(self) -> Json:
        states = self.calls.router.providers()
        calls, failed = self.calls.last_minute()
        return {
            "version": __version__,
            "providers_healthy": sum(state.breaker != "open" for state in states),
            "providers_total": len(states),
            "requests_total": self.calls.requests,
            "requests_last_minute": calls,
            "errors_last_minute": failed,
            "under_way": self.calls.under_way,
            **self._facts(),
        }

    def _provider(self, state: Any) -> Json:
        return dict(msgspec.to_builtins(state))

    async def _circuit(self, http: Http) -> None:
        self.access.manage(http.headers)
        _, name, _, action = http.path.removeprefix("/_infermux/").split("/")
        if action not in ("open", "close", "reset"):
            raise NotFound(f"no such switch: {action[:40]!r}", hint="open, close or reset")
        self.calls.router.circuit(name, action)
        state = next(s for s in self.calls.router.providers() if s.name == name)
        await http.answer(200, _encode(self._provider(state)), [_JSON])


def about(routed: Routed) -> Pairs:
    """The headers of an answer."""
    usage = routed.reply.usage
    out = known(routed)
    out.append((b"x-infermux-latency-ms", b"%.3f" % (routed.latency_ns / 1e6)))
    if routed.cost_usd is not None:
        out.append((b"x-infermux-cost", _decimal(routed.cost_usd)))
    if usage.tokens_in is not None:
        out.append((b"x-infermux-prompt-tokens", b"%d" % usage.tokens_in))
    if usage.tokens_out is not None:
        out.append((b"x-infermux-completion-tokens", b"%d" % usage.tokens_out))
    return out


def known(routed: Routed | None) -> Pairs:
    """Those that are known before the answer is."""
    if routed is None:
        return []
    out = [(b"x-infermux-provider", _text(routed.provider)), (b"x-infermux-model", _text(routed.model))]
    for name, text in (
        (b"x-infermux-strategy", routed.strategy), (b"x-infermux-route-group", routed.group),
        (b"x-infermux-model-override", routed.budget_override),
    ):  # fmt: skip
        if text:
            out.append((name, _text(text)))
    return out


def summary(routed: Routed) -> Json:
    """What a stream's last event says beside its usage."""
    return {
        "provider": routed.provider, "model": routed.model, "strategy": routed.strategy, "group": routed.group,
        "latency_ms": routed.latency_ns / 1e6, "cost_usd": routed.cost_usd,
    }  # fmt: skip


def blame(error: MistError) -> Pairs:
    """The headers of an error: what it was, when to come back, and whether that has a point."""
    what = said(error)
    out: Pairs = [(b"x-infermux-error", _text(what.code))]
    if what.status in (429, 503):
        out.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s or 1.0))))
    if what.status == 429 or what.status >= 500:
        # the official client asks twice more after any of these; this is the word by which it does not
        out.append((b"x-should-retry", b"true" if what.again else b"false"))
    return out


def _openai_error(error: MistError) -> bytes:
    return error_body(error)


def _flat_error(error: MistError) -> bytes:
    return _encode(error.to_wire())


def _decimal(usd: float) -> bytes:
    """Dollars without an exponent, down to a billionth."""
    return (f"{usd:.9f}".rstrip("0").rstrip(".") or "0").encode()


def _text(value: str) -> bytes:
    """A name as a header may carry it."""
    return value.encode("ascii", "backslashreplace").replace(b"\r", b"").replace(b"\n", b"")

