"""Site and AppServer: routes, unfinished platforms, errors nobody handled."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from conftest import run

from mist.errors import Closed, InvalidArgument, NotFound, TransportError
from mist.kit.server import Answer, App, AppServer, Site, page


def saying(text: str) -> App:
    async def answer(scope: Any) -> Answer:
        return Answer(200, text.encode(), b"text/plain")

    return page(answer)


async def raising(scope: Any, receive: Any, send: Any) -> None:
    raise scope["app.error"] if "app.error" in scope else ValueError("a secret text")


async def missing(scope: Any, receive: Any, send: Any) -> None:
    raise NotFound("no such trace")


def test_each_path_has_its_app() -> None:
    """In the order of the tables, the exact path first; below a path that ends with `/` everything; `seen` is told."""
    seen: list[tuple[str, str, int]] = []
    late: dict[str, App] = {}
    waiting = ""
    site = Site(
        {"/a": saying("a"), "/t/": saying("below")}, {"/a": saying("never"), "/t/x": saying("exact")}, late,
        waiting=lambda: waiting, seen=lambda method, route, status, s: seen.append((method, route, status)),
    )  # fmt: skip

    async def case() -> None:
        nonlocal waiting
        async with AppServer(site) as server, httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
            assert (await client.get("/a")).text == "a"
            assert (await client.get("/t/1/2")).text == "below"
            assert (await client.get("/t/x")).text == "exact"
            answer = await client.get("/late")
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
            waiting = "not all is ready yet"
            answer = await client.get("/late")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            late["/late"] = saying("here")
            assert (await client.get("/late")).text == "here"
        assert seen == [
            ("GET", "/a", 200), ("GET", "/t/", 200), ("GET", "/t/x", 200), ("GET", "", 404), ("GET", "", 503),
            ("GET", "/late", 200),
        ]  # fmt: skip

    run(case())


def test_errors_nobody_handled(caplog: pytest.LogCaptureFixture) -> None:
    """Ours have their status; any other is 500 without its text, which goes to the log. The server lives on."""

    async def case() -> None:
        site = Site({"/bug": raising, "/missing": missing})
        async with AppServer(site) as server, httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
            answer = await client.get("/bug")
            assert (answer.status_code, answer.json()["code"]) == (500, "internal")
            assert "secret" not in answer.text
            answer = await client.get("/missing")
            assert (answer.status_code, answer.json()["message"]) == (404, "no such trace")

    run(case())
    assert "a secret text" in caplog.text


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_both_parsers(http: Any) -> None:
    """The one that was asked for answers."""

    async def case() -> None:
        async with AppServer(Site({"/": saying("hello")}), http=http) as server:
            assert server._server.config.http == http
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.get(server.url + "/")).text == "hello"

    run(case())


def test_a_parser_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with the install line."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    async def case() -> None:
        with pytest.raises(InvalidArgument, match=r"mist-stack\[fast\]"):
            await AppServer(Site(), http="httptools").start()

    run(case())


def test_addresses_that_are_taken_and_servers_that_are_closed() -> None:
    """Both are errors of ours."""

    async def case() -> None:
        async with AppServer(Site()) as server:
            port = httpx.URL(server.url).port
            with pytest.raises(TransportError):
                await AppServer(Site(), port=port or 0).start()
        await server.close()
        with pytest.raises(Closed):
            await server.start()

    run(case())
