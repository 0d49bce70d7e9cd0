"""Bytes to envelopes and back. JSON is canonical; msgpack is the second content type.

`decode` is what a reader of our own stores uses: shape, version and checksum are verified. `decode_foreign` is what
every door to the outside uses (http, file, stdio, streams made by others): it adds the limits on size, depth and
keys, UTF-8, and the range of numbers. Every refusal is its own error class, has a code, and is counted in `refusals`.
Nothing here changes the bytes of a JSON payload, and nothing else than mist.errors is raised.
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

import msgspec
from msgspec import Raw

from mist.errors import ChecksumMismatch, LoneSurrogate, Malformed, MissingField, ProtocolError, TooDeep, TooLarge
from mist.protocol.envelope import SIZE_BYTES_MAX, Envelope
from mist.protocol.pack import screen_msgpack
from mist.protocol.screen import (
    DEPTH_MAX,
    KEYS_MAX,
    check_all_numbers,
    check_numbers,
    explain,
    screen,
    screen_lines,
)
from mist.protocol.version import check_version

__all__ = [
    "DEPTH_MAX",
    "JSON",
    "KEYS_MAX",
    "MSGPACK",
    "NDJSON",
    "SIZE_BYTES_MAX",
    "decode",
    "decode_foreign",
    "decode_lines",
    "decode_msgpack",
    "encode",
    "encode_lines",
    "encode_msgpack",
    "refusals",
    "refuse",
    "screen",
    "verify",
]

JSON = "application/json"
MSGPACK = "application/msgpack"
NDJSON = "application/x-ndjson"

refusals: Counter[str] = Counter()
"""How many documents this process refused, by error code."""
_counting = threading.Lock()

_encoder = msgspec.json.Encoder()
_encode = _encoder.encode
_decoder = msgspec.json.Decoder(Envelope)
_decode = _decoder.decode
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

E = TypeVar("E", bound=ProtocolError | TooLarge)


def refuse(error: E) -> E:
    """Count a refusal and hand the error back, to be raised."""
    with _counting:
        refusals[error.code] += 1
    return error


def encode(env: Envelope) -> bytes:
    """Compact JSON, keys in the order of the class, payload bytes verbatim. Raises LoneSurrogate."""
    try:
        return _encode(env)
    except UnicodeEncodeError as exc:
        raise LoneSurrogate(f"envelope: {exc}") from exc


def encode_lines(envelopes: Iterable[Envelope]) -> bytes:
    """JSON lines: one document and one newline per envelope.

    A payload that holds line breaks between its tokens keeps them: whoever needs one line each looks for that.
    """
    try:
        return _encoder.encode_lines(envelopes)
    except UnicodeEncodeError as exc:
        raise LoneSurrogate(f"envelope: {exc}") from exc


def decode(data: bytes | bytearray | memoryview) -> Envelope:
    """The envelope in one JSON document, verified: required fields, version, checksum.

    Raises Malformed (or NotFinite, LoneSurrogate, TooDeep where that is why it is not JSON), MissingField,
    VersionUnsupported or ChecksumMismatch.
    """
    if data.__class__ is bytes:
        # the common case by itself: two calls fewer are a tenth of it
        try:
            env = _decode(data)
        except _NOT_JSON:
            pass
        else:
            if env.version == "1" and env.id and env.source and env.type and not env.checksum:
                return env
    try:
        return _one(data)
    except ProtocolError as exc:
        refuse(exc)
        raise


def decode_foreign(
    data: bytes | bytearray | memoryview,
    *,
    size_bytes_max: int = SIZE_BYTES_MAX,
    depth_max: int = DEPTH_MAX,
    keys_max: int = KEYS_MAX,
) -> Envelope:
    """`decode` for bytes from outside. Raises TooLarge, TooDeep, TooManyKeys, NotFinite and LoneSurrogate as well."""
    if data.__class__ is not bytes:
        data = bytes(data)
    try:
        screen(data, size_bytes_max=size_bytes_max, depth_max=depth_max, keys_max=keys_max)
        env = _one(data)
        check_numbers(env.payload)
    except (ProtocolError, TooLarge) as exc:
        refuse(exc)
        raise
    return env


def decode_lines(data: bytes, *, foreign: bool = False, size_bytes_max: int = SIZE_BYTES_MAX) -> list[Envelope]:
    """Envelopes of a block of JSON lines. Empty lines are passed over. The first bad line raises, its number in
    `meta["line"]`.

    A block of good lines is decoded at once. Anything unusual is looked at line by line.
    """
    envs = _block(data, foreign, size_bytes_max)
    if envs is not None:
        return envs
    out: list[Envelope] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            out.append(decode_foreign(line, size_bytes_max=size_bytes_max) if foreign else decode(line))
        except (ProtocolError, TooLarge) as exc:
            exc.meta.setdefault("line", str(number))
            raise
    return out


def decode_block(data: bytes, *, size_bytes_max: int = SIZE_BYTES_MAX) -> list[Envelope] | None:
    """The envelopes of a block of foreign JSON lines, exactly one for each line, or None when some line has to be looked
    at by itself: it may be bad, or blank. For readers that go on behind a bad line and count lines."""
    return _block(data, True, size_bytes_max)


def _block(data: bytes, foreign: bool, size_bytes_max: int) -> list[Envelope] | None:
    """All envelopes of a block, or None when a line has to be looked at by itself."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    if foreign and not screen_lines(data, lines, size_bytes_max=size_bytes_max):
        return None
    try:
        # line by line, because the decoder for lines would take a document on two of them, or two on one
        envs = list(map(_decode, lines))
        for env in envs:
            if env.version != "1" or not env.id or not env.source or not env.type or env.checksum:
                verify(env)
        if foreign:
            check_all_numbers([env.payload for env in envs])
    except (*_NOT_JSON, ProtocolError):
        return None
    return envs


