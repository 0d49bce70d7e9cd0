"""The reference pages of the tools are complete: every verb is in them, every verb's help shows an example.

That the pages' commands run is checked in tests/docs.
"""

from __future__ import annotations

from pathlib import Path

from mist.cli import demo, eval, infer, trace
from mist.tools.tokentrace import bare
from mist.tools.tokentrace.alerts.api import AlertApi
from mist.tools.tokentrace.api import Api, Query
from mist.tools.tokentrace.readers import Readers

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_every_command_of_the_tools_is_documented_and_has_an_example() -> None:
    """The reference lists each verb; `--help` of each shows an example."""
    for noun, app, page in (
        ("trace", trace.app, "tokentrace"),
        ("eval", eval.app, "matchspec"),
        ("infer", infer.app, "infermux"),
    ):
        text = (DOCS / "reference" / f"{page}.md").read_text(encoding="utf-8")
        for info in app.registered_commands:
            assert info.callback is not None
            verb = info.name or info.callback.__name__
            assert f"`mist {noun} {verb}" in text, verb
            assert f"mist {noun} {verb}" in (info.callback.__doc__ or ""), verb
    assert "mist demo" in (demo.command.__doc__ or "")


def test_every_route_and_parameter_is_in_the_reference(tmp_path: Path) -> None:
    """The doors of the questions, of spans and of alerts; the filters of the questions."""
    text = (DOCS / "reference" / "tokentrace.md").read_text(encoding="utf-8")
    place = tmp_path / "t.db"
    for route in (*Api(Readers(place)).doors(), *AlertApi(place, ()).doors(), bare.PATH):
        assert f" {route}" in text, route
    query = Query(b"", 0)
    query.where()
    for name in (*query._known, "limit", "cursor", "groupby", "bucket", "tree"):
        assert f"`{name}" in text or f"{name}=" in text, name
