"""What goes through the router: a question, the pieces of an answer, and the whole of it. Names are those of OpenAI's chat
API, which every other provider is translated to and from; what it has no name for is not carried.

Unknown is None, never zero: a count that the provider did not state, a price that no table holds.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from mist.protocol.payloads import Int64

Json = dict[str, Any]


class ChatMessage(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """`content` is text, a list of parts (`{"type": "text", "text": …}`, `image_url` …), or None beside tool calls."""

    role: str
    content: str | list[Json] | None = None
    name: str = ""
    tool_calls: list[Json] = []
    tool_call_id: str = ""

    @property
    def text(self) -> str:
        """The text of it, parts joined by new lines; what is not text is left out."""
        if isinstance(self.content, list):
            return "\n".join(str(p.get("text", "")) for p in self.content if p.get("type") == "text")
        return self.content or ""


class Caller(Struct, frozen=True, kw_only=True):
    """Who asks, for budgets, limits and attribution. `key` is the name of an API key, never the key itself."""

    key: str = ""
    team: str = ""
    project: str = ""
    env: str = ""


class ChatRequest(Struct, frozen=True, kw_only=True):
    """`model` is as it was asked for: a model, an alias, a group, or `auto`. `params` are the sampling parameters, tools,
    response format and so on under OpenAI's names. `provider`: this one and no other. `meta` is the seed's: tags and
    trace context, passed on and recorded, never sent to a provider. `id` is that of the request's envelope."""

    model: str
    messages: tuple[ChatMessage, ...]
    params: Json = {}
    provider: str = ""
    meta: dict[str, str] = {}
    caller: Caller = Caller()
    id: str = ""
    traceparent: str = ""
    tenant: str = ""


class Usage(Struct, frozen=True, kw_only=True):
    """Tokens. `cached` is a part of `tokens_in`, `reasoning` one of `tokens_out`."""

    tokens_in: Int64 | None = None
    tokens_out: Int64 | None = None
    cached: Int64 | None = None
    reasoning: Int64 | None = None


class Reply(Struct, frozen=True, kw_only=True):
    """A whole answer. `model` is the provider's name of what answered. `finish_reason` is OpenAI's: `stop`, `length`,
    `tool_calls`, `content_filter`. `cost_usd` is set where the provider (or a recording) states it; else the router's
    price table says."""

    content: str
    model: str
    finish_reason: str = "stop"
    tool_calls: list[Json] = []
    refusal: str = ""
    usage: Usage = Usage()
    cost_usd: float | None = None
    id: str = ""
    """The provider's."""


class Chunk(Struct, frozen=True, kw_only=True):
    """A piece of an answer. `tool_calls` are OpenAI's deltas (`index`, `id`, `function.name`, `function.arguments`).
    The last one has the finish reason; usage may come with it or after it."""

    content: str = ""
    tool_calls: list[Json] = []
    refusal: str = ""
    finish_reason: str = ""
    usage: Usage | None = None
    model: str = ""
    id: str = ""


class Embeddings(Struct, frozen=True, kw_only=True):
    vectors: list[list[float]]
    model: str
    usage: Usage = Usage()
