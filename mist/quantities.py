"""Times and sizes as people write them: `7d`, `1h30m`, `250ms`; `10GiB`, `512KiB`, `1.5MB`.

    retain: Duration = Duration("30d")

A Duration is a float of seconds, a Size an int of bytes, so that they are used like the number they are. A bare number is no
duration (of what? nanoseconds, in the seed), except 0; a bare number is a size in bytes. `str` gives the text back in the
largest units that keep it exact.
"""

from __future__ import annotations

import math
import re
from typing import Any, Self

from mist.errors import InvalidArgument

_SECONDS = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
    "w": 604800.0,
}
_SHOWN = (("w", 604800), ("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
_BYTES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", 1):
    _BYTES |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power, _letter: 1024**_power}
_BINARY = ("PiB", "TiB", "GiB", "MiB", "KiB")
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|µs|ms|s|m|h|d|w)", re.ASCII)
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", re.ASCII)
CHARS_MAX = 40


class Duration(float):
    """Seconds, from text with units (or 0)."""

    def __new__(cls, value: object = 0) -> Self:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return super().__new__(cls, _seconds(value.strip()))
        if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
            return super().__new__(cls, 0.0)
        raise InvalidArgument(
            f"{str(value)[:CHARS_MAX]!r} is no duration: it has no unit", hint="for example 30s, 5m, 7d"
        )

    def __str__(self) -> str:
        left, out = float(self), ""
        if not left:
            return "0"
        for unit, seconds in _SHOWN:
            if left >= seconds and unit != "w":
                count, left = divmod(left, seconds)
                out += f"{count:.0f}{unit}"
        return out + (f"{round(left * 1000, 6):g}ms" if left > 1e-9 else "")

    __repr__ = __str__


class Size(int):
    """Bytes, from a number or text with a unit. `K`, `M`, `G` mean the binary ones, like `KiB`; `KB` is 1000."""

    def __new__(cls, value: object = 0) -> Self:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return super().__new__(cls, _bytes(value.strip()))
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return super().__new__(cls, value)
        raise InvalidArgument(f"{str(value)[:CHARS_MAX]!r} is no size", hint="for example 10GiB, 512KiB, 4096")

    def __str__(self) -> str:
        for power, unit in zip(range(5, 0, -1), _BINARY, strict=True):
            if self and self % 1024**power == 0:
                return f"{self // 1024**power}{unit}"
        return f"{int(self)}"

    __repr__ = __str__


def read_quantity(type: type, value: Any) -> Any:
    """The `dec_hook` of msgspec for both."""
    if type in (Duration, Size):
        try:
            return type(value)
        except InvalidArgument as exc:
            raise ValueError(str(exc)) from exc  # what msgspec turns into its own error, with the path
    raise NotImplementedError(f"no quantity: {type}")


def _seconds(text: str) -> float:
    if text == "0":
        return 0.0
    parts = list(_PART.finditer(text)) if len(text) <= CHARS_MAX else []
    total = sum(float(m[1]) * _SECONDS[m[2]] for m in parts)
    if not parts or "".join(m[0] for m in parts) != text or not math.isfinite(total):
        raise InvalidArgument(f"{text[:CHARS_MAX]!r} is no duration", hint="for example 30s, 5m, 1h30m, 7d")
    return total


def _bytes(text: str) -> int:
    m = _SIZE.fullmatch(text) if len(text) <= CHARS_MAX else None
    unit = _BYTES.get(m[2].lower()) if m is not None else None
    if m is None or unit is None:
        raise InvalidArgument(f"{text[:CHARS_MAX]!r} is no size", hint="for example 10GiB, 512KiB, 4096")
    return round(float(m[1]) * unit) if "." in m[1] else int(m[1]) * unit
