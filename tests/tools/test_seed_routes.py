"""The seed's doors and routes against a real `mist up`: what its own tests ask for, and its defects, each of them gone."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest
from cli.conftest import Cli, records
from cli.test_up import started
from conftest import run

from mist.protocol.codec import NDJSON, encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN
from mist.transport import dial

from .spanning import TRACE, envelope, payload

Spawn = Callable[..., "subprocess.Popen[bytes]"]


class Up(httpx.Client):
    """A platform that runs, and who asks it."""

    def __init__(self, found: dict[str, Any]) -> None:
        super().__init__(base_url=found["readyz"].removesuffix("/readyz"), trust_env=False, timeout=30)

    def give(self, *envelopes: Envelope) -> None:
        """Post them, one a request, as the seed's senders do."""
        for env in envelopes:
            answer = self.post("/mist", content=encode(env))
            assert (answer.status_code, answer.content) == (202, b""), answer.text

    def settled(self, sequence: int) -> None:
        """Wait until the store has read so far. The test's own time limit ends it."""
        while self.get("/readyz").json()["tools"]["tokentrace"]["position"] < sequence:
            time.sleep(0.02)

    def json(self, path: str) -> Any:
        answer = self.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
def up(spawn: Spawn, log: str) -> Iterator[Up]:
    _, found = started(spawn, log)
    with Up(found) as client:
        yield client


def test_what_the_seeds_own_tests_ask_for(up: Up, log: str) -> None:
    """Empty answers, 202 with an empty body, 400, 405, 404, figures of one span, the newest three, a hundred by default."""
    nothing = up.get("/stats").json()
    assert [value for value in nothing.values() if value != 0] == []
    assert nothing["total_cost_usd"] == 0
    assert "by_operation" not in nothing
    assert up.json("/traces") == {"trace_ids": [], "count": 0, "traces": [], "next": ""}
    assert up.json("/traces/recent") == {"spans": [], "count": 0, "next": ""}

    up.give(envelope(1))
    up.settled(1)
    stats = up.json("/stats")
    assert (stats["total_spans"], stats["total_tokens_in"], stats["total_tokens_out"]) == (1, 100, 20)
    assert (stats["total_cost_usd"], stats["latency_avg_ms"], stats["error_rate"]) == (0.5, 250, 0)
    assert stats["by_operation"] == {"chat": {"count": 1, "errors": 0}}
    (span,) = up.json(f"/traces/{TRACE}")["spans"]
    assert {key: span[key] for key in payload()} == payload()

    assert up.get("/mist").status_code == 405
    for body in (b"{not json", b'{"version":"1","id":"x","source":"s","type":"trace.span","timestamp_ns":1.5}'):
        assert up.post("/mist", content=body).status_code == 400
    assert (up.get("/traces/none").status_code, up.get("/traces/none").json()["message"]) == (404, "trace not found")

    lines = b"".join(encode(envelope(n, trace_id=f"t{n % 2}")) + b"\n" for n in range(2, 151))
    assert up.post("/mist", content=lines, headers={"content-type": NDJSON}).json()["accepted"] == 149
    up.settled(150)
    assert sorted(up.json("/traces")["trace_ids"]) == sorted(["t0", "t1", TRACE])
    newest = [int(s["span_id"], 16) for s in up.json("/traces/recent?limit=3")["spans"]]
    assert newest == [150, 149, 148]
    assert up.json("/traces/recent")["count"] == 100


def test_another_type_is_stored_in_the_stream_and_is_no_span(up: Up, log: str) -> None:
    """The seed's tool refuses it. Here the door is the stream's, which carries every type; what it knows to be wrong of one
    (a payload that cannot be that type's) is found by who reads it."""
    up.give(Envelope.new("trace.alert", {"level": "warning", "metric": "m"}, source="s"), envelope(1))
    up.settled(2)
    assert [r.subject for r in records(log, "trace")] == ["trace.alert", "trace.span"]
    assert up.json("/stats")["total_spans"] == 1


REFUSED = {
    "a payload that is null": None,
    "an empty trace id": payload(11, trace_id=""),
    "an end before the start": payload(12, start_ns=10, end_ns=9),
    "a negative cost": payload(13, attrs={"cost_usd": -3}),
    "a count that is text": payload(14, attrs={"tokens_in": "100"}),
}


