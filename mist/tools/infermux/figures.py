"""The answers of `/_infermux/costs…`: what was spent in a month, in the shapes of the seed's documents, out of the ledger.

    costs                 the whole month, by provider and by model
    costs/by-caller       each key (or `X-Infermux-Caller`), with its budget of the month where it has one
    costs/caller/ID       one of them
    costs/by-model        each model of each provider

Promises: sums of billionths, exact; `unpriced` counts the calls whose cost nobody knows, which are in no sum, and `estimated` those
that count with the most they may have cost.
"""

from __future__ import annotations

import datetime
import re
from typing import Any

from mist.errors import InvalidArgument, NotFound
from mist.tools.infermux.budgets import Ledger, Line
from mist.tools.infermux.settings import NANO, InferMuxSettings

_MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])", re.ASCII)


def month_of(time_ns: int) -> str:
    return datetime.datetime.fromtimestamp(time_ns // 1_000_000_000, datetime.UTC).strftime("%Y-%m")


async def costs(ledger: Ledger, settings: InferMuxSettings, what: str, month: str) -> dict[str, Any]:
    """`what` is the path behind `/_infermux/`. Raises NotFound, InvalidArgument."""
    if _MONTH.fullmatch(month) is None:
        raise InvalidArgument(f"period={month[:40]!r} is no month", hint="YYYY-MM")
    await ledger.flush()
    if what == "costs":
        whole = await ledger.report(since=month, until=month)
        providers = await ledger.report("provider", since=month, until=month)
        models = await ledger.report("model", since=month, until=month)
        return {
            "period": month, **_figures(whole),
            "by_provider": {line.by["provider"]: line.usd for line in providers},
            "by_model": {line.by["model"]: line.usd for line in models},
        }  # fmt: skip
    if what == "costs/by-model":
        lines = await ledger.report("model", "provider", since=month, until=month)
        return {"period": month, "models": [{**line.by, **_figures([line])} for line in lines]}
    if what == "costs/by-caller":
        return {"period": month, "callers": await _callers(ledger, settings, month)}
    if what.startswith("costs/caller/"):
        name = what.removeprefix("costs/caller/")
        for found in await _callers(ledger, settings, month):
            if found["caller"] == name:
                return {"period": month, **found}
        raise NotFound(f"caller {name[:80]!r} has spent nothing in {month}")
    raise NotFound(f"no such figures: {what[:80]}", hint="costs, costs/by-caller, costs/caller/ID, costs/by-model")


async def _callers(ledger: Ledger, settings: InferMuxSettings, month: str) -> list[dict[str, Any]]:
    mine = [b for b in settings.budgets if b.period == "month" and b.scope[0] == "key"]
    states = {s.name: s for s in await ledger.states(mine) if s.period == month}
    out = []
    for line in await ledger.report("key", since=month, until=month):
        state = states.get(line.by["key"])
        limit = state.budget.limit_nano if state is not None else None
        left = max(0, limit - state.used_nano) if state is not None and limit is not None else None
        out.append(
            {
                "caller": line.by["key"], "budget_usd": _usd(limit), "budget_remaining_usd": _usd(left),
                **_figures([line]),
            }
        )  # fmt: skip
    return out


def _figures(lines: list[Line]) -> dict[str, Any]:
    line = lines[0] if lines else Line(by={}, calls=0, tokens_in=0, tokens_out=0, nano=0, unknown=0, estimated=0)
    return {
        "total_usd": line.usd, "requests": line.calls, "prompt_tokens": line.tokens_in,
        "completion_tokens": line.tokens_out, "unpriced": line.unknown, "estimated": line.estimated,
    }  # fmt: skip


def _usd(nano: int | None) -> float | None:
    return None if nano is None else nano / NANO
