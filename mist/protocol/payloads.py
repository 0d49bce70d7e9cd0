"""The ten payload types, with the seed's keys and omit rules.

Field order is the order on the wire. A plain default is omitted from the wire while it holds, as the seed omits an empty
value; a field made by `always` is written whatever it holds. Decoding is lenient, as the seed's: unknown keys are
ignored, absent ones are empty or zero. Integers fit 64 bits. Money and tokens may be `None`: unknown is not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from msgspec import Meta, Struct, field

T = TypeVar("T")
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]

DATA_ENTITIES = "data.entities"
DATA_SCHEMA = "data.schema"
INFER_REQUEST = "infer.request"
INFER_RESPONSE = "infer.response"
EVAL_RUN = "eval.run"
EVAL_RESULT = "eval.result"
TRACE_SPAN = "trace.span"
TRACE_ALERT = "trace.alert"
HEALTH_PING = "health.ping"
HEALTH_PONG = "health.pong"


def always(empty: Callable[[], T]) -> T:
    """A field that is on the wire even when empty, and may be absent when decoding."""
    # omit_defaults never omits a value that a factory other than list, dict and set made
    return field(default_factory=empty)


def _none() -> None:
    return None


class ChatMessage(Struct, frozen=True, omit_defaults=True):
    """`content` is text; beside tool calls it may be null, and with pictures it is a list of OpenAI's parts. What follows it
    is ours and optional."""

    role: str = always(str)
    content: str | list[dict[str, Any]] | None = always(str)
    name: str = ""
    tool_calls: list[dict[str, Any]] = []
    tool_call_id: str = ""


class InferRequest(Struct, frozen=True, omit_defaults=True):
    """`model` is a name or `auto`."""

    model: str = always(str)
    provider: str = ""
    messages: list[ChatMessage] | None = always(_none)
    params: dict[str, Any] = {}
    meta: dict[str, str] = {}


class InferResponse(Struct, frozen=True, omit_defaults=True):
    """Tokens may be null: not stated. What follows `finish_reason` is ours and optional: `request_key` names the question
    (mist/tools/infermux/recordings.py), so that a stream of answers can be replayed; `request_id` is the provider's name for
    the call, `answered_by` its name for the model; `tokens_cached` is a part of `tokens_in`, `tokens_reasoning` one of
    `tokens_out`; `price_version` is that of the table `cost_usd` is from. A question that failed for good has `error` and
    `error_code`, the `finish_reason` "error" and no `request_key`."""

    model: str = always(str)
    provider: str = always(str)
    content: str = always(str)
    tokens_in: Int64 | None = always(int)
    tokens_out: Int64 | None = always(int)
    cost_usd: float | None = always(float)
    latency_ms: Int64 = always(int)
    finish_reason: str = always(str)
    request_key: str = ""
    request_id: str = ""
    answered_by: str = ""
    tool_calls: list[dict[str, Any]] = []
    refusal: str = ""
    tokens_cached: Int64 | None = None
    tokens_reasoning: Int64 | None = None
    price_version: str = ""
    error: str = ""
    error_code: str = ""


class EvalRun(Struct, frozen=True, omit_defaults=True):
    """No `tasks` means all of the suite."""

    suite: str = always(str)
    tasks: list[str] = []
    baseline: bool = always(bool)
    infer_url: str = ""
    tags: dict[str, str] = {}


class EvalResult(Struct, frozen=True, omit_defaults=True):
    suite: str = always(str)
    task: str = always(str)
    passed: bool = always(bool)
    score: float = always(float)
    baseline_score: float = always(float)
    delta: float = always(float)
    duration_ms: Int64 = always(int)
    error: str = ""


class TraceSpan(Struct, frozen=True, omit_defaults=True, gc=False):
    """`status` is `ok` or `error`; `attrs` by convention holds model, provider, tokens_in, tokens_out, cost_usd, error."""

    trace_id: str = always(str)
    span_id: str = always(str)
    parent_id: str = ""
    operation: str = always(str)
    start_ns: Int64 = always(int)
    end_ns: Int64 = always(int)
    status: str = always(str)
    attrs: dict[str, Any] = {}


class TraceAlert(Struct, frozen=True, omit_defaults=True):
    """`level` is `warning` or `critical`. `value` is null where an alert is about there being no data. What follows
    `message` is ours and optional: the rule's `name`; `state`, `firing` or `resolved`; what the spans were told apart by;
    the window; how many spans the value is made of; since when the episode runs; one `dedup_key` for rule and group."""

    level: str = always(str)
    metric: str = always(str)
    value: float | None = always(float)
    threshold: float = always(float)
    message: str = always(str)
    name: str = ""
    state: str = ""
    group: dict[str, str] = {}
    window_s: float = 0.0
    samples: Int64 = 0
    since_ns: Int64 = 0
    dedup_key: str = ""


class DataEntities(Struct, frozen=True, omit_defaults=True):
    """`format` is `json`, `jsonl` or `csv`."""

    count: Int64 = always(int)
    format: str = always(str)
    path: str = always(str)
    schema: str = ""
    checksum: str = ""


class SchemaField(Struct, frozen=True):
    name: str = ""
    type: str = ""
    required: bool = False


class DataSchema(Struct, frozen=True):
    name: str = ""
    fields: list[SchemaField] | None = None


class HealthPing(Struct, frozen=True, rename={"from_": "from"}):
    from_: str = ""


class HealthPong(Struct, frozen=True, rename={"from_": "from"}):
    from_: str = ""
    version: str = ""
    uptime_s: Int64 = 0


PAYLOADS: dict[str, type[Struct]] = {
    DATA_ENTITIES: DataEntities,
    DATA_SCHEMA: DataSchema,
    INFER_REQUEST: InferRequest,
    INFER_RESPONSE: InferResponse,
    EVAL_RUN: EvalRun,
    EVAL_RESULT: EvalResult,
    TRACE_SPAN: TraceSpan,
    TRACE_ALERT: TraceAlert,
    HEALTH_PING: HealthPing,
    HEALTH_PONG: HealthPong,
}
