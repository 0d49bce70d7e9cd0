"""What all graders share: their common settings, the empty output, and the marker.

An output without a word in it is no answer: every grader fails it, negated or not (`answer` stays None), whatever its
pattern would match. So does an output without the `marker` that the grader was told to look behind.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from mist.errors import InvalidArgument
from mist.tools.matchspec.grading import GradeInput, Verdict
from mist.tools.matchspec.numbers import after_marker

Share = Annotated[float, Meta(gt=0, le=1)]
"""A score that is enough. Not 0: everything would be."""

EMPTY = Verdict(False, 0.0, None, "the output is empty")


class Base(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True, tag_field="type"):
    """`label` is written `name`. What is worked out once from the settings (a compiled pattern) is a cached property,
    which is no field: settings are what a suite's digest covers."""

    kind: ClassVar[str] = ""
    label: str = msgspec.field(name="name", default="")
    negate: bool = False
    weight: Annotated[float, Meta(ge=0)] | None = None
    threshold: Annotated[float, Meta(ge=0, le=1)] | None = None

    @property
    def name(self) -> str:
        return self.label or self.kind

    @property
    def reads_expected(self) -> bool:
        """Whether the expected text has a part in the verdict. Where not, a sample need not have one."""
        return True

    def check(self, expected: str) -> None:
        """Raises InvalidArgument when no output could be graded fairly against this."""

    def wrong(self, what: str) -> InvalidArgument:
        return InvalidArgument(f"grader {self.name}: {what}")


class Marked(Base, frozen=True, kw_only=True):
    """A grader that reads the output, or what follows the last `marker` in it, and compares it with the expected text, or
    what follows the last `expected_marker` in that."""

    marker: str = ""
    expected_marker: str = ""

    def grade(self, given: GradeInput) -> Verdict:
        output = given.output
        if not output or output.isspace():
            return EMPTY
        if self.marker:
            found = after_marker(output, self.marker)
            if not found:
                return Verdict(False, 0.0, None, f"nothing after {self.marker!r} in the output")
            output = found
        return self.judge(output, self.wanted(given.expected))

    def judge(self, output: str, expected: str) -> Verdict:
        """The verdict on an output that is not empty. Markers are gone from both."""
        raise NotImplementedError

    def wanted(self, expected: str) -> str:
        if not self.expected_marker:
            return expected
        text = after_marker(expected, self.expected_marker)
        if text is None:
            raise self.wrong(f"expected text without {self.expected_marker!r}: {expected[-60:]!r}")
        return text

    def check(self, expected: str) -> None:
        text = self.wanted(expected)
        if not text or text.isspace():
            raise self.wrong("the expected text is empty, every output would be as good")


class Text(Marked, frozen=True, kw_only=True):
    """`normalise`: a Unicode form both are brought to; then white space at the ends goes, then case (`casefold`)."""

    case_sensitive: bool = True
    trim_whitespace: bool = True
    normalise: Literal["", "NFC", "NFKC"] = ""

    def judge(self, output: str, expected: str) -> Verdict:
        plain = self.plain
        return self.compare(plain(output), plain(expected), output)

    def compare(self, said: str, wanted: str, output: str) -> Verdict:
        raise NotImplementedError

    @cached_property
    def plain(self) -> Callable[[str], str]:
        """What of a text is compared."""
        form, trim, fold = self.normalise, self.trim_whitespace, not self.case_sensitive
        if not form and not fold:
            return str.strip if trim else str

        def prepared(text: str) -> str:
            if form:
                text = unicodedata.normalize(form, text)
            if trim:
                text = text.strip()
            return text.casefold() if fold else text

        return prepared


def decided(passed: bool, answer: str, reason: str = "") -> Verdict:
    return Verdict(passed, 1.0 if passed else 0.0, answer, reason)


def rated(score: float, enough: float, answer: str, reason: str = "") -> Verdict:
    """A verdict by a score that must reach `enough`."""
    return Verdict(score >= enough, score, answer, reason or f"{score:.4f}, {enough:g} is enough")


_SLOT = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def slots(template: str) -> set[str]:
    return set(_SLOT.findall(template))


def fill(template: str, values: dict[str, Any]) -> str:
    """The template with its `{{name}}` replaced, each once: what a value brings along is not looked at again."""
    return _SLOT.sub(lambda m: str(values.get(m[1], m[0])), template)
