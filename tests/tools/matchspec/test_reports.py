"""Reports: every format says the same, and what a model wrote stays text in all of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mist.errors import InvalidArgument
from mist.tools.matchspec.reports import FORMATS, Example, Grade, Report, badge, render
from mist.tools.matchspec.reports.markdown import code, heading

EVIL = (
    "</pre><script>alert(1)</script>\x1b[31m `` | @team ![x](http://evil/x) \x00\ud800 \u202e ]]> &amp; 'q' \"d\"\n## h"
)


def xml(text: str | bytes) -> ElementTree.Element:
    return ElementTree.fromstring(text)  # noqa: S314 - our own writing


def example(number: int, *, passed: bool = False, text: str = "no", error: str = "") -> Example:
    return Example(
        id=f"q{number}", input=text, expected="yes", output=text, scores={"exact": float(passed)}, passed=passed,
        reasons={} if passed else {"exact": text}, model="small", harness="small", error=error, latency_ms=12.0,
    )  # fmt: skip


def report(text: str = "no", failed: int = 7, **more: object) -> Report:
    grade = Grade(
        name="exact", score=0.3, threshold=0.8, passed=False, n=10, ci_lower=0.1, ci_upper=0.6, model="small",
        harness="small", passed_n=3, baseline_score=0.4, delta=-0.1, p_value=0.04, why=text,
    )  # fmt: skip
    examples = [example(i, text=text) for i in range(failed)] + [example(100, passed=True), example(101, error=text)]
    return Report(
        run_id="run-1", suite="capitals", status="failed", verdict="FAIL", started_at="2026-01-31T12:00:00Z",
        finished_at="2026-01-31T12:00:02Z", duration_seconds=2.0, grader_results=[grade], examples=examples,
        model_errors=1, reasons=["exact: 0.300 is below 0.800"], total=10, completed=10, passed=3, failed=failed, **more,
    )  # type: ignore[arg-type]  # fmt: skip


def test_the_text_has_a_row_per_grader_and_the_first_five_failures() -> None:
    text = render(report(), "text")
    assert "  exact  0.300  ✗ (≥0.800)  [0.100, 0.600]  3 of 10  DELTA -0.500  baseline 0.400 -0.100 (p=0.04)" in text
    assert "failing examples (5 of 7):" in text
    assert '  q4: expected "yes", got "no" (exact: no)' in text
    assert "q5" not in text
    assert "and 2 more; --show-all-failures shows them" in text
    assert "model_errors 1 of 10" in text
    assert text.endswith("FAIL\n")
    assert "q6" in render(report(), "text", show_all=True)
    assert "passing examples (1):" in render(report(), "text", show_passing=True)


def test_the_text_is_plain_where_the_terminal_is() -> None:
    plain = render(report("ä"), "text", ascii=True)
    assert plain.isascii()
    assert "FAIL (>=0.800)" in plain
    assert "\x1b" not in plain
    assert "\x1b[31m" in render(report(), "text", color=True)


def test_no_format_obeys_what_a_model_wrote() -> None:
    """Nothing for a terminal, no element, no attribute, no mention, no link; and every parser takes the file."""
    found = report(EVIL)
    text = render(found, "text", show_all=True)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    html = render(found, "html")
    assert html.count("<script") == 1
    assert html.count("</pre>") == html.count("<pre>")
    assert "\x1b" not in html
    tree = xml(render(found, "junit").encode())
    assert {e.tag for e in tree.iter()} <= {"testsuites", "testsuite", "testcase", "failure", "error", "system-out"}
    outside = re.sub(r"(`+)( ?).*?(?<!`)\1(?!`)", "", render(found, "markdown"))
    assert "@team" not in outside
    assert "http" not in outside
    assert "<script" not in outside
    drawing = xml(badge.write(msgspec.structs.replace(found, suite=EVIL)))
    assert {e.tag.rpartition("}")[2] for e in drawing.iter()} == {"svg", "title", "rect", "g", "text"}


@given(st.text(max_size=60))
@settings(max_examples=50)
def test_any_text_stays_one_code_span_and_well_formed_xml(text: str) -> None:
    span = code(text)
    fence = re.match("`+", span)
    assert fence is not None
    inner = span[len(fence[0]) : -len(fence[0])]
    assert "\n" not in span
    assert max(map(len, re.findall("`+", inner)), default=0) != len(fence[0])
    xml(render(report(text, failed=1), "junit").encode())


class _Loads(HTMLParser):
    """Collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            (tag, name) for name, _ in attrs if name in ("src", "href", "action", "srcset") or name.startswith("on")
        ]


def test_the_html_file_asks_for_nothing_and_its_policy_allows_nothing_else() -> None:
    html = render(report(EVIL), "html")
    reader = _Loads()
    reader.feed(html)
    assert reader.found == []
    policy = re.search('Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1]


BROWSER = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_html_file_works_in_a_browser(tmp_path: Path) -> None:
    """Its script runs under its own policy (the count is written), and what a model wrote does not."""
    place = tmp_path / "r.html"
    place.write_text(render(report(EVIL), "html"), errors="replace")
    argv = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", place.as_uri()]
    dom = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout
    assert ">8 of 9</small>" in dom


def test_junit_counts_what_it_holds() -> None:
    tree = xml(render(report(), "junit").encode())
    cases = tree.findall(".//testcase")
    assert (tree.get("tests"), tree.get("failures"), tree.get("errors")) == (str(len(cases)), "9", "1")
    assert len(cases) == 2 + 9  # a threshold and the verdict; seven failures, one pass, one error
    assert len(tree.findall(".//failure")) == 9


def test_a_passing_report_has_no_failure_in_it() -> None:
    good = Report(
        run_id="r", suite="s", status="passed", verdict="PASS", started_at="", finished_at="", duration_seconds=0,
        grader_results=[Grade(name="exact", score=1.0, threshold=0.9, passed=True, n=40, ci_lower=0.91, ci_upper=1)],
        examples=[example(1, passed=True)], model_errors=0, total=1, completed=1, passed=1,
    )  # fmt: skip
    assert "<failure" not in render(good, "junit")
    assert "✓ (≥0.900)" in render(good, "text")
    assert "❌" not in render(good, "markdown")
    assert "PASS 1.00" in badge.write(good)


def test_clusters_are_told_wherever_a_reader_sees_how_many_samples_there_were() -> None:
    found = report()
    rows = [replace(g, clusters=3) for g in found.grader_results]
    for format in ("text", "junit", "markdown", "html"):
        assert "in 3 clusters" in render(replace(found, grader_results=rows), format)
        assert "clusters" not in render(found, format)
    assert "bootstrap over clusters" in render(replace(found, grader_results=rows), "html")


def test_json_has_the_documents_keys() -> None:
    found = msgspec.json.decode(render(report(), "json"))
    assert {
        "run_id", "status", "suite", "started_at", "finished_at", "duration_seconds", "verdict", "grader_results",
        "examples", "model_errors",
    } <= set(found)  # fmt: skip
    assert {"name", "score", "threshold", "passed", "n", "ci_lower", "ci_upper"} <= set(found["grader_results"][0])
    assert {"id", "input", "expected", "output", "scores", "passed"} <= set(found["examples"][0])


def test_markdown_is_found_by_its_heading() -> None:
    first = render(report(), "markdown").splitlines()[0]
    assert first == heading("capitals") == "## MatchSpec: `capitals`"


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="pdf"):
        render(report(), "pdf")
    assert set(FORMATS) == {"text", "json", "junit", "markdown", "html"}
