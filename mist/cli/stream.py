"""`mist stream`: what streams there are, what they hold, and their upkeep."""

from __future__ import annotations

from collections import Counter, deque
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer

from mist.broker.base import Stream, StreamConfig, StreamInfo
from mist.broker.clock import SYSTEM
from mist.cli.options import DryRun, FilterOptions, Level, RangeOptions, StreamArg, durability_of
from mist.cli.position import after_of, parse_position
from mist.cli.render import escape, moment, seq
from mist.cli.scan import Bounds, Scan, explain_empty, filter_of
from mist.cli.session import current
from mist.cli.wrap import noun
from mist.errors import (
    AlreadyExists,
    CursorAhead,
    DataLoss,
    InvalidArgument,
    NotFound,
    SequenceExpired,
    Unsupported,
)
from mist.kit.parallel import Pool
from mist.protocol.subject import check_stream, dead_stream
from mist.quantities import Duration

app = noun("Streams of a broker.")
ASK_AT_ONCE = 8
DAMAGED = 8
DIFFERENT = 10
ERASE_MAX = 1_000_000
"""Sequences of one `erase`."""
_SIZES = {"": 1, "b": 1, "k": 1024, "kib": 1024, "kb": 1000, "m": 1024**2, "mib": 1024**2, "mb": 1000**2,
          "g": 1024**3, "gib": 1024**3, "gb": 1000**3, "t": 1024**4, "tib": 1024**4, "tb": 1000**4}  # fmt: skip


class Full(StrEnum):
    drop_oldest = "drop_oldest"
    refuse = "refuse"


def shape(info: StreamInfo) -> dict[str, Any]:
    """The documented JSON shape of a stream."""
    return {
        "name": info.name,
        "incarnation": info.incarnation,
        "first": seq(info.first),
        "last": seq(info.last),
        "records": info.records,
        "bytes": info.bytes,
        "durability": info.durability,
        "capabilities": msgspec.to_builtins(info.capabilities),
        "config": msgspec.to_builtins(info.config),
        "created_ns": info.created_ns,
        "size_bytes_max": info.size_bytes_max,
        "warnings": list(info.warnings),
        **_spool(info),
    }


def _spool(info: StreamInfo) -> dict[str, Any]:
    """What the stream of a spool says more."""
    from mist.log.spool import SpoolInfo

    if not isinstance(info, SpoolInfo):
        return {}
    return {"destination": info.destination, "spool": msgspec.to_builtins(info.figures)}


@app.command("ls")
async def ls() -> None:
    """List the streams.

    Examples:
      mist stream ls
      mist -u log:./data stream ls --format json
    """
    session = current()
    broker = await session.connect()

    async def row(name: str) -> dict[str, Any] | None:
        try:
            return shape(await (await broker.open(name, create=False)).info())
        except NotFound:
            return None  # deleted between the two questions

    found = await Pool(ASK_AT_ONCE).map(row, await broker.streams())
    session.out.rows(
        [row for row in found if row is not None],
        ["name", "records", "first", "last", "bytes", "durability"],
        empty=f"no streams in {broker.url}",
    )


@app.command("info")
async def info(stream: StreamArg) -> None:
    """Show what a stream is and holds.

    JSON: {"name","incarnation","first","last","records","bytes","durability","capabilities":{…}}, then config,
    created_ns, size_bytes_max and warnings.

    Examples:
      mist stream info trace
      mist s info trace --format json
    """
    session = current()
    found = await (await session.stream(stream)).info()
    out = session.out
    if out.format != "table":
        out.item(shape(found))
    else:
        config = {k: v for k, v in msgspec.to_builtins(found.config).items() if v not in (None, 0)}
        out.item(
            {
                "name": found.name,
                "incarnation": found.incarnation,
                "records": found.records,
                "first": found.first,
                "last": found.last,
                "bytes": found.bytes,
                "durability": found.durability,
                "created": moment(found.created_ns),
                "capabilities": " ".join(k for k, v in msgspec.to_builtins(found.capabilities).items() if v),
                "config": " ".join(f"{k}={v}" for k, v in config.items()) or "-",
                "record limit": f"{found.size_bytes_max} bytes",
                **{
                    "destination" if k == "destination" else "spool": v if isinstance(v, str) else _pairs(v)
                    for k, v in _spool(found).items()
                },
            }
        )
    for warning in found.warnings:
        out.warn(warning)


def _pairs(values: dict[str, Any]) -> str:
    return " ".join(f"{k}={round(v, 1) if isinstance(v, float) else v}" for k, v in values.items() if k != "stream")


