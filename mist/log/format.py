"""The bytes of the log, as pure functions. docs/reference/log-format.md is the specification; golden bytes are in tests.

All integers little-endian. Checksums are CRC-32C, seeded with the CRC-32C of the stream's incarnation, so that a block
of another stream, or one that lies inside a payload, never passes for a block of this one.

segment  header of 4096 bytes, then blocks one behind the other, then zeros
block    44-byte header, meta (msgpack: subjects, subject of each record, ids, headers), data (msgpack list of payloads)
trim     two halves of 512 bytes, written in turn: the first sequence that is kept
tail     one page: what is published, and the durable mark
index    slot k (24 bytes): the first block that starts in the k-th 64 KiB of the segment; a cache
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from itertools import repeat
from typing import Any, NamedTuple

import msgspec
from google_crc32c import extend as crc32c_extend
from google_crc32c import value as crc32c
from msgspec import Struct

from mist.broker.base import Headers, Record, StreamConfig

VERSION = 1
SEGMENT_HEADER = 4096
_COPY = SEGMENT_HEADER // 2
SEGMENT_MAGIC = b"MISTSEG1"
BLOCK_MAGIC = b"MBLK"
TAIL_MAGIC = b"MISTTAIL"
INDEX_EVERY = 64 * 1024

_BLOCK = struct.Struct("<4sIBBHIIIIQQ")
BLOCK_HEADER = _BLOCK.size
_AFTER_CRC = struct.Struct("<BBHIIIIQQ")
_SEGMENT = struct.Struct("<8sIIQQI")  # magic, crc, body length, base sequence, created ns, chain
_INDEX = struct.Struct("<QQQ")
INDEX_ENTRY = _INDEX.size
_TAIL = struct.Struct("<8sIIQ16sQQQQQQQQQQQQQI")
TAIL_BYTES = _TAIL.size
TRIM_MAGIC = b"MISTTRIM"
TRIM_BYTES = 1024
_TRIM = struct.Struct("<8sQQ")

BLOCK_RECORDS_MAX = 65_535
BLOCK_DATA_MAX = 16 * 1024 * 1024

_encoder = msgspec.msgpack.Encoder()
_encode = _encoder.encode
_decode_payloads = msgspec.msgpack.Decoder(list[bytes]).decode
_Meta = tuple[list[str], bytes, list[str] | None, list[list[tuple[str, str]]] | None]
_decode_meta = msgspec.msgpack.Decoder(_Meta).decode


class BadBytes(ValueError):
    """Bytes that are not what they should be; the message says how."""


class NewerFormat(BadBytes):
    """Whole, but of a later version of this format: not damage, and nothing an older build may touch."""


class SegmentHeader(Struct, frozen=True, kw_only=True):
    """What makes a segment readable alone: a lost tail or state file orphans nothing."""

    stream: str
    incarnation: str
    base: int
    created_ns: int
    chain: int
    """CRC of the block before this segment's first one; 0 for the first segment."""
    stream_created_ns: int
    config: StreamConfig


class _SegmentVersion(Struct, frozen=True):
    version: int


class _SegmentBody(Struct, frozen=True):
    version: int
    stream: str
    incarnation: str
    stream_created_ns: int
    config: StreamConfig


def seed_of(incarnation: str) -> int:
    """The seed of every block checksum of a stream."""
    return int(crc32c(incarnation.encode()))


def encode_segment_header(h: SegmentHeader) -> bytes:
    """4096 bytes: the header twice, so that one flipped bit does not make a segment unreadable."""
    body = msgspec.json.encode(_SegmentBody(VERSION, h.stream, h.incarnation, h.stream_created_ns, h.config))
    rest = _SEGMENT.pack(SEGMENT_MAGIC, 0, len(body), h.base, h.created_ns, h.chain)[12:] + body
    rest = rest.ljust(_COPY - 12, b"\0")
    if len(rest) != _COPY - 12:
        raise BadBytes("segment header does not fit its half page")
    return (SEGMENT_MAGIC + struct.pack("<I", crc32c(rest)) + rest) * 2


def decode_segment_header(data: bytes, *, strict: bool = False) -> SegmentHeader:
    """The header, from the second copy when the first is bad; `strict` wants both. Raises BadBytes."""
    try:
        found = _segment_header(data[:_COPY])
    except BadBytes:
        if strict:
            raise
        return _segment_header(data[_COPY:SEGMENT_HEADER])
    if strict:
        _segment_header(data[_COPY:SEGMENT_HEADER])
    return found


