"""copy, mirror, export, import and replay: nothing lost, nothing doubled, resumable, verified."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

import mist.broker.memory as memory
from cli.conftest import Cli, content, envelope, fill, message, records, with_broker
from mist.broker.base import Message, Record, StreamConfig
from mist.cli import transfer
from mist.errors import DataLoss
from mist.log.broker import LogStream
from mist.protocol.codec import encode, encode_msgpack

TRANSPORT = pytest.mark.skipif(
    importlib.util.find_spec("mist.transport.file") is None, reason="the file: transport is not there"
)
MIXED = [
    *[message(envelope(n)) for n in range(1, 40)],
    Message("foreign.text", b"no envelope", "f1", (("a", "1"), ("a", "2"))),
    Message("foreign.bytes", bytes(range(256))),
    Message("foreign.bytes", bytes(range(256))),
    Message("pretty", json.dumps(json.loads(encode(envelope(50))), indent=2).encode(), "id-50"),
    Message("packed", encode_msgpack(envelope(51)), "id-51", (("Content-Type", "application/msgpack"),)),
    Message("elsewhere", encode(envelope(52)), "another-id"),
]


@pytest.fixture
def other(tmp_path: Path) -> str:
    return f"log:{tmp_path / 'other'}"


def test_copy_is_exact_and_running_it_again_copies_what_is_new(cli: Cli, url: str, other: str) -> None:
    """Subject, data, id and headers of every kind of record; then only the rest."""
    fill(url, "s", MIXED)
    first = cli.ok("-u", url, "copy", "s", other, "-j").json
    assert (first["stored"], first["repeated"], first["position"]) == (len(MIXED), 0, len(MIXED))
    assert content(other, "s") == content(url, "s")
    fill(url, "s", [message(envelope(99))])
    again = cli.ok("-u", url, "copy", "s", other, "-j").json
    assert (again["stored"], again["repeated"]) == (1, 0)
    assert content(other, "s") == content(url, "s")
    cli.ok("-u", url, "copy", "s", f"{other}?stream=t", "--from", "40")
    assert content(other, "t") == content(url, "s")[39:]


def test_copy_filters_and_rehearsal(cli: Cli, url: str, other: str) -> None:
    """Only what matches goes over; --dry-run ends with 10 and makes nothing."""
    fill(url, "s", [message(envelope(n, "eval.result" if n % 2 else "trace.span")) for n in range(1, 11)])
    assert cli("-u", url, "copy", "s", other, "--dry-run").code == 10
    assert not os.path.exists(other[4:])
    cli.ok("-u", url, "copy", "s", other, "--subject", "eval.>", "--where", "payload.n>4")
    assert [r.id for r in records(other, "s")] == ["id-5", "id-7", "id-9"]


@pytest.mark.parametrize("ids", [True, False])
def test_a_crash_between_storing_and_saving_doubles_nothing(
    cli: Cli, log: str, other: str, monkeypatch: pytest.MonkeyPatch, ids: bool
) -> None:
    """The place was not saved and the window of ids is over: the tail is read back, with and without ids."""
    fill(log, "s", [Message("a", b"%d" % n, f"i{n}" if ids else "") for n in range(2500)])
    fill(other, "s", [], config=StreamConfig(dedupe_window_s=0, dedupe_ids_max=0))
    monkeypatch.setattr(transfer, "SAVE_EVERY_S", 0.0)
    real, calls = transfer.StreamSink.save, []

    async def broken(self: transfer.StreamSink, key: str, place: transfer.Place) -> None:
        calls.append(place)
        if len(calls) >= 3:
            raise OSError("the machine stops here")
        await real(self, key, place)

    with monkeypatch.context() as patch:
        patch.setattr(transfer.StreamSink, "save", broken)
        assert cli("-u", log, "copy", "s", other).code == 1
    assert len(records(other, "s")) == 2000
    result = cli.ok("-u", log, "copy", "s", other, "-j").json
    assert (result["stored"], result["repeated"]) == (500, 1000)
    assert content(other, "s") == content(log, "s")


def test_a_source_that_was_made_again_is_refused(cli: Cli, log: str, other: str) -> None:
    """The place of an old incarnation never skips records of a new one; --restart begins again."""
    fill(log, "s", 5)
    cli.ok("-u", log, "copy", "s", other)
    cli.ok("-u", log, "stream", "rm", "s", "-y")
    fill(log, "s", [message(envelope(n)) for n in range(100, 103)])
    assert cli("-u", log, "copy", "s", other).code == 5
    cli.ok("-u", log, "copy", "s", other, "--restart")
    assert [r.id for r in records(other, "s")][5:] == ["id-100", "id-101", "id-102"]


def test_what_is_read_back_is_compared(cli: Cli, log: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A destination that stores something else ends with 8."""
    fill(log, "s", 5)
    real = LogStream.append

    async def tampering(self: LogStream, messages: Any, *, expected_last: int | None = None) -> list[int]:
        changed = [Message(m.subject, m.data.replace(b"id-3", b"id-4"), m.id, m.headers) for m in messages]
        return await real(self, changed, expected_last=expected_last)

    monkeypatch.setattr(LogStream, "append", tampering)
    result = cli("-u", log, "copy", "s", other)
    assert result.code == 8
    assert "digests differ" in result.err


