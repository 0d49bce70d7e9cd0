"""Graders of JSON outputs. `fenced`: where the output has a Markdown fence, what is in it counts; otherwise the whole
output must be JSON."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from mist.errors import InvalidArgument, MistError
from mist.tools.matchspec.graders import jsonvalue
from mist.tools.matchspec.graders.base import EMPTY, Base, decided
from mist.tools.matchspec.graders.jsonvalue import NOTHING
from mist.tools.matchspec.graders.patterns import Matcher
from mist.tools.matchspec.grading import GradeInput, Verdict
from mist.tools.matchspec.numbers import after_marker

if TYPE_CHECKING:
    from jsonschema_rs import Validator

INSTALL = "pip install 'mist-stack[evals]'"
NO_JSON = "the output is not JSON"


class _Json(Base, frozen=True, kw_only=True):
    """Reads the output, or what follows the last `marker` in it, as JSON."""

    marker: str = ""
    fenced: bool = False

    @property
    def reads_expected(self) -> bool:
        return False

    def grade(self, given: GradeInput) -> Verdict:
        output: str | None = given.output
        if not output or output.isspace():
            return EMPTY
        if self.marker:
            output = after_marker(output, self.marker)
        value = jsonvalue.read(jsonvalue.fenced(output) if self.fenced else output) if output else NOTHING
        if value is NOTHING:
            return self.no_json(given.output)
        return self.judge(value, given)

    def no_json(self, output: str) -> Verdict:
        return Verdict(False, 0.0, None, NO_JSON)

    def judge(self, value: Any, given: GradeInput) -> Verdict:
        raise NotImplementedError


class IsJson(_Json, frozen=True, kw_only=True, tag="is_json"):
    """The output is JSON, of the kind that `of` names."""

    kind: ClassVar[str] = "is_json"
    of: Literal["", "object", "array", "string", "number", "boolean"] = ""

    def no_json(self, output: str) -> Verdict:
        return decided(False, output, NO_JSON)  # here that is the answer, and `negate` may want it

    def judge(self, value: Any, given: GradeInput) -> Verdict:
        kind = _kind(value)
        return decided(not self.of or kind == self.of, given.output, f"a JSON {kind}")


class JsonSchema(_Json, frozen=True, kw_only=True, tag="json_schema"):
    """The output is JSON that the `schema` allows (the draft that its `$schema` names, else 2020-12). References into the
    schema only: nothing is fetched. Patterns are matched in linear time, so look-around and back-references are refused."""

    kind: ClassVar[str] = "json_schema"
    schema: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.schema:
            raise InvalidArgument("the schema is empty, any JSON would be as good")

    def check(self, expected: str) -> None:
        _ = self.validator

    @cached_property
    def validator(self) -> Validator:
        """Raises InvalidArgument for what is no schema, and where the extra is not installed."""
        try:
            import jsonschema_rs
        except ImportError as exc:
            raise InvalidArgument(f"grader {self.name} needs jsonschema-rs", hint=INSTALL) from exc
        try:
            return jsonschema_rs.validator_for(self.schema, pattern_options=jsonschema_rs.RegexOptions(), offline=True)
        except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError) as exc:
            raise self.wrong(f"not a JSON schema we can use: {str(exc).splitlines()[0][:300]}") from exc

    def judge(self, value: Any, given: GradeInput) -> Verdict:
        errors = self.validator.iter_errors(value)
        first = next(iter(errors), None)
        if first is None:
            return decided(True, given.output)
        place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first.instance_path)
        return decided(False, given.output, f"${place}: {first.message[:200]}")


class JsonPath(_Json, frozen=True, kw_only=True, tag="json_path"):
    """The value at `path`: `test` equals (the default), exists, or matches. It is compared with `value`, or with the expected
    text where there is none: a found text with the text itself, anything else with the JSON it is. `matches` takes a
    pattern as the grader `regex` does, for a found text."""

    kind: ClassVar[str] = "json_path"
    path: str
    test: Literal["equals", "exists", "matches"] = "equals"
    value: Any = msgspec.UNSET
    pattern: str = ""
    flags: str = ""

    def __post_init__(self) -> None:
        try:
            steps = jsonvalue.parse(self.path)
        except MistError as exc:
            raise InvalidArgument(exc.message, hint=exc.hint) from exc
        if not steps:
            raise InvalidArgument("the path names no place", hint="use json_schema or is_json for the whole")
        if (self.test == "matches") != bool(self.pattern):
            raise InvalidArgument("`pattern` belongs to test = matches, and that needs one")
        if self.value is not msgspec.UNSET and self.test != "equals":
            raise InvalidArgument(f"`value` does not belong to test = {self.test}")
        if self.pattern:
            _ = self._matcher

    @property
    def reads_expected(self) -> bool:
        return self._matcher.filled if self.test == "matches" else self.test == "equals" and self.value is msgspec.UNSET

    @cached_property
    def _steps(self) -> jsonvalue.Path:
        return jsonvalue.parse(self.path)

    def heavy(self, given: GradeInput) -> bool:
        return self.test == "matches" and self._matcher.far(given.output, given.expected)

    @cached_property
    def _matcher(self) -> Matcher:
        return Matcher(self.pattern, self.flags)

    def check(self, expected: str) -> None:
        if self.reads_expected and not expected.strip():
            raise self.wrong("the expected text is empty, and there is no `value`")

    def judge(self, value: Any, given: GradeInput) -> Verdict:
        found = jsonvalue.find(value, self._steps)
        if found is NOTHING:
            return decided(False, "", f"nothing at {self.path}") if self.test == "exists" else _absent(self.path)
        answer = found if isinstance(found, str) else msgspec.json.encode(found).decode()
        match self.test:
            case "exists":
                return decided(True, answer)
            case "matches":
                if not isinstance(found, str):
                    return decided(False, answer, f"{self.path} holds a {_kind(found)}, not a text")
                return decided(self._matcher.search(found, given.expected) is not None, answer)
            case _:
                return decided(self._equal(found, given.expected), answer)

    def _equal(self, found: Any, expected: str) -> bool:
        if self.value is not msgspec.UNSET:
            return jsonvalue.same(found, self.value)
        if isinstance(found, str):
            return found == expected
        wanted = jsonvalue.read(expected)
        return wanted is not NOTHING and jsonvalue.same(found, wanted)


def _absent(path: str) -> Verdict:
    return Verdict(False, 0.0, None, f"nothing at {path}")


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"
