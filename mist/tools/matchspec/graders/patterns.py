"""Regular expressions that cannot run away with the run.

Python's `re` tries alternatives one after the other, and a pattern such as `(a+)+b` takes longer than anybody waits on a
text of forty letters. So the worst case of a pattern is estimated once, from its parse tree: variable repeats inside
a repeat, and many optional parts in a row, make it *exponential*; otherwise it takes about `length ** (1 + number
of unbounded repeats)` steps. What stays under STEPS_MAX steps for the text at hand is matched at once. Anything else
is matched in a process of its own (`far` tells before), which is ended after SECONDS_MAX: then the grader has an error,
and the sample has not passed. No pattern is refused for its shape, and no text for its length.

`{{expected}}` in a pattern stands for the expected text, escaped.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cached_property, lru_cache
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any, ClassVar

import msgspec

from mist.errors import InvalidArgument, TimedOut
from mist.tools.matchspec.graders.base import Marked, decided, fill, slots
from mist.tools.matchspec.grading import GradeInput, Verdict

STEPS_MAX = 100_000_000
SECONDS_MAX = 5.0
OPTIONAL_MAX = 12
"""More parts that may be left out, or alternatives, than these count as exponential."""
MANY = 64
"""A repeat that may go further than this counts as unbounded."""

_FLAGS = {"s": re.DOTALL, "i": re.IGNORECASE, "m": re.MULTILINE}
_CHILD = """
import json, re, sys
pattern, flags, text = json.loads(sys.stdin.buffer.read())
print(json.dumps(m.group() if (m := re.search(pattern, text, flags)) else None))
"""


class Matcher:
    """A pattern with its flags (of `s`, `i`, `m`). Raises InvalidArgument for what is no pattern."""

    def __init__(self, pattern: str, flags: str = "") -> None:
        unknown = sorted(set(flags) - set(_FLAGS))
        if unknown:
            raise InvalidArgument(f"unknown flag {unknown[0]!r}", hint="known: s (dot matches new lines), i, m")
        if not pattern:
            raise InvalidArgument("the pattern is empty, it would match everything")
        strange = slots(pattern) - {"expected"}
        if strange:
            raise InvalidArgument(f"the pattern holds {{{{{min(strange)}}}}}", hint="only {{expected}} is filled in")
        self.pattern = pattern
        self.flags = int(sum(_FLAGS[f] for f in set(flags)))
        self.filled = bool(slots(pattern))
        compiled(self._written("x"), self.flags)

    def _written(self, expected: str) -> str:
        return fill(self.pattern, {"expected": re.escape(expected)}) if self.filled else self.pattern

    def far(self, text: str, expected: str) -> bool:
        """Whether `search` would begin a process."""
        degree = compiled(self._written(expected), self.flags)[1]
        return degree is None or len(text) ** degree > STEPS_MAX

    def search(self, text: str, expected: str) -> str | None:
        """What the pattern finds first in the text; None = nothing. Raises TimedOut."""
        written = self._written(expected)
        known, degree = compiled(written, self.flags)
        if degree is not None and len(text) ** degree <= STEPS_MAX:
            found = known.search(text)
            return found.group() if found else None
        return _in_a_child(written, self.flags, text)


@lru_cache(maxsize=4096)
def compiled(pattern: str, flags: int) -> tuple[re.Pattern[str], int | None]:
    """The pattern, and the degree of its worst case; None = exponential."""
    try:
        return re.compile(pattern, flags), degree(pattern, flags)
    except (re.error, RecursionError, OverflowError) as exc:
        raise InvalidArgument(f"not a regular expression: {exc}") from exc


def degree(pattern: str, flags: int = 0) -> int | None:
    """1 + the unbounded repeats of the pattern: the power of the text's length that the work may grow with. None: it may
    grow exponentially."""
    found = _Count()
    found.walk(_parser.parse(pattern, flags), inside=False)
    return None if found.nested or found.optional > OPTIONAL_MAX else 1 + found.unbounded


class _Count:
    def __init__(self) -> None:
        self.unbounded = self.optional = 0
        self.nested = False

    def walk(self, items: Any, *, inside: bool) -> None:
        """`inside` a repeat that may go on."""
        for op, arg in items:
            if op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT):
                low, high, body = arg
                variable = low != high
                if variable and inside:
                    self.nested = True
                if variable and high > MANY:
                    self.unbounded += 1
                elif variable:
                    self.optional += 1
                self.walk(body, inside=inside or high > 1)
            elif op is _constants.BRANCH:
                self.nested |= inside
                self.optional += 1
                for branch in arg[1]:
                    self.walk(branch, inside=inside)
            elif op is _constants.SUBPATTERN:
                self.walk(arg[-1], inside=inside)
            elif op is _constants.ATOMIC_GROUP:
                self.walk(arg, inside=inside)
            elif op in (_constants.ASSERT, _constants.ASSERT_NOT):
                self.walk(arg[1], inside=inside)
            elif op is _constants.GROUPREF_EXISTS:
                self.optional += 1
                self.walk(arg[1], inside=inside)
                self.walk(arg[2] or [], inside=inside)
            elif op is _constants.GROUPREF:
                self.unbounded += 1


def _in_a_child(pattern: str, flags: int, text: str) -> str | None:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=msgspec.json.encode([pattern, flags, text]),
            capture_output=True,
            timeout=SECONDS_MAX,
            check=True,
        )
    except subprocess.TimeoutExpired as exc:
        raise TimedOut(
            f"the pattern {pattern[:80]!r} took longer than {SECONDS_MAX:g} s on a text of {len(text)} characters",
            hint="a repeat inside a repeat, or several in a row, can be matched in too many ways: write it more narrowly",
        ) from exc
    except (subprocess.CalledProcessError, OSError) as exc:
        raise InvalidArgument(
            f"the pattern {pattern[:80]!r} could not be matched in a process of its own: {exc}"
        ) from exc
    found: str | None = msgspec.json.decode(done.stdout)
    return found


class Regex(Marked, frozen=True, kw_only=True, tag="regex"):
    """The `pattern` is found somewhere in the output (`^…$` for all of it)."""

    kind: ClassVar[str] = "regex"
    pattern: str
    flags: str = ""

    def __post_init__(self) -> None:
        _ = self.matcher

    @cached_property
    def matcher(self) -> Matcher:
        return Matcher(self.pattern, self.flags)

    @property
    def reads_expected(self) -> bool:
        return self.matcher.filled

    def check(self, expected: str) -> None:
        if self.matcher.filled:
            super().check(expected)

    def wanted(self, expected: str) -> str:
        return super().wanted(expected) if self.matcher.filled else ""

    def heavy(self, given: GradeInput) -> bool:
        # a marker only shortens the output, and expectations are escaped: letters, whatever they are
        return self.matcher.far(given.output, given.expected)

    def judge(self, output: str, expected: str) -> Verdict:
        found = self.matcher.search(output, expected)
        return decided(found is not None, output if found is None else found)
