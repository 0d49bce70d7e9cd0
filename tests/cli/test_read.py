"""tail, get and count: what is shown, in which format, from where to where."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cli.conftest import Cli, envelope, fill, message, with_broker
from mist.broker.base import Broker, Message, StreamConfig
from mist.client.blobs import beside
from mist.client.client import Client
from mist.protocol.codec import encode, encode_msgpack


def sequences(result: object) -> list[int]:
    return [line["sequence"] for line in result.lines]  # type: ignore[attr-defined]


def test_tail_shows_the_last_ten(cli: Cli, url: str) -> None:
    """Without anything else these are the last ten records, oldest first."""
    fill(url, "s", 15)
    result = cli.ok("-u", url, "tail", "s", "-o", "jsonl")
    assert sequences(result) == list(range(6, 16))


def test_the_json_line_is_exactly_the_documented_one(cli: Cli, url: str) -> None:
    """{"sequence","subject","timestamp_ns","envelope"}, and the envelope's bytes are those that were published."""
    data = b'{"version":"1","id":"x","source":"s","type":"a.b","timestamp_ns":5,"extra":[1, 2],"payload":{"z":1.0,"a":"\\u00e9"}}'
    fill(url, "s", [Message("a.b", data, "x")])
    result = cli.ok("-u", url, "tail", "s", "-o", "jsonl")
    line = result.lines[0]
    assert list(line) == ["sequence", "subject", "timestamp_ns", "envelope"]
    assert (line["sequence"], line["subject"]) == (1, "a.b")
    assert isinstance(line["timestamp_ns"], int)
    assert b'"envelope":' + data + b"}" in result.raw
    assert cli.ok("-u", url, "get", "s", "1", "-o", "jsonl").raw == result.raw


def test_json_is_one_document_and_empty_is_an_empty_list(cli: Cli, url: str) -> None:
    """--format json prints an array, whatever its length."""
    fill(url, "s", 3)
    assert [r["sequence"] for r in cli.ok("-u", url, "tail", "s", "-j").json] == [1, 2, 3]
    assert cli.ok("-u", url, "tail", "s", "-j", "--type", "none").json == []


def test_foreign_data_is_shown_not_dropped(cli: Cli, url: str) -> None:
    """Text, bytes, and an envelope with a wrong checksum each appear as data, the last one with its error."""
    bad = encode(envelope(1)).replace(b'"payload"', b'"checksum":7,"payload"')
    fill(
        url, "s", [Message("a", b"plain"), Message("b", b"\xff\xfe"), Message("c", bad), Message("d", b'{"a":1}', "i")]
    )
    lines = cli.ok("-u", url, "tail", "s", "-o", "jsonl").lines
    assert (lines[0]["data"], lines[0]["encoding"]) == ("plain", "utf-8")
    assert (lines[1]["data"], lines[1]["encoding"]) == ("//4=", "base64")
    assert lines[2]["error"]["code"] == "checksum_mismatch"
    assert (lines[3]["data"], lines[3]["id"]) == ('{"a":1}', "i")
    assert "error" not in lines[3]


def test_msgpack_records_are_decoded(cli: Cli, url: str) -> None:
    """A record with the msgpack content type shows the envelope it holds."""
    env = envelope(1)
    fill(url, "s", [Message("a", encode_msgpack(env), env.id, (("Content-Type", "application/msgpack"),))])
    line = cli.ok("-u", url, "tail", "s", "-o", "jsonl").lines[0]
    assert line["envelope"]["payload"] == {"n": 1, "attrs": {"latency_ms": 10, "model": "m1"}}
    assert line["headers"] == [["Content-Type", "application/msgpack"]]


