"""`mist count`: how many records, in all or by a key."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Annotated

import typer

from mist.cli.options import FilterOptions, RangeOptions, StreamArg
from mist.cli.records import View
from mist.cli.render import moment
from mist.cli.scan import Bounds, Scan, explain_empty, filter_of
from mist.cli.session import current
from mist.errors import InvalidArgument

KEYS_MAX = 100_000


class By(StrEnum):
    type = "type"
    source = "source"
    subject = "subject"
    hour = "hour"


async def command(
    stream: StreamArg,
    span: RangeOptions,
    wanted: FilterOptions,
    by: Annotated[By | None, typer.Option("--by", help="One count per type, source, subject or hour (UTC).")] = None,
) -> None:
    """Count the records of a stream.

    Examples:
      mist count trace
      mist count trace --since 24h --by hour
      mist count eval --by subject --format csv
    """
    session = current()
    filters, bounds = filter_of(wanted), Bounds(span)
    broker, source = await session.locate(stream)
    info = await source.info()
    checkpoints = broker.checkpoints if broker is not None else None
    counts: Counter[str] = Counter()
    total = 0
    dense = info.records == info.last - info.first + 1
    scan: Scan | None = None
    to = await bounds.to(source, checkpoints, info)
    after = await bounds.after(source, checkpoints, info)
    if filters.everything and by is None and dense and source.name == info.name and broker is not None:
        total = max(0, (info.last if to is None else min(to, info.last)) - max(after, info.first - 1))
    else:
        scan = Scan(session, source, filters, after=after, to=to, from_start=bounds.start is None)
        with session.out.progress("counting", info.last - after) as progress:
            async for page in scan.pages():
                total += len(page)
                if by is not None:
                    counts.update(_key(view, by) for view in page)
                    if len(counts) > KEYS_MAX:
                        raise InvalidArgument(f"--by {by}: more than {KEYS_MAX} different values")
                progress.at(scan.position - after)
    if by is None:
        session.out.value(str(total), {"stream": source.name, "count": total})
    else:
        ordered = sorted(counts.items()) if by is By.hour else sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))
        session.out.rows([{str(by): key, "count": n} for key, n in ordered], [str(by), "count"])
    if total == 0:
        explain_empty(session, source, info, scan, broker.url if broker is not None else "file:")


def _key(view: View, by: By) -> str:
    match by:
        case By.type:
            return view.type or "(foreign)"
        case By.source:
            return view.source or "(foreign)"
        case By.subject:
            return view.record.subject
        case By.hour:
            return moment(view.record.timestamp_ns)[:13] + ":00Z"
