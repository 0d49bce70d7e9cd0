"""Bytes to envelopes and back. JSON is canonical; msgpack is the second content type.

`decode` is what a reader of our own stores uses: shape, version and checksum are verified. `decode_foreign` is what
every door to the outside uses (http, file, stdio, streams made by others): it adds size, depth, key-count, NaN and
surrogate checks before anything is decoded. Every refusal is its own error class and is counted in `refusals`.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from msgspec import Raw

from mist.errors import (
    ChecksumMismatch,
    LoneSurrogate,
    Malformed,
    MissingField,
    NotFinite,
    ProtocolError,
    TooDeep,
    TooLarge,
    TooManyKeys,
)
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope
from mist.protocol.version import check_version

JSON = "application/json"
MSGPACK = "application/msgpack"
NDJSON = "application/x-ndjson"

DEPTH_MAX = 64
KEYS_MAX = 100_000

refusals: Counter[str] = Counter()
"""How many documents this process refused, by error code."""

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Envelope)
encode: Callable[[Envelope], bytes] = _encoder.encode
"""Envelope -> compact JSON, keys in the order of the class, payload bytes verbatim."""

_FIELDS = {name: name for name in Envelope.__struct_fields__}


def encode_lines(envelopes: Iterable[Envelope]) -> bytes:
    """JSON lines: one document and one newline per envelope."""
    return _encoder.encode_lines(envelopes)


def refuse(error: ProtocolError | TooLarge) -> ProtocolError | TooLarge:
    """Count a refusal and hand the error back, to be raised."""
    refusals[error.code] += 1
    return error


def decode(data: bytes | bytearray | memoryview) -> Envelope:
    """The envelope in one JSON document, verified: required fields, version, checksum.

    Raises Malformed, MissingField, VersionUnsupported or ChecksumMismatch.
    """
    try:
        env = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        env = _decode_slowly(bytes(data))
    if env.version == "1" and env.id and env.source and env.type and not env.checksum:
        return env
    return verify(env)


def verify(env: Envelope) -> Envelope:
    """The same envelope, or the first error in the seed's order: version, id, source, type; then the checksum."""
    for field in ("version", "id", "source", "type"):
        if not getattr(env, field):
            raise refuse(MissingField(field))
    try:
        check_version(env.version)
    except ProtocolError as exc:
        raise refuse(exc) from None
    if env.checksum:
        computed = zlib.crc32(env.payload)
        if computed != env.checksum:
            raise refuse(ChecksumMismatch(stated=env.checksum, computed=computed))
    return env


