"""The stand-in of the providers, as the official clients of OpenAI and Anthropic see it: what they read is what is real."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Late

from mist.testing.providers import Answer, Providers, run_providers

openai: Any = Late("openai")
anthropic: Any = Late("anthropic")
MODEL = "gpt-4o-mini"
ASK: list[Any] = [{"role": "user", "content": "What is the weather?"}]
FUNCTION = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Providers]:
    with run_providers() as there:
        yield there


@pytest.fixture
def there(server: Providers) -> Providers:
    server.heal()
    return server


@pytest.fixture
def oai(there: Providers) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=there.openai_url, api_key=there.api_key, max_retries=0, timeout=5) as client:
        yield client


@pytest.fixture
def claude(there: Providers) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=there.anthropic_url, api_key=there.api_key, max_retries=0, timeout=5) as client:
        yield client


def test_openai_client_chats(there: Providers, oai: openai.OpenAI) -> None:
    answer = oai.chat.completions.create(model=MODEL, messages=ASK, temperature=0)
    assert answer.choices[0].message.content == "Hello from gpt-4o-mini."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 3)
    assert there.seen[-1].body == {"model": MODEL, "messages": ASK, "temperature": 0}
    assert next(model.id for model in oai.models.list()) == MODEL
    vectors = oai.embeddings.create(model="text-embedding-3-small", input=["one", "two"])
    plain = oai.embeddings.create(model="text-embedding-3-small", input=["one", "two"], encoding_format="float")
    assert [v.embedding for v in vectors.data] == [v.embedding for v in plain.data]


def test_openai_client_streams(oai: openai.OpenAI) -> None:
    with oai.chat.completions.create(
        model=MODEL, messages=ASK, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello from gpt-4o-mini."
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_openai_client_calls_tools(oai: openai.OpenAI) -> None:
    """Whole and streamed; the client's own helper puts the pieces together."""
    tools: list[Any] = [{"type": "function", "function": FUNCTION}]
    message = oai.chat.completions.create(model=MODEL, messages=ASK, tools=tools).choices[0].message
    assert message.tool_calls is not None
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}  # type: ignore[union-attr]
    with oai.chat.completions.stream(model=MODEL, messages=ASK, tools=tools) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.name == "get_weather"
    assert json.loads(final.message.tool_calls[0].function.arguments) == {"city": "Paris"}
    told = [*ASK, message, {"role": "tool", "tool_call_id": "call_0", "content": "sunny"}]
    again = oai.chat.completions.create(model=MODEL, messages=told, tools=tools)
    assert again.choices[0].message.content == "Hello from gpt-4o-mini."


OPENAI_ERRORS = [
    ("context_length", "BadRequestError", "context_length_exceeded"),
    ("credentials", "AuthenticationError", "invalid_api_key"),
    ("forbidden", "PermissionDeniedError", "model_access_denied"),
    ("unknown_model", "NotFoundError", "model_not_found"),
    ("rate_limited", "RateLimitError", "rate_limit_exceeded"),
    ("no_quota", "RateLimitError", "insufficient_quota"),
    ("server", "InternalServerError", None),
    ("hang_up", "APIConnectionError", None),
]


@pytest.mark.parametrize(("fault", "error", "code"), OPENAI_ERRORS, ids=[case[0] for case in OPENAI_ERRORS])
def test_openai_client_knows_the_errors(
    there: Providers, oai: openai.OpenAI, fault: Any, error: str, code: str | None
) -> None:
    there.fail(fault, retry_after="7")
    with pytest.raises(getattr(openai, error)) as caught:
        oai.chat.completions.create(model=MODEL, messages=ASK)
    assert caught.value.code == code
    if isinstance(caught.value, openai.APIStatusError):
        assert caught.value.response.headers["retry-after"] == "7"


def test_openai_client_sees_a_stream_fail(there: Providers, oai: openai.OpenAI) -> None:
    there.fail("error_in_stream", after=2)
    with oai.chat.completions.create(model=MODEL, messages=ASK, stream=True) as stream, pytest.raises(openai.APIError):
        list(stream)


