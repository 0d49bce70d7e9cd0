"""The reference pages of the tools are complete: every verb is in them, every verb's help shows an example.

That the pages' commands run is checked in tests/docs.
"""

from __future__ import annotations

from pathlib import Path

from mist.cli import demo, eval, trace

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_every_command_of_the_tools_is_documented_and_has_an_example() -> None:
    """The reference lists each verb; `--help` of each shows an example."""
    for noun, app, page in (("trace", trace.app, "tokentrace"), ("eval", eval.app, "matchspec")):
        text = (DOCS / "reference" / f"{page}.md").read_text(encoding="utf-8")
        for info in app.registered_commands:
            assert info.callback is not None
            verb = info.name or info.callback.__name__
            assert f"`mist {noun} {verb}" in text, verb
            assert f"mist {noun} {verb}" in (info.callback.__doc__ or ""), verb
    assert "mist demo" in (demo.command.__doc__ or "")
