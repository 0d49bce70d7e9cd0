"""The generated pages are what their generator writes, and the index knows every page."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mist import errors
from mist.broker.base import Capabilities

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_reference", ROOT / "scripts/gen_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gen_reference"] = module
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(generator: ModuleType) -> None:
    """The committed pages are what the code says today."""
    for path, text in generator.generated().items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path.relative_to(ROOT)} differs from the code: run scripts/gen_reference.py"
        )


def test_every_error_class_stands_in_the_drawing(generator: ModuleType) -> None:
    """The tree in the docstring shows every class below its parent, and nothing that is not there."""
    drawn: list[tuple[int, str]] = []
    for line in generator.tree().splitlines():
        name = re.search(r"[A-Za-z]+", line)
        assert name is not None
        drawn.append((name.start() // 3, name[0]))
    parents: list[str] = []
    found = set()
    for depth, name in drawn:
        parents[depth:] = [name]
        cls = getattr(errors, name)
        assert cls.__bases__[0].__name__ == (parents[depth - 1] if depth else "Exception")
        found.add(name)
    assert found == {c.__name__ for c in generator.classes()}


def test_every_code_has_a_class_of_its_own(generator: ModuleType) -> None:
    """The table and the tree name the same codes; only `cancelled` has no class."""
    codes = [c.code for c in list(generator.classes())[1:]]
    assert len(codes) == len(set(codes))
    assert set(errors.CODES) - set(codes) == {"cancelled"}


def test_every_capability_is_explained(generator: ModuleType) -> None:
    """No row of the table of capabilities is empty."""
    rows = generator.capability_table([])[2:]
    assert len(rows) == len(Capabilities.__struct_fields__)
    assert all(len(row.split("|")[2].strip()) > 5 for row in rows)


def test_the_docs_index_links_every_page() -> None:
    """A page that nobody finds is not there: docs/README.md links each, except the decisions, which have their own."""
    docs = ROOT / "docs"
    index = (docs / "README.md").read_text(encoding="utf-8")
    linked = {os.path.normpath(target.partition("#")[0]) for target in re.findall(r"\]\(([^)]+)\)", index)}
    pages = {str(p.relative_to(docs)) for p in docs.rglob("*.md") if p.parent.name != "adr"} - {"README.md"}
    assert pages - linked == set()


def test_the_index_of_decisions_links_every_decision() -> None:
    """The same for docs/adr/README.md."""
    folder = ROOT / "docs/adr"
    index = (folder / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in sorted(folder.glob("0*.md")) if f"({p.name})" not in index] == []


def test_generator_explains_itself(generator: ModuleType) -> None:
    """Its docstring names the two ways to call it."""
    assert "--check" in inspect.cleandoc(generator.__doc__ or "")