def test_what_the_seed_counts_and_should_not_is_quarantined_with_its_reason(up: Up, cli: Cli, log: str) -> None:
    """Accepted at the door, as there; then kept aside, and no total knows of it."""
    up.give(*[Envelope.new(TRACE_SPAN, value, source="s") for value in REFUSED.values()], envelope(1))
    up.settled(6)
    stats = up.json("/stats")
    assert (stats["total_spans"], stats["error_count"], stats["total_cost_usd"]) == (1, 0, 0.5)
    assert (stats["total_tokens_in"], stats["latency_p99_ms"]) == (100, pytest.approx(250, rel=0.0081))
    assert up.json("/traces/recent")["count"] == 1
    found = cli.ok("-u", log, "trace", "errors", "--quarantined", "-j").json
    reasons = {r["sequence"]: r["reason"] for r in found}
    words = ["payload is not a span", "trace_id is missing", "before it starts", "attrs.cost_usd", "attrs.tokens_in"]
    assert list(reasons) == [5, 4, 3, 2, 1]
    assert [word in reasons[n] for n, word in enumerate(words, 1)] == [True] * 5


def test_whole_counts_of_any_writing_count_and_other_words_of_status_are_failures(up: Up) -> None:
    """The seed skips a count that is written without a point when it comes from its own process, and knows one word for a
    failure only."""
    up.give(
        envelope(1, attrs={"tokens_in": 100, "tokens_out": 7}),
        envelope(2, attrs={"tokens_in": 100.0, "tokens_out": 1e2}, status="timeout"),
        envelope(3, attrs={"tokens_in": None}, status="gave up"),
        envelope(4, attrs=None, status=""),
    )
    up.settled(4)
    stats = up.json("/stats")
    assert (stats["total_spans"], stats["total_tokens_in"], stats["total_tokens_out"]) == (4, 200, 107)
    assert (stats["error_count"], stats["cost_unknown_spans"], stats["total_cost_usd"]) == (2, 4, None)
    assert [s["status"] for s in up.json("/errors")["spans"]] == ["gave up", "timeout"]


def test_a_trace_is_in_order_and_any_name_of_it_can_be_asked_for(up: Up) -> None:
    """By start, whatever the order of arrival; also for a trace that is called as a route is."""
    up.give(*[envelope(n, trace_id="recent") for n in (3, 1, 2)])
    up.settled(3)
    spans = up.json("/traces/?id=recent")["spans"]
    assert [int(s["span_id"], 16) for s in spans] == [1, 2, 3]
    assert [s["start_ns"] for s in spans] == sorted(s["start_ns"] for s in spans)


def test_a_slash_behind_the_url_of_a_sender_loses_nothing(up: Up, log: str) -> None:
    """`http://host/` is where `http://host` is; a path that is not served is a refusal, never a redirect."""

    base = str(up.base_url).rstrip("/")

    async def send() -> None:
        async with dial(base + "/") as sender:
            await sender.send(envelope(1))

    run(send())
    assert [r.id for r in records(log, "trace")] == [envelope(1).id]
    for path in ("//mist", "/mist/"):
        answer = httpx.post(base + path, content=encode(envelope(2)), trust_env=False)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


# ----------------------------------------------------------------- POST /spans


DOCUMENTED = {
    "trace_id": "d" * 32, "span_id": "1" * 16, "parent_span_id": "2" * 16, "name": "summarize", "caller": "jobs",
    "model": "gpt-4o", "provider": "openai", "prompt_tokens": 512, "comp_tokens": 128, "total_tokens": 640,
    "cost_usd": 0.00256, "latency_ms": 1200.5, "ttft_ms": 0, "status": "timeout", "error": "deadline",
    "started_at": "2026-01-31T12:00:00.000000001Z", "ended_at": "2026-01-31T13:00:01.2+01:00",
    "attributes": {"eval.score": 0.75, "name": "kept as it is"},
}  # fmt: skip


