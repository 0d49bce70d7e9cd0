"""One line of a JSON-lines file as a record's content: a plain envelope, or the object that `tail` and `export` write.

Pure. The two forms may be mixed in one file; `parse_line` tells them apart by the keys.
"""

from __future__ import annotations

import base64
import binascii

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from mist.broker.base import Headers
from mist.errors import InvalidArgument, Malformed, MistError
from mist.protocol import codec
from mist.protocol.subject import check_subject, subject_for

FOREIGN = "line"
"""The subject of a line that is neither: read verbs show it, writing verbs refuse it."""


class Content(Struct, frozen=True):
    """What a line says of a record; `sequence` is the one it had where it was exported, 0 for a plain envelope."""

    subject: str
    data: bytes
    timestamp_ns: int = 0
    id: str = ""
    headers: Headers = ()
    sequence: int = 0
    error: MistError | None = None


class _Exported(Struct, frozen=True):
    sequence: int | str
    subject: str
    timestamp_ns: int
    envelope: Raw | UnsetType = UNSET
    data: str | UnsetType = UNSET
    encoding: str = "utf-8"
    id: str | UnsetType = UNSET
    headers: Headers = ()


_exported = msgspec.json.Decoder(_Exported).decode


def parse_line(line: bytes) -> Content:
    """The content of one line (without its newline). A line that is neither form has `error` set, its bytes as data."""
    try:
        if line.startswith(b'{"sequence":'):
            return _from_export(line)
        env = codec.decode_foreign(line)
        return Content(_subject(env.type), line, env.timestamp_ns, env.id)
    except MistError as exc:
        return Content(FOREIGN, line, error=exc)


def _from_export(line: bytes) -> Content:
    try:
        found = _exported(line)
        sequence = int(found.sequence)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as exc:
        raise Malformed(f"not an exported record: {exc}") from exc
    check_subject(found.subject)
    if isinstance(found.envelope, Raw):
        data = bytes(found.envelope)
        env = codec.decode_foreign(data)
        id = env.id if found.id is UNSET else found.id
    elif isinstance(found.data, str):
        data = _bytes(found.data, found.encoding)
        id = "" if found.id is UNSET else found.id
        if found.id is UNSET:
            id = _envelope_id(data, found.headers)
    else:
        raise Malformed("not an exported record: neither envelope nor data")
    return Content(found.subject, data, found.timestamp_ns, id, found.headers, sequence)


def _bytes(text: str, encoding: str) -> bytes:
    if encoding == "utf-8":
        return text.encode("utf-8", "surrogatepass")
    if encoding != "base64":
        raise Malformed(f"not an exported record: encoding {encoding[:20]!r}")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as exc:
        raise Malformed(f"not an exported record: {exc}") from exc


def _envelope_id(data: bytes, headers: Headers) -> str:
    """The id of an envelope that travelled as data; an export leaves a record's id out when it is the envelope's."""
    try:
        packed = ("Content-Type", codec.MSGPACK) in headers
        return (codec.decode_msgpack(data) if packed else codec.decode(data)).id
    except MistError:
        return ""  # foreign data has no id of its own


def _subject(type: str) -> str:
    try:
        return subject_for(type)
    except InvalidArgument as exc:
        raise Malformed(f"type {type[:40]!r} cannot be a subject") from exc
