"""The report as one HTML file: nothing is loaded from anywhere, everything others wrote is escaped, and a policy in the
file itself forbids every script and style but the ones below (by their digest), every request, frame and form.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape

from mist.tools.matchspec.reports.values import Example, Grade, Report, number

CHARS_MAX = 20_000
"""Of each text in the table; the stream has the whole."""

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #8884; }
th[data-sort] { cursor: pointer; }
td pre { margin: 0; max-height: 12rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85em; }
.pass { color: #1a7f37; } .fail { color: #cf222e; } .verdict { font-weight: bold; }
input[type=search] { width: 20rem; max-width: 100%; padding: .3rem; }
small { color: #777; }
"""

_SCRIPT = """
const rows = [...document.querySelectorAll('#examples tbody tr')];
const find = document.getElementById('find'), only = document.getElementById('only');
const shown = document.getElementById('shown');
const texts = rows.map(r => r.textContent.toLowerCase());
function filter() {
  const words = find.value.toLowerCase();
  let n = 0;
  rows.forEach((r, i) => {
    r.hidden = (only.checked && r.dataset.passed === '1') || !texts[i].includes(words);
    n += !r.hidden;
  });
  shown.textContent = n + ' of ' + rows.length;
}
find.addEventListener('input', filter);
only.addEventListener('change', filter);
document.querySelectorAll('#examples th[data-sort]').forEach((head, column) => {
  let down = false;
  head.addEventListener('click', () => {
    down = !down;
    const value = r => r.cells[column].dataset.value ?? r.cells[column].textContent;
    const order = (a, b) => value(a).localeCompare(value(b), undefined, {numeric: true});
    const body = document.querySelector('#examples tbody');
    [...rows].sort((a, b) => down ? order(a, b) : order(b, a)).forEach(r => body.append(r));
  });
});
filter();
"""


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


POLICY = (
    f"default-src 'none'; script-src '{_digest(_SCRIPT)}'; style-src '{_digest(_STYLE)}'; "
    "base-uri 'none'; form-action 'none'"
)


def write(report: Report) -> str:
    tone = "pass" if report.ok else "fail"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">',
        f"<title>{_e(report.suite)}: {_e(report.verdict)}</title><style>{_STYLE}</style></head><body>",
        f'<h1>{_e(report.suite)}: <span class="verdict {tone}">{_e(report.verdict)}</span></h1>',
        (
            f"<p>run {_e(report.run_id)}, started {_e(report.started_at)}, {report.duration_seconds:.1f} s, "
            f"{report.passed} of {report.total} samples passed, {report.model_errors} errors</p>"
        ),
        *_list("reasons", report.reasons, "fail"),
        *_list("warnings", report.warnings, ""),
        *_grades(report),
        *_examples(report),
        f"<script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _list(what: str, texts: list[str], tone: str) -> list[str]:
    if not texts:
        return []
    return [f'<ul class="{tone}" aria-label="{what}">', *(f"<li>{_e(text)}</li>" for text in texts), "</ul>"]


def _grades(report: Report) -> list[str]:
    heads = "harness", "model", "grader", "score", "interval", "n", "errors", "threshold", "baseline", "delta", "p"
    return [
        "<table><thead><tr>" + "".join(f"<th>{h}</th>" for h in heads) + "</tr></thead><tbody>",
        *map(_grade, report.grader_results),
        (
            f"</tbody></table><p><small>Intervals at {report.confidence:.0%}: {_intervals(report)}. "
            f"The gate compares the {'lower limit' if report.use_lower_bound else 'score'}.</small></p>"
        ),
    ]


def _intervals(report: Report) -> str:
    if any(g.clusters is not None for g in report.grader_results):
        return "bootstrap over clusters of samples"
    return "Wilson's for rates, bootstrap for means"


def _grade(grade: Grade) -> str:
    tone = "" if grade.threshold is None else "pass" if grade.passed else "fail"
    cells = (
        grade.harness, grade.model, grade.name, f"{number(grade.score)} ({grade.metric})",
        f"{number(grade.ci_lower)} to {number(grade.ci_upper)}", grade.size, str(grade.errors),
        number(grade.threshold), number(grade.baseline_score), number(grade.delta), number(grade.p_value),
    )  # fmt: skip
    return f'<tr class="{tone}" title="{_e(grade.why)}">' + "".join(f"<td>{_e(c)}</td>" for c in cells) + "</tr>"


def _examples(report: Report) -> list[str]:
    heads = "verdict", "where", "id", "score", "input", "expected", "output", "reasons"
    left = f" {report.examples_left_out} more are not in this file." if report.examples_left_out else ""
    return [
        (
            '<p><input id="find" type="search" placeholder="filter" aria-label="filter"> '
            f'<label><input id="only" type="checkbox" checked> failed only</label> <small id="shown"></small>{left}</p>'
        ),
        '<table id="examples"><thead><tr>'
        + "".join(f'<th data-sort scope="col">{h}</th>' for h in heads)
        + "</tr></thead><tbody>",
        *map(_example, report.examples),
        "</tbody></table>",
    ]


def _example(e: Example) -> str:
    tone = "pass" if e.passed else "fail"
    known = [s for s in e.scores.values() if s is not None]
    scores = ", ".join(f"{name} {number(score)}" for name, score in e.scores.items())
    reasons = [e.error] if e.error else [f"{name}: {reason}" for name, reason in e.reasons.items() if reason]
    ident = f"{e.id} #{e.epoch}" if e.epoch else e.id
    word = "error" if e.error else tone
    return (
        f'<tr data-passed="{int(e.passed)}"><td class="{tone}">{word}</td><td>{_e(e.place)}</td><td>{_e(ident)}</td>'
        f'<td data-value="{sum(known) / len(known) if known else -1:.6f}">{_e(scores)}</td>'
        f"<td>{_pre(e.input)}</td><td>{_pre(e.expected)}</td><td>{_pre(e.output)}</td><td>{_e('; '.join(reasons))}</td></tr>"
    )


def _pre(text: str) -> str:
    cut = f"{text[:CHARS_MAX]}… ({len(text)} characters)" if len(text) > CHARS_MAX else text
    return f"<pre>{_e(cut)}</pre>"


def _e(text: str) -> str:
    # HTML has no way to write a control character: they are shown as escapes
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    return escape(text)
