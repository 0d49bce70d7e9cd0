"""Numbers in prose: finding them and comparing them, exactly (decimals, never floats). Pure.

Read: an optional sign (`-`, `+`, the minus U+2212), an optional currency sign before or after it, digits with proper
thousands separators (`1,234,567`; also the thin and no-break spaces) or plain, a decimal fraction, an exponent, a
percent sign. Not read: fractions such as 1/2, number words, a decimal comma (`3,5` is 3 and 5).
A minus directly after a digit, a letter or a bracket is an operator: `10-5` holds 10 and 5.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Context, Decimal
from typing import Literal

Percent = Literal["strip", "fraction"]

DIGITS_MAX = 400
_CURRENCY = "$€£¥₹₽₩"
_NUMBER = re.compile(
    rf"""
    (?:(?<![\w).\]])(?P<sign>[-+\u2212])[ ]?)?
    [{_CURRENCY}]?[ ]?
    (?:(?<=[{_CURRENCY}])(?P<inner>[-\u2212]))?
    (?P<body>
      \d{{1,3}}(?:[,\u00a0\u2009\u202f]\d{{3}})+(?!\d)(?:\.\d+)?
      | \d+(?:\.\d+)?
      | (?<![\d.])\.\d+
    )
    (?P<exponent>[eE][-+]?\d{{1,3}}(?![\w.]))?
    (?P<percent>[ ]?%)?
    """,
    re.VERBOSE | re.ASCII,
)
_DIGITS = "0123456789"
_DIGIT = re.compile("[0-9]")
_NO_DIGITS = "".join(chr(c) for c in range(128) if chr(c) not in _DIGITS)
_ENDS = frozenset(["", ".", "\n", " ", "\t", "!", "?", ")", ";", ":"])
"""After two of these (or nothing) a number is over, whatever follows."""
_BEFORE_SPACE = frozenset(_CURRENCY + "+-\u2212")
_PARTS = frozenset(_DIGITS + ".,eE% \u00a0\u2009\u202f") | _BEFORE_SPACE
"""What a number may be made of. A space in it has a sign or a currency sign one or two characters before it."""
_SEPARATORS = str.maketrans("", "", ",\u00a0\u2009\u202f")
_CONTEXT = Context(prec=2 * DIGITS_MAX)


def numbers(text: str, *, percent: Percent = "strip", after: int = 0) -> Iterator[Decimal]:
    """Every number of the text, in order. `percent`: `50%` is 50 (strip) or 0.5 (fraction). `after`: only those from this
    character on."""
    for m in _NUMBER.finditer(text, after):
        sign, inner, body, exponent, share = m.groups()
        if not body.isdigit():
            body = body.translate(_SEPARATORS)
        if len(body) > DIGITS_MAX:
            continue
        value = Decimal(body + exponent if exponent else body)
        if (sign or inner or "+") != "+":
            value = -value
        if share and percent == "fraction":
            value = value.scaleb(-2, _CONTEXT)
        yield value


def first(text: str, *, percent: Percent = "strip") -> Decimal | None:
    """The first number of the text."""
    at = _DIGIT.search(text)
    if at is None:
        return None
    begin, plain_number = _around(text, at.start())
    return plain_number if plain_number is not None else next(numbers(text, percent=percent, after=begin), None)


def last(text: str, *, percent: Percent = "strip") -> Decimal | None:
    """The last number of the text. Found from the end: what stands before it is not read."""
    if len(text) <= DIGITS_MAX and text.isdigit() and text.isascii():
        return Decimal(text)
    at = len(text.rstrip(_NO_DIGITS)) - 1
    if at < 0:
        return None
    if text[at] not in _DIGITS:
        at = max([text.rfind(digit) for digit in _DIGITS])
        if at < 0:
            return None
    begin, plain_number = _around(text, at)
    if plain_number is not None:
        return plain_number
    # where that one has too many digits to be a number, the one before it counts
    for after in (begin, 0):
        found = list(numbers(text, percent=percent, after=after))
        if found:
            return found[-1]
    return None


def _around(text: str, at: int) -> tuple[int, Decimal | None]:
    """(a place from which the number around the digit at `at` is found as in the whole text, because no number reaches
    across it; that number, where it is nothing but digits)."""
    begin, end = at, at + 1
    if begin and text[begin - 1] in _DIGITS:  # most of a number is digits, and they are passed over at once
        from_ = max(0, begin - DIGITS_MAX)
        begin = from_ + len(text[from_:begin].rstrip(_DIGITS))
    while begin > 0:
        c = text[begin - 1]
        if c not in _PARTS:
            break
        if c == " " and (
            begin < 2 or (text[begin - 2] not in _BEFORE_SPACE and (begin < 3 or text[begin - 3] not in _BEFORE_SPACE))
        ):
            break
        begin -= 1
    while end < len(text) and text[end] in _DIGITS:
        end += 1
    if text[end : end + 1] in _ENDS and text[end + 1 : end + 2] in _ENDS:
        body = text[begin:end]
        if body.isdigit() and body.isascii() and len(body) <= DIGITS_MAX:
            return begin, Decimal(body)
    return begin, None


def after_marker(text: str, marker: str) -> str | None:
    """What follows the last occurrence of the marker, trimmed; None when it does not occur."""
    _, found, rest = text.rpartition(marker)
    return rest.strip() if found else None


def close(a: Decimal, b: Decimal, tolerance: Decimal) -> bool:
    """Whether they are equal, or differ by no more than `tolerance`."""
    return a == b or (tolerance > 0 and abs(_CONTEXT.subtract(a, b)) <= tolerance)


def plain(value: Decimal) -> str:
    """How a number is written in a result: no exponent where it is short, no trailing zeros."""
    written = str(value)
    if written.isdigit() and len(written) <= 40:
        return written
    text = f"{value.normalize(_CONTEXT):f}"
    return text if len(text) <= 40 else str(value)
