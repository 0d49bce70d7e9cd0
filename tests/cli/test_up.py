"""`mist up`: real processes, real signals; and the way down, tool by tool, over the memory broker."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from conftest import run

import mist
from cli.conftest import Cli, envelope, records
from mist.broker.base import Broker
from mist.cli import _up_platform, _up_tools
from mist.cli._up_platform import Platform, Running
from mist.errors import Conflict, Internal, InvalidArgument, TimedOut, Unavailable
from mist.kit.local import LocalServer, free_port
from mist.kit.signals import AGAIN_S
from mist.protocol.codec import decode, encode
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TraceSpan
from mist.testing.servers import MissingServer, run_nats, run_redis
from mist.tools.tokentrace.store import Store

Spawn = Callable[..., "subprocess.Popen[bytes]"]


def body(*numbers: int) -> bytes:
    """Spans as lines."""
    return b"".join(encode(envelope(n, payload=span(n))) + b"\n" for n in numbers)


def span(n: int) -> TraceSpan:
    return TraceSpan(
        trace_id=f"{n:032x}", span_id=f"{n:016x}", operation="chat", start_ns=n, end_ns=n + 1, status="ok",
        attrs={"model": "m"},
    )  # fmt: skip


def started(spawn: Spawn, url: str, *args: str) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    """`mist up` on a free port, when it is ready, and what it printed."""
    process = spawn("up", "-u", url, "--listen", "127.0.0.1:0", "-o", "jsonl", *args)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr and process.stderr.read()
    return process, msgspec.json.decode(line)


def until(holds: Callable[[], bool]) -> None:
    """Wait for it; the test's own time limit ends it."""
    while not holds():
        time.sleep(0.05)


def spans(found: dict[str, Any]) -> int:
    """How many the worker has stored since it started."""
    number: int = httpx.get(found["readyz"], trust_env=False, timeout=30).json()["tools"]["tokentrace"]["spans"]
    return number


def post(url: str, *numbers: int) -> httpx.Response:
    return httpx.post(
        url, content=body(*numbers), headers={"content-type": "application/x-ndjson"}, trust_env=False, timeout=60
    )


