"""Graders by likeness: a score from 0 to 1, passed from `pass_score` on."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from mist.tools.matchspec.graders import jsonvalue, likeness
from mist.tools.matchspec.graders.base import Marked, Share, Text, rated
from mist.tools.matchspec.grading import GradeInput, Verdict

HEAVY_CELLS = 10_000_000
"""Characters times characters that are compared in some 10 ms."""


class Levenshtein(Text, frozen=True, kw_only=True, tag="levenshtein"):
    """1 - edits / length of the longer text, in characters."""

    kind: ClassVar[str] = "levenshtein"
    pass_score: Share = 0.8

    def heavy(self, given: GradeInput) -> bool:
        return len(given.output) * len(given.expected) > HEAVY_CELLS

    def compare(self, said: str, wanted: str, output: str) -> Verdict:
        return rated(likeness.levenshtein(said, wanted), self.pass_score, output)


class RougeL(Marked, frozen=True, kw_only=True, tag="rouge_l"):
    """F1 of the longest common subsequence of words (Lin 2004)."""

    kind: ClassVar[str] = "rouge_l"
    pass_score: Share = 0.75

    def check(self, expected: str) -> None:
        if not likeness.words(self.wanted(expected)):
            raise self.wrong(f"no words in the expected text {expected[-60:]!r}")

    def judge(self, output: str, expected: str) -> Verdict:
        return rated(likeness.rouge_l(output, expected), self.pass_score, output)


class Bleu(Marked, frozen=True, kw_only=True, tag="bleu"):
    """BLEU of the output against the one expected text (Papineni et al. 2002)."""

    kind: ClassVar[str] = "bleu"
    pass_score: Share = 0.5
    order: Annotated[int, Meta(ge=1, le=10)] = 4
    smoothing: likeness.Smoothing = "exp"

    def judge(self, output: str, expected: str) -> Verdict:
        score = likeness.bleu(output, expected, order=self.order, smoothing=self.smoothing)
        return rated(score, self.pass_score, output)


class SetOverlap(Text, frozen=True, kw_only=True, tag="set_overlap"):
    """How much two sets have in common. `of` says what their members are: the words of the texts, or the elements of two
    JSON lists. `measure`: precision is the share of the output's members that are expected, recall the share of the
    expected ones that are there, f1 their harmonic mean, jaccard what is common over what is in either."""

    kind: ClassVar[str] = "set_overlap"
    of: Literal["words", "json"] = "words"
    measure: Literal["precision", "recall", "f1", "jaccard"] = "f1"
    pass_score: Share = 1.0

    def check(self, expected: str) -> None:
        wanted = self._members(self.plain(self.wanted(expected)))
        if not wanted:
            what = "a JSON list with elements" if self.of == "json" else "a text with words"
            raise self.wrong(f"the expected text is not {what}: {expected[-60:]!r}")

    def compare(self, said: str, wanted: str, output: str) -> Verdict:
        ours, theirs = self._members(said), self._members(wanted)
        if not ours:
            return Verdict(False, 0.0, None, "no JSON list with elements" if self.of == "json" else "no words")
        if not theirs:
            raise self.wrong("the expected set is empty")
        both = len(ours & theirs)
        match self.measure:
            case "precision":
                score = both / len(ours)
            case "recall":
                score = both / len(theirs)
            case "f1":
                score = 2 * both / (len(ours) + len(theirs))
            case "jaccard":
                score = both / len(ours | theirs)
        return rated(score, self.pass_score, output, f"{both} in common of {len(ours)} and {len(theirs)}")

    def _members(self, text: str) -> set[Any]:
        if self.of == "words":
            return set(likeness.words(text, fold=False))
        found = jsonvalue.read(text)
        return {jsonvalue.canonical(item) for item in found} if isinstance(found, list) else set()
