"""C19, the part of the log's bytes: damaged segments, made-up blocks, pages, headers and indexes.

Two kinds of input. Bytes that were damaged: whatever the reader calls good must be what was written. Bytes that somebody
made with a right checksum: nothing but BadBytes may come out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from google_crc32c import extend

from mist.broker.base import Record, StreamConfig
from mist.log.files import Files
from mist.log.format import (
    BLOCK_HEADER,
    BLOCK_MAGIC,
    SEGMENT_HEADER,
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
    encode_block,
    encode_segment_header,
    encode_tail,
    seed_of,
)
from mist.log.segments import Block, Gap, Segments, segment_name

from .campaign import Report, Trial

_HANG_S = 10.0


class OneFile(Files):
    """A directory with one segment, in memory."""

    def __init__(self, base: int, data: bytes) -> None:
        self._name = segment_name(base)
        self._data = data

    def open(self, path: str, *, create: bool = False, write: bool = True) -> int:
        if not path.endswith(self._name):
            raise FileNotFoundError(path)
        return 1

    def close(self, fd: int) -> None:
        return None

    def listdir(self, path: str) -> list[str]:
        return [self._name]

    def size(self, fd: int) -> int:
        return len(self._data)

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        return self._data[offset : offset + count]


class Sample:
    """A segment of random blocks, and the records in it."""

    def __init__(self, rng: random.Random) -> None:
        self.incarnation = f"{rng.getrandbits(64):016x}"
        self.seed = seed_of(self.incarnation)
        self.base = rng.choice((1, 2, 1000, 1 << 40))
        header = SegmentHeader(
            stream="s", incarnation=self.incarnation, base=self.base, created_ns=1, chain=rng.getrandbits(32),
            stream_created_ns=1, config=StreamConfig(durability="power"),
        )  # fmt: skip
        self.records: dict[int, Record] = {}
        self.parts = [encode_segment_header(header)]
        self.chain = chain = header.chain
        sequence = self.base
        for _ in range(rng.randint(1, 12)):
            columns = _columns(rng)
            parts, chain = encode_block(columns, base=sequence, time_ns=sequence, chain=chain, seed=self.seed)
            block = b"".join(parts)
            head = block_header(block)
            assert head is not None
            for r in decode_records(block, head, decode_meta(block, head)):
                self.records[r.sequence] = r
            self.parts.append(block)
            sequence = head.last + 1
        self.last = sequence - 1
        self.data = b"".join(self.parts) + bytes(rng.choice((0, 0, 100, 5000)))


def _columns(rng: random.Random) -> Columns:
    count = rng.choice((1, 1, 2, 5, 300))
    names = [f"a.{i}" for i in range(rng.choice((1, 2, 300)))]
    # payloads may hold whole blocks of other streams, or the magic alone
    data = [rng.choice((b"", BLOCK_MAGIC, rng.randbytes(rng.randint(0, 60)), b"{}" * 20)) for _ in range(count)]
    ids = [f"id{i}" for i in range(count)] if rng.random() < 0.5 else None
    headers = [(("k", "v"),) if rng.random() < 0.5 else () for _ in range(count)] if rng.random() < 0.3 else None
    return Columns([rng.choice(names) for _ in range(count)], data, ids, headers)


def damaged(sample: Sample, rng: random.Random) -> bytes:
    """The segment with one to four things done to it."""
    data = bytearray(sample.data)
    for _ in range(rng.randint(1, 4)):
        size = len(data)
        at = (
            rng.randrange(SEGMENT_HEADER, size) if rng.random() < 0.9 and size > SEGMENT_HEADER else rng.randrange(size)
        )
        length = rng.choice((1, 4, 44, rng.randint(1, 500)))
        match rng.randrange(9):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + length] = rng.randbytes(len(data[at : at + length]))
            case 2:
                data[at : at + length] = bytes(len(data[at : at + length]))
            case 3:
                del data[at:]
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = rng.randbytes(length)
            case 6:
                data[at:at] = rng.choice(sample.parts[1:])
            case 7:
                data[at : at + 4] = BLOCK_MAGIC
            case _:
                i, j = rng.randrange(1, len(sample.parts)), rng.randrange(1, len(sample.parts))
                parts = list(sample.parts)
                parts[i], parts[j] = parts[j], parts[i]
                data = bytearray(b"".join(parts))
        if not data:
            data = bytearray(1)
    return bytes(data)


def walk_damaged(sample: Sample, data: bytes) -> None:
    """Every record that comes out is one that went in, in order, once; gaps say what is missing."""
    segments = Segments(OneFile(sample.base, data), "dir", sample.seed)
    segments.refresh()
    expected = sample.base
    for item in segments.walk(sample.base, chain=sample.chain, mark=sample.last):
        if isinstance(item, Gap):
            assert item.first == expected, item
            expected = max(expected, item.last + 1)
            continue
        assert isinstance(item, Block)
        assert item.header.base == expected, (item.header, expected)
        for record in decode_records(item.data, item.header, decode_meta(item.data, item.header)):
            assert sample.records[record.sequence] == record
        expected = item.header.last + 1
    assert expected >= sample.last + 1, f"{expected} to {sample.last} are neither records nor a gap"


def made_up(sample: Sample, rng: random.Random) -> None:
    """A block with a right checksum and wrong content: BadBytes, or records that agree with its header."""
    block = bytearray(rng.choice(sample.parts[1:]))
    for _ in range(rng.randint(1, 6)):
        block[rng.randrange(8, len(block))] = rng.choice((0, 0x7F, 0xFF, rng.randrange(256)))
    block[4:8] = extend(sample.seed, bytes(block[8:])).to_bytes(4, "little")
    data = bytes(block)
    header = block_header(data)
    if header is None or not block_ok(data, header, sample.seed):
        return
    try:
        records = decode_records(data, header, decode_meta(data, header))
    except BadBytes:
        return
    assert [r.sequence for r in records] == list(range(header.base, header.last + 1)), "records and header disagree"


def small_things(sample: Sample, rng: random.Random) -> None:
    """Segment headers, tail pages and indexes: the value that was written, nothing, or BadBytes."""
    page = bytearray(encode_tail(Tail(
        generation=1, boot=bytes(16), device=1, inode=2, durable=3, segment=1, end=9, chain=1, time_ns=1, first=1,
        first_segment=1, first_offset=1, bytes=1,
    )))  # fmt: skip
    page[rng.randrange(len(page))] ^= 1 << rng.randrange(8)
    assert decode_tail(bytes(page[: rng.choice((len(page), rng.randrange(len(page))))])) is None
    head = bytearray(sample.parts[0])
    for _ in range(rng.randint(1, 40)):
        head[rng.randrange(len(head))] = rng.randrange(256)
    with suppress(BadBytes):
        assert decode_segment_header(bytes(head)).incarnation == sample.incarnation
    assert isinstance(decode_index(rng.randbytes(rng.randrange(200))), list)
    noise = rng.randbytes(rng.randrange(200))
    block_header(BLOCK_MAGIC + noise, rng.choice((0, 3, len(noise))))
    assert BLOCK_HEADER == 44


def fuzz_blocks(budget_s: float, seed: int, report: Report, *, units: int | None = None) -> dict[str, Any]:
    """Inputs from a seed each: `python -c "from tests.campaigns.blocks import one; one(SEED)"` repeats one."""
    trial = Trial("C19b", budget_s, seed, report, units)
    said = time.monotonic()
    while trial.more():
        number = seed * 1_000_000_007 + trial.reached
        start = time.monotonic()
        try:
            trial.add(inputs=one(number))
        except Exception as exc:
            trial.fail(f"input {number}: {type(exc).__name__}: {exc}")
        if time.monotonic() - start > _HANG_S:
            trial.fail(f"input {number} took {time.monotonic() - start:.0f} s")
        trial.reached += 12
        if time.monotonic() - said > 10:
            said = time.monotonic()
            trial.say(f"{trial.reached} inputs")
    return trial.result()


def one(number: int) -> int:
    """Twelve inputs made from one sample. Raises what is wrong."""
    rng = random.Random(number)
    sample = Sample(rng)
    actions: list[Callable[[], None]] = [
        *[lambda: walk_damaged(sample, damaged(sample, rng))] * 6,
        *[lambda: made_up(sample, rng)] * 4,
        *[lambda: small_things(sample, rng)] * 2,
    ]
    for action in actions:
        action()
    return len(actions)
