"""The questions over HTTP: the seed's routes and shapes, without its defects; filters, pages, windows, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import run

from mist.errors import Closed, MistError, Overloaded, TimedOut
from mist.kit.server import Site
from mist.tools.tokentrace.api import Api
from mist.tools.tokentrace.readers import Readers
from mist.tools.tokentrace.spans import row_of
from mist.tools.tokentrace.store import Batch, Store

from .spanning import envelope, record

NS = 1_000_000_000
NOW = 1_700_010_000 * NS
Get = Callable[..., httpx.Response]


def spans() -> list[dict[str, Any]]:
    """Nine spans of three traces, one a second, the last at NOW - 1 s; the fifth failed."""
    out = []
    for n in range(1, 10):
        at = NOW - (10 - n) * NS
        out.append(
            {
                "trace_id": f"t{n % 3}",
                "parent_id": f"{n - 3:016x}" if n > 3 else "",
                "start_ns": at,
                "end_ns": at + 100_000_000 * n,
                "operation": "chat" if n % 2 else "embed",
                "status": "error" if n == 5 else "ok",
                "attrs": {"model": "a" if n < 6 else "b", "tokens_in": n, "user": f"u{n % 2}", "k": n > 7},
            }
        )
    return out


@pytest.fixture
def place(place: Path | str) -> Path | str:
    """A store with the nine spans."""
    rows = [row_of(record(envelope(n, **changes), n)) for n, changes in enumerate(spans(), 1)]
    with Store.open(place) as store:
        store.apply("trace", "i", Batch(after=0, scanned=9, rows=[r for r in rows if r is not None]))
    return place


@pytest.fixture
def get(place: Path | str) -> Get:
    """GET a path of the API."""

    def ask(path: str, method: str = "GET", **headers: str) -> httpx.Response:
        async def body() -> httpx.Response:
            readers = Readers(place)
            try:
                site = Site(Api(readers, clock=lambda: NOW).doors())
                transport = httpx.ASGITransport(app=site)  # type: ignore[arg-type]
                async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                    return await client.request(method, path, headers=headers)
            finally:
                readers.close()

        return run(body())

    return ask


def ids(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return [int(s["span_id"], 16) for s in answer.json()["spans"]]


def test_a_trace_is_given_whole_and_in_order(get: Get) -> None:
    """The seed's shape and wire fields; spans by start time every time; parents, model and tokens intact."""
    answer = get("/traces/t1")
    assert ids(answer) == [1, 4, 7]
    found = answer.json()
    assert (found["trace_id"], found["count"], found["next"]) == ("t1", 3, "")
    span = found["spans"][1]
    assert (span["parent_id"], span["operation"], span["status"]) == (f"{1:016x}", "embed", "ok")
    assert span["attrs"] == {"model": "a", "tokens_in": 4, "user": "u0", "k": False}
    assert (span["latency_ms"], span["model"], span["tokens_in"], span["user"]) == (400.0, "a", 4, "u0")
    assert "cost_usd" not in span
    assert [s["depth"] for s in get("/traces/t1?tree=1").json()["spans"]] == [0, 1, 2]


def test_an_unknown_trace_is_404_with_the_seeds_words(get: Get) -> None:
    """As error JSON; as plain text for who only takes that."""
    answer = get("/traces/none")
    assert (answer.status_code, answer.json()["code"], answer.json()["message"]) == (
        404,
        "not_found",
        "trace not found",
    )
    plain = get("/traces/none", accept="text/plain")
    assert (plain.status_code, plain.text, plain.headers["content-type"]) == (
        404, "trace not found", "text/plain; charset=utf-8",
    )  # fmt: skip
    assert get("/traces/").json()["message"] == "trace ID required"
    assert get("/traces/t1%00").status_code == 404


def test_a_trace_that_is_called_recent_can_be_reached(place: Path | str, get: Get) -> None:
    """Its id as a parameter: the path of that name is another route, as in the seed."""
    row = row_of(record(envelope(77, trace_id="recent"), 77))
    assert row is not None
    with Store.open(place) as store:
        store.apply("trace", "i", Batch(after=9, scanned=77, rows=[row]))
    assert get("/traces/recent").json()["count"] == 10
    assert get("/traces/?id=recent").json()["trace_id"] == "recent"


