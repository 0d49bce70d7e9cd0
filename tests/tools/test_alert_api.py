"""The alerts over HTTP: listed, silenced, deleted; refused where the request cannot be right."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from conftest import run

from mist.kit.server import Site
from mist.tools.tokentrace.alerts.api import AlertApi
from mist.tools.tokentrace.alerts.rules import rules_of
from mist.tools.tokentrace.store import Store

NOW = 1_700_000_000 * 10**9
RULES = rules_of(
    {"tokentrace": {"alerts": [
        {"name": "slow", "metric": "latency_p95", "op": ">", "threshold": 5, "window": "5m"},
        {"name": "cost", "metric": "total_cost_usd", "op": ">", "threshold": 5, "window": "1h"},
    ]}},
    "test",
)  # fmt: skip


def ask(place: Path, method: str, path: str, **more: object) -> httpx.Response:
    async def body() -> httpx.Response:
        site = Site(AlertApi(place, RULES, clock=lambda: NOW).doors())
        transport = httpx.ASGITransport(app=site)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
            return await client.request(method, path, **more)  # type: ignore[arg-type]

    return run(body())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    Store.open(tmp_path / "t.db").close()
    return tmp_path / "t.db"


def test_rules_are_listed_with_how_they_stand(place: Path) -> None:
    """In the order of the configuration; one by its name."""
    found = ask(place, "GET", "/alerts").json()["alerts"]
    assert [(a["name"], a["metric"], a["state"]) for a in found] == [
        ("slow", "latency_p95", "ok"), ("cost", "total_cost_usd", "ok"),
    ]  # fmt: skip
    assert ask(place, "GET", "/alerts/cost/status").json() == found[1]


def test_a_silence_is_kept_and_can_be_ended(place: Path) -> None:
    """The time it lasts to is said and seen in the list; a duration of 0 ends it."""
    answer = ask(place, "POST", "/alerts/slow/silence", json={"duration": "2h"})
    assert (answer.status_code, answer.json()) == (200, {"silenced_until": "2023-11-15T00:13:20+00:00"})
    assert ask(place, "GET", "/alerts/slow/status").json()["silenced_until_ns"] == NOW + 7200 * 10**9
    assert ask(place, "POST", "/alerts/slow/silence", json={"duration": "0s"}).json() == {"silenced_until": None}
    assert ask(place, "GET", "/alerts/slow/status").json()["silenced_until_ns"] == 0


def test_a_deleted_rule_is_gone(place: Path) -> None:
    """From the list and for orders; the others stay."""
    assert ask(place, "DELETE", "/alerts/slow").status_code == 204
    assert [a["name"] for a in ask(place, "GET", "/alerts").json()["alerts"]] == ["cost"]
    assert ask(place, "DELETE", "/alerts/slow").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/alerts/none/status", None, 404),
        ("POST", "/alerts/none/silence", {"duration": "1h"}, 404),
        ("GET", "/alerts/slow/magic", None, 404),
        ("GET", "/alerts/slow/status/more", None, 404),
        ("POST", "/alerts", {"name": "x"}, 405),
        ("GET", "/alerts/slow", None, 405),
        ("GET", "/alerts/slow/silence", None, 405),
        ("POST", "/alerts/slow/silence", {"duration": "two hours"}, 400),
        ("POST", "/alerts/slow/silence", {"duration": "900d"}, 400),
        ("POST", "/alerts/slow/silence", {"duration": "1h", "who": "me"}, 400),
        ("POST", "/alerts/slow/silence", {"duration": "1h" * 4000}, 413),
    ],
)
def test_what_cannot_be_right_is_refused(
    place: Path, method: str, path: str, body: dict[str, str] | None, status: int
) -> None:
    """With the status that says why, and error JSON."""
    answer = ask(place, method, path, json=body) if body is not None else ask(place, method, path)
    assert (answer.status_code, set(answer.json()) >= {"code", "message"}) == (status, True), answer.text
