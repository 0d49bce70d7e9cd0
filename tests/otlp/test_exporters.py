"""The real OpenTelemetry exporters, unmodified, against `mist up`: nothing but an endpoint is told to them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import pytest
from cli.conftest import records
from cli.test_up import started
from opentelemetry import trace as api
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mist.kit.local import free_port
from mist.protocol.codec import decode
from mist.protocol.payloads import TraceSpan

Spawn = Callable[..., "subprocess.Popen[bytes]"]


class Up(NamedTuple):
    url: str
    http: str
    grpc: str


@pytest.fixture
def up(spawn: Spawn, log: str) -> Up:
    _, found = started(spawn, log, "--otlp-grpc", "127.0.0.1:0")
    return Up(found["readyz"].removesuffix("/readyz"), found["v1/traces"], found["grpc"])


def json_exporter() -> Any:
    module = pytest.importorskip(
        "opentelemetry.exporter.otlp.json.http.trace_exporter",
        reason="opentelemetry-exporter-otlp-json-http is not installed; the golden file stands for it",
    )
    return module.OTLPJSONSpanExporter if hasattr(module, "OTLPJSONSpanExporter") else module.OTLPSpanExporter


EXPORTERS: dict[str, Callable[[Up], SpanExporter]] = {
    "http": lambda up: HttpExporter(up.http),
    "http+gzip": lambda up: HttpExporter(up.http, compression=Compression.Gzip),
    "grpc": lambda up: GrpcExporter(up.grpc, insecure=True),
    "grpc+gzip": lambda up: GrpcExporter(up.grpc, insecure=True, compression=grpc.Compression.Gzip),
    "json": lambda up: json_exporter()(endpoint=up.http),
}


def a_conversation(exporter: SpanExporter) -> list[ReadableSpan]:
    """An agent calls a model twice, the second time in vain: three spans, as instrumentations make them."""
    kept = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource.create({"service.name": "chat-api", "deployment.zones": ["a", "b"]}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracer = provider.get_tracer("test.instrumentation", "1.2")
    with tracer.start_as_current_span("invoke_agent helper", attributes={"gen_ai.operation.name": "invoke_agent"}):
        with tracer.start_as_current_span(
            "chat gpt-4",
            kind=api.SpanKind.CLIENT,
            attributes={
                "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "gpt-4",
                "gen_ai.request.temperature": 0.5,
            },
        ) as span:  # fmt: skip
            span.set_attributes({"gen_ai.response.model": "gpt-4-0613", "gen_ai.usage.input_tokens": 374})
            span.set_attributes({"gen_ai.usage.output_tokens": 44, "gen_ai.usage.cost": 0.01386})
            span.set_attribute("gen_ai.response.finish_reasons", ("stop",))
            span.add_event("gen_ai.choice", {"index": 0})
        with pytest.raises(TimeoutError), tracer.start_as_current_span("chat gpt-4", kind=api.SpanKind.CLIENT):
            raise TimeoutError("no answer")
    provider.shutdown()
    return list(kept.get_finished_spans())


@pytest.mark.parametrize("name", EXPORTERS)
def test_spans_of_the_real_exporters_can_be_asked_for(name: str, up: Up, log: str) -> None:
    """Model, tokens, cost and parents are what they were; in the stream and through the query routes."""
    sent = a_conversation(EXPORTERS[name](up))
    stored = {r.id: decode(r.data) for r in records(log, "trace")}
    assert len(stored) == len(sent) == 3
    for span in sent:
        context, parent = span.context, span.parent
        assert context is not None
        env = stored[f"{context.trace_id:032x}-{context.span_id:016x}"]
        payload = env.decode(TraceSpan)
        assert (env.source, payload.parent_id) == ("chat-api", f"{parent.span_id:016x}" if parent else "")
        assert (payload.start_ns, payload.end_ns) == (span.start_time, span.end_time)
        for key, value in (span.attributes or {}).items():
            assert payload.attrs[key] == (list(value) if isinstance(value, tuple) else value)
        assert payload.attrs["resource.deployment.zones"] == ["a", "b"]
        assert (payload.attrs["otel.scope.name"], payload.attrs["otel.scope.version"]) == (
            "test.instrumentation",
            "1.2",
        )
    good, failed, agent = [
        stored[f"{s.context.trace_id:032x}-{s.context.span_id:016x}"].decode(TraceSpan) for s in sent
    ]
    assert (agent.operation, agent.parent_id, agent.attrs["otel.kind"]) == ("invoke_agent", "", "internal")
    assert (good.operation, good.status, good.attrs["otel.name"]) == ("chat", "ok", "chat gpt-4")
    ours = {"model": "gpt-4-0613", "provider": "openai", "tokens_in": 374, "tokens_out": 44, "cost_usd": 0.01386}
    assert ours.items() <= good.attrs.items()
    assert good.attrs["finish_reason"] == "stop"
    assert good.attrs["otel.events"][0]["name"] == "gen_ai.choice"
    assert (failed.status, failed.attrs["error"]) == ("error", "TimeoutError: no answer")
    assert failed.attrs["otel.events"][0]["attributes"]["exception.type"] == "TimeoutError"
    with httpx.Client(base_url=up.url, trust_env=False) as client:
        while len(rows := client.get(f"/traces/{good.trace_id}").json().get("spans", [])) < 3:
            time.sleep(0.05)
        by_id = {row["span_id"]: row for row in rows}
        assert {k: by_id[good.span_id][k] for k in ours} == ours
        assert {by_id[s.span_id]["parent_id"] for s in (good, failed)} == {agent.span_id}
        assert by_id[failed.span_id]["status"] == "error"
        stats = client.get("/stats").json()
    assert (stats["total_spans"], stats["error_count"], stats["total_tokens_in"]) == (3, 1, 374)
    assert stats["total_cost_usd"] == pytest.approx(0.01386)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed; the golden file stands for it")
def test_spans_of_the_exporter_for_node(up: Up, log: str) -> None:
    """OpenTelemetry JS, HTTP/JSON: the packages are found where NODE_PATH says."""
    script = [str(Path(__file__).with_name("exporter.cjs")), up.http]
    packages = [p.partition("'")[2].partition("'")[0] for p in Path(script[0]).read_text().split("require(")[1:]]
    found = subprocess.run(["node", "-e", f"{packages}.map((p) => require(p))"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("the packages that exporter.cjs requires are not on NODE_PATH; the golden file stands for them")
    subprocess.run(["node", *script], check=True, timeout=60)
    good, failed, agent = (decode(r.data).decode(TraceSpan) for r in records(log, "trace"))
    assert good.attrs["model"] == "gpt-4-0613"
    assert (good.attrs["tokens_in"], good.attrs["tokens_out"], good.attrs["cost_usd"]) == (374, 44, 0.01386)
    assert (good.parent_id, failed.parent_id, failed.status) == (agent.span_id, agent.span_id, "error")


# killed and started again


SPANS, BATCH = 3000, 150


def test_spans_while_the_receiver_is_killed(spawn: Spawn, log: str) -> None:
    """SIGKILL and a new process on the same ports, again and again: what the exporters' own retry delivers is in the
    stream once each. Their time limit is chosen so that it covers the outages; nothing of them is patched."""
    http, rpc = free_port(), free_port()
    arguments = ("up", "-u", log, "--listen", f"127.0.0.1:{http}", "--otlp-grpc", f"127.0.0.1:{rpc}", "-o", "jsonl")
    url = f"http://127.0.0.1:{http}"

    def start() -> subprocess.Popen[bytes]:
        process = spawn(*arguments)
        assert process.stdout is not None
        assert process.stdout.readline()
        return process

    process = start()
    results: list[SpanExportResult] = []
    provider = TracerProvider(resource=Resource.create({"service.name": "killed"}))
    memory = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer("t")
    for n in range(SPANS):
        tracer.start_span(f"s{n}").end()
    kept = list(memory.get_finished_spans())
    exporters: list[SpanExporter] = [
        HttpExporter(f"{url}/v1/traces", timeout=60),
        GrpcExporter(f"127.0.0.1:{rpc}", insecure=True, timeout=60),
        HttpExporter(f"{url}/v1/traces", timeout=60, compression=Compression.Gzip),
    ]
    batches = [kept[at : at + BATCH] for at in range(0, SPANS, BATCH)]
    lock = threading.Lock()

    def work(exporter: SpanExporter) -> None:
        while True:
            with lock:
                if not batches:
                    return
                batch = batches.pop()
            results.append(exporter.export(batch))

    threads = [threading.Thread(target=work, args=(exporter,)) for exporter in exporters]
    for thread in threads:
        thread.start()
    kills = 0
    seen = 0
    while any(thread.is_alive() for thread in threads):
        done = len(results)
        if done >= seen + 3 and kills < 3:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = start()
            kills, seen = kills + 1, len(results)
        time.sleep(0.002)
    assert kills == 3
    assert results == [SpanExportResult.SUCCESS] * (SPANS // BATCH)
    ids = [r.id for r in records(log, "trace")]
    assert len(ids) == SPANS
    assert set(ids) == {f"{s.context.trace_id:032x}-{s.context.span_id:016x}" for s in kept if s.context}
