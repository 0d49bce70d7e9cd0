"""Moving data while brokers come and go, between streams that number in their own way, and through a spool."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from log import shaky

import mist.broker.memory as memory
from cli.conftest import Cli, content, envelope, fill, message, records
from mist.broker import registry
from mist.broker.base import Message, Page, Record, StreamConfig, StreamInfo, check_messages
from mist.broker.feed import Places
from mist.broker.patience import Patience, Steady
from mist.cli import transfer
from mist.errors import CursorAhead, Unavailable
from mist.log.broker import LogStream
from mist.protocol.url import Url

_names = itertools.count(1)
BASE = 1_795_000_000_000 << 20
"""A Redis id of our days, as a sequence."""


@pytest.fixture
def other(tmp_path: Path) -> str:
    return f"log:{tmp_path / 'other'}"


# -- brokers that go away ----------------------------------------------------------------------------------------------


class Outage:
    """Every n-th call of a method of LogStream finds its broker away, twice in a row, in the streams of one log."""

    def __init__(self, patch: pytest.MonkeyPatch, method: str, every: int, *, stored: bool = False) -> None:
        self.count = 0
        real = getattr(LogStream, method)

        async def call(stream: LogStream, *args: Any, **kw: Any) -> Any:
            self.count += 1
            if self.count % every in (0, 1):
                raise Unavailable("connection refused")
            return await real(stream, *args, **kw)

        patch.setattr(LogStream, method, call)


@pytest.mark.parametrize("method", ["read", "append"])
@pytest.mark.parametrize("command", ["copy", "mirror", "import"])
def test_a_broker_that_goes_away_is_waited_for(
    cli: Cli, log: str, other: str, home: Path, monkeypatch: pytest.MonkeyPatch, method: str, command: str
) -> None:
    """Source or destination: the command goes on, says so, and what is there is what was sent."""
    fill(log, "s", [Message("a", b"%d" % (n // 3), "" if n % 2 else f"i{n}") for n in range(3000)])
    cli.ok("-u", log, "export", "s", "x.jsonl")
    with monkeypatch.context() as patch:
        Outage(patch, method, 3)
        if command == "import":
            done = cli.ok("-u", other, "import", "x.jsonl", "s", "-j")
        else:
            extra = ["--once"] if command == "mirror" else []
            done = cli.ok("-u", log, command, "s", other, "-j", *extra)
    assert "does not answer (connection refused)" in done.err
    assert "is back after" in done.err
    assert content(other, "s") == content(log, "s")


def test_patience_ends_with_the_timeout(cli: Cli, log: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A destination that stays away ends with 6, and holds nobody up at the end; the next run finishes."""
    fill(log, "s", 10)
    with monkeypatch.context() as patch:
        Outage(patch, "append", 1)
        result = cli("-u", log, "copy", "s", other, "--timeout", "0.7")
        assert result.code == 6, result
        assert "until --timeout 0.7 is over" in result.err
    assert cli.ok("-u", log, "copy", "s", other, "-j").json["stored"] == 10


