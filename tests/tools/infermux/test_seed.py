"""What the seed's tests assert, one by one, and what its documents promise of its routes: over the whole service, with the
real router and its echo, on a real listener."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from conftest import run

from mist.errors import MistError, NotFound
from mist.kit.metrics import Metrics
from mist.kit.server import AppServer, Site
from mist.protocol.codec import decode, encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import ChatMessage, InferRequest, InferResponse
from mist.tools.infermux.budgets import Ledger
from mist.tools.infermux.chat import ChatMessage as Message
from mist.tools.infermux.chat import ChatRequest
from mist.tools.infermux.failures import ProviderError
from mist.tools.infermux.providers.echo import Echo
from mist.tools.infermux.router import Router
from mist.tools.infermux.service import MANAGEMENT, InferMux, watch
from mist.tools.infermux.settings import BudgetSettings, InferMuxSettings, KeySettings
from mist.transport import server

GOLDEN = "hello world, how are you"
TOKEN = {"authorization": "Bearer let-me"}


def asked(model: str = "echo", text: str = GOLDEN, type: str = "infer.request") -> Envelope:
    return Envelope.new(type, InferRequest(model, "", [ChatMessage("user", text)]), source="me")


@asynccontextmanager
async def served(
    settings: InferMuxSettings | None = None,
    *,
    ledger: Ledger | None = None,
    env: dict[str, str] | None = None,
    **echo: Any,
) -> AsyncIterator[tuple[httpx.AsyncClient, InferMux]]:
    settings = settings or InferMuxSettings()
    router = Router(settings, [Echo(**echo)], ledger=ledger)
    metrics = Metrics()
    service = InferMux(settings, router, ledger=ledger, metrics=metrics, env=env or {MANAGEMENT: "let-me"})
    watch(metrics, lambda: service)

    async def nothing(envelopes: list[Envelope]) -> list[int]:
        raise MistError("stored")

    def reply(envelope: Envelope, headers: Any) -> Any:
        return service.answer(envelope, headers) if envelope.type == "infer.request" else None

    doors = {**service.doors(), "/mist": server.ingest(nothing, reply=reply)}
    async with (
        AppServer(Site(doors), close_s=1.0) as listener,
        httpx.AsyncClient(base_url=listener.url, trust_env=False, timeout=30) as client,
    ):
        yield client, service


def test_the_echo_provider() -> None:
    """Its name, its models, what it says, its finish reason, its golden numbers; a call that is cancelled says nothing."""

    async def main() -> None:
        echo = Echo()
        assert (echo.name, list(echo.models)) == ("echo", ["echo"])
        question = ChatRequest(model="echo", messages=(Message(role="user", content=GOLDEN),))
        reply = await echo.complete(question, "echo", timeout_s=1)
        assert (reply.content, reply.finish_reason) == (f"echo: {GOLDEN}", "stop")
        assert (reply.usage.tokens_in, reply.usage.tokens_out) == (6, 7)
        assert reply.cost_usd == pytest.approx(0.00013)
        task = asyncio.create_task(Echo(delay_s=60).complete(question, "echo", timeout_s=100))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())


def test_the_router() -> None:
    """By name, by model, `auto`; an unknown model is an error; one provider is one."""

    async def main() -> None:
        router = Router.from_settings(InferMuxSettings())
        assert [p.name for p in router.providers()] == ["echo"]
        for model in ("echo", "auto"):
            routed = await router.complete(ChatRequest(model=model, messages=(Message(role="user", content="x"),)))
            assert (routed.provider, routed.reply.content) == ("echo", "echo: x")
        with pytest.raises(NotFound):
            await router.complete(ChatRequest(model="nobody", messages=()))

    run(main())


def test_mist_takes_a_request_and_answers_with_a_response() -> None:
    async def main() -> None:
        async with served() as (http, _service):
            request = asked()
            answer = await http.post("/mist", content=encode(request))
            assert answer.status_code == 200
            said = decode(answer.content)
            assert (said.type, said.source, said.correlation_id) == ("infer.response", "infermux", request.id)
            found = said.decode(InferResponse)
            assert (found.content, found.provider, found.finish_reason) == (f"echo: {GOLDEN}", "echo", "stop")
            assert (found.tokens_in, found.tokens_out, found.cost_usd) == (6, 7, pytest.approx(0.00013))
            assert (await http.get("/mist")).status_code == 405
            for bad in (b"{not json", b'{"version":"99","id":"x","source":"s","type":"infer.request","payload":{}}'):
                assert (await http.post("/mist", content=bad)).status_code == 400
            unknown = await http.post("/mist", content=encode(asked("zzz")))
            assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
            unreadable = Envelope.new("infer.request", {"messages": 7}, source="me")
            assert (await http.post("/mist", content=encode(unreadable))).status_code == 400

    run(main())


def test_infer_and_providers() -> None:
    """The bare route; what the seed accepts it accepts, what it answers with 502 has its own status."""

    async def main() -> None:
        async with served() as (http, _service):
            answer = await http.post(
                "/infer", json={"model": "auto", "messages": [{"role": "user", "content": GOLDEN}]}
            )
            assert answer.status_code == 200
            assert answer.json()["content"] == f"echo: {GOLDEN}"
            assert list(answer.json())[:8] == [
                "model", "provider", "content", "tokens_in", "tokens_out", "cost_usd", "latency_ms", "finish_reason",
            ]  # fmt: skip
            assert (await http.post("/infer", content=b"{}")).json()["content"] == "echo: "
            assert (await http.post("/infer", content=b'{"model":"auto"} garbage')).status_code == 400
            unknown = await http.post("/infer", json={"model": "zzz"})
            assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
            assert "echo" in unknown.json()["meta"]["hint"]
            assert (await http.get("/infer")).status_code == 405
            assert (await http.get("/providers")).json() == {"providers": [{"name": "echo", "models": ["echo"]}]}

    run(main())


def test_statuses_of_failures() -> None:
    """429 and 503 say when to come back; 502 and 504 are the upstream's."""

    async def main() -> None:
        async with served() as (http, service):
            for error, status, again in (
                (ProviderError("rate_limited", "x", retry_after_s=6.0), 429, "6"),
                (ProviderError("overloaded", "x"), 503, "1"),
                (ProviderError("timeout", "x"), 504, None),
                (ProviderError("server", "x"), 502, None),
            ):

                async def fail(request: ChatRequest, error: MistError = error) -> Any:
                    raise error

                service.router.complete = fail  # type: ignore[method-assign]
                for answer in (await http.post("/infer", json={}), await http.post("/mist", content=encode(asked()))):
                    assert answer.status_code == status
                    assert answer.headers.get("retry-after") == again
                    assert answer.json()["message"] == "x"

    run(main())


