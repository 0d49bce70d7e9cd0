"""Who answers. `answerer(spec, …)` gives one for every kind of model but the recorded one.

`at_once` answers without waiting for anybody (echo, noop); the others are asked: `await ask(question)` gives an
`infer.response` envelope. `records` says whether whoever answers stores question and answer in the stream of answers
itself; where not, the runner does.

    infer    over a broker           the question is published under its own id and answered by whoever consumes it;
                                     the answer is the first `infer.response` with its correlation_id
             over http(s)            POST /mist
             callable                handed in by the program
    http     any endpoint, by template and path
    command  a program, without a shell; killed with its group when it takes too long
    python   a callable

Errors are MistErrors whose `retryable` says whether asking again can help. Does not retry and does not time: the runner
does.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import msgspec

from mist.broker.base import Stream
from mist.broker.patience import again
from mist.client.client import to_message
from mist.client.received import decode_record
from mist.errors import (
    Internal,
    InvalidArgument,
    Malformed,
    MistError,
    NotAuthorised,
    NotFound,
    ProtocolError,
    TooLarge,
    TransportError,
    Unavailable,
)
from mist.kit.aside import aside
from mist.kit.http1_client import Pool, Response
from mist.kit.http1_target import Target, checked_headers, host_of
from mist.protocol.codec import decode_foreign, encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import INFER_RESPONSE
from mist.tools.matchspec.asking import Answer, Ask, Question, response
from mist.tools.matchspec.suite import Command, Echo, Harness, Http, Infer, Noop, Python, Recorded, Sample
from mist.transport._status import error_for

OUTPUT_BYTES_MAX = 8 * 1024 * 1024
STDERR_CHARS_MAX = 500
_PIECE = 1 << 16
ANSWERS = (INFER_RESPONSE, f"{INFER_RESPONSE}.>")
_HOLE = re.compile(r"\{\{\s*(input|system|id)\s*\}\}")
_STEP = re.compile(r"(?:^|\.)([A-Za-z_$][\w$-]*)|\[(\d+)\]", re.ASCII)


class Answerer(Protocol):
    records: bool

    async def ask(self, q: Question) -> Envelope: ...

    async def aclose(self) -> None: ...


def at_once(harness: Harness) -> Callable[[Sample], Answer | str | None] | None:
    """What answers without waiting; None where somebody must be asked. None as its answer: there is none."""
    model = harness.model
    match model:
        case Recorded():
            answers = model.answers
            return (lambda sample: sample.output) if answers is None else lambda sample: answers.get(sample.id)
        case Echo():
            return harness.prompt
        case Noop():
            return lambda sample: ""
    return None


def answerer(
    harness: Harness,
    *,
    ask: Ask | None,
    questions: Stream | None,
    answers: Stream,
    after: int,
    asked: Callable[[str], bool],
) -> Answerer:
    """Ready to be asked. Over a broker: questions go to the one stream, their answers are looked for on the other, behind
    `after`; `asked` says whether a question was put before. Raises InvalidArgument, NotFound, NotAuthorised, Unsupported."""
    model = harness.model
    match model:
        case Infer() if questions is not None:
            return _OverBroker(questions, answers, after, asked)
        case Infer(url="") if ask is not None:
            return _Callable(ask)
        case Infer(url=url) if url:
            return _OverHttp(url)
        case Http():
            return _Endpoint(model, harness.label)
        case Command():
            return _Program(model, harness.label)
        case Python():
            return _Function(model, harness.label)
    raise InvalidArgument(f"harness {harness.name}: nobody has to be asked, or nobody can be")


class _Callable:
    records = False

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def ask(self, q: Question) -> Envelope:
        return await self._ask(q.request)

    async def aclose(self) -> None:
        return None


class _OverBroker:
    """Questions on one stream, answers from another. One task follows the answers for all who wait."""

    records = True

    def __init__(self, questions: Stream, answers: Stream, after: int, asked: Callable[[str], bool]) -> None:
        self._questions = questions
        self._answers = answers
        self._after = after
        self._asked = asked
        self._waiting: dict[str, asyncio.Future[Envelope]] = {}
        self._following: asyncio.Task[None] | None = None

    async def ask(self, q: Question) -> Envelope:
        future = self._waiting.get(q.id)
        if future is None:
            future = self._waiting[q.id] = asyncio.get_running_loop().create_future()
        try:
            if self._following is None or self._following.done():
                self._following = asyncio.create_task(self._follow())
            if not self._asked(q.id):
                message = to_message(q.request, size_bytes_max=self._questions.size_bytes_max)
                await again(lambda: self._questions.append([message]))
            return await asyncio.shield(future)
        finally:
            self._waiting.pop(q.id, None)

    async def _follow(self) -> None:
        try:
            while True:
                page = await again(
                    lambda: self._answers.read(after=self._after, subjects=ANSWERS, limit=1000, wait_s=5.0)
                )
                for record in page.records:
                    try:
                        env = decode_record(record)
                    except MistError:
                        continue  # not an envelope, so nobody's answer
                    waiter = self._waiting.get(env.correlation_id)
                    if waiter is not None and not waiter.done():
                        waiter.set_result(env)
                self._after = page.scanned
        except MistError as exc:
            for waiter in self._waiting.values():
                if not waiter.done():
                    error = Unavailable(f"the answers on stream {self._answers.name} cannot be read: {exc}")
                    error.__cause__ = exc
                    waiter.set_exception(error)

    async def aclose(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait({self._following})


class Posting:
    """Requests over connections that are kept. `url` is what they go to, for errors; it may have holes."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        Target.of(_HOLE.sub("x", url), "the URL of a model")
        self._where = urlsplit(url)._replace(query="", fragment="").geturl()
        self._headers = {
            "user-agent": "mist-matchspec", "accept-encoding": "identity", "content-type": "application/json",
            **checked_headers(headers or {}, "the headers of a model"),
        }  # fmt: skip
        self._pool = Pool()

    async def send(self, method: str, url: str, body: bytes | None, traceparent: str = "") -> bytes:
        """The answer's body. Raises what its status, or its absence, stands for."""
        target = Target.of(url, "the URL of a model")
        headers = {"host": host_of(target.origin), **self._headers}
        if traceparent:
            headers["traceparent"] = traceparent
        if body is not None:
            headers["content-length"] = str(len(body))
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"{method} {target.path or '/'}{target.query} HTTP/1.1\r\n{lines}\r\n".encode("ascii")
        try:
            answer = await self._pool.post(target.origin, head, body or b"", repeatable=True)
            try:
                found = await self._read(answer)
            finally:
                answer.release()
        except (Unavailable, ProtocolError) as exc:
            raise Unavailable(f"{self._where}: {exc.message}") from exc
        if answer.status >= 300:
            raise error_for(answer.status, answer.headers, found, self._where)
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise Malformed(f"{self._where}: the answer is compressed, which nobody asked for")
        return found

    async def _read(self, answer: Response) -> bytes:
        found = bytearray()
        while piece := await answer.read():
            found += piece
            if len(found) > OUTPUT_BYTES_MAX:
                raise TooLarge(f"answer of {self._where}", size_bytes=len(found), size_bytes_max=OUTPUT_BYTES_MAX)
        return bytes(found)

    async def aclose(self) -> None:
        await self._pool.aclose()