def damage(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Make a range of every memory stream unreadable, as the contract says it shows."""
    real = memory.MemoryStream.read

    async def read(self: memory.MemoryStream, *, after: int = 0, limit: int = 256, **kw: Any) -> Any:
        if after + 1 >= first and after < last:
            raise DataLoss(first=first, last=last, resume_after=last, stream=self.name)
        if after < first:
            limit = min(limit, first - 1 - after)
        return await real(self, after=after, limit=limit, **kw)

    monkeypatch.setattr(memory.MemoryStream, "read", read)


def test_damage_is_told_passed_over_and_ends_with_nine(
    cli: Cli, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tail, count, copy and export warn with the range, go on, and end with 9; gaps lists it."""
    url = f"memory:damage-{os.getpid()}"
    fill(url, "s", 10)
    damage(monkeypatch, 4, 6)
    kept = [1, 2, 3, 7, 8, 9, 10]
    for args in (["--from", "start"], ["-n", "7"], ["-n", "100"]):
        shown = cli("-u", url, "tail", "s", "-o", "jsonl", *args)
        assert shown.code == 9, shown
        assert "records 4 to 6 are damaged; going on after 6" in shown.err
        assert [r["sequence"] for r in shown.lines][-7:] == kept[-len(shown.lines) :]
    assert cli("-u", url, "copy", "s", other).code == 9
    assert [r.id for r in records(other, "s")] == [f"id-{n}" for n in kept]
    exported = cli("-u", url, "export", "s", str(tmp_path / "x.jsonl"))
    assert exported.code == 9
    manifest = json.loads((tmp_path / "x.jsonl.manifest.json").read_text())
    assert [(g["first"], g["last"]) for g in manifest["gaps"]] == [(4, 6)]
    assert manifest["records"] == 7
    assert cli("-u", url, "stream", "gaps", "s", "-j").json == [{"first": 4, "last": 6, "records": 3, "why": "damaged"}]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_export_and_import_give_the_same_records(cli: Cli, url: str, other: str, home: Path, name: str) -> None:
    """Every kind of record, with a manifest whose checksums hold; importing again stores nothing."""
    fill(url, "s", MIXED)
    told = cli.ok("-u", url, "export", "s", name, "-j").json
    assert told["records"] == len(MIXED)
    manifest = json.loads((home / f"{name}.manifest.json").read_text())
    data = (home / name).read_bytes()
    plain = gzip.decompress(data) if name.endswith(".gz") else data
    digest = __import__("hashlib").sha256
    assert manifest["file_sha256"] == digest(data).hexdigest()
    assert manifest["sha256"] == digest(plain).hexdigest()
    assert (manifest["records"], manifest["first"], manifest["last"]) == (len(MIXED), 1, len(MIXED))
    assert (manifest["bytes"], manifest["file_bytes"]) == (len(plain), len(data))
    assert sorted(p.name for p in home.iterdir() if p.name.startswith("x.")) == [name, f"{name}.manifest.json"]
    first = cli.ok("-u", other, "import", name, "s", "-j").json
    assert first["stored"] == len(MIXED)
    assert content(other, "s") == content(url, "s")
    assert cli.ok("-u", other, "import", name, "s", "-j").json["stored"] == 0


def test_export_lines_are_those_of_tail(cli: Cli, url: str, home: Path) -> None:
    """One documented line, whoever writes it; --envelopes gives the envelopes alone."""
    fill(url, "s", 5)
    cli.ok("-u", url, "export", "s", "x.jsonl")
    assert (home / "x.jsonl").read_bytes() == cli.ok("-u", url, "tail", "s", "-o", "jsonl").raw
    assert cli.ok("-u", url, "export", "s", "-").raw == (home / "x.jsonl").read_bytes()
    cli.ok("-u", url, "export", "s", "e.jsonl", "--envelopes")
    assert (home / "e.jsonl").read_bytes() == b"".join(encode(envelope(n)) + b"\n" for n in range(1, 6))
    fill(url, "s", [Message("a", b"foreign")])
    partial = cli("-u", url, "export", "s", "e2.jsonl", "--envelopes")
    assert partial.code == 9
    assert "1 records are no envelopes" in partial.err


def test_an_export_writes_over_nothing(cli: Cli, url: str, home: Path) -> None:
    """An existing file is a conflict without --force, and a failed export leaves no file under the name."""
    fill(url, "s", 3)
    (home / "x.jsonl").write_text("mine")
    assert cli("-u", url, "export", "s", "x.jsonl").code == 5
    assert (home / "x.jsonl").read_text() == "mine"
    cli.ok("-u", url, "export", "s", "x.jsonl", "--force")
    assert cli("-u", url, "export", "absent", "y.jsonl").code == 3
    assert cli("-u", url, "export", "s", "no/such/dir.jsonl").code == 2
    assert cli("-u", url, "export", "s", "z.jsonl", "--resume").code == 3
    assert not (home / "y.jsonl").exists()


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_an_export_that_was_stopped_goes_on(
    cli: Cli, log: str, home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Stopped anywhere, --resume gives the same lines as one run, and only with the same filters."""
    from mist.cli import export

    fill(log, "s", 3500)
    real, seen = export._Writer.line, []

    def stopping(self: Any, record: Record, line: bytes) -> None:
        seen.append(record.sequence)
        if len(seen) == 2345:
            raise KeyboardInterrupt
        real(self, record, line)

    monkeypatch.setattr(export, "SAVE_EVERY_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(export._Writer, "line", stopping)
        assert cli("-u", log, "export", "s", name).code == 130
    assert not (home / name).exists()
    with (home / f"{name}.part").open("ab") as part:
        part.write(b"torn by a crash")
    assert cli("-u", log, "export", "s", name).code == 5
    assert cli("-u", log, "export", "s", name, "--resume", "--type", "x").code == 5
    cli.ok("-u", log, "export", "s", name, "--resume")
    data = (home / name).read_bytes()
    plain = gzip.decompress(data) if name.endswith(".gz") else data
    assert plain == cli.ok("-u", log, "export", "s", "-").raw
    manifest = json.loads((home / f"{name}.manifest.json").read_text())
    assert manifest["records"] == 3500
    assert manifest["sha256"] == __import__("hashlib").sha256(plain).hexdigest()


def test_import_checks_the_manifest_and_names_bad_lines(cli: Cli, log: str, home: Path) -> None:
    """A changed file is refused with 8; without a manifest bad lines are told, 9 for a part, 10 for nothing."""
    fill(log, "s", 5)
    cli.ok("-u", log, "export", "s", "x.jsonl")
    lines = (home / "x.jsonl").read_bytes().splitlines(keepends=True)
    (home / "x.jsonl").write_bytes(b"".join(lines[:-1]))
    assert cli("-u", log, "import", "x.jsonl", "t").code == 8
    (home / "y.jsonl").write_bytes(lines[0] + b"bad\n" + encode(envelope(2)) + b"\n")
    partial = cli("-u", log, "import", "y.jsonl", "t")
    assert partial.code == 9
    assert "records 2 to 2 are not an envelope" in partial.err
    assert [r.id for r in records(log, "t")] == ["id-1", "id-2"]
    (home / "z.jsonl").write_bytes(b"bad\nworse\n")
    assert cli("-u", log, "import", "z.jsonl", "u").code == 10
    assert cli("-u", log, "import", "absent.jsonl", "u").code == 3
    assert cli("-u", log, "import", "y.jsonl", "u", "--dry-run").code == 10


def test_a_missing_package_is_one_sentence(cli: Cli, log: str, home: Path) -> None:
    """.zst without its package names the install line."""
    if importlib.util.find_spec("zstandard") is not None:
        pytest.skip("zstandard is installed")
    fill(log, "s", 1)
    result = cli("-u", log, "export", "s", "x.jsonl.zst")
    assert result.code == 2
    assert "pip install zstandard" in result.err
    assert not (home / "x.jsonl.zst.part").exists()


def test_mirror_catches_up_and_reports_lag(cli: Cli, url: str, other: str) -> None:
    """--once ends when it has caught up; a second run goes on where the first stopped."""
    fill(url, "s", MIXED)
    report = cli.ok("-u", url, "mirror", "s", other, "--once", "-o", "jsonl").lines[-1]
    assert list(report) == ["source", "destination", "position", "last", "lag", "lag_s", "stored", "repeated"]
    assert (report["lag"], report["stored"]) == (0, len(MIXED))
    fill(url, "s", [message(envelope(99))])
    assert cli.ok("-u", url, "mirror", "s", other, "--once", "-o", "jsonl").lines[-1]["stored"] == 1
    assert content(other, "s") == content(url, "s")


def test_mirror_follows_until_it_is_stopped(cli: Cli, log: str, other: str) -> None:
    """Without --once it waits for more; stopped by its timeout it has saved its place."""
    fill(log, "s", 3)
    assert cli("-u", log, "mirror", "s", other, "--timeout", "0.3").code == 6
    assert len(records(other, "s")) == 3
    fill(log, "s", [message(envelope(9))])
    assert cli.ok("-u", log, "mirror", "s", other, "--once", "-j").json["stored"] == 1


def test_replay_to_a_stream_and_to_stdout(cli: Cli, url: str, other: str) -> None:
    """From a position, in order, ids kept; without --to it prints like tail."""
    fill(url, "s", MIXED)
    cli.ok("-u", url, "replay", "s", "--from", "38", "--to", f"{other}?stream=t")
    assert content(other, "t") == content(url, "s")[37:]
    shown = cli.ok("-u", url, "replay", "s", "--from", "2", "--until", "4", "-o", "jsonl")
    assert [r["sequence"] for r in shown.lines] == [2, 3, 4]
    assert [r["sequence"] for r in cli.ok("-u", url, "replay", "s", "-n", "2", "-o", "jsonl").lines] == [1, 2]
    for speed in ("0x", "fast", "-1x", "nanx", "infx"):
        assert cli("-u", url, "replay", "s", "--speed", speed).code == 2


def test_replay_keeps_the_pace(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 2x a record is sent half the time after the first that it came; the clock decides, not the test's speed."""
    from mist.cli import replay

    waits: list[float] = []
    clock = [100.0]

    async def sleep(seconds: float) -> None:
        waits.append(round(seconds, 6))
        clock[0] += seconds

    class Time:
        @staticmethod
        def monotonic() -> float:
            return clock[0]

    url = f"memory:pace-{os.getpid()}"
    fill(url, "s", 3)

    async def stamp(broker: Any) -> None:
        found = broker._store.streams["s"].records
        for n, record in enumerate(found):
            found[n] = Record(record.sequence, record.subject, record.data, 10**18 + n * 4 * 10**9, record.id)

    with_broker(url, stamp)
    monkeypatch.setattr(replay, "time", Time)
    monkeypatch.setattr(replay.asyncio, "sleep", sleep)
    assert len(cli.ok("-u", url, "replay", "s", "--speed", "2x", "-o", "jsonl").lines) == 3
    assert waits == [2.0, 2.0]


@TRANSPORT
def test_copy_to_and_from_a_file_of_envelopes(cli: Cli, url: str, other: str, home: Path) -> None:
    """file: as destination holds plain envelopes; a second run appends what is new; and it can be copied back."""
    fill(url, "s", 5)
    cli.ok("-u", url, "copy", "s", "file:e.jsonl")
    fill(url, "s", [message(envelope(6))])
    assert cli.ok("-u", url, "copy", "s", "file:e.jsonl", "-j").json["stored"] == 1
    assert (home / "e.jsonl").read_bytes() == b"".join(encode(envelope(n)) + b"\n" for n in range(1, 7))
    cli.ok("-u", other, "copy", "file:e.jsonl", "s")
    assert content(other, "s") == content(url, "s")
    fill(url, "s", [Message("a", b"foreign")])
    partial = cli("-u", url, "copy", "s", "file:e.jsonl")
    assert partial.code == 9
    assert "no envelopes" in partial.err


@TRANSPORT
def test_replay_to_a_transport(cli: Cli, log: str, home: Path) -> None:
    """--to takes every transport's URL; what is no envelope is told."""
    fill(log, "s", MIXED[:41])
    result = cli("-u", log, "replay", "s", "--to", "file:r.jsonl")
    assert result.code == 9
    assert (home / "r.jsonl").read_bytes() == b"".join(encode(envelope(n)) + b"\n" for n in range(1, 40))
