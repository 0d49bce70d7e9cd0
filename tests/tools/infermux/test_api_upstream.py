"""The official client on one side, providers that speak the real wire formats on the other, the whole router between: what is
asked arrives, what is answered comes back, and what goes wrong is told as what it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from conftest import run

from mist.kit.server import AppServer, Site
from mist.quantities import Duration
from mist.testing.providers import Answer, Providers, run_providers
from mist.tools.infermux.router import Router
from mist.tools.infermux.service import InferMux
from mist.tools.infermux.settings import InferMuxSettings, ProviderSettings, RoutingSettings

USER: Any = [{"role": "user", "content": "what is it"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
    }
]


@pytest.fixture(scope="module")
def there() -> Any:
    with run_providers() as providers:
        yield providers


@asynccontextmanager
async def client(there: Providers, timeout: str = "60s", **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    there.heal()
    settings = InferMuxSettings(
        providers=(
            ProviderSettings(
                name="oai", type="openai", base_url=there.openai_url, api_key_env="K", timeout=Duration(timeout),
                models=("gpt-4o-mini", "text-embedding-3-small"),
            ),
            ProviderSettings(
                name="ant", type="anthropic", base_url=there.anthropic_url, api_key_env="K", models=("claude-haiku",),
                timeout=Duration(timeout),
            ),
        ),
        routing=RoutingSettings(retries=0, deadline=Duration("5s")),
    )  # fmt: skip
    router = Router.from_settings(settings, env={"K": there.api_key})
    service = InferMux(settings, router, env={})
    async with (
        AppServer(Site(service.doors()), close_s=1.0) as server,
        openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as ai,
    ):  # fmt: skip
        yield ai
    await service.aclose(1.0)


async def until(holds: Callable[[], bool]) -> None:
    """Wait for it; the test's own time limit ends it."""
    while not holds():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("model", ["gpt-4o-mini", "claude-haiku"])
def test_chat_streams_and_tools(there: Providers, model: str) -> None:
    """The same program against either kind of provider."""

    async def main() -> None:
        async with client(there) as ai:
            answer = await ai.chat.completions.create(model=model, messages=USER, temperature=0.5)
            assert answer.choices[0].message.content == f"Hello from {model}."
            assert answer.usage is not None
            assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
            assert there.seen[-1].body["temperature"] == 0.5
            stream = await ai.chat.completions.create(
                model=model, messages=USER, stream=True, stream_options={"include_usage": True}
            )
            chunks = [c async for c in stream]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == f"Hello from {model}."
            assert chunks[-1].usage is not None
            called = await ai.chat.completions.create(model=model, messages=USER, tools=TOOLS)
            (call,) = called.choices[0].message.tool_calls or []
            assert (call.function.name, called.choices[0].finish_reason) == ("look", "tool_calls")  # type: ignore[union-attr]
            result: Any = {"role": "tool", "tool_call_id": call.id, "content": "a cat"}
            there.answer(Answer(text="A cat."))
            final = await ai.chat.completions.create(
                model=model, messages=[*USER, called.choices[0].message.model_dump(), result], tools=TOOLS
            )
            assert final.choices[0].message.content == "A cat."
            deltas = [
                c async for c in await ai.chat.completions.create(model=model, messages=USER, tools=TOOLS, stream=True)
            ]
            names = [t.function.name for c in deltas for t in c.choices[0].delta.tool_calls or [] if t.function]
            assert next(n for n in names if n) == "look"

    run(main())


def test_embeddings_come_through(there: Providers) -> None:
    async def main() -> None:
        async with client(there) as ai:
            found = await ai.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
            assert [len(d.embedding) for d in found.data] == [8, 8]
            plain = await ai.embeddings.create(model="text-embedding-3-small", input="a", encoding_format="float")
            assert plain.data[0].embedding == pytest.approx(found.data[0].embedding, rel=1e-6)
            with pytest.raises(openai.BadRequestError):
                await ai.embeddings.create(model="claude-haiku", input="a")

    run(main())


WRONG: list[tuple[Any, type[openai.APIStatusError], int]] = [
    ("rate_limited", openai.RateLimitError, 429),
    ("server", openai.InternalServerError, 502),
    ("overloaded", openai.InternalServerError, 503),
    ("credentials", openai.InternalServerError, 502),
    ("bad_json", openai.InternalServerError, 502),
    ("context_length", openai.BadRequestError, 400),
    ("content_policy", openai.BadRequestError, 400),
]


@pytest.mark.parametrize(("fault", "kind", "status"), WRONG)
def test_faults_of_a_provider(there: Providers, fault: Any, kind: type[openai.APIStatusError], status: int) -> None:
    async def main() -> None:
        for stream in (False, True):
            async with client(there) as ai:
                there.fail(fault, retry_after="7" if fault == "rate_limited" else "")
                asking = ai.chat.completions.create(model="gpt-4o-mini", messages=USER, stream=stream)
                if fault == "bad_json" and stream:  # what a stream does not begin with is bad in its middle
                    with pytest.raises(openai.APIError):
                        [chunk async for chunk in await asking]
                    return
                with pytest.raises(kind) as found:
                    await asking
                assert found.value.status_code == status
                assert found.value.response.headers.get("retry-after") == {429: "7", 503: "1"}.get(status)

    run(main())


def test_a_stream_cut_off_upstream_is_no_whole_answer(there: Providers) -> None:
    async def main() -> None:
        async with client(there) as ai:
            there.fail("truncated", after=1)
            stream = await ai.chat.completions.create(model="gpt-4o-mini", messages=USER, stream=True)
            with pytest.raises(openai.APIError):
                async for _ in stream:
                    pass

    run(main())


def test_a_slow_provider_is_a_timeout(there: Providers) -> None:
    """Ours: 504. The client's own: its class, and the provider sees that nobody waits any more."""

    async def main() -> None:
        async with client(there, timeout="100ms") as ai:
            there.fail("slow_headers")
            with pytest.raises(openai.InternalServerError) as found:
                await ai.chat.completions.create(model="gpt-4o-mini", messages=USER)
            assert (found.value.status_code, found.value.code) == (504, "upstream_timeout")
        async with client(there) as ai:
            before = there.given_up
            there.fail("slow_headers")
            with pytest.raises(openai.APITimeoutError):
                await ai.chat.completions.create(model="gpt-4o-mini", messages=USER, timeout=0.2)
            await until(lambda: there.given_up > before)

    run(main())


def test_the_provider_sees_a_client_that_leaves_its_stream(there: Providers) -> None:
    async def main() -> None:
        async with client(there) as ai:
            before = there.given_up
            there.fail("slow_chunks")
            stream = await ai.chat.completions.create(model="gpt-4o-mini", messages=USER, stream=True)
            await anext(stream)
            await stream.close()
            await until(lambda: there.given_up > before)

    run(main())
