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
from collections.abc import Container, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import msgspec
from google_crc32c import extend as crc32c_extend
from google_crc32c import value as crc32c
from msgspec import Struct

from mist.broker.base import Headers, Record, StreamConfig

VERSION = 1
VERSION_ERASED = 2
"""As 1, and blocks may be erased ones. A stream and a segment are 2 from their first erasure on, so that older builds
refuse them."""
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

_ERASED = 1
"""The flag of a block that records were erased from."""
_PATCH = 4
"""Bytes at the end of an erased block that make its checksum the former one."""
_POLYNOMIAL = 0x82F63B78

BLOCK_RECORDS_MAX = 65_535
BLOCK_DATA_MAX = 16 * 1024 * 1024

_encoder = msgspec.msgpack.Encoder()
_encode = _encoder.encode
_decode_payloads = msgspec.msgpack.Decoder(list[bytes]).decode
_Meta = tuple[list[str], bytes, list[str] | None, list[list[tuple[str, str]]] | None]
_decode_meta = msgspec.msgpack.Decoder(_Meta).decode
_decode_erased = msgspec.msgpack.Decoder(
    tuple[list[str], bytes, list[str] | None, list[list[tuple[str, str]]] | None, bytes]
).decode


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
    version: int = VERSION


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
    body = msgspec.json.encode(_SegmentBody(h.version, h.stream, h.incarnation, h.stream_created_ns, h.config))
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
    if version not in (VERSION, VERSION_ERASED):
        raise NewerFormat(f"segment format version {version}, this build reads up to {VERSION_ERASED}")
    body = msgspec.json.decode(raw, type=_SegmentBody)
    return SegmentHeader(
        stream=body.stream, incarnation=body.incarnation, base=base, created_ns=created_ns, chain=chain,
        stream_created_ns=body.stream_created_ns, config=body.config, version=version,
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
    erased: bool = False
    """Whether records were erased from it."""


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
    count = len(columns.subjects)
    distinct, index = _subject_columns(columns.subjects)
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


def _subject_columns(subjects: list[str]) -> tuple[list[str], bytes]:
    """The distinct subjects in order of first use, and the number of each record's, as narrow as it goes."""
    distinct = list(dict.fromkeys(subjects))
    if len(distinct) <= 1:
        return distinct, b""
    numbers = {s: i for i, s in enumerate(distinct)}
    if len(distinct) <= 256:
        return distinct, bytes(map(numbers.__getitem__, subjects))
    return distinct, array("H", map(numbers.__getitem__, subjects)).tobytes()


def erase_from_block(block: bytes, header: BlockHeader, gone: Container[int], seed: int) -> tuple[bytes, list[int]]:
    """A block whose checksum holds, without the records of these sequences; and which went now.

    Sequences, time, chain and checksum stay, so that nothing around it changes: its last four bytes are chosen to make
    the checksum come out as before. Raises BadBytes.
    """
    meta = decode_meta(block, header)
    records = decode_records(block, header, meta)
    kept = [r for r in records if r.sequence not in gone]
    if len(kept) == len(records):
        return block[: header.size], []
    bits = bytearray(b"\xff" * ((header.records + 7) // 8))
    bits[-1] >>= -header.records % 8
    for r in kept:
        at = r.sequence - header.base
        bits[at >> 3] &= ~(1 << (at & 7))
    ids, headers = [r.id for r in kept], [r.headers for r in kept]
    columns = (
        *_subject_columns([r.subject for r in kept]),
        ids if any(ids) else None,
        headers if any(headers) else None,
    )
    new = _encode((*columns, bytes(bits)))
    data = _encode([r.data for r in kept])
    check = crc32c_extend(seed, new) & 0xFFFF
    rest = _AFTER_CRC.pack(
        VERSION, _ERASED, check, header.records, len(new), len(data) + _PATCH, header.chain, header.base, header.time_ns
    )
    body = rest + new + data
    patch = _bytes_towards(header.crc, crc32c_extend(seed, body))
    return BLOCK_MAGIC + header.crc.to_bytes(4, "little") + body + patch, [
        r.sequence for r in records if r.sequence in gone
    ]


def _bytes_towards(crc: int, so_far: int) -> bytes:
    """The four bytes that, behind bytes with the checksum `so_far`, make it `crc`.

    Four bytes added to a register are the register XOR them, shifted by 32 zero bits. So: shift the wanted register back
    by 32 bits, where the top bit tells whether the polynomial was taken in, and XOR with the register there is.
    """
    register = crc ^ 0xFFFFFFFF
    for _ in range(32):
        if register >> 31:
            register = (register ^ _POLYNOMIAL) << 1 | 1
        else:
            register <<= 1
    return (register ^ so_far ^ 0xFFFFFFFF).to_bytes(4, "little")


def block_header(data: bytes | bytearray, at: int = 0) -> BlockHeader | None:
    """The header of the block at `at`, unchecked but for its shape; None when no block starts there."""
    if len(data) - at < BLOCK_HEADER:
        return None
    magic, crc, version, flags, check, count, meta_len, data_len, chain, base, time_ns = _BLOCK.unpack_from(data, at)
    if magic != BLOCK_MAGIC or version != VERSION or flags & ~_ERASED or not count or not base:
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
        flags == _ERASED,
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
    """The columns of the records that are there; `erased` is a bitmap over all of the block's, empty when all are."""

    subjects: list[str]
    which: bytes
    ids: list[str] | None
    headers: list[list[tuple[str, str]]] | None
    erased: bytes = b""

    def kept(self, header: BlockHeader) -> Sequence[int]:
        """The sequences of the records that are there."""
        bits = self.erased
        if not bits:
            return range(header.base, header.last + 1)
        return [header.base + i for i in range(header.records) if not bits[i >> 3] >> (i & 7) & 1]

    def gone(self, header: BlockHeader) -> list[int]:
        """The sequences that were erased."""
        bits = self.erased
        return [header.base + i for i in range(header.records) if bits[i >> 3] >> (i & 7) & 1] if bits else []

    def all_ids(self, header: BlockHeader) -> list[str] | None:
        """One id for every sequence of the block, empty for an erased one; None when no record has any."""
        if self.ids is None or not self.erased:
            return self.ids
        out = [""] * header.records
        for sequence, id in zip(self.kept(header), self.ids, strict=True):
            out[sequence - header.base] = id
        return out

    def numbers(self, count: int) -> Any:
        """The subject number of each record; None when there is one subject for all."""
        if not self.which:
            return None
        return self.which if len(self.subjects) <= 256 else memoryview(self.which).cast("H")


def decode_meta(block: bytes | bytearray, header: BlockHeader) -> Meta:
    """The meta part of a block; `block` may end behind it. Raises BadBytes."""
    try:
        decode: Any = _decode_erased if header.erased else _decode_meta
        meta = Meta(*decode(memoryview(block)[BLOCK_HEADER : BLOCK_HEADER + header.meta_len]))
    except (ValueError, MemoryError) as exc:  # the last: a length that nothing follows
        raise BadBytes(f"block meta cannot be read: {exc!r}") from exc
    count, subjects = header.records, len(meta.subjects)
    if header.erased:
        erased = int.from_bytes(meta.erased, "little")
        if len(meta.erased) != (count + 7) // 8 or not erased or erased >> count:
            raise BadBytes(f"block meta marks no records of {count} as erased, or others")
        count -= erased.bit_count()
    which = 0 if subjects <= 1 else count if subjects <= 256 else 2 * count
    if (
        (not subjects and count)
        or len(meta.which) != which
        or (meta.ids is not None and len(meta.ids) != count)
        or (meta.headers is not None and len(meta.headers) != count)
    ):
        raise BadBytes(f"block meta does not fit {count} records")
    return meta


def decode_records(block: bytes | bytearray, header: BlockHeader, meta: Meta) -> list[Record]:
    """All records of a block whose checksum holds. Raises BadBytes."""
    start = BLOCK_HEADER + header.meta_len
    end = start + header.data_len - (_PATCH if header.erased else 0)
    try:
        datas = _decode_payloads(memoryview(block)[start:end])
    except (ValueError, MemoryError) as exc:
        raise BadBytes(f"block data cannot be read: {exc!r}") from exc
    sequences = meta.kept(header)
    if len(datas) != len(sequences):
        raise BadBytes(f"{len(datas)} payloads in a block of {len(sequences)} records")
    if not datas:
        return []
    time_ns = header.time_ns
    if len(datas) == 1:
        heads: Headers = tuple(meta.headers[0]) if meta.headers else ()
        return [Record(sequences[0], meta.subjects[0], datas[0], time_ns, meta.ids[0] if meta.ids else "", heads)]
    numbers = meta.numbers(len(datas))
    subjects = repeat(meta.subjects[0]) if numbers is None else map(meta.subjects.__getitem__, numbers)
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
    erasures: int = 0
    """Changes when published bytes may have: who remembers any reads them again."""


def encode_tail(t: Tail) -> bytes:
    """The published page. Written by one pwrite; the checksum makes a torn or mixed read recognisable."""
    body = _TAIL.pack(
        TAIL_MAGIC, VERSION, t.erasures & 0xFFFFFFFF, t.generation, t.boot, t.device, t.inode, t.durable, t.segment, t.end, t.chain, t.time_ns,
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
        first_time_ns=f[17], erasures=f[2],
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
