"""Health: the pages, and checks that hang, fail, ignore their cancellation."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from conftest import run

from mist.errors import InvalidArgument, Unavailable
from mist.kit.health import Health, go_duration
from mist.kit.server import App
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import HEALTH_PING, HealthPing, HealthPong


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def health(**kw: Any) -> Health:
    return Health("infermux", "1.2.3", **kw)


async def well() -> None:
    pass


async def get(app: App, path: str, method: str = "GET") -> tuple[int, dict[bytes, bytes], bytes]:
    """Ask one page."""
    sent: list[Any] = []

    async def send(event: Any) -> None:
        sent.append(event)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    await app({"type": "http", "path": path, "method": method, "headers": []}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


def test_the_pages_are_those_of_the_go_library() -> None:
    """Same keys, statuses and content type (spec vector 17); uptime as Go writes it, and as seconds."""
    clock = Clock()
    h = health(clock=clock)
    clock.now += 90061

    async def down() -> None:
        raise Unavailable("down")

    async def case() -> None:
        pages = h.pages()
        code, headers, body = await get(pages["/healthz"], "/healthz")
        assert (code, headers[b"content-type"]) == (200, b"application/json")
        assert body.endswith(b"}\n")
        assert msgspec.json.decode(body) == {
            "status": "ok", "tool": "infermux", "version": "1.2.3", "uptime": "25h1m1s", "uptime_s": 90061,
        }  # fmt: skip
        code, _, body = await get(pages["/readyz"], "/readyz")
        assert code == 200
        assert "checks" not in msgspec.json.decode(body), "none registered = healthy, as there"
        h.add_check("db", down)
        code, _, body = await get(pages["/readyz"], "/readyz")
        found = msgspec.json.decode(body)
        assert (code, found["status"], found["checks"]) == (503, "degraded", {"db": "down"})
        assert set(found["took_ms"]) == {"db"}
        h.set_ready(False)
        code, _, body = await get(pages["/readyz"], "/readyz")
        found = msgspec.json.decode(body)
        assert (code, found["status"]) == (503, "not_ready")
        assert "checks" not in found
        code, headers, body = await get(pages["/readyz"], "/readyz", "POST")
        assert (code, headers[b"allow"]) == (405, b"GET, HEAD")
        code, headers, body = await get(pages["/healthz"], "/healthz", "HEAD")
        assert (code, body) == (200, b"")
        assert int(headers[b"content-length"]) > 0

    run(case())


def test_durations() -> None:
    """Spec vector 7."""
    assert [go_duration(n) for n in (0, 59, 60, 3600, 90061)] == ["0s", "59s", "1m0s", "1h0m0s", "25h1m1s"]


def test_a_check_that_hangs_costs_its_own_line_only() -> None:
    """They run side by side; one that ignores even its cancellation is given up, and not started twice."""
    started: list[int] = []
    release = asyncio.Event()

    async def deaf() -> None:
        started.append(1)
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async def case() -> None:
        h = health()
        h.add_check("deaf", deaf, timeout_s=0.05, cache_s=0)
        h.add_check("well", well)
        for _ in range(3):
            report = await h.readiness()
            assert report.code == 503
            assert report.body["checks"] == {"deaf": "no answer within 0.05 s", "well": "ok"}
        assert started == [1]
        release.set()
        while (await h.readiness()).code != 200:
            await asyncio.sleep(0)
        assert started == [1, 1]

    run(case())


def test_checks_run_side_by_side() -> None:
    """Each waits for the other: one after the other they would both hang."""

    async def case() -> None:
        here, there = asyncio.Event(), asyncio.Event()

        async def one() -> None:
            here.set()
            await there.wait()

        async def two() -> None:
            there.set()
            await here.wait()

        h = health()
        h.add_check("one", one)
        h.add_check("two", two)
        assert (await h.readiness()).code == 200

    run(case())


def test_a_failing_check_tells_no_secrets(caplog: pytest.LogCaptureFixture) -> None:
    """Ours: the message without passwords. Any other error: its class; the text goes to the log."""

    async def ours() -> None:
        raise Unavailable("no answer from nats://me:geheim@host:4222")

    async def foreign() -> None:
        raise ValueError("SELECT secret FROM internals")

    async def case() -> None:
        h = health()
        h.add_check("ours", ours)
        h.add_check("foreign", foreign)
        checks = (await h.readiness()).body["checks"]
        assert "geheim" not in checks["ours"]
        assert "nats://" in checks["ours"]
        assert checks["foreign"] == "failed: ValueError"

    run(case())
    assert "SELECT secret" in caplog.text


def test_results_are_used_again_for_the_stated_time() -> None:
    """And many probes at once are one call."""
    clock = Clock()
    calls: list[float] = []

    async def case() -> None:
        h = health(clock=clock)
        go = asyncio.Event()

        async def counted() -> None:
            calls.append(clock.now)
            await go.wait()

        h.add_check("counted", counted, cache_s=5)
        asking = [asyncio.create_task(h.readiness()) for _ in range(10)]
        while not calls:
            await asyncio.sleep(0)
        go.set()
        assert {(await task).code for task in asking} == {200}
        assert len(calls) == 1
        clock.now += 4.9
        await h.readiness()
        assert len(calls) == 1
        clock.now += 0.2
        await h.readiness()
        assert len(calls) == 2

    run(case())


def test_draining_is_not_ready_at_once() -> None:
    """Without asking anybody; and also for a probe that was under way."""

    async def case() -> None:
        h = health()
        go = asyncio.Event()
        asked: list[int] = []

        async def slow() -> None:
            asked.append(1)
            await go.wait()

        h.add_check("slow", slow)
        under_way = asyncio.create_task(h.readiness())
        while not asked:
            await asyncio.sleep(0)
        h.drain()
        report = await h.readiness()
        assert (report.code, report.body["status"], report.body["reason"]) == (503, "not_ready", "draining")
        assert asked == [1]
        go.set()
        assert (await under_way).body["status"] == "not_ready"
        assert h.liveness().code == 200

    run(case())


def test_an_optional_check_is_shown_and_nothing_more() -> None:
    """The service works without it."""

    async def down() -> None:
        raise Unavailable("down")

    async def case() -> None:
        h = health()
        h.add_check("cache", down, optional=True)
        report = await h.readiness()
        assert (report.code, report.body["status"], report.body["checks"]) == (200, "ok", {"cache": "down"})

    run(case())


def test_startup_is_over_once() -> None:
    """503 until everything was ready for the first time; what fails later is not the start's business."""
    good = False

    async def later() -> None:
        if not good:
            raise Unavailable("warming up")

    async def case() -> None:
        nonlocal good
        h = health()
        h.add_check("model", later, cache_s=0)
        report = await h.startup()
        assert (report.code, report.body["status"], report.body["reason"]) == (503, "starting", "model: warming up")
        good = True
        assert (await h.startup()).code == 200
        good = False
        assert (await h.readiness()).code == 503
        assert (await h.startup()).code == 200

    run(case())


def test_a_ping_is_answered() -> None:
    """from, version, uptime_s; correlated with the ping and in its trace."""
    clock = Clock()
    h = health(clock=clock)
    clock.now += 7.9
    ping = Envelope.new(
        HEALTH_PING, HealthPing(from_="me"), source="me", traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    )
    pong = h.pong(ping)
    assert (pong.type, pong.source, pong.correlation_id, pong.traceparent) == (
        "health.pong", "infermux", ping.id, ping.traceparent,
    )  # fmt: skip
    assert pong.decode() == HealthPong(from_="infermux", version="1.2.3", uptime_s=7)
    with pytest.raises(InvalidArgument):
        h.pong(pong)


def test_names_are_taken_once() -> None:
    """And times have to be possible."""
    h = health()
    h.add_check("a", well)
    for name, kw in (("a", {}), ("b", {"timeout_s": 0}), ("c", {"cache_s": -1})):
        with pytest.raises(InvalidArgument):
            h.add_check(name, well, **kw)  # type: ignore[arg-type]
