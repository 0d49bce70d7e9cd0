"""Graders of what an answer took. What nobody stated is unknown, and an unknown amount is an error, never within a budget."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from mist.errors import InvalidArgument
from mist.tools.matchspec.graders.base import EMPTY, Base, decided
from mist.tools.matchspec.grading import GradeInput, Verdict

Amount = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0)]


class _Budget(Base, frozen=True, kw_only=True):
    @property
    def reads_expected(self) -> bool:
        return False

    def grade(self, given: GradeInput) -> Verdict:
        if not given.output or given.output.isspace():
            return EMPTY
        return self.within(given)

    def within(self, given: GradeInput) -> Verdict:
        raise NotImplementedError

    def judged(self, what: str, found: float | None, most: float) -> Verdict:
        if found is None:
            raise self.wrong(f"the {what} of this answer is not known")
        if not 0 <= found < float("inf"):
            raise self.wrong(f"a {what} of {found} cannot be")
        return decided(found <= most, f"{found:g}", f"{what} {found:g}, at most {most:g}")


class Cost(_Budget, frozen=True, kw_only=True, tag="cost"):
    """At most `max_usd` dollars."""

    kind: ClassVar[str] = "cost"
    max_usd: Amount

    def within(self, given: GradeInput) -> Verdict:
        return self.judged("cost in USD", given.cost_usd, self.max_usd)


class Latency(_Budget, frozen=True, kw_only=True, tag="latency"):
    """At most `max_ms` milliseconds."""

    kind: ClassVar[str] = "latency"
    max_ms: Amount

    def within(self, given: GradeInput) -> Verdict:
        return self.judged("latency in ms", given.latency_ms, self.max_ms)


class Tokens(_Budget, frozen=True, kw_only=True, tag="tokens"):
    """At most so many tokens: of the prompt (`max_in`), of the answer (`max_out`), of both (`max_total`)."""

    kind: ClassVar[str] = "tokens"
    max_in: Count | None = None
    max_out: Count | None = None
    max_total: Count | None = None

    def __post_init__(self) -> None:
        if self.max_in is None and self.max_out is None and self.max_total is None:
            raise InvalidArgument("one of max_in, max_out, max_total is needed")

    def within(self, given: GradeInput) -> Verdict:
        both = None
        if given.tokens_in is not None and given.tokens_out is not None:
            both = given.tokens_in + given.tokens_out
        found = [
            self.judged(what, amount, most)
            for what, amount, most in (
                ("tokens in", given.tokens_in, self.max_in),
                ("tokens out", given.tokens_out, self.max_out),
                ("tokens", both, self.max_total),
            )
            if most is not None
        ]
        return next((v for v in found if not v.passed), found[-1])
