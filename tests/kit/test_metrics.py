"""Metrics: numbers that cannot break a page, label sets that cannot fill the memory, two formats."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from conftest import run
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from mist.errors import InvalidArgument
from mist.kit.metrics import DROPPED, Metrics, go_float
from mist.kit.server import AppServer, Site


def samples(text: bytes, parse: Any = parse_text) -> dict[tuple[str, tuple[str, ...]], float]:
    """What a scraper reads."""
    return {
        (sample.name, tuple(v for _, v in sorted(sample.labels.items()))): sample.value
        for family in parse(text.decode())
        for sample in family.samples
    }


def client_of(server: AppServer) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, trust_env=False)


def dropped(metrics: Metrics, name: str, reason: str) -> float:
    return metrics.get(DROPPED, metric=name, reason=reason)


def test_the_order_of_labels_does_not_matter() -> None:
    """One series; other labels than the family's are refused."""
    metrics = Metrics()
    sent = metrics.counter("sent_total", "Sent.", ("scheme", "kind"))
    sent.add(2, scheme="file", kind="a")
    sent.add(kind="a", scheme="file")
    assert sent.get(scheme="file", kind="a") == 3
    assert metrics.get("sent_total", kind="a", scheme="file") == 3
    assert metrics.get("nothing_total") == 0
    for labels in ({}, {"scheme": "x"}, {"scheme": "x", "other": "y"}, {"scheme": "x", "kind": "y", "z": "z"}):
        with pytest.raises(InvalidArgument):
            sent.add(**labels)


def test_label_sets_are_capped() -> None:
    """What comes beyond is counted in the `other` series, and told; nothing is lost."""
    metrics = Metrics(series_max=3)
    users = metrics.counter("users_total", "", ("user", "plan"))
    seconds = metrics.histogram("user_seconds", "", ("user",))
    for n in range(100):
        users.add(user=f"u{n}", plan="free")
        seconds.observe(0.1, user=f"u{n}")
    users.add(user="u0", plan="free")
    assert len(users.values()) == 4
    assert users.get(user="u0", plan="free") == 2
    assert users.get(user="other", plan="other") == 97
    assert sum(users.values().values()) == 101
    assert seconds.values()[("other",)].count == 97
    assert dropped(metrics, "users_total", "overflow") == 97
    users.remove(user="u1", plan="free")
    users.remove(user="other", plan="other")
    users.add(user="new", plan="free")
    assert users.get(user="new", plan="free") == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_breaks_a_page(bad: float) -> None:
    """Counters and histograms refuse it and say so, a gauge shows it; both pages stay whole."""
    metrics = Metrics()
    gauge, histogram = metrics.gauge("g"), metrics.histogram("h_seconds")
    counter = metrics.counter("c_total")
    gauge.set(bad)
    histogram.observe(bad)
    histogram.observe(0.2)
    if bad > 0 or math.isnan(bad):
        counter.add(bad)
        assert dropped(metrics, "c_total", "not_finite") == 1
    found = samples(metrics.text()[0])
    assert math.isnan(found["g", ()]) if math.isnan(bad) else found["g", ()] == bad
    assert (found["h_seconds_count", ()], found["h_seconds_sum", ()], found["c_total", ()]) == (1, 0.2, 0)
    assert dropped(metrics, "h_seconds", "not_finite") == 1
    document = msgspec.json.decode(metrics.json())
    assert document["gauges"]["g"]["value"] is None
    assert document["histograms"]["h_seconds"]["sum"] == 0.2


def test_a_watch_that_fails_costs_its_own_line() -> None:
    """An exception, text, the wrong labels: counted, the rest of the page is there."""
    metrics = Metrics(series_max=2)

    def bug() -> float:
        raise ZeroDivisionError

    metrics.watch("a", "A.", bug)
    metrics.watch("b", "B.", lambda: "text")  # type: ignore[arg-type, return-value]
    metrics.watch("c", "C.", lambda: {("x", "y"): 1.0}, labels=("one",))
    metrics.watch("d", "D.", lambda: {("x",): 1, ("y",): 2, ("z",): 3}, labels=("one",))
    metrics.watch("e_total", "E.", lambda: 5, kind="counter")
    found = samples(metrics.text()[0])
    assert {name for name, _ in found} == {"d", "e_total", DROPPED}
    assert found["d", ("y",)] == 2
    assert found[DROPPED, ("a", "failed")] == 1
    assert dropped(metrics, "d", "overflow") == 1
    with pytest.raises(InvalidArgument):
        metrics.watch("a", "A.", lambda: 1)