@app.command("create")
async def create(
    stream: StreamArg,
    durability: Annotated[
        Level | None, typer.Option("--durability", help="What an acknowledged record survives.")
    ] = None,
    age_max: Annotated[
        str | None, typer.Option("--age-max", metavar="AGE", help="Drop older records: 7d, 12h.")
    ] = None,
    bytes_max: Annotated[str | None, typer.Option("--bytes-max", metavar="SIZE", help="For example 10GiB.")] = None,
    records_max: Annotated[
        int | None, typer.Option("--records-max", min=0, metavar="N", help="At most N records.")
    ] = None,
    full: Annotated[Full | None, typer.Option("--full", help="What happens above the limits.")] = None,
    dedupe_window: Annotated[str | None, typer.Option("--dedupe-window", metavar="AGE", help="2m if absent.")] = None,
    dedupe_ids_max: Annotated[
        int | None, typer.Option("--dedupe-ids-max", min=0, metavar="N", help="Ids remembered.")
    ] = None,
    if_absent: Annotated[bool, typer.Option("--if-absent", help="Succeed when it exists with these settings.")] = False,
) -> None:
    """Make a stream.

    Examples:
      mist stream create trace
      mist stream create trace --age-max 7d --bytes-max 10GiB --full drop_oldest
      mist stream create scratch --durability process --if-absent
    """
    session = current()
    url, name = session.target(stream)
    check_stream(name)
    config = StreamConfig(
        durability=durability_of(durability),
        age_s_max=float(Duration(age_max)) if age_max is not None else None,
        bytes_max=parse_size(bytes_max) if bytes_max is not None else None,
        records_max=records_max,
        full=None if full is None else "refuse" if full is Full.refuse else "drop_oldest",
        dedupe_window_s=float(Duration(dedupe_window)) if dedupe_window is not None else None,
        dedupe_ids_max=dedupe_ids_max,
    )
    broker = await session.connect(url, create=True)
    if not if_absent and name in await broker.streams():
        raise AlreadyExists(f"stream {name} exists in {broker.url}", hint="--if-absent accepts it")
    made = await broker.open(name, config=config)
    session.out.item(shape(await made.info())) if session.out.format != "table" else session.out.note(
        f"stream {name} is in {broker.url}"
    )


def parse_size(text: str) -> int:
    """`512`, `10GiB`, `1.5M` in bytes. Raises InvalidArgument."""
    digits = text.strip().lower().rstrip("bikmgt")
    unit = text.strip().lower()[len(digits) :]
    try:
        return int(float(digits) * _SIZES[unit])
    except (ValueError, KeyError, OverflowError) as exc:
        raise InvalidArgument(f"not a size: {text[:40]!r}", hint="for example 512, 64MiB, 10G") from exc


@app.command("rm")
async def rm(stream: StreamArg, dry_run: DryRun = False) -> None:
    """Delete a stream with its consumers and cursors. Its dead letters stay.

    Examples:
      mist stream rm scratch --dry-run
      mist stream rm scratch -y
    """
    session = current()
    url, name = session.target(stream)
    broker = await session.connect(url)
    target = await session.stream(stream)
    found = await target.info()
    consumers = await target.consumers() if found.capabilities.consumers else []
    what = f"delete stream {name} with {found.records:,} records and {len(consumers)} consumers"
    if dry_run:
        session.out.outcome(what, dry_run=True)
        session.fail_with(DIFFERENT)
        return
    session.confirm(what)
    await broker.delete(name)
    session.out.outcome(f"deleted stream {name}")
    if dead_stream(name) in await broker.streams():
        session.out.note(f"its dead letters are still in {dead_stream(name)}")