def _segment_header(data: bytes) -> SegmentHeader:
    if len(data) < _COPY:
        raise BadBytes("segment header is cut short")
    magic, crc, size, base, created_ns, chain = _SEGMENT.unpack_from(data)
    if magic != SEGMENT_MAGIC:
        raise BadBytes("not a segment of this format")
    if crc32c(data[12:]) != crc:
        raise BadBytes("segment header has a wrong checksum")
    raw = data[_SEGMENT.size : _SEGMENT.size + size]
    version = msgspec.json.decode(raw, type=_SegmentVersion).version
    if version != VERSION:
        raise NewerFormat(f"segment format version {version}, this build reads {VERSION}")
    body = msgspec.json.decode(raw, type=_SegmentBody)
    return SegmentHeader(
        stream=body.stream, incarnation=body.incarnation, base=base, created_ns=created_ns, chain=chain,
        stream_created_ns=body.stream_created_ns, config=body.config,
    )  # fmt: skip


class BlockHeader(NamedTuple):
    """`size` is the whole block with its header; `last` the sequence of its last record."""

    crc: int
    records: int
    meta_len: int
    data_len: int
    chain: int
    base: int
    time_ns: int
    size: int
    last: int
    check: int
    """Low half of the checksum of the meta part alone, for who reads ids without payloads."""


class Columns(NamedTuple):
    """A batch by column, all of one length. `ids` or `headers` is None when every one is empty."""

    subjects: list[str]
    datas: list[bytes]
    ids: list[str] | None
    headers: list[Headers] | None


def encode_block(
    columns: Columns, *, base: int, time_ns: int, chain: int, seed: int, into: bytearray | None = None
) -> tuple[list[bytes | bytearray], int]:
    """The parts of a block, to be written one behind the other, and its CRC (the chain of the next one).

    `into` is a buffer to use for the data part; the parts are good until it is used again.
    """
    subjects = columns.subjects
    count = len(subjects)
    distinct = list(dict.fromkeys(subjects))
    if len(distinct) == 1:
        index = b""
    else:
        numbers = {s: i for i, s in enumerate(distinct)}
        if len(distinct) <= 256:
            index = bytes(map(numbers.__getitem__, subjects))
        else:
            index = array("H", map(numbers.__getitem__, subjects)).tobytes()
    meta = _encode((distinct, index, columns.ids, columns.headers))
    data: bytes | bytearray
    checked: Any
    if into is None:
        data = checked = _encode(columns.datas)
    else:
        _encoder.encode_into(columns.datas, into)
        data, checked = into, (ctypes.c_char * len(into)).from_buffer(into)
    check = crc32c_extend(seed, meta) & 0xFFFF
    rest = _AFTER_CRC.pack(VERSION, 0, check, count, len(meta), len(data), chain, base, time_ns)
    crc = crc32c_extend(crc32c_extend(seed, rest + meta), checked)
    return [BLOCK_MAGIC + crc.to_bytes(4, "little") + rest + meta, data], crc


def block_header(data: bytes | bytearray, at: int = 0) -> BlockHeader | None:
    """The header of the block at `at`, unchecked but for its shape; None when no block starts there."""
    if len(data) - at < BLOCK_HEADER:
        return None
    magic, crc, version, flags, check, count, meta_len, data_len, chain, base, time_ns = _BLOCK.unpack_from(data, at)
    if magic != BLOCK_MAGIC or version != VERSION or flags or not count or not base:
        return None
    return BlockHeader(
        crc,
        count,
        meta_len,
        data_len,
        chain,
        base,
        time_ns,
        BLOCK_HEADER + meta_len + data_len,
        base + count - 1,
        check,
    )


def block_ok(block: bytes | bytearray, header: BlockHeader, seed: int) -> bool:
    """Whether the checksum of a whole block holds. `block` starts at its magic and may be longer."""
    if block.__class__ is bytearray:
        # google-crc32c takes no buffer that may change under it; a ctypes view passes without a copy
        view = (ctypes.c_char * (header.size - 8)).from_buffer(block, 8)
        return bool(crc32c_extend(seed, view) == header.crc)
    return len(block) >= header.size and crc32c_extend(seed, block[8 : header.size]) == header.crc


def meta_ok(block: bytes, header: BlockHeader, seed: int) -> bool:
    """Whether the meta part can be believed without reading the payloads behind it."""
    meta = block[BLOCK_HEADER : BLOCK_HEADER + header.meta_len]
    return len(meta) == header.meta_len and crc32c_extend(seed, meta) & 0xFFFF == header.check


class Meta(NamedTuple):
    subjects: list[str]
    which: bytes
    ids: list[str] | None
    headers: list[list[tuple[str, str]]] | None

    def numbers(self, count: int) -> Any:
        """The subject number of each record; None when there is one subject for all."""
        if not self.which:
            return None
        return self.which if len(self.subjects) <= 256 else memoryview(self.which).cast("H")


def decode_meta(block: bytes | bytearray, header: BlockHeader) -> Meta:
    """The meta part of a block; `block` may end behind it. Raises BadBytes."""
    try:
        meta = Meta(*_decode_meta(memoryview(block)[BLOCK_HEADER : BLOCK_HEADER + header.meta_len]))
    except (ValueError, MemoryError) as exc:  # the last: a length that nothing follows
        raise BadBytes(f"block meta cannot be read: {exc!r}") from exc
    count, subjects = header.records, len(meta.subjects)
    which = 0 if subjects == 1 else count if subjects <= 256 else 2 * count
    if (
        not subjects
        or len(meta.which) != which
        or (meta.ids is not None and len(meta.ids) != count)
        or (meta.headers is not None and len(meta.headers) != count)
    ):
        raise BadBytes(f"block meta does not fit {count} records")
    return meta


