"""The demo's parts, without processes: traffic, suite, and a judge that can say no."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from conftest import run

import mist
from mist.broker.base import Message
from mist.cli import _demo_traffic as traffic_module
from mist.cli._demo_judge import Verdict, acknowledged_line, judge, read_acknowledged
from mist.cli._demo_traffic import CONTEXT_TOKENS, GENERATED_TOKENS, draw, span_of, traffic
from mist.errors import Internal
from mist.protocol.codec import encode
from mist.protocol.payloads import TraceSpan
from mist.tools.matchspec.load import load_suite as load
from mist.tools.matchspec.results import rows
from mist.tools.tokentrace.ingest import Options, ingest
from mist.tools.tokentrace.spans import row_of
from mist.tools.tokentrace.store import Batch, Store

from .graded import grade
from .spanning import envelope, message, record
from .suites import write_recorded_suite

DATA = Path(os.environ.get("MIST_TEST_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")
AZURE = DATA / "azure_llm_conv_2023.csv"


def spans(count: int = 2000, seed: int = 1, run: str = "r", base_ns: int = 10**18) -> list[TraceSpan]:
    return [e.decode(TraceSpan) for e in traffic(count, seed=seed, run=run, base_ns=base_ns)]


def test_the_seed_decides_the_traffic_and_the_run_its_ids() -> None:
    """Two runs of one seed publish the same calls under different ids, so a shared broker keeps both."""
    one, again, other = spans(), spans(), spans(run="r2")
    assert one == again
    assert [s.attrs for s in one] == [s.attrs for s in other]
    assert not {s.span_id for s in one} & {s.span_id for s in other}
    assert [s.attrs for s in spans(seed=2)] != [s.attrs for s in one]


def test_traffic_is_valid_shaped_like_traces_and_in_the_past() -> None:
    """The store takes every span; ids are unique; children name a parent of their trace; nothing starts after now."""
    found = list(traffic(5000, seed=3, run="r", base_ns=10**18))
    assert len(found) == 5000
    for n, env in enumerate(found, 1):
        assert row_of(record(env, n)) is not None
    decoded = [e.decode(TraceSpan) for e in found]
    assert len({(s.trace_id, s.span_id) for s in decoded}) == 5000
    ids = {(s.trace_id, s.span_id) for s in decoded}
    assert all(not s.parent_id or (s.trace_id, s.parent_id) in ids for s in decoded)
    assert 0.2 < sum(bool(s.parent_id) for s in decoded) / 5000 < 0.8
    assert max(s.start_ns for s in decoded) < 10**18 + span_of(5000)
    statuses = Counter(s.status for s in decoded)
    assert statuses["ok"] > 4800
    assert statuses["error"] > 0
    assert all(("cost_usd" in s.attrs) == (s.status == "ok" and s.attrs["model"] != "local-8b") for s in decoded)


def test_the_tables_are_drawn_from_end_to_end() -> None:
    """Quantile 0 is the least value, the top is never passed, and they rise."""
    for table in (CONTEXT_TOKENS, GENERATED_TOKENS):
        assert list(table) == sorted(table)
        assert draw(table, 0.0) == table[0]
        assert draw(table, 0.999999) <= table[-1]
        assert draw(table, 0.5) == table[len(table) // 2]


@pytest.mark.skipif(not AZURE.exists(), reason="the shared data are not here")
def test_the_tables_are_those_of_the_published_trace() -> None:
    """Every 64th part of the sorted columns, and drawn tokens have their quartiles."""
    columns = [line.split(",")[1:] for line in AZURE.read_text().splitlines()[1:]]
    drawn = spans(20_000)
    for at, (table, name) in enumerate(((CONTEXT_TOKENS, "tokens_in"), (GENERATED_TOKENS, "tokens_out"))):
        real = sorted(int(c[at]) for c in columns)
        assert table == tuple(real[round(i * (len(real) - 1) / 64)] for i in range(65))
        ours = sorted(s.attrs[name] for s in drawn if name in s.attrs)
        for part in (0.25, 0.5, 0.75, 0.9):
            a, b = real[int(part * len(real))], ours[int(part * len(ours))]
            assert abs(a - b) <= 0.1 * a + 10, (name, part, a, b)


def test_the_suite_has_the_passes_it_was_written_with(tmp_path: Path) -> None:
    """Graders find exactly the answers that were written as right ones, for each of the three kinds."""
    path, right = write_recorded_suite(tmp_path / "s", seed=5, samples=300)
    suite = load(path)
    table = rows((grade(suite.name, h, s, "r") for h in suite.harnesses for s in h.samples), suite.models)
    assert {r.model: r.passed for r in table} == right
    assert Counter(s.graders for s in suite.harnesses[0].samples) == {
        ("numeric",): 100,
        ("contains",): 100,
        ("exact",): 100,
    }


def acknowledged(tmp_path: Path, count: int) -> Path:
    path = tmp_path / "acknowledged.txt"
    lines = []
    for n in range(1, count + 1):
        span = envelope(n).decode(TraceSpan)
        lines.append(acknowledged_line(n, span.trace_id, span.span_id))
    path.write_bytes(b"".join(lines))
    return path


def verdict_of(tmp_path: Path, *batches: Batch) -> Verdict:
    with Store.open(tmp_path / "t.db") as store:
        for batch in batches:
            store.apply("trace", "i", batch, record="w")
        return judge(acknowledged(tmp_path, 10), store)


def batch(after: int, first: int, last: int, scanned: int | None = None) -> Batch:
    found = [row_of(record(envelope(n), n)) for n in range(first, last + 1)]
    return Batch(after=after, scanned=last if scanned is None else scanned, rows=[r for r in found if r is not None])


def test_the_judge_accepts_what_is_whole(tmp_path: Path) -> None:
    """Every acknowledged span once."""
    verdict = verdict_of(tmp_path, batch(0, 1, 6), batch(6, 7, 10))
    assert verdict == Verdict(acknowledged=10, stored=10, lost=0, duplicated=0, refused=0, unrecorded=0)
    assert verdict.ok


def test_the_judge_sees_a_position_that_ran_ahead(tmp_path: Path) -> None:
    """A worker that moves its position before the rows loses what lies between."""
    verdict = verdict_of(tmp_path, batch(0, 1, 4, scanned=6), batch(6, 7, 10))
    assert (verdict.lost, verdict.stored, verdict.ok) == (2, 8, False)


def test_the_judge_sees_a_position_that_stayed_behind(tmp_path: Path) -> None:
    """A worker that moves its position after the rows repeats them; the table of spans alone would hide it."""
    verdict = verdict_of(tmp_path, batch(0, 1, 6, scanned=4), batch(4, 5, 10))
    assert (verdict.lost, verdict.duplicated, verdict.stored, verdict.ok) == (0, 2, 10, False)


def test_the_judge_sees_a_span_that_was_published_twice(tmp_path: Path) -> None:
    """The same span under two sequences is done twice, although stored once."""

    async def body() -> Verdict:
        async with mist.connect("memory:") as broker:
            stream = await broker.open("trace")
            await stream.append([message(n) for n in range(1, 11)])
            last = (await stream.append([Message("trace.span", encode(envelope(3)))]))[-1]
            with Store.open(tmp_path / "t.db") as store:
                await ingest(broker, stream, store, until=last, options=Options(record="w"))
                return judge(acknowledged(tmp_path, 10), store)

    verdict = run(body())
    assert (verdict.duplicated, verdict.stored, verdict.ok) == (1, 10, False)


def test_the_judge_does_not_pass_nothing(tmp_path: Path) -> None:
    """No acknowledgement, or a record that knows nothing of what is stored, is not a success."""
    with Store.open(tmp_path / "t.db") as store:
        (tmp_path / "none.txt").write_bytes(b"")
        assert not judge(tmp_path / "none.txt", store).ok
        store.apply("trace", "i", batch(0, 1, 10))
        verdict = judge(acknowledged(tmp_path, 10), store)
        assert (verdict.lost, verdict.duplicated, verdict.unrecorded, verdict.ok) == (0, 0, 10, False)


def test_a_torn_last_line_is_no_acknowledgement(tmp_path: Path) -> None:
    """The producer may be killed while it writes; a torn line elsewhere is damage."""
    path = acknowledged(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:-5])
    assert len(read_acknowledged(path)) == 2
    path.write_bytes(b"1 a b\ntorn\n2 c d\n")
    with pytest.raises(Internal):
        read_acknowledged(path)


def test_models_share_all_traffic() -> None:
    """The invented models' shares are a whole, and one has no known price."""
    assert sum(m.share for m in traffic_module.MODELS) == pytest.approx(1.0)
    assert any(m.price_in is None for m in traffic_module.MODELS)
