"""MatchSpec in pytest: the fixture `matchspec`, and suites as tests with `--matchspec FILE`.

    def test_capital(matchspec):
        matchspec.assert_sample(ask("Capital of France?"), "Paris", grader="contains")

Pytest loads its plug-ins in every run of an environment, so this one is a package of its own beside `mist`: loading it
imports nothing, and what it does is imported when it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mist.tools.matchspec.asserting import MatchSpec
    from mist.tools.matchspec.suite import Suite


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("matchspec", "evals")
    group.addoption(
        "--matchspec",
        action="append",
        default=[],
        metavar="FILE",
        help="run the suites of this file as tests (repeatable)",
    )


@pytest.fixture(scope="session")
def matchspec() -> MatchSpec:
    """Judges single outputs, and runs suites: see mist.tools.matchspec.asserting."""
    from mist.tools.matchspec.asserting import MatchSpec

    return MatchSpec()


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in config.getoption("--matchspec"):
        # not through the collection by arguments: a suite's file may be of any kind, and lie anywhere
        file: pytest.File = SuiteFile.from_parent(session, path=(config.invocation_params.dir / name).resolve())
        items.extend(item for item in file.collect() if isinstance(item, pytest.Item))


class SuiteFile(pytest.File):
    """A file of suites; each is one test."""

    def collect(self) -> Iterator[pytest.Item]:
        from mist.errors import MistError
        from mist.tools.matchspec.load import load

        try:
            suites = load(self.path).suites
        except MistError as exc:
            raise pytest.UsageError(f"--matchspec {self.path}: {exc}") from exc
        for suite in suites:
            item: SuiteItem = SuiteItem.from_parent(self, name=suite.name, suite=suite)
            yield item


class SuiteItem(pytest.Item):
    """Passes when the suite's gate does."""

    def __init__(self, *, suite: Suite, **given: Any) -> None:
        super().__init__(**given)
        self.suite = suite

    def runtest(self) -> None:
        from mist.tools.matchspec.asserting import assert_suite

        assert_suite(self.suite)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, AssertionError):
            return str(excinfo.value)  # the report; where it was raised tells nobody anything
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, f"suite {self.name}"
