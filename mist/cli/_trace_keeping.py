"""The verbs of `mist trace` that look over a store as a whole, or change it: metrics, rebuild, reprice, retain, erase,
alerts."""

from __future__ import annotations

import contextlib
import time
from enum import StrEnum
from typing import Annotated, Any

import typer

from mist.cli._tools import StoreOption
from mist.cli.options import DryRun
from mist.cli.session import current
from mist.cli.trace import SpanOptions, StreamOption, app, prices_of, store_of
from mist.errors import InvalidArgument
from mist.kit.signals import drained

PricesOption = Annotated[
    str, typer.Option("--prices", metavar="FILE", help="A price table; default tokentrace.prices of mist.toml.")
]


class BucketChoice(StrEnum):
    minute = "minute"
    hour = "hour"
    day = "day"


@app.command()
def metrics(
    which: SpanOptions,
    by: Annotated[
        str, typer.Option("--by", metavar="A,B", help="Group by: model, operation, provider, tenant, user, attr.KEY…")
    ] = "",
    bucket: Annotated[BucketChoice | None, typer.Option("--bucket", help="One row per time bucket.")] = None,
    store: StoreOption = "",
) -> None:
    """Counts, errors, latency, tokens and cost of a window, in groups or over time.

    Examples:
      mist trace metrics --since 1h --by model
      mist trace metrics --since 7d --bucket day --by tenant -o csv
    """
    import msgspec

    from mist.cli.render import moment
    from mist.tools.tokentrace.stats import metrics as compute
    from mist.tools.tokentrace.store import Store

    session = current()
    out = session.out
    names = tuple(name.strip() for name in by.split(",") if name.strip())
    with Store.read(store_of(session, store)) as opened:
        found = compute(opened, which.where(), names, bucket=bucket.value if bucket else None)
    if out.json:
        out.rows([msgspec.to_builtins(m) for m in found], [])
        return
    rows: list[dict[str, Any]] = []
    for m in found:
        row: dict[str, Any] = {} if m.at is None else {"at": moment(m.at * 1_000_000_000)}
        row |= m.group
        row |= {"spans": m.spans, "errors": m.errors, "error_rate": m.error_rate}
        row |= {f"latency_{p}_ms": getattr(m.latency_ms, p) for p in ("p50", "p95", "p99")}
        row |= {"tokens_in": m.tokens_in.total, "tokens_out": m.tokens_out.total, "cost_usd": m.cost_usd.total}
        rows.append(row)
    out.rows(rows, list(rows[0]) if rows else ["spans"], empty="no spans match")


