"""MatchSpec over HTTP: the routes of its documents and those of the seed.

| | |
|---|---|
| `POST /run` | `{suite?, tags?, concurrency?, baseline?}` -> 202 `{run_id, status, suite, started_at, results_url}` |
| `GET /results` | `{runs, total, limit, offset, next}`, newest first; `suite`, `status`, `limit`, `offset` or `cursor` |
| `GET /results/{id}` | the progress of a run, or its report |
| `GET /suites` | `{suites: [{name, task_count, harnesses, thresholds}]}` |
| `GET /health` | `{status, version}`, always open |
| `POST /eval` | the seed's: a bare `eval.run` payload -> a bare array of `eval.result` payloads, when all are there |
| `POST /mist` | the same in an envelope; with `Accept: application/x-ndjson` the answer is envelopes, one a line |
| `GET /results?suite=NAME` | the seed's: with this parameter alone a bare array of results of all runs |

With a key every route but /health wants `Authorization: Bearer KEY`. Errors are the flat error JSON, or its message as plain
text where only that is accepted. A body's `config` is refused: files of the server are not the client's to choose.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from msgspec import Raw, Struct

import mist
from mist.client.handler import Handler
from mist.errors import InvalidArgument, Malformed, MistError, NotAuthorised, NotFound, TooLarge
from mist.kit.server import Answer, App, Receive, Scope, Send, as_asked, refusal, reply
from mist.protocol.codec import decode_foreign, encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import EVAL_RESULT, EVAL_RUN, EvalRun
from mist.tools.matchspec.asking import SOURCE
from mist.tools.matchspec.reports.values import Report
from mist.tools.matchspec.results import each_result, read_head, read_heads
from mist.tools.matchspec.service import Job, Service, State
from mist.tools.matchspec.suite import Suite
from mist.transport.body import Gone, Intake, Limits

LIMIT = 20
LIMIT_MAX = 1000
RESULTS_MAX = 10_000
RESULTS_BYTES_MAX = 64 * 1024 * 1024
"""Results that one answer of the seed's routes holds; larger runs are asked for by `POST /run`."""
STATUSES = ("running", "passed", "failed", "error")
_LIMITS = Limits(body_bytes_max=1024 * 1024, inflight_requests_max=64)
_NDJSON = b"application/x-ndjson"


class RunBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    suite: str = ""
    tags: list[str] = []
    concurrency: int | None = None
    baseline: str = ""
    config: str = ""


