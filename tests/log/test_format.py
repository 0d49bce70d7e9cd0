"""The bytes of the log: golden files in tests/log/golden, and the limits of blocks. docs/reference/log-format.md is their text.

`MIST_WRITE_GOLDEN=1` writes the golden files anew; a change of them is a change of the format.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from google_crc32c import extend, value

from mist.broker.base import StreamConfig
from mist.log.format import (
    BLOCK_HEADER,
    SEGMENT_HEADER,
    TAIL_BYTES,
    TRIM_BYTES,
    BadBytes,
    Columns,
    SegmentHeader,
    Tail,
    block_header,
    block_ok,
    decode_index,
    decode_meta,
    decode_records,
    decode_segment_header,
    decode_tail,
    decode_trim,
    encode_block,
    encode_index_entry,
    encode_segment_header,
    encode_tail,
    encode_trim,
    meta_ok,
    seed_of,
)
from mist.log.journal import LOG_DEFAULTS

GOLDEN = Path(__file__).parent / "golden"
SEED = seed_of("00112233445566ff")
HEADER = SegmentHeader(
    stream="trace", incarnation="00112233445566ff", base=1, created_ns=1_700_000_000_000_000_001, chain=0,
    stream_created_ns=1_700_000_000_000_000_001, config=StreamConfig(records_max=1000).or_defaults(LOG_DEFAULTS),
)  # fmt: skip
ONE = Columns(["trace.span"], [b'{"a":1}'], None, None)
MANY = Columns(
    ["trace.span", "trace.error", "trace.span"], [b"", b"\x00\xff", b"x" * 40], ["id-1", "", "id-3"],
    [(), (("Content-Type", "application/msgpack"),), ()],
)  # fmt: skip
TAIL = Tail(
    generation=7, boot=bytes(range(16)), device=2049, inode=131, durable=4, segment=1, end=4388, chain=0x01020304,
    time_ns=1_700_000_000_000_000_009, first=2, first_segment=1, first_offset=4170, bytes=218, deleted=0,
    first_time_ns=1_700_000_000_000_000_005,
)  # fmt: skip


def blocks() -> bytes:
    first, crc = encode_block(ONE, base=1, time_ns=1_700_000_000_000_000_005, chain=0, seed=SEED)
    second, _ = encode_block(MANY, base=2, time_ns=1_700_000_000_000_000_009, chain=crc, seed=SEED)
    return b"".join([*first, *second])


def golden(name: str, made: bytes) -> bytes:
    """The bytes of a golden file, which must be what we make now."""
    path = GOLDEN / name
    if os.environ.get("MIST_WRITE_GOLDEN"):
        path.write_bytes(made)
    kept = path.read_bytes()
    assert made == kept, f"{name}: the format changed"
    return kept


def test_segment_header() -> None:
    """Two equal halves of 2048 bytes; either one is enough to read it, both are wanted by verify."""
    data = golden("segment-header.bin", encode_segment_header(HEADER))
    assert len(data) == SEGMENT_HEADER
    assert data[:2048] == data[2048:]
    assert data[:8] == b"MISTSEG1"
    assert int.from_bytes(data[8:12], "little") == value(data[12:2048])
    assert int.from_bytes(data[16:24], "little") == 1
    assert decode_segment_header(data, strict=True) == HEADER
    for broken in (b"x" + data[1:], data[:3000] + b"x" + data[3001:]):
        assert decode_segment_header(broken) == HEADER
        with pytest.raises(BadBytes):
            decode_segment_header(broken, strict=True)
    with pytest.raises(BadBytes):
        decode_segment_header(data[:100] + b"x" + data[101:2100] + b"x" + data[2101:])
    with pytest.raises(BadBytes):
        decode_segment_header(data[:1000])


def test_blocks() -> None:
    """The golden blocks decode to their records, field by field at the offsets of the specification."""
    data = golden("blocks.bin", blocks())
    assert data[:4] == b"MBLK"
    assert data[8:10] == b"\x01\x00"
    first = block_header(data)
    assert first is not None
    assert (first.base, first.last, first.records, first.chain) == (1, 1, 1, 0)
    assert block_ok(data, first, SEED)
    assert int.from_bytes(data[4:8], "little") == extend(SEED, data[8 : first.size])
    meta_bytes = data[BLOCK_HEADER : BLOCK_HEADER + first.meta_len]
    assert int.from_bytes(data[10:12], "little") == extend(SEED, meta_bytes) & 0xFFFF
    assert meta_ok(data, first, SEED)
    (one,) = decode_records(data, first, decode_meta(data, first))
    assert (one.sequence, one.subject, one.data, one.id, one.headers) == (1, "trace.span", b'{"a":1}', "", ())
    rest = data[first.size :]
    second = block_header(rest)
    assert second is not None
    assert second.chain == first.crc
    records = decode_records(rest, second, decode_meta(rest, second))
    assert [r.sequence for r in records] == [2, 3, 4]
    assert [r.subject for r in records] == MANY.subjects
    assert [r.data for r in records] == MANY.datas
    assert [r.id for r in records] == MANY.ids
    assert [r.headers for r in records] == MANY.headers
    assert len(rest) == second.size


def test_tail_page() -> None:
    """One page, checked as a whole: any flipped bit makes it no page at all."""
    data = golden("tail.bin", encode_tail(TAIL))
    assert len(data) == TAIL_BYTES == 148
    assert decode_tail(data) == TAIL
    for bit in range(len(data) * 8):
        broken = bytearray(data)
        broken[bit >> 3] ^= 1 << (bit & 7)
        assert decode_tail(bytes(broken)) is None
    assert decode_tail(data[:-1]) is None
    assert decode_tail(b"") is None


def test_index() -> None:
    """Slots of 24 bytes; empty ones, ones that go back and ones inside the header are left out."""
    entries = [(1, 10, 4096), (50, 20, 70_000), (90, 30, 140_000)]
    data = golden("index.bin", b"".join(encode_index_entry(*e) for e in entries))
    assert decode_index(data) == entries
    assert decode_index(data[:24] + bytes(24) + data[48:] + b"cut") == [entries[0], entries[2]]
    assert decode_index(data[24:48] + data[:24]) == [entries[1]]
    assert decode_index(encode_index_entry(1, 1, 100)) == []


def test_trim_mark() -> None:
    """Two halves written in turn; the newer good one counts."""
    data = golden("trim.bin", encode_trim(0, 1).ljust(TRIM_BYTES // 2, b"\0") + encode_trim(1, 42).ljust(512, b"\0"))
    assert max(decode_trim(data))[1] == 42
    for bit in range(512 * 8, 512 * 8 + 28 * 8):
        broken = bytearray(data)
        broken[bit >> 3] ^= 1 << (bit & 7)
        assert decode_trim(bytes(broken)) == [(0, 1)]
    assert decode_trim(b"") == []


@pytest.mark.parametrize("distinct", [1, 2, 255, 256, 257, 1000, 65_535])
def test_any_number_of_subjects(distinct: int) -> None:
    """One byte per record up to 256 subjects, two above, none for one; up to 65,535 records in a block."""
    subjects = [f"s.{i}" for i in range(distinct)] + ["s.0"] * (3 if distinct < 65_000 else 0)
    made = Columns(subjects, [b"d"] * len(subjects), None, None)
    parts, _ = encode_block(made, base=5, time_ns=1, chain=2, seed=3)
    data = b"".join(parts)
    header = block_header(data)
    assert header is not None
    assert block_ok(data, header, 3)
    meta = decode_meta(data, header)
    assert len(meta.which) == (0 if distinct == 1 else len(subjects) * (1 if distinct <= 256 else 2))
    assert [r.subject for r in decode_records(data, header, meta)] == subjects


def test_a_block_of_another_stream_is_none_of_ours() -> None:
    """The checksum is seeded with the incarnation."""
    data = blocks()
    header = block_header(data)
    assert header is not None
    assert not block_ok(data, header, seed_of("another"))
    assert not meta_ok(data, header, seed_of("another"))


def test_what_is_no_block() -> None:
    """Another magic, version, flags, no records, sequence 0, or too few bytes."""
    data = blocks()
    for at, to in ((0, b"X"), (8, b"\x02"), (9, b"\x01")):
        assert block_header(data[:at] + to + data[at + 1 :]) is None
    assert block_header(data[:12] + bytes(4) + data[16:]) is None
    assert block_header(data[:28] + bytes(8) + data[36:]) is None
    assert block_header(data[: BLOCK_HEADER - 1]) is None
    assert block_header(b"") is None
