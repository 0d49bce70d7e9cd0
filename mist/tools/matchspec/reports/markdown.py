"""The report as Markdown, made for one comment on a pull request: its first line is a heading by which a script finds the
comment to update. What others wrote stands in code spans only, where it cannot mention, link, load or format anything.
"""

from __future__ import annotations

import re

from mist.tools.matchspec.reports.values import Example, Grade, Report, failing, number, printable

FAILING = 5
_CUT = 200


def write(report: Report, *, show_all: bool = False) -> str:
    lines = [heading(report.suite), ""]
    lines.append(f"**{report.verdict}** {report.passed} of {report.total} samples passed, run {code(report.run_id)}")
    lines += ["", "| | grader | score | interval | n | threshold | baseline |", "|---|---|---|---|---|---|---|"]
    several = len({(g.harness, g.model) for g in report.grader_results}) > 1
    lines += [_row(g, several) for g in report.grader_results]
    if report.reasons:
        lines += ["", *(f"- {code(reason)}" for reason in report.reasons)]
    if report.warnings:
        lines += ["", *(f"- warning: {code(text)}" for text in report.warnings)]
    if report.model_errors:
        lines += ["", f"model_errors {report.model_errors} of {report.total}"]
    shown = failing(report, 0 if show_all else FAILING)
    if shown:
        lines += ["", f"<details><summary>failing examples ({len(shown)} of {report.failed})</summary>", ""]
        lines += [_example(e) for e in shown]
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def heading(suite: str) -> str:
    """The first line of the report, the same for every run of a suite."""
    return f"## MatchSpec: {code(suite)}"


def _row(grade: Grade, several: bool) -> str:
    mark = "" if grade.threshold is None else "✅" if grade.passed else "❌"
    where = " / ".join(dict.fromkeys(p for p in (grade.harness, grade.model) if p)) if several else ""
    name = code(f"{where}: {grade.name}" if where else grade.name, table=True)
    wanted = "" if grade.threshold is None else f"≥ {grade.threshold:.3f}"
    before = "" if grade.delta is None else f"{number(grade.baseline_score)} ({grade.delta:+.3f}"
    before += "" if grade.delta is None else ")" if grade.p_value is None else f", p={grade.p_value:.3g})"
    interval = f"{number(grade.ci_lower)} – {number(grade.ci_upper)}"
    return f"| {mark} | {name} | {number(grade.score)} | {interval} | {grade.size} | {wanted} | {before} |"


def _example(example: Example) -> str:
    name = code(f"{example.place}: {example.id}" if example.place else example.id)
    if example.error:
        return f"- {name}: error {code(example.error)}"
    return f"- {name}: expected {code(example.expected)}, got {code(example.output)}"


def code(text: str, *, table: bool = False) -> str:
    """A code span that holds this text and nothing else, on one line."""
    text = text.strip()
    text = printable(text if len(text) <= _CUT else "…" + text[1 - _CUT :])
    if table:
        text = text.replace("|", "\\|")  # the one thing a table reads inside a code span
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if not text or text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"
