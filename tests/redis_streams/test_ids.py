"""Sequence <-> entry id, and entries of any shape: properties over everything Redis can hold."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.broker.base import SEQUENCE_MAX, header
from mist.errors import Conflict
from mist.protocol.subject import check_subject
from mist_redis.entry import ENTRY, SHAPE, foreign_subject, record, records
from mist_redis.ids import MS_MAX, OWN_MAX, SMALL, NoSequence, runs, split, to_id, to_sequence

part = st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1), st.sampled_from((SMALL - 1, SMALL, OWN_MAX, MS_MAX)))
ids = st.builds(lambda ms, n: (ms, n), st.one_of(part, st.integers(1_600_000_000_000, 1_900_000_000_000)), part)


def text(id: tuple[int, int]) -> str:
    return f"{id[0]}-{id[1]}"


@given(ids, st.booleans())
def test_what_has_a_sequence_comes_back_as_the_same_id(id: tuple[int, int], own: bool) -> None:
    try:
        sequence = to_sequence(text(id), own=own)
    except NoSequence:
        return
    assert 0 <= sequence <= SEQUENCE_MAX
    assert to_id(sequence, own=own) == text(id)
    assert split(sequence, own=own) == id
    assert to_sequence(text(id).encode(), own=own) == sequence


@given(ids, ids, st.booleans())
def test_the_order_of_ids_is_the_order_of_sequences(a: tuple[int, int], b: tuple[int, int], own: bool) -> None:
    try:
        left, right = to_sequence(text(a), own=own), to_sequence(text(b), own=own)
    except NoSequence:
        return
    assert (left < right) == (a < b)
    assert (left == right) == (a == b)


@given(st.integers(0, OWN_MAX - 1))
def test_our_numbers_are_their_sequences(n: int) -> None:
    assert to_sequence(f"0-{n}", own=True) == n
    assert to_id(n, own=True) == f"0-{n}"


@given(st.integers(1_500_000_000_000, MS_MAX - 1), st.integers(0, SMALL - 1), st.integers(0, OWN_MAX - 1))
def test_the_servers_own_ids_come_after_ours(ms: int, n: int, ours: int) -> None:
    assert to_sequence(f"{ms}-{n}", own=True) > ours


@pytest.mark.parametrize(
    ("id", "own"),
    [
        (f"0-{OWN_MAX}", True), ("1-1", True), (f"{(OWN_MAX >> 20) - 1}-0", True), (f"0-{SMALL}", False),
        (f"{MS_MAX}-0", False), (f"{MS_MAX}-0", True), (f"1732000000000-{SMALL}", True), (f"{2**64 - 1}-{2**64 - 1}", False),
    ],
)  # fmt: skip
def test_what_cannot_be_mapped_is_refused(id: str, own: bool) -> None:
    with pytest.raises(Conflict, match=id):
        to_sequence(id, own=own)


@given(st.sets(st.integers(1, 60), max_size=30), st.booleans())
def test_runs_are_the_sequences(numbers: set[int], far: bool) -> None:
    base = (1_732_000_000_000 << 20) + SMALL - 30 if far else 0
    sequences = sorted(base + n for n in numbers)
    flat = runs(sequences, own=True)
    back = [
        to_sequence(f"{ms}-{n}", own=True)
        for ms, low, high in zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        for n in range(low, high + 1)
    ]
    assert back == sequences


fields = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from((b"subject", b"data", b"time", b"id", b"headers_json", b"__data__", b"payload")),
            st.binary(max_size=8),
        ),
        st.one_of(st.sampled_from((b"", b"12", b"[]", b'[["a","b"]]', b"a.b")), st.binary(max_size=12)),
    ),
    max_size=6,
)


@given(ids, fields, st.booleans())
def test_no_entry_stops_a_reader(id: tuple[int, int], pairs: list[tuple[bytes, bytes]], own: bool) -> None:
    """Whatever fields somebody wrote: a record with its bytes, or its fields as JSON, and its own id in a header."""
    flat = [x for pair in pairs for x in pair]
    entry = [text(id).encode(), flat]
    try:
        found = record(entry, own=own, subject="s")
    except NoSequence:
        return
    assert records([entry], own=own, subject="s") == [found]
    shape = header(found.headers, SHAPE)
    if not shape:
        return
    assert header(found.headers, ENTRY) == text(id)
    assert found.subject == "s"
    if shape == "fields":
        assert isinstance(msgspec.json.decode(found.data), dict)
    else:
        assert flat == [shape.encode(), found.data]


@given(st.text(min_size=1, max_size=80))
def test_every_name_gives_a_subject(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return
    check_subject(foreign_subject(name))
