"""Which records: compiled filters over decoded records, and the small language of `--where`.

    expr   = or ;  or = and { ("or" | "||") and } ;  and = not { ("and" | "&&") not }
    not    = ("not" | "!") not | "(" expr ")" | test
    test   = path [ op value ]      op: == = != < <= > >= ~ !~ contains
    path   = name { "." name | "[" N "]" }
    value  = number | 'text' | "text" | true | false | null | bare-word

Paths start at the record (`sequence`, `subject`, `timestamp_ns`, `headers`), the envelope (`type`, `source`, `id`, …) or
`payload`. A path alone holds when the value is there and not empty, false or zero. Comparing with a value that is not
there, or of another kind, does not hold; only `!=` does. Nothing is ever evaluated as code; regular expressions are
stopped after a second (a signal, so only in the main thread).
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from msgspec import Struct

from mist.cli.records import MISSING, View
from mist.errors import InvalidArgument, TimedOut
from mist.protocol.subject import check_filter, matcher

Predicate = Callable[[View], bool]
EXPRESSION_CHARS_MAX = 4000
EXAMPLE = "for example 'payload.attrs.latency_ms>500 and source=api'"
DEPTH_MAX = 50
REGEX_LIMIT_S = 1.0

_TOKEN = re.compile(
    r"\s*(?:(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.-]))"
    r"|(?P<text>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
    r"|(?P<op>==|!=|<=|>=|!~|&&|\|\||[=<>~!()])"
    r"|(?P<word>[A-Za-z_@][\w@/:-]*(?:(?:\.[\w@/:-]+)|(?:\[\d+\]))*)"
    r"|(?P<bare>[\w][\w.:@/+-]*))",
    re.ASCII,
)
_OPS = frozenset({"==", "=", "!=", "<", "<=", ">", ">=", "~", "!~", "contains"})
_RESERVED = frozenset({"and", "or", "not", "contains"})
_WORDS = {"true": True, "false": False, "null": None}
_STEP = re.compile(r"[^.\[\]]+")


class Filter(Struct, frozen=True):
    """`subjects` is what the broker can filter by itself; `test` the rest, None when nothing is left to test."""

    subjects: tuple[str, ...]
    test: Predicate | None

    @property
    def everything(self) -> bool:
        return self.test is None and self.subjects == (">",)


def compile_filter(
    *,
    subject: Sequence[str] = (),
    type: Sequence[str] = (),
    source: Sequence[str] = (),
    id: Sequence[str] = (),
    trace_id: str | None = None,
    grep: str | None = None,
    where: Sequence[str] = (),
    invert: bool = False,
) -> Filter:
    """The filter of these options. Raises InvalidArgument for what cannot be parsed."""
    tests: list[Predicate] = []
    subjects = tuple(check_filter(s) for s in subject)
    if subjects and invert:
        match = matcher(subjects)
        tests.append(lambda v: match is None or match(v.record.subject))
    if type:
        types = frozenset(type)
        tests.append(lambda v: v.type in types)
    if source:
        sources = frozenset(source)
        tests.append(lambda v: v.source in sources)
    if id:
        ids = frozenset(id)
        tests.append(lambda v: v.record.id in ids or v.id in ids)
    if trace_id:
        wanted = trace_id.lower()
        tests.append(lambda v: v.trace_id.lower() == wanted)
    if grep is not None:
        tests.append(grep_test(grep))
    tests.extend(parse_where(expression) for expression in where)
    if not tests:
        return Filter(subjects or (">",), _never if invert else None)
    every = tests[0] if len(tests) == 1 else lambda v: all(t(v) for t in tests)
    if invert:
        return Filter((">",), lambda v: not every(v))
    return Filter(subjects or (">",), every)


def _never(view: View) -> bool:
    return False


# regular expressions


def compile_regex(text: str, option: str) -> Callable[[bytes | str], bool]:
    """A search that is stopped after a second. Raises InvalidArgument for what is not a regular expression."""
    try:
        as_text = re.compile(text)
        as_bytes = re.compile(text.encode()) if text.isascii() else None
    except (re.error, OverflowError, RecursionError) as exc:
        raise InvalidArgument(f"{option}: not a regular expression: {exc}") from exc

    def search(data: bytes | str) -> bool:
        with time_limit(REGEX_LIMIT_S, f"{option} {text!r}"):
            if isinstance(data, str):
                return as_text.search(data) is not None
            if as_bytes is not None:
                return as_bytes.search(data) is not None
            return as_text.search(data.decode("utf-8", "replace")) is not None

    return search


def grep_test(pattern: str) -> Predicate:
    search = compile_regex(pattern, "--grep")
    return lambda v: search(v.record.data)


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TimedOut in the block after `seconds` of wall time; no limit outside the main thread.

    Python's regular expressions cannot be given a budget, but they look for signals while they backtrack.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(number: int, frame: FrameType | None) -> None:
        raise TimedOut(f"{what} took more than {seconds:g} s on one record", hint="write it without nested repeats")

    handler = signal.signal(signal.SIGALRM, expired)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)


# the language of --where


class _Token(Struct, frozen=True):
    kind: str
    text: str
    at: int


def tokens(expression: str) -> list[_Token]:
    """The tokens of an expression. Raises InvalidArgument at the first character that starts none."""
    if len(expression) > EXPRESSION_CHARS_MAX:
        raise InvalidArgument(f"--where: longer than {EXPRESSION_CHARS_MAX} characters")
    out: list[_Token] = []
    at = 0
    end = len(expression.rstrip())
    while at < end:
        match = _TOKEN.match(expression, at)
        if match is None or match.end() == at:
            raise InvalidArgument(
                f"--where: cannot read {expression[at : at + 20].strip()!r} in {expression[:80]!r}", hint=EXAMPLE
            )
        kind = match.lastgroup or ""
        out.append(_Token(kind, match[kind], match.start(kind)))
        at = match.end()
    return out


def parse_where(expression: str) -> Predicate:
    """The predicate of an expression. Raises InvalidArgument with the place."""
    parser = _Parser(tokens(expression), expression)
    predicate = parser.alternatives(0)
    parser.finish()
    return predicate


class _Parser:
    def __init__(self, found: list[_Token], expression: str) -> None:
        self._tokens = found
        self._at = 0
        self._expression = expression

    def _fail(self, what: str) -> InvalidArgument:
        where = self._tokens[self._at].text if self._at < len(self._tokens) else "the end"
        return InvalidArgument(
            f"--where: {what} at {where[:40]!r} in {self._expression[:80]!r}",
            hint=EXAMPLE,
        )

    def _peek(self) -> str:
        return self._tokens[self._at].text if self._at < len(self._tokens) else ""

    def _take(self, *texts: str) -> bool:
        if self._at < len(self._tokens) and self._tokens[self._at].kind != "text" and self._peek() in texts:
            self._at += 1
            return True
        return False

    def finish(self) -> None:
        if self._at < len(self._tokens):
            raise self._fail("more than one expression")

    def alternatives(self, depth: int) -> Predicate:
        parts = [self._all(depth)]
        while self._take("or", "||"):
            parts.append(self._all(depth))
        return parts[0] if len(parts) == 1 else lambda v: any(p(v) for p in parts)

    def _all(self, depth: int) -> Predicate:
        parts = [self._one(depth)]
        while self._take("and", "&&"):
            parts.append(self._one(depth))
        return parts[0] if len(parts) == 1 else lambda v: all(p(v) for p in parts)

    def _one(self, depth: int) -> Predicate:
        if depth > DEPTH_MAX:
            raise self._fail(f"nested more than {DEPTH_MAX} deep")
        if self._take("not", "!"):
            inner = self._one(depth + 1)
            return lambda v: not inner(v)
        if self._take("("):
            inner = self.alternatives(depth + 1)
            if not self._take(")"):
                raise self._fail("a ) is missing")
            return inner
        return self._test()

    def _test(self) -> Predicate:
        if self._at >= len(self._tokens) or self._tokens[self._at].kind != "word" or self._peek() in _RESERVED:
            raise self._fail("a field name is expected")
        path = split_path(self._peek())
        self._at += 1
        op = self._peek()
        if self._at >= len(self._tokens) or op not in _OPS or self._tokens[self._at].kind == "text":
            return lambda v: bool(_or_none(v.get(path)))
        self._at += 1
        return comparison(path, op, self._value())

    def _value(self) -> Any:
        if self._at >= len(self._tokens):
            raise self._fail("a value is missing")
        token = self._tokens[self._at]
        if token.kind == "op":
            raise self._fail("a value is missing")
        self._at += 1
        if token.kind == "number":
            return float(token.text) if any(c in token.text for c in ".eE") else int(token.text)
        if token.kind == "text":
            return re.sub(r"\\(.)", r"\1", token.text[1:-1])
        return _WORDS.get(token.text, token.text) if token.kind == "word" else token.text


def split_path(text: str) -> tuple[str, ...]:
    """`payload.messages[0].role` as steps."""
    return tuple(_STEP.findall(text))


def _or_none(value: Any) -> Any:
    return None if value is MISSING else value


def comparison(path: tuple[str, ...], op: str, wanted: Any) -> Predicate:
    """One test of a value against a constant."""
    if op in ("~", "!~"):
        search = compile_regex(str(wanted), "--where ~")
        if op == "~":
            return lambda v: isinstance(x := v.get(path), str) and search(x)
        return lambda v: not (isinstance(x := v.get(path), str) and search(x))
    if op == "contains":
        return lambda v: _contains(v.get(path), wanted)
    if op in ("=", "=="):
        return lambda v: _equal(v.get(path), wanted)
    if op == "!=":
        return lambda v: not _equal(v.get(path), wanted)
    order: dict[str, Callable[[Any, Any], bool]] = {
        "<": lambda a, b: a < b,
        "<=": lambda a, b: a <= b,
        ">": lambda a, b: a > b,
        ">=": lambda a, b: a >= b,
    }
    compare = order[op]
    return lambda v: _ordered(x := v.get(path), wanted) and compare(x, wanted)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _equal(value: Any, wanted: Any) -> bool:
    if value is MISSING:
        return wanted is None
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(value, str) and _number(wanted):
        return value == str(wanted)  # ids and versions are texts that look like numbers
    return bool(value == wanted)


def _ordered(value: Any, wanted: Any) -> bool:
    return (_number(value) and _number(wanted)) or (isinstance(value, str) and isinstance(wanted, str))


def _contains(value: Any, wanted: Any) -> bool:
    if isinstance(value, str):
        return str(wanted) in value
    if isinstance(value, dict):
        return str(wanted) in value
    return isinstance(value, list) and wanted in value
