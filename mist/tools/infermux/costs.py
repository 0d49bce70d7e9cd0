"""What a question will cost at most, and what an answer did cost. Whole billionths of a US dollar, so that sums are exact.

The estimate of a question: its text as UTF-8 at three bytes a token (English takes some four, Chinese about three), 8 tokens a
message and 1,500 a picture, its tools and formats as JSON; the answer with `max_tokens` (`max_completion_tokens`), or with
`tokens_out_default`, for each of `n` answers. It is more than most questions cost, and no proof: what is paid in the end is
booked as it was.

Promises: unknown is None, never zero. A price is looked up by the provider's name, else by its type; that of `echo` is the
seed's, and `replay` costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from mist.kit.prices import Price, Prices
from mist.tools.infermux.chat import ChatMessage, ChatRequest, Usage
from mist.tools.infermux.settings import NANO, ProviderSettings

BYTES_PER_TOKEN = 3
MESSAGE_TOKENS = 8
PICTURE_TOKENS = 1500
CHARS_PER_TOKEN_MAX = 8
"""No text of any length has more; with it a question is taken as too long only where there is no doubt."""
_ECHO = Price(model="*", input_per_million=10.0, output_per_million=10.0)
_FREE = Price(model="*", input_per_million=0.0, output_per_million=0.0)


class Size:
    """How much a question is: text in bytes, pictures, the tokens its answer may have."""

    __slots__ = ("bytes", "chars", "messages", "pictures", "stated", "tokens_out")

    def __init__(self, request: ChatRequest, tokens_out_default: int) -> None:
        params = request.params
        self.bytes = self.chars = self.pictures = 0
        self.messages = len(request.messages)
        for message in request.messages:
            self._add(message)
        for name in ("tools", "functions", "response_format"):
            if name in params:
                self.bytes += len(msgspec.json.encode(params[name]))
        stated = params.get("max_completion_tokens") or params.get("max_tokens")
        answers = params.get("n")
        many = answers if isinstance(answers, int) and answers > 0 else 1
        self.stated = stated * many if isinstance(stated, int) and stated > 0 else 0
        """What the question says of its answer; 0 = nothing."""
        self.tokens_out = self.stated or tokens_out_default * many

    def _add(self, message: ChatMessage) -> None:
        content = message.content
        if isinstance(content, str):
            self._text(content)
        elif content is not None:
            for part in content:
                if part.get("type") == "text":
                    self._text(str(part.get("text", "")))
                else:
                    self.pictures += 1
        if message.tool_calls:
            self.bytes += len(msgspec.json.encode(message.tool_calls))

    def _text(self, text: str) -> None:
        self.chars += len(text)
        self.bytes += utf8_size(text)

    @property
    def tokens_in(self) -> int:
        """Hardly more than this."""
        return -(-self.bytes // BYTES_PER_TOKEN) + MESSAGE_TOKENS * self.messages + PICTURE_TOKENS * self.pictures

    @property
    def tokens_in_min(self) -> int:
        """Surely not less than this."""
        return self.chars // CHARS_PER_TOKEN_MAX


def utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def tokens_of(text_bytes: int) -> int:
    """Tokens of a part of an answer that nobody counted."""
    return -(-text_bytes // BYTES_PER_TOKEN)


class Costs:
    """The prices in force, by the names of the settings."""

    def __init__(self, prices: Prices | None, providers: Sequence[ProviderSettings]) -> None:
        self._prices = prices
        self._types = {p.name: p.type for p in providers}
        self.version = prices.version if prices is not None else ""

    def price(self, provider: str, model: str, time_ns: int) -> Price | None:
        kind = self._types.get(provider)
        if kind == "replay":
            return _FREE
        found = self._prices.find(provider, model, time_ns) if self._prices is not None else None
        if self._prices is not None and kind is not None and (found is None or not found.provider):
            by_type = self._prices.find(kind, model, time_ns)
            found = by_type if by_type is not None else found
        return _ECHO if found is None and kind == "echo" else found

    def estimate(self, provider: str, model: str, tokens_in: int, tokens_out: int, time_ns: int) -> int | None:
        """At most, as far as anybody can say before."""
        price = self.price(provider, model, time_ns)
        dollars = price.cost_usd(tokens_in, tokens_out) if price is not None else None
        return to_nano(dollars) if dollars is not None else None

    def actual(self, provider: str, model: str, usage: Usage, time_ns: int) -> float | None:
        """US dollars of an answer, by its tokens."""
        price = self.price(provider, model, time_ns)
        return price.cost_usd(usage.tokens_in, usage.tokens_out, usage.cached) if price is not None else None


def to_nano(dollars: float) -> int:
    """Billionths, rounded up; what a float adds behind the sixth decimal of a billionth is not money."""
    return math.ceil(round(dollars * NANO, 6))


def to_dollars(nano: int) -> float:
    return nano / NANO
