"""What OpenAI's and Anthropic's adapters send, and what they make of what comes back, against the stand-in server."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import missing, run

from mist.errors import InvalidArgument
from mist.kit.http1_client import Pool
from mist.testing.providers import Answer, FaultName, Providers, run_providers
from mist.tools.infermux.chat import ChatMessage, ChatRequest, Chunk, Reply, Usage
from mist.tools.infermux.failures import ProviderError
from mist.tools.infermux.providers.anthropic import Anthropic
from mist.tools.infermux.providers.openai import OpenAI

NOW = datetime(2026, 11, 25, 12, 0, 0, tzinfo=UTC)
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "get_time"}},
]  # fmt: skip
Adapter = OpenAI | Anthropic


@pytest.fixture(scope="module")
def server() -> Iterator[Providers]:
    with run_providers() as there:
        yield there


@pytest.fixture
def there(server: Providers) -> Providers:
    server.heal()
    return server


@pytest.fixture(params=[OpenAI, Anthropic], ids=["openai", "anthropic"])
def kind_(request: pytest.FixtureRequest) -> type[Adapter]:
    return request.param  # type: ignore[no-any-return]


def ask(*messages: ChatMessage, **params: Any) -> ChatRequest:
    return ChatRequest(model="m", messages=messages or (ChatMessage(role="user", content="hi"),), params=params)


def make(there: Providers, kind: type[Adapter], **fields: Any) -> Any:
    base_url = there.openai_url if kind is OpenAI else there.anthropic_url
    return kind("p", **{"base_url": base_url, "api_key": there.api_key, "now": lambda: NOW, **fields})


def complete(there: Providers, kind: type[Adapter], question: ChatRequest, **fields: Any) -> Reply:
    async def body() -> Reply:
        provider = make(there, kind, **fields)
        try:
            return await provider.complete(question, "m", timeout_s=5)  # type: ignore[no-any-return]
        finally:
            await provider.aclose()

    return run(body())


def stream(there: Providers, kind: type[Adapter], question: ChatRequest, **fields: Any) -> list[Chunk]:
    async def body() -> list[Chunk]:
        provider = make(there, kind, **fields)
        try:
            return [chunk async for chunk in provider.stream(question, "m", timeout_s=5)]
        finally:
            await provider.aclose()

    return run(body())


def refused(there: Providers, kind: type[Adapter], question: ChatRequest, **fields: Any) -> ProviderError:
    """The same error whichever way it is asked."""
    before = there.requests
    with pytest.raises(ProviderError) as caught:
        complete(there, kind, question, **fields)
    with pytest.raises(ProviderError) as again:
        stream(there, kind, question, **fields)
    assert (caught.value.kind, caught.value.message) == (again.value.kind, again.value.message)
    assert there.requests == before
    return caught.value


# failures


class Said(NamedTuple):
    kind: str
    status: int


OPENAI: dict[FaultName, Said] = {
    "context_length": Said("context_window", 400),
    "content_policy": Said("content_policy", 400),
    "credentials": Said("credentials", 401),
    "forbidden": Said("credentials", 403),
    "unknown_model": Said("unknown_model", 404),
    "invalid": Said("invalid", 400),
    "rate_limited": Said("rate_limited", 429),
    "no_quota": Said("credentials", 429),
    "server": Said("server", 500),
    "overloaded": Said("overloaded", 503),
    "html": Said("overloaded", 503),
    "redirect": Said("bad_answer", 307),
    "hang_up": Said("connection", 0),
    "bad_json": Said("bad_answer", 200),
    "bad_utf8": Said("bad_answer", 200),
    "not_an_object": Said("bad_answer", 200),
    "compressed": Said("bad_answer", 200),
    "refused_with_200": Said("server", 200),
}
ANTHROPIC: dict[FaultName, Said] = {
    **OPENAI,
    "no_quota": Said("credentials", 400),
    "overloaded": Said("overloaded", 529),
    "refused_with_200": Said("overloaded", 200),
}


@pytest.mark.parametrize("fault", OPENAI)
def test_a_refusal_has_its_kind_and_status(there: Providers, kind_: type[Adapter], fault: FaultName) -> None:
    """Whole and streamed alike: nothing has begun, and the key is nowhere in what is said."""
    expected = (OPENAI if kind_ is OpenAI else ANTHROPIC)[fault]
    there.fail(fault, times=2)
    for call in (complete, stream):
        with pytest.raises(ProviderError) as caught:
            call(there, kind_, ask())
        error = caught.value
        assert (error.kind, error.status) == expected
        assert (error.begun, error.provider) == (False, "p")
        assert there.api_key not in str(error) + json.dumps(error.to_wire())
        assert "secret-value" not in json.dumps(error.to_wire())


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"retry_after": "7"}, 7.0),
        ({"retry_after": "0.5"}, 0.5),
        ({"retry_after": "Wed, 25 Nov 2026 12:00:30 GMT"}, 30.0),
        ({"retry_after": "Wed, 25 Nov 2026 11:00:00 GMT"}, 0.0),
        ({"retry_after": "7", "retry_after_ms": "1250"}, 1.25),
        ({"retry_after": "soon"}, None),
        ({"retry_after": "-3"}, None),
        ({"retry_after": "nan", "retry_after_ms": "inf"}, None),
        ({}, None),
    ],
)
def test_when_to_come_again_is_understood(there: Providers, fields: dict[str, str], seconds: float | None) -> None:
    there.fail("rate_limited", **fields)
    with pytest.raises(ProviderError) as caught:
        complete(there, OpenAI, ask())
    assert caught.value.retry_after_s == seconds


def test_a_whole_answer_that_breaks_off_is_none(there: Providers, kind_: type[Adapter]) -> None:
    for fault in ("truncated", "no_choices"):
        there.fail(fault)  # type: ignore[arg-type]
        with pytest.raises(ProviderError) as caught:
            complete(there, kind_, ask())
        assert caught.value.kind == "bad_answer"


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("fault", ["truncated", "error_in_stream", "bad_piece", "no_choices", "no_done"])
def test_a_stream_that_breaks_off_says_whether_it_had_begun(
    there: Providers, kind_: type[Adapter], fault: FaultName, after: int
) -> None:
    async def body() -> tuple[str, ProviderError]:
        provider = make(there, kind_)
        said = ""
        try:
            async for chunk in provider.stream(ask(), "m", timeout_s=5):
                said += chunk.content
        except ProviderError as exc:
            return said, exc
        finally:
            await provider.aclose()
        raise AssertionError("it ended well")

    there.fail(fault, after=after)
    said, error = run(body())
    expected = "bad_answer"
    if fault == "error_in_stream":
        expected = "server" if kind_ is OpenAI else "overloaded"
    assert error.kind == expected
    assert said == ("Hello from m." if fault == "no_done" else " ".join(["Hello", "from", "m."][:after]))
    assert error.begun == bool(said)


def test_a_stream_stands_still(there: Providers, kind_: type[Adapter]) -> None:
    """Between pieces the clock runs too; what was handed out is said to be."""

    async def body() -> ProviderError:
        provider = make(there, kind_)
        there.fail("slow_chunks", after=1)
        try:
            async for _ in provider.stream(ask(), "m", timeout_s=0.2):
                pass
        except ProviderError as exc:
            return exc
        finally:
            await provider.aclose()
        raise AssertionError("it ended well")

    error = run(body())
    assert (error.kind, error.begun) == ("timeout", True)


def test_a_head_that_does_not_come_is_a_timeout(there: Providers, kind_: type[Adapter]) -> None:
    """Whole and streamed; nothing had begun."""

    async def body() -> None:
        provider = make(there, kind_)
        there.fail("slow_headers", times=2)
        with pytest.raises(ProviderError, match=r"no answer within 0\.1 s") as caught:
            await provider.complete(ask(), "m", timeout_s=0.1)
        with pytest.raises(ProviderError, match=r"no answer within 0\.1 s") as again:
            await anext(provider.stream(ask(), "m", timeout_s=0.1))
        for error in (caught.value, again.value):
            assert (error.kind, error.begun, error.retryable) == ("timeout", False, False)
        await provider.aclose()

    run(body())


def test_a_certificate_that_nobody_signed_is_refused(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        missing("no openssl program to make a certificate with")
    argv = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    argv += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key", "-out", "cert"]
    subprocess.run(argv, cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")

    async def body() -> None:
        server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0, ssl=context)
        async with server:
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            provider = OpenAI("p", base_url=url, api_key="sk-0123456789")
            with pytest.raises(ProviderError, match="certificate") as caught:
                await provider.complete(ask(), "m", timeout_s=5)
            assert caught.value.kind == "connection"
            await provider.aclose()

    run(body())


def test_nobody_there_is_a_connection_error(there: Providers, kind_: type[Adapter]) -> None:
    with pytest.raises(ProviderError, match="cannot be reached") as caught:
        complete(there, kind_, ask(), base_url="http://127.0.0.1:9/v1")
    assert caught.value.kind == "connection"


def test_an_answer_has_a_size(there: Providers) -> None:
    """Beyond it the connection is closed, whatever is still to come."""

    async def body() -> None:
        provider = make(there, OpenAI)
        provider._http._body_bytes_max = 50_000
        there.fail("huge")
        with pytest.raises(ProviderError, match="larger than 50000 bytes") as caught:
            await provider.complete(ask(), "m", timeout_s=5)
        assert caught.value.kind == "bad_answer"
        there.answer(Answer(text="x " * 50_000))
        with pytest.raises(ProviderError, match="larger than 50000 bytes") as caught:
            async for _ in provider.stream(ask(), "m", timeout_s=5):
                pass
        assert caught.value.begun
        await provider.aclose()

    run(body())


def test_a_key_is_in_no_error(there: Providers) -> None:
    """Not even where the provider repeats it; and no header is made of what breaks one."""
    there.fail_always("credentials", model="m")  # it says sk-wrong
    with pytest.raises(ProviderError) as caught:
        complete(there, OpenAI, ask(), api_key="sk-wrong")
    assert "sk-wrong" not in str(caught.value)
    assert "***" in str(caught.value)
    for fields in ({"api_key": "sk-bad\nkey"}, {"headers": {"x-secret": "sk-bad\r\nkey"}}, {"headers": {"x y": "v"}}):
        with pytest.raises(InvalidArgument) as found:
            make(there, OpenAI, **fields)
        assert "sk-bad" not in str(found.value)
    for base_url in (
        "http://user:sk-bad@host/v1",
        "ftp://host",
        "nonsense",
        "http://host/v1?api_key=sk-bad",
        "http://host:sk-bad/v1",
    ):
        with pytest.raises(InvalidArgument) as found:
            make(there, OpenAI, base_url=base_url)
        assert "sk-bad" not in str(found.value)


def test_where_a_base_url_leads(there: Providers) -> None:
    """Path and query are kept, what is no ASCII is written as a URL writes it; what would end a line is refused."""
    for base, path, query, host in (
        ("https://here/v1/", "/v1", "", "here"), ("http://[::1]:8080", "", "", "[::1]:8080"),
        ("http://here:80/a%20b?api-version=1", "/a%20b", "?api-version=1", "here"),
        ("https://bücher.example/ü", "/%C3%BC", "", "xn--bcher-kva.example"),
    ):  # fmt: skip
        http = make(there, OpenAI, base_url=base)._http
        assert (http._path, http._query) == (path, query)
        assert f"host: {host}\r\n" in http._headers
    for wrong in ("http://here/a\r\nx: y", "http://here/a b", "http://", "http://here:0", "http://here:99999"):
        with pytest.raises(InvalidArgument):
            make(there, OpenAI, base_url=wrong)
    with pytest.raises(InvalidArgument, match="connection's own"):
        make(there, OpenAI, headers={"Content-Length": "3"})


# connections


def test_connections_are_kept(there: Providers) -> None:
    """Ten questions, whole and streamed, to two providers on one pool: one connection."""

    async def body() -> int:
        before = there.connections
        pool = Pool()
        providers = [make(there, OpenAI, pool=pool), make(there, Anthropic, pool=pool)]
        for _ in range(5):
            for provider in providers:
                await provider.complete(ask(), "m", timeout_s=5)
                async for _ in provider.stream(ask(), "m", timeout_s=5):
                    pass
        for provider in providers:
            await provider.aclose()
        await providers[0].complete(ask(), "m", timeout_s=5)  # the pool is its owner's to close
        await pool.aclose()
        return there.connections - before

    assert run(body()) == 1


def test_an_answer_read_halfway_takes_its_connection_along(there: Providers) -> None:
    async def body() -> int:
        before = there.connections
        provider = make(there, OpenAI)
        for _ in range(2):
            there.fail("slow_chunks", after=1)
            stream = provider.stream(ask(), "m", timeout_s=5)
            await anext(stream)
            await stream.aclose()
        await provider.complete(ask(), "m", timeout_s=5)
        await provider.aclose()
        return there.connections - before

    assert run(body()) == 3


def test_the_environment_is_not_asked(there: Providers, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of it is used."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert complete(there, OpenAI, ask()).content == "Hello from m."


# OpenAI's format


def test_openai_sends_what_was_asked(there: Providers) -> None:
    """Names and values as they came; null, OpenAI's defaults and how it is delivered are left out; meta is not sent."""
    question = ChatRequest(
        model="alias",
        messages=(
            ChatMessage(role="system", content="s"),
            ChatMessage(role="user", content=[{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}], name="n"),
            ChatMessage(role="assistant", tool_calls=[{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
            ChatMessage(role="tool", content="r", tool_call_id="c"),
        ),
        params={"temperature": 0, "seed": 1, "n": 1, "stop": None, "stream": True, "tools": TOOLS, "logprobs": False},
        meta={"secret": "no"}, traceparent="00-11111111111111111111111111111111-2222222222222222-01",
    )  # fmt: skip
    complete(there, OpenAI, question, headers={"OpenAI-Organization": "org-1"})
    seen = there.seen[-1]
    assert seen.body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}], "name": "n"},
            {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "r", "tool_call_id": "c"},
        ],
        "temperature": 0, "seed": 1, "tools": TOOLS,
    }  # fmt: skip
    assert seen.headers["authorization"] == f"Bearer {there.api_key}"
    assert seen.headers["openai-organization"] == "org-1"
    assert "traceparent" not in seen.headers
    stream(there, OpenAI, question)
    assert there.seen[-1].body["stream"] is True
    assert there.seen[-1].body["stream_options"] == {"include_usage": True}


