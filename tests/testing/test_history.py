"""The history checker accepts sound histories and finds every kind of broken promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mist.testing import history as h
from mist.testing.history import AnyEvent, Checker, Verdict


def appended(lane: str, first: int, sequences: list[int], at: int, *, error: str = "") -> list[AnyEvent]:
    count = len(sequences) or 1
    return [
        h.Append(start_ns=at, lane=lane, first=first, count=count),
        h.Appended(
            start_ns=at, end_ns=at + 5, lane=lane, first=first, count=count, sequences=h.runs(sequences), error=error
        ),
    ]


def final(records: h.Seen, *, last: int, after: int = 0, reader: str = "end", at: int = 1000) -> h.Read:
    return h.Read(
        start_ns=at, end_ns=at + 1, reader=reader, after=after, scanned=last, last=last, records=records, final=True
    )


def verdict(*events: AnyEvent | list[AnyEvent], **options: Any) -> Verdict:
    checker = Checker(**options)
    for e in events:
        checker.add(e if isinstance(e, list) else [e])
    return checker.check()


SOUND = [*appended("a", 1, [1, 2], 10), *appended("a", 3, [4], 20)]
OTHER = appended("b", 1, [3], 12)
CONTENT: h.Seen = [(1, "a", 1, 2), (3, "b", 1, 1), (4, "a", 3, 1)]


def test_a_sound_history_is_accepted() -> None:
    """Nothing is wrong with appends of two lanes, read back where they were acked."""
    v = verdict(SOUND, OTHER, final(CONTENT, last=4), final(CONTENT, last=4, reader="again"))
    assert v.ok, v
    assert v.counts["acked"] == 4
    assert v.counts["records"] == 4


@pytest.mark.parametrize("error", ["ambiguous", None])
@pytest.mark.parametrize("stored", [True, False])
def test_an_unknown_fate_allows_both(error: str | None, stored: bool) -> None:
    """A killed or ambiguous append may be there or not."""
    call = appended("b", 1, [], 12, error=error or "")
    events = call if error else call[:1]
    content: h.Seen = [(1, "a", 1, 2), (3, "a", 3, 1), *([(4, "b", 1, 1)] if stored else [])]
    acks = [*appended("a", 1, [1, 2], 10), *appended("a", 3, [3], 20)]
    assert verdict(acks, events, final(content, last=3 + stored)).ok


ERASED = [h.Erase(start_ns=30, sequences=[(1, 2)]), h.Erased(start_ns=30, end_ns=40, sequences=[(1, 2)])]


@pytest.mark.parametrize("answered", [True, False])
def test_erased_records_may_be_missing(answered: bool) -> None:
    """They leave a hole in the numbers, of sequences and of a lane; one whose erasure had no answer may still be there."""
    left: h.Seen = [(3, "b", 1, 1), (4, "a", 3, 1)]
    asked = ERASED if answered else ERASED[:1]
    v = verdict(SOUND, OTHER, asked, final(left, last=4, after=2), final(left, last=4, after=2, reader="again"))
    assert v.ok, v
    middle = [h.Erase(start_ns=30, sequences=[(2, 1)])]
    for content in (CONTENT, [(1, "a", 1, 1), (3, "b", 1, 1), (4, "a", 3, 1)]):
        v = verdict(SOUND, OTHER, middle, final(content, last=4))
        assert v.ok, v


def broken(v: Verdict) -> set[str]:
    return set(v.totals)


CASES: dict[str, tuple[str, list[AnyEvent]]] = {
    "an acked record is gone": ("lost", [*SOUND, final([(1, "a", 1, 2)], last=2)]),
    "an acked record lies elsewhere": ("moved", [*SOUND, final([(1, "a", 1, 3)], last=3)]),
    "a message is stored twice": ("doubled", [*OTHER, *SOUND, final([*CONTENT, (5, "b", 1, 1)], last=5)]),
    "a sequence holds nothing": ("gap", [*SOUND, final([(1, "a", 1, 2), (4, "a", 3, 1)], last=4)]),
    "a refused message is stored": (
        "phantom",
        [*appended("a", 1, [], 10, error="storage_full"), final([(1, "a", 1, 1)], last=1)],
    ),
    "a message nobody sent is stored": ("phantom", [final([(1, "z", 7, 1)], last=1)]),
    "a payload is wrong": (
        "phantom",
        [
            *SOUND,
            *OTHER,
            final(CONTENT, last=4),
            h.Read(start_ns=50, end_ns=51, reader="r", after=0, scanned=1, last=4, records=[(1, "a", 1, 1)], bad=[1]),
        ],
    ),
    "a lane's messages change places": (
        "order",
        [
            h.Append(start_ns=10, lane="a", first=1, count=1),
            h.Append(start_ns=20, lane="a", first=2, count=1),
            final([(1, "a", 2, 1), (2, "a", 1, 1)], last=2),
        ],
    ),
    "a later message is stored without an earlier one": (
        "hole",
        [h.Append(start_ns=10, lane="a", first=1, count=3), final([(1, "a", 1, 1), (2, "a", 3, 1)], last=2)],
    ),
    "a reader saw something else": (
        "replay",
        [
            *SOUND,
            *OTHER,
            final(CONTENT, last=4),
            h.Read(start_ns=50, end_ns=51, reader="r", after=3, scanned=4, last=4, records=[(4, "b", 9, 1)]),
        ],
    ),
    "a reader saw a record that was taken back": (
        "replay",
        [
            *SOUND,
            *OTHER,
            final(CONTENT, last=4),
            h.Read(start_ns=50, end_ns=51, reader="r", after=4, scanned=5, last=5, records=[(5, "b", 2, 1)]),
        ],
    ),
    "two replays differ": (
        "replay",
        [*SOUND, *OTHER, final(CONTENT, last=4), final([(1, "a", 1, 2)], last=4, reader="two")],
    ),
    "a page skips a record": (
        "page",
        [
            *SOUND,
            *OTHER,
            final(CONTENT, last=4),
            h.Read(start_ns=50, end_ns=51, reader="r", after=1, scanned=4, last=4, records=[(3, "b", 1, 1)]),
        ],
    ),
    "a reader does not see what was acked": (
        "stale",
        [
            *SOUND,
            *OTHER,
            final(CONTENT, last=4),
            h.Read(start_ns=50, end_ns=51, reader="r", after=1, scanned=1, last=1),
        ],
    ),
    "a later append lands before an acked one": (
        "time",
        [*appended("a", 1, [2], 10), *appended("b", 1, [1], 30), final([(1, "b", 1, 1), (2, "a", 1, 1)], last=2)],
    ),
    "records were trimmed that nobody trimmed": (
        "lost",
        [*SOUND, *OTHER, h.Trim(start_ns=30, before=2), final(CONTENT[1:], after=2, last=4)],
    ),
    "an erased record comes back": ("back", [*SOUND, *OTHER, *ERASED, final(CONTENT, last=4)]),
    "another record than the erased one is gone": (
        "lost",
        [*SOUND, *OTHER, h.Erase(start_ns=30, sequences=[(2, 1)]), final([(1, "a", 1, 2), (4, "a", 3, 1)], last=4)],
    ),
    "nobody read at the end": ("unread", [*SOUND]),
    "a checkpoint goes back": (
        "checkpoint",
        [
            h.Save(start_ns=1, name="c", sequence=5),
            h.Saved(start_ns=1, end_ns=2, name="c", sequence=5),
            h.Save(start_ns=3, name="c", sequence=4),
            h.Loaded(start_ns=5, end_ns=6, name="c", sequence=4),
        ],
    ),
    "a lower checkpoint is accepted": (
        "checkpoint",
        [
            h.Loaded(start_ns=1, end_ns=2, name="c", sequence=-1),
            h.Save(start_ns=3, name="c", sequence=5),
            h.Saved(start_ns=3, end_ns=4, name="c", sequence=5),
            h.Save(start_ns=5, name="c", sequence=4),
            h.Saved(start_ns=5, end_ns=6, name="c", sequence=4),
        ],
    ),
    "a checkpoint is lost": (
        "checkpoint",
        [
            h.Save(start_ns=1, name="c", sequence=5),
            h.Saved(start_ns=1, end_ns=2, name="c", sequence=5),
            h.Loaded(start_ns=3, end_ns=4, name="c", sequence=-1),
        ],
    ),
    "a checkpoint nobody saved": ("checkpoint", [h.Loaded(start_ns=1, end_ns=2, name="c", sequence=7)]),
    "a checkpoint cannot be read": ("checkpoint", [h.Loaded(start_ns=1, end_ns=2, name="c", error="unavailable")]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_promise_of_the_stream_is_found(case: str) -> None:
    """Each kind of violation of the stream's and the checkpoints' promises is named."""
    promise, events = CASES[case]
    assert promise in broken(verdict(events)), case


CONSUMING = h.Consuming(
    start_ns=0, consumer="c", after=0, ack_wait_s=0.002_001, attempts_max=2
)  # 1,000 ns more than deadlines are rounded by
TWO = [*appended("a", 1, [1, 2], 10), final([(1, "a", 1, 2)], last=2, at=20_000)]


def fetched(at: int, *deliveries: tuple[int, int, int]) -> h.Fetched:
    return h.Fetched(start_ns=at, end_ns=at + 10, consumer="c", deliveries=list(deliveries))


def settled(at: int, how: str, *sequences: int, count: int | None = None) -> list[AnyEvent]:
    got = len(sequences) if count is None else count
    of = h.runs(sequences)
    return [
        h.Settle(start_ns=at, consumer="c", how=how, sequences=of),
        h.Settled(start_ns=at, end_ns=at + 5, consumer="c", how=how, sequences=of, count=got),
    ]


def looked(at: int, floor: int, *, final: bool = False, pending: int = 0, lag: int = 0) -> h.Looked:
    return h.Looked(
        start_ns=at, end_ns=at + 1, consumer="c", floor=floor, delivered=2, pending=pending, lag=lag, final=final
    )


def test_a_sound_consumer_is_accepted() -> None:
    """Redelivery after the ack wait, a nak, a dead letter and final acks are all as promised."""
    v = verdict(
        CONSUMING, TWO, fetched(100, (1, 2, 1)), settled(120, "ack", 1), settled(130, "nak", 2), fetched(150, (2, 1, 2)),
        looked(160, 1), h.Buried(start_ns=5000, consumer="c", sequence=2, attempts=2, reason="attempts used up"),
        looked(6000, 2, final=True),
    )  # fmt: skip
    assert v.ok, v


WORK: dict[str, tuple[str, list[AnyEvent]]] = {
    "the floor passes an unacked record": (
        "floor",
        [fetched(100, (1, 2, 1)), *settled(120, "ack", 2), looked(200, 2)],
    ),
    "delivered again after its ack": (
        "final",
        [fetched(100, (1, 2, 1)), *settled(120, "ack", 1, 2), fetched(5000, (1, 1, 2))],
    ),
    "two holders at once": ("exclusive", [fetched(100, (1, 1, 1)), fetched(300, (1, 1, 2))]),
    "the attempt does not rise": ("attempt", [fetched(100, (1, 1, 1)), fetched(5000, (1, 1, 1))]),
    "more attempts than allowed": ("attempt", [fetched(100, (1, 1, 3))]),
    "a record is never delivered": (
        "missed",
        [fetched(100, (1, 1, 1)), *settled(120, "ack", 1), looked(200, 2, final=True)],
    ),
    "work is left at the end": ("missed", [fetched(100, (1, 2, 1)), looked(200, 0, final=True, pending=2, lag=2)]),
    "a dead letter comes twice": (
        "buried",
        [h.Buried(start_ns=1, consumer="c", sequence=1, attempts=2, reason="x")] * 2,
    ),
    "a dead letter has no reason": ("buried", [h.Buried(start_ns=1, consumer="c", sequence=1, attempts=2)]),
    "a dead letter comes too early": (
        "buried",
        [h.Buried(start_ns=1, consumer="c", sequence=1, attempts=1, reason="x")],
    ),
    "an acked record becomes a dead letter": (
        "buried",
        [
            fetched(100, (1, 1, 1)),
            *settled(120, "ack", 1),
            h.Buried(start_ns=1, consumer="c", sequence=1, attempts=2, reason="x"),
        ],
    ),
    "a termed record is no dead letter": ("buried", [fetched(100, (1, 1, 1)), *settled(120, "term", 1)]),
    "a record that is not in the stream": ("phantom", [fetched(100, (3, 1, 1))]),
}


@pytest.mark.parametrize("case", WORK)
def test_a_broken_promise_to_consumers_is_found(case: str) -> None:
    """Each kind of violation of the consumer's promises is named."""
    promise, events = WORK[case]
    assert promise in broken(verdict([CONSUMING], TWO, events)), case