def test_the_settings_redact_sample_and_alert(
    spawn: Spawn, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What mist.toml says holds for the doors: a secret is nowhere on disk, good traces are dropped and counted, and the
    errors that are kept make an alert in the stream."""
    (tmp_path / "mist.toml").write_text(
        """
        [tokentrace.redact]
        rules = [{ detect = ["api_key"] }, { attrs = ["user.*"], action = "drop" }]
        [tokentrace.sample]
        rate = 0.0
        keep = [{ errors = true }]
        [[tokentrace.alerts]]
        name = "errors"
        metric = "error_count"
        threshold = 1
        window = "1m"
        every = "1s"
        """
    )
    monkeypatch.setenv("MIST_CONFIG", str(tmp_path / "mist.toml"))
    _, found = started(spawn, log)
    now = time.time_ns()
    attrs = {"note": "key sk-abcdefghijklmnop1234", "user.id": "anna-b"}
    sent = [
        msgspec.structs.replace(span(n), start_ns=now, end_ns=now, status="error" if n % 2 else "ok", attrs=attrs)
        for n in range(6)
    ]
    lines = b"".join(encode(envelope(n, payload=one)) + b"\n" for n, one in enumerate(sent))
    headers = {"content-type": "application/x-ndjson"}
    assert httpx.post(found["mist"], content=lines, headers=headers, trust_env=False).status_code == 202
    until(lambda: any(r.subject == "trace.alert" for r in records(log, "trace")))
    kept = [decode(r.data) for r in records(log, "trace")]
    assert [e.data()["attrs"] for e in kept if e.type == "trace.span"] == [{"note": "key [api_key]"}] * 3
    alert = next(e for e in kept if e.type == "trace.alert").decode()
    assert (alert.name, alert.state, alert.value) == ("errors", "firing", 3.0)
    for file in (tmp_path / "data").rglob("*"):
        if file.is_file():
            assert b"sk-abcdef" not in file.read_bytes(), file
    tools = httpx.get(found["readyz"], trust_env=False).json()["tools"]
    assert (tools["door"]["dropped_by_rate"], tools["door"]["redacted"], tools["alerts"]["fired"]) == (3, 3, 1)


def test_from_the_door_to_the_store(spawn: Spawn, cli: Cli, log: str, tmp_path: Path) -> None:
    """What was answered with 202 is in the stream, and soon in the store; SIGTERM ends with 143 and says how far."""
    process, found = started(spawn, log)
    assert found["tools"] == ["door", "tokentrace", "otlp", "alerts", "infermux", "matchspec"]
    alive = httpx.get(found["healthz"], trust_env=False).json()
    assert (alive["status"], alive["tool"], alive["version"]) == ("ok", "mist", mist.__version__)
    assert httpx.get(found["startupz"], trust_env=False).status_code == 200
    answer = post(found["mist"], 1, 2, 3)
    assert (answer.status_code, answer.json()) == (202, {"accepted": 3, "first": 1, "last": 3})
    assert [r.id for r in records(log, "trace")] == ["id-1", "id-2", "id-3"]
    until(lambda: spans(found) == 3)
    report = httpx.get(found["readyz"], trust_env=False).json()
    assert (report["status"], report["checks"]) == ("ok", dict.fromkeys(("broker", *found["tools"]), "ok"))
    assert report["tools"]["door"]["accepted"] == 3
    page = httpx.get(found["metrics"], trust_env=False)
    assert 'mist_http_requests_total{method="POST",route="/mist",status="202"} 1.0' in page.text
    assert 'mist_tool_fact{fact="accepted",tool="door"} 3.0' in page.text
    assert 'mist_tool_ready{tool="tokentrace"} 1.0' in page.text
    numbers = httpx.get(found["metricsz"], trust_env=False).json()
    assert numbers["gauges"]["mist_tool_fact{tool,tokentrace,fact,spans}"]["value"] == 3
    ping = Envelope.new("health.ping", {"from": "me"}, source="me")
    answer = httpx.post(found["mist"], content=encode(ping), trust_env=False)
    pong = decode(answer.content)
    assert (answer.status_code, pong.type, pong.correlation_id) == (200, "health.pong", ping.id)
    assert pong.decode().version == mist.__version__
    assert len(records(log, "trace")) == 3, "a ping is answered, not stored"
    process.terminate()
    assert process.wait(30) == 143
    assert process.stderr is not None
    assert "spans 3" in process.stderr.read().decode()
    assert cli.ok("-u", log, "trace", "stats", "-j").json["total"] == 3


def test_killed_and_started_again_nothing_is_lost(spawn: Spawn, log: str, tmp_path: Path) -> None:
    """SIGKILL right after a 202: the next one stores what this one did not, once."""
    process, found = started(spawn, log)
    for n in range(0, 500, 50):
        assert post(found["mist"], *range(n, n + 50)).status_code == 202
    process.kill()
    process.wait()
    process, found = started(spawn, log)
    while httpx.get(found["readyz"], trust_env=False).json()["tools"]["tokentrace"]["position"] < 500:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    with Store.read(tmp_path / "data/tools/tokentrace.db") as store:
        assert store.count() == 500


def test_what_it_says_as_structured_lines(spawn: Spawn, log: str) -> None:
    """One JSON object per line on stderr: requests in their trace, the tools' figures at the end; stdout has values only."""
    process, found = started(spawn, log, "--log-format", "json", "--log-level", "debug")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    httpx.post(
        found["mist"], content=encode(envelope(1, payload=span(1))), headers={"traceparent": parent}, trust_env=False
    )
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, b"")
    lines = [msgspec.json.decode(line) for line in err.splitlines()]
    assert all(list(line)[:4] == ["time", "level", "msg", "tool"] and line["tool"] == "mist" for line in lines)
    request = next(line for line in lines if line.get("route") == "/mist")
    assert (request["status"], request["trace_id"]) == (202, "0af7651916cd43dd8448eb211c80319c")
    assert next(line for line in lines if line["msg"] == "door ended")["accepted"] == 1


def half_a_request(url: str) -> socket.socket:
    """A POST whose last byte is still missing."""
    parts = httpx.URL(url)
    data = body(7)
    s = socket.create_connection((parts.host, parts.port or 0), timeout=20)
    s.sendall(
        b"POST /mist HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\ncontent-length: %d\r\n\r\n"
        % len(data) + data[:-1]
    )  # fmt: skip
    return s


