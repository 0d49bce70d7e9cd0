"""What a reader gets: an envelope with its place in the stream, or the record that holds none.

`decode_record` is the one way from a record to its envelope. Records that our client wrote carry the envelope's id and
were checked when they entered; a record without an id was written by somebody else and gets every check of a door to
the outside (size, depth, keys, NaN, surrogates).
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from mist.broker.base import Record, header
from mist.client.blobs import Blobs, inlined
from mist.errors import MistError
from mist.protocol.codec import MSGPACK, decode, decode_foreign, decode_msgpack
from mist.protocol.envelope import Envelope

CONTENT_TYPE = "Content-Type"
OnBad = Literal["raise", "skip", "yield"]


class Received(Struct, frozen=True, gc=False):
    """An envelope as it was read. `timestamp_ns` is the broker's record time; the sender's is in the envelope."""

    sequence: int
    subject: str
    timestamp_ns: int
    envelope: Envelope


class Bad(Struct, frozen=True):
    """A record that is no acceptable envelope, and why (a ProtocolError or TooLarge)."""

    record: Record
    error: MistError

    @property
    def sequence(self) -> int:
        return self.record.sequence

    @property
    def subject(self) -> str:
        return self.record.subject

    @property
    def timestamp_ns(self) -> int:
        return self.record.timestamp_ns


def decode_record(record: Record, blobs: Blobs | None = None) -> Envelope:
    """The envelope in a record, with a payload that lies beside the stream where `blobs` has it. Raises a ProtocolError
    (Malformed, ChecksumMismatch, …), TooLarge, or DataLoss for such a payload that is gone."""
    if record.headers:
        packed = header(record.headers, CONTENT_TYPE) == MSGPACK
        return inlined(decode_msgpack(record.data) if packed else _decoded(record), record, blobs)
    return _decoded(record)


def _decoded(record: Record) -> Envelope:
    return decode(record.data) if record.id else decode_foreign(record.data)


def receive(record: Record, blobs: Blobs | None = None) -> Received:
    """The record as `Received`. Raises as `decode_record`, with the sequence among the error's coordinates."""
    try:
        return Received(record.sequence, record.subject, record.timestamp_ns, decode_record(record, blobs))
    except MistError as exc:
        exc.meta.setdefault("sequence", str(record.sequence))
        raise
