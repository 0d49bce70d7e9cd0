"""InferMux over HTTP: OpenAI's routes, the seed's, and the management routes, as doors of a site (mist/kit/server.py).

| route | |
|---|---|
| `POST /v1/chat/completions`, `/v1/completions` | OpenAI's; `stream` answers in server-sent events |
| `POST /v1/embeddings`, `GET /v1/models`, `/v1/models/{id}` | OpenAI's |
| `POST /infer`, `GET /providers` | the seed's |
| `GET /_infermux/{health,status,providers,costs,costs/by-caller,costs/by-model,costs/timeseries,metrics}` | figures |
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
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import msgspec

from mist import __version__
from mist.errors import Internal, InvalidArgument, MistError, NotFound
from mist.kit.http1 import Door, Exchange, Headers, Respond
from mist.kit.server import App, Receive, Scope, Send
from mist.protocol.payloads import InferRequest
from mist.tools.infermux import openai_api
from mist.tools.infermux.access import Access, Named
from mist.tools.infermux.calls import Calls
from mist.tools.infermux.chat import Json
from mist.tools.infermux.envelopes import question, response_payload
from mist.tools.infermux.openai_api import BadBody, Events, error_body, now_s, said
from mist.tools.infermux.routed import Routed, RoutedEmbeddings, Way
from mist.transport.body import Answer, Gone, Intake, Limits, Request

_log = logging.getLogger("mist.tools.infermux.api")

KEEP_ALIVE_S = 10.0
"""Silence of a stream after which a comment goes out."""
BODY_BYTES_MAX = 32 * 1024 * 1024
REQUEST_ID_CHARS_MAX = 128
LIMITS = Limits(body_bytes_max=BODY_BYTES_MAX, inflight_requests_max=1024)

_encode = msgspec.json.Encoder().encode
_infer_request = msgspec.json.Decoder(InferRequest).decode
Pairs = list[tuple[bytes, bytes]]
Reply = tuple[int, bytes, Pairs]
"""Status, body, headers but the length."""
Reading = Callable[..., openai_api.Question]
_JSON = (b"content-type", b"application/json")
_SSE: Pairs = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]  # fmt: skip


class Asked:
    """A request, its body through."""

    __slots__ = ("body", "headers", "path", "query")

    def __init__(self, path: str, query: bytes, headers: Named, body: bytes) -> None:
        self.path = path
        self.query = query
        self.headers = headers
        self.body = body

    @property
    def traceparent(self) -> str:
        found = self.headers.get(b"traceparent")
        return found.decode("latin-1") if found else ""


Route = Callable[[Asked], Awaitable[Reply]]
Stream = Callable[[Asked, "Pieces"], Awaitable[bool]]
"""Answers in pieces, or says that none are wanted. Raises before the first of them what is to be an answer of its own."""
Form = Callable[[MistError], bytes]


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
        def post(path: str, route: Route, form: Form, stream: Stream | None = None) -> Post:
            return Post(path, route, form, self._intake, stream)

        return {
            "/v1/chat/completions": post("/v1/chat/completions", self._chat, error_body, self._chat_stream),
            "/v1/completions": post("/v1/completions", self._completion, error_body, self._completion_stream),
            "/v1/embeddings": post("/v1/embeddings", self._embeddings, error_body),
            "/v1/models": get(self._models, error_body),
            "/v1/models/": get(self._model, error_body),
            "/v1/": _nothing,
            "/infer": post("/infer", self._infer, flat_error),
            "/providers": get(self._providers, flat_error),
            "/_infermux/": self._management,
        }

    # ------------------------------------------------------------------ OpenAI's routes

    def _read(self, read: Reading, asked: Asked) -> openai_api.Question:
        question = read(asked.body, caller=self.access.who(asked.headers), meta={}, traceparent=asked.traceparent)
        if question.stream and not openai_api.wants_stream(asked.body):
            raise BadBody("write `stream` without escapes", param="stream")
        return question

    async def _chat(self, asked: Asked) -> Reply:
        request, routed = await self.calls.complete(self._read(openai_api.chat, asked).request)
        return 200, openai_api.chat_completion(routed.reply, request.id, now_s()), [_JSON, *about(routed)]

    async def _completion(self, asked: Asked) -> Reply:
        request, routed = await self.calls.complete(self._read(openai_api.completion, asked).request)
        return 200, openai_api.text_completion(routed.reply, request.id, now_s()), [_JSON, *about(routed)]

    async def _chat_stream(self, asked: Asked, out: Pieces) -> bool:
        return await self._stream(self._read(openai_api.chat, asked), out, text=False)

    async def _completion_stream(self, asked: Asked, out: Pieces) -> bool:
        return await self._stream(self._read(openai_api.completion, asked), out, text=True)

    async def _stream(self, question: openai_api.Question, out: Pieces, *, text: bool) -> bool:
        if not question.stream:
            return False
        silence = _Silence(out, self._keep_alive_s)
        try:
            async with silence, self.calls.streaming(question.request) as streaming:
                events = Events(streaming.request.id, now_s(), include_usage=question.include_usage, text=text)
                await out.begin([*_SSE, *known(streaming.known())])
                async for chunk in streaming.chunks:
                    if data := events.chunk(chunk):
                        silence.broken()
                        await out.piece(data)
                routed = streaming.known()
        except MistError as exc:
            if not out.started:
                raise
            await out.piece(b"data: %b\n\n" % error_body(exc), more=False)
            return True
        await out.piece(events.end(routed.reply.usage, summary(routed)), more=False)
        return True

    async def _embeddings(self, asked: Asked) -> Reply:
        caller = self.access.who(asked.headers)
        wanted = openai_api.embedding(asked.body)
        found = await self.calls.embed(wanted.model, wanted.texts, wanted.params, caller, asked.traceparent)
        return 200, openai_api.embeddings(found.embeddings, as_base64=wanted.base64), [_JSON, *about(found)]

    async def _models(self, asked: Asked) -> Reply:
        self.access.who(asked.headers)
        return 200, openai_api.models(self._names()), [_JSON]

    async def _model(self, asked: Asked) -> Reply:
        self.access.who(asked.headers)
        name = asked.path.removeprefix("/v1/models/")
        names = self._names()
        if name not in names:
            raise NotFound(f"no model {name[:80]!r}", hint=f"known: {', '.join(names)}", meta={"model": name[:80]})
        return 200, openai_api.model(name, names[name]), [_JSON]

    # ------------------------------------------------------------------ the seed's

    async def _infer(self, asked: Asked) -> Reply:
        caller = self.access.who(asked.headers)
        try:
            payload = _infer_request(asked.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise BadBody(f"not an infer request: {exc}") from exc
        wanted = msgspec.structs.replace(question(payload), caller=caller, traceparent=asked.traceparent)
        request, routed = await self.calls.complete(wanted)
        return 200, _encode(response_payload(request, routed)), [_JSON, *about(routed)]

    async def _providers(self, asked: Asked) -> Reply:
        self.access.who(asked.headers)
        found = [
            {"name": state.name, "models": [m.model for m in state.models]} for state in self.calls.router.providers()
        ]
        return 200, _encode({"providers": found}), [_JSON]

    # ------------------------------------------------------------------ management

    async def _management(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts = scope["path"].removeprefix("/_infermux/").split("/")
        if parts == ["metrics"] and self._metrics is not None:
            await self._metrics(scope, receive, send)
        elif len(parts) == 4 and parts[0] == "providers" and parts[2] == "circuit":
            await Post(scope["path"], self._circuit, flat_error, self._intake)(scope, receive, send)
        else:
            await get(self._figures, flat_error)(scope, receive, send)

    async def _figures(self, asked: Asked) -> Reply:
        what = asked.path.removeprefix("/_infermux/")
        if what == "health":
            return 200, b'{"status":"ok"}', [_JSON]
        self.access.look(asked.headers)
        if what == "status":
            found: Any = self._status()
        elif what == "providers":
            found = [msgspec.to_builtins(state) for state in self.calls.router.providers()]
        elif what.partition("/")[0] == "costs" and self._costs is not None:
            found = await self._costs(what, asked.query)
        else:
            raise NotFound(f"nothing is served at {asked.path}", hint="health, status, providers, costs, metrics")
        return 200, _encode(found), [_JSON]

    def _status(self) -> Json:
        states = self.calls.router.providers()
        calls, failed = self.calls.last_minute()
        return {
            "version": __version__,
            "uptime_seconds": int(self.calls.uptime_s()),
            "providers_healthy": sum(state.healthy for state in states),
            "providers_total": len(states),
            "requests_total": self.calls.requests,
            "requests_last_minute": calls,
            "errors_last_minute": failed,
            **self._facts(),
        }

    async def _circuit(self, asked: Asked) -> Reply:
        self.access.manage(asked.headers)
        _, name, _, action = asked.path.removeprefix("/_infermux/").split("/")
        known: tuple[Literal["open", "close", "reset"], ...] = ("open", "close", "reset")
        switch = next((word for word in known if word == action), None)
        if switch is None:
            raise NotFound(f"no such switch: {action[:40]!r}", hint="open, close or reset")
        self.calls.router.circuit(name, switch)
        return 200, _encode([s for s in self.calls.router.providers() if s.name == name]), [_JSON]


# ---------------------------------------------------------------------------- doors


class Post(Door):
    """`POST path`: an ASGI app, and the door of mist.kit.http1, which spares an answer in one piece what ASGI costs."""

    def __init__(self, path: str, route: Route, form: Form, intake: Intake, stream: Stream | None = None) -> None:
        self.path = path
        self.intake = intake
        self.body_s_max = intake.limits.read_timeout_s
        self.streams = stream is not None
        self._route = route
        self._stream = stream
        self._form = form

    def direct(self, path: str) -> Door | None:
        return self if path == self.path else None

    def begin(self, method: bytes, headers: Headers) -> Exchange:
        if method != b"POST":
            raise wrong_method(method.decode("latin-1"), self.path, "POST")
        return _Direct(self, dict(headers))

    async def answer(self, asked: Asked) -> Reply:
        """The answer of the route, an error among them. Raises what is no error of ours."""
        try:
            status, body, more = await self._route(asked)
        except MistError as exc:
            status, body, more = self.refused(exc)
        if request_id := asked.headers.get(b"x-request-id"):
            more.append((b"x-request-id", request_id[:REQUEST_ID_CHARS_MAX]))
        return status, body, more

    def refused(self, error: MistError) -> Reply:
        return said(error).status, self._form(error), [_JSON, *blame(error)]

    def refusal(self, error: Exception, headers: Headers) -> Reply:
        if isinstance(error, Answer):
            return error.status, self._form(error.error), [_JSON, *error.headers]
        if isinstance(error, MistError):
            return self.refused(error)
        _log.error("POST %s failed", self.path, exc_info=error)
        return self.refused(Internal(f"the server failed: {type(error).__name__}"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        out = Pieces(send, headers)
        try:
            if scope["method"] != "POST":
                raise wrong_method(scope["method"], self.path, "POST")
            with self.intake.request() as request:  # under way until it is answered
                asked = Asked(
                    scope["path"], scope.get("query_string", b""), headers, await request.read(headers, receive)
                )
                async with there(receive):
                    if (
                        self._stream is not None
                        and openai_api.wants_stream(asked.body)
                        and await self._stream(asked, out)
                    ):
                        return
                    found = await self.answer(asked)
        except Gone:
            return
        except Exception as exc:
            if out.started:
                raise  # half an answer is out: only closing the connection tells the client
            found = self.refusal(exc, [])
        await _send(send, found)


class _Direct(Exchange):
    """A request that comes without ASGI."""

    __slots__ = ("_door", "_named", "_request", "_task")

    def __init__(self, door: Post, named: dict[bytes, bytes]) -> None:
        self._door = door
        self._named = named
        self._task: asyncio.Task[None] | None = None
        self._request: Request | None = door.intake.enter()
        try:
            self._request.begin(named)
        except BaseException:
            self.left()
            raise

    def feed(self, data: bytes) -> None:
        if self._request is not None:
            self._request.feed(data)

    def end(self, respond: Respond) -> bytes | None:
        if self._request is None:
            return None
        body = self._request.end()
        if self._door.streams and openai_api.wants_stream(body):
            # the app reads it as it would have come: what was packed is not packed any more
            self._named.pop(b"content-encoding", None)
            return body
        self._task = asyncio.get_running_loop().create_task(self._work(body, respond))
        return None

    async def _work(self, body: bytes, respond: Respond) -> None:
        try:
            found = await self._door.answer(Asked(self._door.path, b"", self._named, body))
        except Exception as exc:
            found = self._door.refusal(exc, [])
        respond(*found)

    def left(self) -> None:
        if self._task is not None:  # it is done, or its client is gone
            self._task.cancel()
        request, self._request = self._request, None
        if request is not None:
            self._door.intake.leave(request)


class Pieces:
    """An answer in pieces."""

    def __init__(self, send: Send, headers: Named) -> None:
        self.started = False
        self._send = send
        self._headers = headers

    async def begin(self, headers: Pairs) -> None:
        """Idempotent."""
        if self.started:
            return
        self.started = True
        if request_id := self._headers.get(b"x-request-id"):
            headers.append((b"x-request-id", request_id[:REQUEST_ID_CHARS_MAX]))
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def piece(self, data: bytes, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


class _Silence:
    """While the block runs, a comment goes out whenever nothing else has for so long."""

    def __init__(self, out: Pieces, most_s: float) -> None:
        self._out = out
        self._most_s = most_s
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._task: asyncio.Task[None] | None = None

    def broken(self) -> None:
        self._since = self._loop.time()

    async def __aenter__(self) -> None:
        self._task = self._loop.create_task(self._watch())

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while True:
            left = self._since + self._most_s - self._loop.time()
            if left > 0:
                await asyncio.sleep(left)
                continue
            await self._out.begin(list(_SSE))
            self.broken()
            await self._out.piece(openai_api.KEEP_ALIVE)


@asynccontextmanager
async def there(receive: Receive) -> AsyncIterator[None]:
    """The block is cancelled when the client leaves, and raises Gone then."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a server runs apps in tasks
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
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


