"""Graders that compare the output with the expected text as it stands."""

from __future__ import annotations

import re
from functools import cached_property
from typing import ClassVar

from mist.errors import InvalidArgument
from mist.tools.matchspec.graders.base import Text, decided
from mist.tools.matchspec.grading import Verdict


class Exact(Text, frozen=True, kw_only=True, tag="exact"):
    kind: ClassVar[str] = "exact"

    def compare(self, said: str, wanted: str, output: str) -> Verdict:
        return decided(said == wanted, output)


class Contains(Text, frozen=True, kw_only=True, tag="contains"):
    kind: ClassVar[str] = "contains"

    def compare(self, said: str, wanted: str, output: str) -> Verdict:
        return decided(wanted in said, output)


class Prefix(Text, frozen=True, kw_only=True, tag="prefix"):
    kind: ClassVar[str] = "prefix"

    def compare(self, said: str, wanted: str, output: str) -> Verdict:
        return decided(said.startswith(wanted), output)


class Suffix(Text, frozen=True, kw_only=True, tag="suffix"):
    kind: ClassVar[str] = "suffix"

    def compare(self, said: str, wanted: str, output: str) -> Verdict:
        return decided(said.endswith(wanted), output)


class Choice(Text, frozen=True, kw_only=True, tag="choice"):
    """The last of `choices` that stands by itself in the output (no letter or digit beside it), and with a `marker` the
    first after it, is the one that is expected."""

    kind: ClassVar[str] = "choice"
    choices: tuple[str, ...]

    def __post_init__(self) -> None:
        plain = {self.plain(c) for c in self.choices}
        if len(plain) < 2 or len(plain) < len(self.choices) or not all(c.strip() for c in plain):
            raise InvalidArgument("choices must be two or more, different, and none of them empty")

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted((self.plain(c) for c in self.choices), key=len, reverse=True)
        return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")

    def check(self, expected: str) -> None:
        wanted = self.plain(self.wanted(expected))
        if wanted not in {self.plain(c) for c in self.choices}:
            raise self.wrong(f"{wanted[:60]!r} is none of the choices {', '.join(self.choices)}")

    def compare(self, said: str, wanted: str, output: str) -> Verdict:
        found = self._pattern.findall(said)
        if not found:
            return Verdict(False, 0.0, None, f"none of {', '.join(self.choices)} in the output")
        answer = found[0] if self.marker else found[-1]
        return decided(answer == wanted, answer)