def _one(data: bytes | bytearray | memoryview) -> Envelope:
    if data.__class__ is not bytes:
        data = bytes(data)  # the payload is a view of these bytes; a buffer would change under it
    try:
        env = _decode(data)
    except _NOT_JSON:
        env = _decode_slowly(data)
    if env.version == "1" and env.id and env.source and env.type and not env.checksum:
        return env
    return verify(env)


def verify(env: Envelope) -> Envelope:
    """The same envelope, or the first error in the seed's order: version, id, source, type; then version range and
    checksum. Does not count."""
    for field in ("version", "id", "source", "type"):
        if not getattr(env, field):
            raise MissingField(field)
    check_version(env.version)
    if env.checksum:
        computed = zlib.crc32(env.payload)
        if computed != env.checksum:
            raise ChecksumMismatch(stated=env.checksum, computed=computed)
    return env


_FIELDS = frozenset(Envelope.__struct_fields__)
_ABSENT = {
    b"version": b'""',
    b"id": b'""',
    b"source": b'""',
    b"type": b'""',
    b"timestamp_ns": b"0",
    b"payload": b"null",
}


def _decode_slowly(data: bytes) -> Envelope:
    """What the seed accepts beyond the fast path: keys in any case, absent or null fields."""
    try:
        fields = msgspec.json.decode(data, type=dict[str, Raw])
    except _NOT_JSON as exc:
        raise explain(data, exc) from exc
    known = dict(_ABSENT)
    for key, raw in fields.items():
        name = key if key in _FIELDS else key.lower()
        if name in _FIELDS and (name == "payload" or bytes(raw) != b"null"):
            known[name.encode()] = bytes(raw)
    try:
        return _decode(b"{%s}" % b",".join(b'"%s":%s' % pair for pair in known.items()))
    except _NOT_JSON as exc:
        raise explain(data, exc) from exc


# msgpack: the same fields; the payload is msgpack too, so a checksum covers those bytes and not the JSON ones
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Envelope).decode


def encode_msgpack(env: Envelope) -> bytes:
    """A JSON envelope as msgpack. The payload is converted; a checksum is computed anew over the new bytes.

    Raises Malformed for a payload that msgpack cannot hold (an integer above 64 bits).
    """
    try:
        payload = Raw(_pack(env.data()))
        checksum = zlib.crc32(payload) if env.checksum else 0
        return _pack(msgspec.structs.replace(env, payload=payload, checksum=checksum))
    except UnicodeEncodeError as exc:
        raise LoneSurrogate(f"envelope: {exc}") from exc
    except (OverflowError, ValueError, TypeError) as exc:
        raise Malformed(f"envelope {env.id}: the payload has no msgpack form: {exc}") from exc


def decode_msgpack(data: bytes | bytearray | memoryview, *, size_bytes_max: int = SIZE_BYTES_MAX) -> Envelope:
    """A msgpack envelope as the JSON one: verified over the bytes that came, then the payload converted.

    Fit for bytes from outside: all that `decode_foreign` refuses is refused here, and values without a JSON form.
    """
    if data.__class__ is not bytes:
        data = bytes(data)
    try:
        if len(data) > size_bytes_max:
            raise TooLarge("envelope", size_bytes=len(data), size_bytes_max=size_bytes_max)
        screen_msgpack(data)
        try:
            env = verify(_unpack(data))
            payload = Raw(msgspec.json.encode(msgspec.msgpack.decode(env.payload)))
        except RecursionError as exc:
            raise TooDeep("envelope: nested too deeply") from exc
        except (msgspec.DecodeError, UnicodeError) as exc:
            raise Malformed(f"envelope: {exc}") from exc
    except (ProtocolError, TooLarge) as exc:
        refuse(exc)
        raise
    return msgspec.structs.replace(env, payload=payload, checksum=zlib.crc32(payload) if env.checksum else 0)
