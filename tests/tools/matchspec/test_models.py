"""Who answers: an endpoint, a program, a callable, InferMux over HTTP; and how each of them fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import run
from msgspec import Struct

import mist
from mist.broker.base import Stream
from mist.errors import InvalidArgument, Malformed, MistError, NotAuthorised, NotFound, TooLarge
from mist.protocol.codec import decode, encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import INFER_RESPONSE
from mist.tools.matchspec import models
from mist.tools.matchspec.asking import question, read_answer
from mist.tools.matchspec.models import Answerer, answerer, at_once, fill, load_callable, path_steps, pick
from mist.tools.matchspec.suite import Command, Echo, Harness, Http, Infer, ModelSpec, Noop, Python, Sample

SAMPLE = Sample("s1", 'say "hi"', "x")


def harness(model: ModelSpec, **settings: Any) -> Harness:
    return Harness(name="h", samples=[SAMPLE], model=model, graders=(), **settings)


async def asked(model: ModelSpec, **settings: Any) -> str:
    """What it answers to the sample."""
    async with mist.connect("memory:") as broker:
        h = harness(model, **settings)
        who = answerer(h, ask=None, questions=None, answers=await broker.open("infer"), after=0, asked=lambda id: False)
        try:
            q = question("r", h, SAMPLE, "k", 1, seed=None)
            env = await who.ask(q)
            assert env.correlation_id == q.id
            return read_answer(env).output
        finally:
            await who.aclose()


def test_what_answers_at_once() -> None:
    """Echo gives the prompt, noop nothing; the others have to be asked."""
    echo, noop = at_once(harness(Echo(), template="<{{input}}>")), at_once(harness(Noop()))
    assert echo is not None
    assert noop is not None
    assert (echo(SAMPLE), noop(SAMPLE)) == ('<say "hi">', "")
    assert at_once(harness(Http(endpoint="http://x"))) is None


@pytest.mark.parametrize(
    ("via", "code"),
    [
        ("stdin", "import sys; print(sys.stdin.read().upper())"),
        ("arg", "import sys; print(sys.argv[1].upper())"),
        ("env", "import os; print(os.environ['INPUT'].upper())"),
    ],
)
def test_a_program_answers(via: Any, code: str) -> None:
    """Its standard output without the last new line; no shell looks at the input."""
    model = Command(command=(sys.executable, "-S", "-c", code), input_via=via)
    assert run(asked(model)) == 'SAY "HI"'


def test_a_program_that_never_stops_talking_is_ended_and_one_that_reads_nothing_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No more of it is kept than an answer may have."""
    monkeypatch.setattr(models, "OUTPUT_BYTES_MAX", 100_000)
    with pytest.raises(TooLarge):
        run(asked(Command(command=("sh", "-c", "while :; do echo yes; echo no >&2; done"))))
    assert run(asked(Command(command=("sh", "-c", "exec <&-; echo yes")), template="x" * 10**6)) == "yes"


def test_a_program_that_fails_is_an_error_and_one_that_is_slow_is_killed_with_its_children(tmp_path: Path) -> None:
    """Exit code and the end of stderr are told."""
    with pytest.raises(MistError, match="exit code 3: no luck") as failed:
        run(asked(Command(command=("sh", "-c", "echo no luck >&2; exit 3"))))
    assert not failed.value.retryable
    with pytest.raises(NotFound):
        run(asked(Command(command=("/none/such",))))
    pid = tmp_path / "pid"

    async def slow() -> None:
        async with asyncio.timeout(10):
            task = asyncio.create_task(
                asked(Command(command=("sh", "-c", f"sleep 60 & echo $! > {pid}.new; mv {pid}.new {pid}; wait")))
            )
            while not pid.exists():
                await asyncio.sleep(0.005)
            task.cancel()
            await asyncio.wait({task})

    run(slow())
    child = int(pid.read_text())
    until = time.monotonic() + 10
    while _alive(child):
        assert time.monotonic() < until
        time.sleep(0.005)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


async def loud(text: str) -> str:
    return text.upper()


def bad(text: str) -> str:
    raise KeyError(text)


def nothing(text: str) -> None:
    return None


def test_a_callable_answers() -> None:
    """Coroutine functions and plain ones; what it raises, and what is no text, is an error."""
    assert run(asked(Python(target=f"{__name__}:loud"))) == 'SAY "HI"'
    assert run(asked(Python(target="builtins:repr"))) == repr(SAMPLE.input)
    for target, error in ((f"{__name__}:bad", "KeyError"), (f"{__name__}:nothing", "NoneType, not text")):
        with pytest.raises(MistError, match=error):
            run(asked(Python(target=target)))
    for target in ("nothing", ":x", "no.such.module:f", "builtins:none"):
        with pytest.raises((InvalidArgument, NotFound)):
            load_callable(target)


def test_templates_are_filled_in_their_texts_only() -> None:
    """An input cannot change the shape of a request, and holes in it stay."""
    q = question("r", harness(Echo(), system="sys"), Sample("7", '"}{{id}}', ""), "k", 1, seed=None)
    template = {"m": [{"c": "<{{input}}>"}, "{{ system }}", 3, None, True], "{{input}}": "{{id}}{{x}}"}
    assert fill(template, q) == {"m": [{"c": '<"}{{id}}>'}, "sys", 3, None, True], "{{input}}": "7{{x}}"}


