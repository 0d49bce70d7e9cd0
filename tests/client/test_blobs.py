"""Large payloads beside the stream: durable before their record, whole again for readers, swept when nobody names them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from conftest import run

import mist
from mist.broker.base import Message
from mist.broker.deadletter import dead_stream
from mist.client.blobs import REF, Blobs, beside, referenced, sweep_all
from mist.client.client import Client
from mist.errors import DataLoss, Malformed, NotFound, TooLarge, Unavailable
from mist.protocol.envelope import Envelope
from mist.testing.clock import FakeClock

BIG = "x" * 3000


def blobs(tmp_path: Path, clock: FakeClock | None = None) -> Blobs:
    return Blobs(tmp_path / "blobs", over_bytes=1000, **({"clock": clock} if clock else {}))


def files(tmp_path: Path) -> list[Path]:
    return [p for p in (tmp_path / "blobs").rglob("*") if p.is_file() and p.name != "lock"]


def test_a_file_is_named_by_its_content_and_stored_once(tmp_path: Path) -> None:
    """The same bytes are one file, private to the user; what comes back is what was put."""
    store = blobs(tmp_path)
    one = store.put(b"a" * 2000)
    assert store.put(b"a" * 2000) == one
    assert store.put(b"b") != one
    assert len(files(tmp_path)) == 2
    assert store.get(one) == b"a" * 2000
    assert {p.stat().st_mode & 0o777 for p in files(tmp_path)} == {0o600}
    for wrong in ("", "sha256:", "sha256:../../etc/passwd", "md5:" + "0" * 64, "sha256:" + "G" * 64):
        with pytest.raises(Malformed):
            store.get(wrong)
    with pytest.raises(NotFound):
        store.get("sha256:" + "0" * 64)


def test_a_damaged_file_is_never_believed(tmp_path: Path) -> None:
    """Reading refuses it, putting the same bytes mends it."""
    store = blobs(tmp_path)
    ref = store.put(b"a" * 2000)
    (path,) = files(tmp_path)
    path.write_bytes(b"b" * 2000)
    with pytest.raises(Malformed):
        store.get(ref)
    assert store.put(b"a" * 2000) == ref
    assert store.get(ref) == b"a" * 2000


@pytest.mark.parametrize("fails", ["fsync", "rename"])
def test_a_failed_put_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """The error is ours, no file has the name, and no record is appended."""

    def broken(*args: object) -> None:
        raise OSError(5, "Input/output error")

    async def body() -> None:
        async with mist.connect("memory:") as broker, Client(broker, source="t", blobs=blobs(tmp_path)) as client:
            with monkeypatch.context() as patch:
                patch.setattr(*(("os.fsync", broken) if fails == "fsync" else (Path, "rename", broken)))
                with pytest.raises(Unavailable):
                    await client.publish("s", client.envelope("a.b", BIG))
            assert files(tmp_path) == []
            assert (await (await broker.open("s")).info()).records == 0
            await client.publish("s", client.envelope("a.b", BIG))
            assert len(files(tmp_path)) == 1

    run(body())


@pytest.mark.parametrize("checksum", [False, True])
def test_readers_and_workers_get_the_envelope_whole(tmp_path: Path, checksum: bool) -> None:
    """The record is small; who has the directory sees no difference, who has not sees the reference."""

    async def body() -> None:
        async with mist.connect("memory:") as broker, Client(broker, source="t", blobs=blobs(tmp_path)) as client:
            sent = [
                Envelope.new("a.b", value, source="t", checksum=checksum, tenant="acme")
                for value in ("small", BIG, "z")
            ]
            await client.publish("s", sent)
            await client.publish("s", sent)  # again: nothing new is stored
            stream = await broker.open("s")
            records = (await stream.read()).records
            assert len(records) == 3
            assert max(len(r.data) for r in records) < 1000
            assert [e.envelope async for e in client.replay("s")] == sent
            got = []

            async def handle(item: object) -> None:
                got.append(item.envelope)  # type: ignore[attr-defined]

            worker = await client.subscribe("s", "c", handle)
            async with mist.Client(broker) as plain:
                seen = [e.envelope async for e in plain.replay("s")]
            assert [e.data() if i != 1 else sorted(e.data()) for i, e in enumerate(seen)] == [
                "small",
                ["$ref", "size"],
                "z",
            ]
            running = asyncio.ensure_future(worker.run())
            async with asyncio.timeout(20):
                while len(got) < 3:
                    await asyncio.sleep(0.01)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert got == sent

    run(body())


def test_only_the_header_makes_a_reference(tmp_path: Path) -> None:
    """A payload that looks like one, from outside, is data."""

    async def body() -> None:
        store = blobs(tmp_path)
        ref = store.put(b'"secret"')
        async with mist.connect("memory:") as broker, Client(broker, source="t", blobs=store) as client:
            await client.publish("s", client.envelope("a.b", {"$ref": ref, "size": 8}))
            (got,) = [e.envelope.data() async for e in client.replay("s")]
            assert got == {"$ref": ref, "size": 8}

    run(body())


def test_a_missing_payload_is_data_loss_of_its_record(tmp_path: Path) -> None:
    """Raised, or passed over and counted, and the next record comes."""

    async def body() -> None:
        async with mist.connect("memory:") as broker, Client(broker, source="t", blobs=blobs(tmp_path)) as client:
            await client.publish("s", [client.envelope("a.b", BIG), client.envelope("a.b", "next")])
            os.unlink(files(tmp_path)[0])
            with pytest.raises(DataLoss) as loss:
                [e async for e in client.replay("s")]
            assert (loss.value.first, loss.value.last) == (1, 1)
            assert [e.envelope.data() async for e in client.replay("s", on_bad="skip")] == ["next"]

    run(body())


def test_the_limit_is_that_of_the_whole_envelope(tmp_path: Path) -> None:
    """Beside the stream or not; nothing is stored of one that is too large."""

    async def body() -> None:
        async with (
            mist.connect("memory:") as broker,
            Client(broker, source="t", size_bytes_max=5000, blobs=blobs(tmp_path)) as client,
        ):
            await client.publish("s", client.envelope("a.b", "x" * 4900))
            with pytest.raises(TooLarge):
                await client.publish("s", client.envelope("a.b", "y" * 5001))
            assert len(files(tmp_path)) == 1

    run(body())


def test_a_sweep_takes_what_nobody_names_and_is_old(tmp_path: Path) -> None:
    """Trimmed and deleted records free their payloads; dead letters and other streams keep theirs; young ones stay."""

    async def body() -> None:
        clock = FakeClock()
        store = blobs(tmp_path, clock)
        async with mist.connect("memory:") as broker, Client(broker, source="t", blobs=store) as client:
            for n in range(4):
                await client.publish("s", client.envelope("a.b", f"{n}" * 2000))
            stream = await broker.open("s")
            (first, *_) = (await stream.read()).records
            await (await broker.open(dead_stream("s"))).append([Message(first.subject, first.data, "", first.headers)])
            await stream.trim(before=4)
            assert len(await referenced(broker)) == 2
            swept = await sweep_all(broker, store, grace_s=60.0)
            assert (swept.removed, swept.young, swept.kept) == (0, 2, 2)
            clock.advance(61.0)
            store.put(b'"' + b"1" * 2000 + b'"')  # about to be appended again
            swept = await sweep_all(broker, store, grace_s=60.0)
            assert (swept.removed, swept.bytes, swept.young, swept.kept) == (1, 2002, 1, 2)
            assert len([e async for e in client.replay("s", after=3)]) == 1
            assert (await sweep_all(broker, Blobs(tmp_path / "none"))).removed == 0

    run(body())


def test_a_log_has_its_own_directory(tmp_path: Path) -> None:
    """DIR/blobs; a client that was not told reads what others stored there."""

    async def body() -> None:
        async with mist.connect(f"log:{tmp_path}") as broker:
            store = beside(broker)
            assert store is not None
            assert store.directory == tmp_path / "blobs"
            store.over_bytes = 1000
            async with Client(broker, source="t", blobs=store) as client:
                await client.publish("s", client.envelope("a.b", BIG))
            assert (await (await broker.open("s")).read()).records[0].headers[0][0] == REF
            async with Client(broker) as plain:
                assert [e.envelope.data() async for e in plain.replay("s")] == [BIG]
                await plain.publish("s", plain.envelope("a.b", "y" * 2_000_000, source="t"))
            assert len(files(tmp_path)) == 1
        async with mist.connect("memory:") as broker:
            assert beside(broker) is None

    run(body())
