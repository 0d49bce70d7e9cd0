"""What must hold of a JSON document from outside, and why one was refused.

`screen` runs before anything is decoded: size, UTF-8, depth, number of keys. `check_numbers` runs on a payload whose
syntax the decoder has already accepted. `explain` runs after a failure and names it: NaN, a lone surrogate, depth, or
just not JSON. Every function is linear in the input, for any bytes, and raises or returns errors without counting
them (codec.py counts). It does not look for duplicate keys: the last one wins, as in the seed.
"""

from __future__ import annotations

import re
from math import isinf

import msgspec
from msgspec import Raw

from mist.errors import LoneSurrogate, Malformed, NotFinite, ProtocolError, TooDeep, TooLarge, TooManyKeys
from mist.protocol.envelope import SIZE_BYTES_MAX

DEPTH_MAX = 64
"""Objects and lists open at once; the envelope's own object is the first, its payload the second."""
KEYS_MAX = 100_000
INTEGER_DIGITS_MAX = 4300
"""More digits are refused by the decoder, and by Python itself."""

_KEY_BYTES_MIN = 4  # `"":0,` is the shortest key there is
_DECODE_BYTES_MAX = 1024 * 1024
"""A payload up to this size is checked by decoding it: fast, and at most some 20 MiB of objects for a moment."""
_CHUNK = 256 * 1024

_NOT_OPENING = bytes(set(range(256)) - set(b"[{"))
_NOT_OPENING_OR_NEWLINE = bytes(set(range(256)) - set(b"[{\n"))
_AS_BRACE = bytes.maketrans(b"[", b"{")
_NOT_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_STEP = bytes.maketrans(b"{}", b"[]")

_NOT_FINITE = re.compile(rb"(?<![\w.])[-+]?(?:nan|inf|infinity)(?!\w)", re.IGNORECASE)
_SURROGATE = re.compile(
    rb"\\u(?:d[89ab][0-9a-f]{2}(?!\\ud[c-f][0-9a-f]{2})|(?<!\\ud[89ab][0-9a-f]{2}\\u)d[c-f][0-9a-f]{2})",
    re.IGNORECASE,
)
# A number is looked at closely if its exponent has three digits or it is very long. The look-behinds make every
# number be tried once, at its first digit; the possessive repeats never give back: linear for any input.
_BIG = re.compile(
    rb"(?<![0-9.eE+])(?<![eE]-)[0-9]"
    rb"(?:[0-9]*+(?:\.[0-9]++)?+[eE]\+?0*+[0-9]{3}[0-9]*+|[0-9]{199}[0-9]*+(?:\.[0-9]++)?+(?:[eE][+-]?+[0-9]++)?+)"
)


def screen(
    data: bytes, *, size_bytes_max: int = SIZE_BYTES_MAX, depth_max: int = DEPTH_MAX, keys_max: int = KEYS_MAX
) -> None:
    """Refuse a document that could hurt whoever decodes it. Raises TooLarge, Malformed or LoneSurrogate (not UTF-8),
    TooDeep, TooManyKeys.

    Counting brackets decides nearly every document; the exact look is taken only at those that have more than
    `depth_max` of them, brackets in strings included.
    """
    size = len(data)
    if size > size_bytes_max:
        raise TooLarge("envelope", size_bytes=size, size_bytes_max=size_bytes_max)
    check_utf8(data)
    if len(data.translate(None, _NOT_OPENING)) > depth_max:
        check_depth(data, depth_max)
    if size > keys_max * _KEY_BYTES_MIN and data.count(b":") > keys_max:
        keys = outside_strings(data).count(b":")
        if keys > keys_max:
            raise TooManyKeys(f"envelope: {keys} keys (max {keys_max})")


def screen_lines(
    data: bytes,
    lines: list[bytes],
    *,
    size_bytes_max: int = SIZE_BYTES_MAX,
    depth_max: int = DEPTH_MAX,
    keys_max: int = KEYS_MAX,
) -> bool:
    """Whether each line of `data` is certain to pass `screen`. False says nothing: look at each by itself."""
    if not lines or max(map(len, lines)) > min(size_bytes_max, keys_max * _KEY_BYTES_MIN):
        return False
    try:
        check_utf8(data)
    except ProtocolError:
        return False
    return b"{" * (depth_max + 1) not in data.translate(_AS_BRACE, _NOT_OPENING_OR_NEWLINE)