class _OverHttp:
    records = False

    def __init__(self, url: str) -> None:
        self._url = url if urlsplit(url).path not in ("", "/") else url.rstrip("/") + "/mist"
        self._http = Posting(url)

    async def ask(self, q: Question) -> Envelope:
        body = await self._http.send("POST", self._url, encode(q.request), q.request.traceparent)
        if not body.strip():
            raise TransportError(f"{self._url}: took the question and gave no answer", retryable=False)
        return decode_foreign(body)

    async def aclose(self) -> None:
        await self._http.aclose()


class _Endpoint:
    records = False

    def __init__(self, spec: Http, label: str) -> None:
        self._spec = spec
        self._label = label
        headers = dict(spec.headers)
        if spec.api_key_env:
            key = os.environ.get(spec.api_key_env, "")
            if not key:
                raise NotAuthorised(f"model {label}: the variable {spec.api_key_env} is not set")
            if not any(name.lower() == "authorization" for name in spec.headers):
                headers["Authorization"] = f"Bearer {key}"
            headers = {k: v.replace("{{api_key}}", key) for k, v in headers.items()}
        self._http = Posting(spec.endpoint, headers)
        if spec.response_path:
            path_steps(spec.response_path)

    async def ask(self, q: Question) -> Envelope:
        began = time.perf_counter_ns()
        template = self._spec.request_template
        body = (
            None
            if self._spec.method == "GET"
            else msgspec.json.encode({"input": q.prompt} if template is None else fill(template, q))
        )
        url = _filled(self._spec.endpoint, q, encoded=True)
        raw = await self._http.send(self._spec.method, url, body)
        if not self._spec.response_path:
            output = raw.decode("utf-8", "replace")
        else:
            try:
                output = pick(msgspec.json.decode(raw), self._spec.response_path)
            except (msgspec.DecodeError, UnicodeDecodeError) as exc:
                raise Malformed(f"model {self._label}: the answer is not JSON: {exc}") from exc
        return response(q, Answer(output=output, latency_ms=_since_ms(began)), self._label)

    async def aclose(self) -> None:
        await self._http.aclose()