def test_openai_brings_back_all_of_it(there: Providers) -> None:
    said = Answer(text="Wait.", tool_calls=[("get_weather", {"city": "Rome"}), ("get_time", {})], cached=2, reasoning=3)
    there.answer(said, said, Answer(refusal="No.", finish="content_filter"), Answer(refusal="No."))
    reply = complete(there, OpenAI, ask())
    assert (reply.content, reply.finish_reason) == ("Wait.", "tool_calls")
    assert [call["function"]["name"] for call in reply.tool_calls] == ["get_weather", "get_time"]
    assert json.loads(reply.tool_calls[0]["function"]["arguments"]) == {"city": "Rome"}
    assert reply.usage == Usage(tokens_in=1, tokens_out=14, cached=2, reasoning=3)
    assert reply.id.startswith("chatcmpl-")
    assert together(stream(there, OpenAI, ask())) == (reply.content, calls_of(reply), reply.finish_reason, reply.usage)
    no = complete(there, OpenAI, ask())
    assert (no.content, no.refusal, no.finish_reason) == ("", "No.", "content_filter")
    assert "".join(chunk.refusal for chunk in stream(there, OpenAI, ask())) == "No."


def test_openai_refuses_what_it_could_not_bring_back(there: Providers) -> None:
    """And what is no parameter of OpenAI's, unless the server is said to take it."""
    error = refused(there, OpenAI, ask(n=2, logprobs=True, top_k=5, temperature=0))
    assert error.kind == "unsupported"
    assert "logprobs, n, top_k" in error.message
    assert "extra_params" in refused(there, OpenAI, ask(top_k=5)).hint
    assert refused(there, OpenAI, ask(n=2), extra_params=("*",)).kind == "unsupported"
    complete(there, OpenAI, ask(top_k=5), extra_params=("top_k",))
    assert there.seen[-1].body["top_k"] == 5
    complete(there, OpenAI, ask(n=2, top_k=5, seed=1), drop_params=True)
    assert there.seen[-1].body.keys() == {"model", "messages", "seed"}
    assert refused(there, OpenAI, ask(ChatMessage(role="user", content="\ud800"))).kind == "invalid"