@app.command("purge")
async def purge(
    stream: StreamArg,
    before: Annotated[
        str | None, typer.Option("--before", metavar="POS", help="Only the records before this position.")
    ] = None,
    keep: Annotated[int | None, typer.Option("--keep", min=0, metavar="N", help="All but the last N.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Remove the records of a stream; the stream, its numbering and its consumers stay.

    Examples:
      mist stream purge scratch -y
      mist stream purge trace --before @-7d --dry-run
      mist stream purge trace --keep 100000 -y
    """
    session = current()
    if before is not None and keep is not None:
        raise InvalidArgument("--before and --keep exclude each other")
    broker, target = await session.locate(stream)
    found = await target.info()
    if keep is not None:
        before = f"-{keep}" if keep else "end"
    position = parse_position(before or "end", now_ns=SYSTEM.time_ns())
    bound = await after_of(position, target, broker.checkpoints if broker is not None else None, found) + 1
    doomed = max(0, min(bound, found.last + 1) - found.first)
    if not found.records or not doomed:
        if session.out.format != "table":
            session.out.item({"stream": target.name, "removed": 0, "first": seq(found.first)})
        session.out.note(f"nothing to remove from stream {target.name}")
        return
    what = f"remove up to {min(doomed, found.records):,} records of stream {target.name}, all before {bound}"
    if dry_run:
        session.out.outcome(what, dry_run=True)
        session.fail_with(DIFFERENT)
        return
    session.confirm(what)
    gone = await target.trim(before=bound)
    session.out.note(f"removed {gone:,} records of stream {target.name}")
    if session.out.format != "table":
        session.out.item({"stream": target.name, "removed": gone, "first": seq((await target.info()).first)})


@app.command("erase")
async def erase(
    stream: StreamArg,
    which: Annotated[list[str], typer.Argument(metavar="SEQ|FIRST..LAST...", help="Sequences, and ranges of them.")],
    dry_run: DryRun = False,
) -> None:
    """Erase single records, their bytes too, wherever they lie; everything else stays.

    What that means on each backend is in docs/adr/0014-erasing-records.md. Dead letters and copies are other streams. It
    can be repeated after any error; records that are not there are passed over.

    Examples:
      mist stream erase trace 4711
      mist stream erase trace 17 20..24 --dry-run
      mist stream erase trace--dead 3 -y
    """
    session = current()
    sequences = _sequences(which)
    target = await session.stream(stream)
    if not (await target.info()).capabilities.erase:
        raise Unsupported("erase", session.target(stream)[0].scheme)
    there = await _present(target, sequences)
    what = f"erase {there:,} records of stream {target.name} for good"
    if dry_run:
        session.out.outcome(what, dry_run=True)
        if there:
            session.fail_with(DIFFERENT)
        return
    if there:
        session.confirm(what)
    # also when nothing is there: an erasure that was interrupted is finished by repeating it
    gone = await target.erase(sequences)
    session.out.note(f"erased {gone:,} records of stream {target.name}")
    if session.out.format != "table":
        session.out.item({"stream": target.name, "erased": gone})


def _sequences(which: list[str]) -> list[int]:
    """The sequences of `17` and `20..24`, each once. Raises InvalidArgument."""
    out: set[int] = set()
    for text in which:
        first, dots, last = text.partition("..")
        bounds = [first, last] if dots else [first, first]
        if not all(b.isascii() and b.isdigit() and len(b) < 20 for b in bounds):
            raise InvalidArgument(f"not a sequence: {text[:40]!r}", hint="for example 17, or 20..24")
        low, high = map(int, bounds)
        if high < low:
            raise InvalidArgument(f"{text[:40]} goes backwards", hint=f"{high}..{low}?")
        if len(out) + high - low >= ERASE_MAX:
            raise InvalidArgument(
                f"more than {ERASE_MAX:,} sequences at once", hint="`mist stream purge` takes all up to a position"
            )
        out.update(range(low, high + 1))
    return sorted(out)


async def _present(stream: Stream, sequences: list[int]) -> int:
    """How many of these are there; what cannot be read counts as there."""
    count = 0
    wanted = deque(sequences)
    while wanted:
        after = wanted[0] - 1
        try:
            page = await stream.read(after=max(after, 0), limit=1000)
        except SequenceExpired as exc:
            passed, found = exc.first - 1, set[int]()
        except CursorAhead:
            break
        except DataLoss as exc:
            passed, found = exc.last, set(range(exc.first, exc.last + 1))
        else:
            passed, found = max(page.scanned, after + 1), {r.sequence for r in page.records}
        while wanted and wanted[0] <= passed:
            count += wanted.popleft() in found
    return count


@app.command("subjects")
async def subjects(stream: StreamArg, span: RangeOptions, wanted: FilterOptions) -> None:
    """Count the records of each subject.

    Examples:
      mist stream subjects trace
      mist stream subjects eval --subject 'eval.result.*' --format jsonl
    """
    session = current()
    bounds = Bounds(span)
    broker, source = await session.locate(stream)
    found = await source.info()
    checkpoints = broker.checkpoints if broker is not None else None
    after = await bounds.after(source, checkpoints, found)
    to = await bounds.to(source, checkpoints, found)
    scan = Scan(session, source, filter_of(wanted), after=after, to=to, from_start=bounds.start is None)
    counts: Counter[str] = Counter()
    with session.out.progress("reading", found.last - after) as progress:
        async for page in scan.pages():
            counts.update(v.record.subject for v in page)
            progress.at(scan.position - after)
    rows = [{"subject": s, "records": n} for s, n in sorted(counts.items())]
    session.out.rows(rows, ["subject", "records"])
    if not rows:
        explain_empty(session, source, found, scan, broker.url if broker is not None else "file:")


@app.command("gaps")
async def gaps(stream: StreamArg) -> None:
    """List the sequences that are missing between the first and the last record, and damaged ranges.

    Examples:
      mist stream gaps trace
      mist stream gaps trace --format json
    """
    session = current()
    source = await session.stream(stream)
    found = await source.info()
    rows: list[dict[str, Any]] = []
    expected = after = found.first - 1
    with session.out.progress("reading", found.last - after) as progress:
        while after < found.last:
            try:
                page = await source.read(after=after, limit=10_000)
            except DataLoss as exc:
                rows.append(_gap(exc.first, exc.last, "damaged"))
                after = expected = exc.resume_after
                continue
            for record in page.records:
                if record.sequence > expected + 1:
                    rows.append(_gap(expected + 1, record.sequence - 1, "missing"))
                expected = record.sequence
            if page.scanned <= after:
                break
            after = page.scanned
            progress.at(after - found.first + 1)
    if found.first > 1:
        session.out.detail(f"records 1 to {found.first - 1} were trimmed or expired")
    session.out.rows(rows, ["first", "last", "records", "why"], empty=f"stream {source.name} has no gaps")


def _gap(first: int, last: int, why: str) -> dict[str, Any]:
    return {"first": seq(first), "last": seq(last), "records": last - first + 1, "why": why}


@app.command("verify")
async def verify(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="A stream; all streams if absent.")] = "",
) -> None:
    """Read every stored byte of a stream, or of all. Ends with 8 when something is damaged.

    Examples:
      mist stream verify trace
      mist stream verify --format json
    """
    session = current()
    names = [stream] if stream else await (await session.connect()).streams()
    rows: list[dict[str, Any]] = []
    for name in names:
        source = await session.stream(name)
        capabilities = (await source.info()).capabilities
        if not capabilities.verify:
            raise Unsupported("verify", session.target(name)[0].scheme)
        result = await source.verify()
        damage = [{"first": seq(d.first), "last": seq(d.last), "where": d.where, "why": d.why} for d in result.damage]
        rows.append(
            {
                "stream": source.name,
                "records": result.records,
                "bytes": result.bytes,
                "first": seq(result.first),
                "last": seq(result.last),
                "damage": damage,
                "ok": not damage,
            }
        )
        for d in result.damage:
            session.out.warn(
                f"stream {source.name}: records {d.first} to {d.last}: {escape(d.why)} ({escape(d.where)})"
            )
        if damage:
            session.exit_code = DAMAGED
    if session.out.format == "table":
        rows = [{**r, "damaged ranges": len(r["damage"])} for r in rows]
    if stream and session.out.format in ("json", "jsonl"):
        session.out.item(rows[0])
    else:
        session.out.rows(
            rows, ["stream", "records", "first", "last", "bytes", "damaged ranges", "ok"], empty="no streams"
        )


@app.command("sweep")
async def sweep(
    blobs: Annotated[
        str, typer.Option("--blobs", metavar="DIR", help="Where large payloads lie; for log:DIR it is DIR/blobs.")
    ] = "",
    grace: Annotated[str, typer.Option("--grace", metavar="AGE", help="Leave what is younger; default 1d.")] = "1d",
) -> None:
    """Remove large payloads beside the streams that no record of this broker refers to any more.

    Reads every stream of the broker. All streams that refer to the directory must be on it.

    Examples:
      mist stream sweep
      mist stream sweep -u nats://localhost:4222 --blobs /var/lib/mist/blobs
    """
    from mist.client.blobs import Blobs, beside, sweep_all

    session = current()
    broker = await session.connect()
    where = Blobs(blobs) if blobs else beside(broker)
    if where is None:
        raise InvalidArgument("where do large payloads lie?", hint="name the directory: --blobs DIR")
    done = await sweep_all(broker, where, grace_s=float(Duration(grace)))
    session.out.note(f"removed {done.removed:,} payloads, {done.bytes:,} bytes; {done.young:,} are too young to go")
    if session.out.format != "table":
        session.out.item(msgspec.to_builtins(done))


@app.command("compact")
async def compact(stream: StreamArg) -> None:
    """Rewrite the storage of a stream more densely, where the backend can. Records do not change.

    Examples:
      mist stream compact trace
    """
    session = current()
    source = await session.stream(stream)
    work = getattr(source, "compact", None)
    if work is None:
        scheme = session.target(stream)[0].scheme
        raise Unsupported(
            "compact", scheme, hint="nothing needs to be done: the backend looks after its storage itself"
        )
    before = (await source.info()).bytes
    await work()
    after = (await source.info()).bytes
    session.out.note(f"stream {source.name}: {before:,} bytes before, {after:,} after")
    if session.out.format != "table":
        session.out.item({"stream": source.name, "bytes_before": before, "bytes_after": after})