def test_recent_spans_are_newest_first_with_the_seeds_limits(get: Get) -> None:
    """`limit` counts; zero, less and text are the default; the answer is [] and not null when nothing matches."""
    assert ids(get("/traces/recent?limit=3")) == [9, 8, 7]
    for odd in ("0", "-1", "ten", ""):
        assert len(ids(get(f"/traces/recent?limit={odd}"))) == 9
    assert get("/traces/recent?limit=10001").status_code == 400
    assert get("/traces/recent?model=none").json() == {"spans": [], "count": 0, "next": ""}


def test_pages_go_on_where_the_one_before_ended(get: Get) -> None:
    """By the cursor it says; for spans, for the spans of a trace, and for traces."""
    first = get("/traces/recent?limit=4")
    assert ids(first) + ids(get(f"/traces/recent?limit=9&cursor={first.json()['next']}")) == list(range(9, 0, -1))
    first = get("/traces/t1?limit=2")
    assert ids(get(f"/traces/t1?cursor={first.json()['next']}")) == [7]
    first = get("/traces?limit=2")
    assert first.json()["trace_ids"] == ["t0", "t2"]
    second = get(f"/traces?limit=2&cursor={first.json()['next']}").json()
    assert (second["trace_ids"], second["count"], second["next"]) == (["t1"], 1, "")
    assert second["traces"][0]["spans"] == 3
    assert get("/traces?cursor=x").status_code == 400


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("model=b", [9, 8, 7, 6]),
        ("operation=embed&model=a", [4, 2]),
        ("user=u1&status=ok", [9, 7, 3, 1]),
        ("failed=1", [5]),
        ("attr.k=true", [9, 8]),
        ("attr.tokens_in=3", [3]),
        ("window=3s", [9, 8, 7]),
        (f"since={NOW - 4 * NS}&until={NOW - 2 * NS}", [7, 6]),
        ("since=2023-11-15T00:59:58Z", [9, 8]),
        ("since=2023-11-15T01:59:58%2B01:00", [9, 8]),
        ("until=2023-11-15", []),
        ("until=9999-12-31&tenant=", list(range(9, 0, -1))),
        ("since=9999-12-31T23:59:59Z", []),
        ("source=svc&tenant=", list(range(9, 0, -1))),
        ("tenant=acme", []),
    ],
)
def test_filters_and_windows(get: Get, query: str, expected: list[int]) -> None:
    """Each by itself and together."""
    assert ids(get(f"/traces/recent?{query}")) == expected


def test_errors_come_first_where_they_are_asked_for(get: Get) -> None:
    """Failed spans only, newest first."""
    assert ids(get("/errors")) == [5]
    assert ids(get("/errors?model=b")) == []


def test_stats_have_the_seeds_keys(get: Get) -> None:
    """Of everything, and of a window; unknown cost is null and counted."""
    found = get("/stats").json()
    assert (found["total_spans"], found["error_count"], found["error_rate"]) == (9, 1, pytest.approx(1 / 9))
    assert (found["latency_p50_ms"], found["latency_p99_ms"]) == (
        pytest.approx(500, rel=0.0081), pytest.approx(900, rel=0.0081),
    )  # fmt: skip
    assert found["latency_avg_ms"] == 500
    assert (found["total_tokens_in"], found["total_tokens_out"]) == (45, 0)
    assert (found["total_cost_usd"], found["cost_unknown_spans"]) == (None, 9)
    assert found["by_operation"] == {"chat": {"count": 5, "errors": 1}, "embed": {"count": 4, "errors": 0}}
    assert get("/stats?window=3s").json()["total_spans"] == 3