def fill(template: Any, q: Question) -> Any:
    """The template with its holes filled; only texts are looked into, so that no input can change its shape."""
    if isinstance(template, str):
        return _filled(template, q)
    if isinstance(template, dict):
        return {k: fill(v, q) for k, v in template.items()}
    if isinstance(template, list | tuple):
        return [fill(v, q) for v in template]
    return template


def _filled(text: str, q: Question, *, encoded: bool = False) -> str:
    """`encoded`: for a URL; nothing in a value is more than a part of it."""
    values = {"input": q.prompt, "system": q.system, "id": q.sample.id}
    return _HOLE.sub(lambda m: quote(values[m[1]], safe="") if encoded else values[m[1]], text)


def path_steps(path: str) -> list[str | int]:
    """`choices[0].message.content` as its steps. Raises InvalidArgument."""
    steps: list[str | int] = []
    at = 0
    for m in _STEP.finditer(path):
        if m.start() != at:
            break
        steps.append(m[1] if m[1] is not None else int(m[2]))
        at = m.end()
    if at != len(path) or not steps:
        raise InvalidArgument(f"not a path into an answer: {path!r}", hint="for example choices[0].message.content")
    return steps


def pick(document: Any, path: str) -> str:
    """The text (or number, as text) at the path. Raises Malformed when there is none."""
    value: Any = document
    for step in path_steps(path):
        try:
            fits = isinstance(value, list if isinstance(step, int) else dict)
            value = value[step] if fits else None
        except (KeyError, IndexError):
            value = None
        if value is None:
            raise Malformed(f"the answer has nothing at {path} (looked for {step!r})")
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return msgspec.json.encode(value).decode()
    raise Malformed(f"what the answer has at {path} is no text")