def get(route: Route, form: Form) -> App:
    """`GET` and `HEAD`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["method"] not in ("GET", "HEAD"):
                raise wrong_method(scope["method"], scope["path"], "GET")
            asked = Asked(scope["path"], scope.get("query_string", b""), dict(scope["headers"]), b"")
            found = await route(asked)
        except Answer as exc:
            found = exc.status, form(exc.error), [_JSON, *exc.headers]
        except MistError as exc:
            found = said(exc).status, form(exc), [_JSON, *blame(exc)]
        await _send(send, found, head=scope["method"] == "HEAD")

    return app


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """What of OpenAI's API is not here, said as a client of it can read."""
    error = NotFound(f"nothing is served at {scope['path']}", hint="chat/completions, completions, embeddings, models")
    await _send(send, (404, error_body(error), [_JSON, *blame(error)]), head=scope["method"] == "HEAD")


async def _send(send: Send, found: Reply, *, head: bool = False) -> None:
    status, body, headers = found
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if head else body})


def wrong_method(method: str, path: str, right: str) -> Answer:
    error = InvalidArgument(f"{method} is not served at {path}", hint=right)
    return Answer(405, error, ((b"allow", right.encode()),))


# ---------------------------------------------------------------------------- what is said of an answer


def about(routed: Routed | RoutedEmbeddings) -> Pairs:
    """The headers of an answer."""
    usage = routed.reply.usage if isinstance(routed, Routed) else routed.embeddings.usage
    out = known(routed)
    out.append((b"x-infermux-latency-ms", b"%.3f" % (routed.latency_ns / 1e6)))
    if routed.cost_usd is not None:
        out.append((b"x-infermux-cost", _decimal(routed.cost_usd)))
    if usage.tokens_in is not None:
        out.append((b"x-infermux-prompt-tokens", b"%d" % usage.tokens_in))
    if usage.tokens_out is not None:
        out.append((b"x-infermux-completion-tokens", b"%d" % usage.tokens_out))
    return out


def known(routed: Way) -> Pairs:
    """Those that are known before the answer is."""
    out = [(b"x-infermux-provider", _text(routed.provider)), (b"x-infermux-model", _text(routed.model))]
    for name, text in (
        (b"x-infermux-strategy", routed.strategy), (b"x-infermux-route-group", routed.group),
        (b"x-infermux-model-override", routed.budget_override),
    ):  # fmt: skip
        if text:
            out.append((name, _text(text)))
    return out


def summary(routed: Way) -> Json:
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


def flat_error(error: MistError) -> bytes:
    return _encode(error.to_wire())


def _decimal(usd: float) -> bytes:
    """Dollars without an exponent, down to a billionth."""
    return (f"{usd:.9f}".rstrip("0").rstrip(".") or "0").encode()


def _text(value: str) -> bytes:
    """A name as a header may carry it."""
    return value.encode("ascii", "backslashreplace").replace(b"\r", b"").replace(b"\n", b"")
