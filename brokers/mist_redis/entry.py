"""Entry fields <-> Record, pure.

Ours have the fields `subject`, `data`, `id`, `time` (milliseconds, the server's) and `headers_json` (a JSON list of
pairs), empty `id` and headers left out. `headers_json` and not `headers`, because FastStream takes `data` for the body
of such an entry, and would take a field `headers` for a JSON object. An entry somebody else wrote is shown whole: see
`foreign`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from mist.broker.base import Headers, Record
from mist.protocol.subject import SUBJECT_CHARS_MAX, encode_token
from mist_redis.ids import to_sequence

ENTRY = "Redis-Entry"
SHAPE = "Redis-Shape"
"""Headers of a foreign entry: its own id, and what `data` is made from: `data`, `__data__`, `payload` or `fields`."""
BODIES = (b"data", b"__data__", b"payload")
FOREIGN = "foreign"
"""The subject of an entry that names none, when the stream's name cannot be one."""

Entry = Sequence[Any]
"""As hiredis gives it: `[id, [field, value, field, value, …]]`."""

_headers = msgspec.json.Decoder(list[tuple[str, str]]).decode
_plain: dict[bytes, str] = {}
_PLAIN_MAX = 4096
"""Subjects seen, decoded: most streams know few."""


def foreign_subject(name: str) -> str:
    """The subject of records that carry none: the stream's name as one token."""
    token = encode_token(name)
    return token if len(token) <= SUBJECT_CHARS_MAX else FOREIGN


def _decoded(raw: bytes) -> str:
    """A subject, remembered."""
    found = raw.decode()
    if len(_plain) >= _PLAIN_MAX:
        _plain.clear()
    _plain[raw] = found
    return found


def records(entries: Sequence[Entry], *, own: bool, subject: str) -> list[Record]:
    """The records of these entries; `subject` is for those that name none. Raises NoSequence."""
    out: list[Record] = []
    add = out.append
    known = _plain
    for entry in entries:
        id, f = entry
        # the shape nearly every entry has, looked at without a dictionary
        if (
            own
            and len(f) == 8
            and f[0] == b"subject"
            and f[4] == b"id"
            and f[6] == b"time"
            and id[:2] == b"0-"
            and len(id) < 17
        ):
            stamp = f[7]
            if f[2] == b"data" and len(stamp) < 16 and stamp.isdigit():
                try:
                    text = known.get(f[1])
                    if text is None:
                        text = _decoded(f[1])
                    add(Record(int(id[2:]), text, f[3], int(stamp) * 1_000_000, f[5].decode()))
                    continue
                except UnicodeDecodeError:
                    pass  # not one of ours after all
        add(record(entry, own=own, subject=subject))
    return out


def record(entry: Entry, *, own: bool, subject: str) -> Record:
    """One record, whoever wrote the entry. Never raises for its fields, only NoSequence for its id."""
    id, flat = entry
    sequence = to_sequence(id, own=own)
    flat = flat or []
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    ms = id.partition(b"-")[0]
    if b"subject" in fields and b"data" in fields and b"time" in fields and len(flat) == 2 * len(fields):
        known = _ours(fields)
        if known is not None:
            # a time beside a time: the id's is the one that never goes back among everybody's
            stamp = int(fields[b"time"]) if ms == b"0" else int(ms)
            return Record(sequence, known[0], fields[b"data"], stamp * 1_000_000, known[1], known[2])
    return foreign(id, flat, sequence, subject)


def _ours(fields: dict[bytes, bytes]) -> tuple[str, str, Headers] | None:
    """Subject, id and headers, when the fields are ours and nothing else."""
    if not fields.keys() <= {b"subject", b"data", b"time", b"id", b"headers_json"}:
        return None
    try:
        headers = tuple(_headers(fields[b"headers_json"])) if b"headers_json" in fields else ()
        if not fields[b"time"].isdigit() or len(fields[b"time"]) > 15:
            return None
        return fields[b"subject"].decode(), fields.get(b"id", b"").decode(), headers
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def foreign(id: bytes, flat: Sequence[bytes], sequence: int, subject: str) -> Record:
    """An entry of somebody else: the one field that is a body, byte for byte, else all fields as a JSON object."""
    names = flat[::2]
    shape = "fields"
    if len(names) == 1 and names[0] in BODIES:
        shape, data = names[0].decode(), bytes(flat[1])
    else:
        # a name given twice keeps all its values, bytes that are no UTF-8 become U+FFFD: this is for looking at
        pairs: dict[str, Any] = {}
        for name, value in zip(names, flat[1::2], strict=True):
            key, text = name.decode("utf-8", "replace"), value.decode("utf-8", "replace")
            if key in pairs:
                pairs[key] = [*(pairs[key] if isinstance(pairs[key], list) else [pairs[key]]), text]
            else:
                pairs[key] = text
        data = msgspec.json.encode(pairs)
    ms = int(id.partition(b"-")[0])
    return Record(sequence, subject, data, ms * 1_000_000, "", ((ENTRY, id.decode()), (SHAPE, shape)))
