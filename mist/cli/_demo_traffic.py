"""Made-up LLM traffic for the demo: real token counts, invented models, prices, latencies and failures.

Token counts follow the Azure LLM inference trace of 2023, conversation service (19,366 calls): the two tables below
are every 64th part of its sorted ContextTokens and GeneratedTokens. Their rank correlation in the trace is 0.07, so they
are drawn independently. Source: Azure/AzurePublicDataset, AzureLLMInferenceTrace_conv.csv, CC-BY 4.0, (c) Microsoft;
Patel et al., "Splitwise: Efficient generative LLM inference using phase splitting", ISCA 2024.

Pure: the same seed, run and base time give the same envelopes. The seed decides the traffic, the run its ids.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence

from msgspec import Struct

from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN, TraceSpan

CONTEXT_TOKENS = (
    2, 64, 165, 181, 194, 200, 206, 212, 235, 321, 374, 378, 383, 388, 391, 394, 396, 398, 401, 403, 405, 408, 412, 419,
    428, 459, 818, 910, 966, 986, 1001, 1011, 1020, 1028, 1037, 1044, 1052, 1059, 1067, 1075, 1083, 1092, 1100, 1110,
    1120, 1133, 1147, 1164, 1189, 1233, 1312, 1315, 1335, 1479, 1766, 2019, 2309, 2584, 3018, 4074, 4079, 4084, 4089,
    4107, 14050,
)  # fmt: skip
GENERATED_TOKENS = (
    7, 18, 33, 40, 45, 49, 53, 56, 60, 64, 68, 72, 75, 78, 81, 83, 85, 87, 89, 90, 92, 94, 95, 97, 99, 101, 104, 107, 110,
    114, 118, 123, 129, 135, 141, 149, 157, 163, 171, 181, 195, 217, 223, 373, 377, 385, 389, 393, 395, 396, 397, 399,
    402, 407, 411, 414, 416, 420, 427, 429, 440, 456, 502, 568, 1000,
)  # fmt: skip


class Model(Struct, frozen=True, kw_only=True):
    """An invented model. Prices in US dollars per million tokens; None = nobody knows (self-hosted)."""

    name: str
    provider: str
    share: float
    first_token_ms: float
    per_token_ms: float
    price_in: float | None
    price_out: float | None


MODELS = (
    Model(name="cirrus-large", provider="cirrus", share=0.3, first_token_ms=620, per_token_ms=22, price_in=3.0, price_out=15.0),
    Model(name="cirrus-small", provider="cirrus", share=0.5, first_token_ms=210, per_token_ms=7, price_in=0.15, price_out=0.6),
    Model(name="local-8b", provider="self-hosted", share=0.2, first_token_ms=90, per_token_ms=14, price_in=None, price_out=None),
)  # fmt: skip
SERVICES = ("chat-api", "search", "agents")
ERRORS = ("rate_limit", "upstream_unavailable", "content_filter")
TIMEOUT_MS = 60_000
SPANS_MAX = 6
TRACE_EVERY_MS = 40


def draw(table: Sequence[int], u: float) -> int:
    """The value at quantile `u` (0 <= u < 1), between the table's points in a straight line."""
    at = u * (len(table) - 1)
    low = int(at)
    return round(table[low] + (table[low + 1] - table[low]) * (at - low))


def span_of(count: int) -> int:
    """Nanoseconds that so much traffic takes, and a little more: begin so long ago and all of it is in the past."""
    return int(count * TRACE_EVERY_MS * 1e6 * 0.6) + 600 * 1_000_000_000


def traffic(count: int, *, seed: int, run: str, base_ns: int) -> Iterator[Envelope]:
    """`count` spans in traces of 1 to 6, each trace from one service, starting at `base_ns`."""
    rng = random.Random(seed)
    ids = random.Random(hashlib.sha256(f"{seed}:{run}".encode()).digest())
    weights = [m.share for m in MODELS]
    now, made = base_ns, 0
    while made < count:
        now += int(rng.expovariate(1 / TRACE_EVERY_MS) * 1e6)
        trace_id = f"{ids.getrandbits(128):032x}"
        service = rng.choice(SERVICES)
        parent, at = "", now
        size = min(count - made, 1 + int(min(rng.expovariate(0.7), SPANS_MAX - 1)))
        for number in range(size):
            span_id = f"{ids.getrandbits(64):016x}"
            model = rng.choices(MODELS, weights)[0]
            span = _span(rng, model, trace_id, span_id, parent, at)
            yield Envelope.new(
                TRACE_SPAN, span, source=service, id=f"{ids.getrandbits(128):032x}", timestamp_ns=span.end_ns
            )
            at = span.end_ns
            if number == 0:
                parent = span_id
        made += size


def _span(rng: random.Random, model: Model, trace_id: str, span_id: str, parent: str, start_ns: int) -> TraceSpan:
    tokens_in = draw(CONTEXT_TOKENS, rng.random())
    tokens_out = draw(GENERATED_TOKENS, rng.random())
    latency_ms = (model.first_token_ms + tokens_in * 0.05 + tokens_out * model.per_token_ms) * rng.lognormvariate(
        0, 0.25
    )
    attrs: dict[str, object] = {"model": model.name, "provider": model.provider, "tokens_in": tokens_in}
    luck = rng.random()
    if luck < 0.012:
        status, latency_ms = "error", latency_ms * 0.1
        attrs["error"] = rng.choice(ERRORS)
    elif luck < 0.015:
        status, latency_ms = "timeout", float(TIMEOUT_MS)
        attrs["error"] = "timeout"
    else:
        status = "ok"
        attrs["tokens_out"] = tokens_out
        if model.price_in is not None and model.price_out is not None:
            attrs["cost_usd"] = round((tokens_in * model.price_in + tokens_out * model.price_out) / 1e6, 9)
    return TraceSpan(
        trace_id=trace_id,
        span_id=span_id,
        parent_id=parent,
        operation="chat",
        start_ns=start_ns,
        end_ns=start_ns + int(latency_ms * 1e6),
        status=status,
        attrs=attrs,
    )