def judged(events: list[AnyEvent], **options: bool) -> set[str]:
    checker = h.Checker(**options)
    checker.add([CONSUMING, *TWO, *events])
    return broken(checker.check())


def test_across_a_network_calls_may_time_out() -> None:
    """Reads, fetches, loads and saves; what timed out may be stored. An append that timed out is still `ambiguous` only."""
    events: list[AnyEvent] = [
        h.Read(start_ns=1, end_ns=2, reader="r", after=0, error="timeout"),
        h.Fetched(start_ns=1, end_ns=2, consumer="c", error="timeout"),
        h.Save(start_ns=3, name="c", sequence=5),
        h.Saved(start_ns=3, end_ns=4, name="c", sequence=5, error="timeout"),
        h.Loaded(start_ns=5, end_ns=6, name="c", error="unavailable"),
        h.Loaded(start_ns=7, end_ns=8, name="c", sequence=5),
    ]
    assert judged(events, remote=True) == set()
    assert judged(events) == {"page", "missed", "checkpoint"}
    late = h.Read(start_ns=60, end_ns=70, reader="r", after=0, scanned=1, last=1, records=[(1, "a", 1, 1)])
    empty = h.Read(start_ns=60, end_ns=70, reader="r", after=1, scanned=1, last=1)
    assert judged([late]) == {"stale"}
    assert judged([late], remote=True) == set()
    assert judged([empty], remote=True) == {"stale"}
    stored = [*appended("b", 1, [], 30, error="timeout"), final([(1, "a", 1, 2), (3, "b", 1, 1)], last=3, at=20_000)]
    assert "phantom" in judged(stored, remote=True)