class Api:
    """The routes, as doors of a site. `mist` False leaves `/mist` to another door."""

    def __init__(self, service: Service, *, key: str = "") -> None:
        self._service = service
        self._key = key.encode()
        self._intake = Intake(_LIMITS)
        self.handler = Handler("matchspec", self._run_envelope, accepts=(EVAL_RUN,))
        """The tool as it runs over any transport: `eval.run` in, `eval.result` out."""

    def doors(self, *, mist: bool = True) -> dict[str, App]:
        doors = {
            "/run": self._door("POST", self._run),
            "/results/": self._door("GET", self._result),
            "/results": self._door("GET", self._results),
            "/suites": self._door("GET", self._suites),
            "/health": self._door("GET", self._health, open=True),
            "/eval": self._door("POST", self._eval),
        }
        return {**doors, "/mist": self._door("POST", self._mist)} if mist else doors

    def _door(self, method: str, answer: Callable[[Asked], Awaitable[Answer]], *, open: bool = False) -> App:
        allowed = ("GET", "HEAD") if method == "GET" else (method,)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                if scope["method"] not in allowed:
                    error = InvalidArgument(f"{scope['method']} is not served at {scope['path']}", hint=method)
                    found = as_asked(scope, refusal(405, error, ((b"allow", ", ".join(allowed).encode()),)), error)
                else:
                    headers = {bytes(k).lower(): bytes(v) for k, v in scope["headers"]}
                    if not open:
                        self._authorise(headers)
                    body = b""
                    if method == "POST":
                        with self._intake.request() as request:
                            body = await request.read(headers, receive)
                    found = await answer(Asked(scope, headers, body))
            except Gone:
                return
            except MistError as exc:
                extra: tuple[tuple[bytes, bytes], ...] = ()
                if isinstance(exc, NotAuthorised):
                    extra = ((b"www-authenticate", b"Bearer"),)
                elif exc.http_status in (429, 503):
                    extra = ((b"retry-after", b"%d" % max(1, round(exc.retry_after_s or 1))),)
                found = as_asked(scope, refusal(exc.http_status, exc, extra), exc)
            await reply(scope, send, found)

        return app

    def _authorise(self, headers: dict[bytes, bytes]) -> None:
        if not self._key:
            return
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._key):
            raise NotAuthorised("the key is missing or wrong", hint="Authorization: Bearer …")

    # ----------------------------------------------------------------- the documents' routes

    async def _run(self, asked: Asked) -> Answer:
        body = asked.json(RunBody)
        if body.config:
            raise InvalidArgument("config: files of the server are not chosen by a request", hint="name a suite")
        names = [body.suite] if body.suite else list(self._service.suites)
        if not names:
            raise NotFound("there are no suites here")
        options: dict[str, Any] = {"concurrency": body.concurrency, "baseline": body.baseline}
        begun = [_begun(await self._service.begin(name, tags=body.tags, **options)) for name in names]
        return _json({**begun[0], "runs": begun} if len(begun) > 1 else begun[0], status=202)

    async def _results(self, asked: Asked) -> Answer:
        query = asked.query(("suite", "status", "limit", "offset", "cursor"))
        if set(query) == {"suite"}:
            return await self._of_suite(query["suite"])
        limit = _number(query, "limit", LIMIT, 1, LIMIT_MAX)
        offset = _number(query, "offset", 0, 0, 2**53)
        cursor = _number(query, "cursor", 0, 0, 2**63 - 1)
        status = query.get("status", "")
        if status and status not in STATUSES:
            raise InvalidArgument(f"no status {status[:40]!r}", hint=f"one of {', '.join(STATUSES)}")
        if cursor and offset:
            raise InvalidArgument("offset and cursor are given both", hint="`next` of the page before is the cursor")
        found = [
            s
            for s in await self._service.states()
            if (not status or s.status == status) and query.get("suite", s.suite) == s.suite
        ]
        page = [s for s in found if not cursor or s.first < cursor][offset : offset + limit]
        more = bool(page) and page[-1] is not found[-1]
        runs = [
            {
                "run_id": s.run_id, "status": s.status, "suite": s.suite, "started_at": s.started_at,
                "finished_at": s.finished_at, "verdict": s.verdict,
            }
            for s in page
        ]  # fmt: skip
        answer = {"runs": runs, "total": len(found), "limit": limit, "offset": offset}
        return _json({**answer, "next": str(page[-1].first) if more else ""})

    async def _result(self, asked: Asked) -> Answer:
        asked.query(())
        id = asked.scope["path"].removeprefix("/results/")
        state = await self._service.state(id)
        if state.status == "running":
            return _json(_progress(state))
        report: Report = await self._service.report(id)
        if state.error:
            return _json({**msgspec.to_builtins(report), "status": state.status, "error": state.error})
        return _json(report)

    async def _suites(self, asked: Asked) -> Answer:
        asked.query(())
        return _json({"suites": [_suite(s) for s in self._service.suites.values()]})

    async def _health(self, asked: Asked) -> Answer:
        return _json({"status": "ok", "version": mist.__version__})

    # ----------------------------------------------------------------- the seed's routes

    async def _of_suite(self, suite: str) -> Answer:
        found: list[Raw] = []
        for id, (manifest, _) in (await read_heads(self._service.stream)).items():
            if manifest.suite == suite:
                size = sum(len(bytes(raw)) for raw in found)
                found += await self._payloads(id, RESULTS_MAX - len(found), RESULTS_BYTES_MAX - size)
        if not found and suite not in self._service.suites:
            raise NotFound(f"matchspec: unknown suite {suite[:80]!r}", hint="GET /suites lists them")
        return _json(found)

    async def _eval(self, asked: Asked) -> Answer:
        try:
            run = msgspec.json.decode(asked.body, type=EvalRun)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise Malformed(f"invalid request: {exc}") from exc
        return _json(await self._finished(run))

    async def _mist(self, asked: Asked) -> Answer:
        request = decode_foreign(asked.body)
        outputs = await self.handler(request)
        if request.type != EVAL_RUN:
            return Answer(200, encode(outputs[0]))
        if _NDJSON in asked.headers.get(b"accept", b""):
            return Answer(200, b"".join(encode(env) + b"\n" for env in outputs), _NDJSON)
        return _json([env.payload for env in outputs])

    async def _run_envelope(self, request: Envelope) -> list[Envelope]:
        try:
            run = request.decode(EvalRun)
        except Malformed as exc:
            raise Malformed(f"invalid run payload: {exc.message}") from exc
        # a request that is handled again after a crash is the same run
        id = "run-" + hashlib.blake2b(f"{request.source}\0{request.id}".encode(), digest_size=12).hexdigest()
        return [Envelope.new(EVAL_RESULT, raw, source=SOURCE) for raw in await self._finished(run, id)]

    async def _finished(self, run: EvalRun, id: str = "") -> list[Raw]:
        """The results of a run, when all are there. The seed's `baseline` names no run and its `tags` choose
        nothing: both are taken and have no effect, as there."""
        suite = self._service.suites.get(run.suite)
        if suite is not None and suite.total > RESULTS_MAX:
            raise TooLarge(
                f"suite {run.suite}", size_bytes=suite.total, size_bytes_max=RESULTS_MAX,
                hint="POST /run begins it, GET /results/{id} has its report",
            )  # fmt: skip
        if run.infer_url:
            raise InvalidArgument("infer_url: whom to ask is the server's to say", hint="leave it out")
        job = await self._service.begin(run.suite, tasks=run.tasks, id=id)
        await job.done.wait()
        return await self._payloads(job.run_id, RESULTS_MAX, RESULTS_BYTES_MAX)

    async def _payloads(self, id: str, limit: int, bytes_max: int) -> list[Raw]:
        """In the order of the data. Raises TooLarge."""
        stream = self._service.stream
        head = await read_head(stream, id)
        order = {h.name: at for at, h in enumerate(head.manifest.harnesses)}
        found: list[tuple[tuple[int, int, int], Raw]] = []
        size = 0
        async for stored in each_result(stream, head):
            if len(found) >= limit:
                break
            r = stored.result
            data = msgspec.json.encode(r)
            size += len(data)
            if size > bytes_max:
                raise TooLarge(
                    f"results of run {id}", size_bytes=size, size_bytes_max=bytes_max, hint="GET /results/{id}"
                )
            found.append(((order.get(r.harness, 0), r.index, r.epoch), Raw(data)))
        return [raw for _, raw in sorted(found, key=lambda item: item[0])]