def test_bodies_have_a_limit_on_every_door() -> None:
    async def main() -> None:
        settings = InferMuxSettings(body_bytes_max=2000)  # type: ignore[arg-type]
        async with served(settings) as (http, _service):
            for path in ("/infer", "/v1/chat/completions", "/v1/embeddings"):
                assert (await http.post(path, content=b" " * 2001)).status_code == 413, path
            body = {"model": "echo", "messages": [{"role": "user", "content": ""}]}
            most = 2000 - len(msgspec.json.encode(body))
            body["messages"][0]["content"] = "x" * most  # type: ignore[index]
            assert (await http.post("/v1/chat/completions", content=msgspec.json.encode(body))).status_code == 200
            body["messages"][0]["content"] = "x" * (most + 1)  # type: ignore[index]
            assert (await http.post("/v1/chat/completions", content=msgspec.json.encode(body))).status_code == 413

    run(main())


def test_management(tmp_path: Path) -> None:
    """Figures with the token; circuits are switched by hand; costs of the month out of the ledger."""

    async def main() -> None:
        ledger = await Ledger.open(tmp_path / "ledger.db")
        settings = InferMuxSettings(budgets=(BudgetSettings(limit_usd="1", key="me"),))
        async with served(settings, ledger=ledger) as (http, _service):
            assert (await http.get("/_infermux/health")).json() == {"status": "ok"}
            for path in ("status", "providers", "costs"):
                assert (await http.get(f"/_infermux/{path}")).status_code == 401, path
            http.headers.update(TOKEN)
            ask = {"model": "echo", "messages": [{"role": "user", "content": GOLDEN}]}
            me = {"X-Infermux-Caller": "me"}
            assert (await http.post("/v1/chat/completions", json=ask, headers=me)).status_code == 200
            status = (await http.get("/_infermux/status")).json()
            assert (status["requests_total"], status["requests_last_minute"], status["errors_last_minute"]) == (1, 1, 0)
            assert (status["providers_healthy"], status["providers_total"]) == (1, 1)
            costs = (await http.get("/_infermux/costs")).json()
            assert (costs["total_usd"], costs["requests"], costs["prompt_tokens"]) == (0.00013, 1, 6)
            assert costs["by_provider"] == costs["by_model"] == {"echo": 0.00013}
            (mine,) = (await http.get("/_infermux/costs/by-caller")).json()["callers"]
            assert (mine["caller"], mine["total_usd"], mine["budget_usd"]) == ("me", 0.00013, 1.0)
            assert mine["budget_remaining_usd"] == pytest.approx(0.99987)
            assert (await http.get("/_infermux/costs/caller/me")).json()["completion_tokens"] == 7
            assert (await http.get("/_infermux/costs/caller/you")).status_code == 404
            assert (await http.get("/_infermux/costs/by-model?period=2001-01")).json()["models"] == []
            assert [m["model"] for m in (await http.get("/_infermux/costs/by-model")).json()["models"]] == ["echo"]
            assert (await http.get("/_infermux/costs?period=today")).status_code == 400
            series = (await http.get("/_infermux/costs/timeseries?hours=3")).json()
            assert (series["hours"], series["bucket"], len(series["points"])) == (3, "1h", 3)
            assert sum(point["total_usd"] for point in series["points"]) == 0.00013
            for wrong in (
                "hours=0",
                "hours=-1",
                "hours=99999",
                "hours=x",
                "bucket=0h",
                "bucket=1w",
                "bucket=",
                "period=1",
            ):
                assert (await http.get(f"/_infermux/costs/timeseries?{wrong}")).status_code == 400, wrong
            nowhere = await http.get("/v1/files")
            assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "not_found")
            unknown = await http.post("/_infermux/providers/none/circuit/open")
            assert (unknown.status_code, unknown.headers["x-infermux-error"]) == (404, "not_found")

            opened = await http.post("/_infermux/providers/echo/circuit/open")
            assert opened.json()[0]["models"][0]["circuit"] == "open"
            refused = await http.post("/v1/chat/completions", json=ask)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_healthy_providers")
            assert int(refused.headers["retry-after"]) >= 1
            assert (
                'infermux_circuit_state{model="echo",provider="echo"} 1.0'
                in (await http.get("/_infermux/metrics")).text
            )
            assert (await http.post("/_infermux/providers/echo/circuit/close")).status_code == 200
            assert (await http.post("/v1/chat/completions", json=ask)).status_code == 200
            assert (await http.post("/_infermux/providers/zzz/circuit/open")).status_code == 404
            assert (await http.post("/_infermux/providers/echo/circuit/burn")).status_code == 404
            page = (await http.get("/_infermux/metrics")).text
            assert 'infermux_requests_total{model="echo",provider="echo",status="ok"} 2.0' in page
            http.headers.pop("authorization")
            assert (await http.post("/_infermux/providers/echo/circuit/open")).status_code == 401
        async with served(env={"x": "y"}) as (http, _service):
            assert (await http.get("/_infermux/status")).status_code == 200
            assert (await http.post("/_infermux/providers/echo/circuit/open", headers=TOKEN)).status_code == 403
        await ledger.aclose()

    run(main())


def test_keys_guard_every_door_that_asks() -> None:
    """With keys: 401 without one, also at /mist, where the envelope may claim to be anybody."""

    async def main() -> None:
        settings = InferMuxSettings(keys=(KeySettings(name="ci", env="K"),))
        async with served(settings, env={"K": "sk"}) as (http, _service):
            ask = {"model": "echo", "messages": [{"role": "user", "content": "x"}]}
            claim = Envelope.new("infer.request", InferRequest("echo", meta={"caller.key": "somebody"}), source="me")
            for key, status in (("", 401), ("nonsense", 401), ("sk", 200)):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                for path, body in (
                    ("/v1/chat/completions", msgspec.json.encode(ask)), ("/infer", msgspec.json.encode(ask)), ("/mist", encode(claim)),
                ):  # fmt: skip
                    answer = await http.post(path, content=body, headers=headers)
                    assert answer.status_code == status, (key, path)
                for path in ("/v1/models", "/providers", "/_infermux/status"):
                    assert (await http.get(path, headers=headers)).status_code == status, (key, path)

    run(main())
