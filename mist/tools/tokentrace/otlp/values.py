"""OTLP's attribute values as JSON and back: pure, no protobuf.

Text, truth values, integers, lists and maps are their JSON. What JSON cannot say, or would not give back, is a map with one
key of ours:

    {"otel.bytes": "<base64>"}              bytes
    {"otel.double": "NaN"}                  a double that is not finite: NaN, Infinity, -Infinity
    {"otel.kvlist": [[key, value], ...]}    a map with a key twice, or one that would look like these forms

A double always has a fraction or an exponent in its JSON, an integer never: `1.0` and `1` stay what they were. A value
that is not set is null.
"""

from __future__ import annotations

import base64
import binascii
from math import inf, isnan, nan
from typing import Any

from mist.errors import TooDeep

DEPTH_MAX = 16
"""Lists and maps inside one another in one value. In its JSON form each is at most three levels, so that a span stays
below the codec's limit of 64."""

BYTES = "otel.bytes"
DOUBLE = "otel.double"
KVLIST = "otel.kvlist"
_FORMS = (BYTES, DOUBLE, KVLIST)
_SPECIAL = {"NaN": nan, "Infinity": inf, "-Infinity": -inf}


def too_deep() -> TooDeep:
    return TooDeep(f"an attribute value is nested deeper than {DEPTH_MAX}")


def of_bytes(data: bytes) -> dict[str, str]:
    return {BYTES: base64.b64encode(data).decode()}


def of_double(value: float) -> float | dict[str, str]:
    if value - value == 0:  # finite
        return value
    return {DOUBLE: "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"}


def of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A map, from its keys and values in order (the values are JSON already)."""
    out = dict(pairs)
    if len(out) != len(pairs) or (len(out) == 1 and pairs[0][0] in _FORMS):
        return {KVLIST: [list(pair) for pair in pairs]}
    return out


def special(value: dict[str, Any]) -> bytes | float | list[tuple[str, Any]] | None:
    """What a map of one key of ours stands for (a list of pairs is a map); None for any other map."""
    if len(value) != 1:
        return None
    (name, inner), *_ = value.items()
    if name == BYTES and isinstance(inner, str):
        try:
            return base64.b64decode(inner, validate=True)
        except (binascii.Error, ValueError):
            return None
    if name == DOUBLE and isinstance(inner, str):
        return _SPECIAL.get(inner)
    if name == KVLIST and isinstance(inner, list) and all(_is_pair(pair) for pair in inner):
        return [(pair[0], pair[1]) for pair in inner]
    return None


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
