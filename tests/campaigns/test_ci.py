"""Every campaign in its small size."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from .campaign import Campaign
from .registry import CAMPAIGNS
from .run import State, done, main, table
from .sites import lacking

LONGEST_S = 180


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="campaigns need pidfd, mount namespaces and /proc")
@pytest.mark.timeout(LONGEST_S + 60)
@pytest.mark.parametrize("campaign", CAMPAIGNS, ids=[c.id for c in CAMPAIGNS])
def test_the_promises_hold(campaign: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing breaks, and the small size is reached (or, where the size is `all`, everything there is)."""
    monkeypatch.setenv("MIST_CAMPAIGN_DIR", str(tmp_path))
    for why in filter(None, map(lacking, campaign.needs)):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    said: list[str] = []
    result = campaign.run(LONGEST_S, 20_261_121, said.append, units=campaign.ci or None)
    print("\n".join(said))
    for note in result["notes"]:
        print(f"note: {note}")
    assert result["failures"] == [], f"kept in {result['kept']}"
    assert result["reached"] >= (campaign.ci or result["whole"])


def test_the_state_adds_up_over_runs(tmp_path: Path) -> None:
    """What runs reached is summed, the longest run counts where that is asked for, and failures stay on record."""
    campaign = CAMPAIGNS[0]._replace(id="X1", nightly=10)
    longest = campaign._replace(id="X2", longest=True)
    whole = campaign._replace(id="X3", nightly=0)
    for _ in range(2):
        state = State(tmp_path)
        for c in (campaign, longest):
            state.add(c, 7, 1.5, {"reached": 6, "failures": [], "notes": ["n"], "counts": {"k": 2}})
        state.add(whole, 8, 1.0, {"reached": 3, "whole": 4, "failures": ["broke"], "kept": "here"})
    state = State(tmp_path)
    assert state.of("X1")["reached"] == 12
    assert state.of("X1")["counts"] == {"k": 4}
    assert state.of("X2")["reached"] == 6
    assert [done(c, state.of(c.id)) for c in (campaign, longest, whole)] == [True, False, False]
    state.add(whole, 9, 1.0, {"reached": 4, "whole": 4, "failures": []})
    assert done(whole, state.of("X3"))
    text = table([campaign, longest, whole], state)
    assert "| X1 " in text
    assert "all (4)" in text
    assert len(state.of("X3")["failures"]) == 2


def test_the_runner_goes_on_where_it_stopped_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two short runs of one campaign add up, the table can be printed alone, and an unknown id is refused."""
    args = ["--only", "C19b", "--minutes", "0.05", "--seed", "1", "--state", str(tmp_path)]
    assert main(args) == 0
    first = State(tmp_path).of("C19b")["reached"]
    assert main(args) == 0
    assert State(tmp_path).of("C19b")["reached"] > first > 0
    capsys.readouterr()
    assert main(["--table", "--only", "C19b", "--state", str(tmp_path)]) == 0
    assert "10,000,000 inputs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--only", "C99"])
