"""Every code block and command of the documents runs, page by page, in an empty directory of its own.

Fences marked `python` and `sh` run in order; what one block writes, the next ones of the page find. A fence that cannot run
here says why in its first line: ```sh needs: a Docker engine```. Those that say `needs: servers` run against a NATS and a
Redis server started for them, in place of localhost:4222 and localhost:6379, behind the page's earlier blocks of their
language. `<!-- setup: COMMAND -->` runs unseen. `mist demo` is a small one. What a block leaves running is there for the page's next ones and killed
behind the last. Other fences (text, json, toml, console output) are for reading only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import missing

from mist.testing.servers import run_nats, run_redis

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(
    r"^```(\w+)(?: +(needs: [^\n]+|fails: \d+))?\n(.*?)^```$|^<!-- setup: (.+?) -->$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    line: int
    language: str
    note: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The fences and set-up lines of a page, in order."""
    source = page.read_text()
    for m in _FENCE.finditer(source):
        line = source.count("\n", 0, m.start()) + 1
        if m[4]:
            yield Block(line, "sh", "", m[4])
        else:
            yield Block(line, m[1], m[2] or "", m[3])


SERVERS = "needs: servers"


def runnable(page: Path) -> list[Block]:
    return [b for b in blocks(page) if b.language in ("python", "sh") and not b.note.startswith("needs:")]


def for_servers(page: Path) -> list[Block]:
    return [b for b in blocks(page) if b.language in ("python", "sh") and b.note == SERVERS]


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    """The environment of a page: this checkout's `mist` first on the path, nothing of the user's configuration."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MIST_")}
    scripts = tmp_path / "bin"
    scripts.mkdir()
    # the demo's size is no matter of the pages, and half a minute of processor time
    demo = 'if [ "$1" = demo ]; then set -- "$@" --spans 1000 --questions 30; fi\n'
    for name, argv, first in (("mist", f"{sys.executable} -m mist", demo), ("python", sys.executable, "")):
        # a link would be a Python outside of its virtual environment
        (scripts / name).write_text(f'#!/bin/sh\n{first}exec {argv} "$@"\n')
        (scripts / name).chmod(0o755)
    env["PATH"] = f"{scripts}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env["PYTHONPATH"] = str(ROOT)
    env["HOME"] = str(tmp_path)
    env["XDG_CONFIG_HOME"] = str(tmp_path / "config")
    env["NO_COLOR"] = "1"
    env["MIST_EXAMPLES"] = "15"  # of the model, where a page runs the suites
    return env


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_of_the_page_runs(page: Path, place: dict[str, str], tmp_path: Path) -> None:
    """A reader who follows the page from top to bottom meets no error that the page does not announce."""
    if shutil.which("curl") is None and any(re.search(r"^curl ", b.text, re.MULTILINE) for b in runnable(page)):
        missing("curl is not installed")
    work = tmp_path / "work"
    work.mkdir()
    groups: list[int] = []
    try:
        for block in runnable(page):
            execute(page, block, block.text, work, place, groups)
    finally:
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def execute(
    page: Path, block: Block, text: str, work: Path, env: dict[str, str], groups: list[int] | None = None
) -> None:
    """Run one block; it has to end as the page says. Its process group is put into `groups`."""
    if block.language == "python":
        argv = [sys.executable, "-W", "error", "-c", text]
    else:
        argv = ["bash", "-euo", "pipefail", "-c", text]
    process = subprocess.Popen(
        argv, cwd=work, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=90)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if groups is not None:
        groups.append(process.pid)
    want = int(block.note.removeprefix("fails: ")) if block.note.startswith("fails:") else 0
    assert process.returncode == want, (
        f"{page.relative_to(ROOT)}:{block.line} ended with {process.returncode}, expected {want}\n"
        f"{text}\n--- stdout\n{out[-3000:]}\n--- stderr\n{err[-3000:]}"
    )


@pytest.mark.parametrize("page", [p for p in PAGES if for_servers(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_about_servers_runs(page: Path, place: dict[str, str], tmp_path: Path) -> None:
    """The blocks marked `needs: servers`, against real ones."""
    work = tmp_path / "work"
    work.mkdir()
    with run_nats(own_process=True) as nats, run_redis(own_process=True) as redis:
        for wanted in for_servers(page):
            text = "".join(
                b.text for b in blocks(page) if b.language == wanted.language == "python" and b.line < wanted.line
            )
            text += wanted.text
            for usual, server in (("localhost:4222", nats), ("localhost:6379", redis)):
                text = text.replace(usual, f"127.0.0.1:{server.port}")  # type: ignore[union-attr]
            execute(page, wanted, text, work, place)


def test_fences_name_their_language() -> None:
    """A fence without a language would escape this test."""
    for page in PAGES:
        inside = False
        for number, line in enumerate(page.read_text().splitlines(), 1):
            if line.startswith("```"):
                assert inside or line.strip() != "```", f"{page.relative_to(ROOT)}:{number}: a fence without a language"
                inside = not inside
