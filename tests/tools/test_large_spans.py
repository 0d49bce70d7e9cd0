"""Spans above 1 MiB: beside the stream by reference, whole in the store, gone when they are erased."""

from __future__ import annotations

from pathlib import Path

from conftest import run

import mist
from mist.client.blobs import REF, Blobs, beside, outlining
from mist.protocol.subject import subject_for
from mist.tools.tokentrace.ingest import Options, ingest
from mist.tools.tokentrace.queries import spans
from mist.tools.tokentrace.store import Store
from mist.transport.server import stream_sink

from .shell import Shell
from .spanning import envelope

LARGE = "x" * (1024 * 1024 + 1)


def test_a_large_span_lies_beside_the_stream_and_comes_back_whole(tmp_path: Path) -> None:
    """The record is small, the file is there, the row has all of it; a small span beside it is as ever."""

    async def body() -> None:
        async with mist.connect(f"log:{tmp_path / 'log'}") as broker:
            stream = await broker.open("trace")
            sink = outlining(stream_sink(stream), stream, beside(broker), lambda e: subject_for(e.type))
            await sink([envelope(1, attrs={"prompt": LARGE, "model": "m"}), envelope(2)])
            records = (await stream.read()).records
            assert [dict(r.headers).keys() >= {REF} for r in records] == [True, False]
            assert len(records[0].data) < 1000
            with Store.open(tmp_path / "t.db") as store:
                await ingest(broker, stream, store, until=2)
                found = spans(store, limit=5, oldest_first=True).spans
            assert [s.model for s in found] == ["m", "m1"]
            assert LARGE.encode() in bytes(found[0].attrs)

    run(body())


def test_a_payload_that_is_gone_is_a_refusal_and_not_an_end(tmp_path: Path) -> None:
    """Quarantined with the reason; the next span is stored."""

    async def body() -> None:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            blobs = Blobs(tmp_path / "blobs")
            sink = outlining(stream_sink(stream), stream, blobs, lambda e: subject_for(e.type))
            await sink([envelope(1, attrs={"prompt": LARGE})])
            await sink([envelope(2)])
            for file in (tmp_path / "blobs").glob("*/*"):
                file.unlink()
            with Store.open(tmp_path / "t.db") as store:
                done = await ingest(broker, stream, store, until=2, options=Options(blobs=blobs))
                assert (done.spans, done.refused) == (1, 1)
                assert "incomplete" in str(store.one("SELECT reason FROM quarantine"))

    run(body())


def test_a_file_goes_through_the_same_intake(shell: Shell, tmp_path: Path) -> None:
    """`mist trace ingest` redacts before anything is stored, and keeps large payloads beside the stream."""
    (tmp_path / "mist.toml").write_text('[[tokentrace.redact.rules]]\nattrs = ["secret"]\naction = "drop"\n')
    line = '{"trace_id":"t1","span_id":"s1","operation":"chat","secret":"4711-geheim","prompt":"%s"}\n' % LARGE  # noqa: UP031
    (tmp_path / "calls.jsonl").write_text(line)
    done = shell("trace", "ingest", "calls.jsonl", "-j")
    assert (done.code, done.json["acknowledged"]) == (0, 1), done.err
    assert list((tmp_path / "log" / "blobs").glob("??/*"))
    for file in (tmp_path / "log").rglob("*"):
        if file.is_file():
            assert b"geheim" not in file.read_bytes(), file
    assert shell("trace", "show", "t1", "-j").json["spans"][0]["attrs"]["prompt"] == LARGE