def test_bare_spans_of_the_documents_and_of_the_wire(up: Up, log: str) -> None:
    """An object or an array, in the one shape or the other, answered with how many; sent again it is there once."""
    for _ in range(2):
        answer = up.post("/spans", json=DOCUMENTED, headers={"mist-source": "billing"})
        assert (answer.status_code, answer.json()["accepted"]) == (202, 1)
    answer = up.post("/spans", json=[payload(1), {**payload(2), "name": "not ours"}])
    assert (answer.status_code, answer.json()["accepted"]) == (202, 2)
    assert up.post("/spans", json=[]).json() == {"accepted": 0}
    stored = records(log, "trace")
    assert [r.id for r in stored] == [f"{'d' * 32}-{'1' * 16}", *(f"{TRACE}-{n:016x}" for n in (1, 2))]
    up.settled(3)
    (span,) = up.json(f"/traces/{'d' * 32}")["spans"]
    assert (span["operation"], span["parent_id"], span["status"]) == ("summarize", "2" * 16, "timeout")
    assert (span["source"], span["start_ns"], span["end_ns"]) == (
        "billing", 1_769_860_800_000_000_001, 1_769_860_801_200_000_000,
    )  # fmt: skip
    assert (span["model"], span["provider"], span["tokens_in"], span["tokens_out"]) == ("gpt-4o", "openai", 512, 128)
    assert (span["cost_usd"], span["score"]) == (0.00256, 0.75)
    assert "ttft_ms" not in span
    assert (span["attrs"]["caller"], span["attrs"]["error"], span["attrs"]["name"]) == (
        "jobs", "deadline", "kept as it is",
    )  # fmt: skip
    wire = {s["span_id"]: s for s in up.json(f"/traces/{TRACE}")["spans"]}
    assert {key: wire[f"{1:016x}"][key] for key in payload(1)} == payload(1)
    assert (wire[f"{2:016x}"]["operation"], wire[f"{2:016x}"]["source"]) == ("chat", "spans")
    assert up.json("/traces?attr.caller=jobs")["count"] == 1


def test_ids_that_could_be_taken_for_others_are_not(up: Up, log: str) -> None:
    """(a-b, c) and (a, b-c) are two spans; ids of any length are ids."""
    pairs = [("a-b", "c"), ("a", "b-c"), ("a", "b"), ("x" * 256, "y" * 256)]
    assert up.post("/spans", json=[{"trace_id": t, "span_id": s} for t, s in pairs]).status_code == 202
    up.settled(4)
    found = {(s["trace_id"], s["span_id"]) for s in up.json("/traces/recent")["spans"]}
    assert found == set(pairs)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{not json", 400, "item 1"),
        (b"[1]", 400, "item 1: a span is an object"),
        (b"[" * 5000, 400, "body"),
        (b'[{"trace_id":"t","span_id":"s"},{"trace_id":"t"}]', 400, "item 2: span_id is missing"),
        (b'{"trace_id":7,"span_id":"s"}', 400, "item 1: trace_id is missing"),
        (b'{"trace_id":"t","span_id":"s","attributes":[]}', 400, "item 1: attrs is not an object"),
        (b'{"trace_id":"t","span_id":"s","started_at":"noon"}', 400, "item 1: start_ns: not a time"),
        (b'{"trace_id":"t","span_id":"s","attrs":' + b'{"a":' * 200 + b"1" + b"}" * 201, 400, "item 1"),
        (msgspec.json.encode([{"trace_id": "t", "span_id": str(n)} for n in range(1001)]), 413, "spans"),
    ],
)  # fmt: skip
def test_what_no_span_can_be_made_of_is_refused_whole(body: bytes, status: int, reason: str) -> None:
    """The item is named, and nothing of the body is stored."""
    from mist.tools.tokentrace import bare
    from mist.transport.server import Limits, ingest

    taken: list[Envelope] = []

    async def sink(envelopes: list[Envelope]) -> None:
        taken.extend(envelopes)

    async def post() -> httpx.Response:
        app = ingest(sink, path=bare.PATH, limits=Limits(envelopes_max=bare.SPANS_MAX), read=bare.envelopes)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://t") as client:  # type: ignore[arg-type]
            return await client.post("/spans", content=body)

    answer = run(post())
    assert (answer.status_code, taken) == (status, []), answer.text
    assert reason in answer.json()["message"]
