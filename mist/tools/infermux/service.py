"""InferMux at work: one router, its record, its doors, the requests of a stream, its costs.

Promises: what is recorded lies in the streams that are handed in; the way down is in order: requests of the stream are given
back or finished, the record is drained within its deadline, then the router is closed. Does not: open brokers or listeners,
or read settings from files; the caller hands them in.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from mist.broker.base import Stream
from mist.errors import InvalidArgument
from mist.kit.breaker import STATES
from mist.kit.metrics import Metrics
from mist.kit.server import App
from mist.protocol.envelope import Envelope
from mist.tools.infermux.access import Access
from mist.tools.infermux.api import Api
from mist.tools.infermux.budgets import Ledger
from mist.tools.infermux.calls import ALL, Calls
from mist.tools.infermux.chat import Caller
from mist.tools.infermux.figures import costs, month_of, timeseries
from mist.tools.infermux.handler import answered
from mist.tools.infermux.keys import Keys
from mist.tools.infermux.recorder import DRAIN_S, Recorder
from mist.tools.infermux.router import Router
from mist.tools.infermux.settings import InferMuxSettings
from mist.transport.body import Limits

MANAGEMENT = "INFERMUX_MANAGEMENT_TOKEN"
"""The variable with the token of the management routes, by the name the documents give it."""
Say = Callable[[str], None]


class InferMux:
    """`infer` and `trace` are the streams of the record; None is nowhere."""

    def __init__(
        self,
        settings: InferMuxSettings,
        router: Router,
        *,
        infer: Stream | None = None,
        trace: Stream | None = None,
        ledger: Ledger | None = None,
        metrics: Metrics | None = None,
        env: Mapping[str, str] = os.environ,
        clock: Callable[[], int] = time.time_ns,
        say: Say = lambda _text: None,
    ) -> None:
        self.settings = settings
        self.router = router
        self.recorder = Recorder(infer, trace, capture=settings.capture, say=say)
        self.calls = Calls(router, self.recorder, metrics=metrics)
        self._ledger = ledger
        self._clock = clock
        self.access = Access(Keys(settings, env), management_token=env.get(MANAGEMENT, ""))
        self._api = Api(
            self.calls,
            access=self.access,
            limits=Limits(body_bytes_max=int(settings.body_bytes_max), inflight_requests_max=settings.requests_max),
            names=lambda: names_of(settings),
            costs=self._costs if ledger is not None else None,
            metrics=metrics.pages()["/metrics"] if metrics is not None else None,
            facts=self.facts,
        )

    def doors(self) -> dict[str, App]:
        return self._api.doors()

    async def answer(self, asked: Envelope, headers: Mapping[bytes, bytes]) -> Envelope:
        """The `infer.response` to an `infer.request` of a door. Raises what became of it instead."""
        caller = self.access.who(headers)
        return await answered(self.calls, asked, ALL, errors=False, caller=caller if caller != Caller() else None)

    def facts(self) -> dict[str, Any]:
        """Counters of this process."""
        recorded = self.recorder.stats
        return {
            "requests": self.calls.requests, "under_way": self.calls.under_way, "recorded": recorded.stored,
            "unrecorded": recorded.pending, "dropped": sum(recorded.dropped.values()),
        }  # fmt: skip

    async def aclose(self, drain_s: float) -> None:
        """Drain the record, close the providers and the ledger."""
        try:
            await self.recorder.aclose(min(drain_s, DRAIN_S))
        finally:  # also when nobody wants to wait any longer: money is not to be lost for a record
            try:
                await self.router.aclose()
            finally:
                if self._ledger is not None:
                    await self._ledger.aclose()

    async def _costs(self, path: str, query: bytes) -> Any:
        assert self._ledger is not None  # noqa: S101 - else the route is not there
        given = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
        if path == "costs/timeseries":
            hours, bucket = given.pop("hours", "24"), given.pop("bucket", "1h")
            self._no_more(given, "hours=24, bucket=1h")
            return await timeseries(self._ledger, hours, bucket, self._clock())
        month = given.pop("period", "") or month_of(self._clock())
        self._no_more(given, "period=YYYY-MM")
        return await costs(self._ledger, self.settings, path, month)

    @staticmethod
    def _no_more(given: Mapping[str, str], known: str) -> None:
        if given:
            raise InvalidArgument(f"unknown parameter {next(iter(given))[:60]!r}", hint=known)

    def circuits(self) -> dict[tuple[str, ...], float]:
        return {
            (state.name, model.model): STATES.index(model.circuit)
            for state in self.router.providers()
            for model in state.models
        }


def watch(metrics: Metrics, now: Callable[[], InferMux]) -> None:
    """Show the one that works now as metrics, beside those that calls are counted by (calls.py)."""
    metrics.watch(
        "infermux_circuit_state",
        "0 closed, 1 open, 2 half-open.",
        lambda: now().circuits(),
        labels=("provider", "model"),
    )
    metrics.watch("infermux_calls_under_way", "Calls.", lambda: now().calls.under_way)
    metrics.watch(
        "infermux_records_dropped_total", "Records that were not stored, by reason.",
        lambda: {(reason,): float(number) for reason, number in now().recorder.dropped.items()},
        labels=("reason",), kind="counter",
    )  # fmt: skip
    metrics.watch("infermux_records_pending", "Records that wait to be stored.", lambda: now().recorder.stats.pending)


def names_of(settings: InferMuxSettings) -> dict[str, str]:
    """What may be asked for -> whose it is: providers' models, then groups and aliases."""
    out: dict[str, str] = {}
    for provider in settings.asked:
        for name in (*provider.models, *provider.aliases):
            out.setdefault(name, provider.name)
    for name in settings.names():
        out.setdefault(name, "infermux")
    return out
