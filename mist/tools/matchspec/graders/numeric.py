"""Numbers in prose, compared as decimals; see numbers.py for what is read as one."""

from __future__ import annotations

from decimal import Decimal
from functools import cached_property, lru_cache
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from mist.tools.matchspec.graders.base import Marked, decided
from mist.tools.matchspec.grading import Verdict
from mist.tools.matchspec.numbers import Percent, close, first, last, plain


class Numeric(Marked, frozen=True, kw_only=True, tag="numeric"):
    """The number of the output equals the expected one, or lies within `tolerance` of it, or within the share
    `relative_tolerance` of it. `pick`: which number of a text counts; "" is the last, and with a marker the first after it."""

    kind: ClassVar[str] = "numeric"
    tolerance: Annotated[float, Meta(ge=0)] = 0.0
    relative_tolerance: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    percent: Percent = "strip"
    pick: Literal["", "first", "last"] = ""

    def check(self, expected: str) -> None:
        self._wanted(self.wanted(expected))

    def judge(self, output: str, expected: str) -> Verdict:
        answer = self._number(output, marked=bool(self.marker))
        if answer is None:
            return Verdict(False, 0.0, None, "no number in the output")
        wanted = self._wanted(expected)
        return decided(answer == wanted or close(answer, wanted, self._allowed(wanted)), plain(answer))

    @cached_property
    def _tolerances(self) -> tuple[Decimal, Decimal]:
        return Decimal(str(self.tolerance)), Decimal(str(self.relative_tolerance))

    def _allowed(self, wanted: Decimal) -> Decimal:
        absolute, relative = self._tolerances
        return max(absolute, relative * abs(wanted)) if relative else absolute

    def _wanted(self, expected: str) -> Decimal:
        found = _expected(expected, self.percent, self._takes_first(marked=bool(self.expected_marker)))
        if found is None:
            raise self.wrong(f"no number in the expected text {expected[-60:]!r}")
        return found

    def _number(self, text: str, *, marked: bool) -> Decimal | None:
        return _found(text, self.percent, self._takes_first(marked=marked))

    def _takes_first(self, *, marked: bool) -> bool:
        return marked if not self.pick else self.pick == "first"


def _found(text: str, percent: Percent, take_first: bool) -> Decimal | None:
    return first(text, percent=percent) if take_first else last(text, percent=percent)


_expected = lru_cache(maxsize=4096)(_found)
"""Expectations come again: when the suite is loaded, for each model, for each repeat."""
