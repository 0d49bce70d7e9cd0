"""Graders: an output and what was expected to a verdict. A closed set; an unknown name is an error, never a pass.

`exact`     the texts are equal
`contains`  the expected text occurs in the output
`numeric`   the numbers are equal, or within `tolerance`

`marker` (all three): only what follows its last occurrence in the output counts; an output without it has no answer
and fails. `expected_marker` does the same to the expected text, where its absence is an error of the suite.
Without a marker `numeric` takes the last number of the text, with one the first number after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from mist.errors import InvalidArgument
from mist.tools.matchspec.grading import GradeInput, Pure, Verdict
from mist.tools.matchspec.numbers import Percent, after_marker, close, numbers, plain


class _Base(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: ClassVar[str] = ""
    label: str = msgspec.field(name="name", default="")
    marker: str = ""
    expected_marker: str = ""
    negate: bool = False
    weight: Annotated[float, Meta(ge=0)] | None = None
    threshold: Annotated[float, Meta(ge=0, le=1)] | None = None

    @property
    def name(self) -> str:
        return self.label or self.kind

    def _expected(self, expected: str) -> str:
        if not self.expected_marker:
            return expected
        text = after_marker(expected, self.expected_marker)
        if text is None:
            raise InvalidArgument(
                f"grader {self.name}: expected text without {self.expected_marker!r}: {expected[-60:]!r}"
            )
        return text

    def _output(self, output: str) -> str | None:
        return after_marker(output, self.marker) if self.marker else output

    def _missing(self) -> Verdict:
        return Verdict(False, 0.0, None, f"no {self.marker!r} in the output")


def _decided(passed: bool, answer: str) -> Verdict:
    return Verdict(passed, 1.0 if passed else 0.0, answer)


class _Text(_Base, frozen=True, kw_only=True, forbid_unknown_fields=True):
    case_sensitive: bool = True
    trim_whitespace: bool = True

    def check(self, expected: str) -> None:
        if not self._plain(self._expected(expected)):
            raise InvalidArgument(f"grader {self.name}: the expected text is empty, every output would be as good")

    def _plain(self, text: str) -> str:
        text = text.strip() if self.trim_whitespace else text
        return text if self.case_sensitive else text.casefold()


class Exact(_Text, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="exact"):
    kind: ClassVar[str] = "exact"

    def grade(self, given: GradeInput) -> Verdict:
        answer = self._output(given.output)
        if answer is None:
            return self._missing()
        return _decided(self._plain(answer) == self._plain(self._expected(given.expected)), answer)


class Contains(_Text, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="contains"):
    kind: ClassVar[str] = "contains"

    def grade(self, given: GradeInput) -> Verdict:
        answer = self._output(given.output)
        if answer is None:
            return self._missing()
        return _decided(self._plain(self._expected(given.expected)) in self._plain(answer), answer)


class Numeric(_Base, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="numeric"):
    kind: ClassVar[str] = "numeric"
    tolerance: Annotated[float, Meta(ge=0)] = 0.0
    percent: Percent = "strip"

    def check(self, expected: str) -> None:
        if self._number(self._expected(expected), first=bool(self.expected_marker)) is None:
            raise InvalidArgument(f"grader {self.name}: no number in the expected text {expected[-60:]!r}")

    def grade(self, given: GradeInput) -> Verdict:
        text = self._output(given.output)
        if text is None:
            return self._missing()
        answer = self._number(text, first=bool(self.marker))
        if answer is None:
            return Verdict(False, 0.0, None, "no number in the output")
        wanted = self._number(self._expected(given.expected), first=bool(self.expected_marker))
        if wanted is None:
            raise InvalidArgument(f"grader {self.name}: no number in the expected text {given.expected[-60:]!r}")
        return _decided(close(answer, wanted, Decimal(str(self.tolerance))), plain(answer))

    def _number(self, text: str, *, first: bool) -> Decimal | None:
        found = numbers(text, percent=self.percent)
        return (found[0] if first else found[-1]) if found else None


GRADERS = ("exact", "contains", "numeric")
Kind = Literal["exact", "contains", "numeric"]


def grader(spec: Mapping[str, Any], where: str = "grader") -> Pure:
    """The grader a table `{type = "numeric", …}` describes. Raises InvalidArgument for an unknown type or key."""
    kind = spec.get("type")
    if kind not in GRADERS:
        raise InvalidArgument(f"{where}: unknown type {kind!r}", hint=f"known: {', '.join(GRADERS)}")
    try:
        return msgspec.convert(dict(spec), Exact | Contains | Numeric)
    except msgspec.ValidationError as exc:
        raise InvalidArgument(f"{where} ({kind}): {exc}") from exc
