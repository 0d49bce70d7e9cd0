"""What every provider promises: one set of cases over OpenAI's and Anthropic's formats, echo, replay and command."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import run

from mist.errors import NotFound
from mist.protocol.payloads import InferResponse
from mist.testing.providers import Answer, Providers, run_providers
from mist.tools.infermux.chat import ChatMessage, ChatRequest, Chunk, Reply
from mist.tools.infermux.failures import ProviderError
from mist.tools.infermux.providers.anthropic import Anthropic
from mist.tools.infermux.providers.base import Provider
from mist.tools.infermux.providers.command import Command
from mist.tools.infermux.providers.echo import Echo
from mist.tools.infermux.providers.openai import OpenAI
from mist.tools.infermux.providers.replay import Replay
from mist.tools.infermux.recordings import Recordings, key_of

TEXT = "one two  three\nfour"
PROGRAM = textwrap.dedent("""
    import json, sys, time
    asked = json.load(sys.stdin)
    time.sleep(asked["params"].get("seed", 0))
    print("one two  three\\nfour")
""")


def ask(text: str = "hi", **params: Any) -> ChatRequest:
    return ChatRequest(model="m", messages=(ChatMessage(role="user", content=text),), params=params)


class Case(NamedTuple):
    """`make` gives a provider; `prepare` lets it say TEXT once more; `slow` lets it take its time for the next question."""

    make: Callable[[], Provider]
    content: str = TEXT
    prepare: Callable[[], None] = lambda: None
    slow: Callable[[], Any] | None = None
    question: ChatRequest = ask()
    slow_question: ChatRequest = ask()
    embeds: bool = False


@pytest.fixture(scope="module")
def server() -> Iterator[Providers]:
    with run_providers() as there:
        yield there


def recorded(*texts: str) -> Recordings:
    recordings = Recordings()
    for text in texts:
        recordings.add(key_of(ask(), "m"), InferResponse("m", "p", text, 1, 2, 0.5, 3, "stop"))
    return recordings


@pytest.fixture(params=["openai", "anthropic", "echo", "replay", "command"])
def case(request: pytest.FixtureRequest, server: Providers) -> Iterator[Case]:
    server.heal()
    match request.param:
        case "openai":
            yield Case(
                lambda: OpenAI("p", base_url=server.openai_url, api_key=server.api_key, models=("m",)),
                prepare=lambda: server.answer(Answer(text=TEXT)),
                slow=lambda: server.fail("slow_chunks"),
                embeds=True,
            )
        case "anthropic":
            yield Case(
                lambda: Anthropic("p", base_url=server.anthropic_url, api_key=server.api_key, models=("m",)),
                prepare=lambda: server.answer(Answer(text=TEXT)),
                slow=lambda: server.fail("slow_chunks"),
            )
        case "echo":
            yield Case(
                lambda: Echo("p", models=("m",)), content="echo: one two  three\nfour", question=ask(TEXT),
            )  # fmt: skip
        case "replay":
            with recorded(TEXT) as recordings:
                yield Case(lambda: Replay("p", recordings, models=("m",)))
        case "command":
            yield Case(
                lambda: Command("p", [sys.executable, "-c", PROGRAM], models=("m",)),
                slow=lambda: None,
                slow_question=ask(seed=60),
            )


@asynccontextmanager
async def opened(case: Case) -> AsyncIterator[Provider]:
    provider = case.make()
    try:
        yield provider
    finally:
        await provider.aclose()


async def all_of(provider: Provider, question: ChatRequest, timeout_s: float = 10) -> list[Chunk]:
    return [chunk async for chunk in provider.stream(question, "m", timeout_s=timeout_s)]


def test_says_who_it_is_and_answers_whole(case: Case) -> None:
    async def body() -> Reply:
        async with opened(case) as provider:
            assert (provider.name, list(provider.models)) == ("p", ["m"])
            case.prepare()
            return await provider.complete(case.question, "m", timeout_s=10)

    reply = run(body())
    assert (reply.content, reply.model, reply.finish_reason, reply.tool_calls) == (case.content, "m", "stop", [])


def test_pieces_joined_are_the_answer(case: Case) -> None:
    async def body() -> tuple[list[Chunk], Reply]:
        async with opened(case) as provider:
            case.prepare()
            case.prepare()
            chunks = await all_of(provider, case.question)
            return chunks, await provider.complete(case.question, "m", timeout_s=10)

    chunks, reply = run(body())
    assert "".join(chunk.content for chunk in chunks) == reply.content == case.content
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
    assert all(chunk.model == "m" for chunk in chunks)
    assert all(chunk.content or chunk.finish_reason or chunk.usage for chunk in chunks)  # no piece is empty
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert usages == ([] if case.make().__class__ is Command else [reply.usage])


def test_a_stream_may_be_left(case: Case, server: Providers) -> None:
    """Nothing stays open, and the next question is answered."""

    async def body() -> str:
        async with opened(case) as provider:
            case.prepare()
            stream = provider.stream(case.question, "m", timeout_s=10)
            async with aclosing(stream) as chunks:  # type: ignore[type-var]
                first = await anext(chunks)  # type: ignore[call-overload]
                assert first.content
            case.prepare()
            return (await provider.complete(case.question, "m", timeout_s=10)).content

    assert run(body()) == case.content


SLOW = pytest.mark.parametrize("case", ["openai", "anthropic", "command"], indirect=True)
"""Echo and replay are never under way for long."""


@SLOW
def test_a_cancelled_call_ends_at_once_and_leaves_it_usable(case: Case, server: Providers) -> None:
    async def body() -> None:
        async with opened(case) as provider:
            for call in (provider.complete, all_of_it(provider)):
                assert case.slow is not None
                case.slow()
                before = server.given_up
                task = asyncio.create_task(call(case.slow_question, "m", timeout_s=30))
                await under_way(case, server, task)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                if case.make().__class__ is not Command:
                    while server.given_up == before:
                        await asyncio.sleep(0.001)  # the connection is closed, and they hear of it
            case.prepare()
            assert (await provider.complete(case.question, "m", timeout_s=10)).content == case.content

    run(body())


def all_of_it(provider: Provider) -> Callable[..., Any]:
    async def call(question: ChatRequest, model: str, *, timeout_s: float) -> Sequence[Chunk]:
        return await all_of(provider, question, timeout_s)

    return call


async def under_way(case: Case, server: Providers, task: asyncio.Task[Any]) -> None:
    """Until the question is out."""
    before = server.requests
    if case.make().__class__ is Command:
        for _ in range(20):
            await asyncio.sleep(0)
        return
    while server.requests == before and not task.done():
        await asyncio.sleep(0.001)


@SLOW
def test_what_takes_too_long_is_a_timeout(case: Case, server: Providers) -> None:
    async def body() -> None:
        async with opened(case) as provider:
            for call in (provider.complete, all_of_it(provider)):
                assert case.slow is not None
                case.slow()
                with pytest.raises(ProviderError) as caught:
                    await call(case.slow_question, "m", timeout_s=0.1)
                assert (caught.value.kind, caught.value.retryable) == ("timeout", False)

    run(body())


def test_embeds_or_says_that_it_cannot(case: Case) -> None:
    async def body() -> None:
        async with opened(case) as provider:
            if case.embeds:
                found = await provider.embed("m", ["a b", "a b c", "z"], {}, timeout_s=10)
                assert [len(vector) for vector in found.vectors] == [8, 8, 8]
                assert found.usage.tokens_in == 6
            else:
                with pytest.raises(ProviderError) as caught:
                    await provider.embed("m", ["a"], {}, timeout_s=10)
                assert caught.value.kind == "unsupported"

    run(body())


def test_closing_twice_is_closing_once(case: Case) -> None:
    async def body() -> None:
        async with opened(case) as provider:
            await provider.aclose()

    run(body())


# echo


def test_echo_has_the_seeds_numbers() -> None:
    """Tokens are four bytes, of each message by itself, and cost the same everywhere."""

    async def body(*texts: str) -> tuple[int | None, int | None, float | None]:
        messages = tuple(ChatMessage(role="user", content=text) for text in texts)
        reply = await Echo().complete(ChatRequest(model="echo", messages=messages), "echo", timeout_s=1)
        assert reply.content == f"echo: {texts[-1] if texts else ''}"
        return reply.usage.tokens_in, reply.usage.tokens_out, reply.cost_usd

    assert run(body("hello world, how are you")) == (6, 7, pytest.approx(0.00013))
    assert run(body("x" * 4000)) == (1000, 1001, pytest.approx(0.02001))
    assert run(body("日本語テスト")) == (4, 6, pytest.approx(0.0001))
    assert run(body("abc", "def")) == (0, 2, pytest.approx(0.00002))
    assert run(body()) == (0, 1, pytest.approx(0.00001))


def test_echo_waits_as_told_and_gives_up_in_time() -> None:
    """Its delay is slept through the function it was given; a sleep that is cancelled ends it."""
    slept: list[float] = []

    async def asleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) > 1:
            await asyncio.Event().wait()

    async def body() -> None:
        echo = Echo(delay_s=5, sleep=asleep)
        assert (await echo.complete(ask(), "echo", timeout_s=1)).content == "echo: hi"
        with pytest.raises(ProviderError) as caught:
            await echo.complete(ask(), "echo", timeout_s=0.01)
        assert caught.value.kind == "timeout"
        task = asyncio.create_task(echo.complete(ask(), "echo", timeout_s=30))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(body())
    assert slept == [5, 5, 5]


# command


def test_command_says_how_it_failed(tmp_path: Path) -> None:
    """Exit code, signal and standard error; no such program; too much, and no UTF-8."""

    async def body(program: str, kind: str, match: str, **fields: Any) -> None:
        argv = [sys.executable, "-c", program] if program else [str(tmp_path / "nothing")]
        command = Command("cmd", argv, **fields)
        for call in (command.complete, all_of_it(command)):
            with pytest.raises(ProviderError, match=match) as caught:
                await call(ask(), "m", timeout_s=10)
            assert caught.value.kind == kind
            assert caught.value.provider == "cmd"

    failing = "import sys; print('no model\\nhere', file=sys.stderr); sys.exit(3)"
    run(body(failing, "server", "provider cmd: exited with 3: no model here"))
    run(body("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "server", "killed by signal 15"))
    run(body("", "connection", "cannot be started: No such file"))
    run(body("print('x' * 1000)", "bad_answer", "more than 100 bytes", answer_bytes_max=100))
    run(body("import os; os.write(1, b'ok \\xff')", "bad_answer", "no UTF-8"))


def test_command_kills_all_it_started(tmp_path: Path) -> None:
    """The child of a shell that is out of time is gone too: its end of the pipe is closed."""
    left = tmp_path / "pid"

    async def body() -> None:
        command = Command("cmd", ["/bin/sh", "-c", f"sleep 600 & echo $! > {left}; wait"])
        with pytest.raises(ProviderError) as caught:
            await command.complete(ask(), "m", timeout_s=0.5)
        assert caught.value.kind == "timeout"
        pid = int(left.read_text())
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
            await asyncio.sleep(0.001)

    if not Path("/proc").exists():
        pytest.skip("needs /proc")
    run(body())


def test_command_takes_the_last_text_or_refuses() -> None:
    """One text has no room for parameters and earlier messages; they are dropped only where that is set."""
    program = "import os, sys; print(os.environ['INFERMUX_MODEL'] + ': ' + sys.stdin.read().upper())"
    argv = [sys.executable, "-c", program]
    long = ChatRequest(
        model="m",
        messages=(ChatMessage(role="system", content="s"), ChatMessage(role="user", content="hé")),
        params={"temperature": 0, "n": 1},
    )

    async def body() -> None:
        strict = Command("cmd", argv, question="text", env={"PYTHONUTF8": "1"})
        assert (await strict.complete(ask("hé"), "m7", timeout_s=10)).content == "m7: HÉ"
        with pytest.raises(ProviderError, match="earlier messages, temperature") as caught:
            await strict.complete(long, "m7", timeout_s=10)
        assert caught.value.kind == "unsupported"
        loose = Command("cmd", argv, question="text", env={"PYTHONUTF8": "1"}, drop_params=True)
        assert (await loose.complete(long, "m7", timeout_s=10)).content == "m7: HÉ"

    run(body())


# replay


def test_replay_costs_nothing_and_says_what_it_has_not() -> None:
    async def body() -> None:
        with recorded("a", "b") as recordings:
            replay = Replay("p", recordings)
            reply = await replay.complete(ask(), "m", timeout_s=1)
            assert (reply.content, reply.cost_usd, reply.usage.tokens_out) == ("a", 0.0, 2)
            for question, model, match in (
                (ask("other"), "m", "no answer of m is recorded"),
                (ask(), "m2", "no answer of m2 is recorded"),
                (ask(temperature=1), "m", "no answer of m is recorded"),
                (
                    ChatRequest(model="m", messages=ask().messages, meta={"epoch": "3"}),
                    "m",
                    "2 answers of m are recorded",
                ),
            ):
                with pytest.raises(ProviderError, match=match) as caught:
                    await replay.complete(question, model, timeout_s=1)
                assert caught.value.kind == "invalid"  # it would be another provider's turn, and money, otherwise

    run(body())


def test_replay_reads_once_when_it_is_first_asked(tmp_path: Path) -> None:
    """However many ask at once; what cannot be read fails each question, and may be there for the next."""
    reads: list[Recordings] = []

    async def read() -> Recordings:
        if not reads:
            reads.append(recorded())
            raise NotFound("no file x", hint="make one")
        await asyncio.sleep(0)
        reads.append(recorded("a"))
        return reads[-1]

    async def body() -> None:
        replay = Replay("p", read)
        with pytest.raises(ProviderError, match="no file x") as caught:
            await replay.complete(ask(), "m", timeout_s=1)
        assert (caught.value.kind, caught.value.hint) == ("invalid", "make one")
        replies = await asyncio.gather(*[replay.complete(ask(), "m", timeout_s=1) for _ in range(3)])
        assert [reply.content for reply in replies] == ["a", "a", "a"]
        await replay.aclose()
        with pytest.raises(sqlite3.ProgrammingError):
            reads[-1].count("0" * 64)

    run(body())
    assert len(reads) == 2
