"""What every door does to spans before they are stored: sample, then redact.

One function over lists of envelopes, in front of the sink of HTTP, OTLP, files and stdin alike. Sampling comes first: what is
not kept need not be cleaned, and its rules may look at attributes that are redacted. Order is kept; what is dropped is
missing from the result, so that the result may be empty.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct

from mist.errors import InvalidArgument
from mist.protocol.envelope import Envelope
from mist.tools.tokentrace.redact import Redactor, RedactSettings, redact_settings
from mist.tools.tokentrace.sampling import Sampler, SampleSettings, sample_settings


class IntakeSettings(Struct, frozen=True, kw_only=True):
    """None = not at all."""

    redact: RedactSettings | None = None
    sample: SampleSettings | None = None


class Intake:
    """Call it with what came in; it gives what is to be stored."""

    def __init__(
        self,
        settings: IntakeSettings,
        *,
        env: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sampler = Sampler(settings.sample, clock) if settings.sample is not None else None
        self._redactor = Redactor(settings.redact, env) if settings.redact is not None else None

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


def intake_settings(document: Mapping[str, Any], origin: str) -> IntakeSettings:
    """The settings in `[tokentrace.redact]` and `[tokentrace.sample]` of a TOML document that was read already; `origin` names it
    in errors. Raises InvalidArgument."""
    ours = document.get("tokentrace", {})
    tables = {}
    for name in ("redact", "sample"):
        table = ours.get(name) if isinstance(ours, Mapping) else None
        if table is not None and not isinstance(table, Mapping):
            raise InvalidArgument(f"{origin}: tokentrace.{name} is a table", hint=f"[tokentrace.{name}]")
        tables[name] = table
    return IntakeSettings(
        redact=redact_settings(tables["redact"], origin) if tables["redact"] is not None else None,
        sample=sample_settings(tables["sample"], origin) if tables["sample"] is not None else None,
    )
