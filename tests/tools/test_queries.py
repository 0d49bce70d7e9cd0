"""Questions about traces: stable order, trees, prefixes, and the way out and in again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from mist.errors import InvalidArgument, NotFound
from mist.protocol.envelope import Envelope
from mist.protocol.payloads import TRACE_SPAN
from mist.tools.tokentrace import queries
from mist.tools.tokentrace.files import BadRow, envelopes_of
from mist.tools.tokentrace.queries import StoredSpan
from mist.tools.tokentrace.spans import row_of
from mist.tools.tokentrace.store import Batch, Refusal, Store
from mist.tools.tokentrace.tree import tree
from mist.tools.tokentrace.where import Where

from .spanning import payload, record


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    spans = [
        payload(1, trace_id="aa01", start_ns=100, end_ns=900),
        payload(
            2, trace_id="aa01", parent_id=f"{1:016x}", start_ns=300, end_ns=800, status="error", attrs={"error": "boom"}
        ),
        payload(
            3, trace_id="aa01", parent_id=f"{1:016x}", start_ns=200, end_ns=250, attrs={"model": "m2", "tokens_in": 1}
        ),
        payload(4, trace_id="aa02", start_ns=500, end_ns=600),
        payload(5, trace_id="bb03", start_ns=400, end_ns=0, attrs={}),
    ]
    rows = []
    for number, span in enumerate(spans, 1):
        row = row_of(record(Envelope.new(TRACE_SPAN, span, source="svc"), number))
        assert row is not None
        rows.append(row)
    refusal = Refusal(9, 5, "malformed: x", "s", b"\xff{")
    with Store.open(tmp_path / "t.db") as opened:
        opened.apply("trace", "i", Batch(after=0, scanned=9, rows=rows, refused=[refusal]))
        yield opened


def test_traces_are_listed_newest_first_and_summed(store: Store) -> None:
    """By their newest span; sums over all spans of a trace, unknown stays None."""
    found = queries.traces(store, limit=10).traces
    assert [t.trace_id for t in found] == ["aa02", "bb03", "aa01"]
    whole = found[2]
    assert (whole.spans, whole.failed, whole.tokens_in, whole.models) == (3, 1, 101, ["m1", "m2"])
    assert whole.latency_ms == pytest.approx(800 / 1e6)
    assert (found[1].tokens_in, found[1].cost_usd, found[1].latency_ms) == (None, None, None)
    assert [t.trace_id for t in queries.traces(store, limit=1).traces] == ["aa02"]
    assert [t.trace_id for t in queries.traces(store, Where(failed=True), limit=9).traces] == ["aa01"]


def test_a_trace_is_found_by_a_unique_beginning(store: Store) -> None:
    """Spans in the order they started; an ambiguous or unknown beginning is an error that helps."""
    assert [s.span_id for s in queries.trace(store, "aa01")] == [f"{n:016x}" for n in (1, 3, 2)]
    assert queries.trace(store, "b")[0].trace_id == "bb03"
    with pytest.raises(InvalidArgument, match="aa01, aa02"):
        queries.trace(store, "aa")
    for unknown in ("zz", ""):
        with pytest.raises(NotFound):
            queries.trace(store, unknown)


def test_failed_spans_and_refused_records_are_listed(store: Store) -> None:
    """A status other than ok; quarantine with its reason."""
    assert [s.span_id for s in queries.spans(store, Where(failed=True), limit=5).spans] == [f"{2:016x}"]
    (refused,) = queries.quarantined(store, limit=5)
    assert (refused.sequence, refused.reason, refused.data) == (9, "malformed: x", "\ufffd{")


def test_exported_spans_come_in_again_as_they_were(store: Store, tmp_path: Path) -> None:
    """The wire shape of every span, through a file of JSON lines, is the same span."""
    before = [queries.payload_of(s) for s in queries.every_span(store)]
    path = tmp_path / "spans.jsonl"
    path.write_bytes(msgspec.json.Encoder().encode_lines(before))
    after = []
    for env in envelopes_of(path, model="unused"):
        assert not isinstance(env, BadRow)
        after.append(env.decode())
    # a span without a model gets the file's, everything else is untouched
    assert [
        msgspec.structs.replace(s, attrs={**s.attrs, "model": s.attrs.get("model", "unused")}) for s in before
    ] == after


def span(number: int, parent: int = 0) -> StoredSpan:
    return StoredSpan(
        trace_id="t", span_id=f"s{number}", parent_id=f"s{parent}" if parent else "", source="", tenant="", user_id="",
        operation="", status="", model=None, provider=None, time_ns=number, start_ns=number, end_ns=None,
        latency_ms=None, ttft_ms=None, tokens_in=None, tokens_out=None, cost_usd=None, score=None, price=None, attrs=msgspec.Raw(b"{}"), sequence=number,
    )  # fmt: skip


def drawn(*spans: StoredSpan) -> list[str]:
    return [branch + s.span_id for branch, s in tree(spans)]


def test_the_tree_draws_children_below_their_parents() -> None:
    """Orphans are roots; siblings in start order."""
    assert drawn(span(1), span(2, 1), span(3, 2), span(4, 1), span(5, 99)) == ["s1", "├─ s2", "│  └─ s3", "└─ s4", "s5"]


def test_the_tree_survives_cycles_and_depth() -> None:
    """A span that is its own parent, two that are each other's, and a chain deeper than Python's stack."""
    assert drawn(span(1, 1)) == ["s1"]
    assert drawn(span(1, 2), span(2, 1)) == ["s1", "└─ s2"]
    assert len(drawn(*[span(n, n - 1) for n in range(1, 3000)])) == 2999
