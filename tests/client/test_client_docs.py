"""The Python programs in the pages about publishing, reading and consuming run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["how-to/publish.md", "how-to/replay.md", "how-to/checkpoint.md", "how-to/consume.md"]
PROGRAMS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL), 1)
]


@pytest.mark.parametrize("block", PROGRAMS)
def test_the_programs_of_the_pages_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in an empty directory, from top to bottom, with its own assertions."""
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs", "exec"), {"__name__": "__main__"})  # noqa: S102 - our own pages
