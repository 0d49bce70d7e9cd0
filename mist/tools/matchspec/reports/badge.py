"""An SVG badge: the verdict and the lowest score. No script, no font from elsewhere, no link."""

from __future__ import annotations

from xml.sax.saxutils import escape

from mist.tools.matchspec.reports.values import Report, printable

_CHAR = 7
_HEIGHT = 20
_LABEL_MAX = 40


def write(report: Report) -> str:
    scores = [g.score for g in report.grader_results if g.score is not None and g.threshold is not None]
    said = f"{report.verdict} {min(scores):.2f}" if scores else report.verdict
    label = printable(report.suite, _LABEL_MAX)
    left, right = (len(text) * _CHAR + 10 for text in (label, said))
    tint = "#2da44e" if report.ok else "#cf222e"
    name = escape(f"{label}: {said}", {'"': "&quot;"})
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="{_HEIGHT}" role="img" '
        f'aria-label="{name}"><title>{name}</title>'
        f'<rect width="{left}" height="{_HEIGHT}" fill="#444"/>'
        f'<rect x="{left}" width="{right}" height="{_HEIGHT}" fill="{tint}"/>'
        f'<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">'
        f'<text x="{left / 2:g}" y="14">{escape(label)}</text>'
        f'<text x="{left + right / 2:g}" y="14">{escape(said)}</text></g></svg>\n'
    )
