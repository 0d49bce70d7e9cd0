"""The alerts over a real store, a real log and a real receiver in its own process, once, in real time."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mist
from mist.broker.base import Message, Stream
from mist.errors import TransportError, Unavailable
from mist.kit.local import free_port
from mist.protocol.codec import decode, encode
from mist.protocol.envelope import Envelope
from mist.tools.tokentrace.alerts import control
from mist.tools.tokentrace.alerts.measure import measure
from mist.tools.tokentrace.alerts.rules import rules_of
from mist.tools.tokentrace.alerts.service import Alerts, watch
from mist.tools.tokentrace.alerts.webhook import HttpPost, verify
from mist.tools.tokentrace.ingest import ingest
from mist.tools.tokentrace.store import Store
from mist.transport.server import stream_sink
from tests.tools.alerting import rule
from tests.tools.spanning import payload

ROOT = Path(__file__).parents[2]
SECRET = "whsec_c2VjcmV0IGtleSBvZiB0aGUgdGVzdA=="


@pytest.fixture
def receiver() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(its URL, the process)."""
    argv = [sys.executable, "-m", "tests.tools.hook_receiver"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}", process
        finally:
            process.kill()


async def feed(stream: Stream, numbers: range, status: str) -> int:
    """Spans that began just now; the last sequence."""
    now = time.time_ns()
    envelopes = [
        Envelope.new("trace.span", payload(n, start_ns=now - 2_000_000_000, end_ns=now, status=status), source="svc")
        for n in numbers
    ]
    return (await stream.append([Message("trace.span.svc", encode(e), e.id) for e in envelopes]))[-1]


async def until(found: Any, seconds: float = 60) -> Any:
    """What `found()` gives, once it gives something."""
    async with asyncio.timeout(seconds):
        while not (value := found()):
            await asyncio.sleep(0.05)
    return value


def test_once_for_real(tmp_path: Path, receiver: tuple[str, subprocess.Popen[str]]) -> None:
    """Errors come in, the alert fires, as envelope on the log and as a signed webhook behind a 503; good spans come in, it
    resolves; silenced, it stays silent."""
    url, process = receiver
    env = {"HOOK_SECRET": SECRET, "HOOK_URL": f"{url}/hook"}
    table = {
        "name": "errors", "metric": "error_rate", "threshold": {"warning": 0.2, "critical": 0.6}, "window": "1m",
        "every": "1s", "cooldown": "0s", "group_by": ["model"],
        "delivery": {"url_env": "HOOK_URL", "secret_env": "HOOK_SECRET"},
    }  # fmt: skip
    rules = rules_of({"tokentrace": {"alerts": [table]}}, "mist.toml", env=env)
    place = tmp_path / "store.db"

    def hook() -> dict[str, Any]:
        assert process.stdout is not None
        got: dict[str, Any] = json.loads(process.stdout.readline())
        return got

    async def play() -> None:
        stop = asyncio.Event()
        running: list[Alerts] = []
        async with mist.connect(f"log:{tmp_path / 'log'}") as broker:
            stream = await broker.open("trace")
            with Store.open(place) as ingested, Store.open(place) as watched, Store.open(place) as asked:
                last = await feed(stream, range(9), "error")
                await ingest(broker, stream, ingested, until=last)
                task = asyncio.create_task(
                    watch(watched, stream_sink(stream), rules, stop=stop, env=env, on_start=running.append)
                )
                fired = await asyncio.to_thread(hook)
                assert verify(fired["headers"], fired["body"].encode(), SECRET, now_s=time.time()) != ""
                told = json.loads(fired["body"])
                assert (told["state"], told["level"], told["value"], told["span_count"]) == (
                    "firing",
                    "critical",
                    1.0,
                    9,
                )
                assert told["group"] == {"model": "m1"}
                last = await feed(stream, range(100, 191), "ok")
                await ingest(broker, stream, ingested, until=last)
                resolved = json.loads((await asyncio.to_thread(hook))["body"])
                assert (resolved["state"], resolved["dedup_key"]) == ("resolved", told["dedup_key"])
                control.silence(asked, rules, "errors", 3600, now_ns=time.time_ns())
                last = await feed(stream, range(200, 400), "error")
                await ingest(broker, stream, ingested, until=last)
                seen = time.time_ns()
                status = await until(
                    lambda: (
                        (s := control.status(asked, rules, "errors", now_ns=time.time_ns())).evaluated_ns > seen and s
                    )
                )
                assert status.silenced_until_ns > 0
                assert [g.state for g in status.groups] == ["pending"]
                stop.set()
                await task
            page = await stream.read(after=0, subjects=("trace.alert",), limit=100)
            alerts = [decode(r.data).decode() for r in page.records]
            assert [(a.state, a.level, a.name) for a in alerts] == [
                ("firing", "critical", "errors"), ("resolved", "critical", "errors"),
            ]  # fmt: skip
            facts = running[0].facts()
            assert (facts["webhooks_delivered"], facts["webhooks_retried"], facts["webhooks_failed"]) == (2, 1, 0)

    asyncio.run(play())


def test_redirects_are_not_followed_and_nobody_there_is_worth_another_try(
    receiver: tuple[str, subprocess.Popen[str]],
) -> None:
    """A redirect is a refusal for good; a refused connection is not."""

    async def play() -> None:
        async with HttpPost() as post:
            with pytest.raises(TransportError, match="redirects are not followed") as moved:
                await post(f"{receiver[0]}/moved", {}, b"{}", 5.0)
            assert not moved.value.retryable
            with pytest.raises(Unavailable) as away:
                await post(f"http://127.0.0.1:{free_port()}/", {}, b"{}", 5.0)
            assert away.value.retryable

    asyncio.run(play())


def test_a_real_store_answers_what_a_rule_asks(tmp_path: Path) -> None:
    """Window, filter, attributes and groups against spans counted by hand."""

    async def play() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            spans = [
                payload(1, attrs={"model": "a", "tokens_in": 10, "stage": "prod"}),
                payload(2, attrs={"model": "a", "tokens_in": 30, "stage": "test"}, status="timeout"),
                payload(3, attrs={"tokens_in": 5, "stage": "prod"}, operation="embed"),
            ]
            envelopes = [Envelope.new("trace.span", span, source="s") for span in spans]
            last = (await stream.append([Message("trace.span", encode(e), e.id) for e in envelopes]))[-1]
            with Store.open(tmp_path / "s.db") as store:
                await ingest(broker, stream, store, until=last)
                start = spans[0]["start_ns"]
                (row,) = measure(store, rule(), start, start + 60_000_000_000)
                assert (row.spans, row.errors, row.timeouts) == (3, 1, 1)
                (row,) = measure(store, rule(), start - 60_000_000_000, start)
                assert row.spans == 0
                by_model = measure(store, rule(group_by=["model"]), start, start + 10)
                assert {m.group["model"]: m.tokens_in.total for m in by_model} == {"a": 40, None: 5}
                (row,) = measure(
                    store, rule(filter={"attrs": {"stage": "prod"}, "operation": "chat"}), start, start + 10
                )
                assert (row.spans, row.tokens_in.total) == (1, 10)
                by_stage = measure(store, rule(group_by=["attr.stage"]), start, start + 10)
                assert {m.group["attr.stage"]: m.spans for m in by_stage} == {"prod": 2, "test": 1}

    asyncio.run(play())
