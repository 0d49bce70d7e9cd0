"""A look at msgpack from outside before it is decoded: depth, keys, number of values, and what has no JSON form.

msgpack can claim four billion elements in five bytes, and one byte may become an object of 64; so the headers are
walked first, without making anything, and only as far as there are bytes. Costs time per value, not per byte. Raises
without counting; does not check UTF-8 and trailing bytes, which the decoder does.
"""

from __future__ import annotations

import struct
from math import isfinite

from mist.errors import Malformed, NotFinite, TooDeep, TooManyKeys
from mist.protocol.screen import DEPTH_MAX, KEYS_MAX

VALUES_MAX = 1_000_000

_SKIP = {0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}
_FLOATS = {0xCA: struct.Struct(">f"), 0xCB: struct.Struct(">d")}
_STRINGS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_LISTS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}


def screen_msgpack(
    data: bytes, *, depth_max: int = DEPTH_MAX, keys_max: int = KEYS_MAX, values_max: int = VALUES_MAX
) -> None:
    """Raises Malformed (not msgpack, binary or extension values, keys that are not text), NotFinite, TooDeep,
    TooManyKeys (also for more than `values_max` values in all)."""
    size = len(data)
    at = keys = values = 0
    left = [1]  # values still to come, per open container; a map counts keys and values and has its flag set
    in_map = [False]
    while left:
        if not left[-1]:
            left.pop()
            in_map.pop()
            continue
        is_key = in_map[-1] and left[-1] % 2 == 0
        left[-1] -= 1
        values += 1
        if at >= size:
            raise Malformed("envelope: msgpack ends too early")
        if values > values_max:
            raise TooManyKeys(f"envelope: more than {values_max} values")
        code = data[at]
        at += 1
        count = -1
        if 0xA0 <= code <= 0xBF or code in _STRINGS:
            wide = _STRINGS.get(code, 0)
            at += wide + (int.from_bytes(data[at : at + wide]) if wide else code & 0x1F)
            continue
        if is_key:
            raise Malformed("envelope: a key that is not text has no JSON form")
        if code <= 0x7F or code >= 0xE0:
            continue
        if code in _SKIP:
            at += _SKIP[code] - 1
        elif code in _FLOATS:
            form = _FLOATS[code]
            if at + form.size > size:
                raise Malformed("envelope: msgpack ends too early")
            if not isfinite(form.unpack_from(data, at)[0]):
                raise NotFinite("envelope: NaN and infinities have no JSON form")
            at += form.size
        elif code <= 0x8F or code in _MAPS:
            wide = _MAPS.get(code, 0)
            pairs = int.from_bytes(data[at : at + wide]) if wide else code & 0x0F
            at += wide
            keys += pairs
            count = 2 * pairs
            if keys > keys_max:
                raise TooManyKeys(f"envelope: more than {keys_max} keys")
        elif code <= 0x9F or code in _LISTS:
            wide = _LISTS.get(code, 0)
            count = int.from_bytes(data[at : at + wide]) if wide else code & 0x0F
            at += wide
        else:
            raise Malformed(f"envelope: msgpack type 0x{code:02x} has no JSON form")
        if count >= 0:
            if len(left) > depth_max:  # the document itself is the first entry
                raise TooDeep(f"envelope: nested deeper than {depth_max}", meta={"depth_max": str(depth_max)})
            left.append(count)
            in_map.append(code <= 0x8F or code in _MAPS)
    if at > size:
        raise Malformed("envelope: msgpack ends too early")
