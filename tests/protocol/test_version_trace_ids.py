"""Versions, trace context and ids: the small values of the protocol."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mist.errors import InvalidArgument, VersionUnsupported
from mist.protocol.ids import new_id
from mist.protocol.tracecontext import TraceContext, new_trace, parse_traceparent
from mist.protocol.version import check_version, negotiate


@pytest.mark.parametrize("version", ["1", " 1 ", "+1", "01", "\t1\n"])
def test_these_are_version_one(version: str) -> None:
    """Integers after trimming, as the seed reads them."""
    check_version(version)


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("0", "too old"), ("-1", "too old"), ("2", "too new"), ("999", "too new"), ("abc", "invalid"), ("", "invalid"),
        ("1.0", "invalid"), ("1 1", "invalid"), ("1_0", "invalid"), ("١", "invalid"), ("--1", "invalid"), ("+", "invalid"),
        ("9" * 5000, "invalid"), ("9" * 4000, "too new"),
    ],
)  # fmt: skip
def test_other_versions_are_refused_with_the_seeds_reason(version: str, why: str) -> None:
    """Too old, too new or no number; the message stays short whatever came."""
    with pytest.raises(VersionUnsupported, match=why) as caught:
        check_version(version)
    assert len(str(caught.value)) < 150


ranges = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted)


@settings(max_examples=300, deadline=None)
@given(ranges, ranges, st.booleans())
def test_negotiation_finds_the_highest_common_version(a: list[int], b: list[int], short: bool) -> None:
    """Against the sets that the ranges stand for; a range of one may be written as one number."""

    def form(r: list[int]) -> str:
        return str(r[0]) if short and r[0] == r[1] else f"{r[0]}-{r[1]}"

    common = set(range(a[0], a[1] + 1)) & set(range(b[0], b[1] + 1))
    if common:
        assert negotiate(form(a), form(b)) == str(max(common))
    else:
        with pytest.raises(VersionUnsupported):
            negotiate(form(a), form(b))


@pytest.mark.parametrize("bad", ["", "x", "1-", "-1", "1-2-3", "3-1", "1.5", "1-x"])
def test_a_bad_range_is_named_as_local_or_remote(bad: str) -> None:
    """The caller's own mistake and the peer's are told apart."""
    with pytest.raises(InvalidArgument, match="local"):
        negotiate(bad, "1")
    with pytest.raises(InvalidArgument, match="remote"):
        negotiate("1", bad)


def test_a_traceparent_is_written_as_it_is_read() -> None:
    """Version 00, the ids, the flags; a child keeps trace and flags and has a span id of its own."""
    text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    context = parse_traceparent(text)
    assert context is not None
    assert str(context) == text
    child = context.child()
    assert (child.trace_id, child.flags) == (context.trace_id, 0)
    assert child.span_id != context.span_id
    assert parse_traceparent(str(child)) == child


@settings(max_examples=300, deadline=None)
@given(st.text("0123456789abcdefABCDEF- \n", max_size=60) | st.text(max_size=60))
def test_only_the_exact_form_is_a_traceparent(text: str) -> None:
    """Whatever is read prints to something that is read again."""
    context = parse_traceparent(text)
    if context is not None:
        assert re.fullmatch(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", text)
        assert parse_traceparent(str(context)) == context


def test_a_new_trace_is_valid_and_sampled() -> None:
    """32 and 16 hex characters, never the same twice."""
    one, two = new_trace(), new_trace()
    assert one != two
    assert parse_traceparent(str(one)) == TraceContext(one.trace_id, one.span_id, 1)


def test_ids_are_32_hex_and_unique_across_threads() -> None:
    """100,000 ids of ten threads, no two alike."""
    out: list[list[str]] = [[] for _ in range(10)]

    def work(mine: list[str]) -> None:
        mine.extend(new_id() for _ in range(10_000))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in out]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    ids = [i for mine in out for i in mine]
    assert len(set(ids)) == 100_000
    assert all(re.fullmatch(r"[0-9a-f]{32}", i) for i in ids[::1000])


def _in_child(pipe: multiprocessing.connection.Connection) -> None:
    pipe.send([new_id() for _ in range(5)])


def test_a_forked_child_does_not_hand_out_its_parents_ids() -> None:
    """The pool is dropped at the fork."""
    new_id()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_in_child, args=(theirs,))
    child.start()
    of_child = ours.recv()
    child.join()
    ours.close()
    theirs.close()
    child.close()
    assert not set(of_child) & {new_id() for _ in range(2000)}
