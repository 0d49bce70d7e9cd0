"""The ten payload types, with the seed's keys and omit rules.

Field order is the order on the wire. Fields with a default are omitted when they hold it, as the seed does; fields
without one are always written. Unknown keys are ignored when decoding. Money may be `None`: unknown is not zero.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

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


class ChatMessage(Struct, frozen=True):
    role: str
    content: str


class InferRequest(Struct, frozen=True, omit_defaults=True):
    model: str
    provider: str = ""
    messages: list[ChatMessage] | None = None
    params: dict[str, Any] = {}
    meta: dict[str, str] = {}


class InferResponse(Struct, frozen=True):
    model: str
    provider: str
    content: str
    tokens_in: int
    tokens_out: int
    cost_usd: float
    latency_ms: int
    finish_reason: str


class EvalRun(Struct, frozen=True, omit_defaults=True):
    suite: str
    tasks: list[str] = []
    baseline: bool = False
    infer_url: str = ""
    tags: dict[str, str] = {}


class EvalResult(Struct, frozen=True, omit_defaults=True):
    suite: str
    task: str
    passed: bool
    score: float
    baseline_score: float
    delta: float
    duration_ms: int
    error: str = ""


class TraceSpan(Struct, frozen=True, omit_defaults=True, gc=False):
    trace_id: str
    span_id: str
    parent_id: str = ""
    operation: str = ""
    start_ns: int = 0
    end_ns: int = 0
    status: str = ""
    attrs: dict[str, Any] = {}


class TraceAlert(Struct, frozen=True):
    level: str
    metric: str
    value: float
    threshold: float
    message: str


class DataEntities(Struct, frozen=True, omit_defaults=True):
    count: int
    format: str
    path: str
    schema: str = ""
    checksum: str = ""


class SchemaField(Struct, frozen=True):
    name: str
    type: str
    required: bool


class DataSchema(Struct, frozen=True):
    name: str
    fields: list[SchemaField] | None = None


class HealthPing(Struct, frozen=True, rename={"from_": "from"}):
    from_: str


class HealthPong(Struct, frozen=True, rename={"from_": "from"}):
    from_: str
    version: str
    uptime_s: int


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