def test_openai_client_comes_again_when_it_was_told_to(there: Providers) -> None:
    """Its own retries read both headers."""
    with openai.OpenAI(base_url=there.openai_url, api_key=there.api_key, max_retries=1) as client:
        there.fail("rate_limited", retry_after_ms="1")
        before = there.requests
        client.chat.completions.create(model=MODEL, messages=ASK)
        assert there.requests == before + 2


def test_anthropic_client_chats(there: Providers, claude: anthropic.Anthropic) -> None:
    there.answer(Answer(text="Bonjour.", cached=30))
    answer = claude.messages.create(model="claude-haiku", messages=ASK, max_tokens=100, system="Be brief.")
    assert answer.content[0].type == "text"
    assert answer.content[0].text == "Bonjour."
    assert answer.stop_reason == "end_turn"
    assert (answer.usage.cache_read_input_tokens, answer.usage.output_tokens) == (30, 1)
    assert there.seen[-1].body["system"] == "Be brief."


def test_anthropic_client_streams_text_and_tools(there: Providers, claude: anthropic.Anthropic) -> None:
    there.answer(Answer(text="Let me look.", tool_calls=[("get_weather", {"city": "Rome"}), ("get_time", {})]))
    tools: list[Any] = [{"name": "get_weather", "input_schema": {"type": "object"}}]
    with claude.messages.stream(model="claude-haiku", messages=ASK, max_tokens=100, tools=tools) as stream:
        assert "".join(stream.text_stream) == "Let me look."
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    assert [block.input for block in final.content if block.type == "tool_use"] == [{"city": "Rome"}, {}]
    assert final.usage.output_tokens == 13


ANTHROPIC_ERRORS = [
    ("context_length", "BadRequestError"),
    ("credentials", "AuthenticationError"),
    ("forbidden", "PermissionDeniedError"),
    ("unknown_model", "NotFoundError"),
    ("rate_limited", "RateLimitError"),
    ("server", "InternalServerError"),
    ("hang_up", "APIConnectionError"),
]


@pytest.mark.parametrize(("fault", "error"), ANTHROPIC_ERRORS, ids=[case[0] for case in ANTHROPIC_ERRORS])
def test_anthropic_client_knows_the_errors(
    there: Providers, claude: anthropic.Anthropic, fault: Any, error: str
) -> None:
    there.fail(fault)
    with pytest.raises(getattr(anthropic, error)):
        claude.messages.create(model="claude-haiku", messages=ASK, max_tokens=100)


def test_anthropic_client_knows_overload(there: Providers, claude: anthropic.Anthropic) -> None:
    """A status of Anthropic's own, and an event in the middle of a stream."""
    there.fail("overloaded")
    with pytest.raises(anthropic.APIStatusError, match="Overloaded") as caught:
        claude.messages.create(model="claude-haiku", messages=ASK, max_tokens=100)
    assert caught.value.status_code == 529
    there.fail("error_in_stream", after=2)
    with (
        claude.messages.stream(model="claude-haiku", messages=ASK, max_tokens=100) as stream,
        pytest.raises(anthropic.APIStatusError, match="Overloaded"),
    ):
        stream.get_final_message()


def test_keys_are_checked(there: Providers) -> None:
    client = openai.OpenAI(base_url=there.openai_url, api_key="sk-other", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(model=MODEL, messages=ASK)
    other = anthropic.Anthropic(base_url=there.anthropic_url, api_key="sk-other", max_retries=0)
    with other, pytest.raises(anthropic.AuthenticationError):
        other.messages.create(model="claude-haiku", messages=ASK, max_tokens=1)


def test_faults_are_those_of_a_model_where_one_is_named(there: Providers, oai: openai.OpenAI) -> None:
    there.fail_always("server", model="bad-model")
    for _ in range(2):
        with pytest.raises(openai.InternalServerError):
            oai.chat.completions.create(model="bad-model", messages=ASK)
        oai.chat.completions.create(model=MODEL, messages=ASK)
    there.heal()
    oai.chat.completions.create(model="bad-model", messages=ASK)