def _decode_slowly(data: bytes) -> Envelope:
    """What the seed accepts beyond the fast path: keys in any case, absent payload or time, invalid UTF-8."""
    try:
        text = data.decode("utf-8", "replace").encode() if not _is_utf8(data) else data
        fields = msgspec.json.decode(text, type=dict[str, Raw])
    except RecursionError as exc:
        raise refuse(TooDeep("envelope: nested too deeply")) from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise refuse(Malformed(f"envelope: {exc}")) from exc
    known: dict[str, Any] = {"payload": Raw(b"null"), "timestamp_ns": Raw(b"0")}
    for name in ("version", "id", "source", "type"):
        known[name] = Raw(b'""')
    for key, raw in fields.items():
        name = key if key in _FIELDS else key.lower()
        if name in _FIELDS:
            known[name] = raw
    if bytes(known.get("checksum", b"0")) == b"null":
        del known["checksum"]
    body = b",".join(b'"%s":%s' % (k.encode(), bytes(v)) for k, v in known.items())
    try:
        return _decoder.decode(b"{%s}" % body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise refuse(Malformed(f"envelope: {exc}")) from exc


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


_NOT_FINITE = re.compile(rb"(?<![A-Za-z0-9_\"\\])-?(?:NaN|Infinity|inf|nan)\b")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BIG_EXPONENT = re.compile(rb"[0-9][eE]\+?[0-9]{3,}")


def screen(
    data: bytes, *, size_bytes_max: int = SIZE_BYTES_MAX, depth_max: int = DEPTH_MAX, keys_max: int = KEYS_MAX
) -> None:
    """Refuse a JSON document that could hurt whoever decodes it, before it is decoded.

    Raises TooLarge, TooDeep, TooManyKeys, NotFinite or LoneSurrogate. Counting bytes decides nearly every document;
    the exact look happens only when a count is above its limit.
    """
    if len(data) > size_bytes_max:
        raise refuse(TooLarge("envelope", size_bytes=len(data), size_bytes_max=size_bytes_max))
    if data.count(b"{") + data.count(b"[") > depth_max or data.count(b":") > keys_max:
        bare = _STRING.sub(b'""', data)
        depth = deepest = 0
        for byte in bare:
            if byte in b"{[":
                depth += 1
                deepest = max(deepest, depth)
            elif byte in b"}]":
                depth -= 1
        if deepest > depth_max:
            raise refuse(TooDeep(f"envelope: nested {deepest} deep (max {depth_max})"))
        keys = bare.count(b":")
        if keys > keys_max:
            raise refuse(TooManyKeys(f"envelope: {keys} keys (max {keys_max})"))
    if (
        (b"N" in data or b"n" in data or b"I" in data)
        and _NOT_FINITE.search(data)
        and _NOT_FINITE.search(_STRING.sub(b'""', data))
    ):
        raise refuse(NotFinite("envelope: NaN and infinities have no JSON form"))
    if (b"e" in data or b"E" in data) and _BIG_EXPONENT.search(data):
        for m in re.finditer(rb"-?[0-9]+(?:\.[0-9]+)?[eE]\+?[0-9]{3,}", _STRING.sub(b'""', data)):
            if float(m[0]) in (float("inf"), float("-inf")):
                raise refuse(NotFinite("envelope: a number is too large to be finite"))
    if b"\\u" in data and _SURROGATE.search(data):
        try:
            msgspec.json.decode(data)
        except msgspec.DecodeError as exc:
            if "surrogate" in str(exc):
                raise refuse(LoneSurrogate(f"envelope: {exc}")) from exc


def decode_foreign(data: bytes, *, size_bytes_max: int = SIZE_BYTES_MAX) -> Envelope:
    """`screen` and `decode`: for bytes from outside."""
    screen(data, size_bytes_max=size_bytes_max)
    return decode(data)


def decode_lines(data: bytes, *, foreign: bool = False) -> list[Envelope]:
    """Envelopes of a block of JSON lines. Empty lines are passed over. The first bad line raises, naming its number.

    The whole block is decoded at once; only after a failure, or for foreign bytes, line by line.
    """
    if not foreign:
        try:
            envs: list[Envelope] = _decoder.decode_lines(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
        else:
            for env in envs:
                if env.version != "1" or not env.id or not env.source or not env.type or env.checksum:
                    verify(env)
            return envs
    one = decode_foreign if foreign else decode
    out: list[Envelope] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            out.append(one(line))
        except (ProtocolError, TooLarge) as exc:
            exc.meta.setdefault("line", str(number))
            raise
    return out


# msgpack: the same fields; the payload is msgpack too, so a checksum covers those bytes and not the JSON ones
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Envelope).decode


def encode_msgpack(env: Envelope) -> bytes:
    """A JSON envelope as msgpack. The payload is converted; a checksum is computed anew over the new bytes."""
    payload = Raw(_pack(env.data()))
    checksum = zlib.crc32(payload) if env.checksum else 0
    return _pack(msgspec.structs.replace(env, payload=payload, checksum=checksum))


def decode_msgpack(data: bytes, *, size_bytes_max: int = SIZE_BYTES_MAX) -> Envelope:
    """A msgpack envelope as the JSON one: verified over the bytes that came, then the payload converted."""
    if len(data) > size_bytes_max:
        raise refuse(TooLarge("envelope", size_bytes=len(data), size_bytes_max=size_bytes_max))
    try:
        env = verify(_unpack(data))
        payload = Raw(msgspec.json.encode(msgspec.msgpack.decode(env.payload)))
    except RecursionError as exc:
        raise refuse(TooDeep("envelope: nested too deeply")) from exc
    except (msgspec.DecodeError, UnicodeError, ValueError, TypeError) as exc:
        raise refuse(Malformed(f"envelope: {exc}")) from exc
    return msgspec.structs.replace(env, payload=payload, checksum=zlib.crc32(payload) if env.checksum else 0)