def decode_records(block: bytes | bytearray, header: BlockHeader, meta: Meta) -> list[Record]:
    """All records of a block whose checksum holds. Raises BadBytes."""
    start = BLOCK_HEADER + header.meta_len
    try:
        datas = _decode_payloads(memoryview(block)[start : start + header.data_len])
    except (ValueError, MemoryError) as exc:
        raise BadBytes(f"block data cannot be read: {exc!r}") from exc
    if len(datas) != header.records:
        raise BadBytes(f"{len(datas)} payloads in a block of {header.records} records")
    base, time_ns = header.base, header.time_ns
    if header.records == 1:
        heads: Headers = tuple(meta.headers[0]) if meta.headers else ()
        return [Record(base, meta.subjects[0], datas[0], time_ns, meta.ids[0] if meta.ids else "", heads)]
    numbers = meta.numbers(header.records)
    subjects = repeat(meta.subjects[0]) if numbers is None else map(meta.subjects.__getitem__, numbers)
    sequences = range(base, base + header.records)
    try:
        if meta.headers is None:
            if meta.ids is None:
                return list(map(Record, sequences, subjects, datas, repeat(time_ns)))
            return list(map(Record, sequences, subjects, datas, repeat(time_ns), meta.ids))
        ids = meta.ids or repeat("")
        return list(map(Record, sequences, subjects, datas, repeat(time_ns), ids, map(tuple, meta.headers)))
    except IndexError as exc:
        raise BadBytes("a record names a subject that its block does not have") from exc


class Tail(Struct, frozen=True, kw_only=True):
    """What is published. `generation` counts publications, `durable` is the last sequence a reader may see."""

    generation: int
    boot: bytes
    device: int
    inode: int
    durable: int
    segment: int
    """Base sequence of the segment being written."""
    end: int
    """Offset behind its last block."""
    chain: int
    time_ns: int
    first: int
    first_segment: int
    first_offset: int
    bytes: int
    deleted: int = 0
    first_time_ns: int = 0


def encode_tail(t: Tail) -> bytes:
    """The published page. Written by one pwrite; the checksum makes a torn or mixed read recognisable."""
    body = _TAIL.pack(
        TAIL_MAGIC, VERSION, 0, t.generation, t.boot, t.device, t.inode, t.durable, t.segment, t.end, t.chain, t.time_ns,
        t.first, t.first_segment, t.first_offset, t.bytes, t.deleted, t.first_time_ns, 0,
    )[:-4]  # fmt: skip
    return body + struct.pack("<I", crc32c(body))


def decode_tail(data: bytes) -> Tail | None:
    """None when these bytes are not a whole page of this format."""
    if len(data) < TAIL_BYTES:
        return None
    f = _TAIL.unpack_from(data)
    if f[0] != TAIL_MAGIC or f[1] != VERSION or crc32c(data[: TAIL_BYTES - 4]) != f[18]:
        return None
    return Tail(
        generation=f[3], boot=f[4], device=f[5], inode=f[6], durable=f[7], segment=f[8], end=f[9], chain=f[10],
        time_ns=f[11], first=f[12], first_segment=f[13], first_offset=f[14], bytes=f[15], deleted=f[16],
        first_time_ns=f[17],
    )  # fmt: skip


def encode_index_entry(base: int, time_ns: int, offset: int) -> bytes:
    return _INDEX.pack(base, time_ns, offset)


def decode_index(data: bytes) -> list[tuple[int, int, int]]:
    """The filled slots, in order: (sequence, time, offset). An entry is a hint: the block there must agree."""
    whole = len(data) - len(data) % INDEX_ENTRY
    out = []
    last = 0
    for sequence, time_ns, offset in _INDEX.iter_unpack(data[:whole]):
        if sequence > last and offset >= SEGMENT_HEADER:
            out.append((sequence, time_ns, offset))
            last = sequence
    return out


def encode_trim(count: int, first: int) -> bytes:
    """One half of the trim mark: the newer one, by `count`, says which sequence is the first kept."""
    body = _TRIM.pack(TRIM_MAGIC, count, first)
    return body + struct.pack("<I", crc32c(body))


def decode_trim(data: bytes) -> list[tuple[int, int]]:
    """(count, first) of every good half, in no order."""
    out = []
    for at in (0, TRIM_BYTES // 2):
        half = data[at : at + _TRIM.size + 4]
        if len(half) == _TRIM.size + 4 and crc32c(half[:-4]) == int.from_bytes(half[-4:], "little"):
            magic, count, first = _TRIM.unpack_from(half)
            if magic == TRIM_MAGIC:
                out.append((count, first))
    return out
