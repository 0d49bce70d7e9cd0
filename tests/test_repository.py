"""The repository itself: two commands, one lock without hosts, a light import, documents without dead links."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scripts import check_links

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def normal(requirement: str) -> str:
    """A requirement's distribution name in the form the lock uses."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]).lower()


def pins() -> dict[str, str]:
    """name -> the lock's whole entry, hashes included."""
    entries = re.split(r"\n(?=\S)", LOCK.replace("\\\n", " "))
    return {normal(e): e for e in entries if not e.startswith("#")}


def files() -> list[Path]:
    """What is committed or about to be."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    out = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return [ROOT / name for name in out.split("\0") if name and (ROOT / name).is_file()]


def test_every_pin_of_the_lock_has_hashes_and_an_exact_version() -> None:
    """`pip install --require-hashes` needs both, for every line."""
    assert len(pins()) > 20
    for name, entry in pins().items():
        assert re.match(r"[A-Za-z0-9._-]+==[^\s;]+", entry), name
        assert "--hash=sha256:" in entry, name


def test_the_lock_names_no_host_and_no_place() -> None:
    """The lock works against any index: no URL, no index or links option, no path of one machine."""
    assert not re.search(r"https?:|file:|^-|--index|--find|--extra|--trusted|@ |/[a-z]+/", LOCK, re.MULTILINE)


def test_the_lock_covers_what_the_targets_use() -> None:
    """Core, the extras installed for tests, the build backend and all of the dev group are pinned."""
    project = PROJECT["project"]
    groups = PROJECT["dependency-groups"]
    wanted = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in ("server", "client", "fast"):
        wanted += project["optional-dependencies"][extra]
    for group in ("tests", "lint", "bench"):
        wanted += groups[group]
    assert {normal(r) for r in wanted} <= pins().keys()


def test_no_committed_file_names_a_registry_or_a_machine() -> None:
    """Paths of one machine and addresses of package indexes stay out of the repository."""
    bad = re.compile(rb"pypi\.org/simple|" + rb"index" + rb"-url\s*=|" + rb"(?<![\w.])/(?:work|root|home/\w+)/")
    offenders = [str(p.relative_to(ROOT)) for p in files() if bad.search(p.read_bytes())]
    assert offenders == []


def test_the_promised_targets_exist_and_help_lists_them() -> None:
    """`make help` needs nothing installed and lists every target of the contract."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    out = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    listed = set(re.findall(r"^  make (\S+)", out, re.MULTILINE))
    promised = {
        "demo",
        "test",
        "check",
        "campaign-ci",
        "campaign",
        "bench",
        "conform",
        "compose-test",
        "docs",
        "fmt",
        "lock",
        "clean",
    }
    assert promised <= listed


def test_ci_runs_the_three_gates() -> None:
    """`.ci/run` is executable, stops at the first failure, and runs check, test and campaign-ci."""
    script = ROOT / ".ci" / "run"
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in text
    assert re.findall(r"^make (\S+)$", text, re.MULTILINE) == ["check", "test", "campaign-ci"]


def test_the_changelog_knows_the_current_version() -> None:
    """The version that `import mist` states has a section, or the unreleased one stands for it."""
    import mist

    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[(?:Unreleased|{re.escape(mist.__version__)})\]", text, re.MULTILINE)


def test_importing_mist_loads_msgspec_and_the_standard_library_only() -> None:
    """A program that imports `mist` pays for nothing it did not ask for."""
    code = "import sys; before = set(sys.modules); import mist; print(*sorted(set(sys.modules) - before))"
    out = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}; {code}"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    loaded = {name.partition(".")[0] for name in out}
    assert {"mist", "msgspec"} <= loaded
    # msgspec itself takes typing_extensions where somebody installed it
    assert loaded - sys.stdlib_module_names - {"typing_extensions"} == {"mist", "msgspec"}


def test_all_is_sorted_and_every_name_is_there() -> None:
    """`mist.__all__` is the small public surface, sorted, and nothing in it is missing."""
    import mist

    assert list(mist.__all__) == sorted(mist.__all__)
    assert [n for n in mist.__all__ if not hasattr(mist, n)] == []


def test_no_document_has_a_dead_link() -> None:
    """Relative links and anchors of README, CHANGELOG and docs resolve."""
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert [line for d in documents for line in check_links.dead(ROOT, d)] == []


def test_the_link_check_sees_what_it_promises(tmp_path: Path) -> None:
    """A missing file, a missing heading and a link out of the tree are found; code is not looked at."""
    (tmp_path / "b.md").write_text('# A `b` c\n## Twice\n## Twice\n<a id="here"></a>\n')
    (tmp_path / "a.md").write_text(
        "[ok](b.md) [ok](b.md#a-b-c) [ok](b.md#twice-1) [ok](b.md#here) [ok](https://x.example/y) [ok](#top)\n"
        "# Top\n`[no](gone.md)`\n```\n[no](gone.md)\n```\n"
        "[x](gone.md)\n[x](b.md#nowhere)\n[x](../out.md)\n[ref]: lost.md\n"
    )
    found = list(check_links.dead(tmp_path, tmp_path / "a.md"))
    assert [line.split(": ", 1)[0] for line in found] == ["a.md:7", "a.md:8", "a.md:9", "a.md:10"]
    assert check_links.main(tmp_path) == 1


def test_every_decision_record_is_in_the_index_and_has_its_parts() -> None:
    """Each ADR states date and status, context, decision and consequences, and docs/adr/README.md lists it."""
    folder = ROOT / "docs" / "adr"
    index = (folder / "README.md").read_text()
    records = sorted(folder.glob("[0-9]*.md"))
    assert [int(r.name[:4]) for r in records] == list(range(1, len(records) + 1))
    for record in records:
        text = record.read_text()
        assert f"({record.name})" in index, record.name
        for part in ("| Date |", "| Status |", "## Context", "## Decision", "## Consequences"):
            assert part in text, f"{record.name}: {part}"
