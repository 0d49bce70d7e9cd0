"""Graders and numbers: what counts as the same, and that nothing passes by accident."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.errors import InvalidArgument
from mist.tools.matchspec.graders import grader
from mist.tools.matchspec.grading import GradeInput
from mist.tools.matchspec.numbers import after_marker, close, first, last, numbers, plain


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("18", ["18"]),
        ("It is 65,960.", ["65960"]),
        ("1,234,567.89 apples", ["1234567.89"]),
        ("12,34 and 1,2", ["12", "34", "1", "2"]),
        ("1234,567", ["1234", "567"]),
        ("$3,000 or -$5 or $-6 or € 7", ["3000", "-5", "-6", "7"]),
        ("-4 and - 4 and −4 and +4", ["-4", "-4", "-4", "4"]),
        ("10-5=5, x-3, (2)-1", ["10", "5", "5", "3", "2", "1"]),
        ("50% of .5 is 2.5e-1", ["50", "0.5", "0.25"]),
        ("1\u202f000\u202f000 and 2\u00a0500", ["1000000", "2500"]),
        ("10.833333333333332", ["10.833333333333332"]),
        ("v1.2.3", ["1.2", "3"]),
        ("no number here", []),
        ("", []),
    ],
)
def test_numbers_are_found_in_prose(text: str, found: list[str]) -> None:
    """Signs, thousands separators, currency, percent, fractions, exponents."""
    assert list(numbers(text)) == [Decimal(n) for n in found]


def test_percent_can_be_a_fraction() -> None:
    """50% is 50 unless the suite says that it is one half."""
    assert list(numbers("50 %", percent="fraction")) == [Decimal("0.5")]


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_a_number_written_any_usual_way_is_the_same_number(value: Decimal) -> None:
    """Plain, with separators, with a currency sign, in a sentence, and as we write it."""
    for text in (f"{value:f}", f"{value:,f}", f"${value:,f}", f"The answer is {value:f}.", plain(value)):
        assert list(numbers(text)) == [value], text


@given(st.text(max_size=80))
def test_any_text_has_numbers_that_can_be_compared(text: str) -> None:
    """Finding, comparing and writing never fail."""
    for value in numbers(text):
        assert close(value, value, Decimal(0))
        assert plain(value)


def test_the_last_marker_counts() -> None:
    """A model that answers twice means the second."""
    assert after_marker("A: 1\nno, wait\nA: 2 ", "A:") == "2"
    assert after_marker("none", "A:") is None


@pytest.mark.parametrize(
    ("spec", "output", "expected", "passed"),
    [
        ({"type": "exact"}, " Paris \n", "Paris", True),
        ({"type": "exact"}, "paris", "Paris", False),
        ({"type": "exact", "case_sensitive": False}, "PARIS", "Paris", True),
        ({"type": "exact", "trim_whitespace": False}, "Paris ", "Paris", False),
        ({"type": "exact", "marker": "A:"}, "so\nA: Paris", "Paris", True),
        ({"type": "exact", "marker": "A:"}, "Paris", "Paris", False),
        ({"type": "exact"}, "65,960", "65960", False),
        ({"type": "contains"}, "It is Paris, of course", "Paris", True),
        ({"type": "contains"}, "It is paris", "Paris", False),
        ({"type": "contains", "case_sensitive": False}, "It is PARIS", "paris", True),
        ({"type": "contains"}, "", "Paris", False),
        ({"type": "numeric"}, "first 3, then 4", "4", True),
        ({"type": "numeric"}, "4, then 5", "4", False),
        ({"type": "numeric"}, "none at all", "4", False),
        ({"type": "numeric"}, "$1,000.00", "1000", True),
        ({"type": "numeric", "marker": "A:"}, "9\nA: 4 apples of 7", "4", True),
        ({"type": "numeric", "marker": "A:"}, "4", "4", False),
        ({"type": "numeric", "marker": "A:"}, "A: nothing", "4", False),
        ({"type": "numeric", "marker": "A:", "expected_marker": "####"}, "A: 65,960", "so 2\n#### 65960", True),
        ({"type": "numeric", "tolerance": 0.01}, "3.149", "3.14", True),
        ({"type": "numeric", "tolerance": 0.01}, "3.151", "3.14", False),
        ({"type": "numeric", "tolerance": 0.1}, "0.3", "0.2", True),
        ({"type": "numeric", "percent": "fraction"}, "50%", "0.5", True),
        ({"type": "numeric"}, "-4", "4", False),
    ],
)
def test_a_grader_decides(spec: dict[str, Any], output: str, expected: str, passed: bool) -> None:
    """The table of what passes."""
    g = grader(spec)
    g.check(expected)
    assert g.grade(GradeInput(output=output, expected=expected)).passed is passed


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"type": "Exact"},
        {"type": "regex"},
        {"type": "prefixx"},
        {"type": "exact", "tolerance": 1},
        {"type": "numeric", "tolerance": -1},
        {"type": "numeric", "tolerance": "big"},
        {"type": "numeric", "percent": "maybe"},
        {"type": "contains", "markr": "A:"},
    ],
)
def test_an_unknown_grader_or_setting_is_an_error(spec: dict[str, Any]) -> None:
    """The seed took a misspelt matcher for `contains` and passed; here it is refused."""
    with pytest.raises(InvalidArgument):
        grader(spec)


def test_what_any_output_would_pass_is_an_error() -> None:
    """An empty expectation, an absent marker or number in it: nothing could be judged fairly."""
    for kind in ("exact", "contains", "numeric"):
        with pytest.raises(InvalidArgument):
            grader({"type": kind}).check("  ")
    with pytest.raises(InvalidArgument, match="####"):
        grader({"type": "numeric", "expected_marker": "####"}).check("18")


@given(st.text("0123456789.,eE% \u00a0$€+-−()x\n", max_size=14), st.sampled_from(["strip", "fraction"]))
def test_the_first_and_the_last_are_found_as_among_all(text: str, percent: Any) -> None:
    """They are looked for from their end of the text only."""
    found = list(numbers(text, percent=percent))
    assert first(text, percent=percent) == (found[0] if found else None)
    assert last(text, percent=percent) == (found[-1] if found else None)


@pytest.mark.parametrize("text", ["1 " + "9" * 401, "-  4", "ten 10 x" + "é" * 50])
def test_the_last_number_may_hide(text: str) -> None:
    """Behind one with too many digits, two spaces after its sign, far from the end."""
    assert last(text) == list(numbers(text))[-1]
