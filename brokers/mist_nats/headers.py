"""What a message becomes on the wire of NATS, and back: subject, id and headers, exactly.

- id: the header `Nats-Msg-Id`, as it is when it is printable ASCII without blanks at its ends and does not begin with
  `=`; otherwise `=` and its `encode_token`. Where the stream does not de-duplicate, the header is `Mist-Msg-Id`, which
  the server does not look at.
- headers: plain `Name: value` lines when every one of them survives that (NATS trims values and looks names up without
  case); otherwise the whole list is in `Mist-Headers`, compact JSON, which alone counts on read. Plain ones stand
  beside it for readers that do not know us.
- more than 60,000 bytes of headers (JetStream takes 64 KiB): the JSON follows the data, and `Mist-Headers-Bytes` says
  how long it is.

A plain NATS subscriber sees the data as it was given, except in that last case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from mist.broker.base import Headers, Message
from mist.broker.deadletter import OURS
from mist.errors import InvalidArgument
from mist.protocol.subject import decode_token, encode_token

LINES_BYTES_MAX = 60_000
COPIES_BYTES_MAX = 4096
ID = b"Nats-Msg-Id"
QUIET_ID = b"Mist-Msg-Id"
LIST = b"Mist-Headers"
SPILLED = b"Mist-Headers-Bytes"

_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?").fullmatch
_ID = re.compile(r"[!-<>-~](?:[ -~]*[!-~])?").fullmatch
_TAKEN = re.compile(r"nats-|mist-", re.IGNORECASE).match
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Headers).decode


def id_text(id: str) -> str:
    """The id as a header value."""
    return id if _ID(id) else f"={encode_token(id)}"


def id_of(value: str) -> str:
    """The id from its header value. Values that we did not write are taken as they are."""
    if value[:1] == "=":
        try:
            return decode_token(value[1:])
        except InvalidArgument:
            return value
    return value


def _plain(name: str, value: str) -> bool:
    return bool(_NAME(name) and _VALUE(value) and (name in OURS or not _TAKEN(name)))


def header_lines(headers: Headers) -> tuple[bytes, bytes]:
    """The header lines, each with CRLF, and what has to follow the data (nearly always empty)."""
    if not headers:
        return b"", b""
    plain = [_plain(k, v) for k, v in headers]
    if all(plain) and len({k.lower() for k, _ in headers}) == len(headers):
        lines = "".join([f"{k}: {v}\r\n" for k, v in headers]).encode()
        if len(lines) <= LINES_BYTES_MAX:
            return lines, b""
    listed = _encode(headers)
    copies, seen = b"", set()
    for (name, value), fits in zip(headers, plain, strict=True):
        line = f"{name}: {value}\r\n".encode() if fits and name.lower() not in seen else b""
        if line and len(copies) + len(line) <= COPIES_BYTES_MAX:
            copies += line
            seen.add(name.lower())
    if len(listed) + len(copies) <= LINES_BYTES_MAX:
        return b"%b: %b\r\n%b" % (LIST, listed, copies), b""
    return b"%b: %d\r\n%b" % (SPILLED, len(listed), copies), listed


def plain_ids(ids: Sequence[str]) -> bool:
    """Whether all of them go out as they are; decides nearly every batch in one look."""
    joined = "".join(ids)
    return joined.isascii() and joined.isprintable() and " " not in joined and "=" not in joined


def message_lines(m: Message, id_header: bytes) -> tuple[bytes, bytes]:
    """All lines of one message, and what has to follow its data."""
    lines, spilled = header_lines(m.headers)
    if m.id:
        lines = b"%b: %b\r\n%b" % (id_header, id_text(m.id).encode(), lines)
    return lines, spilled


# --- and back ------------------------------------------------------------------------------------------------------


_USUAL = b"NATS/1.0\r\nNats-Msg-Id: "
_USUAL_BYTES = len(_USUAL)
_BLOCK = rb"NATS/1\.0\r\nNats-Msg-Id: ([!-<>-~][ -~]*)\r\n(?:Nats-Batch-[^\r\n]*\r\n)*\r\n"
_block_ids = re.compile(_BLOCK).findall
_blocks = re.compile(b"(?:%b)*" % _BLOCK.replace(b"([!", b"(?:[!")).fullmatch


def plain_headers(headers: Sequence[bytes]) -> list[str] | None:
    """The ids of messages that have an id and no other header of ours; None when any of them has more to it. The same as
    `read_header` for each, in a few looks at all of them together."""
    count, joined = len(headers), b"".join(headers)
    ids: list[bytes] = _block_ids(joined)
    # as many blocks as headers, each header begins with one, and nothing lies between: so each is exactly one
    if len(ids) != count or b"".join([h[:_USUAL_BYTES] for h in headers]) != _USUAL * count:
        return None
    text = b"\n".join(ids)
    if len(joined) != count * (_USUAL_BYTES + 3) + len(text) + 1 and not _blocks(joined):
        return None
    return text.decode().split("\n")


def read_header(header: bytes, data: bytes) -> tuple[str, Headers, bytes]:
    """Id, headers and data of a stored message. Never raises: what is foreign is taken as it stands."""
    if not header:
        return "", (), data
    # the usual one: our id comes first, then nothing or what the server added
    if header.startswith(b"NATS/1.0\r\nNats-Msg-Id: "):
        end = header.find(b"\r\n", 23)
        rest = header[end + 2 : end + 7]
        if rest == b"\r\n" or (rest == b"Nats-" and _only_server(header, end)):
            value = header[23:end]
            if value.isascii():
                text = value.decode()
                return (id_of(text) if text[:1] == "=" else text), (), data
    elif header.startswith(b"NATS/1.0\r\nNats-") and _only_server(header, 8):
        return "", (), data
    return _read_slowly(header, data)


_OTHERS = re.compile(rb"\r\n(?!Nats-|\r\n|\Z)").search


def _only_server(header: bytes, start: int) -> bool:
    """Whether every line from `start` on is the server's own and not the id's."""
    return _OTHERS(header, start) is None and b"\r\nNats-Msg-Id:" not in header[start:]


def _read_slowly(header: bytes, data: bytes) -> tuple[str, Headers, bytes]:
    id, found, listed, whole = "", [], None, data
    for line in header.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if not colon:
            continue
        text = value.strip(b" \t").decode(errors="replace")
        if name in (ID, QUIET_ID):
            id = id or id_of(text)
        elif name == LIST:
            listed = value.strip(b" \t")
        elif name == SPILLED and text.isascii() and text.isdigit() and 0 < int(text) <= len(data):
            cut = len(data) - int(text)
            listed, data = data[cut:], data[:cut]
        elif not name.startswith(b"Nats-"):
            found.append((name.decode(errors="replace"), text))
    if listed is not None:
        try:
            return id, _decode(listed), data
        except (msgspec.MsgspecError, UnicodeDecodeError):
            data = whole  # somebody else's header of that name
    return id, tuple(found), data
