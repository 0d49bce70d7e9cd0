"""What is asked and what is answered: `infer.request` and `infer.response` envelopes, whoever answers.

Ids are made from what is asked for: (run, harness, sample key, epoch, attempt). So a question that was asked before a
crash is the same question after it, and its answer is found in the stream (`recorded.py`) instead of being paid again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from msgspec import Raw, Struct

from mist.errors import Malformed, TransportError
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import INFER_REQUEST, INFER_RESPONSE
from mist.tools.matchspec.suite import Harness, Infer, Sample

SOURCE = "matchspec"
Ask = Callable[[Envelope], Awaitable[Envelope]]
"""One `infer.request` to its `infer.response`; raises a MistError. A program that holds a router hands one in."""


class Question(Struct, frozen=True, kw_only=True):
    """One question in every form that one who answers may want."""

    id: str
    sample: Sample
    prompt: str
    system: str
    request: Envelope


class Answer(Struct, frozen=True, kw_only=True):
    """What came back. Counts, costs and times are None where nobody stated them. `recalled`: it was found in the stream and
    not asked for now."""

    output: str
    tokens_in: int | None = None
    tokens_out: int | None = None
    cost_usd: float | None = None
    latency_ms: float | None = None
    model: str = ""
    provider: str = ""
    request_id: str = ""
    trace_id: str = ""
    recalled: bool = False


class Response(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The keys of `infer.response` that are read here. `error` says why there is no answer. An absent count is unknown, which is not zero."""

    content: str
    model: str = ""
    provider: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    cost_usd: float | None = None
    latency_ms: float | None = None
    finish_reason: str = ""
    error: str = ""
    error_code: str = ""


def request_id(run: str, harness: str, key: str, epoch: int, attempt: int = 0) -> str:
    """The id of a question's envelope. A second attempt at the same question is another question to whoever answers."""
    parts = [run, harness, key, epoch, attempt]
    return hashlib.sha256(b"infer.request" + msgspec.json.encode(parts)).hexdigest()[:32]


def question(
    run: str, harness: Harness, sample: Sample, key: str, epoch: int, *, seed: int | None, attempt: int = 0
) -> Question:
    """Repeat `epoch` of a sample asks with the seed + epoch - 1, where there is a seed: the same for everybody would make
    every repeat the same."""
    prompt = harness.prompt(sample)
    model = harness.model
    params: dict[str, Any] = dict(model.params) if isinstance(model, Infer) else {}
    if seed is not None and isinstance(model, Infer):
        params.setdefault("seed", seed + epoch - 1)
    messages = [{"role": "system", "content": harness.system}] if harness.system else []
    messages.append({"role": "user", "content": prompt})
    payload: dict[str, Any] = {"model": model.model if isinstance(model, Infer) else harness.label}
    if isinstance(model, Infer) and model.provider:
        payload["provider"] = model.provider
    payload["messages"] = messages
    if params:
        payload["params"] = params
    payload["meta"] = {"run": run, "harness": harness.name, "sample": sample.id, "epoch": str(epoch)}
    id = request_id(run, harness.name, key, epoch, attempt)
    trace = hashlib.sha256(f"trace:{run}:{harness.name}:{key}:{epoch}".encode()).hexdigest()
    request = Envelope.new(
        INFER_REQUEST,
        payload,
        source=SOURCE,
        id=id,
        correlation_id=id,
        traceparent=f"00-{trace[:32]}-{trace[32:48]}-01",
    )
    return Question(id=id, sample=sample, prompt=prompt, system=harness.system, request=request)


def response(q: Question, answer: Answer, label: str) -> Envelope:
    """The answer of somebody who does not speak in envelopes, as one. Its id is made from the question's."""
    payload = Response(
        content=answer.output,
        model=answer.model or label,
        provider=answer.provider,
        tokens_in=answer.tokens_in,
        tokens_out=answer.tokens_out,
        cost_usd=answer.cost_usd,
        latency_ms=None if answer.latency_ms is None else round(answer.latency_ms, 3),
        finish_reason="stop",
    )
    return Envelope.new(
        INFER_RESPONSE,
        payload,
        source=SOURCE,
        id=hashlib.sha256(f"infer.response:{q.id}".encode()).hexdigest()[:32],
        correlation_id=q.id,
        causation_id=q.id,
        traceparent=q.request.traceparent,
    )


_response = msgspec.json.Decoder(Response).decode


def read_answer(env: Envelope, *, latency_ms: float | None = None, recalled: bool = False) -> Answer:
    """Raises Malformed for an envelope that is no answer, or states numbers that cannot be, and TransportError for an
    answer that is an error."""
    if env.type != INFER_RESPONSE:
        raise Malformed(f"envelope {env.id}: expected {INFER_RESPONSE}, got {env.type}")
    return answer_of(env.payload, env.id, env.correlation_id, env.traceparent, latency_ms=latency_ms, recalled=recalled)


def answer_of(
    payload: Raw | bytes,
    id: str,
    correlation_id: str,
    traceparent: str,
    *,
    latency_ms: float | None = None,
    recalled: bool = False,
) -> Answer:
    try:
        found = _response(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Malformed(f"envelope {id}: not the payload of an answer: {exc}") from exc
    if found.error:
        told = f"{found.error_code}: {found.error}" if found.error_code else found.error
        # whoever answers with an error has given up: what may pass is not answered but tried again over there
        raise TransportError(told, retryable=False, meta={"error_code": found.error_code})
    counts = (found.tokens_in, found.tokens_out, found.cost_usd, found.latency_ms)
    if any(n is not None and not 0 <= n < math.inf for n in counts):
        raise Malformed(f"envelope {id}: an answer with impossible counts: {counts}")
    return Answer(
        output=found.content,
        tokens_in=found.tokens_in,
        tokens_out=found.tokens_out,
        cost_usd=found.cost_usd,
        # whole milliseconds: a stated 0 is less than one, and not unknown, where nobody measured it here (recalled)
        latency_ms=found.latency_ms if found.latency_ms or latency_ms is None else latency_ms,
        model=found.model,
        provider=found.provider,
        request_id=correlation_id,
        trace_id=traceparent[3:35],
        recalled=recalled,
    )
