"""The report for a terminal: one row per grader, then what failed, then why the verdict is what it is."""

from __future__ import annotations

from mist.tools.matchspec.reports.values import Example, Grade, Report, failing, number, printable

FAILING = 5
"""Failing examples that are shown unless all are asked for."""
_CUT = 120
_GREEN, _RED, _YELLOW, _END = "\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[0m"


def write(
    report: Report, *, show_all: bool = False, show_passing: bool = False, color: bool = False, ascii: bool = False
) -> str:
    """`ascii`: for terminals without Unicode. `color` is the caller's to decide (NO_COLOR, not a terminal)."""
    marks = ("ok", "FAIL", ">=") if ascii else ("✓", "✗", "≥")
    lines = [f"suite {printable(report.suite)}  run {printable(report.run_id)}"]
    several = len({(g.harness, g.model) for g in report.grader_results}) > 1
    width = max((len(_name(g, several)) for g in report.grader_results), default=0)
    lines += [_row(g, several, width, marks, color) for g in report.grader_results]
    lines += _examples(report, show_all)
    if show_passing:
        good = [e for e in report.examples if e.passed]
        lines += ["", f"passing examples ({len(good)}):", *(f"  {printable(e.id)}: {_got(e)}" for e in good)]
    lines.append("")
    if report.model_errors:
        lines.append(f"model_errors {report.model_errors} of {report.total}")
    lines.append(_spent(report))
    lines += [_tint(f"warning: {printable(w)}", _YELLOW, color) for w in report.warnings]
    lines += [f"reason: {printable(reason)}" for reason in report.reasons]
    lines.append(_tint(report.verdict, _GREEN if report.ok else _RED, color))
    text = "\n".join(lines) + "\n"
    return text.encode("ascii", "backslashreplace").decode() if ascii else text


def _name(grade: Grade, several: bool) -> str:
    where = " / ".join(dict.fromkeys(p for p in (grade.harness, grade.model) if p)) if several else ""
    return printable(f"{where}: {grade.name}" if where else grade.name)


def _row(grade: Grade, several: bool, width: int, marks: tuple[str, str, str], color: bool) -> str:
    good, bad, at_least = marks
    mark = (
        " "
        if grade.threshold is None
        else _tint(good if grade.passed else bad, _GREEN if grade.passed else _RED, color)
    )
    wanted = "" if grade.threshold is None else f" ({at_least}{grade.threshold:.3f})"
    line = f"  {_name(grade, several):<{width}}  {number(grade.score)}  {mark}{wanted}"
    line += f"  [{number(grade.ci_lower)}, {number(grade.ci_upper)}]  {_of(grade)}"
    if grade.metric != "pass_rate":
        line += f"  {grade.metric}"
    if grade.errors:
        line += f"  errors={grade.errors}"
    if not grade.passed and grade.threshold is not None and grade.score is not None:
        line += f"  DELTA {grade.score - grade.threshold:+.3f}"
    if grade.delta is not None:
        line += f"  baseline {number(grade.baseline_score)} {grade.delta:+.3f}"
        line += "" if grade.p_value is None else f" (p={grade.p_value:.3g})"
    return line


def _of(grade: Grade) -> str:
    """How many passed, where that is what the score says."""
    if grade.score is not None and grade.metric == "pass_rate" and grade.passed_n == round(grade.score * grade.n, 6):
        return f"{grade.passed_n} of {grade.size}"
    return f"n={grade.size}"


def _examples(report: Report, show_all: bool) -> list[str]:
    shown = failing(report, 0 if show_all else FAILING)
    if not shown:
        return []
    several = len({e.place for e in shown}) > 1
    more = report.failed - len(shown)
    lines = ["", f"failing examples ({len(shown)} of {report.failed}):"]
    lines += [f"  {printable(f'{e.place}: ' if several else '')}{printable(e.id)}: {_got(e)}" for e in shown]
    if more > 0:
        lines.append(f"  and {more} more" + ("" if show_all else "; --show-all-failures shows them"))
    return lines


def _got(example: Example) -> str:
    if example.error:
        return f"error: {printable(example.error, _CUT)}"
    # the answer stands at the end of a text more often than at its beginning
    said = "; ".join(f"{name}: {reason}" for name, reason in example.reasons.items() if reason)
    line = f"expected {_tail(example.expected)}, got {_tail(example.output)}"
    return line + (f" ({printable(said, _CUT)})" if said else "")


def _tail(text: str) -> str:
    text = text.strip()
    return '"' + printable(text if len(text) <= _CUT else "…" + text[1 - _CUT :]) + '"'


def _spent(report: Report) -> str:
    parts = [f"{report.passed} of {report.total} samples passed", f"{report.duration_seconds:.1f} s"]
    if report.tokens_in is not None or report.tokens_out is not None:
        parts.append(f"{report.tokens_in or 0:,} tokens in, {report.tokens_out or 0:,} out")
    if report.cost_usd is not None:
        unknown = f" and {report.cost_unknown} calls of unknown cost" if report.cost_unknown else ""
        parts.append(f"${report.cost_usd:.6g}{unknown}")
    return ", ".join(parts)


def _tint(text: str, tint: str, color: bool) -> str:
    return f"{tint}{text}{_END}" if color else text
