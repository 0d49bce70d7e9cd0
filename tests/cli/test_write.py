"""pub, stream upkeep, consumers, cursors, dead letters: what changes, what is asked first, what scripts get."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cli.conftest import Cli, envelope, fill, message, records, with_broker
from mist.broker.base import Capabilities, ConsumerConfig, Message
from mist.protocol.codec import decode, encode

# pub


def test_pub_makes_the_stream_and_an_envelope(cli: Cli, url: str) -> None:
    """One message: the stream is made, the payload is JSON where it is JSON, else text."""
    shown = cli.ok(
        "-u", url, "pub", "notes", '{"b":1.50,"a":[1]}', "--type", "note.new", "--source", "me", "--id", "x1", "-j"
    )
    assert shown.json == {"stream": "notes", "sequence": 1, "id": "x1", "subject": "note.new"}
    cli.ok("-u", url, "pub", "notes", "just words", "--subject", "notes.private", "--checksum", "--tenant", "t")
    cli.ok("-u", url, "pub", "notes", "-", stdin=b"from stdin\n")
    first, second, third = records(url, "notes")
    assert bytes(decode(first.data).payload) == b'{"b":1.50,"a":[1]}'
    assert (first.id, first.subject, decode(first.data).source) == ("x1", "note.new", "me")
    assert decode(second.data).data() == "just words"
    assert (second.subject, decode(second.data).tenant) == ("notes.private", "t")
    assert decode(second.data).checksum
    assert decode(third.data).data() == "from stdin"


@pytest.mark.parametrize(
    ("args", "stdin", "code"),
    [
        (["s", '{"a":NaN}'], b"", 10),
        (["s", "[1,"], b"", 10),
        (["s", "[" * 100 + "]" * 100], b"", 10),
        (["s", "-"], b"\xff\xfe", 2),
        (["s", "x", "--subject", "a..b"], b"", 2),
        (["s", "x", "--repeat", "2", "--id", "i"], b"", 2),
        (["s", "x", "--jsonl"], b"", 2),
        (["s", "x", "--repeat", "0"], b"", 2),
        (["s", "-"], b'"' + b"x" * (10 * 1024 * 1024) + b'"', 11),
    ],
)
def test_pub_refuses_before_anything_is_stored(cli: Cli, url: str, args: list[str], stdin: bytes, code: int) -> None:
    """What cannot be published is told, and the stream is not even made."""
    result = cli("-u", url, "pub", *args, stdin=stdin)
    assert result.code == code, result
    assert cli("-u", url, "tail", "s").code == 3


def test_pub_jsonl_keeps_ids_and_repeats_are_no_errors(cli: Cli, url: str) -> None:
    """Whole envelopes: payload bytes and ids stay; publishing the file again stores nothing and succeeds."""
    line = b'{"version":"1","id":"x","source":"s","type":"a.b","timestamp_ns":5,"payload":{"z":1.0, "a":2}}'
    data = b"\n".join([encode(envelope(1)), b"", line, encode(envelope(1))])
    first = cli.ok("-u", url, "pub", "s", "--jsonl", "-j", stdin=data)
    assert first.json == {"stream": "s", "published": 2, "repeated": 1, "invalid": 0, "first": 1, "last": 2}
    again = cli.ok("-u", url, "pub", "s", "--jsonl", "-j", stdin=data)
    assert (again.json["published"], again.json["repeated"]) == (0, 3)
    stored = records(url, "s")
    assert [r.id for r in stored] == ["id-1", "x"]
    assert bytes(decode(stored[1].data).payload) == b'{"z":1.0, "a":2}'


def test_pub_jsonl_tells_bad_lines_and_goes_on(cli: Cli, url: str) -> None:
    """Good lines are stored, bad ones named; 9 for a part, 10 when nothing was good."""
    wrong = encode(envelope(2)).replace(b'"payload"', b'"checksum":3,"payload"')
    result = cli("-u", url, "pub", "s", "--jsonl", stdin=encode(envelope(1)) + b"\nbad\n" + wrong + b"\n{}")
    assert result.code == 9
    assert [w for w in ("line 2", "line 3", "line 4") if w in result.err] == ["line 2", "line 3", "line 4"]
    assert [r.id for r in records(url, "s")] == ["id-1"]
    assert cli("-u", url, "pub", "s", "--jsonl", stdin=b"bad").code == 10


def test_pub_repeat_gives_new_ids(cli: Cli, url: str) -> None:
    """--repeat publishes different envelopes."""
    cli.ok("-u", url, "pub", "s", "x", "--repeat", "25", "--rate", "10000")
    assert len({r.id for r in records(url, "s")}) == 25


# streams


def test_stream_info_has_the_documented_keys_in_order(cli: Cli, url: str) -> None:
    """{"name","incarnation","first","last","records","bytes","durability","capabilities":{…}}, then more."""
    fill(url, "s", 3)
    info = cli.ok("-u", url, "stream", "info", "s", "--format", "json").json
    assert list(info)[:8] == ["name", "incarnation", "first", "last", "records", "bytes", "durability", "capabilities"]
    assert (info["name"], info["first"], info["last"], info["records"]) == ("s", 1, 3, 3)
    assert set(info["capabilities"]) == set(Capabilities.__struct_fields__)
    assert info["durability"] == ("memory" if url.startswith("memory:") else "power")
    listed = cli.ok("-u", url, "stream", "ls", "-j").json
    assert listed == [info]
    assert cli.ok("-u", url, "s", "ls", "-o", "jsonl").lines == [info]


def test_stream_create_with_settings(cli: Cli, url: str) -> None:
    """Settings are kept; creating it again is a conflict unless it is allowed and fits."""
    args = ["-u", url, "stream", "create", "s", "--age-max", "7d", "--bytes-max", "1.5MiB", "--full", "refuse"]
    config = cli.ok(*args, "-j").json["config"]
    assert (config["age_s_max"], config["bytes_max"], config["full"]) == (604800.0, 1572864, "refuse")
    assert cli(*args).code == 5
    assert cli.ok(*args, "--if-absent").code == 0
    assert cli("-u", url, "stream", "create", "s", "--full", "drop_oldest", "--if-absent").code == 5
    assert cli("-u", url, "stream", "create", "t", "--bytes-max", "many").code == 2
    assert cli("-u", url, "stream", "create", "t", "--durability", "holy").code == 2


def test_destructive_commands_ask_and_can_be_rehearsed(cli: Cli, url: str) -> None:
    """--dry-run shows and ends with 10; without -y and without a terminal nothing is done (11); -y does it."""
    fill(url, "s", 5)
    dry = cli("-u", url, "stream", "rm", "s", "--dry-run")
    assert dry.code == 10
    assert "would delete stream s with 5 records" in dry.err
    refused = cli("-u", url, "stream", "rm", "s")
    assert refused.code == 11
    assert "-y" in refused.err
    assert cli("-u", url, "stream", "rm", "s", "--no-input").code == 11
    assert len(records(url, "s")) == 5
    cli.ok("-u", url, "stream", "rm", "s", "-y")
    assert cli("-u", url, "stream", "rm", "s", "-y").code == 3
    assert cli("-u", url, "stream", "rm", "s", "--dry-run").code == 3


def test_purge(cli: Cli, url: str) -> None:
    """By position or by what is kept; the numbering goes on."""
    fill(url, "s", 10)
    args = ["-u", url, "stream", "purge", "s"]
    assert cli(*args, "--keep", "4", "--dry-run").code == 10
    cli.ok(*args, "--before", "3", "-y")
    assert [r.sequence for r in records(url, "s")] == list(range(3, 11))
    assert cli.ok(*args, "--keep", "4", "-y", "-j").json == {"stream": "s", "removed": 4, "first": 7}
    cli.ok(*args, "-y")
    assert records(url, "s") == []
    assert cli.ok(*args, "--dry-run").code == 0
    assert fill(url, "s", [Message("a", b"x")]) == [11]
    assert cli(*args, "--keep", "1", "--before", "2").code == 2


def test_erase(cli: Cli, url: str) -> None:
    """Sequences and ranges, asked for once; what is not there is passed over, and repeating it is fine."""
    fill(url, "s", 10)
    args = ["-u", url, "stream", "erase", "s"]
    dry = cli(*args, "2", "4..6", "99", "--dry-run", "-j")
    assert (dry.code, dry.json["dry_run"]) == (10, True)
    assert "4 records" in str(dry.json)
    assert len(records(url, "s")) == 10
    refused = cli(*args, "2", "--no-input")
    assert refused.code == 11
    assert "-y" in refused.err
    assert cli.ok(*args, "2", "4..6", "99", "-y", "-j").json == {"stream": "s", "erased": 4}
    assert [r.sequence for r in records(url, "s")] == [1, 3, 7, 8, 9, 10]
    assert cli.ok(*args, "4..6", "--dry-run").code == 0
    assert cli.ok(*args, "4..6", "-j").json == {"stream": "s", "erased": 0}
    assert [(g["first"], g["last"]) for g in cli.ok("-u", url, "stream", "gaps", "s", "-j").json] == [(2, 2), (4, 6)]
    for wrong in ("x", "3..", "-1", "5..a", "1..99999999"):
        assert cli(*args, wrong, "-y").code == 2, wrong
    assert cli(*args, "7..3", "-y").code == 2
    assert len(records(url, "s")) == 6


def test_subjects_gaps_and_verify(cli: Cli, url: str) -> None:
    """Counts by subject, no gaps in a dense stream, nothing damaged."""
    fill(url, "s", [message(envelope(n, "a.b" if n % 2 else "c")) for n in range(1, 6)])
    assert cli.ok("-u", url, "stream", "subjects", "s", "-j").json == [
        {"subject": "a.b", "records": 3},
        {"subject": "c", "records": 2},
    ]
    gaps = cli.ok("-u", url, "stream", "gaps", "s", "-j")
    assert gaps.json == []
    assert "has no gaps" in gaps.err
    if url.startswith(("nats:", "redis:")):
        refused = cli("-u", url, "stream", "verify", "s")
        assert refused.code == 2
        assert "does not have the capability `verify`" in refused.err
        return
    one = cli.ok("-u", url, "stream", "verify", "s", "-j").json
    assert (one["records"], one["damage"], one["ok"]) == (5, [], True)
    assert [r["stream"] for r in cli.ok("-u", url, "stream", "verify", "-j").json] == ["s"]


def test_compact_where_the_backend_cannot(cli: Cli) -> None:
    """A capability that is not there is named in one line."""
    fill("memory:cli-compact", "s", 1)
    result = cli("-u", "memory:cli-compact", "stream", "compact", "s")
    assert result.code == 2
    assert "compact" in result.err


# consumers


def consumer(url: str, stream: str, name: str, **config: object) -> None:
    async def body(broker: object) -> None:
        opened = await broker.open(stream)  # type: ignore[attr-defined]
        await opened.consumer(name, ConsumerConfig(**config))  # type: ignore[arg-type]

    with_broker(url, body)


def test_lag_has_the_documented_shape(cli: Cli, url: str) -> None:
    """{"stream","consumer","pending","lag","lag_s","redelivered"}; one object for one consumer, else a list."""
    fill(url, "s", 5)
    consumer(url, "s", "w")
    cli.ok("-u", url, "consumer", "next", "s", "w", "-n", "2")
    for words in (["s", "w"], ["w"], ["s/w"]):
        lag = cli.ok("-u", url, "consumer", "lag", *words, "--format", "json").json
        assert list(lag) == ["stream", "consumer", "pending", "lag", "lag_s", "redelivered"]
        assert (lag["stream"], lag["consumer"], lag["pending"], lag["lag"], lag["redelivered"]) == ("s", "w", 2, 5, 0)
        assert lag["lag_s"] >= 0
    consumer(url, "s", "v")
    assert [r["consumer"] for r in cli.ok("-u", url, "consumer", "lag", "-j").json] == ["v", "w"]
    assert len(cli.ok("-u", url, "c", "lag", "s", "-o", "jsonl").lines) == 2


def test_a_consumer_is_found_by_its_name_alone(cli: Cli, url: str) -> None:
    """Only where several streams have one of that name the stream must be said."""
    fill(url, "a", 1)
    fill(url, "b", 1)
    consumer(url, "a", "only")
    consumer(url, "a", "both")
    consumer(url, "b", "both")
    assert cli.ok("-u", url, "consumer", "info", "only", "-j").json["stream"] == "a"
    several = cli("-u", url, "consumer", "info", "both")
    assert several.code == 2
    assert "a/both" in several.err
    assert cli.ok("-u", url, "consumer", "info", "b/both", "-j").json["stream"] == "b"
    missing = cli("-u", url, "consumer", "info", "a", "nope")
    assert missing.code == 3
    assert "there are: both, only" in missing.err


def test_next_settles_as_told(cli: Cli, url: str) -> None:
    """--ack, --nak, --term, or nothing; at the end there is nothing more, exit 3."""
    fill(url, "s", 4)
    cli.ok("-u", url, "consumer", "create", "s", "w", "--ack-wait", "1h", "--attempts-max", "3")
    args = ["-u", url, "consumer", "next", "s", "w", "-o", "jsonl"]
    assert cli.ok(*args, "--ack").lines[0]["sequence"] == 1
    assert cli.ok(*args, "--nak").lines[0]["sequence"] == 2
    again = cli.ok(*args, "--term", "--reason", "bad one")
    assert again.lines[0]["sequence"] == 2
    assert "attempt 2" in again.err
    held = cli.ok(*args, "-n", "9")
    assert [line["sequence"] for line in held.lines] == [3, 4]
    assert "not settled" in held.err
    assert cli(*args).code == 3
    assert cli(*args, "--ack", "--nak").code == 2
    if url.startswith("nats:"):
        refused = cli("-u", url, "consumer", "pending", "w")
        assert refused.code == 2
        assert "does not have the capability `pending`" in refused.err
        assert cli.ok("-u", url, "consumer", "info", "w", "-j").json["pending"] == 2
        return
    pending = cli.ok("-u", url, "consumer", "pending", "w", "-j").json
    assert [(p["sequence"], p["attempt"]) for p in pending] == [(3, 1), (4, 1)]


def test_seek_and_reset(cli: Cli, url: str) -> None:
    """A consumer is moved to a position of the grammar, after asking."""
    fill(url, "s", 10)
    consumer(url, "s", "w")
    args = ["-u", url, "consumer"]
    assert cli(*args, "seek", "w").code == 2
    assert cli(*args, "seek", "w", "--to", "8").code == 11
    dry = cli(*args, "seek", "w", "--to", "8", "--dry-run")
    assert dry.code == 10
    assert "from 0 to 7" in dry.err
    cli.ok(*args, "seek", "w", "--to", "8", "-y")
    assert cli.ok(*args, "next", "w", "-o", "jsonl", "--ack").lines[0]["sequence"] == 8
    cli.ok(*args, "seek", "w", "--to", "-1", "-y")
    assert cli.ok(*args, "next", "w", "-o", "jsonl", "--ack").lines[0]["sequence"] == 10
    cli.ok(*args, "reset", "w", "-y")
    assert cli.ok(*args, "next", "w", "-o", "jsonl").lines[0]["sequence"] == 1
    assert cli(*args, "seek", "w", "--to", "99", "-y").code == 2


def test_consumer_create_list_remove(cli: Cli, url: str) -> None:
    """Made with its settings, listed with its lag, removed after asking; a stream that is not there is not made."""
    fill(url, "s", 3)
    args = ["-u", url, "consumer"]
    made = cli.ok(*args, "create", "s", "w", "--from", "end", "--subject", "a.>", "--subject", "b", "-j").json
    assert made["config"]["subjects"] == ["a.>", "b"]
    assert made["delivered"] == 3
    assert cli(*args, "create", "s", "w").code == 5
    cli.ok(*args, "create", "s", "w", "--if-absent")
    assert cli(*args, "create", "absent", "w").code == 3
    assert [r["consumer"] for r in cli.ok(*args, "ls", "-j").json] == ["w"]
    assert cli(*args, "rm", "w").code == 11
    cli.ok(*args, "rm", "w", "-y")
    assert cli.ok(*args, "ls", "s", "-j").json == []


def test_sub_prints_then_acks(cli: Cli, url: str) -> None:
    """A worker acks what it printed; --no-ack leaves it; without --consumer nothing stays behind."""
    fill(url, "s", 6)
    args = ["-u", url, "sub", "s", "--from", "start", "-o", "jsonl"]
    assert [r["sequence"] for r in cli.ok(*args, "--consumer", "w", "-n", "4").lines] == [1, 2, 3, 4]
    lag = cli.ok("-u", url, "consumer", "lag", "w", "-j").json
    assert (lag["pending"], lag["lag"]) == (0, 2)
    assert cli.ok(*args, "--consumer", "w", "--no-ack", "-n", "1").lines[0]["sequence"] == 5
    assert cli.ok("-u", url, "consumer", "lag", "w", "-j").json["pending"] == 1
    assert [r["sequence"] for r in cli.ok(*args, "-n", "2", "--where", "payload.n>2").lines] == [3, 4]
    assert [r["consumer"] for r in cli.ok("-u", url, "consumer", "ls", "-j").json] == ["w"]


# cursors and checkpoints


def test_cursors(cli: Cli, url: str) -> None:
    """Set, show, list with lag, refuse to go back, export, import, forget."""
    fill(url, "s", 10)
    args = ["-u", url, "cursor"]
    assert cli.ok(*args, "set", "s", "me", "5", "-j").json["sequence"] == 4
    assert cli(*args, "set", "s", "me", "start").code == 5
    cli.ok(*args, "set", "s", "me", "start", "--force")
    cli.ok(*args, "set", "s", "me", "+7")
    row = cli.ok(*args, "ls", "-j").json[0]
    assert (row["stream"], row["name"], row["sequence"], row["lag"], row["state"]) == ("s", "me", 7, 3, "ok")
    assert cli.ok("-u", url, "checkpoint", "ls", "s", "-j").json[0]["sequence"] == 7
    shown = cli.ok(*args, "show", "s", "me", "-j").json
    assert list(shown) == ["stream", "name", "sequence", "incarnation", "time_ns"]
    exported = cli.ok(*args, "export").raw
    assert msgspec.json.decode(exported) == shown
    cli.ok(*args, "rm", "s", "me", "-y")
    missing = cli(*args, "show", "s", "me")
    assert missing.code == 3
    cli.ok(*args, "import", stdin=exported)
    assert cli.ok(*args, "show", "s", "me", "-j").json["sequence"] == 7
    assert cli(*args, "import", stdin=b"nonsense").code == 10
    assert cli(*args, "rm", "s", "me", "--dry-run").code == 10
    assert cli(*args, "rm", "s", "other", "-y").code == 3


# dead letters


def dead(url: str, count: int) -> None:
    fill(url, "s", [message(envelope(n)) for n in range(1, count + 1)])

    async def body(broker: object) -> None:
        worker = await (await broker.open("s")).consumer("w")  # type: ignore[attr-defined]
        await worker.term(await worker.fetch(), reason="cannot be read\x1b[2J")

    with_broker(url, body)


def test_dead_letters_are_listed_and_shown_with_their_reason(cli: Cli, url: str) -> None:
    """Which streams have some, and why each died."""
    dead(url, 3)
    assert cli.ok("-u", url, "dlq", "ls", "-j").json == [{"stream": "s", "letters": 3, "first": 1, "last": 3}]
    rows = cli.ok("-u", url, "dlq", "show", "s", "-j").json
    assert [(r["sequence"], r["consumer"], r["attempts"]) for r in rows] == [
        ("1", "w", "1"),
        ("2", "w", "1"),
        ("3", "w", "1"),
    ]
    assert rows[0]["reason"] == "cannot be read [2J"
    full = cli.ok("-u", url, "dlq", "show", "s--dead", "--full", "-o", "jsonl", "-n", "1").lines[0]
    assert full["envelope"]["id"] == "id-3"
    assert ["Mist-Consumer", "w"] in full["headers"]


def test_retry_publishes_again_although_the_id_is_known(cli: Cli, url: str) -> None:
    """The stream still knows the id as a duplicate; a retried letter is stored all the same, and leaves the letters."""
    dead(url, 3)
    assert cli("-u", url, "dlq", "retry", "s", "--dry-run").code == 10
    assert cli("-u", url, "dlq", "retry", "s").code == 11
    cli.ok("-u", url, "dlq", "retry", "s", "--limit", "1")
    assert [decode(r.data).id for r in records(url, "s")] == ["id-1", "id-2", "id-3", "id-1"]
    assert all(not k.startswith("Mist-") for k, _ in records(url, "s")[3].headers)
    assert cli.ok("-u", url, "dlq", "retry", "s", "--to", "other", "-y", "-j").json["letters"] == 2
    assert [decode(r.data).id for r in records(url, "other")] == ["id-2", "id-3"]
    assert records(url, "s--dead") == []
    assert "no dead letters" in cli.ok("-u", url, "dlq", "retry", "s", "-y").err


def test_drop_and_export_dead_letters(cli: Cli, url: str, home: Path) -> None:
    """Oldest first, after asking; an export keeps the reasons."""
    dead(url, 3)
    assert cli("-u", url, "dlq", "drop", "s", "-y").code == 2
    assert cli("-u", url, "dlq", "drop", "s", "--all", "--dry-run").code == 10
    cli.ok("-u", url, "dlq", "drop", "s", "--limit", "2", "-y")
    cli.ok("-u", url, "dlq", "export", "s", "dead.jsonl")
    line = msgspec.json.decode((home / "dead.jsonl").read_bytes())
    assert line["envelope"]["id"] == "id-3"
    assert ["Mist-Sequence", "3"] in line["headers"]
    cli.ok("-u", url, "dlq", "drop", "s", "--all", "-y")
    assert records(url, "s--dead") == []
    fill(url, "fresh", 1)
    assert "has no dead letters" in cli("-u", url, "dlq", "show", "fresh").err
    assert cli("-u", url, "dlq", "show", "absent").code == 3
