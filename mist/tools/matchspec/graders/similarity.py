"""Meaning by embeddings. The vectors come from whoever was handed in."""

from __future__ import annotations

from math import isfinite, sqrt
from typing import ClassVar

from mist.tools.matchspec.graders.base import EMPTY, Share, rated
from mist.tools.matchspec.graders.hands import Asker
from mist.tools.matchspec.grading import GradeInput, Verdict


class SemanticSimilarity(Asker, frozen=True, kw_only=True, tag="semantic_similarity"):
    """The cosine of the two embeddings. A negative one counts as 0, and the reason says what it was."""

    kind: ClassVar[str] = "semantic_similarity"
    model: str = "auto"
    pass_score: Share = 0.75

    def check(self, expected: str) -> None:
        if not expected.strip():
            raise self.wrong("the expected text is empty, there is nothing to be similar to")

    async def grade_async(self, given: GradeInput) -> Verdict:
        if not given.output or given.output.isspace():
            return EMPTY
        self.check(given.expected)
        if self.hands.embed is None:
            raise self.nobody("embeddings")
        vectors = await self.hands.embed(self.model, [given.output, given.expected])
        if len(vectors) != 2:
            raise self.wrong(f"{len(vectors)} vectors came back for 2 texts")
        found = self._cosine(vectors[0], vectors[1])
        return rated(
            max(0.0, found), self.pass_score, given.output, f"cosine {found:.4f}, {self.pass_score:g} is enough"
        )

    def _cosine(self, a: list[float], b: list[float]) -> float:
        if len(a) != len(b) or not a:
            raise self.wrong(f"vectors of {len(a)} and {len(b)} numbers cannot be compared")
        lengths = sqrt(sum(x * x for x in a)) * sqrt(sum(x * x for x in b))
        if not isfinite(lengths) or lengths == 0.0:
            raise self.wrong("a vector is zero or not finite, it points nowhere")
        return min(1.0, max(-1.0, sum(x * y for x, y in zip(a, b, strict=True)) / lengths))
