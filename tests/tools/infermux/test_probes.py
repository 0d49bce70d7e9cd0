"""Health probes: who is down is not asked, who works again is; a probe is paid and booked."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run

from mist.errors import CircuitOpen, InvalidArgument
from mist.quantities import Duration
from mist.tools.infermux.budgets import Ledger
from mist.tools.infermux.probes import PROBER, probe
from mist.tools.infermux.settings import HealthCheckSettings, InferMuxSettings, ProviderSettings

from .scripted import HANG, Clock, Scripted, at_rest, fail, question, router

CHECK = {"health_check": HealthCheckSettings(interval=Duration("60s"), timeout=Duration("20ms"))}


class Enough(Exception):
    """Ends the probing of a test."""


def test_who_is_down_is_asked_by_nobody_until_a_probe_works() -> None:
    """Down by any failure that says so; not by one that says that it is there."""
    script = [fail("server"), fail("invalid", 400), HANG, fail("rate_limited", 429), fail("credentials", 401), "pong"]

    async def main() -> None:
        clock = Clock()
        first, second = Scripted("a", *script), Scripted("b", "from b")
        there = router(first, second, clock=clock, of={"a": CHECK})
        told: list[str] = []
        states: list[bool] = []

        async def between(seconds: float) -> None:
            """What a call finds after each probe."""
            assert 54 <= seconds <= 66
            states.append(there.providers()[0].healthy)
            if not states[-1]:
                assert (await there.complete(question())).reply.content == "from b"
                assert "health probe" in there.explain(question()).left_out[0].reason
            if len(states) == len(script):
                raise Enough

        with pytest.raises(ExceptionGroup, match="unhandled"):
            await probe(there, say=told.append, sleep=between)
        assert states == [False, True, False, True, False, True]
        assert len(told) == 6
        assert len(first.asked) == len(script)  # probes, and no call
        at_rest(there)

        alone = router(Scripted("a", fail("server")), of={"a": CHECK})
        with pytest.raises(ExceptionGroup, match="unhandled"):
            await probe(alone, sleep=_enough)
        with pytest.raises(CircuitOpen, match="health probe failed"):
            await alone.complete(question())

    run(main())


async def _enough(_seconds: float) -> None:
    raise Enough


def test_a_probe_is_booked_and_only_who_asks_is_probed(tmp_path: Path) -> None:
    async def main() -> None:
        ledger = await Ledger.open(tmp_path / "l.db", time_ns=lambda: 1_795_608_000_000_000_000)
        probed, other = Scripted("a"), Scripted("b")
        there = router(probed, other, of={"a": CHECK}, ledger=ledger)
        with pytest.raises(ExceptionGroup, match="unhandled"):
            await probe(there, sleep=_enough)
        assert (len(probed.asked), len(other.asked)) == (1, 0)
        await ledger.flush()
        (line,) = await ledger.report("key", "provider")
        assert (line.by, line.calls, line.tokens_in) == ({"key": PROBER.key, "provider": "a"}, 1, 10)
        await ledger.aclose()
        await probe(router(other))

    run(main())


def test_a_check_needs_a_model() -> None:
    with pytest.raises(InvalidArgument, match="health_check"):
        InferMuxSettings(providers=(ProviderSettings(name="a", type="echo", health_check=HealthCheckSettings()),))
