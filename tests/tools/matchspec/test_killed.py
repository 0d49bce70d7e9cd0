"""A run of recorded solutions killed while it works, and replayed from its middle, over each backend.

Here with a few kills and the first of GSM8K's questions; `python -m tests.campaigns.run --only C34,C34n,C34r` kills runs
over all 1,319 of them twenty times each.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import missing

from tests.campaigns.campaign import Trial
from tests.campaigns.evals import evaluate
from tests.campaigns.processes import Nursery
from tests.campaigns.sites import lacking, site

KILLS = 2


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nursery")) as found:
        yield found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs pidfd and /proc")
@pytest.mark.parametrize(("backend", "over_stream"), [("log", False), ("log", True), ("nats", True), ("redis", False)])
def test_a_killed_run_gives_the_report_of_one_that_was_not(
    backend: str, over_stream: bool, nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Result by result; over the stream of answers no question is asked twice, else only those in flight at a kill; and
    a replay from the middle gives the same report and asks nobody."""
    if why := lacking(backend):
        missing(why)
    monkeypatch.setenv("MIST_CAMPAIGN_DIR", str(tmp_path))
    trial = Trial("T", 60, 7, lambda text: None, KILLS)
    with site(backend, trial.round()) as where:
        kills = evaluate(
            trial, nursery, where, trial.folder / "round-1", random.Random(7), rows=60, asked=60, kills=KILLS,
            over_stream=over_stream,
        )  # fmt: skip
    assert trial.failures == []
    assert kills == KILLS
