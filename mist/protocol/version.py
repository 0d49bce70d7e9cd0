"""Protocol versions: what we speak, and negotiation between two ranges (seed behaviour, spec 1.4)."""

from __future__ import annotations

from mist.errors import InvalidArgument, VersionUnsupported

CURRENT = 1
MIN = 1
MAX = 1


def _integer(text: str) -> int:
    body = text.strip()
    digits = body[1:] if body[:1] in "+-" else body
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(text)
    return int(body)


def check_version(version: str) -> None:
    """Raise VersionUnsupported unless `version` is an integer in MIN..MAX (` 1 `, `+1` and `01` are 1)."""
    if version == "1":
        return
    try:
        number = _integer(version)
    except ValueError:
        raise VersionUnsupported(
            f"envelope: invalid version {version[:40]!r}", hint=f"this build speaks {MIN}"
        ) from None
    if number < MIN:
        raise VersionUnsupported(
            f"envelope: version {version[:40]!r} is too old", hint=f"this build speaks {MIN} to {MAX}"
        )
    if number > MAX:
        raise VersionUnsupported(
            f"envelope: version {version[:40]!r} is too new", hint=f"this build speaks {MIN} to {MAX}"
        )


def _range(text: str, whose: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    try:
        lo = _integer(low)
        hi = _integer(high) if dash else lo
    except ValueError:
        raise InvalidArgument(f"invalid {whose} version range {text[:40]!r}") from None
    if lo > hi:
        raise InvalidArgument(f"inverted {whose} version range {text[:40]!r}")
    return lo, hi


def negotiate(local: str, remote: str) -> str:
    """The highest version in both ranges (`N` or `min-max`). Raises VersionUnsupported when there is none."""
    a, b = _range(local, "local"), _range(remote, "remote")
    low, high = max(a[0], b[0]), min(a[1], b[1])
    if low > high:
        raise VersionUnsupported(f"no compatible version between {local[:40]!r} and {remote[:40]!r}")
    return str(high)