def test_replay_and_relay_wait_too(cli: Cli, log: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both verbs without a stored position: what arrives is what was sent, once."""
    fill(log, "s", 1200)
    with monkeypatch.context() as patch:
        Outage(patch, "append", 3)
        cli.ok("-u", log, "replay", "s", "--to", f"{other}?stream=s")
        cli.ok("relay", f"{log}?stream=s&follow=0", f"{other}?stream=r")
    assert content(other, "s") == content(log, "s")
    assert content(other, "r") == content(log, "s")


def test_relay_says_where_to_go_on(cli: Cli, log: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by its timeout, it prints the URL that resumes."""
    fill(log, "s", 5)
    stopped = cli("relay", f"{log}?stream=s", f"{other}?stream=r", "--timeout", "1")
    assert stopped.code == 6
    assert "from=%2B5" in stopped.err or "from=+5" in stopped.err
    assert len(records(other, "r")) == 5


def test_the_same_transfer_twice_at_once_is_a_conflict(
    cli: Cli, log: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's place under our key: neither could promise anything, so this one stops with 5."""
    fill(log, "s", 5000)
    monkeypatch.setattr(transfer, "SAVE_EVERY_S", 0.0)
    real, calls = Places.save, []

    async def save(self: Places, name: str, place: Any) -> None:
        calls.append(name)
        await real(self, name, place)
        if len(calls) == 2:
            await real(self, name, transfer.Place(place.incarnation, place.sequence + 7, place.at, place.target))

    with monkeypatch.context() as patch:
        patch.setattr(Places, "save", save)
        result = cli("-u", log, "copy", "s", other)
    assert result.code == 5
    assert "another run of the same transfer" in result.err


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_what_a_destination_does_not_take_is_told_and_counted(
    cli: Cli, log: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records above its limit: the first ones by sequence, then a count, and exit code 9; the others are there."""
    fill(log, "s", [Message("a", b"x" * (300 if n % 4 == 0 else 10), f"i{n}") for n in range(1, 101)])
    real = LogStream.append

    async def append(self: LogStream, messages: Any, *, expected_last: int | None = None) -> list[int]:
        check_messages(messages, 100)
        return await real(self, messages, expected_last=expected_last)

    monkeypatch.setattr(LogStream, "append", append)
    result = cli("-u", log, "copy", "s", other, "-j")
    assert result.code == 9
    assert (result.json["stored"], result.json["refused"]) == (75, 25)
    assert "record 4: not taken by s in" in result.err
    assert result.err.count("warning: record ") == transfer.TOLD_MAX
    assert "25 records were not taken" in result.err
    assert [r.id for r in records(other, "s")] == [f"i{n}" for n in range(1, 101) if n % 4]
    again = cli.ok("-u", log, "copy", "s", other, "-j").json  # passed over is passed over
    assert (again["stored"], again["refused"]) == (0, 0)


def test_a_destination_with_a_short_memory_cannot_be_compared(cli: Cli, log: str, other: str) -> None:
    """Its retention removes records before they are read back: told, 9, never a false alarm of damage."""
    fill(log, "s", 5000)
    fill(other, "s", [], config=StreamConfig(records_max=100, full="drop_oldest"))
    result = cli("-u", log, "copy", "s", other, "-j")
    assert result.code in (0, 9)
    assert result.json["stored"] == 5000
    assert (result.code == 9) == bool(result.json["unverified"])
    assert [r.id for r in records(other, "s")] == [f"id-{n}" for n in range(4901, 5001)]


# -- streams that number in their own way ------------------------------------------------------------------------------


class Sparse(Steady):
    """A stream that others made: sequences far apart and above 2^53, as ids of Redis give them."""

    def __init__(self, stream: memory.MemoryStream) -> None:
        super().__init__(stream, Patience())

    def out(self, sequence: int) -> int:
        return BASE + sequence * ((1 << 20) + 3) if sequence else 0

    def inside(self, sequence: int) -> int:
        return max(0, sequence - BASE) // ((1 << 20) + 3)

    async def read(self, *, after: int = 0, **kw: Any) -> Page:
        last = (await self.info()).last
        if after > last:
            raise CursorAhead(after=after, last=last, stream=self.name)
        page = await self.stream.read(after=self.inside(after), **kw)
        found = [Record(self.out(r.sequence), r.subject, r.data, r.timestamp_ns, r.id, r.headers) for r in page.records]
        return Page(found, max(after, self.out(page.scanned)), self.out(page.last))

    async def append(self, messages: Sequence[Message], *, expected_last: int | None = None) -> list[int]:
        expected = None if expected_last is None else self.inside(expected_last)
        return [self.out(s) for s in await self.stream.append(messages, expected_last=expected)]

    async def info(self) -> StreamInfo:
        found = await self.stream.info()
        values = {f: getattr(found, f) for f in found.__struct_fields__}
        return StreamInfo(**{**values, "first": self.out(found.first), "last": self.out(found.last)})

    async def locate(self, time_ns: int) -> int:
        return self.out(await self.stream.locate(time_ns))


async def connect(url: Url, **options: Any) -> memory.MemoryBroker:
    broker = await memory.connect(Url("memory", f"sparse-{url.target}"))
    real = broker.open

    async def opened(name: str, **kw: Any) -> Any:
        return Sparse(await real(name, **kw))

    broker.open = opened  # type: ignore[method-assign]
    return broker


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(registry._BUILT_IN, "sparse", f"{__name__}:connect")
    return f"sparse:{os.getpid()}-{next(_names)}"


FOREIGN = [
    *[Message("orders.eu", b"row %d" % (n // 2)) for n in range(1500)],
    Message("f.b", bytes(range(256)), "", (("field", "v"),)),
    *[message(envelope(n)) for n in range(1, 20)],
]


@pytest.mark.parametrize("verb", ["copy", "mirror", "replay", "export"])
def test_foreign_streams_go_over_as_they_are(cli: Cli, sparse: str, other: str, home: Path, verb: str) -> None:
    """Sequences near 2^60 with gaps, neighbours that are the same, no ids: every record, once, in order."""
    fill(sparse, "s", FOREIGN)
    if verb == "export":
        cli.ok("-u", sparse, "export", "s", "x.jsonl.gz")
        assert cli.ok("-u", other, "import", "x.jsonl.gz", "s", "-j").json["stored"] == len(FOREIGN)
    elif verb == "replay":
        cli.ok("-u", sparse, "replay", "s", "--to", f"{other}?stream=s")
    else:
        extra = ["--once"] if verb == "mirror" else []
        done = cli.ok("-u", sparse, verb, "s", other, "-j", *extra).json
        assert done["stored"] == len(FOREIGN)
        assert isinstance(done["position"], str)  # above 2^53 a number would lose digits
        fill(sparse, "s", [Message("orders.eu", b"new")])
        assert cli.ok("-u", sparse, verb, "s", other, "-j", *extra).json["stored"] == 1
    assert content(other, "s") == content(sparse, "s")


def test_a_destination_may_number_as_it_likes(cli: Cli, log: str, sparse: str) -> None:
    """Into sparse sequences: stored, compared, gone on with, and its last records found without a walk."""
    fill(log, "s", FOREIGN)
    assert cli.ok("-u", log, "copy", "s", sparse, "-j").json["stored"] == len(FOREIGN)
    assert cli.ok("-u", log, "copy", "s", sparse, "-j").json["stored"] == 0
    assert content(sparse, "s") == content(log, "s")
    assert [r["sequence"] for r in cli.ok("-u", sparse, "tail", "s", "-n", "2", "-o", "jsonl").lines] == [
        str(r.sequence) for r in records(sparse, "s")[-2:]
    ]
    rehearsal = cli("-u", sparse, "copy", "s", log + "2", "--dry-run")
    assert rehearsal.code == 10
    assert f"up to {len(FOREIGN):,} records" in rehearsal.err


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_copy_that_is_killed_goes_on_without_doubles(log: str, other: str, spawn: Any, cli: Cli) -> None:
    """kill -9, again and again, without ids and without a window: the content is the source's."""
    fill(log, "s", [Message("a", b"%d" % (n // 5)) for n in range(40_000)])
    fill(other, "s", [], config=StreamConfig(dedupe_window_s=0, dedupe_ids_max=0))
    for wait_s in (0.35, 0.4, 0.45, 0.5, 0.6, 0.3):
        process = spawn("-u", log, "copy", "s", other, "--rate", "30000")
        time.sleep(wait_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
    cli.ok("-u", log, "copy", "s", other)
    assert content(other, "s") == content(log, "s")


# -- the spool ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, shaky.World]:
    shaky.register(monkeypatch)
    world = shaky.world(f"cli{next(_names)}-{os.getpid()}")
    return f"spool+shaky:{world.name}?spool={tmp_path / 'spool'}&spool_drain=1", world


def test_publishing_through_a_spool(cli: Cli, spool: tuple[str, shaky.World]) -> None:
    """pub while the broker is away; status, doctor and info tell; flush waits for it, bounded; then all is there."""
    url, world = spool
    world.away = True
    assert "stored as s 1" in cli.ok("-u", url, "pub", "s", '"one"').err
    cli.ok("-u", url, "pub", "s", '"two"')
    (row,) = cli.ok("-u", url, "spool", "status", "-o", "json").json
    assert (row["stream"], row["waiting"], row["forwarded"], row["refused"], row["dropped"]) == ("s", 2, 0, 0, 0)
    status = cli.ok("-u", url, "spool", "status").err
    assert "is away" in status
    assert "2 records wait" in status
    info = cli.ok("-u", url, "stream", "info", "s", "-j").json
    assert (info["spool"]["waiting"], info["durability"], info["capabilities"]["read"]) == (2, "power", False)
    assert "2 records wait here" in cli.ok("-u", url, "doctor").out
    flushed = cli("-u", url, "spool", "flush", "--timeout", "1")
    assert flushed.code == 6
    assert "is away" in flushed.err
    world.away = False
    assert cli.ok("-u", url, "spool", "flush", "-j").json[0]["forwarded"] == 2
    assert len(records(f"memory:shaky-{world.name}", "s")) == 2
    cli.ok("-u", url, "pub", "s", '"three"')  # the moment at the end is enough for it
    assert len(records(f"memory:shaky-{world.name}", "s")) == 3


def test_reading_from_a_spool_is_refused_with_the_way_out(cli: Cli, spool: tuple[str, shaky.World]) -> None:
    """Read verbs name the broker behind, a spool that is not there is not made, and spool verbs want a spool."""
    url, world = spool
    assert cli("-u", url, "tail", "s").code == 3
    cli.ok("-u", url, "pub", "s", "x")
    for args in (
        ["tail", "s"],
        ["count", "s"],
        ["get", "s", "1"],
        ["copy", "s", "memory:"],
        ["consumer", "create", "s", "c"],
    ):
        result = cli("-u", url, *args)
        assert result.code == 2, args
        assert f"go to the broker behind it: shaky:{world.name}" in result.err
    assert cli("spool", "status").code == 2
    assert cli("-u", "spool+memory:?spool=./none", "spool", "status").code == 3
    assert not Path("none").exists()


def test_trace_ingest_through_a_spool(cli: Cli, spool: tuple[str, shaky.World], home: Path) -> None:
    """Acknowledged here, forwarded there; what cannot wait for rows behind a broker says so instead."""
    url, world = spool
    (home / "calls.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2026-01-01 00:00:00.0,1,2\n2026-01-01 00:00:01.0,3,4\n"
    )
    result = cli.ok("-u", url, "trace", "ingest", "calls.csv", "--model", "m", "-j")
    assert result.json["acknowledged"] == 2
    assert "for publishing only" in result.err
    cli.ok("-u", url, "spool", "flush")
    assert len(records(f"memory:shaky-{world.name}", "trace")) == 2


def test_the_folder_of_spools_is_a_setting(cli: Cli, spool: tuple[str, shaky.World], home: Path) -> None:
    """mist.toml, MIST_SPOOL; each broker gets a folder of its own below."""
    _, world = spool
    (home / "mist.toml").write_text('spool = "./kept"\n')
    cli.ok("-u", f"spool+shaky:{world.name}", "pub", "s", "x")
    (made,) = (home / "kept").iterdir()
    assert (made / "streams" / "s").is_dir()
