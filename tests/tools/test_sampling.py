"""Sampling and the intake: whole traces, what is always kept, what is counted, in which order."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from mist.config import Layer, merge
from mist.errors import InvalidArgument
from mist.protocol.envelope import Envelope
from mist.tools.tokentrace.intake import Intake
from mist.tools.tokentrace.sampling import PROBABILITY, SOURCES_MAX, Sampler, share
from mist.tools.tokentrace.settings import Keep, RedactRule, RedactSettings, SampleSettings
from tests.tools.spanning import envelope, payload

TRACES = [f"{n:032x}" for n in range(4000)]


def still() -> float:
    return 0.0


def sampler(**settings: Any) -> Sampler:
    return Sampler(SampleSettings(**settings), still)


def test_traces_are_kept_as_a_whole_and_at_the_rate() -> None:
    """All spans of a trace share its fate, in every sampler; one in ten of four thousand is 400, give or take."""
    one, other = sampler(rate=0.1), sampler(rate=0.1)
    kept = {t for n, t in enumerate(TRACES) if one(envelope(n, trace_id=t)) is not None}
    again = {t for n, t in enumerate(TRACES) if other(envelope(n + 9999, trace_id=t, operation="x")) is not None}
    assert kept == again
    assert 330 <= len(kept) <= 470
    wider = sampler(rate=0.3)
    assert kept <= {t for t in TRACES if wider(envelope(1, trace_id=t)) is not None}
    assert (one.kept, one.dropped) == (len(kept), {"rate": 4000 - len(kept), "source": 0})


def test_the_hash_does_not_change() -> None:
    """Processes of different versions have to agree."""
    assert share("4bf92f3577b34da6a3ce929d0e0e4736") == pytest.approx(SHARE, abs=1e-15)


SHARE = 0.15039768000230236


def test_a_kept_span_says_its_probability() -> None:
    """Totals weighted by its inverse come out right; an earlier sampler's is multiplied; a good checksum stays good."""
    sample = sampler(rate=0.25)
    total = 0.0
    for n, trace in enumerate(TRACES):
        out = sample(envelope(n, trace_id=trace))
        if out is not None:
            total += 1 / out.data()["attrs"][PROBABILITY]
    assert total == pytest.approx(4000, rel=0.1)
    env = Envelope.new("trace.span", payload(attrs={PROBABILITY: 0.5, "a": 1}), source="s", checksum=True)
    all_of_it = sampler(rate=0.999999)(env)
    assert all_of_it is not None
    assert all_of_it.data()["attrs"] == {PROBABILITY: pytest.approx(0.5, rel=1e-5), "a": 1}
    assert all_of_it.checksum == zlib.crc32(all_of_it.payload)


@pytest.mark.parametrize(
    ("keep", "span", "kept"),
    [
        (Keep(errors=True), {"status": "error"}, True),
        (Keep(errors=True), {"status": "timeout"}, True),
        (Keep(errors=True), {"status": "ok"}, False),
        (Keep(slower_than="200ms"), {}, True),
        (Keep(slower_than="250ms"), {}, False),
        (Keep(slower_than="1ms"), {"start_ns": 0}, False),
        (Keep(cost_over_usd=0.4), {}, True),
        (Keep(cost_over_usd=0.5), {}, False),
        (Keep(cost_over_usd=0.1), {"attrs": {}}, False),
        (Keep(cost_over_usd=0.1), {"attrs": {"cost_usd": "1"}}, False),
        (Keep(attrs={"model": "m1"}), {}, True),
        (Keep(attrs={"model": "m2"}), {}, False),
        (Keep(attrs={"tokens_in": "100"}), {}, True),
        (Keep(attrs={"debug": ""}), {"attrs": {"debug": False}}, True),
        (Keep(attrs={"debug": ""}), {"attrs": None}, False),
        (Keep(errors=True, attrs={"model": "m1"}), {}, False),
        (Keep(errors=True, attrs={"model": "m1"}), {"status": "error"}, True),
    ],
)
def test_what_is_always_kept(keep: Keep, span: dict[str, Any], kept: bool) -> None:
    """At a rate of nothing. The bytes are the same: it stands for itself alone."""
    env = envelope(**span)
    assert sampler(rate=0.0, keep=(keep,))(env) is (env if kept else None)


