"""Between the router's shapes and those on a stream: `infer.request`, `infer.started`, `infer.response`, and the span of a call.

Promises: an answer of an envelope says what it answers (`correlation_id`); a failed one is an `infer.response` too, with
`finish_reason` "error", `error` and `error_code`, and without a `request_key`, so that nobody replays a failure. Nothing
here does I/O; the seed's keys are where the seed has them.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from mist.errors import InvalidArgument, MistError
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import INFER_REQUEST, InferRequest, InferResponse, TraceSpan
from mist.protocol.payloads import ChatMessage as WireMessage
from mist.protocol.tracecontext import TraceContext
from mist.tools.infermux.chat import Caller, ChatMessage, ChatRequest, Usage
from mist.tools.infermux.failures import ProviderError
from mist.tools.infermux.recordings import key_of
from mist.tools.infermux.routed import Routed, RoutedEmbeddings, Way
from mist.tools.infermux.settings import Capture

SOURCE = "infermux"
INFER_STARTED = "infer.started"
OPERATION = "infermux.infer"
EMBEDDING = "infermux.embed"
ERROR = "error"
CALLER_META = "caller."
"""Beginning of the keys of `meta` that say who asks: `caller.key`, `caller.team`, `caller.project`, `caller.env`."""

_SCALARS = (str, int, float, bool)


class InferStarted(Struct, frozen=True, omit_defaults=True):
    """A call has begun; one without an `infer.response` was under way when its router died."""

    model: str
    stream: bool = False
    caller: str = ""


def chat_request(envelope: Envelope) -> ChatRequest:
    """The question of an `infer.request`. Who asks is in its `meta`. Raises Malformed, InvalidArgument."""
    if envelope.type != INFER_REQUEST:
        raise InvalidArgument(f"expected type {INFER_REQUEST}, got {envelope.type}", meta={"id": envelope.id})
    payload = envelope.decode(InferRequest)
    request = question(payload)
    return msgspec.structs.replace(
        request, id=envelope.id, traceparent=envelope.traceparent, tenant=envelope.tenant
    )  # fmt: skip


def question(payload: InferRequest) -> ChatRequest:
    """The same of a bare payload. An empty model is `auto`, as in the seed."""
    meta = payload.meta
    who = {k.removeprefix(CALLER_META): v for k, v in meta.items() if k.startswith(CALLER_META)}
    caller = Caller(**{k: v for k, v in who.items() if k in Caller.__struct_fields__}) if who else _NOBODY
    return ChatRequest(
        model=payload.model or "auto", provider=payload.provider, params=payload.params, meta=meta, caller=caller,
        messages=tuple(
            [
                ChatMessage(
                    role=m.role, content=m.content, name=m.name, tool_calls=m.tool_calls, tool_call_id=m.tool_call_id
                )
                for m in payload.messages or ()
            ]
        ),
    )  # fmt: skip


_NOBODY = Caller()


def request_payload(request: ChatRequest, capture: Capture = "full") -> InferRequest:
    """What is written of a question. `metadata`: without texts, tools and schemas; `none`: the model's name alone."""
    if capture == "none":
        return InferRequest(model=request.model, provider=request.provider)
    meta = {**request.meta}
    for name in Caller.__struct_fields__:
        if value := getattr(request.caller, name):
            meta[CALLER_META + name] = value
    if capture == "metadata":
        params = {k: v for k, v in request.params.items() if isinstance(v, _SCALARS)}
        return InferRequest(
            request.model, request.provider, [WireMessage(m.role, "") for m in request.messages], params, meta
        )
    messages = [WireMessage(m.role, m.content, m.name, m.tool_calls, m.tool_call_id) for m in request.messages]
    return InferRequest(request.model, request.provider, messages, request.params, meta)


def response_payload(request: ChatRequest, routed: Routed, capture: Capture = "full") -> InferResponse:
    """The answer on the wire, with the key under which it can be replayed."""
    reply, usage = routed.reply, routed.reply.usage
    full = capture == "full"
    return InferResponse(
        model=routed.model,
        provider=routed.provider,
        content=reply.content if full else "",
        tokens_in=usage.tokens_in,
        tokens_out=usage.tokens_out,
        cost_usd=routed.cost_usd,
        latency_ms=routed.latency_ns // 1_000_000,
        finish_reason=reply.finish_reason,
        request_key=key_of(request, routed.model) if full else "",
        request_id=reply.id,
        answered_by=reply.model if reply.model != routed.model else "",
        tool_calls=reply.tool_calls if full else [],
        refusal=reply.refusal if full else "",
        tokens_cached=usage.cached,
        tokens_reasoning=usage.reasoning,
        price_version=routed.price_version or "",
    )


