"""Rendering: escapes, widths, colours, progress, and writes that the system cuts short."""

from __future__ import annotations

import io
import sys
from typing import Any

import msgspec
import pytest

from mist.cli import render
from mist.cli.render import Output, cell, clip, csv_lines, escape, moment, width
from mist.errors import NotFound, TooLarge


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_escaping_and_widths() -> None:
    """Whatever a terminal would act upon is shown instead; wide characters take two columns."""
    assert escape("a\x1b[31mb\n\t\r\x00\x9b\u202e\U000e0001") == "a\\x1b[31mb\\n\\t\\r\\x00\\x9b\\u202e\\U000e0001"
    assert escape("é漢字 ok") == "é漢字 ok"
    assert (width("abc"), width("漢字"), width("e\u0301")) == (3, 4, 1)
    assert (clip("abcdef", 4), clip("漢字漢字", 5), clip("abc", 3)) == ("abc…", "漢字…", "abc")
    assert (cell(None), cell(True), cell(1.50), cell([1]), cell({"a": 1})) == ("-", "yes", "1.5", "[1]", '{"a":1}')


def test_moments_are_never_rounded_or_crash() -> None:
    """Milliseconds are cut, not rounded; times out of range are numbers."""
    assert moment(1_700_000_000_999_999_999) == "2023-11-14T22:13:20.999Z"
    assert moment(0) == "-"
    assert moment(2**63 - 1) == "2262-04-11T23:47:16.854Z"
    assert moment(10**25) == str(10**25)


def test_csv_quotes() -> None:
    """Commas, quotes and line breaks survive; null is empty."""
    assert csv_lines([["a,b", 'q"', "x\ny", None, 1, True]]) == '"a,b","q""","x\ny",,1,True\n'


@pytest.mark.parametrize(
    ("terminal", "env", "colour"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "0"}, False),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colour(monkeypatch: pytest.MonkeyPatch, terminal: bool, env: dict[str, str], colour: bool) -> None:
    """Only a terminal gets it, unless it is forced; NO_COLOR wins over everything."""
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "stdout", Terminal() if terminal else io.StringIO())
    assert Output().color is colour


def out(monkeypatch: pytest.MonkeyPatch, **kw: Any) -> tuple[Output, io.BytesIO, io.StringIO]:
    raw, err = io.BytesIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, write_through=True))
    monkeypatch.setattr(sys, "stderr", err)
    return Output(**kw), raw, err


def test_every_format_of_rows_and_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """One list and one object in five formats."""
    rows = [{"a": 1, "b": "x\x1b"}, {"a": 10, "b": None}]
    expected = {
        "table": b" a  b\n 1  x\\x1b\n10  -\n",
        "json": b'[\n  {\n    "a": 1,\n    "b": "x\\u001b"\n  },\n  {\n    "a": 10,\n    "b": null\n  }\n]\n',
        "jsonl": b'{"a":1,"b":"x\\u001b"}\n{"a":10,"b":null}\n',
        "csv": b"a,b\n1,x\x1b\n10,\n",
        "raw": b"1\n10\n",
    }
    for format, want in expected.items():
        output, raw, _ = out(monkeypatch, format=format)
        output.rows(rows, ["a", "b"])
        output.flush()
        assert raw.getvalue() == want, format
    output, raw, err = out(monkeypatch, format="csv")
    output.rows([], ["a", "b"], empty="nothing")
    output.flush()
    assert (raw.getvalue(), err.getvalue()) == (b"a,b\n", "nothing\n")


def test_errors_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """what. why. next step, on one line, with control characters escaped; JSON has the code."""
    output, _, err = out(monkeypatch)
    output.error(NotFound("no \x07stream", hint="make it"))
    assert err.getvalue() == "error: no \\x07stream. make it\n"
    output, _, err = out(monkeypatch, format="json")
    output.error(TooLarge("it", size_bytes=2, size_bytes_max=1))
    assert msgspec.json.decode(err.getvalue())["error"]["code"] == "too_large"


class Short(io.RawIOBase):
    """A descriptor that takes a few bytes at a time, and now and then says that it would block."""

    def __init__(self) -> None:
        self.taken = bytearray()
        self.calls = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int | None:
        self.calls += 1
        if self.calls % 3 == 0:
            return None
        self.taken += bytes(data[:7])
        return min(7, len(data))


def test_short_writes_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unbuffered stdout may take a part of a write; the rest is written too."""

    class Stdout(io.StringIO):
        buffer = Short()

    monkeypatch.setattr(sys, "stdout", Stdout())
    monkeypatch.setattr(render.select, "select", lambda *a: ([], [], []))
    output = Output()
    data = bytes(range(256)) * 10
    output.write(data)
    output.flush()
    assert bytes(Stdout.buffer.taken) == data


def test_progress_speaks_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing before a second; a bar on a terminal, a line every five seconds with -v elsewhere, nothing with -q."""
    clock = [0.0]
    monkeypatch.setattr(render.time, "monotonic", lambda: clock[0])
    output, _, err = out(monkeypatch, verbose=True)
    with output.progress("copying", 100) as progress:
        for second in (0.5, 1.5, 3.0, 7.0):
            clock[0] = second
            progress.at(int(second * 10))
    assert err.getvalue().splitlines() == [
        "copying: [###                     ]  15% 15 of 100 (10/s)",
        "copying: [################        ]  70% 70 of 100 (10/s)",
    ]
    monkeypatch.setattr(sys, "stderr", Terminal())
    for quiet in (False, True):
        clock[0] = 0.0
        output = Output(quiet=quiet)
        with output.progress("copying") as progress:
            clock[0] = 2.0
            progress.at(50)
        shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
        assert ("\r\x1b[K" in shown and "copying: 50 (25/s)" in shown) or quiet
    output, _, err = out(monkeypatch)
    with output.progress("copying") as progress:
        clock[0] = 20.0
        progress.at(50)
    assert err.getvalue() == ""