def test_control_characters_never_reach_a_table(cli: Cli, url: str) -> None:
    """An escape sequence in data is shown, not sent, in tables; raw gives the bytes."""
    fill(url, "s", [Message("a", b"\x1b]0;owned\x07\xe2\x80\xae")])
    result = cli.ok("-u", url, "tail", "s")
    assert "\x1b" not in result.out
    assert "\\x1b]0;owned\\x07\\u202e" in result.out
    assert cli.ok("-u", url, "tail", "s", "-o", "raw").raw == b"\x1b]0;owned\x07\xe2\x80\xae\n"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--from", "start"], range(1, 21)),
        (["--from", "18"], [18, 19, 20]),
        (["--from", "+18"], [19, 20]),
        (["--from", "-2"], [19, 20]),
        (["--from", "end"], []),
        (["--from", "5", "--to", "7"], [5, 6, 7]),
        (["--from", "start", "-n", "3"], [1, 2, 3]),
        (["--to", "4", "-n", "2"], [3, 4]),
        (["-n", "2"], [19, 20]),
        (["-n", "0"], []),
        (["--to", "-19", "--from", "start"], [1, 2]),
        (["--to", "+2", "--from", "start"], [1, 2, 3]),
        (["--to", "start", "--from", "start"], [1]),
        (["--since", "1h", "-n", "2"], [1, 2]),
        (["--until", "1h"], []),
        (["--from", "@2001-01-01", "--to", "2"], [1, 2]),
    ],
)
def test_ranges(cli: Cli, url: str, args: list[str], expected: list[int]) -> None:
    """--from starts with the record, --to ends with it, -n alone is the last n, with a start the first n."""
    fill(url, "s", 20)
    assert sequences(cli.ok("-u", url, "tail", "s", "-o", "jsonl", *args)) == list(expected)