def test_openai_embeds_in_order_and_whole(there: Providers) -> None:
    async def body() -> None:
        provider = make(there, OpenAI)
        params = {"dimensions": 3, "encoding_format": "base64"}
        found = await provider.embed("m", ["a", "b"], params, timeout_s=5)
        assert [len(vector) for vector in found.vectors] == [3, 3]
        assert there.seen[-1].body == {
            "model": "m", "input": ["a", "b"], "dimensions": 3, "encoding_format": "float",
        }  # fmt: skip
        with pytest.raises(ProviderError, match="input_type"):
            await provider.embed("m", ["a"], {"input_type": "query"}, timeout_s=5)
        await provider.aclose()

    run(body())


# Anthropic's format


def test_anthropic_is_asked_in_its_own_words(there: Providers) -> None:
    question = ask(
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content=[{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, {"type": "image_url", "image_url": {"url": "https://pictures.example/a.png"}}]),
        ChatMessage(role="assistant", content="", tool_calls=[
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
            {"id": "c2", "type": "function", "function": {"name": "g", "arguments": ""}},
        ]),
        ChatMessage(role="tool", content="one", tool_call_id="c1"),
        ChatMessage(role="tool", content="", tool_call_id="c2"),
        ChatMessage(role="user", content="Go on."),
        ChatMessage(role="developer", content=[{"type": "text", "text": "In French."}]),
        max_completion_tokens=50, temperature=0.5, top_p=0.9, stop="END", user="u1", tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "f"}}, parallel_tool_calls=False, reasoning_effort="low",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    )  # fmt: skip
    complete(there, Anthropic, question)
    seen = there.seen[-1]
    assert seen.body == {
        "model": "m",
        "max_tokens": 50,
        "system": "Be brief.\n\nIn French.",
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "Look:"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
                {"type": "image", "source": {"type": "url", "url": "https://pictures.example/a.png"}},
            ]},
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
                {"type": "tool_use", "id": "c2", "name": "g", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "one"}]},
                {"type": "tool_result", "tool_use_id": "c2"},
                {"type": "text", "text": "Go on."},
            ]},
        ],
        "temperature": 0.5,
        "top_p": 0.9,
        "stop_sequences": ["END"],
        "metadata": {"user_id": "u1"},
        "tools": [
            {"name": "get_weather", "description": "Weather", "input_schema": {"type": "object"}},
            {"name": "get_time", "input_schema": {"type": "object", "properties": {}}},
        ],
        "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    }  # fmt: skip
    assert seen.headers["x-api-key"] == there.api_key
    assert seen.headers["anthropic-version"] == "2023-06-01"
    complete(there, Anthropic, ask())
    assert there.seen[-1].body == {"model": "m", "max_tokens": 4096, "messages": [{"role": "user", "content": "hi"}]}
    base_url = f"{there.anthropic_url}/v1/"
    complete(there, Anthropic, ask(), max_tokens=7, headers={"anthropic-beta": "b"}, base_url=base_url)
    assert there.seen[-1].body["max_tokens"] == 7
    assert there.seen[-1].headers["anthropic-beta"] == "b"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("auto", {"type": "auto"}), ("none", {"type": "none"}), ("required", {"type": "any"})],
)
def test_anthropic_tool_choices(there: Providers, choice: str, expected: dict[str, str]) -> None:
    complete(there, Anthropic, ask(tools=TOOLS, tool_choice=choice))
    assert there.seen[-1].body["tool_choice"] == expected


