"""What every door does to spans before they are stored: sample, then redact.

One function over lists of envelopes, in front of the sink of HTTP, OTLP, files and stdin alike. Sampling comes first: what is
not kept need not be cleaned, and its rules may look at attributes that are redacted. Order is kept; what is dropped is
missing from the result, so that the result may be empty.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mist.protocol.envelope import Envelope
from mist.tools.tokentrace.redact import Redactor
from mist.tools.tokentrace.sampling import Sampler
from mist.tools.tokentrace.settings import RedactSettings, SampleSettings
from mist.transport._calls import Replies
from mist.transport.server import Sink


class Intake:
    """Call it with what came in; it gives what is to be stored. `env` None = only check the settings."""

    def __init__(
        self,
        redact: RedactSettings,
        sample: SampleSettings,
        *,
        env: Mapping[str, str] | None = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sampler = Sampler(sample, clock) if sample != SampleSettings() else None
        self._redactor = Redactor(redact, env) if redact != RedactSettings() else None

    def __call__(self, envelopes: list[Envelope]) -> list[Envelope]:
        if self._sampler is not None:
            envelopes = [kept for env in envelopes if (kept := self._sampler(env)) is not None]
        if self._redactor is not None:
            envelopes = [self._redactor(env) for env in envelopes]
        return envelopes

    def facts(self) -> dict[str, Any]:
        """Counters since the start; none of a part that is not there."""
        out: dict[str, Any] = {}
        if self._sampler is not None:
            out["sampled_in"] = self._sampler.kept
            out.update({f"dropped_by_{reason}": count for reason, count in self._sampler.dropped.items()})
        if self._redactor is not None:
            out["redacted"] = self._redactor.changed
            out["too_large_to_scan"] = self._redactor.too_large
        return out

    def before(self, sink: Sink) -> Sink:
        """The sink, behind this. Where everything was dropped there is nothing to store, and no sequence."""

        async def store(envelopes: list[Envelope]) -> Sequence[int] | Replies | None:
            kept = self(envelopes)
            return await sink(kept) if kept else None

        return store