def test_a_position_beyond_the_end_or_trimmed_away_is_told(cli: Cli, url: str) -> None:
    """Nothing is skipped silently: beyond the end is usage, below the first kept record is not found."""
    fill(url, "s", 10)

    async def trim(broker: object) -> None:
        await (await broker.open("s")).trim(before=5)  # type: ignore[attr-defined]

    with_broker(url, trim)
    assert cli("-u", url, "tail", "s", "--from", "99").code == 2
    gone = cli("-u", url, "tail", "s", "--from", "2")
    assert gone.code == 3
    assert "the first kept one is 5" in gone.err
    assert sequences(cli.ok("-u", url, "tail", "s", "--from", "start", "-o", "jsonl")) == list(range(5, 11))
    assert sequences(cli.ok("-u", url, "tail", "s", "-n", "99", "-o", "jsonl")) == list(range(5, 11))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--type", "eval.result"], [3, 6, 9]),
        (["--subject", "eval.*"], [3, 6, 9]),
        (["--subject", "eval.>", "--invert"], [1, 2, 4, 5, 7, 8, 10]),
        (["--source", "other"], [10]),
        (["--id", "id-4"], [4]),
        (["--grep", '"n":[12]}'], [1, 2]),
        (["--where", "payload.n>7 and type=trace.span"], [8, 10]),
        (["--where", "payload.n>7", "--invert", "-n", "2"], [6, 7]),
        (["--trace-id", "0af7651916cd43dd8448eb211c80319c"], [10]),
        (["--type", "eval.result", "-n", "1"], [9]),
        (["--type", "eval.result", "--from", "start", "-n", "2"], [3, 6]),
    ],
)
def test_filters(cli: Cli, url: str, args: list[str], expected: list[int]) -> None:
    """Filters select records; -n counts the ones that match."""
    messages = [message(envelope(n, "eval.result" if n % 3 == 0 else "trace.span")) for n in range(1, 10)]
    last = envelope(10, source="other", traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    fill(url, "s", [*messages, message(last)])
    args = args if "-n" in args else [*args, "-n", "100"]
    assert sequences(cli.ok("-u", url, "tail", "s", "-o", "jsonl", *args)) == expected


def test_a_late_match_is_found_far_back(cli: Cli, url: str) -> None:
    """The last match is found although thousands of records came after it."""
    fill(url, "s", [message(envelope(1, "rare.one"))])
    fill(url, "s", [message(envelope(n)) for n in range(2, 4000)])
    assert sequences(cli.ok("-u", url, "tail", "s", "-n", "1", "--type", "rare.one", "-o", "jsonl")) == [1]
    assert sequences(cli.ok("-u", url, "tail", "s", "-n", "1", "--subject", "rare.*", "-o", "jsonl")) == [1]


def test_select_gives_exactly_these_fields_in_every_format(cli: Cli, url: str) -> None:
    """--select chooses and orders fields; what is not there is null."""
    fill(url, "s", 2)
    args = ["-u", url, "tail", "s", "--select", "sequence,payload.attrs.model,payload.no"]
    assert cli.ok(*args, "-o", "jsonl").lines[0] == {"sequence": 1, "payload.attrs.model": "m1", "payload.no": None}
    assert cli.ok(*args, "-o", "csv").out == "sequence,payload.attrs.model,payload.no\n1,m1,\n2,m0,\n"
    assert cli.ok(*args).out == "1  m1  -\n2  m0  -\n"
    assert cli("-u", url, "tail", "s", "--select", " , ").code == 2


def test_an_empty_answer_explains_itself(cli: Cli, url: str) -> None:
    """Nothing on stdout, a sentence on stderr: no such stream, an empty one, no match."""
    fill(url, "spans", 3)
    fill(url, "empty", [])
    missing = cli("-u", url, "tail", "span")
    assert missing.code == 3
    assert "2 streams there: empty, spans" in missing.err
    assert "did you mean spans?" in missing.err
    assert "is empty" in cli.ok("-u", url, "tail", "empty").err
    nothing = cli.ok("-u", url, "tail", "spans", "--type", "none")
    assert nothing.out == ""
    assert "matches (it holds 1 to 3)" in nothing.err
    assert cli.ok("-u", url, "tail", "spans", "--type", "none", "-q").err == ""


def test_a_stream_url_names_broker_and_stream(cli: Cli, url: str) -> None:
    """URL?stream=NAME works wherever a stream's name does; without a stream it says what to add."""
    fill(url, "s", 1)
    separator = "&" if "?" in url else "?"
    assert sequences(cli.ok("tail", f"{url}{separator}stream=s", "-o", "jsonl")) == [1]
    assert f"{separator}stream=NAME" in cli("tail", url).err


def test_save_cursor_and_go_on(cli: Cli, url: str) -> None:
    """A named cursor remembers how far the reader got, and going back is refused."""
    fill(url, "s", 10)
    assert sequences(
        cli.ok("-u", url, "tail", "s", "--from", "start", "-n", "4", "--save-cursor", "me", "-o", "jsonl")
    ) == [1, 2, 3, 4]
    args = ["-u", url, "tail", "s", "--from", "cursor:me", "--save-cursor", "me", "-o", "jsonl"]
    assert sequences(cli.ok(*args)) == [5, 6, 7, 8, 9, 10]
    assert sequences(cli.ok(*args)) == []
    assert sequences(cli.ok("-u", url, "tail", "s", "--from", "start", "--to", "cursor:me", "-o", "jsonl")) == list(
        range(1, 11)
    )
    back = cli("-u", url, "tail", "s", "--from", "start", "-n", "1", "--save-cursor", "me")
    assert back.code == 5
    assert cli("-u", url, "tail", "s", "--from", "cursor:none").code == 3


def test_a_cursor_of_another_incarnation_is_refused(cli: Cli, url: str) -> None:
    """Deleting and making a stream again never lets an old position look valid."""
    fill(url, "s", 3)
    lines = cli.ok("-u", url, "cursor", "set", "s", "me", "+2", "-j")
    assert lines.json["sequence"] == 2
    exported = cli.ok("-u", url, "cursor", "export").raw
    cli.ok("-u", url, "stream", "rm", "s", "-y")
    fill(url, "s", 3)
    assert cli("-u", url, "cursor", "import", stdin=exported).code == 5


def test_follow_with_json_document_is_refused(cli: Cli, url: str) -> None:
    """An array that never ends is no JSON: the hint names jsonl."""
    fill(url, "s", 1)
    result = cli("-u", url, "tail", "s", "-f", "-j")
    assert result.code == 2
    assert "jsonl" in result.err


def test_get_one_record(cli: Cli, url: str) -> None:
    """By sequence, first, last and id; raw gives the bytes and nothing else."""
    fill(url, "s", 5)
    assert cli.ok("-u", url, "get", "s", "first", "-o", "jsonl").lines[0]["sequence"] == 1
    assert cli.ok("-u", url, "get", "s", "last", "-j").json["sequence"] == 5
    assert cli.ok("-u", url, "get", "s", "--id", "id-3", "-j").json["sequence"] == 3
    assert cli.ok("-u", url, "get", "s", "2", "-o", "raw").raw == encode(envelope(2))
    assert cli.ok("-u", url, "get", "s", "2", "--select", "payload.n", "-j").json == {"payload.n": 2}
    table = cli.ok("-u", url, "get", "s", "2").out
    assert "type       trace.span" in table
    assert '  "n": 2' in table


@pytest.mark.parametrize(
    ("args", "code"),
    [(["6"], 3), (["0"], 3), (["x"], 2), (["--id", "nope"], 3), ([], 2), (["1", "--id", "a"], 2), (["-5"], 2)],
)
def test_get_refuses(cli: Cli, url: str, args: list[str], code: int) -> None:
    """A record that is not there is 3, a question that cannot be right is 2."""
    fill(url, "s", 5)
    assert cli("-u", url, "get", "s", *args).code == code


def test_count(cli: Cli, url: str) -> None:
    """In all, in a range, filtered, by key."""
    fill(url, "s", [message(envelope(n, "eval.result" if n % 3 == 0 else "trace.span")) for n in range(1, 10)])
    assert cli.ok("-u", url, "count", "s").out == "9\n"
    assert cli.ok("-u", url, "count", "s", "-j").json == {"stream": "s", "count": 9}
    assert cli.ok("-u", url, "count", "s", "--from", "4", "--to", "6").out == "3\n"
    assert cli.ok("-u", url, "count", "s", "--type", "eval.result").out == "3\n"
    assert cli.ok("-u", url, "count", "s", "--by", "type", "-j").json == [
        {"type": "trace.span", "count": 6},
        {"type": "eval.result", "count": 3},
    ]
    assert cli.ok("-u", url, "count", "s", "--by", "hour", "-o", "csv").out.splitlines()[1].endswith(",9")


def test_sequences_above_two_to_the_53_are_strings(cli: Cli, tmp_path: Path) -> None:
    """A sequence that a double cannot hold is a string in JSON, in every command that prints one."""
    from mist.broker.base import Record
    from mist.cli.records import View, document
    from mist.cli.render import seq

    big = 2**53 + 1
    line = msgspec.json.decode(document(View(Record(big, "a", encode(envelope(1)), 1, "id-1"))))
    assert line["sequence"] == str(big)
    assert (seq(2**53), seq(big)) == (2**53, str(big))


def test_a_limited_stream_still_counts_right(cli: Cli, url: str) -> None:
    """Retention removes from the front; what is shown and counted is what is kept."""
    fill(url, "s", [], config=StreamConfig(records_max=5))
    fill(url, "s", 12)
    info = cli.ok("-u", url, "stream", "info", "s", "-j").json
    kept = info["records"]
    assert cli.ok("-u", url, "count", "s").out == f"{kept}\n"
    assert len(cli.ok("-u", url, "tail", "s", "-n", "100", "-o", "jsonl").lines) == kept


def test_get_and_sweep_payloads_beside_the_stream(cli: Cli, log: str, tmp_path: Path) -> None:
    """`get` shows the whole payload of a log, the reference with a warning where it is gone; `sweep` takes what nobody names."""

    async def body(broker: Broker) -> None:
        store = beside(broker)
        assert store is not None
        async with Client(broker, source="t", blobs=store) as client:
            await client.publish("s", client.envelope("a.b", "x" * 1_100_000))
            await client.publish("s", client.envelope("a.b", "small"))

    with_broker(log, body)
    assert cli.ok("-u", log, "get", "s", "1", "-j").json["envelope"]["payload"] == "x" * 1_100_000
    assert cli.ok("-u", log, "stream", "sweep", "--grace", "0s", "-j").json["removed"] == 0
    cli.ok("-u", log, "stream", "purge", "s", "--before", "2", "-y")
    assert cli.ok("-u", log, "stream", "sweep", "-j").json["young"] == 1
    assert cli.ok("-u", log, "stream", "sweep", "--grace", "0s", "-j").json["removed"] == 1
    with_broker(log, body)
    for path in (Path(log.removeprefix("log:")) / "blobs").rglob("*"):
        if path.is_file() and path.name != "lock":
            path.unlink()
    gone = cli("-u", log, "get", "s", "3", "-j")
    assert gone.code == 9
    assert list(gone.json["envelope"]["payload"]) == ["$ref", "size"]
    assert "incomplete" in gone.err or "no payload" in gone.err
    assert cli("-u", "memory:sweep", "stream", "sweep").code == 2
