"""The GenAI semantic conventions and our columns: pure.

Promises: a column is added only from a value that can be right (text that is not empty, a whole number, a finite amount
not below zero); where several attributes name the same thing the current name wins over the legacy one, and an
attribute that bears our own name wins over all. Nothing is guessed and nothing is taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, NamedTuple

OPERATION = "gen_ai.operation.name"
OPERATIONS = frozenset(
    {
        "chat",
        "create_agent",
        "embeddings",
        "execute_tool",
        "generate_content",
        "invoke_agent",
        "invoke_workflow",
        "retrieval",
        "text_completion",
    }
)
"""The operations that the conventions know; only these are given GenAI attributes on the way out."""
COUNT_MAX = 2**53
"""As in the store: a larger count or amount is no column."""

Read = Callable[[Any], Any]


def text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    whole = int(value) if isfinite(value) and value == int(value) else -1
    return whole if 0 <= whole <= COUNT_MAX else None


def amount(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= COUNT_MAX:
        return None
    return float(value)


def milliseconds(value: Any) -> float | None:
    seconds = amount(value)
    # times and divided by 1000 must give the same number back where they can
    return None if seconds is None or seconds * 1000 > COUNT_MAX else round(seconds * 1000, 6)


def reasons(value: Any) -> str | None:
    """A list of finish reasons, one for each choice, as one text."""
    if isinstance(value, list) and value and all(isinstance(item, str) and item for item in value):
        return ",".join(value)
    return text(value)


class Source(NamedTuple):
    """An attribute that fills a column. Of several that are there, the lowest `rank` wins."""

    column: str
    rank: int
    read: Read


_TABLE: dict[str, tuple[Read, tuple[str, ...]]] = {
    "model": (
        text,
        (
            "gen_ai.response.model",
            "gen_ai.request.model",
            "llm.response.model",
            "llm.request.model",
            "llm.model_name",
            "embedding.model_name",
        ),
    ),
    "provider": (text, ("gen_ai.provider.name", "gen_ai.system", "llm.provider", "llm.system", "llm.vendor")),
    "tokens_in": (
        count,
        (
            "gen_ai.usage.input_tokens",
            "gen_ai.usage.prompt_tokens",
            "llm.token_count.prompt",
            "llm.usage.prompt_tokens",
        ),
    ),
    "tokens_out": (
        count,
        (
            "gen_ai.usage.output_tokens",
            "gen_ai.usage.completion_tokens",
            "llm.token_count.completion",
            "llm.usage.completion_tokens",
        ),
    ),
    "cost_usd": (amount, ("gen_ai.usage.cost", "llm.cost.total")),
    "error": (text, ("error.type",)),
    "finish_reason": (reasons, ("gen_ai.response.finish_reasons", "llm.finish_reason")),
    "ttft_ms": (milliseconds, ("gen_ai.response.time_to_first_chunk", "gen_ai.response.time_to_first_token")),
    "user": (text, ("user.id", "enduser.id")),
}

COLUMNS = frozenset(_TABLE)
"""Our names. An attribute that arrives under one of them is kept as it is."""
SOURCES: dict[str, Source] = {
    name: Source(column, rank, read) for column, (read, names) in _TABLE.items() for rank, name in enumerate(names)
}


def _list(value: Any) -> list[str] | None:
    return value.split(",") if isinstance(value, str) and value else None


def _seconds(value: Any) -> float | None:
    ms = amount(value)
    return None if ms is None else ms / 1000


_OUT: dict[str, tuple[str, Read]] = {
    "model": ("gen_ai.request.model", text),
    "provider": ("gen_ai.provider.name", text),
    "tokens_in": ("gen_ai.usage.input_tokens", count),
    "tokens_out": ("gen_ai.usage.output_tokens", count),
    "finish_reason": ("gen_ai.response.finish_reasons", _list),
    "ttft_ms": ("gen_ai.response.time_to_first_chunk", _seconds),
    "error": ("error.type", text),
    "user": ("user.id", text),
}
"""`cost_usd` has no standard attribute and goes out under its own name only."""


def columns(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """What the conventions in `attrs` say in our names."""
    ranks: dict[str, int] = {}
    out: dict[str, Any] = {}
    for name, value in attrs.items():
        source = SOURCES.get(name)
        found = None if source is None else source.read(value)
        if source is not None and found is not None and source.rank <= ranks.get(source.column, source.rank):
            ranks[source.column], out[source.column] = source.rank, found
    return out


def conventional(operation: str, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """What our names in `attrs` say in those of the conventions, where they do not say it already."""
    there = columns(attrs)
    out: dict[str, Any] = {}
    if operation in OPERATIONS and OPERATION not in attrs:
        out[OPERATION] = operation
    for column, (name, write) in _OUT.items():
        if column in attrs and column not in there and name not in attrs:
            value = write(attrs[column])
            if value is not None:
                out[name] = value
    return out