def test_anthropic_brings_back_all_of_it(there: Providers) -> None:
    """Tokens of the cache count as tokens; a tool without parameters gets an empty object, streamed too."""
    said = Answer(text="Wait.", tool_calls=[("get_weather", {"city": "Rome"}), ("get_time", {})], cached=30)
    there.answer(said, said)
    reply = complete(there, Anthropic, ask())
    assert (reply.content, reply.finish_reason, reply.id) == ("Wait.", "tool_calls", "msg_0123")
    assert calls_of(reply) == [("toolu_0", "get_weather", {"city": "Rome"}), ("toolu_1", "get_time", {})]
    assert reply.usage == Usage(tokens_in=31, tokens_out=11, cached=30)
    assert together(stream(there, Anthropic, ask())) == (
        reply.content,
        calls_of(reply),
        reply.finish_reason,
        reply.usage,
    )


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"), ("refusal", "content_filter"),
        ("model_context_window_exceeded", "length"), ("something_new", "something_new"),
    ],
)  # fmt: skip
def test_anthropic_stop_reasons(there: Providers, reason: str, expected: str) -> None:
    there.answer(Answer(text="x", finish=reason), Answer(text="x", finish=reason))
    assert complete(there, Anthropic, ask()).finish_reason == expected
    assert stream(there, Anthropic, ask())[-1].finish_reason == expected


