"""The bytes of the log: golden files in tests/log/golden, and the limits of blocks. docs/reference/log-format.md is their text.

`MIST_WRITE_GOLDEN=1` writes the golden files anew; a change of them is a change of the format.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from google_crc32c import extend, value
from msgspec.structs import replace

from mist.broker.base import StreamConfig
from mist.log.format import (
    BLOCK_HEADER,
    SEGMENT_HEADER,
    TAIL_BYTES,
    TRIM_BYTES,
    BadBytes,
    BlockHeader,
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
    erase_from_block,
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
    erased = replace(HEADER, version=2)
    assert decode_segment_header(encode_segment_header(erased), strict=True) == erased
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


def test_erased_blocks() -> None:
    """A block keeps checksum, chain and sequences when records are erased from it, and holds nothing of them."""
    whole = blocks()
    first = block_header(whole)
    assert first is not None
    rest = whole[first.size :]
    before = block_header(rest)
    assert before is not None
    some, gone = erase_from_block(rest, before, {3}, SEED)
    assert gone == [3]
    none, gone = erase_from_block(some, head_of(some), {2, 3, 4, 99}, SEED)
    assert gone == [2, 4]
    for name, data, left in (("erased-some.bin", some, [0, 2]), ("erased-all.bin", none, [])):
        data = golden(name, data)
        assert data[:9] == rest[:9]
        assert data[9] == 1
        assert data[12:16] == rest[12:16]
        assert data[24:44] == rest[24:44]
        header = head_of(data)
        assert (header.erased, header.crc, header.chain, header.size) == (True, before.crc, before.chain, len(data))
        assert block_ok(data, header, SEED)
        assert meta_ok(data, header, SEED)
        meta = decode_meta(data, header)
        assert meta.erased == bytes([0b111 & ~sum(1 << i for i in left)])
        records = decode_records(data, header, meta)
        assert [(r.sequence, r.subject, r.data, r.id, r.headers) for r in records] == [
            (2 + i, MANY.subjects[i], MANY.datas[i], (MANY.ids or [])[i], (MANY.headers or [])[i]) for i in left
        ]
        assert b"error" not in data
        assert b"Content-Type" not in data
        assert meta.all_ids(header) in (["id-1", "", "id-3"], None)
        again, gone = erase_from_block(data, header, {3}, SEED)
        assert (again, gone) == (data, [])
        for bit in range(32, len(data) * 8):
            broken = bytearray(data)
            broken[bit >> 3] ^= 1 << (bit & 7)
            head = block_header(broken)
            assert head is None or not block_ok(bytes(broken), head, SEED), f"bit {bit}"


def head_of(block: bytes) -> BlockHeader:
    header = block_header(block)
    assert header is not None
    return header


@pytest.mark.parametrize("count", [1, 7, 8, 9, 255, 256, 257, 3000])
@pytest.mark.parametrize("distinct", [1, 3, 300])
def test_erasing_from_blocks_of_any_size(count: int, distinct: int) -> None:
    """Whatever is erased, in one go or one after the other: the same bytes, the same checksum, the others as they were."""
    rng = random.Random(count * distinct)
    made = Columns(
        [f"s.{i % distinct}" for i in range(count)], [b"%d" % i * 3 for i in range(count)],
        [f"i{i}" if i % 3 else "" for i in range(count)], [(("h", str(i)),) if i % 5 == 0 else () for i in range(count)],
    )  # fmt: skip
    parts, crc = encode_block(made, base=10, time_ns=5, chain=77, seed=SEED)
    whole = b"".join(parts)
    header = head_of(whole)
    records = decode_records(whole, header, decode_meta(whole, header))
    for share in (0.1, 0.9, 1.1):
        gone = {s for s in range(10, 10 + count) if rng.random() < share} or {10}
        once, _ = erase_from_block(whole, header, gone, SEED)
        twice = whole
        for some in (sorted(gone)[::2], sorted(gone)[1::2]):
            twice, _ = erase_from_block(twice, head_of(twice), set(some), SEED)
        assert once == twice
        now = head_of(once)
        assert (now.crc, now.base, now.last, now.time_ns) == (crc, 10, 9 + count, 5)
        assert block_ok(once, now, SEED)
        meta = decode_meta(once, now)
        assert decode_records(once, now, meta) == [r for r in records if r.sequence not in gone]
        assert meta.gone(now) == sorted(gone)


def test_an_erased_block_that_cannot_be_right() -> None:
    """A good checksum over a bitmap that marks nothing, too much, or has another length, is damage."""
    whole = blocks()
    header = head_of(whole[head_of(whole).size :])
    some, _ = erase_from_block(whole[head_of(whole).size :], header, {3}, SEED)
    at = some.index(b"\xc4\x01\x02", BLOCK_HEADER)
    for bits in (b"\xc4\x01\x00", b"\xc4\x01\x0a", b"\xc4\x01\x07"):
        with pytest.raises(BadBytes):
            decode_meta(some[:at] + bits + some[at + 3 :], head_of(some))


def test_tail_page() -> None:
    """One page, checked as a whole: any flipped bit makes it no page at all."""
    data = golden("tail.bin", encode_tail(TAIL))
    assert len(data) == TAIL_BYTES == 148
    assert decode_tail(data) == TAIL
    assert data[12:16] == bytes(4)
    erased = encode_tail(replace(TAIL, erasures=2**32 + 258))
    assert erased[12:16] == b"\x02\x01\0\0"
    assert decode_tail(erased) == replace(TAIL, erasures=258)
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
    for at, to in ((0, b"X"), (8, b"\x02"), (9, b"\x02"), (9, b"\x03")):
        assert block_header(data[:at] + to + data[at + 1 :]) is None
    assert block_header(data[:12] + bytes(4) + data[16:]) is None
    assert block_header(data[:28] + bytes(8) + data[36:]) is None
    assert block_header(data[: BLOCK_HEADER - 1]) is None
    assert block_header(b"") is None
