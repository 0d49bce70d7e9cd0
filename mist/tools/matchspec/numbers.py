"""Numbers in prose: finding them and comparing them, exactly (decimals, never floats). Pure.

Read: an optional sign (`-`, `+`, the minus U+2212), an optional currency sign before or after it, digits with proper
thousands separators (`1,234,567`; also the thin and no-break spaces) or plain, a decimal fraction, an exponent, a
percent sign. Not read: fractions such as 1/2, number words, a decimal comma (`3,5` is 3 and 5).
A minus directly after a digit, a letter or a bracket is an operator: `10-5` holds 10 and 5.
"""

from __future__ import annotations

import re
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
_SEPARATORS = str.maketrans("", "", ",\u00a0\u2009\u202f")
_CONTEXT = Context(prec=2 * DIGITS_MAX)


def numbers(text: str, *, percent: Percent = "strip") -> list[Decimal]:
    """Every number of the text, in order. `percent`: `50%` is 50 (strip) or 0.5 (fraction)."""
    found = []
    for m in _NUMBER.finditer(text):
        body = m["body"].translate(_SEPARATORS)
        if len(body) > DIGITS_MAX:
            continue
        value = Decimal(body + (m["exponent"] or ""))
        if (m["sign"] or m["inner"] or "+") != "+":
            value = -value
        if m["percent"] and percent == "fraction":
            value = value.scaleb(-2, _CONTEXT)
        found.append(value)
    return found


def after_marker(text: str, marker: str) -> str | None:
    """What follows the last occurrence of the marker, trimmed; None when it does not occur."""
    _, found, rest = text.rpartition(marker)
    return rest.strip() if found else None


def close(a: Decimal, b: Decimal, tolerance: Decimal) -> bool:
    """Whether they are equal, or differ by no more than `tolerance`."""
    return a == b or (tolerance > 0 and abs(_CONTEXT.subtract(a, b)) <= tolerance)


def plain(value: Decimal) -> str:
    """How a number is written in a result: no exponent where it is short, no trailing zeros."""
    text = f"{value.normalize(_CONTEXT):f}"
    return text if len(text) <= 40 else str(value)
