"""The answers of `/_infermux/costs…`: what was spent in a month, in the shapes of the seed's documents, out of the ledger.

    costs                 the whole month, by provider and by model
    costs/by-caller       each key (or `X-Infermux-Caller`), with its budget of the month where it has one
    costs/caller/ID       one of them
    costs/by-model        each model of each provider
    costs/timeseries      the last hours, in pieces that begin at whole multiples of their length (UTC), the present one included

Promises: sums of billionths, exact; `unpriced` counts the calls whose cost nobody knows, which are in no sum, and `estimated` those
that count with the most they may have cost.
"""

from __future__ import annotations

import datetime
import re
from typing import Any

from mist.errors import InvalidArgument, NotFound
from mist.tools.infermux.books import hour_of
from mist.tools.infermux.budgets import Ledger, Line
from mist.tools.infermux.settings import NANO, InferMuxSettings

HOURS_MAX = 31 * 24
_BUCKET = re.compile(r"([1-9]\d{0,2})([hd])", re.ASCII)
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
    raise NotFound(
        f"no such figures: {what[:80]}",
        hint="costs, costs/by-caller, costs/caller/ID, costs/by-model, costs/timeseries",
    )


async def timeseries(ledger: Ledger, hours: str, bucket: str, now_ns: int) -> dict[str, Any]:
    """`hours` back from now, in pieces of `bucket`: `1h`, `6h`, `1d`. Raises InvalidArgument."""
    count = int(hours) if hours.isascii() and hours.isdigit() and len(hours) < 6 else 0
    if not 1 <= count <= HOURS_MAX:
        raise InvalidArgument(f"hours={hours[:40]!r} is no number from 1 to {HOURS_MAX}")
    found = _BUCKET.fullmatch(bucket)
    width = int(found[1]) * (24 if found[2] == "d" else 1) if found is not None else 0
    if not 1 <= width <= HOURS_MAX:
        raise InvalidArgument(f"bucket={bucket[:40]!r} is no number of hours or days", hint="for example 1h, 6h, 1d")
    await ledger.flush()
    now = hour_of(now_ns)
    first = (now - count + 1) // width * width
    spent = await ledger.hours(first, now)
    points = []
    for start in range(first, now + 1, width):
        lines = [spent[hour] for hour in range(start, start + width) if hour in spent]
        began = datetime.datetime.fromtimestamp(start * 3600, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        points.append({"start": began, **_figures(lines)})
    return {"hours": count, "bucket": bucket, "points": points}


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
    """Of all of them together."""
    return {
        "total_usd": sum(line.nano for line in lines) / NANO, "requests": sum(line.calls for line in lines),
        "prompt_tokens": sum(line.tokens_in for line in lines),
        "completion_tokens": sum(line.tokens_out for line in lines),
        "unpriced": sum(line.unknown for line in lines), "estimated": sum(line.estimated for line in lines),
    }  # fmt: skip


def _usd(nano: int | None) -> float | None:
    return None if nano is None else nano / NANO
