"""What looks like a secret in a text: built-in detectors, and patterns of the operator's that cannot hurt.

Promises: finding is linear in the text, for any text, with a bounded number of steps for each character; so a pattern of
one's own is parsed at load and refused where its steps would not be bounded, and where a look at one string would not be
the same as a look at a document that contains it (anchors, look-arounds, back-references).
Does not: prove that something is a secret, or find one that is split, encrypted or in base64.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct

from mist.errors import InvalidArgument

PATTERN_CHARS_MAX = 1000
REPEAT_MAX = 1024
STEPS_MAX = 4096
"""For each character of the text, in the worst case."""

Span = tuple[int, int]


class Detector(Struct, frozen=True):
    """`hint` is a fast look at the text as UTF-8: False means that there is no match; None = look always. `narrow` says
    where in a candidate the secret is; None = nowhere."""

    label: str
    pattern: re.Pattern[str]
    hint: Callable[[bytes], object] | None = None
    narrow: Callable[[str, re.Match[str]], Span | None] | None = None

    def find(self, text: str) -> Iterator[Span]:
        """Where they are, from left to right, not overlapping."""
        at = 0
        while (m := self.pattern.search(text, at)) is not None:
            span = m.span() if self.narrow is None else self.narrow(text, m)
            if span is None:
                at = m.start() + 1
            else:
                yield span
                at = span[1]

    def hit(self, text: str) -> bool:
        return next(self.find(text), None) is not None

    def in_bytes(self, data: bytes) -> bool:
        """`hit` for a text as UTF-8."""
        return (self.hint is None or bool(self.hint(data))) and self.hit(data.decode(errors="replace"))


def _detector(
    label: str,
    pattern: str,
    hint: Callable[[bytes], object],
    narrow: Callable[[str, re.Match[str]], Span | None] | None = None,
) -> Detector:
    return Detector(label, re.compile(pattern), hint, narrow)


def _any(*needles: bytes | re.Pattern[bytes]) -> Callable[[bytes], object]:
    """A hint: one of these is there. An expression begins with one plain character that is rare: the engine finds that
    one with memchr, twenty times faster than it tries a longer beginning or a set of characters."""
    plain = [needle for needle in needles if isinstance(needle, bytes)]
    searches = [needle.search for needle in needles if not isinstance(needle, bytes)]
    return lambda data: any(needle in data for needle in plain) or any(search(data) for search in searches)


_LENGTHS: tuple[tuple[int, int, tuple[int, ...]], ...] = (
    (3400, 3499, (15,)), (3700, 3799, (15,)),
    (3000, 3059, (14,)), (3600, 3699, (14,)), (3800, 3899, (14,)), (3528, 3589, (16, 17, 18, 19)),
    (4000, 4999, (13, 16, 19)),
    (2221, 2720, (16,)), (5100, 5599, (16,)),
    (6011, 6011, (16, 17, 18, 19)), (6200, 6299, (16, 17, 18, 19)), (6440, 6599, (16, 17, 18, 19)),
)  # fmt: skip
"""First four digits of card numbers, and how many there are in all (ISO/IEC 7812, as the networks publish them)."""


def luhn(digits: str) -> bool:
    """Whether the check digit is right."""
    total = 0
    for number, char in enumerate(reversed(digits)):
        value = ord(char) - 48
        if number % 2:
            value = value * 2 - 9 if value > 4 else value * 2
        total += value
    return total % 10 == 0


def _card(text: str, m: re.Match[str]) -> Span | None:
    """The longest card number that begins here. What follows it may be digits too: a date, a check number."""
    places = [at for at in range(m.start(), m.end()) if text[at] not in " -"]
    digits = "".join(text[at] for at in places)
    first = int(digits[:4])
    for low, high, lengths in _LENGTHS:
        if low <= first <= high:
            for length in reversed(lengths):
                end = places[length - 1] + 1 if length <= len(places) else 0
                if end and not text[end : end + 1].isalnum() and luhn(digits[:length]):
                    return m.start(), end
    return None


def _token(text: str, m: re.Match[str]) -> Span | None:
    """A bearer token, and not the next word of a sentence about bearers."""
    token = m[1]
    return m.span() if len(token) >= 20 or any(c.isdigit() for c in token) else None


# Possessive repeats never give back; what may be long comes last, or is followed by nothing that can fail, or is bounded:
# each of the three keeps a hostile text from costing more than a scan.
_key_hint = _any(
    re.compile(rb"-(?=[A-Za-z0-9_-]{10})(?:(?<=sk-)|(?<=xox[a-z]-)|(?<=glpat-)|(?<=pypi-))"),
    re.compile(
        rb"_(?=[A-Za-z0-9+/=_]{16})(?:(?<=gh[opsru]_)|(?<=_pat_)|(?<=hf_)|(?<=gsk_)|(?<=_live_)|(?<=_test_)|(?<=whsec_)"
        rb"|(?<=npm_))"
    ),
    b"AKIA", b"ASIA", b"AIza", b"SG.",
)  # fmt: skip
# a card number begins behind something that is no letter or digit, with 2 to 6: in this alphabet `.2` or `-2`, and a 2 is rare
_CARD_ALPHABET = bytes(
    ord("2") if c in b"23456" else ord("0") if c in b"01789" else ord("x") if chr(c).isalpha() and c < 128
    else ord("-") if c in b" -" else ord(".")
    for c in range(256)
)  # fmt: skip
_card_hint = _any(re.compile(rb"2(?<=[.-]2)(?:-?[02]){12}"))
BUILT_IN = {
    d.label: d
    for d in (
        _detector(
            "api_key",
            r"(?<![A-Za-z0-9])(?:sk-[A-Za-z0-9_-]{16,}+|(?:AKIA|ASIA)[0-9A-Z]{16,}+|gh[opsru]_[A-Za-z0-9]{30,}+"
            r"|github_pat_[A-Za-z0-9_]{22,}+|xox[a-z]-[A-Za-z0-9-]{10,}+|AIza[0-9A-Za-z_-]{35,}+|glpat-[A-Za-z0-9_-]{20,}+"
            r"|hf_[A-Za-z0-9]{30,}+|gsk_[A-Za-z0-9]{30,}+|[rs]k_(?:live|test)_[A-Za-z0-9]{16,}+|whsec_[A-Za-z0-9+/=]{16,}+"
            r"|npm_[A-Za-z0-9]{36,}+|pypi-[A-Za-z0-9_-]{32,}+|SG\.[A-Za-z0-9_-]{16,64}+\.[A-Za-z0-9_-]{16,}+)",
            _key_hint,
        ),
        _detector(
            "bearer",
            r"[Bb](?<!\w.)[Ee][Aa][Rr][Ee][Rr][ \t]{1,4}+([A-Za-z0-9._~+/=-]{8,}+)",
            lambda data: b"bearer" in data.lower(),
            _token,
        ),
        _detector(
            "jwt",
            r"(?<![A-Za-z0-9])eyJ[A-Za-z0-9_-]{8,2048}+\.eyJ[A-Za-z0-9_-]{4,}+\.[A-Za-z0-9_-]{4,}+",
            _any(re.compile(rb"J(?<=eyJ)")),
        ),
        _detector(
            "private_key",
            r"-----BEGIN [A-Z0-9 ]{0,32}PRIVATE KEY-----(?:[^-]|-(?!----END))*+(?:-----END [A-Z0-9 ]{0,32}PRIVATE KEY-----)?+",
            lambda data: b"PRIVATE KEY" in data,
        ),
        _detector("email", r"[\w.%+'-]{1,64}+@(?:[\w-]{1,63}+\.){1,8}[^\W\d_]{2,24}", lambda data: b"@" in data),
        _detector(
            "card",
            r"[2-6](?<![0-9A-Za-z].)(?:[ -]?[0-9]){12,18}",
            lambda data: _card_hint(b"." + data.translate(_CARD_ALPHABET)),
            _card,
        ),
        _detector("phone", r"\+(?<![0-9A-Za-z].)[1-9](?:[ ().-]{0,2}+[0-9]){7,14}", lambda data: b"+" in data),
    )
}


def custom(label: str, pattern: str) -> Detector:
    """A detector of the operator's own. Raises InvalidArgument with the reason where it might hurt."""
    where = f"pattern {label!r}"
    if len(pattern) > PATTERN_CHARS_MAX:
        raise InvalidArgument(f"{where}: {len(pattern)} characters (max {PATTERN_CHARS_MAX})")
    try:
        compiled = re.compile(pattern)
        # the tree is the only honest way to count steps, and the standard library keeps it in this module
        tree: Any = importlib.import_module("re._parser").parse(pattern)
    except (re.error, OverflowError, RecursionError) as exc:
        raise InvalidArgument(f"{where}: not a regular expression: {exc}") from exc
    if compiled.flags & (re.MULTILINE | re.LOCALE | re.ASCII):
        raise InvalidArgument(f"{where}: of the flags only i, s and x are taken")
    if tree.getwidth()[0] < 1:
        raise InvalidArgument(f"{where}: it matches the empty text")
    paths, length = _cost(list(tree), where, last=True)
    if paths * length > STEPS_MAX:
        raise InvalidArgument(
            f"{where}: up to {min(paths * length, 10**9)} steps for each character (max {STEPS_MAX})",
            hint="make its repeats shorter, fewer, or possessive: {1,20}+",
        )
    return Detector(label, compiled)


