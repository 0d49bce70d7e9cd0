"""Logging: the order of fields, trace ids, secrets, hostile text; the standard library's loggers included."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import msgspec
import pytest
from conftest import run
from hypothesis import given
from hypothesis import strategies as st

from mist.errors import InvalidArgument, Unavailable
from mist.kit.logging import Log, as_json, as_text, fields_of, in_trace, is_secret, open_log, redact_text, shown
from mist.kit.server import Answer, AppServer, Site, page
from mist.protocol.tracecontext import TraceContext

SPAN = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")


class Written:
    """A log into memory."""

    def __init__(self, format: Any = "json", level: Any = "info") -> None:
        self.stream = io.StringIO()
        self.log: Log = open_log("infermux", format=format, level=level, stream=self.stream)

    @property
    def text(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [msgspec.json.decode(line) for line in self.text]


@pytest.fixture
def written() -> Iterator[Written]:
    found = Written()
    yield found
    found.log.close()


def test_fields_come_in_the_order_of_the_go_library(written: Written) -> None:
    """time, level, msg, tool, the logger's, the call's, trace_id, span_id; the last two only in a span."""
    log = written.log.logger(zone="eu")
    with in_trace(SPAN):
        log.info("routed", provider="openai", took=timedelta(milliseconds=2))
    log.warning("later", error=Unavailable("down"))
    first, second = written.lines
    assert list(first) == ["time", "level", "msg", "tool", "zone", "provider", "took", "trace_id", "span_id"]
    assert first["time"].endswith("Z")
    assert first["time"][10] == "T"
    assert (first["level"], first["took"]) == ("INFO", 2_000_000)
    assert (first["trace_id"], first["span_id"]) == (SPAN.trace_id, SPAN.span_id)
    assert (second["level"], second["error"]) == ("WARN", "down")
    assert "trace_id" not in second


def test_the_level_changes_while_it_runs(written: Written) -> None:
    """For children too; another logger can have its own; an unknown one is an error."""
    child = written.log.logger().bind(part="x")
    child.debug("no")
    written.log.set_level("debug")
    child.debug("yes")
    logging.getLogger("mist.kit.health").debug("also")
    logging.getLogger("somebody.else").info("no")
    written.log.set_level("debug", logger="somebody")
    logging.getLogger("somebody.else").info("now")
    assert [line["msg"] for line in written.lines] == ["yes", "also", "now"]
    with pytest.raises(InvalidArgument):
        written.log.set_level("loud")  # type: ignore[arg-type]
    before = logging.getLogger("mist").level
    written.log.close()
    assert before == logging.DEBUG
    assert logging.getLogger("mist").level == logging.NOTSET
    logging.getLogger("mist").error("after")
    assert len(written.lines) == 3


def test_the_standard_library_goes_the_same_way(written: Written) -> None:
    """Our loggers, others' warnings, `extra`, exceptions; reserved names do not hide ours."""
    logging.getLogger("mist.transport.server").info("%s of %d", "one", 2, extra={"api_key": "k", "level": 3})
    logging.getLogger("uvicorn.error").warning("slow")
    try:
        raise ValueError("password=geheim")
    except ValueError:
        logging.getLogger("mist").exception("failed")
        written.log.logger().exception("failed too")
    first, second, third, fourth = written.lines
    assert (first["msg"], first["logger"], first["api_key"]) == ("one of 2", "mist.transport.server", "***")
    assert (first["level"], first["level_"]) == ("INFO", 3)
    assert (second["logger"], second["level"]) == ("uvicorn.error", "WARN")
    for line in (third, fourth):
        assert line["error"] == "ValueError: password=***"
        assert "test_the_standard_library" in line["stack"]
        assert "geheim" not in str(line)


@pytest.mark.parametrize(
    "key",
    ["authorization", "Authorization", "X-Auth-Token", "access_token", "password", "db.password", "api_key", "apiKey", "API-KEY",
     "client_secret", "clientSecret", "private_key", "Cookie", "set-cookie"],
)  # fmt: skip
def test_keys_of_secrets(key: str) -> None:
    """In any spelling, also inside of values; a whole structure goes."""
    assert is_secret(key)
    assert shown({"a": [{key: "geheim"}], key: {"inner": "geheim"}}) == {"a": [{key: "***"}], key: "***"}


