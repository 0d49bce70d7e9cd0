"""A short, repeatable run of every fuzz target; and the fuzzer itself, on a target with a known fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import driver


@pytest.mark.parametrize("name", driver.TARGETS)
def test_a_short_run_finds_nothing(name: str) -> None:
    """3,000 inputs of a fixed seed; some are accepted, some are refused, none breaks a promise."""
    target = driver.load(name)
    report = driver.run(target, inputs=3000, seed=20261121)
    assert [f.error for f in report.findings] == []
    assert report.inputs == 3000
    assert 0 < report.accepted < 3000
    assert target.name == name


@pytest.mark.parametrize("name", driver.TARGETS)
def test_every_seed_of_a_target_is_a_good_input(name: str) -> None:
    """A seed that is refused would fuzz nothing but the first check."""
    target = driver.load(name)
    assert len([s for s in target.seeds if target.check(s)]) >= len(target.seeds) // 2


def _breaks_on_two_quotes(data: bytes) -> bool:
    if b'""' in data:
        raise ValueError("two quotes")
    return True


FAULTY = driver.Target("faulty", [b'{"a"}'], [b'"', b"x"], _breaks_on_two_quotes)


def test_a_known_fault_is_found_kept_and_repeatable(tmp_path: Path) -> None:
    """The same seed finds the same input at the same number, and its bytes are written down."""
    first = driver.run(FAULTY, inputs=2000, seed=7)
    again = driver.run(FAULTY, inputs=2000, seed=7)
    assert first.findings
    assert [(f.number, f.data) for f in first.findings] == [(f.number, f.data) for f in again.findings]
    assert len(first.findings) <= driver.FINDINGS_MAX
    path = driver.keep(first.findings[0], tmp_path / "new")
    assert path.read_bytes() == first.findings[0].data
    assert "two quotes" in first.findings[0].error


def test_the_command_line_names_what_it_did(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line for each target, 0 when nothing was found; an unknown target is refused."""
    monkeypatch.chdir(tmp_path)
    assert driver.main(["subject"], ["--inputs", "50", "--seed", "3"]) == 0
    assert driver.main(argv=["url", "--seconds", "0.01"]) == 0
    out = capsys.readouterr().out
    assert "subject" in out
    assert "(seed 3)" in out
    assert out.count("\n") == 2
    with pytest.raises(SystemExit):
        driver.main(argv=["nothing"])