def test_the_json_is_that_of_the_go_library() -> None:
    """Flat labels, names with them, cumulative buckets under Go's numbers; and `+Inf`, which it leaves out."""
    metrics = Metrics()
    assert metrics.json() == b"{}\n"
    metrics.counter("requests_total", "", ("model", "status")).add(2, status="ok", model="gpt")
    metrics.gauge("depth").set(-1.5)
    sizes = metrics.histogram("sizes", "", (), (2.5, 1e6, 1234567))
    for value in (1, 2.5, 3, 2e6):
        sizes.observe(value)
    metrics.histogram("empty", "", (), (1,))
    assert msgspec.json.decode(metrics.json()) == {
        "counters": {
            "requests_total{model,gpt,status,ok}": {
                "name": "requests_total", "labels": ["model", "gpt", "status", "ok"], "value": 2,
            }
        },
        "gauges": {"depth": {"name": "depth", "value": -1.5}},
        "histograms": {
            "empty": {"name": "empty", "count": 0, "sum": 0, "min": 0, "max": 0, "buckets": {"1": 0, "+Inf": 0}},
            "sizes": {
                "name": "sizes", "count": 4, "sum": 2000006.5, "min": 1, "max": 2e6,
                "buckets": {"2.5": 2, "1e+06": 3, "1.234567e+06": 3, "+Inf": 4},
            },
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1.234567e+06"), (2500000, "2.5e+06"), (1000000, "1e+06"), (2.5, "2.5"), (0, "0"), (100000, "100000"),
        (0.0001, "0.0001"), (0.00001, "1e-05"), (-12.5, "-12.5"), (-2e-7, "-2e-07"), (1e21, "1e+21"), (5000, "5000"),
    ],
)  # fmt: skip
def test_numbers_as_go_prints_them(value: float, text: str) -> None:
    """Spec vector 6, and around it."""
    assert go_float(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_no_digit_is_lost(value: float) -> None:
    """What Go would print reads back as the same number."""
    assert float(go_float(value)) == value


@given(st.lists(st.tuples(st.text(), st.floats()), max_size=20))
def test_any_label_and_any_number_make_a_page(values: list[tuple[str, float]]) -> None:
    """Surrogates, quotes, line ends, NaN: both formats stay readable, and no two series become one line."""
    metrics = Metrics()
    gauge = metrics.gauge("g", 'with "quotes"\nand lines \\', ("name",))
    for name, value in values:
        gauge.set(value, name=name)
    gauge.set(1, name="\ud800")
    lines = metrics.text()[0].decode()
    assert lines.count("\ng{") == len(gauge.values())
    assert len(msgspec.json.decode(metrics.json())["gauges"]) >= 1


def test_families_are_one_per_name() -> None:
    """The same again is the same; another kind, labels or bounds are refused, and so are names that cannot be."""
    metrics = Metrics()
    first = metrics.histogram("h", "", ("a",), (1, 2))
    assert metrics.histogram("h", "", ("a",), (1, 2)) is first
    clashes: list[Callable[[], object]] = [
        lambda: metrics.histogram("h", "", ("a",), (1, 3)),
        lambda: metrics.histogram("h", "", ("b",), (1, 2)),
        lambda: metrics.gauge("h", "", ("a",)),
        lambda: metrics.counter("no_suffix"),
        lambda: metrics.gauge("gauge_total"),
        lambda: metrics.gauge("with space"),
        lambda: metrics.gauge("x", "", ("le",)),
        lambda: metrics.gauge("x", "", ("__a",)),
        lambda: metrics.histogram("x", "", (), (2, 1)),
        lambda: metrics.histogram("x", "", (), (1, math.inf)),
        lambda: metrics.counter(DROPPED),
        lambda: metrics.counter("c_total").add(-1),
    ]
    for clash in clashes:
        with pytest.raises(InvalidArgument):
            clash()


def test_many_threads() -> None:
    """Nothing is lost, pages are written meanwhile."""
    metrics = Metrics()
    counter = metrics.counter("c_total", "", ("n",))
    histogram = metrics.histogram("h")

    def work(n: int) -> None:
        for _ in range(5000):
            counter.add(n=str(n % 2))
            histogram.observe(0.5)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        value = histogram.values()[()]
        assert value.sum == value.count * 0.5
        metrics.text()
    assert (counter.get(n="0"), counter.get(n="1"), histogram.values()[()].count) == (10_000, 10_000, 20_000)


def test_a_timer() -> None:
    """Also of a block that raises."""
    metrics = Metrics()
    now = iter([1.0, 3.5, 4.0, 4.25])
    histogram = metrics.histogram("h_seconds", "", ("op",))
    with histogram.time(clock=lambda: next(now), op="x"):
        pass
    with pytest.raises(KeyError), histogram.time(clock=lambda: next(now), op="x"):
        raise KeyError
    value = histogram.values()[("x",)]
    assert (value.count, value.sum, value.min, value.max) == (2, 2.75, 0.25, 2.5)


def test_the_pages() -> None:
    """Prometheus text, OpenMetrics where asked for, JSON; an Accept header nobody understands is no error."""
    metrics = Metrics()
    metrics.counter("sent_total", "Sent.", ("to",)).add(3, to="é")

    async def case() -> None:
        async with AppServer(Site(metrics.pages())) as server, client_of(server) as client:
            answer = await client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert samples(answer.content) == {("sent_total", ("é",)): 3}
            answer = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
            assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
            assert samples(answer.content, parse_openmetrics) == {("sent_total", ("é",)): 3}
            assert answer.content.endswith(b"# EOF\n")
            answer = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.x"})
            assert answer.status_code == 200
            answer = await client.get("/metricsz")
            assert answer.headers["content-type"] == "application/json"
            assert answer.json()["counters"]["sent_total{to,é}"]["value"] == 3

    run(case())


def test_without_prometheus_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and JSON are there; the text page says what to install."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    metrics = Metrics()
    metrics.counter("sent_total").add()

    async def case() -> None:
        async with AppServer(Site(metrics.pages())) as server, client_of(server) as client:
            answer = await client.get("/metrics")
            assert (answer.status_code, answer.json()["code"]) == (501, "unsupported")
            assert (await client.get("/metricsz")).status_code == 200

    run(case())