def test_anthropic_refuses_what_it_cannot_be_told(there: Providers) -> None:
    """All of it at once, and before anything is sent."""
    sound = ChatMessage(role="user", name="Ann", content=[{"type": "input_audio", "input_audio": {}}, {"type": "text", "text": "hi"}])  # fmt: skip
    asked = ask(sound, seed=1, temperature=1.5, logit_bias={"1": 2}, tool_choice="required", response_format={"type": "json_object"})  # fmt: skip
    error = refused(there, Anthropic, asked)
    assert error.kind == "unsupported"
    for name in ("seed", "temperature above 1", "logit_bias", "tool_choice without tools", "response_format", "messages.name", "messages.content.input_audio"):  # fmt: skip
        assert name in error.message
    complete(there, Anthropic, asked, drop_params=True)
    assert there.seen[-1].body == {"model": "m", "max_tokens": 4096, "messages": [{"role": "user", "content": "hi"}]}
    assert "temperature" in refused(there, Anthropic, ask(temperature=0), version="2026-10-21").message
    custom = {"type": "custom", "custom": {"name": "x"}}
    assert "tools.custom" in refused(there, Anthropic, ask(tools=[custom])).message
    for wrong in (
        ask(max_tokens=1, max_completion_tokens=2),
        ask(ChatMessage(role="robot", content="x")),
        ask(tools=5),
        ask(ChatMessage(role="assistant", tool_calls=[{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}])),
    ):  # fmt: skip
        assert refused(there, Anthropic, wrong).kind == "invalid"


def calls_of(reply: Reply) -> list[tuple[str, str, Any]]:
    return [(c["id"], c["function"]["name"], json.loads(c["function"]["arguments"])) for c in reply.tool_calls]


def together(chunks: list[Chunk]) -> tuple[str, list[tuple[str, str, Any]], str, Usage]:
    """A streamed answer, put together as a client does."""
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        for delta in chunk.tool_calls:
            call = calls.setdefault(delta["index"], ["", "", ""])
            call[0] += delta.get("id", "")
            call[1] += delta["function"].get("name", "")
            call[2] += delta["function"].get("arguments", "")
    usage = [chunk.usage for chunk in chunks if chunk.usage is not None]
    finish = [chunk.finish_reason for chunk in chunks if chunk.finish_reason]
    assert (len(usage), len(finish)) == (1, 1)
    content = "".join(chunk.content for chunk in chunks)
    return content, [(c[0], c[1], json.loads(c[2])) for _, c in sorted(calls.items())], finish[0], usage[0]