def _cost(items: list[Any], where: str, *, last: bool) -> tuple[int, int]:
    """(ways to go on, characters looked at) of a sequence. `last`: nothing comes after it, so that its final repeat is
    never gone back into."""
    paths, length = 1, 0
    for number, (op, arg) in enumerate(items):
        final = last and number == len(items) - 1
        some, chars = _item(str(op), arg, where, last=final)
        paths, length = min(paths * some, 10**9), length + chars
    return paths, max(length, 1)


def _item(op: str, arg: Any, where: str, *, last: bool) -> tuple[int, int]:
    if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "CATEGORY"):
        return 1, 1
    if op == "AT" and str(arg) in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
        return 1, 1
    if op == "SUBPATTERN":
        return _cost(list(arg[3]), where, last=last)
    if op == "ATOMIC_GROUP":
        return 1, _cost(list(arg), where, last=last)[1]
    if op == "BRANCH":
        costs = [_cost(list(branch), where, last=last) for branch in arg[1]]
        return sum(paths for paths, _ in costs), max(length for _, length in costs)
    if op in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        low, high, inner = arg
        paths, length = _cost(list(inner), where, last=False)
        if int(high) > REPEAT_MAX:
            if last and paths == 1 and op != "MIN_REPEAT" and int(low) <= REPEAT_MAX:
                return 1, int(low) * length + length
            raise InvalidArgument(
                f"{where}: a repeat without an end, or above {REPEAT_MAX}, is taken as its last part only, and greedy",
                hint="say how long it may be: {1,64} for +",
            )
        ways = paths ** min(int(high), 64) * (1 if op == "POSSESSIVE_REPEAT" or last else int(high) - int(low) + 1)
        return ways, int(high) * length
    raise InvalidArgument(f"{where}: {op.lower()} is not taken: no anchors, look-arounds or back-references")
