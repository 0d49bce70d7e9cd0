"""Sampling: which spans are kept when there are too many.

    [tokentrace.sample]
    rate = 0.1                    # of the traces, whole ones
    per_source_per_s = 500        # whatever the rate lets through, at most so many for each source
    [[tokentrace.sample.keep]]    # kept always
    errors = true
    [[tokentrace.sample.keep]]
    slower_than = "5s"

Promises: the choice is a hash of the trace id, so that a trace is kept or dropped as a whole, by every process and again
after a restart; a rule of `keep` looks at the span itself and keeps it whatever becomes of its trace. A span that stands for
others says so: `tt.sampling_probability` (times what an earlier sampler said), so that totals can be weighted by its
inverse. Everything dropped is counted by reason. What is no span, or has no trace id, is kept: quarantine decides.
Does not: wait for a trace to end (a sampler at the tail would), or weight what a rate limit drops, which nobody can.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from mist.errors import InvalidArgument
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN
from mist.quantities import Duration
from mist.tools.tokentrace.settings import Keep, SampleSettings

PROBABILITY = "tt.sampling_probability"
KEEP_MAX = 32
SOURCES_MAX = 10_000
"""Sources whose rate is remembered; the one seen longest ago is forgotten, and starts with a full bucket again."""


class _Span(Struct, gc=False):
    trace_id: str = ""
    start_ns: int = 0
    end_ns: int = 0
    status: str = ""
    attrs: dict[str, Any] | None = None


_span = msgspec.json.Decoder(_Span).decode


def share(trace_id: str) -> float:
    """Where a trace lies between 0 and 1: kept when this is below the rate. Ours alone, so that it does not follow the
    choice that a client's sampler made from the same id."""
    return int.from_bytes(hashlib.blake2b(trace_id.encode(errors="replace"), digest_size=8).digest(), "big") / 2**64


class Sampler:
    """Counts in `kept` and `dropped`. `clock` is monotonic seconds."""

    def __init__(self, settings: SampleSettings, clock: Callable[[], float]) -> None:
        if len(settings.keep) > KEEP_MAX:
            raise InvalidArgument(f"tokentrace.sample: {len(settings.keep)} rules to keep (max {KEEP_MAX})")
        self._rate = settings.rate
        self._keep = [_Kept(rule, f"tokentrace.sample: keep {number}") for number, rule in enumerate(settings.keep, 1)]
        self._per_s = settings.per_source_per_s
        self._burst = settings.burst or max(1.0, settings.per_source_per_s)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self.kept = 0
        self.dropped = {"rate": 0, "source": 0}

    def __call__(self, env: Envelope) -> Envelope | None:
        """The envelope to store, or None."""
        if env.type != TRACE_SPAN:
            return env
        out: Envelope | None = env if self._rate == 1 else self._sampled(env)
        if out is None:
            self.dropped["rate"] += 1
        elif self._per_s and not self._room(env.source):
            self.dropped["source"] += 1
            return None
        else:
            self.kept += 1
        return out

    def _sampled(self, env: Envelope) -> Envelope | None:
        try:
            span = _span(env.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return env
        if not span.trace_id or any(rule.holds(span) for rule in self._keep):
            return env
        return _weighted(env, self._rate) if share(span.trace_id) < self._rate else None

    def _room(self, source: str) -> bool:
        now = self._clock()
        tokens, at = self._buckets.pop(source, (self._burst, now))
        tokens = min(self._burst, tokens + max(0.0, now - at) * self._per_s)
        self._buckets[source] = (tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._buckets) > SOURCES_MAX:
            self._buckets.popitem(last=False)
        return tokens >= 1


class _Kept:
    """A rule of `keep`, checked."""

    def __init__(self, rule: Keep, where: str) -> None:
        if not (rule.errors or rule.slower_than or rule.cost_over_usd is not None or rule.attrs):
            raise InvalidArgument(f"{where}: names nothing, and would keep everything")
        try:
            self._slower_ns = round(Duration(rule.slower_than) * 1e9) if rule.slower_than else None
        except InvalidArgument as exc:
            raise InvalidArgument(f"{where}: slower_than: {exc.message}", hint=exc.hint) from exc
        self._rule = rule

    def holds(self, span: _Span) -> bool:
        rule, attrs = self._rule, span.attrs or {}
        if rule.errors and span.status in ("", "ok"):
            return False
        if self._slower_ns is not None and not (span.start_ns and span.end_ns - span.start_ns > self._slower_ns):
            return False
        if rule.cost_over_usd is not None:
            cost = attrs.get("cost_usd")
            if not isinstance(cost, int | float) or isinstance(cost, bool) or cost <= rule.cost_over_usd:
                return False
        return all(key in attrs and (not value or _as_text(attrs[key]) == value) for key, value in rule.attrs.items())


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _weighted(env: Envelope, rate: float) -> Envelope:
    """The envelope with its probability; bytes and checksum are new."""
    payload = msgspec.json.decode(env.payload)
    attrs = payload.get("attrs") or {}
    before = attrs.get(PROBABILITY)
    earlier = before if isinstance(before, int | float) and not isinstance(before, bool) and 0 < before <= 1 else 1.0
    raw = msgspec.json.encode({**payload, "attrs": {**attrs, PROBABILITY: earlier * rate}})
    return replace(env, payload=Raw(raw), checksum=zlib.crc32(raw) if env.checksum else 0)
