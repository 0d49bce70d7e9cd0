"""The position grammar: every form, every refusal, and what each means on dense and sparse streams."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.conftest import fill, with_broker
from mist.broker.base import Message
from mist.cli.position import (
    Position,
    after_of,
    last_of,
    nth_last,
    parse_position,
    parse_time,
    since_position,
)
from mist.errors import InvalidArgument

NOW = 1_800_000_000_000_000_000
HOUR = 3_600_000_000_000


def ns(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=UTC).timestamp()) * 1_000_000_000  # type: ignore[misc,arg-type]


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("start", Position("start")),
        ("end", Position("end")),
        ("1", Position("at", 1)),
        ("007", Position("at", 7)),
        ("+0", Position("after", 0)),
        ("+41", Position("after", 41)),
        ("-3", Position("last", 3)),
        ("-0", Position("last", 0)),
        (str(2**63 - 1), Position("at", 2**63 - 1)),
        ("@2026-01-31", Position("time", ns(2026, 1, 31))),
        ("@2026-01-31T12:30:00Z", Position("time", ns(2026, 1, 31, 12, 30))),
        ("@2026-01-31T12:30", Position("time", ns(2026, 1, 31, 12, 30))),
        ("@2026-01-31T12:30:00+02:00", Position("time", ns(2026, 1, 31, 10, 30))),
        ("@2026-01-31t12:30:00.000000001z", Position("time", ns(2026, 1, 31, 12, 30) + 1)),
        ("@2026-01-31T12:30:00.25Z", Position("time", ns(2026, 1, 31, 12, 30) + 250_000_000)),
        ("@-1h", Position("time", NOW - HOUR)),
        ("@-1h30m", Position("time", NOW - HOUR * 3 // 2)),
        ("@-0s", Position("time", NOW)),
        ("@1960-01-01", Position("time", 0)),
        ("cursor:me", Position("cursor", 0, "me")),
    ],
)
def test_every_form(text: str, position: Position) -> None:
    """Each form of the grammar gives its position."""
    assert parse_position(text, now_ns=NOW) == position


@pytest.mark.parametrize(
    "text",
    [
        "", "0", "x", "1.5", "--3", "+-3", "+", "-", "1e3", "١", str(2**63), "9" * 40, "@", "@now", "@-", "@-1", "@-1y",
        "@2026-13-01", "@2026-01-31T25:00", "@12:00", "cursor:", "cursor:a b", "cursor:../x", "Start", " 1", "1 ", "1\n", "@2026-01-31\n",
    ],
)  # fmt: skip
def test_everything_else_is_refused_with_the_grammar(text: str) -> None:
    """What is no position raises InvalidArgument, never something else, never a guess."""
    with pytest.raises(InvalidArgument):
        parse_position(text, now_ns=NOW)


@given(st.one_of(st.text(max_size=40), st.from_regex(r"[+@:-]?[0-9a-zT.Z:+-]{0,30}", fullmatch=True)))
def test_any_text_parses_or_is_refused(text: str) -> None:
    """No input makes the parser raise anything but InvalidArgument."""
    try:
        position = parse_position(text, now_ns=NOW)
    except InvalidArgument:
        return
    assert position.number >= 0


@given(st.integers(1, 2**63 - 1))
def test_numbers_round_trip(number: int) -> None:
    """A printed sequence is read back as itself."""
    assert parse_position(str(number), now_ns=NOW) == Position("at", number)
    assert parse_position(f"+{number}", now_ns=NOW) == Position("after", number)


def test_ages_and_since() -> None:
    """Ages add up; --since takes an age, a time, and either with an @."""
    for text, ns_ago in (("1w2d3h4m5s6ms", ((9 * 24 + 3) * 3600 + 245) * 10**9 + 6_000_000), ("1.5h", HOUR * 3 // 2)):
        assert since_position(text, now_ns=NOW) == Position("time", NOW - ns_ago)
    for text in ("1h", "@-1h", "-1h"):
        assert since_position(text, now_ns=NOW) == Position("time", NOW - HOUR)
    assert since_position("2026-01-31", now_ns=NOW) == Position("time", ns(2026, 1, 31))
    for text in ("", "1", "h", "1h 2m", "tomorrow"):
        with pytest.raises(InvalidArgument):
            since_position(text, now_ns=NOW)


def test_time_of_microseconds_is_not_rounded() -> None:
    """Nine digits of a second survive exactly; a float would lose them."""
    assert parse_time("2026-01-31T12:30:00.123456789Z", NOW) % 1_000_000_000 == 123_456_789


def test_positions_on_a_stream(url: str) -> None:
    """What --from and --to mean, record by record, on a stream whose first records are trimmed."""
    fill(url, "s", [Message("a", b"%d" % n) for n in range(1, 11)])

    async def body(broker: object) -> None:
        stream = await broker.open("s")  # type: ignore[attr-defined]
        await stream.trim(before=4)
        info = await stream.info()
        page = await stream.read(after=3, limit=100)
        middle = page.records[3].timestamp_ns
        at = await stream.locate(middle)
        table = [
            ("start", 3, 4), ("end", 10, 10), ("5", 4, 5), ("+5", 5, 6), ("-2", 8, 9), ("-99", 3, 4),
            ("@-1h", 3, 3), ("@2999-01-01", 10, 10),
        ]  # fmt: skip
        for text, after, last in table:
            position = parse_position(text, now_ns=page.records[0].timestamp_ns)
            assert await after_of(position, stream, None, info) == after, text
            assert await last_of(position, stream, None, info) == last, text
        assert await after_of(Position("time", middle), stream, None, info) == at - 1

    with_broker(url, body)


def test_the_last_n_of_a_stream_with_gaps(tmp_path: object) -> None:
    """Where sequences have gaps (blank lines of a file) the last N records are counted, not computed."""
    from conftest import run

    from mist.cli.filestream import FileStream
    from mist.protocol.url import Url

    path = tmp_path / "x.jsonl"  # type: ignore[operator]
    path.write_text("".join(f"line {n}\n" if n % 5 == 0 else "\n" for n in range(1, 2001)))

    async def body() -> None:
        stream = FileStream(Url("file", str(path)))
        info = await stream.info()
        assert (info.records, info.last) == (400, 2000)
        for count in (1, 3, 399, 400, 401):
            after = await nth_last(stream, count, info)
            page = await stream.read(after=after, limit=1000)
            assert len(page.records) == min(count, 400)
        stream.close()

    run(body())
