"""The report as JSON: the documents' keys and ours, indented, with a line end."""

from __future__ import annotations

import msgspec

from mist.tools.matchspec.reports.values import Report


def write(report: Report) -> str:
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n"
