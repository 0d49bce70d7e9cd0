"""What the router answers: an answer and the way it came, and the way an answer would come."""

from __future__ import annotations

from msgspec import Struct

from mist.tools.infermux.chat import Embeddings, Reply
from mist.tools.infermux.naming import LeftOut

CANCELLED = "cancelled"


class Attempt(Struct, frozen=True, kw_only=True):
    """One question to one provider. `kind` is that of its failure (failures.py), `cancelled`, or empty: it answered."""

    provider: str
    model: str
    kind: str = ""
    status: int = 0
    latency_ns: int = 0


class Way(Struct, frozen=True, kw_only=True):
    """How an answer came. `model` is the provider's name of what was asked. `cost_usd` None = unknown; it is that of this answer,
    `price_version` that of the table it is from (empty: the provider stated it). `latency_ns` is for all attempts together.
    `budget_override`: the model that a budget had asked instead."""

    provider: str
    model: str
    strategy: str
    group: str
    cost_usd: float | None
    price_version: str
    latency_ns: int
    attempts: list[Attempt]
    budget_override: str = ""


class Routed(Way, frozen=True, kw_only=True):
    reply: Reply


class RoutedEmbeddings(Way, frozen=True, kw_only=True):
    embeddings: Embeddings


class Choice(Struct, frozen=True, kw_only=True):
    """A candidate as it would be asked. `latency_s` None = unmeasured; `estimate_usd` at most, None = its price is unknown;
    `share` below 1: it works again since a short time, and is passed over now and then; `stage`: what it was asked for by."""

    provider: str
    model: str
    stage: str
    group: str
    strategy: str
    priority: int
    weight: float
    latency_s: float | None
    in_flight: int
    estimate_usd: float | None
    share: float


class Explanation(Struct, frozen=True, kw_only=True):
    """`candidates` in the order they would be asked now, `left_out` who would not be, and why."""

    model: str
    resolved: str
    group: str
    strategy: str
    candidates: list[Choice]
    left_out: list[LeftOut]


class ModelState(Struct, frozen=True, kw_only=True):
    """`latency_s` until a whole answer, `first_s` until the first piece of a stream; None = not measured."""

    model: str
    circuit: str
    retry_after_s: float
    cooling_s: float
    latency_s: float | None
    first_s: float | None
    in_flight: int


class ProviderState(Struct, frozen=True, kw_only=True):
    """`headroom` None = no limit."""

    name: str
    type: str
    healthy: bool
    """Whether any of its models may be asked."""
    models: list[ModelState]
    in_flight: int
    waiting: int
    requests_headroom: int | None
    tokens_headroom: int | None
