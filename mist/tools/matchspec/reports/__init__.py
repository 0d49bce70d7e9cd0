"""Reports of a run: the same values as text, JSON, JUnit XML, Markdown, one HTML file, and a badge.

`render` gives the text of a format. Everything a model, a data set or a server said is untrusted: each format escapes it
in its own way, and none lets it become markup, a link, a mention or a terminal's control sequence. Reports are pure: no
clock, no files, no network; the same report gives the same bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from mist.errors import InvalidArgument
from mist.tools.matchspec.reports.values import Example, Grade, Report

__all__ = ["FORMATS", "Example", "Grade", "Report", "render"]

FORMATS = {"text": "txt", "json": "json", "junit": "xml", "markdown": "md", "html": "html"}
"""Format -> how its files end."""


def render(report: Report, format: str, **options: Any) -> str:
    """The report in this format. `options` are those of its module. Raises InvalidArgument for an unknown format."""
    if format not in FORMATS:
        raise InvalidArgument(f"no report format {format[:40]!r}", hint=f"one of {', '.join(FORMATS)}")
    write: Callable[..., str] = importlib.import_module(f"{__name__}.{format}").write
    return write(report, **options)
