"""Export lines and files as streams: what goes out comes back the same; bad lines are told, never swallowed."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from conftest import run
from hypothesis import given
from hypothesis import strategies as st

from cli.conftest import Cli, envelope
from mist.broker.base import Message, Record
from mist.cli.filestream import FileStream
from mist.cli.lines import FOREIGN, parse_line
from mist.cli.records import View, document
from mist.errors import CursorAhead, DataLoss, InvalidArgument, Malformed, NotFound, Refused, WrongIncarnation
from mist.protocol.codec import encode, encode_msgpack
from mist.protocol.url import Url

SAFE = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)
PRETTY = b'{\n  "version": "1",\n  "id": "p", "source": "s", "type": "t",\r\n  "timestamp_ns": 1, "payload": [\n1]\n}'
LATIN = b'{"version":"1","id":"l","source":"s","type":"t","timestamp_ns":1,"payload":"\xe9"}'
MSGPACK = (("Content-Type", "application/msgpack"),)


@given(
    data=st.one_of(
        st.binary(max_size=60),
        st.builds(lambda p: encode(envelope(1, payload=p)), st.dictionaries(SAFE, st.integers() | SAFE, max_size=3)),
        st.sampled_from([PRETTY, LATIN, encode_msgpack(envelope(1)), b"", b"{}", b'{"sequence":1}']),
    ),
    id=st.sampled_from(["", "id-1", "other", "p", "l"]),
    headers=st.sampled_from([(), (("a", "b"), ("a", "c")), MSGPACK]),
    sequence=st.integers(1, 2**63 - 1),
)
def test_an_exported_record_comes_back_exactly(
    data: bytes, id: str, headers: tuple[tuple[str, str], ...], sequence: int
) -> None:
    """Subject, id, headers and every byte of the data survive export and import, whatever they are."""
    line = document(View(Record(sequence, "a.b", data, 5, id, headers)), exact=True)
    assert b"\n" not in line
    assert b"\r" not in line
    line.decode()
    content = parse_line(line)
    assert content.error is None
    assert (content.subject, content.data, content.id, content.headers) == ("a.b", data, id, headers)
    assert (content.sequence, content.timestamp_ns) == (sequence, 5)


def test_a_plain_envelope_is_a_line() -> None:
    """The bytes are kept, the subject is the type, the id the envelope's."""
    data = encode(envelope(3, "eval.result"))
    content = parse_line(data)
    assert (content.subject, content.data, content.id, content.error) == ("eval.result", data, "id-3", None)


@pytest.mark.parametrize(
    "line",
    [
        b"garbage",
        b"[]",
        b'{"version":"1"}',
        b'{"sequence":1}',
        b'{"sequence":1,"subject":"a","timestamp_ns":1}',
        b'{"sequence":1,"subject":"a b","timestamp_ns":1,"data":"x"}',
        b'{"sequence":1,"subject":"a","timestamp_ns":1,"data":"x","encoding":"rot13"}',
        b'{"sequence":1,"subject":"a","timestamp_ns":1,"data":"!!","encoding":"base64"}',
        b'{"sequence":1,"subject":"a","timestamp_ns":1,"envelope":{"version":"9","id":"i","source":"s","type":"t"}}',
        b"\xff\xfe",
        b'{"version":"1","id":"i","source":"s","type":"a b*","timestamp_ns":1,"payload":NaN}',
    ],
)
def test_other_lines_have_an_error_and_their_bytes(line: bytes) -> None:
    """What is neither form is marked, with the reason."""
    content = parse_line(line)
    assert content.error is not None
    assert (content.subject, content.data) == (FOREIGN, line)


def _stream(path: Path, *, strict: bool = False) -> FileStream:
    return FileStream(Url("file", str(path)), strict=strict)


def test_line_numbers_are_sequences_at_every_page_size(tmp_path: Path) -> None:
    """Blank lines are gaps; reading by any page size gives the same records as reading at once."""
    path = tmp_path / "x.jsonl"
    lines = [b"" if n % 4 == 0 else b" " if n % 7 == 0 else encode(envelope(n)) for n in range(1, 200)]
    path.write_bytes(b"\n".join(lines) + b"\n")

    async def body() -> None:
        stream = _stream(path)
        whole = (await stream.read(limit=1000)).records
        assert [r.sequence for r in whole] == [n for n in range(1, 200) if n % 4 and n % 7]
        assert all(r.data == lines[r.sequence - 1] for r in whole)
        info = await stream.info()
        assert (info.first, info.last, info.records) == (1, 199, len(whole))
        for limit in (1, 2, 3, 50, 149):
            again, after = [], 0
            while after < info.last:
                page = await stream.read(after=after, limit=limit)
                again += page.records
                after = page.scanned
            assert again == whole
        for after in (198, 10, 100, 1):  # and in any order
            found = (await stream.read(after=after, limit=1)).records
            assert found == [r for r in whole if r.sequence > after][:1]
        with pytest.raises(CursorAhead):
            await stream.read(after=200)
        stream.close()

    run(body())


