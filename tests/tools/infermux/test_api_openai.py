"""The official OpenAI client against our doors, on a real listener: it must not notice that we are not OpenAI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from conftest import Late, run

from mist.errors import CircuitOpen, MistError, NotFound, RateLimited
from mist.kit.server import AppServer, Site
from mist.tools.infermux.access import Access
from mist.tools.infermux.api import Api
from mist.tools.infermux.calls import Calls
from mist.tools.infermux.chat import Caller, Chunk, Reply, Usage
from mist.tools.infermux.failures import ProviderError
from mist.tools.infermux.keys import Keys
from mist.tools.infermux.settings import InferMuxSettings, KeySettings

from .fakes import FakeRouter

openai: Any = Late("openai")
USER: Any = [{"role": "user", "content": "hello world"}]


@asynccontextmanager
async def serving(router: FakeRouter, **options: Any) -> AsyncIterator[str]:
    """The address of the doors over that router."""
    options = {"names": router.names, **options}
    server = AppServer(Site(Api(Calls(router), **options).doors()), close_s=1.0)  # type: ignore[arg-type]
    async with server:
        yield server.url


@asynccontextmanager
async def client(
    router: FakeRouter, *, key: str = "any", retries: int = 0, timeout: float = 30.0, **options: Any
) -> Any:
    async with (
        serving(router, **options) as url,
        openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key=key, max_retries=retries, timeout=timeout,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as found,
    ):  # fmt: skip
        yield found


def test_a_chat_and_what_its_headers_say() -> None:
    async def main() -> None:
        router = FakeRouter()
        async with client(router) as ai:
            raw = await ai.chat.completions.with_raw_response.create(
                model="fast", messages=USER, temperature=0.5, user="ada", extra_headers={"X-Request-Id": "r-1"}
            )
            answer = raw.parse()
            assert answer.choices[0].message.content == "echo: hello world"
            assert answer.choices[0].finish_reason == "stop"
            assert answer.model == "m-1"
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 7, 13)
            found = {k: v for k, v in raw.headers.items() if k.startswith("x-")}
            assert found == {
                "x-infermux-provider": "fake", "x-infermux-model": "m", "x-infermux-strategy": "priority",
                "x-infermux-route-group": "g", "x-infermux-latency-ms": "1.500", "x-infermux-cost": "0.00013",
                "x-infermux-prompt-tokens": "6", "x-infermux-completion-tokens": "7", "x-request-id": "r-1",
            }  # fmt: skip
            assert answer.id == f"chatcmpl-{router.asked[0].id}"
            assert router.asked[0].params == {"temperature": 0.5, "user": "ada"}

    run(main())


def test_what_is_unknown_is_not_in_the_answer() -> None:
    """No tokens, no cost: no usage and no headers, rather than zeros."""

    async def main() -> None:
        router = FakeRouter()
        router.cost_usd = None
        router.reply = lambda _request: Reply(content="x", model="m", usage=Usage(tokens_in=3))
        async with client(router) as ai:
            raw = await ai.chat.completions.with_raw_response.create(model="m", messages=USER)
            assert raw.parse().usage is None
            assert "x-infermux-cost" not in raw.headers
            assert raw.headers["x-infermux-prompt-tokens"] == "3"
            assert "x-infermux-completion-tokens" not in raw.headers

    run(main())


def test_streaming() -> None:
    async def main() -> None:
        router = FakeRouter()
        async with client(router) as ai:
            stream = await ai.chat.completions.create(
                model="m", messages=USER, stream=True, stream_options={"include_usage": True}
            )
            chunks = [c async for c in stream]
            assert stream.response.headers["x-infermux-provider"] == "fake"
            assert chunks[0].choices[0].delta.role == "assistant"
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "one two three"
            assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, None, None, "stop"]
            assert chunks[-1].choices == []
            assert chunks[-1].usage.total_tokens == 9
            assert chunks[-1].infermux["cost_usd"] == 0.00013
            assert {c.id for c in chunks} == {f"chatcmpl-{router.asked[0].id}"}
            plain = await ai.chat.completions.create(model="m", messages=USER, stream=True)
            assert all(c.choices and c.usage is None for c in [c async for c in plain])

    run(main())


def test_tools_pass_through() -> None:
    """The tools to the provider as they came, its calls to the client, the results back into the next question."""
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}

    async def main() -> None:
        router = FakeRouter()
        router.reply = lambda _request: Reply(content="", model="m", tool_calls=[call], finish_reason="tool_calls")
        async with client(router) as ai:
            answer = await ai.chat.completions.create(model="m", messages=USER, tools=tools, tool_choice="auto")
            assert router.asked[0].params == {"tools": tools, "tool_choice": "auto"}
            message = answer.choices[0].message
            assert message.content is None
            assert message.tool_calls[0].function.arguments == '{"a":1}'
            # a client sends the answer back as it is, with all its empty fields
            again: Any = [*USER, message.model_dump(), {"role": "tool", "tool_call_id": "c1", "content": "2"}]
            await ai.chat.completions.create(model="m", messages=again)
            assert router.asked[1].messages[1].tool_calls == [call]
            assert router.asked[1].messages[2].tool_call_id == "c1"

            delta = {"index": 0, **call}
            router.chunks = [Chunk(tool_calls=[delta]), Chunk(finish_reason="tool_calls")]
            chunks = [c async for c in await ai.chat.completions.create(model="m", messages=USER, stream=True)]
            assert chunks[0].choices[0].delta.tool_calls[0].function.name == "f"
            assert chunks[-1].choices[0].finish_reason == "tool_calls"

    run(main())


FAILURES: list[tuple[MistError, str, int, str, str]] = [
    (ProviderError("rate_limited", "x", provider="p", retry_after_s=1.2), "RateLimitError", 429, "rate_limit", "2"),
    (ProviderError("overloaded", "x"), "InternalServerError", 503, "no_healthy_providers", "1"),
    (ProviderError("server", "x"), "InternalServerError", 502, "upstream_error", ""),
    (ProviderError("timeout", "x"), "InternalServerError", 504, "upstream_timeout", ""),
    (ProviderError("connection", "x"), "InternalServerError", 502, "upstream_error", ""),
    (ProviderError("bad_answer", "x"), "InternalServerError", 502, "upstream_error", ""),
    (ProviderError("credentials", "x"), "InternalServerError", 502, "upstream_error", ""),
    (ProviderError("unknown_model", "x"), "NotFoundError", 404, "model_not_found", ""),
    (ProviderError("context_window", "x"), "BadRequestError", 400, "context_length_exceeded", ""),
    (ProviderError("content_policy", "x"), "BadRequestError", 400, "content_filter", ""),
    (ProviderError("invalid", "x"), "BadRequestError", 400, "invalid_request", ""),
    (ProviderError("unsupported", "x"), "BadRequestError", 400, "unsupported_parameter", ""),
    (NotFound("no model x", meta={"model": "x"}), "NotFoundError", 404, "model_not_found", ""),
    (CircuitOpen("none", retry_after_s=20.0), "InternalServerError", 503, "no_healthy_providers", "20"),
    (RateLimited("x", meta={"reason": "budget_exceeded"}, retry_after_s=5.0), "RateLimitError", 429, "budget_exceeded", "5"),
]  # fmt: skip


def test_errors_are_the_clients_own_classes() -> None:
    """Each failure with its class, status, code and retry-after, before a stream as without one."""

    async def main() -> None:
        router = FakeRouter()
        async with client(router) as ai:
            for error, kind, status, code, retry_after in FAILURES:
                router.error = error
                for stream in (False, True):
                    with pytest.raises(getattr(openai, kind)) as found:
                        await ai.chat.completions.create(model="m", messages=USER, stream=stream)
                    assert found.value.status_code == status
                    assert found.value.code == code
                    assert found.value.response.headers.get("retry-after", "") == retry_after
                    assert found.value.response.headers["x-infermux-error"] == code

    run(main())


def test_the_client_asks_again_where_that_helps_and_not_where_it_does_not() -> None:
    """Its own retries: after a failure of the moment, not after a refused key of ours or a spent budget."""

    async def main() -> None:
        router = FakeRouter()
        async with client(router, retries=1) as ai:
            for error, tries in (
                (ProviderError("server", "x"), 2),
                (ProviderError("credentials", "x"), 1),
                (RateLimited("x", meta={"reason": "budget_exceeded"}), 1),
            ):
                router.asked.clear()
                router.error = error
                with pytest.raises(openai.APIStatusError):
                    await ai.chat.completions.create(model="m", messages=USER)
                assert len(router.asked) == tries, error

    run(main())


def test_keys() -> None:
    """With keys nobody without one; a key says who asks, and a header may add to it but not change it."""

    async def main() -> None:
        router = FakeRouter()
        settings = InferMuxSettings(keys=(KeySettings(name="ci", env="CI_KEY", team="t", project="p"),))
        access = Access(Keys(settings, {"CI_KEY": "sk-1"}))
        async with client(router, key="sk-2", access=access) as ai:
            for call in (ai.chat.completions.create(model="m", messages=USER), ai.models.list()):
                with pytest.raises(openai.AuthenticationError) as found:
                    await call
                assert found.value.code == "invalid_api_key"
            assert router.asked == []
            mine = ai.with_options(
                api_key="sk-1",
                default_headers={"X-Infermux-Project": "other", "X-Infermux-Env": "prod", "X-Infermux-Caller": "me"},
            )
            await mine.chat.completions.create(model="m", messages=USER)
            assert router.asked[0].caller == Caller(key="ci", team="t", project="p", env="prod")

    run(main())


def test_without_keys_headers_say_who_asks() -> None:
    async def main() -> None:
        router = FakeRouter()
        headers = {"X-Infermux-Caller": "me", "X-Infermux-Project": "p", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        async with client(router) as ai:
            await ai.chat.completions.create(model="m", messages=USER, extra_headers=headers)
            asked = router.asked[0]
            assert asked.caller == Caller(key="me", project="p")
            assert asked.traceparent.split("-")[1] == "a" * 32
            assert asked.traceparent.split("-")[2] != "b" * 16

    run(main())


def test_a_client_that_leaves_ends_its_call() -> None:
    """By its own time limit (APITimeoutError), by cancelling, and by closing a stream half read."""

    async def main() -> None:
        router = FakeRouter()
        router.gate = asyncio.Event()
        async with client(router, timeout=0.2) as ai:
            with pytest.raises(openai.APITimeoutError):
                await ai.chat.completions.create(model="m", messages=USER)
            await router.left.wait()

            router.left.clear(), router.reached.clear()
            task = asyncio.create_task(ai.chat.completions.create(model="m", messages=USER, timeout=30))
            await router.reached.wait()
            task.cancel()
            await router.left.wait()

            router.left.clear()
            router.gate = None
            router.chunks = [Chunk(content="x")] * 1_000_000
            stream = await ai.chat.completions.create(model="m", messages=USER, stream=True, timeout=30)
            async for _ in stream:
                break
            await stream.close()
            await router.left.wait()

    run(main())


def test_a_stream_that_breaks_is_an_error_and_not_an_end() -> None:
    async def main() -> None:
        router = FakeRouter()
        router.error, router.after = ProviderError("server", "it broke", begun=True), 2
        async with client(router) as ai:
            stream = await ai.chat.completions.create(model="m", messages=USER, stream=True)
            assert [(await anext(stream)).choices[0].delta.content for _ in range(2)] == ["one", " two"]
            with pytest.raises(openai.APIError, match="it broke"):
                await anext(stream)

    run(main())


def test_a_silent_stream_says_that_it_lives() -> None:
    """Comments, from the start on; then the answer, and an error that comes late stands in the stream."""

    async def main() -> None:
        router = FakeRouter()
        router.gate = asyncio.Event()
        async with serving(router, keep_alive_s=0.01) as url, httpx.AsyncClient(trust_env=False) as http:
            body = {"model": "m", "messages": USER, "stream": True}
            async with http.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as answer:
                assert answer.status_code == 200
                assert answer.headers["content-type"].startswith("text/event-stream")
                lines = answer.aiter_lines()
                comments = [await anext(lines) for _ in range(4)]
                assert comments == [": keep-alive", "", ": keep-alive", ""]
                router.error = ProviderError("server", "too bad")
                router.gate.set()
                rest = [line async for line in lines if line.startswith("data: ")]
                assert json.loads(rest[0].removeprefix("data: "))["error"]["code"] == "upstream_error"
                assert len(rest) == 1

    run(main())


def test_embeddings_models_and_the_older_completions() -> None:
    async def main() -> None:
        router = FakeRouter()
        async with client(router) as ai:
            found = await ai.embeddings.create(model="m", input=["a", "bbb"])  # asks for base64
            assert [d.embedding for d in found.data] == [[1.0, 0.5], [3.0, 0.5]]
            assert found.usage.prompt_tokens == 3
            plain = await ai.embeddings.create(model="m", input="a", encoding_format="float")
            assert plain.data[0].embedding == [1.0, 0.5]
            assert [(m.id, m.owned_by) for m in (await ai.models.list()).data] == [
                ("m", "fake"), ("n", "fake"), ("auto", "infermux"), ("fast", "infermux"),
            ]  # fmt: skip
            assert (await ai.models.retrieve("n")).owned_by == "fake"
            with pytest.raises(openai.NotFoundError):
                await ai.models.retrieve("zzz")
            text = await ai.completions.create(model="m", prompt="hi")
            assert text.choices[0].text == "echo: hi"
            parts = [c async for c in await ai.completions.create(model="m", prompt="hi", stream=True)]
            assert "".join(c.choices[0].text for c in parts) == "one two three"

    run(main())


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "audio": {"id": "a"}}]}, "messages[0].audio"),
    ({"messages": USER, "model": None}, "model"),
    ({"messages": USER, "n": 2}, "n"),
    ({"messages": USER, "stream": "yes"}, "stream"),
    ({"messages": USER, "stream_options": {"include_usage": True}}, "stream_options"),
]


def test_a_body_that_cannot_be_asked_is_refused_with_its_place() -> None:
    async def main() -> None:
        router = FakeRouter()
        async with serving(router) as url, httpx.AsyncClient(trust_env=False, base_url=url) as http:
            for body, param in BAD:
                answer = await http.post("/v1/chat/completions", json={"model": "m", **body})
                assert answer.status_code == 400, body
                assert answer.json()["error"]["type"] == "invalid_request_error"
                assert answer.json()["error"]["param"] == param
            for raw in (b"", b"[]", b'{"a":', b"\xff", b"[" * 100_000):
                answer = await http.post("/v1/chat/completions", content=raw)
                assert answer.status_code == 400, raw[:20]
            assert (await http.get("/v1/chat/completions")).status_code == 405
            assert router.asked == []
            nulls = {"model": "m", "messages": USER, "tools": None, "stream": None, "n": 1, "brand_new": {"x": 1}}
            assert (await http.post("/v1/chat/completions", json=nulls)).status_code == 200
            assert router.asked[0].params == {"brand_new": {"x": 1}}

    run(main())


def test_the_synchronous_client() -> None:
    async def main() -> None:
        async with serving(FakeRouter()) as url:

            def ask() -> list[str]:
                with openai.OpenAI(
                    base_url=f"{url}/v1", api_key="any", http_client=openai.DefaultHttpxClient(trust_env=False)
                ) as ai:
                    whole = ai.chat.completions.create(model="m", messages=USER).choices[0].message.content
                    with ai.chat.completions.create(model="m", messages=USER, stream=True) as stream:
                        parts = [c.choices[0].delta.content or "" for c in stream]
                    return [whole or "", "".join(parts)]

            assert await asyncio.to_thread(ask) == ["echo: hello world", "one two three"]

    run(main())


def test_a_second_client() -> None:
    """Hugging Face's, which shares nothing with OpenAI's."""
    from huggingface_hub import InferenceClient

    async def main() -> None:
        async with serving(FakeRouter()) as url:

            def ask() -> list[str]:
                hf = InferenceClient(base_url=f"{url}/v1", api_key="any")
                whole = hf.chat_completion(USER, model="m").choices[0].message.content
                parts = [c.choices[0].delta.content or "" for c in hf.chat_completion(USER, model="m", stream=True)]
                return [whole or "", "".join(parts)]

            assert await asyncio.to_thread(ask) == ["echo: hello world", "one two three"]

    run(main())