def test_metrics_of_a_window_in_the_documents_shape(get: Get) -> None:
    """Totals, groups and time buckets; one metric by its name."""
    found = get("/metrics?window=1h&groupby=model,operation").json()
    assert (found["window"], found["span_count"], found["errors"]["count"]) == ("1h", 9, 1)
    assert found["tokens"] == {"prompt_total": 45, "completion_total": None, "total": 45}
    assert found["cost"]["by_model"] == {"a": None, "b": None}
    first = found["groups"][0]
    assert (first["group"], first["span_count"]) == ({"model": "a", "operation": "chat"}, 3)
    buckets = get("/metrics?window=1h&bucket=minute").json()["groups"]
    assert [(b["at"], b["span_count"]) for b in buckets] == [(NOW // NS // 60 * 60 - 60, 9)]
    one = get("/metrics/latency_p50?window=1h").json()
    assert (one["metric"], one["samples"], one["value"]) == ("latency_p50", 9, pytest.approx(500, rel=0.0081))
    assert get("/metrics/total_cost_usd").json()["value"] is None
    assert len(get("/metrics/error_rate?groupby=user").json()["groups"]) == 2
    assert get("/metrics/magic").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/stats?model_name=a", "/stats?window=1x", "/stats?window=0s", "/stats?window=1h&since=2023-01-01", "/stats?since=noon",
        "/stats?model=a&model=b", "/metrics?groupby=magic", "/metrics?groupby=model,model", "/metrics?bucket=year",
        "/traces/recent?failed=maybe", "/traces/recent?attr.=x", '/traces/recent?attr.a"b=x', "/stats?a=" + "x" * 9000,
        "/stats?%ff=%fe", "/traces/t1?limit=1&cursor=1.2.3.4", "/traces?model=a%00", "/stats?attr.k=%00",
        "/stats?since=2026-01-02&until=2026-01-01",
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(get: Get, path: str) -> None:
    """400 with the error JSON: never an answer to another question."""
    answer = get(path)
    assert (answer.status_code, answer.json()["code"]) == (400, "validation"), answer.text


def test_other_methods_are_refused(get: Get) -> None:
    """405 with Allow; HEAD is GET without its body."""
    for path in ("/traces", "/traces/t1", "/stats", "/metrics?window=1h"):
        answer = get(path, "POST")
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    head = get("/stats", "HEAD")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(get("/stats").content)


def test_before_there_is_a_store_it_is_404(tmp_path: Path) -> None:
    """With the sentence that says what makes one."""

    async def body() -> None:
        readers = Readers(tmp_path / "none.db")
        with pytest.raises(MistError, match="no TokenTrace store"):
            await readers.ask(lambda store: store.count())

    run(body())


# ----------------------------------------------------------------- readers


SLOW = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 1000000000) SELECT count(*) FROM c"


def test_a_question_without_an_end_is_interrupted(place: Path | str) -> None:
    """TimedOut; the connection is used again; a cancelled caller leaves no thread behind."""

    async def body() -> None:
        readers = Readers(place, connections=1, deadline_s=0.3)
        with pytest.raises(TimedOut):
            await readers.ask(lambda store: store.one(SLOW))
        assert await readers.ask(lambda store: store.count()) == 9
        task = asyncio.create_task(readers.ask(lambda store: store.one(SLOW)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await readers.ask(lambda store: store.count()) == 9
        readers.close()
        with pytest.raises(Closed):
            await readers.ask(lambda store: store.count())

    run(body())


def test_more_questions_than_may_wait_are_refused(tmp_path: Path) -> None:
    """Overloaded, with when to come back; those that wait are answered."""
    Store.open(tmp_path / "t.db").close()

    async def body() -> None:
        readers = Readers(tmp_path / "t.db", connections=1, waiting_max=2)
        gate = asyncio.Event()
        loop = asyncio.get_running_loop()

        def held(store: Store) -> int:
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
            return store.count()

        tasks = [asyncio.create_task(readers.ask(held)) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded) as caught:
            await readers.ask(held)
        assert caught.value.retry_after_s == 1
        gate.set()
        assert await asyncio.gather(*tasks) == [0, 0, 0]
        readers.close()

    run(body())
