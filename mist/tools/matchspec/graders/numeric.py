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
        answer = _found(output, self.percent, self._takes_first[0])
        if answer is None:
            return Verdict(False, 0.0, None, "no number in the output")
        wanted = self._wanted(expected)
        right = answer == wanted
        if not right and self._tolerances:
            absolute, relative = self._tolerances
            right = close(answer, wanted, max(absolute, relative * abs(wanted)) if relative else absolute)
        return decided(right, plain(answer))

    @cached_property
    def _tolerances(self) -> tuple[Decimal, Decimal] | None:
        if not self.tolerance and not self.relative_tolerance:
            return None
        return Decimal(str(self.tolerance)), Decimal(str(self.relative_tolerance))

    def _wanted(self, expected: str) -> Decimal:
        found = _expected(expected, self.percent, self._takes_first[1])
        if found is None:
            raise self.wrong(f"no number in the expected text {expected[-60:]!r}")
        return found

    @cached_property
    def _takes_first(self) -> tuple[bool, bool]:
        """In the output, and in the expected text."""
        if self.pick:
            return self.pick == "first", self.pick == "first"
        return bool(self.marker), bool(self.expected_marker)


def _found(text: str, percent: Percent, take_first: bool) -> Decimal | None:
    return first(text, percent=percent) if take_first else last(text, percent=percent)


_expected = lru_cache(maxsize=4096)(_found)
"""Expectations come again: when the suite is loaded, for each model, for each repeat."""