def test_paths_into_answers() -> None:
    """Names and places; what is not there, or no text, is an error."""
    document = {"choices": [{"message": {"content": "hi"}}], "n": 4, "ok": True, "deep": {"x": None}}
    assert pick(document, "choices[0].message.content") == "hi"
    assert (pick(document, "n"), pick(document, "ok"), pick([["a"]], "[0][0]")) == ("4", "true", "a")
    for path in ("choices[1].message", "choices.message", "none", "deep.x", "choices", "n[0]"):
        with pytest.raises(Malformed):
            pick(document, path)
    for path in ("", ".", "a..b", "a[", "a[-1]", "[x]", "a b"):
        with pytest.raises(InvalidArgument):
            path_steps(path)


class Asked(Struct):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Told(Struct):
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = {}


Serve = Callable[[Asked], Told]


async def serving(serve: Serve, body: Callable[[str], Awaitable[None]]) -> None:
    """Run `body` with the address of a real server, which keeps its connections."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while True:
                line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
                method, path, _ = line.split(" ")
                headers = dict(f.split(": ", 1) for f in fields)
                told = serve(
                    Asked(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))
                )
                more = "".join(
                    f"{k}: {v}\r\n" for k, v in {**told.headers, "content-length": str(len(told.body))}.items()
                )
                writer.write(f"HTTP/1.1 {told.status} x\r\n{more}\r\n".encode() + told.body)

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        await body(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


def test_an_endpoint_answers_and_fails_as_its_status_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Template, headers, key from the environment, path; statuses become errors that say whether to try again."""
    monkeypatch.setenv("THE_KEY", "secret")
    seen: list[tuple[dict[str, str], Any]] = []
    paths: list[str] = []
    status = 200
    text = b'{"choices": [{"message": {"content": "hello"}}]}'

    def serve(request: Asked) -> Told:
        seen.append((request.headers, msgspec.json.decode(request.body or b"null")))
        paths.append(request.path)
        return Told(text, status, {"Retry-After": "7"} if status == 429 else {})

    async def body(base: str) -> None:
        nonlocal status, text
        model = Http(
            endpoint=f"{base}/v1/chat", headers={"X-A": "b"}, api_key_env="THE_KEY",
            request_template={"messages": [{"role": "user", "content": "{{input}}"}]},
            response_path="choices[0].message.content",
        )  # fmt: skip
        assert await asked(model) == "hello"
        headers, request = seen[-1]
        assert (headers["authorization"], headers["x-a"]) == ("Bearer secret", "b")
        assert request == {"messages": [{"role": "user", "content": SAMPLE.input}]}
        for given, code, retryable, after in (
            (429, "rate_limit", True, 7),
            (503, "unavailable", True, None),
            (401, "auth", False, None),
        ):
            status = given
            with pytest.raises(MistError) as failed:
                await asked(model)
            error = failed.value
            assert (error.code, error.retryable, error.retry_after_s) == (code, retryable, after)
            assert "secret" not in str(error)
        status, text = 200, b"not json"
        with pytest.raises(Malformed):
            await asked(model)
        assert await asked(Http(endpoint=base, method="GET")) == "not json"
        await asked(Http(endpoint=f"{base}/a/{{{{id}}}}?q={{{{input}}}}&b=c#d", method="GET"))
        assert paths[-2:] == ["/", "/a/s1?q=say%20%22hi%22&b=c"]

    run(serving(serve, body))
    monkeypatch.delenv("THE_KEY")
    with pytest.raises(NotAuthorised, match="THE_KEY"):
        run(asked(Http(endpoint="http://127.0.0.1:9", api_key_env="THE_KEY")))
    with pytest.raises(InvalidArgument):
        run(asked(Http(endpoint="http://user:pass@127.0.0.1:9")))
    with pytest.raises(InvalidArgument, match="no header may hold"):
        run(asked(Http(endpoint="http://127.0.0.1:9", headers={"X-A": "b\r\nX-B: c"})))
    with pytest.raises(MistError) as refused:
        run(asked(Http(endpoint="http://127.0.0.1:9")))
    assert refused.value.retryable


def test_infermux_is_asked_over_http() -> None:
    """An envelope to /mist, its answer by correlation; an error in its own words; no answer is an error."""
    answers: list[Told] = []

    def serve(request: Asked) -> Told:
        assert request.path == "/mist"
        if answers:
            return answers.pop()
        env = decode(request.body)
        out = Envelope.new(INFER_RESPONSE, {"content": "there"}, source="m", correlation_id=env.id)
        return Told(encode(out), headers={"content-type": "application/json"})

    async def body(base: str) -> None:
        assert await asked(Infer(url=base)) == "there"
        error = msgspec.json.encode({"code": "rate_limit", "message": "budget", "meta": {"reason": "budget_exceeded"}})
        answers.append(Told(error, 429))
        with pytest.raises(MistError, match="budget") as failed:
            await asked(Infer(url=base))
        assert failed.value.meta["reason"] == "budget_exceeded"
        answers.append(Told(status=202))
        with pytest.raises(MistError, match="gave no answer"):
            await asked(Infer(url=f"{base}/mist"))

    run(serving(serve, body))


def test_every_answerer_has_the_shape() -> None:
    """For type checkers, and for those who write another."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("infer")

            def made(model: ModelSpec, questions: Stream | None = None) -> Answerer:
                return answerer(
                    harness(model), ask=None, questions=questions, answers=stream, after=0, asked=lambda id: False
                )

            assert made(Infer(), stream).records
            for model in (Infer(url="http://x"), Http(endpoint="http://x"), Command(command=("x",))):
                assert not made(model).records
            for nobody in (Echo(), Infer()):
                with pytest.raises(InvalidArgument):
                    made(nobody)

    run(body())