def test_a_message_may_be_stored_by_the_first_call_that_held_it() -> None:
    """A call of unknown fate, repeated and then asked for in smaller calls: its second message is as old as the first."""
    events: list[AnyEvent] = [
        h.Append(start_ns=10, lane="a", first=1, count=2),
        h.Appended(start_ns=10, end_ns=15, lane="a", first=1, count=2, error="ambiguous"),
        *appended("a", 1, [], 20, error="unavailable"),
        *appended("a", 1, [1], 30),
        *appended("b", 1, [3], 40),
        *appended("a", 2, [2], 50),
        final([(1, "a", 1, 2), (3, "b", 1, 1)], last=3),
    ]
    assert verdict(events).ok
    late = [*appended("a", 1, [1], 10), *appended("b", 1, [3], 40), *appended("a", 2, [2], 50), events[-1]]
    assert broken(verdict(late)) == {"time"}


def test_a_server_that_forgets_may_deliver_again_and_nothing_else() -> None:
    """Acks and attempts of its last moments; a record that was never delivered is still missed."""
    again = [fetched(100, (1, 2, 1)), *settled(120, "ack", 1, 2), fetched(150, (1, 1, 1))]
    assert judged(again, forgets=True) == set()
    assert judged(again) == {"final", "attempt"}
    assert judged([looked(200, 2, final=True)], forgets=True) == {"floor", "missed"}


