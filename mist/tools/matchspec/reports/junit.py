"""The report as JUnit XML: a test suite for the gate (one case per threshold) and one per harness and model (one case per
example). What XML 1.0 cannot hold is written as its escape, so that every reader takes the file.
"""

from __future__ import annotations

import re
from xml.sax.saxutils import escape

from mist.tools.matchspec.reports.values import Example, Report, number

_TEXT_MAX = 10_000
_UNFIT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write(report: Report) -> str:
    groups: dict[str, list[Example]] = {}
    for example in report.examples:
        groups.setdefault(example.place or report.suite, []).append(example)
    suites = [_gate(report), *(_suite(report, name, found) for name, found in groups.items())]
    tests = sum(n for n, _, _, _ in suites)
    failures = sum(n for _, n, _, _ in suites)
    errors = sum(n for _, _, n, _ in suites)
    body = "\n".join(text for _, _, _, text in suites)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<testsuites name={_attr(report.suite)} tests="{tests}" failures="{failures}" errors="{errors}" '
        f'time="{report.duration_seconds:.3f}">\n{body}\n</testsuites>\n'
    )


def _gate(report: Report) -> tuple[int, int, int, str]:
    cases = []
    failures = 0
    for grade in report.grader_results:
        if grade.threshold is None:
            continue
        where = " / ".join(dict.fromkeys(p for p in (grade.harness, grade.model) if p)) or report.suite
        name = f"{grade.name} >= {grade.threshold:.3f}"
        told = f"{number(grade.score)} [{number(grade.ci_lower)}, {number(grade.ci_upper)}] n={grade.size}"
        inner = f"<system-out>{_text(told)}</system-out>"
        if not grade.passed:
            failures += 1
            inner = f"<failure message={_attr(grade.why or 'below the threshold')}>{_text(told)}</failure>"
        cases.append(f"    <testcase classname={_attr(where)} name={_attr(name)}>{inner}</testcase>")
    told = "; ".join(report.reasons)
    inner = "" if report.ok else f"<failure message={_attr(told)}/>"
    failures += not report.ok
    cases.append(f'    <testcase classname={_attr(report.suite)} name="verdict">{inner}</testcase>')
    head = f'  <testsuite name="gate" tests="{len(cases)}" failures="{failures}" errors="0">'
    return len(cases), failures, 0, "\n".join([head, *cases, "  </testsuite>"])


def _suite(report: Report, name: str, examples: list[Example]) -> tuple[int, int, int, str]:
    errors = sum(1 for e in examples if e.error)
    failures = sum(1 for e in examples if not e.passed and not e.error)
    head = (
        f'  <testsuite name={_attr(name)} tests="{len(examples)}" failures="{failures}" errors="{errors}" '
        f"timestamp={_attr(report.started_at)}>"
    )
    return len(examples), failures, errors, "\n".join([head, *map(_case, examples), "  </testsuite>"])


def _case(example: Example) -> str:
    seconds = f' time="{example.latency_ms / 1000:.3f}"' if example.latency_ms is not None else ""
    name = example.id if not example.epoch else f"{example.id} #{example.epoch}"
    open_ = f"    <testcase classname={_attr(example.place)} name={_attr(name)}{seconds}"
    if example.error:
        return f"{open_}><error message={_attr(example.error)}/></testcase>"
    if example.passed:
        return f"{open_}/>"
    scores = ", ".join(f"{grader} {number(score)}" for grader, score in example.scores.items())
    told = f"expected: {example.expected[-_TEXT_MAX:]}\ngot: {example.output[-_TEXT_MAX:]}\nscores: {scores}"
    message = "; ".join(f"{g}: {r}" for g, r in example.reasons.items() if r) or f"scores {scores}"
    return f"{open_}><failure message={_attr(message)}>{_text(told)}</failure></testcase>"


def _fit(text: str) -> str:
    return _UNFIT.sub(lambda m: repr(m[0])[1:-1], text)


def _text(text: str) -> str:
    return escape(_fit(text), {"\r": "&#13;"})


def _attr(text: str) -> str:
    ends = {'"': "&quot;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;"}
    return f'"{escape(_fit(text[:_TEXT_MAX]), ends)}"'
