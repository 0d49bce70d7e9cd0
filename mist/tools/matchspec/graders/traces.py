"""Assertions about the trace of an answer: which spans it has, how long they took, whether one failed."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from mist.errors import InvalidArgument
from mist.protocol.payloads import TraceSpan
from mist.tools.matchspec.graders import jsonvalue
from mist.tools.matchspec.graders.base import EMPTY, decided
from mist.tools.matchspec.graders.hands import Asker
from mist.tools.matchspec.grading import GradeInput, Verdict

Count = Annotated[int, Meta(ge=0)]


class Trace(Asker, frozen=True, kw_only=True, tag="trace"):
    """All that is said must hold for the spans whose operation is `operation` (`*` and `?` stand for any characters; "" is
    every span): their number, at least `min_count` and at most `max_count`; no one longer than `max_duration_ms`;
    `no_errors`; each has the attribute `attribute`, with the value `equals` where that is said.

    There is at least one such span unless `max_count` is 0 or `min_count` is. An answer without a trace, and a trace
    without spans, are errors: they prove nothing."""

    kind: ClassVar[str] = "trace"
    operation: str = ""
    min_count: Count = 1
    max_count: Count | None = None
    max_duration_ms: Annotated[float, Meta(ge=0)] | None = None
    no_errors: bool = False
    attribute: str = ""
    equals: Any = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.max_count == 0 and self.min_count == 1:
            msgspec.structs.force_setattr(self, "min_count", 0)
        if self.max_count is not None and self.max_count < self.min_count:
            raise InvalidArgument(f"max_count = {self.max_count} lies below min_count = {self.min_count}")
        if self.equals is not msgspec.UNSET and not self.attribute:
            raise InvalidArgument("`equals` belongs to an `attribute`")
        said = (
            self.operation,
            self.max_count is not None,
            self.max_duration_ms is not None,
            self.no_errors,
            self.attribute,
        )
        if not any(said):
            raise InvalidArgument(
                "nothing is asserted", hint="operation, max_count, max_duration_ms, no_errors, attribute"
            )

    @property
    def reads_expected(self) -> bool:
        return False

    async def grade_async(self, given: GradeInput) -> Verdict:
        if not given.output or given.output.isspace():
            return EMPTY
        if self.hands.trace is None:
            raise self.nobody("traces")
        if not given.trace_id:
            raise self.wrong("the answer has no trace")
        spans = await self.hands.trace(given.trace_id)
        if not spans:
            raise self.wrong(f"trace {given.trace_id} has no spans, or they have not arrived")
        chosen = [s for s in spans if not self.operation or fnmatchcase(s.operation, self.operation)]
        complaint = self._complaint(chosen)
        return decided(not complaint, f"{len(chosen)} spans", complaint)

    def _complaint(self, spans: list[TraceSpan]) -> str:
        what = f"spans of {self.operation}" if self.operation else "spans"
        if len(spans) < self.min_count:
            return f"{len(spans)} {what}, at least {self.min_count}"
        if self.max_count is not None and len(spans) > self.max_count:
            return f"{len(spans)} {what}, at most {self.max_count}"
        for span in spans:
            at = f"span {span.span_id} ({span.operation})"
            took_ms = (span.end_ns - span.start_ns) / 1e6
            if self.max_duration_ms is not None and took_ms > self.max_duration_ms:
                return f"{at} took {took_ms:g} ms, at most {self.max_duration_ms:g}"
            if self.no_errors and span.status not in ("", "ok", "none"):
                return f"{at} has the status {span.status}"
            if self.attribute and self.attribute not in span.attrs:
                return f"{at} has no attribute {self.attribute}"
            if self.equals is not msgspec.UNSET and not jsonvalue.same(span.attrs[self.attribute], self.equals):
                return f"{at}: {self.attribute} is {str(span.attrs[self.attribute])[:80]!r}"
        return ""