def test_what_cannot_be_judged_is_kept() -> None:
    """Another type, no trace id, no span at all."""
    for env in (
        Envelope.new("trace.alert", {}, source="s"), envelope(trace_id=""),
        Envelope.new("trace.span", Raw(b'{"trace_id":1}'), source="s"), Envelope.new("trace.span", None, source="s"),
    ):  # fmt: skip
        assert sampler(rate=0.0)(env) is env


def test_a_source_has_its_rate_and_its_burst() -> None:
    """Three at once, then one each half second; another source has its own; a clock that stands still gives nothing."""
    now = 0.0
    sample = Sampler(SampleSettings(per_source_per_s=2, burst=3), lambda: now)
    noisy, quiet = envelope(1), msgspec.structs.replace(envelope(2), source="quiet")
    assert [sample(noisy) is noisy for _ in range(5)] == [True] * 3 + [False] * 2
    assert sample(quiet) is quiet
    now = 0.5
    assert [sample(noisy) is noisy for _ in range(2)] == [True, False]
    now = 100.0
    assert [sample(noisy) is noisy for _ in range(4)] == [True] * 3 + [False]
    now = 50.0
    assert sample(noisy) is None
    assert (sample.kept, sample.dropped) == (8, {"rate": 0, "source": 5})


def test_sources_are_bounded() -> None:
    """A name for each span does not fill the memory."""
    sample = sampler(per_source_per_s=1)
    env = envelope()
    for n in range(SOURCES_MAX + 10):
        sample(msgspec.structs.replace(env, source=f"s{n}"))
    assert len(sample._buckets) == SOURCES_MAX


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rate": 1.1}, "rate = 1.1"), ({"rate": "x"}, "f: rate"), ({"rates": 1}, "unknown key"),
        ({"rate": float("nan")}, "rate = nan"), ({"burst": 3}, "limits nothing"), ({"per_source_per_s": -1}, "numbers from 0"),
        ({"keep": [{}]}, "keep 1: names nothing"), ({"keep": [{"slower_than": "5"}]}, "keep 1: slower_than: '5' is no duration"),
        ({"keep": [{"error": True}]}, "unknown field"), ({"keep": [{"errors": True}] * 33}, "max 32"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(table: dict[str, Any], message: str) -> None:
    """At load."""
    with pytest.raises(InvalidArgument, match=message):
        Sampler(merge(SampleSettings, [Layer("f", table)]).value, still)


def test_the_intake_samples_and_then_redacts_in_order() -> None:
    """A rule to keep sees what is redacted afterwards; order stays; facts count."""
    intake = Intake(
        RedactSettings(rules=(RedactRule(attrs=("user",)),)),
        SampleSettings(rate=0.0, keep=(Keep(attrs={"user": "anna"}),)),
        env={}, clock=still,
    )  # fmt: skip
    spans = [envelope(n, attrs={"user": "anna" if n % 2 else "otto"}) for n in range(6)]
    out = intake(spans)
    assert [e.id for e in out] == [spans[n].id for n in (1, 3, 5)]
    assert {e.data()["attrs"]["user"] for e in out} == {"[redacted]"}
    assert intake.facts() == {
        "sampled_in": 3, "dropped_by_rate": 3, "dropped_by_source": 0, "redacted": 3, "too_large_to_scan": 0,
    }  # fmt: skip


def test_an_intake_without_settings_does_nothing() -> None:
    """The same list, no facts."""
    spans = [envelope()]
    nothing = Intake(RedactSettings(), SampleSettings())
    assert nothing(spans) is spans
    assert nothing.facts() == {}


def test_a_sink_behind_an_intake_sees_what_is_kept() -> None:
    """And nothing at all where nothing is."""
    seen: list[list[Envelope]] = []

    async def sink(envelopes: list[Envelope]) -> list[int]:
        seen.append(envelopes)
        return [1] * len(envelopes)

    intake = Intake(RedactSettings(), SampleSettings(rate=0.0, keep=(Keep(errors=True),)))
    store = intake.before(sink)
    spans = [envelope(1), envelope(2, status="error")]
    assert asyncio.run(store(spans)) == [1]
    assert asyncio.run(store(spans[:1])) is None
    assert seen == [spans[1:]]