def error_payload(request: ChatRequest, error: MistError, latency_ns: int = 0) -> InferResponse:
    """The answer of a question that has none. What was used up is unknown."""
    return InferResponse(
        model=request.model,
        provider=error.provider if isinstance(error, ProviderError) else request.provider,
        tokens_in=None,
        tokens_out=None,
        cost_usd=None,
        latency_ms=latency_ns // 1_000_000,
        finish_reason=ERROR,
        error=error.message,
        error_code=code_of(error),
    )


def code_of(error: MistError) -> str:
    """One word for a failure: a provider's kind, a limit's reason, else the code of the error."""
    if isinstance(error, ProviderError):
        return error.kind
    return error.meta.get("reason") or error.code


def span_of(
    request: ChatRequest,
    *,
    here: TraceContext,
    parent_id: str,
    start_ns: int,
    end_ns: int,
    way: Way | None,
    error: MistError | None,
    ttft_ns: int | None = None,
    stream: bool = False,
) -> TraceSpan:
    """The span of a call. `model` is what was asked of the provider; what the caller wrote and what the provider says it
    was stand beside it where they differ. What is unknown is absent."""
    attrs: dict[str, Any] = {"model": request.model, "latency_ms": (end_ns - start_ns) / 1e6, "request_id": request.id}
    if way is not None:
        _add_way(attrs, request, way, failed=error is not None)
    if ttft_ns is not None:
        attrs["ttft_ms"] = ttft_ns / 1e6
    if stream:
        attrs["stream"] = True
    for name in Caller.__struct_fields__:
        if value := getattr(request.caller, name):
            attrs["caller" if name == "key" else name] = value
    if user := request.params.get("user"):
        attrs["user"] = user
    if error is not None:
        attrs["error"] = error.message
        attrs["error_kind"] = code_of(error)
        if "provider" not in attrs and isinstance(error, ProviderError) and error.provider:
            attrs["provider"] = error.provider
    return TraceSpan(
        trace_id=here.trace_id, span_id=here.span_id, parent_id=parent_id,
        operation=EMBEDDING if isinstance(way, RoutedEmbeddings) else OPERATION, start_ns=start_ns, end_ns=end_ns,
        status="ok" if error is None else "error", attrs=attrs,
    )  # fmt: skip


def _add_way(attrs: dict[str, Any], request: ChatRequest, way: Way, *, failed: bool) -> None:
    if isinstance(way, Routed):
        usage, answered = way.reply.usage, way.reply.model
        if not failed:
            attrs["finish_reason"] = way.reply.finish_reason
    elif isinstance(way, RoutedEmbeddings):
        usage, answered = way.embeddings.usage, way.embeddings.model
    else:
        usage, answered = _UNKNOWN, ""
    attrs["provider"] = way.provider
    attrs["model"] = way.model
    if way.model != request.model:
        attrs["model_requested"] = request.model
    if answered and answered != way.model:
        attrs["model_answered"] = answered
    numbers = {
        "tokens_in": usage.tokens_in, "tokens_out": usage.tokens_out, "tokens_cached": usage.cached,
        "tokens_reasoning": usage.reasoning, "cost_usd": way.cost_usd,
    }  # fmt: skip
    attrs.update({name: value for name, value in numbers.items() if value is not None})
    texts = {
        "price_version": way.price_version, "strategy": way.strategy, "group": way.group,
        "budget_override": way.budget_override,
    }  # fmt: skip
    attrs.update({name: text for name, text in texts.items() if text})
    attrs["attempts"] = len(way.attempts)
    if len(way.attempts) > 1:
        attrs["tries"] = [
            {
                "provider": a.provider, "model": a.model, "kind": a.kind, "status": a.status,
                "latency_ms": a.latency_ns / 1e6,
            }
            for a in way.attempts
        ]  # fmt: skip


_UNKNOWN = Usage()
