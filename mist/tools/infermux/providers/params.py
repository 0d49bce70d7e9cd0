"""Parameters of a question, and the refusal of what a provider cannot be told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from mist.tools.infermux.chat import Json
from mist.tools.infermux.failures import ProviderError

_encode = msgspec.json.Encoder().encode

DELIVERY = frozenset({"stream", "stream_options"})
"""How the answer is handed over: the caller's choice of `complete` or `stream`, no business of a provider."""

_SAME_AS_NONE: dict[str, tuple[Any, ...]] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "frequency_penalty": (0,), "presence_penalty": (0,),
    "logit_bias": ({},), "modalities": (["text"],), "response_format": ({"type": "text"},), "store": (False,),
    "tools": ([],), "stop": ([],), "service_tier": ("auto",),
}  # fmt: skip


def stated(params: Mapping[str, Any]) -> Json:
    """What is really asked for: without `null`, without the defaults of OpenAI's API, without DELIVERY."""
    return {
        name: value
        for name, value in params.items()
        if value is not None and name not in DELIVERY and value not in _SAME_AS_NONE.get(name, ())
    }


def unsupported(provider: str, names: Iterable[str], *, hint: str = "") -> ProviderError:
    """To be raised: what is asked cannot be sent."""
    listed = ", ".join(sorted(set(names)))
    return ProviderError(
        "unsupported", f"cannot be asked with {listed}", provider=provider,
        hint=hint or "leave it out, ask another provider, or set drop_params for this one",
    )  # fmt: skip


def encoded(provider: str, question: Json) -> bytes:
    """The JSON of a question."""
    try:
        return _encode(question)
    except (UnicodeEncodeError, TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise ProviderError("invalid", f"the question has no JSON form: {exc}", provider=provider) from exc