def check_utf8(data: bytes) -> None:
    """Raise LoneSurrogate for a surrogate written as UTF-8, Malformed for any other bytes that are not UTF-8."""
    if data.isascii():
        return
    try:
        data.decode()
    except UnicodeDecodeError as exc:
        raise _not_utf8(data, exc) from exc


def _not_utf8(data: bytes, exc: UnicodeDecodeError) -> ProtocolError:
    at = exc.start
    if data[at] == 0xED and 0xA0 <= int.from_bytes(data[at + 1 : at + 2]) <= 0xBF:
        return LoneSurrogate(f"envelope: a surrogate is not a character (byte {at})")
    return Malformed(f"envelope: not UTF-8 at byte {at}")


def check_depth(data: bytes, depth_max: int) -> None:
    """Raise TooDeep when more than `depth_max` objects and lists are open at once anywhere in the document."""
    depth = 0
    for char in outside_strings(data).translate(_STEP, _NOT_BRACKET):
        if char == 0x5B:
            depth += 1
            if depth > depth_max:
                raise TooDeep(f"envelope: nested deeper than {depth_max}", meta={"depth_max": str(depth_max)})
        else:
            depth -= 1


def check_numbers(payload: bytes) -> None:
    """Raise NotFinite for a number that becomes an infinity when read, or an integer of more than 4,300 digits.

    The payload is JSON already, as far as a decoder sees that skips it; `msgspec.Raw` will do.
    """
    if len(payload) <= _DECODE_BYTES_MAX:
        try:
            _any(payload)
        except msgspec.ValidationError as exc:
            raise NotFinite(f"envelope: {exc}") from exc
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise explain(bytes(payload), exc) from exc
        return
    for m in _BIG.finditer(outside_strings(bytes(payload))):
        number = m[0]
        if len(number) > INTEGER_DIGITS_MAX if number.isdigit() else isinf(float(number)):
            raise NotFinite("envelope: Number out of range")


def check_all_numbers(payloads: list[Raw]) -> None:
    """`check_numbers` for many, in half the time where all are small. Raises what it raises, or a DecodeError of msgspec
    for one that is no JSON or holds such a number: the caller then looks at each."""
    if sum(map(len, payloads)) > _DECODE_BYTES_MAX:
        for payload in payloads:
            check_numbers(payload)
        return
    for payload in payloads:
        _any(payload)


_any = msgspec.json.Decoder().decode


def outside_strings(data: bytes) -> bytes:
    """The document without its strings; a quotation mark stands for nearly each, so that what was apart stays apart.

    Exact up to the first place where the document stops being JSON. Works in chunks, because splitting ten megabytes
    of `""` at once would make ten million objects.
    """
    if b"\\" in data:
        data = data.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    out: list[bytes] = []
    inside = 0
    for at in range(0, len(data), _CHUNK):
        parts = data[at : at + _CHUNK].split(b'"')
        out.append(b'"'.join(parts[inside::2]))
        inside ^= (len(parts) - 1) & 1
    return b"".join(out)


def explain(data: bytes, exc: BaseException) -> ProtocolError:
    """The error for a document that a decoder refused with `exc`."""
    if isinstance(exc, RecursionError):
        return TooDeep("envelope: nested too deeply")
    if isinstance(exc, UnicodeDecodeError):
        try:
            check_utf8(data)
        except ProtocolError as error:
            return error
    if not isinstance(exc, msgspec.ValidationError):
        # a decoder says "malformed" or "truncated" for these, which helps nobody
        if b"\\u" in data and (m := _SURROGATE.search(data.replace(b"\\\\", b"__"))):
            return LoneSurrogate(f"envelope: half of a surrogate pair is not a character (byte {m.start()})")
        if m := _NOT_FINITE.search(outside_strings(data)):
            return NotFinite(f"envelope: {m[0].decode()} has no JSON form")
    return Malformed(f"envelope: {exc}")