def test_a_torn_last_line_is_left_out_and_cut_when_recording_goes_on(tmp_path: Path) -> None:
    """A process killed inside its own record loses that line only, and its next life goes on behind the last whole one."""
    path = tmp_path / "p.jsonl"
    recorder = h.Recorder(path)
    for e in SOUND:
        recorder.write(e)
    recorder.close()
    with path.open("ab") as f:
        f.write(b'{"op":"append","start')
    assert h.load(path) == SOUND
    recorder = h.Recorder(path)
    recorder.write(OTHER[0])
    recorder.close()
    recorder.close()
    assert h.load(path) == [*SOUND, OTHER[0]]


def test_a_bad_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    """Only the last line can be torn; anything else means that the history is no evidence."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"op":"append"\n{"op":"trim","start_ns":1,"before":2}\n')
    with pytest.raises(Exception, match=r"truncated|malformed"):
        h.load(path)


def test_an_answer_without_a_call_is_refused() -> None:
    """A history that holds an answer to nothing was recorded wrongly and is not judged."""
    with pytest.raises(ValueError, match="without a call"):
        verdict(SOUND[1:2])


def test_runs_and_spread_are_inverse() -> None:
    """Sequences survive being written as runs."""
    for sequences in ([], [5], [1, 2, 3, 7, 9, 10], [4, 3, 2]):
        assert h.spread(h.runs(sequences)) == sequences


def test_the_verdict_says_how_many_and_shows_the_first() -> None:
    """A verdict names the kinds, their numbers and examples, without printing thousands of lines."""
    v = verdict(appended("a", 1, list(range(1, 101)), 10), final([], last=0))
    assert v.totals["lost"] == 100
    assert len([p for p in v.problems if p.promise == "lost"]) == 5
    assert "lost: a 1, acked at 1, is not there" in str(v)