@pytest.mark.parametrize(
    "key", ["tokens_in", "max_tokens", "token_ids_count", "keyboard", "monkey", "passed", "author"]
)
def test_keys_that_only_look_like_it(key: str) -> None:
    """Counts of tokens are what this platform is about: numbers stay, whatever the key."""
    assert shown({key: 17}) == {key: 17}


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("cannot reach nats://me:geheim@host:4222: refused", "geheim"),
        ("GET https://host/x?api_key=geheim&n=1 and redis://:geheim@h/0", "geheim"),
        ("Authorization: Bearer geheim.abc.def", "geheim"),
        ("header basic Z2VoZWltOng=", "Z2VoZWlt"),
        ("password=geheim user=x", "geheim"),
        ('{"api_key": "geheim", "n": 1}', "geheim"),
        ("OPENAI_API_KEY=sk-geheim0123456789", "geheim"),
        ("key sk-proj-geheim0123456789 was refused", "geheim"),
    ],
)
def test_secrets_in_text(text: str, secret: str) -> None:
    """Hidden, and the rest is still there."""
    hidden = redact_text(text)
    assert secret not in hidden
    assert "***" in hidden
    assert hidden.split()[0][:3] == text[:3]


@pytest.mark.parametrize(
    "text", ["prompt tokens: 5, cost=0.1", "see https://example.org/a?b=1", "user@example.org wrote", ""]
)
def test_text_without_secrets_stays(text: str) -> None:
    """As it was."""
    assert redact_text(text) == text


def test_hostile_text_is_one_line() -> None:
    """Line ends, escape sequences (C1 too), marks that turn text around; in both formats, in keys and values."""
    evil = 'a\n{"level":"ERROR"}\r\x1b[2J\x9b1m\u202e\u2028\ud800"\\ é'
    for format in ("json", "text"):
        written = Written(format)
        written.log.logger().info(evil, **{evil: evil})
        written.log.close()
        raw = written.stream.getvalue()
        assert raw.count("\n") == 1
        assert raw[:-1].isprintable()
        assert "é" in raw
        if format == "json":
            line = written.lines[0]
            assert line["msg"] == evil.replace("\ud800", "\\ud800")


def test_text_has_the_same_fields() -> None:
    """`key=value`, quoted where it has to be."""
    written = Written("text")
    written.log.logger().info("two words", n=1, empty="", yes=True, none=None, list=[1, "a"])
    written.log.close()
    text = written.text[0]
    assert text.startswith("time=2")
    assert text.partition(" ")[2] == (
        r'level=INFO msg="two words" tool=infermux n=1 empty="" yes=true none=null list="[1,\"a\"]"'
    )


class Nasty:
    def __str__(self) -> str:
        raise RuntimeError("no text")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just(Nasty()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.text(), st.dictionaries(st.text(), values, max_size=5))
def test_nothing_makes_it_fail(msg: str, found: dict[str, Any]) -> None:
    """Any text, any value: one printable line, and JSON where that was asked for."""
    record = logging.makeLogRecord({"name": "mist", "levelno": logging.INFO})
    line = fields_of("t", record, {"event": msg, **found})
    assert as_text(line).isprintable()
    text = as_json(line)
    assert text.isprintable()
    assert msgspec.json.decode(text)["tool"] == "t"


def test_bounds() -> None:
    """Long text is cut, deep structures and endless ones end, huge numbers are text."""
    loop: list[Any] = []
    loop.append(loop)
    assert len(shown("x" * 100_000)) < 20_000
    assert shown(2**70) == str(2**70)
    assert shown(float("nan")) == "nan"
    assert "..." in str(shown(loop))
    assert shown(b"\xff") == "\\xff"
    assert shown(Nasty()) == "<Nasty without text: RuntimeError>"


def test_what_cannot_be() -> None:
    """An unknown format is an error, not silently JSON."""
    with pytest.raises(InvalidArgument):
        open_log("t", format="xml")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument):
        open_log("t", level="loud")  # type: ignore[arg-type]


def test_without_structlog(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with the install line."""
    monkeypatch.setitem(sys.modules, "structlog", None)
    with pytest.raises(InvalidArgument, match=r"mist-stack\[logging\]"):
        open_log("t")


def test_a_request_runs_in_its_trace(written: Written) -> None:
    """The `traceparent` of a request is on what is logged for it, and on nothing else."""

    async def answer(scope: Any) -> Answer:
        logging.getLogger("mist.test").info("asked")
        return Answer(200, b"{}")

    async def case() -> None:
        async with AppServer(Site({"/": page(answer)})) as server, httpx.AsyncClient(trust_env=False) as client:
            await client.get(server.url + "/", headers={"traceparent": str(SPAN)})
            await client.get(server.url + "/")

    run(case())
    first, second = (line for line in written.lines if line["msg"] == "asked")
    assert first["trace_id"] == SPAN.trace_id
    assert "trace_id" not in second