def refuses(url: str) -> bool:
    parts = httpx.URL(url)
    try:
        socket.create_connection((parts.host, parts.port or 0), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_request_under_way_is_answered_before_the_end(spawn: Spawn, log: str) -> None:
    """SIGTERM in the middle of a body: nobody new comes in, this one gets its 202, and the record is there."""
    process, found = started(spawn, log)
    with half_a_request(found["mist"]) as s:
        time.sleep(0.2)  # its head has arrived
        process.terminate()
        while not refuses(found["mist"]):
            time.sleep(0.02)
        assert process.poll() is None
        s.sendall(b"\n")
        assert s.recv(4096).startswith(b"HTTP/1.1 202")
    assert process.wait(30) == 143
    assert [r.id for r in records(log, "trace")] == ["id-7"]


def test_a_second_signal_does_not_wait(spawn: Spawn, log: str) -> None:
    """With the exit code of the first one."""
    process, found = started(spawn, log)
    with half_a_request(found["mist"]):
        time.sleep(0.2)
        process.terminate()
        while not refuses(found["mist"]):
            time.sleep(0.02)
        time.sleep(AGAIN_S)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 143


def test_one_tool_alone(spawn: Spawn, cli: Cli, log: str) -> None:
    """Without the door there is health and nothing else; the worker alone is told nothing by HTTP."""
    process, found = started(spawn, log, "--tools", "tokentrace")
    assert "mist" not in found
    url = found["healthz"].removesuffix("/healthz")
    with httpx.Client(base_url=url, trust_env=False) as client:
        assert client.post("/mist", content=body(1)).json()["code"] == "not_found"
        assert client.head("/readyz").status_code == 200
        refused = client.post("/readyz")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
    process.terminate()
    assert process.wait(30) == 143


def test_what_cannot_run_is_refused(cli: Cli, log: str, spawn: Spawn) -> None:
    """An unknown tool, no address, an address that is taken, a store in memory, a stream of before."""
    assert cli("up", "--tools", "door,magic").code == 2
    assert cli("up", "--listen", "nowhere").code == 2
    assert cli("up", "-u", "memory:").code == 2
    process, found = started(spawn, log)
    port = httpx.URL(found["healthz"]).port
    assert cli("up", "-u", log, "--listen", f"127.0.0.1:{port}").code == 7
    assert post(found["mist"], 1).status_code == 202
    while httpx.get(found["readyz"], trust_env=False).json()["tools"]["tokentrace"]["position"] < 1:
        time.sleep(0.02)
    process.terminate()
    process.wait()
    cli.ok("-u", log, "stream", "rm", "trace", "-y")
    again = cli("up", "-u", log, "--listen", "127.0.0.1:0")
    assert again.code == 5
    assert "deleted and made again" in again.err
    assert cli("up", "-u", log, "--listen", "127.0.0.1:0", "--timeout", "0.5", "--tools", "door").code == 6


@pytest.mark.parametrize("start", [run_nats, run_redis], ids=["nats", "redis"])
def test_over_a_broker_that_is_killed(start: Any, spawn: Spawn, cli: Cli) -> None:
    """While it is dead nothing is acknowledged and /readyz says why; when it is back, all that was is there once."""
    try:
        with start(own_process=True) as server:
            process, found = started(spawn, server.url)
            assert post(found["mist"], *range(100)).status_code == 202
            server.kill()
            report = httpx.get(found["readyz"], trust_env=False, timeout=30)
            assert (report.status_code, report.json()["status"]) == (503, "degraded")
            assert report.json()["reason"]
            refused = post(found["mist"], *range(100, 200))
            assert refused.status_code in (503, 504), refused.text
            assert httpx.get(found["healthz"], trust_env=False).status_code == 200
            server.start()
            until(lambda: post(found["mist"], *range(100, 200)).status_code == 202)
            until(lambda: httpx.get(found["readyz"], trust_env=False, timeout=30).status_code == 200)
            until(lambda: spans(found) == 200)
            process.terminate()
            assert process.wait(60) == 143
            assert cli.ok("-u", server.url, "trace", "stats", "-j").json["total"] == 200
            assert sorted(r.id for r in records(server.url, "trace")) == sorted(f"id-{n}" for n in range(200))
    except MissingServer as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))


def test_a_broker_that_comes_late_is_waited_for(spawn: Spawn) -> None:
    """`mist up` before its server: it says so, and goes on when the server is there."""
    try:
        with run_redis(own_process=True) as server:
            assert isinstance(server, LocalServer)
            server.stop()
            process = spawn("up", "-u", server.url, "--listen", "127.0.0.1:0", "-o", "jsonl")
            assert process.stderr is not None
            assert b"trying again" in process.stderr.readline()
            server.start()
            assert process.stdout is not None
            found = msgspec.json.decode(process.stdout.readline())
            assert post(found["mist"], 1).status_code == 202
            process.terminate()
            assert process.wait(60) == 143
    except MissingServer as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))