@app.command()
async def rebuild(
    stream: Annotated[
        list[str] | None,
        typer.Option("--stream", metavar="STREAM", help="The stores' streams. Repeatable; default trace."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also where spans are lost that the stream has no more.")
    ] = False,
    prices: PricesOption = "",
    store: StoreOption = "",
) -> None:
    """Make the store anew from its stream: spans, totals and quarantine, all at once or not at all.

    Meanwhile the old answers stand, and a worker on the same store waits. The same stream gives the same answers, byte for
    byte. Alerts keep their state.

    Example:
      mist trace rebuild
    """
    from mist.tools.tokentrace.ingest import Options
    from mist.tools.tokentrace.ingest import rebuild as run_rebuild
    from mist.tools.tokentrace.store import Store

    session = current()
    out = session.out
    options = Options(prices=prices_of(session, prices))
    streams = []
    for name in stream or [session.config.tokentrace.stream]:
        broker, opened = await session.reach(name, create=False)
        streams.append(opened)
    with Store.open(store_of(session, store)) as opened_store:
        done = await drained(
            lambda stop: run_rebuild(
                broker, streams, opened_store, options=options, stop=stop, force=force, on_event=out.warn
            )
        )
        out.item(
            {"store": opened_store.place, "records": done.records, "spans": done.spans, "refused": done.refused,
             "other": done.other, "gaps": done.gaps}
        )  # fmt: skip


@app.command()
def reprice(prices: PricesOption = "", store: StoreOption = "") -> None:
    """Make the costs anew that a price table made, or that were unknown; totals follow. Costs that spans state stay.

    Example:
      mist trace reprice --prices prices.toml
    """
    from mist.tools.tokentrace.store import Store

    session = current()
    table = prices_of(session, prices)
    if table is None:
        raise InvalidArgument("no price table", hint="--prices FILE, or tokentrace.prices in mist.toml")
    with Store.open(store_of(session, store)) as opened:
        changed = opened.reprice(table)
    session.out.item({"changed": changed, "prices": table.version})


@app.command()
def retain(
    age: Annotated[str, typer.Option("--age", metavar="AGE", help="Delete spans that began longer ago, as 30d.")] = "",
    size: Annotated[
        str, typer.Option("--size", metavar="BYTES", help="Delete the oldest above this size, as 10GiB.")
    ] = "",
    dry_run: DryRun = False,
    store: StoreOption = "",
) -> None:
    """Delete old spans from the store now; totals by hour, by day and of everything stay, and so does the stream.

    `mist up` does this by itself with tokentrace.retain and tokentrace.retain_bytes of mist.toml.

    Example:
      mist trace retain --age 30d -y
    """
    from mist.quantities import Duration, Size
    from mist.tools.tokentrace.store import Store

    session = current()
    if not age and not size:
        raise InvalidArgument("neither --age nor --size", hint="for example --age 30d")
    before = time.time_ns() - round(float(Duration(age)) * 1e9) if age else None
    most = int(Size(size)) if size else None
    with Store.open(store_of(session, store)) as opened:
        old = opened.one("SELECT count(*) FROM spans WHERE time_ns < ?", (before,)) if before is not None else None
        what = f"delete {old[0]} spans older than {age}" if old else f"delete the oldest spans above {size}"
        if dry_run:
            session.out.outcome(what, dry_run=True)
            if (old and old[0]) or (most is not None and opened.size_bytes() > most):
                session.fail_with(10)
            return
        session.confirm(what)
        gone = 0
        while deleted := opened.retain(before_ns=before, bytes_max=most):
            gone += deleted
    session.out.item({"deleted": gone})


@app.command()
async def erase(
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; kept for ever, so it names nobody.")],
    trace_id: Annotated[str, typer.Option("--trace", metavar="ID", help="All of one trace.")] = "",
    user: Annotated[str, typer.Option("--user", metavar="NAME", help="All of one user.")] = "",
    tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="All of one tenant.")] = "",
    by: Annotated[
        str, typer.Option("--by", metavar="NAME", help="Who does it; default the user of this machine.")
    ] = "",
    dry_run: DryRun = False,
    stream: StreamOption = "trace",
    store: StoreOption = "",
) -> None:
    """Erase what belongs to one trace, user or tenant: from the stream, its dead letters and the store.

    Two records in the stream `audit` say who, when, why and how many; the value itself is there as a salted digest only.
    After an error or a kill run it again.

    Examples:
      mist trace erase --trace 4bf92f3577b34da6a3ce929d0e0e4736 --reason 'ticket 17' --dry-run
      mist trace erase --user u-4711 --reason 'ticket 18' -y
    """
    import getpass

    import msgspec

    from mist.tools.tokentrace.erase import erase as run_erase
    from mist.tools.tokentrace.erase import find
    from mist.tools.tokentrace.store import Selector, Store

    session = current()
    out = session.out
    selector = Selector(trace_id=trace_id, user=user, tenant=tenant)
    place = store_of(session, store)
    broker, opened = await session.reach(stream)
    found = await find(opened, selector)
    what = (
        f"erase {len(found.sequences):,} records of stream {stream} for good, with their dead letters and stored spans"
    )
    if dry_run:
        out.outcome(what, dry_run=True)
        if found.sequences:
            session.fail_with(10)
        return
    session.confirm(what)
    with contextlib.ExitStack() as stack:
        there = isinstance(place, str) or place.exists()
        stored = stack.enter_context(Store.open(place)) if there else None
        done = await run_erase(
            broker, stream, stored, selector, reason=reason, by=by or getpass.getuser(), on_event=out.note
        )
    if done.behind:
        out.warn("the store has not read the whole stream yet; if a worker runs, erase again when it has")
    if done.damaged:
        out.warn(f"{done.damaged} damaged records could not be looked into")
        session.fail_with(9)
    out.item(msgspec.to_builtins(done))


@app.command()
def alerts(store: StoreOption = "") -> None:
    """How the alert rules stand: state, value, silence.

    Example:
      mist trace alerts
    """
    import msgspec

    from mist.cli.render import moment
    from mist.tools.tokentrace.alerts.control import list_alerts
    from mist.tools.tokentrace.alerts.rules import configured
    from mist.tools.tokentrace.store import Store

    session = current()
    out = session.out
    with Store.read(store_of(session, store)) as opened:
        found = list_alerts(opened, configured(session.config.tokentrace), now_ns=time.time_ns())
    if out.json:
        out.rows([msgspec.to_builtins(s) for s in found], [])
        return
    rows = [
        {
            "name": s.name, "state": s.state, "metric": s.metric, "op": s.op,
            "thresholds": ", ".join(f"{level} {limit:g}" for level, limit in s.thresholds.items()),
            "value": max((g.value for g in s.groups if g.value is not None), default=None),
            "silenced_until": moment(s.silenced_until_ns) if s.silenced_until_ns else "",
        }
        for s in found
    ]  # fmt: skip
    out.rows(rows, ["name", "state", "metric", "op", "thresholds", "value", "silenced_until"], empty="no alert rules")


@app.command()
def silence(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The alert.")],
    duration: Annotated[str, typer.Argument(metavar="AGE", help="How long, as 2h; 0 ends it.")],
    store: StoreOption = "",
) -> None:
    """Hold back an alert's firings for a while; what fires already is still resolved.

    Example:
      mist trace silence slow 2h
    """
    from mist.cli.render import moment
    from mist.quantities import Duration
    from mist.tools.tokentrace.alerts.control import silence as order
    from mist.tools.tokentrace.alerts.rules import configured
    from mist.tools.tokentrace.store import Store

    session = current()
    seconds = float(Duration(duration))
    with Store.open(store_of(session, store)) as opened:
        until = order(opened, configured(session.config.tokentrace), name, seconds, now_ns=time.time_ns())
    session.out.item({"alert": name, "silenced_until": moment(until) if until else None})
