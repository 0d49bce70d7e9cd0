"""The pages about the tools: their files and commands run, in order, in a directory of their own."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from pathlib import Path

import pytest

from .shell import Shell

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["tutorials/first-stream.md", "how-to/ingest-traces.md", "how-to/run-an-eval.md", "reference/tokentrace.md", "reference/matchspec.md"]  # fmt: skip
BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files it shows are written, `sh` blocks are run by the command line and end with 0, Python blocks are executed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    shell = Shell(monkeypatch, "")
    for block in BLOCK.finditer((ROOT / "docs" / page).read_text(encoding="utf-8")):
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["body"])
        elif block["kind"] == "python":
            exec(compile(block["body"], page, "exec"), {"__name__": "example", "asyncio": asyncio})  # noqa: S102
        elif block["kind"] == "sh":
            for line in block["body"].splitlines():
                words = shlex.split(line)
                if words[0] == "rm":
                    for name in words[1:]:
                        (tmp_path / name).unlink()
                    continue
                assert words[0] == "mist", line
                done = shell.run(*words[1:])
                assert done.code == 0, (line, done.err)


def test_every_command_of_the_tools_is_documented_and_has_an_example() -> None:
    """The reference lists each verb; `--help` of each shows an example."""
    from mist.cli import demo, eval, trace

    for noun, module, page in (("trace", trace, "tokentrace"), ("eval", eval, "matchspec")):
        text = (ROOT / "docs" / "reference" / f"{page}.md").read_text(encoding="utf-8")
        for info in module.app.registered_commands:
            assert info.callback is not None
            verb = info.name or info.callback.__name__
            assert f"`mist {noun} {verb}" in text, verb
            assert f"mist {noun} {verb}" in (info.callback.__doc__ or ""), verb
    assert "mist demo" in (demo.command.__doc__ or "")