class _Program:
    records = False

    def __init__(self, spec: Command, label: str) -> None:
        if not spec.command:
            raise InvalidArgument("model of type command: no command")
        self._spec = spec
        self._label = label

    async def ask(self, q: Question) -> Envelope:
        began = time.perf_counter_ns()
        argv = list(self._spec.command)
        env = dict(os.environ)
        if self._spec.input_via == "arg":
            argv.append(q.prompt)
        elif self._spec.input_via == "env":
            env["INPUT"] = q.prompt
        by_stdin = self._spec.input_via == "stdin"
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.PIPE if by_stdin else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=env,
                start_new_session=True,
            )
        )
        try:
            process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # asyncio would kill the program alone and wait for the pipes that its children hold
            with contextlib.suppress(OSError, ValueError):
                await _end(await starting)
            raise
        except (OSError, ValueError) as exc:
            raise NotFound(f"model {self._label}: cannot start {argv[0]!r}: {exc}") from exc
        try:
            out, err = await _communicate(process, q.prompt.encode() if by_stdin else None)
            if len(out) > OUTPUT_BYTES_MAX:  # it may go on for ever
                raise TooLarge(f"answer of {self._label}", size_bytes=len(out), size_bytes_max=OUTPUT_BYTES_MAX)
            await process.wait()
        except BaseException:
            await _end(process)
            raise
        if process.returncode:
            told = err.decode("utf-8", "replace").strip()[-STDERR_CHARS_MAX:]
            raise TransportError(f"model {self._label}: exit code {process.returncode}: {told}", retryable=False)
        output = out.decode("utf-8", "replace").removesuffix("\n")
        return response(q, Answer(output=output, latency_ms=_since_ms(began)), self._label)

    async def aclose(self) -> None:
        return None


async def _communicate(process: asyncio.subprocess.Process, given: bytes | None) -> tuple[bytes, bytes]:
    """What it writes to its output, up to one byte more than may be, and the end of what it complains about."""

    async def write() -> None:
        if given is not None and process.stdin is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read what it is asked
                process.stdin.write(given)
                await process.stdin.drain()
            process.stdin.close()

    async def complaints() -> bytes:
        kept = b""
        while stderr is not None and (piece := await stderr.read(_PIECE)):
            kept = (kept + piece)[-4 * STDERR_CHARS_MAX :]
        return kept

    stdout, stderr = process.stdout, process.stderr
    writing = asyncio.create_task(write())
    complaining = asyncio.create_task(complaints())
    try:
        out = bytearray()
        while stdout is not None and len(out) <= OUTPUT_BYTES_MAX and (piece := await stdout.read(_PIECE)):
            out += piece
        if len(out) > OUTPUT_BYTES_MAX:
            return bytes(out), b""
        await writing
        return bytes(out), await complaining
    finally:
        for task in (writing, complaining):
            task.cancel()
        await asyncio.wait({writing, complaining})


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill it with its group, and wait. Where it has ended by itself, a child of it may still hold its output open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.returncode is None:
        await asyncio.shield(process.wait())


class _Function:
    records = False

    def __init__(self, spec: Python, label: str) -> None:
        self._label = label
        self._call = load_callable(spec.target)

    async def ask(self, q: Question) -> Envelope:
        began = time.perf_counter_ns()
        try:
            if inspect.iscoroutinefunction(self._call):
                output = await self._call(q.prompt)
            else:
                output = await aside(lambda: self._call(q.prompt))
        except MistError:
            raise
        except Exception as exc:  # somebody else's code may raise anything
            raise Internal(f"model {self._label} raised {type(exc).__name__}: {exc}") from exc
        if not isinstance(output, str):
            raise Malformed(f"model {self._label} gave {type(output).__name__}, not text")
        return response(q, Answer(output=output, latency_ms=_since_ms(began)), self._label)

    async def aclose(self) -> None:
        return None


def load_callable(target: str) -> Callable[..., Any]:
    """`module:callable`. Raises InvalidArgument, NotFound."""
    module, colon, name = target.partition(":")
    if not colon or not module or not name:
        raise InvalidArgument(f"not a callable: {target!r}", hint="module:callable")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as exc:
        raise NotFound(f"no {target}: {exc}") from exc
    if not callable(found):
        raise InvalidArgument(f"{target} is not callable")
    return found  # type: ignore[no-any-return]


def _since_ms(began_ns: int) -> float:
    return (time.perf_counter_ns() - began_ns) / 1e6
