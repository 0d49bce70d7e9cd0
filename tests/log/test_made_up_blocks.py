"""Blocks whose checksum is right and whose content cannot be: the reader says BadBytes, never anything else."""

from __future__ import annotations

import msgspec
import pytest
from google_crc32c import extend

from mist.log.format import BLOCK_HEADER, BadBytes, Columns, block_header, block_ok, decode_meta, decode_records
from mist.log.format import encode_block as encode

SEED = 7
pack = msgspec.msgpack.encode
TWO = Columns(["a", "b"], [b"1", b"2"], ["i", "j"], [(), (("k", "v"),)])


def block(meta: bytes | None = None, data: bytes | None = None) -> bytes:
    """The block of TWO with its meta or data replaced, lengths and checksum made right."""
    parts, _ = encode(TWO, base=1, time_ns=1, chain=0, seed=SEED)
    whole = b"".join(parts)
    head = block_header(whole)
    assert head is not None
    meta = whole[BLOCK_HEADER : BLOCK_HEADER + head.meta_len] if meta is None else meta
    data = whole[BLOCK_HEADER + head.meta_len :] if data is None else data
    lengths = len(meta).to_bytes(4, "little") + len(data).to_bytes(4, "little")
    rest = whole[8:16] + lengths + whole[24:BLOCK_HEADER] + meta + data
    return whole[:4] + extend(SEED, rest).to_bytes(4, "little") + rest


def decode(data: bytes) -> int:
    header = block_header(data)
    assert header is not None
    assert block_ok(data, header, SEED)
    return len(decode_records(data, header, decode_meta(data, header)))


def test_the_block_as_it_was_made_is_read() -> None:
    """The helper that makes up blocks leaves a good one good."""
    assert decode(block()) == 2


@pytest.mark.parametrize(
    ("what", "meta", "data"),
    [
        ("no subject", pack(([], b"", None, None)), None),
        ("a subject number beyond the list", pack((["a", "b"], b"\x00\x02", None, None)), None),
        ("too few subject numbers", pack((["a", "b"], b"\x00", None, None)), None),
        ("too many ids", pack((["a", "b"], b"\x00\x01", ["i", "j", "k"], None)), None),
        ("no ids where there are some", pack((["a", "b"], b"\x00\x01", [], None)), None),
        ("too few headers", pack((["a", "b"], b"\x00\x01", None, [[]])), None),
        ("not msgpack", b"\xc1", None),
        ("a subject that is not UTF-8", b"\x94\x91\xa2\xff\xfe\xc4\x00\xc0\xc0", None),
        ("a list of four billion subjects", b"\x94\xdd\xff\xff\xff\xff", None),
        ("a payload too few", None, pack([b"1"])),
        ("payloads that are numbers", None, pack([1, 2])),
        ("a list of four billion payloads", None, b"\xdd\xff\xff\xff\xff"),
    ],
)
def test_content_that_does_not_fit_its_header_is_bad_bytes(what: str, meta: bytes | None, data: bytes | None) -> None:
    """No other exception comes out, and no record of a block that contradicts itself."""
    with pytest.raises(BadBytes):
        decode(block(meta, data))