def test_the_stream_is_made_as_it_was_asked_for(spawn: Spawn, cli: Cli, log: str) -> None:
    """--durability holds when the stream is made; one that is there with another is a conflict, not a change."""
    process, _ = started(spawn, log, "--durability", "process")
    assert cli.ok("-u", log, "stream", "info", "trace", "-j").json["durability"] == "process"
    process.terminate()
    process.wait()
    assert cli("up", "-u", log, "--listen", "127.0.0.1:0", "--durability", "power").code == 5


# the platform itself

Act = Callable[[dict[str, Any]], Awaitable[None]]


async def platform(
    tools: dict[str, Any], act: Act, *, connect: Any = None, wait_s: float = 5.0, drain_s: float = 30.0
) -> tuple[Exception | None, list[str]]:
    """Run tools over memory: while `act` does its part; then stop. Gives the error and what was said."""
    said: list[str] = []
    stop = asyncio.Event()
    ready = asyncio.Event()
    port = free_port()
    seen: dict[str, Any] = {"stop": stop, "ready": ready, "said": said, "port": port}
    broker = mist.connect("memory:")

    async def connected() -> Broker:
        return await broker

    def on_ready(url: str, running: Running) -> None:
        seen.update(url=url, running=running)
        ready.set()

    running = asyncio.create_task(
        _up_platform.run(
            connect or connected, tools, stream="s", host="127.0.0.1", port=port, wait_s=wait_s, drain_s=drain_s,
            stop=stop, say=said.append, on_ready=on_ready,
        )
    )  # fmt: skip
    acting = asyncio.create_task(act(seen))
    error: Exception | None = None
    try:
        await running
    except Exception as exc:
        error = exc
    acting.cancel()
    await asyncio.wait({acting})
    if not acting.cancelled():
        acting.result()
    return error, said


async def patient(here: Platform) -> None:
    here.ready.set()
    await here.stop.wait()


async def stop_when_ready(seen: dict[str, Any]) -> None:
    await seen["ready"].wait()
    seen["stop"].set()


def test_a_tool_is_started_again_after_an_error_worth_it() -> None:
    """While it is down /readyz says so and why; the others go on."""
    runs: list[int] = []
    reports: list[dict[str, Any]] = []

    async def shaky(here: Platform) -> None:
        runs.append(len(runs))
        if len(runs) < 3:
            raise Unavailable("the sky is cloudy")
        here.ready.set()
        await here.stop.wait()

    async def act(seen: dict[str, Any]) -> None:
        await seen["ready"].wait()
        seen["running"].tools["shaky"].down("it rains")
        reports.append((await seen["running"].health.readiness()).body)
        seen["stop"].set()

    error, said = run(platform({"shaky": shaky, "patient": patient}, act))
    assert error is None
    assert len(runs) == 3
    assert said[0].startswith("shaky: the sky is cloudy; starting it again in")
    assert reports[0]["status"] == "degraded"
    assert reports[0]["reason"] == "shaky: it rains"
    assert reports[0]["checks"] == {"broker": "ok", "shaky": "it rains", "patient": "ok"}


def test_a_door_that_is_not_open_yet_is_no_404() -> None:
    """Before its tool is ready, and while it is down, a sender is told to come back."""
    answers: list[tuple[int, str | None]] = []
    go = asyncio.Event()

    async def slow(here: Platform) -> None:
        await go.wait()
        await patient(here)

    async def ask(url: str) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.post(f"{url}/mist", content=b"{}")
            answers.append((answer.status_code, answer.headers.get("retry-after")))

    async def act(seen: dict[str, Any]) -> None:
        port = seen["port"]
        while not answers:
            try:
                await ask(f"http://127.0.0.1:{port}")
            except httpx.TransportError:
                await asyncio.sleep(0.01)
        go.set()
        await seen["ready"].wait()
        await ask(seen["url"])
        seen["stop"].set()

    error, _ = run(platform({"slow": slow}, act))
    assert error is None
    assert answers == [(503, "1"), (404, None)]