class Asked:
    """One request: its scope, headers by lower-case name, body."""

    def __init__(self, scope: Scope, headers: dict[bytes, bytes], body: bytes) -> None:
        self.scope = scope
        self.headers = headers
        self.body = body

    def json(self, type: type[RunBody]) -> RunBody:
        """The body; an empty one is an empty object. Raises Malformed."""
        try:
            return msgspec.json.decode(self.body or b"{}", type=type)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise Malformed(f"body: {exc}") from exc

    def query(self, known: tuple[str, ...]) -> dict[str, str]:
        """The parameters, each once. Raises InvalidArgument for one that is not known: a filter with a typing error would
        otherwise answer for everything."""
        try:
            pairs = parse_qsl(
                self.scope.get("query_string", b"").decode("ascii"), keep_blank_values=True, max_num_fields=20,
                errors="strict",
            )  # fmt: skip
        except (ValueError, UnicodeDecodeError) as exc:
            raise InvalidArgument(f"the query cannot be read: {str(exc)[:100]}") from exc
        found = dict(pairs)
        strange = [name for name in found if name not in known]
        if strange or len(found) != len(pairs):
            raise InvalidArgument(
                f"parameter {(strange or ['?'])[0][:80]!r} is not known here, or given twice",
                hint=f"known here: {', '.join(known) or 'none'}",
            )
        return found


def _json(value: Any, status: int = 200) -> Answer:
    return Answer(status, msgspec.json.encode(value))


def _number(query: dict[str, str], name: str, default: int, low: int, high: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
        raise InvalidArgument(f"{name}={text[:40]!r} is not a number from {low} to {high}")
    return int(text)


def _begun(job: Job) -> dict[str, Any]:
    return {
        "run_id": job.run_id, "status": "running", "suite": job.suite, "started_at": job.started_at,
        "results_url": f"/results/{job.run_id}",
    }  # fmt: skip


def _progress(state: State) -> dict[str, Any]:
    percent = round(100 * state.completed / state.total, 1) if state.total else 0.0
    return {
        "run_id": state.run_id, "status": state.status, "suite": state.suite, "started_at": state.started_at,
        "progress": {"total": state.total, "completed": state.completed, "percent": percent},
    }  # fmt: skip


def _suite(suite: Suite) -> dict[str, Any]:
    gate = suite.gate
    own = {g.name: g.threshold for h in suite.harnesses for g in h.graders if g.threshold is not None}
    overall = {} if gate.overall is None else {"overall": gate.overall}
    return {
        "name": suite.name, "task_count": sum(len(h.samples) for h in suite.harnesses),
        "harnesses": [h.name for h in suite.harnesses], "thresholds": {**own, **gate.per_grader, **overall},
        "description": suite.description, "tags": list(suite.tags),
    }  # fmt: skip