def test_a_large_file_is_read_through_its_index(tmp_path: Path) -> None:
    """Lines that cross the index's chunks start where they should."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(b"%d %s\n" % (n, b"x" * (n * 37 % 1500)) for n in range(1, 3001)))

    async def body() -> None:
        stream = _stream(path)
        for n in (2999, 1, 1500, 1499, 2998, 700, 3000):
            page = await stream.read(after=n - 1, limit=1)
            assert page.records[0].data.split()[0] == b"%d" % n
        stream.close()

    run(body())


@pytest.mark.parametrize("tail", [b'{"version":"1","id":"t","sou', b"half a line"])
def test_a_torn_last_line_waits_until_it_is_whole(tmp_path: Path, tail: bytes) -> None:
    """An unfinished line is no record and is told of; finished it is one."""
    path = tmp_path / "x.jsonl"
    whole = encode(envelope(1))
    path.write_bytes(whole + b"\n" + tail)

    async def body() -> None:
        stream = _stream(path)
        info = await stream.info()
        assert info.last == 1
        assert info.warnings == ("the last line is not complete",)
        with path.open("ab") as file:
            file.write(b"\n" + encode(envelope(2)))  # without a newline, but complete
        info = await stream.info()
        assert (info.last, info.warnings) == (3, ())
        page = await stream.read(after=1, wait_s=1)
        assert [r.sequence for r in page.records] == [2, 3]
        stream.close()

    run(body())


def test_a_file_that_is_cut_is_another_stream(tmp_path: Path) -> None:
    """A reader is not fooled by a file that shrank, and a copied file is the same stream."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(encode(envelope(1)) + b"\n" + encode(envelope(2)) + b"\n")

    async def body() -> None:
        stream = _stream(path)
        await stream.info()
        (tmp_path / "y.jsonl").write_bytes(path.read_bytes() + b"more\n")
        other = _stream(tmp_path / "y.jsonl")
        assert other.incarnation == stream.incarnation
        other.close()
        path.write_bytes(b"x\n")
        with pytest.raises(WrongIncarnation):
            await stream.read()
        stream.close()

    run(body())


def test_compressed_files_are_streams_too(tmp_path: Path) -> None:
    """.gz is read like the plain file; a broken one is an error, not an empty stream."""
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(encode(envelope(n)) + b"\n" for n in range(1, 50))))

    async def body() -> None:
        stream = _stream(path)
        assert (await stream.info()).records == 49
        assert (await stream.read(after=47, limit=5)).records[0].id == "id-48"
        assert (await stream.read(after=2, limit=1)).records[0].id == "id-3"
        stream.close()

    run(body())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(Malformed, match="decompressed"):
        run(_info(path))


async def _info(path: Path) -> None:
    stream = _stream(path)
    try:
        await stream.info()
    finally:
        stream.close()


def test_strict_lines_are_damage_with_their_number(tmp_path: Path) -> None:
    """Records before a bad line come first, then DataLoss names the line, then reading goes on."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(encode(envelope(1)) + b"\nbad\n" + encode(envelope(3)) + b"\n")

    async def body() -> None:
        stream = _stream(path, strict=True)
        assert [r.sequence for r in (await stream.read()).records] == [1]
        with pytest.raises(DataLoss) as caught:
            await stream.read(after=1)
        assert (caught.value.first, caught.value.last, caught.value.resume_after) == (2, 2, 2)
        assert [r.sequence for r in (await stream.read(after=2)).records] == [3]
        stream.close()

    run(body())


def test_writing_to_a_file_stream_is_refused(tmp_path: Path) -> None:
    """Read-only means Refused, with what to use instead."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"")

    async def body() -> None:
        stream = _stream(path)
        with pytest.raises(Refused, match="read-only"):
            await stream.append([Message("a", b"")])
        with pytest.raises(Refused):
            await stream.trim(before=1)
        stream.close()

    run(body())
    with pytest.raises(NotFound):
        _stream(tmp_path / "absent")
    with pytest.raises(InvalidArgument, match="directory"):
        _stream(tmp_path)


def test_read_verbs_on_a_file(cli: Cli, home: Path) -> None:
    """tail, get, count, stream info, subjects, gaps and verify take file:PATH."""
    path = home / "x.jsonl"
    path.write_bytes(encode(envelope(1)) + b"\n\n" + encode(envelope(3, "eval.result")) + b"\nbad\n")
    source = "file:x.jsonl"
    assert [r["sequence"] for r in cli.ok("tail", source, "-o", "jsonl").lines] == [1, 3, 4]
    assert cli.ok("get", source, "3", "-j").json["envelope"]["id"] == "id-3"
    assert cli.ok("get", source, "last", "-j").json["data"] == "bad"
    assert cli.ok("count", source).out == "3\n"
    assert cli.ok("count", source, "--type", "trace.span").out == "1\n"
    info = cli.ok("stream", "info", source, "-j").json
    assert (info["first"], info["last"], info["records"]) == (1, 4, 3)
    assert {r["subject"] for r in cli.ok("stream", "subjects", source, "-j").json} == {
        "trace.span",
        "eval.result",
        "line",
    }
    assert cli.ok("stream", "gaps", source, "-j").json == [{"first": 2, "last": 2, "records": 1, "why": "missing"}]
    verified = cli("stream", "verify", source, "-j")
    assert verified.code == 8
    assert [d["first"] for d in verified.json["damage"]] == [4]
    for args in (
        ["pub", source, "x"],
        ["stream", "purge", source, "-y"],
        ["sub", source],
        ["consumer", "create", source, "c"],
    ):
        assert cli(*args).code in (2, 11), args
