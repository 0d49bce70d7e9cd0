"""MatchSpec over HTTP: what the documents promise and what the seed's clients send, on the memory broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest
from conftest import run

import mist
from mist.broker.base import Broker
from mist.errors import Unavailable
from mist.kit.server import Site
from mist.protocol.codec import encode
from mist.protocol.envelope import Envelope
from mist.tools.matchspec import service as services
from mist.tools.matchspec.api import Api
from mist.tools.matchspec.graders import grader
from mist.tools.matchspec.graders.hands import Hands
from mist.tools.matchspec.results import list_runs
from mist.tools.matchspec.service import Service
from mist.tools.matchspec.suite import Gate, Harness, Infer, Sample, Suite, recorded_suite, suite_of

EXACT = grader({"type": "exact"})


def recorded(name: str = "math", good: int = 3, n: int = 4, gate: Gate | None = None) -> Suite:
    samples = [Sample(f"q{i}", f"{i}?", str(i), tags=("even",) if i % 2 == 0 else ()) for i in range(n)]
    answers = {s.id: s.expected if i < good else "no" for i, s in enumerate(samples)}
    return recorded_suite(name, samples, {"m": answers}, [EXACT], where="t", gate=gate)


def asking(name: str = "slow") -> Suite:
    samples = [Sample(f"q{i}", f"{i}?", str(i)) for i in range(6)]
    harness = Harness(name="h", samples=samples, model=Infer(model="m"), graders=(EXACT,), concurrency=1)
    return suite_of(name, [harness], where="t")


@asynccontextmanager
async def serving(
    broker: Broker, *suites: Suite, key: str = "", hands: Hands | None = None
) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    service = Service(suites, hands=hands)
    stop, ready = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(service.run(broker, await broker.open("eval"), stop, ready=ready.set))
    await asyncio.wait([task, asyncio.create_task(ready.wait())], return_when=asyncio.FIRST_COMPLETED)
    transport = httpx.ASGITransport(app=Site(Api(service, key=key).doors()))  # type: ignore[arg-type]
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            yield client, service
    finally:
        stop.set()
        await task


def on_memory(body: Callable[[httpx.AsyncClient, Service], Awaitable[None]], *suites: Suite, **options: Any) -> None:
    async def whole() -> None:
        async with mist.connect("memory:") as broker, serving(broker, *suites, **options) as (client, service):
            await body(client, service)

    run(whole())


async def ended(client: httpx.AsyncClient, id: str) -> dict[str, Any]:
    while True:
        found: dict[str, Any] = (await client.get(f"/results/{id}")).json()
        if found["status"] != "running":
            return found
        await asyncio.sleep(0)


def test_a_run_is_accepted_and_has_a_report_in_the_documents_shape() -> None:
    async def body(client: httpx.AsyncClient, _: Service) -> None:
        answer = await client.post("/run", json={"suite": "math"})
        begun = answer.json()
        assert (answer.status_code, set(begun)) == (202, {"run_id", "status", "suite", "started_at", "results_url"})
        assert begun["status"] == "running"
        assert begun["run_id"].startswith("run-2")
        assert begun["results_url"] == f"/results/{begun['run_id']}"
        found = await ended(client, begun["run_id"])
        assert (found["status"], found["verdict"], found["model_errors"]) == ("passed", "PASS", 0)
        (row,) = found["grader_results"]
        assert (row["name"], row["score"], row["threshold"], row["passed"], row["n"]) == ("exact", 0.75, 0.7, True, 4)
        assert round(row["ci_lower"], 3) == 0.301
        assert [(e["id"], e["passed"], e["scores"]) for e in found["examples"]] == [
            ("q0", True, {"exact": 1.0}), ("q1", True, {"exact": 1.0}), ("q2", True, {"exact": 1.0}),
            ("q3", False, {"exact": 0.0}),
        ]  # fmt: skip
        assert {"finished_at", "duration_seconds"} <= set(found)

    on_memory(body, recorded(gate=Gate(overall=0.7)))


def test_progress_is_told_while_it_runs() -> None:
    gates = [asyncio.Event() for _ in range(6)]
    asked = 0

    async def ask(request: Envelope) -> Envelope:
        nonlocal asked
        await gates[asked].wait()
        asked += 1
        return Envelope.new("infer.response", {"content": str(asked - 1)}, source="t", correlation_id=request.id)

    async def body(client: httpx.AsyncClient, _: Service) -> None:
        id = (await client.post("/run", json={})).json()["run_id"]
        for gate in gates[:3]:
            gate.set()
        while True:
            found = (await client.get(f"/results/{id}")).json()
            assert set(found) == {"run_id", "status", "suite", "started_at", "progress"}
            if found["progress"]["completed"] == 3:
                break
            await asyncio.sleep(0)
        assert found["progress"] == {"total": 6, "completed": 3, "percent": 50.0}
        assert [r["run_id"] for r in (await client.get("/results?status=running")).json()["runs"]] == [id]
        for gate in gates:
            gate.set()
        assert (await ended(client, id))["status"] == "passed"

    on_memory(body, asking(), hands=Hands(ask=ask))


def test_a_restart_goes_on_with_accepted_runs_and_asks_nothing_twice() -> None:
    asked: list[str] = []

    async def whole() -> None:
        half = asyncio.Event()

        async def ask(request: Envelope) -> Envelope:
            asked.append(request.data()["messages"][-1]["content"])
            if len(asked) == 3:
                half.set()
            return Envelope.new("infer.response", {"content": "1"}, source="t", correlation_id=request.id)

        async with mist.connect("memory:") as broker:
            async with serving(broker, asking(), hands=Hands(ask=ask)) as (client, _):
                id = (await client.post("/run", json={"suite": "slow"})).json()["run_id"]
                await half.wait()
            before = len(asked)
            assert 3 <= before < 6
            async with serving(broker, asking(), hands=Hands(ask=ask)) as (client, service):
                assert service.resumed == 1
                found = await ended(client, id)
            assert (found["completed"], found["total"]) == (6, 6)
            assert sorted(asked) == [f"{i}?" for i in range(6)]

    run(whole())


def test_a_finished_run_answers_the_same_after_a_restart_and_is_not_read_for_every_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its report and verdict are in the stream, also where another service knows neither the run nor its suite."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            async with serving(broker, recorded(gate=Gate(overall=0.7))) as (client, _):
                id = (await client.post("/run", json={"suite": "math"})).json()["run_id"]
                before = await ended(client, id)
                listed = (await client.get("/results")).json()
            async with serving(broker, recorded("other")) as (client, _):
                assert (await client.get(f"/results/{id}")).json() == before
                reads = 0
                read = services.report_of

                async def counted(*args: Any, **more: Any) -> Any:
                    nonlocal reads
                    reads += 1
                    return await read(*args, **more)

                monkeypatch.setattr(services, "report_of", counted)
                for _ in range(3):
                    assert (await client.get("/results")).json() == listed
                assert reads == 0
                assert (before["verdict"], listed["runs"][0]["verdict"]) == ("PASS", "PASS")

    run(body())


def test_how_many_are_asked_at_a_time_outlives_a_restart() -> None:
    at_once = most = 0
    hold = asyncio.Event()

    async def ask(request: Envelope) -> Envelope:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await hold.wait()
        at_once -= 1
        return Envelope.new("infer.response", {"content": "0"}, source="t", correlation_id=request.id)

    async def until(wanted: int) -> None:
        while at_once < wanted:
            await asyncio.sleep(0)

    async def body() -> None:
        nonlocal at_once, most
        async with mist.connect("memory:") as broker:
            async with serving(broker, asking(), hands=Hands(ask=ask)) as (client, service):
                id = (await client.post("/run", json={"concurrency": 3})).json()["run_id"]
                await until(3)
                stop = service._stop
                assert stop is not None
                stop.set()
                hold.set()
            at_once = most = 0
            hold.clear()
            async with serving(broker, asking(), hands=Hands(ask=ask)) as (client, _):
                await until(3)
                hold.set()
                await ended(client, id)
        assert most == 3

    run(body())


def test_a_call_that_fails_because_everything_stops_is_no_result() -> None:
    """The router of the same process may end first: the sample is asked again after the restart."""

    async def whole() -> None:
        asked, begun = asyncio.Event(), False

        async def ask(request: Envelope) -> Envelope:
            if begun:
                content = request.data()["messages"][-1]["content"].rstrip("?")
                return Envelope.new("infer.response", {"content": content}, source="t", correlation_id=request.id)
            asked.set()
            assert first._stop is not None
            await first._stop.wait()
            raise Unavailable("the router has ended")

        async with mist.connect("memory:") as broker:
            async with serving(broker, asking(), hands=Hands(ask=ask)) as (client, first):
                id = (await client.post("/run", json={})).json()["run_id"]
                await asked.wait()
            begun = True
            async with serving(broker, asking(), hands=Hands(ask=ask)) as (client, _):
                found = await ended(client, id)
            assert (found["status"], found["model_errors"], found["passed"]) == ("passed", 0, 6)

    run(whole())


def test_a_run_of_a_suite_that_changed_is_an_error_after_a_restart() -> None:
    async def whole() -> None:
        first = asyncio.Event()

        async def never(request: Envelope) -> Envelope:
            first.set()
            await asyncio.Event().wait()
            raise AssertionError

        async with mist.connect("memory:") as broker:
            stop = asyncio.Event()
            service = Service([asking()], hands=Hands(ask=never))
            task = asyncio.create_task(service.run(broker, await broker.open("eval"), stop, ready=lambda: None))
            while service._group is None:
                await asyncio.sleep(0)
            job = await service.begin("slow")
            await first.wait()
            task.cancel()  # as a kill would: nothing is put in order
            await asyncio.wait([task])
            async with serving(broker, recorded("slow")) as (client, _):
                found = (await client.get(f"/results/{job.run_id}")).json()
                assert (found["status"], found["verdict"]) == ("error", "FAIL")
                assert "is not what it was when run" in found["error"]

    run(whole())


def test_runs_are_listed_in_pages_by_offset_and_by_cursor() -> None:
    async def body(client: httpx.AsyncClient, _: Service) -> None:
        ids = []
        for suite in ("math", "bad", "math"):
            ids.append((await client.post("/run", json={"suite": suite})).json()["run_id"])
            await ended(client, ids[-1])
        whole = (await client.get("/results")).json()
        assert set(whole) == {"runs", "total", "limit", "offset", "next"}
        assert [r["run_id"] for r in whole["runs"]] == ids[::-1]
        assert set(whole["runs"][0]) == {"run_id", "status", "suite", "started_at", "finished_at", "verdict"}
        assert (whole["total"], whole["limit"], whole["offset"], whole["next"]) == (3, 20, 0, "")
        assert [r["run_id"] for r in (await client.get("/results?limit=1&offset=1")).json()["runs"]] == [ids[1]]
        seen, cursor = [], ""
        while True:
            page = (await client.get("/results", params={"limit": 1, "cursor": cursor})).json()
            seen += [r["run_id"] for r in page["runs"]]
            cursor = page["next"]
            if not cursor:
                break
        assert seen == ids[::-1]
        failed = (await client.get("/results?status=failed&limit=5")).json()
        assert [(r["run_id"], r["verdict"]) for r in failed["runs"]] == [(ids[1], "FAIL")]
        assert (await client.get("/results?suite=math&limit=5")).json()["total"] == 2
        for wrong in ("status=odd", "limit=0", "limit=x", "offset=-1", "cursor=a", "sweet=x", "cursor=3&offset=1"):
            assert (await client.get(f"/results?{wrong}")).status_code == 400, wrong

    on_memory(body, recorded(gate=Gate(overall=0.5)), recorded("bad"))


def test_tags_choose_samples_and_what_means_nothing_is_refused() -> None:
    async def body(client: httpx.AsyncClient, _: Service) -> None:
        id = (await client.post("/run", json={"suite": "math", "tags": ["even"], "concurrency": 2})).json()["run_id"]
        assert [e["id"] for e in (await ended(client, id))["examples"]] == ["q0", "q2"]
        for wrong, status in (
            ({"suite": "none"}, 404), ({"tags": ["odd"]}, 400), ({"concurrency": 0}, 400), ({"config": "/etc/x"}, 400),
            ({"sweet": "math"}, 400), ({"baseline": "none"}, 404),
        ):  # fmt: skip
            answer = await client.post("/run", json=wrong)
            assert (answer.status_code, "code" in answer.json()) == (status, True), wrong
        assert (await client.get("/results/none")).status_code == 404
        assert (await client.post("/run", content=b"[")).status_code == 400
        assert (await client.get("/run")).status_code == 405

    on_memory(body, recorded())


def test_a_key_is_wanted_everywhere_but_at_health() -> None:
    async def body(client: httpx.AsyncClient, _: Service) -> None:
        assert (await client.get("/health")).json() == {"status": "ok", "version": mist.__version__}
        for path in ("/suites", "/results", "/results/x"):
            refused = await client.get(path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        for given in ("Bearer wrong", "Basic secret", "Bearer"):
            assert (await client.post("/run", headers={"Authorization": given})).status_code == 401
        answer = await client.get("/suites", headers={"Authorization": "bearer secret"})
        assert answer.status_code == 200

    on_memory(body, recorded(), key="secret")


def test_suites_have_the_seeds_keys_and_the_documents() -> None:
    async def body(client: httpx.AsyncClient, _: Service) -> None:
        (suite,) = (await client.get("/suites")).json()["suites"]
        assert (suite["name"], suite["task_count"], suite["harnesses"]) == ("math", 4, ["m"])
        assert suite["thresholds"] == {"overall": 0.7, "exact": 0.5}

    on_memory(body, recorded(gate=Gate(overall=0.7, per_grader={"exact": 0.5})))


def test_no_suites_are_an_empty_list_and_not_null() -> None:
    async def body(client: httpx.AsyncClient, _: Service) -> None:
        assert (await client.get("/suites")).json() == {"suites": []}
        assert (await client.get("/results")).json()["runs"] == []
        assert (await client.post("/run", json={})).status_code == 404

    on_memory(body)


def test_the_seeds_clients_get_their_bare_arrays() -> None:
    """POST /mist and /eval answer when all is there, with an array of eval.result payloads; the results stay."""

    async def body(client: httpx.AsyncClient, _: Service) -> None:
        request = Envelope.new("eval.run", {"suite": "math", "baseline": False, "tasks": ["q1", "q3"]}, source="t")
        found = (await client.post("/mist", content=encode(request))).json()
        assert [(r["suite"], r["task"], r["passed"], r["score"]) for r in found] == [
            ("math", "q1", True, 1.0), ("math", "q3", False, 0.0),
        ]  # fmt: skip
        assert {"suite", "task", "passed", "score", "baseline_score", "delta", "duration_ms"} <= set(found[0])
        lines = await client.post("/mist", content=encode(request), headers={"Accept": "application/x-ndjson"})
        envelopes = [msgspec.json.decode(line, type=Envelope) for line in lines.content.splitlines()]
        assert [(e.type, e.correlation_id) for e in envelopes] == [("eval.result", request.id)] * 2
        # the request came twice: it is one run
        assert len((await client.get("/results?suite=math")).json()) == 2
        assert len((await client.post("/eval", json={"suite": "math"})).json()) == 4
        assert len((await client.get("/results?suite=math")).json()) == 6
        assert (await client.get("/results?suite=other")).json() == []
        ping = Envelope.new("health.ping", {"from": "t"}, source="t")
        assert msgspec.json.decode((await client.post("/mist", content=encode(ping))).content)["type"] == "health.pong"

    on_memory(body, recorded(), recorded("other"))


def test_what_the_seed_took_silently_is_refused_with_a_reason() -> None:
    async def body(client: httpx.AsyncClient, _: Service) -> None:
        for payload, status in (
            ({"suite": "none"}, 404), ({"suite": "math", "tasks": ["zz"]}, 400),
            ({"suite": "math", "infer_url": "http://x"}, 400), ({"suite": 3}, 400),
        ):  # fmt: skip
            sent = encode(Envelope.new("eval.run", payload, source="t"))
            assert (await client.post("/mist", content=sent)).status_code == status, payload
            assert (await client.post("/eval", json=payload)).status_code == status, payload
        wrong = encode(Envelope.new("trace.span", {}, source="t"))
        answer = await client.post("/mist", content=wrong)
        assert (answer.status_code, answer.json()["message"]) == (400, "expected type eval.run, got trace.span")
        plain = await client.post("/mist", content=wrong, headers={"Accept": "text/plain"})
        assert plain.text == "expected type eval.run, got trace.span"
        bad = encode(Envelope.new("eval.run", {"suite": "math"}, source="t")).replace(
            b'"version":"1"', b'"version":"99"'
        )
        assert (await client.post("/mist", content=bad)).status_code == 400

    on_memory(body, recorded())


def test_the_queue_of_runs_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "WAITING_MAX", 1)
    hold = asyncio.Event()

    async def ask(request: Envelope) -> Envelope:
        await hold.wait()
        return Envelope.new("infer.response", {"content": "1"}, source="t", correlation_id=request.id)

    async def body(client: httpx.AsyncClient, service: Service) -> None:
        for _ in range(services.AT_ONCE + 1):
            assert (await client.post("/run", json={})).status_code == 202
        full = await client.post("/run", json={})
        assert (full.status_code, full.headers["retry-after"]) == (503, "1")
        assert len(await list_runs(service.stream)) == services.AT_ONCE + 1
        hold.set()

    on_memory(body, asking(), hands=Hands(ask=ask))