def test_a_tool_that_cannot_go_on_takes_all_down_in_order() -> None:
    """Its error is the platform's; the others are told to stop, not cancelled."""
    ended: list[str] = []

    async def failing(here: Platform) -> None:
        here.ready.set()
        await asyncio.sleep(0.05)
        raise Conflict("no way")

    async def orderly(here: Platform) -> None:
        await patient(here)
        await asyncio.sleep(0.05)
        ended.append("in order")

    async def nothing(seen: dict[str, Any]) -> None:
        await asyncio.sleep(60)

    error, _ = run(platform({"failing": failing, "orderly": orderly}, nothing))
    assert isinstance(error, Conflict)
    assert ended == ["in order"]


def test_a_bug_in_a_tool_is_not_swallowed() -> None:
    """Whatever it raises comes out."""

    async def wrong(here: Platform) -> None:
        raise ZeroDivisionError

    error, _ = run(platform({"wrong": wrong}, stop_when_ready))
    assert isinstance(error, ZeroDivisionError)


def test_a_tool_that_does_not_end_is_cancelled_and_named() -> None:
    """After the time to drain."""

    async def stubborn(here: Platform) -> None:
        here.ready.set()
        await asyncio.Event().wait()

    error, _ = run(platform({"stubborn": stubborn, "patient": patient}, stop_when_ready, drain_s=0.5))
    assert isinstance(error, TimedOut)
    assert "stubborn did not end" in str(error)


def test_the_broker_is_waited_for() -> None:
    """Unready with the reason meanwhile; given up after the wait; and a stop is heard in between."""
    tries: list[int] = []

    async def late() -> Broker:
        tries.append(1)
        if len(tries) < 3:
            raise Unavailable("nobody there")
        return await mist.connect("memory:")

    error, said = run(platform({"patient": patient}, stop_when_ready, connect=late))
    assert error is None
    assert len(said) == 2
    assert "nobody there; trying again in" in said[0]

    async def never() -> Broker:
        raise Unavailable("nobody there")

    async def nothing(seen: dict[str, Any]) -> None:
        await asyncio.sleep(60)

    error, _ = run(platform({"patient": patient}, nothing, connect=never, wait_s=0.05))
    assert isinstance(error, Unavailable)

    async def hangs() -> Broker:
        await asyncio.Event().wait()
        raise Internal("not reached")

    async def stop_soon(seen: dict[str, Any]) -> None:
        await asyncio.sleep(0.05)
        seen["stop"].set()

    error, _ = run(platform({"patient": patient}, stop_soon, connect=hangs, wait_s=0))
    assert error is None


def test_health_without_a_broker_and_while_draining() -> None:
    """Both are 503 with a reason; a websocket is not served."""

    async def body_of() -> None:
        running = Running()
        assert (await running.health.readiness()).body["reason"] == "broker: not connected yet"
        running = Running()
        running.broker = await mist.connect("memory:")
        assert (await running.health.readiness()).code == 200
        await running.broker.aclose()
        closed = Running()
        closed.broker = running.broker
        assert "closed" in (await closed.health.readiness()).body["reason"]
        running.health.drain()
        assert (await running.health.readiness()).body["reason"] == "draining"
        with pytest.raises(Internal):
            await running.site({"type": "websocket"}, None, None)  # type: ignore[arg-type]

    run(body_of())


def test_otlp_without_its_extra_is_left_out_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, log: str
) -> None:
    """Left out with a line on stderr; asked for by name it is an error with the install line."""

    def gone(store: Any, **options: Any) -> Any:
        raise InvalidArgument(
            "OTLP needs a package that is not installed (google)", hint="pip install 'mist-stack[otel]'"
        )

    async def nothing(*args: Any, **kw: Any) -> dict[str, Any]:
        return {}

    monkeypatch.setattr(_up_tools, "otlp", gone)
    monkeypatch.setattr(_up_platform, "run", nothing)
    left_out = cli("-u", log, "up")
    assert left_out.code == 0
    assert "otlp is left out: OTLP needs a package that is not installed" in left_out.err
    for asked in (("--tools", "otlp"), ("--otlp-grpc", "127.0.0.1:0")):
        refused = cli("-u", log, "up", *asked)
        assert refused.code == 2
        assert "mist-stack[otel]" in refused.err


def test_otlp_over_grpc_needs_the_tool(cli: Cli, log: str) -> None:
    """Otherwise the option would be ignored without a word."""
    assert cli("-u", log, "up", "--tools", "door", "--otlp-grpc", "127.0.0.1:0").code == 2
