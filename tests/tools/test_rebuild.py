"""`mist trace rebuild` on every backend: whatever came in by whichever door, the answers are the same bytes again."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from cli.conftest import Cli
from cli.test_up import started
from conftest import run
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from mist.kit.server import Site
from mist.protocol.codec import NDJSON, encode
from mist.protocol.envelope import Envelope
from mist.tools.tokentrace.api import Api
from mist.tools.tokentrace.readers import Readers
from mist.tools.tokentrace.store import Store

from .spanning import TRACE, envelope, payload

Spawn = Callable[..., "subprocess.Popen[bytes]"]
PRICES = """
version = "1"
[[price]]
model = "m*"
input_per_million = 3
output_per_million = 7
"""
QUESTIONS = (
    "/stats", "/stats?window=2h", "/stats?tenant=acme", "/traces", "/traces?limit=3", f"/traces/{TRACE}?tree=1",
    "/traces/recent", "/traces/recent?limit=7&model=m1", "/errors", "/metrics?window=2h&groupby=model,operation,provider",
    "/metrics?window=30d&bucket=minute&groupby=tenant", "/metrics?window=2h&groupby=user,attr.k", "/metrics/latency_p95?window=2h",
)  # fmt: skip


def filled(up: dict[str, str], now: int) -> int:
    """Spans by every door: good ones and failed ones, of two tenants, some twice, some impossible, and OpenTelemetry's. How
    many records that makes."""
    envelopes = []
    for n in range(1, 41):
        attrs = {
            "model": f"m{n % 3}",
            "tokens_in": n * 10,
            "tokens_out": n,
            "user": f"u{n % 4}",
            "k": n % 2,
            "ttft_ms": n / 7,
        }
        if n % 5 == 0:
            attrs["cost_usd"] = n / 1000
        changes = {
            "trace_id": TRACE if n % 2 else f"t{n}",
            "start_ns": now - n * 10**11,
            "end_ns": now - n * 10**11 + n * 10**7,
        }
        found = envelope(n, **changes, attrs=attrs, status="error" if n % 9 == 0 else "ok",
                         parent_id=f"{n - 2:016x}" if n > 2 else "")  # fmt: skip
        envelopes.append(
            Envelope.new(found.type, found.payload, source="svc", id=found.id, tenant="acme" if n % 2 else "")
        )
    again = Envelope.new("trace.span", payload(3, start_ns=now, end_ns=now, status="error"), source="late", id="again")
    broken = [
        Envelope.new("trace.span", None, source="svc", id="null"),
        Envelope.new("trace.span", payload(99, start_ns=9, end_ns=8), source="svc", id="backwards"),
        Envelope.new("trace.alert", {"level": "warning"}, source="svc", id="alert"),
    ]
    lines = b"".join(encode(e) + b"\n" for e in [*envelopes[:20], *broken, *envelopes[20:], again])
    sent = httpx.post(up["mist"], content=lines, headers={"content-type": NDJSON}, trust_env=False, timeout=30)
    assert sent.json()["accepted"] == 44
    assert httpx.post(up["spans"], json=[payload(50), payload(51)], trust_env=False).json()["accepted"] == 2
    provider = TracerProvider(resource=Resource.create({"service.name": "otel"}))
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(up["v1/traces"])))
    with provider.get_tracer("t").start_as_current_span("chat m1") as span:
        span.set_attributes(
            {"gen_ai.request.model": "m1", "gen_ai.usage.input_tokens": 12, "gen_ai.usage.output_tokens": 5}
        )
    provider.shutdown()
    return 47


def answers(place: Path | str, now: int) -> list[bytes]:
    """What the routes say at that time."""

    async def ask() -> list[bytes]:
        readers = Readers(place)
        try:
            site = Site(Api(readers, clock=lambda: now).doors())
            transport = httpx.ASGITransport(app=site)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                found = [await client.get(question) for question in QUESTIONS]
        finally:
            readers.close()
        assert {a.status_code for a in found} == {200}, [a.text for a in found]
        return [a.content for a in found]

    return run(ask())


@pytest.mark.parametrize("backend", ["log", "nats", "redis", "log+postgresql"])
def test_a_rebuilt_store_gives_the_same_bytes(
    backend: str, log: str, servers: Callable[[str], str], spawn: Spawn, cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Figures, pages, trees and quarantine; the store's rows and totals were spoiled before, and the prices the same."""
    (tmp_path / "prices.toml").write_text(PRICES)
    monkeypatch.setenv("MIST_TOKENTRACE__PRICES", str(tmp_path / "prices.toml"))
    url = log if backend.startswith("log") else servers(backend)
    now = time.time_ns()
    place = request.getfixturevalue("database") if backend.endswith("postgresql") else tmp_path / "t.db"
    process, up = started(spawn, url, "--store", str(place))
    count = filled(up, now)
    while True:
        facts = httpx.get(up["readyz"], trust_env=False).json()["tools"]["tokentrace"]
        if facts["spans"] + facts["refused"] == count - 2:  # one is known, one is no span
            break
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 143

    later = now + 10**10
    before = answers(place, later)
    refused = cli.ok("-u", url, "trace", "errors", "--quarantined", "--store", str(place), "-j").raw
    assert b'"total_spans":43' in before[0]
    assert b"before it starts" in refused
    with Store.open(place) as store:
        store._db.execute("DELETE FROM spans WHERE model = 'm1'")
        store._db.execute("UPDATE rollups SET spans = spans + 1")
        store._db.execute("DELETE FROM quarantine")
    spoiled = answers(place, later)
    assert [a != b for a, b in zip(before, spoiled, strict=True)].count(True) >= len(QUESTIONS) - 2
    done = cli.ok("-u", url, "trace", "rebuild", "--store", str(place), "-j").json
    assert (done["records"], done["spans"], done["refused"], done["other"], done["gaps"]) == (46, 43, 2, 1, 0)
    assert answers(place, later) == before
    assert cli.ok("-u", url, "trace", "errors", "--quarantined", "--store", str(place), "-j").raw == refused
